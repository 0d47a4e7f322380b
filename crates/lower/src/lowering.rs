//! [`lower`]: the way from a graph to a plan, one group after another.

use crate::block::{Dag, DagNode, DagOp, DagStore, Ext, KernelParts, zero};
use crate::fuse::{Anchor, AxisMap, FusionPlan, Group, fuse, label, see_through};
use crate::place::Place;
use crate::target::CpuTarget;
use crate::views::{broadcast_axis, nominal};
use crate::{Device, Layouts, Options, cost};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::{DType, Error, IdVec, Result};
use tilewright_graph::{Graph, NodeId, Op, PadMode, ValueId};
use tilewright_layout::{Axis, Dim, Layout, numel};
use tilewright_plan::{
    BufferId, Form, HostCall, KernelId, Note, Plan, PlanKernel, Reshaped, Step, Storage,
};
use tilewright_target::Precision;
use tilewright_tile::{CpuKnobs, MatrixUnit, ReduceKind, Schedule};

/// State of one lowering.
pub(crate) struct Lowering<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) target: &'a CpuTarget,
    pub(crate) layouts: &'a Layouts,
    pub(crate) host: &'a dyn Fn(&Graph, NodeId) -> HostCall,
    pub(crate) users: IdVec<ValueId, Vec<NodeId>>,
    pub(crate) plan: Plan,
    pub(crate) places: BTreeMap<ValueId, Place>,
    pub(crate) copies: BTreeMap<(ValueId, DType, Layout), Place>,
    pub(crate) consts: BTreeMap<(ValueId, DType, Layout), BufferId>,
    pub(crate) precision: Precision,
    pub(crate) device: Device,
    /// Convolutions read their windows through the copy engine.
    pub(crate) windows: bool,
    /// Values that a GPU stores in 16 bits.
    pub(crate) narrow: BTreeSet<ValueId>,
    /// Which views are copied rather than read, and why.
    pub(crate) views: Vec<String>,
    /// On a GPU: kernels that sum over rows.
    pub(crate) row_sums: Vec<crate::gpu::RowSum>,
    /// Model outputs that some step writes.
    pub(crate) written: BTreeSet<usize>,
}

/// Lowers a graph with default options; see [`lower_with`].
pub fn lower(
    graph: &Graph,
    target: &CpuTarget,
    layouts: &Layouts,
    host: &dyn Fn(&Graph, NodeId) -> HostCall,
) -> Result<Plan> {
    Ok(lower_with(graph, target, layouts, host, &Options::default())?.0)
}

/// Lowers a graph: groups its nodes, gives every value a place, and writes a kernel per group.
/// `layouts` says where constants and results shall not be row-major; `host` makes the call for a
/// node without a kernel. Also gives the groups, for people.
pub fn lower_with(
    graph: &Graph,
    target: &CpuTarget,
    layouts: &Layouts,
    host: &dyn Fn(&Graph, NodeId) -> HostCall,
    options: &Options,
) -> Result<(Plan, FusionPlan)> {
    let narrow = matches!(options.precision, Precision::F16 | Precision::Bf16);
    let prologues = options.device == Device::Cpu || options.fold && narrow;
    let mut fusion = fuse(graph, target, options.fusion, options.device, prologues);
    let layouts = &crate::gpu::channels_last(graph, layouts, options);
    let mut low = Lowering {
        graph,
        target,
        layouts,
        host,
        users: graph.users(),
        plan: Plan {
            name: graph.name.clone(),
            symbols: graph.symbols.clone(),
            inputs: signature(graph, graph.inputs.iter().map(|&v| (name_of(graph, v), v))),
            outputs: signature(graph, graph.outputs.iter().cloned()),
            reshapes: reshapes(graph),
            ..Plan::default()
        },
        places: BTreeMap::new(),
        copies: BTreeMap::new(),
        consts: BTreeMap::new(),
        precision: options.precision,
        device: options.device,
        windows: options.windows,
        narrow: crate::gpu::narrow_values(graph, options),
        views: Vec::new(),
        written: BTreeSet::new(),
        row_sums: Vec::new(),
    };
    if let Some(capacity) = options.states.as_ref().filter(|_| options.device == Device::Cpu) {
        low.keep_states(capacity)?;
    }
    // Inputs have their buffers whether anybody reads them or not.
    for &v in &graph.inputs {
        low.place(v)?;
    }
    for group in &fusion.groups {
        if group.outputs.is_empty() {
            continue;
        }
        let origin = group.nodes.first().map(|&n| graph.nodes[n].origin.clone());
        low.group(group).map_err(|e| {
            e.with_context(format!("lowering node `{}`", origin.unwrap_or_default()))
        })?;
    }
    low.outputs()?;
    fusion.views = low.views;
    if low.device == Device::Gpu {
        crate::gpu::pair_products(&mut low.plan)?;
        if options.statistics {
            let said = crate::gpu::sums_from_products(&mut low.plan, &low.row_sums)?;
            fusion.views.extend(said);
        }
    }
    if cfg!(debug_assertions) {
        verify_plan(&low.plan)?;
    }
    Ok((low.plan, fusion))
}

