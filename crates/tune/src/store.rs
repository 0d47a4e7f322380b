//! Records and earlier timings on disk.
//!
//! ```text
//! <folder>/<device>/<hash of the problem>.json          the record (`gemm::Record`)
//!                   <hash of the problem>.trials.jsonl  what was timed: a head, then a choice a line
//! ```
//!
//! The folder is `tuning` in the cache, unless the user says otherwise. Files are written beside and renamed. Timings
//! count only for the same device, compiler and code; anything else is as if nothing had been timed.

use crate::search::Timed;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tilewright_base::{Error, Result};
use tilewright_kernels::gemm::{Device, Key, Knobs, Record};

/// What timings depend on, besides the choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of `Record`")]
pub struct Conditions {
    pub format: u32,
    pub problem: Key,
    pub device: Device,
    pub driver: String,
    pub nvrtc: String,
    /// Of the model's pick: stands for all kernels of the problem.
    pub code: String,
}

/// Choices with what came of them.
pub type Trials = Vec<(Knobs, Timed)>;

/// One timing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trial {
    choice: Knobs,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    failed: Option<String>,
}

/// A folder of records.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// Records in this folder, which need not be there yet.
    pub fn new(folder: PathBuf) -> Store {
        Store { folder }
    }

    /// The folder of records in a cache.
    pub fn of_cache(cache: &Path) -> PathBuf {
        cache.join("tuning")
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Keeps a record.
    ///
    /// # Errors
    /// The user's, when it cannot be written.
    pub fn save(&self, record: &Record) -> Result<PathBuf> {
        let path = Record::path(&self.folder, &record.device, &record.problem);
        write(&path, &(record.line()? + "\n"))?;
        Ok(path)
    }

    /// Keeps what was timed.
    ///
    /// # Errors
    /// The user's, when it cannot be written.
    pub fn save_trials(&self, conditions: &Conditions, trials: &[(Knobs, Timed)]) -> Result<()> {
        let line = |e: serde_json::Error| Error::bug(format!("a timing as JSON: {e}"));
        let mut text = serde_json::to_string(conditions).map_err(line)? + "\n";
        for (choice, timed) in trials {
            let trial = Trial {
                choice: choice.clone(),
                us: timed.as_ref().ok().copied(),
                failed: timed.as_ref().err().cloned(),
            };
            text += &(serde_json::to_string(&trial).map_err(line)? + "\n");
        }
        write(&self.trials(conditions), &text)
    }

    /// What was timed under the same conditions; nothing when the file is damaged.
    pub fn trials_of(&self, conditions: &Conditions) -> Trials {
        let bytes = std::fs::read(self.trials(conditions)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = text.lines();
        let head: Option<Conditions> = lines.next().and_then(|l| serde_json::from_str(l).ok());
        if head.as_ref() != Some(conditions) {
            return Vec::new();
        }
        let trial = |line: &str| {
            let Trial { choice, us, failed } = serde_json::from_str(line).ok()?;
            match (us, failed) {
                (Some(us), None) if us > 0.0 && us.is_finite() => Some((choice, Ok(us))),
                (None, Some(failed)) => Some((choice, Err(failed))),
                _ => None,
            }
        };
        lines.map(trial).collect::<Option<_>>().unwrap_or_default()
    }

    /// All timings of the folder with their conditions, in the order of their files: what a time model is fitted to.
    ///
    /// # Errors
    /// The user's, when the folder cannot be read.
    pub fn all_trials(&self) -> Result<Vec<(Conditions, Trials)>> {
        let folders = entries(&self.folder)
            .map_err(|e| Error::user(format!("{} cannot be read: {e}", self.folder.display())))?;
        let files = folders.iter().flat_map(|f| entries(f).unwrap_or_default());
        let files = files.filter(|f| f.to_string_lossy().ends_with(".trials.jsonl"));
        let read = |file: PathBuf| {
            let text = std::fs::read_to_string(&file).ok()?;
            let head: Conditions = serde_json::from_str(text.lines().next()?).ok()?;
            let trials = self.trials_of(&head);
            Some((head, trials))
        };
        Ok(files.filter_map(read).collect())
    }

    fn trials(&self, c: &Conditions) -> PathBuf {
        Record::path(&self.folder, &c.device, &c.problem).with_extension("trials.jsonl")
    }

    /// Every record of the folder, in the order of device and problem, and what is no record.
    ///
    /// # Errors
    /// The user's, when the folder cannot be read.
    pub fn all(&self) -> Result<(Vec<Record>, Vec<String>)> {
        let cannot = |path: &Path, e: std::io::Error| {
            Error::user(format!("{} cannot be read: {e}", path.display()))
        };
        let (mut records, mut warnings) = (Vec::new(), Vec::new());
        for path in entries(&self.folder).map_err(|e| cannot(&self.folder, e))? {
            for file in entries(&path).unwrap_or_default() {
                if file.extension().is_none_or(|e| e != "json") {
                    continue;
                }
                let text = std::fs::read(&file).map_err(|e| cannot(&file, e))?;
                match Record::parse(&String::from_utf8_lossy(&text)) {
                    Ok(record) => records.push(record),
                    Err(e) => warnings.push(format!("{}: {}", file.display(), e.message())),
                }
            }
        }
        records.sort_by(|a, b| (&a.device, &a.problem).cmp(&(&b.device, &b.problem)));
        Ok((records, warnings))
    }
}

fn entries(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut list: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|e| e.map(|e| e.path())).collect::<std::io::Result<_>>()?;
    list.sort();
    Ok(list)
}

