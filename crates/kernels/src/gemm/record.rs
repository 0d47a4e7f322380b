//! What a tuner found, as text: one [`Record`] per problem and device, and how the picker finds it.
//!
//! A record is one JSON object. `records/tuning/*.jsonl`, one record a line, is part of the program; a folder of a
//! user (one file per problem, named by the hash of its key) comes before it. A record counts only when
//!
//! - the problem is the same in every field, and the device has the same name, capability and multiprocessors,
//! - the code of the kernels has the same fingerprint: after a change of the device library the time means nothing,
//! - the choice stands in the space of the problem. So nothing that stands in a file can make a wrong kernel.
//!
//! What does not count is left out with a warning. To add a field: here, and `FORMAT` one higher.

use crate::gemm::plan::{Candidate, Choice, candidate, choices, plan_untuned};
use crate::gemm::problem::{Precision, Problem};
use crate::gemm::program::{Order, Pair};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tilewright_base::{Error, Result};
use tilewright_lower_gpu::{Mode, ProductKind, StoreKind, lower};
use tilewright_target::Gpu;

/// Version of the form of a record.
pub const FORMAT: u32 = 1;

/// The records that are part of the program.
const SHIPPED: &[(&str, &str)] = &[(
    "records/tuning/gemm-nvidia-h200.jsonl",
    include_str!("../../../../records/tuning/gemm-nvidia-h200.jsonl"),
)];

/// A problem as a record names it: everything that decides which kernels may run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of `Problem`")]
pub struct Key {
    pub m: i64,
    pub n: i64,
    pub k: i64,
    pub batch: i64,
    pub operand: String,
    pub sum: String,
    pub result: String,
    /// `f32`, `tf32x3`, `tf32`.
    pub precision: String,
    pub promoted: bool,
    /// Of `A`, `B`, `C`: `rcr`.
    pub orders: String,
    pub leading: [i64; 3],
    /// Zeros for a single product.
    pub stride: [i64; 3],
    /// Powers of two up to 64: more changes nothing.
    pub align: [i64; 3],
    /// The function and the types of what it reads.
    pub epilogue: String,
}

impl Key {
    /// The key of a problem.
    pub fn of(p: &Problem) -> Key {
        let letter = |order: Order| if order == Order::Row { 'r' } else { 'c' };
        let align = |a: i64| [64, 32, 16, 8, 4, 2].into_iter().find(|n| a % n == 0).unwrap_or(1);
        let e = &p.epilogue;
        let extra = |name: &str, dtype: Option<tilewright_base::DType>| {
            dtype.map_or(String::new(), |d| format!(" {name} {d}"))
        };
        let stride = if p.batch == 1 { (0, 0, 0) } else { p.stride };
        Key {
            m: p.m,
            n: p.n,
            k: p.k,
            batch: p.batch,
            operand: p.operand.to_string(),
            sum: p.sum.to_string(),
            result: p.result.to_string(),
            precision: match p.precision {
                Precision::F32 => "f32",
                Precision::Tf32x3 => "tf32x3",
                Precision::Tf32 => "tf32",
            }
            .into(),
            promoted: p.promoted,
            orders: [p.order.0, p.order.1, p.order.2].into_iter().map(letter).collect(),
            leading: p.leading.into(),
            stride: stride.into(),
            align: [align(p.align.0), align(p.align.1), align(p.align.2)],
            epilogue: format!(
                "{}{}{}{}{}{}",
                e.func,
                if e.pair == Pair::None { "" } else { " pair" },
                extra("cols", e.col_vector),
                extra("rows", e.row_vector),
                extra("residual", e.residual),
                p.statistics.text()
            ),
        }
    }

    /// 64 hexadecimal digits: the name of the file.
    pub fn hash(&self) -> String {
        // The fields in order; none holds a line end.
        let text = serde_json::to_string(self).unwrap_or_default();
        Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { m, n, k, batch, operand, result, orders, .. } = self;
        write!(f, "{operand} {m}x{n}x{k}")?;
        if *batch != 1 {
            write!(f, " x{batch}")?;
        }
        write!(f, " {orders} to {result}")
    }
}

