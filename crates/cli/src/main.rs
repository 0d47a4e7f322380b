//! `tw`: the Tilewright command.
//!
//! Arguments are in `args.rs`, one file per command under `commands/`, and everything a command
//! computes comes from the library crates: this crate only reads arguments and prints.
//!
//! Exit codes: 0 done, 2 the input is wrong, 3 it is right but unsupported, 70 our bug.

mod args;
mod commands;
mod npy;
mod output;

use args::{Cli, Command};
use clap::Parser;
use output::Output;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use tilewright_base::{Error, Result};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let output = Output::new(cli.json);
    match guarded(|| run(&cli.command, &output)).and_then(|()| output.finish()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output.error(&error),
    }
}

fn run(command: &Command, output: &Output) -> Result<()> {
    match command {
        Command::Run(args) => commands::run::run(args, output),
        Command::Verify(args) => commands::verify::run(args, output),
        Command::Bench(args) => commands::bench::run(args, output),
        Command::Generate(args) => commands::generate::run(args, output),
        Command::Tune(args) => commands::gemm::tune(args, output),
        Command::Explain(args) => commands::explain::run(args, output),
        #[cfg(feature = "cpu")]
        Command::Inspect(args) => commands::inspect::run(args, output),
        #[cfg(not(feature = "cpu"))]
        Command::Inspect(args) => {
            let args::InspectWhat::Gemm(args) = &args.what;
            commands::gemm::inspect(args, output)
        }
        Command::Edges(args) => commands::edges::run(args, output),
        Command::Embed(args) => commands::embed::run(args, output),
        #[cfg(feature = "cpu")]
        Command::Expr(args) => commands::expr::run(args, output),
        #[cfg(feature = "cpu")]
        Command::Machine(args) => commands::machine::run(args, output),
    }
}

/// A panic is always our bug: it becomes an error like the others.
fn guarded(f: impl FnOnce() -> Result<()>) -> Result<()> {
    static MESSAGE: Mutex<Option<String>> = Mutex::new(None);
    std::panic::set_hook(Box::new(|info| {
        let place =
            info.location().map_or_else(String::new, |l| format!(" at {}:{}", l.file(), l.line()));
        let text = info.payload().downcast_ref::<&str>().map(|s| (*s).to_string());
        let text = text.or_else(|| info.payload().downcast_ref::<String>().cloned());
        let text = format!("internal error{place}: {}", text.unwrap_or_default());
        // The first panic is the cause; others follow from it.
        MESSAGE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
    }));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or_else(|_| {
        let text = MESSAGE.lock().unwrap_or_else(PoisonError::into_inner).take();
        Err(Error::bug(text.unwrap_or_else(|| "internal error".to_string())))
    })
}

/// Prints help, the version, or what is wrong with the arguments (exit code 2).
fn usage(e: &clap::Error) -> ExitCode {
    if e.use_stderr() && std::env::args_os().any(|a| a == "--json") {
        let text = e.to_string();
        let mut lines = text.lines();
        let message = lines.next().unwrap_or_default().trim_start_matches("error: ");
        let error = Error::user(message).with_hint(lines.collect::<Vec<_>>().join("\n").trim());
        return Output::new(true).error(&error);
    }
    // A closed pipe is no failure.
    let _ = e.print();
    ExitCode::from(if e.use_stderr() { 2 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_bug_with_its_place() {
        #[expect(clippy::unnecessary_literal_unwrap, reason = "the panic is the point")]
        let error = guarded(|| {
            None::<()>.expect("what broke");
            Ok(())
        })
        .unwrap_err();
        assert_eq!(error.exit_code(), 70);
        assert!(error.message().contains("what broke") && error.message().contains("main.rs"));
    }
}
