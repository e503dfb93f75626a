//! The checkpoint that a run makes: what it begins with, and how it is written.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use half::bf16;
use plumb_model::checkpoint::{Checkpoint, Source};
use plumb_model::config::{Config, Head, RewardHead};
use plumb_model::decoder::gradient::{Parameter, Parameters};
use plumb_model::text::{TextConfig, TextPipeline};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::{Value, json};

use crate::lora::Trained;
use crate::output::write_folder;
use crate::recipe::{ComputeType, Objective, Recipe};
use crate::{Error, Result};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
pub(crate) const WEIGHTS: &str = "model.safetensors";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// Neither a server nor Transformers looks for it.
const LANGUAGE_HEAD: &str = "language_head.safetensors";

/// What Transformers calls the weight of a reward head.
const NEW_HEAD: &str = "score.weight";

/// A checkpoint without its weights, and what they were at the beginning.
pub(crate) struct Draft {
    pub(crate) config: Config,
    /// What is trained of it.
    pub(crate) trained: Trained,
    /// Its numbers at the beginning.
    pub(crate) values: Vec<f32>,
    pub(crate) text: TextPipeline,
    pub(crate) end_of_context: u32,
    /// Special tokens that begin every text.
    pub(crate) beginning: usize,
    /// Everything but the weights, by name.
    files: BTreeMap<&'static str, String>,
    /// Name of the file with the weights.
    weights: &'static str,
    /// A vocabulary head that a reward model is not served with: it lies in a file of its own, for whoever trains on.
    language_head: Option<Parameter>,
    dtype: ComputeType,
}

