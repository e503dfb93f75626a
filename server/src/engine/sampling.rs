//! How the next token is drawn, and whether it is taken.

use plumb_model::decoder::{Draw, Drawn, TokenSet, Undrawn};
use plumb_model::loaded::LoadedModel;

use super::ModelHandle;
use crate::error::{Error, Result};

/// Tokens before the next one that a banned string may begin in.
const BAN_CONTEXT: usize = 48;

/// How tokens are drawn; see `plumb.v1.Sampling`.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 1 is off.
    pub repetition_penalty: f32,
    /// Never produced.
    pub banned_strings: Vec<String>,
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Of the random numbers.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            banned_strings: Vec::new(),
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Refuses what makes no sense, naming the field.
    pub fn check(&self) -> Result<()> {
        let unit = 0.0..=1.0;
        // Both divide or multiply logits, which must stay finite whatever they are.
        let factor = 0.01..=100.0;
        let temperature = 0.001..=1000.0;
        let limits = [
            ("repetition_penalty", factor.contains(&self.repetition_penalty), "from 0.01 to 100"),
            (
                "temperature",
                self.temperature == 0.0 || temperature.contains(&self.temperature),
                "0 or from 0.001 to 1000",
            ),
            ("top_p", self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", unit.contains(&self.min_p), "from 0 to 1"),
            ("banned_strings", self.banned_strings.iter().all(|s| !s.is_empty()), "not empty"),
        ];
        match limits.into_iter().find(|(_, holds, _)| !holds) {
            Some((field, _, allowed)) => Err(Error::invalid(format!("sampling.{field}"), format!("must be {allowed}"))),
            None => Ok(()),
        }
    }
}

/// Asks for the tokens of one sequence, and takes them.
pub struct Sampler {
    params: SamplingParams,
    /// Prompt and drawn tokens.
    ids: Vec<u32>,
    prompt: usize,
    /// All of those, where repetition is penalised.
    seen: Option<TokenSet>,
    /// Tokens that would complete a banned string if they came next, and how many.
    banned: Option<TokenSet>,
    attempt: u32,
    model: ModelHandle,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").field("params", &self.params).field("drawn", &self.drawn()).finish()
    }
}

impl Sampler {
    /// A sampler for a sequence that begins with `prompt`.
    pub fn new(params: SamplingParams, prompt: &[u32], model: ModelHandle) -> Result<Self> {
        params.check()?;
        let seen = (params.repetition_penalty != 1.0).then(|| {
            let mut seen = TokenSet::new(model.info.vocab_size);
            seen.extend(prompt.iter().copied());
            seen
        });
        Ok(Self { params, ids: prompt.to_vec(), prompt: prompt.len(), seen, banned: None, attempt: 0, model })
    }

    /// How the next token is to be drawn from a row of logits.
    pub(super) fn draw(&self, row: usize) -> Draw<'_> {
        let SamplingParams { repetition_penalty, banned_strings: _, temperature, top_k, top_p, min_p, seed } =
            self.params;
        Draw {
            row,
            penalty: repetition_penalty,
            penalised: self.seen.as_ref(),
            excluded: self.banned.as_ref(),
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            index: self.drawn() as u32,
            attempt: self.attempt,
        }
    }

    /// Looks at what was drawn: the next token and its log-probability, in nats, under the model's own distribution.
    /// `None` if it is to be drawn again.
    ///
    /// # Errors
    /// `NonFinite` if the logits are no distribution, `FailedPrecondition` if every token is banned.
    pub(super) fn look_at(&mut self, drawn: Result<Drawn, Undrawn>) -> Result<Option<(u32, f32)>> {
        let Drawn { token, log_prob } = drawn.map_err(undrawn)?;
        if self.completes_ban(token)? {
            self.banned.get_or_insert_with(|| TokenSet::new(self.model.info.vocab_size)).insert(token);
            self.attempt += 1;
            return Ok(None);
        }
        Ok(Some((token, log_prob)))
    }

    /// Takes a token: the one after it is drawn next.
    pub(super) fn take(&mut self, token: u32) {
        self.ids.push(token);
        (self.banned, self.attempt) = (None, 0);
        if let Some(seen) = &mut self.seen {
            seen.insert(token);
        }
    }

    fn drawn(&self) -> usize {
        self.ids.len() - self.prompt
    }

    /// True if the token would complete a banned string.
    fn completes_ban(&self, token: u32) -> Result<bool> {
        if self.params.banned_strings.is_empty() {
            return Ok(false);
        }
        let model: &LoadedModel = &self.model;
        let start = self.prompt.max(self.ids.len().saturating_sub(BAN_CONTEXT));
        let mut ids = self.ids[start..].to_vec();
        let before = model.text.decode(&ids)?;
        ids.push(token);
        let after = model.text.decode(&ids)?;
        Ok(self.params.banned_strings.iter().any(|ban| after.contains(ban) && !before.contains(ban)))
    }
}

/// What a caller is told.
pub(super) fn undrawn(why: Undrawn) -> Error {
    match why {
        Undrawn::NotFinite => Error::NonFinite { what: "the logits that the model computed".into() },
        Undrawn::AllExcluded => Error::failed_precondition("every token would complete a banned string"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_by_name() {
        let base = SamplingParams::default;
        for (params, field) in [
            (SamplingParams { temperature: -1.0, ..base() }, "temperature"),
            (SamplingParams { temperature: 1e-38, ..base() }, "temperature"),
            (SamplingParams { top_p: 0.0, ..base() }, "top_p"),
            (SamplingParams { min_p: f32::NAN, ..base() }, "min_p"),
            (SamplingParams { repetition_penalty: 0.0, ..base() }, "repetition_penalty"),
            (SamplingParams { repetition_penalty: 9e-41, ..base() }, "repetition_penalty"),
            (SamplingParams { banned_strings: vec![String::new()], ..base() }, "banned_strings"),
        ] {
            let error = params.check().unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
