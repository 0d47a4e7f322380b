//! The time model: the slower of memory and arithmetic, a part of the other, plus the launch.
//!
//! * Memory: every operand from outside and every stored result, over the bandwidth of the level
//!   that holds what the kernel touches; rows that are walked in pieces read their operands once
//!   per walk.
//! * Arithmetic: flops over the peak, with a share of it by kind of work. A map counts as often as
//!   it is computed: once per element where it varies along all axes, again in every block
//!   otherwise, and once per walk over long rows.
//!
//! Flops and bytes of a group are also there as expressions over the sizes, for `explain`.

use crate::block::func_cost;
use crate::fuse::{Anchor, Group, WHOLE_ROW, row_axes, see_through};
use crate::prologue::{Prologue, operand_axes};
use crate::schedule::{How, gemm_tiles, knobs, map_tiles, row_tile};
use crate::survey::Survey;
use crate::target::CpuTarget;
use std::collections::{BTreeMap, BTreeSet};
use tilewright_graph::{Graph, Node, NodeId, Op, ValueId};
use tilewright_layout::{Dim, numel};
use tilewright_plan::Note;

/// Floating-point operations of one node.
pub(crate) fn node_flops(graph: &Graph, node: &Node) -> Dim {
    let Some(&out) = node.outputs.first() else { return Dim::new(0) };
    let elements = numel(graph.shape(out));
    let operand = |i: usize| node.inputs.get(i).map(|&v| graph.shape(v)).unwrap_or_default();
    match &node.op {
        Op::Map(func) => elements * func_cost(func),
        Op::Contract { lhs, rhs, out, .. } => {
            let mut product = Dim::new(2);
            let mut seen = BTreeSet::new();
            for (letters, shape) in [(lhs, operand(0)), (rhs, operand(1))] {
                for (letter, extent) in letters.chars().zip(shape) {
                    // The stretched side of a letter has extent 1 and does not count.
                    if !extent.is(1) && seen.insert(letter) {
                        product = product * extent;
                    }
                }
            }
            let _ = out;
            product
        }
        Op::GroupProduct { .. } => elements * 2 * numel(&operand(1)[1..]),
        Op::Conv(_) => elements * 2 * numel(&operand(1)[1..]),
        Op::Window(attrs) => elements * attrs.kernel.iter().product::<i64>(),
        Op::Attention(_) => {
            let (q, k, v) = (operand(0), operand(1), operand(2));
            let scores = &(&q[0] * &q[1]) * &(&q[2] * &k[2]);
            &scores * &((&q[3] + &v[3]) * 2 + 16)
        }
        Op::Softmax { .. } => elements * 16,
        Op::LayerNorm { .. } => elements * 8,
        Op::RmsNorm { .. } => elements * 5,
        Op::Reduce { .. } | Op::ArgReduce { .. } => numel(operand(0)),
        Op::Scan { .. } => elements,
        _ => Dim::new(0),
    }
}

fn bytes(graph: &Graph, v: ValueId) -> Dim {
    let (elements, dtype) = (numel(graph.shape(v)), graph.dtype(v));
    match dtype.bits() {
        4 => elements.ceil_div(&Dim::new(2)),
        _ => elements * dtype.size() as i64,
    }
}

/// Flops, bytes that must move, bytes that fusion keeps out of memory.
fn totals(graph: &Graph, group: &Group) -> (Dim, Dim, Dim) {
    let (mut flops, mut moved, mut saved) = (Dim::new(0), Dim::new(0), Dim::new(0));
    let mut read = BTreeSet::new();
    for &n in &group.nodes {
        let node = &graph.nodes[n];
        flops = flops + node_flops(graph, node);
        for &v in &node.inputs {
            let (base, _) = see_through(graph, v);
            if group.vals.contains_key(&base) || !read.insert(base) {
                continue;
            }
            // A gather reads as many rows as it writes, not the whole table.
            moved = match (&node.op, group.anchor) {
                (Op::Gather(_), Anchor::Gather) if node.inputs[0] == v => {
                    moved + bytes(graph, node.outputs[0])
                }
                _ => moved + bytes(graph, base),
            };
        }
    }
    for &v in &group.outputs {
        moved = moved + bytes(graph, v);
    }
    for &v in group.vals.keys() {
        if !group.outputs.contains(&v) {
            saved = saved + bytes(graph, v) * 2;
        }
    }
    if group.anchor == Anchor::Attention {
        // The score matrix, written and read by softmax and both products.
        let attention = group.nodes.iter().map(|&n| &graph.nodes[n]);
        for node in attention.filter(|n| matches!(n.op, Op::Attention(_))) {
            let (q, k) = (graph.shape(node.inputs[0]), graph.shape(node.inputs[1]));
            let scores = &(&q[0] * &q[1]) * &(&q[2] * &k[2]);
            saved = saved + scores * (4 * graph.dtype(node.inputs[0]).size() as i64);
        }
    }
    (flops, moved, saved)
}

