//! Runs the workspace's tests: every test program that cargo builds, as many at a time as there are processors, and
//! beside them whatever commands the caller names (`--beside "python tests/x.py"`; words are split at spaces).
//!
//! `cargo test` runs programs one after another, and most have a long test that leaves the other processors idle. Here each
//! worker takes the next one, with the documentation's tests as one of them; what a program prints is shown when
//! it fails. A program runs in the folder of its package, as under cargo, a command in the repository's.
//!
//! Those that took longest the last time start first (`test-seconds` in the target folder), so that none is left alone at
//! the end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How tests are built: as everything else is, so that nothing is compiled twice.
const BUILD: [&str; 4] = ["test", "--release", "--locked", "--workspace"];
/// Programs that take longer are named.
const LONG: Duration = Duration::from_secs(2);

/// Something to run.
struct Job {
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
    folder: PathBuf,
}

/// Builds and runs all tests, and the commands `beside` them.
pub(crate) fn run(beside: &[&str]) -> ExitCode {
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let mut jobs = match build(&cargo) {
        Ok(mut tests) => {
            tests.push(examples(&cargo));
            tests
        }
        Err(message) => {
            eprintln!("test: {message}");
            return ExitCode::FAILURE;
        }
    };
    jobs.extend(beside.iter().filter_map(|line| command(line)));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    let kept = target.join("test-seconds");
    let last = std::fs::read_to_string(&kept).unwrap_or_default();
    longest_first(&mut jobs, &seconds(&last));
    let Ran { failed, took } = run_all(&jobs);
    let lines: Vec<String> = took.iter().map(|(name, s)| format!("{s:.2} {name}\n")).collect();
    // Without it the order is another, no more.
    let _ = std::fs::write(&kept, lines.concat());
    if failed.is_empty() {
        println!("{} test programs passed", jobs.len());
        ExitCode::SUCCESS
    } else {
        eprintln!("{} of {} test programs failed: {}", failed.len(), jobs.len(), failed.join(", "));
        ExitCode::FAILURE
    }
}

/// A line of words as something to run; `None` without any.
fn command(line: &str) -> Option<Job> {
    let mut words = line.split_whitespace();
    let program = PathBuf::from(words.next()?);
    let arguments = words.map(str::to_owned).collect();
    Some(Job { name: line.to_owned(), program, arguments, folder: PathBuf::from(".") })
}

/// The tests in the documentation, of all packages: fewer would be built with other features of the dependencies.
fn examples(cargo: &Path) -> Job {
    let arguments = BUILD.iter().chain(&["--quiet", "--doc"]).map(|a| (*a).to_owned()).collect();
    Job { name: "documentation".into(), program: cargo.into(), arguments, folder: ".".into() }
}

/// What `run_all` wrote the last time: seconds by name.
fn seconds(text: &str) -> BTreeMap<&str, f64> {
    let line = |line: &'_ str| -> Option<(usize, f64)> {
        let (seconds, _) = line.split_once(' ')?;
        Some((seconds.len() + 1, seconds.parse().ok()?))
    };
    text.lines().filter_map(|l| line(l).map(|(at, s)| (&l[at..], s))).collect()
}

/// Jobs in the order in which they start; those that never ran come first.
fn longest_first(jobs: &mut [Job], last: &BTreeMap<&str, f64>) {
    let took = |job: &Job| last.get(job.name.as_str()).copied().unwrap_or(f64::INFINITY);
    jobs.sort_by(|a, b| took(b).total_cmp(&took(a)));
}

/// Builds the test programs; what cargo says of each is one line of JSON.
fn build(cargo: &Path) -> Result<Vec<Job>, String> {
    let mut command = Command::new(cargo);
    command.args(BUILD).args(["--no-run", "--message-format=json-render-diagnostics"]);
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo cannot be run: {e}"))?;
    if !output.status.success() {
        return Err("the tests do not build".into());
    }
    let jobs: Vec<Job> = String::from_utf8_lossy(&output.stdout).lines().filter_map(job).collect();
    if jobs.is_empty() { Err("cargo names no test programs".into()) } else { Ok(jobs) }
}

/// The test program that a line of cargo's is about, if it is about one.
fn job(line: &str) -> Option<Job> {
    let program = PathBuf::from(field(line, "executable")?);
    // Programs that tests run are built, too, and are no tests.
    line.contains("\"test\":true},\"features\"").then_some(())?;
    let manifest = PathBuf::from(field(line, "manifest_path")?);
    let folder = manifest.parent()?.to_owned();
    let package = folder.file_name()?.to_string_lossy().into_owned();
    let source = PathBuf::from(field(line, "src_path")?);
    let source = source.strip_prefix(&folder).unwrap_or(&source).display().to_string();
    Some(Job { name: format!("{package}/{source}"), program, arguments: Vec::new(), folder })
}

