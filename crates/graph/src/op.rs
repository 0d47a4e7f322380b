//! The operators of the graph IR.
//!
//! Three groups: the *core*, which lowering knows; *composites*, which frontends create and the
//! decomposition pass rewrites into the core (or lowering takes whole); and *host operators*, which
//! run as written in the interpreter, on the host (sort, string-free odds and ends): correct, slow.
//!
//! Adding an operator: a variant here, its type rule in `infer.rs`, its text form in `text.rs`, its
//! meaning in the crate `interp`; the exhaustive matches lead the way.

use tilewright_base::DType;
use tilewright_expr::Func;
use tilewright_layout::Dim;

/// How a reduction or scan combines elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReduceKind {
    /// Sum; of nothing 0.
    Sum,
    /// Product; of nothing 1.
    Prod,
    /// Largest; NaN wins; of nothing the smallest value of the type.
    Max,
    /// Smallest; NaN wins; of nothing the largest value of the type.
    Min,
}

/// What a scatter does where it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScatterKind {
    /// Overwrites; the last update in row-major order wins.
    Set,
    /// Adds.
    Add,
    /// Multiplies.
    Mul,
    /// Keeps the larger.
    Max,
    /// Keeps the smaller.
    Min,
}

/// What padding is filled with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PadMode {
    /// One value (as `f64`; exact for every value that occurs in models).
    Constant(tilewright_expr::Value),
    /// The nearest edge element.
    Edge,
    /// Mirror without repeating the edge.
    Reflect,
    /// Periodic.
    Wrap,
}

/// What a pooling window computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WindowKind {
    /// Largest; padding never wins.
    Max,
    /// Sum; padding counts 0.
    Sum,
    /// Mean over the elements inside the tensor.
    Mean,
    /// Mean over the whole window, padding included.
    MeanWithPad,
}

/// Convolution geometry. Data is `[N, C, spatial...]`, weights `[O, C/groups, spatial...]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConvAttrs {
    /// One per spatial axis.
    pub strides: Vec<i64>,
    /// Zeros in front of each spatial axis.
    pub pads_lo: Vec<i64>,
    /// Zeros behind each spatial axis.
    pub pads_hi: Vec<i64>,
    /// Distance between kernel taps.
    pub dilations: Vec<i64>,
    /// Channel groups; equal to the channel count for depthwise convolution.
    pub groups: i64,
}

/// Pooling geometry. Data is `[N, C, spatial...]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WindowAttrs {
    /// What is computed.
    pub kind: WindowKind,
    /// Window extent per spatial axis.
    pub kernel: Vec<i64>,
    /// One per spatial axis.
    pub strides: Vec<i64>,
    /// Padding in front.
    pub pads_lo: Vec<i64>,
    /// Padding behind (with ceil mode already folded in by the frontend).
    pub pads_hi: Vec<i64>,
    /// Distance between taps.
    pub dilations: Vec<i64>,
}

/// `softmax(score(q k^T, extras...)) v` over the last two axes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AttentionAttrs {
    /// Applied to each raw dot product before the softmax. Its first parameter is the dot product,
    /// the others are the node's extra inputs, broadcast to `[B, H, S, T]`. Scaling and additive
    /// masks are written here.
    pub score: Func,
    /// Position `t` is hidden from position `s` when `t > s + (T - S)`.
    pub causal: bool,
    /// A row whose scores are all minus infinity has weights 0, as in PyTorch's attention. Its softmax would be NaN, and is without.
    pub zeros: bool,
}

/// An attribute of a host operator.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the payloads are the documentation")]
pub enum HostAttr {
    Int(i64),
    Float(f64),
    Str(String),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
}

/// An operator that the interpreter runs on the host, by name. The name and attributes are those of
/// the registry in the crate `interp`.
#[derive(Clone, Debug, PartialEq)]
pub struct HostOp {
    /// Registered name, e.g. `nonzero`.
    pub name: String,
    /// Attributes by name, sorted by name.
    pub attrs: Vec<(String, HostAttr)>,
    /// Types of the results. Sizes that depend on data are symbols that this node introduces.
    pub types: Vec<crate::TensorType>,
}

