//! LLVM IR text to machine code in memory, with a cache on disk.
//!
//! [`Jit::build`] takes the text of kernels and gives a [`Library`] of function addresses: what the
//! cache holds is loaded, the rest is compiled on several threads and cached. The only crate that
//! links LLVM; it knows nothing of graphs, tiles or tensors.

mod cache;
mod llvm;
mod origin;
mod prototype;
mod resident;

pub use llvm::{Library, llvm_version};
pub use origin::{Found, Origin};
pub use prototype::Prototype;
pub use resident::let_go_of_compiler;

use cache::Cache;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tilewright_base::{Error, Result, ResultExt};

/// How kernels are compiled.
#[derive(Clone, Debug)]
pub struct Options {
    /// LLVM's pass pipeline, e.g. `default<O2>`.
    pub passes: String,
    /// Folder of the cache, or `None` for no cache.
    pub cache: Option<PathBuf>,
    /// Threads that compile.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { passes: "default<O2>".into(), cache: None, threads: 1 }
    }
}

/// One kernel: a module of LLVM IR text that defines `symbol` and needs nothing from outside.
#[derive(Clone, Debug)]
pub struct Source {
    /// Name of the function, without `@`: letters, digits and `_`.
    pub symbol: String,
    /// The module.
    pub text: String,
}

/// The compiler.
#[derive(Debug)]
pub struct Jit {
    options: Options,
    host: llvm::Host,
}

