//! Products of a matrix with few vectors, with what comes before and after them in a decoder.
//!
//! `W [N, K]` lies as checkpoints have it, rows along the depth. A row of threads reads lines of it; the vectors come
//! from the caches. The RMS norm needs no pass of its own: `norm(x) W = (x * gain) W / rms(x)`, and the sum of squares is
//! taken on the way. A layer norm takes two short passes over the vectors first: taken on the way, what is left of a large
//! mean would lose digits.

use super::heads::Turn;
use super::{Rows, Scheduled, along, scalar, schedule, text};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::{Func, Op, Value};
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Access, KernelBuilder, Operand, ParamId, ReduceKind, TileId, TileType};

/// Sums that a thread keeps at most, as long as it has one access to each matrix.
const MOST_SUMS: i64 = 64;

/// What happens to the sums.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// `Y[m, n]`, with `residual` plus `R[m, n]`.
    Plain {
        /// Adds `R`.
        residual: bool,
    },
    /// `Y[m, n] = act(sum)`; the function is from f32 to f32.
    Activated(Func),
    /// `act(sum with W) * (sum with U)`; the function is from f32 to f32.
    Gated(Func),
    /// The lines of `W` are `heads + 2 * kv_heads` heads: queries and keys are rotated to their position. Queries go to
    /// `Q [rows, heads, width]`, keys and values to the caches `[batch, kv_heads, positions, width]`.
    Rotary {
        /// Heads of the queries.
        heads: i64,
        /// Heads of keys and values.
        kv_heads: i64,
        /// Width of a head, even.
        width: i64,
    },
}

/// What is done to the vectors before a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Type of the gain, and of the shift.
    pub dtype: DType,
    /// What is added to the mean of squares.
    pub eps: f64,
    /// A layer norm: the mean is taken off, and a shift added at the end. Otherwise an RMS norm.
    pub centred: bool,
}

/// A product for a few vectors. Parameters in order: `X [rows, K]` f32, the gain, the shift of a layer norm, `W`, `U`, the bias (of a
/// gate two), and what the ending has: `R` and `Y`; `Y`; `cos` and `sin` `[2, positions, width/2]` (first of what turns, then of what does not), `Q`, keys,
/// values.
#[derive(Clone, Debug, PartialEq)]
pub struct VectorProduct {
    /// Its name.
    pub name: String,
    /// Rows of `X`.
    pub rows: Rows,
    /// Lines of `W`.
    pub lines: i64,
    /// Depth.
    pub depth: i64,
    /// Type of the weights.
    pub weight: DType,
    /// A norm in front.
    pub norm: Option<Norm>,
    /// A bias of the weights' type, one per line.
    pub bias: bool,
    /// What happens to the sums.
    pub ending: Ending,
}

/// How threads share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Threads of a block.
    pub threads: i64,
    /// Neighbouring threads along a line.
    pub lanes: i64,
    /// Lines that a thread reads at once.
    pub each: i64,
    /// Accesses of 16 bytes that it makes to each.
    pub runs: i64,
    /// Blocks that share a multiprocessor, for which registers are limited.
    pub blocks: i64,
    /// Weights are asked for while the kernel before still runs.
    pub ahead: bool,
    /// Turns of the loop along the depth whose weights are under way in shared memory; below 2: none.
    pub fetched: i64,
}

impl VectorProduct {
    /// Matrices, or pairs of lines of one, that a block reads side by side.
    fn planes(&self) -> i64 {
        if matches!(self.ending, Ending::Plain { .. } | Ending::Activated(_)) { 1 } else { 2 }
    }

    /// Lines that are counted in blocks of `BN`.
    fn blocked(&self) -> i64 {
        match &self.ending {
            Ending::Rotary { width, .. } => width / 2,
            _ => self.lines,
        }
    }

    /// Elements of one access.
    fn vector(&self) -> i64 {
        let mut vector = 128 / i64::from(self.weight.bits());
        while vector > 1 && self.depth % vector != 0 {
            vector /= 2;
        }
        // Every row has sums of its own, and registers are better spent on more threads.
        while vector > 4 && vector * self.planes() * self.rows.count() > MOST_SUMS {
            vector /= 2;
        }
        vector
    }