/// An operator; its operands and results are the node's.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    // ---- core: elementwise and data movement -------------------------------------------------
    /// `out[i] = func(in0[i], in1[i], ...)`, operands broadcast by NumPy's rule.
    /// Result type: the function's.
    Map(Func),
    /// `out[i] = data[reshaped]`: the same elements in row-major order under another shape.
    Reshape(Vec<Dim>),
    /// Axis `i` of the result is axis `perm[i]` of the operand.
    Permute(Vec<usize>),
    /// Broadcast to a shape by NumPy's rule.
    Expand(Vec<Dim>),
    /// Per axis: first coordinate, length, step (negative walks back from the start).
    Slice {
        /// First coordinate per axis.
        starts: Vec<Dim>,
        /// Number of elements per axis.
        lens: Vec<Dim>,
        /// Step per axis, not 0.
        steps: Vec<i64>,
    },
    /// Grows each axis on both sides. Negative amounts crop.
    Pad {
        /// Elements in front, per axis.
        lo: Vec<Dim>,
        /// Elements behind, per axis.
        hi: Vec<Dim>,
        /// What they hold.
        mode: PadMode,
    },
    /// Joins operands along an axis.
    Concat(usize),
    /// `out[..., i, ...] = i` along `axis`, of any numeric type.
    Iota {
        /// Result type.
        ty: crate::TensorType,
        /// The counting axis.
        axis: usize,
    },
    /// A vector of `i64` holding the values of dimensions (`Shape` of a tensor).
    Dims(Vec<Dim>),

    // ---- core: reductions ---------------------------------------------------------------------
    /// Combines over axes, which become extent 1 (`keep`) or vanish.
    Reduce {
        /// How.
        kind: ReduceKind,
        /// Which axes, ascending.
        axes: Vec<usize>,
        /// Keep them with extent 1.
        keep: bool,
    },
    /// Position (`i64`) of the largest or smallest element along an axis; NaN counts as extreme.
    ArgReduce {
        /// `Max` or `Min`.
        kind: ReduceKind,
        /// Along which axis.
        axis: usize,
        /// Keep it with extent 1.
        keep: bool,
        /// Among equals the last position instead of the first.
        last: bool,
    },
    /// Running combination along an axis.
    Scan {
        /// How.
        kind: ReduceKind,
        /// Along which axis.
        axis: usize,
        /// Leave out the element itself.
        exclusive: bool,
        /// From the end.
        reverse: bool,
    },

    // ---- core: contractions ---------------------------------------------------------------------
    /// Einsum of two operands: letters name axes (`bmk,bkn->bmn`), letters missing from the result
    /// are summed. Extents of one letter are equal or 1 (which stretches). Products and sums are
    /// taken in `acc`, the result is rounded to `out`.
    Contract {
        /// Letters of the first operand.
        lhs: String,
        /// Letters of the second operand.
        rhs: String,
        /// Letters of the result.
        out: String,
        /// Accumulation type.
        acc: DType,
        /// Result type.
        dtype: DType,
    },
    /// Product with a matrix that is stored in few bits, with a scale for each group of its depth. Operands x
    /// `[..., K]`, codes `[N, K]` (integers of 4 or 8 bits), scales `[N, ceil(K/group)]` (floats), and optionally zeros
    /// of the scales' shape, floats too:
    /// `out[..., n] = sum over k of x[..., k] * (codes[n, k] - zeros[n, k/group]) * scales[n, k/group]`.
    /// Sums are taken in the type in which x computes; the result has the type of x. A scale that is not finite gives
    /// its column results that are not.
    ///
    /// x may be in codes as well: of `i8`, followed behind the scales by its own scales `[..., ceil(K/group)]` (floats,
    /// of the result's type). Each element stands for its product with the scale of its group.
    GroupProduct {
        /// Neighbours of the depth that share a scale; the last group may be shorter.
        group: i64,
    },
    /// Convolution (cross-correlation): operands data `[N,C,...]` and weights `[O,C/g,...]`.
    Conv(ConvAttrs),
    /// Pooling over data `[N,C,...]`.
    Window(WindowAttrs),
    /// Operands q `[B,H,S,D]`, k `[B,G,T,D]`, v `[B,G,T,E]` with H a multiple of G, then extras.
    /// Result `[B,H,S,E]`.
    Attention(AttentionAttrs),

    // ---- core: indexing -------------------------------------------------------------------------
    /// Operands data, indices: `out[a..., i..., b...] = data[a..., indices[i...], b...]` at `axis`.
    /// Negative indices count from the end.
    Gather(usize),
    /// Operands data, indices of the same rank: picks along `axis` (ONNX GatherElements).
    GatherElements(usize),
    /// Operands data, indices: the last index axis holds coordinates (ONNX GatherND).
    GatherNd {
        /// Leading axes that both share.
        batch: usize,
    },
    /// Operands data, indices, updates (ONNX ScatterElements).
    ScatterElements {
        /// Along which axis.
        axis: usize,
        /// What happens where it writes.
        kind: ScatterKind,
    },
    /// Operands data, indices, updates (ONNX ScatterND).
    ScatterNd {
        /// What happens where it writes.
        kind: ScatterKind,
    },
    /// The `k` largest (or smallest) along `axis`, sorted: values, positions (`i64`).
    TopK {
        /// Along which axis.
        axis: usize,
        /// How many.
        k: Dim,
        /// Largest first; otherwise smallest first.
        largest: bool,
    },
    /// Uniform numbers in [0, 1) from a counter-based generator (Philox4x32-10) with this seed.
    Random {
        /// Result type.
        ty: crate::TensorType,
        /// The key.
        seed: u64,
    },

    // ---- composites -----------------------------------------------------------------------------
    /// Softmax, or its logarithm, along an axis.
    Softmax {
        /// Along which axis.
        axis: usize,
        /// Return logarithms.
        log: bool,
    },
    /// Operands x, scale, and optionally bias: normalises over axes `axis..` to zero mean and unit
    /// variance (biased, plus `eps`).
    LayerNorm {
        /// First normalised axis.
        axis: usize,
        /// Added to the variance; `f64` bits so that equality is exact.
        eps: u64,
    },
    /// Operands x, scale: divides by the root of the mean square (plus `eps`) over axes `axis..`.
    RmsNorm {
        /// First normalised axis.
        axis: usize,
        /// Added to the mean square; `f64` bits.
        eps: u64,
    },
    /// Operands x `[N,C,...]`, scale, bias, mean, variance (each `[C]`): inference form.
    BatchNorm {
        /// Added to the variance; `f64` bits.
        eps: u64,
    },
    /// Operands x `[N,C,...]`, scale, bias (each `[C]`): normalises each of `groups` channel groups
    /// of each sample. `groups == C` is instance normalisation.
    GroupNorm {
        /// Number of groups.
        groups: i64,
        /// Added to the variance; `f64` bits.
        eps: u64,
    },

    // ---- host -----------------------------------------------------------------------------------
    /// An operator of the interpreter's registry.
    Host(HostOp),
}

