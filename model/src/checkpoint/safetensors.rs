//! Tensors in safetensors files: one file, or an index and shards.
//!
//! Only the headers are read when files are opened; a tensor is read from its place in the file, straight into the
//! memory that it is used from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor, WithDType};
use plumb_kernels::fp8::Fp8Rows;
use plumb_kernels::linear::Held;
use plumb_kernels::memory::OutOfMemory;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::fields::{Fields, read_json};
use super::manifest::is_file_name;
use super::read::{Bytes, Reader};
use super::weights::{Description, MOST_NAME, MOST_TENSORS, Stored, TensorStore};
use crate::{Error, Result};

/// Bytes of a header: [`MOST_TENSORS`] of 256 bytes each. The format's own limit, 100 MB, becomes 1 GB in memory.
const MOST_HEADER: u64 = 16 << 20;
/// Dimensions of a tensor; matrices have two.
const MOST_DIMS: usize = 8;

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Open safetensors files with distinct tensors.
#[derive(Debug)]
pub(super) struct Safetensors {
    files: Vec<OpenFile>,
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

#[derive(Debug)]
struct OpenFile {
    bytes: Bytes,
    /// Where the tensors begin.
    data: u64,
}

/// The names of the files with a folder's weights, the index included.
pub(super) fn weight_files(folder: &Path) -> Result<Vec<String>> {
    if folder.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    if folder.join(INDEX).is_file() {
        let mut files: Vec<String> = shards(folder)?.into_values().collect();
        files.push(INDEX.to_owned());
        files.sort();
        files.dedup();
        return Ok(files);
    }
    for pickle in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        if folder.join(pickle).exists() {
            return Err(Error::Unsupported(format!(
                "{} holds `{pickle}` and no safetensors; a pickle can run code, so it is not read. Convert it: load it \
                 with transformers and call save_pretrained(folder, safe_serialization=True)",
                folder.display()
            )));
        }
    }
    Err(Error::MissingFile { path: folder.to_owned(), what: format!("`{SINGLE}` or `{INDEX}`") })
}

/// The index: the shard of each tensor.
fn shards(folder: &Path) -> Result<BTreeMap<String, String>> {
    let path = folder.join(INDEX);
    let json = read_json(&path)?;
    let index = Fields::new(&path, &json)?;
    let map = index.object("weight_map")?.ok_or_else(|| index.wrong("weight_map", "the shard of each tensor"))?;
    let shard = |(name, value): (&String, &serde_json::Value)| match value.as_str() {
        Some(file) if is_file_name(file) && file.ends_with(".safetensors") => Ok((name.clone(), file.to_owned())),
        _ => Err(map.wrong(name, "the name of a .safetensors file in the same folder")),
    };
    map.iter().map(shard).collect()
}

impl Safetensors {
    /// Opens what [`weight_files`] names.
    pub(super) fn open_folder(folder: &Path, weight_files: &[String], reader: &Reader) -> Result<Self> {
        let shards_of = |file: &&String| file.ends_with(".safetensors");
        let paths: Vec<_> = weight_files.iter().filter(shards_of).map(|file| folder.join(file)).collect();
        let opened = Self::open(&paths, reader)?;
        if weight_files.iter().any(|file| file == INDEX) {
            for (name, shard) in shards(folder)? {
                let found = opened.tensors.get(&name).map(|(file, _)| opened.files[*file].bytes.path());
                if found != Some(&folder.join(&shard)) {
                    let reason = format!("tensor `{name}` is not here, though {INDEX} says so");
                    return Err(Error::Malformed { path: folder.join(shard), reason });
                }
            }
        }
        Ok(opened)
    }

    pub(super) fn open(paths: &[PathBuf], reader: &Reader) -> Result<Self> {
        let mut files = Vec::with_capacity(paths.len());
        let mut tensors = BTreeMap::new();
        for (index, path) in paths.iter().enumerate() {
            let bytes = reader.open(path)?;
            let (data, metadata) = read_header(&bytes)?;
            for (name, info) in metadata.tensors() {
                if tensors.insert(name.clone(), (index, info.clone())).is_some() {
                    let reason = format!("tensor `{name}` is also in another shard");
                    return Err(Error::Malformed { path: path.clone(), reason });
                }
            }
            files.push(OpenFile { bytes, data });
        }
        Ok(Self { files, tensors })
    }
}

/// Reads and checks a header; returns where the tensors begin.
fn read_header(file: &Bytes) -> Result<(u64, Metadata)> {
    let malformed = |reason: String| Error::Malformed { path: file.path().to_owned(), reason };
    let length = file.len();
    let mut prefix = [0; 8];
    if length < prefix.len() as u64 {
        return Err(malformed(format!("not safetensors: {length} bytes; copy or download it again")));
    }
    file.read_exact_at(&mut prefix, 0)?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > MOST_HEADER.min(length - 8) {
        return Err(malformed(format!("not safetensors: a header of {header_length} bytes in a file of {length}")));
    }
    let mut header = vec![0; header_length as usize];
    file.read_exact_at(&mut header, 8)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| malformed(format!("not safetensors: {error}")))?;
    check_tensors(&metadata).map_err(malformed)?;
    let data = 8 + header_length;
    let described = metadata.data_len() as u64;
    if described != length - data {
        return Err(malformed(format!(
            "the header describes {described} bytes of tensors, there are {}; copy or download it again",
            length - data
        )));
    }
    Ok((data, metadata))
}

