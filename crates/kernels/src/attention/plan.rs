//! From a problem to steps.

use crate::attention::problem::{Mask, Problem, Strides};
use crate::attention::program::{AttentionSpec, padded};
use crate::attention::space::{Access, space};
use crate::attention::steps::{Launch, Workspace, addressable, ceil, first_built, sizes, tile};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_lower_gpu::{GpuSchedule, ProductKind};
use tilewright_target::Gpu;

/// Which tensor of the problem a parameter of a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Mask.
    Mask,
    /// Result.
    O,
    /// Log-sum-exp of each row.
    Lse,
    /// Part of the workspace.
    Workspace {
        /// First byte, a multiple of 256.
        offset: u64,
        /// Length.
        bytes: u64,
    },
}

/// One launch.
pub type Step = Launch<Place>;

/// A way to compute a problem.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Launches in order.
    pub steps: Vec<Step>,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
    /// Estimated time.
    pub estimate_us: f64,
}

/// What the device is compiled for.
fn arch(gpu: &Gpu) -> Arch {
    Arch::of_capability(gpu.capability)
}

/// A choice before its steps are made.
struct Choice {
    estimate_us: f64,
    /// Parts of the keys.
    parts: i64,
    schedule: GpuSchedule,
}

/// Ways to compute `problem`, best first by the time model, at most `most` of them.
///
/// # Errors
/// The user's for impossible sizes; unsupported when no kernel of the library fits.
pub fn plan(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    problem.check()?;
    if problem.batch == 0 || problem.heads == 0 || problem.q_len == 0 {
        return Ok(vec![Candidate { steps: Vec::new(), workspace_bytes: 0, estimate_us: 0.0 }]);
    }
    let packed = packed(problem);
    let problem = packed.as_ref().unwrap_or(problem);
    let spec = problem.spec()?;
    let access = access(problem);
    let mut ranked = Vec::new();
    // Few queries wait for memory: two blocks a multiprocessor were not measured there.
    let few = |s: &GpuSchedule| problem.q_len <= 64 && s.blocks_per_sm > 1;
    for schedule in space(&spec, arch(gpu), &access) {
        if schedule.product == ProductKind::Wgmma && few(&schedule) {
            continue;
        }
        let estimate_us = estimate_us(problem, gpu, &schedule, 1);
        ranked.push(Choice { estimate_us, parts: 1, schedule });
    }
    let part = AttentionSpec { result: DType::F32, ..spec.clone() };
    let spaces = space(&part, arch(gpu), &Access { vector: access.vector.min(4), ..access });
    let in_parts = |s: &GpuSchedule| match s.product {
        ProductKind::Wgmma => s.blocks_per_sm == 1,
        ProductKind::MmaSync | ProductKind::MmaSplit => problem.dtype == DType::F32,
        ProductKind::Fma => false,
    };
    for schedule in spaces.into_iter().filter(in_parts) {
        for parts in parts(problem, gpu, &schedule) {
            let estimate_us = estimate_us(problem, gpu, &schedule, parts);
            ranked.push(Choice { estimate_us, parts, schedule: schedule.clone() });
        }
    }
    ranked.sort_by(|a, b| {
        let time = a.estimate_us.total_cmp(&b.estimate_us);
        time.then_with(|| (a.parts, &a.schedule).cmp(&(b.parts, &b.schedule)))
    });
    let out = first_built(ranked, most, |choice| {
        let candidate = build(problem, gpu, &spec, choice)?;
        candidate.steps.iter().try_for_each(Launch::lowers)?;
        Ok(candidate)
    })?;
    if out.is_empty() {
        let (dtype, depth) = (problem.dtype, problem.depth);
        return Err(Error::unsupported(format!("attention of {dtype} with depth {depth}")));
    }
    Ok(out)
}

/// A single query per head: the heads that share keys become the rows of one, so that keys are read once.
fn packed(p: &Problem) -> Option<Problem> {
    let each = p.heads / p.kv_heads;
    if p.q_len != 1 || each == 1 {
        return None;
    }
    let fold = |s: &Strides| Strides { batch: s.batch, head: s.head * each, row: s.head };
    let keys = p.causal.map_or(p.kv_len, |offset| (offset + 1).clamp(0, p.kv_len));
    Some(Problem {
        heads: p.kv_heads,
        q_len: each,
        kv_len: keys,
        causal: None,
        mask: p.mask.map(|m| Mask { strides: fold(&m.strides), ..m }),
        q: fold(&p.q),
        o: fold(&p.o),
        ..p.clone()
    })
}

