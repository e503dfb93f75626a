//! What the way back through a layer needs of the way there.

use std::ops::Range;

use super::super::backend::{Number, Tape};
use super::backend::Gradients;
use crate::Result;

/// What a layer leaves. An array may be longer than its rows.
#[derive(Debug)]
pub(super) struct Kepts<B: Gradients> {
    backend: B,
    /// The residual stream before the layer, `[rows, hidden]`.
    pub(super) x: B::Array<f32>,
    /// The residual stream before the feed-forward, unless that is parallel.
    pub(super) mid: B::Array<f32>,
    /// q, k and v before their norms, where there are norms.
    pub(super) qkv: B::Array<B::Element>,
    /// `[rows, heads * padded_dim]`.
    pub(super) q: B::Array<B::Element>,
    /// `[rows, heads * head_dim]`.
    pub(super) attended: B::Array<B::Element>,
    /// Of attention's sums, `[rows, heads]`, where the way back asks for them.
    pub(super) log_sums: B::Array<f32>,
    /// The attention's result before its norm, where there is one, `[rows, hidden]`.
    pub(super) attention_branch: B::Array<f32>,
    /// What the non-linearity is given, of `[rows, intermediate]`.
    pub(super) activations: B::Activations,
    /// The feed-forward's result before its norm, where there is one, `[rows, hidden]`.
    pub(super) mlp_branch: B::Array<f32>,
}

impl<B: Gradients> Kepts<B> {
    pub(super) fn new(backend: &B) -> Self {
        Self {
            backend: backend.clone(),
            x: backend.array(),
            mid: backend.array(),
            qkv: backend.array(),
            q: backend.array(),
            attended: backend.array(),
            log_sums: backend.array(),
            attention_branch: backend.array(),
            activations: backend.activations(),
            mlp_branch: backend.array(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let Self { backend: _, x, mid, qkv, q, attended, log_sums, attention_branch, activations, mlp_branch } = self;
        let elements = [qkv, q, attended].map(B::bytes).iter().sum::<usize>();
        let floats = [x, mid, log_sums, attention_branch, mlp_branch].map(B::bytes).iter().sum::<usize>();
        elements + floats + B::activations_bytes(activations)
    }
}

/// These rows of an array that will have `total`; they have `len` elements.
fn rows_of<'a, B: Gradients, T: Number>(
    backend: &B,
    array: &'a mut B::Array<T>,
    len: usize,
    rows: Range<usize>,
    total: usize,
) -> Result<B::PartMut<'a, T>> {
    let width = len / rows.len().max(1);
    backend.resize(array, total * width)?;
    Ok(B::part_mut(array, rows.start * width..rows.start * width + len))
}

/// All of the rows.
fn keep<B: Gradients>(backend: &B, array: &mut B::Array<f32>, x: B::Part<'_, f32>) -> Result<()> {
    let to = backend.resize(array, B::len(x))?;
    backend.copy(x, to)
}

impl<B: Gradients> Tape<B> for Kepts<B> {
    fn keep_input(&mut self, x: B::Part<'_, f32>) -> Result<()> {
        keep(&self.backend, &mut self.x, x)
    }

    fn keep_qkv(&mut self, qkv: B::Part<'_, B::Sum>, rows: Range<usize>, total: usize) -> Result<()> {
        let to = rows_of(&self.backend, &mut self.qkv, B::len(qkv), rows, total)?;
        self.backend.round_sums(qkv, to)
    }

    fn log_sums(&mut self, len: usize) -> Result<Option<B::PartMut<'_, f32>>> {
        if !B::LOG_SUMS {
            return Ok(None);
        }
        self.backend.resize(&mut self.log_sums, len).map(Some)
    }

    fn keep_attention(&mut self, q: &mut B::Array<B::Element>, attended: &mut B::Array<B::Element>) {
        std::mem::swap(&mut self.q, q);
        std::mem::swap(&mut self.attended, attended);
    }

    fn keep_attention_branch(&mut self, branch: B::Part<'_, f32>, rows: Range<usize>, total: usize) -> Result<()> {
        let to = rows_of(&self.backend, &mut self.attention_branch, B::len(branch), rows, total)?;
        self.backend.copy(branch, to)
    }

    fn keep_middle(&mut self, x: B::Part<'_, f32>) -> Result<()> {
        keep(&self.backend, &mut self.mid, x)
    }

    fn kept(&mut self, rows: Range<usize>, total: usize, width: usize, gated: bool) -> Result<B::Kept<'_>> {
        self.backend.kept(&mut self.activations, rows, total, width, gated)
    }

    fn keep_mlp_branch(&mut self, branch: B::Part<'_, f32>, rows: Range<usize>, total: usize) -> Result<()> {
        let to = rows_of(&self.backend, &mut self.mlp_branch, B::len(branch), rows, total)?;
        self.backend.copy(branch, to)
    }
}
