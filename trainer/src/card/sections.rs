//! What people read of a card.

use serde_json::{Map, Value};

use super::{Card, Score, Training};
use crate::history::paths;

pub(super) fn markdown(card: &Card<'_>) -> String {
    let mut text = format!("# {}\n\n{}\n", line(card.name), introduction(card));
    text += &table(&["", ""], &facts(card));
    if let Some(training) = card.training {
        text += &made(training);
    }
    text += &worth(card);
    text += &usage(card);
    text += &limits(card);
    text
}

fn introduction(card: &Card<'_>) -> String {
    let what = match (card.model.preference, card.training.map(|training| training.text("objective"))) {
        (true, _) => {
            "A preference model (Askell et al. 2021, arXiv 2112.00861): it gives a text, such as a dialogue that ends with \
             an answer, one number, the reward. Of two answers to the same prompt, the one with the higher reward is the \
             one that people are expected to prefer, with probability sigmoid(difference)."
        }
        (false, Some("imitation")) => {
            "A language model that learned the better answers of preference data by imitation (Askell et al. 2021, arXiv \
             2112.00861)."
        }
        (false, _) => "A language model.",
    };
    format!("{what}\n")
}

fn facts(card: &Card<'_>) -> Vec<Vec<String>> {
    let model = card.model;
    let template = if model.chat_template { "in the checkpoint" } else { "none" };
    let mut rows = vec![
        ("architecture", line(&model.architecture)),
        ("parameters", thousands(model.parameters)),
        ("vocabulary", thousands(model.vocabulary as u64)),
        ("context", format!("{} tokens", thousands(model.context as u64))),
        ("type", line(&model.dtype)),
        ("chat template", template.to_owned()),
    ];
    if let Some(training) = card.training {
        rows.push(("begun with", line(training.base_model.as_deref().unwrap_or(training.text("init")))));
    }
    rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect()
}

/// How it was trained, and on what.
fn made(training: &Training) -> String {
    let mut text = format!(
        "\n## How it was made\n\nBy `plumb-train run` {}, in {} steps, with this recipe; of paths, only the ends are told.\n\n",
        line(&training.plumb_train),
        thousands(training.steps)
    );
    text += &fenced("toml", toml::to_string(&training.recipe).unwrap_or_default().trim_end());
    text += "\n### Data\n\n";
    let rows = training.data.iter().map(|(split, counts)| {
        let number = |key: &str| counts[key].as_u64().map(thousands).unwrap_or_default();
        let dropped = counts["dropped"].as_object().map(described).unwrap_or_default();
        let mut row = vec![line(split)];
        row.extend(["lines", "examples", "tokens", "cut"].map(number));
        row.push(dropped);
        row
    });
    let rows: Vec<Vec<String>> = rows.collect();
    text += &table(&["", "lines", "examples", "tokens", "sequences cut", "left out"], &rows);
    for set in &training.prepared {
        let (files, counts) = (set.files.iter().map(|file| line(file)).collect::<Vec<_>>().join(", "), &set.counts);
        let number = |key: &str| counts.get(key).and_then(Value::as_u64).map(thousands).unwrap_or_default();
        let binarised = if set.binarise { ", binarised (section 4.1 of the paper)" } else { "" };
        text += &format!(
            "\n`plumb-train prepare` {}{binarised} made {} lines to learn from and {} to measure on of {} records in {files}; \
             left out: {}.\n",
            line(set.dataset.as_deref().unwrap_or_default()),
            number("train"),
            number("dev"),
            number("read"),
            counts.get("dropped").and_then(Value::as_object).map(described).unwrap_or_default(),
        );
    }
    text
}

/// What was measured.
fn worth(card: &Card<'_>) -> String {
    let mut text = String::new();
    if let Some(dev) = card.training.and_then(|training| training.dev.as_ref()) {
        let files = card.training.map(|training| paths(&training.recipe, "dev")).unwrap_or_default();
        let files: Vec<String> = files.iter().map(|file| line(&file.to_string_lossy())).collect();
        text +=
            &format!("\nOn the dev data of the run ({}), after step {}:\n\n", files.join(", "), thousands(dev.step));
        let rows: Vec<Vec<String>> =
            dev.rows().into_iter().map(|(name, value)| vec![line(&name), line(&value)]).collect();
        text += &table(&["", ""], &rows);
    }
    for file in card.results {
        let task = if file.task.is_empty() { String::new() } else { format!(" {}", line(&file.task)) };
        text += &format!("\nBy `plumb-train evaluate`{task}, with 95 % intervals:\n\n");
        let row = |score: &Score| {
            let interval = score.low.zip(score.high).map(|(low, high)| format!("{low:.4} to {high:.4}"));
            let by = score.score.as_deref().map(line).unwrap_or_default();
            let n = score.n.map(thousands).unwrap_or_default();
            vec![
                line(&score.name),
                line(&score.metric),
                by,
                format!("{:.4}", score.value),
                interval.unwrap_or_default(),
                n,
            ]
        };
        let rows: Vec<Vec<String>> = file.results.iter().map(row).collect();
        text += &table(&["data", "metric", "by", "value", "interval", "n"], &rows);
    }
    match text.is_empty() {
        true => "\n## What it is worth\n\nNothing is known: it was measured on no data.\n".to_owned(),
        false => format!("\n## What it is worth\n{text}"),
    }
}

