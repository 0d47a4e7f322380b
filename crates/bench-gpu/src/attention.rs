//! Attention on the device: cases, buffers, a float64 reference on the host.
//!
//! The error is relative, in the Euclidean norm over the compared rows, and may be [`ERROR_RATIO_MAX`] times
//! that of a plain model of the arithmetic: exact scores and sums, weights rounded to the operands' type, the
//! result to its own.

use crate::arms::Pass;
use crate::case::Place as Matrix;
use crate::record::ERROR_RATIO_MAX;
use crate::support::Support;
use std::fmt;
use std::marker::PhantomData;
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::{Buffer, Event, Stream};
use tilewright_data::{from_f64, from_i64, read_f64, read_i64};
use tilewright_device::Program;
use tilewright_kernels::attention::{Candidate, Mask, MaskKind, Place, Problem, Strides};
use tilewright_kernels::gemm::{Order, Precision};
use tilewright_launch::{BoundKernel, LoadedKernel, Loader, Operand};
use tilewright_lower_gpu::lower;

/// Error of plain f32 arithmetic, relative.
const F32_ERROR: f64 = 2e-6;

/// A problem with a name.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is computed.
    pub problem: Problem,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.problem;
        write!(
            f,
            "{} B{} H{}/{} S{} T{} D{}/{}",
            if tf32(p) { "tf32".to_string() } else { p.dtype.to_string() },
            p.batch,
            p.heads,
            p.kv_heads,
            p.q_len,
            p.kv_len,
            p.depth,
            p.width
        )?;
        if p.q.head < p.q.row {
            write!(f, " rows-first")?;
        }
        if let Some(offset) = p.causal {
            write!(f, " causal+{offset}")?;
        }
        if let Some(mask) = &p.mask {
            write!(f, " {:?}{}", mask.kind, if mask.strides.row == 0 { "/key" } else { "" })?;
        }
        if p.lse { write!(f, " lse") } else { Ok(()) }
    }
}

