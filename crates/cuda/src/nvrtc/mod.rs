//! CUDA C++ text to machine code, through NVRTC, with a cache on disk.
//!
//! A [`CompileRequest`] is everything that the result depends on; the same request gives the same
//! [`Compiled`], from the compiler or from the cache. No GPU is needed.

mod api;
mod cache;
mod log;
#[cfg(test)]
mod tests;

pub use log::{FunctionResources, Warning, WarningKind};

use crate::Arch;
use api::Api;
use cache::{Cache, Output};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tilewright_base::{Error, Result};

/// Stack of a compiling thread. The compiler is recursive, and a thread's usual 2 MiB are a guess of
/// somebody who did not know it.
const STACK_BYTES: usize = 64 << 20;

/// A module to compile: one text, the headers it includes, and how.
///
/// Kernels should be `extern "C"`, so that they are found by their name. For an instance of a
/// template, write a kernel that calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileRequest {
    /// What the module is called in messages, and the file name in diagnostics: `gemm` is `gemm.cu`.
    pub name: String,
    /// The text.
    pub source: String,
    /// Headers that the text may include: the name as it stands in `#include`, and its text. The
    /// compiler sees no other files, unless an option names a folder.
    pub headers: Vec<(String, String)>,
    /// What it is compiled for.
    pub arch: Arch,
    /// Further options of NVRTC: `-DTILE_M=128`, `--use_fast_math`.
    pub options: Vec<String>,
}

impl CompileRequest {
    /// A text without headers and options.
    pub fn new(name: impl Into<String>, source: impl Into<String>, arch: Arch) -> CompileRequest {
        CompileRequest {
            name: name.into(),
            source: source.into(),
            headers: Vec::new(),
            arch,
            options: Vec::new(),
        }
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, text: impl Into<String>) -> CompileRequest {
        self.headers.push((name.into(), text.into()));
        self
    }

    /// With one more option.
    #[must_use]
    pub fn option(mut self, option: impl Into<String>) -> CompileRequest {
        self.options.push(option.into());
        self
    }

    /// Options that decide what comes out.
    fn all_options(&self) -> Vec<String> {
        // `-v` makes the assembler count registers and spills.
        let mut options =
            vec![format!("--gpu-architecture={}", self.arch), "--ptxas-options=-v".to_owned()];
        options.extend(self.options.iter().cloned());
        options
    }
}

/// A compiled module.
#[derive(Clone)]
pub struct Compiled {
    request: Arc<CompileRequest>,
    output: Arc<Output>,
    nvrtc: Arc<str>,
    /// Version of the compiler, major and minor.
    pub nvrtc_version: (u32, u32),
    /// What each function takes.
    pub functions: Vec<FunctionResources>,
    /// What the compiler and the assembler warned of.
    pub warnings: Vec<Warning>,
    /// Whether it came out of the cache.
    pub from_cache: bool,
    /// Why it could not be stored in the cache, if so. The module itself is complete.
    pub cache_failure: Option<String>,
    folder: Option<PathBuf>,
}

impl Compiled {
    /// The name of the request.
    pub fn name(&self) -> &str {
        &self.request.name
    }

    /// What it was compiled for.
    pub fn arch(&self) -> Arch {
        self.request.arch
    }

    /// The machine code.
    pub fn cubin(&self) -> &[u8] {
        &self.output.cubin
    }

    /// The assembly text that the machine code was made from.
    pub fn ptx(&self) -> &str {
        &self.output.ptx
    }

    /// What the compiler and the assembler said, without how long they took.
    pub fn log(&self) -> &str {
        &self.output.log
    }

    /// The resources of a function.
    pub fn resources(&self, function: &str) -> Option<&FunctionResources> {
        self.functions.iter().find(|row| row.name == function)
    }

    /// The first warning of a kind.
    pub fn warning(&self, kind: WarningKind) -> Option<&Warning> {
        self.warnings.iter().find(|w| w.kind == kind)
    }

    /// The folder with source, headers, assembly text, machine code, log and configuration: the
    /// cache's, or one that is now written below the system's folder for temporary files.
    pub fn keep(&self) -> std::io::Result<PathBuf> {
        if let Some(folder) = &self.folder {
            return Ok(folder.clone());
        }
        keep(&self.request, &self.nvrtc, &self.output)
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled")
            .field("name", &self.name())
            .field("arch", &format_args!("{}", self.arch()))
            .field("cubin_bytes", &self.cubin().len())
            .field("functions", &self.functions)
            .field("warnings", &self.warnings)
            .field("from_cache", &self.from_cache)
            .finish_non_exhaustive()
    }
}

/// The compiler, and the cache it uses.
#[derive(Debug)]
pub struct Nvrtc {
    api: &'static Api,
    cache: Option<Cache>,
    /// Version and size of the library: two builds of one version differ in their code.
    identity: Arc<str>,
}

impl Nvrtc {
    /// Opens NVRTC, once per process: the library that `TILEWRIGHT_NVRTC` names (a file or its
    /// folder), or else one beside the program, in a Python environment (`VIRTUAL_ENV`, `.venv`),
    /// under `/usr/local/cuda*`, or known to the system's loader. `cache` is the folder of
    /// everything cached (the one that the CPU's kernels use, too); nothing is cached without.
    pub fn open(cache: Option<&Path>) -> Result<Nvrtc> {
        static API: OnceLock<Result<Api>> = OnceLock::new();
        let api = API.get_or_init(Api::open).as_ref().map_err(Clone::clone)?;
        let size = std::fs::metadata(&api.path).map_or(0, |m| m.len());
        let identity = format!("{}.{} ({size} bytes)", api.version.0, api.version.1).into();
        Ok(Nvrtc { api, cache: cache.map(Cache::new), identity })
    }