    /// The form for a machine with this many multiprocessors, as measured on an H200
    /// (`crates/runtime-gpu/examples/decode_forms.rs`).
    pub fn form(&self, sms: i64) -> Form {
        let lanes = 32;
        // Short products are over before much has been asked for: of one vector most of their weights come to shared memory while
        // attention, or the layer before, still runs.
        let short = self.depth <= 2048 && self.lines < 4 * self.depth && self.rows.count() == 1;
        let fetched = match &self.ending {
            Ending::Rotary { .. } | Ending::Plain { .. } if short => 3,
            _ => 0,
        };
        let (threads, mut each, mut runs) = match &self.ending {
            Ending::Rotary { .. } => (128, 2, 2),
            Ending::Gated(_) => (if self.depth <= 2048 { 256 } else { 128 }, 2, 1),
            // So many lines that every multiprocessor has many blocks.
            _ if self.lines >= 128 * sms => (128, 4, 2),
            // As deep as it is wide: the product behind attention.
            _ if self.depth <= 2048 => (128, 2, 4),
            _ => (256, 1, 4),
        };
        let useful = (self.depth + lanes * self.vector() - 1) / (lanes * self.vector());
        while runs > 1 && runs > useful {
            runs /= 2;
        }
        let sums =
            |each: i64, runs: i64| runs * each * self.planes() * self.vector() * self.rows.count();
        while runs > 1 && sums(each, runs) > MOST_SUMS {
            runs /= 2;
        }
        while each > 1 && sums(each, runs) > MOST_SUMS {
            each /= 2;
        }
        Form { threads, lanes, each, runs, blocks: 1, ahead: true, fetched }
    }

    /// The kernel in the form that suits the machine.
    ///
    /// # Errors
    /// Our bug.
    pub fn scheduled(&self, arch: Arch, sms: i64) -> Result<Scheduled> {
        self.in_form(arch, &self.form(sms))
    }

    /// The kernel in a form.
    ///
    /// # Errors
    /// Our bug.
    pub fn in_form(&self, arch: Arch, form: &Form) -> Result<Scheduled> {
        let vector = self.vector();
        let mut form = *form;
        // Blocks of lines do not straddle heads.
        if let Ending::Rotary { width, .. } = &self.ending {
            while (width / 2) % (form.threads / form.lanes * form.each) != 0 {
                if form.each > 1 {
                    form.each /= 2;
                } else if form.threads > form.lanes.max(32) {
                    form.threads /= 2;
                } else {
                    break;
                }
            }
        }
        let tiles = [
            ("BN", form.threads / form.lanes * form.each),
            ("BK", form.lanes * vector * form.runs),
        ];
        let mut schedule =
            schedule(arch, &tiles, (form.threads, form.lanes, vector), self.depth, true);
        schedule.lines.ahead &= form.ahead;
        schedule.lines.fetched = form.fetched.clamp(0, 16) as u32;
        schedule.blocks_per_sm = form.blocks.clamp(1, 16) as u32;
        Ok(Scheduled { kernel: self.program()?, schedule })
    }

