//! Walks a model: declares inputs, converts nodes in order, inlines functions and branches.
//!
//! Conversion does not stop at the first thing that it cannot do: the results of such a node are
//! *poisoned*, what reads them is skipped, and everything found is reported together.

use super::cx::Cx;
use super::node::{N, Val};
use super::ops;
use super::proto::{
    AttributeProto, DimensionValue, FunctionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, TypeProto, TypeValue, ValueInfoProto,
};
use super::tensor::{Source, dtype_of};
use super::{ImportOptions, Imported};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{Error, Kind, Result, ResultExt};
use tilewright_graph::TensorType;
use tilewright_layout::Dim;

/// Nested functions and branches beyond this are refused.
const DEPTH_LIMIT: usize = 64;
/// More nodes than this after inlining and unrolling are refused.
const NODE_LIMIT: usize = 2_000_000;

/// Names and what they stand for, innermost scope last.
pub(crate) type Scopes = Vec<BTreeMap<String, Val>>;

/// The walk.
pub(crate) struct Walk<'a> {
    pub(crate) cx: Cx,
    pub(crate) source: Source,
    functions: BTreeMap<(String, String, String), &'a FunctionProto>,
    /// What could not be done: message, then the nodes it concerns.
    findings: BTreeMap<String, Vec<String>>,
    depth: usize,
    nodes: usize,
}

/// Versions of operator sets by domain (`ai.onnx` is written `""`).
pub(crate) type Opsets = BTreeMap<String, i64>;

fn normal_domain(domain: &str) -> String {
    if domain == "ai.onnx" { String::new() } else { domain.to_string() }
}

fn opsets(imports: &[OperatorSetIdProto]) -> Opsets {
    imports.iter().map(|o| (normal_domain(&o.domain), o.version)).collect()
}

/// Converts a decoded model.
pub(crate) fn convert(
    model: &ModelProto,
    source: Source,
    options: &ImportOptions,
) -> Result<Imported> {
    let Some(graph) = &model.graph else {
        return Err(Error::user(
            "the file holds no graph: it is not an ONNX model, or a damaged one",
        ));
    };
    let opsets = opsets(&model.opset_import);
    if opsets.is_empty() && !graph.node.is_empty() {
        return Err(Error::user("the model does not say which operator set it uses"));
    }
    let mut walk = Walk {
        cx: Cx::new(&graph.name),
        source,
        functions: BTreeMap::new(),
        findings: BTreeMap::new(),
        depth: 0,
        nodes: 0,
    };
    for f in &model.functions {
        let key = (normal_domain(&f.domain), f.name.clone(), f.overload.clone());
        if walk.functions.insert(key, f).is_some() {
            return Err(Error::user(format!("function `{}` is defined twice", f.name)));
        }
    }
    let mut scopes: Scopes = vec![BTreeMap::new()];
    walk.inputs(graph, options, &mut scopes)?;
    walk.body(&graph.node, &opsets, &mut scopes)?;
    let mut outputs = Vec::new();
    let mut names = BTreeSet::new();
    for info in &graph.output {
        if !names.insert(&info.name) {
            return Err(Error::user(format!("two outputs are named `{}`", info.name)));
        }
        match find(&scopes, &info.name) {
            Some(Val::T(v)) => outputs.push((info.name.clone(), *v)),
            Some(Val::Poison) => {}
            Some(Val::Seq(_) | Val::Absent) => {
                walk.find("a sequence or optional as output", &format!("`{}`", info.name));
            }
            None => {
                return Err(Error::user(format!("nothing computes the output `{}`", info.name)));
            }
        }
    }
    if graph.output.is_empty() {
        return Err(Error::user("the model has no outputs"));
    }
    walk.finish(outputs)
}

/// The innermost meaning of a name.
pub(crate) fn find<'s>(scopes: &'s Scopes, name: &str) -> Option<&'s Val> {
    scopes.iter().rev().find_map(|scope| scope.get(name))
}

fn label(node: &NodeProto) -> String {
    match (node.name.as_str(), node.output.iter().find(|o| !o.is_empty())) {
        ("", Some(out)) => format!("{} -> {out}", node.op_type),
        ("", None) => node.op_type.clone(),
        (name, _) => name.to_string(),
    }
}

impl<'a> Walk<'a> {
    fn find(&mut self, what: &str, node: &str) {
        self.findings.entry(what.to_string()).or_default().push(node.to_string());
    }