impl Draft {
    /// Opens what the recipe begins with and turns it into what it is to become: a reward model gets a head, drawn from
    /// the seed where there was none, and texts end with the end-of-context token.
    pub(crate) fn new(recipe: &Recipe) -> Result<Self> {
        let source = Source { model: recipe.init.clone(), ..Source::default() };
        let Checkpoint { mut config, mut weights, tokenizer, mut special, folder, .. } = Checkpoint::open(&source)?;
        let adapter = recipe.lora_rank > 0;
        let kept_head = folder.as_ref().map(|folder| folder.join(LANGUAGE_HEAD)).filter(|path| path.is_file());
        check_init(recipe, &config, kept_head.is_some())?;
        let read = |name: &str| match folder.as_ref().map(|folder| folder.join(name)) {
            Some(path) if path.is_file() => read_json(&path),
            _ => Ok(json!({})),
        };
        if folder.is_none() && !adapter {
            let message = "init is a file: name a folder or a repository, or train an adapter (lora-rank)";
            return Err(Error::Recipe(message.into()));
        }
        let reward = recipe.objective == Objective::Preference;
        let language_head = reward && recipe.language_weight > 0.0;
        let before = Parameters::new(&config, false);
        let end = end_of_context(recipe, &special.eos, &tokenizer)?;
        let mut files = BTreeMap::new();
        let mut json = read(CONFIG)?;
        let mut tokenizer_config = read(TOKENIZER_CONFIG)?;
        set_class(&mut tokenizer_config);
        json["dtype"] = json!(if recipe.dtype == ComputeType::F32 { "float32" } else { "bfloat16" });
        if let Some(object) = json.as_object_mut() {
            object.remove("torch_dtype");
            // Weights are written one number each.
            object.remove("quantization_config");
        }
        if reward {
            if config.head == Head::Language {
                become_reward_model(&mut json, &mut config);
            }
            let filler = filler(&tokenizer, &special.pad, &end.0)?;
            json["pad_token_id"] = json!(filler.as_ref().map(|(_, id)| id));
            if let Some((token, _)) = filler {
                tokenizer_config["pad_token"] = json!(token);
                special.pad = Some(token);
            }
        }
        let tokenizer_json = with_end(&tokenizer, &end)?;
        let beginning = leading(&tokenizer)?;
        let template = template(&beginning.concat(), &end.0);
        let tokenizer = tokenizer_json.parse().map_err(|error| Error::Recipe(format!("the tokenizer: {error}")))?;
        let text = TextPipeline::new(TextConfig {
            tokenizer,
            chat_template: Some(template.clone()),
            special,
            vocab_size: config.vocab_size,
            // The reader cuts.
            max_tokens: usize::MAX,
            hhh: Default::default(),
        })?;
        let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
        files.insert(TOKENIZER, tokenizer_json);
        files.insert(TOKENIZER_CONFIG, pretty(&tokenizer_config));
        files.insert(CHAT_TEMPLATE, template);

        let parameters = Parameters::new(&config, language_head);
        let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
        // Only a new reward head is not there: of a size that gives rewards of about 1 (Stiennon et al. 2020).
        let deviation = 1.0 / ((config.hidden_size + 1) as f32).sqrt();
        let mut kept_head = kept_head.map(|path| read_tensors(&path)).transpose()?;
        let values = parameters.read_or(&mut weights, |parameter| {
            if parameters.is_untied_language_head(parameter) {
                let kept = kept_head.as_mut()?.remove(&parameter.name);
                return kept.filter(|values| values.len() == parameter.range.len());
            }
            let draw = |_| deviation * Distribution::<f32>::sample(&StandardNormal, &mut rng);
            (parameter.name == NEW_HEAD).then(|| parameter.range.clone().map(draw).collect())
        })?;
        // What the new model has no use for has to make sense, too.
        for parameter in before.list().iter().filter(|old| parameters.list().iter().all(|new| new.name != old.name)) {
            weights.take(&parameter.name, &parameter.shape)?;
        }
        weights.finish()?;
        let language_head = match &config.head {
            Head::Reward(_) => parameters.list().iter().find(|one| parameters.is_untied_language_head(one)).cloned(),
            Head::Language => None,
        };
        let (trained, mut values) = Trained::new(recipe, &parameters, values)?;
        if let Some(folder) = &recipe.init_adapter {
            trained.take(&mut values, &read_tensors(&folder.join(ADAPTER_WEIGHTS))?, folder)?;
        }
        let weights = match trained.adapter_config(&recipe.init) {
            Some(json) => {
                files.insert(ADAPTER_CONFIG, pretty(&json));
                ADAPTER_WEIGHTS
            }
            None => {
                files.insert(CONFIG, pretty(&json));
                WEIGHTS
            }
        };
        Ok(Self {
            config,
            trained,
            values,
            text,
            end_of_context: end.1,
            beginning: beginning.len(),
            files,
            weights,
            language_head: language_head.filter(|_| !adapter),
            dtype: recipe.dtype,
        })
    }

    /// Adds a file.
    pub(crate) fn add(&mut self, name: &'static str, content: String) {
        self.files.insert(name, content);
    }

    /// The tensors of the file with the weights.
    pub(crate) fn served(&self) -> impl Iterator<Item = &Parameter> {
        self.trained.list().iter().filter(|one| Some(*one) != self.language_head.as_ref())
    }

    /// Writes a folder in Hugging Face layout, whole or not at all.
    pub(crate) fn save(&self, values: &[f32], folder: &Path) -> Result<()> {
        write_folder(folder, |folder| {
            for (name, content) in &self.files {
                let path = folder.join(name);
                fs::write(&path, content).map_err(Error::io(&path))?;
            }
            if let Some(head) = &self.language_head {
                Written { list: vec![head], values, dtype: self.dtype }.save(&folder.join(LANGUAGE_HEAD))?;
            }
            Written { list: self.served().collect(), values, dtype: self.dtype }.save(&folder.join(self.weights))
        })
    }
}

/// Weights on their way into a file.
pub(crate) struct Written<'a> {
    pub(crate) list: Vec<&'a Parameter>,
    pub(crate) values: &'a [f32],
    pub(crate) dtype: ComputeType,
}

