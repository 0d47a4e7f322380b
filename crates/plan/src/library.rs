//! [`Library`]: work that a library of kernels has whole and that no tile program of the plan says.
//!
//! A kernel of a plan gives one kind of result for each block of a grid; these read their operands once for several results of
//! different shapes, or are several kernels with memory between them. Their meaning is that of the host operator of the same name
//! (crate `interp`). Parameters count the step's inputs, then its outputs.

use crate::{Attention, Heads};
use tilewright_base::DType;
use tilewright_layout::Dim;

/// What a [`Step::Library`](crate::Step::Library) computes.
#[derive(Clone, Debug, PartialEq)]
pub enum Library {
    /// Attention that also gives the logarithm of each row's sum of exponentials.
    AttentionLse {
        /// The attention.
        attention: Box<Attention>,
        /// Parameter of the logarithms: f32, a dense `[batch, heads, queries]`.
        lse: usize,
    },
    /// The gradients of queries, keys and values.
    AttentionBackward(Box<AttentionBackward>),
    /// The gradient of a layer normalisation.
    LayerNormBackward(LayerNormBackward),
}

/// The gradient of an attention, from its operands, its result and the gradient of that.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionBackward {
    /// The attention; all its tensors are operands, also the result.
    pub forward: Attention,
    /// Parameter of what the forward kernel kept: f32, a dense `[batch, heads, queries]`.
    pub lse: usize,
    /// The gradient of the result.
    pub of_result: Heads,
    /// The gradients of queries, keys and values: results.
    pub gradients: [Heads; 3],
}

/// The gradient of a layer normalisation of the rows of a matrix; all tensors are dense.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNormBackward {
    /// Number of rows.
    pub rows: Dim,
    /// Elements of a row.
    pub columns: Dim,
    /// What is added to the variance.
    pub eps: f64,
    /// Type of all tensors.
    pub dtype: DType,
    /// Parameter of the rows that were normalised.
    pub x: usize,
    /// Parameter of the gradient of the result.
    pub dy: usize,
    /// Parameter of the vector that scales.
    pub scale: usize,
    /// Parameter of another gradient of the rows, which is added to the result's.
    pub other: Option<usize>,
    /// Parameter of the gradient of the rows.
    pub dx: usize,
    /// Parameters of the gradients of the vectors: scale and shift.
    pub vectors: [usize; 2],
}

impl Library {
    /// Name for people: the host operator's.
    pub fn name(&self) -> &'static str {
        match self {
            Library::AttentionLse { .. } => "attention_lse",
            Library::AttentionBackward(_) => "attention_backward",
            Library::LayerNormBackward(_) => "layer_norm_backward",
        }
    }
}
