//! Rotary position embedding: rotates the first and the second half of a head's first `dim` elements by angles that
//! grow with the position.

use crate::simd::vectorised;

/// Cosines and sines for every position of a model's context.
#[derive(Clone, Debug)]
pub struct Rotary {
    dim: usize,
    positions: usize,
    /// `[positions, 2, dim / 2]`: cosines, sines.
    table: Vec<f32>,
}

impl Rotary {
    /// A table for `positions` positions of the given inverse frequencies, `dim / 2` of them, in radians a position.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let mut table = Vec::with_capacity(positions * 2 * inverse_frequencies.len());
        for position in 0..positions {
            // The angle is rounded to f32 before its sine is taken, as the models were trained.
            let angles = || inverse_frequencies.iter().map(|f| f64::from(position as f32 * f));
            table.extend(angles().map(|angle| angle.cos() as f32));
            table.extend(angles().map(|angle| angle.sin() as f32));
        }
        Self { dim: 2 * inverse_frequencies.len(), positions, table }
    }

    /// Elements of a head that are rotated.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// `[positions, dim]`: of each position the cosines of all pairs, then their sines.
    pub fn table(&self) -> &[f32] {
        &self.table
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Rotates one head in place.
    ///
    /// # Panics
    /// If the position is not covered or the head is narrower than the rotated part.
    pub fn apply(&self, position: usize, head: &mut [f32]) {
        let (first, second) = head[..self.dim].split_at_mut(self.dim / 2);
        let (cos, sin) = self.angles(position);
        rotate(first, second, cos, sin);
    }

    /// Rotates one head back in place: what [`Rotary::apply`] does to a gradient.
    ///
    /// # Panics
    /// As [`Rotary::apply`].
    pub fn undo(&self, position: usize, head: &mut [f32]) {
        let (first, second) = head[..self.dim].split_at_mut(self.dim / 2);
        let (cos, sin) = self.angles(position);
        // The other way round, the halves change places.
        rotate(second, first, cos, sin);
    }

    /// Cosines and sines of a position.
    fn angles(&self, position: usize) -> (&[f32], &[f32]) {
        self.table[position * self.dim..(position + 1) * self.dim].split_at(self.dim / 2)
    }
}

vectorised! {
    fn rotate(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32]) {
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotates_pairs_and_leaves_the_rest() {
        let rotary = Rotary::new(&[1.0, 0.5], 4);
        let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
        rotary.apply(2, &mut head);
        let (c1, s1, c2, s2) = (2f32.cos(), 2f32.sin(), 1f32.cos(), 1f32.sin());
        let expected = [c1 - 3.0 * s1, 2.0 * c2 - 4.0 * s2, 3.0 * c1 + s1, 4.0 * c2 + 2.0 * s2, 5.0];
        for (a, b) in head.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
        rotary.undo(2, &mut head);
        assert!(head.iter().zip([1.0, 2.0, 3.0, 4.0, 5.0]).all(|(a, b)| (a - b).abs() < 1e-6), "{head:?}");
        let mut same = [1.0, 2.0, 3.0, 4.0];
        rotary.apply(0, &mut same);
        assert_eq!(same, [1.0, 2.0, 3.0, 4.0]);
    }
}
