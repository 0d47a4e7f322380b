//! Products whose left operand is computed on its way in: `C = epilogue(f(A, D0, D1, ...) B)`, with vectors along the depth.
//!
//! Two ways, and the estimated times decide between them:
//!
//! * **inside**: tiles of `A` come to shared memory as they lie; each consumer loads its rows, computes and rounds them in registers, and the
//!   tensor cores take their left operand from there. Every tile of columns of the result computes them again.
//! * **apart**: a kernel computes the operand into workspace, and any product reads that.

use crate::gemm::model::instructions;
use crate::gemm::plan::{
    CACHED_PARTS, Candidate, Choice, EXTRA_LAUNCH_US, Extent, Oriented, Place, Step, Workspace,
    aligned_elements, candidate_of, lines, needs_copy, orient, packed_line, ranked, sizes,
};
use crate::gemm::problem::Problem;
use crate::gemm::program::{Order, Prologue, depth_stride, prologue_program};
use crate::gemm::record::plan;
use tilewright_base::Result;
use tilewright_device::Arch;
use tilewright_lower_gpu::{GpuSchedule, Mode, ProductKind};
use tilewright_target::Gpu;

/// What computes the left operand of a problem. `A` lies as the problem says, in the type that the prologue names; the problem's operand type
/// is that of what is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    /// What is computed.
    pub prologue: Prologue,
    /// Distances between the batches of each vector, in elements; 0 where it is the same one.
    pub strides: Vec<i64>,
    /// Alignment of the addresses of all vectors, in bytes.
    pub align: i64,
}

/// Registers that a thread of a consumer needs for addresses and loops, beside tiles.
const OTHER_REGISTERS: i64 = 56;
/// Lanes of a multiprocessor that computing an operand keeps busy: a few warps, as in an epilogue.
const BUSY_LANES: f64 = 48.0;
/// Instructions of an element of an operand beside its function's: from shared memory, widened, rounded.
const MOVING_INSTRUCTIONS: i64 = 4;

fn tile(s: &GpuSchedule, name: &str) -> i64 {
    s.tiles.get(name).copied().unwrap_or(1)
}

/// Rows of the tile that one consumer multiplies.
fn rows_each(s: &GpuSchedule) -> i64 {
    match s.mode {
        Mode::Cooperative => tile(s, "BM") / i64::from(s.consumers.max(1)),
        Mode::PingPong => tile(s, "BM"),
    }
}

/// Whether a consumer has registers for its sums and for the operand's tile, as it comes and as it is multiplied.
fn has_room(s: &GpuSchedule, vectors: i64) -> bool {
    let threads = 128 * (1 + i64::from(s.consumers));
    let room = match (s.blocks_per_sm, s.consumers) {
        (1, 2) => 232,
        (1, 3) => 160,
        (blocks, _) => (65536 / threads / i64::from(blocks.max(1))).min(255) / 8 * 8,
    };
    let (rows, depth) = (rows_each(s), tile(s, "BK"));
    let sums = rows * tile(s, "BN") / 128;
    let operand = rows * depth / 128;
    sums + operand + operand / 2 + vectors * depth / 4 + OTHER_REGISTERS <= room
}

/// Time in which the consumers compute the operand: every tile of columns does it again.
fn computing_us(p: &Problem, c: &Computed, gpu: &Gpu, s: &GpuSchedule) -> f64 {
    let whole = |n: i64, tile: i64| (n + tile - 1) / tile;
    let (bm, bk) = (tile(s, "BM"), tile(s, "BK"));
    let elements = whole(p.m, bm) * bm * whole(p.k, bk) * bk * p.batch;
    let again = whole(p.n, tile(s, "BN"));
    let each = instructions(&c.prologue.func) + 2 + MOVING_INSTRUCTIONS;
    let rate = f64::from(gpu.sms) * BUSY_LANES * gpu.model.clock_ghz * 1e3;
    (elements * again * each) as f64 / rate
}

/// Whether the zeros that lie behind the depth stay finite, so that zeros of the other operand take them away.
fn zeros_stay(p: &Problem, c: &Computed, s: &GpuSchedule) -> bool {
    let zeros = vec![0.0; c.prologue.func.params().len()];
    p.k % tile(s, "BK") == 0 || c.prologue.func.eval_f64(&zeros).is_finite()
}

/// The problem's orientation with the prologue, if its operands can be read where they lie.
fn inside(p: &Problem, c: &Computed, gpu: &Gpu) -> Option<Oriented> {
    let mut o = orient(p, false);
    let types = p.operand.bits() == 16 && p.operand.is_float() && c.prologue.stored == p.operand;
    // Vectors are read two elements at a time.
    let pairs = c.prologue.vectors.iter().all(|t| c.align % i64::from(t.bits() / 4) == 0)
        && p.k % 2 == 0
        && (p.batch == 1 || c.strides.iter().all(|s| s % 2 == 0));
    let fits = Arch::of_capability(gpu.capability) >= Arch::Sm90a
        && types
        && pairs
        && p.images.is_none()
        && o.spec.a == Order::Row
        && o.spec.epilogue.pair == crate::gemm::program::Pair::None
        && !needs_copy(p, &o, 0)
        && !needs_copy(p, &o, 1);
    o.spec.prologue = Some(c.prologue.clone());
    o.depth_strides.clone_from(&c.strides);
    fits.then_some(o)
}