impl Written<'_> {
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let bytes: Vec<(&str, &[usize], Vec<u8>)> = self
            .list
            .iter()
            .map(|parameter| {
                let values = &self.values[parameter.range.clone()];
                let bytes = match self.dtype {
                    ComputeType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                    ComputeType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
                };
                (&parameter.name[..], &parameter.shape[..], bytes)
            })
            .collect();
        let dtype = if self.dtype == ComputeType::F32 { Dtype::F32 } else { Dtype::BF16 };
        let wrong = |error: SafeTensorError| Error::Malformed { path: path.to_owned(), reason: error.to_string() };
        let views = bytes.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape.to_vec(), bytes)?)));
        let views: Vec<_> = views.collect::<std::result::Result<_, SafeTensorError>>().map_err(wrong)?;
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(metadata), path).map_err(wrong)?;
        // The file is made for its owner alone, but a server may be somebody else.
        #[cfg(unix)]
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).map_err(Error::io(path))?;
        fs::File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
    }
}

/// What a reward model cannot be made into.
fn check_init(recipe: &Recipe, config: &Config, kept_head: bool) -> Result<()> {
    let problem = match (&config.head, recipe.objective) {
        (Head::Language, _) => return Ok(()),
        (Head::Reward(_), objective) if objective != Objective::Preference => {
            "it can only be trained as a preference model".to_owned()
        }
        (Head::Reward(_), _) if !config.architecture.ends_with("ForSequenceClassification") => {
            format!("the layout of {} is read, but not written", config.architecture)
        }
        (Head::Reward(_), _) if recipe.language_weight > 0.0 && !config.tie_word_embeddings && !kept_head => {
            "it has no vocabulary head any more: set language-weight to 0".to_owned()
        }
        (Head::Reward(_), _) => return Ok(()),
    };
    Err(Error::Recipe(format!("{} is a reward model: {problem}", recipe.init)))
}

/// The end-of-context token's text and id.
fn end_of_context(recipe: &Recipe, eos: &Option<String>, tokenizer: &tokenizers::Tokenizer) -> Result<(String, u32)> {
    let Some(token) = recipe.end_of_context.as_ref().or(eos.as_ref()) else {
        return Err(Error::Recipe("the tokenizer has no EOS: name an end-of-context token".into()));
    };
    match tokenizer.token_to_id(token) {
        Some(id) => Ok((token.clone(), id)),
        None => Err(Error::Recipe(format!("end-of-context: the tokenizer has no token `{token}`"))),
    }
}

/// The tensors of a file, in f32.
fn read_tensors(path: &Path) -> Result<BTreeMap<String, Vec<f32>>> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let wrong = |reason: String| Error::Malformed { path: path.to_owned(), reason };
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
    let read = |(name, tensor): (String, TensorView<'_>)| {
        let data = tensor.data();
        let values = match tensor.dtype() {
            Dtype::F32 => data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::BF16 => data.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
            other => return Err(wrong(format!("`{name}` is {other:?}, neither F32 nor BF16"))),
        };
        Ok((name, values))
    };
    tensors.tensors().into_iter().map(read).collect()
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Malformed { path: path.to_owned(), reason: error.to_string() })
}

/// A class that reads what `tokenizer.json` says, post-processor included.
fn set_class(tokenizer_config: &mut Value) {
    tokenizer_config["tokenizer_class"] = json!("PreTrainedTokenizerFast");
    if let Some(object) = tokenizer_config.as_object_mut() {
        for key in ["add_bos_token", "add_eos_token", "chat_template", "backend", "is_local", "local_files_only"] {
            object.remove(key);
        }
    }
}

fn become_reward_model(json: &mut Value, config: &mut Config) {
    config.architecture = config.architecture.replace("ForCausalLM", "ForSequenceClassification");
    config.head = Head::Reward(RewardHead { weight: NEW_HEAD.to_owned(), bias: None, normalization: None });
    json["architectures"] = json!([config.architecture]);
    json["id2label"] = json!({"0": "LABEL_0"});
    json["label2id"] = json!({"LABEL_0": 0});
}

