//! NumPy files in and out.

use std::io::{BufReader, Write};
use std::path::Path;
use tilewright_base::{DType, Error, Result, ResultExt};
use tilewright_data::{Tensor, element_count};

/// Reads a `.npy` file of numbers in C order.
pub(crate) fn read(path: &Path) -> Result<Tensor> {
    let name = path.display();
    let failed = |what: String| Error::user(format!("{name}: {what}"));
    let file = std::fs::File::open(path).map_err(|e| failed(format!("cannot be opened: {e}")))?;
    let npy = npyz::NpyFile::new(BufReader::new(file))
        .map_err(|e| failed(format!("not a NumPy file: {e}")))?;
    if npy.order() != npyz::Order::C {
        return Err(
            failed("is in Fortran order".into()).with_hint("save numpy.ascontiguousarray(x)")
        );
    }
    let shape: Vec<usize> = npy
        .shape()
        .iter()
        .map(|&d| usize::try_from(d))
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| failed("its shape is too large".into()))?;
    element_count(&shape).context(|| format!("reading {name}"))?;
    let descr = npy.dtype().descr();
    let kind = descr.trim_matches(|c| c == '\'' || c == '"').to_string();
    macro_rules! typed {
        ($t:ty) => {{
            let values =
                npy.into_vec::<$t>().map_err(|e| failed(format!("cannot be read: {e}")))?;
            Tensor::from_slice(&shape, &values)
        }};
    }
    match kind.as_str() {
        "<f8" => typed!(f64),
        "<f4" => typed!(f32),
        "<i8" => typed!(i64),
        "<i4" => typed!(i32),
        "<i2" => typed!(i16),
        "|i1" | "<i1" => typed!(i8),
        "<u8" => typed!(u64),
        "<u4" => typed!(u32),
        "<u2" => typed!(u16),
        "|u1" | "<u1" => typed!(u8),
        "|b1" => {
            let values =
                npy.into_vec::<bool>().map_err(|e| failed(format!("cannot be read: {e}")))?;
            let values: Vec<i64> = values.into_iter().map(i64::from).collect();
            Tensor::from_i64s(DType::Bool, &shape, &values)
        }
        other => Err(Error::unsupported(format!("{name}: element type {other}"))),
    }
}

/// Writes a tensor; types that NumPy lacks (bf16, f8, 4-bit) become `f32` or `i8`. The file appears
/// whole or not at all.
pub(crate) fn write(path: &Path, tensor: &Tensor) -> Result<()> {
    let (descr, bytes): (&str, Vec<u8>) = match tensor.dtype() {
        DType::F64 => ("<f8", tensor.bytes().to_vec()),
        DType::F32 => ("<f4", tensor.bytes().to_vec()),
        DType::F16 => ("<f2", tensor.bytes().to_vec()),
        DType::I64 => ("<i8", tensor.bytes().to_vec()),
        DType::I32 => ("<i4", tensor.bytes().to_vec()),
        DType::I16 => ("<i2", tensor.bytes().to_vec()),
        DType::I8 => ("|i1", tensor.bytes().to_vec()),
        DType::U64 => ("<u8", tensor.bytes().to_vec()),
        DType::U32 => ("<u4", tensor.bytes().to_vec()),
        DType::U16 => ("<u2", tensor.bytes().to_vec()),
        DType::U8 => ("|u1", tensor.bytes().to_vec()),
        DType::Bool => ("|b1", tensor.bytes().to_vec()),
        DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => {
            let values = tensor.to_f64s();
            ("<f4", values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect())
        }
        DType::I4 | DType::U4 => ("|i1", tensor.to_i64s().iter().map(|v| *v as u8).collect()),
    };
    let dims: Vec<String> = tensor.shape().iter().map(|d| format!("{d},")).collect();
    let mut header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", dims.concat());
    // Magic, version and length take 10 bytes; the whole header is a multiple of 64.
    let padding = (64 - (10 + header.len() + 1) % 64) % 64;
    header += &" ".repeat(padding);
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(bytes);
    write_whole(path, &file)
}

/// Writes beside the target and renames, so that nobody sees half a file. A link stays one, and what is no file (a pipe, a
/// device such as `/dev/stdout`) is written to and not replaced.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |e: std::io::Error| Error::user(format!("cannot write {}: {e}", path.display()));
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let opened = std::fs::OpenOptions::new().write(true).open(path);
        return opened.and_then(|mut f| f.write_all(bytes)).map_err(failed);
    }
    let linked = std::fs::canonicalize(path);
    let path = linked.as_deref().unwrap_or(path);
    let mut temp = path.as_os_str().to_owned();
    temp.push(format!(".tmp{}", std::process::id()));
    let result = std::fs::File::create(&temp)
        .and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()))
        .and_then(|()| std::fs::rename(&temp, path));
    if result.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    result.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let path = std::env::temp_dir().join(format!("tilewright-npy-{}.npy", std::process::id()));
        for shape in [vec![], vec![3], vec![2, 0], vec![2, 3]] {
            let n: usize = shape.iter().product();
            let values: Vec<f32> = (0..n).map(|i| i as f32 * 1.5 - 1.0).collect();
            let tensor = Tensor::from_slice(&shape, &values).unwrap();
            write(&path, &tensor).unwrap();
            assert_eq!(read(&path).unwrap(), tensor);
        }
        std::fs::write(&path, b"not numpy").unwrap();
        assert!(read(&path).is_err());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn links_stay_links() {
        let folder = std::env::temp_dir().join(format!("tilewright-links-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (file, link) = (folder.join("file"), folder.join("link"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_whole(&link, b"new").unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
