//! The verifier: every promise of the IR, checked; all violations are reported at once.
//!
//! A graph is well-formed when
//!
//! 1. `order` names existing nodes, each at most once, and every operand of a live node is an input,
//!    a constant, or a result of an earlier live node; so is every output;
//! 2. input `i` says `Def::Input(i)`, and no other value says it is an input; a node's results point
//!    back to it with their number, in order;
//! 3. the types of a node's results are what [`infer`] gives for its operands;
//! 4. a constant's type is its data's;
//! 5. symbols are declared once, are identifiers, and have non-empty ranges; every symbol in the
//!    type of an input, of a live node's result, or in an operator's sizes is declared; one that a
//!    host operator introduces (as a plain dimension of a result) and no input has is not used
//!    before that operator;
//! 6. no dimension is a negative number;
//! 7. attributes are in range: steps not 0, strides, dilations and kernels at least 1, group counts
//!    at least 1, accumulators no narrower a class than their operands (float for floats, integer
//!    for integers), `eps` finite and not negative, contraction letters alphabetic, host attributes
//!    sorted by name;
//! 8. inputs and outputs have unique names, and each graph has an output.

use crate::infer::infer;
use crate::ir::{Def, Graph, Node, NodeId, TensorType, ValueId};
use crate::op::Op;
use std::collections::BTreeSet;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_layout::Dim;

/// Checks every promise in the module's head. The error is our bug (the frontends check what comes
/// from outside first) and notes every violation.
pub fn verify(graph: &Graph) -> Result<()> {
    let mut checker = Checker { graph, found: Vec::new(), pending: BTreeSet::new() };
    checker.symbols();
    checker.inputs();
    checker.nodes();
    checker.outputs();
    let found = checker.found;
    if found.is_empty() {
        return Ok(());
    }
    let count = found.len();
    let error =
        Error::bug(format!("graph `{}` is not well-formed: {count} violations", graph.name));
    Err(found.into_iter().fold(error, Error::with_note))
}

struct Checker<'a> {
    graph: &'a Graph,
    found: Vec<String>,
    /// Symbols that only a later host operator gives a value.
    pending: BTreeSet<Arc<str>>,
}

