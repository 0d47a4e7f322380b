//! States: a model's memory of earlier runs, made longer in place.
//!
//! ```text
//! before:  past = input          present = concat(past, new) = output
//! after:   one memory [.., capacity, ..] of the session; past is its front, new is written behind, present is both
//! ```
//!
//! That holds for inputs that one concatenation alone reads, as its first operand, and whose result is an output: the
//! cache of keys and values of a decoder. They must be the last inputs and the last outputs; what is in front keeps
//! its number.

use crate::lowering::Lowering;
use crate::place::Place;
use std::sync::Arc;
use tilewright_base::{Error, Result};
use tilewright_graph::{Def, Graph, Op, ValueId};
use tilewright_layout::{Dim, Layout};
use tilewright_plan::{Buffer, State, Storage};

/// A state of a graph.
pub(crate) struct Pair {
    past: ValueId,
    present: ValueId,
    output: usize,
    axis: usize,
}

/// The states of a graph; none when they are not its last inputs and outputs.
pub(crate) fn pairs(graph: &Graph) -> Vec<Pair> {
    let users = graph.users();
    let found: Vec<Pair> = graph
        .outputs
        .iter()
        .enumerate()
        .filter_map(|(output, (_, present))| {
            let node = &graph.nodes[graph.producer(*present)?];
            let Op::Concat(axis) = node.op else { return None };
            let past = *node.inputs.first()?;
            let alone = users[past].len() == 1 && !graph.is_output(past);
            let once = node.inputs.iter().filter(|v| **v == past).count() == 1;
            let input = matches!(graph.values[past].def, Def::Input(_));
            let named_once = graph.outputs.iter().filter(|(_, v)| v == present).count() == 1;
            (alone && once && input && named_once).then_some(Pair {
                past,
                present: *present,
                output,
                axis,
            })
        })
        .collect();
    let first_input = graph.inputs.len() - found.len().min(graph.inputs.len());
    let first_output = graph.outputs.len() - found.len().min(graph.outputs.len());
    let last = found
        .iter()
        .all(|p| p.output >= first_output && graph.inputs[first_input..].contains(&p.past));
    if last { found } else { Vec::new() }
}

impl Lowering<'_> {
    /// Gives the states their places. The capacity is the graph's symbol of this name.
    pub(crate) fn keep_states(&mut self, capacity: &Arc<str>) -> Result<()> {
        let graph = self.graph;
        if !graph.symbols.iter().any(|s| s.name == *capacity) {
            return Err(Error::bug(format!("no symbol {capacity} for the capacity of states")));
        }
        for pair in pairs(graph) {
            let number = self.plan.states.len();
            let valid = graph.shape(pair.present).to_vec();
            let mut shape = valid.clone();
            shape[pair.axis] = Dim::sym(capacity.clone());
            let slice = |of: &Layout, len: &Dim| {
                let cut = of.slice(pair.axis, &Dim::new(0), len, 1);
                cut.ok_or_else(|| Error::bug("a slice of a row-major tensor"))
            };
            let layout = slice(&Layout::row_major(&shape), &valid[pair.axis])?;
            let before = slice(&layout, &graph.shape(pair.past)[pair.axis])?;
            let (name, dtype) = (graph.outputs[pair.output].0.clone(), graph.dtype(pair.present));
            let buffer = self.plan.buffers.push(Buffer {
                name: name.clone(),
                value: Some(pair.present.0),
                dtype,
                layout: layout.clone(),
                storage: Storage::State(number),
            });
            self.places.insert(pair.present, Place { buffer, layout });
            self.places.insert(pair.past, Place { buffer, layout: before });
            self.written.insert(pair.output);
            self.plan.states.push(State { name, dtype, shape, valid });
        }
        let count = self.plan.states.len();
        self.plan.inputs.truncate(self.plan.inputs.len() - count);
        self.plan.outputs.truncate(self.plan.outputs.len() - count);
        Ok(())
    }
}
