//! What a slice costs.

use std::ops::Range;

use plumb_model::config::Config;

/// Attention runs at about two thirds of the linear layers' speed: on tiles of a few dozen rows, with a soft-max between.
const ATTENTION_SPEED: (usize, usize) = (2, 3);

/// The unit is a token without context: what its linear layers cost. Attention adds to that with every key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Keys whose attention costs as much as the linear layers of a token.
    pub keys_per_unit: usize,
    /// Most keys that a token attends to, where all layers have a sliding window.
    pub window: Option<usize>,
}

impl Cost {
    /// Of a model.
    pub fn of(config: &Config) -> Self {
        let (hidden, heads) = (config.hidden_size, config.num_heads * config.head_dim);
        let projections = 2 * heads + 2 * config.num_kv_heads * config.head_dim;
        let inner = config.intermediate_size * if config.gated { 3 } else { 2 };
        // Multiply-adds of a layer, and of a key in it.
        let (linear, key) = (hidden * (projections + inner), 2 * heads);
        let windows: Option<Vec<usize>> = config.windows.iter().copied().collect();
        Self {
            keys_per_unit: (linear * ATTENTION_SPEED.0 / (key * ATTENTION_SPEED.1).max(1)).max(1),
            window: windows.and_then(|windows| windows.into_iter().max()),
        }
    }

    /// Of the tokens at these positions.
    pub fn slice(self, positions: Range<usize>) -> usize {
        let keys = self.keys_before(positions.end) - self.keys_before(positions.start);
        positions.len() + keys / self.keys_per_unit
    }

    /// Keys that all tokens before a position attend to, in sum.
    fn keys_before(self, position: usize) -> usize {
        let growing = self.window.map_or(position, |window| position.min(window));
        growing * (growing + 1) / 2 + (position - growing) * growing
    }

    /// How many of the tokens at `positions` can be had for `budget`.
    pub fn affordable(self, positions: Range<usize>, budget: usize) -> usize {
        let (mut most, mut too_many) = (0, positions.len() + 1);
        while too_many - most > 1 {
            let len = most.midpoint(too_many);
            match self.slice(positions.start..positions.start + len) <= budget {
                true => most = len,
                false => too_many = len,
            }
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_quadratic_up_to_the_window() {
        let cost = Cost { keys_per_unit: 100, window: None };
        assert_eq!(cost.slice(0..100), 100 + 50);
        assert_eq!(cost.slice(0..200), 200 + 201);
        // Cached tokens cost nothing but the keys that later ones look at.
        assert_eq!(cost.slice(1000..1001), 1 + 10);
        let local = Cost { window: Some(50), ..cost };
        assert_eq!(local.slice(1000..1100), 100 + 50);
        assert_eq!(local.slice(0..50), 50 + 12);
    }

    #[test]
    fn affordable_is_the_longest_slice_under_the_budget() {
        let cost = Cost { keys_per_unit: 100, window: None };
        for (start, budget) in [(0, 0), (0, 1), (0, 151), (0, 150), (900, 300), (5000, 40)] {
            let len = cost.affordable(start..start + 1000, budget);
            assert!(cost.slice(start..start + len) <= budget, "{start} {budget}");
            assert!(len == 1000 || cost.slice(start..start + len + 1) > budget, "{start} {budget}");
        }
        assert_eq!(cost.affordable(0..10, 1000), 10);
    }
}
