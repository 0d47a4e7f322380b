//! Which loads feed the tensor cores.
//!
//! A stream is a load inside the loop whose tile is an operand of a product, perhaps through a
//! transposition or after dropping axes of extent 1. Its tiles go through a ring in shared memory,
//! in the orientation in which the product reads them; nothing is moved to transpose.

use crate::schedule::ProductKind;
use std::collections::BTreeMap;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Swizzle, Windows};
use tilewright_expr::{ExprId, Func, FuncBuilder, Op, Value as Constant};
use tilewright_layout::Dim;
use tilewright_tile::{For, Kernel, ParamId, Stmt, TileId, TileOp};

/// Definitions of tiles, by tile.
pub(crate) type Defs<'a> = BTreeMap<TileId, &'a TileOp>;

/// Collects the `Let`s of a list of steps, not of nested loops.
pub(crate) fn definitions(stmts: &[Stmt]) -> Defs<'_> {
    stmts
        .iter()
        .filter_map(|s| match s {
            Stmt::Let(id, op) => Some((*id, op)),
            _ => None,
        })
        .collect()
}

/// A tile seen through transpositions and dropped unit axes: a load, and which axis of its
/// parameter each axis of the tile runs along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoadView {
    pub(crate) load: TileId,
    pub(crate) param: ParamId,
    pub(crate) index: Vec<Dim>,
    /// Axis of the parameter for each axis of the tile.
    pub(crate) axes: Vec<usize>,
    /// Lines are outputs of a window, not lines of the parameter.
    pub(crate) windows: Option<WindowTap>,
}

/// Which windows, and which of their taps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WindowTap {
    pub(crate) windows: Windows,
    /// Distance from a window's first pixel: down, right.
    pub(crate) tap: [Dim; 2],
}

/// Names of the parameters of [`window_line`].
const WINDOW_LINE: [&str; 11] = [
    "output", "down", "right", "height", "width", "rows", "cols", "step_y", "step_x", "before_y",
    "before_x",
];

/// The line of a list of pixels that an output of a window sees at a tap, -1 outside the image: what
/// [`Windows`](tilewright_device::Windows) says. A gather of such lines may be the copy engine's.
pub fn window_line() -> Func {
    let mut b = FuncBuilder::new();
    let [output, down, right, height, width, rows, cols, step_y, step_x, before_y, before_x] =
        WINDOW_LINE.map(|name| b.param(name, DType::I64));
    let zero = b.constant_int(0, DType::I64);
    let row = b.op(Op::Div, &[output, cols]);
    let image = b.op(Op::Div, &[row, rows]);
    let mut inside = Vec::new();
    let mut place = |b: &mut FuncBuilder, at, [count, step, tap, before, size]: [ExprId; 5]| {
        let at = b.op(Op::Rem, &[at, count]);
        let at = b.op(Op::Mul, &[at, step]);
        let at = b.op(Op::Add, &[at, tap]);
        let at = b.op(Op::Sub, &[at, before]);
        inside.push(b.op(Op::Ge, &[at, zero]));
        inside.push(b.op(Op::Lt, &[at, size]));
        at
    };
    let y = place(&mut b, row, [rows, step_y, down, before_y, height]);
    let x = place(&mut b, output, [cols, step_x, right, before_x, width]);
    let line = b.op(Op::Mul, &[image, height]);
    let line = b.op(Op::Add, &[line, y]);
    let line = b.op(Op::Mul, &[line, width]);
    let line = b.op(Op::Add, &[line, x]);
    let outside = b.constant_int(-1, DType::I64);
    let line = inside.iter().fold(line, |line, &c| b.op(Op::Select, &[c, line, outside]));
    b.finish(line)
}

/// Resolves the lines of a gather to outputs of windows: their first, and which windows.
fn window_lines(defs: &Defs<'_>, rows: TileId) -> Option<(Dim, WindowTap)> {
    let TileOp::Map { func, args } = defs.get(&rows)? else { return None };
    if *func != window_line() {
        return None;
    }
    let starts: Option<Vec<Dim>> = args
        .iter()
        .map(|arg| match defs.get(&arg.tile) {
            Some(TileOp::Iota { axis: 0, start }) => Some(start.clone()),
            _ => None,
        })
        .collect();
    let [first, down, right, height, width, rows, cols, rest @ ..] = &starts?[..] else {
        return None;
    };
    let numbers: Option<Vec<i64>> = rest.iter().map(Dim::as_const).collect();
    let [step_y, step_x, before_y, before_x] = numbers?[..] else { return None };
    let windows = Windows {
        size: [height.clone(), width.clone()],
        outputs: [rows.clone(), cols.clone()],
        steps: [step_y, step_x],
        before: [before_y, before_x],
    };
    Some((first.clone(), WindowTap { windows, tap: [down.clone(), right.clone()] }))
}

