//! `TensorProto` to [`Tensor`]: every element type we have, every place the data may lie in.
//!
//! `raw_data` and external data stay in the mapped file, aligned or not; everything else is
//! copied. A file may lie: counts, offsets, lengths and paths are all checked here.

use super::proto::{SparseTensorProto, TensorProto};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use tilewright_base::{DType, Error, Result, ResultExt};
use tilewright_data::{Bytes, MappedFile, Tensor, element_count};

/// Our data type for an ONNX element type number.
pub(crate) fn dtype_of(code: i32) -> Result<DType> {
    Ok(match code {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::BF16,
        17 => DType::F8E4M3,
        19 => DType::F8E5M2,
        21 => DType::U4,
        22 => DType::I4,
        8 => return Err(Error::unsupported("string tensors")),
        14 | 15 => return Err(Error::unsupported("complex tensors")),
        18 => return Err(Error::unsupported("element type float8e4m3fnuz")),
        20 => return Err(Error::unsupported("element type float8e5m2fnuz")),
        23 => return Err(Error::unsupported("element type float4e2m1")),
        24 => return Err(Error::unsupported("element type float8e8m0")),
        25 => return Err(Error::unsupported("element type uint2")),
        26 => return Err(Error::unsupported("element type int2")),
        27 => return Err(Error::unsupported("element type float6e2m3")),
        28 => return Err(Error::unsupported("element type float6e3m2")),
        0 => return Err(Error::user("a tensor without an element type")),
        other => return Err(Error::user(format!("there is no element type number {other}"))),
    })
}

/// Where tensor data may come from besides the message itself.
#[derive(Default)]
pub(crate) struct Source {
    /// The mapped model file, for zero-copy slices.
    pub(crate) map: Option<Arc<MappedFile>>,
    /// Folder of the model; external data lies under it.
    pub(crate) base_dir: Option<PathBuf>,
    /// External files mapped so far.
    pub(crate) external: BTreeMap<PathBuf, Arc<MappedFile>>,
}

impl Source {
    /// The part of a mapped file as tensor bytes, aligned or not.
    fn from_map(map: &Arc<MappedFile>, start: usize, len: usize) -> Result<Bytes> {
        let end = start.checked_add(len).filter(|&e| e <= map.len());
        let Some(end) = end else {
            return Err(Error::user("data lies outside its file"));
        };
        Ok(Bytes::Mapped(map.clone(), start..end))
    }

    fn raw(&self, raw: &[u8]) -> Result<Bytes> {
        if let Some(map) = &self.map {
            let base = map.as_ptr() as usize;
            let at = raw.as_ptr() as usize;
            if at >= base && at + raw.len() <= base + map.len() {
                return Source::from_map(map, at - base, raw.len());
            }
        }
        Ok(Bytes::copy_from(raw))
    }

    /// Reads external data: location, offset and length as the message says.
    fn external(&mut self, proto: &TensorProto, want: usize) -> Result<Bytes> {
        let entry = |key: &str| proto.external_data.iter().find(|e| e.key == key).map(|e| &e.value);
        let number = |key: &str| match entry(key) {
            None => Ok(None),
            Some(text) => text.trim().parse::<usize>().map(Some).map_err(|_| {
                Error::user(format!("external data {key} `{text}` is not a size in bytes"))
            }),
        };
        let Some(location) = entry("location") else {
            return Err(Error::user("external data without a location"));
        };
        let offset = number("offset")?.unwrap_or(0);
        let length = number("length")?;
        if let Some(length) = length
            && length != want
        {
            return Err(Error::user(format!(
                "external data of {length} bytes where the shape needs {want}"
            )));
        }
        let relative = Path::new(location);
        let inside =
            relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        if !inside || location.is_empty() {
            return Err(Error::user(format!(
                "external data location `{location}` leads out of the model's folder"
            ))
            .with_hint("external files must lie beside the model, or below it"));
        }
        let Some(base) = &self.base_dir else {
            return Err(Error::user(format!(
                "external data `{location}`, but the model was not loaded from a file"
            )));
        };
        let path = base.join(relative);
        if !self.external.contains_key(&path) {
            // A symbolic link may still lead outside: compare the real paths.
            let real = path.canonicalize().map_err(|e| {
                Error::user(format!("external data file {} cannot be read: {e}", path.display()))
                    .with_hint("copy the data file beside the model")
            })?;
            let real_base = base.canonicalize().unwrap_or_else(|_| base.clone());
            if !real.starts_with(&real_base) {
                return Err(Error::user(format!(
                    "external data location `{location}` leads out of the model's folder"
                )));
            }
            let map = MappedFile::open(&real)?;
            self.external.insert(path.clone(), map);
        }
        let Some(map) = self.external.get(&path) else {
            return Err(Error::bug("a mapped file vanished"));
        };
        if offset.checked_add(want).is_none_or(|end| end > map.len()) {
            return Err(Error::user(format!(
                "external data at {offset} of {want} bytes, but {} has {} bytes",
                path.display(),
                map.len()
            )));
        }
        Source::from_map(map, offset, want)
    }

