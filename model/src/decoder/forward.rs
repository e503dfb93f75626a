//! The forward pass.

use std::ops::Range;

use plumb_kernels::Element;
use plumb_kernels::attention::{KvPages, PAGE, Prepare, Rule, Run, Span, Work, attention, padded, prepare};
use plumb_kernels::head::{dot, soft_cap, token_log_probs};
use plumb_kernels::linear::Store;

use super::build::Load;
use super::step::{Read, Step, StepSequence};
use super::{Head, Layer, Stack};
use crate::config::Block;
use crate::{Error, Result};

/// Rows that go through a linear layer together: what lies between two of them stays small and in the cache.
const CHUNK: usize = 384;

/// Buffers of a step, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct Buffers<E> {
    /// The residual stream, `[rows, hidden]`.
    x: Vec<f32>,
    /// Normalised rows of a chunk, `[CHUNK, hidden]`.
    normed: Vec<E>,
    /// q, k and v of a chunk.
    qkv: Vec<f32>,
    /// A branch's result for a chunk before its norm, `[CHUNK, hidden]`.
    branch: Vec<f32>,
    /// The feed-forward's inner rows of a chunk, `[CHUNK, intermediate]`.
    inner: Vec<E>,
    /// `[rows, heads * padded_dim]`.
    q: Vec<E>,
    /// `[rows, heads * head_dim]`.
    attended: Vec<E>,
    /// Input of a parallel feed-forward, `[rows, hidden]`.
    parallel: Vec<E>,
    /// Rows that the head sees, `[reads, hidden]`.
    last: Vec<f32>,
    /// `[reads, vocab_size]`.
    logits: Vec<f32>,
}

impl<E> Buffers<E> {
    pub(super) fn bytes(&self) -> usize {
        let Self { x, normed, qkv, branch, inner, q, attended, parallel, last, logits } = self;
        let elements = [normed, inner, q, attended, parallel].map(Vec::capacity).iter().sum::<usize>();
        let floats = [x, qkv, branch, last, logits].map(Vec::capacity).iter().sum::<usize>();
        elements * size_of::<E>() + floats * size_of::<f32>()
    }
}

impl<E: Load> Stack<E> {
    pub(super) fn step(&self, step: &Step<'_>, kv: &mut KvPages<E>, buffers: &mut Buffers<E>) -> Result<Vec<Vec<f32>>> {
        step.sequences.iter().try_for_each(|sequence| self.check(sequence))?;
        let rows: usize = step.sequences.iter().map(|s| s.tokens.len()).sum();
        if rows == 0 {
            return Ok(Vec::new());
        }
        let runs = runs(step);
        let config = &self.config;
        let work = Work::new(&spans(step), config.num_heads / config.num_kv_heads, config.num_kv_heads);
        self.embed(step, resize(&mut buffers.x, rows * self.config.hidden_size));
        for (i, layer) in self.layers.iter().enumerate() {
            self.attend(i, layer, &runs, &work, kv, buffers);
            self.feed_forward(layer, rows, buffers);
        }
        self.read(step, buffers)
    }

    /// What the kernels would panic on.
    fn check(&self, sequence: &StepSequence<'_>) -> Result<()> {
        let invalid = |message: String| Err(Error::InvalidInput(message));
        let end = sequence.position + sequence.tokens.len();
        if sequence.tokens.is_empty() {
            return invalid("a sequence without tokens".into());
        }
        if end > self.rotary.positions() {
            return Err(Error::TooLong { tokens: end, limit: self.rotary.positions() });
        }
        if end > sequence.pages.len() * PAGE {
            return invalid(format!("{} pages for {end} positions", sequence.pages.len()));
        }
        let targets: &[u32] = match &sequence.read {
            Read::LogProbs { rows, targets } => {
                if rows.end > sequence.tokens.len() || rows.len() != targets.len() {
                    return invalid(format!("{} targets for rows {rows:?}", targets.len()));
                }
                targets
            }
            _ => &[],
        };
        if let Some(id) = sequence.tokens.iter().chain(targets).find(|id| **id as usize >= self.config.vocab_size) {
            return invalid(format!("token {id} is outside the vocabulary of {}", self.config.vocab_size));
        }
        match (&sequence.read, &self.head) {
            (Read::LastReward | Read::Rewards, Head::Language { .. }) => {
                invalid("a language model has no reward head".into())
            }
            (Read::LogProbs { .. } | Read::LastLogits, Head::Reward { .. }) => {
                invalid("a preference model has no vocabulary head".into())
            }
            _ => Ok(()),
        }
    }

