//! One file per command. Each has `run(args, output)`.

pub(crate) mod bench;
pub(crate) mod edges;
pub(crate) mod embed;
#[cfg(feature = "cpu")]
pub(crate) mod emit;
pub(crate) mod explain;
#[cfg(feature = "cpu")]
pub(crate) mod expr;
pub(crate) mod gemm;
pub(crate) mod generate;
pub(crate) mod gpu;
#[cfg(feature = "cpu")]
pub(crate) mod inspect;
#[cfg(feature = "cpu")]
pub(crate) mod machine;
pub(crate) mod run;
#[cfg(feature = "cpu")]
pub(crate) mod tune;
pub(crate) mod verify;

use crate::args::{InputArgs, ModelArgs};
use crate::npy;
#[cfg(feature = "cpu")]
use crate::output::{progress, say};
use std::collections::BTreeMap;
use std::path::PathBuf;
#[cfg(feature = "cpu")]
use tilewright::{Choice, Compiled, Compiler};
use tilewright::{Model, Result, Tensor};
use tilewright_base::Error;

/// Whether the model is to run on a GPU.
fn on_gpu(args: &ModelArgs) -> Result<bool> {
    match args.device.as_str() {
        "cpu" if args.target.is_some() => {
            Err(Error::user("--target is for GPUs").with_hint("give `--device cuda`"))
        }
        "cpu" => Ok(false),
        device => tilewright::gpu::ordinal(device).map(|_| true),
    }
}

/// Why this program cannot run models on a CPU.
#[cfg(not(feature = "cpu"))]
fn without_cpu() -> Error {
    Error::unsupported("this `tw` was built without LLVM: it runs models on GPUs only")
        .with_hint("give `--device cuda`")
}

/// What commands for a CPU do in a program without LLVM.
#[cfg(not(feature = "cpu"))]
fn no_cpu<T>(_: &T, _: &crate::output::Output) -> Result<()> {
    Err(without_cpu())
}

/// A compiler as the arguments say.
#[cfg(feature = "cpu")]
fn compiler(args: &ModelArgs) -> Result<Compiler> {
    let cache = if args.no_cache { None } else { cache_folder(args) };
    let cpu = tilewright::host_cpu(args.threads, cache.as_deref())?;
    let mut compiler = Compiler::for_cpu(cpu, cache);
    if args.no_fusion {
        compiler.fusion = Choice::Apart;
    }
    if args.untuned {
        compiler.records = None;
    }
    compiler.precision = args.precision.parse().map_err(Error::user)?;
    Ok(compiler)
}

/// Reads the model.
fn open(args: &ModelArgs) -> Result<Model> {
    match args.random_weights {
        None => Model::open(&args.model),
        Some(seed) => Model::open_random(&args.model, seed),
    }
}

/// The cache folder: the argument, or the usual one.
fn cache_folder(args: &ModelArgs) -> Option<PathBuf> {
    args.cache.cache.clone().or_else(tilewright::cache_dir)
}

#[cfg(feature = "cpu")]
/// Reads and compiles the model; cache trouble is said, not fatal.
fn compile(args: &ModelArgs) -> Result<(Model, Compiled)> {
    let compiler = compiler(args)?;
    let model = open(args)?;
    let compiled = {
        let _progress = progress(format!("compiling {}", model.graph.name));
        compiler.compile(&model)?
    };
    for warning in compiled.warnings() {
        say(&format!("warning: {warning}"));
    }
    Ok((model, compiled))
}

/// `NAME=VALUE` pairs.
fn pairs<'a>(list: &'a [String], example: &str) -> Result<Vec<(&'a str, &'a str)>> {
    list.iter()
        .map(|pair| {
            pair.split_once('=').ok_or_else(|| {
                Error::user(format!("`{pair}` is not of the form NAME=VALUE"))
                    .with_hint(format!("for example {example}"))
            })
        })
        .collect()
}

/// Sizes that the user chose.
fn dims(args: &InputArgs) -> Result<BTreeMap<String, i64>> {
    let mut dims = BTreeMap::new();
    for (name, value) in pairs(&args.dims, "--dim batch=8")? {
        let number =
            value.parse().map_err(|_| Error::user(format!("`{value}` is not a whole number")))?;
        dims.insert(name.to_string(), number);
    }
    Ok(dims)
}

/// Inputs from files, the others random. Sizes of given inputs determine those of the others.
fn inputs(model: &Model, args: &InputArgs) -> Result<Vec<Tensor>> {
    let graph = &model.graph;
    let mut chosen = dims(args)?;
    let mut given: BTreeMap<usize, Tensor> = BTreeMap::new();
    for (name, file) in pairs(&args.inputs, "--input ids=ids.npy")? {
        let at = graph.inputs.iter().position(|&v| graph.values[v].name == name);
        let Some(at) = at else {
            let names: Vec<&str> = graph.inputs.iter().map(|&v| &*graph.values[v].name).collect();
            return Err(Error::user(format!("the model has no input `{name}`"))
                .with_hint(format!("its inputs are: {}", names.join(", "))));
        };
        let tensor = npy::read(file.as_ref())?;
        for (dim, &extent) in graph.shape(graph.inputs[at]).iter().zip(tensor.shape()) {
            if let Some(symbol) = dim.as_symbol() {
                chosen.entry(symbol.to_string()).or_insert(extent as i64);
            }
        }
        given.insert(at, tensor);
    }
    let mut inputs = tilewright::inputs::random(graph, &chosen, args.seed)?;
    for (at, tensor) in given {
        inputs[at] = tensor;
    }
    Ok(inputs)
}