/// Elements of the result that one block of a product computes along an axis, about.
const PRODUCT_BLOCK: f64 = 64.0;

/// Part of the peak that maps reach: it counts a multiply-add as two, they do one operation.
pub(crate) const MAP_SHARE: f64 = 0.5;

/// Part of the peak that products reach.
const PRODUCT_SHARE: f64 = 0.8;

/// Part of the shorter of memory and arithmetic that the longer does not hide.
const NOT_HIDDEN: f64 = 0.25;

/// Work below this many elements is not worth a second thread.
const SHARE_ELEMENTS: f64 = 1024.0;

/// Estimated time of a group at likely sizes, in nanoseconds.
pub(crate) fn estimate_ns(s: &Survey<'_>, group: &Group) -> f64 {
    let walks = Walks::of(s, group);
    let threads = (s.target.threads as f64).max(1.0);
    let widest = group.shape.iter().map(|d| s.extent(d)).product::<f64>().max(1.0);
    // Small kernels do not keep all threads busy.
    let busy = (widest / SHARE_ELEMENTS).ceil().clamp(1.0, threads) / threads;
    let compute = arithmetic(s, group, &walks) / s.target.flops_per_second / busy;
    let compute = compute.max(ending_s(s, group));
    let memory = traffic(s, group, &walks) / busy.sqrt();
    let (long, short) = (compute.max(memory), compute.min(memory));
    (long + NOT_HIDDEN * short) * 1e9 + s.target.launch_ns + apart_ns(s, group)
}

/// What a product costs beside its kernel where that cannot hold its epilogue, in nanoseconds. On a GPU it stores one result and
/// reads one other tensor of its size; with more, the product goes through memory to a kernel for the rest, whose memory no arithmetic
/// hides.
fn apart_ns(s: &Survey<'_>, group: &Group) -> f64 {
    if !s.gpu || group.anchor != Anchor::Contract {
        return 0.0;
    }
    let Some(product) = product_of(s, group) else { return 0.0 };
    let own = s.graph.nodes[product].outputs[0];
    let read = read_beside(s, group, own);
    if group.outputs.len() <= 1 && read.len() <= 1 {
        return 0.0;
    }
    let size = |v: ValueId| s.elements(v) * s.graph.dtype(v).size() as f64;
    let others = group.outputs.iter().copied().filter(|&v| v != own).chain(read);
    let times = if group.outputs.contains(&own) { 1.0 } else { 2.0 };
    let bytes = times * size(own) + (1.0 - NOT_HIDDEN) * others.map(size).sum::<f64>();
    copy_ns(s.target, bytes)
}

/// The contraction of a group.
fn product_of(s: &Survey<'_>, group: &Group) -> Option<NodeId> {
    group.nodes.iter().copied().find(|&n| matches!(s.graph.nodes[n].op, Op::Contract { .. }))
}

/// Tensors of a product's size that its epilogue reads.
fn read_beside(s: &Survey<'_>, group: &Group, product: ValueId) -> BTreeSet<ValueId> {
    let elements = s.elements(product);
    let maps =
        group.nodes.iter().map(|&n| &s.graph.nodes[n]).filter(|n| matches!(n.op, Op::Map(_)));
    let read = maps.flat_map(|n| &n.inputs).map(|&v| s.seen(v).0);
    read.filter(|v| !group.vals.contains_key(v) && s.elements(*v) >= elements).collect()
}

