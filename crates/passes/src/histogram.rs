//! Counts of operators: the shortest picture of a graph.

use std::collections::BTreeMap;
use std::fmt;
use tilewright_graph::{Graph, Op};

/// How often each operator occurs; prints as `contract 96, map 120`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram(pub BTreeMap<String, usize>);

impl Histogram {
    /// Counts the live nodes.
    pub fn of(graph: &Graph) -> Histogram {
        let mut counts = BTreeMap::new();
        for (_, node) in graph.live() {
            *counts.entry(op_name(&node.op)).or_insert(0) += 1;
        }
        Histogram(counts)
    }

    /// How often an operator occurs.
    pub fn count(&self, name: &str) -> usize {
        self.0.get(name).copied().unwrap_or(0)
    }
}

impl fmt::Display for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(name, n)| format!("{name} {n}")).collect();
        f.write_str(&parts.join(", "))
    }
}

/// The name of an operator; host operators as `host nonzero`.
pub fn op_name(op: &Op) -> String {
    match op {
        Op::Host(host) => format!("host {}", host.name),
        _ => op.name().to_string(),
    }
}
