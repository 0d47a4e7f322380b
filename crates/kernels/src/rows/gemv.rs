//! Products of a matrix with few vectors: `C[m, n] = epilogue(sum over k of A[m, k] * B[k, n])` for up to
//! [`MOST_VECTORS`] rows `m`.
//!
//! The matrix `B` is read once and sets the pace; the vectors come from the caches. One tile program serves both
//! orders of `B`. Where its lines run along the depth, neighbouring threads share a sum and combine theirs at the
//! end; where they run along the columns, neighbouring threads have columns of their own, and lines of threads
//! combine theirs. Either way every register has sums of its own while the depth goes by, so that a sum is a tree of
//! many short ones. Few columns leave few blocks: the depth is cut into parts then, which a second step adds up in
//! order. Of a pair ([`Pair`]) there are two matrices, or two sets of vectors, and two sums for each result.
//!
//! [`GemvSpec::space`] lists schedules, [`GemvForm::estimate_us`] their time.

use super::program::{along, func};
use crate::gemm::{GemmSpec, Order, Pair};
use tilewright_base::DType;
use tilewright_device::{Arch, Streams};
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Axis, Dim, Layout, Range, Symbol};
use tilewright_lower_gpu::{GpuSchedule, LinesKnobs, byte_product};
use tilewright_target::Gpu;
use tilewright_tile::{
    Access, Kernel, KernelBuilder, Operand, ParamId, ReduceKind, TileId, TileType,
};

/// Vectors that a kernel takes at most: each has its own sums in registers.
pub const MOST_VECTORS: i64 = 8;
/// Sums that a thread keeps at most, registers that hold what was read among them.
const SUMS: i64 = 120;
/// Time from a load to its data while memory is busy, in microseconds.
const LATENCY_US: f64 = 0.63;
/// What reading reaches at most, over the rate of a copy.
const STREAM_OVER_COPY: f64 = 1.21;
/// Time of the step that adds up the parts of the depth, and of each part in it, in microseconds.
const SUM_STEP_US: f64 = 2.2;
const SUM_PART_US: f64 = 0.13;
/// Time until the first block runs, and after the last, in microseconds.
const START_US: f64 = 1.5;
/// Where memory sets the pace the model of the tensor cores' kernels is so much above what they take; the two are
/// compared.
const AS_TENSOR_CORES: f64 = 1.17;

/// A product with `vectors` rows for all other sizes. Size symbols are those of [`GemmSpec::program`] without `M`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GemvSpec {
    /// Types, orders, epilogue. How f32 operands are multiplied does not matter: they are not rounded.
    pub gemm: GemmSpec,
    /// Rows of `A` and `C`, 1 to [`MOST_VECTORS`].
    pub vectors: i64,
}

/// How threads share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GemvForm {
    /// Threads of a block.
    pub threads: i64,
    /// Neighbouring threads along a line of `B`.
    pub lanes: i64,
    /// Lines of `B` that a thread reads at once.
    pub each: i64,
    /// Runs of `vector` elements that it reads of each.
    pub runs: i64,
    /// Elements of one access.
    pub vector: i64,
    /// Parts of the depth.
    pub splits: i64,
}

/// What a schedule is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemvSizes {
    /// Columns of the result.
    pub n: i64,
    /// Depth.
    pub k: i64,
    /// Products.
    pub batch: i64,
    /// Elements of one access to `B` that addresses and distances allow.
    pub vector: i64,
}

fn ceil(a: i64, b: i64) -> i64 {
    (a + b - 1) / b.max(1)
}

/// A matrix `[rows, cols]` in an order; with a batch, `L` of them.
fn matrix(rows: Dim, cols: Dim, order: Order, leading: &str, batch: Option<&str>) -> Layout {
    let (unit, leading) = (Dim::new(1), Dim::sym(leading));
    let strides = if order == Order::Row { (leading, unit) } else { (unit, leading) };
    let axis = |extent, stride| Axis { extent, stride, block: None };
    let mut axes = vec![axis(rows, strides.0), axis(cols, strides.1)];
    if let Some(stride) = batch {
        axes.insert(0, axis(Dim::sym("L"), Dim::sym(stride)));
    }
    Layout { axes, offset: Dim::new(0) }
}

