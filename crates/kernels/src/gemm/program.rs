//! The tile program of a matrix product.

use tilewright_base::DType;
use tilewright_expr::{Func, FuncBuilder, Op, Value};
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_tile::{Access, Kernel, KernelBuilder, Operand, TileId, TileType};

/// Which axis of a matrix is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Order {
    /// The last axis: row-major.
    Row,
    /// The first axis: column-major, a transposed view.
    Col,
}

/// What happens to a tile of sums before it is stored. Parameters of `func` are the sum and then,
/// in this order, those of `col_vector`, `row_vector` and `residual` that are present.
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
}

impl Epilogue {
    /// Only the conversion to the result's type.
    pub fn cast(from: DType, to: DType) -> Epilogue {
        Epilogue { func: Func::cast(from, to), col_vector: None, row_vector: None, residual: None }
    }

    /// The epilogue of the transposed product: vectors along rows and columns change places.
    #[must_use]
    pub fn transposed(&self) -> Epilogue {
        let mut out =
            Epilogue { col_vector: self.row_vector, row_vector: self.col_vector, ..self.clone() };
        if self.col_vector.is_some() && self.row_vector.is_some() {
            let mut b = FuncBuilder::new();
            let mut order: Vec<usize> = (0..self.func.params().len()).collect();
            order.swap(1, 2);
            let params = self.func.params();
            let new: Vec<_> =
                order.iter().map(|i| b.param(&params[*i].name, params[*i].dtype)).collect();
            let args: Vec<_> = order.iter().map(|i| new[*i]).collect();
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
        Epilogue { func: b.finish(x), col_vector: Some(bias), row_vector: None, residual: None }
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

/// A matrix product for all sizes: `C[b,m,n] = epilogue(sum over k of A[b,m,k] * B[b,k,n])`.
///
/// Size symbols: `M`, `N`, `K`, with `batched` also `L`; `lda`, `ldb`, `ldc` are the distances in
/// elements between neighbours along the axis that is not contiguous, and `sa`, `sb`, `sc` those
/// between batches.
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
}

/// The operand rounded to TF32.
fn round(k: &mut KernelBuilder, tile: TileId) -> TileId {
    let shape = k.ty(tile).shape.clone();
    let arg = k.plain(tile);
    k.map(tilewright_lower_gpu::tf32_round(), vec![arg], shape)
}

fn matrix(rows: &str, cols: &str, order: Order, leading: &str, batch: Option<&str>) -> Layout {
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
        }
    }

    /// The tile program, with tile sizes `BM`, `BN`, `BK`.
    pub fn program(&self, name: &str) -> Kernel {
        self.build(name, false)
    }