impl Checker<'_> {
    fn report(&mut self, message: impl Into<String>) {
        self.found.push(message.into());
    }

    fn symbols(&mut self) {
        let mut seen = BTreeSet::new();
        for symbol in &self.graph.symbols {
            let name = &symbol.name;
            let mut chars = name.chars();
            let identifier = chars.next().is_some_and(|c| c.is_alphabetic() || c == '_')
                && chars.all(|c| c.is_alphanumeric() || c == '_' || c == '.');
            if !identifier {
                self.report(format!("symbol name {name:?} is not an identifier"));
            }
            if !seen.insert(name.clone()) {
                self.report(format!("symbol {name} is declared twice"));
            }
            if symbol.range.min > symbol.range.max {
                self.report(format!("symbol {name} has an empty range"));
            }
        }
    }

    fn dim(&mut self, dim: &Dim, place: &str) {
        let graph = self.graph;
        if dim.as_const().is_some_and(|d| d < 0) {
            self.report(format!("{place}: negative size {dim}"));
        }
        let mut unknown = BTreeSet::new();
        dim.for_each_symbol(&mut |name| {
            if !graph.symbols.iter().any(|s| s.name == *name) {
                unknown.insert((name.clone(), "is not declared"));
            } else if self.pending.contains(name) {
                unknown.insert((name.clone(), "is used before the operator that finds it"));
            }
        });
        for (name, problem) in unknown {
            self.report(format!("{place}: symbol {name} {problem}"));
        }
    }

    fn ty(&mut self, ty: &TensorType, place: &str) {
        for dim in &ty.shape {
            self.dim(dim, place);
        }
    }

    fn inputs(&mut self) {
        let graph = self.graph;
        let mut names = BTreeSet::new();
        for (i, &v) in graph.inputs.iter().enumerate() {
            let Some(value) = graph.values.get(v) else {
                self.report(format!("input {i} is {v}, which does not exist"));
                continue;
            };
            if !matches!(value.def, Def::Input(n) if n == i) {
                self.report(format!("{v} is input {i}, and says it is {}", place_of(&value.def)));
            }
            if !names.insert(&value.name) {
                self.report(format!("two inputs are called `{}`", value.name));
            }
            self.ty(&value.ty, &format!("input `{}`", value.name));
        }
        for (v, value) in graph.values.iter() {
            match &value.def {
                Def::Input(n) if graph.inputs.get(*n) != Some(&v) => {
                    self.report(format!("{v} says it is input {n}, and is not"));
                }
                Def::Const(tensor) => {
                    let fits = value.ty.dtype == tensor.dtype()
                        && value.ty.const_shape().as_deref() == Some(tensor.shape());
                    if !fits {
                        self.report(format!(
                            "constant {v} is {}, its data {}{:?}",
                            value.ty,
                            tensor.dtype(),
                            tensor.shape()
                        ));
                    }
                }
                _ => {}
            }
        }
    }

    fn nodes(&mut self) {
        let graph = self.graph;
        let mut placed: BTreeSet<NodeId> = BTreeSet::new();
        let introduces = |node: &Node| match &node.op {
            Op::Host(host) => host.types.iter().flat_map(plain_symbols).collect(),
            _ => Vec::new(),
        };
        let live = graph.order.iter().filter_map(|&id| graph.nodes.get(id));
        self.pending = live.flat_map(introduces).collect();
        for ty in graph.inputs.iter().filter_map(|&v| graph.values.get(v)).map(|v| &v.ty) {
            plain_symbols(ty).for_each(|name| _ = self.pending.remove(&name));
        }
        for &id in &graph.order {
            let Some(node) = graph.nodes.get(id) else {
                self.report(format!("the order has {id}, which does not exist"));
                continue;
            };
            let place = match node.origin.as_str() {
                "" => format!("{id} ({})", node.op.name()),
                origin => format!("{id} ({} from `{origin}`)", node.op.name()),
            };
            let mut known = true;
            for &v in &node.inputs {
                known &= self.available(v, &placed, &place);
            }
            if !placed.insert(id) {
                self.report(format!("{place} is in the order twice"));
            }
            for (i, &v) in node.outputs.iter().enumerate() {
                match graph.values.get(v).map(|value| &value.def) {
                    Some(Def::Node(n, k)) if *n == id && *k == i => {}
                    Some(def) => {
                        let says = place_of(def);
                        self.report(format!("{place}: result {i} is {v}, which says it is {says}"));
                    }
                    None => {
                        self.report(format!("{place}: result {i} is {v}, which does not exist"));
                        known = false;
                    }
                }
            }
            introduces(node).iter().for_each(|name| _ = self.pending.remove(name));
            self.attributes(node, &place);
            if known {
                self.types(node, &place);
            }
        }
    }

    /// Reports an operand or output that is not there yet; false when its type cannot be asked.
    fn available(&mut self, v: ValueId, placed: &BTreeSet<NodeId>, place: &str) -> bool {
        match self.graph.values.get(v).map(|value| &value.def) {
            None => {
                self.report(format!("{place} reads {v}, which does not exist"));
                false
            }
            Some(Def::Node(node, i)) => {
                let made =
                    self.graph.nodes.get(*node).is_some_and(|n| n.outputs.get(*i) == Some(&v));
                if !made {
                    self.report(format!("{place} reads {v}, which {node} does not make"));
                } else if !placed.contains(node) {
                    self.report(format!("{place} reads {v} before {node} makes it"));
                }
                true
            }
            Some(_) => true,
        }
    }

    fn types(&mut self, node: &Node, place: &str) {
        let graph = self.graph;
        let operands: Vec<TensorType> = node.inputs.iter().map(|&v| graph.ty(v).clone()).collect();
        for &v in &node.outputs {
            self.ty(graph.ty(v), place);
        }
        match infer(&node.op, &operands) {
            Err(e) => self.report(format!("{place}: {}", e.message())),
            Ok(types) if types.len() != node.outputs.len() => {
                self.report(format!(
                    "{place}: {} results, the operator has {}",
                    node.outputs.len(),
                    types.len()
                ));
            }
            Ok(types) => {
                for (&v, ty) in node.outputs.iter().zip(types) {
                    if *graph.ty(v) != ty {
                        self.report(format!("{place}: {v} is {}, not {ty}", graph.ty(v)));
                    }
                }
            }
        }
    }

    fn attributes(&mut self, node: &Node, place: &str) {
        for_each_dim(&node.op, &mut |dim, sign| {
            if sign == Sign::Any && dim.as_const().is_some() {
                return;
            }
            self.dim(dim, place);
        });
        let dtype = |i: usize| {
            node.inputs.get(i).and_then(|&v| self.graph.values.get(v)).map(|value| value.ty.dtype)
        };
        let mut problems: Vec<String> = Vec::new();
        let mut check = |ok: bool, message: &str| {
            if !ok {
                problems.push(message.to_string());
            }
        };
        match &node.op {
            Op::Slice { steps, .. } => check(!steps.contains(&0), "a slice step is 0"),
            Op::Conv(a) => {
                let least = a.strides.iter().chain(&a.dilations).all(|&s| s >= 1);
                check(least, "a stride or dilation is below 1");
            }
            Op::Window(a) => {
                let all = a.strides.iter().chain(&a.dilations).chain(&a.kernel);
                check(all.into_iter().all(|&s| s >= 1), "a kernel, stride or dilation is below 1");
            }
            Op::Contract { lhs, rhs, out, acc, .. } => {
                let letters =
                    [lhs, rhs, out].into_iter().all(|s| s.chars().all(char::is_alphabetic));
                check(letters, "contraction letters are not alphabetic");
                let mut seen = BTreeSet::new();
                check(out.chars().all(|c| seen.insert(c)), "a result letter occurs twice");
                for operand in [dtype(0), dtype(1)].into_iter().flatten() {
                    let fits = acc.is_float() || (acc.is_int() && !operand.is_float());
                    check(fits && *acc != DType::Bool, &format!("{operand} accumulated in {acc}"));
                }
            }
            Op::GroupProduct { group } => check(*group >= 1, "groups of less than one"),
            Op::LayerNorm { eps, .. }
            | Op::RmsNorm { eps, .. }
            | Op::BatchNorm { eps }
            | Op::GroupNorm { eps, .. } => {
                let eps = f64::from_bits(*eps);
                check(eps.is_finite() && eps >= 0.0, "eps is negative or not finite");
                if let Op::GroupNorm { groups, .. } = &node.op {
                    check(*groups >= 1, "fewer than one group");
                }
            }
            Op::Random { ty, .. } => check(ty.dtype.is_float(), "random numbers are floats"),
            Op::Host(host) => {
                let sorted = host.attrs.windows(2).all(|w| w[0].0 < w[1].0);
                check(sorted, "host attributes are not sorted by name");
            }
            _ => {}
        }
        for problem in problems {
            self.report(format!("{place}: {problem}"));
        }
    }

    fn outputs(&mut self) {
        let graph = self.graph;
        if graph.outputs.is_empty() {
            self.report("there is no output");
        }
        let placed: BTreeSet<NodeId> = graph.order.iter().copied().collect();
        let mut names = BTreeSet::new();
        for (name, v) in &graph.outputs {
            self.available(*v, &placed, &format!("output `{name}`"));
            if !names.insert(name) {
                self.report(format!("two outputs are called `{name}`"));
            }
        }
    }
}