    fn finish(self, outputs: Vec<(String, tilewright_graph::ValueId)>) -> Result<Imported> {
        if !self.cx.needed.is_empty() {
            return Ok(Imported::Needs(self.cx.needed.into_iter().collect()));
        }
        if !self.findings.is_empty() {
            let count: usize = self.findings.values().map(Vec::len).sum();
            let mut error = Error::unsupported(format!(
                "the model has {count} node{} beyond what is supported",
                if count == 1 { "" } else { "s" }
            ));
            let mut rows: Vec<_> = self.findings.into_iter().collect();
            rows.sort_by(|a, b| b.1.len().cmp(&a.1.len()).then(a.0.cmp(&b.0)));
            for (what, nodes) in rows {
                let first: Vec<&str> = nodes.iter().take(3).map(String::as_str).collect();
                let more = if nodes.len() > 3 { ", ..." } else { "" };
                error = error.with_note(format!(
                    "{what} ({}x: {}{more})",
                    nodes.len(),
                    first.join(", ")
                ));
            }
            return Err(error);
        }
        let mut b = self.cx.b;
        for (name, v) in outputs {
            b.output(name, v);
        }
        let mut graph = b.finish();
        graph.remove_dead();
        Ok(Imported::Graph(Box::new(graph)))
    }

