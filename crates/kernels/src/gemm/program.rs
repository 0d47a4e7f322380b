//! The tile program of a matrix product.

use crate::gemm::statistics::{self, RowSums, Statistics};
use tilewright_base::DType;
use tilewright_expr::{Func, FuncBuilder, Op, Value};
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, ParamId, TileId, TileType};

/// Which axis of a matrix is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Order {
    /// The last axis: row-major.
    Row,
    /// The first axis: column-major, a transposed view.
    Col,
}

/// Which operand there are two of: the epilogue then reads two sums for each result, as gated units do
/// (`silu(A B) * (A B2)`: SwiGLU, GeGLU and so on; Shazeer, "GLU variants improve transformer", 2020).
///
/// The second one lies as the first, in other memory: it may be the second half of one matrix, or (by leading
/// dimensions of two lines) every other line of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pair {
    /// One product.
    None,
    /// `A B` and `A B2`.
    Right,
    /// `A B` and `A2 B`: the transposed view of the other.
    Left,
}

impl Pair {
    /// How many left and right operands there are.
    pub(crate) fn operands(self) -> [i64; 2] {
        match self {
            Pair::None => [1, 1],
            Pair::Right => [1, 2],
            Pair::Left => [2, 1],
        }
    }
}

/// What happens to a tile of sums before it is stored. Parameters of `func` are the sum (of a pair: both) and then,
/// in this order, those of `col_vector`, `row_vector` and `residual` that are present. A vector along the operand that
/// there are two of is two vectors, one for each sum.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// From the sum (in the accumulation type) and the extra operands to the result's type.
    pub func: Func,
    /// Type of a vector `[N]` (a bias, scales of columns).
    pub col_vector: Option<DType>,
    /// Type of a vector `[M]` (scales of rows).
    pub row_vector: Option<DType>,
    /// Type of a matrix `[M, N]`, laid out as the result.
    pub residual: Option<DType>,
    /// Whether there are two sums.
    pub pair: Pair,
}

/// A parameter of an epilogue's function. Of a pair there is a second one of some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Sum { second: bool },
    Cols { second: bool },
    Rows { second: bool },
    Residual,
}

/// A list for the first of a pair and, if there are two, for the second.
fn each(two: bool) -> impl Iterator<Item = bool> {
    [false, true].into_iter().take(1 + usize::from(two))
}

impl Epilogue {
    /// Only the conversion to the result's type.
    pub fn cast(from: DType, to: DType) -> Epilogue {
        let func = Func::cast(from, to);
        Epilogue { func, col_vector: None, row_vector: None, residual: None, pair: Pair::None }
    }

    /// `activation(sum) * second sum`, in f32: a gated unit, with [`Pair::Right`]. `activation` maps f32 to f32.
    pub fn gated(activation: &Func, to: DType) -> Epilogue {
        let mut b = FuncBuilder::new();
        let (gate, up) = (b.param("gate", DType::F32), b.param("up", DType::F32));
        let x = b.inline(activation, &[gate]);
        let x = b.op(Op::Mul, &[x, up]);
        let x = b.cast(x, to);
        let func = b.finish(x);
        Epilogue { func, col_vector: None, row_vector: None, residual: None, pair: Pair::Right }
    }

    /// The parameters of `func`, in order.
    pub(super) fn slots(&self) -> Vec<Slot> {
        let mut out: Vec<Slot> =
            each(self.pair != Pair::None).map(|second| Slot::Sum { second }).collect();
        if self.col_vector.is_some() {
            out.extend(each(self.pair == Pair::Right).map(|second| Slot::Cols { second }));
        }
        if self.row_vector.is_some() {
            out.extend(each(self.pair == Pair::Left).map(|second| Slot::Rows { second }));
        }
        out.extend(self.residual.map(|_| Slot::Residual));
        out
    }

    /// The epilogue of the transposed product: vectors along rows and columns change places.
    #[must_use]
    pub fn transposed(&self) -> Epilogue {
        let pair = match self.pair {
            Pair::None => Pair::None,
            Pair::Right => Pair::Left,
            Pair::Left => Pair::Right,
        };
        let (col_vector, row_vector) = (self.row_vector, self.col_vector);
        let mut out = Epilogue { col_vector, row_vector, pair, ..self.clone() };
        let from = |slot: Slot| match slot {
            Slot::Cols { second } => Slot::Rows { second },
            Slot::Rows { second } => Slot::Cols { second },
            same => same,
        };
        let mine = self.slots();
        let theirs: Vec<Slot> = out.slots().into_iter().map(from).collect();
        if mine != theirs {
            // The same parameters in another order.
            let mut b = FuncBuilder::new();
            let params = self.func.params();
            let at = |slot: &Slot| mine.iter().position(|m| m == slot);
            let order: Vec<usize> = theirs.iter().filter_map(at).collect();
            let new: Vec<_> =
                order.iter().map(|i| b.param(&params[*i].name, params[*i].dtype)).collect();
            let args: Vec<_> = (0..mine.len())
                .filter_map(|i| order.iter().position(|o| *o == i).map(|at| new[at]))
                .collect();
            let result = b.inline(&self.func, &args);
            out.func = b.finish(result);
        }
        out
    }

