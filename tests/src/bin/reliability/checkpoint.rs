//! Copies of checkpoints: with other weights, so that two versions are told apart by every score, and damaged ones.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";
/// The token embedding, in the names of Llama and its kin.
const EMBEDDING: &str = "model.embed_tokens.weight";
/// What the names of all tensors of layers begin with.
const LAYERS: &str = "model.layers.";
/// The widest feed-forward network that a server takes.
const LARGEST_WIDTH: usize = 1 << 20;
/// A matrix that every layer has.
const MATRIX: &str = "model.layers.0.mlp.up_proj.weight";

/// A tensor as it is stored.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Copies the files of a folder.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// Copies a checkpoint; every weight of variant 1 and higher is another one by up to 1.5 %, drawn from its number.
pub(crate) fn variant(from: &Path, to: &Path, number: u64) -> Result<()> {
    copy(from, to)?;
    if number == 0 {
        return Ok(());
    }
    let mut rng = ChaCha8Rng::seed_from_u64(number);
    let mut factor = || 1.0 + rng.random_range(-0.015..0.015f32);
    change(to, |tensors| {
        for tensor in tensors.values_mut() {
            match tensor.dtype {
                Dtype::BF16 => tensor.bytes.chunks_exact_mut(2).for_each(|bytes| {
                    let weight = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32() * factor();
                    bytes.copy_from_slice(&bf16::from_f32(weight).to_le_bytes());
                }),
                Dtype::F32 => tensor.bytes.chunks_exact_mut(4).for_each(|bytes| {
                    let weight = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) * factor();
                    bytes.copy_from_slice(&weight.to_le_bytes());
                }),
                other => bail!("{}: weights in {other:?} cannot be varied; bf16 and f32 can", from.display()),
            }
        }
        Ok(())
    })
}

/// Makes the embedding of a token NaN.
pub(crate) fn poison(folder: &Path, token: u32) -> Result<()> {
    change(folder, |tensors| {
        let embedding = tensors.get_mut(EMBEDDING).context("no embedding by the name that Llama gives it")?;
        let nan: &[u8] = match embedding.dtype {
            Dtype::BF16 => &[0xc0, 0x7f],
            Dtype::F32 => &[0, 0, 0xc0, 0x7f],
            other => bail!("an embedding in {other:?} cannot be poisoned; bf16 and f32 can"),
        };
        let row = embedding.bytes.len() / embedding.shape.first().copied().unwrap_or(1).max(1);
        let row = embedding.bytes.chunks_exact_mut(row).nth(token as usize).context("no such token")?;
        row.chunks_exact_mut(nan.len()).for_each(|weight| weight.copy_from_slice(nan));
        Ok(())
    })
}

/// What is wrong with a checkpoint on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Damage {
    /// A byte of the weights is another one than when it was published.
    CorruptByte,
    /// The manifest lists another digest for the tokenizer.
    WrongDigest,
    /// The weights end early.
    Truncated,
    /// A matrix lies the wrong way round.
    WrongShape,
    /// A matrix is not there.
    MissingTensor,
    /// More weights than the machine has memory; a file with holes.
    TooLarge,
}

/// Copies a published version and damages the copy.
pub(crate) fn damaged(published: &Path, to: &Path, damage: Damage) -> Result<()> {
    copy(published, to)?;
    let weights = to.join(WEIGHTS);
    let manifest = to.join(crate::surface::MANIFEST);
    // What lies about its content in its own words is found without a digest.
    if !matches!(damage, Damage::CorruptByte | Damage::WrongDigest) {
        fs::remove_file(&manifest)?;
    }
    match damage {
        Damage::CorruptByte => {
            let mut bytes = fs::read(&weights)?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Ok(fs::write(&weights, bytes)?)
        }
        Damage::WrongDigest => edit_json(&manifest, |value| value["files"]["tokenizer.json"] = "0".repeat(64).into()),
        Damage::Truncated => {
            let file = File::options().write(true).open(&weights)?;
            Ok(file.set_len(file.metadata()?.len() * 2 / 3)?)
        }
        Damage::WrongShape => change(to, |tensors| {
            tensors.get_mut(MATRIX).context(MATRIX)?.shape.reverse();
            Ok(())
        }),
        Damage::MissingTensor => change(to, |tensors| {
            tensors.remove(MATRIX).context(MATRIX)?;
            Ok(())
        }),
        Damage::TooLarge => inflate(to),
    }
}

