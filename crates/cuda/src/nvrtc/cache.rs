//! The cache of compiled kernels: one folder per content address, beside those of the CPU's kernels.
//!
//! ```text
//! <cache>/kernels/<2 digits>/<key>/kernel.cu       the text
//!                                  include/        the headers it was given
//!                                  kernel.ptx      the assembly text
//!                                  kernel.cubin    the machine code
//!                                  log.txt         what the compiler and the assembler said
//!                                  config.json     what it was compiled for, and checksums
//! ```
//!
//! An entry is written into a temporary folder and renamed, so that it exists whole or not at all.
//! One that does not fit its checksums is as good as none and is written again.

use super::CompileRequest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What an entry was compiled for, and the checksums of its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Config {
    version: String,
    name: String,
    arch: String,
    nvrtc: String,
    options: Vec<String>,
    cubin_sha256: String,
    ptx_sha256: String,
    log_sha256: String,
}

/// The files of an entry that are read back.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Output {
    pub(super) cubin: Vec<u8>,
    pub(super) ptx: String,
    pub(super) log: String,
}

/// A cache in a folder.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(super) fn new(root: &Path) -> Cache {
        Cache { root: root.join("kernels") }
    }

    pub(super) fn folder(&self, key: &str) -> PathBuf {
        self.root.join(&key[..2]).join(key)
    }

    /// The entry of this key, when it is there and whole.
    pub(super) fn load(&self, key: &str) -> Option<Output> {
        let folder = self.folder(key);
        let config: Config =
            serde_json::from_slice(&fs::read(folder.join("config.json")).ok()?).ok()?;
        let cubin = fs::read(folder.join("kernel.cubin")).ok()?;
        let ptx = fs::read_to_string(folder.join("kernel.ptx")).ok()?;
        let log = fs::read_to_string(folder.join("log.txt")).ok()?;
        let whole = sha256(&cubin) == config.cubin_sha256
            && sha256(ptx.as_bytes()) == config.ptx_sha256
            && sha256(log.as_bytes()) == config.log_sha256;
        whole.then_some(Output { cubin, ptx, log })
    }

    /// Stores an entry. The error is a sentence for the user.
    pub(super) fn store(
        &self,
        key: &str,
        request: &CompileRequest,
        nvrtc: &str,
        output: &Output,
    ) -> Result<(), String> {
        static COUNTER: AtomicUsize = AtomicUsize::new(0);
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temp = self.root.join(format!(".new-cuda-{}-{unique}", std::process::id()));
        let result =
            write_files(&temp, request, nvrtc, output).and_then(|()| self.place(&temp, key));
        if result.is_err() {
            let _ = fs::remove_dir_all(&temp);
        }
        result
            .map_err(|e| format!("the kernel cache {} cannot be written: {e}", self.root.display()))
    }

    fn place(&self, temp: &Path, key: &str) -> std::io::Result<()> {
        let folder = self.folder(key);
        if let Some(parent) = folder.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::rename(temp, &folder) {
            Ok(()) => Ok(()),
            // Somebody was faster with the same entry, or a damaged one is in the way.
            Err(_) if self.load(key).is_some() => fs::remove_dir_all(temp),
            Err(_) => {
                fs::remove_dir_all(&folder)?;
                fs::rename(temp, &folder)
            }
        }
    }
}

/// Writes what belongs together into a folder: for the cache, and for a kernel that failed.
pub(super) fn write_files(
    folder: &Path,
    request: &CompileRequest,
    nvrtc: &str,
    output: &Output,
) -> std::io::Result<()> {
    let config = Config {
        version: env!("CARGO_PKG_VERSION").into(),
        name: request.name.clone(),
        arch: request.arch.to_string(),
        nvrtc: nvrtc.to_owned(),
        options: request.all_options(),
        cubin_sha256: sha256(&output.cubin),
        ptx_sha256: sha256(output.ptx.as_bytes()),
        log_sha256: sha256(output.log.as_bytes()),
    };
    fs::create_dir_all(folder)?;
    fs::write(folder.join("kernel.cu"), &request.source)?;
    for (name, text) in &request.headers {
        // A header's name is a path below `include`; one that leaves it is not written.
        let inside = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        if inside {
            let path = folder.join("include").join(name);
            fs::create_dir_all(path.parent().unwrap_or(folder))?;
            fs::write(path, text)?;
        }
    }
    fs::write(folder.join("kernel.ptx"), &output.ptx)?;
    fs::write(folder.join("kernel.cubin"), &output.cubin)?;
    fs::write(folder.join("log.txt"), &output.log)?;
    fs::write(folder.join("config.json"), serde_json::to_vec_pretty(&config)?)
}

