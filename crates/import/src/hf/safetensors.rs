//! Reads safetensors files: memory-mapped, every number of the header checked, nothing copied.
//!
//! A file is a little-endian `u64` (length of the header), a JSON header that gives for each tensor
//! its `dtype`, `shape` and `data_offsets` (within the rest of the file), and the data. As the
//! format demands, tensors must cover the data without holes and without overlap.
//!
//! A tensor whose bytes are not aligned to its type (files of early writers) is copied: that is the
//! one case in which memory is taken for weights.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Bytes, MappedFile, Tensor};

/// The format's own limit on the header.
const LARGEST_HEADER: u64 = 100_000_000;

/// One file's tensors by name, and what cannot be held as a tensor.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Tensors over the mapped file.
    pub tensors: BTreeMap<String, Tensor>,
    /// Tensors of element types that we do not have: name and the type's name in the file.
    pub foreign: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Row {
    Tensor(Entry),
    Other {},
}

/// The element type that a header calls `name`, with its width in bits; `None` as type when we do
/// not have it, `None` altogether when nobody has.
fn element(name: &str) -> Option<(Option<DType>, usize)> {
    let ours = |d: DType| Some((Some(d), d.bits() as usize));
    match name {
        "F64" => ours(DType::F64),
        "F32" => ours(DType::F32),
        "F16" => ours(DType::F16),
        "BF16" => ours(DType::BF16),
        "F8_E4M3" => ours(DType::F8E4M3),
        "F8_E5M2" => ours(DType::F8E5M2),
        "I64" => ours(DType::I64),
        "I32" => ours(DType::I32),
        "I16" => ours(DType::I16),
        "I8" => ours(DType::I8),
        "U64" => ours(DType::U64),
        "U32" => ours(DType::U32),
        "U16" => ours(DType::U16),
        "U8" => ours(DType::U8),
        "BOOL" => ours(DType::Bool),
        "F4" => Some((None, 4)),
        "F6_E2M3" | "F6_E3M2" => Some((None, 6)),
        "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => Some((None, 8)),
        "C64" => Some((None, 64)),
        _ => None,
    }
}

/// Reads the header and maps the data.
pub fn read(path: &Path) -> Result<Contents> {
    let in_file = |e: Error| e.with_context(format!("reading `{}`", path.display()));
    let file = MappedFile::open(path)?;
    let whole = 0..file.len();
    parse(&Bytes::Mapped(file, whole)).map_err(in_file)
}

/// As [`read`], of a file in memory; the data is copied.
pub fn read_bytes(file: &[u8]) -> Result<Contents> {
    parse(&Bytes::copy_from(file))
}

/// The tensors of a file.
fn parse(file: &Bytes) -> Result<Contents> {
    let data_start = header_end(file)?;
    let header = file.get(8..data_start).unwrap_or_default();
    let rows: BTreeMap<String, Row> = serde_json::from_slice(header).map_err(|e| {
        Error::user(format!("the safetensors header is not what it should be: {e}"))
    })?;
    let data_len = file.len() - data_start;
    let mut entries: Vec<(String, Entry)> = Vec::with_capacity(rows.len());
    for (name, row) in rows {
        match row {
            Row::Tensor(entry) => entries.push((name, entry)),
            Row::Other {} if name == "__metadata__" => {}
            Row::Other {} => {
                return Err(Error::user(format!("the header's entry `{name}` is not a tensor")));
            }
        }
    }
    // Zero-sized tensors share their start with a neighbour, so the end decides next.
    entries.sort_by(|(a, x), (b, y)| (x.data_offsets, a).cmp(&(y.data_offsets, b)));
    let mut contents = Contents::default();
    let mut covered = 0;
    for (name, entry) in entries {
        let (start, end) = entry.data_offsets;
        let Some((dtype, bits)) = element(&entry.dtype) else {
            let message = format!("tensor `{name}` has the unknown element type `{}`", entry.dtype);
            return Err(Error::user(message));
        };
        if start != covered || end < start {
            return Err(Error::user(format!(
                "tensor `{name}` lies at {start}..{end}, but the data before it ends at {covered}"
            )));
        }
        if end > data_len {
            return Err(Error::user(format!(
                "tensor `{name}` ends at byte {end} of the data, which has {data_len}: the file is cut off"
            )));
        }
        covered = end;
        let count = entry.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let size = count.and_then(|n| n.checked_mul(bits)).filter(|b| b % 8 == 0).map(|b| b / 8);
        if size != Some(end - start) {
            return Err(Error::user(format!(
                "tensor `{name}` is {} of shape {:?} in {} bytes: that does not fit",
                entry.dtype,
                entry.shape,
                end - start
            )));
        }
        let Some(dtype) = dtype else {
            contents.foreign.insert(name, entry.dtype);
            continue;
        };
        let range = data_start + start..data_start + end;
        let bytes = file.part(range, dtype.size());
        let bytes = bytes.ok_or_else(|| Error::bug("a tensor outside the data, checked above"))?;
        contents.tensors.insert(name, Tensor::new(dtype, entry.shape, bytes)?);
    }
    if covered != data_len {
        let message = format!("{} bytes at the end belong to no tensor", data_len - covered);
        return Err(Error::user(message));
    }
    Ok(contents)
}

/// Where the header ends, by its length in the first eight bytes.
fn header_end(file: &[u8]) -> Result<usize> {
    let Some(first) = file.first_chunk::<8>() else {
        let message = format!("{} bytes are too few for a safetensors file", file.len());
        return Err(Error::user(message));
    };
    let len = u64::from_le_bytes(*first);
    if len > LARGEST_HEADER {
        return Err(Error::user(format!(
            "the header would be {len} bytes long, more than a safetensors file may have: \
             this is not a safetensors file, or it is damaged"
        )));
    }
    // At most 100 million, checked above.
    let end = 8 + len as usize;
    if end > file.len() {
        return Err(Error::user(format!(
            "the header ends at byte {end}, the file at {}: the file is cut off",
            file.len()
        )));
    }
    Ok(end)
}
