//! From a problem to steps.

use crate::gemm::model::{Shape, estimate, estimate_multiply_add, instructions};
use crate::gemm::pipelined::{Accesses, estimate_pipelined, lacking_type, pipelined_space};
use crate::gemm::problem::{Images, Precision, Problem};
use crate::gemm::program::{GemmSpec, Math, Order, Pair, Slot, copy_program, depth_stride};
use crate::gemm::space::{RASTERS, each_schedule, multiply_add_space};
use crate::gemm::statistics;
use crate::gemm::vector;
use std::sync::Arc;
use tilewright_base::{DType, Error, Kind, Result};
use tilewright_device::Arch;
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, ProductKind, StoreKind, lower};
use tilewright_target::Gpu;
use tilewright_tile::Kernel;

/// Which tensor of the problem a parameter of a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Left operand.
    A,
    /// Right operand.
    B,
    /// The second right operand of a pair.
    B2,
    /// Vector along the columns of the result.
    Cols,
    /// The same for the second sum of a pair.
    Cols2,
    /// Vector along the rows of the result, or the sums over rows that it is made of.
    Rows,
    /// Matrix that the epilogue reads.
    Residual,
    /// A vector along the depth that the left operand is computed with, by its number.
    Depth(usize),
    /// Result.
    C,
    /// Sums over rows that are left beside it.
    Parts,
    /// Part of the workspace.
    Workspace {
        /// First byte, a multiple of 256.
        offset: u64,
        /// Length.
        bytes: u64,
    },
}

/// One launch.
#[derive(Clone, Debug)]
pub struct Step {
    /// What one block computes.
    pub kernel: Kernel,
    /// How.
    pub schedule: GpuSchedule,
    /// The kernel's size symbols.
    pub sizes: Env,
    /// The kernel's parameters, in order.
    pub operands: Vec<Place>,
}

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

/// A problem in one orientation, as the tensor-core kernels see it.
#[derive(Clone)]
pub(super) struct Oriented {
    pub(super) spec: GemmSpec,
    pub(super) m: i64,
    pub(super) n: i64,
    pub(super) leading: (i64, i64, i64),
    pub(super) stride: (i64, i64, i64),
    pub(super) align: (i64, i64, i64),
    pub(super) swapped: bool,
    /// Distances between the batches of vectors along the depth.
    pub(super) depth_strides: Vec<i64>,
}

fn flip(order: Order) -> Order {
    if order == Order::Row { Order::Col } else { Order::Row }
}

pub(super) fn orient(p: &Problem, swapped: bool) -> Oriented {
    let mut spec = p.spec();
    let depth_strides = Vec::new();
    let (l, s, a) = (p.leading, p.stride, p.align);
    if !swapped {
        let (m, n) = (p.m, p.n);
        return Oriented { spec, m, n, leading: l, stride: s, align: a, swapped, depth_strides };
    }
    // C^T = B^T A^T.
    (spec.a, spec.b, spec.c) = (flip(p.order.1), flip(p.order.0), flip(p.order.2));
    spec.epilogue = spec.epilogue.transposed();
    Oriented {
        spec,
        m: p.n,
        n: p.m,
        leading: (l.1, l.0, l.2),
        stride: (s.1, s.0, s.2),
        align: (a.1, a.0, a.2),
        swapped,
        depth_strides,
    }
}

/// Whether the copy engine can address a matrix: 16-byte addresses and lines.
pub(super) fn addressable(p: &Problem, size: i64, leading: i64, stride: i64, align: i64) -> bool {
    align % 16 == 0 && leading * size % 16 == 0 && (p.batch == 1 || stride * size % 16 == 0)
}

/// Whether the copy engine can store the result: it writes whole units of 16 bytes, so lines must end with one.
fn stores_by_engine(p: &Problem, o: &Oriented) -> bool {
    let size = p.result_bytes();
    let line = if o.spec.c == Order::Row { o.n } else { o.m };
    line * size % 16 == 0 && addressable(p, size, o.leading.2, o.stride.2, o.align.2)
}

/// The contiguous extents and the strides of a matrix: what runs of elements must divide.
#[derive(Clone, Copy)]
struct Line {
    size: i64,
    extent: i64,
    leading: i64,
    stride: i64,
    align: i64,
}

impl Line {
    /// Whether accesses of `n` elements stay aligned and end with the line.
    fn takes(&self, n: i64, batch: i64) -> bool {
        self.align % (n * self.size) == 0
            && self.extent % n == 0
            && self.leading % n == 0
            && (batch == 1 || self.stride % n == 0)
    }
}

