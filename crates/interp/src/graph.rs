//! Runs graphs: binds symbols from the inputs, then computes node after node.
//!
//! ```
//! use tilewright_base::DType;
//! use tilewright_data::Tensor;
//! use tilewright_expr::Op;
//! use tilewright_graph::{GraphBuilder, TensorType};
//! use tilewright_interp::{Mode, run};
//! use tilewright_layout::{Dim, Range};
//!
//! let mut b = GraphBuilder::new("double");
//! let n = b.symbol("N", Range { min: 1, max: 8 });
//! let x = b.input("x", TensorType::new(DType::F32, [n]));
//! let y = b.binary(Op::Add, x, x)?;
//! b.output("y", y);
//! let outputs = run(&b.finish(), &[Tensor::from_slice(&[2], &[1f32, 2.5])?], Mode::Exact)?;
//! assert_eq!(outputs[0].to_f64s(), [2.0, 5.0]);
//! # Ok::<(), tilewright_base::Error>(())
//! ```
//!
//! Before each node its operator is *made concrete*: sizes become numbers, and the type rules run
//! again on the shapes at hand. What could not be said of symbols when the graph was built (do
//! `N` and `M` agree?) is therefore checked here, with the same words.

use crate::host;
use crate::ops::{self, OutType};
use crate::value::{Val, checked_len};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{DType, Error, IdVec, Result, ResultExt};
use tilewright_data::Tensor;
use tilewright_graph::{Def, Graph, HostOp, Node, Op, TensorType, ValueId, infer};
use tilewright_layout::{Dim, Env};

/// In which numbers a graph is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// In the graph's own data types: each operation's float result is rounded to its type,
    /// integers wrap, contractions accumulate in their accumulation type.
    Exact,
    /// The oracle: floats of every type are held as `f64` and never rounded; integers are exact.
    /// Outputs of float type are `F64` tensors.
    F64,
}

/// How to run; [`Options::new`] gives the plain way.
#[derive(Clone, Debug)]
pub struct Options {
    /// In which numbers.
    pub mode: Mode,
    /// Sizes known beforehand: symbols that no input determines.
    pub env: Env,
    /// Return every intermediate value.
    pub trace: bool,
}

impl Options {
    /// No symbols given, no trace.
    pub fn new(mode: Mode) -> Options {
        Options { mode, env: Env::new(), trace: false }
    }
}

/// What a run gives.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Outputs in the graph's order.
    pub outputs: Vec<Tensor>,
    /// The value of every symbol, those found while running included.
    pub env: Env,
    /// With [`Options::trace`]: every input, constant that is read, and node result. In `f64` mode
    /// floats are `F64` tensors.
    pub trace: BTreeMap<ValueId, Tensor>,
}

/// Runs a graph on inputs in its order.
pub fn run(graph: &Graph, inputs: &[Tensor], mode: Mode) -> Result<Vec<Tensor>> {
    Ok(run_with(graph, inputs, &Options::new(mode))?.outputs)
}

/// As [`run`], with inputs by name: each of the graph's inputs once, and no others.
pub fn run_named(
    graph: &Graph,
    inputs: &BTreeMap<String, Tensor>,
    options: &Options,
) -> Result<Outcome> {
    run_with(graph, &order_inputs(graph, inputs)?, options)
}

/// Puts named inputs in the graph's order; all missing and unknown names are reported at once.
pub fn order_inputs(graph: &Graph, named: &BTreeMap<String, Tensor>) -> Result<Vec<Tensor>> {
    let declared: Vec<&str> = graph.inputs.iter().map(|&v| &*graph.values[v].name).collect();
    let missing: Vec<&str> = declared.iter().copied().filter(|n| !named.contains_key(*n)).collect();
    let unknown: Vec<&str> =
        named.keys().map(String::as_str).filter(|n| !declared.contains(n)).collect();
    if missing.is_empty() && unknown.is_empty() {
        return Ok(declared.iter().map(|n| named[*n].clone()).collect());
    }
    let mut error = Error::user("the inputs are not those of the model");
    for name in missing {
        error = error.with_note(format!("input `{name}` is missing"));
    }
    for name in unknown {
        error = error.with_note(format!("there is no input `{name}`"));
    }
    Err(error.with_hint(format!("the model takes {}", declared.join(", "))))
}

