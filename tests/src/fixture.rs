//! The checkpoints in `tests/fixtures`, what Transformers computed from them, and changed copies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use plumb_client::v1;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

/// Path of a fixture, such as `llama-pm` or `gguf/llama-lm.gguf`.
#[must_use]
pub fn fixture(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    assert!(path.exists(), "{}", path.display());
    path
}

/// `expected.json` of a fixture; its README says what is in it.
#[derive(Debug, Deserialize)]
pub struct Expected {
    /// Texts.
    pub cases: Vec<Case>,
    /// Conversations, where there is a chat template.
    #[serde(default)]
    pub conversations: Vec<Conversation>,
}

/// A text and what comes of it.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fixtures' README has the words")]
pub struct Case {
    pub name: String,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub reward: Option<f32>,
    pub normalized_reward: Option<f32>,
    #[serde(default)]
    pub token_rewards: Vec<f32>,
    #[serde(default)]
    pub token_log_probs: Vec<f32>,
    #[serde(default)]
    pub greedy: Vec<u32>,
}

/// A conversation and what comes of it.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fixtures' README has the words")]
pub struct Conversation {
    pub messages: Vec<Turn>,
    pub rendered: String,
    pub token_ids: Vec<u32>,
    pub rendered_with_generation_prompt: String,
    pub token_ids_with_generation_prompt: Vec<u32>,
    pub reward: Option<f32>,
    #[serde(default)]
    pub token_log_probs: Vec<f32>,
}

/// A turn of a conversation.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fixtures' README has the words")]
pub struct Turn {
    pub role: String,
    pub content: String,
}

impl Conversation {
    /// As an input.
    #[must_use]
    pub fn input(&self) -> v1::Input {
        plumb_client::conversation(self.messages.iter().map(|turn| (turn.role.as_str(), turn.content.as_str())))
    }
}

/// What Transformers computed from a fixture.
#[must_use]
pub fn expected(name: &str) -> Expected {
    let path = fixture(name);
    let path = if path.is_dir() { path.join("expected.json") } else { path.with_extension("expected.json") };
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A copy of a fixture that can be changed. It is gone when dropped.
#[derive(Debug)]
pub struct Copied(TempDir);

/// A tensor as it is stored.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Copied {
    /// Copies a fixture.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let copied = Self(tempfile::tempdir().unwrap());
        for entry in std::fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copied.path().join(entry.file_name())).unwrap();
        }
        copied
    }

    /// `llama-lm` with a context in which a generation outlasts a test.
    #[must_use]
    pub fn long_lm() -> Self {
        Self::of("llama-lm").json("config.json", |config| config["max_position_embeddings"] = 65_536.into())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// With a JSON file changed.
    #[must_use]
    pub fn json(self, file: &str, change: impl FnOnce(&mut Value)) -> Self {
        let path = self.path().join(file);
        let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
        self
    }

    /// With the weights changed.
    #[must_use]
    pub fn tensors(self, change: impl FnOnce(&mut BTreeMap<String, Stored>)) -> Self {
        let path = self.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let stored = |(name, view): (String, TensorView<'_>)| {
            (name, Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
        };
        let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(stored).collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, Stored { dtype, shape, bytes })| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, header.metadata().clone(), &path).unwrap();
        self
    }

    /// With NaN in the embedding of a token.
    #[must_use]
    pub fn poisoned(self, token: u32) -> Self {
        self.tensors(|tensors| {
            let embedding = tensors.get_mut("model.embed_tokens.weight").unwrap();
            assert_eq!(embedding.dtype, Dtype::BF16);
            let row = embedding.shape[1] * 2;
            for weight in embedding.bytes[token as usize * row..][..row].chunks_exact_mut(2) {
                weight.copy_from_slice(&[0xc0, 0x7f]);
            }
        })
    }
}
