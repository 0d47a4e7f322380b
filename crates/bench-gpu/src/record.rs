//! The record of a run, and its table.

use crate::case::Case;
use crate::ending::{Ending, unit};
use crate::measure::{Arm, Measured};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};
use tilewright_base::{Error, Result};
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Gpu, Nvrtc, driver_version};

/// One shape's outcome.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was multiplied.
    pub case: Case,
    /// Our plan, in a line.
    pub plan: String,
    /// Its place among the planner's candidates.
    pub candidate: usize,
    /// What failed before it.
    pub failures: Vec<String>,
    /// The measurement, or why there is none.
    pub outcome: Result<Measured, String>,
    /// Why there is no peer, if so.
    pub peer_missing: Option<String>,
    /// The tuned schedule of a record, beside the planner's.
    pub tuned: Option<Tuned>,
}

/// A tuned schedule, measured in the same run.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// The schedule, in a line.
    pub plan: String,
    /// Median times of the planner's and of the tuned one, in turns.
    pub us: [f64; 2],
    /// The tuned one against cuBLASLt, as `Row::outcome`.
    pub measured: Measured,
}

/// An error of ours at most this many times the peer's is accepted.
pub const ERROR_RATIO_MAX: f64 = 2.0;

impl Row {
    /// What is wrong with the results, if anything.
    pub fn problem(&self) -> Option<String> {
        let of_tuned = self.tuned.as_ref().and_then(|t| self.problem_of(&t.measured));
        let own = self.outcome.as_ref().ok().and_then(|measured| self.problem_of(measured));
        own.or_else(|| of_tuned.map(|problem| format!("tuned: {problem}")))
    }

    fn problem_of(&self, measured: &Measured) -> Option<String> {
        let ours = measured.ours.accuracy;
        if ours.unwritten != [0, 0] {
            return Some(format!("{:?} elements were not written", ours.unwritten));
        }
        let worst = |errors: [f64; 2]| errors[0].max(errors[1]);
        let peer = measured.peer.as_ref().map_or(0.0, |p| worst(p.arm.accuracy.errors));
        let unit = unit(self.case.c.dtype);
        let allowed = match (&measured.peer, self.case.c.dtype.is_float()) {
            (_, false) => 0.0,
            (Some(_), true) => (ERROR_RATIO_MAX * peer).max(unit),
            (None, true) => self.case.numbers.lone_error_max(),
        };
        let error = worst(ours.errors);
        (error.is_nan() || error > allowed)
            .then(|| format!("error {error:.2e}, and {allowed:.2e} is allowed"))
    }

    /// Our median time over the peer's, when both were measured and our results are right.
    pub fn ratio(&self) -> Option<f64> {
        let ratio = self.outcome.as_ref().ok()?.ratio?[1];
        self.problem().is_none().then_some(ratio)
    }

    /// Our tuned median time over the peer's, under the same conditions; the planner's without a record.
    fn tuned_ratio(&self) -> Option<f64> {
        let ratio = match &self.tuned {
            Some(tuned) => tuned.measured.ratio?[1],
            None => return self.ratio(),
        };
        self.problem().is_none().then_some(ratio)
    }

    /// The tuned time over the planner's.
    fn gain(&self) -> Option<f64> {
        let tuned = self.tuned.as_ref()?;
        self.problem().is_none().then_some(tuned.us[1] / tuned.us[0])
    }

