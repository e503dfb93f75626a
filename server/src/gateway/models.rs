//! `/v1/models` as OpenAI has it: what can be asked now.

use plumb_proto::v1;
use serde_json::{Value, json};

/// The models of which a version is available; `id` is what the other routes take as `model`. OpenAI's clients want to
/// know when each was created, which no checkpoint says: it is `now`, as in vLLM.
pub(super) fn list(statuses: &[v1::ModelStatus], now: u64) -> Value {
    let mut models: Vec<Value> = Vec::new();
    for status in statuses.iter().filter(|status| status.state() == v1::ModelState::Available) {
        let v1::ModelIdentity { name, version, weights_digest } = status.model.clone().unwrap_or_default();
        let details = status.details.clone().unwrap_or_default();
        let entry = json!({
            "version": version,
            "weights_digest": weights_digest,
            "labels": status.labels,
            "root": details.source,
            "max_model_len": details.max_input_tokens,
        });
        // They come by name.
        match models.last_mut().filter(|model| model["id"] == name.as_str()) {
            Some(model) => {
                if let Some(versions) = model["versions"].as_array_mut() {
                    versions.push(entry);
                }
            }
            None => models.push(json!({
                "id": name,
                "object": "model",
                "created": now,
                "owned_by": "plumb",
                "kind": match details.kind() {
                    v1::ModelKind::Preference => "preference",
                    v1::ModelKind::Language => "language",
                    v1::ModelKind::Unspecified => "unknown",
                },
                "is_default": status.is_default,
                "versions": [entry],
            })),
        }
    }
    json!({ "object": "list", "data": models })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_asked_is_listed_by_name_with_its_versions() {
        let status = |name: &str, version, state: v1::ModelState| v1::ModelStatus {
            model: Some(v1::ModelIdentity { name: name.into(), version, weights_digest: "d".into() }),
            state: state.into(),
            details: Some(v1::ModelDetails {
                kind: v1::ModelKind::Preference.into(),
                source: "/pm".into(),
                max_input_tokens: 8,
                ..Default::default()
            }),
            labels: vec!["stable".into()],
            is_default: true,
            ..Default::default()
        };
        let available = v1::ModelState::Available;
        let statuses = [
            status("a", 1, v1::ModelState::Loading),
            status("pm", 1, available),
            status("pm", 2, available),
            status("pm", 3, v1::ModelState::Failed),
        ];
        let version = |version| json!({ "version": version, "weights_digest": "d", "labels": ["stable"], "root": "/pm", "max_model_len": 8 });
        let expected = json!({
            "id": "pm", "object": "model", "created": 7, "owned_by": "plumb", "kind": "preference", "is_default": true,
            "versions": [version(1), version(2)],
        });
        assert_eq!(list(&statuses, 7), json!({ "object": "list", "data": [expected] }));
    }
}
