//! The operators, a file per family, and their list.

mod attention;
mod attention_training;
pub(crate) mod bags;
mod cross_entropy;
mod cross_entropy_total;
pub(crate) mod dropout;
mod elementwise;
mod linear;
mod norm;
pub(crate) mod optimizers;
mod rotary;
mod scale;
mod softmax;

pub(crate) use attention::{Attention, AttentionRows};
pub(crate) use attention_training::{AttentionBackward, AttentionLse};
pub(crate) use bags::{EmbeddingBag, EmbeddingBagBackward, EmbeddingBagWeightsBackward};
pub(crate) use cross_entropy::{CrossEntropy, CrossEntropyBackward, CrossEntropyBoth};
pub(crate) use cross_entropy_total::CrossEntropyTotal;
pub(crate) use dropout::{Dropout, DropoutDrawn};
pub(crate) use elementwise::{Map, MapBackward, Numbered};
pub use elementwise::{formula, number_of, variables};
pub(crate) use linear::{ColumnSums, Linear};
pub(crate) use norm::{
    AddLayerNorm, AddRmsNorm, LayerNorm, LayerNormBackward, RmsNorm, RmsNormBackward,
};
#[cfg(test)]
pub(crate) use optimizers::table_definitions;
pub(crate) use optimizers::{AdamW, GradientNorm, Lion};
pub(crate) use rotary::Rotary;
pub(crate) use scale::Scale;
pub(crate) use softmax::{Softmax, SoftmaxBackward};

/// Calls a macro of this crate with the types of all operators.
macro_rules! for_each_operator {
    ($macro:ident) => {
        $macro! {
            $crate::ops::RmsNorm<true>,
            $crate::ops::RmsNorm<false>,
            $crate::ops::AddRmsNorm<true>,
            $crate::ops::AddRmsNorm<false>,
            $crate::ops::RmsNormBackward,
            $crate::ops::LayerNorm<true>,
            $crate::ops::LayerNorm<false>,
            $crate::ops::AddLayerNorm<true>,
            $crate::ops::AddLayerNorm<false>,
            $crate::ops::LayerNormBackward,
            $crate::ops::Softmax,
            $crate::ops::SoftmaxBackward,
            $crate::ops::Map<0>,
            $crate::ops::Map<1>,
            $crate::ops::Map<2>,
            $crate::ops::Numbered<1>,
            $crate::ops::Numbered<2>,
            $crate::ops::MapBackward<0>,
            $crate::ops::MapBackward<1>,
            $crate::ops::MapBackward<2>,
            $crate::ops::CrossEntropy,
            $crate::ops::CrossEntropyBackward,
            $crate::ops::CrossEntropyBoth,
            $crate::ops::CrossEntropyTotal<true>,
            $crate::ops::CrossEntropyTotal<false>,
            $crate::ops::Scale,
            $crate::ops::Rotary,
            $crate::ops::Linear<false>,
            $crate::ops::Linear<true>,
            $crate::ops::ColumnSums,
            $crate::ops::Attention,
            $crate::ops::AttentionRows,
            $crate::ops::AttentionLse,
            $crate::ops::AttentionBackward,
            $crate::ops::AdamW,
            $crate::ops::Lion,
            $crate::ops::GradientNorm,
            $crate::ops::Dropout,
            $crate::ops::DropoutDrawn,
            $crate::ops::EmbeddingBag<true>,
            $crate::ops::EmbeddingBag<false>,
            $crate::ops::EmbeddingBagBackward,
            $crate::ops::EmbeddingBagWeightsBackward,
        }
    };
}
pub(crate) use for_each_operator;

/// Graphs of all operators for small rows, by name.
#[cfg(test)]
pub(crate) fn samples() -> Vec<(String, String)> {
    let families = [
        norm::samples(),
        softmax::samples(),
        elementwise::samples(),
        cross_entropy::samples(),
        rotary::samples(),
        linear::samples(),
        dropout::samples(),
        attention::samples(),
    ];
    families.concat()
}