/// Checks that every kernel keeps the promises of the tile IR and that its schedule is legal; the
/// error shows the kernel. Lowering does this itself in debug builds.
pub fn verify_plan(plan: &Plan) -> Result<()> {
    for (_, PlanKernel { kernel, schedule, forms }) in plan.kernels.iter() {
        let checked = tilewright_tile::verify(kernel)
            .and_then(|()| tilewright_tile::verify_schedule(kernel, schedule));
        checked.map_err(|e| e.with_note(format!("{kernel}\n{schedule}")))?;
        for form in forms {
            if let Form::Program { kernel, .. } = form {
                tilewright_tile::verify(kernel).map_err(|e| e.with_note(kernel.to_string()))?;
            }
        }
    }
    Ok(())
}

/// Reshapes that are right for some sizes only.
fn reshapes(graph: &Graph) -> Vec<Reshaped> {
    let shapes = graph.live().filter_map(|(_, node)| match &node.op {
        Op::Reshape(to) => Some((node, graph.shape(node.inputs[0]), to)),
        _ => None,
    });
    shapes
        .filter(|(_, from, to)| numel(from) != numel(to))
        .map(|(node, from, to)| Reshaped {
            node: node.origin.clone(),
            from: from.to_vec(),
            to: to.clone(),
        })
        .collect()
}

fn name_of(graph: &Graph, v: ValueId) -> String {
    let name = &graph.values[v].name;
    if name.is_empty() { v.to_string() } else { name.clone() }
}

fn signature(
    graph: &Graph,
    values: impl Iterator<Item = (String, ValueId)>,
) -> Vec<(String, DType, Vec<Dim>)> {
    values.map(|(name, v)| (name, graph.dtype(v), graph.shape(v).to_vec())).collect()
}

fn is_grouped(graph: &Graph, node: NodeId) -> bool {
    matches!(graph.nodes[node].op, Op::GroupProduct { .. })
}

/// The tile program's form of a reduction kind.
pub(crate) fn reduce_kind(kind: tilewright_graph::ReduceKind) -> ReduceKind {
    match kind {
        tilewright_graph::ReduceKind::Sum => ReduceKind::Sum,
        tilewright_graph::ReduceKind::Prod => ReduceKind::Prod,
        tilewright_graph::ReduceKind::Max => ReduceKind::Max,
        tilewright_graph::ReduceKind::Min => ReduceKind::Min,
    }
}

