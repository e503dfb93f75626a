//! What stands before the tensors of a GGUF file. Every count and length in it is the file's word, so each is checked
//! against what the file has left and against a limit, before memory is taken for it.
//!
//! The layout is that of ggml's `docs/gguf.md`, versions 1 to 3, little-endian.

use std::collections::HashMap;
use std::io::{Error as IoError, Read};

use candle_core::Shape;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, DEFAULT_ALIGNMENT, TensorInfo, Value, VersionedMagic};

use super::weights::{MOST_NAME, MOST_TENSORS};

/// Values, those in arrays among them. A vocabulary of 256,000 tokens has about 1,300,000: texts, scores, types, merges.
/// One takes 32 bytes of memory, be it a byte in the file.
const MOST_VALUES: u64 = 1 << 22;
/// Bytes of all texts together: that vocabulary has about 8 MiB.
const MOST_TEXT: u64 = 64 << 20;
/// The specification's limit of a key.
const MOST_KEY: u64 = (1 << 16) - 1;
/// ggml's limit, `GGML_MAX_DIMS`.
const MOST_DIMS: u32 = 4;
/// Arrays in arrays; no known file has any.
const MOST_DEPTH: usize = 2;
/// Where tensors may begin: multiples of a memory page at most.
const MOST_ALIGNMENT: u64 = 1 << 16;

/// Types by their number in `ggml.h`. The quantised ones are those that `gguf_blocks` takes apart.
const TYPES: [(u32, GgmlDType); 13] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (30, GgmlDType::BF16),
];

/// Reads a header from the start of a file of `length` bytes.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(reader: impl Read, length: u64) -> Result<Content, String> {
    let mut header = Header { reader, at: 0, length, version: 0, values: 0, text: 0 };
    if &header.bytes::<4>()? != b"GGUF" {
        return Err("it does not begin with `GGUF`".to_owned());
    }
    header.version = header.u32()?;
    let magic = match header.version {
        1 => VersionedMagic::GgufV1,
        2 => VersionedMagic::GgufV2,
        3 => VersionedMagic::GgufV3,
        other => return Err(format!("version {other} (big-endian?); 1, 2 and 3 are read")),
    };
    let tensors = header.count("tensors", MOST_TENSORS as u64)?;
    let entries = header.count("entries of metadata", MOST_VALUES)?;
    let metadata = header.metadata(entries)?;
    let tensor_infos = header.tensors(tensors)?;
    let alignment = alignment(&metadata)?;
    let tensor_data_offset = header.at.next_multiple_of(alignment);
    for (name, info) in &tensor_infos {
        let end = bytes_of(info).and_then(|bytes| tensor_data_offset.checked_add(info.offset)?.checked_add(bytes));
        if end.is_none_or(|end| end > length) {
            let shape = info.shape.dims();
            return Err(format!(
                "tensor `{name}`, {shape:?} of {:?} at {}, does not fit into a file of {length} bytes; copy or download \
                 it again",
                info.ggml_dtype, info.offset
            ));
        }
    }
    Ok(Content { magic, metadata, tensor_infos, tensor_data_offset })
}

/// Bytes of a tensor in the file; `None` if its shape makes no sense.
fn bytes_of(info: &TensorInfo) -> Option<u64> {
    let elements = info.shape.dims().iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim))?;
    let block = info.ggml_dtype.block_size();
    let blocks = elements.is_multiple_of(block).then_some(elements / block)?;
    u64::try_from(blocks.checked_mul(info.ggml_dtype.type_size())?).ok()
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<u64, String> {
    let alignment = match metadata.get("general.alignment") {
        None => return Ok(DEFAULT_ALIGNMENT),
        Some(Value::I32(value)) => u64::try_from(*value).ok(),
        Some(value) => value.to_u64().ok(),
    };
    alignment
        .filter(|bytes| bytes.is_power_of_two() && *bytes <= MOST_ALIGNMENT)
        .ok_or_else(|| format!("`general.alignment` is not a power of 2 up to {MOST_ALIGNMENT}"))
}