    /// `activation(sum + bias)`; `activation` maps f32 to f32.
    pub fn bias(activation: Option<&Func>, bias: DType, to: DType) -> Epilogue {
        let mut b = FuncBuilder::new();
        let sum = b.param("sum", DType::F32);
        let bias_in = b.param("bias", bias);
        let bias_f = b.cast(bias_in, DType::F32);
        let mut x = b.op(Op::Add, &[sum, bias_f]);
        if let Some(f) = activation {
            x = b.inline(f, &[x]);
        }
        let x = b.cast(x, to);
        let (func, col_vector) = (b.finish(x), Some(bias));
        Epilogue { func, col_vector, row_vector: None, residual: None, pair: Pair::None }
    }
}

/// How products of the operands are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Math {
    /// Of the operands as they are.
    Exact,
    /// f32 operands are rounded to TF32 (11 significant digits) first.
    Tf32,
    /// f32 operands come as two TF32 parts, `x = high + low`, in tensors `A`, `A_low`, `B`, `B_low`;
    /// the product of the two low parts is left out. (Markidis et al., "NVIDIA Tensor Core
    /// programmability, performance and precision", 2018; Ootomo and Yokota, 2022.)
    Tf32x3,
    /// Sums of one tile depth are formed apart and then added in f32: eight-bit floats, whose
    /// tensor-core sums keep fewer digits.
    Promoted,
}

/// The left operand of a convolution: the matrix with a line per output and a column per tap and channel, read from
/// images as they lie, `[pixels, channels]`. Entries are for rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Windows {
    /// Taps.
    pub taps: [i64; 2],
    /// Distances between neighbouring windows.
    pub steps: [i64; 2],
    /// Rows and columns of zeros before an image.
    pub before: [i64; 2],
    /// Distances between neighbouring taps.
    pub dilations: [i64; 2],
}

impl Windows {
    /// How many taps.
    pub fn count(&self) -> i64 {
        self.taps[0] * self.taps[1]
    }
}

/// What computes the left operand on its way in: `A'[b,m,k] = func(A[b,m,k], D0[b,k], D1[b,k], ...)`, rounded to the type of the operands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prologue {
    /// From an element of `A` as it is stored, and one of each vector, to the type of the operands.
    pub func: Func,
    /// Type of `A` in memory.
    pub stored: DType,
    /// Types of vectors `[K]` along the depth, of which every batch may have its own.
    pub vectors: Vec<DType>,
}

/// Name of the distance between the batches of a vector along the depth.
pub(super) fn depth_stride(i: usize) -> String {
    format!("sd{i}")
}

/// A matrix product for all sizes: `C[b,m,n] = epilogue(sum over k of A[b,m,k] * B[b,k,n])`.
///
/// Size symbols: `M`, `N`, `K`, with `batched` also `L`; `lda`, `ldb`, `ldc` are the distances in
/// elements between neighbours along the axis that is not contiguous, and `sa`, `sb`, `sc` those
/// between batches. Of a pair the second operand, `A2` or `B2`, lies as the first, and `epilogue` reads both sums.
///
/// With `windows` the sum runs over taps, and over channels within: `K` counts channels, `B` is `[taps, K, N]` with
/// taps an equal part of `ldb` apart, `A` is `[R, K]`, the pixels of images of `H` by `W` (row-major, not batched), and outputs are `P` by `Q`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GemmSpec {
    /// Type of the operands.
    pub operand: DType,
    /// Type of the sums: f32, or i32 for integers.
    pub sum: DType,
    /// Type of the result.
    pub result: DType,
    /// How products are formed.
    pub math: Math,
    /// Order of `A [M, K]`.
    pub a: Order,
    /// Order of `B [K, N]`.
    pub b: Order,
    /// Order of `C [M, N]`.
    pub c: Order,
    /// A third axis in front, `L` matrices.
    pub batched: bool,
    /// What happens to the sums.
    pub epilogue: Epilogue,
    /// `A` is read through windows.
    pub windows: Option<Windows>,
    /// `A` is computed from what is stored.
    pub prologue: Option<Prologue>,
    /// Sums over rows, of single products.
    pub statistics: Statistics,
}

/// The operand rounded to TF32.
fn round(k: &mut KernelBuilder, tile: TileId) -> TileId {
    let shape = k.ty(tile).shape.clone();
    let arg = k.plain(tile);
    k.map(tilewright_lower_gpu::tf32_round(), vec![arg], shape)
}

