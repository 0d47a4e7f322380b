//! Random graphs: well-typed by construction, with numbers that stay of moderate size.
//!
//! Only continuous functions of floats are used (no comparisons or conversions to integers of
//! computed floats), so a compiled result may be compared with the oracle within a budget.
//!
//! Adding an operator: a row in `STEPS` and its function, which answers `None` when no value in
//! the pool suits it.

use crate::data::{Rng, tensor};
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::Func;
use tilewright_graph::{
    AttentionAttrs, ConvAttrs, Graph, GraphBuilder, Op, PadMode, ReduceKind, TensorType, ValueId,
    WindowAttrs, WindowKind,
};
use tilewright_layout::{Dim, Range, numel};

/// What random graphs look like.
#[derive(Clone, Debug)]
pub struct Options {
    /// About how many nodes.
    pub nodes: usize,
    /// The float type of inputs and weights.
    pub dtype: DType,
    /// Sometimes a symbolic leading dimension.
    pub symbolic: bool,
    /// Sometimes a dimension of extent 0.
    pub zero_dims: bool,
    /// Largest extent of a fixed dimension.
    pub extent_max: i64,
}

impl Default for Options {
    fn default() -> Options {
        Options { nodes: 12, dtype: DType::F32, symbolic: true, zero_dims: true, extent_max: 7 }
    }
}

/// Values larger than this are not made.
const ELEMENTS_MAX: i64 = 20_000;

type Step = fn(&mut Maker) -> Option<ValueId>;

/// What a step of the generator may do, with weights.
const STEPS: &[(usize, Step)] = &[
    (6, Maker::unary),
    (5, Maker::binary),
    (3, Maker::with_constant),
    (3, Maker::centred),
    (3, Maker::reduce),
    (4, Maker::linear),
    (2, Maker::gram),
    (2, Maker::reshape),
    (3, Maker::permute),
    (2, Maker::expand),
    (3, Maker::slice),
    (2, Maker::pad),
    (2, Maker::concat),
    (2, Maker::softmax),
    (2, Maker::layer_norm),
    (1, Maker::rms_norm),
    (3, Maker::conv),
    (1, Maker::window),
    (2, Maker::gather),
    (1, Maker::scan),
    (1, Maker::attention),
    (1, Maker::top_k),
];

/// The random graph of this seed.
pub fn graph(seed: u64, options: &Options) -> Graph {
    let mut maker = Maker {
        b: GraphBuilder::new(format!("random{seed}")),
        rng: Rng::new(seed),
        pool: Vec::new(),
        options: options.clone(),
        symbol: None,
    };
    maker.inputs();
    let total: usize = STEPS.iter().map(|(weight, _)| weight).sum();
    for number in 0..options.nodes {
        let mut ticket = maker.rng.below(total);
        let step = STEPS.iter().find(|(weight, _)| {
            let hit = ticket < *weight;
            ticket = ticket.saturating_sub(*weight);
            hit
        });
        maker.b.set_origin(format!("step{number}"));
        let Some(v) = step.and_then(|(_, step)| step(&mut maker)) else { continue };
        maker.pool.push(v);
    }
    maker.finish()
}

/// Data for convolution and pooling; whether a window fits a symbolic extent is not known here.
fn image(shape: &[Dim]) -> bool {
    shape.len() == 4 && shape[2..].iter().all(|d| d.as_const().is_some())
}

struct Maker {
    b: GraphBuilder,
    rng: Rng,
    pool: Vec<ValueId>,
    options: Options,
    symbol: Option<Dim>,
}

impl Maker {
    fn extent(&mut self) -> Dim {
        if self.options.zero_dims && self.rng.one_in(40) {
            return Dim::new(0);
        }
        Dim::new(self.rng.between(1, self.options.extent_max))
    }