/// Into how many parts the keys may be cut: so many that the machine is filled once or twice.
fn parts(p: &Problem, gpu: &Gpu, s: &GpuSchedule) -> Vec<i64> {
    let items = p.batch * p.heads * ceil(p.q_len, tile(s, "BQ"));
    let (sms, blocks) = (i64::from(gpu.sms), ceil(p.kv_len, tile(s, "BT")));
    let mut out: Vec<i64> = [1, 2]
        .into_iter()
        .map(|waves| (waves * sms / items.max(1)).min(blocks / 2).min(256))
        // Parts of equal length, none of them empty.
        .map(|parts| if parts > 1 { ceil(blocks, ceil(blocks, parts)) } else { 1 })
        .filter(|parts| *parts > 1)
        .collect();
    out.dedup();
    out
}

/// The steps of a choice.
fn build(p: &Problem, gpu: &Gpu, spec: &AttentionSpec, choice: Choice) -> Result<Candidate> {
    let Choice { estimate_us, parts, schedule } = choice;
    let mut sizes = sizes(p);
    if parts == 1 {
        let step = Launch::new(spec.program("attention"), schedule, &sizes, operands(p));
        return Ok(Candidate { steps: vec![step], workspace_bytes: 0, estimate_us });
    }
    let mut workspace = Workspace::default();
    let mut take = |elements: i64| {
        let (offset, bytes) = workspace.take(elements);
        Place::Workspace { offset, bytes }
    };
    let rows = parts * p.batch * p.heads * p.q_len;
    let regions = [take(rows * spec.part_width()), take(rows), take(rows)];
    let blocks = ceil(p.kv_len, tile(&schedule, "BT"));
    sizes.insert("N".into(), parts);
    sizes.insert("each".into(), ceil(blocks, parts));
    let combine = spec.combine_program("combine");
    let lookup = |name: &str| sizes.get(name).copied();
    let Some(lines) = GpuSchedule::lines_for(&combine, arch(gpu), &lookup)? else {
        return Err(Error::unsupported("rows too long to be combined"));
    };
    let lines = GpuSchedule { dependent: arch(gpu) >= Arch::Sm90a, ..lines };
    let mut first: Vec<Place> =
        operands(p).into_iter().filter(|o| !matches!(o, Place::O | Place::Lse)).collect();
    first.extend(regions);
    let mut second = regions.to_vec();
    second.push(Place::O);
    second.extend(p.lse.then_some(Place::Lse));
    let steps = vec![
        Launch::new(spec.part_program("attention_part"), schedule, &sizes, first),
        Launch::new(combine, lines, &sizes, second),
    ];
    Ok(Candidate { steps, workspace_bytes: workspace.bytes, estimate_us })
}

/// How memory can be reached.
fn access(p: &Problem) -> Access {
    Access { engine: engine(p), vector: vector(p), mask_vector: mask_vector(p).min(2) as u32 }
}

/// Whether the copy engine can address all tensors.
fn engine(p: &Problem) -> bool {
    let (size, result) = (p.operand_bytes(), i64::from(p.result.bits()) / 8);
    addressable(&[&p.q, &p.k, &p.v], size, &[], &p.align)
        && addressable(&[&p.o], result, &[p.width], &[])
        && p.kv_len > 0
}

/// Elements of one plain access that every tensor allows.
fn vector(p: &Problem) -> u32 {
    let fits = |n: &i64| {
        let lines = [(&p.q, p.depth), (&p.k, p.depth), (&p.v, p.width), (&p.o, p.width)];
        let sizes = [p.dtype, p.dtype, p.dtype, p.result].map(|t| i64::from(t.bits()) / 8);
        lines.iter().zip(p.align).zip(sizes).all(|(((s, extent), align), size)| {
            [s.batch, s.head, s.row, *extent].iter().all(|x| x % n == 0) && align % (n * size) == 0
        })
    };
    let most = (16 / p.operand_bytes()).min(mask_vector(p));
    [8, 4, 2].into_iter().filter(|n| *n <= most).find(fits).map_or(1, |n| n as u32)
}