    fn json(&self) -> Value {
        let case = &self.case;
        let mut row = Map::new();
        let mut put = |key: &str, value: Value| {
            row.insert(key.into(), value);
        };
        put("type", json!(case.numbers.name));
        put("m", json!(case.m));
        put("n", json!(case.n));
        put("k", json!(case.k));
        put("batch", json!(case.batch));
        put("orders", json!(case.orders_text()));
        if case.ending != Ending::Plain {
            put("ending", json!(case.ending.name()));
        }
        put("plan", json!(self.plan));
        put("candidate", json!(self.candidate));
        if !self.failures.is_empty() {
            put("failed_before", json!(self.failures));
        }
        if let Some(problem) = self.problem() {
            put("problem", json!(problem));
        }
        if let Some(reason) = &self.peer_missing {
            put("cublaslt_missing", json!(reason));
        }
        match &self.outcome {
            Err(error) => put("error", json!(error)),
            Ok(measured) => {
                let tflops = |arm: &Arm| case.operations() / arm.us[1] / 1e6;
                put("tilewright_us", json!(measured.ours.us));
                put("tilewright_tflops", json!(tflops(&measured.ours)));
                put("tilewright_error", json!(measured.ours.accuracy.errors));
                if let Some(peer) = &measured.peer {
                    put("cublaslt_us", json!(peer.arm.us));
                    put("cublaslt_tflops", json!(tflops(&peer.arm)));
                    put("cublaslt_error", json!(peer.arm.accuracy.errors));
                    put("cublaslt_algorithms", json!(peer.algorithms));
                    put("cublaslt_chosen", json!(peer.chosen));
                    put("cublaslt_favourite_us", json!(peer.favourite_us));
                    put("cublaslt_workspace_bytes", json!(peer.workspace_bytes));
                }
                if let Some(ratio) = measured.ratio {
                    put("latency_ratio", json!(ratio));
                }
                if let Some(tuned) = &self.tuned {
                    let Tuned { plan, us, measured } = tuned;
                    put(
                        "tuned",
                        json!({
                            "plan": plan, "tilewright_us": measured.ours.us, "in_turns_us": us,
                            "tilewright_error": measured.ours.accuracy.errors, "latency_ratio": measured.ratio,
                        }),
                    );
                }
                put("sets", json!(measured.sets));
                put("rotation_bytes", json!(measured.rotation_bytes));
                put("passes_per_sample", json!(measured.passes));
                put("pairs", json!(measured.pairs));
            }
        }
        Value::Object(row)
    }
}

/// Geometric mean; none of an empty list.
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    let logs: f64 = values.iter().map(|v| v.ln()).sum();
    (!values.is_empty()).then(|| (logs / values.len() as f64).exp())
}

/// Kinds of numbers in the order of their first row, with the ratios of each.
fn ratios_by_kind(rows: &[Row]) -> Vec<(&'static str, Vec<f64>)> {
    let mut kinds: Vec<(&'static str, Vec<f64>)> = Vec::new();
    for row in rows {
        let name = row.case.numbers.name;
        let at = kinds.iter().position(|(k, _)| *k == name).unwrap_or_else(|| {
            kinds.push((name, Vec::new()));
            kinds.len() - 1
        });
        kinds[at].1.extend(row.ratio());
    }
    kinds
}

/// The table of a run: a line per shape, a mean per kind of numbers.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:<6} {:<22} {:<4} {:>9} {:>9} {:>7} {:>7} {:>6}  quartiles",
        "type", "M x N x K", "abc", "ours us", "cublas us", "TFLOP/s", "cublas", "ratio"
    );
    for row in rows {
        let head = format!(
            "{:<6} {:<22} {:<4}",
            row.case.numbers.name,
            row.case.title(),
            row.case.orders_text()
        );
        let _ = writeln!(out, "{head} {}", line(row));
    }
    for (kind, ratios) in ratios_by_kind(rows) {
        let mean = geometric_mean(&ratios).map_or("-".into(), |m| format!("{m:.3}"));
        let ahead = ratios.iter().filter(|r| **r <= 1.0).count();
        let _ = writeln!(
            out,
            "{kind:<6} geometric mean of our time over cuBLASLt's {mean}, {} shapes, {ahead} at most 1",
            ratios.len()
        );
        let of_kind = || rows.iter().filter(|r| r.case.numbers.name == kind);
        let gains: Vec<f64> = of_kind().filter_map(Row::gain).collect();
        let tuned: Vec<f64> = of_kind().filter_map(Row::tuned_ratio).collect();
        if let (Some(gain), Some(tuned)) = (geometric_mean(&gains), geometric_mean(&tuned)) {
            let _ = writeln!(
                out,
                "{kind:<6} tuned over picked {gain:.3} ({} shapes with records); with records, over cuBLASLt {tuned:.3}",
                gains.len()
            );
        }
    }
    out
}

fn line(row: &Row) -> String {
    let measured = match &row.outcome {
        Ok(measured) => measured,
        Err(error) => return format!("- {}", error.lines().next().unwrap_or_default()),
    };
    let tflops = |us: f64| row.case.operations() / us / 1e6;
    let us = measured.ours.us[1];
    let mut text = match (&measured.peer, measured.ratio) {
        (Some(peer), Some([low, middle, high])) => format!(
            "{us:>9.1} {:>9.1} {:>7.0} {:>7.0} {middle:>6.3}  {low:.3} to {high:.3}",
            peer.arm.us[1],
            tflops(us),
            tflops(peer.arm.us[1])
        ),
        _ => format!("{us:>9.1} {:>9} {:>7.0} {:>7} {:>6}", "-", tflops(us), "-", "-"),
    };
    if let Some(problem) = row.problem() {
        let _ = write!(text, "  WRONG: {problem}");
    }
    if let Some(tuned) = &row.tuned {
        let [picked, us] = tuned.us;
        let over =
            tuned.measured.ratio.map_or(String::new(), |r| format!(", {:.3} over cuBLASLt", r[1]));
        let _ = write!(text, "  tuned {us:.1} us ({:.3}{over})", us / picked);
    }
    if row.candidate > 0 {
        let _ = write!(text, "  (candidate {})", row.candidate);
    }
    text
}