    fn inputs(&mut self) {
        if self.options.symbolic && self.rng.one_in(2) {
            let min = if self.options.zero_dims && self.rng.one_in(4) { 0 } else { 1 };
            self.symbol = Some(self.b.symbol("N", Range { min, max: 9 }));
        }
        for i in 0..1 + self.rng.below(3) {
            let rank = *self.rng.pick(&[1, 2, 2, 3, 3, 4, 4]);
            let mut shape: Vec<Dim> = (0..rank).map(|_| self.extent()).collect();
            if let Some(n) = &self.symbol
                && !self.rng.one_in(4)
            {
                shape[0] = n.clone();
            }
            // A second input often has the shape of the first, so that they meet.
            if i > 0 && self.rng.one_in(2) {
                shape = self.b.shape(self.pool[0]);
            }
            let ty = TensorType::new(self.options.dtype, shape);
            let v = self.b.input(format!("x{i}"), ty);
            self.pool.push(v);
        }
        if let Some(n) = self.symbol.clone()
            && !self.pool.iter().any(|&v| self.b.shape(v).contains(&n))
        {
            let v = self.b.input("n", TensorType::new(self.options.dtype, [n]));
            self.pool.push(v);
        }
    }

    /// Outputs: what nothing reads, at most four.
    fn finish(mut self) -> Graph {
        let users = self.b.graph().users();
        let made: Vec<ValueId> =
            self.pool.iter().copied().filter(|&v| users[v].is_empty()).collect();
        let from = made.len().saturating_sub(4);
        let outputs = if made.is_empty() { vec![self.pool[0]] } else { made[from..].to_vec() };
        for (i, v) in outputs.into_iter().enumerate() {
            self.b.output(format!("y{i}"), v);
        }
        let mut g = self.b.finish();
        g.remove_dead();
        g
    }

    /// A value, the recent ones more often.
    fn any(&mut self) -> ValueId {
        let n = self.pool.len();
        let back = self.rng.below(n).min(self.rng.below(n));
        self.pool[n - 1 - back]
    }

    /// A value that suits, if a few tries find one.
    fn such(&mut self, suits: impl Fn(&[Dim]) -> bool) -> Option<ValueId> {
        for _ in 0..6 {
            let v = self.any();
            if suits(self.b.graph().shape(v)) {
                return Some(v);
            }
        }
        None
    }

    /// Adds a node unless its result would be too large.
    fn add(&mut self, op: Op, inputs: &[ValueId]) -> Option<ValueId> {
        let types: Vec<TensorType> = inputs.iter().map(|&v| self.b.ty(v).clone()).collect();
        let result = tilewright_graph::infer(&op, &types).ok()?;
        let size = numel(&result.first()?.shape).eval_with(&|_| Some(9))?;
        if size > ELEMENTS_MAX {
            return None;
        }
        self.b.op(op, inputs).ok()
    }

    fn map(&mut self, text: &str, inputs: &[ValueId]) -> Option<ValueId> {
        let dtypes: Vec<DType> = inputs.iter().map(|&v| self.b.dtype(v)).collect();
        let func = Func::parse(text, &dtypes).expect("the generator's functions parse");
        self.add(Op::Map(func), inputs)
    }

    /// A constant of normal numbers times `scale`.
    fn weights(&mut self, shape: &[Dim], scale: f64) -> Option<ValueId> {
        let shape: Option<Vec<usize>> =
            shape.iter().map(|d| d.as_const().and_then(|v| usize::try_from(v).ok())).collect();
        let data = tensor(self.options.dtype, &shape?, scale, &mut self.rng);
        Some(self.b.constant("", data))
    }

    fn unary(&mut self) -> Option<ValueId> {
        let x = self.any();
        let text = *self.rng.pick(&[
            "{ x -> tanh(x) }",
            "{ x -> max(x, 0.0) }",
            "{ x -> x * 0.5 + 0.25 }",
            "{ x -> abs(x) }",
            "{ x -> 0.5 * x * (1.0 + erf(x * 0.70710678)) }",
            "{ x -> 1.0 / (1.0 + exp(-x)) }",
            "{ x -> sqrt(x * x + 1.0) }",
            "{ x -> min(max(x, -2.0), 2.0) }",
            "{ x -> sin(x) }",
            "{ x -> -x }",
        ]);
        self.map(text, &[x])
    }

