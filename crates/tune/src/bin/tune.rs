//! `tw-gpu-tune`: what `tw tune gemm` does, as a small program that needs nothing but the driver and NVRTC.

use clap::Parser;
use std::process::ExitCode;
use tilewright_tune::command::{TuneOptions, tune_command};

/// Finds the fastest schedules of matrix products by measuring, and keeps them.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    options: TuneOptions,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let cache = cli.options.cache_dir();
    let mut report = |line: &str| eprintln!("{line}");
    match tune_command(&cli.options, cache.as_deref(), &mut report) {
        Ok(outcome) if cli.json => println!("{}", outcome.json()),
        Ok(outcome) => print!("{}", outcome.table()),
        Err(error) => {
            eprintln!("{error:?}");
            return ExitCode::from(error.exit_code() as u8);
        }
    }
    ExitCode::SUCCESS
}
