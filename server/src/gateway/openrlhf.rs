//! `/get_reward` as OpenRLHF's `--reward.remote_url` has it. `prompts` and `labels` say nothing that the full text in
//! `query` does not.

use serde_json::json;

use super::ask::{Ask, Items};
use super::json::{Body, text};
use super::{Answer, reward};
use crate::error::{Error, Result};

pub(super) fn get_reward(mut body: Body) -> Result<(Ask, Answer)> {
    let texts = body.query.take().ok_or_else(|| Error::invalid("query", "a list of texts is needed"))?.0;
    let ask = Ask::of(body, "query", Items::Inputs(texts.into_iter().map(text).collect()))?;
    let answer = |scored: &super::Scored| {
        let rewards: Vec<f64> = scored.scores.iter().map(reward).collect();
        json!({ "rewards": rewards, "scores": rewards, "extra_logs": {} })
    };
    Ok((ask, Box::new(answer)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{asked, refused};
    use super::*;

    #[test]
    fn the_full_texts_are_scored() {
        let (ask, answer) =
            asked(get_reward, json!({ "query": ["a", "b"], "prompts": ["p", "q"], "labels": [null, {"x": 1}] }));
        assert_eq!((ask.field, ask.items), ("query", Items::Inputs(vec![text("a".into()), text("b".into())])));
        // 0.1 as f32, exactly.
        let rewards = [0.100_000_001_490_116_12, -2.5];
        assert_eq!(answer(&[0.1, -2.5]), json!({ "rewards": rewards, "scores": rewards, "extra_logs": {} }));
        refused(get_reward, json!({ "prompts": [] }), "query: a list of texts is needed");
    }
}