/// Content address: everything that the machine code depends on.
pub(super) fn key(request: &CompileRequest, nvrtc: &str) -> String {
    let options = request.all_options();
    let counts = [options.len().to_string(), request.headers.len().to_string()];
    let mut parts = vec!["cuda", env!("CARGO_PKG_VERSION"), nvrtc, &request.name, &request.source];
    parts.extend(counts.iter().map(String::as_str));
    parts.extend(options.iter().map(String::as_str));
    parts.extend(request.headers.iter().flat_map(|(name, text)| [name.as_str(), text.as_str()]));
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hex(&hash.finalize()[..20])
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arch;

    fn temp(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("tilewright-cuda-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    fn request() -> CompileRequest {
        CompileRequest::new("k", "text", Arch::SM_80)
            .header("a/b.cuh", "one")
            .header("c.cuh", "two")
    }

    #[test]
    fn entries_are_whole_or_absent() {
        let dir = temp("entries");
        let cache = Cache::new(&dir);
        let output = Output { cubin: vec![1, 2, 3], ptx: "ptx".into(), log: "log".into() };
        let key = key(&request(), "13.0");
        assert_eq!(cache.load(&key), None);
        cache.store(&key, &request(), "13.0", &output).unwrap();
        assert_eq!(cache.load(&key), Some(output.clone()));
        let folder = cache.folder(&key);
        assert_eq!(fs::read_to_string(folder.join("include/a/b.cuh")).unwrap(), "one");
        assert_eq!(fs::read_to_string(folder.join("kernel.cu")).unwrap(), "text");
        for (file, bytes) in
            [("kernel.cubin", &b"\x01\x02"[..]), ("log.txt", b"?"), ("config.json", b"{}")]
        {
            fs::write(folder.join(file), bytes).unwrap();
            assert_eq!(cache.load(&key), None, "{file}");
            cache.store(&key, &request(), "13.0", &output).unwrap();
            assert_eq!(cache.load(&key), Some(output.clone()), "{file}");
        }
        // Nothing temporary is left.
        let names = fs::read_dir(dir.join("kernels")).unwrap().map(|e| e.unwrap().file_name());
        assert_eq!(names.collect::<Vec<_>>(), [&key[..2]]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_header_that_leaves_its_folder_is_not_written() {
        let dir = temp("outside");
        let request = CompileRequest::new("k", "", Arch::SM_80).header("../outside.cuh", "x");
        let output = Output { cubin: vec![], ptx: String::new(), log: String::new() };
        write_files(&dir.join("entry"), &request, "13.0", &output).unwrap();
        assert!(!dir.join("entry/outside.cuh").exists() && !dir.join("outside.cuh").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn everything_that_matters_is_in_the_key() {
        let base = key(&request(), "13.0");
        let others = [
            key(&request(), "13.1"),
            key(&request().header("d.cuh", ""), "13.0"),
            key(&request().option("-DN=1"), "13.0"),
            key(&CompileRequest { arch: Arch::SM_89, ..request() }, "13.0"),
            key(&CompileRequest { source: "texts".into(), ..request() }, "13.0"),
            key(&CompileRequest { name: "l".into(), ..request() }, "13.0"),
        ];
        assert_eq!(base, key(&request(), "13.0"));
        for (i, other) in others.iter().enumerate() {
            assert_ne!(&base, other, "{i}");
            assert!(!others[..i].contains(other));
        }
    }
}
