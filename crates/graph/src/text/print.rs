//! Prints graphs. Total: a graph that is not well-formed prints too, for reports of our bugs.

use crate::ir::{Def, Graph, Node, ValueId};
use crate::op::{HostAttr, Op, PadMode, ReduceKind, ScatterKind, WindowKind};
use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::Value;

use super::INLINE_ELEMENTS;

/// Appends the text of `graph`; returns the constants that it only names.
pub(super) fn print(graph: &Graph, out: &mut String) -> BTreeMap<String, Tensor> {
    let mut printer = Printer { graph, out, labels: BTreeMap::new(), table: BTreeMap::new() };
    printer.graph();
    printer.table
}

/// A name after `@`: bare when it is an identifier.
fn at_name(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    if !name.is_empty() && name.chars().all(plain) { name.to_string() } else { format!("{name:?}") }
}

pub(super) fn list<T: Display>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_string).collect();
    format!("[{}]", items.join(", "))
}

/// A float that reads back to the same value (all NaNs are one).
pub(super) fn float(x: f64) -> String {
    if x.is_nan() { "nan".to_string() } else { format!("{x:?}") }
}

pub(super) fn reduce_name(kind: ReduceKind) -> &'static str {
    match kind {
        ReduceKind::Sum => "sum",
        ReduceKind::Prod => "prod",
        ReduceKind::Max => "max",
        ReduceKind::Min => "min",
    }
}

pub(super) fn scatter_name(kind: ScatterKind) -> &'static str {
    match kind {
        ScatterKind::Set => "set",
        ScatterKind::Add => "add",
        ScatterKind::Mul => "mul",
        ScatterKind::Max => "max",
        ScatterKind::Min => "min",
    }
}

pub(super) fn window_name(kind: WindowKind) -> &'static str {
    match kind {
        WindowKind::Max => "max",
        WindowKind::Sum => "sum",
        WindowKind::Mean => "mean",
        WindowKind::MeanWithPad => "mean_with_pad",
    }
}

/// FNV-1a over words of eight bytes, then type and shape: a name for the content, not a seal.
fn content_key(tensor: &Tensor) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add =
        |word: u64| hash = (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
    for chunk in tensor.bytes().chunks(8) {
        let mut word = [0u8; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        add(u64::from_le_bytes(word));
    }
    add(tensor.dtype() as u64);
    tensor.shape().iter().for_each(|&d| add(d as u64));
    format!("{hash:016x}")
}

/// The elements as the text writes them, when they are few and read back to the same bytes.
fn inline_literal(tensor: &Tensor) -> Option<String> {
    if tensor.len() > INLINE_ELEMENTS {
        return None;
    }
    let dtype = tensor.dtype();
    let items: Vec<String> = (0..tensor.len())
        .map(|i| match dtype {
            DType::F64 => float(tensor.get_f64(i)),
            _ if dtype.is_float() => {
                // Every narrower float is exact in f32, whose shortest digits are shorter.
                let x = tensor.get_f64(i) as f32;
                if x.is_nan() { "nan".to_string() } else { format!("{x:?}") }
            }
            DType::U64 => (tensor.get_i64(i) as u64).to_string(),
            DType::Bool => (tensor.get_i64(i) != 0).to_string(),
            _ => tensor.get_i64(i).to_string(),
        })
        .collect();
    let back = super::parse::literal_tensor(dtype, tensor.shape(), &items).ok()?;
    if &back != tensor {
        return None;
    }
    Some(if tensor.shape().is_empty() { items.concat() } else { list(&items) })
}

struct Printer<'a> {
    graph: &'a Graph,
    out: &'a mut String,
    labels: BTreeMap<ValueId, usize>,
    table: BTreeMap<String, Tensor>,
}