/// A device as a record names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of `Gpu`")]
pub struct Device {
    pub name: String,
    pub capability: u32,
    pub sms: u32,
}

impl Device {
    /// The name of a device.
    pub fn of(gpu: &Gpu) -> Device {
        Device { name: gpu.name.clone(), capability: gpu.capability, sms: gpu.sms }
    }
}

/// A choice as a record names it: what tells the choices of one problem apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the names are those of `GpuSchedule` and `Choice`")]
pub struct Knobs {
    pub product: String,
    pub swapped: bool,
    pub splits: i64,
    /// `BM`, `BN`, `BK`.
    pub tile: [i64; 3],
    pub warps: [u32; 2],
    pub mode: String,
    pub consumers: u32,
    pub stages: u32,
    pub cluster: u32,
    pub cluster_axis: usize,
    pub raster: u32,
    pub store: String,
    pub store_slots: u32,
    pub vector: u32,
}

impl Knobs {
    /// The name of a choice.
    pub fn of(choice: &Choice) -> Knobs {
        let s = &choice.schedule;
        let tile = |name: &str| s.tiles.get(name).copied().unwrap_or(1);
        Knobs {
            product: match s.product {
                ProductKind::Wgmma => "wgmma",
                ProductKind::MmaSync => "mma.sync",
                ProductKind::MmaSplit => "mma.sync-x3",
                ProductKind::Fma => "fma",
            }
            .into(),
            swapped: choice.swapped,
            splits: choice.splits,
            tile: [tile("BM"), tile("BN"), tile("BK")],
            warps: s.warps.into(),
            mode: match s.mode {
                Mode::Cooperative => "cooperative",
                Mode::PingPong => "ping-pong",
            }
            .into(),
            consumers: s.consumers,
            stages: s.stages,
            cluster: s.cluster,
            cluster_axis: s.cluster_axis,
            raster: s.raster,
            store: match s.store {
                StoreKind::Tma => "tma",
                StoreKind::Direct => "direct",
                StoreKind::Staged => "staged",
            }
            .into(),
            store_slots: s.store_slots,
            vector: s.vector,
        }
    }
}

impl fmt::Display for Knobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [bm, bn, bk] = self.tile;
        write!(f, "{bm}x{bn}x{bk} {}", self.product)?;
        if self.product == "wgmma" {
            write!(f, " {} consumers={}", self.mode, self.consumers)?;
        } else {
            write!(f, " warps={}x{}", self.warps[0], self.warps[1])?;
        }
        write!(f, " stages={}", self.stages)?;
        if self.cluster > 1 {
            write!(f, " cluster={}@{}", self.cluster, self.cluster_axis)?;
        }
        write!(f, " raster={} {}x{}", self.raster, self.store, self.store_slots)?;
        if self.splits > 1 {
            write!(f, " splits={}", self.splits)?;
        }
        f.write_str(if self.swapped { " swapped" } else { "" })
    }
}

/// What was found for a problem on a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// What was multiplied.
    pub problem: Key,
    /// On what.
    pub device: Device,
    /// Version of the driver.
    pub driver: String,
    /// Version of NVRTC.
    pub nvrtc: String,
    /// Of the kernels of the choice ([`code_of`]).
    pub code: String,
    /// The fastest choice that was found; none when the model's own was, and is none of the space.
    pub choice: Option<Knobs>,
    /// Its median time.
    pub us: f64,
    /// Median time of what the model picks alone, measured in turns with it.
    pub picker_us: f64,
    /// Error of the result relative to float64, in the Euclidean norm.
    pub error: f64,
    /// Choices that were timed.
    pub trials: u32,
    /// When, in UTC.
    pub date: String,
}