/// Lines of `A`, `B` and `C`.
fn lines_of(p: &Problem, o: &Oriented) -> [Line; 3] {
    let pick = |order: Order, rows: i64, cols: i64| if order == Order::Row { cols } else { rows };
    let (size, out) = (p.operand_bytes(), p.result_bytes());
    let line = |size, extent, leading, stride, align| Line { size, extent, leading, stride, align };
    [
        line(size, pick(o.spec.a, o.m, p.k), o.leading.0, o.stride.0, o.align.0),
        line(size, pick(o.spec.b, p.k, o.n), o.leading.1, o.stride.1, o.align.1),
        line(out, pick(o.spec.c, o.m, o.n), o.leading.2, o.stride.2, o.align.2),
    ]
}

/// Elements of the result (and of vectors along its columns) that one plain access may take: 1 or 2.
fn result_vector(p: &Problem, o: &Oriented) -> u32 {
    u32::from(lines_of(p, o)[2].takes(2, p.batch) && o.n % 2 == 0) + 1
}

/// Elements of one plain access that every matrix allows: 1, 2 or 4.
fn access_vector(p: &Problem, o: &Oriented) -> u32 {
    let lines = lines_of(p, o);
    let fits = |n: &i64| lines.iter().all(|l| l.takes(*n, p.batch)) && o.n % n == 0;
    [4, 2].into_iter().find(fits).map_or(1, |n| n as u32)
}

/// Elements of one plain access to the result and what lies as it, without the copy engine: up to 8.
fn result_accesses(p: &Problem, o: &Oriented) -> u32 {
    let line = &lines_of(p, o)[2];
    let fits = |n: &i64| line.takes(*n, p.batch) && (o.spec.c == Order::Row || o.n % n == 0);
    [8, 4, 2].into_iter().find(fits).map_or(1, |n| n as u32)
}

/// Elements of one copy of an operand, as it lies when it was made readable: up to 16 bytes. Lines may end within one.
fn copy_accesses(p: &Problem, o: &Oriented) -> u32 {
    let lines = lines_of(p, o);
    let starts = |l: &Line, n: i64| Line { extent: n, ..*l }.takes(n, p.batch);
    let fits = |n: &i64| (0..2).all(|i| needs_copy(p, o, i) || starts(&lines[i], *n));
    let most = 16 / p.operand_bytes();
    [16, 8, 4, 2].into_iter().filter(|n| *n <= most).find(fits).map_or(1, |n| n as u32)
}

/// Elements, a power of two up to 16, of which an address with this alignment is a multiple.
pub(super) fn aligned_elements(align: i64, size: i64) -> i64 {
    [16, 8, 4, 2].into_iter().find(|n| align % (n * size) == 0).unwrap_or(1)
}

/// Parts that the depth may be cut into.
const SPLITS: [i64; 12] = [2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64];
/// Tiles a multiprocessor of plain multiply-adds up to which parts of the depth are worth a look: they fill the last
/// wave, and that is a smaller share of more.
const MULTIPLY_ADD_TILES: i64 = 24;
/// Time of a further small launch, in microseconds.
pub(super) const EXTRA_LAUNCH_US: f64 = 2.0;
/// Workspace regions start at multiples of this.
const REGION: u64 = 256;

/// Hands out regions of the workspace.
#[derive(Default)]
pub(super) struct Workspace {
    pub(super) bytes: u64,
}

impl Workspace {
    pub(super) fn take(&mut self, bytes: i64) -> Place {
        let bytes = bytes.unsigned_abs();
        let offset = self.bytes;
        self.bytes = (offset + bytes).next_multiple_of(REGION);
        Place::Workspace { offset, bytes }
    }
}

/// An operand after preparation: where it is and how it lies.
#[derive(Clone, Copy)]
struct Ready {
    place: Place,
    /// The low part, for three-part TF32.
    low: Option<Place>,
    order: Order,
    leading: i64,
    stride: i64,
}

/// A point of the space of a problem: how its product is run, before its steps are made.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// By the time model.
    pub estimate_us: f64,
    /// The transposed product is computed: `C^T = B^T A^T`.
    pub swapped: bool,
    /// Parts of the depth that are summed apart.
    pub splits: i64,
    /// Of the product's step.
    pub schedule: GpuSchedule,
}

/// Which part of the space is enumerated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// What the model judges well: parts of the depth only where there are few tiles.
    Picker,
    /// Every legal choice.
    Whole,
}

/// Every legal choice for a problem, best first by the time model: what a tuner searches. None for an empty product.
///
/// # Errors
/// The user's for impossible sizes.
pub fn choices(problem: &Problem, gpu: &Gpu) -> Result<Vec<Choice>> {
    ranked(problem, gpu, Extent::Whole)
}

