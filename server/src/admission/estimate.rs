//! How many tokens a text will be, before it is tokenized: its bytes, and what the model made of bytes until now.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Of English text and most tokenizers; only the first calls are counted with it.
const TOKENS_PER_BYTE: f64 = 0.25;
/// Bytes that are remembered: a change of what callers send shows after some hundred texts.
const MEMORY: f64 = 1e6;
/// Names that are remembered. There are no more models than that; a name is forgotten with the others.
const MAX_MODELS: usize = 1024;

/// What models made of bytes.
#[derive(Debug, Default)]
pub(crate) struct Estimator(Mutex<HashMap<String, Seen>>);

#[derive(Clone, Copy, Debug)]
struct Seen {
    bytes: f64,
    tokens: f64,
}

impl Estimator {
    /// Tokens that `bytes` of text are likely to be.
    pub(crate) fn tokens(&self, model: &str, bytes: usize) -> usize {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ratio = seen.get(model).map_or(TOKENS_PER_BYTE, |seen| seen.tokens / seen.bytes);
        (bytes as f64 * ratio).ceil() as usize
    }

    /// Takes in what a text has become.
    pub(crate) fn learn(&self, model: &str, bytes: usize, tokens: usize) {
        if bytes == 0 {
            return;
        }
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MAX_MODELS && !all.contains_key(model) {
            all.clear();
        }
        let seen = all.entry(model.to_owned()).or_insert(Seen { bytes: 0.0, tokens: 0.0 });
        let kept = (1.0 - bytes as f64 / MEMORY).max(0.0);
        *seen = Seen { bytes: seen.bytes * kept + bytes as f64, tokens: seen.tokens * kept + tokens as f64 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_follows_what_a_model_is_sent() {
        let estimator = Estimator::default();
        assert_eq!(estimator.tokens("pm", 1000), 250);
        estimator.learn("pm", 0, 0);
        estimator.learn("pm", 100, 50);
        assert_eq!(estimator.tokens("pm", 1000), 500);
        assert_eq!(estimator.tokens("lm", 1000), 250, "each model has its own tokenizer");
        (0..1000).for_each(|_| estimator.learn("pm", 10_000, 1000));
        assert!((100..=101).contains(&estimator.tokens("pm", 1000)), "{estimator:?}");
    }

    #[test]
    fn names_do_not_pile_up() {
        let estimator = Estimator::default();
        (0..3 * MAX_MODELS).for_each(|i| estimator.learn(&i.to_string(), 10, 10));
        assert!(estimator.0.lock().unwrap().len() <= MAX_MODELS);
    }
}
