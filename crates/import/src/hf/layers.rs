//! [`Net`]: the layers that all families are made of, on top of the graph builder.
//!
//! Weights are asked for by name and shape. A missing or ill-shaped one is noted and replaced by a
//! stand-in without data, so that one run finds everything that is missing; [`Net::check`] then
//! turns the notes into one error.
//!
//! Activations are `[B, S, width]` in the compute type. Weights stay in the type of their file and
//! are cast in the graph.

use super::MatrixForm;
use super::quantise::quantise;
use super::weights::Weights;
use std::collections::BTreeMap;
use tilewright_base::{DType, Error, Result, ResultExt};
use tilewright_data::Tensor;
use tilewright_graph::{AttentionAttrs, GraphBuilder, Op, ReduceKind, TensorType, ValueId};
use tilewright_layout::{Dim, Range};

/// After this many problems the rest is not looked at.
const MOST_PROBLEMS: usize = 100;

/// A model under construction.
pub(crate) struct Net {
    pub(crate) b: GraphBuilder,
    /// In which type activations are held.
    pub(crate) compute: DType,
    pub(crate) weights: Weights,
    /// The form of matrices.
    pub(crate) matrices: MatrixForm,
    /// Batch size.
    pub(crate) batch: Dim,
    /// Sequence length, when the model has one.
    pub(crate) seq: Dim,
    most_tokens: i64,
    /// Tokens whose keys and values are remembered, in a model with a cache; see [`Net::with_cache`].
    past: Option<Dim>,
    /// There are none before the first step.
    prompt: bool,
    /// Keys and values of all tokens so far, to be outputs.
    present: Vec<(String, ValueId)>,
    /// Masks of sliding windows.
    windows: BTreeMap<i64, ValueId>,
    loaded: BTreeMap<String, ValueId>,
    cast: BTreeMap<String, ValueId>,
    codes: BTreeMap<String, [ValueId; 2]>,
    problems: Vec<String>,
    unsupported: Vec<String>,
}

/// A weight that activations are multiplied with.
pub(crate) enum Matrix {
    /// Floats, with the letters of its axes.
    Plain { weight: ValueId, letters: &'static str },
    /// Codes `[to, from]` and a scale for each group of the depth.
    Codes { codes: ValueId, scales: ValueId, group: i64, both: bool },
}

/// How attention looks at its operands.
pub(crate) struct Heads {
    /// Query heads.
    pub(crate) q: i64,
    /// Width of a head.
    pub(crate) width: i64,
    /// Factor on the dot products.
    pub(crate) scale: f64,
    /// Later positions are hidden.
    pub(crate) causal: bool,
    /// Of the others those are seen that are less than this many positions back.
    pub(crate) window: Option<i64>,
}

impl Net {
    /// An empty model; `B` is in `1..=most_batch`.
    pub(crate) fn new(name: &str, weights: Weights, compute: DType, most_batch: i64) -> Net {
        let mut b = GraphBuilder::new(name);
        let batch = b.symbol("B", Range { min: 1, max: most_batch });
        Net {
            b,
            compute,
            weights,
            matrices: MatrixForm::Compute,
            batch,
            seq: Dim::new(1),
            most_tokens: 1,
            past: None,
            prompt: false,
            present: Vec::new(),
            windows: BTreeMap::new(),
            loaded: BTreeMap::new(),
            cast: BTreeMap::new(),
            codes: BTreeMap::new(),
            problems: Vec::new(),
            unsupported: Vec::new(),
        }
    }

    /// Makes it a step of generation: keys and values of `P` earlier tokens are inputs, those of all tokens are outputs,
    /// only the last position's result is computed, and there is no padding.
    ///
    /// In the first step, of a `prompt`, there are no earlier tokens, and keys and values are all that is asked for.
    pub(crate) fn with_cache(&mut self, prompt: bool) {
        self.past = Some(Dim::new(0));
        self.prompt = prompt;
    }

    /// Whether the model can remember; families that cannot are refused.
    pub(crate) fn remembers(&self) -> bool {
        !self.present.is_empty()
    }

    /// The number of earlier tokens.
    pub(crate) fn past(&self) -> Dim {
        self.past.clone().unwrap_or_else(|| Dim::new(0))
    }

