//! `plumb tokenize` and `plumb render`: what a model would be fed.

use std::io::Read;

use clap::Args;
use plumb_client::v1;
use serde_json::json;

use super::args::{Global, HhhPrompt, ModelArgs, TextArgs};
use super::input::{Reading, prompt_input, with_response};
use super::output::{Model, describe, print, print_json, table, visible};
use super::{Outcome, Usage};

/// Arguments of `plumb tokenize`.
#[derive(Args)]
#[command(after_help = "Examples:\n  plumb tokenize 'Hello world'\n  plumb tokenize --no-special - < text.txt")]
pub(crate) struct TokenizeArgs {
    /// Texts; - is standard input
    #[arg(value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// Do not add the tokenizer's special tokens
    #[arg(long)]
    no_special: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) async fn tokenize(global: &Global, args: TokenizeArgs) -> anyhow::Result<Outcome> {
    let mut texts = args.texts;
    for text in texts.iter_mut().filter(|text| *text == "-") {
        text.clear();
        std::io::stdin().read_to_string(text)?;
    }
    let client = global.connect().await?;
    let request = v1::TokenizeRequest {
        model: Some(args.model.spec()),
        texts,
        add_special_tokens: args.no_special.then_some(false),
    };
    let answer = client.tokenize(request).await?;
    for tokenized in &answer.tokenized {
        if global.json {
            let token = |t: &v1::Token| json!({"id": t.id, "text": t.text, "special": t.special, "start": t.start, "stop": t.stop});
            print_json(&json!({"tokens": tokenized.tokens.iter().map(token).collect::<Vec<_>>()}))?;
            continue;
        }
        let row = |t: &v1::Token| {
            let special = if t.special { "special" } else { "" };
            [t.id.to_string(), format!("{}..{}", t.start, t.stop), special.into(), visible(&t.text)]
        };
        let rows = table(["id", "bytes", "kind", "token"], tokenized.tokens.iter().map(row));
        print(format!("{rows}{} tokens, {}\n\n", tokenized.tokens.len(), describe(answer.model.as_ref())))?;
    }
    Ok(Outcome::Done)
}

/// Arguments of `plumb render`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  plumb render --prompt 'Hello' --response 'Hi.'
  plumb render --prompt 'Hello' --generation --hhh-prompt short
  plumb render --split-turns --text \"$(cat transcript.txt)\"")]
pub(crate) struct RenderArgs {
    /// A text as it is
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt", conflicts_with = "prompt")]
    text: Option<String>,
    /// A user's prompt
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// The response to --prompt
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    response: Option<String>,
    /// Read Human: and Assistant: markers as turns of a conversation
    #[arg(long)]
    split_turns: bool,
    /// Render as generate does, ending where the answer begins
    #[arg(long, conflicts_with = "response")]
    generation: bool,
    /// Put the helpful, honest, harmless prompt before the conversation
    #[arg(long, value_enum, default_value_t = HhhPrompt::None, value_name = "WHICH")]
    hhh_prompt: HhhPrompt,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text_options: TextArgs,
}

pub(crate) async fn render(global: &Global, args: RenderArgs) -> anyhow::Result<Outcome> {
    let (words, raw) = match (args.text, args.prompt) {
        (Some(text), _) => (text, true),
        (None, prompt) => (prompt.unwrap_or_default(), false),
    };
    let mut input = prompt_input(words, Reading { split_turns: args.split_turns, raw }).map_err(Usage)?;
    if let Some(response) = &args.response {
        input = with_response(&input, response);
    }
    let client = global.connect().await?;
    let request = v1::RenderRequest {
        model: Some(args.model.spec()),
        input: Some(input),
        text: Some(args.text_options.options(args.hhh_prompt)),
        add_generation_prompt: args.generation,
    };
    let answer = client.render(request).await?;
    if global.json {
        let mut line = json!({
            "text": answer.text,
            "token_ids": answer.token_ids,
            "response_start": answer.response_start,
            "response_end": answer.response_end,
            "template_sha256": answer.template_sha256,
            "truncated": answer.truncated,
        });
        if let (Some(line), Ok(serde_json::Value::Object(model))) =
            (line.as_object_mut(), serde_json::to_value(answer.model.as_ref().map(Model::from)))
        {
            line.extend(model);
        }
        print_json(&line)?;
        return Ok(Outcome::Done);
    }
    let ids: Vec<String> = answer.token_ids.iter().map(u32::to_string).collect();
    print(format!(
        "{}\n\ntoken ids: {}\n{} tokens{}, response at {}..{}, template {}, {}\n",
        answer.text,
        ids.join(" "),
        ids.len(),
        if answer.truncated { " (cut to fit)" } else { "" },
        answer.response_start,
        answer.response_end,
        answer.template_sha256,
        describe(answer.model.as_ref()),
    ))?;
    Ok(Outcome::Done)
}