impl Case {
    /// Multiply-adds times two, of what is visible.
    pub fn flops(&self) -> f64 {
        let p = &self.problem;
        let pairs: f64 = (0..p.q_len).map(|i| self.visible(i) as f64).sum();
        2.0 * pairs * (p.batch * p.heads * (p.depth + p.width)) as f64
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> f64 {
        let p = &self.problem;
        let (rows, keys) = (p.batch * p.heads * p.q_len, p.batch * p.kv_heads * p.kv_len);
        let size = |t: DType| f64::from(t.bits()) / 8.0;
        ((rows * p.depth + keys * (p.depth + p.width)) as f64) * size(p.dtype)
            + (rows * p.width) as f64 * size(p.result)
    }

    fn visible(&self, row: i64) -> i64 {
        let p = &self.problem;
        p.causal.map_or(p.kv_len, |offset| (row + offset + 1).clamp(0, p.kv_len))
    }
}

/// The tensors of a case.
#[derive(Debug)]
pub struct Tensors {
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// The result.
    pub o: Buffer,
    mask: Option<Buffer>,
    lse: Buffer,
    host_mask: Vec<u8>,
}

fn elements(strides: &Strides, heads: i64, rows: i64, batch: i64, line: i64) -> usize {
    let last = |n: i64, stride: i64| (n - 1).max(0) * stride;
    let last = last(batch, strides.batch) + last(heads, strides.head) + last(rows, strides.row);
    (last + line) as usize
}

impl Tensors {
    /// Allocates and fills.
    pub fn new(stream: &Stream, support: &Support, case: &Case, seed: u64) -> Result<Tensors> {
        let p = &case.problem;
        let filled = |count: usize, dtype: DType, seed: u64| -> Result<Buffer> {
            let buffer = stream.alloc(count * dtype.bits() as usize / 8)?;
            let place = Matrix::dense(dtype, Order::Row, 1, count as u64, 1);
            support.fill(stream, &buffer, &place, seed)?;
            Ok(buffer)
        };
        let q = elements(&p.q, p.heads, p.q_len, p.batch, p.depth);
        let k = elements(&p.k, p.kv_heads, p.kv_len, p.batch, p.depth);
        let v = elements(&p.v, p.kv_heads, p.kv_len, p.batch, p.width);
        let o = elements(&p.o, p.heads, p.q_len, p.batch, p.width);
        let o = stream.alloc(o * p.result.bits() as usize / 8)?;
        o.poison(stream)?;
        let host_mask = p.mask.as_ref().map_or_else(Vec::new, |m| mask_bytes(case, m));
        let mask = match p.mask {
            Some(_) => Some(stream.upload(&host_mask)?),
            None => None,
        };
        Ok(Tensors {
            q: filled(q, p.dtype, seed)?,
            k: filled(k, p.dtype, seed + 1)?,
            v: filled(v, p.dtype, seed + 2)?,
            o,
            mask,
            lse: stream.alloc((p.batch * p.heads * p.q_len) as usize * 4)?,
            host_mask,
        })
    }
}

/// A mask that hides about a third of the keys, and in one row of each head all of them.
fn mask_bytes(case: &Case, mask: &Mask) -> Vec<u8> {
    let p = &case.problem;
    let s = &mask.strides;
    let rows = if s.row == 0 { 1 } else { p.q_len };
    let count = elements(s, p.heads, rows, p.batch, p.kv_len);
    let mut bytes = vec![0u8; count * mask.dtype.bits() as usize / 8];
    for i in 0..count {
        let noise = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let hidden = noise.is_multiple_of(3) || (s.row > 0 && (i as i64 / s.row) % 37 == 5);
        match mask.kind {
            MaskKind::Keep => from_i64(mask.dtype, &mut bytes, i, i64::from(!hidden)),
            MaskKind::Add if hidden => from_f64(mask.dtype, &mut bytes, i, f64::NEG_INFINITY),
            MaskKind::Add => from_f64(mask.dtype, &mut bytes, i, (noise % 64) as f64 / 32.0 - 1.0),
        }
    }
    bytes
}

/// A plan, loaded.
#[derive(Debug)]
pub struct Ours {
    candidate: Candidate,
    kernels: Vec<LoadedKernel>,
    workspace: Buffer,
}

/// The programs of a candidate's steps.
pub fn programs(candidate: &Candidate) -> Result<Vec<Program>> {
    candidate.steps.iter().map(|step| lower(&step.kernel, &step.schedule)).collect()
}

/// What a candidate is, in a line.
pub fn describe(candidate: &Candidate) -> String {
    let steps: Vec<String> = candidate.steps.iter().map(|s| s.schedule.to_string()).collect();
    steps.join("; ")
}

impl Ours {
    /// Lowers, compiles (or finds) and loads a candidate.
    pub fn load(loader: &Loader, stream: &Stream, candidate: &Candidate) -> Result<Ours> {
        let kernels =
            loader.load_all(&programs(candidate)?).into_iter().collect::<Result<Vec<_>>>()?;
        let workspace = stream.alloc(candidate.workspace_bytes as usize)?;
        Ok(Ours { candidate: candidate.clone(), kernels, workspace })
    }

    /// Binds a set of tensors.
    pub fn bind<'a>(&'a self, tensors: &'a Tensors) -> Result<Bound<'a>> {
        let whole = |b: &Buffer| Operand { address: b.address(), bytes: b.len() as u64 };
        let mut out = Vec::new();
        for (step, kernel) in self.candidate.steps.iter().zip(&self.kernels) {
            let operands = step
                .operands
                .iter()
                .map(|place| match place {
                    Place::Q => Ok(whole(&tensors.q)),
                    Place::K => Ok(whole(&tensors.k)),
                    Place::V => Ok(whole(&tensors.v)),
                    Place::O => Ok(whole(&tensors.o)),
                    Place::Lse => Ok(whole(&tensors.lse)),
                    Place::Mask => match &tensors.mask {
                        Some(mask) => Ok(whole(mask)),
                        None => Err(Error::bug("a plan asks for a mask that is not there")),
                    },
                    Place::Workspace { offset, bytes } => {
                        let address = self.workspace.address() + offset;
                        Ok(Operand { address, bytes: *bytes })
                    }
                })
                .collect::<Result<Vec<_>>>()?;
            out.push(kernel.bind(&step.sizes, &operands)?);
        }
        Ok(Bound { steps: out, memory: PhantomData })
    }
}

/// A plan with its tensors, which it keeps borrowed.
#[derive(Debug)]
pub struct Bound<'a> {
    steps: Vec<BoundKernel>,
    memory: PhantomData<&'a Buffer>,
}