/// Beside and renamed, so that nobody reads half a file.
fn write(path: &Path, text: &str) -> Result<()> {
    let temp = path.with_extension(format!("new{}", std::process::id()));
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&temp, text))
        .and_then(|()| std::fs::rename(&temp, path));
    written.map_err(|e| {
        let _ = std::fs::remove_file(&temp);
        Error::user(format!("{} cannot be written: {e}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::products::Products;
    use tilewright_base::DType;
    use tilewright_kernels::gemm::{FORMAT, Problem};
    use tilewright_target::Gpu;

    struct Temp(PathBuf);

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_kept_comes_back_and_what_is_damaged_does_not() {
        let (gpu, problem) = (Gpu::h200(), Problem::dense(64, 64, 64, DType::BF16, DType::BF16));
        let products = Products::new(&problem, &gpu).unwrap();
        let temp =
            Temp(std::env::temp_dir().join(format!("tilewright-store-{}", std::process::id())));
        let store = Store::new(temp.0.join("deep/er"));
        assert!(store.all().is_err());
        let conditions = Conditions {
            format: FORMAT,
            problem: Key::of(&problem),
            device: Device::of(&gpu),
            driver: "1".into(),
            nvrtc: "13.0".into(),
            code: "c".into(),
        };
        let trials = vec![
            (products.knobs[3].clone(), Ok(2.5)),
            (products.knobs[1].clone(), Err("no \"room\"".to_owned())),
        ];
        assert_eq!(store.trials_of(&conditions), []);
        store.save_trials(&conditions, &trials).unwrap();
        assert_eq!(store.trials_of(&conditions), trials);
        assert_eq!(store.all_trials().unwrap(), [(conditions.clone(), trials.clone())]);
        let other = Conditions { code: "d".into(), ..conditions.clone() };
        assert_eq!(store.trials_of(&other), []);
        let path = store.trials(&conditions);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        assert_eq!(store.trials_of(&conditions), []);
        let record = Record {
            format: FORMAT,
            problem: conditions.problem.clone(),
            device: conditions.device.clone(),
            driver: "1".into(),
            nvrtc: "13.0".into(),
            code: "c".into(),
            choice: Some(products.knobs[0].clone()),
            us: 1.5,
            picker_us: 2.0,
            error: 0.0,
            trials: 2,
            date: "2026-11-21T00:00:00Z".into(),
        };
        let file = store.save(&record).unwrap();
        assert_eq!(store.all().unwrap(), (vec![record], Vec::new()));
        std::fs::write(&file, "{").unwrap();
        let (records, warnings) = store.all().unwrap();
        assert!(records.is_empty() && warnings.len() == 1, "{warnings:?}");
    }
}
