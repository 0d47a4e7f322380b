//! Writes composites in the core.
//!
//! ```text
//! before: v1 = batch_norm eps=1e-5 x, g, b, m, v
//! after:  a = map(g, v) { g, v -> g / sqrt(v + 1e-5) }      (constants: folded)
//!         c = map(b, m, a) { b, m, a -> b - m * a }
//!         v1 = map(x, a, c) { x, a, c -> x * a + c }         (a and c as [C,1,1])
//! ```
//!
//! The pipeline's pass takes apart what lowering does not take whole: batch norm and group norm
//! (which becomes a layer norm over the elements of each group and an affine map). Softmax, layer
//! norm, RMS norm and attention stay. [`decompose_all`] takes all of them apart: it is the slow,
//! obvious meaning of each composite, and tests hold the interpreter's own against it.
//!
//! Side conditions: for group norm the number of groups divides the number of channels for all
//! sizes; for attention the number of heads of k and v is a number.

use crate::edit::{Editor, rewrite};
use crate::manager::PassContext;
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::{ExprId, FuncBuilder, Op as ExprOp};
use tilewright_graph::{AttentionAttrs, Graph, NodeId, Op, ReduceKind, TensorType, ValueId};
use tilewright_layout::{Dim, numel};

/// See the module's head.
pub(crate) fn run(graph: &mut Graph, _: &PassContext) -> Result<bool> {
    rewrite(graph, &mut |ed, id| Ok(normalisation(ed, id)?.map(|v| vec![v])))
}

/// Takes every composite apart, also those that lowering takes whole.
pub fn decompose_all(graph: &mut Graph) -> Result<bool> {
    let mut changed = false;
    // Group norm becomes layer norm, which is taken apart in the next round.
    while rewrite(graph, &mut |ed, id| {
        let node = ed.graph.nodes[id].clone();
        let v = match &node.op {
            Op::BatchNorm { .. } | Op::GroupNorm { .. } => normalisation(ed, id)?,
            Op::Softmax { axis, log } => Some(softmax(ed, node.inputs[0], *axis, *log)?),
            Op::LayerNorm { axis, eps } => Some(row_norm(ed, &node.inputs, *axis, *eps, true)?),
            Op::RmsNorm { axis, eps } => Some(row_norm(ed, &node.inputs, *axis, *eps, false)?),
            Op::Attention(attrs) => attention(ed, attrs, &node.inputs, false)?,
            _ => None,
        };
        Ok(v.map(|v| vec![v]))
    })? {
        changed = true;
    }
    Ok(changed)
}

/// Takes attention apart into two products and a softmax, where `keep` does not hold of it, and writes
/// products that sum nothing (outer products) as maps: for targets without kernels for these.
pub fn decompose_products(
    graph: &mut Graph,
    keep: &dyn Fn(&Graph, NodeId) -> bool,
) -> Result<bool> {
    rewrite(graph, &mut |ed, id| {
        let node = ed.graph.nodes[id].clone();
        let v = match &node.op {
            Op::Attention(_) if keep(ed.graph, id) => None,
            Op::Attention(attrs) => attention(ed, attrs, &node.inputs, true)?,
            Op::Contract { .. } => outer_product(ed, &node.op, &node.inputs)?,
            _ => None,
        };
        Ok(v.map(|v| vec![v]))
    })
}

