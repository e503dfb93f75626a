//! LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A pair `A [r, in]`, `B [out, r]` adds `scale * B A` to a weight `[out, in]`, with `scale = alpha / r`, or
//! `alpha / sqrt(r)` with `use_rslora`. A module listed in `modules_to_save` replaces the base's, or is added: so a
//! classifier's `score` is saved.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::fields::{Fields, excerpt, read_json};
use super::read::Reader;
use super::safetensors::Safetensors;
use super::weights::{Stored, TensorStore};
use crate::{Error, Result};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

const MOST_RANK: usize = 1 << 16;

/// Keys that may have any value: they describe the training, or the tensors already say what they say.
const HARMLESS: [&str; 21] = [
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

/// Initialisations that leave the base's weights as they are; others need the base changed before the merge.
const HARMLESS_INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// An adapter whose tensors have not all been used.
#[derive(Debug)]
pub(super) struct Adapter {
    store: Safetensors,
    /// By the base's tensor name.
    deltas: BTreeMap<String, Delta>,
    /// The adapter's tensor, by the base's tensor name.
    replacements: BTreeMap<String, String>,
    classifier: bool,
}

/// The adapter's tensors for one weight.
#[derive(Debug)]
struct Delta {
    a: String,
    b: String,
    scale: f64,
}

impl Adapter {
    pub(super) fn open(folder: &Path, reader: &Reader) -> Result<Self> {
        let path = folder.join(CONFIG);
        let json = read_json(&path)?;
        let settings = Settings::parse(&Fields::new(&path, &json)?)?;
        let weights = folder.join(weight_file(folder)?);
        let store = Safetensors::open(std::slice::from_ref(&weights), reader)?;
        let (deltas, replacements) = assign(&weights, &store, &settings)?;
        Ok(Self { store, deltas, replacements, classifier: settings.classifier })
    }

    /// Whether it was trained as a sequence classifier.
    pub(super) fn is_classifier(&self) -> bool {
        self.classifier
    }

    pub(super) fn replaces(&self, name: &str) -> bool {
        self.replacements.contains_key(name)
    }

    /// Whether a tensor of the base gets a delta.
    pub(super) fn changes(&self, name: &str) -> bool {
        self.deltas.contains_key(name)
    }

    /// The tensor that stands in the place of the base's, if there is one.
    pub(super) fn take_replacement(&mut self, name: &str) -> Option<Result<Tensor>> {
        self.replacements.remove(name).map(|key| self.store.read(&key))
    }

    /// Adds the delta for this tensor, if there is one. The sum is f32, and rounded once: when the weights are packed.
    pub(super) fn merge(&mut self, name: &str, base: Stored) -> Result<Stored> {
        let Some(delta) = self.deltas.remove(name) else { return Ok(base) };
        let base = base.into_tensor()?;
        let a = self.store.read(&delta.a)?.to_dtype(DType::F32)?;
        let b = self.store.read(&delta.b)?.to_dtype(DType::F32)?;
        let found = vec![b.dims().first().copied().unwrap_or(0), a.dims().last().copied().unwrap_or(0)];
        if found != base.dims() {
            return Err(Error::MisshapenTensor {
                name: format!("{} and {}", delta.b, delta.a),
                found,
                expected: base.dims().to_vec(),
            });
        }
        let change = (b.matmul(&a)? * delta.scale)?;
        Ok(Stored::Plain((base.to_dtype(DType::F32)? + change)?))
    }

    /// The adapter's tensors that nothing has used.
    pub(super) fn unused(&self) -> Vec<String> {
        let deltas = self.deltas.values().flat_map(|delta| [delta.a.clone(), delta.b.clone()]);
        deltas.chain(self.replacements.values().cloned()).collect()
    }
}

/// The name of the file with an adapter's weights, which is there.
pub(super) fn weight_file(folder: &Path) -> Result<String> {
    if folder.join(WEIGHTS).is_file() {
        return Ok(WEIGHTS.to_owned());
    }
    let what = match folder.join("adapter_model.bin").is_file() {
        true => format!(
            "`{WEIGHTS}` (`adapter_model.bin` is a pickle, which can run code and is not read: save the adapter with \
             safe_serialization=True)"
        ),
        false => format!("`{WEIGHTS}`"),
    };
    Err(Error::MissingFile { path: folder.to_owned(), what })
}

/// `adapter_config.json`, as far as it counts after training.
struct Settings {
    classifier: bool,
    rank: usize,
    alpha: f64,
    rank_stabilized: bool,
    /// Ranks may differ from `rank`.
    ranks_vary: bool,
    /// Alphas of modules whose path is, or ends with, the name.
    alphas: Vec<(String, f64)>,
    /// Modules whose tensors replace the base's.
    saved_modules: Vec<String>,
}

impl Settings {
    fn parse(fields: &Fields<'_>) -> Result<Self> {
        match fields.text("peft_type")? {
            Some("LORA") => {}
            _ => return Err(fields.wrong("peft_type", "\"LORA\"; other adapters are not merged")),
        }
        let classifier = match fields.text("task_type")? {
            Some("SEQ_CLS") => true,
            Some("CAUSAL_LM") | None => false,
            Some(_) => return Err(fields.wrong("task_type", "\"SEQ_CLS\" or \"CAUSAL_LM\"")),
        };
        for (key, value) in fields.iter() {
            if !is_served(key, value) {
                let (key, value) = (excerpt(key), value.to_string());
                return Err(Error::Unsupported(format!("adapter option `{key}` = {}", excerpt(&value))));
            }
        }
        let mut alphas = Vec::new();
        if let Some(pattern) = fields.object("alpha_pattern")? {
            for (module, _) in pattern.iter() {
                let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
                if !module.chars().all(plain) {
                    let what =
                        format!("adapter option `alpha_pattern` with the regular expression `{}`", excerpt(module));
                    return Err(Error::Unsupported(what));
                }
                alphas.push((module.clone(), pattern.required_positive(module)?));
            }
        }
        let saved_module = |value: &Value| match value.as_str() {
            Some(module) => Ok(module.to_owned()),
            None => Err(fields.wrong("modules_to_save", "a list of names")),
        };
        Ok(Self {
            classifier,
            rank: fields.required_size("r", MOST_RANK)?,
            alpha: fields.required_positive("lora_alpha")?,
            rank_stabilized: fields.flag("use_rslora", false)?,
            ranks_vary: fields.object("rank_pattern")?.is_some_and(|pattern| pattern.iter().next().is_some()),
            alphas,
            saved_modules: fields
                .list("modules_to_save")?
                .unwrap_or_default()
                .iter()
                .map(saved_module)
                .collect::<Result<_>>()?,
        })
    }

    /// What the product of a module's matrices is multiplied with.
    fn scale(&self, module: &str, rank: usize) -> f64 {
        let of_module = |(name, _): &&(String, f64)| {
            module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let alpha = self.alphas.iter().find(of_module).map_or(self.alpha, |(_, alpha)| *alpha);
        let rank = rank as f64;
        alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }
}

/// Whether an option leaves the merge as it is described above.
fn is_served(key: &str, value: &Value) -> bool {
    let empty = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    empty
        || HARMLESS.contains(&key)
        || match key {
            "use_rslora" | "alpha_pattern" => true,
            "bias" => value == "none",
            "init_lora_weights" => value.as_str().map_or(value == true, |init| HARMLESS_INITS.contains(&init)),
            _ => false,
        }
}

type Assignment = (BTreeMap<String, Delta>, BTreeMap<String, String>);

/// Sorts the adapter's tensors by the base's tensors that they change or replace.
fn assign(path: &Path, store: &Safetensors, settings: &Settings) -> Result<Assignment> {
    let malformed = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let mut pairs: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
    let mut replacements = BTreeMap::new();
    let tensors = store.describe();
    for key in tensors.keys() {
        let Some(name) = key.strip_prefix("base_model.model.") else {
            return Err(malformed(format!("tensor `{key}`: PEFT's names begin with `base_model.model.`")));
        };
        // PEFT leaves the adapter's own name, `default`, out; some trainers leave it in.
        let name = name.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight");
        if let Some(module) = name.strip_suffix(".lora_A.weight") {
            pairs.entry(module.to_owned()).or_default()[0] = Some(key.clone());
        } else if let Some(module) = name.strip_suffix(".lora_B.weight") {
            pairs.entry(module.to_owned()).or_default()[1] = Some(key.clone());
        } else if settings.saved_modules.iter().any(|module| name.split('.').any(|part| part == module)) {
            replacements.insert(name, key.clone());
        } else {
            return Err(malformed(format!(
                "tensor `{key}` is neither lora_A, lora_B nor of a module in `modules_to_save`"
            )));
        }
    }

    let mut deltas = BTreeMap::new();
    for (module, pair) in pairs {
        let [Some(a), Some(b)] = pair else {
            return Err(malformed(format!("`{module}` has only one of lora_A and lora_B")));
        };
        let shapes = (tensors[&a].shape.as_slice(), tensors[&b].shape.as_slice());
        let ([rank, _], [_, columns]) = shapes else {
            return Err(malformed(format!("`{a}` and `{b}` are not matrices")));
        };
        if rank != columns || *rank == 0 || (*rank != settings.rank && !settings.ranks_vary) {
            let reason = format!("`{a}` has rank {rank}, `{b}` {columns}, `r` in {CONFIG} is {}", settings.rank);
            return Err(malformed(reason));
        }
        let scale = settings.scale(&module, *rank);
        deltas.insert(format!("{module}.weight"), Delta { a, b, scale });
    }
    Ok((deltas, replacements))
}