/// Checks count, types and shapes of inputs and finds the value of every symbol that they (or
/// `known`) determine. In `f64` mode a float input may also be an `F64` tensor.
pub fn bind_inputs(graph: &Graph, inputs: &[Tensor], known: &Env, mode: Mode) -> Result<Env> {
    if inputs.len() != graph.inputs.len() {
        return Err(Error::user(format!(
            "{} inputs are given, the model takes {}",
            inputs.len(),
            graph.inputs.len()
        )));
    }
    let mut env = known.clone();
    let named = |v: ValueId| format!("input `{}`", graph.values[v].name);
    for (&v, tensor) in graph.inputs.iter().zip(inputs) {
        let ty = graph.ty(v);
        let widened = mode == Mode::F64 && ty.dtype.is_float() && tensor.dtype() == DType::F64;
        if tensor.dtype() != ty.dtype && !widened {
            return Err(Error::user(format!(
                "{} is {}, the model takes {}",
                named(v),
                tensor.dtype(),
                ty.dtype
            )));
        }
        bind_symbols(&ty.shape, tensor.shape(), &mut env).map_err(|e| e.with_context(named(v)))?;
    }
    // Sizes such as `N + 3`, where no input has a plain `N`.
    for (&v, tensor) in graph.inputs.iter().zip(inputs) {
        for (dim, &size) in graph.ty(v).shape.iter().zip(tensor.shape()) {
            if let Some((name, value)) = dim.solve(size as i64, &env) {
                env.insert(name, value);
            }
        }
    }
    // A last round: composite sizes whose symbols a later input determined.
    for (&v, tensor) in graph.inputs.iter().zip(inputs) {
        for (dim, &size) in graph.ty(v).shape.iter().zip(tensor.shape()) {
            match dim.eval(&env) {
                Some(value) if value == size as i64 => {}
                Some(value) => {
                    return Err(Error::user(format!(
                        "{} has shape {:?}: `{dim}` is {value}, not {size}",
                        named(v),
                        tensor.shape()
                    )));
                }
                None => {
                    return Err(Error::user(format!(
                        "{}: the size `{dim}` is not determined by the inputs",
                        named(v)
                    )));
                }
            }
        }
    }
    for symbol in &graph.symbols {
        if let Some(&value) = env.get(&symbol.name)
            && !(symbol.range.min..=symbol.range.max).contains(&value)
        {
            return Err(Error::user(format!(
                "{} is {value}, outside its range {}..{}",
                symbol.name, symbol.range.min, symbol.range.max
            )));
        }
    }
    Ok(env)
}

/// Gives plain symbols of `shape` that have no value yet the sizes found; checks the others.
fn bind_symbols(shape: &[Dim], sizes: &[usize], env: &mut Env) -> Result<()> {
    let text = || shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", ");
    if shape.len() != sizes.len() {
        return Err(Error::user(format!(
            "shape {sizes:?} has {} axes, [{}] has {}",
            sizes.len(),
            text(),
            shape.len()
        )));
    }
    for (dim, &size) in shape.iter().zip(sizes) {
        let size = size as i64;
        let Some(name) = dim.as_symbol() else {
            if dim.as_const().is_some_and(|d| d != size) {
                return Err(Error::user(format!("shape {sizes:?} is not [{}]", text())));
            }
            continue;
        };
        match env.get(name) {
            None => {
                env.insert(name.clone(), size);
            }
            Some(&value) if value == size => {}
            Some(&value) => {
                return Err(Error::user(format!(
                    "shape {sizes:?} is not [{}]: {name} is {value} elsewhere, {size} here",
                    text()
                )));
            }
        }
    }
    Ok(())
}