/// The last text with this name in a line of JSON.
fn field(line: &str, name: &str) -> Option<String> {
    let (_, rest) = line.rsplit_once(&format!("\"{name}\":\""))?;
    let mut out = String::new();
    let mut chars = rest.chars();
    loop {
        match chars.next()? {
            '"' => return Some(out),
            '\\' => out.push(chars.next()?),
            c => out.push(c),
        }
    }
}

/// What became of the jobs.
struct Ran {
    /// Names of those that failed, in their order.
    failed: Vec<String>,
    /// Seconds that each took, by name.
    took: BTreeMap<String, f64>,
}

/// Runs the jobs.
fn run_all(jobs: &[Job]) -> Ran {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let seconds = Mutex::new(BTreeMap::new());
    let work = || {
        while let Some((index, job)) = take(&next, jobs) {
            let start = Instant::now();
            let mut command = Command::new(&job.program);
            let result = command.args(&job.arguments).current_dir(&job.folder).output();
            let took = start.elapsed();
            if let Ok(mut seconds) = seconds.lock() {
                seconds.insert(job.name.clone(), took.as_secs_f64());
            }
            let text = match result {
                Ok(output) if output.status.success() => {
                    if took > LONG {
                        println!("{:5.1} s {}", took.as_secs_f64(), job.name);
                    }
                    continue;
                }
                Ok(output) => report(&output),
                Err(e) => format!("{} cannot be run: {e}\n", job.program.display()),
            };
            if let Ok(mut failed) = failed.lock() {
                // Under the lock, so that reports do not mix.
                eprintln!("\n-- {} failed after {:.1} s\n{text}", job.name, took.as_secs_f64());
                failed.push((index, job.name.clone()));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let mut failed = failed.into_inner().unwrap_or_default();
    failed.sort();
    let failed = failed.into_iter().map(|(_, name)| name).collect();
    Ran { failed, took: seconds.into_inner().unwrap_or_default() }
}

fn take<'a>(next: &AtomicUsize, jobs: &'a [Job]) -> Option<(usize, &'a Job)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    jobs.get(index).map(|job| (index, job))
}

/// All that a program printed, and how it ended.
fn report(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|b| String::from_utf8_lossy(b));
    format!("{out}{err}{}\n", output.status)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As cargo prints them, shortened.
    const LINE: &str = r#"{"reason":"compiler-artifact","manifest_path":"/r/crates/base/Cargo.toml","target":{"kind":["test"],"name":"t","src_path":"/r/crates/base/tests/t.rs","doctest":false,"test":true},"profile":{"opt_level":"2","test":true},"features":[],"filenames":["/r/t"],"executable":"/r/a \"b\"/t-1","fresh":true}"#;

    #[test]
    fn test_programs_are_found_in_what_cargo_says() {
        let found = job(LINE).expect("a test program");
        assert_eq!(found.name, "base/tests/t.rs");
        assert_eq!(found.program, Path::new("/r/a \"b\"/t-1"));
        assert_eq!(found.folder, Path::new("/r/crates/base"));
        let program =
            LINE.replace("\"opt_level\":\"2\",\"test\":true", "\"opt_level\":\"2\",\"test\":false");
        assert!(job(&program).is_none(), "a program that is no test");
        let library = LINE.replace("\"/r/a \\\"b\\\"/t-1\"", "null");
        assert!(job(&library).is_none() && job("").is_none());
    }

    #[test]
    fn every_job_runs_and_failures_are_named() {
        let job = |name: &str, program: &str| Job {
            name: name.into(),
            program: program.into(),
            arguments: vec!["--version".into()],
            folder: ".".into(),
        };
        let jobs = [job("a", "/no/such/program"), job("b", env!("CARGO")), job("c", "/no/such")];
        let ran = run_all(&jobs);
        assert_eq!(ran.failed, ["a", "c"]);
        let lines: Vec<String> = ran.took.iter().map(|(n, s)| format!("{s:.2} {n}\n")).collect();
        let names: Vec<&str> = ran.took.keys().map(String::as_str).collect();
        assert!(seconds(&lines.concat()).keys().eq(&names), "{lines:?}");
    }

    #[test]
    fn the_longest_start_first_and_new_ones_before_them() {
        let last = seconds("1.50 a\n20.00 two words\nnonsense\n0.10 c\n");
        let mut jobs: Vec<Job> =
            ["c", "a", "new", "two words"].iter().filter_map(|line| command(line)).collect();
        // The name is the whole line, the program its first word.
        assert_eq!(jobs[3].program, Path::new("two"));
        assert_eq!(jobs[3].arguments, ["words"]);
        longest_first(&mut jobs, &last);
        let names: Vec<&str> = jobs.iter().map(|j| j.name.as_str()).collect();
        assert_eq!(names, ["new", "two words", "a", "c"]);
        assert!(command("  ").is_none());
    }
}