/// A contraction over letters of extent 1 only, as a map of permuted operands.
fn outer_product(ed: &mut Editor<'_>, op: &Op, inputs: &[ValueId]) -> Result<Option<ValueId>> {
    let Op::Contract { lhs, rhs, out, acc, dtype } = op else { return Ok(None) };
    let mut sides = Vec::new();
    for (letters, &v) in [(lhs, &inputs[0]), (rhs, &inputs[1])] {
        let shape = ed.graph.shape(v).to_vec();
        let summed = |(l, d): (char, &Dim)| !out.contains(l) && !d.is(1);
        if letters.chars().zip(&shape).any(summed) {
            return Ok(None);
        }
        // The operand's axes in the order of the result, extents of 1 for what it lacks.
        let mut kept: Vec<(usize, usize)> =
            letters.chars().enumerate().filter_map(|(i, l)| Some((out.find(l)?, i))).collect();
        kept.sort_unstable();
        let rest = (0..shape.len()).filter(|i| kept.iter().all(|k| k.1 != *i));
        let perm: Vec<usize> = kept.iter().map(|k| k.1).chain(rest).collect();
        let there: Vec<Dim> = (0..out.len())
            .map(|o| kept.iter().find(|k| k.0 == o).map_or(Dim::new(1), |k| shape[k.1].clone()))
            .collect();
        let v = ed.permute(v, &perm)?;
        sides.push(ed.reshape(v, &there)?);
    }
    let (acc, dtype) = (*acc, *dtype);
    Ok(Some(map(ed, &sides, |f, p| {
        let (a, b) = (f.cast(p[0], acc), f.cast(p[1], acc));
        let y = f.op(ExprOp::Mul, &[a, b]);
        f.cast(y, dtype)
    })?))
}

/// An elementwise node whose function the closure writes.
fn map(
    ed: &mut Editor<'_>,
    inputs: &[ValueId],
    body: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId,
) -> Result<ValueId> {
    let mut f = FuncBuilder::new();
    let params: Vec<ExprId> = inputs
        .iter()
        .zip(["x", "y", "z", "w", "u"])
        .map(|(&v, name)| f.param(name, ed.graph.dtype(v)))
        .collect();
    let result = body(&mut f, &params);
    ed.map(f.finish(result), inputs)
}

fn normalisation(ed: &mut Editor<'_>, id: NodeId) -> Result<Option<ValueId>> {
    let node = ed.graph.nodes[id].clone();
    let Some(&x) = node.inputs.first() else { return Ok(None) };
    let spatial = ed.graph.shape(x).len().saturating_sub(2);
    let dtype = ed.graph.dtype(x);
    // `[C]` next to data `[N,C,...]`.
    let beside = |ed: &mut Editor<'_>, v: ValueId| {
        let mut shape = ed.graph.shape(v).to_vec();
        shape.extend(std::iter::repeat_n(Dim::new(1), spatial));
        ed.reshape(v, &shape)
    };
    match node.op {
        Op::BatchNorm { eps } => {
            let [_, gamma, beta, mean, var] = node.inputs[..] else { return Ok(None) };
            let a = map(ed, &[gamma, var], |f, p| {
                let eps = f.constant(f64::from_bits(eps), f.dtype_of(p[1]));
                let v = f.op(ExprOp::Add, &[p[1], eps]);
                let s = f.op(ExprOp::Sqrt, &[v]);
                let g = f.cast(p[0], f.dtype_of(s));
                f.op(ExprOp::Div, &[g, s])
            })?;
            let c = map(ed, &[beta, mean, a], |f, p| {
                let (m, b) = (f.cast(p[1], f.dtype_of(p[2])), f.cast(p[0], f.dtype_of(p[2])));
                let shift = f.op(ExprOp::Mul, &[m, p[2]]);
                f.op(ExprOp::Sub, &[b, shift])
            })?;
            let (a, c) = (beside(ed, a)?, beside(ed, c)?);
            Ok(Some(map(ed, &[x, a, c], |f, p| {
                let (a, c) = (f.cast(p[1], dtype), f.cast(p[2], dtype));
                let y = f.op(ExprOp::Mul, &[p[0], a]);
                f.op(ExprOp::Add, &[y, c])
            })?))
        }
        Op::GroupNorm { groups, eps } => {
            let [_, gamma, beta] = node.inputs[..] else { return Ok(None) };
            let shape = ed.graph.shape(x).to_vec();
            let Some(per_group) = shape[1].exact_div(&Dim::new(groups)) else {
                // Whoever runs it says what is wrong, or that this is not known of the sizes.
                return Ok(None);
            };
            let elements = per_group * numel(&shape[2..]);
            let rows = ed.reshape(x, &[shape[0].clone(), Dim::new(groups), elements])?;
            let ones = ed.constant(Tensor::from_f64s(dtype, &[1], &[1.0])?);
            let normal = ed.op(Op::LayerNorm { axis: 2, eps }, &[rows, ones])?;
            let normal = ed.reshape(normal, &shape)?;
            let (g, b) = (beside(ed, gamma)?, beside(ed, beta)?);
            Ok(Some(map(ed, &[normal, g, b], |f, p| {
                let (g, b) = (f.cast(p[1], dtype), f.cast(p[2], dtype));
                let y = f.op(ExprOp::Mul, &[p[0], g]);
                f.op(ExprOp::Add, &[y, b])
            })?))
        }
        _ => Ok(None),
    }
}

