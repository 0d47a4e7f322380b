//! [`Decoder`]: a language model taken apart, for those who run it step by step with a cache of keys and values.
//!
//! The frame is fixed: norm, attention, norm, feed-forward, each added to what came in. Llama and its kin have RMS norms, rotated
//! queries and keys and a gated feed-forward part; GPT-2 has layer norms, a table of positions and a plain one.

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
    /// Layer norms, with shifts; otherwise RMS norms.
    pub centred: bool,
    /// The activation of the feed-forward part, as text.
    pub act: String,
    /// Matrices of layers are `[from, to]`.
    pub turned: bool,
    /// The longest sequence.
    pub most_tokens: i64,
    /// Angle of each pair of a head's coordinates at position 1: zeros where nothing turns.
    pub frequencies: Vec<f64>,
    /// What is added to each token's vector for its position, `[positions, hidden]`.
    pub positions: Option<Tensor>,
    /// `[vocabulary, hidden]`
    pub table: Tensor,
    /// In order.
    pub layers: Vec<DecoderLayer>,
    /// The last norm.
    pub norm: DecoderNorm,
    /// `[vocabulary, hidden]`; none when it is the table.
    pub head: Option<Tensor>,
}

/// A norm: `[hidden]` each.
#[derive(Clone, Debug)]
pub struct DecoderNorm {
    /// Factors.
    pub gain: Tensor,
    /// What is added, by a layer norm.
    pub shift: Option<Tensor>,
}

/// One layer of a [`Decoder`]. Matrices are `[to, from]` unless the decoder says otherwise.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// The norm before attention.
    pub input_norm: DecoderNorm,
    /// Of queries, keys and values; one tensor for all three, or three.
    pub qkv: Vec<Tensor>,
    /// The same, or none.
    pub qkv_bias: Vec<Tensor>,
    /// Gains of the norms over each head of queries and keys, `[width]`; none or two.
    pub head_norms: Vec<Tensor>,
    /// Positions that a token sees, its own included; all when it is none.
    pub window: Option<i64>,
    /// Factor of the scores.
    pub scale: f64,
    /// Of attention's result.
    pub o: Tensor,
    /// Its bias.
    pub o_bias: Option<Tensor>,
    /// The norm before the feed-forward part.
    pub post_norm: DecoderNorm,
    /// What goes through the activation and multiplies the other; none: the other goes through it.
    pub gate: Option<Tensor>,
    /// From the hidden to the inner width.
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
