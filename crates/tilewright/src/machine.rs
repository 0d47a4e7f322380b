//! This machine's data, measured once and cached.

use std::path::PathBuf;
#[cfg(feature = "cpu")]
pub use with_cpu::{host_cpu, measured_cpu};

/// Folder of everything cached: `$TILEWRIGHT_CACHE`, `$XDG_CACHE_HOME/tilewright` or
/// `~/.cache/tilewright`; `None` when none of these variables is set.
pub fn cache_dir() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("TILEWRIGHT_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("tilewright")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/tilewright")))
}

#[cfg(feature = "cpu")]
mod with_cpu {
    //! Measuring takes the thread pool and compiled kernels.

    use std::path::{Path, PathBuf};
    use tilewright_base::{Error, Result};
    use tilewright_runtime::{Pool, measure};
    use tilewright_target::Cpu;

    fn file(cache: &Path, cpu: &Cpu) -> PathBuf {
        let slug: String =
            cpu.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        cache.join("machines").join(format!("{slug}-{}.json", cpu.threads))
    }

    /// This machine with the ceilings that the cache holds for it, or careful guesses.
    /// `threads` of 0 means all.
    pub fn host_cpu(threads: usize, cache: Option<&Path>) -> Result<Cpu> {
        let cpu = Cpu::detect(threads)?;
        let known = cache
            .and_then(|dir| std::fs::read_to_string(file(dir, &cpu)).ok())
            .and_then(|text| serde_json::from_str::<Cpu>(&text).ok())
            .filter(|known| known.name == cpu.name && known.features == cpu.features);
        Ok(match known {
            Some(known) => Cpu { ceilings: known.ceilings, ..cpu },
            None => cpu,
        })
    }

    /// As [`host_cpu`], measuring (about two seconds) when the cache holds nothing or `again` is set,
    /// and caching the result. A cache that cannot be written is done without.
    pub fn measured_cpu(threads: usize, cache: Option<&Path>, again: bool) -> Result<Cpu> {
        let mut cpu = host_cpu(threads, cache)?;
        if cpu.is_measured() && !again {
            return Ok(cpu);
        }
        cpu.ceilings = measure(&cpu, &Pool::new(cpu.threads))?;
        if let Some(dir) = cache {
            let path = file(dir, &cpu);
            let text = serde_json::to_string_pretty(&cpu).map_err(|e| Error::bug(e.to_string()))?;
            // Written beside and renamed, so that nobody reads half a file.
            let temp = path.with_extension(format!("tmp{}", std::process::id()));
            let written = path
                .parent()
                .map_or(Ok(()), std::fs::create_dir_all)
                .and_then(|()| std::fs::write(&temp, text))
                .and_then(|()| std::fs::rename(&temp, &path));
            if written.is_err() {
                let _ = std::fs::remove_file(&temp);
            }
        }
        Ok(cpu)
    }
}
