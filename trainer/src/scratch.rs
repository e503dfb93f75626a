//! A language model to begin with: a tokenizer learned from text, and weights that have learned nothing.

use std::fs;
use std::path::{Path, PathBuf};

use plumb_model::checkpoint::read_config;
use plumb_model::decoder::gradient::Parameters;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Deserialize;
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

use crate::draft::{self, Written};
use crate::input::Lines;
use crate::output::write_folder;
use crate::recipe::ComputeType;
use crate::{Error, Result};

/// Ends every text, and every generation.
const END: &str = "<|endoftext|>";
/// Fills up where Transformers has to; never seen in training.
const FILLER: &str = "<|pad|>";
/// Standard deviation of a matrix's numbers (GPT-2).
const DEVIATION: f32 = 0.02;

/// Sizes of a Llama.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct Shape {
    /// Tokens that the tokenizer learns, special ones and bytes among them
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub vocab_size: usize,
    /// Width of the residual stream
    #[arg(long, value_name = "N", default_value_t = 192)]
    pub hidden_size: usize,
    /// Width of the feed-forward layer
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub intermediate_size: usize,
    /// Layers
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub layers: usize,
    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub heads: usize,
    /// Key and value heads
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub kv_heads: usize,
    /// Most tokens in a sequence
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub context: usize,
}

/// Learns a byte-level BPE tokenizer from the strings of JSONL files, and writes a checkpoint with random weights into a
/// folder that is not there yet.
///
/// # Errors
/// If the sizes make no decoder, a file cannot be read, or the folder exists.
pub fn scratch(files: &[PathBuf], output: &Path, shape: Shape, seed: u64) -> Result<()> {
    let Shape { vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, context } = shape;
    if output.exists() {
        return Err(Error::Recipe(format!("{} exists: name another folder", output.display())));
    }
    let sound = heads > 0 && kv_heads > 0 && hidden_size % (2 * heads.max(1)) == 0 && heads % kv_heads.max(1) == 0;
    if !sound || layers == 0 || intermediate_size % 2 != 0 || intermediate_size == 0 || context == 0 {
        let message = "these sizes make no decoder: hidden-size has to be a multiple of twice the heads, heads of \
                       kv-heads, intermediate-size even, and none of them 0";
        return Err(Error::Recipe(message.into()));
    }
    let tokenizer = tokenizer(files, vocab_size)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": 0,
        "dtype": "float32",
        "eos_token_id": 0,
        "head_dim": hidden_size / heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": DEVIATION,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": context,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": true,
        "vocab_size": vocab_size,
    });
    let tokenizer_config = json!({
        "bos_token": END,
        "eos_token": END,
        "model_max_length": context,
        "pad_token": FILLER,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    let files = [
        (draft::CONFIG, format!("{config:#}\n")),
        (draft::TOKENIZER, tokenizer),
        (draft::TOKENIZER_CONFIG, format!("{tokenizer_config:#}\n")),
    ];
    write_folder(output, |folder| {
        for (name, content) in &files {
            let path = folder.join(name);
            fs::write(&path, content).map_err(Error::io(&path))?;
        }
        let config = read_config(folder)?;
        let parameters = Parameters::new(&config, false);
        let values = random(&parameters, layers, seed);
        let list = parameters.list().iter().collect();
        Written { list, values: &values, dtype: ComputeType::F32 }.save(&folder.join(draft::WEIGHTS))
    })
}

/// Norms 1, biases 0, matrices normal; those that add to the residual stream smaller, as there are two in each layer.
fn random(parameters: &Parameters, layers: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut values = Vec::with_capacity(parameters.len());
    for parameter in parameters.list() {
        let adds = ["o_proj.weight", "down_proj.weight"].iter().any(|end| parameter.name.ends_with(end));
        let deviation = if adds { DEVIATION / ((2 * layers) as f32).sqrt() } else { DEVIATION };
        let draw = |_| match parameter.shape.len() {
            1 => 1.0,
            _ => deviation * Distribution::<f32>::sample(&StandardNormal, &mut rng),
        };
        values.extend(parameter.range.clone().map(draw));
    }
    values
}

/// The strings of a line.
#[derive(Deserialize)]
#[serde(untagged)]
enum Strings {
    Text(String),
    List(Vec<Strings>),
    Map(std::collections::BTreeMap<String, Strings>),
    Other(serde::de::IgnoredAny),
}

impl Strings {
    fn take(self, into: &mut Vec<String>) {
        match self {
            Self::Text(text) => into.push(text),
            Self::List(list) => list.into_iter().for_each(|item| item.take(into)),
            Self::Map(map) => map.into_values().for_each(|item| item.take(into)),
            Self::Other(_) => {}
        }
    }
}

/// `tokenizer.json`.
fn tokenizer(files: &[PathBuf], vocab_size: usize) -> Result<String> {
    let mut texts = Vec::new();
    for path in files {
        let mut lines = Lines::open(path)?;
        while let Some((number, line)) = lines.next()? {
            let strings: Strings = serde_json::from_slice(&line)
                .map_err(|error| Error::Malformed { path: path.clone(), reason: format!("line {number}: {error}") })?;
            strings.take(&mut texts);
        }
    }
    let wrong = |error: tokenizers::Error| Error::Recipe(format!("the tokenizer: {error}"));
    let bytes = ByteLevel::new(false, true, true);
    let special = |text: &str| AddedToken::from(text, true);
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(vec![special(END), special(FILLER)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(bytes))
        .with_post_processor(Some(bytes))
        .with_decoder(Some(bytes))
        .build()
        .map_err(wrong)?;
    tokenizer.train(&mut trainer, texts.into_iter()).map_err(wrong)?;
    tokenizer.to_string(false).map_err(wrong)
}