impl Bound<'_> {
    /// Puts the steps into the stream that tensors and workspace were allocated on.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        for step in &self.steps {
            // SAFETY: tensors and workspace are borrowed, so they are alive here; what frees them later does
            // so in the order of the same stream.
            unsafe { step.launch(stream)? };
        }
        Ok(())
    }
}

/// Microseconds of each of `samples` samples over several sets of tensors, cold.
pub fn time(stream: &Stream, ours: &Ours, sets: &[Tensors], samples: usize) -> Result<Vec<f64>> {
    let bound = sets.iter().map(|s| ours.bind(s)).collect::<Result<Vec<_>>>()?;
    let pass = Pass::record(stream, sets.len(), |i| bound[i].launch(stream))?;
    let events = [Event::new(stream.gpu())?, Event::new(stream.gpu())?];
    pass.launch(stream)?;
    let mut out = Vec::new();
    for _ in 0..samples {
        events[0].record(stream)?;
        pass.launch(stream)?;
        events[1].record(stream)?;
        events[1].synchronize()?;
        out.push(events[1].since_us(&events[0])? / sets.len() as f64);
    }
    Ok(out)
}

/// Whether operands are rounded to TF32.
fn tf32(p: &Problem) -> bool {
    p.dtype == DType::F32 && p.precision == Precision::Tf32
}

/// One row: results and log-sum-exp, exactly and in the model of the arithmetic.
struct Row {
    exact: Vec<f64>,
    model: Vec<f64>,
    lse: f64,
}

/// The tensors on the host.
struct Host {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    (0..bytes.len() * 8 / dtype.bits() as usize).map(|i| read_f64(dtype, bytes, i)).collect()
}

/// As an operand of a product.
fn operand(p: &Problem, x: f64) -> f64 {
    match tf32(p) {
        // 11 digits, to the nearest.
        true => f64::from(f32::from_bits((x as f32).to_bits().wrapping_add(0x1000) & !0x1FFF)),
        false => rounded(p.dtype, x),
    }
}

fn rounded(dtype: DType, x: f64) -> f64 {
    let mut bytes = [0u8; 8];
    from_f64(dtype, &mut bytes, 0, x);
    read_f64(dtype, &bytes, 0)
}