impl Printer<'_> {
    /// Writing to a string cannot fail.
    fn write(&mut self, args: std::fmt::Arguments<'_>) {
        let _ = self.out.write_fmt(args);
    }

    fn graph(&mut self) {
        let graph = self.graph;
        let symbols: Vec<String> = graph
            .symbols
            .iter()
            .map(|s| match s.range.max {
                i64::MAX => format!("{} in {}..", s.name, s.range.min),
                max => format!("{} in {}..{max}", s.name, s.range.min),
            })
            .collect();
        let symbols =
            if symbols.is_empty() { String::new() } else { format!("({})", symbols.join(", ")) };
        self.write(format_args!("graph @{}{symbols} {{\n", at_name(&graph.name)));
        for &v in &graph.inputs {
            let head = self.define(v);
            self.write(format_args!("  {head} = input\n"));
        }
        for &id in &graph.order {
            match graph.nodes.get(id) {
                Some(node) => self.node(node),
                None => self.write(format_args!("  # {id} does not exist\n")),
            }
        }
        let outputs: Vec<ValueId> = graph.outputs.iter().map(|(_, v)| *v).collect();
        self.constants(&outputs);
        let outputs: Vec<String> =
            graph.outputs.iter().map(|(name, v)| format!("{name:?}: {}", self.label(*v))).collect();
        self.write(format_args!("  return {}", outputs.join(", ")));
        self.out.truncate(self.out.trim_end().len());
        self.out.push_str("\n}\n");
    }

    /// Gives a value its label; the left side of its definition.
    fn define(&mut self, v: ValueId) -> String {
        let n = self.labels.len();
        self.labels.insert(v, n);
        let Some(value) = self.graph.values.get(v) else { return format!("%{n}") };
        let name = if value.name.is_empty() { String::new() } else { format!(" {:?}", value.name) };
        format!("%{n}{name}: {}", value.ty)
    }

    fn label(&self, v: ValueId) -> String {
        match self.labels.get(&v) {
            Some(n) => format!("%{n}"),
            None => format!("%undefined_{v}"),
        }
    }

    /// Defines the constants among `values` that have not been yet.
    fn constants(&mut self, values: &[ValueId]) {
        for &v in values {
            if self.labels.contains_key(&v) {
                continue;
            }
            let graph = self.graph;
            let Some(Def::Const(tensor)) = graph.values.get(v).map(|value| &value.def) else {
                continue;
            };
            let head = self.define(v);
            match inline_literal(tensor) {
                Some(literal) => self.write(format_args!("  {head} = const {literal}\n")),
                None => {
                    let key = content_key(tensor);
                    self.write(format_args!("  {head} = const @{key}\n"));
                    self.table.insert(key, tensor.clone());
                }
            }
        }
    }

    fn node(&mut self, node: &Node) {
        self.constants(&node.inputs);
        let operands: Vec<String> = node.inputs.iter().map(|&v| self.label(v)).collect();
        let heads: Vec<String> = node.outputs.iter().map(|&v| self.define(v)).collect();
        let mut line = format!("  {} = {}", heads.join(", "), node.op.name());
        for part in attributes(&node.op).into_iter().chain([operands.join(", ")]) {
            if !part.is_empty() {
                line.push(' ');
                line.push_str(&part);
            }
        }
        if !node.origin.is_empty() {
            // Quoted where the bare text would not read back.
            let origin = &node.origin;
            let bare = !origin.starts_with('"')
                && origin.trim() == origin
                && !origin.chars().any(char::is_control);
            line.push_str("  # ");
            line.push_str(&if bare { origin.clone() } else { format!("{origin:?}") });
        }
        self.write(format_args!("{line}\n"));
    }
}