impl Lowering<'_> {
    /// Vector knobs of the target.
    pub(crate) fn knobs(&self) -> CpuKnobs {
        crate::schedule::knobs(self.target)
    }

    /// Knobs of a kernel whose results go through these functions: with neighbours side by side where one of them is an
    /// elementary function, whose steps wait for each other.
    pub(crate) fn with_chains(&self, knobs: CpuKnobs, dag: &Dag) -> CpuKnobs {
        let dear = |n: &DagNode| matches!(&n.op, DagOp::Map(f) if crate::block::func_cost(f) >= 10);
        match !self.on_gpu() && dag.nodes.iter().any(dear) {
            true => CpuKnobs { jam: knobs.jam.max(self.jam()), ..knobs },
            false => knobs,
        }
    }

    /// Neighbours side by side that the registers hold.
    pub(crate) fn jam(&self) -> u32 {
        if self.target.lanes >= 16 { 4 } else { 2 }
    }

    /// The type in which an operand of a product is multiplied: `f32` becomes `bf16` when the user
    /// allows it.
    pub(crate) fn operand_type(&self, dtype: DType) -> DType {
        match (self.precision, dtype) {
            (Precision::Bf16, DType::F32) => DType::BF16,
            (Precision::F16, DType::F32) => DType::F16,
            _ => dtype,
        }
    }

    /// Knobs of a product of operands of these types: with the unit that takes them.
    pub(crate) fn product_knobs(&self, a: DType, b: DType, acc: DType) -> CpuKnobs {
        let here = [self.target.bf16_unit, self.target.int8_unit];
        let unit = here.into_iter().find(|u| *u != MatrixUnit::Fma && u.takes(a, b, acc));
        let unit = unit.unwrap_or_default();
        match unit {
            MatrixUnit::Bf16Tile => CpuKnobs::amx(),
            MatrixUnit::I8Tile => CpuKnobs::amx_bytes(),
            unit => CpuKnobs { unit, ..self.knobs() },
        }
    }

    /// One group to steps.
    fn group(&mut self, group: &Group) -> Result<()> {
        match group.anchor {
            Anchor::Map => self.map_group(group),
            Anchor::Rows => self.rows_group(group),
            Anchor::Contract => match group.nodes.iter().any(|&n| is_grouped(self.graph, n)) {
                true => self.group_product_group(group),
                false => self.contract_group(group),
            },
            Anchor::Conv => self.conv_group(group),
            Anchor::Window => self.window_group(group),
            Anchor::Attention => self.attention_group(group),
            Anchor::Gather => self.gather_group(group),
            Anchor::Concat => self.concat_group(group),
            Anchor::Dims => self.dims_group(group),
            Anchor::Host => self.host_group(group),
        }
    }

    /// What a group's kernel is called: its operators in order, without what only moves data.
    pub(crate) fn kernel_name(&self, group: &Group) -> String {
        let mut parts: Vec<String> =
            group.nodes.iter().map(|&n| label(&self.graph.nodes[n])).collect();
        parts.dedup();
        parts.truncate(6);
        let name: String = parts
            .join("_")
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' })
            .collect();
        if name.starts_with(|c: char| c.is_ascii_alphabetic()) { name } else { format!("k_{name}") }
    }

    /// Adds a launch; equal kernels with equal schedules are one.
    pub(crate) fn launch(
        &mut self,
        parts: KernelParts,
        tiles: Vec<(String, i64)>,
        knobs: CpuKnobs,
        note: Note,
    ) -> Result<()> {
        self.launch_forms(parts, tiles, knobs, Vec::new(), note)
    }

    /// As [`Lowering::launch`], with other forms of the kernel.
    pub(crate) fn launch_forms(
        &mut self,
        parts: KernelParts,
        tiles: Vec<(String, i64)>,
        knobs: CpuKnobs,
        forms: Vec<Form>,
        note: Note,
    ) -> Result<()> {
        let (kernel, args) = parts.finish(&self.graph.symbols);
        let tiles = tiles.into_iter().map(|(name, v)| (name.as_str().into(), v)).collect();
        let schedule = Schedule { tiles, cpu: knobs };
        let known = self
            .plan
            .kernels
            .iter()
            .find(|(_, k)| k.schedule == schedule && *k.kernel == kernel && k.forms == forms)
            .map(|(id, _)| id);
        let sizes = kernel.symbols.iter().map(|s| Dim::sym(s.name.clone())).collect();
        let kernel: KernelId = known.unwrap_or_else(|| {
            self.plan.kernels.push(PlanKernel { kernel: kernel.into(), schedule, forms })
        });
        self.plan.steps.push(Step::Launch { kernel, args, sizes, note });
        Ok(())
    }

    /// The note of a group's step.
    pub(crate) fn note(&self, group: &Group) -> Note {
        cost::note(self.graph, group)
    }

    /// A layout of the value's own shape, seen over the reference axes.
    pub(crate) fn over_reference(&self, layout: &Layout, axes: &AxisMap, shape: &[Dim]) -> Layout {
        let mut out = Layout {
            axes: shape.iter().map(|d| broadcast_axis(d.clone())).collect(),
            offset: layout.offset.clone(),
        };
        for (axis, reference) in layout.axes.iter().zip(axes) {
            if let Some(r) = reference
                && !axis.extent.is(1)
            {
                out.axes[*r] = Axis { extent: shape[*r].clone(), ..axis.clone() };
            }
        }
        out
    }

    /// Loads an outside value that runs along these reference axes.
    pub(crate) fn outside(
        &mut self,
        dag: &mut Dag,
        v: ValueId,
        axes: &AxisMap,
        shape: &[Dim],
    ) -> Result<usize> {
        let place = self.place(v)?;
        let layout = self.over_reference(&place.layout, axes, shape);
        let dtype = self.plan.buffers[place.buffer].dtype;
        let same = |e: &Ext| e.buffer == place.buffer && e.layout == layout && e.shift.is_none();
        let known = dag
            .nodes
            .iter()
            .position(|n| matches!(&n.op, DagOp::Ext(e) if same(e) && n.dtype == dtype));
        let loaded = known.unwrap_or_else(|| {
            let varies = layout.axes.iter().map(|a| !crate::views::is_broadcast(a)).collect();
            let ext = Ext { buffer: place.buffer, dtype, layout, shift: None, fill: zero(dtype) };
            dag.push(DagOp::Ext(ext), vec![], varies, dtype)
        });
        Ok(dag.cast(loaded, self.graph.dtype(v)))
    }

    /// The elementwise and reducing part of a group. The anchor's result (for anchors that are not
    /// rows) is node 0.
    pub(crate) fn dag(&mut self, group: &Group) -> Result<Dag> {
        let graph = self.graph;
        let mut dag = Dag::default();
        let mut made: BTreeMap<ValueId, usize> = BTreeMap::new();
        let rank = group.shape.len();
        let computed = |n: &&NodeId| group.prologues.iter().any(|p| p.nodes.contains(n));
        for &id in group.nodes.iter().filter(|n| !computed(n)) {
            let node = &graph.nodes[id];
            let out = node.outputs[0];
            let result = match &node.op {
                Op::Map(_) => {
                    self.map_node(&mut dag, &group.vals, &group.shape, &mut made, id)?;
                    continue;
                }
                Op::Iota { ty, axis } => {
                    let mut varies = vec![false; rank];
                    varies[*axis] = !group.shape[*axis].is(1);
                    dag.push(DagOp::Iota(*axis), vec![], varies, ty.dtype)
                }
                Op::Random { ty, seed } => {
                    dag.push(DagOp::Random(*seed), vec![], vec![true; rank], ty.dtype)
                }
                Op::Pad { lo, mode: PadMode::Constant(fill), .. } => {
                    let x = node.inputs[0];
                    let place = self.place(x)?;
                    let dtype = self.plan.buffers[place.buffer].dtype;
                    let shift = lo.iter().map(|d| Dim::new(0) - d).collect();
                    let ext = Ext {
                        buffer: place.buffer,
                        dtype,
                        layout: place.layout,
                        shift: Some(shift),
                        fill: *fill,
                    };
                    let padded = dag.push(DagOp::Ext(ext), vec![], vec![true; rank], dtype);
                    dag.cast(padded, graph.dtype(x))
                }
                op if group.anchor == Anchor::Rows => {
                    let identity: AxisMap = (0..rank).map(Some).collect();
                    let mut args = Vec::new();
                    for (i, &v) in node.inputs.iter().enumerate() {
                        // Scale and bias align right.
                        let r = graph.shape(v).len();
                        let axes: AxisMap = identity[rank - r..].to_vec();
                        args.push(if i == 0 {
                            self.operand(&mut dag, &group.shape, &made, v, &identity)?
                        } else {
                            self.operand(&mut dag, &group.shape, &made, v, &axes)?
                        });
                    }
                    crate::rows::expand(&mut dag, op, &args, &group.reduced, &group.shape)
                }
                _ => dag.push(DagOp::Anchor, vec![], vec![true; rank], graph.dtype(out)),
            };
            made.insert(out, result);
        }
        for &v in &group.outputs {
            let place = self.destination(v)?;
            let layout = self.over_reference(&place.layout, &group.vals[&v], &group.shape);
            let node = dag.cast(made[&v], self.plan.buffers[place.buffer].dtype);
            dag.stores.push(DagStore { node, buffer: place.buffer, layout });
        }
        Ok(dag)
    }

    /// Adds a map, with what it loads; `vals` has its axes in `shape`.
    pub(crate) fn map_node(
        &mut self,
        dag: &mut Dag,
        vals: &BTreeMap<ValueId, AxisMap>,
        shape: &[Dim],
        made: &mut BTreeMap<ValueId, usize>,
        id: NodeId,
    ) -> Result<()> {
        let node = &self.graph.nodes[id];
        let Op::Map(func) = &node.op else { return Err(Error::bug("a map")) };
        let axes = vals[&node.outputs[0]].clone();
        let mut args = Vec::new();
        for &v in &node.inputs {
            args.push(self.operand(dag, shape, made, v, &axes)?);
        }
        let result = dag.map(func.clone(), args, shape.len());
        made.insert(node.outputs[0], result);
        Ok(())
    }

    /// An operand of a node inside a group over `reference`, whose result runs along `axes`: a node made
    /// before, or a load.
    fn operand(
        &mut self,
        dag: &mut Dag,
        reference: &[Dim],
        made: &BTreeMap<ValueId, usize>,
        v: ValueId,
        axes: &AxisMap,
    ) -> Result<usize> {
        let (base, _) = see_through(self.graph, v);
        if let Some(&node) = made.get(&base) {
            return Ok(node);
        }
        let rank = self.graph.shape(v).len();
        let shift = axes.len() - rank;
        let aligned: AxisMap = axes[shift..].to_vec();
        self.outside(dag, v, &aligned, reference)
    }

    /// Copies a tensor from one place to another.
    pub(crate) fn copy_step(&mut self, from: &Place, to: &Place, name: &str) -> Result<()> {
        let shape = to.layout.shape();
        let [dtype, wanted] = [from, to].map(|p| self.plan.buffers[p.buffer].dtype);
        let mut dag = Dag::default();
        let layout = Layout {
            axes: from
                .layout
                .axes
                .iter()
                .zip(&shape)
                .map(|(a, d)| match crate::views::is_broadcast(a) {
                    true => broadcast_axis(d.clone()),
                    false => Axis { extent: d.clone(), ..a.clone() },
                })
                .collect(),
            offset: from.layout.offset.clone(),
        };
        let varies = layout.axes.iter().map(|a| !crate::views::is_broadcast(a)).collect();
        let ext = Ext { buffer: from.buffer, dtype, layout, shift: None, fill: zero(dtype) };
        let x = dag.push(DagOp::Ext(ext), vec![], varies, dtype);
        let node = dag.cast(x, wanted);
        dag.stores.push(DagStore { node, buffer: to.buffer, layout: to.layout.clone() });
        let bytes = tilewright_layout::numel(&shape) * (dtype.size() + wanted.size()) as i64;
        let note = Note {
            label: "copy".to_string(),
            anchor: "map".to_string(),
            nodes: vec![name.to_string()],
            estimate_ns: cost::copy_ns(self.target, nominal(&bytes, &self.graph.symbols) as f64),
            bytes,
            ..Note::default()
        };
        self.map_kernel("copy".to_string(), &dag, &shape, note)
    }

    /// Operands are written into slices of one buffer; what already lies there needs nothing.
    fn concat_group(&mut self, group: &Group) -> Result<()> {
        let id = group.nodes[0];
        let node = &self.graph.nodes[id];
        let Op::Concat(axis) = node.op else {
            return Err(Error::bug("a concatenation group without one"));
        };
        let out = node.outputs[0];
        let mut whole = self.destination(out)?;
        let fits = |low: &Self, whole: &Place| {
            node.inputs.iter().all(|&v| low.concat_slice(id, axis, v, whole).is_some())
        };
        if !fits(self, &whole) {
            // Blocks would be cut: nobody wrote a slice yet, so row-major is as good.
            whole = self.in_arena(out, Layout::row_major(self.graph.shape(out)));
            self.places.insert(out, whole.clone());
        }
        let mut start = Dim::new(0);
        for &v in &node.inputs {
            let len = self.graph.shape(v)[axis].clone();
            let layout = whole.layout.slice(axis, &start, &len, 1);
            let layout = layout.ok_or_else(|| Error::bug("a slice of a concatenation"))?;
            let to = Place { buffer: whole.buffer, layout };
            let from = self.place(v)?;
            if from != to {
                let name = self.value_name(v);
                self.copy_step(&from, &to, &name)?;
            }
            start = start + len;
        }
        Ok(())
    }

    /// Sizes stored as data.
    fn dims_group(&mut self, group: &Group) -> Result<()> {
        let node = &self.graph.nodes[group.nodes[0]];
        let Op::Dims(dims) = &node.op else { return Err(Error::bug("a size group without one")) };
        let place = self.destination(node.outputs[0])?;
        let mut k = KernelParts::new("dims", &self.graph.symbols);
        let param = k.output(place.buffer, DType::I64, place.layout);
        k.grid("g", Dim::new(1));
        for (i, d) in dims.iter().enumerate() {
            let tile = k.b.iota(DType::I64, 0, d.clone(), vec![Dim::new(1)]);
            k.b.store(param, vec![Dim::from(i)], tile);
        }
        let (knobs, note) = (self.knobs(), self.note(group));
        self.launch(k, vec![], knobs, note)
    }

    /// A node that the interpreter runs: operands and results are row-major buffers.
    pub(crate) fn host_group(&mut self, group: &Group) -> Result<()> {
        if self.library_group(group)? {
            return Ok(());
        }
        let id = group.nodes[0];
        let node = &self.graph.nodes[id];
        let mut inputs = Vec::new();
        for &v in &node.inputs {
            inputs.push(self.plain_buffer(v)?);
        }
        let mut outputs = Vec::new();
        for &v in &node.outputs {
            let wished = self.destination(v)?;
            let plain = Layout::row_major(self.graph.shape(v));
            let buffer = &self.plan.buffers[wished.buffer];
            let whole = buffer.layout == plain && buffer.dtype == self.graph.dtype(v);
            if wished.layout == plain && whole {
                outputs.push(wished.buffer);
                continue;
            }
            // Written apart, and copied to where it is wanted afterwards.
            let apart = self.in_arena(v, plain);
            self.plan.buffers[apart.buffer].dtype = self.graph.dtype(v);
            outputs.push(apart.buffer);
        }
        let note = self.note(group);
        let buffers = (inputs.as_slice(), outputs.as_slice());
        if !self.top_k(id, buffers, &note)? && !self.places(id, buffers, &note)? {
            let op = (self.host)(self.graph, id);
            self.plan.steps.push(Step::Host { op, inputs, outputs: outputs.clone(), note });
        }
        for (&v, buffer) in node.outputs.iter().zip(outputs) {
            let wished = self.destination(v)?;
            if wished.buffer != buffer {
                let from = Place { buffer, layout: Layout::row_major(self.graph.shape(v)) };
                let name = self.value_name(v);
                self.copy_step(&from, &wished, &name)?;
            }
        }
        Ok(())
    }

    /// A buffer that holds exactly this value, row-major.
    fn plain_buffer(&mut self, v: ValueId) -> Result<BufferId> {
        let plain = Layout::row_major(self.graph.shape(v));
        let dtype = self.graph.dtype(v);
        if self.graph.as_const(v).is_some() {
            return Ok(self.const_place_as(v, dtype, plain).buffer);
        }
        let place = self.place(v)?;
        let buffer = &self.plan.buffers[place.buffer];
        if place.layout == plain && buffer.layout == plain && buffer.dtype == dtype {
            return Ok(place.buffer);
        }
        Ok(self.row_major_copy_as(v, dtype, &place)?.buffer)
    }

    /// Model outputs that no step has written yet: inputs, constants, views, and repeats.
    fn outputs(&mut self) -> Result<()> {
        for (i, (name, v)) in self.graph.outputs.iter().enumerate() {
            if self.written.contains(&i) {
                continue;
            }
            let from = self.place(*v)?;
            if self.written.contains(&i) {
                continue;
            }
            let layout = Layout::row_major(self.graph.shape(*v));
            let buffer = self.new_buffer(*v, layout.clone(), Storage::Output(i));
            self.copy_step(&from, &Place { buffer, layout }, name)?;
            self.written.insert(i);
        }
        Ok(())
    }
}