    /// An error with everything noted so far, if anything was.
    pub(crate) fn check(&self) -> Result<()> {
        let count = self.problems.len() + self.unsupported.len();
        if count == 0 {
            return Ok(());
        }
        let notes = self.problems.iter().chain(&self.unsupported).cloned();
        let error = match self.problems.is_empty() {
            true => Error::unsupported("weights are stored in types that are not supported"),
            false if self.weights.are_random() => {
                Error::user("out of memory: random weights as large as config.json says")
            }
            false => Error::user("the weights do not fit config.json"),
        };
        let error = notes.fold(error, Error::with_note);
        Err(if count < MOST_PROBLEMS { error } else { error.with_note("...") })
    }

    fn problem(&mut self, what: String) -> Result<()> {
        self.problems.push(what);
        if self.problems.len() < MOST_PROBLEMS { Ok(()) } else { self.check() }
    }

    /// Where a stand-in has the right shape and no data.
    fn stand_in(&mut self, name: &str, shape: &[i64]) -> ValueId {
        let dims: Vec<Dim> = shape.iter().map(|&d| Dim::new(d)).collect();
        self.b.input(name, TensorType::new(self.compute, dims))
    }

    /// A weight as it is stored: a floating-point tensor of this shape.
    pub(crate) fn stored(&mut self, name: &str, shape: &[i64]) -> Result<ValueId> {
        if let Some(&value) = self.loaded.get(name) {
            return Ok(value);
        }
        let tensor = self.weights.get(name, shape).cloned();
        let fits = |t: &Tensor| {
            t.shape().len() == shape.len()
                && t.shape().iter().zip(shape).all(|(&a, &b)| usize::try_from(b) == Ok(a))
        };
        let value = match tensor {
            Some(t) if fits(&t) && t.dtype().is_float() => self.b.constant(name, t),
            Some(t) => {
                let (is, shape_is) = (t.dtype(), t.shape().to_vec());
                self.problem(match is.is_float() {
                    true => format!("tensor `{name}` has shape {shape_is:?}, not {shape:?}"),
                    false => format!("tensor `{name}` is {is}, not of a floating-point type"),
                })?;
                self.stand_in(name, shape)
            }
            None => {
                if let Some(dtype) = self.weights.foreign(name) {
                    self.unsupported.push(format!("tensor `{name}` is stored as {dtype}"));
                } else {
                    let what = if self.weights.are_random() { "has no room" } else { "is missing" };
                    self.problem(format!("tensor `{name}` of shape {shape:?} {what}"))?;
                }
                self.stand_in(name, shape)
            }
        };
        self.loaded.insert(name.to_string(), value);
        Ok(value)
    }

    /// A weight in the compute type.
    pub(crate) fn weight(&mut self, name: &str, shape: &[i64]) -> Result<ValueId> {
        if let Some(&value) = self.cast.get(name) {
            return Ok(value);
        }
        let stored = self.stored(name, shape)?;
        self.b.set_origin(name);
        let value = self.b.cast(stored, self.compute)?;
        self.cast.insert(name.to_string(), value);
        Ok(value)
    }

    /// `x W^T + b` over the last axis, with `W [to, from]` as PyTorch's `Linear` stores it.
    pub(crate) fn linear(
        &mut self,
        x: ValueId,
        name: &str,
        from: i64,
        to: i64,
        bias: bool,
    ) -> Result<ValueId> {
        let weight = self.matrix(&format!("{name}.weight"), [to, from], "oi")?;
        let bias = self.optional_bias(name, to, bias)?;
        self.project(x, weight, bias, name)
    }

    /// `x W + b` over the last axis, with `W [from, to]` as GPT-2's `Conv1D` stores it.
    pub(crate) fn conv1d(&mut self, x: ValueId, name: &str, from: i64, to: i64) -> Result<ValueId> {
        let weight = self.matrix(&format!("{name}.weight"), [from, to], "io")?;
        let bias = self.optional_bias(name, to, true)?;
        self.project(x, weight, bias, name)
    }

    /// Codes `[to, from]` and scales of a matrix.
    fn codes(
        &mut self,
        name: &str,
        shape: [i64; 2],
        turned: bool,
        dtype: DType,
        group: i64,
    ) -> Result<[ValueId; 2]> {
        if let Some(known) = self.codes.get(name) {
            return Ok(*known);
        }
        let (stored, mut sizes) = (self.stored(name, &shape)?, shape);
        let tensor = self.b.graph().as_const(stored).cloned();
        let pair = match tensor {
            Some(mut tensor) => {
                if turned {
                    tensor = transposed(&tensor)?;
                }
                let size = usize::try_from(group).unwrap_or(1);
                let made = quantise(&tensor, dtype, size);
                let (codes, scales) = made.context(|| format!("storing `{name}` as {dtype}"))?;
                [("codes", codes), ("scales", scales)]
                    .map(|(part, t)| self.b.constant(format!("{name}.{part}"), t))
            }
            // Noted as missing: what stands in has the right shapes.
            None => {
                if turned {
                    sizes.reverse();
                }
                let groups = (sizes[1] + group - 1) / group.max(1);
                let shapes = [(dtype, sizes[1], "codes"), (DType::BF16, groups, "scales")];
                shapes.map(|(dtype, k, part)| {
                    let ty = TensorType::new(dtype, vec![Dim::new(sizes[0]), Dim::new(k)]);
                    self.b.input(format!("{name}.{part}"), ty)
                })
            }
        };
        self.codes.insert(name.to_string(), pair);
        Ok(pair)
    }

