//! Gives the crate a digest of its own sources and of those that it depends on: whoever keeps what was printed, keeps it
//! for these sources only.

use std::fs;
use std::path::{Path, PathBuf};

/// The crates whose sources decide about texts.
const CRATES: [&str; 5] = ["base", "layout", "expr", "tile", "emit-llvm"];

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let mut files = Vec::new();
    for name in CRATES {
        // Beside this crate; where it stands alone, the version speaks for the others.
        let folder = here.join("..").join(name).join("src");
        println!("cargo:rerun-if-changed={}", folder.display());
        collect(&folder, &mut files);
    }
    files.sort();
    let mut digest = Digest(0xcbf2_9ce4_8422_2325);
    digest.add(std::env::var("CARGO_PKG_VERSION").unwrap_or_default().as_bytes());
    for file in files {
        digest.add(&fs::read(&file).unwrap_or_default());
    }
    println!("cargo:rustc-env=TILEWRIGHT_PRINTER={:016x}", digest.0);
}

/// All files below a folder.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}

/// FNV-1a.
struct Digest(u64);

impl Digest {
    fn add(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        for &byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}
