//! A checkpoint's tensors: each is taken once, by its Hugging Face name, and none may be left over.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use plumb_kernels::fp8::Fp8Rows;
use plumb_kernels::linear::Held;
use plumb_kernels::quantised::QuantRows;

use super::lora::Adapter;
use crate::config::{Config, Head};
use crate::{Error, Result};

/// Tensors of a file: five times as many as a decoder of 1000 layers has.
pub(super) const MOST_TENSORS: usize = 1 << 16;
/// Bytes of a tensor's name; the longest published ones have about 100.
pub(super) const MOST_NAME: usize = 512;

/// Where tensors come from.
pub(super) trait TensorStore: Send + Sync {
    /// Every tensor, by its Hugging Face name.
    fn describe(&self) -> BTreeMap<String, Description>;
    /// Whether there is one of this name.
    fn holds(&self, name: &str) -> bool;
    /// Reads one. Its shape has been checked.
    fn read(&self, name: &str) -> Result<Tensor>;
    /// Reads one, and leaves a quantised matrix quantised.
    fn read_stored(&self, name: &str) -> Result<Stored> {
        self.read(name).map(Stored::Plain)
    }
}

/// A tensor as it is stored.
#[derive(Debug)]
pub enum Stored {
    /// One number a weight.
    Plain(Tensor),
    /// A matrix of integers and scales.
    Quantised(QuantRows),
    /// A matrix of e4m3 and scales.
    Fp8(Fp8Rows),
}

impl Stored {
    /// One number a weight, in the stored type, or in f32 if it was quantised or e4m3.
    ///
    /// # Errors
    /// [`Error::Tensor`], as every operation on a tensor.
    pub fn into_tensor(self) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor),
            Self::Quantised(rows) => {
                Ok(Tensor::from_vec(rows.expand::<f32>(), (rows.rows(), rows.inputs), &Device::Cpu)?)
            }
            Self::Fp8(rows) => Ok(Tensor::from_vec(rows.expand::<f32>(), (rows.rows(), rows.inputs), &Device::Cpu)?),
        }
    }
}

/// Tensors that are in memory.
struct Memory(BTreeMap<String, Tensor>);

impl TensorStore for Memory {
    fn describe(&self) -> BTreeMap<String, Description> {
        // Clones share their numbers.
        let describe = |tensor: &Tensor| Description {
            shape: tensor.dims().to_vec(),
            dtype: Some(tensor.dtype()),
            held: Held::Plain,
            reading: 0,
        };
        self.0.iter().map(|(name, tensor)| (name.clone(), describe(tensor))).collect()
    }

    fn holds(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn read(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::MissingTensor { name: name.to_owned(), expected: Vec::new() };
        self.0.get(name).cloned().ok_or_else(missing)
    }
}

/// What is known of a tensor before it is read.
#[derive(Clone, Debug)]
pub(super) struct Description {
    pub(super) shape: Vec<usize>,
    /// What to compute in; `None` if it cannot be read.
    pub(super) dtype: Option<DType>,
    /// How it can stay, if it is a matrix.
    pub(super) held: Held,
    /// Bytes of memory for a number that reading takes, with its result.
    pub(super) reading: usize,
}

/// How a tensor will come, as far as it is known before it is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Foreseen {
    /// What to compute in; f32 if nothing is known.
    pub(crate) dtype: DType,
    /// How it stays.
    pub(crate) held: Held,
    /// Bytes of memory for a number that reading takes, with its result.
    pub(crate) reading: usize,
}

/// The tensors of a checkpoint, adapter included, that have not been taken.
pub struct Weights {
    store: Box<dyn TensorStore>,
    left: BTreeMap<String, Entry>,
    adapter: Option<Adapter>,
    architecture: String,
    inert: Inert,
    rounded_to_fp8: bool,
}

struct Entry {
    /// Its name in the store.
    name: String,
    description: Description,
}

/// The Hugging Face name of a tensor. TRL saves a value head's model under its plain names; saved by other means, its
/// wrapper's attribute comes first.
fn canonical(name: &str) -> &str {
    name.strip_prefix("pretrained_model.").unwrap_or(name)
}

impl Weights {
    pub(super) fn new(store: Box<dyn TensorStore>, adapter: Option<Adapter>) -> Self {
        let mut left = BTreeMap::new();
        for (name, description) in store.describe() {
            left.insert(canonical(&name).to_owned(), Entry { name, description });
        }
        Self { store, left, adapter, architecture: String::new(), inert: Inert::default(), rounded_to_fp8: false }
    }

    /// Tensors by their Hugging Face names.
    pub(crate) fn from_tensors(tensors: BTreeMap<String, Tensor>) -> Self {
        Self::new(Box::new(Memory(tensors)), None)
    }

    /// Tells which tensors the model will not need.
    pub(super) fn configure(&mut self, config: &Config) {
        self.architecture = config.architecture.clone();
        self.inert = Inert {
            tied: config.tie_word_embeddings,
            reward_on_language_model: config.head != Head::Language
                && !config.architecture.ends_with("ForSequenceClassification"),
        };
    }