/// The pixels that `bm` outputs from `row0` on see at a tap.
fn window_lines(k: &mut KernelBuilder, w: &Windows, row0: &Dim, tap: &Dim, bm: &Dim) -> TileId {
    let across = Dim::new(w.taps[1]);
    let down = tap.floor_div(&across) * w.dilations[0];
    let right = tap.modulo(&across) * w.dilations[1];
    let sizes = ["H", "W", "P", "Q"].map(Dim::sym);
    let numbers = [w.steps[0], w.steps[1], w.before[0], w.before[1]].map(Dim::new);
    let single = [down, right].into_iter().chain(sizes).chain(numbers);
    let mut starts = vec![(row0.clone(), bm.clone())];
    starts.extend(single.map(|d| (d, Dim::new(1))));
    let args = starts
        .into_iter()
        .map(|(start, extent)| {
            let tile = k.iota(DType::I64, 0, start, vec![extent]);
            k.plain(tile)
        })
        .collect();
    k.map(tilewright_lower_gpu::window_line(), args, vec![bm.clone()])
}

pub(super) fn matrix(
    rows: &str,
    cols: &str,
    order: Order,
    leading: &str,
    batch: Option<&str>,
) -> Layout {
    let unit = Dim::new(1);
    let leading = Dim::sym(leading);
    let (row_stride, col_stride) = match order {
        Order::Row => (leading, unit),
        Order::Col => (unit, leading),
    };
    let axis = |extent: &str, stride: Dim| Axis { extent: Dim::sym(extent), stride, block: None };
    let mut axes = vec![axis(rows, row_stride), axis(cols, col_stride)];
    if let Some(stride) = batch {
        axes.insert(0, axis("L", Dim::sym(stride)));
    }
    Layout { axes, offset: Dim::new(0) }
}

/// A vector along the depth, of which every batch may have its own.
fn along_depth(extent: &str, i: usize, batched: bool) -> Layout {
    let axis = |extent: &str, stride: Dim| Axis { extent: Dim::sym(extent), stride, block: None };
    let mut axes = vec![axis(extent, Dim::new(1))];
    if batched {
        axes.insert(0, axis("L", Dim::sym(depth_stride(i).as_str())));
    }
    Layout { axes, offset: Dim::new(0) }
}

/// A part of such a vector, as an operand along the columns of a tile of two axes.
fn load_along(
    k: &mut KernelBuilder,
    param: ParamId,
    batch: Option<&Dim>,
    at: &Dim,
    len: &Dim,
) -> Operand {
    let mut tile = match batch {
        None => k.load(param, vec![at.clone()], vec![len.clone()]),
        Some(l) => k.load(param, vec![l.clone(), at.clone()], vec![Dim::new(1), len.clone()]),
    };
    if batch.is_some() {
        tile = k.reshape(tile, vec![len.clone()]);
    }
    Operand { tile, along: vec![1] }
}

/// Declares what an epilogue reads besides sums, in order; a residual lies as `residual` says.
fn declare_extras(
    k: &mut KernelBuilder,
    e: &Epilogue,
    residual: &Layout,
    sums: Option<&RowSums>,
) -> Vec<(Slot, ParamId)> {
    let vector = |extent: &str| Layout::row_major(&[Dim::sym(extent)]);
    let mut out = Vec::new();
    for slot in e.slots() {
        let (name, dtype, layout) = match slot {
            Slot::Sum { .. } => continue,
            Slot::Cols { second } => {
                (["cols", "cols2"][second as usize], e.col_vector, vector("N"))
            }
            Slot::Rows { second } => match sums {
                Some(sums) => {
                    let layout = statistics::sums_layout(Dim::sym("M"), Dim::new(sums.parts));
                    ("row_sums", Some(DType::F32), layout)
                }
                None => (["rows", "rows2"][second as usize], e.row_vector, vector("M")),
            },
            Slot::Residual => ("R", e.residual, residual.clone()),
        };
        out.extend(dtype.map(|t| (slot, k.param(name, t, layout, Access::In))));
    }
    out
}

/// Loads them for a tile at `at`; rows and columns are its last two axes. The operands are of a map over the tile, or
/// over its last two axes alone.
fn load_extras(
    k: &mut KernelBuilder,
    extras: &[(Slot, ParamId)],
    at: &[Dim],
    shape: &[Dim],
    whole: bool,
    sums: Option<&RowSums>,
) -> Vec<Operand> {
    let first = shape.len() - 2;
    let mut out = Vec::new();
    for (slot, param) in extras {
        let axis = match slot {
            Slot::Rows { .. } => first,
            Slot::Cols { .. } => first + 1,
            Slot::Sum { .. } | Slot::Residual => {
                let mut tile = k.load(*param, at.to_vec(), shape.to_vec());
                if !whole && first > 0 {
                    tile = k.reshape(tile, shape[first..].to_vec());
                }
                out.push(k.plain(tile));
                continue;
            }
        };
        let tile = match (slot, sums) {
            (Slot::Rows { .. }, Some(sums)) => {
                statistics::row_vector(k, *param, sums, (&at[axis], &shape[axis]), sums.parts)
            }
            _ => k.load(*param, vec![at[axis].clone()], vec![shape[axis].clone()]),
        };
        let along = vec![if whole { axis } else { axis - first }];
        out.push(Operand { tile, along });
    }
    out
}