/// How many times slower the few warps of a GPU's epilogue compute than a kernel of all warps does (48 of 128 lanes).
const ENDING_SLOWNESS: f64 = 128.0 / 48.0;
/// Operations an element above which an epilogue no longer hides behind the stores of a cooperative schedule.
const LONG_ENDING: f64 = 12.0;
/// Bytes per second of a tensor that registers load where consumers take turns (12608 x 3072 x 768 with the derivative of GELU).
const ENDING_BYTES_PER_S: f64 = 0.3e12;

/// Seconds of a GPU's product with a long epilogue: either that takes turns with the products of the other consumer, and registers load
/// what it reads, or it follows the products. 12608 x 3072 x 768 with the derivative of GELU took 220 us, the product and a kernel behind
/// it 72 and 60; with GELU alone, 37 and 45 at 4096 x 3072 x 768.
fn ending_s(s: &Survey<'_>, group: &Group) -> f64 {
    if !s.gpu || group.anchor != Anchor::Contract {
        return 0.0;
    }
    let Some(product) = product_of(s, group) else { return 0.0 };
    let own = s.graph.nodes[product].outputs[0];
    let maps = group.nodes.iter().filter(|&&n| matches!(s.graph.nodes[n].op, Op::Map(_)));
    let of_result = maps.filter(|&&n| s.elements(s.graph.nodes[n].outputs[0]) >= s.elements(own));
    let work: f64 = of_result.map(|&n| s.work(n) * s.elements(s.graph.nodes[n].outputs[0])).sum();
    if work <= LONG_ENDING * s.elements(own) {
        return 0.0;
    }
    let rate = s.target.flops_per_second;
    let products = s.work(product) / (PRODUCT_SHARE * s.target.product_speedup * rate);
    let read: f64 = read_beside(s, group, own).into_iter().map(|v| s.bytes(v)).sum();
    let ending = ENDING_SLOWNESS * work / (MAP_SHARE * rate);
    ((products + ending + read / ENDING_BYTES_PER_S) / 2.0).min(products + ending)
}

/// Estimated time of a copy of this many bytes, read and written, in nanoseconds.
pub(crate) fn copy_ns(target: &CpuTarget, bytes: f64) -> f64 {
    bytes / Level::holding(target, bytes).rate(target) * 1e9 + target.launch_ns
}

/// Estimated time to gather elements of `bytes` across memory, in nanoseconds: one by one each takes
/// about two vector operations. Squares of four-byte elements are turned in registers.
pub(crate) fn gather_ns(target: &CpuTarget, elements: f64, bytes: usize) -> f64 {
    let each = if bytes == 4 { 0.5 } else { 2.0 };
    elements * each * target.lanes as f64 / (target.flops_per_second * MAP_SHARE) * 1e9
}

/// Flops, weighted so that the peak does them in their time: matrix work comes near the peak, maps
/// do one operation where a multiply-add counts as two, and rows and depthwise taps less.
fn arithmetic(s: &Survey<'_>, group: &Group, walks: &Walks) -> f64 {
    let mut flops = 0.0;
    let products = s.target.product_speedup;
    for &n in &group.nodes {
        let node = &s.graph.nodes[n];
        let share = match &node.op {
            Op::Contract { .. } | Op::GroupProduct { .. } => PRODUCT_SHARE * products,
            Op::Conv(attrs) if attrs.groups == 1 => PRODUCT_SHARE * products,
            Op::Attention(_) => 0.5 * products,
            Op::Conv(_) => 0.12,
            Op::Map(_) => MAP_SHARE,
            _ if s.anchor(n) == Some(Anchor::Host) => 0.002,
            _ => 0.25,
        };
        let times = match &node.op {
            Op::Map(_) => s.elements(node.outputs[0]) * times_computed(s, group, node.outputs[0]),
            _ => 1.0,
        };
        flops += s.work(n) * times * walks.of_node(n) / share;
    }
    let spilled = crowded(s, group) * group.shape.iter().map(|d| s.extent(d)).product::<f64>();
    // A value that does not fit the registers is stored and loaded again.
    flops + spilled * 2.0 / MAP_SHARE
}