    /// Tells that the linear layers of the stack are wanted in e4m3, with a scale for each of their outputs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if they are quantised in another way.
    pub(crate) fn round_to_fp8(&mut self) -> Result<()> {
        let quantised = |entry: &Entry| matches!(entry.description.held, Held::Quantised(_));
        if self.left.values().any(quantised) {
            return Err(Error::Unsupported("fp8 of a checkpoint that is quantised already; take another dtype".into()));
        }
        self.rounded_to_fp8 = true;
        Ok(())
    }

    /// Whether [`Weights::round_to_fp8`] was called.
    pub(crate) fn are_rounded_to_fp8(&self) -> bool {
        self.rounded_to_fp8
    }

    /// The floating point type that most elements of linear weights have.
    pub(super) fn dtype(&self) -> Option<DType> {
        let mut elements: Vec<(DType, usize)> = Vec::new();
        for Description { shape, dtype, .. } in self.left.values().map(|entry| &entry.description) {
            let (Some(dtype), [_, _]) = (*dtype, shape.as_slice()) else { continue };
            let count: usize = shape.iter().product();
            match elements.iter_mut().find(|(other, _)| *other == dtype) {
                Some((_, sum)) => *sum += count,
                None => elements.push((dtype, count)),
            }
        }
        elements.into_iter().max_by_key(|(_, count)| *count).map(|(dtype, _)| dtype)
    }

    /// Whether the tensor is there and has not been taken.
    pub fn contains(&self, name: &str) -> bool {
        self.left.contains_key(name) || self.adapter.as_ref().is_some_and(|adapter| adapter.replaces(name))
    }

    /// How a tensor will come that is still to be taken.
    pub(crate) fn foresee(&self, name: &str) -> Foreseen {
        // Base, both factors' product, the same scaled, and the sum.
        const MERGING: usize = 4 * size_of::<f32>();
        let adapter = self.adapter.as_ref();
        let Some(Entry { description, .. }) = self.left.get(name).filter(|_| adapter.is_none_or(|a| !a.replaces(name)))
        else {
            return Foreseen { dtype: DType::F32, held: Held::Plain, reading: size_of::<f32>() };
        };
        let Description { dtype, held, reading, .. } = *description;
        match adapter.is_some_and(|adapter| adapter.changes(name)) {
            true => Foreseen { dtype: DType::F32, held: Held::Plain, reading: reading + MERGING },
            false => Foreseen { dtype: dtype.unwrap_or(DType::F32), held, reading },
        }
    }

    /// Takes a tensor, on the CPU and in its stored type; in f32 if it was quantised, e4m3 or an adapter was merged into it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] if it is not there or was taken, [`Error::MisshapenTensor`] if it has another shape.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.take_stored(name, shape)?.into_tensor()
    }

    /// As [`Weights::take`], but a matrix that is quantised or e4m3, and that no adapter changes, stays so.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn take_stored(&mut self, name: &str, shape: &[usize]) -> Result<Stored> {
        if let Some(replacement) = self.adapter.as_mut().and_then(|adapter| adapter.take_replacement(name)) {
            self.left.remove(name);
            let tensor = replacement?;
            check_shape(name, tensor.dims(), shape)?;
            return Ok(Stored::Plain(tensor));
        }
        let Some(entry) = self.left.get(name) else {
            return Err(Error::MissingTensor { name: name.to_owned(), expected: shape.to_vec() });
        };
        check_shape(name, &entry.description.shape, shape)?;
        let stored = self.store.read_stored(&entry.name)?;
        self.left.remove(name);
        match &mut self.adapter {
            Some(adapter) => adapter.merge(name, stored),
            None => Ok(stored),
        }
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// [`Error::ExtraTensors`] with everything that was not taken and that is not known to be inert.
    pub fn finish(self) -> Result<()> {
        let mut names: Vec<String> = self.left.into_keys().filter(|name| !self.inert.covers(name)).collect();
        names.extend(self.adapter.iter().flat_map(Adapter::unused));
        if names.is_empty() {
            return Ok(());
        }
        Err(Error::ExtraTensors { architecture: self.architecture, names })
    }
}

fn check_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::MisshapenTensor { name: name.to_owned(), found: found.to_vec(), expected: expected.to_vec() })
}

/// Which tensors may be left: the one list of what is ignored, and why.
#[derive(Default)]
struct Inert {
    tied: bool,
    /// A reward head on what was saved as, or from, a language model.
    reward_on_language_model: bool,
}

impl Inert {
    fn covers(&self, name: &str) -> bool {
        let language_head = matches!(name, "lm_head.weight" | "embed_out.weight");
        // The rotary frequencies follow from the configuration; older versions of Transformers saved them all the same.
        name.ends_with(".rotary_emb.inv_freq")
            // GPT-NeoX's causal mask and the value it fills in: constants, saved by older versions of Transformers.
            || name.ends_with(".attention.bias")
            || name.ends_with(".attention.masked_bias")
            // A second copy of the embedding.
            || (language_head && self.tied)
            // The head of the language model that the reward model was made from; TRL and adapters leave it in place.
            || (language_head && self.reward_on_language_model)
            // OpenRLHF's buffers; the values that count are in its config.json.
            || (self.reward_on_language_model && matches!(name, "mean" | "std"))
    }
}
