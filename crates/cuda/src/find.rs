//! Where NVIDIA's libraries may lie. Only paths here: [`crate::nvrtc`], [`crate::driver`] and
//! [`crate::peer`] open them.
//!
//! | library | comes with | searched in |
//! |---|---|---|
//! | driver, `libcuda.so.1` | the kernel module | what the system's loader knows |
//! | NVRTC, `libnvrtc.so.13` | the toolkit, or a Python package | see [`in_order`] |
//! | cuBLASLt, `libcublasLt.so.13` | the same | the same |

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};

/// Names of the driver's library, for the system's loader.
pub(crate) fn driver() -> Vec<PathBuf> {
    let names: &[&str] =
        if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
    names.iter().map(PathBuf::from).collect()
}

/// Environment variable that names NVRTC's library or its folder.
pub(crate) const NVRTC_VARIABLE: &str = "TILEWRIGHT_NVRTC";

/// Environment variable that names cuBLASLt's library or its folder.
pub(crate) const CUBLASLT_VARIABLE: &str = "TILEWRIGHT_CUBLASLT";

/// Candidates for NVRTC, best first.
pub(crate) fn nvrtc() -> Vec<PathBuf> {
    in_order(NVRTC_VARIABLE, "libnvrtc.so")
}

/// Candidates for cuBLASLt, best first.
pub(crate) fn cublaslt() -> Vec<PathBuf> {
    in_order(CUBLASLT_VARIABLE, "libcublasLt.so")
}

/// Candidates for a library, best first: what the variable names (a file or a folder; when it is set,
/// nothing else counts), the program's folder, the Python packages of `VIRTUAL_ENV`, of the nearest
/// `.venv` and of the `python3` on the path, `/usr/local/cuda*`, and what the system's loader knows.
/// `stem` is the file's name without its version: `libnvrtc.so`.
fn in_order(variable: &str, stem: &str) -> Vec<PathBuf> {
    if let Some(given) = env::var_os(variable).filter(|v| !v.is_empty()) {
        return at(Path::new(&given), stem);
    }
    let mut found = Vec::new();
    if let Some(folder) = env::current_exe().ok().as_deref().and_then(Path::parent) {
        found.extend(in_folder(folder, stem));
        found.extend(in_folder(&folder.join("lib"), stem));
    }
    if let Some(venv) = env::var_os("VIRTUAL_ENV") {
        found.extend(in_venv(Path::new(&venv), stem));
    }
    if let Ok(here) = env::current_dir() {
        found.extend(here.ancestors().flat_map(|folder| in_venv(&folder.join(".venv"), stem)));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    if let Some(bin) = env::split_paths(&path).find(|folder| folder.join("python3").exists()) {
        found.extend(bin.parent().into_iter().flat_map(|prefix| in_venv(prefix, stem)));
    }
    let toolkits = children(Path::new("/usr/local"), |name| name.starts_with("cuda"));
    found.extend(toolkits.iter().rev().flat_map(|folder| in_folder(&folder.join("lib64"), stem)));
    found.extend(["13", "12"].map(|version| PathBuf::from(format!("{stem}.{version}"))));
    found.push(PathBuf::from(stem));
    found
}

/// The candidates of a path that the user gave.
fn at(given: &Path, stem: &str) -> Vec<PathBuf> {
    if given.is_dir() { in_folder(given, stem) } else { vec![given.to_owned()] }
}

/// A library in a folder, newest first; not the parts it opens itself, which have other names.
fn in_folder(folder: &Path, stem: &str) -> Vec<PathBuf> {
    let mut found = children(folder, |name| name.starts_with(stem));
    found.reverse();
    found
}

/// The Python packages of NVIDIA's libraries: `nvidia-*` (CUDA 13), `nvidia-cuda-nvrtc-cu12` and
/// `nvidia-cublas-cu12`.
fn in_venv(venv: &Path, stem: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for python in children(&venv.join("lib"), |name| name.starts_with("python")).iter().rev() {
        let packages = python.join("site-packages/nvidia");
        for folder in ["cu13/lib", "cuda_nvrtc/lib", "cublas/lib"] {
            found.extend(in_folder(&packages.join(folder), stem));
        }
    }
    found
}

/// `libnvrtc-builtins`, which NVRTC opens by its bare name: with the full path opened first, that
/// name is known, wherever it lies.
pub(crate) fn nvrtc_builtins(nvrtc: &Path) -> Vec<PathBuf> {
    let folder = nvrtc.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.map_or_else(Vec::new, |folder| {
        children(folder, |name| name.starts_with("libnvrtc-builtins.so"))
    })
}

/// Why a library did not open, in the loader's words.
pub(crate) fn reason(path: &Path, error: &libloading::Error) -> String {
    let words = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let named = words.contains(&*path.to_string_lossy());
    if named { words } else { format!("{}: {words}", path.display()) }
}

/// Entries of a folder by name, sorted; none when it cannot be read.
fn children(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|e| e.file_name().to_str().is_some_and(&wanted)).map(|e| e.path()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_virtual_environment_is_searched_without_the_parts_of_nvrtc() {
        let venv = env::temp_dir().join(format!("tilewright-find-{}", std::process::id()));
        let lib = venv.join("lib/python3.11/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&lib).unwrap();
        for name in ["libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0"] {
            fs::write(lib.join(name), "").unwrap();
        }
        assert_eq!(in_venv(&venv, "libnvrtc.so"), [lib.join("libnvrtc.so.13")]);
        assert_eq!(at(&lib, "libnvrtc.so"), [lib.join("libnvrtc.so.13")]);
        assert_eq!(at(&lib.join("nothing"), "libnvrtc.so"), [lib.join("nothing")]);
        let builtins = nvrtc_builtins(&lib.join("libnvrtc.so.13"));
        assert_eq!(builtins, [lib.join("libnvrtc-builtins.so.13.0")]);
        assert!(nvrtc_builtins(Path::new("libnvrtc.so.13")).is_empty());
        assert!(in_venv(&venv, "libcublasLt.so").is_empty());
        fs::remove_dir_all(&venv).unwrap();
        assert!(in_venv(&venv, "libnvrtc.so").is_empty());
    }
}
