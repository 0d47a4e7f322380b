//! Small graphs at the edges of what a compiler is asked: rows of one element, NaN and infinities, rows that are minus
//! infinity throughout, targets that are ignored, odd sizes, empty batches, places that are data; and inputs that must be refused.
//!
//! `tw edges --device cuda` runs them on a device and holds them against float64; `tests/gpu_edges.rs` does so in the device
//! interpreter. [`large`] is one with more than 2^31 elements, for a device only. To add an edge: a function that gives
//! [`Edge`]s, and its line in [`all`].

use std::sync::Arc;
use tilewright_base::{DType, Result};
use tilewright_data::Tensor;
use tilewright_expr::{ExprId, Func, FuncBuilder, Op as ExprOp};
use tilewright_graph::{
    ConvAttrs, Graph, GraphBuilder, Op, PadMode, ReduceKind, ScatterKind, TensorType, ValueId,
    WindowAttrs, WindowKind,
};
use tilewright_layout::{Dim, Range};

/// What a run must give.
#[derive(Clone, Debug)]
pub enum Expect {
    /// What float64 gives, within the contract.
    Right,
    /// The user's error, with these words in it.
    Refused(&'static str),
    /// More than any device has: said before anything is launched, with these words; runs that fit go on. Not for
    /// interpreters, whose memory is the host's.
    TooLarge(&'static str),
}

/// A graph with inputs.
#[derive(Clone, Debug)]
pub struct Edge {
    /// For people, unique.
    pub name: String,
    /// What is computed; equal graphs are one allocation.
    pub graph: Arc<Graph>,
    /// On what.
    pub inputs: Vec<Tensor>,
    /// What comes of it.
    pub expect: Expect,
}

/// All edges.
///
/// # Errors
/// Bugs: graphs that cannot be built.
pub fn all() -> Result<Vec<Edge>> {
    let mut found = Vec::new();
    for edges in [
        rows,
        losses,
        vocabularies,
        empty,
        picked,
        borders,
        scattered,
        scans,
        images,
        refused,
        memory,
    ] {
        found.extend(edges()?);
    }
    Ok(found)
}

const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;

/// Numbers around 0 that look random, a function of the seed.
fn numbers(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut values = Vec::new();
    for _ in 0..shape.iter().product() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        values.push((state >> 40) as f64 / (1u64 << 24) as f64 - 0.5);
    }
    Tensor::from_f64s(DType::F32, shape, &values)
}

fn integers(shape: &[usize], values: &[i64]) -> Result<Tensor> {
    let values: Vec<f64> = values.iter().map(|&v| v as f64).collect();
    Tensor::from_f64s(DType::I64, shape, &values)
}

fn func(types: &[DType], body: impl FnOnce(&mut FuncBuilder, &[ExprId]) -> ExprId) -> Func {
    let mut f = FuncBuilder::new();
    let params: Vec<ExprId> = types.iter().map(|t| f.param("x", *t)).collect();
    let result = body(&mut f, &params);
    f.finish(result)
}

fn float(shape: impl Into<Vec<Dim>>) -> TensorType {
    TensorType::new(DType::F32, shape.into())
}

fn dims(shape: &[i64]) -> Vec<Dim> {
    shape.iter().map(|&d| Dim::new(d)).collect()
}

fn edge(name: &str, graph: &Arc<Graph>, inputs: Vec<Tensor>) -> Edge {
    Edge { name: name.to_string(), graph: graph.clone(), inputs, expect: Expect::Right }
}

/// Everything that goes along rows, for any number of rows, none included.
fn row_graph(cols: i64) -> Result<Graph> {
    let mut b = GraphBuilder::new("rows");
    let m = b.symbol("M", Range { min: 0, max: 1 << 20 });
    let x = b.input("x", float([m, Dim::new(cols)]));
    let scale = b.constant("scale", numbers(&[cols as usize], 1)?);
    let bias = b.constant("bias", numbers(&[cols as usize], 2)?);
    let eps = 1e-5f64.to_bits();
    let reduce = |kind| Op::Reduce { kind, axes: vec![1], keep: false };
    for (name, op, inputs) in [
        ("softmax", Op::Softmax { axis: 1, log: false }, vec![x]),
        ("log_softmax", Op::Softmax { axis: 1, log: true }, vec![x]),
        ("layer_norm", Op::LayerNorm { axis: 1, eps }, vec![x, scale, bias]),
        ("rms_norm", Op::RmsNorm { axis: 1, eps }, vec![x, scale]),
        ("sum", reduce(ReduceKind::Sum), vec![x]),
        ("max", reduce(ReduceKind::Max), vec![x]),
        ("min", reduce(ReduceKind::Min), vec![x]),
        ("whole", Op::Reduce { kind: ReduceKind::Sum, axes: vec![0, 1], keep: false }, vec![x]),
        ("columns", Op::Reduce { kind: ReduceKind::Max, axes: vec![0], keep: true }, vec![x]),
        ("nothing", Op::Reduce { kind: ReduceKind::Sum, axes: vec![], keep: false }, vec![x]),
        (
            "first_largest",
            Op::ArgReduce { kind: ReduceKind::Max, axis: 1, keep: false, last: false },
            vec![x],
        ),
        (
            "last_smallest",
            Op::ArgReduce { kind: ReduceKind::Min, axis: 1, keep: true, last: true },
            vec![x],
        ),
        (
            "running",
            Op::Scan { kind: ReduceKind::Sum, axis: 1, exclusive: false, reverse: false },
            vec![x],
        ),
    ] {
        let y = b.node(op, &inputs)?[0];
        b.output(name, y);
    }
    let top = b.node(Op::TopK { axis: 1, k: Dim::new(cols.min(3)), largest: true }, &[x])?;
    b.output("top", top[0]);
    b.output("top_places", top[1]);
    Ok(b.finish())
}

fn rows() -> Result<Vec<Edge>> {
    let mut found = Vec::new();
    for cols in [1usize, 7, 1023] {
        let graph = Arc::new(row_graph(cols as i64)?);
        found.push(edge(&format!("rows of {cols}"), &graph, vec![numbers(&[5, cols], 3)?]));
        found.push(edge(&format!("no rows of {cols}"), &graph, vec![numbers(&[0, cols], 3)?]));
        // Each row with one kind of what is no number, at its ends and within; and rows of nothing else.
        let mut values = Vec::new();
        for special in [NAN, INF, -INF] {
            for at in [0, cols / 2, cols - 1] {
                let mut row = numbers(&[cols], at as u64)?.to_f64s();
                row[at] = special;
                values.extend(row);
            }
            values.extend(vec![special; cols]);
        }
        let mut mixed = numbers(&[cols], 9)?.to_f64s();
        mixed[0] = INF;
        mixed[cols - 1] = -INF;
        values.extend(mixed);
        let rows = values.len() / cols;
        let x = Tensor::from_f64s(DType::F32, &[rows, cols], &values)?;
        found.push(edge(&format!("NaN and infinities in rows of {cols}"), &graph, vec![x]));
    }
    Ok(found)
}

/// Cross-entropy with targets that are ignored, as its formula.
fn losses() -> Result<Vec<Edge>> {
    let mut b = GraphBuilder::new("loss");
    let m = b.symbol("M", Range { min: 0, max: 1 << 20 });
    let x = b.input("logits", float([m.clone(), Dim::new(1009)]));
    let target = b.input("targets", TensorType::new(DType::I64, [m.clone()]));
    let chosen = func(&[DType::I64], |f, a| {
        let zero = f.constant_int(0, DType::I64);
        f.op(ExprOp::Max, &[a[0], zero])
    });
    let chosen = b.map(chosen, &[target])?;
    let chosen = b.reshape(chosen, &[m.clone(), Dim::new(1)])?;
    let logs = b.node(Op::Softmax { axis: 1, log: true }, &[x])?[0];
    let picked = b.op(Op::GatherElements(1), &[logs, chosen])?;
    let picked = b.reshape(picked, &[m])?;
    let loss = func(&[DType::F32, DType::I64], |f, a| {
        let (zero, none) = (f.constant_int(0, DType::I64), f.constant(0.0, DType::F32));
        let ignored = f.op(ExprOp::Lt, &[a[1], zero]);
        let loss = f.op(ExprOp::Neg, &[a[0]]);
        f.op(ExprOp::Select, &[ignored, none, loss])
    });
    let each = b.map(loss, &[picked, target])?;
    let counts = func(&[DType::I64], |f, a| {
        let zero = f.constant_int(0, DType::I64);
        let counts = f.op(ExprOp::Le, &[zero, a[0]]);
        f.cast(counts, DType::F32)
    });
    let counts = b.map(counts, &[target])?;
    let all = b.reduce(ReduceKind::Sum, each, &[0], false)?;
    let count = b.reduce(ReduceKind::Sum, counts, &[0], false)?;
    let mean = b.binary(ExprOp::Div, all, count)?;
    b.output("each", each);
    b.output("mean", mean);
    let graph = Arc::new(b.finish());
    let of = |targets: &[i64]| -> Result<Vec<Tensor>> {
        let m = targets.len();
        Ok(vec![numbers(&[m, 1009], 4)?, integers(&[m], targets)?])
    };
    Ok(vec![
        edge("some targets ignored", &graph, of(&[3, -100, 1008, 0, -100])?),
        edge("all targets ignored", &graph, of(&[-100, -100])?),
        edge("no targets", &graph, of(&[])?),
    ])
}

/// A head over a vocabulary that is a multiple of nothing: logits, their softmax, the likeliest tokens, and an embedding.
fn vocabularies() -> Result<Vec<Edge>> {
    let mut b = GraphBuilder::new("vocabulary");
    let m = b.symbol("M", Range { min: 0, max: 1 << 20 });
    let x = b.input("x", float([m.clone(), Dim::new(48)]));
    let ids = b.input("ids", TensorType::new(DType::I64, [m]));
    let w = b.constant("w", numbers(&[1013, 48], 5)?);
    let y = b.contract("mk,vk->mv", x, w)?;
    let p = b.node(Op::Softmax { axis: 1, log: false }, &[y])?[0];
    let embedded = b.op(Op::Gather(0), &[w, ids])?;
    b.output("probabilities", p);
    b.output("embedded", embedded);
    let graph = Arc::new(b.finish());
    let inputs = vec![numbers(&[3, 48], 6)?, integers(&[3], &[0, 1012, -1])?];
    let none = vec![numbers(&[0, 48], 6)?, integers(&[0], &[])?];
    Ok(vec![
        edge("a vocabulary of 1013", &graph, inputs),
        edge("a vocabulary of 1013, no tokens", &graph, none),
    ])
}

/// Products, convolutions and pooling of a batch that may be empty.
fn empty() -> Result<Vec<Edge>> {
    let mut b = GraphBuilder::new("empty");
    let n = b.symbol("N", Range { min: 0, max: 64 });
    let x = b.input("x", float([n, Dim::new(4), Dim::new(9), Dim::new(8)]));
    let conv = |groups| {
        Op::Conv(ConvAttrs {
            strides: vec![1; 2],
            pads_lo: vec![1; 2],
            pads_hi: vec![1; 2],
            dilations: vec![1; 2],
            groups,
        })
    };
    let w = b.constant("w", numbers(&[8, 4, 3, 3], 1)?);
    let y = b.op(conv(1), &[x, w])?;
    let w = b.constant("grouped", numbers(&[8, 4, 3, 3], 2)?);
    let y = b.op(conv(2), &[y, w])?;
    let w = b.constant("depthwise", numbers(&[8, 1, 3, 3], 3)?);
    let y = b.op(conv(8), &[y, w])?;
    let pool = Op::Window(WindowAttrs {
        kind: WindowKind::Max,
        kernel: vec![2; 2],
        strides: vec![2; 2],
        pads_lo: vec![0; 2],
        pads_hi: vec![0; 2],
        dilations: vec![1; 2],
    });
    let y = b.op(pool, &[y])?;
    let z = b.reduce(ReduceKind::Sum, y, &[2, 3], false)?;
    let w = b.constant("classes", numbers(&[8, 5], 4)?);
    let z = b.contract("nc,ck->nk", z, w)?;
    b.output("pooled", y);
    b.output("classes", z);
    let graph = Arc::new(b.finish());
    Ok(vec![
        edge("two images", &graph, vec![numbers(&[2, 4, 9, 8], 5)?]),
        edge("no images", &graph, vec![numbers(&[0, 4, 9, 8], 5)?]),
    ])
}

/// Norms over groups and batches, means of windows, and what only moves data, of a batch that may be empty or one image.
fn images() -> Result<Vec<Edge>> {
    let mut b = GraphBuilder::new("images");
    let n = b.symbol("N", Range { min: 0, max: 64 });
    let x = b.input("x", float([n.clone(), Dim::new(6), Dim::new(5), Dim::new(7)]));
    let eps = 1e-5f64.to_bits();
    let vector = |b: &mut GraphBuilder, seed: u64, least: f64| -> Result<ValueId> {
        let values: Vec<f64> =
            numbers(&[6], seed)?.to_f64s().iter().map(|v| v.abs() + least).collect();
        Ok(b.constant(format!("v{seed}"), Tensor::from_f64s(DType::F32, &[6], &values)?))
    };
    let mut v = Vec::new();
    for (seed, least) in [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.5)] {
        v.push(vector(&mut b, seed, least)?);
    }
    let group = b.node(Op::GroupNorm { groups: 3, eps }, &[x, v[0], v[1]])?[0];
    let batch = b.node(Op::BatchNorm { eps }, &[x, v[0], v[1], v[2], v[3]])?[0];
    let mean = Op::Window(WindowAttrs {
        kind: WindowKind::Mean,
        kernel: vec![3; 2],
        strides: vec![2; 2],
        pads_lo: vec![1; 2],
        pads_hi: vec![1; 2],
        dilations: vec![1; 2],
    });
    let mean = b.op(mean, &[x])?;
    let turned = b.permute(x, &[0, 3, 2, 1])?;
    let turned = b.unary(ExprOp::Neg, turned)?;
    let cut = Op::Slice {
        starts: dims(&[0, 5, 1, 0]),
        lens: vec![n, Dim::new(3), Dim::new(2), Dim::new(7)],
        steps: vec![1, -2, 2, 1],
    };
    let cut = b.op(cut, &[x])?;
    let joined = b.slice_axis(x, 2, Dim::new(0), Dim::new(2))?;
    let joined = b.slice_axis(joined, 1, Dim::new(1), Dim::new(3))?;
    let joined = b.op(Op::Concat(1), &[cut, joined])?;
    let zeros = PadMode::Constant(tilewright_expr::Value::Float(0.5));
    let padded = Op::Pad { lo: dims(&[0, 1, 0, 3]), hi: dims(&[0, 0, 2, 1]), mode: zeros };
    let padded = b.op(padded, &[x])?;
    for (name, value) in [
        ("group_norm", group),
        ("batch_norm", batch),
        ("mean", mean),
        ("turned", turned),
        ("joined", joined),
        ("padded", padded),
    ] {
        b.output(name, value);
    }
    let graph = Arc::new(b.finish());
    let mut found = Vec::new();
    for n in [2, 1, 0] {
        found.push(edge(
            &format!("{n} images in groups"),
            &graph,
            vec![numbers(&[n, 6, 5, 7], 3)?],
        ));
    }
    Ok(found)
}