/// The special tokens that the tokenizer puts before a text.
fn leading(tokenizer: &tokenizers::Tokenizer) -> Result<Vec<String>> {
    let wrong = |error: tokenizers::Error| Error::Recipe(format!("the tokenizer: {error}"));
    let encoding = tokenizer.encode("a", true).map_err(wrong)?;
    let count = encoding.get_special_tokens_mask().iter().take_while(|mask| **mask == 1).count();
    Ok(encoding.get_tokens()[..count].to_vec())
}

/// A special token, and its id, that fills up where Transformers pads: there the last token that does not fill up has the
/// reward, and the filler's embedding does not learn. It stands in no text: neither at its end nor at its beginning.
fn filler(tokenizer: &tokenizers::Tokenizer, pad: &Option<String>, end: &str) -> Result<Option<(String, u32)>> {
    let beginning = leading(tokenizer)?;
    let mut special: Vec<(u32, String)> = tokenizer
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(_, token)| token.special && token.content != end && !beginning.contains(&token.content))
        .map(|(id, token)| (id, token.content))
        .collect();
    // The checkpoint's own first.
    special.sort_by_key(|(id, token)| (Some(token) != pad.as_ref(), *id));
    Ok(special.into_iter().next().map(|(id, token)| (token, id)))
}

/// `tokenizer.json` with a post-processor that puts the end-of-context token after every text.
fn with_end(tokenizer: &tokenizers::Tokenizer, (token, id): &(String, u32)) -> Result<String> {
    let wrong = |error: tokenizers::Error| Error::Recipe(format!("the tokenizer: {error}"));
    let encoding = tokenizer.encode("a", true).map_err(wrong)?;
    let mut json: Value = serde_json::from_str(&tokenizer.to_string(false).map_err(wrong)?)
        .map_err(|error| Error::Recipe(format!("the tokenizer: {error}")))?;
    if encoding.get_ids().last() != Some(id) {
        let leading = leading(tokenizer)?.len();
        let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
        let before: Vec<Value> = encoding.get_tokens()[..leading].iter().map(|token| special(token)).collect();
        let single: Vec<Value> =
            before.iter().cloned().chain([json!({"Sequence": {"id": "A", "type_id": 0}}), special(token)]).collect();
        let second = [json!({"Sequence": {"id": "B", "type_id": 0}}), special(token)];
        let pair: Vec<Value> = single.iter().cloned().chain(second).collect();
        let mut tokens = serde_json::Map::new();
        let known = encoding.get_tokens()[..leading].iter().zip(encoding.get_ids()).map(|(token, id)| (token, *id));
        for (token, id) in known.chain([(token, *id)]) {
            tokens.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        json["post_processor"] =
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens});
    }
    serde_json::to_string(&json).map_err(|error| Error::Recipe(format!("the tokenizer: {error}")))
}

/// The `Human:`/`Assistant:` form (Askell et al. 2021, section 2) as a chat template: a complete conversation ends with the
/// end-of-context token.
fn template(beginning: &str, end: &str) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let lines = [
        format!("{{{{- {} -}}}}", quoted(beginning)),
        "{%- for message in messages -%}".to_owned(),
        "{%- if not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}".to_owned(),
        "{%- if message.role == 'user' -%}{{- 'Human: ' + message.content -}}".to_owned(),
        "{%- elif message.role == 'assistant' -%}{{- 'Assistant: ' + message.content -}}".to_owned(),
        "{%- else -%}{{- message.content -}}".to_owned(),
        "{%- endif -%}".to_owned(),
        "{%- endfor -%}".to_owned(),
        format!(
            "{{%- if add_generation_prompt -%}}{{{{- '\\n\\nAssistant:' -}}}}{{%- else -%}}{{{{- {} -}}}}{{%- endif -%}}",
            quoted(end)
        ),
    ];
    lines.join("\n") + "\n"
}