    /// The tensor that a message describes.
    pub(crate) fn tensor(&mut self, proto: &TensorProto) -> Result<Tensor> {
        self.tensor_inner(proto).context(|| match proto.name.as_str() {
            "" => "a tensor of the model".to_string(),
            name => format!("tensor `{name}`"),
        })
    }

    fn tensor_inner(&mut self, proto: &TensorProto) -> Result<Tensor> {
        let dtype = dtype_of(proto.data_type)?;
        let shape: Option<Vec<usize>> =
            proto.dims.iter().map(|&d| usize::try_from(d).ok()).collect();
        let Some(shape) = shape else {
            return Err(Error::user(format!("negative extent in shape {:?}", proto.dims)));
        };
        let count = element_count(&shape)?;
        let want = dtype
            .bytes_for(count)
            .ok_or_else(|| Error::user(format!("shape {shape:?} is too large")))?;
        if proto.data_location == 1 {
            let bytes = self.external(proto, want)?;
            return Tensor::new(dtype, shape, bytes);
        }
        if let Some(raw) = &proto.raw_data
            && (!raw.is_empty() || want == 0)
        {
            let bytes = self.raw(raw)?;
            return Tensor::new(dtype, shape, bytes);
        }
        let check = |got: usize, need: usize| {
            if got == need {
                return Ok(());
            }
            Err(Error::user(format!("{got} values where shape {shape:?} needs {need}")))
        };
        match dtype {
            DType::F32 => {
                check(proto.float_data.len(), count)?;
                Tensor::from_slice(&shape, &proto.float_data)
            }
            DType::F64 => {
                check(proto.double_data.len(), count)?;
                Tensor::from_slice(&shape, &proto.double_data)
            }
            DType::I64 => {
                check(proto.int64_data.len(), count)?;
                Tensor::from_slice(&shape, &proto.int64_data)
            }
            DType::U64 | DType::U32 => {
                check(proto.uint64_data.len(), count)?;
                let values: Vec<i64> = proto.uint64_data.iter().map(|&v| v as i64).collect();
                Tensor::from_i64s(dtype, &shape, &values)
            }
            // Bit patterns of the small floats sit in int32_data.
            DType::F16 | DType::BF16 => {
                check(proto.int32_data.len(), count)?;
                let bytes: Vec<u8> =
                    proto.int32_data.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect();
                Tensor::new(dtype, shape, Bytes::copy_from(&bytes))
            }
            // Bytes, and packed pairs of nibbles, one byte per entry.
            DType::F8E4M3 | DType::F8E5M2 | DType::I4 | DType::U4 => {
                check(proto.int32_data.len(), want)?;
                let bytes: Vec<u8> = proto.int32_data.iter().map(|&v| v as u8).collect();
                Tensor::new(dtype, shape, Bytes::copy_from(&bytes))
            }
            DType::I32 | DType::I16 | DType::I8 | DType::U16 | DType::U8 | DType::Bool => {
                check(proto.int32_data.len(), count)?;
                let values: Vec<i64> = proto.int32_data.iter().map(|&v| v.into()).collect();
                Tensor::from_i64s(dtype, &shape, &values)
            }
        }
    }

    /// A sparse tensor, made dense.
    pub(crate) fn sparse(&mut self, proto: &SparseTensorProto) -> Result<Tensor> {
        let (Some(values), Some(indices)) = (&proto.values, &proto.indices) else {
            return Err(Error::user("a sparse tensor without values or indices"));
        };
        let (values, indices) = (self.tensor(values)?, self.tensor(indices)?);
        let shape: Option<Vec<usize>> =
            proto.dims.iter().map(|&d| usize::try_from(d).ok()).collect();
        let Some(shape) = shape else {
            return Err(Error::user(format!("negative extent in shape {:?}", proto.dims)));
        };
        let mut out = Tensor::zeros(values.dtype(), shape.clone())?;
        let (count, total) = (values.len(), out.len());
        let bad = || Error::user("the indices of a sparse tensor do not fit its shape");
        let per_value = indices.len().checked_div(count).unwrap_or(0);
        if count > 0
            && (indices.len() % count != 0 || !(per_value == 1 || per_value == shape.len()))
        {
            return Err(bad());
        }
        let dtype = out.dtype();
        let bytes = out.bytes_mut();
        for i in 0..count {
            let at = if per_value == shape.len() && indices.shape().len() == 2 {
                let mut at = 0usize;
                for (axis, &extent) in shape.iter().enumerate() {
                    let x = usize::try_from(indices.get_i64(i * per_value + axis)).ok();
                    let x = x.filter(|&x| x < extent).ok_or_else(bad)?;
                    at = at * extent + x;
                }
                at
            } else {
                usize::try_from(indices.get_i64(i)).ok().filter(|&x| x < total).ok_or_else(bad)?
            };
            if dtype.is_float() {
                tilewright_data::from_f64(dtype, bytes, at, values.get_f64(i));
            } else {
                tilewright_data::from_i64(dtype, bytes, at, values.get_i64(i));
            }
        }
        Ok(out)
    }
}
