//! [`Origin`]: what a text is printed from. Printing kernels takes longer than loading their code, so the cache also
//! says which entry holds the code of an origin; then nothing is printed.

use crate::cache::{Cache, Known};
use crate::prototype::Prototype;
use crate::{Jit, Source, hex, symbol_of};
use sha2::{Digest, Sha256};
use std::hash::{Hash, Hasher};

/// A content address of what a text is printed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(String);

/// Code that was found without its text.
#[derive(Clone, Debug)]
pub struct Found {
    symbol: String,
    object: Vec<u8>,
    prototype: Prototype,
    /// What [`Jit::remember`] was given with it.
    pub note: u64,
}

impl Found {
    pub(crate) fn loadable(&self) -> (String, Vec<u8>, Prototype) {
        (self.symbol.clone(), self.object.clone(), self.prototype.clone())
    }
}

/// Everything that is hashed, in SHA-256.
struct Wide(Sha256);

impl Hasher for Wide {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        0
    }
}

impl Jit {
    /// The origin of a text that is a function of `from` alone. `from` holds all that the text depends on, also which
    /// program prints it.
    pub fn origin(&self, from: &impl Hash) -> Origin {
        let mut hasher = Wide(Sha256::new());
        from.hash(&mut hasher);
        Origin(self.address(&["origin", &hex(&hasher.0.finalize())]))
    }

    /// The code of what was printed from `origin`, if the cache has it.
    pub fn find(&self, origin: &Origin) -> Option<Found> {
        let cache = Cache::new(self.options.cache.as_deref()?);
        let Known { key, name, signature, note, .. } = cache.known(&origin.0)?;
        let object = cache.load(&key)?;
        Some(Found {
            symbol: symbol_of(&key),
            object,
            prototype: Prototype { name, signature },
            note,
        })
    }

    /// Keeps in the cache that `source` was printed from `origin`, with a number for whoever finds it. A cache that
    /// cannot be written costs time only, and [`Jit::build`] says that it cannot.
    pub fn remember(&self, origin: &Origin, source: &Source, note: u64) {
        let Some(folder) = &self.options.cache else { return };
        let Some(prototype) = Prototype::find(&source.text, &source.symbol) else { return };
        let known = Known::new(self.key(source), prototype.name, prototype.signature, note);
        let _ = Cache::new(folder).know(&origin.0, &known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, Part};

    #[test]
    fn what_was_printed_before_is_found_and_damage_is_not() {
        let dir = std::env::temp_dir().join(format!("tilewright-origin-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let jit = Jit::new(Options { cache: Some(dir.clone()), ..Options::default() }).unwrap();
        let text = "define i64 @two() {\n  ret i64 2\n}\n".to_string();
        let source = Source { symbol: "two".into(), text };
        let (origin, other) = (jit.origin(&("printer 1", 2)), jit.origin(&("printer 2", 2)));
        assert_ne!(origin, other);
        jit.remember(&origin, &source, 77);
        assert!(jit.find(&origin).is_none(), "nothing is compiled yet");
        jit.build(std::slice::from_ref(&source)).unwrap();
        let found = jit.find(&origin).unwrap();
        assert_eq!(found.note, 77);
        let build = jit.build_parts(&[Part::Found(&found)]).unwrap();
        assert_eq!(build.cache_hits, 1);
        assert_eq!(build.library.prototype(0).unwrap().signature, "i64 ()");
        assert!(jit.find(&other).is_none());
        // Another number than the one that was kept.
        let file = dir.join("origins").join(&origin.0[..2]).join(format!("{}.json", origin.0));
        let kept = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, kept.replace("77", "78")).unwrap();
        assert!(jit.find(&origin).is_none());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
