//! Drawing the next token.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::utils::apply_repeat_penalty;
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

/// Draws the tokens of one sequence.
pub struct Sampler {
    params: SamplingParams,
    /// Without one the likeliest token is taken.
    processor: Option<LogitsProcessor>,
    /// Prompt and drawn tokens.
    ids: Vec<u32>,
    prompt: usize,
    model: ModelHandle,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler").field("params", &self.params).field("drawn", &(self.ids.len() - self.prompt)).finish()
    }
}

impl Sampler {
    /// A sampler for a sequence that begins with `prompt`.
    pub fn new(params: SamplingParams, prompt: &[u32], model: ModelHandle) -> Result<Self> {
        params.check()?;
        let temperature = f64::from(params.temperature);
        let processor =
            (temperature != 0.0).then(|| LogitsProcessor::from_sampling(params.seed, Sampling::All { temperature }));
        Ok(Self { params, processor, ids: prompt.to_vec(), prompt: prompt.len(), model })
    }

    /// The next token and its log-probability, in nats, under the model's own distribution. Uses `logits` up.
    ///
    /// # Errors
    /// `NonFinite` if the logits are no distribution, `FailedPrecondition` if every token is banned.
    pub fn draw(&mut self, logits: &mut [f32]) -> Result<(u32, f32)> {
        let normalizer = plumb_model::decoder::log_sum_exp(logits);
        if !normalizer.is_finite() {
            return Err(Error::NonFinite { what: "the logits that the model computed".into() });
        }
        let penalised = self.penalise(logits)?;
        loop {
            if logits.iter().all(|l| *l == f32::NEG_INFINITY) {
                return Err(Error::failed_precondition("every token would complete a banned string"));
            }
            let token = match &mut self.processor {
                Some(processor) => {
                    let tensor = Tensor::from_slice(logits, logits.len(), &Device::Cpu).map_err(fault)?;
                    let params = &self.params;
                    processor.sample_f(&tensor, |p| filter(p, params)).map_err(fault)?
                }
                None => likeliest(logits),
            };
            let logit = logits[token as usize];
            if self.completes_ban(token)? {
                logits[token as usize] = f32::NEG_INFINITY;
                continue;
            }
            self.ids.push(token);
            let own = penalised.iter().find(|(id, _)| *id == token).map_or(logit, |(_, logit)| *logit);
            return Ok((token, own - normalizer));
        }
    }

    /// Applies the repetition penalty; answers what the logits of the tokens concerned were.
    fn penalise(&self, logits: &mut [f32]) -> Result<Vec<(u32, f32)>> {
        if self.params.repetition_penalty == 1.0 {
            return Ok(Vec::new());
        }
        let concerned = self.ids.iter().filter_map(|id| logits.get(*id as usize).map(|logit| (*id, *logit))).collect();
        let tensor = Tensor::from_slice(logits, logits.len(), &Device::Cpu).map_err(fault)?;
        let penalised = apply_repeat_penalty(&tensor, self.params.repetition_penalty, &self.ids).map_err(fault)?;
        logits.copy_from_slice(&penalised.to_vec1::<f32>().map_err(fault)?);
        Ok(concerned)
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

/// Zeroes the probabilities that top-k, top-p and min-p leave out, in that order.
fn filter(p: &mut [f32], params: &SamplingParams) {
    let keep_all = (params.top_k == 0 || params.top_k >= p.len()) && params.top_p >= 1.0 && params.min_p <= 0.0;
    if keep_all {
        return;
    }
    let mut order: Vec<u32> = (0..p.len() as u32).collect();
    // Ties by index, so that the cut is the same every time.
    order.sort_unstable_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]).then(a.cmp(b)));
    let mut keep = if params.top_k == 0 { order.len() } else { params.top_k.min(order.len()) };
    let kept: f32 = order[..keep].iter().map(|i| p[*i as usize]).sum();
    let mut sum = 0.0;
    for (i, token) in order[..keep].iter().enumerate() {
        sum += p[*token as usize];
        if sum >= params.top_p * kept {
            keep = i + 1;
            break;
        }
    }
    let least = params.min_p * order.first().map_or(0.0, |i| p[*i as usize]);
    keep = keep.min(order.iter().take_while(|i| p[**i as usize] >= least).count()).max(1);
    for token in &order[keep..] {
        p[*token as usize] = 0.0;
    }
}

/// The first of the largest logits.
fn likeliest(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    logits.iter().position(|logit| *logit == largest).unwrap_or(0) as u32
}

fn fault(error: candle_core::Error) -> Error {
    Error::internal(format!("sampling: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(p: &[f32], params: SamplingParams, expected: &[f32]) {
        let mut p = p.to_vec();
        filter(&mut p, &params);
        assert_eq!(p, expected, "{params:?}");
    }

    #[test]
    fn filters_keep_the_likeliest_tokens() {
        let p = [0.1, 0.4, 0.3, 0.2];
        let base = SamplingParams::default;
        check(&p, base(), &p);
        check(&p, SamplingParams { top_k: 2, ..base() }, &[0.0, 0.4, 0.3, 0.0]);
        check(&p, SamplingParams { top_p: 0.65, ..base() }, &[0.0, 0.4, 0.3, 0.0]);
        check(&p, SamplingParams { top_p: 0.01, ..base() }, &[0.0, 0.4, 0.0, 0.0]);
        check(&p, SamplingParams { min_p: 0.5, ..base() }, &[0.0, 0.4, 0.3, 0.2]);
        check(&p, SamplingParams { top_k: 3, top_p: 0.5, min_p: 0.9, ..base() }, &[0.0, 0.4, 0.0, 0.0]);
        check(&[0.25; 4], SamplingParams { top_k: 1, ..base() }, &[0.25, 0.0, 0.0, 0.0]);
    }

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