impl GemvSpec {
    /// The tile program, with tile sizes `BN` and `BK`. With `split`, part `ps` of the depth goes to `P[ps]`, as
    /// [`GemmSpec::part_program`] has it.
    pub fn program(&self, name: &str, split: bool) -> Kernel {
        let g = &self.gemm;
        let mut k = KernelBuilder::new(name);
        let mut names = vec!["N", "K", "lda", "ldb", "ldc"];
        if g.batched {
            names.extend(["L", "sa", "sb", "sc"]);
        }
        if split {
            names.extend(["S", "part", "sp"]);
        }
        for name in names {
            // Matrices of a batch may be the same one.
            let min = i64::from(!name.starts_with('s'));
            k.symbol(Symbol { name: name.into(), range: Range { min, max: i32::MAX.into() } });
        }
        let (bn, bk) = (k.tile("BN"), k.tile("BK"));
        let (n, depth, m) = (Dim::sym("N"), Dim::sym("K"), Dim::new(self.vectors));
        let batch = |s: &'static str| g.batched.then_some(s);
        let a = matrix(m.clone(), depth.clone(), g.a, "lda", batch("sa"));
        let b = matrix(depth.clone(), n.clone(), g.b, "ldb", batch("sb"));
        let c = || matrix(m.clone(), n.clone(), g.c, "ldc", batch("sc"));
        let e = &g.epilogue;
        let mut operand = |names: [&str; 2], count: i64, layout: Layout| -> Vec<ParamId> {
            let names = names.into_iter().take(count as usize);
            names.map(|name| k.param(name, g.operand, layout.clone(), Access::In)).collect()
        };
        let a = operand(["A", "A2"], self.lefts(), a);
        let b = operand(["B", "B2"], self.rights(), b);
        let with = |t: Option<DType>| t.filter(|_| !split);
        let axis = |extent: &Dim, stride| Axis {
            extent: extent.clone(),
            stride: Dim::new(stride),
            block: None,
        };
        let cols = Layout::row_major(std::slice::from_ref(&n));
        // A value per row as a matrix whose columns are all the same one.
        let rows = Layout { axes: vec![axis(&m, 1), axis(&n, 0)], offset: Dim::new(0) };
        let mut vectors = |names: [&str; 2], two: bool, dtype: Option<DType>, layout: Layout| {
            let names = names.into_iter().take(1 + usize::from(two));
            let list = with(dtype).into_iter().flat_map(|t| names.clone().map(move |n| (n, t)));
            let make = |(name, t)| k.param(name, t, layout.clone(), Access::In);
            list.map(make).collect::<Vec<ParamId>>()
        };
        let cols = vectors(["cols", "cols2"], e.pair == Pair::Right, e.col_vector, cols);
        let rows = vectors(["rows", "rows2"], e.pair == Pair::Left, e.row_vector, rows);
        let residual = with(e.residual).map(|t| k.param("R", t, c(), Access::In));
        let c = if split {
            let mut layout = matrix(m.clone(), n.clone(), g.c, "ldc", None);
            let parts = Axis { extent: Dim::sym("S"), stride: Dim::sym("sp"), block: None };
            layout.axes.insert(0, parts);
            let names = ["P", "P2"].into_iter().take(self.sums() as usize);
            names.map(|name| k.param(name, g.sum, layout.clone(), Access::Out)).collect()
        } else {
            vec![k.param("C", g.result, c(), Access::Out)]
        };
        let ps = split.then(|| k.grid("ps", Dim::sym("S")));
        let pl = g.batched.then(|| k.grid("pl", Dim::sym("L")));
        let col0 = k.grid("pn", n.ceil_div(&bn)) * &bn;
        let at = |x: Dim, y: Dim| pl.iter().cloned().chain([x, y]).collect::<Vec<_>>();
        let shape = |x: Dim, y: Dim| pl.iter().map(|_| Dim::new(1)).chain([x, y]).collect();
        let zero = if g.sum.is_float() { Value::Float(0.0) } else { Value::Int(0) };
        let ty = TileType::new(g.sum, [bn.clone()]);
        // Sums of one row after another, of a pair both.
        let count = self.vectors * self.sums();
        let init: Vec<TileId> = (0..count).map(|_| k.full(zero, ty.clone())).collect();
        let steps = depth.ceil_div(&bk);
        let (lo, hi) = match &ps {
            None => (Dim::new(0), steps),
            Some(ps) => {
                let lo = ps.clone() * &Dim::sym("part");
                let hi = (lo.clone() + &Dim::sym("part")).min_with(&steps);
                (lo, hi)
            }
        };
        let (var, sums) = k.begin_for("piece", lo, hi, &init);
        let k0 = var * &bk;
        let mut matrices = Vec::new();
        for b in b {
            let w = k.load(b, at(k0.clone(), col0.clone()), shape(bk.clone(), bn.clone()));
            matrices.push(k.reshape(w, vec![bk.clone(), bn.clone()]));
        }
        let sum = g.sum;
        let product = match g.operand {
            DType::I8 | DType::U8 => byte_product(g.operand),
            _ => func(&[g.operand, g.operand], |f, a| {
                let (x, y) = (f.cast(a[0], sum), f.cast(a[1], sum));
                f.op(Op::Mul, &[x, y])
            }),
        };
        let mut next = Vec::new();
        for (i, both) in sums.chunks(self.sums() as usize).enumerate() {
            let mut rows = Vec::new();
            for a in &a {
                let row = at(Dim::new(i as i64), k0.clone());
                let x = k.load(*a, row, shape(Dim::new(1), bk.clone()));
                rows.push(k.reshape(x, vec![bk.clone()]));
            }
            for (which, sum) in both.iter().enumerate() {
                let of = |list: &[TileId]| list[which.min(list.len() - 1)];
                let args = vec![k.plain(of(&matrices)), along(of(&rows), 0)];
                let p = k.map(product.clone(), args, vec![bk.clone(), bn.clone()]);
                let part = k.reduce(ReduceKind::Sum, p, 0, None);
                let args = vec![k.plain(*sum), k.plain(part)];
                next.push(k.map(Func::binary(Op::Add, g.sum), args, vec![bn.clone()]));
            }
        }
        let sums = k.end_for(&next);
        for (i, both) in sums.chunks(self.sums() as usize).enumerate() {
            let row = Dim::new(i as i64);
            let line = vec![Dim::new(1), bn.clone()];
            if let Some(ps) = &ps {
                for (sum, parts) in both.iter().zip(&c) {
                    let out = k.reshape(*sum, vec![Dim::new(1), Dim::new(1), bn.clone()]);
                    k.store(*parts, vec![ps.clone(), row.clone(), col0.clone()], out);
                }
                continue;
            }
            let mut args: Vec<Operand> = both.iter().map(|sum| k.plain(*sum)).collect();
            let mut more = |k: &mut KernelBuilder, tile| {
                let tile = k.reshape(tile, vec![bn.clone()]);
                args.push(Operand { tile, along: vec![0] });
            };
            for p in &cols {
                let t = k.load(*p, vec![col0.clone()], vec![bn.clone()]);
                more(&mut k, t);
            }
            for p in &rows {
                let t = k.load(*p, vec![row.clone(), col0.clone()], line.clone());
                more(&mut k, t);
            }
            if let Some(p) = residual {
                let at = at(row.clone(), col0.clone());
                let t = k.load(p, at, shape(Dim::new(1), bn.clone()));
                more(&mut k, t);
            }
            let out = k.map(e.func.clone(), args, vec![bn.clone()]);
            let out = k.reshape(out, shape(Dim::new(1), bn.clone()));
            k.store(c[0], at(row, col0.clone()), out);
        }
        k.finish()
    }