/// The command line as a record gives it: a path from the root of this machine's files says nothing
/// elsewhere, so of such a one only the last part stays.
pub fn command(args: impl Iterator<Item = String>) -> String {
    let short = |arg: String| {
        let last = arg.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
        if !arg.starts_with('/') {
            arg
        } else if last.is_empty() {
            "ROOT".to_owned()
        } else {
            last
        }
    };
    args.map(short).collect::<Vec<_>>().join(" ")
}

/// A query of `nvidia-smi`: names and values; empty when it is not there.
pub fn nvidia_smi(fields: &[&str]) -> Map<String, Value> {
    let query = format!("--query-gpu={}", fields.join(","));
    let output = Command::new("nvidia-smi").args([&query, "--format=csv,noheader"]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let values: Vec<&str> = text.lines().next().unwrap_or_default().split(", ").collect();
    if values.len() != fields.len() {
        return Map::new();
    }
    fields.iter().zip(values).map(|(f, v)| ((*f).to_owned(), json!(v.trim()))).collect()
}

/// Clocks, power and temperature at this moment.
pub fn clocks() -> Map<String, Value> {
    nvidia_smi(&[
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.draw",
        "power.limit",
        "temperature.gpu",
        "clocks_event_reasons.active",
    ])
}

/// The machine, as the record names it.
pub fn machine(gpu: &Gpu, nvrtc: &Nvrtc, peer: Option<&CublasLt>) -> Value {
    let properties = gpu.properties();
    let pair = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    let driver = nvidia_smi(&["driver_version"]).remove("driver_version");
    json!({
        "gpu": properties.name,
        "sms": properties.sm_count,
        "l2_bytes": properties.l2_bytes,
        "memory_bytes": properties.memory_bytes,
        "ecc": properties.ecc,
        "driver": driver,
        "driver_cuda": driver_version().ok().map(pair),
        "nvrtc": pair(nvrtc.version()),
        "cublaslt": peer.map(|p| {
            let (major, minor, patch) = p.version();
            format!("{major}.{minor}.{patch}")
        }),
    })
}

/// The whole record.
pub fn record(head: Map<String, Value>, rows: &[Row]) -> Value {
    let mut record = Map::new();
    let endings = rows.iter().any(|r| r.case.ending != Ending::Plain);
    record.insert("kind".into(), json!(if endings { "gpu-endings" } else { "gpu-gemm" }));
    record.extend(head);
    let means: Map<String, Value> = ratios_by_kind(rows)
        .into_iter()
        .map(|(kind, ratios)| {
            let mean = geometric_mean(&ratios);
            let gains: Vec<f64> =
                rows.iter().filter(|r| r.case.numbers.name == kind).filter_map(Row::gain).collect();
            let mut row = json!({ "latency_ratio": mean, "shapes": ratios.len() });
            if !gains.is_empty() {
                row["tuned_over_picked"] = json!(geometric_mean(&gains));
                row["tuned_shapes"] = json!(gains.len());
            }
            (kind.to_owned(), row)
        })
        .collect();
    record.insert("geometric_means".into(), Value::Object(means));
    record.insert("rows".into(), rows.iter().map(Row::json).collect());
    Value::Object(record)
}

/// Date and time of day in UTC: `2026-11-21T14:00:00Z`.
pub fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    utc(seconds)
}

