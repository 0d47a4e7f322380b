//! What `tw tune gemm` and `tw-gpu-tune` share: their arguments, the loop over products, the table.

use crate::search::Options;
use crate::store::Store;
use crate::tuner::{Tuned, Tuner};
use clap::Args;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::case::{Case, Numbers, orders, read_list};
use tilewright_bench_gpu::ending::Ending;
use tilewright_bench_gpu::record::geometric_mean;
use tilewright_kernels::gemm::{Records, Source, plan_with};

/// Which products.
#[derive(Args, Clone, Debug)]
pub struct ProductArgs {
    /// Rows of the result
    pub m: Option<u64>,
    /// Columns of the result
    pub n: Option<u64>,
    /// Depth of the sums
    pub k: Option<u64>,
    /// How many products
    #[arg(long, default_value_t = 1)]
    pub batch: u64,
    /// Kinds of numbers, separated by commas: bf16, f16, tf32, f32, f32x3, i8, e4m3 (or f8), e5m2, f8p (promoted sums)
    #[arg(long = "type", value_delimiter = ',', value_name = "TYPE")]
    pub types: Vec<String>,
    /// Contiguous axes of A, B and C, r for row-major, c for column-major: rcr; without, the kind's own
    #[arg(long)]
    pub order: Option<String>,
    /// What follows the sums: bias-gelu, bias-relu-residual, swiglu, ..., or a formula of sum, sum2, cols, cols2, rows and
    /// residual: "relu(sum + cols) + residual"
    #[arg(long)]
    pub ending: Option<String>,
    /// A list of products instead, a line each: TYPES M N K [xBATCH] [ORDERS] [ENDING]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["m", "n", "k"])]
    pub shapes: Option<PathBuf>,
}

impl ProductArgs {
    /// The products.
    ///
    /// # Errors
    /// The user's: unknown kinds, sizes that are none, a list that cannot be read.
    pub fn cases(&self) -> Result<Vec<Case>> {
        let types: Vec<String> = self
            .types
            .iter()
            .map(|t| match t.as_str() {
                "e4m3" => "f8".to_owned(),
                "e5m2" => "f8e5m2".to_owned(),
                _ => t.clone(),
            })
            .collect();
        if let Some(path) = &self.shapes {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::user(format!("{name} cannot be read: {e}")))?;
            let cases = read_list(&name, &text, &types)?;
            if cases.is_empty() {
                return Err(Error::user(format!("{name} has no products of these kinds")));
            }
            return Ok(cases);
        }
        let (Some(m), Some(n), Some(k)) = (self.m, self.n, self.k) else {
            return Err(Error::user("which product is missing")
                .with_hint("give M N K, for example 4096 4096 4096, or --shapes FILE"));
        };
        for (name, size) in [("M", m), ("N", n), ("K", k), ("batch", self.batch)] {
            if !(1..=1 << 30).contains(&size) {
                let message = format!("{name} = {size} is not a size from 1 to 2^30");
                return Err(Error::user(message));
            }
        }
        let types = if types.is_empty() { vec!["bf16".to_owned()] } else { types };
        let case = |name: &String| {
            let numbers = Numbers::named(name).ok_or_else(|| {
                let known: Vec<&str> =
                    tilewright_bench_gpu::case::NUMBERS.iter().map(|n| n.name).collect();
                Error::user(format!("there is no kind of numbers `{name}`"))
                    .with_hint(format!("known: {}", known.join(", ")))
            })?;
            let text = self.order.as_deref().unwrap_or(numbers.orders);
            let order = orders(text).ok_or_else(|| {
                Error::user(format!("`{text}` are no orders of three matrices"))
                    .with_hint("three letters, r for row-major, c for column-major: rcr")
            })?;
            let case = Case::dense(numbers, [m, n, k, self.batch], order);
            let Some(name) = &self.ending else { return Ok(case) };
            Ok(case.ending(Ending::parse(name)?))
        };
        types.iter().map(case).collect()
    }
}