    fn binary(&mut self) -> Option<ValueId> {
        let a = self.any();
        let shape = self.b.shape(a);
        let b = self
            .such(|s| s == shape)
            .or_else(|| self.such(|s| tilewright_layout::broadcast_shapes(&shape, s).is_some()))?;
        let text = *self.rng.pick(&[
            "{ a, b -> a + b }",
            "{ a, b -> a - b }",
            "{ a, b -> a * b * 0.5 }",
            "{ a, b -> max(a, b) }",
            "{ a, b -> a / (abs(b) + 1.0) }",
            "{ a, b -> a + tanh(b) }",
        ]);
        self.map(text, &[a, b])
    }

    /// With a bias or scale along the last axis.
    fn with_constant(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.last().is_some_and(|d| d.as_const().is_some()))?;
        let last = self.b.shape(x).last()?.clone();
        let c = self.weights(&[last], 1.0)?;
        let text = *self.rng.pick(&["{ x, c -> x + c }", "{ x, c -> x * c }", "{ c, x -> c - x }"]);
        let order = if text.starts_with("{ c") { [c, x] } else { [x, c] };
        self.map(text, &order)
    }

    /// Less a reduction of itself.
    fn centred(&mut self) -> Option<ValueId> {
        let x = self.such(|s| !s.is_empty())?;
        let axis = self.rng.below(self.b.shape(x).len());
        let kind = *self.rng.pick(&[ReduceKind::Max, ReduceKind::Sum]);
        let r = self.add(Op::Reduce { kind, axes: vec![axis], keep: true }, &[x])?;
        self.map("{ x, m -> x - m * 0.25 }", &[x, r])
    }

    fn reduce(&mut self) -> Option<ValueId> {
        let x = self.such(|s| !s.is_empty())?;
        let rank = self.b.shape(x).len();
        let mut axes: Vec<usize> = (0..rank).filter(|_| self.rng.one_in(2)).collect();
        if axes.is_empty() {
            axes.push(self.rng.below(rank));
        }
        let kind = *self.rng.pick(&[ReduceKind::Sum, ReduceKind::Max, ReduceKind::Min]);
        let keep = self.rng.one_in(2);
        self.add(Op::Reduce { kind, axes, keep }, &[x])
    }

    fn contract(&mut self, spec: [String; 3], a: ValueId, b: ValueId) -> Option<ValueId> {
        let dtype = self.options.dtype;
        let [lhs, rhs, out] = spec;
        self.add(Op::Contract { lhs, rhs, out, acc: dtype.compute(), dtype }, &[a, b])
    }

    /// Times a weight matrix, over the last axis.
    fn linear(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.last().is_some_and(|d| d.as_const().is_some()))?;
        let shape = self.b.shape(x);
        let k = shape.last()?.clone();
        let n = self.extent();
        let scale = 1.0 / (k.as_const()?.max(1) as f64).sqrt();
        let lead: String = "abcdefg".chars().take(shape.len() - 1).collect();
        let transposed = self.rng.one_in(2);
        let w =
            if transposed { self.weights(&[n, k], scale) } else { self.weights(&[k, n], scale) }?;
        let rhs = if transposed { "nk" } else { "kn" };
        self.contract([format!("{lead}k"), rhs.to_string(), format!("{lead}n")], x, w)
    }

    /// Dot products of rows with rows: batched, the same value twice.
    fn gram(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.len() >= 2 && s.len() <= 4)?;
        let lead: String = "abc".chars().take(self.b.shape(x).len() - 2).collect();
        let y =
            self.contract([format!("{lead}mk"), format!("{lead}nk"), format!("{lead}mn")], x, x)?;
        self.map("{ x -> x * 0.125 }", &[y])
    }

    fn reshape(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.len() >= 2)?;
        let mut shape = self.b.shape(x);
        let at = self.rng.below(shape.len() - 1);
        let merged = &shape[at] * &shape[at + 1];
        if self.rng.one_in(3) {
            shape.insert(at, Dim::new(1));
        } else {
            shape.splice(at..at + 2, [merged]);
        }
        if shape.len() > 4 {
            return None;
        }
        self.add(Op::Reshape(shape), &[x])
    }

    fn permute(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.len() >= 2)?;
        let mut perm: Vec<usize> = (0..self.b.shape(x).len()).collect();
        for i in (1..perm.len()).rev() {
            perm.swap(i, self.rng.below(i + 1));
        }
        self.add(Op::Permute(perm), &[x])
    }

    fn expand(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.len() < 4)?;
        let mut shape = self.b.shape(x);
        if let Some(at) = shape.iter().position(|d| d.is(1)) {
            shape[at] = self.extent();
        } else {
            shape.insert(0, Dim::new(2));
        }
        self.add(Op::Expand(shape), &[x])
    }

    fn slice(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.iter().any(|d| d.as_const().is_some_and(|e| e > 1)))?;
        let mut lens = self.b.shape(x);
        let (mut starts, mut steps) = (vec![Dim::new(0); lens.len()], vec![1; lens.len()]);
        for axis in 0..lens.len() {
            let Some(extent) = lens[axis].as_const().filter(|&e| e > 1) else { continue };
            if self.rng.one_in(2) {
                continue;
            }
            let step = *self.rng.pick(&[1, 1, 2, -1]);
            let start = self.rng.between(0, extent - 1);
            let room = if step > 0 { (extent - 1 - start) / step } else { start };
            starts[axis] = Dim::new(start);
            lens[axis] = Dim::new(self.rng.between(1, room + 1));
            steps[axis] = step;
        }
        self.add(Op::Slice { starts, lens, steps }, &[x])
    }

    fn pad(&mut self) -> Option<ValueId> {
        let x = self.such(|s| !s.is_empty())?;
        let rank = self.b.shape(x).len();
        let mut side = || -> Vec<Dim> {
            (0..rank)
                .map(|_| Dim::new(if self.rng.one_in(2) { 0 } else { self.rng.between(0, 2) }))
                .collect()
        };
        let (lo, hi) = (side(), side());
        let value = tilewright_expr::Value::Float(0.5);
        let empty_axis = self.b.shape(x).iter().any(|d| d.as_const().is_none_or(|e| e == 0));
        let mode = match self.rng.below(4) {
            1 if !empty_axis => PadMode::Edge,
            2 if !empty_axis => PadMode::Reflect,
            _ => PadMode::Constant(value),
        };
        self.add(Op::Pad { lo, hi, mode }, &[x])
    }

    fn concat(&mut self) -> Option<ValueId> {
        let x = self.such(|s| !s.is_empty())?;
        let shape = self.b.shape(x);
        let axis = self.rng.below(shape.len());
        let same = |s: &[Dim]| {
            s.len() == shape.len() && (0..s.len()).all(|i| i == axis || s[i] == shape[i])
        };
        let y = self.such(same).unwrap_or(x);
        self.add(Op::Concat(axis), &[x, y])
    }

    fn softmax(&mut self) -> Option<ValueId> {
        let x = self.such(|s| !s.is_empty())?;
        let rank = self.b.shape(x).len();
        let axis = if self.rng.one_in(4) { self.rng.below(rank) } else { rank - 1 };
        let log = self.rng.one_in(4);
        self.add(Op::Softmax { axis, log }, &[x])
    }

    fn layer_norm(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.last().is_some_and(|d| d.as_const().is_some()))?;
        let shape = self.b.shape(x);
        let last = shape.last()?.clone();
        let (scale, bias) =
            (self.weights(std::slice::from_ref(&last), 1.0)?, self.weights(&[last], 1.0)?);
        // A generous epsilon: rows of equal elements stay well-conditioned.
        let op = Op::LayerNorm { axis: shape.len() - 1, eps: 0.1f64.to_bits() };
        self.add(op, &[x, scale, bias])
    }

    fn rms_norm(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.last().is_some_and(|d| d.as_const().is_some()))?;
        let shape = self.b.shape(x);
        let scale = self.weights(&[shape.last()?.clone()], 1.0)?;
        self.add(Op::RmsNorm { axis: shape.len() - 1, eps: 0.1f64.to_bits() }, &[x, scale])
    }

    fn conv(&mut self) -> Option<ValueId> {
        let x = self.such(|s| image(s) && s[1].as_const().is_some_and(|c| c > 0))?;
        let channels = self.b.shape(x)[1].as_const()?;
        let depthwise = self.rng.one_in(3);
        let groups = if depthwise { channels } else { 1 };
        let outputs = if depthwise { channels } else { self.rng.between(1, 6) };
        let kernel: Vec<i64> = (0..2).map(|_| self.rng.between(1, 3)).collect();
        let mut four =
            |low, high| -> Vec<i64> { (0..2).map(|_| self.rng.between(low, high)).collect() };
        let attrs = ConvAttrs {
            strides: four(1, 2),
            pads_lo: four(0, 1),
            pads_hi: four(0, 2),
            dilations: four(1, 2),
            groups,
        };
        let shape = [outputs, channels / groups, kernel[0], kernel[1]].map(Dim::new);
        let w = self.weights(&shape, 0.4)?;
        self.add(Op::Conv(attrs), &[x, w])
    }

    fn window(&mut self) -> Option<ValueId> {
        let x = self.such(image)?;
        let kernel = vec![self.rng.between(1, 3), self.rng.between(1, 3)];
        let pads: Vec<i64> = kernel.iter().map(|k| self.rng.between(0, k / 2)).collect();
        let attrs = WindowAttrs {
            kind: *self.rng.pick(&[
                WindowKind::Max,
                WindowKind::Sum,
                WindowKind::Mean,
                WindowKind::MeanWithPad,
            ]),
            kernel,
            strides: vec![self.rng.between(1, 2), self.rng.between(1, 2)],
            pads_lo: pads.clone(),
            pads_hi: pads,
            dilations: vec![1, 1],
        };
        self.add(Op::Window(attrs), &[x])
    }

    fn gather(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.iter().any(|d| d.as_const().is_some_and(|e| e > 0)))?;
        let shape = self.b.shape(x);
        let axes: Vec<usize> =
            (0..shape.len()).filter(|&i| shape[i].as_const().is_some_and(|e| e > 0)).collect();
        let axis = *self.rng.pick(&axes);
        let extent = shape[axis].as_const()?;
        let n = 1 + self.rng.below(5);
        let picks: Vec<i64> = (0..n).map(|_| self.rng.between(-extent, extent - 1)).collect();
        let indices = self.b.constant("", Tensor::from_i64s(DType::I64, &[n], &picks).ok()?);
        self.add(Op::Gather(axis), &[x, indices])
    }

    fn scan(&mut self) -> Option<ValueId> {
        let x = self.such(|s| !s.is_empty())?;
        let axis = self.rng.below(self.b.shape(x).len());
        let (exclusive, reverse) = (self.rng.one_in(3), self.rng.one_in(3));
        self.add(Op::Scan { kind: ReduceKind::Sum, axis, exclusive, reverse }, &[x])
    }

    fn attention(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.len() == 4)?;
        let causal = self.rng.one_in(2);
        let score = Func::parse("{ s -> s * 0.25 }", &[self.options.dtype.compute()]).ok()?;
        self.add(Op::Attention(AttentionAttrs { score, causal, zeros: false }), &[x, x, x])
    }

    fn top_k(&mut self) -> Option<ValueId> {
        let x = self.such(|s| s.last().is_some_and(|d| d.as_const().is_some_and(|e| e > 0)))?;
        let shape = self.b.shape(x);
        let k = self.rng.between(1, shape.last()?.as_const()?);
        let largest = self.rng.one_in(2);
        self.add(Op::TopK { axis: shape.len() - 1, k: Dim::new(k), largest }, &[x])
    }
}
