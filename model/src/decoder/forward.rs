//! The forward pass.

use std::ops::Range;

use plumb_kernels::Element;
use plumb_kernels::attention::{KvPages, PAGE, Prepare, Rule, Run, Span, Work, attention, padded, prepare};
use plumb_kernels::element::round_all;
use plumb_kernels::head::{dot, soft_cap, token_log_probs, top_log_probs};
use plumb_kernels::linear::{Kept, Linear, Store};
use plumb_kernels::norm::Norm;

use super::build::Load;
use super::step::{Progress, Read, Step, StepSequence};
use super::{Head, Layer, Stack};
use crate::config::Block;
use crate::{Error, Result};

/// Rows that go through a linear layer together: what lies between two of them stays small and in the cache.
pub(super) const CHUNK: usize = 384;

/// Buffers of a step, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct Buffers<E> {
    /// Counts layers.
    pub(super) progress: Progress,
    /// The residual stream, `[rows, hidden]`.
    pub(super) x: Vec<f32>,
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

/// How a step's rows are cut, the same for all layers.
pub(super) struct Cut<'a> {
    runs: Vec<Run>,
    work: Work<'a>,
}

/// What the gradient of a layer needs of its forward pass. A vector may be longer than its rows.
#[derive(Debug, Default)]
pub(super) struct Tape<E> {
    /// The residual stream before the layer, `[rows, hidden]`.
    pub(super) x: Vec<f32>,
    /// The residual stream before the feed-forward, unless that is parallel.
    pub(super) mid: Vec<f32>,
    /// q, k and v before their norms, where there are norms.
    pub(super) qkv: Vec<E>,
    /// `[rows, heads * padded_dim]`.
    pub(super) q: Vec<E>,
    /// `[rows, heads * head_dim]`.
    pub(super) attended: Vec<E>,
    /// The attention's result before its norm, where there is one, `[rows, hidden]`.
    pub(super) attention_branch: Vec<f32>,
    /// What the non-linearity is given, `[rows, intermediate]`.
    pub(super) gate: Vec<E>,
    pub(super) up: Vec<E>,
    /// The feed-forward's result before its norm, where there is one, `[rows, hidden]`.
    pub(super) mlp_branch: Vec<f32>,
}

impl<E> Tape<E> {
    pub(super) fn bytes(&self) -> usize {
        let Self { x, mid, qkv, q, attended, attention_branch, gate, up, mlp_branch } = self;
        let elements = [qkv, q, attended, gate, up].map(Vec::capacity).iter().sum::<usize>();
        let floats = [x, mid, attention_branch, mlp_branch].map(Vec::capacity).iter().sum::<usize>();
        elements * size_of::<E>() + floats * size_of::<f32>()
    }
}

impl<E> Buffers<E> {
    pub(super) fn bytes(&self) -> usize {
        let Self { progress: _, x, normed, qkv, branch, inner, q, attended, parallel, last, logits } = self;
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
        let cut = self.cut(step);
        self.embed(step, resize(&mut buffers.x, rows * self.config.hidden_size));
        for layer in 0..self.layers.len() {
            self.layer(layer, &cut, kv, buffers, None);
            buffers.progress.advance();
        }
        self.read(step, buffers)
    }