impl GemmSpec {
    /// Row-major `A`, `B`, `C`, no epilogue but the conversion.
    pub fn plain(operand: DType, sum: DType, result: DType) -> GemmSpec {
        GemmSpec {
            operand,
            sum,
            result,
            math: Math::Exact,
            a: Order::Row,
            b: Order::Row,
            c: Order::Row,
            batched: false,
            epilogue: Epilogue::cast(sum, result),
            windows: None,
            prologue: None,
            statistics: Statistics::default(),
        }
    }

    /// The tile program, with tile sizes `BM`, `BN`, `BK`.
    pub fn program(&self, name: &str) -> Kernel {
        self.build(name, false)
    }

    /// The program of a product whose depth is cut into parts: part `ps` sums `part` tiles of depth and
    /// stores its sums to `P[ps]`, a tensor `[S, M, N]` in the order of `C`; of a pair the second sums to `P2`, which
    /// lies as `P`. [`GemmSpec::sum_program`] adds the parts up. Not for batches.
    pub fn part_program(&self, name: &str) -> Kernel {
        self.build(name, true)
    }

    fn build(&self, name: &str, split: bool) -> Kernel {
        let mut k = KernelBuilder::new(name);
        let mut sizes = vec!["M", "N", "K"];
        if self.batched {
            sizes.insert(0, "L");
        }
        sizes.extend(["lda", "ldb", "ldc"]);
        if split {
            sizes.extend(["S", "part", "sp"]);
        }
        if self.windows.is_some() {
            sizes.extend(["R", "H", "W", "P", "Q"]);
        }
        if self.batched {
            sizes.extend(["sa", "sb", "sc"]);
        }
        let distances: Vec<String> = match (&self.prologue, self.batched) {
            (Some(p), true) => (0..p.vectors.len()).map(depth_stride).collect(),
            _ => Vec::new(),
        };
        for size in sizes.into_iter().chain(distances.iter().map(String::as_str)) {
            // Matrices of a batch may be the same one.
            let min = i64::from(!size.starts_with('s'));
            k.symbol(Symbol { name: size.into(), range: Range { min, max: i32::MAX.into() } });
        }
        let leaves_sums = !split && self.statistics.leaves.is_some();
        let (bm, tile_parts, bn, bk) = if leaves_sums {
            let (bm, parts) = (k.tile("BM"), k.tile(statistics::TILE_PARTS));
            (bm, parts.clone(), parts * statistics::PART, k.tile("BK"))
        } else {
            (k.tile("BM"), Dim::new(0), k.tile("BN"), k.tile("BK"))
        };
        let (m, n, depth) = (Dim::sym("M"), Dim::sym("N"), Dim::sym("K"));
        let batch = |s: &'static str| self.batched.then_some(s);
        let pair = self.epilogue.pair;
        let name_of = |name: &str, second: bool| format!("{name}{}", if second { "2" } else { "" });
        let stored = self.prologue.as_ref().map_or(self.operand, |p| p.stored);
        let mut operand = |name: &str, two: bool, layout: Layout| -> Vec<ParamId> {
            let dtype = if name == "A" { stored } else { self.operand };
            each(two)
                .map(|s| k.param(&name_of(name, s), dtype, layout.clone(), Access::In))
                .collect()
        };
        let lines = if self.windows.is_some() { "R" } else { "M" };
        let a_layout = matrix(lines, "K", self.a, "lda", batch("sa"));
        let a = operand("A", pair == Pair::Left, a_layout);
        let mut b_layout = matrix("K", "N", self.b, "ldb", batch("sb"));
        if let Some(w) = &self.windows {
            let count = Dim::new(w.count());
            let stride = Dim::sym("ldb").floor_div(&count);
            let taps = Axis { extent: count, stride, block: None };
            b_layout.axes.insert(0, taps);
        }
        let b = operand("B", pair == Pair::Right, b_layout);
        let low = (self.math == Math::Tf32x3).then(|| {
            let mut parts = |name: &str, two: bool, layout: Layout| -> Vec<ParamId> {
                each(two)
                    .map(|s| format!("{}_low", name_of(name, s)))
                    .map(|name| k.param(&name, self.operand, layout.clone(), Access::In))
                    .collect()
            };
            let a = matrix("M", "K", self.a, "lda", batch("sa"));
            let a = parts("A", pair == Pair::Left, a);
            let b = matrix("K", "N", self.b, "ldb", batch("sb"));
            (a, parts("B", pair == Pair::Right, b))
        });
        let mut vectors = Vec::new();
        for (i, dtype) in self.prologue.iter().flat_map(|p| p.vectors.iter().enumerate()) {
            let layout = along_depth("K", i, self.batched);
            vectors.push(k.param(&format!("D{i}"), *dtype, layout, Access::In));
        }
        let e = &self.epilogue;
        let c_layout = || matrix("M", "N", self.c, "ldc", batch("sc"));
        let Statistics { reads, leaves } = &self.statistics;
        let sums_read = reads.as_ref();
        let extras = if split { vec![] } else { declare_extras(&mut k, e, &c_layout(), sums_read) };
        let c = if split {
            let mut layout = matrix("M", "N", self.c, "ldc", None);
            let parts = Axis { extent: Dim::sym("S"), stride: Dim::sym("sp"), block: None };
            layout.axes.insert(0, parts);
            each(pair != Pair::None)
                .map(|s| k.param(&name_of("P", s), self.sum, layout.clone(), Access::Out))
                .collect()
        } else {
            vec![k.param("C", self.result, c_layout(), Access::Out)]
        };
        let left_sums = leaves.as_ref().filter(|_| leaves_sums).map(|func| {
            let layout = statistics::sums_layout(m.clone(), statistics::parts_of(&n));
            (k.param("P", DType::F32, layout, Access::Out), func)
        });
        let ps = split.then(|| k.grid("ps", Dim::sym("S")));
        let pl = self.batched.then(|| k.grid("pl", Dim::sym("L")));
        let pm = k.grid("pm", m.ceil_div(&bm));
        let pn = k.grid("pn", n.ceil_div(&bn));
        let at = |x: Dim, y: Dim| match &pl {
            Some(l) => vec![l.clone(), x, y],
            None => vec![x, y],
        };
        let shape = |x: &Dim, y: &Dim| match &pl {
            Some(_) => vec![Dim::new(1), x.clone(), y.clone()],
            None => vec![x.clone(), y.clone()],
        };
        let zero = if self.sum.is_float() { Value::Float(0.0) } else { Value::Int(0) };
        let init = k.full(zero, TileType::new(self.sum, [bm.clone(), bn.clone()]));
        let sums = a.len().max(b.len());
        let steps_each = depth.ceil_div(&bk);
        let steps = &steps_each * self.windows.map_or(1, |w| w.count());
        let (lo, hi) = match &ps {
            None => (Dim::new(0), steps),
            Some(ps) => {
                let lo = ps.clone() * &Dim::sym("part");
                let hi = (lo.clone() + &Dim::sym("part")).min_with(&steps);
                (lo, hi)
            }
        };
        let (var, carried) = k.begin_for("k", lo, hi, &vec![init; sums]);
        let row0 = pm * &bm;
        let part0 = pn.clone() * &tile_parts;
        let col0 = pn * &bn;
        let (tap, k0) = match &self.windows {
            None => (Dim::new(0), var * &bk),
            Some(_) => (var.floor_div(&steps_each), var.modulo(&steps_each) * &bk),
        };
        let limit = depth - &k0;
        let mut left = Vec::new();
        for param in &a {
            left.push(match &self.windows {
                None => k.load(*param, at(row0.clone(), k0.clone()), shape(&bm, &bk)),
                Some(w) => {
                    let lines = window_lines(&mut k, w, &row0, &tap, &bm);
                    let at = vec![Dim::new(0), k0.clone()];
                    k.gather(*param, 0, lines, at, vec![bm.clone(), bk.clone()])
                }
            });
        }
        let mut right = Vec::new();
        for param in &b {
            right.push(match &self.windows {
                None => k.load(*param, at(k0.clone(), col0.clone()), shape(&bk, &bn)),
                Some(_) => {
                    let part = vec![Dim::new(1), bk.clone(), bn.clone()];
                    let t = k.load(*param, vec![tap.clone(), k0.clone(), col0.clone()], part);
                    k.reshape(t, vec![bk.clone(), bn.clone()])
                }
            });
        }
        if self.batched {
            left = left.iter().map(|t| k.reshape(*t, vec![bm.clone(), bk.clone()])).collect();
            right = right.iter().map(|t| k.reshape(*t, vec![bk.clone(), bn.clone()])).collect();
        }
        if let Some(p) = &self.prologue {
            let mut loaded = Vec::new();
            for param in &vectors {
                loaded.push(load_along(&mut k, *param, pl.as_ref(), &k0, &bk));
            }
            for tile in &mut left {
                let args = [k.plain(*tile)].into_iter().chain(loaded.iter().cloned()).collect();
                *tile = k.map(p.func.clone(), args, vec![bm.clone(), bk.clone()]);
            }
        }
        if self.math == Math::Tf32 {
            left = left.iter().map(|t| round(&mut k, *t)).collect();
            right = right.iter().map(|t| round(&mut k, *t)).collect();
        }
        let operands = |i: usize| (left[i.min(left.len() - 1)], right[i.min(right.len() - 1)]);
        let next: Vec<TileId> = match self.math {
            Math::Exact | Math::Tf32 => (0..sums)
                .map(|i| {
                    let (ta, tb) = operands(i);
                    k.mma(carried[i], ta, tb, Some(limit.clone()))
                })
                .collect(),
            Math::Tf32x3 => {
                let (a_low, b_low) = low.expect("declared for this math");
                let mut parts = |params: &[ParamId], place: Vec<Dim>, x: &Dim, y: &Dim| {
                    let mut out = Vec::new();
                    for param in params {
                        let mut t = k.load(*param, place.clone(), shape(x, y));
                        if self.batched {
                            t = k.reshape(t, vec![x.clone(), y.clone()]);
                        }
                        out.push(round(&mut k, t));
                    }
                    out
                };
                let low_left = parts(&a_low, at(row0.clone(), k0.clone()), &bm, &bk);
                let low_right = parts(&b_low, at(k0.clone(), col0.clone()), &bk, &bn);
                let high_left: Vec<_> = left.iter().map(|t| round(&mut k, *t)).collect();
                let high_right: Vec<_> = right.iter().map(|t| round(&mut k, *t)).collect();
                let of = |list: &[TileId], i: usize| list[i.min(list.len() - 1)];
                // Small terms first. The tensor cores drop the low digits of their sums, so sums of one tile depth
                // are added in f32.
                (0..sums)
                    .map(|i| {
                        let (ha, hb) = (of(&high_left, i), of(&high_right, i));
                        let (la, lb) = (of(&low_left, i), of(&low_right, i));
                        let x = k.mma(init, la, hb, Some(limit.clone()));
                        let x = k.mma(x, ha, lb, Some(limit.clone()));
                        let part = k.mma(x, ha, hb, Some(limit.clone()));
                        let args = vec![k.plain(carried[i]), k.plain(part)];
                        let add = Func::binary(Op::Add, self.sum);
                        k.map(add, args, vec![bm.clone(), bn.clone()])
                    })
                    .collect()
            }
            Math::Promoted => (0..sums)
                .map(|i| {
                    let (ta, tb) = operands(i);
                    let part = k.mma(init, ta, tb, Some(limit.clone()));
                    let add = Func::binary(Op::Add, self.sum);
                    let args = vec![k.plain(carried[i]), k.plain(part)];
                    k.map(add, args, vec![bm.clone(), bn.clone()])
                })
                .collect(),
        };
        let sums = k.end_for(&next);
        if let Some(ps) = ps {
            for (sum, parts) in sums.iter().zip(&c) {
                let out = k.reshape(*sum, vec![Dim::new(1), bm.clone(), bn.clone()]);
                k.store(*parts, vec![ps.clone(), row0.clone(), col0.clone()], out);
            }
            return k.finish();
        }
        let mut args: Vec<Operand> = sums.iter().map(|t| k.plain(*t)).collect();
        let place = at(row0.clone(), col0.clone());
        args.extend(load_extras(&mut k, &extras, &place, &shape(&bm, &bn), false, sums_read));
        let mut out = k.map(e.func.clone(), args, vec![bm.clone(), bn.clone()]);
        if let Some((param, func)) = left_sums {
            let (place, sizes) = ((row0.clone(), part0), (&bm, &tile_parts));
            statistics::leave(&mut k, param, func, out, place, sizes);
        }
        if self.batched {
            out = k.reshape(out, shape(&bm, &bn));
        }
        k.store(c[0], at(row0, col0), out);
        k.finish()
    }

