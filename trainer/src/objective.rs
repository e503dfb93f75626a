//! What is learned from a batch, and what is measured on it.

use plumb_model::decoder::gradient::{Group, Language, Outcome, Sequence};
use serde::Serialize;

use crate::examples::{Example, Side, Teacher};
use crate::recipe::{Objective, Recipe};
use crate::record::Pair;

/// How the examples of a batch count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights {
    objective: Objective,
    /// Of a pair's preference loss: lambda over the number of pairs.
    pub(crate) pair: f32,
    /// Of a token's loss: mu, or 1, over the number of tokens that count in the batch.
    token: f32,
}

/// Sums over examples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sums {
    pairs: u64,
    /// Pairs whose better side was found better; half of one where both are equal.
    right: f64,
    preference: f64,
    margin: f64,
    language: f64,
    rows: u64,
    /// Tokens of all sequences.
    pub(crate) tokens: u64,
}

/// Means over examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measures {
    /// What is minimised: lambda * preference + mu * language (Askell et al. 2021, equation C.1), or the language loss.
    pub loss: f64,
    /// softplus(r_rejected - r_chosen), equation 3.1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preference_loss: Option<f64>,
    /// Mean negative log-likelihood of the tokens that count, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language_loss: Option<f64>,
    /// Share of pairs whose chosen side is found better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Mean of r_chosen - r_rejected, or of the mean log-likelihoods' difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
}

impl Weights {
    /// Of the examples of a whole batch.
    pub(crate) fn new(recipe: &Recipe, batch: &[&Example]) -> Self {
        let rows: usize = batch.iter().map(|example| learned_rows(recipe.objective, example)).sum();
        let token = match recipe.objective {
            Objective::Preference => recipe.language_weight,
            Objective::Language | Objective::Imitation | Objective::Distillation => 1.0,
        };
        Self {
            objective: recipe.objective,
            pair: recipe.preference_weight / batch.len().max(1) as f32,
            token: token / rows.max(1) as f32,
        }
    }

    /// What the decoder is to compute of an example, for learning.
    pub(crate) fn group<'a>(&self, example: &'a Example) -> Group<'a> {
        let reward = self.objective == Objective::Preference;
        let learned = |side: &'a Side| {
            let rows = rows(self.objective, side);
            let language = match self.token > 0.0 {
                true => Language::Next { rows, weight: self.token },
                false => Language::Nothing,
            };
            Sequence { tokens: &side.tokens, reward, language }
        };
        let sequences = match (example, self.objective) {
            (Example::Text(side), _) => vec![learned(side)],
            (Example::Taught { side, teacher }, _) => {
                let Teacher { first, top, ids, log_probs } = teacher;
                let language = Language::Teacher { first: *first, top: *top, ids, log_probs, weight: self.token };
                vec![Sequence { tokens: &side.tokens, reward: false, language }]
            }
            (Example::Pair { chosen, rejected }, Objective::Preference) => {
                vec![learned(chosen), Sequence { tokens: &rejected.tokens, reward, language: Language::Nothing }]
            }
            (Example::Pair { chosen, .. }, _) => vec![learned(chosen)],
        };
        Group { sequences }
    }

    /// What the decoder is to compute of an example, for measuring: the other side counts too.
    pub(crate) fn measured<'a>(&self, example: &'a Example) -> Group<'a> {
        let mut group = self.group(example);
        if let (Example::Pair { rejected, .. }, false) = (example, self.objective == Objective::Preference) {
            let language = Language::Next { rows: rows(self.objective, rejected), weight: self.token };
            group.sequences.push(Sequence { tokens: &rejected.tokens, reward: false, language });
        }
        group
    }
}

impl Sums {
    /// As numbers that processes exchange; counts below 2^53 stay what they are.
    pub(crate) fn to_numbers(self) -> [f64; 7] {
        let Self { pairs, right, preference, margin, language, rows, tokens } = self;
        [pairs as f64, right, preference, margin, language, rows as f64, tokens as f64]
    }

    /// Adds the sums over other examples, in their order.
    pub(crate) fn add_all(&mut self, others: &[[f64; 7]]) {
        for &[pairs, right, preference, margin, language, rows, tokens] in others {
            self.pairs += pairs as u64;
            self.right += right;
            self.preference += preference;
            self.margin += margin;
            self.language += language;
            self.rows += rows as u64;
            self.tokens += tokens as u64;
        }
    }

    /// Adds examples and what came of their sequences.
    pub(crate) fn add(&mut self, objective: Objective, groups: &[Group<'_>], mut outcomes: &[Outcome]) {
        for group in groups {
            let (own, rest) = outcomes.split_at(group.sequences.len().min(outcomes.len()));
            outcomes = rest;
            self.tokens += group.sequences.iter().map(|sequence| sequence.tokens.len() as u64).sum::<u64>();
            let Some(first) = own.first() else { continue };
            self.language += first.loss;
            self.rows += first.rows as u64;
            let Some(Pair { chosen, rejected }) = scores(objective, own) else { continue };
            let margin = chosen - rejected;
            self.pairs += 1;
            self.margin += margin;
            self.preference += softplus(-margin);
            self.right += if margin > 0.0 {
                1.0
            } else if margin == 0.0 {
                0.5
            } else {
                0.0
            };
        }
    }

    /// Means.
    pub(crate) fn means(&self, recipe: &Recipe) -> Measures {
        let reward = recipe.objective == Objective::Preference;
        let per_pair = |sum: f64| (self.pairs > 0).then(|| sum / self.pairs as f64);
        let language_loss = (self.rows > 0).then(|| self.language / self.rows as f64);
        let preference_loss = per_pair(self.preference).filter(|_| reward);
        let loss = match reward {
            true => {
                f64::from(recipe.preference_weight) * preference_loss.unwrap_or(0.0)
                    + f64::from(recipe.language_weight) * language_loss.unwrap_or(0.0)
            }
            false => language_loss.unwrap_or(0.0),
        };
        let (accuracy, margin) = (per_pair(self.right), per_pair(self.margin));
        Measures { loss, preference_loss, language_loss, accuracy, margin }
    }
}

/// What a pair's margin is the difference of: the sides' rewards, or mean log-likelihoods.
pub(crate) fn scores(objective: Objective, pair: &[Outcome]) -> Option<Pair> {
    let [chosen, rejected, ..] = pair else { return None };
    let mean = |outcome: &Outcome| -outcome.loss / outcome.rows.max(1) as f64;
    Some(match objective {
        Objective::Preference => Pair { chosen: f64::from(chosen.reward), rejected: f64::from(rejected.reward) },
        _ => Pair { chosen: mean(chosen), rejected: mean(rejected) },
    })
}

/// `ln(1 + e^x)` without overflow.
pub(crate) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Rows of an example whose log-probabilities are learned.
fn learned_rows(objective: Objective, example: &Example) -> usize {
    match example {
        Example::Text(side) | Example::Pair { chosen: side, .. } => rows(objective, side).len(),
        Example::Taught { teacher, .. } => teacher.ids.len() / teacher.top,
    }
}

/// Rows whose next token counts: in imitation those of the response, elsewhere all.
fn rows(objective: Objective, side: &Side) -> std::ops::Range<usize> {
    let first = if objective == Objective::Imitation { side.response - 1 } else { 0 };
    first..side.tokens.len() - 1
}