impl Record {
    /// Reads one.
    ///
    /// # Errors
    /// The user's: no JSON, fields that are missing or unknown, another format, times that are none.
    pub fn parse(text: &str) -> Result<Record> {
        let record: Record = serde_json::from_str(text)
            .map_err(|e| Error::user(format!("no record of a tuned product: {e}")))?;
        if record.format != FORMAT {
            let (found, known) = (record.format, FORMAT);
            return Err(Error::user(format!("a record of format {found}, {known} is known")));
        }
        if !(record.us > 0.0 && record.us.is_finite() && record.picker_us.is_finite()) {
            return Err(Error::user(format!("a record with the time {} us", record.us)));
        }
        Ok(record)
    }

    /// As one line.
    ///
    /// # Errors
    /// A bug, for a number that JSON does not have.
    pub fn line(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::bug(format!("a record as JSON: {e}")))
    }

    /// Where the record of a problem lies in a folder of records.
    pub fn path(folder: &Path, device: &Device, key: &Key) -> PathBuf {
        folder.join(slug(&device.name)).join(format!("{}.json", key.hash()))
    }
}

/// A name of a device as a folder: `nvidia-h200`.
pub fn slug(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    name.chars().map(plain).collect()
}

/// The fingerprint of the kernels of a candidate, in the order of its steps.
///
/// # Errors
/// When a step cannot be lowered or printed.
pub fn code_of(candidate: &Candidate) -> Result<String> {
    let mut all = Sha256::new();
    for step in &candidate.steps {
        let source = tilewright_emit_cuda::emit(&lower(&step.kernel, &step.schedule)?)?;
        all.update(tilewright_emit_cuda::fingerprint(&source));
    }
    Ok(all.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

/// Records, to be asked by problem.
#[derive(Clone, Debug, Default)]
pub struct Records {
    folder: Option<PathBuf>,
    list: BTreeMap<(Device, Key), Record>,
    warnings: Vec<String>,
}

impl Records {
    /// None at all.
    pub fn none() -> Records {
        Records::default()
    }

    /// Those that are part of the program.
    pub fn shipped() -> &'static Records {
        static SHIPPED_RECORDS: OnceLock<Records> = OnceLock::new();
        SHIPPED_RECORDS.get_or_init(|| {
            let mut records = Records::none();
            for (name, text) in SHIPPED {
                records.add_lines(name, text);
            }
            records
        })
    }

    /// Those of a folder before these.
    #[must_use]
    pub fn with_folder(mut self, folder: PathBuf) -> Records {
        self.folder = Some(folder);
        self
    }

    /// Adds the lines of a text; what is no record becomes a warning.
    pub fn add_lines(&mut self, name: &str, text: &str) {
        for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match Record::parse(line) {
                Ok(record) => self.add(record),
                Err(e) => {
                    self.warnings.push(format!("{name}, line {}: {}", at + 1, e.message()));
                }
            }
        }
    }

    /// Adds one; it takes the place of another for the same problem and device.
    pub fn add(&mut self, record: Record) {
        self.list.insert((record.device.clone(), record.problem.clone()), record);
    }

    /// Those that were added, by device and problem.
    pub fn iter(&self) -> impl Iterator<Item = &Record> {
        self.list.values()
    }

    /// Up to `most` records of the same device and kind of product in other sizes, the nearest first.
    pub fn near(&self, device: &Device, key: &Key, most: usize) -> Vec<&Record> {
        // The same but for sizes and distances.
        let kind = |k: &Key| Key {
            m: 0,
            n: 0,
            k: 0,
            batch: i64::from(k.batch != 1),
            leading: [0; 3],
            stride: [0; 3],
            ..k.clone()
        };
        let apart = |a: i64, b: i64| (a.max(1) as f64 / b.max(1) as f64).ln().powi(2);
        let distance = |r: &Record| {
            let p = &r.problem;
            apart(p.m, key.m) + apart(p.n, key.n) + apart(p.k, key.k) + apart(p.batch, key.batch)
        };
        let wanted = kind(key);
        let others = self.list.values().filter(|r| r.device == *device && r.problem != *key);
        let mut list: Vec<&Record> = others.filter(|r| kind(&r.problem) == wanted).collect();
        list.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
        list.truncate(most);
        list
    }

    /// What was wrong with what was added.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The record of a problem, whatever its worth, and what was wrong with a file of the folder.
    pub fn find(&self, gpu: &Gpu, key: &Key) -> (Option<Record>, Option<String>) {
        let device = Device::of(gpu);
        let mut warning = None;
        if let Some(path) = self.folder.as_ref().map(|f| Record::path(f, &device, key))
            && let Ok(bytes) = std::fs::read(&path)
        {
            let fits = |r: &Record| r.problem == *key && r.device == device;
            match Record::parse(&String::from_utf8_lossy(&bytes)) {
                Ok(record) if fits(&record) => return (Some(record), None),
                Ok(_) => warning = Some("it is of another problem or device".to_owned()),
                Err(e) => warning = Some(e.message().to_owned()),
            }
            warning = warning.map(|w| format!("{} is not used: {w}", path.display()));
        }
        (self.list.get(&(device, key.clone())).cloned(), warning)
    }
}

