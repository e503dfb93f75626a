//! From `--model-id`, `--model`, `--adapter` and `--revision` to the list of models.

use std::path::Path;

use plumb_model::checkpoint::Source;

use super::args::ModelFlags;
use crate::registry::bundled;

/// Most characters in a model's name.
const MAX_NAME_LENGTH: usize = 128;

/// A model that is loaded at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    /// Name under which it is served.
    pub name: String,
    /// Version that it gets.
    pub version: u64,
    /// Where it lies.
    pub source: Source,
}

/// The models of the command line, in its order.
pub(super) fn resolve(flags: &ModelFlags) -> Result<Vec<ModelConfig>, String> {
    let mut models = Vec::new();
    if let Some(source) = &flags.model_id {
        let (name, version) = name_of(source)?;
        models.push(model(name, version, source));
    }
    for pair in &flags.model {
        let (name, source) = pair.split_once('=').ok_or_else(|| format!("--model {pair}: expected NAME=SOURCE"))?;
        let version = version_folder(source).map_or(1, |(_, version)| version);
        models.push(model(name.to_owned(), version, source));
    }
    if models.is_empty() && flags.model_root.is_none() {
        models.extend(bundled::NAMES.map(|name| model(name.to_owned(), 1, &format!("{}{name}", bundled::PREFIX))));
    }
    for (i, model) in models.iter().enumerate() {
        check_name(&model.name)?;
        if models[..i].iter().any(|other| other.name == model.name) {
            return Err(format!("two models are named `{}`; give them names with --model NAME=SOURCE", model.name));
        }
    }
    let has_plain = flags.model_id.is_some();
    for value in &flags.adapter {
        let (model, adapter) = target(&mut models, value, has_plain, "adapter")?;
        model.source.adapter = Some(adapter);
    }
    for value in &flags.revision {
        let (model, revision) = target(&mut models, value, has_plain, "revision")?;
        model.source.revision = Some(revision);
    }
    Ok(models)
}

/// Whether a model may have this name: it becomes part of metrics, paths and log lines.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_NAME_LENGTH || !name.chars().all(fits) {
        return Err(format!(
            "`{name}` cannot be a model's name: 1 to {MAX_NAME_LENGTH} letters, digits, `-`, `_` and `.` are allowed"
        ));
    }
    Ok(())
}

fn model(name: String, version: u64, source: &str) -> ModelConfig {
    ModelConfig { name, version, source: Source { model: source.to_owned(), adapter: None, revision: None } }
}

/// The model that `[NAME=]VALUE` is about. Only a served name is taken for one, because a path may hold a `=`.
fn target<'a>(
    models: &'a mut [ModelConfig],
    value: &str,
    has_plain: bool,
    option: &str,
) -> Result<(&'a mut ModelConfig, String), String> {
    let named = value
        .split_once('=')
        .and_then(|(name, rest)| Some((models.iter().position(|model| model.name == name)?, rest.to_owned())));
    // --model-id is the first of the list.
    let (index, rest) = match named {
        Some(found) => found,
        None if has_plain => (0, value.to_owned()),
        None => return Err(format!("--{option} {value}: expected NAME=... with the name of a --model")),
    };
    Ok((&mut models[index], rest))
}

/// Name and version of a source that was given without a name.
fn name_of(source: &str) -> Result<(String, u64), String> {
    if let Some((parent, version)) = version_folder(source) {
        return Ok((parent, version));
    }
    if let Some(name) = source.strip_prefix(bundled::PREFIX) {
        return Ok((name.to_owned(), 1));
    }
    // `.` and `..` have no name of their own.
    let path = Path::new(source);
    let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if source.ends_with(".gguf") { path.file_stem() } else { canonical.file_name() };
    let name =
        name.and_then(|name| name.to_str()).ok_or_else(|| format!("--model-id {source}: there is no name in it"))?;
    Ok((name.to_owned(), 1))
}

/// `<model>/<integer version>`, the layout in which trainers publish.
pub(crate) fn version_folder(source: &str) -> Option<(String, u64)> {
    let path = Path::new(source);
    let version = path.file_name()?.to_str()?.parse().ok()?;
    let name = path.parent()?.file_name()?.to_str()?;
    Some((name.to_owned(), version))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(model_id: Option<&str>, model: &[&str], adapter: &[&str], revision: &[&str]) -> ModelFlags {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        ModelFlags {
            model_id: model_id.map(str::to_owned),
            model: texts(model),
            adapter: texts(adapter),
            revision: texts(revision),
            device: Vec::new(),
            dtype: crate::config::DType::Auto,
            default_preference_model: None,
            default_language_model: None,
            hhh_prompt_file: None,
            model_root: None,
            version_policy: Vec::new(),
            swap_policy: crate::config::SwapPolicy::Availability,
            poll_interval_secs: std::time::Duration::ZERO,
            rollback_window_secs: std::time::Duration::ZERO,
            label: Vec::new(),
            traffic: Vec::new(),
        }
    }

    #[test]
    fn names_and_versions_come_from_the_source() {
        let check = |source: &str, name: &str, version: u64| {
            let models = resolve(&flags(Some(source), &[], &[], &[])).unwrap();
            assert_eq!((models[0].name.as_str(), models[0].version), (name, version), "{source}");
            assert_eq!(models[0].source.model, source);
        };
        check("/ckpt/llama-pm", "llama-pm", 1);
        check("/ckpt/llama-pm/", "llama-pm", 1);
        check("/ckpt/pm/3", "pm", 3);
        check("org/reward-model-8b", "reward-model-8b", 1);
        check("weights/smollm2-135m.gguf", "smollm2-135m", 1);
    }

    #[test]
    fn adapters_and_revisions_find_their_model() {
        let models = resolve(&flags(Some("base=x"), &[], &["dir=with=signs"], &["v2"]));
        assert!(models.is_err(), "`base=x` is no name");
        let models =
            resolve(&flags(Some("org/base"), &["pm=/m/pm"], &["pm=/a/pm", "/a/base"], &["pm=v1", "v2"])).unwrap();
        let source = |i: usize| (models[i].source.adapter.as_deref(), models[i].source.revision.as_deref());
        assert_eq!(source(0), (Some("/a/base"), Some("v2")));
        assert_eq!(source(1), (Some("/a/pm"), Some("v1")));
    }

    #[test]
    fn without_a_model_those_of_the_program_are_served() {
        let named = |flags: ModelFlags| -> Vec<String> {
            resolve(&flags).unwrap().into_iter().map(|model| format!("{}={}", model.name, model.source.model)).collect()
        };
        assert_eq!(named(flags(None, &[], &[], &[])), ["pm=bundled:pm", "lm=bundled:lm"]);
        let watching = ModelFlags { model_root: Some("models".into()), ..flags(None, &[], &[], &[]) };
        assert!(named(watching).is_empty());
        assert_eq!(named(flags(Some("bundled:lm"), &[], &[], &[])), ["lm=bundled:lm"]);
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        let check = |flags: ModelFlags, message: &str| {
            let error = resolve(&flags).unwrap_err();
            assert!(error.contains(message), "{error}");
        };
        check(flags(None, &["pm"], &[], &[]), "expected NAME=SOURCE");
        check(flags(None, &["a b=x"], &[], &[]), "cannot be a model's name");
        check(flags(Some("x/pm"), &["pm=y"], &[], &[]), "two models are named `pm`");
        check(flags(None, &["pm=y"], &["lm=z"], &[]), "--adapter lm=z");
    }
}