/// Computes in the wider type that kernels accumulate in.
fn widened(ed: &mut Editor<'_>, x: ValueId) -> Result<(ValueId, DType)> {
    let wide = ed.graph.dtype(x).compute();
    Ok((map(ed, &[x], |f, p| f.cast(p[0], wide))?, wide))
}

fn narrowed(ed: &mut Editor<'_>, x: ValueId, to: DType) -> Result<ValueId> {
    map(ed, &[x], |f, p| f.cast(p[0], to))
}

fn reduce(ed: &mut Editor<'_>, kind: ReduceKind, x: ValueId, axes: Vec<usize>) -> Result<ValueId> {
    ed.op(Op::Reduce { kind, axes, keep: true }, &[x])
}

fn softmax(ed: &mut Editor<'_>, x: ValueId, axis: usize, log: bool) -> Result<ValueId> {
    let dtype = ed.graph.dtype(x);
    let (x, _) = widened(ed, x)?;
    let max = reduce(ed, ReduceKind::Max, x, vec![axis])?;
    let d = map(ed, &[x, max], |f, p| f.op(ExprOp::Sub, &[p[0], p[1]]))?;
    let e = map(ed, &[d], |f, p| f.op(ExprOp::Exp, &[p[0]]))?;
    let sum = reduce(ed, ReduceKind::Sum, e, vec![axis])?;
    let y = if log {
        map(ed, &[d, sum], |f, p| {
            let l = f.op(ExprOp::Log, &[p[1]]);
            f.op(ExprOp::Sub, &[p[0], l])
        })?
    } else {
        map(ed, &[e, sum], |f, p| f.op(ExprOp::Div, &[p[0], p[1]]))?
    };
    narrowed(ed, y, dtype)
}

/// The number of elements over some axes, as a float value.
fn count(ed: &mut Editor<'_>, dims: &[Dim], dtype: DType) -> Result<ValueId> {
    let n = ed.op(Op::Dims(vec![numel(dims)]), &[])?;
    let n = ed.reshape(n, &[])?;
    map(ed, &[n], |f, p| f.cast(p[0], dtype))
}

fn row_norm(
    ed: &mut Editor<'_>,
    inputs: &[ValueId],
    axis: usize,
    eps: u64,
    centred: bool,
) -> Result<ValueId> {
    let dtype = ed.graph.dtype(inputs[0]);
    let (x, wide) = widened(ed, inputs[0])?;
    let shape = ed.graph.shape(x).to_vec();
    let axes: Vec<usize> = (axis..shape.len()).collect();
    let n = count(ed, &shape[axis..], wide)?;
    let mean_of = |ed: &mut Editor<'_>, v: ValueId| -> Result<ValueId> {
        let sum = reduce(ed, ReduceKind::Sum, v, axes.clone())?;
        map(ed, &[sum, n], |f, p| f.op(ExprOp::Div, &[p[0], p[1]]))
    };
    let d = if centred {
        let mean = mean_of(ed, x)?;
        map(ed, &[x, mean], |f, p| f.op(ExprOp::Sub, &[p[0], p[1]]))?
    } else {
        x
    };
    let squares = map(ed, &[d], |f, p| f.op(ExprOp::Mul, &[p[0], p[0]]))?;
    let variance = mean_of(ed, squares)?;
    let normal = map(ed, &[d, variance], |f, p| {
        let eps = f.constant(f64::from_bits(eps), wide);
        let v = f.op(ExprOp::Add, &[p[1], eps]);
        let s = f.op(ExprOp::Sqrt, &[v]);
        f.op(ExprOp::Div, &[p[0], s])
    })?;
    let mut operands = vec![normal];
    operands.extend_from_slice(&inputs[1..]);
    map(ed, &operands, |f, p| {
        let scale = f.cast(p[1], wide);
        let mut y = f.op(ExprOp::Mul, &[p[0], scale]);
        if let Some(&bias) = p.get(2) {
            let bias = f.cast(bias, wide);
            y = f.op(ExprOp::Add, &[y, bias]);
        }
        f.cast(y, dtype)
    })
}