/// The extents of a tile as numbers.
pub(crate) fn extents(kernel: &Kernel, tile: TileId) -> Result<Vec<u32>> {
    kernel
        .ty(tile)
        .shape
        .iter()
        .map(|d| {
            d.as_const()
                .and_then(|v| u32::try_from(v).ok())
                .ok_or_else(|| Error::bug(format!("tile extent {d} is not a number")))
        })
        .collect()
}

/// Resolves a tile to a load with step 1 and zero fill, if it is one.
pub(crate) fn load_view(kernel: &Kernel, defs: &Defs<'_>, tile: TileId) -> Option<LoadView> {
    match defs.get(&tile)? {
        TileOp::Load { param, index, steps, fill } => {
            let zero = matches!(fill, Constant::Int(0))
                || matches!(fill, Constant::Float(v) if v.to_bits() == 0);
            (steps.iter().all(|s| *s == 1) && zero).then(|| LoadView {
                load: tile,
                param: *param,
                index: index.clone(),
                axes: (0..index.len()).collect(),
                windows: None,
            })
        }
        TileOp::Gather { param, axis: 0, rows, index, fill } if index.len() == 2 => {
            let zero = matches!(fill, Constant::Int(0))
                || matches!(fill, Constant::Float(v) if v.to_bits() == 0);
            let (first, windows) = window_lines(defs, *rows)?;
            (zero && index[0].is(0)).then(|| LoadView {
                load: tile,
                param: *param,
                index: vec![first, index[1].clone()],
                axes: vec![0, 1],
                windows: Some(windows),
            })
        }
        TileOp::Permute { x, perm } => {
            let inner = load_view(kernel, defs, *x)?;
            let axes = perm.iter().map(|p| inner.axes[*p]).collect();
            Some(LoadView { axes, ..inner })
        }
        TileOp::Reshape(x) => {
            let inner = load_view(kernel, defs, *x)?;
            let from = extents(kernel, *x).ok()?;
            let to = extents(kernel, tile).ok()?;
            let kept: Vec<usize> = (0..from.len()).filter(|i| from[*i] != 1).collect();
            let wanted: Vec<u32> = to.iter().copied().filter(|e| *e != 1).collect();
            // Only unit axes vanish; none appear.
            if kept.iter().map(|i| from[*i]).ne(wanted.iter().copied()) || wanted.len() != to.len()
            {
                return None;
            }
            let axes = kept.iter().map(|i| inner.axes[*i]).collect();
            Some(LoadView { axes, ..inner })
        }
        _ => None,
    }
}

/// An operand tile that goes through the ring.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) view: LoadView,
    /// Extents in the orientation of the product.
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    /// 0 or 1: the axis of the tile that is contiguous in memory.
    pub(crate) contiguous: usize,
    pub(crate) swizzle: Swizzle,
    /// Rounded to TF32 on the way.
    pub(crate) tf32: bool,
    /// What is multiplied is computed from the stream's tiles, in registers.
    pub(crate) computed: Option<Computed>,
}

/// A left operand that is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Computed {
    /// The tile that is multiplied.
    pub(crate) result: TileId,
    /// The stream's tile, as steps in front of the product read it.
    pub(crate) operand: TileId,
}

impl Stream {
    /// Lines of a tile: the extent of the strided axis.
    pub(crate) fn lines(&self) -> u32 {
        if self.contiguous == 1 { self.rows } else { self.cols }
    }

    /// Extent of the contiguous axis.
    pub(crate) fn along(&self) -> u32 {
        if self.contiguous == 1 { self.cols } else { self.rows }
    }
}

/// A register tile of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// The carried tile with this number.
    Carried(usize),
    /// A tile that lives within one turn of the loop.
    Scratch(usize),
}

/// One step of the loop on register tiles.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// `acc += a * b`, with streams as operands.
    Product {
        acc: Value,
        a: usize,
        b: usize,
        /// The sum starts here: on every turn for scratch, on the first for a carried tile.
        starts: bool,
    },
    /// Elementwise.
    Map { dst: Value, func: Func, args: Vec<Value> },
}

/// The loop as streams and steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pipeline {
    pub(crate) streams: Vec<Stream>,
    pub(crate) steps: Vec<Step>,
    /// Type of each scratch tile.
    pub(crate) scratch: Vec<TileId>,
}

/// Rounds f32 to the nearest number of 11 significant digits, TF32, by Veltkamp's splitting (Dekker, "A
/// floating-point technique for extending the available precision", 1971). A product of operands rounded
/// so may run on the tensor cores as TF32: the copy engine rounds on the way.
pub fn tf32_round() -> Func {
    let mut b = FuncBuilder::new();
    let x = b.param("x", DType::F32);
    let factor = b.constant(8193.0, DType::F32);
    let scaled = b.op(Op::Mul, &[factor, x]);
    let low = b.op(Op::Sub, &[scaled, x]);
    let high = b.op(Op::Sub, &[scaled, low]);
    b.finish(high)
}