    /// Sets of vectors, matrices, and sums for each result: two of a pair.
    fn lefts(&self) -> i64 {
        self.gemm.epilogue.pair.operands()[0]
    }

    fn rights(&self) -> i64 {
        self.gemm.epilogue.pair.operands()[1]
    }

    fn sums(&self) -> i64 {
        self.lefts().max(self.rights())
    }

    /// Whether lines of `B` run along the depth.
    fn deep(&self) -> bool {
        self.gemm.b == Order::Col
    }

    /// Products that one instruction adds to a sum: four of bytes along the depth.
    fn summed_at_once(&self, vector: i64) -> i64 {
        let bytes = matches!(self.gemm.operand, DType::I8 | DType::U8);
        if bytes && self.deep() && vector % 4 == 0 { 4 } else { 1 }
    }

    fn operand_bytes(&self) -> i64 {
        i64::from(self.gemm.operand.bits()) / 8
    }

    /// Forms that suit these sizes, in a fixed order.
    pub fn space(&self, gpu: &Gpu, sizes: &GemvSizes) -> Vec<GemvForm> {
        let deep = self.deep();
        let (line, lines_of) = if deep { (sizes.k, sizes.n) } else { (sizes.n, sizes.k) };
        let mut vector = sizes.vector.min(16 / self.operand_bytes()).max(1);
        // A run has sums of its own for every vector.
        let each_sum = self.vectors * self.sums();
        while vector > 1 && vector * each_sum / self.summed_at_once(vector) > SUMS - 24 {
            vector /= 2;
        }
        let mut out = Vec::new();
        for threads in [256, 128] {
            for lanes in [256, 128, 32, 16, 8, 4] {
                let runs_of = ceil(line, vector);
                // Lanes beyond the line, and lines of threads beyond the lines, are idle.
                let idle = |count: i64, extent: i64| count > extent.max(1) * 2 - 1;
                if lanes > threads || (lanes > 4 && idle(lanes, runs_of)) {
                    continue;
                }
                for each in [8, 4, 2, 1] {
                    for runs in [1, 2, 4, 8] {
                        let sums = each * runs * vector * each_sum / self.summed_at_once(vector);
                        let bytes = each * runs * vector * self.operand_bytes() * self.rights();
                        let wide = runs > 1 && lanes * runs > runs_of;
                        let tall = each > 1 && threads / lanes * each > lines_of;
                        // Where an access is as wide as can be, more lines at once serve better than longer ones.
                        let full = vector * self.operand_bytes() == 16;
                        let long = full && runs > if deep { 4 } else { 1 };
                        if sums + bytes / 4 > SUMS || bytes > 128 || wide || tall || long {
                            continue;
                        }
                        let form = GemvForm { threads, lanes, each, runs, vector, splits: 1 };
                        out.extend(self.split(gpu, sizes, form));
                    }
                }
            }
        }
        out
    }