fn attention(
    ed: &mut Editor<'_>,
    attrs: &AttentionAttrs,
    inputs: &[ValueId],
    keep_softmax: bool,
) -> Result<Option<ValueId>> {
    let (q, k, v) = (inputs[0], inputs[1], inputs[2]);
    let (qs, ks, vs) =
        (ed.graph.shape(q).to_vec(), ed.graph.shape(k).to_vec(), ed.graph.shape(v).to_vec());
    let dtype = ed.graph.dtype(q);
    // Heads in groups: q as [B,G,R,S,D] where R query heads share one head of k and v.
    let Some(repeat) = qs[1].exact_div(&ks[1]) else { return Ok(None) };
    let grouped =
        ed.reshape(q, &[qs[0].clone(), ks[1].clone(), repeat, qs[2].clone(), qs[3].clone()])?;
    let acc = dtype.compute();
    let contract = |lhs: &str, rhs: &str, out: &str, dtype: DType| Op::Contract {
        lhs: lhs.into(),
        rhs: rhs.into(),
        out: out.into(),
        acc,
        dtype,
    };
    let score_type = attrs.score.params().first().map_or(dtype, |p| p.dtype);
    let dots = ed.op(contract("bgrsd", "bgtd", "bgrst", score_type), &[grouped, k])?;
    let shape = [qs[0].clone(), qs[1].clone(), qs[2].clone(), ks[2].clone()];
    let dots = ed.reshape(dots, &shape)?;
    let mut operands = vec![dots];
    operands.extend_from_slice(&inputs[3..]);
    let mut scores = ed.map(attrs.score.clone(), &operands)?;
    if attrs.causal {
        let ty = |shape: &[Dim]| TensorType::new(DType::I64, shape);
        let (s, t) = (&shape[2], &shape[3]);
        let rows = ed.op(Op::Iota { ty: ty(&[s.clone(), Dim::new(1)]), axis: 0 }, &[])?;
        let cols = ed.op(Op::Iota { ty: ty(std::slice::from_ref(t)), axis: 0 }, &[])?;
        let shift = ed.op(Op::Dims(vec![t - s]), &[])?;
        scores = map(ed, &[scores, rows, cols, shift], |f, p| {
            let last = f.op(ExprOp::Add, &[p[1], p[3]]);
            let hidden = f.op(ExprOp::Gt, &[p[2], last]);
            let nothing = f.constant(f64::NEG_INFINITY, f.dtype_of(p[0]));
            f.op(ExprOp::Select, &[hidden, nothing, p[0]])
        })?;
    }
    let weights = match keep_softmax {
        true => ed.op(Op::Softmax { axis: 3, log: false }, &[scores])?,
        false => softmax(ed, scores, 3, false)?,
    };
    let weights = match attrs.zeros {
        true => {
            let most = reduce(ed, ReduceKind::Max, scores, vec![3])?;
            map(ed, &[weights, most], |f, p| {
                let low = f.constant(f64::NEG_INFINITY, f.dtype_of(p[1]));
                let none = f.op(ExprOp::Eq, &[p[1], low]);
                let zero = f.constant(0.0, f.dtype_of(p[0]));
                f.op(ExprOp::Select, &[none, zero, p[0]])
            })?
        }
        false => weights,
    };
    let weights = ed.reshape(
        weights,
        &[
            qs[0].clone(),
            ks[1].clone(),
            qs[1].exact_div(&ks[1]).unwrap_or_default(),
            qs[2].clone(),
            ks[2].clone(),
        ],
    )?;
    let weights = narrowed(ed, weights, dtype)?;
    let out = ed.op(contract("bgrst", "bgte", "bgrse", dtype), &[weights, v])?;
    Ok(Some(ed.reshape(out, &[qs[0].clone(), qs[1].clone(), qs[2].clone(), vs[3].clone()])?))
}
