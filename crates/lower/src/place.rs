//! Places: in which buffer, under which layout, each value lies.
//!
//! A view (reshape, permute, slice, expand) is its operand's place under another layout whenever
//! that layout exists; otherwise the operand is copied once into row-major order. Values that are
//! computed choose their place by who reads them: a model output is written where the caller wants
//! it, an operand of a concatenation straight into its slice, and a value that is only read through
//! permutations is stored in the order in which it is read.

use crate::fuse::is_view;
use crate::lowering::Lowering;
use tilewright_base::{DType, Error, Result};
use tilewright_graph::{Def, Op, ValueId};
use tilewright_layout::{Dim, Layout};
use tilewright_plan::{Buffer, BufferId, Storage};

/// A buffer, and where in it the elements of a value are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place {
    pub(crate) buffer: BufferId,
    pub(crate) layout: Layout,
}

/// Why a view of a layout cannot be had: it must be copied.
pub(crate) fn view(op: &Op, from: &Layout) -> Option<Layout> {
    match op {
        Op::Reshape(shape) => from.reshape(shape).or_else(|| {
            // Row-major stays row-major, also when the symbols do not show the equal products.
            from.is_row_major().then(|| Layout::row_major(shape))
        }),
        Op::Permute(perm) => Some(from.permute(perm)),
        Op::Expand(shape) => from.expand(shape),
        Op::Slice { starts, lens, steps } => {
            let mut layout = from.clone();
            for axis in 0..starts.len() {
                let whole = starts[axis].is(0)
                    && steps[axis] == 1
                    && lens[axis] == layout.axes[axis].extent;
                if !whole {
                    layout = layout.slice(axis, &starts[axis], &lens[axis], steps[axis])?;
                }
            }
            Some(layout)
        }
        _ => None,
    }
}

/// The layout of a view's operand under which the view has the layout `to`.
fn unview(op: &Op, to: &Layout, from_shape: &[Dim]) -> Option<Layout> {
    match op {
        Op::Reshape(_) => view(&Op::Reshape(from_shape.to_vec()), to),
        Op::Permute(perm) => {
            let mut inverse = vec![0; perm.len()];
            perm.iter().enumerate().for_each(|(i, &p)| inverse[p] = i);
            Some(to.permute(&inverse))
        }
        _ => None,
    }
}