    /// Adds up the parts of [`GemmSpec::part_program`], in order, and applies the epilogue: tile sizes
    /// `BR` (lines) and `BC` (along lines). For a column-major result the program is that of the
    /// transposed one, so that lines are contiguous either way.
    pub fn sum_program(&self, name: &str) -> Kernel {
        let e = self.epilogue_along_lines();
        let mut k = KernelBuilder::new(name);
        for size in ["M", "N", "S", "ldp", "ldc", "sp"] {
            k.symbol(Symbol { name: size.into(), range: Range { min: 1, max: i32::MAX.into() } });
        }
        let (br, bc) = (k.tile("BR"), k.tile("BC"));
        let mut parts = matrix("M", "N", Order::Row, "ldp", None);
        parts.axes.insert(0, Axis { extent: Dim::sym("S"), stride: Dim::sym("sp"), block: None });
        let p: Vec<ParamId> = ["P", "P2"]
            .into_iter()
            .take(1 + usize::from(e.pair != Pair::None))
            .map(|name| k.param(name, self.sum, parts.clone(), Access::In))
            .collect();
        let c_layout = || matrix("M", "N", Order::Row, "ldc", None);
        let extras = declare_extras(&mut k, &e, &c_layout(), None);
        let c = k.param("C", self.result, c_layout(), Access::Out);
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&br));
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bc));
        let (row0, col0) = (pm * &br, pn * &bc);
        let zero = if self.sum.is_float() { Value::Float(0.0) } else { Value::Int(0) };
        let init = k.full(zero, TileType::new(self.sum, [br.clone(), bc.clone()]));
        let (s, carried) = k.begin_for("s", Dim::new(0), Dim::sym("S"), &vec![init; p.len()]);
        let place = vec![s, row0.clone(), col0.clone()];
        let mut next = Vec::new();
        for (p, sum) in p.iter().zip(&carried) {
            let t = k.load(*p, place.clone(), vec![Dim::new(1), br.clone(), bc.clone()]);
            let t = k.reshape(t, vec![br.clone(), bc.clone()]);
            let args = vec![k.plain(*sum), k.plain(t)];
            let add = Func::binary(Op::Add, self.sum);
            next.push(k.map(add, args, vec![br.clone(), bc.clone()]));
        }
        let sums = k.end_for(&next);
        let mut args: Vec<Operand> = sums.iter().map(|t| k.plain(*t)).collect();
        let place = [row0.clone(), col0.clone()];
        args.extend(load_extras(&mut k, &extras, &place, &[br.clone(), bc.clone()], false, None));
        let out = k.map(e.func.clone(), args, vec![br, bc]);
        k.store(c, vec![row0, col0], out);
        k.finish()
    }

    /// A product over an empty sum: the epilogue of zeros. Sizes, tile sizes and the transposition of a column-major
    /// result are those of [`GemmSpec::sum_program`], less what parts need; with `batched` there are `L` matrices.
    pub fn empty_program(&self, name: &str) -> Kernel {
        let e = self.epilogue_along_lines();
        let mut k = KernelBuilder::new(name);
        let sizes: &[&str] =
            if self.batched { &["L", "M", "N", "ldc", "sc"] } else { &["M", "N", "ldc"] };
        for size in sizes {
            let min = i64::from(!size.starts_with('s'));
            k.symbol(Symbol { name: (*size).into(), range: Range { min, max: i32::MAX.into() } });
        }
        let (br, bc) = (k.tile("BR"), k.tile("BC"));
        let batch = self.batched.then_some("sc");
        let c_layout = || matrix("M", "N", Order::Row, "ldc", batch);
        let extras = declare_extras(&mut k, &e, &c_layout(), None);
        let c = k.param("C", self.result, c_layout(), Access::Out);
        let pl = self.batched.then(|| k.grid("pl", Dim::sym("L")));
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&br));
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bc));
        let (row0, col0) = (pm * &br, pn * &bc);
        let mut at = vec![row0, col0];
        let mut shape = vec![br, bc];
        if let Some(pl) = pl {
            at.insert(0, pl);
            shape.insert(0, Dim::new(1));
        }
        let zero = if self.sum.is_float() { Value::Float(0.0) } else { Value::Int(0) };
        let sums = k.full(zero, TileType::new(self.sum, shape.clone()));
        let mut args: Vec<Operand> = each(e.pair != Pair::None).map(|_| k.plain(sums)).collect();
        args.extend(load_extras(&mut k, &extras, &at, &shape, true, None));
        let out = k.map(e.func.clone(), args, shape);
        k.store(c, at, out);
        k.finish()
    }

    /// The epilogue as a kernel of its own, over sums that another kernel stored as `from`: what follows a product of a
    /// library without such an epilogue. Tensors are `S` (of a pair also `S2`) with `lds`, what the epilogue reads, and
    /// `C`; all row-major, tile sizes as for [`GemmSpec::sum_program`].
    pub fn apart_program(&self, name: &str, from: DType) -> Kernel {
        let e = &self.epilogue;
        let mut k = KernelBuilder::new(name);
        for size in ["M", "N", "lds", "ldc"] {
            k.symbol(Symbol { name: size.into(), range: Range { min: 1, max: i32::MAX.into() } });
        }
        let (br, bc) = (k.tile("BR"), k.tile("BC"));
        let layout = |leading: &str| matrix("M", "N", Order::Row, leading, None);
        let two = e.pair != Pair::None;
        let names = ["S", "S2"].into_iter().take(1 + usize::from(two));
        let stored: Vec<ParamId> =
            names.map(|name| k.param(name, from, layout("lds"), Access::In)).collect();
        let extras = declare_extras(&mut k, e, &layout("ldc"), None);
        let c = k.param("C", self.result, layout("ldc"), Access::Out);
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&br));
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bc));
        let (at, shape) = (vec![pm * &br, pn * &bc], vec![br, bc]);
        let mut args = Vec::new();
        for param in stored {
            let tile = k.load(param, at.clone(), shape.clone());
            let wide = vec![k.plain(tile)];
            let tile = k.map(Func::cast(from, self.sum), wide, shape.clone());
            args.push(k.plain(tile));
        }
        args.extend(load_extras(&mut k, &extras, &at, &shape, true, None));
        let out = k.map(e.func.clone(), args, shape);
        k.store(c, at, out);
        k.finish()
    }

    /// The epilogue of the result or, where that is column-major, of its transposed view.
    fn epilogue_along_lines(&self) -> Epilogue {
        if self.c == Order::Row { self.epilogue.clone() } else { self.epilogue.transposed() }
    }
}