    /// The type of a declared input.
    fn declared(&mut self, info: &ValueInfoProto, options: &ImportOptions) -> Result<TensorType> {
        let name = &info.name;
        let Some(TypeProto { value: Some(value) }) = &info.r#type else {
            return Err(Error::user(format!("input `{name}` has no type")));
        };
        let TypeValue::Tensor(tensor) = value else {
            return Err(Error::unsupported("an input that is not a tensor"));
        };
        let dtype = dtype_of(tensor.elem_type)?;
        let Some(shape) = &tensor.shape else {
            return Err(Error::unsupported("an input of unknown rank"));
        };
        let mut dims = Vec::with_capacity(shape.dim.len());
        for (i, d) in shape.dim.iter().enumerate() {
            dims.push(match &d.value {
                Some(DimensionValue::Value(v)) if *v >= 0 => Dim::new(*v),
                Some(DimensionValue::Value(v)) if *v < -1 => {
                    return Err(Error::user(format!("input `{name}` has extent {v}")));
                }
                Some(DimensionValue::Param(p)) if !p.is_empty() => {
                    self.cx.b.symbol(&symbol_name(p), options.symbol_range)
                }
                _ => self.cx.b.symbol(&symbol_name(&format!("{name}_{i}")), options.symbol_range),
            });
        }
        Ok(TensorType::new(dtype, dims))
    }

    fn inputs(
        &mut self,
        graph: &GraphProto,
        options: &ImportOptions,
        scopes: &mut Scopes,
    ) -> Result<()> {
        let mut scope = BTreeMap::new();
        self.initialisers(graph, &mut scope)?;
        let mut seen = BTreeSet::new();
        for info in &graph.input {
            if info.name.is_empty() {
                return Err(Error::user("an input without a name"));
            }
            if !seen.insert(&info.name) {
                return Err(Error::user(format!("two inputs are named `{}`", info.name)));
            }
            // An input with an initialiser has a default; the default is what we take.
            if scope.contains_key(&info.name) {
                continue;
            }
            if let Some(tensor) = options.specialise.get(&info.name) {
                let v = self.cx.b.constant(info.name.clone(), tensor.clone());
                scope.insert(info.name.clone(), Val::T(v));
                continue;
            }
            let val = match self.declared(info, options) {
                Ok(ty) => Val::T(self.cx.b.input(info.name.clone(), ty)),
                Err(e) if e.kind() == Kind::Unsupported => {
                    self.find(e.message(), &format!("input `{}`", info.name));
                    Val::Poison
                }
                Err(e) => return Err(e),
            };
            scope.insert(info.name.clone(), val);
        }
        if let Some(scope_slot) = scopes.last_mut() {
            *scope_slot = scope;
        }
        Ok(())
    }

    fn initialisers(
        &mut self,
        graph: &GraphProto,
        scope: &mut BTreeMap<String, Val>,
    ) -> Result<()> {
        for proto in &graph.initializer {
            if proto.name.is_empty() {
                return Err(Error::user("an initialiser without a name"));
            }
            let val = match self.source.tensor(proto) {
                Ok(tensor) => Val::T(self.cx.b.constant(proto.name.clone(), tensor)),
                Err(e) if e.kind() == Kind::Unsupported => {
                    self.find(e.message(), &format!("initialiser `{}`", proto.name));
                    Val::Poison
                }
                Err(e) => return Err(e),
            };
            if scope.insert(proto.name.clone(), val).is_some() {
                return Err(Error::user(format!("two initialisers are named `{}`", proto.name)));
            }
        }
        for sparse in &graph.sparse_initializer {
            let name = sparse.values.as_ref().map(|v| v.name.clone()).unwrap_or_default();
            let tensor = self.source.sparse(sparse)?;
            let v = self.cx.b.constant(name.clone(), tensor);
            scope.insert(name, Val::T(v));
        }
        Ok(())
    }

    /// Converts nodes in an order in which operands come first.
    pub(crate) fn body(
        &mut self,
        nodes: &[NodeProto],
        opsets: &Opsets,
        scopes: &mut Scopes,
    ) -> Result<()> {
        for &i in &schedule(nodes, scopes)? {
            self.node(&nodes[i], opsets, scopes)?;
        }
        Ok(())
    }

    fn node(&mut self, node: &NodeProto, opsets: &Opsets, scopes: &mut Scopes) -> Result<()> {
        self.nodes += 1;
        if self.nodes > NODE_LIMIT {
            return Err(Error::unsupported(format!("more than {NODE_LIMIT} nodes when unrolled")));
        }
        let name = label(node);
        let mut ins = Vec::with_capacity(node.input.len());
        for input in &node.input {
            ins.push(match (input.as_str(), find(scopes, input)) {
                ("", _) => None,
                (_, Some(val)) => Some(val.clone()),
                (_, None) => {
                    return Err(Error::user(format!(
                        "node `{name}` reads `{input}`, which nothing computes"
                    )));
                }
            });
        }
        let domain = normal_domain(&node.domain);
        let key = (domain.clone(), node.op_type.clone(), node.overload.clone());
        let function = self.functions.get(&key).copied();
        let converter = ops::lookup(&domain, &node.op_type);
        let poisoned = ins.iter().flatten().any(|v| matches!(v, Val::Poison));
        if function.is_none() && converter.is_none() {
            let shown = match domain.as_str() {
                "" => node.op_type.clone(),
                domain => format!("{domain}.{}", node.op_type),
            };
            self.find(&format!("operator {shown}"), &name);
        }
        let result = if poisoned || (function.is_none() && converter.is_none()) {
            Ok(vec![Val::Poison; node.output.len()])
        } else {
            self.cx.b.set_origin(name.clone());
            // A domain that is not imported is read as its first version.
            let opset = opsets.get(&domain).copied().unwrap_or(1);
            self.depth += 1;
            let out = if self.depth > DEPTH_LIMIT {
                Err(Error::user("functions or branches are nested too deeply, or call themselves"))
            } else if let Some(function) = function {
                self.call(function, node, ins)
            } else if let Some(converter) = converter {
                let n = N { proto: node, ins, opset };
                match converter {
                    ops::Converter::Plain(f) => f(&mut self.cx, &n),
                    ops::Converter::Walk(f) => f(self, &n, opsets, scopes),
                }
            } else {
                Err(Error::bug("a node with nothing to convert it"))
            };
            self.depth -= 1;
            out
        };
        let results = match result {
            Ok(results) => results,
            Err(e) if e.kind() == Kind::Unsupported => {
                self.find(&format!("{}: {}", node.op_type, e.message()), &name);
                vec![Val::Poison; node.output.len()]
            }
            Err(e) => return Err(e).context(|| format!("node `{name}` ({})", node.op_type)),
        };
        let wanted = node.output.iter().rposition(|o| !o.is_empty()).map_or(0, |i| i + 1);
        if results.len() < wanted {
            self.find(&format!("{} with {wanted} outputs", node.op_type), &name);
        }
        let Some(scope) = scopes.last_mut() else { return Err(Error::bug("no scope")) };
        for (i, output) in node.output.iter().enumerate() {
            if output.is_empty() {
                continue;
            }
            let val = results.get(i).cloned().unwrap_or(Val::Poison);
            if let Val::T(v) = &val
                && self.cx.b.graph().values[*v].name.is_empty()
            {
                self.cx.b.name(*v, output.clone());
            }
            if scope.insert(output.clone(), val).is_some() {
                return Err(Error::user(format!("two nodes compute `{output}`")));
            }
        }
        Ok(())
    }

    /// Inlines a function of the model.
    fn call(
        &mut self,
        function: &'a FunctionProto,
        node: &NodeProto,
        ins: Vec<Option<Val>>,
    ) -> Result<Vec<Val>> {
        if ins.len() > function.input.len() {
            return Err(Error::user(format!(
                "{} operands for function `{}` of {}",
                ins.len(),
                function.name,
                function.input.len()
            )));
        }
        let mut scope = BTreeMap::new();
        let mut ins = ins.into_iter();
        for name in &function.input {
            scope.insert(name.clone(), ins.next().flatten().unwrap_or(Val::Absent));
        }
        let body: Vec<NodeProto> =
            function.node.iter().map(|n| bind_attributes(n, node, function)).collect();
        // A function sees its own names only.
        let mut scopes = vec![scope];
        self.body(&body, &opsets(&function.opset_import), &mut scopes)
            .context(|| format!("function `{}`", function.name))?;
        function
            .output
            .iter()
            .map(|name| {
                find(&scopes, name).cloned().ok_or_else(|| {
                    Error::user(format!("function `{}` does not compute `{name}`", function.name))
                })
            })
            .collect()
    }

    /// Inlines a subgraph with values for its inputs; it sees the names around it.
    pub(crate) fn subgraph(
        &mut self,
        graph: &GraphProto,
        args: &[Val],
        opsets: &Opsets,
        scopes: &mut Scopes,
    ) -> Result<Vec<Val>> {
        let mut scope = BTreeMap::new();
        self.initialisers(graph, &mut scope)?;
        if args.len() != graph.input.len() {
            return Err(Error::user(format!(
                "{} values for a subgraph of {} inputs",
                args.len(),
                graph.input.len()
            )));
        }
        for (info, val) in graph.input.iter().zip(args) {
            scope.insert(info.name.clone(), val.clone());
        }
        scopes.push(scope);
        let done = self.body(&graph.node, opsets, scopes).and_then(|()| {
            graph
                .output
                .iter()
                .map(|info| {
                    find(scopes, &info.name).cloned().ok_or_else(|| {
                        Error::user(format!("nothing computes the output `{}`", info.name))
                    })
                })
                .collect::<Result<Vec<Val>>>()
        });
        scopes.pop();
        done
    }
}

