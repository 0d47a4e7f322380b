//! Host operators that a library of kernels has for a GPU: attention with its log-sum-exp, and gradients.
//!
//! Matrices of attention are read and written where they lie, as far as the copy engine takes them: columns are neighbours in
//! memory, lines and starts are at multiples of 16 bytes. What lies otherwise is copied. Vectors and the rows of normalisations are
//! row-major.

use super::no_blocks;
use crate::fuse::Group;
use crate::lowering::Lowering;
use crate::place::Place;
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{HostAttr, HostOp, Op, ValueId};
use tilewright_layout::{Dim, Layout};
use tilewright_plan::{
    Attention, AttentionBackward, BufferId, Heads, LayerNormBackward, Library, Note, Step,
};

/// Distances in memory are multiples of so many bytes.
const LINE_BYTES: i64 = 16;

/// The buffers of a call, operands first.
#[derive(Default)]
struct Args {
    inputs: Vec<BufferId>,
    outputs: Vec<BufferId>,
    /// Results that are wanted elsewhere than where they were written.
    moved: Vec<(ValueId, Place)>,
}

fn float(host: &HostOp, name: &str) -> Result<f64> {
    let found = host.attrs.iter().find(|(n, _)| n == name).map(|(_, v)| v);
    match found {
        Some(HostAttr::Float(x)) => Ok(*x),
        Some(HostAttr::Int(x)) => Ok(*x as f64),
        _ => Err(Error::bug(format!("{} without the number `{name}`", host.name))),
    }
}

fn flag(host: &HostOp, name: &str) -> bool {
    host.attrs.iter().any(|(n, v)| n == name && matches!(v, HostAttr::Int(1)))
}