/// The symbols that are plain dimensions of a type.
fn plain_symbols(ty: &TensorType) -> impl Iterator<Item = Arc<str>> {
    ty.shape.iter().filter_map(|d| d.as_symbol().cloned())
}

fn place_of(def: &Def) -> String {
    match def {
        Def::Input(i) => format!("input {i}"),
        Def::Const(_) => "a constant".to_string(),
        Def::Node(node, i) => format!("result {i} of {node}"),
    }
}

/// Whether a size may be negative.
#[derive(Clone, Copy, PartialEq)]
enum Sign {
    /// A coordinate or an amount of padding.
    Any,
    /// An extent.
    NotNegative,
}

/// Calls `visit` with every size in the operator's attributes.
fn for_each_dim(op: &Op, visit: &mut dyn FnMut(&Dim, Sign)) {
    let mut all = |dims: &[Dim], sign: Sign| dims.iter().for_each(|d| visit(d, sign));
    match op {
        Op::Reshape(shape) | Op::Expand(shape) => all(shape, Sign::NotNegative),
        Op::Dims(dims) => all(dims, Sign::Any),
        Op::Slice { starts, lens, .. } => {
            all(starts, Sign::Any);
            all(lens, Sign::NotNegative);
        }
        Op::Pad { lo, hi, .. } => {
            all(lo, Sign::Any);
            all(hi, Sign::Any);
        }
        Op::TopK { k, .. } => visit(k, Sign::NotNegative),
        Op::Iota { ty, .. } | Op::Random { ty, .. } => all(&ty.shape, Sign::NotNegative),
        Op::Host(host) => host.types.iter().for_each(|ty| all(&ty.shape, Sign::NotNegative)),
        Op::Map(_)
        | Op::Permute(_)
        | Op::Concat(_)
        | Op::Reduce { .. }
        | Op::ArgReduce { .. }
        | Op::Scan { .. }
        | Op::Contract { .. }
        | Op::GroupProduct { .. }
        | Op::Conv(_)
        | Op::Window(_)
        | Op::Attention(_)
        | Op::Gather(_)
        | Op::GatherElements(_)
        | Op::GatherNd { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::Softmax { .. }
        | Op::LayerNorm { .. }
        | Op::RmsNorm { .. }
        | Op::BatchNorm { .. }
        | Op::GroupNorm { .. } => {}
    }
}