impl Op {
    /// The operator's name, as in the text form: `contract`, `layer_norm`.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Map(_) => "map",
            Op::Reshape(_) => "reshape",
            Op::Permute(_) => "permute",
            Op::Expand(_) => "expand",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Concat(_) => "concat",
            Op::Iota { .. } => "iota",
            Op::Dims(_) => "dims",
            Op::Reduce { .. } => "reduce",
            Op::ArgReduce { .. } => "arg_reduce",
            Op::Scan { .. } => "scan",
            Op::Contract { .. } => "contract",
            Op::GroupProduct { .. } => "group_product",
            Op::Conv(_) => "conv",
            Op::Window(_) => "window",
            Op::Attention(_) => "attention",
            Op::Gather(_) => "gather",
            Op::GatherElements(_) => "gather_elements",
            Op::GatherNd { .. } => "gather_nd",
            Op::ScatterElements { .. } => "scatter_elements",
            Op::ScatterNd { .. } => "scatter_nd",
            Op::TopK { .. } => "top_k",
            Op::Random { .. } => "random",
            Op::Softmax { .. } => "softmax",
            Op::LayerNorm { .. } => "layer_norm",
            Op::RmsNorm { .. } => "rms_norm",
            Op::BatchNorm { .. } => "batch_norm",
            Op::GroupNorm { .. } => "group_norm",
            Op::Host(_) => "host",
        }
    }
}