/// Civil date from days since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn utc(seconds: u64) -> String {
    let days = seconds / 86400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The commit that was measured: what the environment says (`TILEWRIGHT_COMMIT`, for programs outside
/// a repository), or what git says.
pub fn commit() -> String {
    if let Some(given) = std::env::var("TILEWRIGHT_COMMIT").ok().filter(|c| !c.is_empty()) {
        return given;
    }
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    text.ok().filter(|t| !t.is_empty()).unwrap_or_else(|| "unknown".into())
}

/// Writes a record into `folder`, named after its kind, its date and its commit.
///
/// # Errors
/// The user's when the file cannot be written.
pub fn write(folder: &Path, kind: &str, record: &Value) -> Result<()> {
    let date = record["date"].as_str().unwrap_or_default().get(..10).unwrap_or("undated");
    let commit = record["commit"].as_str().unwrap_or_default();
    let path = folder.join(format!("{kind}-{date}-{commit}.json"));
    let text = serde_json::to_string_pretty(record).map_err(|e| Error::bug(e.to_string()))?;
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&path, text + "\n"))
        .map_err(|e| Error::user(format!("{} cannot be written: {e}", path.display())))?;
    println!("record: {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{Numbers, orders};
    use crate::measure::{Accuracy, PeerMeasured};

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_795_273_445), "2026-11-21T15:04:05Z");
    }

    fn row(ours: f64, peer: f64, error: f64, peer_error: f64) -> Row {
        let accuracy = |e| Accuracy { errors: [e, e], unwritten: [0, 0] };
        let numbers = Numbers::named("bf16").unwrap();
        let measured = Measured {
            ours: Arm { us: [ours; 3], accuracy: accuracy(error) },
            peer: Some(PeerMeasured {
                arm: Arm { us: [peer; 3], accuracy: accuracy(peer_error) },
                algorithms: 16,
                chosen: 2,
                workspace_bytes: 0,
                favourite_us: peer,
            }),
            ratio: Some([ours / peer; 3]),
            sets: 2,
            rotation_bytes: 1,
            passes: 1,
            pairs: 5,
        };
        Row {
            case: Case::dense(numbers, [64, 64, 64, 1], orders("rrr").unwrap()),
            plan: "gemm".into(),
            candidate: 0,
            failures: Vec::new(),
            outcome: Ok(measured),
            peer_missing: None,
            tuned: None,
        }
    }

    #[test]
    fn wrong_results_have_no_ratio() {
        let good = row(1.0, 2.0, 1.6e-3, 1.6e-3);
        assert_eq!((good.problem(), good.ratio()), (None, Some(0.5)));
        let wrong = row(1.0, 2.0, 4e-3, 1.6e-3);
        assert!(wrong.problem().unwrap().contains("4.00e-3"));
        assert_eq!(wrong.ratio(), None);
        assert!(row(1.0, 2.0, f64::INFINITY, 1.6e-3).problem().is_some());
        assert!(row(1.0, 2.0, f64::NAN, 1.6e-3).problem().is_some());
        let mut unwritten = row(1.0, 2.0, 1.6e-3, 1.6e-3);
        if let Ok(measured) = &mut unwritten.outcome {
            measured.ours.accuracy.unwritten = [0, 3];
        }
        assert!(unwritten.problem().unwrap().contains("not written"));
        let rows = [good, wrong, row(2.0, 1.0, 1.6e-3, 1.6e-3)];
        let text = table(&rows);
        assert!(text.contains("cuBLASLt's 1.000, 2 shapes, 1 at most 1"), "{text}");
        assert!(text.contains("WRONG"));
        let record = record(Map::new(), &rows);
        assert_eq!(record["geometric_means"]["bf16"]["shapes"], 2);
        assert_eq!(record["geometric_means"]["bf16"]["tuned_shapes"], Value::Null);
        assert!(record["rows"][1]["problem"].is_string());
    }

    #[test]
    fn tuned_schedules_stand_beside_the_planners_and_wrong_ones_count_as_wrong() {
        let tuned = |us: f64, error: f64| {
            let Ok(measured) = row(us, 2.0, error, 1.6e-3).outcome else { unreachable!() };
            Some(Tuned { plan: "gemm".into(), us: [4.0, us], measured })
        };
        let mut good = row(4.0, 2.0, 1.6e-3, 1.6e-3);
        good.tuned = tuned(1.0, 1.6e-3);
        let text = table(&[good.clone(), row(2.0, 1.0, 1.6e-3, 1.6e-3)]);
        assert!(text.contains("tuned 1.0 us (0.250, 0.500 over cuBLASLt)"), "{text}");
        assert!(text.contains("tuned over picked 0.250 (1 shapes with records)"), "{text}");
        assert!(text.contains("with records, over cuBLASLt 1.000"), "{text}");
        let all = record(Map::new(), std::slice::from_ref(&good));
        assert_eq!(all["geometric_means"]["bf16"]["tuned_over_picked"], 0.25);
        let mut wrong = good;
        wrong.tuned = tuned(1.0, 1.0);
        assert!(wrong.problem().unwrap().starts_with("tuned: error"));
    }

    #[test]
    fn commands_name_no_folder_of_one_machine() {
        let command = |text: &str| command(text.split(' ').map(str::to_owned));
        assert_eq!(
            command("/srv/x/tw-gpu-bench --out /srv/out/ --cache .cache/k --filter /"),
            "tw-gpu-bench --out out --cache .cache/k --filter ROOT"
        );
    }
}