/// Arguments of tuning.
#[derive(Args, Clone, Debug)]
pub struct TuneOptions {
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields have them")]
    pub products: ProductArgs,
    /// Seconds in all, shared among the products
    #[arg(long, default_value_t = 20.0)]
    pub seconds: f64,
    /// Schedules that are timed at most, per product
    #[arg(long, default_value_t = 400)]
    pub trials: usize,
    /// Schedules that are chosen together; the first two batches do not depend on times
    #[arg(long, default_value_t = 16)]
    pub together: usize,
    /// Only compile what would be timed first, into the cache
    #[arg(long)]
    pub prepare: bool,
    /// Of the random choices
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder of records (default: `tuning` in the cache)
    #[arg(long, value_name = "DIR")]
    pub records: Option<PathBuf>,
    /// Also write all records of the folder into one file, a record a line
    #[arg(long, value_name = "FILE")]
    pub export: Option<PathBuf>,
    /// Leave out products that have a record already
    #[arg(long)]
    pub only_new: bool,
    /// Which GPU
    #[arg(long, default_value_t = 0)]
    pub device: u32,
    /// Folder of the cache (default: $TILEWRIGHT_CACHE, $XDG_CACHE_HOME/tilewright or ~/.cache/tilewright)
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

impl TuneOptions {
    /// The folder of the cache.
    pub fn cache_dir(&self) -> Option<PathBuf> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        self.cache
            .clone()
            .or_else(|| var("TILEWRIGHT_CACHE"))
            .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("tilewright")))
            .or_else(|| var("HOME").map(|d| d.join(".cache/tilewright")))
    }
}

/// What came of all products.
#[derive(Debug)]
pub struct Outcome {
    rows: Vec<(Case, std::result::Result<Tuned, String>)>,
}

/// Tunes every product; `say` gets a line for each.
///
/// # Errors
/// Wrong arguments, no device; or a device that fails on the way (what was found before is kept).
pub fn tune_command(
    options: &TuneOptions,
    cache: Option<&Path>,
    say: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    let cases = options.products.cases()?;
    if !(options.seconds > 0.0 && options.seconds <= 1e6) {
        return Err(Error::user(format!("{} is no number of seconds", options.seconds)));
    }
    let folder = options.records.clone().or_else(|| cache.map(Store::of_cache));
    let store = Store::new(folder.ok_or_else(|| {
        Error::user("there is no folder for records").with_hint("name one: --records DIR")
    })?);
    let tuner = Tuner::open(options.device, cache, hang)?;
    let known = known(&store, say);
    let mut rows = Vec::new();
    let began = Instant::now();
    let count = cases.len();
    for (at, case) in cases.into_iter().enumerate() {
        let records = known.clone().with_folder(store.folder().to_owned());
        if options.only_new {
            let planned = plan_with(&case.problem(), tuner.target(), 1, &records);
            if planned.is_ok_and(|p| matches!(p.source, Source::Record(_))) {
                say(&format!("[{}/{count}] {} has a record", at + 1, title(&case)));
                continue;
            }
        }
        // What a product does not use, the others get.
        let left = options.seconds - began.elapsed().as_secs_f64();
        let search = Options {
            trials: options.trials,
            seconds: (left / (count - at) as f64).max(0.0),
            seed: options.seed,
            batch: options.together.max(1),
            ..Options::default()
        };
        if options.prepare {
            let line = match tuner.prepare(&case, &search) {
                Ok((made, of)) => format!("{} {made} of {of} compiled", title(&case)),
                Err(e) => format!("{} - {}", title(&case), e.message()),
            };
            say(&format!("[{}/{count}, {:>4.0} s] {line}", at + 1, began.elapsed().as_secs_f64()));
            continue;
        }
        let tuned = tuner.tune(&case, &store, &records, &search);
        let line = match &tuned {
            Ok(tuned) => row(&case, tuned),
            Err(e) => format!("{} - {}", title(&case), e.message()),
        };
        say(&format!("[{}/{count}, {:>4.0} s] {line}", at + 1, began.elapsed().as_secs_f64()));
        if let Ok(tuned) = &tuned {
            tuned.wrong.iter().for_each(|w| say(&format!("  WRONG, not recorded: {w}")));
        }
        let lost = tuned.as_ref().is_err_and(|_| tuner.is_lost());
        if count == 1 || lost {
            let tuned = tuned?;
            rows.push((case, Ok(tuned)));
            break;
        }
        rows.push((case, tuned.map_err(|e| e.message().to_owned())));
    }
    if let Some(path) = &options.export {
        export(&store, path)?;
    }
    Ok(Outcome { rows })
}

