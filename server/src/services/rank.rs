//! The order of candidates, as pure data.

use plumb_proto::v1;

use crate::error::Error;

/// Candidates with their places, best first. Equal rewards keep the order of the request; those without a score come
/// last, with rank 0.
pub(super) fn order(results: Vec<Result<v1::Score, Error>>) -> Vec<v1::Ranked> {
    let mut scored = Vec::new();
    let mut failed = Vec::new();
    for (index, result) in (0..).zip(results) {
        match result {
            Ok(score) => scored.push((index, score)),
            Err(error) => {
                failed.push(v1::Ranked { index, error: Some(v1::ItemError::from(&error)), ..v1::Ranked::default() });
            }
        }
    }
    // Stable. -0 and 0 are equal rewards, and rewards are finite.
    scored.sort_by(|(_, a), (_, b)| b.reward.partial_cmp(&a.reward).unwrap_or(std::cmp::Ordering::Equal));
    let best = scored.first().map_or(0.0, |(_, score)| score.reward);
    let ranked = (1..).zip(scored).map(|(rank, (index, score))| {
        let margin = score.reward - best;
        v1::Ranked { index, rank, score: Some(score), margin, probability: sigmoid(margin), error: None }
    });
    ranked.chain(failed).collect()
}

/// The probability of being preferred, from a difference of rewards (Askell et al. 2021, eq. 3.1).
fn sigmoid(margin: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(margin)).exp())) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rewards: &[Option<f32>], expected: &[(u32, u32, f32)]) {
        let score = |reward: f32| v1::Score { reward, ..v1::Score::default() };
        let results = rewards.iter().map(|reward| reward.map(score).ok_or(Error::DeadlineExceeded)).collect();
        let found: Vec<_> = order(results).iter().map(|ranked| (ranked.index, ranked.rank, ranked.margin)).collect();
        assert_eq!(found, expected, "{rewards:?}");
    }

    #[test]
    fn the_best_reward_is_first_and_ties_keep_their_order() {
        check(&[Some(1.0), Some(3.0), Some(2.0)], &[(1, 1, 0.0), (2, 2, -1.0), (0, 3, -2.0)]);
        check(&[Some(-1.5), Some(2.5), Some(-1.5)], &[(1, 1, 0.0), (0, 2, -4.0), (2, 3, -4.0)]);
        check(&[Some(0.0), Some(-0.0), Some(0.0)], &[(0, 1, 0.0), (1, 2, 0.0), (2, 3, 0.0)]);
        check(&[None, Some(-7.0), None], &[(1, 1, 0.0), (0, 0, 0.0), (2, 0, 0.0)]);
        check(&[], &[]);
    }

    #[test]
    fn the_probability_is_that_of_beating_the_best() {
        let ranked = order(vec![
            Ok(v1::Score { reward: 0.0, ..v1::Score::default() }),
            Ok(v1::Score { reward: -3f32.ln(), ..v1::Score::default() }),
        ]);
        assert!((ranked[0].probability - 0.5).abs() < 1e-7);
        assert!((ranked[1].probability - 0.25).abs() < 1e-7, "odds of 1 to 3");
        assert!(sigmoid(-1e30) == 0.0);
    }
}
