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
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = output::Output::new(cli.json);
    // A panic is always our bug: say so in one line instead of a backtrace.
    std::panic::set_hook(Box::new(|info| {
        let place =
            info.location().map_or_else(String::new, |l| format!(" at {}:{}", l.file(), l.line()));
        let text = info.payload().downcast_ref::<&str>().map(|s| (*s).to_string());
        let text =
            text.or_else(|| info.payload().downcast_ref::<String>().cloned()).unwrap_or_default();
        eprintln!("error: internal error{place}: {text}\n  reproduce: {}", output::command_line());
    }));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match &cli.command {
        Command::Run(args) => commands::run::run(args, &output),
        Command::Verify(args) => commands::verify::run(args, &output),
        Command::Bench(args) => commands::bench::run(args, &output),
        Command::Explain(args) => commands::explain::run(args, &output),
        Command::Inspect(args) => commands::inspect::run(args, &output),
        Command::Embed(args) => commands::embed::run(args, &output),
        Command::Expr(args) => commands::expr::run(args, &output),
        Command::Machine(args) => commands::machine::run(args, &output),
    }));
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => output.error(&error),
        Err(_) => ExitCode::from(70),
    }
}
