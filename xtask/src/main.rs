//! The repository's own commands, run as `cargo xtask <command>`.
//!
//! `tidy` reads every committed text file and reports what breaks the project's rules about its own
//! shape; `test` runs the tests. To add a command: one arm in [`main`] and one line in [`USAGE`].

mod test;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command>

  test    build and run all Rust tests, several programs at a time;
          --beside COMMAND (any number of them): other tests, run among them
  tidy    check crate arrows, file heads, docs lists, links and words
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["test", rest @ ..] => match beside(rest) {
            Some(commands) => test::run(&commands),
            None => {
                eprint!("{USAGE}");
                ExitCode::from(2)
            }
        },
        ["tidy"] => run_tidy(),
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// The commands of `--beside COMMAND ...`.
fn beside<'a>(arguments: &[&'a str]) -> Option<Vec<&'a str>> {
    let pairs = arguments.chunks(2).map(|pair| match pair {
        ["--beside", command] => Some(*command),
        _ => None,
    });
    pairs.collect()
}

fn run_tidy() -> ExitCode {
    let repo = match tidy::Repo::from_git() {
        Ok(repo) => repo,
        Err(message) => {
            eprintln!("tidy: {message}");
            return ExitCode::from(2);
        }
    };
    let problems = tidy::check(&repo);
    for problem in &problems {
        eprintln!("{problem}");
    }
    if problems.is_empty() {
        println!("tidy: {} files, nothing to report", repo.files.len());
        ExitCode::SUCCESS
    } else {
        eprintln!("tidy: {} problem(s)", problems.len());
        ExitCode::FAILURE
    }
}