    fn optional_bias(&mut self, name: &str, to: i64, bias: bool) -> Result<Option<ValueId>> {
        bias.then(|| self.weight(&format!("{name}.bias"), &[to])).transpose()
    }

    /// A matrix to multiply with, in the form that was asked for; `letters` are `oi` (PyTorch's `Linear`) or `io`.
    pub(crate) fn matrix(
        &mut self,
        name: &str,
        shape: [i64; 2],
        letters: &'static str,
    ) -> Result<Matrix> {
        match self.matrices {
            MatrixForm::Codes { dtype, group, both } => {
                let [codes, scales] = self.codes(name, shape, letters == "io", dtype, group)?;
                Ok(Matrix::Codes { codes, scales, group, both })
            }
            form => {
                let stored = self.stored(name, &shape)?;
                let keep = form == MatrixForm::Stored && self.b.dtype(stored).bits() == 16;
                let weight = if keep { stored } else { self.weight(name, &shape)? };
                Ok(Matrix::Plain { weight, letters })
            }
        }
    }

    /// The product of the last axis of `x` with a matrix, plus a bias.
    pub(crate) fn project(
        &mut self,
        x: ValueId,
        matrix: Matrix,
        bias: Option<ValueId>,
        origin: &str,
    ) -> Result<ValueId> {
        self.b.set_origin(origin);
        let y = match matrix {
            Matrix::Codes { codes, scales, group, both } => {
                let depth = self.b.shape(x).last().and_then(Dim::as_const);
                let operands = match both && depth.is_some_and(|d| d % group == 0) {
                    true => {
                        let [x, own] = self.b.in_codes(x, group)?;
                        vec![x, codes, scales, own]
                    }
                    false => vec![x, codes, scales],
                };
                self.b.op(Op::GroupProduct { group }, &operands)?
            }
            Matrix::Plain { weight, letters } => {
                let outer = if self.b.shape(x).len() == 2 { "b" } else { "bs" };
                self.b.contract(&format!("{outer}i,{letters}->{outer}o"), x, weight)?
            }
        };
        match bias {
            Some(bias) => self.b.map_text("{ x, b -> x + b }", &[y, bias]),
            None => Ok(y),
        }
    }

    /// Normalisation of the last axis. Early checkpoints call scale and shift `gamma` and `beta`.
    pub(crate) fn layer_norm(
        &mut self,
        x: ValueId,
        name: &str,
        width: i64,
        eps: f64,
    ) -> Result<ValueId> {
        let early = self.weights.has(&format!("{name}.gamma"));
        let (scale, shift) = if early { ("gamma", "beta") } else { ("weight", "bias") };
        let scale = self.weight(&format!("{name}.{scale}"), &[width])?;
        let shift = self.weight(&format!("{name}.{shift}"), &[width])?;
        self.b.set_origin(name);
        let axis = self.b.shape(x).len() - 1;
        self.b.op(Op::LayerNorm { axis, eps: eps.to_bits() }, &[x, scale, shift])
    }

    /// Root-mean-square normalisation of the last axis.
    pub(crate) fn rms_norm(
        &mut self,
        x: ValueId,
        name: &str,
        width: i64,
        eps: f64,
    ) -> Result<ValueId> {
        let scale = self.weight(&format!("{name}.weight"), &[width])?;
        self.b.set_origin(name);
        let axis = self.b.shape(x).len() - 1;
        self.b.op(Op::RmsNorm { axis, eps: eps.to_bits() }, &[x, scale])
    }

    /// Rows of a table, in the compute type. The rows are cast, not the table.
    pub(crate) fn embedding(
        &mut self,
        ids: ValueId,
        name: &str,
        rows: i64,
        width: i64,
    ) -> Result<ValueId> {
        let table = self.stored(name, &[rows, width])?;
        self.b.set_origin(name);
        let picked = self.b.op(Op::Gather(0), &[table, ids])?;
        self.b.cast(picked, self.compute)
    }