    /// The program of a product whose depth is cut into parts: part `ps` sums `part` tiles of depth and
    /// stores its sums to `P[ps]`, a tensor `[S, M, N]` in the order of `C`. [`GemmSpec::sum_program`]
    /// adds the parts up. Not for batches.
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
        if self.batched {
            sizes.extend(["sa", "sb", "sc"]);
        }
        for size in sizes {
            // Matrices of a batch may be the same one.
            let min = i64::from(!size.starts_with('s'));
            k.symbol(Symbol { name: size.into(), range: Range { min, max: i32::MAX.into() } });
        }
        let (bm, bn, bk) = (k.tile("BM"), k.tile("BN"), k.tile("BK"));
        let (m, n, depth) = (Dim::sym("M"), Dim::sym("N"), Dim::sym("K"));
        let batch = |s: &'static str| self.batched.then_some(s);
        let a =
            k.param("A", self.operand, matrix("M", "K", self.a, "lda", batch("sa")), Access::In);
        let b =
            k.param("B", self.operand, matrix("K", "N", self.b, "ldb", batch("sb")), Access::In);
        let low = (self.math == Math::Tf32x3).then(|| {
            let a = matrix("M", "K", self.a, "lda", batch("sa"));
            let b = matrix("K", "N", self.b, "ldb", batch("sb"));
            let a = k.param("A_low", self.operand, a, Access::In);
            (a, k.param("B_low", self.operand, b, Access::In))
        });
        let vector = |extent: &str| Layout::row_major(&[Dim::sym(extent)]);
        let e = &self.epilogue;
        let with = |t: Option<DType>| t.filter(|_| !split);
        let col = with(e.col_vector).map(|t| k.param("cols", t, vector("N"), Access::In));
        let row = with(e.row_vector).map(|t| k.param("rows", t, vector("M"), Access::In));
        let c_layout = || matrix("M", "N", self.c, "ldc", batch("sc"));
        let residual = with(e.residual).map(|t| k.param("R", t, c_layout(), Access::In));
        let c = if split {
            let mut layout = matrix("M", "N", self.c, "ldc", None);
            let parts = Axis { extent: Dim::sym("S"), stride: Dim::sym("sp"), block: None };
            layout.axes.insert(0, parts);
            k.param("P", self.sum, layout, Access::Out)
        } else {
            k.param("C", self.result, c_layout(), Access::Out)
        };
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
        let steps = depth.ceil_div(&bk);
        let (lo, hi) = match &ps {
            None => (Dim::new(0), steps),
            Some(ps) => {
                let lo = ps.clone() * &Dim::sym("part");
                let hi = (lo.clone() + &Dim::sym("part")).min_with(&steps);
                (lo, hi)
            }
        };
        let (var, carried) = k.begin_for("k", lo, hi, &[init]);
        let row0 = pm * &bm;
        let col0 = pn * &bn;
        let k0 = var * &bk;
        let mut ta = k.load(a, at(row0.clone(), k0.clone()), shape(&bm, &bk));
        let mut tb = k.load(b, at(k0.clone(), col0.clone()), shape(&bk, &bn));
        if self.batched {
            ta = k.reshape(ta, vec![bm.clone(), bk.clone()]);
            tb = k.reshape(tb, vec![bk.clone(), bn.clone()]);
        }
        let limit = depth - &k0;
        let next = match self.math {
            Math::Exact => k.mma(carried[0], ta, tb, Some(limit)),
            Math::Tf32 => {
                let (ra, rb) = (round(&mut k, ta), round(&mut k, tb));
                k.mma(carried[0], ra, rb, Some(limit))
            }
            Math::Tf32x3 => {
                let (a_low, b_low) = low.expect("declared for this math");
                let mut la = k.load(a_low, at(row0.clone(), k0.clone()), shape(&bm, &bk));
                let mut lb = k.load(b_low, at(k0.clone(), col0.clone()), shape(&bk, &bn));
                if self.batched {
                    la = k.reshape(la, vec![bm.clone(), bk.clone()]);
                    lb = k.reshape(lb, vec![bk.clone(), bn.clone()]);
                }
                let (ha, hb) = (round(&mut k, ta), round(&mut k, tb));
                let (la, lb) = (round(&mut k, la), round(&mut k, lb));
                // Small terms first. The tensor cores drop the low digits of their sums, so sums of one tile depth
                // are added in f32.
                let x = k.mma(init, la, hb, Some(limit.clone()));
                let x = k.mma(x, ha, lb, Some(limit.clone()));
                let part = k.mma(x, ha, hb, Some(limit));
                let args = vec![k.plain(carried[0]), k.plain(part)];
                k.map(Func::binary(Op::Add, self.sum), args, vec![bm.clone(), bn.clone()])
            }
            Math::Promoted => {
                let part = k.mma(init, ta, tb, Some(limit));
                let add = Func::binary(Op::Add, self.sum);
                let args = vec![k.plain(carried[0]), k.plain(part)];
                k.map(add, args, vec![bm.clone(), bn.clone()])
            }
        };
        let sums = k.end_for(&[next])[0];
        if let Some(ps) = ps {
            let out = k.reshape(sums, vec![Dim::new(1), bm, bn]);
            k.store(c, vec![ps, row0, col0], out);
            return k.finish();
        }
        let mut args = vec![k.plain(sums)];
        if let Some(p) = col {
            let v = k.load(p, vec![col0.clone()], vec![bn.clone()]);
            args.push(Operand { tile: v, along: vec![1] });
        }
        if let Some(p) = row {
            let v = k.load(p, vec![row0.clone()], vec![bm.clone()]);
            args.push(Operand { tile: v, along: vec![0] });
        }
        if let Some(p) = residual {
            let mut t = k.load(p, at(row0.clone(), col0.clone()), shape(&bm, &bn));
            if self.batched {
                t = k.reshape(t, vec![bm.clone(), bn.clone()]);
            }
            args.push(k.plain(t));
        }
        let mut out = k.map(e.func.clone(), args, vec![bm.clone(), bn.clone()]);
        if self.batched {
            out = k.reshape(out, shape(&bm, &bn));
        }
        k.store(c, at(row0, col0), out);
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
        let p = k.param("P", self.sum, parts, Access::In);
        let vector = |extent: &str| Layout::row_major(&[Dim::sym(extent)]);
        let c_layout = || matrix("M", "N", Order::Row, "ldc", None);
        let col = e.col_vector.map(|t| k.param("cols", t, vector("N"), Access::In));
        let row = e.row_vector.map(|t| k.param("rows", t, vector("M"), Access::In));
        let residual = e.residual.map(|t| k.param("R", t, c_layout(), Access::In));
        let c = k.param("C", self.result, c_layout(), Access::Out);
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&br));
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bc));
        let (row0, col0) = (pm * &br, pn * &bc);
        let zero = if self.sum.is_float() { Value::Float(0.0) } else { Value::Int(0) };
        let init = k.full(zero, TileType::new(self.sum, [br.clone(), bc.clone()]));
        let (s, carried) = k.begin_for("s", Dim::new(0), Dim::sym("S"), &[init]);
        let t = k.load(
            p,
            vec![s, row0.clone(), col0.clone()],
            vec![Dim::new(1), br.clone(), bc.clone()],
        );
        let t = k.reshape(t, vec![br.clone(), bc.clone()]);
        let args = vec![k.plain(carried[0]), k.plain(t)];
        let next = k.map(Func::binary(Op::Add, self.sum), args, vec![br.clone(), bc.clone()]);
        let sums = k.end_for(&[next])[0];
        let mut args = vec![k.plain(sums)];
        if let Some(p) = col {
            let v = k.load(p, vec![col0.clone()], vec![bc.clone()]);
            args.push(Operand { tile: v, along: vec![1] });
        }
        if let Some(p) = row {
            let v = k.load(p, vec![row0.clone()], vec![br.clone()]);
            args.push(Operand { tile: v, along: vec![0] });
        }
        if let Some(p) = residual {
            let t = k.load(p, vec![row0.clone(), col0.clone()], vec![br.clone(), bc.clone()]);
            args.push(k.plain(t));
        }
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
        let vector = |extent: &str| Layout::row_major(&[Dim::sym(extent)]);
        let c_layout = || matrix("M", "N", Order::Row, "ldc", batch);
        let col = e.col_vector.map(|t| k.param("cols", t, vector("N"), Access::In));
        let row = e.row_vector.map(|t| k.param("rows", t, vector("M"), Access::In));
        let residual = e.residual.map(|t| k.param("R", t, c_layout(), Access::In));
        let c = k.param("C", self.result, c_layout(), Access::Out);
        let pl = self.batched.then(|| k.grid("pl", Dim::sym("L")));
        let pm = k.grid("pm", Dim::sym("M").ceil_div(&br));
        let pn = k.grid("pn", Dim::sym("N").ceil_div(&bc));
        let (row0, col0) = (pm * &br, pn * &bc);
        let mut at = vec![row0.clone(), col0.clone()];
        let mut shape = vec![br.clone(), bc.clone()];
        if let Some(pl) = pl {
            at.insert(0, pl);
            shape.insert(0, Dim::new(1));
        }
        let zero = if self.sum.is_float() { Value::Float(0.0) } else { Value::Int(0) };
        let sums = k.full(zero, TileType::new(self.sum, shape.clone()));
        let mut args = vec![k.plain(sums)];
        let lines = shape.len() - 2;
        for (param, start, extent, axis) in [(col, col0, bc, lines + 1), (row, row0, br, lines)] {
            if let Some(p) = param {
                let v = k.load(p, vec![start], vec![extent]);
                args.push(Operand { tile: v, along: vec![axis] });
            }
        }
        if let Some(p) = residual {
            let t = k.load(p, at.clone(), shape.clone());
            args.push(k.plain(t));
        }
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