/// Elements of one plain access to the mask; many without one.
fn mask_vector(p: &Problem) -> i64 {
    let Some(mask) = &p.mask else { return 16 };
    let size = i64::from(mask.dtype.bits()) / 8;
    let (s, keys) = (&mask.strides, p.kv_len);
    let fits = |n: &i64| {
        [s.batch, s.head, s.row, keys].iter().all(|x| x % n == 0) && mask.align % (n * size) == 0
    };
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

/// Microseconds under a schedule: blocks of queries in whole waves, each at the pace of its products and of
/// what they do not hide; not less than the time of reading everything once.
fn estimate_us(p: &Problem, gpu: &Gpu, s: &GpuSchedule, parts: i64) -> f64 {
    let (bq, bt) = (tile(s, "BQ"), tile(s, "BT"));
    let blocks_q = ceil(p.q_len, bq);
    let items = (p.batch * p.heads * blocks_q * parts) as f64;
    // Blocks of keys that the blocks of queries see, on average.
    let seen = |block: i64| match p.causal {
        Some(offset) => ceil(((block + 1) * bq + offset).clamp(0, p.kv_len), bt),
        None => ceil(p.kv_len, bt),
    };
    let all: i64 = (0..blocks_q).map(seen).sum();
    let steps = (all as f64 / blocks_q.max(1) as f64 / parts as f64).max(1.0);
    let (dk, dv) = (padded(p.depth, p.dtype), padded(p.width, p.dtype));
    let flops = (2 * bq * bt * (dk + dv)) as f64;
    let warps = f64::from(s.warps.0);
    // Elementwise work of a turn: exponents at 16 a clock, and the rest beside them.
    let scores = (bq * bt) as f64;
    let (step, item) = match s.product {
        ProductKind::Wgmma => {
            let products = flops / gpu.tensor_flops_per_clock;
            let maps = scores / 11.8;
            // One consumer's maps run beside the others' products: the share of the shorter that shows.
            let shown = match (s.consumers, s.turns) {
                (1, _) if s.blocks_per_sm > 1 => 0.25,
                (1, _) => 0.6,
                (2, true) => 0.1,
                (2, false) => 0.25,
                (_, true) => 0.0,
                _ => 0.05,
            };
            let turn = products.max(maps) + shown * products.min(maps);
            // More scores than that leave registers for little else.
            let turn = if s.consumers == 2 && bt > 128 { 1.12 * turn } else { turn };
            match s.blocks_per_sm {
                1 => (turn + 200.0, 4000.0),
                // What one of two blocks costs while the other runs beside it.
                _ => (turn + 180.0, 500.0 + (9 * bq + 3 * dv) as f64),
            }
        }
        ProductKind::MmaSync | ProductKind::MmaSplit if p.dtype == DType::F32 => {
            // Three products of parts; rounding, beside single ones, takes longer than they do.
            let rate = if s.product == ProductKind::MmaSplit { 0.215 / 3.0 } else { 0.18 };
            // Small blocks split the same keys more often.
            let small = if s.warps.0 < 4 { 1.15 } else { 1.0 };
            let products = small * flops / (gpu.tensor_flops_per_clock * rate);
            // What one block's turn costs while the others of the multiprocessor run beside it.
            let beside = f64::from(s.blocks_per_sm);
            let maps = scores / 9.0;
            let shown = if beside * warps > 4.0 { 0.4 } else { 1.0 };
            (products.max(maps) + shown * products.min(maps) + 400.0 / beside, 3000.0 / beside)
        }
        ProductKind::MmaSync | ProductKind::MmaSplit => {
            let rate = gpu.tensor_flops_per_clock * 0.4 * (warps / 8.0).min(1.0);
            (flops / rate + scores / 10.0 + 500.0, 3000.0)
        }
        ProductKind::Fma => {
            let rate = gpu.f32_flops_per_clock * 0.4 * (warps / 8.0).min(1.0);
            (flops / rate + scores / 10.0 + 500.0, 3000.0)
        }
    };
    // Turns in which rows stop run longer.
    let longer = match (s.product, s.blocks_per_sm) {
        (ProductKind::Wgmma, 1) => 500.0,
        (ProductKind::Wgmma, _) => 3.5 * dv as f64,
        _ => 1.5 * step,
    };
    let item = item + if p.causal.is_some() { longer * ceil(bq, bt) as f64 } else { 0.0 };
    // A persistent grid evens out costs that differ; else whole waves.
    let each = items / f64::from(gpu.sms);
    let beside = f64::from(s.blocks_per_sm);
    let whole = (each / beside).ceil() * beside;
    let waves = if p.causal.is_some() && p.q_len > bq { each.max(beside) } else { whole };
    let clocks = waves * (steps * step + item);
    let busy = clocks / gpu.model.clock_ghz / 1e3;
    let keys = (p.batch * p.kv_heads * p.kv_len * (p.depth + p.width) * p.operand_bytes()) as f64;
    let active = items.min(f64::from(gpu.sms)) / f64::from(gpu.sms);
    let memory = keys / (gpu.model.stream_bytes_per_s * active) * 1e6;
    let combine = if parts > 1 {
        let bytes = (p.batch * p.heads * p.q_len * p.width * parts * 8) as f64;
        3.0 + bytes / gpu.copy_bytes_per_s * 1e6
    } else {
        0.0
    };
    busy.max(memory) + 0.1 * busy.min(memory) + combine + gpu.model.launch_us
}

fn operands(p: &Problem) -> Vec<Place> {
    let mut out = vec![Place::Q, Place::K, Place::V];
    out.extend(p.mask.map(|_| Place::Mask));
    out.push(Place::O);
    out.extend(p.lse.then_some(Place::Lse));
    out
}