impl Lowering<'_> {
    pub(crate) fn new_buffer(&mut self, v: ValueId, layout: Layout, storage: Storage) -> BufferId {
        let name = self.value_name(v);
        // Inputs and outputs are the caller's: they have the types of the model.
        let dtype = match storage {
            Storage::Arena | Storage::Const(_) => self.stored_type(v),
            Storage::Input(_) | Storage::Output(_) | Storage::State(_) => self.graph.dtype(v),
        };
        self.plan.buffers.push(Buffer { name, value: Some(v.0), dtype, layout, storage })
    }

    /// A name for people: the value's, or that of the node that makes it.
    pub(crate) fn value_name(&self, v: ValueId) -> String {
        let value = &self.graph.values[v];
        if !value.name.is_empty() {
            return value.name.clone();
        }
        match value.def {
            Def::Node(n, _) if !self.graph.nodes[n].origin.is_empty() => {
                self.graph.nodes[n].origin.clone()
            }
            _ => v.to_string(),
        }
    }

    /// Where a value can be read. Makes a copy step when a view needs one.
    pub(crate) fn place(&mut self, v: ValueId) -> Result<Place> {
        if let Some(place) = self.places.get(&v) {
            return Ok(place.clone());
        }
        let graph = self.graph;
        let place = match &graph.values[v].def {
            Def::Input(i) => {
                let layout = Layout::row_major(graph.shape(v));
                let buffer = self.new_buffer(v, layout.clone(), Storage::Input(*i));
                Place { buffer, layout }
            }
            Def::Const(_) => {
                let layout = match self.layouts.get(&v) {
                    Some(layout) => layout.clone(),
                    None => Layout::row_major(graph.shape(v)),
                };
                self.const_place(v, layout)
            }
            Def::Node(n, _) if is_view(&graph.nodes[*n].op) => {
                let node = &graph.nodes[*n];
                let from = self.place(node.inputs[0])?;
                match view(&node.op, &from.layout) {
                    Some(layout) => Place { buffer: from.buffer, layout },
                    None => {
                        let copy = self.copy_for_view(v, node.inputs[0], &from)?;
                        let layout = view(&node.op, &copy.layout).ok_or_else(|| {
                            Error::bug(format!("no view of a row-major tensor: {:?}", node.op))
                        })?;
                        Place { buffer: copy.buffer, layout }
                    }
                }
            }
            Def::Node(n, _) => {
                return Err(Error::bug(format!("value {v} of node {n} is read before it is made")));
            }
        };
        self.places.insert(v, place.clone());
        Ok(place)
    }

    /// A constant under a layout of its own; the same constant under the same layout is one buffer.
    pub(crate) fn const_place(&mut self, v: ValueId, layout: Layout) -> Place {
        self.const_place_as(v, self.stored_type(v), layout)
    }

    /// As [`Lowering::const_place`], rounded to a type when it is packed.
    pub(crate) fn const_place_as(&mut self, v: ValueId, dtype: DType, layout: Layout) -> Place {
        let key = (v, dtype, layout.clone());
        let known = self.consts.get(&key).copied();
        let buffer = known.unwrap_or_else(|| {
            let Def::Const(tensor) = &self.graph.values[v].def else {
                unreachable!("asked for constants only")
            };
            let storage = Storage::Const(tensor.clone());
            let buffer = self.new_buffer(v, layout.clone(), storage);
            self.plan.buffers[buffer].dtype = dtype;
            self.consts.insert(key, buffer);
            buffer
        });
        Place { buffer, layout }
    }

    /// A row-major copy of a value in the arena, made once.
    pub(crate) fn row_major_copy(&mut self, v: ValueId, from: &Place) -> Result<Place> {
        self.row_major_copy_as(v, self.plan.buffers[from.buffer].dtype, from)
    }

    /// As [`Lowering::row_major_copy`], in this type.
    pub(crate) fn row_major_copy_as(
        &mut self,
        v: ValueId,
        dtype: DType,
        from: &Place,
    ) -> Result<Place> {
        self.copy_as(v, dtype, from, Layout::row_major(self.graph.shape(v)))
    }

    /// A copy of a value in the arena in this type under a layout, made once.
    pub(crate) fn copy_as(
        &mut self,
        v: ValueId,
        dtype: DType,
        from: &Place,
        layout: Layout,
    ) -> Result<Place> {
        let key = (v, dtype, layout.clone());
        if let Some(copy) = self.copies.get(&key) {
            return Ok(copy.clone());
        }
        let name = self.value_name(v);
        let buffer = self.new_buffer(v, layout.clone(), Storage::Arena);
        self.plan.buffers[buffer].dtype = dtype;
        let to = Place { buffer, layout };
        self.copy_step(from, &to, &name)?;
        self.copies.insert(key, to.clone());
        Ok(to)
    }

    /// Where a computed value is to be written.
    pub(crate) fn destination(&mut self, v: ValueId) -> Result<Place> {
        if let Some(place) = self.places.get(&v) {
            return Ok(place.clone());
        }
        let place = self.wish(v)?;
        self.places.insert(v, place.clone());
        Ok(place)
    }

    /// The users of a value when it has exactly one, and is no output.
    fn only_user(&self, v: ValueId) -> Option<tilewright_graph::NodeId> {
        match self.users[v].as_slice() {
            [one] if !self.graph.is_output(v) => Some(*one),
            _ => None,
        }
    }

    fn wish(&mut self, v: ValueId) -> Result<Place> {
        let graph = self.graph;
        if let Some(layout) = self.layouts.get(&v)
            && !graph.is_output(v)
        {
            let layout = layout.clone();
            return Ok(self.in_arena(v, layout));
        }
        if let Some(place) = self.in_seen_output(v)? {
            return Ok(place);
        }
        // Views that only this value feeds, as far as they go.
        let mut chain = Vec::new();
        let mut end = v;
        while let Some(user) = self.only_user(end) {
            let node = &graph.nodes[user];
            if !matches!(node.op, Op::Reshape(_) | Op::Permute(_)) {
                break;
            }
            chain.push(user);
            end = node.outputs[0];
        }
        // The layout that `v` must have for the first `len` views of the chain to end in this one.
        let before = |len: usize, end: &Layout| {
            chain[..len].iter().rev().try_fold(end.clone(), |layout, &n| {
                let node = &graph.nodes[n];
                unview(&node.op, &layout, graph.shape(node.inputs[0]))
            })
        };
        for len in (0..=chain.len()).rev() {
            let last = if len == 0 { v } else { graph.nodes[chain[len - 1]].outputs[0] };
            let plain = Layout::row_major(graph.shape(last));
            // Asking for an output's place promises to write it.
            if graph.is_output(last) && before(len, &plain).is_none() {
                continue;
            }
            let target = match self.target_of(last)? {
                Some(place) => place,
                None => Place { buffer: BufferId(u32::MAX), layout: plain },
            };
            let Some(layout) = before(len, &target.layout) else { continue };
            if target.buffer != BufferId(u32::MAX) {
                // The views at the end then lie there too.
                self.places.insert(last, target.clone());
                return Ok(Place { buffer: target.buffer, layout });
            }
            return Ok(self.in_arena(v, layout));
        }
        let layout = Layout::row_major(graph.shape(v));
        Ok(self.in_arena(v, layout))
    }

    /// A value of several readers in the memory of an output that is the same elements in another shape, or with its axes in another
    /// order, the nearest one being the same: lines of it are read then as they were.
    fn in_seen_output(&mut self, v: ValueId) -> Result<Option<Place>> {
        let graph = self.graph;
        if graph.is_output(v) || self.users[v].len() < 2 {
            return Ok(None);
        }
        let plain = Layout::row_major(graph.shape(v));
        for &user in &self.users[v].clone() {
            let node = &graph.nodes[user];
            let seen = node.outputs[0];
            if !matches!(node.op, Op::Reshape(_) | Op::Permute(_)) || !graph.is_output(seen) {
                continue;
            }
            let layout = match node.op {
                // Row-major in any shape (strides of single elements apart).
                Op::Reshape(_) => plain.clone(),
                _ => {
                    let there = Layout::row_major(graph.shape(seen));
                    let Some(layout) = unview(&node.op, &there, graph.shape(v)) else { continue };
                    let lines = |l: &Layout| l.axes.last().cloned();
                    if layout != plain && lines(&layout) != lines(&plain) {
                        continue;
                    }
                    layout
                }
            };
            if let Some(place) = self.target_of(seen)? {
                self.places.insert(seen, place.clone());
                return Ok(Some(Place { buffer: place.buffer, layout }));
            }
        }
        Ok(None)
    }

    /// A row-major copy for a view that has none where the value lies. A reshape that is an output gets it in the output's memory.
    fn copy_for_view(&mut self, seen: ValueId, source: ValueId, from: &Place) -> Result<Place> {
        let graph = self.graph;
        let dtype = self.plan.buffers[from.buffer].dtype;
        let layout = Layout::row_major(graph.shape(source));
        let key = (source, dtype, layout.clone());
        let reshaped =
            graph.producer(seen).is_some_and(|n| matches!(graph.nodes[n].op, Op::Reshape(_)));
        let wanted = reshaped && graph.is_output(seen) && graph.dtype(seen) == dtype;
        if !wanted || self.copies.contains_key(&key) {
            return self.row_major_copy(source, from);
        }
        let Some(place) = self.target_of(seen)? else { return self.row_major_copy(source, from) };
        let to = Place { buffer: place.buffer, layout };
        let name = self.value_name(seen);
        self.copy_step(from, &to, &name)?;
        self.copies.insert(key, to.clone());
        Ok(to)
    }

    pub(crate) fn in_arena(&mut self, v: ValueId, layout: Layout) -> Place {
        let buffer = self.new_buffer(v, layout.clone(), Storage::Arena);
        Place { buffer, layout }
    }

    /// Where somebody else wants the value: the caller, or a concatenation.
    fn target_of(&mut self, v: ValueId) -> Result<Option<Place>> {
        let graph = self.graph;
        if let Some(i) = graph.outputs.iter().position(|(_, o)| *o == v)
            && !self.written.contains(&i)
        {
            self.written.insert(i);
            let layout = Layout::row_major(graph.shape(v));
            let buffer = self.new_buffer(v, layout.clone(), Storage::Output(i));
            return Ok(Some(Place { buffer, layout }));
        }
        let Some(user) = self.only_user(v) else { return Ok(None) };
        let node = &graph.nodes[user];
        let Op::Concat(axis) = node.op else { return Ok(None) };
        if node.inputs.iter().filter(|&&i| i == v).count() != 1 {
            return Ok(None);
        }
        let whole = self.destination(node.outputs[0])?;
        Ok(self.concat_slice(user, axis, v, &whole))
    }

    /// The part of a concatenation's place that holds its first operand equal to `v`.
    pub(crate) fn concat_slice(
        &self,
        node: tilewright_graph::NodeId,
        axis: usize,
        v: ValueId,
        whole: &Place,
    ) -> Option<Place> {
        let mut start = Dim::new(0);
        for &operand in &self.graph.nodes[node].inputs {
            let len = &self.graph.shape(operand)[axis];
            if operand == v {
                // A blocked axis must not be cut inside a block: neighbours would share it.
                let block = whole.layout.axes[axis].block.as_ref().map(|b| Dim::new(b.size));
                let cuts = block.is_some_and(|b| len.exact_div(&b).is_none());
                let layout = whole.layout.slice(axis, &start, len, 1).filter(|_| !cuts)?;
                return Some(Place { buffer: whole.buffer, layout });
            }
            start = start + len;
        }
        None
    }
}
