//! Algebra on graphs: no-ops vanish, chains of views become one.
//!
//! ```text
//! before: v1 = permute [1,0] v0                after: return v0
//!         v2 = permute [1,0] v1
//!         return v2
//! ```
//!
//! The rules, one function each below; those on elementwise functions are in `simplify_map.rs`.
//!
//! | pattern | becomes | when |
//! |---|---|---|
//! | `reshape x` | `x` | same shape |
//! | `reshape (reshape x)` | `reshape x` | |
//! | `reshape (reduce x)` | `reduce x` with or without kept axes | only axes of extent 1 differ |
//! | `reshape (map (reduce x))` | `map (reduce x)` | only axes of extent 1 differ |
//! | `reshape (permute x)` | `reshape x` | the permute moves only axes of extent 1 |
//! | `permute (permute x)` | `permute x` | |
//! | `permute x` | `x` | identity |
//! | `expand x` | `x` | same shape |
//! | `expand (expand x)` | `expand x` | |
//! | `slice x` | `x` | whole, step 1 |
//! | `slice (slice x)` | `slice x` | |
//! | `slice (concat ..)` | the operand | exactly one operand is cut out |
//! | `pad x` | `x` | nothing added |
//! | `conv (pad x) w` | `conv x w` | zeros, on spatial axes only |
//! | `concat x` | `x` | one operand; operands of extent 0 are dropped |
//! | `concat (concat ..)` | `concat ..` | same axis, the inner one is read only here |
//! | `reduce x` | `reshape x` | over axes of extent 1, or none |
//! | `window x` | `reduce x` | the window is the whole plane, no padding |
//! | `gather x, i` | `slice x` | known indices that count up by one |
//! | `scan x` from the end | `slice (scan (slice x))`, both backwards | the axis is long, or of unknown length |
//!
//! Every rule is exact: results keep their bits. (A window of means divides by the count as a
//! reduction followed by a division does.)

use crate::edit::{Editor, Rewritten, is_identity, permuted, rewrite};
use crate::manager::PassContext;
use crate::simplify_map;
use crate::view::same_but_units;
use tilewright_base::Result;
use tilewright_expr::{FuncBuilder, Op as ExprOp, Value};
use tilewright_graph::{Graph, NodeId, Op, PadMode, ReduceKind, ValueId, WindowKind};
use tilewright_layout::Dim;

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    rewrite(graph, &mut rule)
}

fn rule(ed: &mut Editor<'_>, id: NodeId) -> Rewritten {
    let node = ed.graph.nodes[id].clone();
    let inputs = &node.inputs;
    let one = |v: Option<ValueId>| Ok(v.map(|v| vec![v]));
    match &node.op {
        Op::Map(func) => one(simplify_map::rule(ed, func, inputs, node.outputs[0])?),
        Op::Reshape(shape) => one(reshape(ed, shape, inputs[0])?),
        Op::Permute(perm) => one(permute(ed, perm, inputs[0])?),
        Op::Expand(shape) => one(expand(ed, shape, inputs[0])?),
        Op::Slice { starts, lens, steps } => one(slice(ed, starts, lens, steps, inputs[0])?),
        Op::Pad { lo, hi, .. } => {
            let nothing = lo.iter().chain(hi).all(|d| d.is(0));
            one(nothing.then_some(inputs[0]))
        }
        Op::Concat(axis) => one(concat(ed, *axis, inputs)?),
        Op::Reduce { kind, axes, keep } => one(reduce(ed, *kind, axes, *keep, inputs[0])?),
        Op::Window(_) => one(window(ed, &node.op, inputs[0])?),
        Op::Conv(_) => one(conv(ed, &node.op, inputs)?),
        Op::Gather(axis) => one(gather(ed, *axis, inputs)?),
        Op::Scan { reverse: true, .. } => one(scan_from_end(ed, &node.op, inputs[0])?),
        _ => Ok(None),
    }
}

/// Axes up to this length are scanned from the end as they lie, in one tile.
const SCANNED_WHOLE: i64 = 32 << 10;