/// Kernels that compute the operand inside, best first, at most `most`.
fn candidates_inside(p: &Problem, c: &Computed, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    let Some(o) = inside(p, c, gpu) else { return Ok(Vec::new()) };
    let vectors = c.prologue.vectors.len() as i64;
    let mut choices: Vec<Choice> = ranked(p, gpu, Extent::Picker)?
        .into_iter()
        .filter(|choice| {
            let s = &choice.schedule;
            let plain = !choice.swapped && choice.splits == 1 && s.product == ProductKind::Wgmma;
            plain && has_room(s, vectors) && zeros_stay(p, c, s)
        })
        .map(|choice| {
            let computing = computing_us(p, c, gpu, &choice.schedule);
            Choice { estimate_us: choice.estimate_us + computing, ..choice }
        })
        .collect();
    choices.sort_by(|a, b| a.estimate_us.total_cmp(&b.estimate_us));
    let mut out = Vec::new();
    for choice in choices {
        if out.len() >= most {
            break;
        }
        out.extend(candidate_of(p, &o, &choice)?);
    }
    Ok(out)
}

/// Products of an operand that a kernel before them computes.
fn candidates_apart(p: &Problem, c: &Computed, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    let size = p.operand_bytes();
    let line = packed_line(p.k, size);
    let mut plain = p.clone();
    plain.order.0 = Order::Row;
    plain.leading.0 = line;
    plain.stride.0 = line * p.m;
    plain.align.0 = 256;
    let mut values = vec![("R", p.m), ("C", p.k), ("ldx", p.leading.0), ("ldy", line)];
    let distances: Vec<String> = (0..c.strides.len()).map(depth_stride).collect();
    if p.batch != 1 {
        values.extend([("L", p.batch), ("sx", p.stride.0), ("sy", line * p.m)]);
        values.extend(distances.iter().map(String::as_str).zip(c.strides.iter().copied()));
    }
    let kernel = prologue_program(&c.prologue, p.order.0, p.operand, p.batch != 1);
    let stored = i64::from(c.prologue.stored.bits()) / 8;
    let types = c.prologue.vectors.iter().map(|t| i64::from(t.bits()) / 8);
    let widest = types.chain([stored, size]).max().unwrap_or(1).max(1);
    let aligned = aligned_elements(p.align.0.min(c.align), widest);
    let elements = p.m * p.k * p.batch;
    let bytes = elements * (stored + size);
    let rate = if elements * size <= CACHED_PARTS { 2.0 } else { 1.0 };
    let time = bytes as f64 / (rate * gpu.copy_bytes_per_s) * 1e6 + EXTRA_LAUNCH_US;
    let arch = Arch::of_capability(gpu.capability);
    let mut out = Vec::new();
    for candidate in plan(&plain, gpu, most)? {
        let mut workspace = Workspace { bytes: candidate.workspace_bytes };
        let computed = workspace.take(line * p.m * p.batch * size);
        let vectors = (0..c.prologue.vectors.len()).map(Place::Depth);
        let operands = [Place::A].into_iter().chain(vectors).chain([computed]).collect();
        let first = lines(arch, kernel.clone(), sizes(&values), operands, aligned)?;
        let rest = candidate.steps.into_iter().map(|mut step: Step| {
            let moved = |place: &mut Place| {
                if *place == Place::A {
                    *place = computed;
                }
            };
            step.operands.iter_mut().for_each(moved);
            step
        });
        out.push(Candidate {
            steps: [first].into_iter().chain(rest).collect(),
            workspace_bytes: workspace.bytes,
            estimate_us: candidate.estimate_us + time,
        });
    }
    Ok(out)
}

/// Ways to compute a problem whose left operand is computed, best first by estimated time, at most `most` of them.
///
/// # Errors
/// As [`plan`].
pub fn plan_computed(
    problem: &Problem,
    computed: &Computed,
    gpu: &Gpu,
    most: usize,
) -> Result<Vec<Candidate>> {
    problem.check()?;
    if problem.m == 0 || problem.n == 0 || problem.k == 0 || problem.batch == 0 {
        return plan(problem, gpu, most);
    }
    let mut out = candidates_inside(problem, computed, gpu, most)?;
    out.extend(candidates_apart(problem, computed, gpu, most)?);
    out.sort_by(|a, b| a.estimate_us.total_cmp(&b.estimate_us));
    // One that does not need registers for an operand is always among them.
    let last = out.iter().rposition(|c| c.steps.len() > 1);
    if let Some(last) = last.filter(|at| *at >= most && most > 0) {
        out.swap(most - 1, last);
    }
    out.truncate(most);
    Ok(out)
}