/// How often each element of a map's result is computed.
fn times_computed(s: &Survey<'_>, group: &Group, v: ValueId) -> f64 {
    match group.prologues.iter().find(|p| p.vals.contains_key(&v)) {
        Some(p) => Again::of(s, group, p).map_or(1.0, |again| again.of_value(s, p, v)),
        None => blocks_again(s, group, v),
    }
}

/// The blocks of a product that compute an operand, with the tiles that its kernel will have.
struct Again {
    /// Blocks along the result's other axis: each computes the operand's tile.
    others: f64,
    /// Blocks along the operand's own axes in the result.
    own: f64,
    /// Steps along the sum.
    steps: f64,
}

impl Again {
    fn of(s: &Survey<'_>, group: &Group, p: &Prologue) -> Option<Again> {
        let mut nodes = group.nodes.iter().map(|&n| &s.graph.nodes[n]);
        let node = nodes.find(|n| matches!(n.op, Op::Contract { .. } | Op::Conv(_)))?;
        let mut has = [0, 1].map(|_| vec![false; group.shape.len()]);
        for (i, has) in has.iter_mut().enumerate() {
            let shape = s.graph.shape(node.inputs[i]);
            let axes = operand_axes(&node.op, i, shape.len());
            let real = axes.iter().zip(shape).filter(|(_, d)| !d.is(1));
            real.filter_map(|(a, _)| *a).for_each(|a| has[a] = true);
        }
        let size = |l: bool, r: bool| -> f64 {
            let those = (0..group.shape.len()).filter(|&a| (has[0][a], has[1][a]) == (l, r));
            those.map(|a| s.extent(&group.shape[a])).product::<f64>().max(1.0)
        };
        let (m, n, batch) = (size(true, false), size(false, true), size(true, true));
        let k = (s.elements(node.inputs[0]) / (m * batch)).max(1.0);
        // The operand with the result's nearest axis is the right one of a contraction's kernel.
        let near = (0..group.shape.len()).rfind(|&a| !group.shape[a].is(1));
        let turned =
            matches!(node.op, Op::Contract { .. }) && near.is_some_and(|a| has[0][a] && !has[1][a]);
        let (rows, cols) = if turned { (n, m) } else { (m, n) };
        let left = (p.operand == 0) != turned;
        let sizes = [rows, cols, k].map(|x| x as i64);
        let how = if left { How::LeftComputed } else { How::Plain };
        let t = gemm_tiles(s.target, &knobs(s.target), 4, batch as i64, sizes, how);
        let up = |x: f64, tile: i64| (x / tile as f64).ceil().max(1.0);
        let (of_rows, of_cols) = (up(rows, t.bm), up(cols, t.bn));
        let (own, others) = if left { (of_rows, of_cols) } else { (of_cols, of_rows) };
        Some(Again { others, own: own * batch, steps: up(k, t.bk) })
    }

    /// How often an element of a value inside the prologue is computed: also in each block along axes of the
    /// operand that it lacks, but no more often than there are elements of the operand for it.
    fn of_value(&self, s: &Survey<'_>, p: &Prologue, v: ValueId) -> f64 {
        let operand = p.nodes.last().map(|&n| s.graph.nodes[n].outputs[0]);
        let whole = operand.map_or(1.0, |o| s.elements(o) / s.elements(v).max(1.0));
        self.others * (self.own * self.steps).min(whole).max(1.0)
    }
}

/// Seconds in which products write and read the operands that they compute: their tiles lie in a near cache.
fn kept(s: &Survey<'_>, group: &Group) -> f64 {
    let tiles = group.prologues.iter().filter_map(|p| {
        let operand = s.graph.nodes[*p.nodes.last()?].outputs[0];
        Some(2.0 * s.bytes(operand) * Again::of(s, group, p)?.others)
    });
    tiles.sum::<f64>() / s.target.l2_bytes_per_second
}

