//! Drawing tokens where the logits are.

use bytemuck::{Pod, Zeroable};

use super::driver::Argument::{Address, U32};
use super::{Buffer, Gpu, GpuError, Result, View};
use crate::sample::{Draw, Drawn, Terms, TokenSet, Undrawn};

/// Threads that draw a token; `THREADS` in `cuda/sample.cu`.
const THREADS: usize = 1024;

/// As in `cuda/sample.cu`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Outcome {
    sum: u64,
    logit: f32,
    largest: f32,
    token: u32,
    status: u32,
}

impl Outcome {
    fn drawn(self) -> Result<Result<Drawn, Undrawn>> {
        match self.status {
            0 => Ok(Ok(Drawn::new(self.token, self.logit, self.largest, self.sum))),
            1 => Ok(Err(Undrawn::NotFinite)),
            2 => Ok(Err(Undrawn::AllExcluded)),
            status => Err(GpuError::Failed(format!("draw_tokens: {status} is no outcome"))),
        }
    }
}

/// What it takes to draw tokens; kept from one step to the next.
#[derive(Debug)]
pub struct Sampler {
    gpu: Gpu,
    terms: Buffer<Terms>,
    /// Words of the sets that the draws name.
    sets: Buffer<u32>,
    outcomes: Buffer<Outcome>,
}

impl Sampler {
    /// Takes no memory yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), terms: gpu.empty(), sets: gpu.empty(), outcomes: gpu.empty() }
    }

    /// Bytes that it takes now.
    pub fn bytes(&self) -> usize {
        let Self { gpu: _, terms, sets, outcomes } = self;
        terms.bytes() + sets.bytes() + outcomes.bytes()
    }

    /// Bytes that it takes at most for so many draws at a time.
    pub fn most_bytes(draws: usize, vocabulary: usize) -> usize {
        let sets = 2 * TokenSet::new(vocabulary).words().len() * size_of::<u32>();
        draws.saturating_mul(size_of::<Terms>() + size_of::<Outcome>() + sets)
    }

    /// Draws tokens from `logits[_, vocabulary]`, each from its row, as [`crate::sample::draw`] does.
    ///
    /// # Errors
    /// If the GPU refuses.
    ///
    /// # Panics
    /// If lengths do not fit, or a draw does not fit the vocabulary.
    pub fn draw(
        &mut self,
        logits: View<'_, f32>,
        vocabulary: usize,
        draws: &[Draw<'_>],
    ) -> Result<Vec<Result<Drawn, Undrawn>>> {
        let rows = logits.len.checked_div(vocabulary).unwrap_or(0);
        assert!(draws.iter().all(|draw| draw.row < rows), "draws from {rows} rows");
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let mut sets = Vec::new();
        let mut place = |set: Option<&TokenSet>| {
            let first = sets.len() as u32;
            set.map_or(Terms::NO_SET, |set| {
                sets.extend_from_slice(set.words());
                first
            })
        };
        let terms = |draw: &Draw<'_>| {
            let mut terms = Terms::new(draw, vocabulary);
            (terms.penalised, terms.excluded) = (place(draw.penalised), place(draw.excluded));
            terms
        };
        let terms: Vec<Terms> = draws.iter().map(terms).collect();
        self.terms.grow(terms.len())?;
        self.terms.write(0, &terms)?;
        self.sets.grow(sets.len())?;
        self.sets.write(0, &sets)?;
        self.outcomes.grow(terms.len())?;
        let arguments = [
            Address(logits.address),
            U32(vocabulary as u32),
            Address(self.terms.all().address),
            Address(self.sets.all().address),
            Address(self.outcomes.all_mut().address),
        ];
        // SAFETY: as in `cuda/sample.cu`. Rows are inside, and sets are of this vocabulary.
        unsafe { self.gpu.launch("draw_tokens", [terms.len(), 1, 1], THREADS, 0, &arguments)? };
        let mut outcomes = vec![Outcome::zeroed(); terms.len()];
        self.outcomes.read(0, &mut outcomes)?;
        outcomes.into_iter().map(Outcome::drawn).collect()
    }
}