/// Gathers by elements and by coordinates, negative ones included.
fn picked() -> Result<Vec<Edge>> {
    let mut found = Vec::new();
    for (name, axis, index) in [
        ("along the last axis", 2, [3usize, 4, 7]),
        ("along the middle axis", 1, [3, 9, 5]),
        ("along the first axis of fewer lines", 0, [4, 2, 3]),
    ] {
        let mut b = GraphBuilder::new("gather_elements");
        let n = b.symbol("N", Range { min: 0, max: 64 });
        let k = b.symbol("K", Range { min: 0, max: 64 });
        let x = b.input("x", float([n.clone(), Dim::new(4), Dim::new(5)]));
        let mut shape = [n, Dim::new(4), Dim::new(5)];
        for a in 0..3 {
            if a == axis {
                shape[a] = k.clone();
            } else if index[a] < [3, 4, 5][a] {
                shape[a] = Dim::from(index[a]);
            }
        }
        let i = b.input("i", TensorType::new(DType::I64, shape.to_vec()));
        let y = b.op(Op::GatherElements(axis), &[x, i])?;
        b.output("y", y);
        let graph = Arc::new(b.finish());
        let extent = [3i64, 4, 5][axis];
        let values: Vec<i64> = (0..index.iter().product::<usize>() as i64)
            .map(|v| (v * 7919) % (2 * extent) - extent)
            .collect();
        let inputs = vec![numbers(&[3, 4, 5], 7)?, integers(&index, &values)?];
        found.push(edge(&format!("gather elements {name}"), &graph, inputs));
    }
    for (name, batch, index, depth) in [
        ("of all axes", 0, vec![6usize], 3i64),
        ("of two axes", 0, vec![2, 3], 2),
        ("of one axis for each of a batch", 1, vec![3, 2], 1),
        ("of no axis", 0, vec![2], 0),
    ] {
        let mut b = GraphBuilder::new("gather_nd");
        let n = b.symbol("N", Range { min: 1, max: 64 });
        let x = b.input("x", float([n.clone(), Dim::new(4), Dim::new(5)]));
        let mut shape: Vec<Dim> = index.iter().map(|&d| Dim::from(d)).collect();
        if batch == 1 {
            shape[0] = n;
        }
        shape.push(Dim::new(depth));
        let i = b.input("i", TensorType::new(DType::I64, shape));
        let y = b.op(Op::GatherNd { batch }, &[x, i])?;
        b.output("y", y);
        let graph = Arc::new(b.finish());
        let extents = &[3i64, 4, 5][batch..];
        let count: usize = index.iter().product();
        let values: Vec<i64> = (0..count as i64 * depth)
            .map(|v| {
                let extent = extents[(v % depth) as usize];
                (v * 7919 / depth) % (2 * extent) - extent
            })
            .collect();
        let shape = [index, vec![depth as usize]].concat();
        let inputs = vec![numbers(&[3, 4, 5], 8)?, integers(&shape, &values)?];
        found.push(edge(&format!("gather by coordinates {name}"), &graph, inputs));
    }
    Ok(found)
}