/// What stands between the operator's name and its operands.
fn attributes(op: &Op) -> Vec<String> {
    let word = |set: bool, text: &str| if set { text.to_string() } else { String::new() };
    let eps = |bits: &u64| format!("eps={}", float(f64::from_bits(*bits)));
    match op {
        Op::Map(func) => vec![func.to_string()],
        Op::Reshape(shape) | Op::Expand(shape) | Op::Dims(shape) => vec![list(shape)],
        Op::Permute(perm) => vec![list(perm)],
        Op::Slice { starts, lens, steps } => vec![
            format!("starts={}", list(starts)),
            format!("lens={}", list(lens)),
            format!("steps={}", list(steps)),
        ],
        Op::Pad { lo, hi, mode } => {
            let mode = match mode {
                PadMode::Constant(Value::Float(x)) => format!("constant={}", float(*x)),
                PadMode::Constant(Value::Int(x)) => format!("constant={x}"),
                PadMode::Edge => "edge".to_string(),
                PadMode::Reflect => "reflect".to_string(),
                PadMode::Wrap => "wrap".to_string(),
            };
            vec![format!("lo={}", list(lo)), format!("hi={}", list(hi)), mode]
        }
        Op::Concat(axis) | Op::Gather(axis) | Op::GatherElements(axis) | Op::Iota { axis, .. } => {
            vec![format!("axis={axis}")]
        }
        Op::Reduce { kind, axes, keep } => vec![
            reduce_name(*kind).to_string(),
            format!("axes={}", list(axes)),
            word(*keep, "keep"),
        ],
        Op::ArgReduce { kind, axis, keep, last } => vec![
            reduce_name(*kind).to_string(),
            format!("axis={axis}"),
            word(*keep, "keep"),
            word(*last, "last"),
        ],
        Op::Scan { kind, axis, exclusive, reverse } => vec![
            reduce_name(*kind).to_string(),
            format!("axis={axis}"),
            word(*exclusive, "exclusive"),
            word(*reverse, "reverse"),
        ],
        Op::Contract { lhs, rhs, out, acc, .. } => {
            vec![format!("\"{lhs},{rhs}->{out}\""), format!("acc={acc}")]
        }
        Op::Conv(a) => vec![
            format!("strides={}", list(&a.strides)),
            format!("pads_lo={}", list(&a.pads_lo)),
            format!("pads_hi={}", list(&a.pads_hi)),
            format!("dilations={}", list(&a.dilations)),
            format!("groups={}", a.groups),
        ],
        Op::Window(a) => vec![
            window_name(a.kind).to_string(),
            format!("kernel={}", list(&a.kernel)),
            format!("strides={}", list(&a.strides)),
            format!("pads_lo={}", list(&a.pads_lo)),
            format!("pads_hi={}", list(&a.pads_hi)),
            format!("dilations={}", list(&a.dilations)),
        ],
        Op::Attention(a) => {
            let of = a.score.params().first().map_or(DType::F32, |p| p.dtype);
            let words = [word(a.causal, "causal"), word(a.zeros, "zeros")];
            [vec![format!("score={of} {}", a.score)], words.to_vec()].concat()
        }
        Op::GatherNd { batch } => vec![format!("batch={batch}")],
        Op::ScatterElements { axis, kind } => {
            vec![scatter_name(*kind).to_string(), format!("axis={axis}")]
        }
        Op::ScatterNd { kind } => vec![scatter_name(*kind).to_string()],
        Op::TopK { axis, k, largest } => {
            vec![format!("axis={axis}"), format!("k=[{k}]"), word(*largest, "largest")]
        }
        Op::Random { seed, .. } => vec![format!("seed={seed}")],
        Op::Softmax { axis, log } => vec![format!("axis={axis}"), word(*log, "log")],
        Op::LayerNorm { axis, eps: e } | Op::RmsNorm { axis, eps: e } => {
            vec![format!("axis={axis}"), eps(e)]
        }
        Op::GroupProduct { group } => vec![format!("group={group}")],
        Op::BatchNorm { eps: e } => vec![eps(e)],
        Op::GroupNorm { groups, eps: e } => vec![format!("groups={groups}"), eps(e)],
        Op::Host(host) => {
            let mut parts = vec![format!("{:?}", host.name)];
            for (name, value) in &host.attrs {
                let value = match value {
                    HostAttr::Int(x) => x.to_string(),
                    HostAttr::Float(x) => float(*x),
                    HostAttr::Str(x) => format!("{x:?}"),
                    HostAttr::Ints(x) => list(x),
                    HostAttr::Floats(x) => {
                        format!("f{}", list(&x.iter().map(|&x| float(x)).collect::<Vec<_>>()))
                    }
                };
                parts.push(format!("{name}={value}"));
            }
            parts
        }
    }
}