    /// How the step's rows are cut, the same for all layers.
    pub(super) fn cut<'a>(&self, step: &Step<'a>) -> Cut<'a> {
        let config = &self.config;
        let work = Work::new(&spans(step), config.num_heads / config.num_kv_heads, config.num_kv_heads);
        Cut { runs: runs(step), work }
    }

    /// Runs a layer over the residual stream in `buffers.x`; what its gradient needs is kept where that is asked for.
    pub(super) fn layer(
        &self,
        index: usize,
        cut: &Cut<'_>,
        kv: &mut KvPages<E>,
        buffers: &mut Buffers<E>,
        mut tape: Option<&mut Tape<E>>,
    ) {
        self.attend(index, cut, kv, buffers, tape.as_deref_mut());
        self.feed_forward(&self.layers[index], cut.work.rows(), buffers, tape);
    }

    /// What the kernels would panic on.
    pub(super) fn check(&self, sequence: &StepSequence<'_>) -> Result<()> {
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
            Read::TopLogProbs { rows, count } => {
                if rows.end > sequence.tokens.len() || !(1..=self.config.vocab_size).contains(count) {
                    return invalid(format!("the {count} likeliest tokens for rows {rows:?}"));
                }
                &[]
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
            (Read::LogProbs { .. } | Read::TopLogProbs { .. } | Read::LastLogits, Head::Reward { .. }) => {
                invalid("a preference model has no vocabulary head".into())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn embed(&self, step: &Step<'_>, x: &mut [f32]) {
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
        cut: &Cut<'_>,
        kv: &mut KvPages<E>,
        buffers: &mut Buffers<E>,
        mut tape: Option<&mut Tape<E>>,
    ) {
        let (config, layer) = (&self.config, &self.layers[index]);
        let (hidden, heads, dim) = (config.hidden_size, config.num_heads, config.head_dim);
        let Cut { runs, work } = cut;
        let rows = work.rows();
        let how = self.prepare(index);
        let (width, q_width) = (layer.qkv.outputs(), heads * padded(dim));
        if let Some(tape) = &mut tape {
            resize(&mut tape.x, rows * hidden).copy_from_slice(&buffers.x[..rows * hidden]);
        }
        let q = resize(&mut buffers.q, rows * q_width);
        let mut next_run = 0;
        for chunk in chunks(rows) {
            let normed = resize(&mut buffers.normed, chunk.len() * hidden);
            layer.attention_norm.forward(&buffers.x[chunk.start * hidden..chunk.end * hidden], normed);
            let qkv = resize(&mut buffers.qkv, chunk.len() * width);
            layer.qkv.forward(normed, qkv, Store::Set);
            if let Some(tape) = &mut tape
                && config.qk_norm
            {
                round_all(qkv, &mut resize(&mut tape.qkv, rows * width)[chunk.start * width..chunk.end * width]);
            }
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
        let attended = resize(&mut buffers.attended, rows * heads * dim);
        attention(q, kv, index, work, self.rule(index), attended);
        for chunk in chunks(rows) {
            let attended = &attended[chunk.start * heads * dim..chunk.end * heads * dim];
            let range = chunk.start * hidden..chunk.end * hidden;
            let kept = match (&mut tape, &layer.attention_post_norm) {
                (Some(tape), Some(_)) => Some(&mut resize(&mut tape.attention_branch, rows * hidden)[range.clone()]),
                _ => None,
            };
            let (norm, x) = (layer.attention_post_norm.as_ref(), &mut buffers.x[range]);
            add_branch(&layer.output, attended, norm, &mut buffers.branch, x, kept);
        }
        if let Some(tape) = tape {
            std::mem::swap(&mut tape.q, &mut buffers.q);
            std::mem::swap(&mut tape.attended, &mut buffers.attended);
        }
    }

    /// How q, k and v of a layer are made ready.
    pub(super) fn prepare(&self, layer: usize) -> Prepare<'_> {
        Prepare {
            heads: self.config.num_heads,
            head_dim: self.config.head_dim,
            q_norm: self.layers[layer].q_norm.as_ref(),
            k_norm: self.layers[layer].k_norm.as_ref(),
            rotary: &self.rotary,
        }
    }

    /// What a query of a layer sees.
    pub(super) fn rule(&self, layer: usize) -> Rule {
        Rule {
            heads: self.config.num_heads,
            head_dim: self.config.head_dim,
            scale: self.config.attention_scale,
            softcap: self.config.attention_softcap,
            window: self.config.windows[layer],
        }
    }

    /// `x += [post_norm] down(act(up(norm(x))))`.
    fn feed_forward(&self, layer: &Layer<E>, rows: usize, buffers: &mut Buffers<E>, mut tape: Option<&mut Tape<E>>) {
        let (hidden, outputs) = (self.config.hidden_size, layer.up.outputs());
        let parallel = self.config.block == Block::Parallel;
        if let Some(tape) = &mut tape {
            if !parallel {
                resize(&mut tape.mid, rows * hidden).copy_from_slice(&buffers.x[..rows * hidden]);
            }
            resize(&mut tape.up, rows * outputs);
            resize(&mut tape.gate, if self.config.gated { rows * outputs } else { 0 });
        }
        for chunk in chunks(rows) {
            let x = &mut buffers.x[chunk.start * hidden..chunk.end * hidden];
            let normed = if parallel {
                &buffers.parallel[chunk.start * hidden..chunk.end * hidden]
            } else {
                let normed = resize(&mut buffers.normed, chunk.len() * hidden);
                layer.mlp_norm.forward(x, normed);
                normed
            };
            let inner = resize(&mut buffers.inner, chunk.len() * outputs);
            let kept = chunk.start * outputs..chunk.end * outputs;
            let keep = tape.as_deref_mut().map(|tape| Kept {
                gate: if self.config.gated { &mut tape.gate[kept.clone()] } else { &mut [] },
                up: &mut tape.up[kept],
            });
            layer.up.forward(normed, inner, keep);
            let kept = match (&mut tape, &layer.mlp_post_norm) {
                (Some(tape), Some(_)) => {
                    Some(&mut resize(&mut tape.mlp_branch, rows * hidden)[chunk.start * hidden..chunk.end * hidden])
                }
                _ => None,
            };
            add_branch(&layer.down, inner, layer.mlp_post_norm.as_ref(), &mut buffers.branch, x, kept);
        }
    }

    /// Final norm and head for the rows that somebody asked for, in f32.
    fn read(&self, step: &Step<'_>, buffers: &mut Buffers<E>) -> Result<Vec<Vec<f32>>> {
        let hidden = self.config.hidden_size;
        let mut wanted = Vec::new();
        let (mut first, mut scored_rows) = (0, 0);
        for sequence in &step.sequences {
            let rows = sequence.read.rows(sequence.tokens.len());
            if let Read::LogProbs { .. } = sequence.read {
                scored_rows += rows.len();
            }
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
                // As few passes over the vocabulary as may be: one for many log-probabilities, one for all logits.
                let mut scored = (Vec::with_capacity(scored_rows * hidden), Vec::with_capacity(scored_rows));
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
                let mut log_probs = Vec::with_capacity(scored.1.len());
                for (rows, targets) in scored.0.chunks(ROWS_AT_A_TIME * hidden).zip(scored.1.chunks(ROWS_AT_A_TIME)) {
                    log_probs.extend(token_log_probs(logits, *softcap, rows, targets));
                    buffers.progress.advance();
                }
                let mut log_probs = log_probs.into_iter();
                let all_logits = resize(&mut buffers.logits, sampled.len() / hidden * self.config.vocab_size);
                logits.forward_f32(&sampled, all_logits, Store::Set);
                if let Some(cap) = softcap {
                    soft_cap(all_logits, *cap);
                }
                let mut rows = all_logits.chunks_exact(self.config.vocab_size);
                let mut last_row = 0;
                for sequence in &step.sequences {
                    let first_row = last_row;
                    last_row += sequence.read.rows(sequence.tokens.len()).len();
                    answers.push(match &sequence.read {
                        Read::TopLogProbs { count, .. } => {
                            let rows = &last[first_row * hidden..last_row * hidden];
                            let (ids, log_probs) = top_log_probs(logits, *softcap, rows, *count);
                            let row = |(ids, log_probs): (&[u32], &[f32])| {
                                ids.iter().map(|id| *id as f32).chain(log_probs.iter().copied()).collect::<Vec<_>>()
                            };
                            ids.chunks(*count).zip(log_probs.chunks(*count)).flat_map(row).collect()
                        }
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

/// Rows whose log-probabilities are computed at a time: many, for whom the weights are read once, and not so many that
/// nothing seems to happen meanwhile.
const ROWS_AT_A_TIME: usize = 512;

/// `x += [norm](linear(input))`; what the norm is given is kept where that is asked for.
fn add_branch<E: Element>(
    linear: &Linear<E>,
    input: &[E],
    norm: Option<&Norm>,
    branch: &mut Vec<f32>,
    x: &mut [f32],
    kept: Option<&mut [f32]>,
) {
    match norm {
        None => linear.forward(input, x, Store::Add),
        Some(norm) => {
            let branch = resize(branch, x.len());
            linear.forward(input, branch, Store::Set);
            norm.add_to(branch, x);
            if let Some(kept) = kept {
                kept.copy_from_slice(branch);
            }
        }
    }
}

/// The first `len` elements of the buffer, whose values are whatever they were.
pub(super) fn resize<T: Default + Clone>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        // What is foretold has no room for more.
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

pub(super) fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
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

pub(super) fn spans<'a>(step: &Step<'a>) -> Vec<Span<'a>> {
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