    /// A form whole, and with the depth in parts when there are few blocks.
    fn split(&self, gpu: &Gpu, sizes: &GemvSizes, form: GemvForm) -> Vec<GemvForm> {
        let mut out = vec![form];
        let (bn, bk) = self.tile(&form);
        let steps = ceil(sizes.k, bk);
        let blocks = ceil(sizes.n, bn) * sizes.batch;
        for splits in [2, 4, 8, 16, 32, 64, 128] {
            if sizes.batch != 1 || splits > steps || blocks * splits > 16 * i64::from(gpu.sms) {
                break;
            }
            out.push(GemvForm { splits, ..form });
        }
        out
    }

    /// `BN` and `BK`.
    pub fn tile(&self, form: &GemvForm) -> (i64, i64) {
        let lines = form.threads / form.lanes * form.each;
        let line = form.lanes * form.vector * form.runs;
        if self.deep() { (lines, line) } else { (line, lines) }
    }

    /// Registers that a thread takes, roughly.
    fn registers(&self, form: &GemvForm) -> i64 {
        let held = form.each * form.runs * form.vector;
        let matrix = held * self.rights() * self.operand_bytes() / 4;
        let vectors = if self.deep() { form.runs * form.vector } else { form.each };
        let addresses = if form.vector * self.operand_bytes() < 16 { held } else { form.each };
        let sums = held * self.vectors * self.sums() / self.summed_at_once(form.vector);
        24 + sums
            + matrix
            + vectors * self.vectors.min(2) * self.lefts()
            + addresses * self.rights()
    }

    /// Blocks that share a multiprocessor.
    fn together(&self, form: &GemvForm) -> i64 {
        (65536 / form.threads / self.registers(form).min(255)).clamp(1, 1536 / form.threads)
    }

    /// The schedule of a form.
    pub fn schedule(&self, arch: Arch, form: &GemvForm) -> GpuSchedule {
        let (bn, bk) = self.tile(form);
        let mut s = GpuSchedule::hopper(&[("BN", bn), ("BK", bk)]);
        s.arch = arch;
        s.persistent = false;
        s.dependent = arch >= Arch::Sm90a;
        s.vector = form.vector as u32;
        s.lines = LinesKnobs {
            threads: form.threads as u32,
            lanes: form.lanes as u32,
            vector: form.vector as u32,
            early: false,
            streams: Streams::Past,
            ..LinesKnobs::default()
        };
        // The registers are an estimate: what it falls short of must not spill.
        s.blocks_per_sm = (self.together(form) * 3 / 4).max(1) as u32;
        s
    }