/// The choice that the model alone would take, if its first candidate comes from the space.
///
/// # Errors
/// As [`plan`].
pub fn picked(problem: &Problem, gpu: &Gpu) -> Result<Option<Choice>> {
    for choice in ranked(problem, gpu, Extent::Picker)? {
        if candidate(problem, &choice)?.is_some() {
            return Ok(Some(choice));
        }
    }
    Ok(None)
}

/// The steps of a choice; none when the lowering, which has the last word, refuses it.
///
/// # Errors
/// Bugs of the lowering.
pub fn candidate(problem: &Problem, choice: &Choice) -> Result<Option<Candidate>> {
    candidate_of(problem, &orient(problem, choice.swapped), choice)
}

/// The same for a problem that is oriented already.
pub(super) fn candidate_of(
    problem: &Problem,
    o: &Oriented,
    choice: &Choice,
) -> Result<Option<Candidate>> {
    if !statistics::inside(problem, choice) {
        return Ok(None);
    }
    let candidate = build(problem, o, choice.clone())?;
    match candidate.steps.iter().try_for_each(|s| lower(&s.kernel, &s.schedule).map(drop)) {
        Ok(()) => Ok(Some(candidate)),
        Err(e) if e.kind() == Kind::Unsupported => Ok(None),
        Err(e) => Err(e),
    }
}

/// Every choice of a part of the space, best first.
pub(super) fn ranked(problem: &Problem, gpu: &Gpu, extent: Extent) -> Result<Vec<Choice>> {
    problem.check()?;
    let mut ranked = Vec::new();
    if problem.m == 0 || problem.n == 0 || problem.k == 0 || problem.batch == 0 {
        return Ok(ranked);
    }
    for swapped in [false, true] {
        // Windows are the left operand's.
        if swapped && problem.images.is_some() {
            break;
        }
        rank(problem, gpu, &orient(problem, swapped), extent, &mut ranked);
    }
    ranked.sort_by(|a, b| {
        let key = |c: &Choice| (c.swapped, c.splits);
        let time = a.estimate_us.total_cmp(&b.estimate_us);
        time.then_with(|| key(a).cmp(&key(b))).then_with(|| a.schedule.cmp(&b.schedule))
    });
    Ok(ranked)
}

/// Ways to compute `problem`, best first by the time model alone, at most `most` of them.
///
/// # Errors
/// The user's for impossible sizes; unsupported when no kernel of the library fits.
pub fn plan_untuned(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    problem.check()?;
    if problem.m == 0 || problem.n == 0 || problem.batch == 0 {
        return Ok(vec![Candidate { steps: Vec::new(), workspace_bytes: 0, estimate_us: 0.0 }]);
    }
    if let Some(dtype) = lacking_type(problem, gpu) {
        return Err(Error::unsupported(format!("{} has no instructions for {dtype}", gpu.name)));
    }
    if !problem.statistics.is_empty() {
        return statistics::plan(problem, gpu, most);
    }
    if problem.k == 0 {
        return Ok(vec![empty_sum(problem, gpu, &orient(problem, false))?]);
    }
    let orientations = [orient(problem, false), orient(problem, true)];
    if problem.images.is_some() {
        let o = &orientations[0];
        // The copy engine reads them where they lie, or nobody does.
        let plain = Scored::new(problem, gpu, o).is_plain();
        let refused = plain || [0, 1].iter().any(|side| needs_copy(problem, o, *side));
        let found = if refused { Vec::new() } else { first_candidates(problem, gpu, most)? };
        return match found.is_empty() {
            true => Err(Error::unsupported(format!("windows of {}", problem.operand))),
            false => Ok(found),
        };
    }
    let vectors = vector::candidates(problem, &orientations, gpu, most)?;
    if vector::alone(problem) && !vectors.is_empty() {
        return Ok(vectors);
    }
    let mut out = first_candidates(problem, gpu, most)?;
    if problem.spec().math == Math::Tf32x3 {
        // Small products are done sooner, and more exactly, without three parts of copies.
        let exact = Problem { precision: Precision::F32, ..problem.clone() };
        out.extend(first_candidates(&exact, gpu, most)?);
    }
    out.extend(vectors);
    out.sort_by(|a, b| a.estimate_us.total_cmp(&b.estimate_us));
    out.truncate(most);
    if out.is_empty() {
        let (name, operand) = (&gpu.name, problem.operand);
        return Err(Error::unsupported(format!("{operand} products of this form on {name}")));
    }
    Ok(out)
}