/// How to serve and to load it.
fn usage(card: &Card<'_>) -> String {
    let mut text = "\n## How to use it\n\n`FOLDER` is the folder of this file.\n\n".to_owned();
    let call = match card.model.preference {
        true => "plumb score pairs.jsonl  # lines with \"prompt\" and \"response\", or \"chosen\" and \"rejected\"",
        false => "plumb generate 'Why is the sky blue?'",
    };
    text += &fenced("sh", &format!("plumb-server --model-id FOLDER &\n{call}"));
    if !card.model.is_known_to_transformers() {
        return text;
    }
    let class = match card.model.preference {
        true => "AutoModelForSequenceClassification",
        false => "AutoModelForCausalLM",
    };
    let user = "{\"role\": \"user\", \"content\": \"Why is the sky blue?\"}";
    let answer = "{\"role\": \"assistant\", \"content\": \"Air scatters blue light more than red light.\"}";
    let input = match (card.model.chat_template, card.model.preference) {
        (true, true) => format!(
            "dialogue = [\n    {user},\n    {answer},\n]\n\
             inputs = tokenizer.apply_chat_template(dialogue, return_tensors=\"pt\", return_dict=True)\n"
        ),
        (true, false) => format!(
            "dialogue = [{user}]\ninputs = tokenizer.apply_chat_template(\n    \
             dialogue, add_generation_prompt=True, return_tensors=\"pt\", return_dict=True\n)\n"
        ),
        (false, _) => "inputs = tokenizer(\"Why is the sky blue?\", return_tensors=\"pt\")\n".to_owned(),
    };
    let result = match card.model.preference {
        true => "with torch.no_grad():\n    print(model(**inputs).logits.item())  # the reward",
        false => {
            "output = model.generate(**inputs, max_new_tokens=64)\nprint(tokenizer.decode(output[0], skip_special_tokens=True))"
        }
    };
    let torch = if card.model.preference { "import torch\n" } else { "" };
    text += "\nOr with Transformers:\n\n";
    text += &fenced(
        "python",
        &format!(
            "{torch}from transformers import {class}, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(\"FOLDER\")\n\
             model = {class}.from_pretrained(\"FOLDER\")\n{input}{result}"
        ),
    );
    text
}

fn limits(card: &Card<'_>) -> String {
    let mut items = Vec::new();
    if card.model.preference {
        items.push(
            "A reward says nothing by itself, and nothing beside another model's: only differences between answers to the \
             same prompt do."
                .to_owned(),
        );
        items.push(
            "It learned what the people, or the scores, behind its data preferred, with their errors. Where answers are \
             unlike that data, its rewards are guesses, and whoever optimises against it long enough will find answers \
             that it likes and people do not."
                .to_owned(),
        );
    } else {
        items.push("What it says can be wrong, harmful or made up.".to_owned());
    }
    if let Some(training) = card.training {
        if let Some(tokens) = training.recipe.get("max-tokens").and_then(Value::as_u64) {
            items.push(format!(
                "It saw no more than {} tokens of a text at once while it was trained.",
                thousands(tokens)
            ));
        }
        if training.dev.is_some() {
            items.push("The dev data is of the same kind as the training data: on other data, expect less.".to_owned());
        }
    }
    items.push("Nobody tested whether it treats groups of people alike, or withstands attacks.".to_owned());
    let items: String = items.iter().map(|item| format!("- {item}\n")).collect();
    format!("\n## Limits\n\n{items}")
}

/// Reasons with their counts.
fn described(counts: &Map<String, Value>) -> String {
    let counts = counts
        .iter()
        .map(|(reason, count)| format!("{} {}", count.as_u64().map(thousands).unwrap_or_default(), line(reason)));
    let text = counts.collect::<Vec<_>>().join(", ");
    if text.is_empty() { "nothing".to_owned() } else { text }
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let row = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    let rule = row(head.iter().map(|_| "---").collect());
    let rows = rows.iter().map(|cells| row(cells.iter().map(String::as_str).collect()));
    row(head.to_vec()) + &rule + &rows.collect::<String>()
}

/// A text within a line or a cell of a table: what Markdown or HTML would take for its own is escaped.
fn line(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            c if c.is_control() => escaped.push(' '),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' | '!' => escaped.extend(['\\', c]),
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '&' => escaped += "&amp;",
            c => escaped.push(c),
        }
    }
    escaped
}

/// A block of code, within a fence that is longer than any in it.
fn fenced(language: &str, code: &str) -> String {
    let longest = code.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat((longest + 1).max(3));
    format!("{fence}{language}\n{code}\n{fence}\n")
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let parts = digits.as_bytes().rchunks(3).rev().map(|part| String::from_utf8_lossy(part).into_owned());
    parts.collect::<Vec<_>>().join(",")
}
