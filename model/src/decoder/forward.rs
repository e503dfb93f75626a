//! The forward pass.

use std::ops::Range;

use plumb_kernels::Element;
use plumb_kernels::attention::{PAGE, Rule, Run, Span};
use plumb_kernels::sample::{Draw, Drawn, Undrawn};

use super::backend::{Backend, Embedding, Floats, How, Stream, TapeMut, Vocabulary};
use super::step::{Answer, Asked, Progress, Read, Step, StepSequence};
use super::{Head, Layer, Stack};
use crate::config::Block;
use crate::{Error, Result};

/// Buffers of a step, kept from one to the next.
#[derive(Debug)]
pub(super) struct Buffers<B: Backend> {
    /// Counts layers.
    pub(super) progress: Progress,
    /// The residual stream, `[rows, hidden]`.
    pub(super) x: B::Array<f32>,
    /// Normalised rows of a chunk, `[CHUNK, hidden]`.
    normed: B::Array<B::Element>,
    /// q, k and v of a chunk.
    qkv: B::Array<B::Sum>,
    /// A branch's result for a chunk before its norm, `[CHUNK, hidden]`.
    branch: B::Array<f32>,
    /// The feed-forward's inner rows of a chunk, `[CHUNK, intermediate]`.
    inner: B::Array<B::Element>,
    /// `[rows, heads * padded_dim]`.
    q: B::Array<B::Element>,
    /// `[rows, heads * head_dim]`.
    attended: B::Array<B::Element>,
    /// Input of a parallel feed-forward, `[rows, hidden]`.
    parallel: B::Array<B::Element>,
    pub(super) scratch: B::Scratch,
    /// Of the last step.
    used: Option<B::Used>,
    /// Rows of logits to draw from that the last step has left, one of the model whose number it is.
    drawable: (u64, usize),
    /// Of the model whose number it is.
    graphs: (u64, B::Graphs),
}