    fn program(&self) -> Result<tilewright_tile::Kernel> {
        use Access::{In, Out};
        let mut k = KernelBuilder::new(&self.name);
        let rows = self.rows.count();
        let (bn, bk) = (k.tile("BN"), k.tile("BK"));
        let d = Dim::new;
        let shape = |s: &[i64]| Layout::row_major(&s.iter().map(|&n| d(n)).collect::<Vec<_>>());
        let x = k.param("X", DType::F32, shape(&[rows, self.depth]), In);
        let mut of_norm = |name: &str, there: bool| {
            let norm = self.norm.filter(|_| there);
            norm.map(|n| k.param(name, n.dtype, shape(&[self.depth]), In))
        };
        let gain = of_norm("gain", true);
        let centred = self.norm.filter(|n| n.centred);
        let shift = of_norm("shift", centred.is_some());
        let w = k.param("W", self.weight, shape(&[self.lines, self.depth]), In);
        let u = match self.ending {
            Ending::Gated(_) => k.param("U", self.weight, shape(&[self.lines, self.depth]), In),
            _ => w,
        };
        let bias = self.bias.then(|| k.param("bias", self.weight, shape(&[self.lines]), In));
        let bias2 = match self.ending {
            Ending::Gated(_) if self.bias => {
                Some(k.param("bias2", self.weight, shape(&[self.lines]), In))
            }
            _ => bias,
        };

        // Where the lines of this block begin, and those of its second plane.
        let (first, second, head, within) = match &self.ending {
            Ending::Rotary { heads, kv_heads, width } => {
                let head = k.grid("head", d(heads + 2 * kv_heads));
                let at = k.grid("pn", d(self.blocked()).ceil_div(&bn)) * &bn;
                let first = head.clone() * *width + &at;
                (first.clone(), first + &d(width / 2), head, at)
            }
            _ => {
                let at = k.grid("pn", d(self.lines).ceil_div(&bn)) * &bn;
                (at.clone(), at.clone(), d(0), at)
            }
        };
        let two = self.planes() == 2;
        let planes = if two { 2 } else { 1 };
        let means = match centred {
            Some(norm) => self.means(&mut k, x, &bk, norm.eps)?,
            None => Vec::new(),
        };
        // A layer norm is complete before the product.
        let roots = self.norm.filter(|n| !n.centred);
        let sum = TileType::new(DType::F32, [bn.clone()]);
        let zero = Value::Float(0.0);
        let mut init: Vec<TileId> = (0..planes * rows).map(|_| k.full(zero, sum.clone())).collect();
        if roots.is_some() {
            let one = TileType::new(DType::F32, Vec::new());
            init.extend((0..rows).map(|_| k.full(zero, one.clone())));
        }
        let (var, sums) = k.begin_for("piece", d(0), d(self.depth).ceil_div(&bk), &init);
        let k0 = var * &bk;
        let plane = vec![bn.clone(), bk.clone()];
        let mut weights = vec![k.load(w, vec![first.clone(), k0.clone()], plane.clone())];
        if two {
            weights.push(k.load(u, vec![second.clone(), k0.clone()], plane.clone()));
        }
        let [gains, shifts] =
            [gain, shift].map(|p| p.map(|p| k.load(p, vec![k0.clone()], vec![bk.clone()])));
        let add = Func::binary(Op::Add, DType::F32);
        let mut next = Vec::new();
        let mut squares = Vec::new();
        for row in 0..rows {
            let x = k.load(x, vec![d(row), k0.clone()], vec![d(1), bk.clone()]);
            let x = k.reshape(x, vec![bk.clone()]);
            let mut scaled = x;
            if let (Some(g), Some(b), Some(norm)) = (gains, shifts, centred) {
                let [mean, root] = means[row as usize];
                let f = "{ x, m, r, g, b -> (x - m) * r * f32(g) + f32(b) }";
                let types = [DType::F32, DType::F32, DType::F32, norm.dtype, norm.dtype];
                let args = vec![along(x, 0), scalar(mean), scalar(root), along(g, 0), along(b, 0)];
                scaled = k.map(text(f, &types)?, args, vec![bk.clone()]);
            } else if let (Some(g), Some(norm)) = (gains, roots) {
                let f = text("{ x, g -> x * f32(g) }", &[DType::F32, norm.dtype])?;
                scaled = k.map(f, vec![along(x, 0), along(g, 0)], vec![bk.clone()]);
                let f = text("{ x -> x * x }", &[DType::F32])?;
                let square = k.map(f, vec![along(x, 0)], vec![bk.clone()]);
                let part = k.reduce(ReduceKind::Sum, square, 0, None);
                let old = sums[(planes * rows + row) as usize];
                squares.push(k.map(add.clone(), vec![scalar(old), scalar(part)], vec![]));
            }
            for (p, w) in weights.iter().enumerate() {
                let f = text("{ w, x -> f32(w) * x }", &[self.weight, DType::F32])?;
                let product = k.map(f, vec![k.plain(*w), along(scaled, 1)], plane.clone());
                let part = k.reduce(ReduceKind::Sum, product, 1, None);
                let old = sums[row as usize * weights.len() + p];
                let args = vec![along(old, 0), along(part, 0)];
                next.push(k.map(add.clone(), args, vec![bn.clone()]));
            }
        }
        next.extend(squares);
        let sums = k.end_for(&next);

        let line = vec![bn.clone()];
        let biases: Vec<TileId> = [(bias, first), (bias2, second)]
            .into_iter()
            .take(planes as usize)
            .filter_map(|(b, at)| b.map(|b| k.load(b, vec![at], line.clone())))
            .collect();
        let mut finished = Vec::new();
        for row in 0..rows {
            for p in 0..planes {
                let mut y = sums[(row * planes + p) as usize];
                if let Some(Norm { eps, .. }) = roots {
                    let q = sums[(planes * rows + row) as usize];
                    let of = self.depth;
                    let f = format!("{{ s, q -> s * rsqrt(q / f32({of}) + f32({eps:?})) }}");
                    let f = text(&f, &[DType::F32; 2])?;
                    y = k.map(f, vec![along(y, 0), scalar(q)], line.clone());
                }
                if let Some(b) = biases.get(p as usize) {
                    let f = text("{ s, b -> s + f32(b) }", &[DType::F32, self.weight])?;
                    y = k.map(f, vec![along(y, 0), along(*b, 0)], line.clone());
                }
                finished.push(y);
            }
        }
        match &self.ending {
            Ending::Plain { residual } => {
                let flat = shape(&[rows, self.lines]);
                let r = residual.then(|| k.param("R", DType::F32, flat.clone(), In));
                let y = k.param("Y", DType::F32, flat, Out);
                for (row, mut value) in finished.into_iter().enumerate() {
                    let at = vec![d(row as i64), within.clone()];
                    let one = vec![d(1), bn.clone()];
                    if let Some(r) = r {
                        let old = k.load(r, at.clone(), one.clone());
                        let old = k.reshape(old, line.clone());
                        let args: Vec<Operand> = vec![along(value, 0), along(old, 0)];
                        value = k.map(add.clone(), args, line.clone());
                    }
                    let value = k.reshape(value, one);
                    k.store(y, at, value);
                }
            }
            Ending::Activated(act) => {
                let y = k.param("Y", DType::F32, shape(&[rows, self.lines]), Out);
                for (row, value) in finished.into_iter().enumerate() {
                    let value = k.map(act.clone(), vec![along(value, 0)], line.clone());
                    let value = k.reshape(value, vec![d(1), bn.clone()]);
                    k.store(y, vec![d(row as i64), within.clone()], value);
                }
            }
            Ending::Gated(act) => {
                let y = k.param("Y", DType::F32, shape(&[rows, self.lines]), Out);
                for (row, pair) in finished.chunks(2).enumerate() {
                    let gate = k.map(act.clone(), vec![along(pair[0], 0)], line.clone());
                    let f = Func::binary(Op::Mul, DType::F32);
                    let value = k.map(f, vec![along(gate, 0), along(pair[1], 0)], line.clone());
                    let value = k.reshape(value, vec![d(1), bn.clone()]);
                    k.store(y, vec![d(row as i64), within.clone()], value);
                }
            }
            Ending::Rotary { heads, kv_heads, width } => {
                let turn = Turn {
                    rows: self.rows,
                    heads: *heads,
                    kv_heads: *kv_heads,
                    width: *width,
                    cache: self.weight,
                };
                let to = turn.params(&mut k);
                for (row, pair) in finished.chunks(2).enumerate() {
                    let row = d(row as i64);
                    turn.place(&mut k, &to, [&row, &head, &within], [pair[0], pair[1]])?;
                }
            }
        }
        Ok(k.finish())
    }

