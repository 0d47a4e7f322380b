//! What compilation shows of its stages.

use std::time::Duration;
use tilewright_graph::Graph;
use tilewright_lower::FusionPlan;
use tilewright_plan::Plan;

/// What the graph looks like on its way, for `tw inspect`.
#[derive(Debug)]
pub enum Stage<'a> {
    /// After a graph pass (or `import`, before the first).
    Graph(&'a str, &'a Graph),
    /// The fusion groups.
    Fusion(&'a FusionPlan),
    /// Tile programs and plan.
    Plan(&'a Plan),
    /// LLVM IR of one kernel: name and text.
    Llvm(&'a str, &'a str),
}

/// How long a stage of compilation took.
#[derive(Clone, Debug)]
pub struct StageTime {
    /// Pass or step.
    pub name: String,
    /// Wall time.
    pub time: Duration,
}