/// Borders that repeat what is there, of an axis with one element, too; negative ones cut.
fn borders() -> Result<Vec<Edge>> {
    let mut found = Vec::new();
    for (name, mode) in
        [("mirrored", PadMode::Reflect), ("repeated", PadMode::Edge), ("periodic", PadMode::Wrap)]
    {
        let mut b = GraphBuilder::new("borders");
        let n = b.symbol("N", Range { min: 1, max: 64 });
        let x = b.input("x", float([Dim::new(2), n, Dim::new(6)]));
        let (lo, hi) = (dims(&[0, 3, -1]), dims(&[0, 2, 4]));
        let y = b.op(Op::Pad { lo, hi, mode }, &[x])?;
        let y = b.unary(ExprOp::Neg, y)?;
        b.output("y", y);
        let graph = Arc::new(b.finish());
        for lines in [5, 1] {
            let x = numbers(&[2, lines, 6], 9)?;
            found.push(edge(&format!("{name} borders of {lines} lines"), &graph, vec![x]));
        }
    }
    Ok(found)
}

/// Scatters: several updates of one place, each way to combine, negative indices, none.
fn scattered() -> Result<Vec<Edge>> {
    let kinds = [
        ("set", ScatterKind::Set),
        ("add", ScatterKind::Add),
        ("multiply", ScatterKind::Mul),
        ("largest", ScatterKind::Max),
        ("smallest", ScatterKind::Min),
    ];
    let mut found = Vec::new();
    for (name, kind) in kinds {
        for (axis, index) in [(0, [9usize, 3]), (1, [4, 11])] {
            let mut b = GraphBuilder::new("scatter_elements");
            let u = b.symbol("U", Range { min: 0, max: 64 });
            let x = b.input("x", float(dims(&[5, 4])));
            let mut shape = [Dim::from(index[0]), Dim::from(index[1])];
            shape[axis] = u;
            let i = b.input("i", TensorType::new(DType::I64, shape.to_vec()));
            let v = b.input("v", float(shape.to_vec()));
            let y = b.op(Op::ScatterElements { axis, kind }, &[x, i, v])?;
            b.output("y", y);
            let graph = Arc::new(b.finish());
            let extent = [5i64, 4][axis];
            let count = (index[0] * index[1]) as i64;
            let at: Vec<i64> = (0..count).map(|v| (v * 7919) % (2 * extent) - extent).collect();
            let x = numbers(&[5, 4], 1)?;
            let inputs = vec![x.clone(), integers(&index, &at)?, numbers(&index, 2)?];
            found.push(edge(&format!("scatter, {name}, along {axis}"), &graph, inputs));
            let mut none = index;
            none[axis] = 0;
            let inputs = vec![x, integers(&none, &[])?, numbers(&none, 2)?];
            found.push(edge(&format!("scatter, {name}, of nothing along {axis}"), &graph, inputs));
        }
        for depth in [1usize, 2, 3] {
            let mut b = GraphBuilder::new("scatter_nd");
            let n = b.symbol("N", Range { min: 1, max: 64 });
            let u = b.symbol("U", Range { min: 0, max: 64 });
            let data = [n, Dim::new(4), Dim::new(3)];
            let x = b.input("x", float(data.to_vec()));
            let index = vec![u.clone(), Dim::from(depth)];
            let i = b.input("i", TensorType::new(DType::I64, index));
            let updates = [vec![u], data[depth..].to_vec()].concat();
            let v = b.input("v", float(updates));
            let y = b.op(Op::ScatterNd { kind }, &[x, i, v])?;
            b.output("y", y);
            let graph = Arc::new(b.finish());
            let sizes = [5usize, 4, 3];
            let at: Vec<i64> = (0..7 * depth)
                .map(|v| {
                    let extent = sizes[v % depth] as i64;
                    (v as i64 * 31 / depth as i64) % (2 * extent) - extent
                })
                .collect();
            let shape = [&[7], &sizes[depth..]].concat();
            let inputs =
                vec![numbers(&sizes, 3)?, integers(&[7, depth], &at)?, numbers(&shape, 4)?];
            found.push(edge(&format!("scatter by {depth} coordinates, {name}"), &graph, inputs));
        }
    }
    // In one dimension, and integers, whose sums wrap.
    let mut b = GraphBuilder::new("count");
    let u = b.symbol("U", Range { min: 0, max: 1 << 20 });
    let x = b.input("x", TensorType::new(DType::I32, dims(&[300])));
    let i = b.input("i", TensorType::new(DType::I64, [u.clone()]));
    let v = b.input("v", TensorType::new(DType::I32, [u]));
    let add = Op::ScatterElements { axis: 0, kind: ScatterKind::Add };
    let y = b.op(add, &[x, i, v])?;
    b.output("y", y);
    let at: Vec<i64> = (0..500).map(|v| (v * v) % 300).collect();
    let x: Vec<f64> = (0..300).map(f64::from).collect();
    let v: Vec<f64> = (0..500).map(|v| f64::from(v - 250)).collect();
    let inputs = vec![
        Tensor::from_f64s(DType::I32, &[300], &x)?,
        integers(&[500], &at)?,
        Tensor::from_f64s(DType::I32, &[500], &v)?,
    ];
    found.push(edge("a histogram of integers", &Arc::new(b.finish()), inputs));
    Ok(found)
}