fn row(case: &Case, host: &Host, mask: &[u8], (b, h, i): (i64, i64, i64)) -> Row {
    let p = &case.problem;
    let group = h / (p.heads / p.kv_heads);
    let at =
        |s: &Strides, head: i64, row: i64| (b * s.batch + head * s.head + row * s.row) as usize;
    let q = &host.q[at(&p.q, h, i)..][..p.depth as usize];
    let (mut scores, mut near) = (Vec::new(), Vec::new());
    for j in 0..case.visible(i) {
        let k = &host.k[at(&p.k, group, j)..][..p.depth as usize];
        let masked = |s: f64| {
            let Some(m) = &p.mask else { return s };
            let index = at(&m.strides, h, i) + j as usize;
            match m.kind {
                MaskKind::Add => s + read_f64(m.dtype, mask, index),
                MaskKind::Keep if read_i64(m.dtype, mask, index) == 0 => f64::NEG_INFINITY,
                MaskKind::Keep => s,
            }
        };
        let dot = q.iter().zip(k).map(|(x, y)| x * y).sum::<f64>();
        scores.push(masked(p.scale * dot));
        let dot = q.iter().zip(k).map(|(x, y)| operand(p, *x) * operand(p, *y)).sum::<f64>();
        near.push(masked(p.scale * dot));
    }
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = |scores: &[f64]| -> Vec<f64> {
        match max {
            f64::NEG_INFINITY => vec![0.0; scores.len()],
            _ => scores.iter().map(|s| (s - max).exp()).collect(),
        }
    };
    let (weights, near) = (weights(&scores), weights(&near));
    let (total, near_total): (f64, f64) = (weights.iter().sum(), near.iter().sum());
    let mut exact = vec![0.0; p.width as usize];
    let mut model = exact.clone();
    for (j, (w, near)) in weights.iter().zip(&near).enumerate() {
        let v = &host.v[at(&p.v, group, j as i64)..][..p.width as usize];
        let narrow = operand(p, *near);
        for (c, x) in v.iter().enumerate() {
            exact[c] += w * x;
            model[c] += narrow * operand(p, *x);
        }
    }
    exact.iter_mut().for_each(|x| *x /= total);
    model.iter_mut().for_each(|x| *x = rounded(p.result, *x / near_total));
    let lse = if total == 0.0 { f64::NEG_INFINITY } else { max + total.ln() };
    Row { exact, model, lse }
}

/// Compares rows with float64 after a run: the error over that of the model, or what is wrong.
///
/// `most`: how many rows; all of smaller results.
pub fn compare(
    stream: &Stream,
    case: &Case,
    t: &Tensors,
    most: i64,
) -> Result<std::result::Result<f64, String>> {
    let p = &case.problem;
    let host = Host {
        q: numbers(p.dtype, &t.q.to_vec(stream)?),
        k: numbers(p.dtype, &t.k.to_vec(stream)?),
        v: numbers(p.dtype, &t.v.to_vec(stream)?),
    };
    let got = t.o.to_vec(stream)?;
    let lse = t.lse.to_vec(stream)?;
    let rows = p.batch * p.heads * p.q_len;
    let count = rows.min(most);
    let (mut error, mut model, mut norm) = (0.0, 0.0, 0.0);
    for n in 0..count {
        let at = if count == 1 { 0 } else { n * (rows - 1) / (count - 1) };
        let (b, h, i) = (at / (p.heads * p.q_len), at / p.q_len % p.heads, at % p.q_len);
        let want = row(case, &host, &t.host_mask, (b, h, i));
        let start = (b * p.o.batch + h * p.o.head + i * p.o.row) as usize;
        for (c, exact) in want.exact.iter().enumerate() {
            let value = read_f64(p.result, &got, start + c);
            if value.is_nan() != exact.is_nan() {
                return Ok(Err(format!("b {b} h {h} row {i} col {c}: {value}, not {exact}")));
            }
            if !exact.is_nan() {
                error += (value - exact).powi(2);
                model += (want.model[c] - exact).powi(2);
                norm += exact.powi(2);
            }
        }
        if p.lse {
            let value = read_f64(DType::F32, &lse, at as usize);
            let close =
                value == want.lse || (value - want.lse).abs() < 1e-3 * (1.0 + want.lse.abs());
            if !close {
                return Ok(Err(format!("lse of b {b} h {h} row {i}: {value}, not {}", want.lse)));
            }
        }
    }
    let allowed = (model / norm).sqrt().max(F32_ERROR);
    let ratio = if norm == 0.0 { 0.0 } else { (error / norm).sqrt() / allowed };
    if ratio > ERROR_RATIO_MAX {
        return Ok(Err(format!("{ratio:.2} times the error of the model, {allowed:.1e}")));
    }
    Ok(Ok(ratio))
}