    /// The library's path, or its name where the system's loader found it.
    pub fn path(&self) -> &Path {
        &self.api.path
    }

    /// Version of CUDA that the compiler belongs to, major and minor. The driver must not be of an
    /// older major version.
    pub fn version(&self) -> (u32, u32) {
        self.api.version
    }

    /// Options as NVRTC gets them. Its own cache answers without the assembler's report, on machines with a
    /// driver, so it is turned off where it can be: ours keeps the report.
    fn compiler_options(&self, request: &CompileRequest) -> Vec<String> {
        let mut options = request.all_options();
        if self.version() >= (13, 0) {
            options.push("--no-cache".to_owned());
        }
        options
    }

    /// Compiles one module, or finds it in the cache. A text that does not compile is our bug: the
    /// kernels are ours. The error has the log and the folder where the text is.
    pub fn compile(&self, request: &CompileRequest) -> Result<Compiled> {
        let mut results = self.compile_all(std::slice::from_ref(request), 1);
        results.pop().unwrap_or_else(|| Err(Error::bug("a module was not compiled")))
    }

    /// Compiles modules on several threads. Result `i` belongs to request `i`.
    pub fn compile_all(
        &self,
        requests: &[CompileRequest],
        threads: usize,
    ) -> Vec<Result<Compiled>> {
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Option<Result<Compiled>>>> =
            requests.iter().map(|_| Mutex::new(None)).collect();
        let work = || {
            while let Some(i) = take(&next, requests.len()) {
                *lock(&results[i]) = Some(self.find_or_compile(&requests[i]));
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads.clamp(1, requests.len().max(1)) {
                let builder = std::thread::Builder::new().stack_size(STACK_BYTES);
                // Without one more thread, those that there are do all.
                let _ = builder.spawn_scoped(scope, work);
            }
        });
        // What is left when no thread could be started.
        work();
        let took = |slot: Mutex<Option<Result<Compiled>>>| {
            let result = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
            result.unwrap_or_else(|| Err(Error::bug("a module was not compiled")))
        };
        results.into_iter().map(took).collect()
    }

    fn find_or_compile(&self, request: &CompileRequest) -> Result<Compiled> {
        let key = cache::key(request, &self.identity);
        if let Some(output) = self.cache.as_ref().and_then(|c| c.load(&key)) {
            return Ok(self.finish(request, output, true));
        }
        let output = self.run(request)?;
        let stored = self.cache.as_ref().map(|c| c.store(&key, request, &self.identity, &output));
        let mut compiled = self.finish(request, output, false);
        if let Some(Err(failure)) = stored {
            compiled.folder = None;
            compiled.cache_failure = Some(failure);
        }
        Ok(compiled)
    }

    fn finish(&self, request: &CompileRequest, output: Output, from_cache: bool) -> Compiled {
        let key = cache::key(request, &self.identity);
        Compiled {
            functions: log::resources(&output.log),
            warnings: log::warnings(&output.log),
            request: Arc::new(request.clone()),
            output: Arc::new(output),
            nvrtc: self.identity.clone(),
            nvrtc_version: self.api.version,
            from_cache,
            cache_failure: None,
            folder: self.cache.as_ref().map(|c| c.folder(&key)),
        }
    }

    fn run(&self, request: &CompileRequest) -> Result<Output> {
        self.check_arch(request.arch)?;
        let headers: Vec<(&str, &str)> =
            request.headers.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        let name = format!("{}.cu", request.name);
        let context = || format!("compiling {} for {}", request.name, request.arch);
        let result = self
            .api
            .compile(&name, &request.source, &headers, &self.compiler_options(request))
            .map_err(|e| Error::bug(format!("NVRTC: {e}")).with_context(context()))?;
        let log = log::without_times(&result.log);
        match result.code {
            Ok((cubin, ptx)) => Ok(Output { cubin, ptx, log }),
            Err(message) => {
                let output = Output { cubin: Vec::new(), ptx: String::new(), log: log.clone() };
                let mut error = Error::bug(message).with_context(context()).with_note(log);
                if let Ok(folder) = keep(request, &self.identity, &output) {
                    error = error.with_note(format!("the text is in {}", folder.display()));
                }
                Err(error)
            }
        }
    }

    fn check_arch(&self, arch: Arch) -> Result<()> {
        let known = self.api.architectures().unwrap_or_default();
        let number = (arch.major() * 10 + arch.minor()).cast_signed();
        if known.is_empty() || known.contains(&number) {
            return Ok(());
        }
        let (major, minor) = self.api.version;
        let names = known.iter().map(|n| format!("sm_{n}")).collect::<Vec<_>>().join(", ");
        Err(Error::unsupported(format!("NVRTC {major}.{minor} does not compile for {arch}"))
            .with_note(format!("it compiles for {names}"))
            .with_note(format!("it is {}", self.api.path.display())))
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("path", &self.path).field("version", &self.version).finish()
    }
}

/// Writes a kernel that failed, or that has no cache, where a person can look at it.
fn keep(request: &CompileRequest, nvrtc: &str, output: &Output) -> std::io::Result<PathBuf> {
    let key = cache::key(request, nvrtc);
    let folder = std::env::temp_dir().join("tilewright-kept").join(key);
    cache::write_files(&folder, request, nvrtc, output)?;
    Ok(folder)
}

fn take(next: &AtomicUsize, end: usize) -> Option<usize> {
    let i = next.fetch_add(1, Ordering::Relaxed);
    (i < end).then_some(i)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