    fn embed(&self, step: &Step<'_>, x: &mut [f32]) {
        let hidden = self.config.hidden_size;
        // Transformers holds the scale in the weights' type.
        let scale = E::from_f32(self.config.embedding_scale).to_f32();
        let ids = step.sequences.iter().flat_map(|s| s.tokens);
        for (row, id) in x.chunks_exact_mut(hidden).zip(ids) {
            match (&self.embedding, &self.head) {
                (Some(table), _) => {
                    for (x, e) in row.iter_mut().zip(&table[*id as usize * hidden..]) {
                        *x = e.to_f32();
                    }
                }
                (None, Head::Language { logits, .. }) => logits.row(*id as usize, row),
                // A tied embedding exists only under a language head.
                (None, Head::Reward { .. }) => row.fill(f32::NAN),
            }
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }

    /// `x += [post_norm] output(attention(qkv(norm(x))))`.
    fn attend(
        &self,
        index: usize,
        layer: &Layer<E>,
        runs: &[Run],
        work: &Work<'_>,
        kv: &mut KvPages<E>,
        buffers: &mut Buffers<E>,
    ) {
        let config = &self.config;
        let (hidden, heads, dim) = (config.hidden_size, config.num_heads, config.head_dim);
        let rows = work.rows();
        let how = Prepare {
            heads,
            head_dim: dim,
            q_norm: layer.q_norm.as_ref(),
            k_norm: layer.k_norm.as_ref(),
            rotary: &self.rotary,
        };
        let q_width = heads * padded(dim);
        let q = resize(&mut buffers.q, rows * q_width);
        let mut next_run = 0;
        for chunk in chunks(rows) {
            let normed = resize(&mut buffers.normed, chunk.len() * hidden);
            layer.attention_norm.forward(&buffers.x[chunk.start * hidden..chunk.end * hidden], normed);
            let qkv = resize(&mut buffers.qkv, chunk.len() * layer.qkv.outputs());
            layer.qkv.forward(normed, qkv, Store::Set);
            let first_run = next_run;
            while runs.get(next_run).is_some_and(|run| run.row < chunk.end) {
                next_run += 1;
            }
            let q = &mut q[chunk.start * q_width..chunk.end * q_width];
            prepare(qkv, chunk.start, &runs[first_run..next_run], how, q, kv, index);
        }
        if config.block == Block::Parallel {
            layer.mlp_norm.forward(&buffers.x[..rows * hidden], resize(&mut buffers.parallel, rows * hidden));
        }
        let rule = Rule {
            heads,
            head_dim: dim,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            window: config.windows[index],
        };
        let attended = resize(&mut buffers.attended, rows * heads * dim);
        attention(q, kv, index, work, rule, attended);
        for chunk in chunks(rows) {
            let attended = &attended[chunk.start * heads * dim..chunk.end * heads * dim];
            let x = &mut buffers.x[chunk.start * hidden..chunk.end * hidden];
            add_branch(&layer.output, attended, layer.attention_post_norm.as_ref(), &mut buffers.branch, x);
        }
    }

    /// `x += [post_norm] down(act(up(norm(x))))`.
    fn feed_forward(&self, layer: &Layer<E>, rows: usize, buffers: &mut Buffers<E>) {
        let hidden = self.config.hidden_size;
        for chunk in chunks(rows) {
            let x = &mut buffers.x[chunk.start * hidden..chunk.end * hidden];
            let normed = if self.config.block == Block::Parallel {
                &buffers.parallel[chunk.start * hidden..chunk.end * hidden]
            } else {
                let normed = resize(&mut buffers.normed, chunk.len() * hidden);
                layer.mlp_norm.forward(x, normed);
                normed
            };
            let inner = resize(&mut buffers.inner, chunk.len() * layer.up.outputs());
            layer.up.forward(normed, inner);
            add_branch(&layer.down, inner, layer.mlp_post_norm.as_ref(), &mut buffers.branch, x);
        }
    }

    /// Final norm and head for the rows that somebody asked for, in f32.
    fn read(&self, step: &Step<'_>, buffers: &mut Buffers<E>) -> Result<Vec<Vec<f32>>> {
        let hidden = self.config.hidden_size;
        let mut wanted = Vec::new();
        let mut first = 0;
        for sequence in &step.sequences {
            let rows = sequence.read.rows(sequence.tokens.len());
            wanted.extend(rows.map(|row| first + row));
            first += sequence.tokens.len();
        }
        let mut gathered = Vec::with_capacity(wanted.len() * hidden);
        for row in &wanted {
            gathered.extend_from_slice(&buffers.x[row * hidden..(row + 1) * hidden]);
        }
        let last = resize(&mut buffers.last, gathered.len());
        self.final_norm.forward(&gathered, last);

        match &self.head {
            Head::Reward { weight, bias, normalization } => {
                let mut rewards = last.chunks_exact(hidden).map(|row| {
                    let logit = dot(weight, row) + bias;
                    normalization.map_or(logit, |(mean, std)| (logit - mean) / std)
                });
                let take = |s: &StepSequence<'_>| rewards.by_ref().take(s.read.rows(s.tokens.len()).len()).collect();
                Ok(step.sequences.iter().map(take).collect())
            }
            Head::Language { logits, softcap } => {
                let mut first = 0;
                let mut answers = Vec::with_capacity(step.sequences.len());
                // One pass over the vocabulary for all log-probabilities, one for all logits.
                let mut scored = (Vec::new(), Vec::new());
                let mut sampled = Vec::new();
                for sequence in &step.sequences {
                    let rows = sequence.read.rows(sequence.tokens.len()).len();
                    let rows = &last[first * hidden..(first + rows) * hidden];
                    first += rows.len() / hidden;
                    match &sequence.read {
                        Read::LogProbs { targets, .. } => {
                            scored.0.extend_from_slice(rows);
                            scored.1.extend_from_slice(targets);
                        }
                        Read::LastLogits => sampled.extend_from_slice(rows),
                        _ => {}
                    }
                }
                let mut log_probs = token_log_probs(logits, *softcap, &scored.0, &scored.1).into_iter();
                let all_logits = resize(&mut buffers.logits, sampled.len() / hidden * self.config.vocab_size);
                logits.forward_f32(&sampled, all_logits, Store::Set);
                if let Some(cap) = softcap {
                    soft_cap(all_logits, *cap);
                }
                let mut rows = all_logits.chunks_exact(self.config.vocab_size);
                for sequence in &step.sequences {
                    answers.push(match &sequence.read {
                        Read::LogProbs { targets, .. } => log_probs.by_ref().take(targets.len()).collect(),
                        Read::LastLogits => rows.next().map(<[f32]>::to_vec).unwrap_or_default(),
                        _ => Vec::new(),
                    });
                }
                Ok(answers)
            }
        }
    }
}

/// `x += [norm](linear(input))`.
fn add_branch<E: Element>(
    linear: &plumb_kernels::linear::Linear<E>,
    input: &[E],
    norm: Option<&plumb_kernels::norm::Norm>,
    branch: &mut Vec<f32>,
    x: &mut [f32],
) {
    match norm {
        None => linear.forward(input, x, Store::Add),
        Some(norm) => {
            let branch = resize(branch, x.len());
            linear.forward(input, branch, Store::Set);
            norm.add_to(branch, x);
        }
    }
}

/// The first `len` elements of the buffer, whose values are whatever they were.
fn resize<T: Default + Clone>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(CHUNK).map(move |start| start..(start + CHUNK).min(rows))
}

/// The step's rows cut at pages and chunks.
fn runs(step: &Step<'_>) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut row = 0;
    for sequence in &step.sequences {
        let (mut position, end) = (sequence.position, sequence.position + sequence.tokens.len());
        while position < end {
            let len = (PAGE - position % PAGE).min(end - position).min(CHUNK - row % CHUNK);
            runs.push(Run { row, len, position, page: sequence.pages[position / PAGE] });
            position += len;
            row += len;
        }
    }
    runs
}

fn spans<'a>(step: &Step<'a>) -> Vec<Span<'a>> {
    let mut row = 0;
    step.sequences
        .iter()
        .map(|sequence| {
            let span = Span { row, len: sequence.tokens.len(), position: sequence.position, pages: sequence.pages };
            row += span.len;
            span
        })
        .collect()
}