/// A copy of a matrix `[R, C]` (with `batched`, `L` of them) from one order to another, packed to its own
/// leading dimension: tile sizes `BR`, `BC`. With `tf32_parts` of f32, the result is two matrices whose sum
/// is the operand up to the last digits of TF32's square: the rounded operand, and what is left, rounded.
pub(super) fn copy_program(
    name: &str,
    dtype: DType,
    from: Order,
    to: Order,
    batched: bool,
    tf32_parts: bool,
) -> Kernel {
    let mut k = KernelBuilder::new(name);
    let mut sizes = vec!["R", "C", "ldx", "ldy"];
    if batched {
        sizes = vec!["L", "R", "C", "ldx", "ldy", "sx", "sy"];
    }
    for size in sizes {
        // One matrix may serve all batches.
        let min = if size.starts_with('s') { 0 } else { 1 };
        k.symbol(Symbol { name: size.into(), range: Range { min, max: i32::MAX.into() } });
    }
    let (br, bc) = (k.tile("BR"), k.tile("BC"));
    let batch = |s: &'static str| batched.then_some(s);
    let x = k.param("X", dtype, matrix("R", "C", from, "ldx", batch("sx")), Access::In);
    let y = k.param("Y", dtype, matrix("R", "C", to, "ldy", batch("sy")), Access::Out);
    let low = tf32_parts
        .then(|| k.param("Y_low", dtype, matrix("R", "C", to, "ldy", batch("sy")), Access::Out));
    let pl = batched.then(|| k.grid("pl", Dim::sym("L")));
    let pr = k.grid("pr", Dim::sym("R").ceil_div(&br));
    let pc = k.grid("pc", Dim::sym("C").ceil_div(&bc));
    let mut at = vec![pr * &br, pc * &bc];
    let mut shape = vec![br, bc];
    if let Some(pl) = pl {
        at.insert(0, pl);
        shape.insert(0, Dim::new(1));
    }
    let t = k.load(x, at.clone(), shape.clone());
    match low {
        None => k.store(y, at, t),
        Some(low) => {
            let high_tile = round(&mut k, t);
            let args = vec![k.plain(t), k.plain(high_tile)];
            let rest = k.map(Func::binary(Op::Sub, dtype), args, shape);
            let low_tile = round(&mut k, rest);
            k.store(y, at.clone(), high_tile);
            k.store(low, at, low_tile);
        }
    }
    k.finish()
}