    /// The rows of a table of positions for these tokens, `[S, width]`.
    pub(crate) fn positions(&mut self, name: &str, rows: i64, width: i64) -> Result<ValueId> {
        let table = self.stored(name, &[rows, width])?;
        self.b.set_origin(name);
        let picked = self.b.slice_axis(table, 0, self.past(), self.seq.clone())?;
        self.b.cast(picked, self.compute)
    }

    /// Declares `S` in `1..=most`.
    pub(crate) fn declare_tokens(&mut self, most: i64) {
        self.most_tokens = most;
        self.seq = self.b.symbol("S", Range { min: 1, max: most });
        if self.past.is_some() && !self.prompt {
            self.past = Some(self.b.symbol("P", Range { min: 0, max: most - 1 }));
        }
    }

    /// What is added to the scores for the input `attention_mask`; none in a model with a cache.
    pub(crate) fn padding_mask(&mut self) -> Result<Option<ValueId>> {
        if self.past.is_some() {
            return Ok(None);
        }
        let mask = self.token_input("attention_mask");
        self.additive_mask(mask).map(Some)
    }

    /// In a model with a cache, puts the keys and values of earlier tokens in front of these, `[B,heads,S,width]`.
    ///
    /// They are named as `optimum` names them: inputs `past_key_values.0.key`, outputs `present.0.key`.
    pub(crate) fn remember(
        &mut self,
        [_, k, v]: &mut [ValueId; 3],
        layer: i64,
        heads: i64,
        width: i64,
    ) -> Result<()> {
        let Some(past) = self.past.clone() else { return Ok(()) };
        for (value, name) in [(k, "key"), (v, "value")] {
            self.b.set_origin(format!("present.{layer}.{name}"));
            if !self.prompt {
                let shape = [self.batch.clone(), Dim::new(heads), past.clone(), Dim::new(width)];
                let ty = TensorType::new(self.compute, shape);
                let old = self.b.input(format!("past_key_values.{layer}.{name}"), ty);
                *value = self.b.op(Op::Concat(2), &[old, *value])?;
            }
            self.present.push((format!("present.{layer}.{name}"), *value));
        }
        Ok(())
    }

    /// The positions whose logits are asked for: with a cache the last one, otherwise all.
    pub(crate) fn asked_for(&mut self, x: ValueId) -> Result<ValueId> {
        match self.past {
            None => Ok(x),
            Some(_) => self.b.slice_axis(x, 1, self.seq.clone() - 1, Dim::new(1)),
        }
    }

    /// Declares the output, and the cache behind it.
    pub(crate) fn outputs_with_cache(&mut self, name: &str, value: ValueId) {
        if !self.prompt {
            self.b.output(name, value);
        }
        for (name, value) in self.present.clone() {
            self.b.output(&name, value);
        }
    }

    /// The largest `S`.
    pub(crate) fn most_tokens(&self) -> i64 {
        self.most_tokens
    }

    /// An input `i64[B,S]`.
    pub(crate) fn token_input(&mut self, name: &str) -> ValueId {
        let shape = [self.batch.clone(), self.seq.clone()];
        self.b.input(name, TensorType::new(DType::I64, shape))
    }

    /// The type in which attention scores are taken.
    fn score_type(&self) -> DType {
        self.compute.compute()
    }

    /// What is added to the scores for a mask `i64[B,S]`: `[B,1,1,S]`, 0 where it is set.
    ///
    /// Elsewhere the lowest finite number, not minus infinity: a row of padding alone then attends
    /// evenly, as in transformers, instead of giving NaN.
    pub(crate) fn additive_mask(&mut self, mask: ValueId) -> Result<ValueId> {
        self.b.set_origin("attention_mask");
        let one = Dim::new(1);
        let shape = [self.batch.clone(), one.clone(), one, self.seq.clone()];
        let mask = self.b.reshape(mask, &shape)?;
        let ty = self.score_type();
        let text = format!("{{ m -> where(m != 0, {ty}(0), -{ty}({:?})) }}", f32::MAX);
        self.b.map_text(&text, &[mask])
    }

    /// `[B,S,n*d]` as `[B,n,S,d]`.
    pub(crate) fn split_heads(&mut self, x: ValueId, n: i64, d: i64) -> Result<ValueId> {
        let outer = self.b.shape(x);
        let shape = [outer[0].clone(), outer[1].clone(), Dim::new(n), Dim::new(d)];
        let x = self.b.reshape(x, &shape)?;
        self.b.permute(x, &[0, 2, 1, 3])
    }