/// What is tested.
pub fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add = |problem: Problem| out.push(Case { problem });
    for dtype in [DType::BF16, DType::F16] {
        for depth in [64, 128] {
            for len in [1, 63, 64, 129, 300, 512] {
                for causal in [None, Some(0)] {
                    add(Problem { causal, lse: true, ..Problem::dense(2, 3, len, depth, dtype) });
                }
            }
        }
    }
    let depths = [16, 32, 40, 80, 96, 256];
    for depth in depths {
        add(Problem { causal: Some(0), ..Problem::dense(1, 2, 200, depth, DType::BF16) });
        add(Problem::dense(1, 2, 333, depth, DType::BF16));
    }
    // Rows first, fewer heads of keys, other lengths.
    let mixed = |heads: i64, groups: i64, rows: i64, keys: i64, depth: i64| Problem {
        kv_heads: groups,
        q_len: rows,
        kv_len: keys,
        q: Strides::rows_first(heads, rows, depth),
        k: Strides::rows_first(groups, keys, depth),
        v: Strides::rows_first(groups, keys, depth),
        o: Strides::rows_first(heads, rows, depth),
        ..Problem::dense(2, heads, rows, depth, DType::BF16)
    };
    for (heads, groups) in [(4, 4), (8, 2), (6, 1)] {
        for (rows, keys) in [(100, 700), (256, 77), (1, 1000), (7, 513)] {
            for causal in [None, Some(keys - rows), Some(3)] {
                add(Problem { causal, lse: true, ..mixed(heads, groups, rows, keys, 128) });
            }
            add(mixed(heads, groups, rows, keys, 64));
        }
    }
    // Decoding: keys in parts, heads packed; and no keys at all.
    for (heads, groups) in [(8, 8), (32, 8), (6, 2)] {
        for (rows, keys) in [(1, 4000), (1, 100), (4, 3000), (8, 2047), (3, 0)] {
            for lse in [false, true] {
                let causal = (rows > 1 && keys > 0).then_some(keys - rows);
                add(Problem { causal, lse, ..mixed(heads, groups, rows, keys, 128) });
            }
        }
    }
    for kind in [MaskKind::Add, MaskKind::Keep] {
        for by_row in [false, true] {
            for len in [100, 257, 512] {
                let dtype = if kind == MaskKind::Add { DType::F32 } else { DType::Bool };
                let line = if by_row { len } else { 0 };
                let strides = Strides { batch: len * line.max(1), head: 0, row: line };
                let mask = Some(Mask { dtype, kind, strides, align: 256 });
                for depth in [64, 128] {
                    add(Problem { mask, ..Problem::dense(2, 2, len, depth, DType::BF16) });
                }
            }
        }
    }
    for precision in [Precision::F32, Precision::Tf32] {
        for depth in [20, 64, 80, 128, 200] {
            for (len, causal) in
                [(1, None), (77, None), (150, Some(0)), (700, Some(0)), (512, None)]
            {
                let p = Problem::dense(1, 2, len, depth, DType::F32);
                add(Problem { precision, causal, lse: depth == 64, ..p });
            }
            let p = Problem { precision, ..mixed(6, 2, 130, 333, depth) };
            let causal = Some(203);
            add(Problem { causal, dtype: DType::F32, result: DType::F32, ..p });
            for kind in [MaskKind::Add, MaskKind::Keep] {
                let dtype = if kind == MaskKind::Add { DType::F32 } else { DType::Bool };
                let strides = Strides { batch: 257 * 257, head: 0, row: 257 };
                let mask = Some(Mask { dtype, kind, strides, align: 256 });
                add(Problem { mask, precision, ..Problem::dense(2, 2, 257, depth, DType::F32) });
            }
        }
    }
    for depth in [64, 20] {
        add(Problem::dense(1, 2, 77, depth + 1, DType::BF16));
    }
    out
}

/// What is measured: batch, length, for all depths, causal and not; 16 heads.
pub const MEASURED: [(i64, i64); 6] =
    [(64, 128), (32, 256), (16, 512), (8, 1024), (8, 2048), (2, 8192)];
