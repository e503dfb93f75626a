use super::*;

fn training() -> Training {
    let value = json!({
        "plumb_train": "0.1.0",
        "recipe": {"objective": "preference", "init": "org/base", "train": ["data/train.jsonl"], "dev": ["data/dev_1.jsonl"],
            "lr": 1e-5, "max-tokens": 1024, "end-of-context": "```\n<|end|>"},
        "base_model": "org/base",
        "steps": 1500,
        "data": {"train": {"lines": 48000, "examples": 47990, "tokens": 9000000, "cut": 3, "dropped": {"bad line": 10}}},
        "prepared": [
            {"dataset": "hh-rlhf", "files": ["a.jsonl.gz"], "counts": {"read": 50000, "train": 48000, "dev": 2000, "dropped": {}}},
            {"dataset": "ethics-justice", "binarise": true},
            {"dataset": "ethics-virtue"},
            {"dataset": "stack-exchange"},
        ],
        "dev": {"step": 1500, "pairs": 200, "values": {"accuracy": 0.56, "loss": 0.688, "margin": 0.1}},
    });
    serde_json::from_value(value).unwrap()
}

fn model(preference: bool, architecture: &str) -> Model {
    Model {
        preference,
        architecture: architecture.to_owned(),
        parameters: 134_515_008,
        vocabulary: 49152,
        context: 8192,
        dtype: "bf16".to_owned(),
        chat_template: true,
    }
}

fn check(card: &Card<'_>, parts: &[&str], absent: &[&str]) {
    let text = card.to_string();
    for part in parts {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    for part in absent {
        assert!(!text.contains(part), "{part} is in {text}");
    }
}

#[test]
fn a_card_tells_where_a_model_comes_from_and_what_it_is_worth() {
    let (training, model) = (training(), model(true, "LlamaForSequenceClassification"));
    let card = Card { name: "pm: \"1\"\n", model: &model, training: Some(&training), results: &[], draft: false };
    let parts = [
        "base_model: \"org/base\"\ntags:\n- \"plumb\"\n- \"preference-model\"\n- \"reward-model\"\n",
        "datasets:\n- \"Anthropic/hh-rlhf\"\n- \"hendrycks/ethics\"\nmetrics:\n- \"accuracy\"\n",
        "- name: \"pm: \\\"1\\\"\"\n",
        // Wilson's interval of 112 of 200, worked out from its formula.
        "      value: 0.56\n      name: \"accuracy, 95 % interval 0.4907 to 0.6270, n = 200\"\n",
        "| accuracy | 56.0 % (49.1 to 62.7 %) of 200 pairs |\n",
        "| loss | 0.6880 nats |\n",
        "| parameters | 134,515,008 |\n",
        // A fence that the recipe cannot close.
        "````toml\n",
        "| train | 48,000 | 47,990 | 9,000,000 | 3 | 10 bad line |\n",
        "hh-rlhf made 48,000 lines to learn from and 2,000 to measure on of 50,000 records in a.jsonl.gz; left out: nothing.",
        "ethics-justice, binarised",
        "(data/dev\\_1.jsonl), after step 1,500",
        "no more than 1,024 tokens",
        "sigmoid(difference)",
    ];
    check(&card, &parts, &["AutoModelForCausalLM"]);
}

#[test]
fn a_card_claims_nothing_that_is_not_known() {
    let model = model(false, "LlamaForCausalLM");
    let card = Card { name: "lm", model: &model, training: None, results: &[], draft: false };
    let absent = ["base_model", "datasets", "metrics", "model-index", "How it was made", "reward"];
    check(&card, &["pipeline_tag: text-generation\n", "Nothing is known", "AutoModelForCausalLM"], &absent);

    let headed = Model { preference: true, ..Model { architecture: "RewardModel".to_owned(), ..model } };
    let card = Card { name: "pm", model: &headed, training: None, results: &[], draft: false };
    check(&card, &["pipeline_tag: text-classification\n"], &["transformers", "Transformers"]);
}

#[test]
fn of_a_path_its_end_is_told() {
    for (path, expected) in [
        ("/home/me/data/helpful/train.jsonl", "helpful/train.jsonl"),
        ("../train.jsonl", "train.jsonl"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ] {
        let mut value = json!(path);
        shorten(&mut value);
        assert_eq!(value, expected);
    }
    for (init, expected) in [
        ("HuggingFaceTB/SmolLM2-135M", true),
        ("src/card", false),
        ("./a/b", false),
        ("/a/b", false),
        ("a", false),
        ("a/b/c", false),
    ] {
        assert_eq!(is_repository(init), expected, "{init}");
    }
}
