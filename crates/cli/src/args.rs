//! What can be typed: one struct per command. The doc comments are the help texts.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use tilewright_tune::command::{ProductArgs, TuneOptions};

/// Compiles models and formulas to fast, verified kernels.
#[derive(Debug, Parser)]
#[command(name = "tw", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Print results (and errors) as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a model on given or random inputs
    Run(RunArgs),
    /// Compare a compiled model with the float64 oracle, per output and per kernel
    Verify(VerifyArgs),
    /// Time a model, or a matrix product on a GPU against cuBLASLt
    Bench(BenchArgs),
    /// Continue a text with a language model, token by token
    Generate(GenerateArgs),
    /// Search for faster schedules by measuring, of a model on this processor or a product on a GPU, and keep them
    Tune(TuneArgs),
    /// Show what each kernel does, costs and reaches, and how memory is used
    Explain(ExplainArgs),
    #[cfg(feature = "cpu")]
    /// Print a model, or a GPU kernel, at any stage of compilation
    Inspect(InspectArgs),
    #[cfg(not(feature = "cpu"))]
    /// Print the GPU kernels of a matrix product
    Inspect(InspectKernelArgs),
    /// Run small graphs at the edges on a GPU: empty batches, NaN, odd sizes, wrong inputs
    Edges(EdgesArgs),
    /// Embed sentences with a sentence encoder, and search among them
    Embed(EmbedArgs),
    #[cfg(feature = "cpu")]
    /// Compile a formula: show each stage, evaluate it, measure it
    Expr(ExprArgs),
    #[cfg(feature = "cpu")]
    /// Show this machine and measure its ceilings
    Machine(MachineArgs),
}

#[cfg(feature = "cpu")]
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

/// A time in seconds.
fn seconds(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number of seconds".to_string())?;
    (number >= 0.0).then_some(number).ok_or_else(|| "not a number of seconds".to_string())
}

/// A count of what there must be one of.
fn at_least_one(text: &str) -> Result<usize, String> {
    let number: usize = text.parse().map_err(|_| "not a count".to_string())?;
    (number > 0).then_some(number).ok_or_else(|| "at least 1 is needed".to_string())
}

/// Stands for the model where none was given.
pub(crate) const NO_MODEL: &str = "-";

#[cfg(feature = "cpu")]
/// Sources that kernels can be printed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EmitTarget {
    /// A Python module per kernel
    Triton,
}

#[cfg(feature = "cpu")]
#[derive(Debug, Args)]
pub(crate) struct ExprArgs {
    /// The formula, e.g. 'x * 2 + y / 3'; definitions may stand in front: 'f(x) = x*x; f(a) + 1'
    pub(crate) text: String,
    /// Values of variables: x=4 y=9; x=1,2,3 is an array, x:i32=4 gives a variable another type
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
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) bench: Option<usize>,
    /// Threads to use; 0 for all
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
}

#[cfg(feature = "cpu")]
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

/// A model and how to compile it.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A .onnx file, a Hugging Face directory (config.json, safetensors), or a .tw graph text
    pub(crate) model: PathBuf,
    /// Threads to use; 0 for all
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// Where it runs: cpu, cuda, or cuda:1 for the second GPU
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// On a GPU: kernels for another architecture, which the device must run or translate: sm_80
    #[arg(long, value_name = "ARCH")]
    pub(crate) target: Option<String>,
    /// Arithmetic of contractions and convolutions: f32 or bf16, on a GPU also tf32 and f16; on a GPU f16
    /// and bf16 are also how weights and intermediate results are stored
    #[arg(long, default_value = "f32")]
    pub(crate) precision: String,
    /// One kernel per operator, to find what a fusion breaks
    #[arg(long)]
    pub(crate) no_fusion: bool,
    /// On a GPU: norms in front of products stay kernels of their own, to see what folding them brings
    #[arg(long)]
    pub(crate) no_fold: bool,
    /// On a GPU: products compute their left operands (scales of channels) where that is estimated to pay
    #[arg(long)]
    pub(crate) fold_operands: bool,
    /// Random weights of this seed: a Hugging Face directory then needs config.json only
    #[arg(long, value_name = "SEED")]
    pub(crate) random_weights: Option<u64>,
    /// Compile everything anew
    #[arg(long)]
    pub(crate) no_cache: bool,
    /// Take the planner's schedules, not those that `tw tune model` found (CPU)
    #[arg(long)]
    pub(crate) untuned: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