/// What the format allows and no checkpoint has.
fn check_tensors(metadata: &Metadata) -> Result<(), String> {
    let tensors = metadata.tensors();
    if tensors.len() > MOST_TENSORS {
        return Err(format!("{} tensors, {MOST_TENSORS} are allowed", tensors.len()));
    }
    for (name, info) in tensors {
        if name.len() > MOST_NAME {
            return Err(format!("a tensor's name has {} bytes, {MOST_NAME} are allowed", name.len()));
        }
        if info.shape.len() > MOST_DIMS {
            return Err(format!("tensor `{name}` has {} dimensions, {MOST_DIMS} are allowed", info.shape.len()));
        }
    }
    Ok(())
}

impl TensorStore for Safetensors {
    fn describe(&self) -> BTreeMap<String, Description> {
        let describe = |(name, (_, info)): (&String, &(usize, TensorInfo))| {
            let (dtype, held) = match info.dtype {
                Dtype::F32 => (Some(DType::F32), Held::Plain),
                Dtype::F16 => (Some(DType::F16), Held::Plain),
                Dtype::BF16 => (Some(DType::BF16), Held::Plain),
                // To be computed in bf16 where not in e4m3.
                Dtype::F8_E4M3 if self.scales_of(name).is_some() => (Some(DType::BF16), Held::Fp8),
                _ => (None, Held::Plain),
            };
            let reading = if held == Held::Fp8 { 1 } else { dtype.map_or(0, |dtype| dtype.size_in_bytes()) };
            (name.clone(), Description { shape: info.shape.clone(), dtype, held, reading })
        };
        // Scales are a part of what they scale.
        let scales: BTreeSet<String> = self.tensors.keys().filter_map(|name| self.scales_of(name)).collect();
        self.tensors.iter().filter(|(name, _)| !scales.contains(*name)).map(describe).collect()
    }

    fn holds(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn read(&self, name: &str) -> Result<Tensor> {
        let Some((file, info)) = self.tensors.get(name) else {
            return Err(Error::MissingTensor { name: name.to_owned(), expected: Vec::new() });
        };
        let file = &self.files[*file];
        match info.dtype {
            Dtype::F32 => read::<f32>(file, info),
            Dtype::F16 => read::<half::f16>(file, info),
            Dtype::BF16 => read::<half::bf16>(file, info),
            Dtype::F8_E4M3 if self.scales_of(name).is_some() => self.read_stored(name)?.into_tensor(),
            other => Err(Error::Unsupported(format!(
                "tensor `{name}` is stored as {other}; F32, F16 and BF16 are read, and F8_E4M3 with a scale for every output"
            ))),
        }
    }

    fn read_stored(&self, name: &str) -> Result<Stored> {
        match (self.tensors.get(name), self.scales_of(name)) {
            (Some((file, info)), Some(scales)) => {
                let scales = self.read(&scales)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                let codes = read_values::<u8>(&self.files[*file], info)?;
                Ok(Stored::Fp8(Fp8Rows { inputs: info.shape[1], codes, scales }))
            }
            _ => self.read(name).map(Stored::Plain),
        }
    }
}

impl Safetensors {
    /// The name of the scales `[outputs, 1]` of a matrix that is stored as e4m3, as compressed-tensors has them.
    fn scales_of(&self, name: &str) -> Option<String> {
        let (_, info) = self.tensors.get(name).filter(|(_, info)| info.dtype == Dtype::F8_E4M3)?;
        let scales = format!("{}.weight_scale", name.strip_suffix(".weight")?);
        let (_, of_scales) = self.tensors.get(&scales)?;
        let [outputs, inputs] = info.shape[..] else { return None };
        let fits = inputs > 0 && of_scales.shape == [outputs, 1] && of_scales.dtype != Dtype::F8_E4M3;
        fits.then_some(scales)
    }
}

/// Room for so many numbers, or an error: a vector that cannot grow would end the process.
fn zeros<T: Pod>(len: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    if values.try_reserve_exact(len).is_err() {
        return Err(OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) }.into());
    }
    values.resize(len, T::zeroed());
    Ok(values)
}

/// The header was checked: the tensor lies within the file, and its length is that of its shape.
fn read<T: WithDType + Pod>(file: &OpenFile, info: &TensorInfo) -> Result<Tensor> {
    Ok(Tensor::from_vec(read_values::<T>(file, info)?, info.shape.as_slice(), &Device::Cpu)?)
}

fn read_values<T: Pod>(file: &OpenFile, info: &TensorInfo) -> Result<Vec<T>> {
    let mut values = zeros(info.shape.iter().product())?;
    file.bytes.read_exact_at(bytemuck::cast_slice_mut::<T, u8>(&mut values), file.data + info.data_offsets.0 as u64)?;
    Ok(values)
}
