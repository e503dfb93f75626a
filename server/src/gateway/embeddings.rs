//! `/v1/embeddings` as SGLang has it for reward models: a vector whose only number is the reward. verl's
//! `reward_model.rollout.name: sglang` asks here.

use serde_json::json;

use super::ask::{Ask, Items, Scored};
use super::json::{Body, Encoding};
use super::{Answer, reward, usage, vector};
use crate::error::Result;

pub(super) fn embeddings(mut body: Body) -> Result<(Ask, Answer)> {
    let (field, inputs) = body.inputs()?;
    let encoding = body.encoding_format.unwrap_or(Encoding::Float);
    let ask = Ask::of(body, field, Items::Inputs(inputs))?;
    let answer = move |scored: &Scored| {
        let data = scored.scores.iter().enumerate().map(
            |(index, score)| json!({ "object": "embedding", "index": index, "embedding": vector(reward(score), encoding) }),
        );
        json!({
            "object": "list",
            "model": scored.model.name,
            "data": data.collect::<Vec<_>>(),
            "usage": usage(scored),
        })
    };
    Ok((ask, Box::new(answer)))
}

#[cfg(test)]
mod tests {
    use super::super::json::text;
    use super::super::tests::{asked, refused};
    use super::*;

    #[test]
    fn a_vector_has_the_reward_and_nothing_else() {
        let (ask, answer) = asked(embeddings, json!({ "model": "pm", "input": "a" }));
        assert_eq!(ask.items, Items::Inputs(vec![text("a".into())]));
        assert_eq!(
            answer(&[0.5]),
            json!({
                "object": "list", "model": "pm",
                "data": [{ "object": "embedding", "index": 0, "embedding": [0.5] }],
                "usage": { "prompt_tokens": 10, "total_tokens": 10 },
            })
        );
        // python3 -c 'import base64, struct; print(base64.b64encode(struct.pack("<f", 0.5)))'
        let encoded = asked(embeddings, json!({ "input": ["a"], "encoding_format": "base64" })).1(&[0.5]);
        assert_eq!(encoded["data"][0]["embedding"], "AAAAPw==");
        refused(embeddings, json!({ "input": "a", "encoding_format": "float16" }), "unknown variant");
        refused(embeddings, json!({ "input": "a", "dimensions": 2 }), "a reward is one number");
    }
}