impl Lowering<'_> {
    /// A step of the library for a group of one host operator. False: the library has none.
    pub(crate) fn library_group(&mut self, group: &Group) -> Result<bool> {
        let node = &self.graph.nodes[group.nodes[0]];
        let Op::Host(host) = &node.op else { return Ok(false) };
        if !self.on_gpu() {
            return Ok(false);
        }
        let mut args = Args::default();
        let call = match (host.name.as_str(), &node.inputs[..], &node.outputs[..]) {
            ("attention_lse", [q, k, v, mask @ ..], [y, lse]) => {
                let [q, k, v] = [*q, *k, *v];
                let qkv = [q, k, v].map(|m| self.heads_read(m, &mut args));
                let mask = self.mask_read(mask, &mut args)?;
                let inputs = args.inputs.len();
                let o = self.heads_written(*y, &mut args, inputs)?;
                let attention = Box::new(self.attention_of(host, [q, k, v], qkv, o, mask)?);
                self.plain_written(*lse, &mut args);
                Library::AttentionLse { attention, lse: inputs + 1 }
            }
            ("attention_backward", [dy, q, k, v, y, lse, mask @ ..], [dq, dk, dv]) => {
                let of_result = self.heads_read(*dy, &mut args)?;
                let qkv = [q, k, v].map(|m| self.heads_read(*m, &mut args));
                let o = self.heads_read(*y, &mut args)?;
                let lse = self.plain_read(*lse, &mut args)?;
                let mask = self.mask_read(mask, &mut args)?;
                let inputs = args.inputs.len();
                let forward = self.attention_of(host, [*q, *k, *v], qkv, o, mask)?;
                let gradients = [dq, dk, dv].map(|m| self.heads_written(*m, &mut args, inputs));
                let [dq, dk, dv] = gradients;
                let gradients = [dq?, dk?, dv?];
                Library::AttentionBackward(Box::new(AttentionBackward {
                    forward,
                    lse,
                    of_result,
                    gradients,
                }))
            }
            ("layer_norm_backward", [dy, x, scale, other @ ..], [dx, dw, db]) => {
                let shape = self.graph.shape(*x);
                let (columns, dtype) = (shape[1].clone(), self.graph.dtype(*x));
                let rows = shape[0].clone();
                let dy = self.plain_read(*dy, &mut args)?;
                let x = self.plain_read(*x, &mut args)?;
                let scale = self.plain_read(*scale, &mut args)?;
                let other = other.first().map(|o| self.plain_read(*o, &mut args)).transpose()?;
                let inputs = args.inputs.len();
                for v in [dx, dw, db] {
                    self.plain_written(*v, &mut args);
                }
                Library::LayerNormBackward(LayerNormBackward {
                    rows,
                    columns,
                    eps: float(host, "eps")?,
                    dtype,
                    x,
                    dy,
                    scale,
                    other,
                    dx: inputs,
                    vectors: [inputs + 1, inputs + 2],
                })
            }
            _ => return Ok(false),
        };
        let note = Note { anchor: "library".to_string(), ..self.note(group) };
        let Args { inputs, outputs, moved } = args;
        self.plan.steps.push(Step::Library { call: Box::new(call), inputs, outputs, note });
        for (v, from) in moved {
            let wished = self.destination(v)?;
            let name = self.value_name(v);
            self.copy_step(&from, &wished, &name)?;
        }
        Ok(true)
    }

    fn attention_of(
        &self,
        host: &HostOp,
        [q, k, v]: [ValueId; 3],
        [at_q, at_k, at_v]: [Result<Heads>; 3],
        o: Heads,
        mask: Option<Heads>,
    ) -> Result<Attention> {
        let (q, k, v) = (self.graph.shape(q), self.graph.shape(k), self.graph.shape(v));
        let known = |d: &Dim| {
            d.as_const().ok_or_else(|| Error::unsupported("attention over heads of symbolic width"))
        };
        Ok(Attention {
            batch: q[0].clone(),
            heads: q[2].clone(),
            kv_heads: k[2].clone(),
            queries: q[1].clone(),
            keys: k[1].clone(),
            depth: known(&q[3])?,
            width: known(&v[3])?,
            q: at_q?,
            k: at_k?,
            v: at_v?,
            o,
            mask,
            scale: float(host, "scale")?,
            causal: flag(host, "causal"),
            zeros: true,
            tf32: false,
        })
    }

    /// Whether the copy engine takes lines of `[batch, row, head, column]`.
    fn fits_engine(layout: &Layout, dtype: DType) -> bool {
        let lines = LINE_BYTES / dtype.size() as i64;
        let whole = |d: &Dim| d.as_const().is_some_and(|n| n >= 0 && n % lines == 0);
        let far = layout.axes[..3].iter().all(|a| a.extent.is(1) || whole(&a.stride));
        let near = layout.axes[3].stride.is(1) || layout.axes[3].extent.is(1);
        far && near && whole(&layout.offset) && no_blocks(layout)
    }

    fn heads(layout: &Layout, param: usize, dtype: DType) -> Heads {
        let strides = [0, 2, 1].map(|i| {
            let axis = &layout.axes[i];
            if axis.extent.is(1) { Dim::new(0) } else { axis.stride.clone() }
        });
        Heads { param, dtype, offset: layout.offset.clone(), strides }
    }

    /// A matrix `[batch, row, head, column]` as an operand.
    fn heads_read(&mut self, v: ValueId, args: &mut Args) -> Result<Heads> {
        let dtype = self.graph.dtype(v);
        let mut place = self.place(v)?;
        let stored = self.plan.buffers[place.buffer].dtype;
        if stored != dtype || !Self::fits_engine(&place.layout, dtype) {
            place = self.row_major_copy_as(v, dtype, &place)?;
        }
        args.inputs.push(place.buffer);
        Ok(Self::heads(&place.layout, args.inputs.len() - 1, dtype))
    }

    /// A matrix `[batch, row, head, column]` as a result, behind so many operands.
    fn heads_written(&mut self, v: ValueId, args: &mut Args, inputs: usize) -> Result<Heads> {
        let dtype = self.graph.dtype(v);
        let wished = self.destination(v)?;
        let same = self.plan.buffers[wished.buffer].dtype == dtype;
        let place = if same && Self::fits_engine(&wished.layout, dtype) {
            wished
        } else {
            self.written_apart(v, args)
        };
        args.outputs.push(place.buffer);
        Ok(Self::heads(&place.layout, inputs + args.outputs.len() - 1, dtype))
    }

    /// A mask `[batch, head, row, key]`; axes of one element repeat.
    fn mask_read(&mut self, mask: &[ValueId], args: &mut Args) -> Result<Option<Heads>> {
        let &[v] = mask else { return Ok(None) };
        let dtype = self.graph.dtype(v);
        let mut place = self.place(v)?;
        let near = place.layout.axes[3].stride.is(1) || place.layout.axes[3].extent.is(1);
        let stored = self.plan.buffers[place.buffer].dtype;
        if !near || stored != dtype || !no_blocks(&place.layout) {
            place = self.row_major_copy_as(v, dtype, &place)?;
        }
        let strides = [0, 1, 2].map(|i| {
            let axis = &place.layout.axes[i];
            if axis.extent.is(1) { Dim::new(0) } else { axis.stride.clone() }
        });
        args.inputs.push(place.buffer);
        let (param, offset) = (args.inputs.len() - 1, place.layout.offset.clone());
        Ok(Some(Heads { param, dtype, offset, strides }))
    }

    /// A row-major operand: its parameter.
    fn plain_read(&mut self, v: ValueId, args: &mut Args) -> Result<usize> {
        let dtype = self.graph.dtype(v);
        let mut place = self.place(v)?;
        let plain = Layout::row_major(self.graph.shape(v));
        if place.layout != plain || self.plan.buffers[place.buffer].dtype != dtype {
            place = self.row_major_copy_as(v, dtype, &place)?;
        }
        args.inputs.push(place.buffer);
        Ok(args.inputs.len() - 1)
    }

    /// A row-major result.
    fn plain_written(&mut self, v: ValueId, args: &mut Args) {
        let plain = Layout::row_major(self.graph.shape(v));
        let place = match self.destination(v) {
            Ok(wished)
                if wished.layout == plain
                    && self.plan.buffers[wished.buffer].dtype == self.graph.dtype(v) =>
            {
                wished
            }
            _ => self.written_apart(v, args),
        };
        args.outputs.push(place.buffer);
    }

    /// Memory for a result that is copied to its place afterwards.
    fn written_apart(&mut self, v: ValueId, args: &mut Args) -> Place {
        let apart = self.in_arena(v, Layout::row_major(self.graph.shape(v)));
        self.plan.buffers[apart.buffer].dtype = self.graph.dtype(v);
        args.moved.push((v, apart.clone()));
        apart
    }
}
