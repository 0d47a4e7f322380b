//! Lowering: from a graph to a plan of tile programs with schedules.
//!
//! ```text
//! graph --fuse--> groups --place--> buffers and layouts --per anchor--> kernel + schedule --> plan
//! ```
//!
//! [`fuse`] decides which nodes become one kernel, the module `place` where each value lies (views
//! are layouts, not kernels), one module per anchor writes the tile program, `schedule` picks tile
//! sizes from the target's numbers, and `cost` estimates. What has no kernel becomes a host step.
//!
//! Adding an operator: say in `fuse.rs` what kind of group it starts; if it is a reduction, expand
//! it in `rows.rs`; if it needs a program of its own, a module here with a `*_group` method and an
//! arm in [`lower`]'s match.
//!
//! For a GPU the same groups become the same tile programs, with row-major layouts and other forms
//! beside them: the module `gpu`.
//!
//! This crate knows no text of any target.

mod attention;
mod block;
mod contract;
mod conv;
mod cost;
mod form;
mod fuse;
mod gather;
mod gpu;
mod greedy;
mod group_product;
mod image_runs;
mod lowering;
mod map;
mod moves;
mod norms;
mod place;
mod planner;
mod prologue;
mod rows;
mod schedule;
mod states;
mod survey;
mod taps;
mod target;
mod views;
mod window;
mod winograd;

pub use fuse::{Anchor, Choice, FusionPlan, Group, fuse, is_view};
pub use gpu::attention_fits;
pub use lowering::{lower, lower_with, verify_plan};
pub use norms::{FoldedNorm, NormTimes, norm_times};
pub use target::{CpuTarget, matrix_units};

use tilewright_target::Precision;

/// Layouts that differ from row-major, by value: packed constants, blocked activations.
pub type Layouts = std::collections::BTreeMap<tilewright_graph::ValueId, tilewright_layout::Layout>;

/// Switches of lowering.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which nodes become one kernel.
    pub fusion: Choice,
    /// Arithmetic of `f32` contractions and convolutions.
    pub precision: Precision,
    /// What runs the plan.
    pub device: Device,
    /// The symbol that says for how many positions there is memory in states: inputs that a concatenation makes longer
    /// are then kept by the session (see the module `states`). On a CPU.
    pub states: Option<std::sync::Arc<str>>,
    /// On a GPU, convolutions read their windows through the copy engine, and images have their channels innermost.
    pub windows: bool,
    /// On a GPU, products leave sums over the rows that they make, and make vectors along rows of such sums.
    pub statistics: bool,
    /// On a GPU, products of 16-bit operands compute their left operand where only they read it.
    pub fold: bool,
}

/// What runs a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// Threads of a CPU: packed weights, blocked layouts, tile sizes for its caches.
    #[default]
    Cpu,
    /// A GPU: everything row-major, kernels in other forms beside the tile programs (see the module
    /// `gpu`), schedules picked when the sizes are known.
    Gpu,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            fusion: Choice::Fastest,
            precision: Precision::F32,
            device: Device::Cpu,
            states: None,
            windows: false,
            statistics: false,
            fold: false,
        }
    }
}
