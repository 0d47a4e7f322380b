//! Operators that the interpreter runs on the host, for plans of every device.

use std::sync::Arc;
use tilewright_data::Tensor;
use tilewright_graph::{Graph, NodeId, Op, Value};
use tilewright_interp::graph::{Mode, Options, run_with};
use tilewright_layout::Env;
use tilewright_plan::HostCall;

/// A call of the interpreter for one node.
pub(crate) fn host_call(graph: &Graph, node: NodeId) -> HostCall {
    let mut alone = Graph::new(graph.name.clone());
    let node = &graph.nodes[node];
    alone.symbols = graph.symbols.clone();
    let inputs: Vec<_> = node
        .inputs
        .iter()
        .enumerate()
        .map(|(i, &v)| {
            let def = tilewright_graph::Def::Input(i);
            let value = Value { name: format!("operand {i}"), ty: graph.ty(v).clone(), def };
            alone.values.push(value)
        })
        .collect();
    alone.inputs = inputs.clone();
    let types = node.outputs.iter().map(|&v| graph.ty(v).clone()).collect();
    let id = alone.add_node(node.op.clone(), inputs, types, node.origin.clone());
    alone.order.push(id);
    for (i, &v) in alone.nodes[id].outputs.clone().iter().enumerate() {
        alone.outputs.push((format!("result {i}"), v));
    }
    let name = match &node.op {
        Op::Host(host) => host.name.clone(),
        op if node.origin.is_empty() => op.name().to_string(),
        _ => node.origin.clone(),
    };
    let run = move |operands: &[Tensor], env: &Env| {
        let options = Options { env: env.clone(), ..Options::new(Mode::Exact) };
        Ok(run_with(&alone, operands, &options)?.outputs)
    };
    HostCall { name, run: Arc::new(run) }
}