/// Running sums from the end along an axis whose length is not known when the model is planned.
fn scans() -> Result<Vec<Edge>> {
    let mut b = GraphBuilder::new("scans");
    let n = b.symbol("N", Range { min: 0, max: 1 << 20 });
    let x = b.input("x", float([Dim::new(3), n]));
    for (name, reverse, exclusive) in [
        ("from_end", true, false),
        ("from_end_without", true, true),
        ("from_front_without", false, true),
    ] {
        let y = b.op(Op::Scan { kind: ReduceKind::Sum, axis: 1, exclusive, reverse }, &[x])?;
        b.output(name, y);
    }
    let most = Op::Scan { kind: ReduceKind::Max, axis: 0, exclusive: false, reverse: true };
    let most = b.op(most, &[x])?;
    b.output("most_from_end", most);
    let graph = Arc::new(b.finish());
    let mut found = Vec::new();
    for n in [1, 300, 0] {
        found.push(edge(&format!("scans of {n}"), &graph, vec![numbers(&[3, n], 6)?]));
    }
    Ok(found)
}

/// What is wrong with the inputs is said in the caller's words.
fn refused() -> Result<Vec<Edge>> {
    let mut b = GraphBuilder::new("refused");
    let n = b.symbol("batch", Range { min: 1, max: 4 });
    let s = b.symbol("sequence", Range { min: 1, max: 8 });
    let x = b.input("x", float([n, s, Dim::new(3)]));
    let y = b.unary(ExprOp::Exp, x)?;
    b.output("y", y);
    let graph = Arc::new(b.finish());
    let of = |name: &str, inputs: Vec<Tensor>, words: &'static str| Edge {
        name: name.to_string(),
        graph: graph.clone(),
        inputs,
        expect: Expect::Refused(words),
    };
    let wide = Tensor::from_f64s(DType::F64, &[1, 2, 3], &[0.0; 6])?;
    Ok(vec![
        of("a sequence beyond its range", vec![numbers(&[1, 9, 3], 0)?], "sequence = 9 is outside"),
        of("a batch below its range", vec![numbers(&[0, 2, 3], 0)?], "batch = 0 is outside"),
        of("a wrong type", vec![wide], "`x` is f64, the model takes f32"),
        of("a wrong shape", vec![numbers(&[1, 2, 4], 0)?], "`x` has shape [1, 2, 4]"),
        of("a wrong rank", vec![numbers(&[2, 3], 0)?], "`x` has shape [2, 3]"),
        of("no input", vec![], "0 inputs are given, the model takes 1"),
    ])
}