/// Gives the model wide and many layers, so that it takes more than the memory that is free; most of the file is a hole.
fn inflate(folder: &Path) -> Result<()> {
    let tensors = read(folder)?;
    let (layer, rest): (Vec<_>, Vec<_>) = tensors.iter().partition(|(name, _)| name.starts_with(LAYERS));
    let first: Vec<(&str, &Stored)> = layer
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix(LAYERS)?.strip_prefix("0.")?, tensor)))
        .collect();
    // Of a matrix of the feed-forward network, the smaller side is the hidden size.
    let widened = |name: &str, tensor: &Stored| {
        let hidden = tensor.shape.iter().copied().min().unwrap_or(1);
        let side = |&n: &usize| if n == hidden || !name.starts_with("mlp.") { n } else { LARGEST_WIDTH };
        tensor.shape.iter().map(side).collect::<Vec<_>>()
    };
    let bytes = |dtype: Dtype, shape: &[usize]| shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let of_layer: usize = first.iter().map(|(name, tensor)| bytes(tensor.dtype, &widened(name, tensor))).sum();
    let layers = free_memory()? * 5 / 4 / of_layer.max(1) + 1;
    edit_json(&folder.join("config.json"), |config| {
        config["intermediate_size"] = LARGEST_WIDTH.into();
        config["num_hidden_layers"] = layers.into();
    })?;
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    let mut add = |name: String, dtype: Dtype, shape: &[usize]| -> Result<()> {
        let begin = end;
        end += bytes(dtype, shape);
        let dtype = serde_json::to_value(dtype)?;
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
        Ok(())
    };
    for (name, tensor) in rest {
        add(name.clone(), tensor.dtype, &tensor.shape)?;
    }
    for number in 0..layers {
        for (name, tensor) in &first {
            add(format!("{LAYERS}{number}.{name}"), tensor.dtype, &widened(name, tensor))?;
        }
    }
    let header = serde_json::to_vec(&header)?;
    let mut file = File::create(folder.join(WEIGHTS))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    Ok(file.set_len((8 + header.len() + end) as u64)?)
}

/// Bytes of memory that could be had without swapping.
fn free_memory() -> Result<usize> {
    let text = fs::read_to_string("/proc/meminfo").context("no procfs as on Linux")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: usize = line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("MemAvailable")?;
    Ok(kib << 10)
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut value = serde_json::from_slice(&fs::read(path).with_context(|| path.display().to_string())?)?;
    change(&mut value);
    Ok(fs::write(path, value.to_string())?)
}

fn read(folder: &Path) -> Result<BTreeMap<String, Stored>> {
    let path: PathBuf = folder.join(WEIGHTS);
    let bytes = fs::read(&path).with_context(|| format!("{}: one file of weights is needed", path.display()))?;
    let stored = |(name, view): (String, TensorView<'_>)| {
        (name, Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    Ok(SafeTensors::deserialize(&bytes)?.tensors().into_iter().map(stored).collect())
}

/// Rewrites the weights of a folder.
fn change(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, Stored>) -> Result<()>) -> Result<()> {
    let mut tensors = read(folder)?;
    change(&mut tensors)?;
    let views = tensors
        .iter()
        .map(|(name, Stored { dtype, shape, bytes })| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    Ok(safetensors::serialize_to_file(views, metadata, &folder.join(WEIGHTS))?)
}
