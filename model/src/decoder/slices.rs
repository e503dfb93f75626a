//! Parts of matrices, for the shards of a model.

use std::borrow::Cow;
use std::ops::Range;

use plumb_kernels::Element;
use plumb_kernels::fp8::Fp8Rows;
use plumb_kernels::linear::{Matrix, Rows};
use plumb_kernels::quantised::{QuantRows, columns};

/// Part of a matrix, with the bias of its outputs.
#[derive(Clone, Debug)]
pub(super) struct Slice<'a, E: Clone> {
    weights: Weights<'a, E>,
    bias: Option<&'a [f32]>,
}

#[derive(Clone, Debug)]
enum Weights<'a, E: Clone> {
    Plain(Cow<'a, [E]>),
    Quantised(Cow<'a, QuantRows>),
    Fp8(Cow<'a, Fp8Rows>),
}

impl<'a, E: Element> Slice<'a, E> {
    /// The share of a shard in the outputs of matrices on top of one another.
    pub(super) fn outputs(list: &[Matrix<'a, E>], inputs: usize, shard: usize, shards: usize) -> Vec<Self> {
        let total: usize = list.iter().map(|matrix| outputs(matrix, inputs)).sum();
        let wanted = share(total, shard, shards);
        let mut first = 0;
        let slices = list.iter().map(|matrix| {
            let here = first..first + outputs(matrix, inputs);
            first = here.end;
            let range = wanted.start.clamp(here.start, here.end)..wanted.end.clamp(here.start, here.end);
            Self::rows(*matrix, inputs, range.start - here.start..range.end - here.start)
        });
        slices.filter(|slice| !slice.is_empty()).collect()
    }

    /// The share of a shard in the outputs of one.
    pub(super) fn outputs_of(matrix: Matrix<'a, E>, inputs: usize, shard: usize, shards: usize) -> Self {
        Self::rows(matrix, inputs, share(outputs(&matrix, inputs), shard, shards))
    }

    /// The share of a shard in the inputs. The bias is the first shard's: it is added once.
    pub(super) fn inputs(matrix: Matrix<'a, E>, inputs: usize, shard: usize, shards: usize) -> Self {
        let range = share(inputs, shard, shards);
        let weights = match matrix.weights {
            Rows::Plain(rows) if shards == 1 => Weights::Plain(Cow::Borrowed(rows)),
            Rows::Plain(rows) => Weights::Plain(columns(rows, inputs, range).into()),
            Rows::Quantised(rows) if shards == 1 => Weights::Quantised(Cow::Borrowed(rows)),
            Rows::Quantised(rows) if rows.described.are_whole(range.len()) => {
                Weights::Quantised(Cow::Owned(rows.columns(range)))
            }
            // Where a shard ends within a block, there is no factor for what it has of it.
            Rows::Quantised(rows) => Weights::Plain(columns(&rows.expand(), inputs, range).into()),
            Rows::Fp8(rows) if shards == 1 => Weights::Fp8(Cow::Borrowed(rows)),
            Rows::Fp8(rows) => Weights::Fp8(Cow::Owned(rows.columns(range))),
        };
        Self { weights, bias: matrix.bias.filter(|_| shard == 0) }
    }

    fn rows(matrix: Matrix<'a, E>, inputs: usize, range: Range<usize>) -> Self {
        let weights = match matrix.weights {
            Rows::Plain(rows) => Weights::Plain(rows[range.start * inputs..range.end * inputs].into()),
            Rows::Quantised(rows) if range == (0..rows.rows()) => Weights::Quantised(Cow::Borrowed(rows)),
            Rows::Quantised(rows) => Weights::Quantised(Cow::Owned(rows.select(range.clone()))),
            Rows::Fp8(rows) if range == (0..rows.rows()) => Weights::Fp8(Cow::Borrowed(rows)),
            Rows::Fp8(rows) => Weights::Fp8(Cow::Owned(rows.select(range.clone()))),
        };
        Self { weights, bias: matrix.bias.map(|bias| &bias[range]) }
    }

    fn is_empty(&self) -> bool {
        match &self.weights {
            Weights::Plain(rows) => rows.is_empty(),
            Weights::Quantised(rows) => rows.codes.is_empty(),
            Weights::Fp8(rows) => rows.codes.is_empty(),
        }
    }

    pub(super) fn matrix(&self) -> Matrix<'_, E> {
        let weights = match &self.weights {
            Weights::Plain(rows) => Rows::Plain(rows),
            Weights::Quantised(rows) => Rows::Quantised(rows),
            Weights::Fp8(rows) => Rows::Fp8(rows),
        };
        Matrix { weights, bias: self.bias }
    }
}

fn share(len: usize, shard: usize, shards: usize) -> Range<usize> {
    shard * len / shards..(shard + 1) * len / shards
}

fn outputs<E>(matrix: &Matrix<'_, E>, inputs: usize) -> usize {
    match matrix.weights {
        Rows::Plain(rows) => rows.len() / inputs,
        Rows::Quantised(rows) => rows.rows(),
        Rows::Fp8(rows) => rows.rows(),
    }
}