/// The first of the ranked choices that the lowering takes, at most `most` of them.
fn first_candidates(problem: &Problem, gpu: &Gpu, most: usize) -> Result<Vec<Candidate>> {
    let mut out = Vec::new();
    for choice in ranked(problem, gpu, Extent::Picker)? {
        if out.len() >= most {
            break;
        }
        out.extend(candidate(problem, &choice)?);
    }
    Ok(out)
}

/// Whether plain multiply-adds are used.
fn is_plain(p: &Problem, o: &Oriented) -> bool {
    p.operand == DType::F32 && o.spec.math == Math::Exact
}

/// Rows of the result from which a right operand is turned beforehand: every element is read that often. A copy of an
/// element takes as long as about 700 multiply-adds are slowed down by asynchronous copies that turn it.
const PACKED_ROWS: i64 = 1024;
/// Columns from which that is more than a launch.
const PACKED_COLS: i64 = 512;

/// How the copy of an operand lies: its order, its lines and their length before it is padded. The tensor cores want the
/// depth along the lines, plain multiply-adds across them.
fn packed(p: &Problem, o: &Oriented, operand: usize) -> (Order, i64, i64) {
    let own = if operand == 0 { o.m } else { o.n };
    let along_depth = if operand == 0 { Order::Row } else { Order::Col };
    if is_plain(p, o) { (flip(along_depth), p.k, own) } else { (along_depth, own, p.k) }
}

/// Whether an operand must be copied before the kernel can read it.
pub(super) fn needs_copy(p: &Problem, o: &Oriented, operand: usize) -> bool {
    let pick = |t: (i64, i64, i64)| if operand == 0 { t.0 } else { t.1 };
    let size = p.operand_bytes();
    let k_major = if operand == 0 { o.spec.a == Order::Row } else { o.spec.b == Order::Col };
    if is_plain(p, o) {
        // Plain multiply-adds read any layout, but only the left operand is turned at little cost.
        return operand == 1
            && o.spec.a == Order::Row
            && o.spec.b == Order::Col
            && p.images.is_none()
            && o.m >= PACKED_ROWS
            && o.n >= PACKED_COLS
            && access_vector(p, o) == 4;
    }
    // Only 16-bit types may have their depth along the strided axis.
    o.spec.math == Math::Tf32x3
        || !(k_major || p.operand.bits() == 16)
        || !addressable(p, size, pick(o.leading), pick(o.stride), pick(o.align))
}

/// Bytes of a line of the caches.
const CACHE_LINE: i64 = 128;

/// Elements of a line of a packed copy: long lines begin at cache lines, all of them at 16 bytes.
pub(super) fn packed_line(k: i64, size: i64) -> i64 {
    let bytes = k * size;
    let unit = if bytes >= 8 * CACHE_LINE { CACHE_LINE } else { 16 };
    (bytes + unit - 1) / unit * unit / size
}

/// Sums for each result: two of a pair.
pub(super) fn sums_of(spec: &GemmSpec) -> i64 {
    spec.epilogue.pair.operands().into_iter().max().unwrap_or(1)
}

/// Bytes of parts that stay in the second-level cache until they are added up.
pub(super) const CACHED_PARTS: i64 = 32 << 20;

/// Time of adding up the parts of the depth.
fn sum_us(p: &Problem, gpu: &Gpu, o: &Oriented, splits: i64) -> f64 {
    let parts = o.m * o.n * 4 * splits * sums_of(&o.spec);
    let bytes = (parts + o.m * o.n * p.result_bytes()) as f64;
    let rate = if parts <= CACHED_PARTS { 2.0 } else { 1.0 };
    bytes / (rate * gpu.copy_bytes_per_s) * 1e6 + EXTRA_LAUNCH_US
}

/// Whether a schedule walks its tiles in an order of its own: rasters as high as the result are one.
fn walks_apart(s: &GpuSchedule, m: i64) -> bool {
    let rows = s.tiles.get("BM").copied().unwrap_or(1);
    let rows = rows * i64::from(s.cluster_tiles().0);
    s.raster == 8 || (m + rows - 1) / rows > i64::from(s.raster.min(8))
}

/// What a schedule's estimate needs to know of one orientation of a problem.
struct Scored<'a> {
    problem: &'a Problem,
    gpu: &'a Gpu,
    o: &'a Oriented,
    /// With the orders that preparation leaves.
    spec: GemmSpec,
    /// Time of preparation.
    copies_us: f64,
    shape: Shape,
}