/// The product of two 8-bit integers in i32. Where rows of such products are only summed, four are summed by one instruction.
pub fn byte_product(dtype: DType) -> Func {
    let mut b = FuncBuilder::new();
    let [x, y] = ["x", "y"].map(|name| b.param(name, dtype));
    let [x, y] = [x, y].map(|v| b.cast(v, DType::I32));
    let product = b.op(Op::Mul, &[x, y]);
    b.finish(product)
}

/// Takes a loop apart, or says what does not fit `product`. `before` defines what the loop may use from
/// outside.
pub(crate) fn pipeline(
    kernel: &Kernel,
    before: &[Stmt],
    body: &For,
    product: ProductKind,
) -> Result<Pipeline> {
    let outer = definitions(before);
    let mut defs = definitions(&body.body.stmts);
    defs.extend(outer.iter().map(|(id, op)| (*id, *op)));
    let is_zero = |tile: &TileId| match defs.get(tile) {
        Some(TileOp::Full(Constant::Int(v))) => *v == 0,
        Some(TileOp::Full(Constant::Float(v))) => v.to_bits() == 0,
        _ => false,
    };
    let mut out = Pipeline::default();
    let mut used = Vec::new();
    let mut values: BTreeMap<TileId, Value> =
        body.carry.iter().enumerate().map(|(i, (inner, _))| (*inner, Value::Carried(i))).collect();
    let mut started = vec![false; body.carry.len()];
    let tf32 = tf32_round();
    for stmt in &body.body.stmts {
        let Stmt::Let(id, op) = stmt else {
            return Err(Error::unsupported("a loop over products that stores, branches or loops"));
        };
        match op {
            TileOp::Mma { acc, a, b, limit } => {
                let mut operand = |tile: TileId, depth_axis: usize| -> Result<usize> {
                    // TF32: the rounding of the operand is the copy engine's.
                    let (tile, rounded) = match defs.get(&tile) {
                        Some(TileOp::Map { func, args }) if *func == tf32 => (args[0].tile, true),
                        _ => (tile, false),
                    };
                    let mut computed = None;
                    if depth_axis == 1
                        && product == ProductKind::Wgmma
                        && load_view(kernel, &defs, tile).is_none()
                    {
                        computed = computed_from(kernel, &defs, tile, &mut used);
                    }
                    let tile = computed.map_or(tile, |c| c.operand);
                    let Some(view) = load_view(kernel, &defs, tile) else {
                        return Err(Error::unsupported(
                            "an operand of a product that is not a plain load",
                        ));
                    };
                    check_limit(kernel, &view, view.axes[depth_axis], limit.as_ref())?;
                    used.push(view.load);
                    let same = |s: &Stream| s.view == view && s.computed == computed;
                    if let Some(i) = out.streams.iter().position(same) {
                        return Ok(i);
                    }
                    let shape = extents(kernel, tile)?;
                    let stream =
                        stream(kernel, view, (shape[0], shape[1]), depth_axis, rounded, product)?;
                    out.streams.push(Stream { computed, ..stream });
                    Ok(out.streams.len() - 1)
                };
                let (a, b) = (operand(*a, 1)?, operand(*b, 0)?);
                let (acc, starts) = match values.get(acc) {
                    Some(Value::Carried(i)) => {
                        let first = !std::mem::replace(&mut started[*i], true);
                        (Value::Carried(*i), first && is_zero(&body.carry[*i].1))
                    }
                    Some(scratch) => (*scratch, false),
                    None if is_zero(acc) => {
                        out.scratch.push(*id);
                        (Value::Scratch(out.scratch.len() - 1), true)
                    }
                    None => {
                        return Err(Error::unsupported(
                            "a product that adds to a tile from outside its loop",
                        ));
                    }
                };
                values.insert(*id, acc);
                out.steps.push(Step::Product { acc, a, b, starts });
            }
            TileOp::Map { func, args } if args.iter().any(|a| values.contains_key(&a.tile)) => {
                let args = args
                    .iter()
                    .map(|a| {
                        let whole = a.along.iter().copied().eq(0..a.along.len());
                        values.get(&a.tile).copied().filter(|_| whole)
                    })
                    .collect::<Option<Vec<_>>>()
                    .ok_or_else(|| {
                        Error::unsupported(
                            "elementwise steps between products on other than whole tiles",
                        )
                    })?;
                let dst = match body.yields.iter().position(|y| y == id) {
                    Some(i) => Value::Carried(i),
                    None => {
                        out.scratch.push(*id);
                        Value::Scratch(out.scratch.len() - 1)
                    }
                };
                values.insert(*id, dst);
                out.steps.push(Step::Map { dst, func: func.clone(), args });
            }
            _ => {}
        }
    }
    for (i, tile) in body.yields.iter().enumerate() {
        if values.get(tile) != Some(&Value::Carried(i)) {
            return Err(Error::unsupported("a loop that permutes what it carries"));
        }
    }
    for (id, op) in definitions(&body.body.stmts) {
        if matches!(op, TileOp::Load { .. }) && !used.contains(&id) {
            return Err(Error::unsupported("a load in the loop that no product reads"));
        }
    }
    if !out.steps.iter().any(|s| matches!(s, Step::Product { .. })) {
        return Err(Error::unsupported("a loop without products"));
    }
    Ok(out)
}

