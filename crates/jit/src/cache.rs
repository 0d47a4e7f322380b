//! The cache of machine code: one folder per content address.
//!
//! ```text
//! <cache>/kernels/<2 digits>/<key>/kernel.ll     the text
//!                                  kernel.o      the object file
//!                                  config.json   what it was compiled for, and a checksum
//! <cache>/origins/<2 digits>/<origin>.json       which entry holds the code of something that was printed before
//! ```
//!
//! An entry is written into a temporary folder and renamed, so that it exists whole or not at all.
//! An entry that does not fit its checksum is as good as none and is written again.

use crate::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What an entry was compiled for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) version: String,
    pub(crate) llvm: String,
    pub(crate) triple: String,
    pub(crate) cpu: String,
    pub(crate) features: String,
    pub(crate) passes: String,
    pub(crate) symbol: String,
    pub(crate) object_sha256: String,
}

/// What is stored beside the object.
pub(crate) struct Entry {
    pub(crate) text: String,
    pub(crate) config: Config,
}

/// Which entry holds the code of an [`crate::Origin`], and what else is known without its text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) key: String,
    pub(crate) name: String,
    pub(crate) signature: String,
    pub(crate) note: u64,
    /// Of all of the above.
    sha256: String,
}

impl Known {
    pub(crate) fn new(key: String, name: String, signature: String, note: u64) -> Known {
        let sha256 = String::new();
        let known = Known { key, name, signature, note, sha256 };
        Known { sha256: known.digest(), ..known }
    }

    fn digest(&self) -> String {
        let Known { key, name, signature, note, .. } = self;
        hex(&Sha256::digest(format!("{key}\n{name}\n{signature}\n{note}").as_bytes()))
    }
}

/// A name for a temporary file or folder that nobody else has.
fn unique() -> String {
    static COUNTER: AtomicUsize = AtomicUsize::new(0);
    format!(".new-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// A cache in a folder.
pub(crate) struct Cache {
    root: PathBuf,
    origins: PathBuf,
}

impl Cache {
    pub(crate) fn new(root: &Path) -> Cache {
        Cache { root: root.join("kernels"), origins: root.join("origins") }
    }

    /// What is known of an origin, when it is there and whole.
    pub(crate) fn known(&self, origin: &str) -> Option<Known> {
        let text = fs::read(self.origin_file(origin)).ok()?;
        let known: Known = serde_json::from_slice(&text).ok()?;
        let is_key = known.key.len() > 2 && known.key.bytes().all(|b| b.is_ascii_hexdigit());
        (known.digest() == known.sha256 && is_key).then_some(known)
    }

    /// Stores what is known of an origin.
    pub(crate) fn know(&self, origin: &str, known: &Known) -> std::io::Result<()> {
        let file = self.origin_file(origin);
        let folder = file.parent().unwrap_or(&self.origins);
        fs::create_dir_all(folder)?;
        let temp = folder.join(unique());
        let text = serde_json::to_vec_pretty(known)?;
        let written = fs::write(&temp, text).and_then(|()| fs::rename(&temp, &file));
        // On a full disk half of it is there.
        written.inspect_err(|_| drop(fs::remove_file(&temp)))
    }

    fn origin_file(&self, origin: &str) -> PathBuf {
        self.origins.join(&origin[..2]).join(format!("{origin}.json"))
    }

    pub(crate) fn folder(&self, key: &str) -> PathBuf {
        self.root.join(&key[..2]).join(key)
    }

    /// The object of this key, when it is there and whole.
    pub(crate) fn load(&self, key: &str) -> Option<Vec<u8>> {
        let folder = self.folder(key);
        let config: Config =
            serde_json::from_slice(&fs::read(folder.join("config.json")).ok()?).ok()?;
        let object = fs::read(folder.join("kernel.o")).ok()?;
        (hex(&Sha256::digest(&object)) == config.object_sha256).then_some(object)
    }

    /// Stores an object. The error is a sentence for the user.
    pub(crate) fn store(&self, key: &str, entry: &Entry, object: &[u8]) -> Result<(), String> {
        let temp = self.root.join(unique());
        let result = self.write(&temp, key, entry, object);
        if result.is_err() {
            let _ = fs::remove_dir_all(&temp);
        }
        result
            .map_err(|e| format!("the kernel cache {} cannot be written: {e}", self.root.display()))
    }

    fn write(&self, temp: &Path, key: &str, entry: &Entry, object: &[u8]) -> std::io::Result<()> {
        fs::create_dir_all(temp)?;
        let config = Config { object_sha256: hex(&Sha256::digest(object)), ..entry.config.clone() };
        fs::write(temp.join("kernel.ll"), &entry.text)?;
        fs::write(temp.join("kernel.o"), object)?;
        fs::write(temp.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
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