    /// Estimated time: that of memory as far as enough of it is asked for, or of the arithmetic. The constants are a
    /// fit to 300 timings of 17 products on an H200 (`crates/bench-gpu/examples/candidates.rs`); the picks among
    /// what was timed are 1.8% from the best, 2.6% with every third product held out.
    pub fn estimate_us(&self, gpu: &Gpu, sizes: &GemvSizes, form: &GemvForm) -> f64 {
        let (bn, bk) = self.tile(form);
        let size = self.operand_bytes();
        let sms = f64::from(gpu.sms);
        // Of a pair two matrices go by, as if it were twice as wide, or twice as many vectors.
        let vectors = (self.vectors * self.lefts()) as f64;
        let rights = self.rights() as f64;
        let steps = ceil(ceil(sizes.k, bk), form.splits);
        let items = ceil(sizes.n, bn) * sizes.batch * form.splits;
        let slots = self.together(form) * i64::from(gpu.sms);
        let active = items.min(slots) as f64;
        let clocks_per_us = gpu.model.clock_ghz * 1e3;
        // Instructions per element of the matrix.
        let widen = match (size, self.gemm.operand.is_float()) {
            (1, true) => 8.3,
            (1, false) => 2.6,
            (2, _) => 1.2,
            _ => 0.0,
        };
        let shared = vectors * if size < 4 { 1.0 } else { 0.3 };
        let reuse = if self.deep() { form.each } else { form.vector * form.runs } as f64;
        let instructions = match self.summed_at_once(form.vector) {
            // Of whole words: a quarter of each, and nothing is widened.
            4 => 0.33 * vectors + 0.25 * shared / reuse + 0.3,
            _ => 1.33 * vectors + widen + shared / reuse + 1.2,
        };
        // A block asks for a piece, waits for it, and works on it: only other blocks of the multiprocessor ask
        // meanwhile.
        let held = (form.each * form.runs * form.vector * form.threads) as f64 * rights;
        let work_us = held * instructions / 128.0 / clocks_per_us;
        let asked = active / sms * held * size as f64 / (LATENCY_US + 1.36 * work_us);
        let ceiling = STREAM_OVER_COPY * gpu.copy_bytes_per_s / 1e6 / sms;
        let rate = sms / (asked.powi(-4) + ceiling.powi(-4)).powf(0.25);
        // Bytes that all blocks read, edges included.
        let bytes = (sizes.n * sizes.k * sizes.batch * size) as f64 * rights;
        let padded = (items * steps * bn * bk * size) as f64 * rights;
        // A last round of blocks that leaves multiprocessors idle.
        let rounds = items as f64 / slots as f64;
        let tail = if rounds <= 1.0 { 1.0 } else { 1.0 + 0.18 * (rounds.ceil() / rounds - 1.0) };
        // Where a load of the matrix brings as many of the vectors, those slow it down; so do short stretches of
        // memory.
        let beside = if self.deep() { vectors / form.each as f64 } else { 0.0 };
        let stretch = (form.lanes * form.runs * form.vector * size) as f64;
        let beside = 1.0 + 0.1 * beside / (size as f64).sqrt() + 8.6 / stretch;
        let memory = bytes.max(padded * 0.5) / rate * tail * beside;
        let issue = 128.0 * clocks_per_us * active.min(sms);
        let arithmetic = padded / size as f64 * instructions / issue;
        // What a block does once: it starts, and combines its sums, beside other blocks.
        let sums =
            form.each as f64 * vectors * rights * if form.lanes > 32 { 0.045 } else { 0.021 };
        let combine = 0.3 + 0.3 * rounds.ceil() * (0.1 + sums) + 0.3 * rounds.min(1.0);
        let parts = if form.splits > 1 {
            let bytes = (self.vectors * self.sums() * sizes.n * form.splits * 8) as f64;
            SUM_STEP_US + SUM_PART_US * form.splits as f64 + bytes / gpu.copy_bytes_per_s * 1e6
        } else {
            0.0
        };
        let all = memory.max(arithmetic) + 0.15 * memory.min(arithmetic) + combine + parts;
        (all + START_US) * AS_TENSOR_CORES
    }
}
