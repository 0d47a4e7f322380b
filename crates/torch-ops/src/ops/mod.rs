//! The operators, a file per family, and their list.

mod cross_entropy;
mod elementwise;
mod norm;
mod softmax;

pub(crate) use cross_entropy::{CrossEntropy, CrossEntropyBackward};
pub use elementwise::variables;
pub(crate) use elementwise::{Map, MapBackward};
pub(crate) use norm::{
    AddLayerNorm, AddRmsNorm, LayerNorm, LayerNormBackward, RmsNorm, RmsNormBackward,
};
pub(crate) use softmax::{Softmax, SoftmaxBackward};

/// Calls a macro of this crate with the types of all operators.
macro_rules! for_each_operator {
    ($macro:ident) => {
        $macro! {
            $crate::ops::RmsNorm,
            $crate::ops::AddRmsNorm,
            $crate::ops::RmsNormBackward,
            $crate::ops::LayerNorm,
            $crate::ops::AddLayerNorm,
            $crate::ops::LayerNormBackward,
            $crate::ops::Softmax,
            $crate::ops::SoftmaxBackward,
            $crate::ops::Map,
            $crate::ops::MapBackward,
            $crate::ops::CrossEntropy,
            $crate::ops::CrossEntropyBackward,
        }
    };
}
pub(crate) use for_each_operator;