/// What goes into a model.
#[derive(Debug, Args)]
pub(crate) struct InputArgs {
    /// Value of a free size of the model, e.g. --dim batch=8
    #[arg(long = "dim", value_name = "NAME=N")]
    pub(crate) dims: Vec<String>,
    /// An input from a NumPy file, e.g. --input ids=ids.npy; inputs not given are random
    #[arg(long = "input", value_name = "NAME=FILE.npy")]
    pub(crate) inputs: Vec<String>,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) inputs: InputArgs,
    /// Write each output as NAME.npy into this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) inputs: InputArgs,
    /// Also list every kernel
    #[arg(long)]
    pub(crate) kernels: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(mut_arg("model", |m| m.required(false).default_value(NO_MODEL).hide_default_value(true)))]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) what: Option<BenchWhat>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) inputs: InputArgs,
    /// Runs to time
    #[arg(long, default_value_t = 100, value_parser = at_least_one)]
    pub(crate) runs: usize,
    /// Runs before the clock starts
    #[arg(long, default_value_t = 5)]
    pub(crate) warmup: usize,
    /// Launch kernels one by one instead of as a recorded graph (GPUs only)
    #[arg(long)]
    pub(crate) no_graph: bool,
    /// Stop after this many seconds
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Print a line once ready, and then a result for every line of standard input, so that another program can be
    /// measured in turns (GPUs only)
    #[arg(long)]
    pub(crate) turns: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) inputs: InputArgs,
    /// Rows of the table, costliest first; 0 for all in order
    #[arg(long, default_value_t = 20)]
    pub(crate) top: usize,
    /// Runs to time each kernel
    #[arg(long, default_value_t = 20, value_parser = at_least_one)]
    pub(crate) runs: usize,
    /// Also list the fusion groups and why each node joined
    #[arg(long)]
    pub(crate) groups: bool,
    /// Write one self-contained page
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

#[cfg(feature = "cpu")]
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(mut_arg("model", |m| m.required(false).default_value(NO_MODEL).hide_default_value(true)))]
pub(crate) struct InspectArgs {
    #[command(subcommand)]
    pub(crate) what: Option<InspectWhat>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Stage to print: import, a pass name, fusion, tile, plan, llvm or asm (`--stages` lists them)
    #[arg(long)]
    pub(crate) stage: Option<String>,
    /// List the stages and why each stands where it stands
    #[arg(long)]
    pub(crate) stages: bool,
    /// Only kernels whose name contains this (stages tile, llvm and asm, and --emit)
    #[arg(long, value_name = "NAME")]
    pub(crate) kernel: Option<String>,
    /// Print kernels as source for another compiler
    #[arg(long, value_enum)]
    pub(crate) emit: Option<EmitTarget>,
    /// With --emit: the text of one tile program, instead of a model
    #[arg(long, value_name = "FILE", requires = "emit", conflicts_with = "stage")]
    pub(crate) tile: Option<PathBuf>,
    /// With --emit: a tile size, num_warps or num_stages, e.g. --set BM=128 (may be repeated)
    #[arg(long, value_name = "NAME=N", requires = "emit")]
    pub(crate) set: Vec<String>,
    /// With --emit: write one file per kernel into this folder
    #[arg(long, value_name = "DIR", requires = "emit")]
    pub(crate) out: Option<PathBuf>,
    /// Print how long each stage took
    #[arg(long)]
    pub(crate) time: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EdgesArgs {
    /// The GPU: cuda, or cuda:1 for the second one
    #[arg(long, default_value = "cuda")]
    pub(crate) device: String,
    /// Only edges whose names contain this
    #[arg(long, default_value = "")]
    pub(crate) only: String,
    /// Arithmetic, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "f32,tf32,f16,bf16")]
    pub(crate) precisions: Vec<String>,
    /// Also tensors of more than 2^31 elements, which take 40 GB on the device
    #[arg(long)]
    pub(crate) large: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EmbedArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Sentences, one per line
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Print the sentences nearest to this one (may be repeated)
    #[arg(long)]
    pub(crate) query: Vec<String>,
    /// Queries, one per line (text after a tab is ignored)
    #[arg(long, value_name = "FILE")]
    pub(crate) query_file: Option<PathBuf>,
    /// Neighbours to print for each query
    #[arg(long, default_value_t = 3)]
    pub(crate) top: usize,
    /// Sentences per run
    #[arg(long, default_value_t = 16, value_parser = at_least_one)]
    pub(crate) batch: usize,
    /// Write the embeddings as a NumPy file
    #[arg(long, value_name = "FILE.npy")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The text to continue; the directory has a tokenizer.json
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Tokens to continue instead, e.g. --tokens 1,15043,29892
    #[arg(long, value_name = "N,N,...", conflicts_with = "prompt")]
    pub(crate) tokens: Option<String>,
    /// New tokens at most
    #[arg(long, default_value_t = 64)]
    pub(crate) max_tokens: usize,
    /// The longest sequence that memory is made for (default: prompt and new tokens)
    #[arg(long)]
    pub(crate) max_length: Option<i64>,
    /// Draw tokens by their probabilities, logits divided by this; 0 takes the likeliest
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Draw among the K likeliest tokens only
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<i64>,
    /// Draw among the likeliest tokens whose probabilities reach P together
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f64>,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Continue the prompt so many times side by side (up to 8 on a GPU, or 16, see the guide)
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub(crate) batch: usize,
    /// How matrices are kept: `stored` (as in the files), `f32`, or as integers with a scale for each group of the
    /// depth: `int8`, `int4` (CPU)
    #[arg(long, value_name = "FORM", default_value = "stored")]
    pub(crate) weights: String,
    /// Depth that shares a scale, with --weights int8 (default 128) or int4 (32)
    #[arg(long, value_name = "N")]
    pub(crate) group: Option<i64>,
    /// How activations are multiplied with weights of --weights int8 or int4: `f32`, or `int8`: rounded to 8 bits with a
    /// scale for each group (CPU)
    #[arg(long, value_name = "FORM", default_value = "f32")]
    pub(crate) activations: String,
    /// Go on behind the token that ends a text
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Compare the logits of every position of the prompt, taken with the cache, with the float64 oracle without one
    #[arg(long)]
    pub(crate) verify: bool,
    /// Show what a step costs, launch by launch, against the bytes that it must read (GPU)
    #[arg(long, conflicts_with = "verify")]
    pub(crate) explain: bool,
    /// Generate twice and report the second time
    #[arg(long)]
    pub(crate) warm: bool,
    /// Launch kernels one by one instead of as a recorded graph (GPU)
    #[arg(long)]
    pub(crate) no_graph: bool,
    /// A kernel for every part of a step, also where one kernel could do most of it (GPU)
    #[arg(long)]
    pub(crate) many_kernels: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    #[command(subcommand)]
    pub(crate) what: TuneWhat,
}

/// What can be tuned.
#[derive(Debug, Subcommand)]
pub(crate) enum TuneWhat {
    /// A matrix product: tw tune gemm 4096 4096 4096 --type bf16
    Gemm(TuneOptions),
    #[cfg(feature = "cpu")]
    /// The kernels of a model on this processor: tw tune model MODEL --seconds 30
    Model(TuneModelArgs),
}

#[cfg(feature = "cpu")]
#[derive(Debug, Args)]
pub(crate) struct TuneModelArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) inputs: InputArgs,
    /// Begin no round after so many seconds
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Candidates of a kernel at most
    #[arg(long, default_value_t = 32)]
    pub(crate) rounds: usize,
}