/// A kernel that never ends holds its process until the process ends.
#[expect(
    clippy::disallowed_methods,
    reason = "the thread that waits for the device never returns to main"
)]
fn hang(schedule: &str) {
    eprintln!("the device does not answer any more, running {schedule}");
    std::process::exit(70);
}

/// The program's records and those of the folder.
fn known(store: &Store, say: &mut dyn FnMut(&str)) -> Records {
    let mut known = Records::shipped().clone();
    if let Ok((records, warnings)) = store.all() {
        warnings.iter().for_each(|w| say(&format!("warning: {w}")));
        records.into_iter().for_each(|r| known.add(r));
    }
    known
}

fn export(store: &Store, path: &Path) -> Result<()> {
    let lines: Vec<String> = store.all()?.0.iter().map(|r| r.line()).collect::<Result<_>>()?;
    let text: String = lines.into_iter().map(|line| line + "\n").collect();
    std::fs::write(path, text)
        .map_err(|e| Error::user(format!("{} cannot be written: {e}", path.display())))
}

fn title(case: &Case) -> String {
    format!("{:<6} {:<22} {:<4}", case.numbers.name, case.title(), case.orders_text())
}

fn row(case: &Case, tuned: &Tuned) -> String {
    let head = title(case);
    let found = &tuned.found;
    let how = format!(
        "{} of {} timed in {:.1} s ({:?})",
        found.timed, tuned.choices, tuned.seconds, found.stop
    );
    let Some(record) = &tuned.record else { return format!("{head} - nothing is right; {how}") };
    let choice = record.choice.as_ref().map_or(tuned.picked.clone(), ToString::to_string);
    format!(
        "{head} {:>9.2} {:>9.2} {:>6.3}  {choice}; {how}",
        record.picker_us,
        record.us,
        record.us / record.picker_us
    )
}

impl Outcome {
    fn ratios(&self) -> Vec<f64> {
        let records = self.rows.iter().filter_map(|(_, t)| t.as_ref().ok()?.record.as_ref());
        records.map(|r| r.us / r.picker_us).collect()
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<6} {:<22} {:<4} {:>9} {:>9} {:>6}  schedule\n",
            "type", "M x N x K", "abc", "pick us", "tuned us", "ratio"
        );
        for (case, tuned) in &self.rows {
            let line = match tuned {
                Ok(tuned) => row(case, tuned),
                Err(e) => format!("{} - {e}", title(case)),
            };
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{line}");
        }
        if let Some(mean) = geometric_mean(&self.ratios()) {
            let _ = writeln!(
                out,
                "geometric mean of tuned over picked {mean:.3}, {} products",
                self.ratios().len()
            );
        }
        out
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(case, tuned)| {
                let mut row = json!({
                    "type": case.numbers.name, "m": case.m, "n": case.n, "k": case.k,
                    "batch": case.batch, "orders": case.orders_text(), "ending": case.ending.name(),
                });
                match tuned {
                    Err(e) => row["error"] = json!(e),
                    Ok(t) => {
                        row["record"] = json!(t.record);
                        row["picked"] = json!(t.picked);
                        row["choices"] = json!(t.choices);
                        row["timed"] = json!(t.found.timed);
                        row["stopped"] = json!(format!("{:?}", t.found.stop));
                        row["wrong"] = json!(t.wrong);
                        row["path"] = json!(t.path.as_ref().map(|p| p.display().to_string()));
                        row["seconds"] = json!(t.seconds);
                    }
                }
                row
            })
            .collect();
        json!({ "products": rows, "tuned_over_picked": geometric_mean(&self.ratios()) })
    }
}
