//! What can be typed: one struct per command. The doc comments are the help texts.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Compiles models and formulas to fast, verified kernels.
#[derive(Debug, Parser)]
#[command(name = "tw", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    /// Print results (and errors) as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compile a formula: show each stage, evaluate it, measure it
    Expr(ExprArgs),
    /// Show this machine and measure its ceilings
    Machine(MachineArgs),
}

/// Stages of an expression that can be printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExprStage {
    /// The words of the text
    Tokens,
    /// The typed syntax tree
    Ast,
    /// The simplified function
    Func,
    /// LLVM IR of the array kernel
    Llvm,
    /// Machine code of the array kernel
    Asm,
    /// CUDA C++ device function
    Cuda,
    /// Triton source
    Triton,
    /// The derivative by each variable
    Derivative,
}

#[derive(Debug, Args)]
pub(crate) struct ExprArgs {
    /// The formula, e.g. 'x * 2 + y / 3'; definitions may stand in front: 'f(x) = x*x; f(a) + 1'
    pub(crate) text: String,
    /// Values of variables: x=4 y=9
    #[arg(value_name = "NAME=VALUE")]
    pub(crate) values: Vec<String>,
    /// Print a stage instead of the value
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) emit: Vec<ExprStage>,
    /// Element type of variables and numbers: f64, f32, f16, bf16, i64, i32, bool, ...
    #[arg(long, default_value = "f64")]
    pub(crate) dtype: String,
    /// Also apply rules that are exact only for finite real numbers (x - x = 0)
    #[arg(long)]
    pub(crate) fast: bool,
    /// Measure over arrays of N elements, against one temporary array per operation
    #[arg(long, value_name = "N")]
    pub(crate) bench: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// Measure the ceilings again and cache them
    #[arg(long)]
    pub(crate) measure: bool,
    /// Threads to use; 0 for all
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
}

/// Where cached files live, or what the user says.
#[derive(Debug, Args)]
pub(crate) struct CacheArgs {
    /// Folder of the cache (default: $TILEWRIGHT_CACHE, $XDG_CACHE_HOME/tilewright or
    /// ~/.cache/tilewright)
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
}