/// What can be timed besides models.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchWhat {
    /// A matrix product on a GPU: tw bench gemm 4096 4096 4096 --type bf16
    Gemm(BenchGemmArgs),
}

/// What can be printed besides models.
#[derive(Debug, Subcommand)]
pub(crate) enum InspectWhat {
    /// The GPU kernels of a matrix product: tw inspect gemm 4096 4096 4096 --emit cuda
    Gemm(InspectGemmArgs),
}

/// What can be printed where there is no LLVM.
#[cfg(not(feature = "cpu"))]
#[derive(Debug, Args)]
pub(crate) struct InspectKernelArgs {
    #[command(subcommand)]
    pub(crate) what: InspectWhat,
}

#[derive(Debug, Args)]
pub(crate) struct BenchGemmArgs {
    #[command(flatten)]
    pub(crate) products: ProductArgs,
    /// How long ours and cuBLASLt's alternate, per product
    #[arg(long, default_value_t = 1.0)]
    pub(crate) seconds: f64,
    #[command(flatten)]
    pub(crate) tuning: TuningArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectGemmArgs {
    #[command(flatten)]
    pub(crate) products: ProductArgs,
    /// What to print
    #[arg(long, value_enum, default_value = "schedule")]
    pub(crate) emit: KernelStage,
    /// With --emit schedule: how many candidates
    #[arg(long, default_value_t = 5)]
    pub(crate) top: usize,
    #[command(flatten)]
    pub(crate) tuning: TuningArgs,
}

/// Which schedules are taken.
#[derive(Debug, Args)]
pub(crate) struct TuningArgs {
    /// Take the model's schedule, whatever was tuned
    #[arg(long)]
    pub(crate) untuned: bool,
    /// Folder of tuning records (default: `tuning` in the cache)
    #[arg(long, value_name = "DIR")]
    pub(crate) records: Option<PathBuf>,
    /// Which GPU; to inspect, without, the H200 as data
    #[arg(long)]
    pub(crate) device: Option<u32>,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
}

/// Stages of a GPU kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KernelStage {
    /// What one block computes
    Tile,
    /// Why which schedule: the first candidates with their estimated times
    Schedule,
    /// The scheduled kernel: roles, memory spaces, barriers
    Device,
    /// CUDA C++
    Cuda,
    /// NVIDIA's assembly text, of NVRTC
    Ptx,
    /// Machine code, of NVRTC and nvdisasm
    Sass,
}
