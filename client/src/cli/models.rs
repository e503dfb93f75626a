//! `plumb models`: what is served, and changing it.

use std::time::Duration;

use clap::{Args, Subcommand};
use futures::StreamExt;
use plumb_client::v1;
use serde_json::json;

use super::Outcome;
use super::args::Global;
use super::output::{digest, print, print_json, table};

/// Arguments of `plumb models`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  plumb models
  plumb models load pm /checkpoints/pm/2
  plumb models label pm stable 2
  plumb models traffic pm stable=95 canary=5
  plumb models unload pm 1
  plumb models watch")]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    command: Option<ModelsCommand>,
}

#[derive(Subcommand)]
enum ModelsCommand {
    /// Show all versions of all models (the default)
    List,
    /// Load a version beside the others; answers once it serves or has failed
    Load {
        /// Name under which it is served
        name: String,
        /// A folder, a .gguf file or a Hugging Face repository, as the server sees it
        source: String,
        /// Version [default: the newest plus one]
        #[arg(long, value_name = "N")]
        version: Option<u64>,
        /// A folder or repository with a LoRA adapter to merge
        #[arg(long, value_name = "SOURCE", default_value = "")]
        adapter: String,
        /// Branch, tag or commit of a Hugging Face repository
        #[arg(long, value_name = "REV", default_value = "")]
        revision: String,
    },
    /// Take a version out of service; calls that use it end on it
    Unload {
        /// Name of the model
        name: String,
        /// Its version
        version: u64,
    },
    /// Point a label at a version, or remove it
    Label {
        /// Name of the model
        name: String,
        /// The label, such as stable
        label: String,
        /// The version; without it the label is removed
        version: Option<u64>,
    },
    /// Split the calls that name neither version nor label between labels, or end the split
    Traffic {
        /// Name of the model
        name: String,
        /// A label and its weight, of the sum of all; without any the split ends
        #[arg(value_name = "LABEL=WEIGHT", value_parser = share)]
        shares: Vec<v1::TrafficShare>,
    },
    /// Print the state of every version, then every change, until interrupted
    Watch {
        /// Only this model
        #[arg(default_value = "")]
        name: String,
    },
}

pub(crate) async fn run(global: &Global, args: ModelsArgs) -> anyhow::Result<Outcome> {
    let client = global.connect().await?;
    let shown = match args.command.unwrap_or(ModelsCommand::List) {
        ModelsCommand::List => client.list_models().await?,
        ModelsCommand::Load { name, source, version, adapter, revision } => {
            // Loading may first have to download.
            let client = client.with_call_timeout(Some(global.timeout(Duration::from_secs(3600))));
            vec![client.load_version(v1::LoadVersionRequest { name, version, source, adapter, revision }).await?]
        }
        ModelsCommand::Unload { name, version } => vec![client.unload_version(name, version).await?],
        ModelsCommand::Label { name, label, version } => {
            client.set_label(name, label, version).await?.into_iter().collect()
        }
        ModelsCommand::Traffic { name, shares } => client.set_traffic(name, shares).await?,
        ModelsCommand::Watch { name } => {
            let mut changes = client.watch_models(name).await?;
            while let Some(change) = changes.next().await {
                if let Some(model) = change?.model {
                    show_change(global, &model)?;
                }
            }
            return Ok(Outcome::Done);
        }
    };
    if global.json {
        for model in &shown {
            print_json(&line(model))?;
        }
    } else if !shown.is_empty() {
        print(models_table(&shown))?;
    }
    Ok(Outcome::Done)
}

fn show_change(global: &Global, model: &v1::ModelStatus) -> anyhow::Result<()> {
    if global.json {
        return print_json(&line(model));
    }
    let (name, version) = name_and_version(model);
    let error = if model.error.is_empty() { String::new() } else { format!(": {}", model.error) };
    Ok(print(format!("{name} {version} {}{error}\n", state(model)))?)
}

fn models_table(models: &[v1::ModelStatus]) -> String {
    let row = |model: &v1::ModelStatus| {
        let (name, version) = name_and_version(model);
        let details = model.details.clone().unwrap_or_default();
        let weights = model.model.as_ref().map_or("", |m| &m.weights_digest);
        let known = |number: u64, text: String| if number == 0 { String::new() } else { text };
        [
            name + if model.is_default { " *" } else { "" },
            version.to_string(),
            state(model).into(),
            labels(model),
            kind(&details).into(),
            details.architecture.clone(),
            details.dtype.clone(),
            known(details.parameters, format!("{:.1} M", details.parameters as f64 / 1e6)),
            known(details.weight_bytes, format!("{:.0} MB", details.weight_bytes as f64 / 1e6)),
            known(u64::from(details.max_input_tokens), details.max_input_tokens.to_string()),
            digest(weights),
            if model.error.is_empty() { details.source.clone() } else { model.error.clone() },
        ]
    };
    let header = [
        "model",
        "version",
        "state",
        "labels",
        "kind",
        "architecture",
        "dtype",
        "parameters",
        "memory",
        "tokens",
        "digest",
        "source",
    ];
    let note = if models.iter().any(|m| m.is_default) { "* default of its kind\n" } else { "" };
    table(header, models.iter().map(row)) + note
}

fn line(model: &v1::ModelStatus) -> serde_json::Value {
    let (name, version) = name_and_version(model);
    let details = model.details.as_ref().map(|d| {
        json!({
            "kind": kind(d),
            "architecture": d.architecture,
            "source": d.source,
            "dtype": d.dtype,
            "parameters": d.parameters,
            "weight_bytes": d.weight_bytes,
            "max_input_tokens": d.max_input_tokens,
            "vocab_size": d.vocab_size,
            "chat_template_sha256": d.chat_template_sha256,
            "hhh_prompt": d.hhh_prompt,
            "reward_head": d.reward_head,
            "normalization": d.normalization.as_ref().map(|n| json!({"mean": n.mean, "std": n.std})),
            "adapter": d.adapter,
        })
    });
    json!({
        "model": name,
        "version": version,
        "weights_digest": model.model.as_ref().map(|m| &m.weights_digest),
        "state": state(model),
        "error": model.error,
        "labels": model.labels,
        "traffic_weight": model.traffic_weight,
        "is_default": model.is_default,
        "details": details,
    })
}

fn name_and_version(model: &v1::ModelStatus) -> (String, u64) {
    model.model.as_ref().map(|m| (m.name.clone(), m.version)).unwrap_or_default()
}

fn labels(model: &v1::ModelStatus) -> String {
    match model.traffic_weight {
        0 => model.labels.join(","),
        weight => format!("{} (weight {weight})", model.labels.join(",")),
    }
}

/// `stable=95`.
fn share(text: &str) -> Result<v1::TrafficShare, String> {
    let parsed = text.split_once('=').and_then(|(label, weight)| Some((label.to_owned(), weight.parse().ok()?)));
    let (label, weight) = parsed.ok_or_else(|| "expected LABEL=WEIGHT, such as canary=5".to_owned())?;
    Ok(v1::TrafficShare { label, weight })
}

fn state(model: &v1::ModelStatus) -> &'static str {
    model.state().as_str_name().trim_start_matches("MODEL_STATE_")
}

fn kind(details: &v1::ModelDetails) -> &'static str {
    match details.kind() {
        v1::ModelKind::Language => "language",
        v1::ModelKind::Preference => "preference",
        v1::ModelKind::Unspecified => "",
    }
}