impl<B: Backend> Buffers<B> {
    pub(super) fn new(backend: &B) -> Self {
        Self {
            progress: Progress::default(),
            x: backend.array(),
            normed: backend.array(),
            qkv: backend.array(),
            branch: backend.array(),
            inner: backend.array(),
            q: backend.array(),
            attended: backend.array(),
            parallel: backend.array(),
            scratch: backend.scratch(),
            used: None,
            drawable: (0, 0),
            graphs: Default::default(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let Self {
            progress: _,
            x,
            normed,
            qkv,
            branch,
            inner,
            q,
            attended,
            parallel,
            scratch,
            used: _,
            drawable: _,
            graphs: _,
        } = self;
        let elements = [normed, inner, q, attended, parallel].map(B::bytes).iter().sum::<usize>();
        elements + B::bytes(x) + B::bytes(qkv) + B::bytes(branch) + B::scratch_bytes(scratch)
    }
}

impl<B: Backend> Stack<B> {
    pub(super) fn ask(&self, step: &Step<'_>, kv: &mut B::KvPages, buffers: &mut Buffers<B>) -> Result<Asked> {
        step.sequences.iter().try_for_each(|sequence| self.check(sequence))?;
        buffers.drawable = (self.number, 0);
        if step.sequences.is_empty() {
            return Ok(Asked { floats: Floats::There(Vec::new()), normalization: None, answers: Vec::new() });
        }
        let cut = self.backend.cut(&self.config, step, buffers.used.take())?;
        self.embed(step, B::rows(&cut), buffers)?;
        let (of, mut graphs) = std::mem::take(&mut buffers.graphs);
        if of != self.number {
            graphs = B::Graphs::default();
        }
        let ran = self.backend.layers(B::shape(&cut, kv), &mut graphs, &mut || {
            (0..self.layers.len()).try_for_each(|layer| {
                self.layer(layer, &cut, kv, buffers, None)?;
                buffers.progress.advance();
                Ok(())
            })
        });
        buffers.graphs = (self.number, graphs);
        ran?;
        // Where they ran as they had before, none of them has counted itself.
        buffers.progress.advance();
        buffers.used = Some(B::used(cut));
        self.read(step, buffers)
    }

    /// Runs a layer over the residual stream in `buffers.x`; what its gradient needs is kept where that is asked for.
    pub(super) fn layer(
        &self,
        index: usize,
        cut: &B::Cut<'_>,
        kv: &mut B::KvPages,
        buffers: &mut Buffers<B>,
        mut tape: TapeMut<'_, B>,
    ) -> Result<()> {
        self.attend(index, cut, kv, buffers, tape.as_deref_mut())?;
        self.feed_forward(&self.layers[index], B::rows(cut), buffers, tape)
    }

    /// What the kernels would panic on.
    pub(super) fn check(&self, sequence: &StepSequence<'_>) -> Result<()> {
        let invalid = |message: String| Err(Error::InvalidInput(message));
        let end = sequence.position + sequence.tokens.len();
        if sequence.tokens.is_empty() {
            return invalid("a sequence without tokens".into());
        }
        if end > self.positions {
            return Err(Error::TooLong { tokens: end, limit: self.positions });
        }
        if end > sequence.pages.len() * PAGE {
            return invalid(format!("{} pages for {end} positions", sequence.pages.len()));
        }
        let targets: &[u32] = match &sequence.read {
            Read::LogProbs { rows, targets } | Read::GreedyLogProbs { rows, targets } => {
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
            (Read::Nothing | Read::LastReward | Read::Rewards, _) | (_, Head::Language { .. }) => Ok(()),
            (_, Head::Reward { .. }) => invalid("a preference model has no vocabulary head".into()),
        }
    }

    /// Fills the residual stream with the tokens' rows, and those that are of no token with any.
    pub(super) fn embed(&self, step: &Step<'_>, rows: usize, buffers: &mut Buffers<B>) -> Result<()> {
        let hidden = self.config.hidden_size;
        let mut ids: Vec<u32> = step.sequences.iter().flat_map(|s| s.tokens).copied().collect();
        ids.resize(rows, 0);
        let table = match (&self.embedding, &self.head) {
            (Some(table), _) => Embedding::Table(table),
            (None, Head::Language { logits, .. }) => Embedding::Head(logits),
            (None, Head::Reward { .. }) => return Err(Error::InvalidInput("the model has no embedding".into())),
        };
        // Transformers holds the scale in the weights' type.
        let scale = B::Element::from_f32(self.config.embedding_scale).to_f32();
        let x = self.backend.resize(&mut buffers.x, ids.len() * hidden)?;
        self.backend.embed(table, &ids, scale, hidden, x, &mut buffers.scratch)
    }

    /// `x += [post_norm] output(attention(qkv(norm(x))))`.
    fn attend(
        &self,
        index: usize,
        cut: &B::Cut<'_>,
        kv: &mut B::KvPages,
        buffers: &mut Buffers<B>,
        mut tape: TapeMut<'_, B>,
    ) -> Result<()> {
        let (config, layer, backend) = (&self.config, &self.layers[index], &self.backend);
        let (hidden, heads, dim) = (config.hidden_size, config.num_heads, config.head_dim);
        let rows = B::rows(cut);
        let (width, q_width) = ((heads + 2 * config.num_kv_heads) * dim, B::q_width(config));
        if let Some(tape) = &mut tape {
            tape.keep_input(B::part(&buffers.x, 0..rows * hidden))?;
        }
        backend.resize(&mut buffers.q, rows * q_width)?;
        for chunk in chunks(rows, B::CHUNK) {
            let normed = backend.resize(&mut buffers.normed, chunk.len() * hidden)?;
            backend.normed(&layer.attention_norm, B::part(&buffers.x, of(&chunk, hidden)), normed)?;
            let normed = B::part(&buffers.normed, 0..chunk.len() * hidden);
            let qkv = backend.resize(&mut buffers.qkv, chunk.len() * width)?;
            backend.multiply(&layer.qkv, normed, qkv)?;
            let qkv = B::part(&buffers.qkv, 0..chunk.len() * width);
            if let Some(tape) = &mut tape
                && config.qk_norm
            {
                tape.keep_qkv(qkv, chunk.clone(), rows)?;
            }
            let q = B::part_mut(&mut buffers.q, of(&chunk, q_width));
            backend.prepare(qkv, cut, chunk, self.how(index), q, kv, index)?;
        }
        if config.block == Block::Parallel {
            let parallel = backend.resize(&mut buffers.parallel, rows * hidden)?;
            backend.normed(&layer.mlp_norm, B::part(&buffers.x, 0..rows * hidden), parallel)?;
        }
        let attended = backend.resize(&mut buffers.attended, rows * heads * dim)?;
        let q = B::part(&buffers.q, 0..rows * q_width);
        let log_sums = match &mut tape {
            Some(tape) => tape.log_sums(rows * heads)?,
            None => None,
        };
        backend.attention(q, kv, index, cut, self.rule(index), attended, log_sums, &mut buffers.scratch)?;
        for chunk in chunks(rows, B::CHUNK) {
            let attended = B::part(&buffers.attended, of(&chunk, heads * dim));
            let x = B::part_mut(&mut buffers.x, of(&chunk, hidden));
            let norm = layer.attention_post_norm.as_ref();
            self.add_branch(&layer.output, attended, norm, &mut buffers.branch, x, chunk.len())?;
            if let (Some(tape), Some(_)) = (&mut tape, norm) {
                tape.keep_attention_branch(B::part(&buffers.branch, 0..chunk.len() * hidden), chunk, rows)?;
            }
        }
        if let Some(tape) = tape {
            tape.keep_attention(&mut buffers.q, &mut buffers.attended);
        }
        Ok(())
    }

    /// `x += [norm](linear(input))`; what the norm is given is then in `branch`.
    fn add_branch(
        &self,
        linear: &B::Linear,
        input: B::Part<'_, B::Element>,
        norm: Option<&B::Norm>,
        branch: &mut B::Array<f32>,
        x: B::PartMut<'_, f32>,
        rows: usize,
    ) -> Result<()> {
        match norm {
            None => self.backend.add(linear, input, x),
            Some(norm) => {
                let len = rows * self.config.hidden_size;
                self.backend.project(linear, input, self.backend.resize(branch, len)?)?;
                self.backend.add_normed(norm, B::part(branch, 0..len), x)
            }
        }
    }

    /// How q, k and v of a layer are made ready.
    pub(super) fn how(&self, layer: usize) -> How<'_, B> {
        How {
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
    fn feed_forward(
        &self,
        layer: &Layer<B>,
        rows: usize,
        buffers: &mut Buffers<B>,
        mut tape: TapeMut<'_, B>,
    ) -> Result<()> {
        let backend = &self.backend;
        let (hidden, width) = (self.config.hidden_size, self.config.intermediate_size);
        let parallel = self.config.block == Block::Parallel;
        if let Some(tape) = &mut tape
            && !parallel
        {
            tape.keep_middle(B::part(&buffers.x, 0..rows * hidden))?;
        }
        for chunk in chunks(rows, B::CHUNK) {
            let normed = if parallel {
                B::part(&buffers.parallel, of(&chunk, hidden))
            } else {
                let normed = backend.resize(&mut buffers.normed, chunk.len() * hidden)?;
                backend.normed(&layer.mlp_norm, B::part(&buffers.x, of(&chunk, hidden)), normed)?;
                B::part(&buffers.normed, 0..chunk.len() * hidden)
            };
            let inner = backend.resize(&mut buffers.inner, chunk.len() * width)?;
            let gated = self.config.gated;
            let kept = tape.as_deref_mut().map(|tape| tape.kept(chunk.clone(), rows, width, gated)).transpose()?;
            backend.activate(&layer.up, normed, inner, kept, &mut buffers.scratch)?;
            let inner = B::part(&buffers.inner, 0..chunk.len() * width);
            let x = B::part_mut(&mut buffers.x, of(&chunk, hidden));
            let norm = layer.mlp_post_norm.as_ref();
            self.add_branch(&layer.down, inner, norm, &mut buffers.branch, x, chunk.len())?;
            if let (Some(tape), Some(_)) = (&mut tape, norm) {
                tape.keep_mlp_branch(B::part(&buffers.branch, 0..chunk.len() * hidden), chunk, rows)?;
            }
        }
        Ok(())
    }

    /// Final norm and head for the rows that somebody asked for, in f32.
    fn read(&self, step: &Step<'_>, buffers: &mut Buffers<B>) -> Result<Asked> {
        let hidden = self.config.hidden_size;
        let rows: usize = step.sequences.iter().map(|s| s.tokens.len()).sum();
        let (x, scratch) = (B::part(&buffers.x, 0..rows * hidden), &mut buffers.scratch);
        let stream = || Stream { x, width: hidden, norm: &self.final_norm };
        // Rows of the step that a sequence reads.
        let mut first = 0;
        let wanted: Vec<Vec<u32>> = step
            .sequences
            .iter()
            .map(|sequence| {
                let rows = sequence.read.rows(sequence.tokens.len());
                let rows = rows.map(|row| (first + row) as u32).collect();
                first += sequence.tokens.len();
                rows
            })
            .collect();
        let sequences = || step.sequences.iter().zip(&wanted);
        match &self.head {
            Head::Reward { weight, bias, normalization } => {
                let floats = self.backend.rewards(stream(), &wanted.concat(), weight, *bias, scratch)?;
                let answers = wanted.iter().map(|rows| Answer::Next(rows.len())).collect();
                Ok(Asked { floats, normalization: *normalization, answers })
            }
            Head::Language { logits, softcap } => {
                let vocabulary = || Vocabulary { logits, softcap: *softcap, size: self.config.vocab_size };
                // As few passes over the vocabulary as may be: one for many log-probabilities, one for all logits.
                let (mut scored, mut targets) = (Vec::new(), Vec::new());
                let (mut drawn, mut copied) = (Vec::new(), Vec::new());
                for (sequence, rows) in sequences() {
                    match &sequence.read {
                        Read::LogProbs { targets: of_rows, .. } | Read::GreedyLogProbs { targets: of_rows, .. } => {
                            scored.extend_from_slice(rows);
                            targets.extend_from_slice(of_rows);
                        }
                        Read::Draw => drawn.extend_from_slice(rows),
                        Read::LastLogits => copied.extend_from_slice(rows),
                        _ => {}
                    }
                }
                let floats =
                    self.backend.log_probs(stream(), &scored, vocabulary(), &targets, scratch, &buffers.progress)?;
                let drawable = drawn.len();
                drawn.extend_from_slice(&copied);
                self.backend.logits(stream(), &drawn, vocabulary(), scratch)?;
                let copied = B::copy_logits(scratch, drawable..drawn.len(), self.config.vocab_size)?;
                buffers.drawable.1 = drawable;
                let mut copied = copied.into_iter();
                let answers = sequences()
                    .map(|(sequence, rows)| {
                        Ok(match &sequence.read {
                            Read::TopLogProbs { count, .. } => {
                                let (ids, log_probs) =
                                    self.backend.top_log_probs(stream(), rows, vocabulary(), *count, scratch)?;
                                let row = |(ids, log_probs): (&[u32], &[f32])| {
                                    let ids = ids.iter().map(|id| *id as f32);
                                    ids.chain(log_probs.iter().copied()).collect::<Vec<_>>()
                                };
                                Answer::There(ids.chunks(*count).zip(log_probs.chunks(*count)).flat_map(row).collect())
                            }
                            Read::LogProbs { targets, .. } => Answer::NextFirsts(targets.len()),
                            Read::GreedyLogProbs { targets, .. } => Answer::Next(2 * targets.len()),
                            Read::LastLogits => Answer::There(copied.next().unwrap_or_default()),
                            _ => Answer::Next(0),
                        })
                    })
                    .collect::<Result<_>>()?;
                Ok(Asked { floats, normalization: None, answers })
            }
        }
    }

    /// Draws tokens after the sequences of the last step that asked for it, counted from 0 on.
    pub(super) fn draw(&self, draws: &[Draw<'_>], buffers: &mut Buffers<B>) -> Result<Vec<Result<Drawn, Undrawn>>> {
        let vocabulary = self.config.vocab_size;
        let (of, rows) = buffers.drawable;
        let rows = if of == self.number { rows } else { 0 };
        if let Some(draw) = draws.iter().find(|draw| draw.row >= rows || !draw.fits(vocabulary)) {
            return Err(Error::InvalidInput(format!("{draw:?} from {rows} rows of {vocabulary} tokens")));
        }
        let drawn = self.backend.draw(vocabulary, draws, &mut buffers.scratch)?;
        buffers.progress.advance();
        Ok(drawn)
    }
}

/// Where rows of this width lie.
pub(super) fn of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

pub(super) fn chunks(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(most).map(move |start| start..(start + most).min(rows))
}

/// The step's rows cut at pages, and after every `most` rows.
pub(super) fn runs(step: &Step<'_>, most: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut row = 0;
    for sequence in &step.sequences {
        let (mut position, end) = (sequence.position, sequence.position + sequence.tokens.len());
        while position < end {
            let len = (PAGE - position % PAGE).min(end - position).min(most - row % most);
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