/// Where the first candidate of a plan comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The time model.
    Model,
    /// A measurement.
    Record(Box<Record>),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Model => f.write_str("picked by the time model"),
            Source::Record(r) => write!(
                f,
                "tuned on {}: {:.2} us, {:.2} us for the model's pick, {} trials ({}, driver {}, NVRTC {})",
                r.device.name, r.us, r.picker_us, r.trials, r.date, r.driver, r.nvrtc
            ),
        }
    }
}

/// Ways to compute a problem, and why in this order.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Best first: a tuned one, then the model's.
    pub candidates: Vec<Candidate>,
    /// Where the first one comes from.
    pub source: Source,
    /// Records that were there and not used, and why.
    pub warnings: Vec<String>,
}

/// Ways to compute `problem`, best first, at most `most` of them: what `records` say, then by the time model.
///
/// # Errors
/// As [`plan_untuned`]. Records that are wrong are warnings.
pub fn plan_with(problem: &Problem, gpu: &Gpu, most: usize, records: &Records) -> Result<Planned> {
    let mut candidates = plan_untuned(problem, gpu, most)?;
    if problem.images.is_some() {
        // Records are of plain products.
        return Ok(Planned { candidates, source: Source::Model, warnings: Vec::new() });
    }
    let key = Key::of(problem);
    let (found, warning) = records.find(gpu, &key);
    let mut warnings: Vec<String> = warning.into_iter().collect();
    let mut source = Source::Model;
    if let Some(record) = found {
        match of_record(problem, gpu, &record, candidates.first()) {
            Ok(first) => {
                if let Some(first) = first {
                    candidates.insert(0, first);
                    candidates.truncate(most.max(1));
                }
                source = Source::Record(Box::new(record));
            }
            Err(why) => warnings.push(format!("the record of {key} is not used: {why}")),
        }
    }
    Ok(Planned { candidates, source, warnings })
}

/// The candidate of a record; none when it confirms the model's pick.
fn of_record(
    problem: &Problem,
    gpu: &Gpu,
    record: &Record,
    picked: Option<&Candidate>,
) -> std::result::Result<Option<Candidate>, String> {
    let said = |e: Error| e.message().to_owned();
    let first = match &record.choice {
        None => None,
        Some(knobs) => {
            let all = choices(problem, gpu).map_err(said)?;
            let choice = all.iter().find(|c| Knobs::of(c) == *knobs);
            let choice = choice.ok_or(format!("{knobs} is no schedule of this problem"))?;
            let first = candidate(problem, choice).map_err(said)?;
            Some(first.ok_or(format!("{knobs} cannot be lowered"))?)
        }
    };
    let kernels = first.as_ref().or(picked).ok_or("there is no pick")?;
    if code_of(kernels).map_err(said)? != record.code {
        return Err("the kernels have changed since it was measured; tune again".into());
    }
    Ok(first)
}

/// Ways to compute `problem`, best first, at most `most` of them: what the program's own records of tuned products
/// say, then by the time model ([`plan_untuned`]).
///
/// # Errors
/// As [`plan_untuned`].
pub fn plan(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    plan_with(problem, gpu, most, Records::shipped()).map(|planned| planned.candidates)
}