impl<'a> Scored<'a> {
    fn new(p: &'a Problem, gpu: &'a Gpu, o: &'a Oriented) -> Scored<'a> {
        let size = p.operand_bytes();
        let parts = if o.spec.math == Math::Tf32x3 { 2 } else { 1 };
        let pair = o.spec.epilogue.pair;
        let (mut spec, mut copies_us) = (o.spec.clone(), 0.0);
        let mut aligned = [true; 2];
        for (operand, lines) in [(0, o.m), (1, o.n)] {
            let pick = |t: (i64, i64, i64)| if operand == 0 { t.0 } else { t.1 };
            let mut leading = pick(o.leading);
            let (mut stride, mut align) = (pick(o.stride), pick(o.align));
            if needs_copy(p, o, operand) {
                let bytes = (lines * p.k * p.batch * size * (1 + parts)) as f64;
                let bytes = bytes * pair.operands()[operand] as f64;
                copies_us += bytes / gpu.copy_bytes_per_s * 1e6 + EXTRA_LAUNCH_US;
                let (order, count, length) = packed(p, o, operand);
                if operand == 0 {
                    spec.a = order
                } else {
                    spec.b = order
                }
                leading = packed_line(length, size);
                (stride, align) = (leading * count, CACHE_LINE);
            }
            aligned[operand] = leading * size % CACHE_LINE == 0
                && align % CACHE_LINE == 0
                && (p.batch == 1 || stride * size % CACHE_LINE == 0);
        }
        let shape = Shape {
            m: o.m,
            n: o.n,
            k: p.k,
            batch: p.batch,
            splits: 1,
            taps: p.taps(),
            products: if parts == 2 { 3 } else { 1 },
            operands: pair.operands(),
            operand_bytes: size,
            result_bytes: p.result_bytes(),
            lines_aligned: (aligned[0], aligned[1]),
            along_depth: (spec.a == Order::Row, spec.b == Order::Col),
            column_major: o.spec.c == Order::Col,
            residual_bytes: o.spec.epilogue.residual.map_or(0, |t| i64::from(t.bits()) / 8),
            epilogue_instructions: instructions(&o.spec.epilogue.func)
                + o.spec.statistics.leaves.as_ref().map_or(0, instructions),
        };
        Scored { problem: p, gpu, o, spec, copies_us, shape }
    }

    /// Whether plain multiply-adds are used, which read any layout.
    fn is_plain(&self) -> bool {
        is_plain(self.problem, self.o)
    }

    fn estimate_us(&self, schedule: &GpuSchedule, splits: i64) -> f64 {
        let shape = Shape { splits, ..self.shape };
        let product = if self.is_plain() {
            // The formula counts in clocks of the H200.
            estimate_multiply_add(self.gpu, schedule, &shape) * (1.75 / self.gpu.model.clock_ghz)
        } else if schedule.product == ProductKind::MmaSync {
            estimate_pipelined(self.gpu, schedule, &shape) + self.copies_us
        } else {
            estimate(self.gpu, schedule, &shape)
        };
        let sum = if splits > 1 { sum_us(self.problem, self.gpu, self.o, splits) } else { 0.0 };
        product + sum + self.copies_us
    }
}

/// Time of a choice by the model of another machine (or with other constants).
pub fn estimate_choice(problem: &Problem, gpu: &Gpu, choice: &Choice) -> f64 {
    let o = orient(problem, choice.swapped);
    Scored::new(problem, gpu, &o).estimate_us(&choice.schedule, choice.splits)
}

/// Scores every schedule of one orientation.
fn rank(p: &Problem, gpu: &Gpu, o: &Oriented, extent: Extent, ranked: &mut Vec<Choice>) {
    let scored = Scored::new(p, gpu, o);
    let swapped = o.swapped;
    let channels = p.k / p.taps().max(1);
    let mut add = |splits: i64, schedule: GpuSchedule| {
        // A step of the depth stays within one tap: what lies behind its channels is zeros.
        let bk = schedule.tiles.get("BK").copied().unwrap_or(1);
        let bytes = bk * p.operand_bytes();
        let lost = channels % bk != 0;
        // Narrow steps are for few channels.
        let narrow = bytes < 128 && channels * p.operand_bytes() > bytes;
        if p.images.is_some()
            && (narrow || lost && (bytes > 128 || channels * 2 <= bk && bytes > 32))
        {
            return;
        }
        let estimate_us = scored.estimate_us(&schedule, splits);
        ranked.push(Choice { estimate_us, swapped, splits, schedule });
    };
    let tile = |s: &GpuSchedule, name: &str| s.tiles.get(name).copied().unwrap_or(1);
    let tiles_of = |s: &GpuSchedule| {
        let (bm, bn) = (tile(s, "BM"), tile(s, "BN"));
        ((o.m + bm - 1) / bm) * ((o.n + bn - 1) / bn)
    };
    let steps_of = |s: &GpuSchedule| p.depth_steps(tile(s, "BK"));
    let is_pair = o.spec.epilogue.pair != Pair::None;
    if scored.is_plain() {
        for schedule in multiply_add_space(gpu, access_vector(p, o), is_pair) {
            for splits in SPLITS {
                let few = tiles_of(&schedule) * splits <= MULTIPLY_ADD_TILES * i64::from(gpu.sms);
                if p.batch != 1 || splits * 8 > steps_of(&schedule) || !few {
                    break;
                }
                add(splits, schedule.clone());
            }
            add(1, schedule);
        }
        return;
    }
    if Arch::of_capability(gpu.capability) < Arch::Sm90a {
        let accesses = Accesses { result: result_accesses(p, o), operands: copy_accesses(p, o) };
        for schedule in pipelined_space(&scored.spec, gpu, accesses) {
            for splits in SPLITS {
                let few = tiles_of(&schedule) * splits <= 2 * i64::from(gpu.sms);
                if p.batch != 1 || splits * 4 > steps_of(&schedule) || !few {
                    break;
                }
                // Parts are f32 in lines of whole accesses.
                add(
                    splits,
                    GpuSchedule { vector: 4, store: StoreKind::Staged, ..schedule.clone() },
                );
            }
            add(1, schedule);
        }
        return;
    }
    let store = match o.spec.c {
        _ if stores_by_engine(p, o) => StoreKind::Tma,
        // Rows that start anywhere: neighbouring threads write neighbouring elements.
        Order::Row => StoreKind::Staged,
        Order::Col => StoreKind::Direct,
    };
    // Clusters along both axes gain something where one wave of blocks has all tiles.
    let known = |s: &GpuSchedule| {
        s.cluster_axis < 2 || extent == Extent::Whole || tiles_of(s) <= i64::from(gpu.sms)
    };
    each_schedule(&scored.spec, store, result_vector(p, o), 1, &RASTERS, &mut |schedule| {
        if walks_apart(schedule, o.m) && known(schedule) {
            add(1, schedule.clone());
        }
    });
    if p.batch != 1 {
        return;
    }
    let mut partial = scored.spec.clone();
    partial.result = scored.spec.sum;
    let line = if partial.c == Order::Row { o.n } else { o.m };
    let store = if line % 4 == 0 { StoreKind::Tma } else { StoreKind::Direct };
    // Parts of few rows of tiles have nothing to walk.
    each_schedule(&partial, store, 1, sums_of(&partial), &[8], &mut |schedule| {
        let tiles = tiles_of(schedule);
        let cooperative = schedule.mode == tilewright_lower_gpu::Mode::Cooperative;
        let takes = match extent {
            Extent::Picker => {
                tiles * 2 <= i64::from(gpu.sms) && cooperative && schedule.cluster_axis < 2
            }
            Extent::Whole => true,
        };
        if !takes {
            return;
        }
        for splits in SPLITS {
            // Every part has at least four steps.
            if splits * 4 > steps_of(schedule) || tiles * splits > 2 * i64::from(gpu.sms) {
                break;
            }
            add(splits, schedule.clone());
        }
    });
}

pub(super) fn sizes(pairs: &[(&str, i64)]) -> Env {
    pairs.iter().map(|(name, value)| (Arc::from(*name), *value)).collect()
}

/// A step without products.
pub(super) fn lines(
    arch: Arch,
    kernel: Kernel,
    sizes: Env,
    operands: Vec<Place>,
    aligned: i64,
) -> Result<Step> {
    let lookup = |name: &str| sizes.get(name).copied();
    let mut schedule = GpuSchedule::lines_for_addresses(&kernel, arch, &lookup, aligned)?
        .ok_or_else(|| Error::bug(format!("no schedule for {}", kernel.name)))?;
    schedule.dependent = arch >= Arch::Sm90a;
    Ok(Step { kernel, schedule, sizes, operands })
}

/// Makes an operand readable: as it is, or a packed copy with its depth contiguous.
/// Of a pair, `second` is the other one of an operand that there are two of.
fn prepare(
    arch: Arch,
    p: &Problem,
    o: &Oriented,
    operand: usize,
    second: bool,
    steps: &mut Vec<Step>,
    workspace: &mut Workspace,
) -> Result<Ready> {
    let pick = |t: (i64, i64, i64)| if operand == 0 { t.0 } else { t.1 };
    let order = if operand == 0 { o.spec.a } else { o.spec.b };
    let places = operand_places(o);
    let place = if operand == 0 { places.0 } else { places.1 };
    let place = if second { Place::B2 } else { place };
    let (leading, stride) = (pick(o.leading), pick(o.stride));
    if !needs_copy(p, o, operand) {
        return Ok(Ready { place, low: None, order, leading, stride });
    }
    let size = p.operand_bytes();
    let parts = o.spec.math == Math::Tf32x3;
    // Lines padded.
    let (to, count, length) = packed(p, o, operand);
    let padded = packed_line(length, size);
    let matrix = padded * count;
    let bytes = matrix * p.batch * size;
    let high = workspace.take(bytes);
    let low = parts.then(|| workspace.take(bytes));
    // Lines are contiguous in the copy: in column-major order that is the transposed view.
    let (rows, cols) = if operand == 0 { (o.m, p.k) } else { (p.k, o.n) };
    let (r, c, from) =
        if to == Order::Row { (rows, cols, order) } else { (cols, rows, flip(order)) };
    let kernel = copy_program("copy", p.operand, from, Order::Row, p.batch != 1, parts);
    let mut values = vec![("R", r), ("C", c), ("ldx", leading), ("ldy", padded)];
    if p.batch != 1 {
        values.extend([("L", p.batch), ("sx", stride), ("sy", matrix)]);
    }
    let mut operands = vec![place, high];
    operands.extend(low);
    let aligned = aligned_elements(pick(o.align), size);
    steps.push(lines(arch, kernel, sizes(&values), operands, aligned)?);
    Ok(Ready { place: high, low, order: to, leading: padded, stride: matrix })
}

/// Depth up to which plain multiply-adds add up the sums of each tile's depth apart.
const SHORT_DEPTH: i64 = 512;

/// Sums that each thread of plain multiply-adds keeps.
fn sums_per_thread(s: &GpuSchedule, spec: &GemmSpec) -> i64 {
    let tile = |name: &str| s.tiles.get(name).copied().unwrap_or(1);
    sums_of(spec) * tile("BM") * tile("BN") / i64::from(s.warps.0 * s.warps.1 * 32).max(1)
}

/// Where the operands of an orientation are.
pub(super) fn operand_places(o: &Oriented) -> (Place, Place) {
    if o.swapped { (Place::B, Place::A) } else { (Place::A, Place::B) }
}

/// What an epilogue reads, and the result.
pub(super) fn extras(spec: &GemmSpec, swapped: bool) -> Vec<Place> {
    let e = &spec.epilogue;
    let (cols, rows) =
        if swapped { (Place::Rows, Place::Cols) } else { (Place::Cols, Place::Rows) };
    let mut out = Vec::new();
    let place = |slot: Slot| match slot {
        Slot::Sum { .. } => None,
        Slot::Cols { second: true } | Slot::Rows { second: true } => Some(Place::Cols2),
        Slot::Cols { second: false } => Some(cols),
        Slot::Rows { second: false } => Some(rows),
        Slot::Residual => Some(Place::Residual),
    };
    out.extend(e.slots().into_iter().filter_map(place));
    out.push(Place::C);
    out.extend(spec.statistics.leaves.as_ref().map(|_| Place::Parts));
    out
}

/// A product over an empty sum: the epilogue of zeros, along the lines of the result.
fn empty_sum(p: &Problem, gpu: &Gpu, o: &Oriented) -> Result<Candidate> {
    let mut along = o.spec.clone();
    let column_major = along.c == Order::Col;
    let (mut m, mut n) = (o.m, o.n);
    if column_major {
        along.epilogue = o.spec.epilogue.transposed();
        (m, n) = (n, m);
    }
    let mut values = vec![("M", m), ("N", n), ("ldc", o.leading.2)];
    if p.batch != 1 {
        values.extend([("L", p.batch), ("sc", o.stride.2)]);
    }
    let kernel = o.spec.empty_program("gemm_empty");
    let aligned = aligned_elements(o.align.2, p.result_bytes());
    let arch = Arch::of_capability(gpu.capability);
    let step = lines(arch, kernel, sizes(&values), extras(&along, column_major), aligned)?;
    let bytes = (m * n * p.batch * p.result_bytes()) as f64;
    let estimate_us = bytes / gpu.copy_bytes_per_s * 1e6 + EXTRA_LAUNCH_US;
    Ok(Candidate { steps: vec![step], workspace_bytes: 0, estimate_us })
}

/// The steps of a choice.
fn build(p: &Problem, o: &Oriented, choice: Choice) -> Result<Candidate> {
    let mut workspace = Workspace::default();
    let mut steps = Vec::new();
    let arch = choice.schedule.arch;
    let pair = o.spec.epilogue.pair;
    let mut ready = |operand: usize, two: bool| -> Result<Vec<Ready>> {
        let each = [false, true].into_iter().take(1 + usize::from(two));
        each.map(|second| prepare(arch, p, o, operand, second, &mut steps, &mut workspace))
            .collect()
    };
    let left = ready(0, pair == Pair::Left)?;
    let right = ready(1, pair == Pair::Right)?;
    let (a, b) = (left[0], right[0]);
    let mut operands: Vec<Place> = left.iter().chain(&right).map(|r| r.place).collect();
    operands.extend(left.iter().chain(&right).filter_map(|r| r.low));
    let mut spec = o.spec.clone();
    (spec.a, spec.b) = (a.order, b.order);
    // The model does not cut the sums of pairs into parts otherwise, whatever the depth.
    let alone = p.k <= SHORT_DEPTH || pair != Pair::None;
    let short = alone && sums_per_thread(&choice.schedule, &spec) <= 32;
    if choice.schedule.product == ProductKind::Fma && short {
        // There are registers for sums of a tile's depth apart: their errors stay near those of sums in parts, which
        // others form for small products.
        spec.math = Math::Promoted;
    }
    let channels = p.k / p.taps().max(1);
    let distances: Vec<String> = (0..o.depth_strides.len()).map(depth_stride).collect();
    let mut values =
        vec![("M", o.m), ("N", o.n), ("K", channels), ("lda", a.leading), ("ldb", b.leading)];
    if let Some(Images { count, size: [h, w], outputs: [rows, cols], .. }) = p.images {
        values.extend([("R", count * h * w), ("H", h), ("W", w), ("P", rows), ("Q", cols)]);
    }
    if choice.splits == 1 {
        values.push(("ldc", o.leading.2));
        if p.batch != 1 {
            values.extend([("L", p.batch), ("sa", a.stride), ("sb", b.stride), ("sc", o.stride.2)]);
        }
        if let Some(prologue) = &spec.prologue {
            operands.extend((0..prologue.vectors.len()).map(Place::Depth));
            if p.batch != 1 {
                let strides = distances.iter().map(String::as_str).zip(o.depth_strides.clone());
                values.extend(strides);
            }
        }
        operands.extend(extras(&spec, o.swapped));
        // Kernels with the same tensors and schedule that sum differently have different names.
        let apart = spec.math == Math::Promoted && o.spec.math != Math::Promoted;
        let kernel = spec.program(match spec.windows {
            Some(_) => "conv",
            None if spec.prologue.is_some() => "gemm_of_computed",
            None if apart => "gemm_apart",
            None => "gemm",
        });
        let schedule = statistics::with_parts(&spec, choice.schedule);
        steps.push(Step { kernel, schedule, sizes: sizes(&values), operands });
    } else {
        let bk = choice.schedule.tiles.get("BK").copied().unwrap_or(1);
        let depth = p.depth_steps(bk);
        let part = (depth + choice.splits - 1) / choice.splits;
        let splits = (depth + part - 1) / part;
        // Lines of the parts lie as those of the result, padded to 16 bytes.
        let (line, lines_of) = if spec.c == Order::Row { (o.n, o.m) } else { (o.m, o.n) };
        let padded = (line + 3) / 4 * 4;
        let sp = padded * lines_of;
        let parts: Vec<Place> =
            (0..sums_of(&spec)).map(|_| workspace.take(sp * splits * 4)).collect();
        values.extend([("ldc", padded), ("S", splits), ("part", part), ("sp", sp)]);
        operands.extend(&parts);
        let mut partial = spec.clone();
        partial.result = spec.sum;
        let conv = spec.windows.is_some();
        let kernel = partial.part_program(if conv { "conv_part" } else { "gemm_part" });
        steps.push(Step { kernel, schedule: choice.schedule, sizes: sizes(&values), operands });
        let column_major = spec.c == Order::Col;
        let (m, n) = if column_major { (o.n, o.m) } else { (o.m, o.n) };
        let values =
            [("M", m), ("N", n), ("S", splits), ("ldp", padded), ("ldc", o.leading.2), ("sp", sp)];
        let kernel = spec.sum_program("gemm_sum");
        let mut operands = parts;
        let mut view = spec.clone();
        if column_major {
            view.epilogue = spec.epilogue.transposed();
        }
        operands.extend(extras(&view, o.swapped != column_major));
        let aligned = aligned_elements(o.align.2, p.result_bytes());
        steps.push(lines(arch, kernel, sizes(&values), operands, aligned)?);
    }
    Ok(Candidate { steps, workspace_bytes: workspace.bytes, estimate_us: choice.estimate_us })
}
