//! `/rerank` as Cohere, Jina and vLLM have it.
//!
//! Their scores lie between 0 and 1: `relevance_score` is the sigmoid of the reward, which stands beside it and by which
//! results are ordered.

use serde_json::json;

use super::ask::{Ask, Items, Scored};
use super::json::{Body, Texts};
use super::{Answer, number, reward, usage};
use crate::error::{Error, Result};

/// As vLLM and Jina have it, whose results bring their documents along.
pub(super) fn rerank(body: Body) -> Result<(Ask, Answer)> {
    ranked(body, true)
}

/// As the second version of Cohere's has it, whose results do not.
pub(super) fn cohere(body: Body) -> Result<(Ask, Answer)> {
    ranked(body, false)
}

fn ranked(mut body: Body, return_documents: bool) -> Result<(Ask, Answer)> {
    let question = match body.query.take().map(|Texts(mut texts)| (texts.pop(), texts.pop())) {
        Some((Some(query), None)) => query,
        _ => return Err(Error::invalid("query", "one text is needed")),
    };
    let answers = body.documents.take().ok_or_else(|| Error::invalid("documents", "a list of texts is needed"))?.0;
    let documents = body.return_documents.unwrap_or(return_documents).then(|| answers.clone());
    let squashed = body.wants_probability(true);
    // vLLM's way of saying all.
    let top_n = body.top_n.filter(|n| *n > 0).unwrap_or(usize::MAX);
    let ask = Ask::of(body, "documents", Items::Answers { question, answers })?;
    let answer = move |scored: &Scored| {
        let mut order: Vec<usize> = (0..scored.scores.len()).collect();
        // Stable: equal ones keep their order.
        order.sort_by(|&a, &b| scored.scores[b].reward.total_cmp(&scored.scores[a].reward));
        let results = order.into_iter().take(top_n).map(|index| {
            let score = &scored.scores[index];
            let relevance_score = number(score, squashed);
            let mut result = json!({ "index": index, "relevance_score": relevance_score, "reward": reward(score) });
            if let Some(documents) = &documents {
                result["document"] = json!({ "text": documents[index] });
            }
            result
        });
        json!({
            "id": scored.id,
            "model": scored.model.name,
            "results": results.collect::<Vec<_>>(),
            "usage": usage(scored),
        })
    };
    Ok((ask, Box::new(answer)))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::Protocol;
    use super::super::tests::{asked, refused};
    use super::*;

    /// With more fields.
    fn with(mut body: Value, more: Value) -> Value {
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    }

    fn indices(answer: &Value) -> Vec<u64> {
        answer["results"].as_array().unwrap().iter().map(|result| result["index"].as_u64().unwrap()).collect()
    }

    #[test]
    fn documents_are_ordered_by_their_rewards() {
        let documents = json!(["a", { "text": "b" }, "c", "d"]);
        let ask_for = |more: Value| asked(cohere, with(json!({ "query": "q", "documents": documents }), more));
        let (ask, answer) = ask_for(json!({}));
        let answers = ["a", "b", "c", "d"].map(str::to_owned).into();
        assert_eq!((ask.field, ask.items), ("documents", Items::Answers { question: "q".into(), answers }));
        // Even where sigmoid cannot tell them apart.
        let answer = answer(&[40.0, -1.0, 41.0, 40.0]);
        assert_eq!(indices(&answer), [2, 0, 3, 1]);
        assert_eq!(answer["results"][0], json!({ "index": 2, "relevance_score": 1.0, "reward": 41.0 }));
        assert_eq!((&answer["model"], &answer["id"]), (&json!("pm"), &json!("id")));
        for (more, expected) in [
            (json!({ "top_n": 2 }), &[3, 2][..]),
            (json!({ "top_n": 0 }), &[3, 2, 1, 0]),
            (json!({ "top_n": 9 }), &[3, 2, 1, 0]),
        ] {
            assert_eq!(indices(&ask_for(more).1(&[0.0, 1.0, 2.0, 3.0])), expected);
        }
        let raw = ask_for(json!({ "use_activation": false })).1(&[0.0, 7.0, 2.0, 3.0]);
        assert_eq!(raw["results"][0], json!({ "index": 1, "relevance_score": 7.0, "reward": 7.0 }));
    }

    #[test]
    fn results_bring_their_documents_where_the_protocol_does() {
        let check = |protocol: Protocol, more: Value, expected: Value| {
            let (_, answer) = asked(protocol, with(json!({ "query": "q", "documents": ["a", { "text": "b" }] }), more));
            assert_eq!(answer(&[1.0, 2.0])["results"][0]["document"], expected);
        };
        let (asked_for, not) = (json!({ "return_documents": true }), json!({ "return_documents": false }));
        let (document, none) = (json!({ "text": "b" }), Value::Null);
        for (more, by_vllm, by_cohere) in
            [(json!({}), &document, &none), (asked_for, &document, &document), (not, &none, &none)]
        {
            check(rerank, more.clone(), by_vllm.clone());
            check(cohere, more, by_cohere.clone());
        }
    }

    #[test]
    fn a_query_is_one_text() {
        refused(rerank, json!({ "documents": [] }), "query: one text");
        refused(rerank, json!({ "query": ["a", "b"], "documents": [] }), "query: one text");
        refused(rerank, json!({ "query": "a" }), "documents: a list of texts");
        refused(rerank, json!({ "query": "a", "documents": ["b"], "max_tokens_per_doc": 5 }), "truncate_prompt_tokens");
    }
}