    /// The mean of each row, and one over the root of the mean square around it.
    fn means(
        &self,
        k: &mut KernelBuilder,
        x: ParamId,
        bk: &Dim,
        eps: f64,
    ) -> Result<Vec<[TileId; 2]>> {
        let (d, of) = (Dim::new, self.depth);
        let add = Func::binary(Op::Add, DType::F32);
        let none = k.full(Value::Float(0.0), TileType::new(DType::F32, Vec::new()));
        let pieces = || d(of).ceil_div(bk);
        let mut all = Vec::new();
        for row in 0..self.rows.count() {
            let piece = |k: &mut KernelBuilder, k0: &Dim| {
                let x = k.load(x, vec![d(row), k0.clone()], vec![d(1), bk.clone()]);
                k.reshape(x, vec![bk.clone()])
            };
            let (var, sum) = k.begin_for("mean", d(0), pieces(), &[none]);
            let here = piece(k, &(var * bk));
            let here = k.reduce(ReduceKind::Sum, here, 0, None);
            let next = k.map(add.clone(), vec![scalar(sum[0]), scalar(here)], vec![]);
            let sum = k.end_for(&[next])[0];
            let f = text(&format!("{{ s -> s / f32({of}) }}"), &[DType::F32])?;
            let mean = k.map(f, vec![scalar(sum)], vec![]);
            let (var, sum) = k.begin_for("square", d(0), pieces(), &[none]);
            let k0 = var * bk;
            let here = piece(k, &k0);
            let places = k.iota(DType::I32, 0, k0, vec![bk.clone()]);
            let f = format!("{{ x, m, i -> where(i < {of}, (x - m) * (x - m), f32(0)) }}");
            let f = text(&f, &[DType::F32, DType::F32, DType::I32])?;
            let args = vec![along(here, 0), scalar(mean), along(places, 0)];
            let square = k.map(f, args, vec![bk.clone()]);
            let here = k.reduce(ReduceKind::Sum, square, 0, None);
            let next = k.map(add.clone(), vec![scalar(sum[0]), scalar(here)], vec![]);
            let sum = k.end_for(&[next])[0];
            let f = format!("{{ q -> rsqrt(q / f32({of}) + f32({eps:?})) }}");
            let root = k.map(text(&f, &[DType::F32])?, vec![scalar(sum)], vec![]);
            all.push([mean, root]);
        }
        Ok(all)
    }
}