/// A header that is being read.
struct Header<R> {
    reader: R,
    /// Bytes that have been read.
    at: u64,
    /// Bytes of the file.
    length: u64,
    version: u32,
    values: u64,
    text: u64,
}

impl<R: Read> Header<R> {
    fn metadata(&mut self, entries: u64) -> Result<HashMap<String, Value>, String> {
        let mut metadata = HashMap::new();
        for _ in 0..entries {
            let key = self.text("a key", MOST_KEY)?;
            let kind = self.u32()?;
            let value = self.value(kind, 0).map_err(|reason| format!("`{key}`: {reason}"))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("`{key}` is there twice"));
            }
        }
        Ok(metadata)
    }

    fn tensors(&mut self, count: u64) -> Result<HashMap<String, TensorInfo>, String> {
        let mut tensors = HashMap::new();
        for _ in 0..count {
            let name = self.text("a tensor's name", MOST_NAME as u64)?;
            let dims = self.u32()?;
            if dims > MOST_DIMS {
                return Err(format!("tensor `{name}` has {dims} dimensions, {MOST_DIMS} are allowed"));
            }
            // The first one is the innermost.
            let mut shape = (0..dims).map(|_| self.size()).collect::<Result<Vec<_>, _>>()?;
            shape.reverse();
            let kind = self.u32()?;
            let Some((_, ggml_dtype)) = TYPES.into_iter().find(|(number, _)| *number == kind) else {
                return Err(format!("tensor `{name}` has ggml's type {kind}, which is not read"));
            };
            let info = TensorInfo { ggml_dtype, shape: Shape::from(shape), offset: self.u64()? };
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("tensor `{name}` is there twice"));
            }
        }
        Ok(tensors)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, String> {
        self.values += 1;
        if self.values > MOST_VALUES {
            return Err(format!("more than {MOST_VALUES} values"));
        }
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("{other} is neither true nor false")),
            },
            8 => Value::String(self.text("a text", MOST_TEXT)?),
            9 if depth < MOST_DEPTH => {
                let kind = self.u32()?;
                let count = self.count("values", MOST_VALUES)?;
                // Grows with what is there, not with what is said to be there.
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, depth + 1)?);
                }
                Value::Array(values)
            }
            9 => return Err(format!("arrays nested more than {MOST_DEPTH} deep")),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            other => return Err(format!("{other} is not a type of value")),
        })
    }

    /// A number of things, each of which takes a byte at least.
    fn count(&mut self, what: &str, most: u64) -> Result<u64, String> {
        let count = self.size()? as u64;
        let left = self.length.saturating_sub(self.at);
        if count > most.min(left) {
            return Err(format!("{count} {what}; {most} are allowed, and {left} bytes are left"));
        }
        Ok(count)
    }

    /// A text, of which files hold some that are not UTF-8 and some that end with a zero.
    fn text(&mut self, what: &str, most: u64) -> Result<String, String> {
        let length = self.count("bytes", most).map_err(|reason| format!("{what} of {reason}"))?;
        self.text += length;
        if self.text > MOST_TEXT {
            return Err(format!("texts of more than {MOST_TEXT} bytes together"));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// A size or a length, of the version's width.
    fn size(&mut self) -> Result<usize, String> {
        let size = if self.version == 1 { u64::from(self.u32()?) } else { self.u64()? };
        usize::try_from(size).map_err(|_| format!("a size of {size}"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        let unreadable = |error: IoError| format!("the header ends in the middle, at byte {}: {error}", self.at);
        self.reader.read_exact(bytes).map_err(unreadable)?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// A file of version 3 with this behind its counts.
    fn file(tensors: u64, entries: u64, rest: &[&[u8]]) -> Vec<u8> {
        let counts = [&tensors.to_le_bytes()[..], &entries.to_le_bytes()].concat();
        [&b"GGUF\x03\0\0\0"[..], &counts, &rest.concat()].concat()
    }

    fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let dims: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        let count = (dims.len() as u32 / 8).to_le_bytes();
        [&text(name)[..], &count, &dims, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
    }

    fn alignment(bytes: u32) -> Vec<u8> {
        [&text("general.alignment")[..], &4_u32.to_le_bytes(), &bytes.to_le_bytes()].concat()
    }

    #[test]
    fn values_and_tensors_are_read() {
        let list = [&text("k\0")[..], &ARRAY.to_le_bytes(), &TEXT.to_le_bytes(), &2_u64.to_le_bytes()].concat();
        let mut bytes = file(1, 2, &[&list, &text("a"), &text("é"), &alignment(64), &tensor("t", &[32, 2], 2, 0)]);
        let begins = bytes.len().next_multiple_of(64);
        bytes.resize(begins + 2 * 18, 0);
        let content = read(bytes.as_slice(), bytes.len() as u64).unwrap();
        assert_eq!(format!("{:?}", content.metadata["k"]), r#"Array([String("a"), String("é")])"#);
        assert_eq!(content.tensor_infos["t"].shape.dims(), [2, 32], "the outermost first");
        assert_eq!(content.tensor_data_offset, begins as u64);
        // A byte less, and the tensor is cut.
        let cut = &bytes[..bytes.len() - 1];
        assert!(read(cut, cut.len() as u64).unwrap_err().contains("tensor `t`, [2, 32] of Q4_0 at 0, does not fit"));
    }

    #[test]
    fn what_a_file_only_claims_takes_no_memory() {
        let check = |bytes: Vec<u8>, reason: &str| {
            let error = read(bytes.as_slice(), bytes.len() as u64).unwrap_err();
            assert!(error.contains(reason), "{error}");
        };
        let key = text("k");
        let of = |kind: u32| [&key[..], &kind.to_le_bytes()].concat();
        let huge = u64::MAX.to_le_bytes();
        check(b"GGUG".to_vec(), "does not begin with `GGUF`");
        check(b"GGUF\0\0\0\x03".to_vec(), "version 50331648 (big-endian?)");
        check(file(u64::MAX, 0, &[]), "tensors; 65536 are allowed");
        check(file(0, 1 << 20, &[]), "entries of metadata; 4194304 are allowed, and 0 bytes are left");
        check(file(0, 1, &[&huge]), "a key of");
        check(file(0, 1, &[&of(TEXT), &huge]), "`k`: a text of");
        check(file(0, 1, &[&of(ARRAY), &0_u32.to_le_bytes(), &huge]), "`k`: 18446744073709551615 values");
        check(file(0, 1, &[&of(7), &[2]]), "neither true nor false");
        check(file(0, 1, &[&of(13)]), "13 is not a type of value");
        check(file(0, 1, &[&of(4), &[0]]), "ends in the middle");
        let nested = [&ARRAY.to_le_bytes()[..], &1_u64.to_le_bytes()].concat();
        check(file(0, 1, &[&of(ARRAY), &nested, &nested, &nested]), "nested more than 2 deep");
        let entry = [&of(0)[..], &[1]].concat();
        check(file(0, 2, &[&entry, &entry]), "`k` is there twice");
        for bytes in [0, 3, 1 << 17] {
            check(file(0, 1, &[&alignment(bytes)]), "`general.alignment` is not a power of 2");
        }
        check(file(2, 0, &[&tensor("t", &[0], 0, 0), &tensor("t", &[0], 0, 0)]), "tensor `t` is there twice");
        check(file(1, 0, &[&tensor("t", &[1; 5], 0, 0)]), "has 5 dimensions");
        check(file(1, 0, &[&tensor("t", &[1 << 33, 1 << 33], 0, 0)]), "does not fit");
        check(file(1, 0, &[&tensor("t", &[1], 0, u64::MAX)]), "does not fit");
        check(file(1, 0, &[&tensor("t", &[31], 2, 0)]), "does not fit");
    }
}