/// A kernel of a build.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// To be compiled, unless the cache has it.
    Source(&'a Source),
    /// Found by [`Jit::find`].
    Found(&'a Found),
}

/// A symbol and the object file that defines it.
type Compiled = (String, Vec<u8>);

/// What a build gives.
pub struct Build {
    /// The functions; address `i` belongs to part `i`.
    pub library: Library,
    /// Parts that came out of the cache.
    pub cache_hits: usize,
    /// What went wrong with the cache; the build itself is complete.
    pub warnings: Vec<String>,
}

impl Jit {
    /// A compiler for this machine. Errors when LLVM cannot compile for it.
    pub fn new(options: Options) -> Result<Jit> {
        Ok(Jit { options, host: llvm::Host::detect()? })
    }

    /// Content address: everything that the machine code depends on.
    fn key(&self, source: &Source) -> String {
        self.address(&[&source.symbol, &source.text])
    }

    /// Content address of some texts, of this compiler and of the machine.
    fn address(&self, texts: &[&str]) -> String {
        let mut hash = Sha256::new();
        let compiler = [
            env!("CARGO_PKG_VERSION"),
            llvm_version(),
            &self.host.triple,
            &self.host.cpu,
            &self.host.features,
            &self.options.passes,
        ];
        for part in compiler.iter().chain(texts) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hex(&hash.finalize()[..20])
    }

    /// Compiles (or finds) all sources and loads them.
    pub fn build(&self, sources: &[Source]) -> Result<Build> {
        self.build_parts(&sources.iter().map(Part::Source).collect::<Vec<_>>())
    }

    /// As [`Jit::build`], with parts whose code was found before.
    pub fn build_parts(&self, parts: &[Part<'_>]) -> Result<Build> {
        let cache = self.options.cache.as_deref().map(Cache::new);
        let warnings = Mutex::new(Vec::new());
        let hits = AtomicUsize::new(0);
        let next = AtomicUsize::new(0);
        let objects: Vec<Mutex<Option<Result<Compiled>>>> =
            parts.iter().map(|_| Mutex::new(None)).collect();
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(part) = parts.get(i) else { return };
                let Part::Source(source) = part else { continue };
                let key = self.key(source);
                let found = cache.as_ref().and_then(|c| c.load(&key));
                let result = match found {
                    Some(object) => {
                        hits.fetch_add(1, Ordering::Relaxed);
                        Ok(object)
                    }
                    None => self.object(source, &key).inspect(|object| {
                        let stored =
                            cache.as_ref().map(|c| c.store(&key, &self.entry(source), object));
                        if let Some(Err(e)) = stored {
                            lock(&warnings).push(e);
                        }
                    }),
                };
                *lock(&objects[i]) = Some(result.map(|object| (symbol_of(&key), object)));
            }
        };
        std::thread::scope(|scope| {
            let sources = parts.iter().filter(|p| matches!(p, Part::Source(_))).count();
            for _ in 1..self.options.threads.min(sources) {
                // Too few threads is no failure: this one does all that is left.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        let mut loaded = Vec::with_capacity(parts.len());
        for (slot, part) in objects.into_iter().zip(parts) {
            let source = match part {
                Part::Source(source) => source,
                Part::Found(found) => {
                    hits.fetch_add(1, Ordering::Relaxed);
                    loaded.push(found.loadable());
                    continue;
                }
            };
            let result = slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let result = result.ok_or_else(|| Error::bug("a kernel was not compiled"))?;
            let (symbol, object) =
                result.context(|| format!("compiling kernel {}", source.symbol))?;
            let prototype = Prototype::find(&source.text, &source.symbol).ok_or_else(|| {
                Error::bug(format!("the text of kernel {} does not define it", source.symbol))
            })?;
            loaded.push((symbol, object, prototype));
        }
        let mut warnings = warnings.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        warnings.sort();
        warnings.dedup();
        Ok(Build { library: Library::load(loaded)?, cache_hits: hits.into_inner(), warnings })
    }

    /// Machine code of a source, as assembly text for people.
    pub fn assembly(&self, source: &Source) -> Result<String> {
        let bytes =
            llvm::compile(&self.host, &source.text, &self.options.passes, llvm::Output::Assembly)?;
        String::from_utf8(bytes).map_err(|_| Error::bug("assembly that is not text"))
    }

    /// As [`Jit::assembly`], for a machine that also has these features (`+amx-tile,+amx-bf16`).
    pub fn assembly_with(&self, source: &Source, features: &str) -> Result<String> {
        let mut host = self.host.clone();
        host.features = format!("{},{features}", host.features);
        let passes = &self.options.passes;
        let bytes = llvm::compile(&host, &source.text, passes, llvm::Output::Assembly)?;
        String::from_utf8(bytes).map_err(|_| Error::bug("assembly that is not text"))
    }

    fn object(&self, source: &Source, key: &str) -> Result<Vec<u8>> {
        // Each function gets a name of its own, so that any set of kernels can be loaded together.
        let text = rename(&source.text, &source.symbol, &symbol_of(key));
        llvm::compile(&self.host, &text, &self.options.passes, llvm::Output::Object)
    }

    fn entry(&self, source: &Source) -> cache::Entry {
        cache::Entry {
            text: source.text.clone(),
            config: cache::Config {
                version: env!("CARGO_PKG_VERSION").into(),
                llvm: llvm_version().into(),
                triple: self.host.triple.clone(),
                cpu: self.host.cpu.clone(),
                features: self.host.features.clone(),
                passes: self.options.passes.clone(),
                symbol: source.symbol.clone(),
                object_sha256: String::new(),
            },
        }
    }
}

fn symbol_of(key: &str) -> String {
    format!("tw_{key}")
}

/// Replaces `@from` by `@to` where it stands as a whole name.
fn rename(text: &str, from: &str, to: &str) -> String {
    let needle = format!("@{from}");
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(at) = rest.find(&needle) {
        let after = &rest[at + needle.len()..];
        let whole = !after.starts_with(|c: char| c.is_ascii_alphanumeric() || "_.$-".contains(c));
        out.push_str(&rest[..at]);
        out.push_str(if whole { "@" } else { &needle });
        if whole {
            out.push_str(to);
        }
        rest = after;
    }
    out + rest
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: &str = "define void @add(ptr %p) {\n  %x = load i64, ptr %p\n  %y = add i64 %x, 5\n  store i64 %y, ptr %p\n  ret void\n}\n";

    fn source(text: &str) -> Source {
        Source { symbol: "add".into(), text: text.into() }
    }

    fn call(library: &Library, i: usize, mut value: i64) -> i64 {
        // SAFETY: every source of these tests defines `void add(ptr)` on one i64.
        unsafe {
            let f: extern "C" fn(*mut i64) = std::mem::transmute(library.address(i));
            f(&mut value);
        }
        value
    }

    fn temp(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("tilewright-jit-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn two_functions_of_one_name() {
        let jit = Jit::new(Options { threads: 2, ..Options::default() }).unwrap();
        let other = ADD.replace("%x, 5", "%x, 7");
        let build = jit.build(&[source(ADD), source(&other)]).unwrap();
        assert_eq!((call(&build.library, 0, 1), call(&build.library, 1, 1)), (6, 8));
        assert_eq!(build.cache_hits, 0);
    }

    #[test]
    fn the_second_build_compiles_nothing_and_a_damaged_entry_is_made_again() {
        let dir = temp("cache");
        let jit = Jit::new(Options { cache: Some(dir.clone()), ..Options::default() }).unwrap();
        assert_eq!(jit.build(&[source(ADD)]).unwrap().cache_hits, 0);
        let again = jit.build(&[source(ADD)]).unwrap();
        assert_eq!((again.cache_hits, call(&again.library, 0, 10)), (1, 15));
        let key = jit.key(&source(ADD));
        let object = Cache::new(&dir).folder(&key).join("kernel.o");
        let mut bytes = std::fs::read(&object).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&object, bytes).unwrap();
        let repaired = jit.build(&[source(ADD)]).unwrap();
        assert_eq!((repaired.cache_hits, call(&repaired.library, 0, 10)), (0, 15));
        assert_eq!(jit.build(&[source(ADD)]).unwrap().cache_hits, 1);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_a_warning() {
        let dir = temp("file");
        std::fs::write(&dir, "a file where the folder should be").unwrap();
        let jit = Jit::new(Options { cache: Some(dir.clone()), ..Options::default() }).unwrap();
        let build = jit.build(&[source(ADD)]).unwrap();
        assert_eq!((call(&build.library, 0, 0), build.warnings.len()), (5, 1));
        std::fs::remove_file(dir).unwrap();
    }

    #[test]
    fn bad_text_is_our_bug_with_the_message_of_llvm() {
        let jit = Jit::new(Options::default()).unwrap();
        let error = jit.build(&[source("define void @add(ptr %p) { %x = bogus }")]).err().unwrap();
        assert!(error.message().contains("expected instruction opcode"), "{error:?}");
        assert!(jit.assembly(&source(ADD)).unwrap().contains("add"));
    }

    #[test]
    fn rename_takes_whole_names_only() {
        assert_eq!(rename("@f @f2 call @f(", "f", "g"), "@g @f2 call @g(");
    }
}