/// A left operand that elementwise steps make of one tile of the plane and of vectors along the depth; notes the vectors' loads as used.
pub(crate) fn computed_from(
    kernel: &Kernel,
    defs: &Defs<'_>,
    tile: TileId,
    used: &mut Vec<TileId>,
) -> Option<Computed> {
    let TileOp::Map { args, .. } = defs.get(&tile)? else { return None };
    let mut operand = None;
    let mut vectors = Vec::new();
    for arg in args {
        match arg.along[..] {
            [0, 1] if operand.is_none() && load_view(kernel, defs, arg.tile).is_some() => {
                operand = Some(arg.tile);
            }
            [1] => vectors.push(match defs.get(&arg.tile)? {
                TileOp::Reshape(x) => *x,
                _ => arg.tile,
            }),
            _ => return None,
        }
    }
    let loaded = |t: &TileId| matches!(defs.get(t), Some(TileOp::Load { .. }));
    if !vectors.iter().all(loaded) {
        return None;
    }
    used.extend(vectors);
    operand.map(|operand| Computed { result: tile, operand })
}

/// A limit on the sum is met by the zeros outside the tensor, if the tensor ends there.
pub(crate) fn check_limit(
    kernel: &Kernel,
    view: &LoadView,
    axis: usize,
    limit: Option<&Dim>,
) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let end = limit.clone() + &view.index[axis];
    if end == kernel.params[view.param].layout.axes[axis].extent {
        Ok(())
    } else {
        Err(Error::unsupported(format!(
            "a product that stops at {end} where tensor {} goes on",
            kernel.params[view.param].name
        )))
    }
}

pub(crate) fn stream(
    kernel: &Kernel,
    view: LoadView,
    (rows, cols): (u32, u32),
    depth_axis: usize,
    tf32: bool,
    product: ProductKind,
) -> Result<Stream> {
    let param = &kernel.params[view.param];
    let exact = matches!(product, ProductKind::Fma | ProductKind::MmaSplit);
    if tf32 && exact {
        return Err(Error::unsupported(format!(
            "{}: products of f32 do not round to TF32",
            param.name
        )));
    }
    if param.dtype != DType::F32 && product == ProductKind::MmaSplit {
        return Err(Error::unsupported(format!("{}: two parts of {}", param.name, param.dtype)));
    }
    if param.dtype == DType::F32 && !tf32 && !exact {
        return Err(Error::unsupported(format!(
            "{}: tensor cores multiply f32 only after rounding to TF32",
            param.name
        )));
    }
    let unit = |axis: usize| {
        let a = &param.layout.axes[axis];
        a.stride.is(1) && a.block.is_none()
    };
    let contiguous = match (unit(view.axes[0]), unit(view.axes[1])) {
        // Lines of the buffer run across the depth, however the tensor lies: copies turn it.
        _ if product == ProductKind::Fma => 1 - depth_axis,
        (_, true) => 1,
        (true, false) => 0,
        // Plain copies follow any stride.
        _ if product != ProductKind::Wgmma => 1,
        _ => {
            return Err(Error::unsupported(format!(
                "tensor {} has no contiguous axis among those of the product",
                param.name
            )));
        }
    };
    if view.windows.is_some() && (contiguous, product) != (1, ProductKind::Wgmma) {
        return Err(Error::unsupported("windows without the copy engine, or across channels"));
    }
    let along = if contiguous == 1 { cols } else { rows };
    let bytes = along * param.dtype.bits() / 8;
    let swizzle = [Swizzle::B128, Swizzle::B64, Swizzle::B32]
        .into_iter()
        .find(|s| bytes.is_multiple_of(s.span_bytes()))
        .ok_or_else(|| Error::unsupported(format!("tiles of {bytes} bytes along a line")))?;
    Ok(Stream { view, rows, cols, contiguous, swizzle, tf32, computed: None })
}
