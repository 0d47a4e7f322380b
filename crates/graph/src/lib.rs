//! Graph IR: tensor programs in SSA form with data types and symbolic shapes.
//!
//! A [`Graph`] is a list of nodes over values. Each value has a [`TensorType`]; a dimension is a
//! number or an expression over the graph's declared symbols (`N in 1..4096`). Operators are the
//! small core that [`Op`] lists, plus composites that frontends create and a pass decomposes.
//!
//! This crate knows no devices, no layouts in memory and no schedules.

mod builder;
mod infer;
mod ir;
mod op;
pub mod text;
mod verify;

pub use builder::GraphBuilder;
pub use infer::infer;
pub use ir::{Def, Graph, Node, NodeId, TensorType, Value, ValueId};
pub use op::{
    AttentionAttrs, ConvAttrs, HostAttr, HostOp, Op, PadMode, ReduceKind, ScatterKind, WindowAttrs,
    WindowKind,
};
pub use text::Constants;
pub use verify::verify;