fn scan_from_end(ed: &mut Editor<'_>, op: &Op, x: ValueId) -> Result<Option<ValueId>> {
    let Op::Scan { kind, axis, exclusive, reverse: true } = *op else { return Ok(None) };
    let shape = ed.graph.shape(x).to_vec();
    if shape[axis].as_const().is_some_and(|n| n <= SCANNED_WHOLE) {
        return Ok(None);
    }
    let mut starts = vec![Dim::new(0); shape.len()];
    let mut steps = vec![1; shape.len()];
    (starts[axis], steps[axis]) = (&shape[axis] - 1, -1);
    let backwards = Op::Slice { starts, lens: shape, steps };
    let turned = ed.op(backwards.clone(), &[x])?;
    let scanned = ed.op(Op::Scan { kind, axis, exclusive, reverse: false }, &[turned])?;
    Ok(Some(ed.op(backwards, &[scanned])?))
}

fn reshape(ed: &mut Editor<'_>, shape: &[Dim], x: ValueId) -> Result<Option<ValueId>> {
    if ed.graph.shape(x) == shape {
        return Ok(Some(x));
    }
    let Some(node) = ed.node_of(x).cloned() else { return Ok(None) };
    match &node.op {
        Op::Reshape(_) => Ok(Some(ed.reshape(node.inputs[0], shape)?)),
        Op::Reduce { kind, axes, keep } if ed.only_here(x) => {
            // The same reduction with the other treatment of its axes?
            let op = Op::Reduce { kind: *kind, axes: axes.clone(), keep: !keep };
            let mut other = ed.graph.shape(node.inputs[0]).to_vec();
            if *keep {
                let mut i = 0;
                other.retain(|_| {
                    i += 1;
                    !axes.contains(&(i - 1))
                });
            } else {
                axes.iter().for_each(|&a| other[a] = Dim::new(1));
            }
            if other == shape { Ok(Some(ed.op(op, &node.inputs)?)) } else { Ok(None) }
        }
        Op::Permute(perm) => {
            let from = ed.graph.shape(node.inputs[0]);
            let moved: Vec<usize> = perm.iter().copied().filter(|&p| !from[p].is(1)).collect();
            if moved.windows(2).all(|w| w[0] < w[1]) {
                return Ok(Some(ed.reshape(node.inputs[0], shape)?));
            }
            Ok(None)
        }
        // Axes of extent 1 go or come before the map, when the reduction below can see to it.
        Op::Map(func) if ed.only_here(x) && same_but_units(shape, ed.graph.shape(x)) => {
            let mut operands = node.inputs.clone();
            let reduced = |ed: &Editor<'_>, v| matches!(ed.op_of(v), Some(Op::Reduce { .. }));
            if !operands.iter().any(|&v| reduced(ed, v)) {
                return Ok(None);
            }
            for v in &mut operands {
                if !reduced(ed, *v) && ed.graph.shape(*v).iter().all(|d| d.is(1)) {
                    *v = ed.reshape(*v, &[])?;
                    continue;
                }
                if !reduced(ed, *v) || !ed.only_here(*v) || ed.graph.shape(*v) != ed.graph.shape(x)
                {
                    return Ok(None);
                }
                let source = *v;
                let Some(seen) = reshape(ed, shape, source)? else { return Ok(None) };
                *v = seen;
            }
            let inner = ed.map(func.clone(), &operands)?;
            Ok((ed.graph.shape(inner) == shape).then_some(inner))
        }
        _ => Ok(None),
    }
}

fn permute(ed: &mut Editor<'_>, perm: &[usize], x: ValueId) -> Result<Option<ValueId>> {
    if is_identity(perm) {
        return Ok(Some(x));
    }
    match ed.node_of(x).cloned() {
        Some(node) => match &node.op {
            Op::Permute(first) => Ok(Some(ed.permute(node.inputs[0], &permuted(first, perm))?)),
            _ => Ok(None),
        },
        None => Ok(None),
    }
}

fn expand(ed: &mut Editor<'_>, shape: &[Dim], x: ValueId) -> Result<Option<ValueId>> {
    if ed.graph.shape(x) == shape {
        return Ok(Some(x));
    }
    match ed.node_of(x) {
        Some(node) if matches!(node.op, Op::Expand(_)) => {
            let source = node.inputs[0];
            Ok(Some(ed.expand(source, shape)?))
        }
        _ => Ok(None),
    }
}

