//! The table of all converters. Families are one file each.
//!
//! A converter takes the graph under construction and one node, emits operators, and returns the
//! node's results in order (it may return more than the node asks for). Differences between opsets
//! are handled inside it (`n.opset`). Adding one: a function in its family's file and a row here,
//! in the place where the operators of its family stand.

mod activation;
mod attention;
mod byte_conv;
mod control;
mod conv;
mod domains;
mod elementwise;
mod group;
mod image;
mod indexing;
mod loss;
mod matmul;
mod norm;
mod quant;
mod random;
mod reduce;
mod rnn;
mod sequence;
mod shape;
mod signal;

use super::cx::Cx;
use super::model::{Opsets, Scopes, Walk};
use super::node::{N, Val};
use Converter::{Plain, Walk as InWalk};
use std::collections::BTreeMap;
use std::sync::LazyLock;
use tilewright_base::Result;
use tilewright_expr::Op as E;
use tilewright_graph::ReduceKind;

/// How a node is converted.
#[derive(Clone, Copy)]
pub(crate) enum Converter {
    /// From its operands alone.
    Plain(fn(&mut Cx, &N<'_>) -> Result<Vec<Val>>),
    /// With subgraphs, by walking them.
    Walk(for<'a> fn(&mut Walk<'a>, &N<'_>, &Opsets, &mut Scopes) -> Result<Vec<Val>>),
}

/// The converter of an operator.
pub(crate) fn lookup(domain: &str, op: &str) -> Option<Converter> {
    static INDEX: LazyLock<BTreeMap<(&str, &str), Converter>> =
        LazyLock::new(|| TABLE.iter().map(|(d, o, c)| ((*d, *o), *c)).collect());
    INDEX.get(&(domain, op)).copied()
}

/// Domain, operator, converter.
#[rustfmt::skip]
const TABLE: &[(&str, &str, Converter)] = &[
    // Elementwise.
    ("", "Abs", Plain(|cx, n| elementwise::unary(cx, n, E::Abs))),
    ("", "Neg", Plain(|cx, n| elementwise::unary(cx, n, E::Neg))),
    ("", "Sign", Plain(|cx, n| elementwise::unary(cx, n, E::Sign))),
    ("", "Floor", Plain(|cx, n| elementwise::unary(cx, n, E::Floor))),
    ("", "Ceil", Plain(|cx, n| elementwise::unary(cx, n, E::Ceil))),
    ("", "Round", Plain(|cx, n| elementwise::unary(cx, n, E::Round))),
    ("", "Sqrt", Plain(|cx, n| elementwise::unary(cx, n, E::Sqrt))),
    ("", "Exp", Plain(|cx, n| elementwise::unary(cx, n, E::Exp))),
    ("", "Log", Plain(|cx, n| elementwise::unary(cx, n, E::Log))),
    ("", "Sin", Plain(|cx, n| elementwise::unary(cx, n, E::Sin))),
    ("", "Cos", Plain(|cx, n| elementwise::unary(cx, n, E::Cos))),
    ("", "Tan", Plain(|cx, n| elementwise::unary(cx, n, E::Tan))),
    ("", "Asin", Plain(|cx, n| elementwise::unary(cx, n, E::Asin))),
    ("", "Acos", Plain(|cx, n| elementwise::unary(cx, n, E::Acos))),
    ("", "Atan", Plain(|cx, n| elementwise::unary(cx, n, E::Atan))),
    ("", "Sinh", Plain(|cx, n| elementwise::unary(cx, n, E::Sinh))),
    ("", "Cosh", Plain(|cx, n| elementwise::unary(cx, n, E::Cosh))),
    ("", "Tanh", Plain(|cx, n| elementwise::unary(cx, n, E::Tanh))),
    ("", "Asinh", Plain(|cx, n| elementwise::unary(cx, n, E::Asinh))),
    ("", "Acosh", Plain(|cx, n| elementwise::unary(cx, n, E::Acosh))),
    ("", "Atanh", Plain(|cx, n| elementwise::unary(cx, n, E::Atanh))),
    ("", "Erf", Plain(|cx, n| elementwise::unary(cx, n, E::Erf))),
    ("", "Sigmoid", Plain(|cx, n| elementwise::unary(cx, n, E::Sigmoid))),
    ("", "BitwiseNot", Plain(|cx, n| elementwise::unary(cx, n, E::Not))),
    ("", "Reciprocal", Plain(elementwise::reciprocal)),
    ("", "IsInf", Plain(elementwise::is_inf)),
    ("", "IsNaN", Plain(elementwise::is_nan)),
    ("", "Add", Plain(|cx, n| elementwise::binary(cx, n, E::Add))),
    ("", "Sub", Plain(|cx, n| elementwise::binary(cx, n, E::Sub))),
    ("", "Mul", Plain(|cx, n| elementwise::binary(cx, n, E::Mul))),
    ("", "Div", Plain(|cx, n| elementwise::binary(cx, n, E::Div))),
    ("", "Mod", Plain(elementwise::modulo)),
    ("", "Pow", Plain(elementwise::pow)),
    ("", "BitShift", Plain(elementwise::bit_shift)),
    ("", "BitwiseAnd", Plain(|cx, n| elementwise::binary(cx, n, E::And))),
    ("", "BitwiseOr", Plain(|cx, n| elementwise::binary(cx, n, E::Or))),
    ("", "BitwiseXor", Plain(|cx, n| elementwise::binary(cx, n, E::Xor))),
    ("", "Equal", Plain(|cx, n| elementwise::binary(cx, n, E::Eq))),
    ("", "Less", Plain(|cx, n| elementwise::binary(cx, n, E::Lt))),
    ("", "LessOrEqual", Plain(|cx, n| elementwise::binary(cx, n, E::Le))),
    ("", "Greater", Plain(|cx, n| elementwise::binary(cx, n, E::Gt))),
    ("", "GreaterOrEqual", Plain(|cx, n| elementwise::binary(cx, n, E::Ge))),
    ("", "And", Plain(|cx, n| elementwise::logical(cx, n, E::And))),
    ("", "Or", Plain(|cx, n| elementwise::logical(cx, n, E::Or))),
    ("", "Xor", Plain(|cx, n| elementwise::logical(cx, n, E::Xor))),
    ("", "Not", Plain(|cx, n| elementwise::logical(cx, n, E::Not))),
    ("", "Max", Plain(|cx, n| elementwise::variadic(cx, n, E::Max))),
    ("", "Min", Plain(|cx, n| elementwise::variadic(cx, n, E::Min))),
    ("", "Sum", Plain(|cx, n| elementwise::variadic(cx, n, E::Add))),
    ("", "Mean", Plain(elementwise::mean)),
    ("", "Where", Plain(elementwise::where_)),
    ("", "Clip", Plain(elementwise::clip)),
    ("", "Cast", Plain(elementwise::cast)),
    ("", "CastLike", Plain(elementwise::cast_like)),
    ("", "BitCast", Plain(elementwise::bit_cast)),
    ("", "Identity", Plain(elementwise::identity)),
    // Activations.
    ("", "Relu", Plain(activation::relu)),
    ("", "LeakyRelu", Plain(activation::leaky_relu)),
    ("", "PRelu", Plain(activation::prelu)),
    ("", "ThresholdedRelu", Plain(activation::thresholded_relu)),
    ("", "Elu", Plain(activation::elu)),
    ("", "Celu", Plain(activation::celu)),
    ("", "Selu", Plain(activation::selu)),
    ("", "HardSigmoid", Plain(activation::hard_sigmoid)),
    ("", "HardSwish", Plain(activation::hard_swish)),
    ("", "Softplus", Plain(activation::softplus)),
    ("", "Softsign", Plain(activation::softsign)),
    ("", "Mish", Plain(activation::mish)),
    ("", "Gelu", Plain(activation::gelu)),
    ("com.microsoft", "Gelu", Plain(activation::gelu)),
    ("com.microsoft", "MatMulNBits", Plain(group::mat_mul_n_bits)),
    ("", "Swish", Plain(activation::swish)),
    ("", "SwiGLU", Plain(activation::swiglu)),
    ("", "Shrink", Plain(activation::shrink)),
    // Reductions.
    ("", "ReduceSum", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::Sum))),
    ("", "ReduceMean", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::Mean))),
    ("", "ReduceMax", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::Max))),
    ("", "ReduceMin", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::Min))),
    ("", "ReduceProd", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::Prod))),
    ("", "ReduceL1", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::L1))),
    ("", "ReduceL2", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::L2))),
    ("", "ReduceSumSquare", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::SumSquare))),
    ("", "ReduceLogSum", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::LogSum))),
    ("", "ReduceLogSumExp", Plain(|cx, n| reduce::reduce(cx, n, reduce::Kind::LogSumExp))),
    ("", "ArgMax", Plain(|cx, n| reduce::arg(cx, n, ReduceKind::Max))),
    ("", "ArgMin", Plain(|cx, n| reduce::arg(cx, n, ReduceKind::Min))),
    ("", "CumSum", Plain(|cx, n| reduce::scan(cx, n, ReduceKind::Sum))),
    ("", "CumProd", Plain(|cx, n| reduce::scan(cx, n, ReduceKind::Prod))),
    // Shapes and movement.
    ("", "Constant", Plain(shape::constant)),
    ("", "ConstantOfShape", Plain(shape::constant_of_shape)),
    ("", "Shape", Plain(shape::shape)),
    ("", "Size", Plain(shape::size)),
    ("", "Reshape", Plain(shape::reshape)),
    ("", "Flatten", Plain(shape::flatten)),
    ("", "Squeeze", Plain(shape::squeeze)),
    ("", "Unsqueeze", Plain(shape::unsqueeze)),
    ("", "Transpose", Plain(shape::transpose)),
    ("", "Concat", Plain(shape::concat)),
    ("", "Split", Plain(shape::split)),
    ("", "Slice", Plain(shape::slice)),
    ("", "Expand", Plain(shape::expand)),
    ("", "Tile", Plain(shape::tile)),
    ("", "Pad", Plain(shape::pad)),
    ("", "Range", Plain(shape::range)),
    ("", "Trilu", Plain(shape::trilu)),
    ("", "EyeLike", Plain(shape::eye_like)),
    ("", "DepthToSpace", Plain(shape::depth_to_space)),
    ("", "SpaceToDepth", Plain(shape::space_to_depth)),
    ("", "CenterCropPad", Plain(shape::center_crop_pad)),
    ("", "OneHot", Plain(shape::one_hot)),
    ("", "ReverseSequence", Plain(shape::reverse_sequence)),
    ("", "NonZero", Plain(shape::non_zero)),
    ("", "Compress", Plain(shape::compress)),
    // Indexing.
    ("", "Gather", Plain(indexing::gather)),
    ("", "GatherElements", Plain(indexing::gather_elements)),
    ("", "GatherND", Plain(indexing::gather_nd)),
    ("", "Scatter", Plain(indexing::scatter_elements)),
    ("", "ScatterElements", Plain(indexing::scatter_elements)),
    ("", "ScatterND", Plain(indexing::scatter_nd)),
    ("", "TensorScatter", Plain(indexing::tensor_scatter)),
    ("", "TopK", Plain(indexing::top_k)),
    ("", "Unique", Plain(indexing::unique)),
    ("", "NonMaxSuppression", Plain(indexing::non_max_suppression)),
    ("", "MaxUnpool", Plain(indexing::max_unpool)),
    // Matrix products.
    ("", "MatMul", Plain(matmul::matmul)),
    ("", "Gemm", Plain(matmul::gemm)),
    ("", "MatMulInteger", Plain(matmul::matmul_integer)),
    ("", "QLinearMatMul", Plain(matmul::qlinear_matmul)),
    ("", "Einsum", Plain(matmul::einsum)),
    ("", "Det", Plain(matmul::det)),
    // Convolution and pooling.
    ("", "Conv", Plain(conv::conv)),
    ("", "ConvTranspose", Plain(conv::conv_transpose)),
    ("", "ConvInteger", Plain(quant::conv_integer)),
    ("", "QLinearConv", Plain(quant::qlinear_conv)),
    ("", "CausalConvWithState", Plain(conv::causal_conv)),
    ("", "MaxPool", Plain(conv::max_pool)),
    ("", "AveragePool", Plain(conv::average_pool)),
    ("", "LpPool", Plain(conv::lp_pool)),
    ("", "GlobalMaxPool", Plain(|cx, n| conv::global_pool(cx, n, ReduceKind::Max))),
    ("", "GlobalAveragePool", Plain(|cx, n| conv::global_pool(cx, n, ReduceKind::Sum))),
    ("", "GlobalLpPool", Plain(conv::global_lp_pool)),
    ("", "Col2Im", Plain(conv::col2im)),
    // Normalisation.
    ("", "Softmax", Plain(|cx, n| norm::softmax(cx, n, false))),
    ("", "LogSoftmax", Plain(|cx, n| norm::softmax(cx, n, true))),
    ("", "Hardmax", Plain(norm::hardmax)),
    ("", "LayerNormalization", Plain(norm::layer_norm)),
    ("", "RMSNormalization", Plain(norm::rms_norm)),
    ("", "BatchNormalization", Plain(norm::batch_norm)),
    ("", "InstanceNormalization", Plain(norm::instance_norm)),
    ("", "GroupNormalization", Plain(norm::group_norm)),
    ("", "LpNormalization", Plain(norm::lp_norm)),
    ("", "LRN", Plain(norm::lrn)),
    ("", "MeanVarianceNormalization", Plain(norm::mvn)),
    ("", "Dropout", Plain(norm::dropout)),
    // Quantisation.
    ("", "QuantizeLinear", Plain(quant::quantize)),
    ("", "DequantizeLinear", Plain(quant::dequantize)),
    ("", "DynamicQuantizeLinear", Plain(quant::dynamic_quantize)),
    // Attention.
    ("", "Attention", Plain(attention::attention)),
    ("", "RotaryEmbedding", Plain(attention::rotary)),
    ("", "LinearAttention", Plain(attention::linear_attention)),
    ("ai.onnx.preview", "FlexAttention", InWalk(control::flex_attention)),
    // Recurrent layers.
    ("", "RNN", Plain(|cx, n| rnn::recurrent(cx, n, rnn::Cell::Rnn))),
    ("", "GRU", Plain(|cx, n| rnn::recurrent(cx, n, rnn::Cell::Gru))),
    ("", "LSTM", Plain(|cx, n| rnn::recurrent(cx, n, rnn::Cell::Lstm))),
    // Images.
    ("", "Resize", Plain(image::resize)),
    ("", "Upsample", Plain(image::resize)),
    ("", "GridSample", Plain(image::grid_sample)),
    ("", "AffineGrid", Plain(image::affine_grid)),
    ("", "RoiAlign", Plain(image::roi_align)),
    // Signals.
    ("", "DFT", Plain(signal::dft)),
    ("", "STFT", Plain(signal::stft)),
    ("", "HannWindow", Plain(|cx, n| signal::window(cx, n, signal::hann))),
    ("", "HammingWindow", Plain(|cx, n| signal::window(cx, n, signal::hamming))),
    ("", "BlackmanWindow", Plain(|cx, n| signal::window(cx, n, signal::blackman))),
    ("", "MelWeightMatrix", Plain(signal::mel_weights)),
    // Random numbers.
    ("", "RandomUniform", Plain(|cx, n| random::random_uniform(cx, n, false))),
    ("", "RandomUniformLike", Plain(|cx, n| random::random_uniform(cx, n, true))),
    ("", "RandomNormal", Plain(|cx, n| random::random_normal(cx, n, false))),
    ("", "RandomNormalLike", Plain(|cx, n| random::random_normal(cx, n, true))),
    ("", "Bernoulli", Plain(random::bernoulli)),
    // Subgraphs.
    ("", "If", InWalk(control::if_)),
    ("", "Loop", InWalk(control::loop_)),
    ("", "Scan", InWalk(control::scan)),
    ("", "SequenceMap", InWalk(control::sequence_map)),
    // Sequences and optionals.
    ("", "SequenceConstruct", Plain(sequence::construct)),
    ("", "SequenceEmpty", Plain(sequence::empty)),
    ("", "SequenceAt", Plain(sequence::at)),
    ("", "SequenceErase", Plain(sequence::erase)),
    ("", "SequenceInsert", Plain(sequence::insert)),
    ("", "SequenceLength", Plain(sequence::length)),
    ("", "ConcatFromSequence", Plain(sequence::concat)),
    ("", "SplitToSequence", Plain(sequence::split)),
    ("", "Optional", Plain(sequence::optional)),
    ("", "OptionalHasElement", Plain(sequence::has_element)),
    ("", "OptionalGetElement", Plain(sequence::get_element)),
    // Other domains.
    ("ai.onnx.ml", "ArrayFeatureExtractor", Plain(domains::array_feature_extractor)),
    ("ai.onnx.ml", "Binarizer", Plain(domains::binarizer)),
    ("ai.onnx.preview.training", "Adagrad", Plain(domains::adagrad)),
    ("ai.onnx.preview.training", "Adam", Plain(domains::adam)),
    ("ai.onnx.preview.training", "Momentum", Plain(domains::momentum)),
    // Losses.
    ("", "NegativeLogLikelihoodLoss", Plain(loss::nll_loss)),
    ("", "SoftmaxCrossEntropyLoss", Plain(loss::softmax_cross_entropy)),
];
