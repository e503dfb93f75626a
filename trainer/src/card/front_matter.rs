//! What Hugging Face reads of a card, in YAML: every text is quoted as in JSON, which is YAML too.

use std::fmt::Write as _;

use serde_json::Value;

use super::{Card, Score};

/// Data sets that `plumb-train prepare` knows and Hugging Face has, by the names that they have there.
const DATASETS: [(&str, &str); 9] = [
    ("hh-rlhf", "Anthropic/hh-rlhf"),
    ("hellaswag", "Rowan/hellaswag"),
    ("summarize-from-feedback", "openai/summarize_from_feedback"),
    ("webgpt", "openai/webgpt_comparisons"),
    ("ethics-utilitarianism", "hendrycks/ethics"),
    ("ethics-justice", "hendrycks/ethics"),
    ("ethics-deontology", "hendrycks/ethics"),
    ("ethics-commonsense", "hendrycks/ethics"),
    ("ethics-virtue", "hendrycks/ethics"),
];

pub(super) fn yaml(card: &Card<'_>) -> String {
    let preference = card.model.preference;
    let mut yaml = String::new();
    if card.model.is_known_to_transformers() {
        yaml += "library_name: transformers\n";
    }
    yaml += if preference { "pipeline_tag: text-classification\n" } else { "pipeline_tag: text-generation\n" };
    if let Some(base) = card.training.and_then(|training| training.base_model.as_deref()) {
        yaml += &format!("base_model: {}\n", quoted(base));
    }
    list(&mut yaml, "tags", if preference { &["plumb", "preference-model", "reward-model"] } else { &["plumb"] });
    let mut datasets: Vec<&str> = Vec::new();
    for set in card.training.into_iter().flat_map(|training| &training.prepared) {
        let known = DATASETS.iter().find(|(name, _)| Some(*name) == set.dataset.as_deref());
        datasets.extend(known.map(|(_, id)| *id).filter(|id| !datasets.contains(id)));
    }
    list(&mut yaml, "datasets", &datasets);
    let results = results(card);
    if !results.is_empty() {
        let mut metrics: Vec<&str> = Vec::new();
        metrics.extend(card.results.iter().flat_map(|file| &file.results).map(|score| &score.metric[..]));
        if results.iter().any(|(_, score)| score.metric == "accuracy") {
            metrics.insert(0, "accuracy");
        }
        let mut seen = Vec::new();
        metrics.retain(|metric| !seen.contains(metric) && (seen.push(*metric), true).1);
        list(&mut yaml, "metrics", &metrics);
        model_index(&mut yaml, card, &results);
    }
    yaml
}

/// Scores with the data that they are of, those on the dev data first.
fn results(card: &Card<'_>) -> Vec<(String, Score)> {
    let dev = card.training.and_then(|training| training.dev.as_ref());
    let dev = dev.and_then(|dev| {
        let (low, high) = dev.accuracy_interval().unzip();
        let value = *dev.values.get("accuracy")?;
        let [name, metric] = ["dev data of the run", "accuracy"].map(str::to_owned);
        Some((name.clone(), Score { name, metric, score: None, value, low, high, n: Some(dev.pairs) }))
    });
    let evaluated = card.results.iter().flat_map(|file| {
        file.results.iter().map(|score| {
            let parts = [&file.task[..], &score.name, score.score.as_deref().unwrap_or_default()];
            (parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", "), score.clone())
        })
    });
    dev.into_iter().chain(evaluated).collect()
}

fn model_index(yaml: &mut String, card: &Card<'_>, results: &[(String, Score)]) {
    let task = if card.model.preference { "text-classification" } else { "text-generation" };
    *yaml += &format!("model-index:\n- name: {}\n  results:\n", quoted(card.name));
    for (data, score) in results {
        let interval = score.low.zip(score.high).map(|(low, high)| format!(", 95 % interval {low:.4} to {high:.4}"));
        let n = score.n.map(|n| format!(", n = {n}"));
        let name = format!("{}{}{}", score.metric, interval.unwrap_or_default(), n.unwrap_or_default());
        let _ = write!(
            yaml,
            "  - task:\n      type: {task}\n    dataset:\n      name: {}\n      type: {}\n    metrics:\n    \
             - type: {}\n      value: {}\n      name: {}\n",
            quoted(data),
            quoted(&slug(data)),
            quoted(&score.metric),
            score.value,
            quoted(&name),
        );
    }
}

fn list(yaml: &mut String, key: &str, values: &[&str]) {
    if !values.is_empty() {
        *yaml += &format!("{key}:\n");
        values.iter().for_each(|value| *yaml += &format!("- {}\n", quoted(value)));
    }
}

/// A name of lower-case letters, digits and dashes.
fn slug(text: &str) -> String {
    let parts = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|part| !part.is_empty());
    let slug = parts.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-");
    if slug.is_empty() { "other".to_owned() } else { slug }
}

/// A text in double quotes, without what YAML has no place for.
fn quoted(text: &str) -> String {
    let text = text.chars().filter(|c| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}'));
    Value::String(text.collect()).to_string()
}