/// Computes the left operand of a product into memory of its own: `Y[b,r,c] = prologue(X[b,r,c], D0[b,c], ...)`, tile sizes `BR` and `BC`.
pub(super) fn prologue_program(p: &Prologue, from: Order, to: DType, batched: bool) -> Kernel {
    let mut k = KernelBuilder::new("gemm_prologue");
    let distances: Vec<String> = (0..p.vectors.len()).map(depth_stride).collect();
    let mut sizes = vec!["R", "C", "ldx", "ldy"];
    if batched {
        sizes = vec!["L", "R", "C", "ldx", "ldy", "sx", "sy"];
        sizes.extend(distances.iter().map(String::as_str));
    }
    for size in sizes {
        let min = if size.starts_with('s') { 0 } else { 1 };
        k.symbol(Symbol { name: size.into(), range: Range { min, max: i32::MAX.into() } });
    }
    let (br, bc) = (k.tile("BR"), k.tile("BC"));
    let batch = |s: &'static str| batched.then_some(s);
    let x = k.param("X", p.stored, matrix("R", "C", from, "ldx", batch("sx")), Access::In);
    let mut vectors = Vec::new();
    for (i, dtype) in p.vectors.iter().enumerate() {
        let layout = along_depth("C", i, batched);
        vectors.push(k.param(&format!("D{i}"), *dtype, layout, Access::In));
    }
    let y = k.param("Y", to, matrix("R", "C", Order::Row, "ldy", batch("sy")), Access::Out);
    let pl = batched.then(|| k.grid("pl", Dim::sym("L")));
    let pr = k.grid("pr", Dim::sym("R").ceil_div(&br));
    let pc = k.grid("pc", Dim::sym("C").ceil_div(&bc));
    let (row0, col0) = (pr * &br, pc * &bc);
    let mut at = vec![row0, col0.clone()];
    let mut shape = vec![br, bc.clone()];
    if let Some(pl) = &pl {
        at.insert(0, pl.clone());
        shape.insert(0, Dim::new(1));
    }
    let t = k.load(x, at.clone(), shape.clone());
    let mut args = vec![k.plain(t)];
    for param in vectors {
        let Operand { tile, .. } = load_along(&mut k, param, pl.as_ref(), &col0, &bc);
        args.push(Operand { tile, along: vec![shape.len() - 1] });
    }
    let t = k.map(p.func.clone(), args, shape);
    k.store(y, at, t);
    k.finish()
}