/// In how many blocks a value is computed again because it does not vary along an axis that is cut
/// into blocks.
fn blocks_again(s: &Survey<'_>, group: &Group, v: ValueId) -> f64 {
    let Some(axes) = group.vals.get(&v) else { return 1.0 };
    let rank = group.shape.len();
    let extents: Vec<f64> = group.shape.iter().map(|d| s.extent(d)).collect();
    let size = |a: usize| extents.get(a).map_or(1, |e| *e as i64);
    let tile = |a: usize| -> f64 {
        match group.anchor {
            Anchor::Contract | Anchor::Conv if a + 2 >= rank => PRODUCT_BLOCK,
            Anchor::Rows if group.reduced.contains(&a) => f64::INFINITY,
            Anchor::Rows => {
                let inner = (0..rank).rev().find(|a| !group.reduced.contains(a));
                let width: i64 = group.reduced.iter().map(|&r| size(r)).product();
                match inner == Some(a) {
                    true => row_tile(s.target, size(a), width) as f64,
                    false => 1.0,
                }
            }
            Anchor::Map if a + 2 >= rank => {
                let rows = if rank >= 2 { size(rank - 2) } else { 1 };
                let (bm, bn) = map_tiles(s.target, rows, size(rank - 1), None, [false; 2]);
                if a + 1 == rank { bn as f64 } else { bm as f64 }
            }
            _ => 1.0,
        }
    };
    let cut = (0..rank).filter(|a| !axes.contains(&Some(*a)));
    cut.map(|a| (extents[a] / tile(a)).ceil().max(1.0)).product()
}

/// By how many the values that a chain of maps keeps exceed the vector registers.
fn crowded(s: &Survey<'_>, group: &Group) -> f64 {
    let registers: usize = if s.target.lanes >= 16 { 28 } else { 12 };
    if group.nodes.len() <= registers {
        return 0.0;
    }
    let mut last: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (i, &n) in group.nodes.iter().enumerate() {
        for &v in &s.graph.nodes[n].inputs {
            let base = s.seen(v).0;
            if group.vals.contains_key(&base) {
                last.insert(base, i);
            }
        }
    }
    let (mut live, mut most) = (BTreeSet::new(), 0);
    for (i, &n) in group.nodes.iter().enumerate() {
        live.extend(s.graph.nodes[n].outputs.iter().copied());
        live.retain(|v| last.get(v).is_some_and(|&end| end > i));
        most = most.max(live.len());
    }
    most.saturating_sub(registers) as f64
}

/// Seconds for the bytes that a group reads and writes.
fn traffic(s: &Survey<'_>, group: &Group, walks: &Walks) -> f64 {
    let mut read: BTreeMap<ValueId, (f64, f64)> = BTreeMap::new();
    for &n in &group.nodes {
        let node = &s.graph.nodes[n];
        for &v in &node.inputs {
            let base = s.seen(v).0;
            if group.vals.contains_key(&base) {
                continue;
            }
            // A gather reads as many rows as it writes, not the whole table.
            let bytes = match &node.op {
                Op::Gather(_) if node.inputs[0] == v => s.bytes(node.outputs[0]),
                _ => s.bytes(base).min(s.bytes(v)),
            };
            let entry = read.entry(base).or_default();
            *entry = (entry.0.max(bytes), entry.1.max(walks.of_node(n)));
        }
    }
    let stored: f64 = group.outputs.iter().map(|&v| s.bytes(v)).sum();
    let touched = stored + read.values().map(|r| r.0).sum::<f64>();
    let t = s.target;
    let rate = Level::holding(t, touched).rate(t);
    let weights = Level::holding(t, s.constant_bytes.max(touched)).rate(t);
    let mut seconds = stored / rate + kept(s, group);
    for (v, (bytes, walked)) in read {
        seconds += bytes / if s.is_constant(v) { weights } else { rate };
        // Walking a row again finds it in a cache.
        seconds += bytes * (walked - 1.0) / t.l2_bytes_per_second;
    }
    seconds
}

/// The level of memory that holds what a kernel touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Second,
    Last,
    Memory,
}