/// Four terabytes from four megabytes, and few from few.
fn memory() -> Result<Vec<Edge>> {
    let mut b = GraphBuilder::new("memory");
    let n = b.symbol("N", Range { min: 0, max: 1 << 20 });
    let x = b.input("x", float([n.clone()]));
    let row = b.reshape(x, &[Dim::new(1), n.clone()])?;
    let column = b.reshape(x, &[n, Dim::new(1)])?;
    let sums = b.binary(ExprOp::Add, row, column)?;
    b.output("sums", sums);
    let graph = Arc::new(b.finish());
    let x = Tensor::from_f64s(DType::F32, &[1 << 20], &vec![1.0; 1 << 20])?;
    let mut large = edge("more memory than there is", &graph, vec![x]);
    large.expect = Expect::TooLarge("out of memory");
    Ok(vec![
        edge("little memory", &graph, vec![numbers(&[5], 1)?]),
        large,
        edge("little memory again", &graph, vec![numbers(&[7], 2)?]),
    ])
}

/// More than 2^31 elements in every tensor between kernels, made on the device: numbers that repeat every [`PERIOD`] rows, their
/// softmax, its sums along rows, and some of its rows. To be planned without fusion, so that all is stored.
///
/// # Errors
/// Bugs.
pub fn large(rows: i64, cols: i64) -> Result<Graph> {
    let mut b = GraphBuilder::new("large");
    let k = b.symbol("K", Range { min: 1, max: 1024 });
    let ids = b.input("rows", TensorType::new(DType::I64, [k]));
    let shape = dims(&[rows, cols]);
    let count = |axis| Op::Iota { ty: TensorType::new(DType::I32, shape.clone()), axis };
    let places: Vec<ValueId> = vec![b.op(count(0), &[])?, b.op(count(1), &[])?];
    let number = func(&[DType::I32; 2], |f, a| {
        let mut sum = f.constant_int(0, DType::I32);
        for (place, times) in a.iter().zip([7, 3]) {
            let times = f.constant_int(times, DType::I32);
            let part = f.op(ExprOp::Mul, &[*place, times]);
            sum = f.op(ExprOp::Add, &[sum, part]);
        }
        let period = f.constant_int(PERIOD, DType::I32);
        let value = f.op(ExprOp::Mod, &[sum, period]);
        let value = f.cast(value, DType::F32);
        let scale = f.constant(0.25, DType::F32);
        f.op(ExprOp::Mul, &[value, scale])
    });
    let x = b.map(number, &places)?;
    let y = b.node(Op::Softmax { axis: 1, log: false }, &[x])?[0];
    let most = b.reduce(ReduceKind::Max, y, &[1], false)?;
    let some = b.op(Op::Gather(0), &[y, ids])?;
    let all = b.reduce(ReduceKind::Sum, y, &[0, 1], false)?;
    b.output("most", most);
    b.output("some", some);
    b.output("all", all);
    Ok(b.finish())
}

/// Rows of [`large`] after which the numbers repeat.
pub const PERIOD: i64 = 11;
