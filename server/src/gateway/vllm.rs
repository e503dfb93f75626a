//! vLLM's routes for models that score: `/score`, `/classify` and `/pooling`.
//!
//! All answer the raw reward; with `use_activation` its sigmoid, which vLLM takes where nothing is said.

use serde_json::{Value, json};

use super::ask::{Ask, Items, Scored};
use super::json::{Body, Encoding, pair};
use super::{Answer, number, usage, vector};
use crate::error::{Error, Result};

/// Scores pairs: one query with many documents, or as many of the ones as of the others.
pub(super) fn score(mut body: Body) -> Result<(Ask, Answer)> {
    let (ones, others, field) = match &mut body {
        Body { queries: Some(ones), documents: Some(others), .. } => (ones, others, "documents"),
        Body { queries: Some(ones), items: Some(others), .. } => (ones, others, "items"),
        Body { text_1: Some(ones), text_2: Some(others), .. } => (ones, others, "text_2"),
        Body { data_1: Some(ones), data_2: Some(others), .. } => (ones, others, "data_2"),
        _ => return Err(Error::invalid("", "`queries` and `documents`, or `text_1` and `text_2`, are needed")),
    };
    let (mut queries, documents) = (std::mem::take(&mut ones.0), std::mem::take(&mut others.0));
    let items = match (queries.len(), documents.len()) {
        (1, _) => Items::Answers { question: queries.remove(0), answers: documents },
        (n, m) if n == m => {
            Items::Inputs(queries.into_iter().zip(documents).map(|(query, document)| pair(query, document)).collect())
        }
        (n, m) => return Err(Error::invalid(field, format!("{m} are given for {n}: one, or as many, are needed"))),
    };
    let entry = |index, score| json!({ "index": index, "object": "score", "score": score });
    answered(body, field, items, entry)
}

/// A class of its own, whose value is the reward. verl's `reward_model.rollout.name: vllm` asks here.
pub(super) fn classify(mut body: Body) -> Result<(Ask, Answer)> {
    let (field, inputs) = body.inputs()?;
    let entry = |index, score| json!({ "index": index, "label": null, "probs": [score], "num_classes": 1 });
    answered(body, field, Items::Inputs(inputs), entry)
}

/// A vector of one number.
pub(super) fn pooling(mut body: Body) -> Result<(Ask, Answer)> {
    let (field, inputs) = body.inputs()?;
    let encoding = body.encoding_format.unwrap_or(Encoding::Float);
    let entry = move |index, score| json!({ "index": index, "object": "pooling", "data": vector(score, encoding) });
    answered(body, field, Items::Inputs(inputs), entry)
}

fn answered(
    body: Body,
    field: &'static str,
    items: Items,
    entry: impl Fn(usize, f64) -> Value + Send + 'static,
) -> Result<(Ask, Answer)> {
    let squashed = body.wants_probability(false);
    let ask = Ask::of(body, field, items)?;
    let answer = move |scored: &Scored| {
        let data = scored.scores.iter().enumerate().map(|(i, score)| entry(i, number(score, squashed)));
        json!({
            "id": scored.id,
            "object": "list",
            "created": scored.created,
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
    fn pairs_are_scored_one_with_many_or_each_with_its_own() {
        let many = Items::Answers { question: "q".into(), answers: vec!["a".into(), "b".into()] };
        for (body, field) in [
            (json!({ "queries": "q", "documents": ["a", "b"] }), "documents"),
            (json!({ "queries": ["q"], "items": ["a", { "text": "b" }] }), "items"),
            (json!({ "text_1": "q", "text_2": ["a", "b"] }), "text_2"),
            (json!({ "data_1": "q", "data_2": ["a", "b"] }), "data_2"),
        ] {
            let (ask, _) = asked(score, body);
            assert_eq!((&ask.items, ask.field), (&many, field));
        }
        let (ask, answer) = asked(score, json!({ "text_1": ["q", "r"], "text_2": ["a", "b"], "model": "pm" }));
        assert_eq!(ask.items, Items::Inputs(vec![pair("q".into(), "a".into()), pair("r".into(), "b".into())]));
        assert_eq!(
            answer(&[0.5, -1.0]),
            json!({
                "id": "id", "object": "list", "created": 7, "model": "pm",
                "data": [
                    { "index": 0, "object": "score", "score": 0.5 },
                    { "index": 1, "object": "score", "score": -1.0 },
                ],
                "usage": { "prompt_tokens": 20, "total_tokens": 20 },
            })
        );
        refused(score, json!({ "text_1": ["q", "r"], "text_2": ["a"] }), "text_2: 1 are given for 2");
        refused(score, json!({ "text_1": "q" }), "`queries` and `documents`");
    }

    #[test]
    fn what_verl_asks_of_vllm() {
        let (ask, answer) =
            asked(classify, json!({ "model": "/checkpoints/pm/3", "input": "a", "use_activation": false }));
        assert_eq!((ask.field, ask.items), ("input", Items::Inputs(vec![text("a".into())])));
        assert_eq!(ask.model.unwrap().name, "pm");
        let data = &answer(&[-3.5])["data"];
        assert_eq!(*data, json!([{ "index": 0, "label": null, "probs": [-3.5], "num_classes": 1 }]));
    }

    #[test]
    fn a_reward_is_raw_unless_its_sigmoid_is_asked_for() {
        let check = |body: Value, expected: f64| {
            assert_eq!(asked(classify, body).1(&[2.0])["data"][0]["probs"][0], json!(expected));
        };
        // Wolfram: 1/(1+exp(-2)).
        check(json!({ "input": "a", "use_activation": true }), 0.880_797_077_977_882_3);
        check(json!({ "input": "a", "activation": false }), 2.0);
        check(json!({ "messages": [{ "role": "user", "content": "a" }] }), 2.0);
        check(json!({ "input": "a", "activation": true, "use_activation": false }), 2.0);
        // What a client sends that knows both names.
        check(json!({ "input": "a", "activation": null, "use_activation": false }), 2.0);
        check(json!({ "input": "a", "activation": true, "use_activation": null }), 0.880_797_077_977_882_3);
    }

    #[test]
    fn a_vector_is_written_as_asked_for() {
        let pooled = |more: Value| {
            let mut body = json!({ "input": [1, 2] });
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            asked(pooling, body).1(&[0.5])["data"][0]["data"].clone()
        };
        assert_eq!(pooled(json!({})), json!([0.5]));
        assert_eq!(pooled(json!({ "encoding_format": "float" })), json!([0.5]));
        // python3 -c 'import base64, struct; print(base64.b64encode(struct.pack("<f", 0.5)))'
        assert_eq!(pooled(json!({ "encoding_format": "base64" })), json!("AAAAPw=="));
    }
}