/// Runs a graph on inputs in its order.
pub fn run_with(graph: &Graph, inputs: &[Tensor], options: &Options) -> Result<Outcome> {
    let mut env = bind_inputs(graph, inputs, &options.env, options.mode)?;
    let mut values: IdVec<ValueId, Option<Val>> = graph.values.ids().map(|_| None).collect();
    let mut trace = BTreeMap::new();
    let mode = options.mode;
    for (&v, tensor) in graph.inputs.iter().zip(inputs) {
        let mut val = Val::from_tensor(tensor)?;
        val.dtype = graph.dtype(v);
        if options.trace {
            trace.insert(v, to_tensor(&val, mode)?);
        }
        values[v] = Some(val);
    }
    // How often each value is still read, so that it is dropped after its last use.
    let mut uses: IdVec<ValueId, usize> = graph.values.ids().map(|_| 0).collect();
    let reads = graph.live().flat_map(|(_, n)| &n.inputs).copied();
    for v in reads.chain(graph.outputs.iter().map(|(_, v)| *v)) {
        uses[v] += 1;
    }
    for (_, node) in graph.live() {
        let mut operands = Vec::with_capacity(node.inputs.len());
        for &v in &node.inputs {
            operands.push(fetch(graph, v, &mut values, &mut trace, options)?);
        }
        for &v in &node.inputs {
            uses[v] -= 1;
            if uses[v] == 0 {
                values[v] = None;
            }
        }
        let results = run_node(graph, node, &operands, &mut env, mode).context(|| {
            match node.origin.as_str() {
                "" => format!("computing {}", node.op.name()),
                origin => format!("node `{origin}` ({})", node.op.name()),
            }
        })?;
        for (&v, val) in node.outputs.iter().zip(results) {
            if options.trace {
                trace.insert(v, to_tensor(&val, mode)?);
            }
            if uses[v] > 0 {
                values[v] = Some(val);
            }
        }
    }
    let mut outputs = Vec::with_capacity(graph.outputs.len());
    for (_, v) in &graph.outputs {
        let val = fetch(graph, *v, &mut values, &mut trace, options)?;
        outputs.push(to_tensor(&val, mode)?);
    }
    Ok(Outcome { outputs, env, trace })
}

fn to_tensor(val: &Val, mode: Mode) -> Result<Tensor> {
    let widen = mode == Mode::F64 && val.dtype.is_float();
    val.to_tensor(if widen { DType::F64 } else { val.dtype })
}

/// The current value; constants are read when first needed.
fn fetch(
    graph: &Graph,
    v: ValueId,
    values: &mut IdVec<ValueId, Option<Val>>,
    trace: &mut BTreeMap<ValueId, Tensor>,
    options: &Options,
) -> Result<Val> {
    if let Some(val) = &values[v] {
        return Ok(val.clone());
    }
    match &graph.values[v].def {
        Def::Const(tensor) => {
            let val = Val::from_tensor(tensor)?;
            if options.trace {
                trace.insert(v, to_tensor(&val, options.mode)?);
            }
            values[v] = Some(val.clone());
            Ok(val)
        }
        _ => Err(Error::bug(format!("{v} is read before it is computed"))),
    }
}

fn run_node(
    graph: &Graph,
    node: &Node,
    operands: &[Val],
    env: &mut Env,
    mode: Mode,
) -> Result<Vec<Val>> {
    let results = if let Op::Host(host) = &node.op {
        run_host(host, operands)?
    } else {
        let op = concrete(&node.op, env)?;
        let types: Vec<TensorType> = operands
            .iter()
            .map(|v| {
                let shape: Vec<Dim> = v.shape.iter().map(|&d| Dim::from(d)).collect();
                TensorType::new(v.dtype, shape)
            })
            .collect();
        let outs: Vec<OutType> = infer(&op, &types)?
            .into_iter()
            .map(|ty| match ty.const_shape() {
                Some(shape) => Ok((ty.dtype, shape)),
                None => Err(Error::user(format!("a result of shape {ty}"))),
            })
            .collect::<Result<_>>()?;
        for (_, shape) in &outs {
            checked_len(shape)?;
        }
        ops::apply(&op, operands, &outs, mode)?
    };
    if results.len() != node.outputs.len() {
        return Err(Error::bug(format!(
            "{} results where the graph has {}",
            results.len(),
            node.outputs.len()
        )));
    }
    for (&v, val) in node.outputs.iter().zip(&results) {
        let ty = graph.ty(v);
        if ty.dtype != val.dtype {
            return Err(Error::bug(format!("{v} is {}, the graph says {ty}", val.dtype)));
        }
        bind_result(graph, &ty.shape, &val.shape, env)?;
    }
    Ok(results)
}

