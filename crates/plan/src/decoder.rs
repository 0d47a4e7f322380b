//! [`Decoder`]: a language model taken apart, for those who run it step by step with a cache of keys and values.
//!
//! What is computed is fixed: norm, attention with rotated queries and keys, gated feed-forward, as in Llama.

use tilewright_data::Tensor;

/// A decoder taken apart, for those who run it step by step: sizes, and weights as they are stored.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Width of the hidden states.
    pub hidden: i64,
    /// Heads of the queries.
    pub heads: i64,
    /// Heads of keys and values.
    pub kv_heads: i64,
    /// Width of a head.
    pub width: i64,
    /// Width of the feed-forward part.
    pub inner: i64,
    /// Words.
    pub vocabulary: i64,
    /// Added to means of squares.
    pub eps: f64,
    /// The activation of the feed-forward part, as text.
    pub gate: String,
    /// The longest sequence.
    pub most_tokens: i64,
    /// Angle of each pair of a head's coordinates at position 1.
    pub frequencies: Vec<f64>,
    /// `[vocabulary, hidden]`
    pub table: Tensor,
    /// In order.
    pub layers: Vec<DecoderLayer>,
    /// `[hidden]`
    pub norm: Tensor,
    /// `[vocabulary, hidden]`; none when it is the table.
    pub head: Option<Tensor>,
}

/// One layer of a [`Decoder`]. Matrices are `[to, from]`.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// Scale of the norm before attention.
    pub input_norm: Tensor,
    /// Of queries, keys and values.
    pub qkv: Vec<Tensor>,
    /// The same; none or three.
    pub qkv_bias: Vec<Tensor>,
    /// Of attention's result.
    pub o: Tensor,
    /// Its bias.
    pub o_bias: Option<Tensor>,
    /// Scale of the norm before the feed-forward part.
    pub post_norm: Tensor,
    /// What goes through the activation.
    pub gate: Tensor,
    /// What it is multiplied with.
    pub up: Tensor,
    /// Bias of the first.
    pub gate_bias: Option<Tensor>,
    /// Bias of the second.
    pub up_bias: Option<Tensor>,
    /// Back to the hidden width.
    pub down: Tensor,
    /// Its bias.
    pub down_bias: Option<Tensor>,
}