fn slice(
    ed: &mut Editor<'_>,
    starts: &[Dim],
    lens: &[Dim],
    steps: &[i64],
    x: ValueId,
) -> Result<Option<ValueId>> {
    let forward = steps.iter().all(|&s| s == 1);
    if forward && starts.iter().all(|d| d.is(0)) && ed.graph.shape(x) == lens {
        return Ok(Some(x));
    }
    let Some(node) = ed.node_of(x).cloned() else { return Ok(None) };
    match &node.op {
        Op::Slice { starts: first, steps: first_steps, .. } => {
            let starts =
                (0..starts.len()).map(|i| &first[i] + &starts[i] * first_steps[i]).collect();
            let steps = steps.iter().zip(first_steps).map(|(a, b)| a.saturating_mul(*b)).collect();
            let op = Op::Slice { starts, lens: lens.to_vec(), steps };
            Ok(Some(ed.op(op, &node.inputs)?))
        }
        Op::Concat(axis) if forward => {
            let others_whole = (0..lens.len())
                .all(|i| i == *axis || (starts[i].is(0) && lens[i] == ed.graph.shape(x)[i]));
            if !others_whole {
                return Ok(None);
            }
            let mut at = Dim::new(0);
            for &part in &node.inputs {
                let extent = ed.graph.shape(part)[*axis].clone();
                if at == starts[*axis] && extent == lens[*axis] {
                    return Ok((ed.graph.shape(part) == lens).then_some(part));
                }
                at = at + extent;
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}

fn concat(ed: &mut Editor<'_>, axis: usize, inputs: &[ValueId]) -> Result<Option<ValueId>> {
    if let [x] = inputs {
        return Ok(Some(*x));
    }
    let mut parts: Vec<ValueId> = Vec::with_capacity(inputs.len());
    for &v in inputs {
        if ed.graph.shape(v)[axis].is(0) {
            continue;
        }
        match ed.node_of(v) {
            Some(node) if node.op == Op::Concat(axis) && ed.only_here(v) => {
                parts.extend_from_slice(&node.inputs);
            }
            _ => parts.push(v),
        }
    }
    if parts == inputs || parts.is_empty() {
        return Ok(None);
    }
    Ok(Some(if let [x] = parts.as_slice() { *x } else { ed.op(Op::Concat(axis), &parts)? }))
}

fn reduce(
    ed: &mut Editor<'_>,
    kind: ReduceKind,
    axes: &[usize],
    keep: bool,
    x: ValueId,
) -> Result<Option<ValueId>> {
    let shape = ed.graph.shape(x).to_vec();
    let (unit, real): (Vec<usize>, Vec<usize>) = axes.iter().partition(|&&a| shape[a].is(1));
    if real.is_empty() {
        let left: Vec<Dim> = shape
            .iter()
            .enumerate()
            .filter(|(i, _)| keep || !axes.contains(i))
            .map(|(_, d)| d.clone())
            .collect();
        return Ok(Some(ed.reshape(x, &left)?));
    }
    if keep && !unit.is_empty() {
        return Ok(Some(ed.op(Op::Reduce { kind, axes: real, keep }, &[x])?));
    }
    Ok(None)
}

/// A window over the whole plane is a reduction.
fn window(ed: &mut Editor<'_>, op: &Op, x: ValueId) -> Result<Option<ValueId>> {
    let Op::Window(w) = op else { return Ok(None) };
    let spatial = ed.graph.shape(x)[2..].to_vec();
    let whole = spatial.iter().zip(&w.kernel).all(|(d, k)| d.is(*k))
        && w.dilations.iter().all(|&d| d == 1)
        && w.pads_lo.iter().chain(&w.pads_hi).all(|&p| p == 0);
    let dtype = ed.graph.dtype(x);
    if !whole || !dtype.is_float() {
        return Ok(None);
    }
    let kind = match w.kind {
        WindowKind::Max => ReduceKind::Max,
        WindowKind::Sum | WindowKind::Mean | WindowKind::MeanWithPad => ReduceKind::Sum,
    };
    let axes = (2..2 + spatial.len()).collect();
    let sum = ed.op(Op::Reduce { kind, axes, keep: true }, &[x])?;
    if !matches!(w.kind, WindowKind::Mean | WindowKind::MeanWithPad) {
        return Ok(Some(sum));
    }
    let n: i64 = w.kernel.iter().product();
    let mut f = FuncBuilder::new();
    let s = f.param("sum", dtype);
    let n = f.constant(n as f64, dtype);
    let mean = f.op(ExprOp::Div, &[s, n]);
    Ok(Some(ed.map(f.finish(mean), &[sum])?))
}

/// Zeros padded around the planes belong to the convolution.
fn conv(ed: &mut Editor<'_>, op: &Op, inputs: &[ValueId]) -> Result<Option<ValueId>> {
    let (Op::Conv(attrs), Some(pad)) = (op, ed.node_of(inputs[0]).cloned()) else {
        return Ok(None);
    };
    let Op::Pad { lo, hi, mode: PadMode::Constant(Value::Float(fill)) } = &pad.op else {
        return Ok(None);
    };
    let amounts = |dims: &[Dim]| -> Option<Vec<i64>> {
        dims.iter().map(|d| d.as_const().filter(|&p| p >= 0)).collect()
    };
    let (Some(lo), Some(hi)) = (amounts(lo), amounts(hi)) else { return Ok(None) };
    if *fill != 0.0 || lo[..2] != [0, 0] || hi[..2] != [0, 0] {
        return Ok(None);
    }
    let mut attrs = attrs.clone();
    let add = |pads: &mut Vec<i64>, more: &[i64]| {
        pads.iter_mut().zip(more).for_each(|(p, m)| *p += m);
    };
    add(&mut attrs.pads_lo, &lo[2..]);
    add(&mut attrs.pads_hi, &hi[2..]);
    Ok(Some(ed.op(Op::Conv(attrs), &[pad.inputs[0], inputs[1]])?))
}

/// Known indices that count up by one are a slice.
fn gather(ed: &mut Editor<'_>, axis: usize, inputs: &[ValueId]) -> Result<Option<ValueId>> {
    let (x, indices) = (inputs[0], inputs[1]);
    let mut lens = ed.graph.shape(x).to_vec();
    let extent = lens[axis].clone();
    let Some(known) = ed.graph.as_const(indices).filter(|t| !t.is_empty()) else {
        return Ok(None);
    };
    let (first, n) = (known.get_i64(0), known.len() as i64);
    // Indices outside the tensor stay: the interpreter and the kernels report them.
    let inside = match extent.as_const() {
        Some(extent) => first >= -extent && first.checked_add(n).is_some_and(|end| end <= extent),
        None => first == 0 && n == 1,
    };
    // A run from a negative index must not pass through -1 to 0.
    let run = (0..known.len()).all(|i| known.get_i64(i) == first.saturating_add(i as i64))
        && (first >= 0 || first + n <= 0);
    if !inside || !run {
        return Ok(None);
    }
    // With symbolic extents even index 0 may be outside: of nothing.
    if extent.as_const().is_none() && !at_least_one(ed.graph, &extent) {
        return Ok(None);
    }
    let start = if first < 0 { &extent + first } else { Dim::new(first) };
    let mut starts = vec![Dim::new(0); lens.len()];
    let steps = vec![1; lens.len()];
    (starts[axis], lens[axis]) = (start, Dim::new(n));
    let mut shape = lens[..axis].to_vec();
    shape.extend_from_slice(ed.graph.shape(indices));
    shape.extend_from_slice(&lens[axis + 1..]);
    let cut =
        if lens == ed.graph.shape(x) { x } else { ed.op(Op::Slice { starts, lens, steps }, &[x])? };
    Ok(Some(ed.reshape(cut, &shape)?))
}

/// True when a size is at least 1 for all values of the symbols.
fn at_least_one(graph: &Graph, d: &Dim) -> bool {
    let range = |name: &str| graph.symbols.iter().find(|s| &*s.name == name).map(|s| s.range);
    d.bounds(&range).min >= 1
}