/// Binds the symbols that a result introduces, and checks its declared shape and their ranges.
fn bind_result(graph: &Graph, shape: &[Dim], sizes: &[usize], env: &mut Env) -> Result<()> {
    let known = env.len();
    bind_symbols(shape, sizes, env)?;
    for (dim, &size) in shape.iter().zip(sizes) {
        if dim.eval(env).is_some_and(|d| d != size as i64) {
            return Err(Error::user(format!("a size is {size} where the model says `{dim}`")));
        }
    }
    if env.len() == known {
        return Ok(());
    }
    for symbol in &graph.symbols {
        if let Some(&value) = env.get(&symbol.name)
            && !(symbol.range.min..=symbol.range.max).contains(&value)
        {
            return Err(Error::user(format!(
                "{}, found while running, is {value}, outside its range {}..{}",
                symbol.name, symbol.range.min, symbol.range.max
            )));
        }
    }
    Ok(())
}

fn run_host(op: &HostOp, operands: &[Val]) -> Result<Vec<Val>> {
    let Some(function) = host::lookup(&op.name) else {
        return Err(Error::unsupported(format!("there is no host operator `{}`", op.name)));
    };
    let inputs: Vec<Tensor> =
        operands.iter().map(|v| v.to_tensor(v.dtype)).collect::<Result<_>>()?;
    let results = (function.run)(&host::Attrs(&op.attrs), &inputs)?;
    results.iter().map(Val::from_tensor).collect()
}

/// `op` with its sizes as numbers.
fn concrete(op: &Op, env: &Env) -> Result<Op> {
    let size = |d: &Dim| -> Result<Dim> {
        match d.as_const() {
            Some(_) => Ok(d.clone()),
            None => d.eval(env).map(Dim::new).ok_or_else(|| {
                let mut names: Vec<Arc<str>> = Vec::new();
                d.for_each_symbol(&mut |s| names.push(s.clone()));
                let unknown = names.iter().find(|n| !env.contains_key(*n));
                Error::user(match unknown {
                    Some(name) => format!("the size `{d}` needs {name}, which nothing determines"),
                    None => format!("the size `{d}` divides by zero or is too large"),
                })
            }),
        }
    };
    let sizes = |dims: &[Dim]| -> Result<Vec<Dim>> { dims.iter().map(size).collect() };
    let ty = |ty: &TensorType| -> Result<TensorType> {
        Ok(TensorType::new(ty.dtype, sizes(&ty.shape)?))
    };
    Ok(match op {
        Op::Reshape(shape) => Op::Reshape(sizes(shape)?),
        Op::Expand(shape) => Op::Expand(sizes(shape)?),
        Op::Slice { starts, lens, steps } => {
            Op::Slice { starts: sizes(starts)?, lens: sizes(lens)?, steps: steps.clone() }
        }
        Op::Pad { lo, hi, mode } => Op::Pad { lo: sizes(lo)?, hi: sizes(hi)?, mode: mode.clone() },
        Op::Iota { ty: t, axis } => Op::Iota { ty: ty(t)?, axis: *axis },
        Op::Dims(dims) => Op::Dims(sizes(dims)?),
        Op::TopK { axis, k, largest } => Op::TopK { axis: *axis, k: size(k)?, largest: *largest },
        Op::Random { ty: t, seed } => Op::Random { ty: ty(t)?, seed: *seed },
        other => other.clone(),
    })
}
