//! Graph rewrites, one file each, and the pass manager that verifies and times them.
//!
//! [`PIPELINE`] is the whole story: stages in order, each with the reason why it stands there.
//! [`run`] carries it out. A pass is a function from a graph to the same computation written
//! better; it names its side conditions in its file's head, with the program before and after.
//! Passes know no machine: the few numbers that depend on one come in [`PassContext`].
//!
//! To add a pass: a file here with `pub fn run(&mut Graph, &PassContext) -> Result<bool>` (true
//! when something changed) and an entry in [`PIPELINE`].

mod cancel_views;
mod cse;
mod dead_code;
mod decompose;
mod edit;
mod fold_constants;
mod fold_norms;
mod histogram;
mod infer_shapes;
mod join_maps;
mod join_products;
mod layout;
mod lift_reshapes;
mod manager;
mod pack_weights;
mod recognise;
mod round_late;
mod simplify;
mod simplify_map;
mod split_reductions;
mod unmerge;
mod view;
mod widen_constants;

pub use decompose::{decompose_all, decompose_products};
pub use fold_norms::fold_norms;
pub use histogram::{Histogram, op_name};
pub use join_maps::join_maps;
pub use join_products::join_products;
pub use layout::{Layouts, choose_layouts};
pub use lift_reshapes::lift_reshapes;
pub use manager::{
    Group, Observer, PIPELINE, Pass, PassContext, Report, StageTime, find_pass, run, run_observed,
};
pub use round_late::round_late;
pub use split_reductions::split_reductions;
pub use widen_constants::widen_constants;