impl Level {
    /// The nearest level of which this many bytes take half at most.
    fn holding(t: &CpuTarget, bytes: f64) -> Level {
        if bytes * 2.0 <= (t.l2_bytes * t.threads.max(1)) as f64 {
            Level::Second
        } else if bytes * 2.0 <= t.l3_bytes as f64 {
            Level::Last
        } else {
            Level::Memory
        }
    }

    /// Its bandwidth for all threads. The last-level cache is not measured: it lies between its
    /// neighbours.
    fn rate(self, t: &CpuTarget) -> f64 {
        let (near, far) = (t.l2_bytes_per_second, t.bytes_per_second);
        match self {
            Level::Second => near,
            Level::Last => (near * far).sqrt(),
            Level::Memory => far,
        }
    }
}

/// How often each node of a group is computed because long rows are walked several times: one walk
/// per reduction that depends on another, one more to store what varies along the row.
struct Walks(BTreeMap<NodeId, u64>);

impl Walks {
    fn of_node(&self, n: NodeId) -> f64 {
        self.0.get(&n).map_or(1.0, |walks| f64::from(walks.count_ones().max(1)))
    }

    fn of(s: &Survey<'_>, group: &Group) -> Walks {
        let long = group.anchor == Anchor::Rows
            && !{
                let mut extents = group.reduced.iter().map(|&a| group.shape[a].as_const());
                let length = extents.try_fold(1i64, |n, e| e.map(|e| n.saturating_mul(e)));
                length.is_some_and(|n| n <= WHOLE_ROW)
            };
        if !long {
            return Walks(BTreeMap::new());
        }
        // In which walks reductions happen: after those that they depend on.
        let mut level: BTreeMap<ValueId, u32> = BTreeMap::new();
        let mut own: BTreeMap<NodeId, u64> = BTreeMap::new();
        for &n in &group.nodes {
            let node = &s.graph.nodes[n];
            let before = node.inputs.iter().filter_map(|v| level.get(&s.seen(*v).0)).max();
            let first = before.copied().unwrap_or(0).min(50);
            let walks = reductions(&node.op);
            own.insert(n, ((1u64 << walks) - 1) << first);
            level.insert(node.outputs[0], first + walks);
        }
        let last = level.values().copied().max().unwrap_or(0);
        // Backwards: what a node's readers need in their walks.
        let mut wanted: BTreeMap<ValueId, u64> = BTreeMap::new();
        let mut walks = BTreeMap::new();
        for &n in group.nodes.iter().rev() {
            let node = &s.graph.nodes[n];
            let out = node.outputs[0];
            let varies = |v: ValueId| {
                let axes = group.vals.get(&v);
                axes.is_none_or(|m| group.reduced.iter().any(|r| m.contains(&Some(*r))))
            };
            let mut mask = wanted.get(&out).copied().unwrap_or(0);
            if !varies(out) {
                // Computed once per row, when its reductions are done.
                mask = 0;
            } else if group.outputs.contains(&out) || mask == 0 {
                mask |= 1 << last;
            }
            let mask = mask | own[&n];
            walks.insert(n, mask);
            for &v in &node.inputs {
                *wanted.entry(s.seen(v).0).or_default() |= mask;
            }
        }
        Walks(walks)
    }
}

/// How many reductions, one after another, a row operator is made of.
fn reductions(op: &Op) -> u32 {
    match op {
        Op::Softmax { .. } | Op::LayerNorm { .. } => 2,
        op => u32::from(row_axes(op, 1).is_some()),
    }
}

/// What `explain` shows of a group.
pub(crate) fn note(graph: &Graph, group: &Group) -> Note {
    let (flops, bytes, bytes_saved) = totals(graph, group);
    let mut nodes: Vec<String> = Vec::new();
    let mut parts: Vec<String> = Vec::new();
    for &n in &group.nodes {
        let node = &graph.nodes[n];
        if !node.origin.is_empty() && nodes.last() != Some(&node.origin) {
            nodes.push(node.origin.clone());
        }
        parts.push(crate::fuse::label(node));
    }
    parts.dedup();
    Note {
        label: parts.join("+"),
        anchor: group.anchor.name().to_string(),
        nodes,
        flops,
        bytes,
        bytes_saved,
        estimate_ns: group.estimate_ns,
    }
}