    /// Attention over `q [B,H,S,D]`, `k` and `v [B,G,S,D]`, back in `[B,S,H*D]`.
    pub(crate) fn attend(
        &mut self,
        [q, k, v]: [ValueId; 3],
        heads: &Heads,
        mask: Option<ValueId>,
        origin: &str,
    ) -> Result<ValueId> {
        self.b.set_origin(origin);
        let ty = self.score_type();
        let scale = heads.scale;
        let added: Vec<ValueId> = match heads.window {
            Some(window) => mask.into_iter().chain([self.window_mask(window)?]).collect(),
            None => mask.into_iter().collect(),
        };
        self.b.set_origin(origin);
        let (names, sum) = [("", ""), (", m", " + m"), (", m, w", " + m + w")][added.len()];
        let text = format!("{{ s{names} -> s * {ty}({scale:?}){sum} }}");
        let score = tilewright_expr::Func::parse(&text, &vec![ty; 1 + added.len()])?;
        let mut operands = vec![q, k, v];
        operands.extend(added);
        let attrs = AttentionAttrs { score, causal: heads.causal, zeros: false };
        let y = self.b.op(Op::Attention(attrs), &operands)?;
        let y = self.b.permute(y, &[0, 2, 1, 3])?;
        let shape = self.b.shape(y);
        let merged = [shape[0].clone(), shape[1].clone(), Dim::new(heads.q * heads.width)];
        self.b.reshape(y, &merged)
    }

    /// What is added to the scores for a window: `[1,1,S,P+S]`, 0 where a position is less than `window` positions back, and
    /// elsewhere the lowest finite number. Made once for each window.
    fn window_mask(&mut self, window: i64) -> Result<ValueId> {
        if let Some(known) = self.windows.get(&window) {
            return Ok(*known);
        }
        self.b.set_origin("sliding_window");
        let one = || Dim::new(1);
        let (past, seq, ty) = (self.past(), self.seq.clone(), self.score_type());
        let all = past.clone() + &seq;
        let mut count = |shape: [Dim; 4], axis: usize| {
            let ty = TensorType::new(DType::I64, shape);
            self.b.op(Op::Iota { ty, axis }, &[])
        };
        let keys = count([one(), one(), one(), all.clone()], 3)?;
        let queries = count([one(), one(), all, one()], 2)?;
        let queries = self.b.slice_axis(queries, 2, past, seq)?;
        let lowest = f32::MAX;
        let text = format!("{{ q, k -> where(q - k < {window}, {ty}(0), -{ty}({lowest:?})) }}");
        let mask = self.b.map_text(&text, &[queries, keys])?;
        self.windows.insert(window, mask);
        Ok(mask)
    }

    /// Elementwise function of one operand, as text.
    pub(crate) fn activate(&mut self, text: &str, x: ValueId) -> Result<ValueId> {
        self.b.map_text(text, &[x])
    }

    /// Sum of two values.
    pub(crate) fn add(&mut self, x: ValueId, y: ValueId) -> Result<ValueId> {
        self.b.map_text("{ x, y -> x + y }", &[x, y])
    }

    /// The first position, `[B,width]`.
    pub(crate) fn first_token(&mut self, x: ValueId) -> Result<ValueId> {
        first_token(&mut self.b, x)
    }
}

/// A matrix with its axes exchanged.
fn transposed(matrix: &Tensor) -> Result<Tensor> {
    let [rows, cols] = *matrix.shape() else {
        return Err(Error::bug(format!("a matrix of shape {:?}", matrix.shape())));
    };
    let size = matrix.dtype().size();
    let mut out = Tensor::zeros(matrix.dtype(), [cols, rows])?;
    let (from, to) = (matrix.bytes(), out.bytes_mut());
    for r in 0..rows {
        for c in 0..cols {
            to[(c * rows + r) * size..][..size]
                .copy_from_slice(&from[(r * cols + c) * size..][..size]);
        }
    }
    Ok(out)
}

/// Position 0 of `[B,S,width]`, as `[B,width]`.
pub(crate) fn first_token(b: &mut GraphBuilder, x: ValueId) -> Result<ValueId> {
    let shape = b.shape(x);
    let first = b.slice_axis(x, 1, Dim::new(0), Dim::new(1))?;
    b.reshape(first, &[shape[0].clone(), shape[2].clone()])
}

/// Sum over an axis of a value.
pub(crate) fn sum(b: &mut GraphBuilder, x: ValueId, axis: usize, keep: bool) -> Result<ValueId> {
    b.reduce(ReduceKind::Sum, x, &[axis], keep)
}