/// Replaces references to the function's attributes by the caller's values or the defaults, in a
/// node and in its subgraphs.
fn bind_attributes(node: &NodeProto, call: &NodeProto, function: &FunctionProto) -> NodeProto {
    let mut out = node.clone();
    out.attribute = node
        .attribute
        .iter()
        .filter_map(|a| {
            if a.ref_attr_name.is_empty() {
                let mut a = a.clone();
                if let Some(g) = &mut a.g {
                    g.node = g.node.iter().map(|n| bind_attributes(n, call, function)).collect();
                }
                return Some(a);
            }
            let given = call.attribute.iter().find(|c| c.name == a.ref_attr_name);
            let default = function.attribute_proto.iter().find(|c| c.name == a.ref_attr_name);
            given.or(default).map(|v| AttributeProto { name: a.name.clone(), ..v.clone() })
        })
        .collect();
    out
}

/// A name that the text forms can hold.
fn symbol_name(name: &str) -> String {
    let mut out: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if !out.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        out.insert(0, 's');
    }
    out
}

/// Positions of nodes, operands before users, otherwise as written. Errors on cycles.
fn schedule(nodes: &[NodeProto], scopes: &Scopes) -> Result<Vec<usize>> {
    let mut producer: BTreeMap<&str, usize> = BTreeMap::new();
    for (i, node) in nodes.iter().enumerate() {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            if producer.insert(output, i).is_some() {
                return Err(Error::user(format!("two nodes compute `{output}`")));
            }
        }
    }
    let here = |name: &str| {
        let outside = scopes.last().is_some_and(|s| s.contains_key(name));
        if outside { None } else { producer.get(name).copied() }
    };
    let reads: Vec<Vec<usize>> = nodes
        .iter()
        .map(|node| {
            let mut names: Vec<&str> = node.input.iter().map(String::as_str).collect();
            for g in node.attribute.iter().filter_map(|a| a.g.as_ref()) {
                captured(g, &mut names);
            }
            let mut list: Vec<usize> = names.into_iter().filter_map(here).collect();
            list.sort_unstable();
            list.dedup();
            list
        })
        .collect();
    // The usual case: already in order.
    if reads.iter().enumerate().all(|(i, r)| r.iter().all(|&p| p < i)) {
        return Ok((0..nodes.len()).collect());
    }
    let mut waiting: Vec<usize> = reads.iter().map(Vec::len).collect();
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for (i, list) in reads.iter().enumerate() {
        for &p in list {
            readers[p].push(i);
        }
    }
    let mut ready: BTreeSet<usize> = (0..nodes.len()).filter(|&i| waiting[i] == 0).collect();
    let mut order = Vec::with_capacity(nodes.len());
    while let Some(i) = ready.pop_first() {
        order.push(i);
        for &r in &readers[i] {
            waiting[r] -= 1;
            if waiting[r] == 0 {
                ready.insert(r);
            }
        }
    }
    if order.len() == nodes.len() {
        return Ok(order);
    }
    let stuck: Vec<String> = (0..nodes.len())
        .filter(|&i| waiting[i] > 0)
        .take(3)
        .map(|i| format!("`{}`", label(&nodes[i])))
        .collect();
    Err(Error::user(format!("the graph has a cycle through {}", stuck.join(", "))))
}

/// Names that a subgraph may take from around it.
fn captured<'g>(graph: &'g GraphProto, names: &mut Vec<&'g str>) {
    for node in &graph.node {
        names.extend(node.input.iter().map(String::as_str));
        for g in node.attribute.iter().filter_map(|a| a.g.as_ref()) {
            captured(g, names);
        }
    }
    names.extend(graph.output.iter().map(|o| o.name.as_str()));
}
