//! Steps that a processor runs for one image after the other: what lies between them then stays in its caches.
//!
//! Convolutions of several images have the images as the first axis of their grids, and mostly a block reads of what
//! earlier kernels wrote its own image only. [`image_runs`] proves that from the tile programs, and gives the longest
//! runs of such steps ([`ImageRun`]). Blocks stay what they are, so no result depends on whether a runtime
//! follows. For a parameter of a kernel, where `g` is the index of the first grid axis:
//!
//! * one axis of its layout is as long as the grid's, and every load and store of it is at `g` there, one element long;
//! * everything else that the layout reaches lies between this image and the next ([`distance`]).
//!
//! What steps of the run write has this form wherever the run reads or writes it. What they only read may have
//! any. The weights of a run are read again for each image: they take a quarter of the last-level cache at most.

use crate::target::CpuTarget;
use std::collections::BTreeMap;
use std::ops::Range;
use tilewright_layout::Dim;
use tilewright_plan::{Buffer, BufferId, ImageRun, Plan, Step, Storage};
use tilewright_tile::{Access, Block, Kernel, ParamId, Stmt, TileOp};

/// Bytes between the steps of a run for each image, at least: there is something to keep, and more work than in
/// starting the steps.
const IMAGE_BYTES: i64 = 128 << 10;

/// What a step of a run reads or writes.
struct Touch {
    buffer: BufferId,
    written: bool,
    /// Elements between images, where only the block's own image is touched.
    distance: Option<i64>,
}

/// A step that can be in a run.
struct Candidate {
    images: i64,
    touches: Vec<Touch>,
    /// Bytes of the constants that it reads.
    weights: i64,
}

/// The runs of a plan, in order.
pub(crate) fn image_runs(plan: &Plan, target: &CpuTarget) -> Vec<ImageRun> {
    let candidates: Vec<Option<Candidate>> =
        plan.steps.iter().map(|step| candidate(plan, step)).collect();
    let lives = lives(plan);
    let mut runs = Vec::new();
    let mut start = 0;
    while start < candidates.len() {
        let mut run = Growing::default();
        let mut end = start;
        let mut full = false;
        while let Some(Some(next)) = candidates.get(end) {
            full = end > start && 4 * (run.weights + next.weights) > target.l3_bytes;
            if full || !run.takes(next) {
                break;
            }
            end += 1;
        }
        if full {
            // Cut where least lies between the steps.
            let crossing = |cut: usize| -> i64 {
                let across = |&(_, l): &(BufferId, &Range<usize>)| l.start < cut && cut < l.end;
                lives.iter().map(|(&b, l)| (b, l)).filter(across).map(|(b, _)| bytes(plan, b)).sum()
            };
            let cuts = (start + 1..=end).rev();
            end = cuts.min_by_key(|&cut| crossing(cut)).unwrap_or(end);
        }
        let made = finish(plan, target, &candidates[start..end], start..end, &lives);
        runs.extend(made);
        start = end.max(start + 1);
    }
    runs
}

/// A run to which steps are added.
#[derive(Default)]
struct Growing {
    images: Option<i64>,
    weights: i64,
    /// Elements between images of what is written.
    written: BTreeMap<BufferId, i64>,
    /// What is read, and how far its images are apart where that is known.
    read: BTreeMap<BufferId, Option<i64>>,
}

impl Growing {
    /// Adds a step unless images would then see each other.
    fn takes(&mut self, next: &Candidate) -> bool {
        if self.images.is_some_and(|n| n != next.images) {
            return false;
        }
        let (mut written, mut read) = (self.written.clone(), self.read.clone());
        for touch in &next.touches {
            match (touch.written, touch.distance) {
                (true, None) => return false,
                (true, Some(d)) => {
                    if *written.entry(touch.buffer).or_insert(d) != d {
                        return false;
                    }
                }
                (false, d) => {
                    if *read.entry(touch.buffer).or_insert(d) != d {
                        read.insert(touch.buffer, None);
                    }
                }
            }
        }
        let apart = |(b, d): (&BufferId, &i64)| read.get(b).is_none_or(|r| *r == Some(*d));
        if !written.iter().all(apart) {
            return false;
        }
        self.images = Some(next.images);
        self.weights += next.weights;
        (self.written, self.read) = (written, read);
        true
    }
}

/// The run of these steps, where it pays.
fn finish(
    plan: &Plan,
    target: &CpuTarget,
    steps: &[Option<Candidate>],
    range: Range<usize>,
    lives: &BTreeMap<BufferId, Range<usize>>,
) -> Option<ImageRun> {
    let images = steps.first()?.as_ref()?.images;
    let touches = || steps.iter().flatten().flat_map(|c| &c.touches);
    let mut inner = BTreeMap::new();
    for touch in touches().filter(|t| t.written) {
        let b = touch.buffer;
        let own =
            matches!(plan.buffers[b].storage, Storage::Arena) && plan.buffers[b].dtype.bits() >= 8;
        let within = lives.get(&b).is_some_and(|l| range.start <= l.start && l.end <= range.end);
        if let (true, true, Some(distance)) = (own, within, touch.distance) {
            inner.insert(b, distance);
        }
    }
    let size = |b: &BufferId| plan.buffers[*b].dtype.size() as i64;
    let image: i64 =
        inner.iter().map(|(b, d)| d.saturating_mul(size(b))).fold(0, i64::saturating_add);
    let pays =
        steps.len() > 1 && image >= IMAGE_BYTES && image.saturating_mul(images) > target.l2_bytes;
    pays.then(|| ImageRun { steps: range, images, inner: inner.into_iter().collect() })
}

/// From the first step that touches a buffer to behind the last one.
fn lives(plan: &Plan) -> BTreeMap<BufferId, Range<usize>> {
    let mut lives: BTreeMap<BufferId, Range<usize>> = BTreeMap::new();
    for (number, step) in plan.steps.iter().enumerate() {
        let touched: Vec<BufferId> = match step {
            Step::Launch { args, .. } => args.clone(),
            Step::Library { inputs, outputs, .. } | Step::Host { inputs, outputs, .. } => {
                [inputs.clone(), outputs.clone()].concat()
            }
        };
        for b in touched {
            lives.entry(b).or_insert(number..number).end = number + 1;
        }
    }
    lives
}

/// Bytes of a buffer of known size.
fn bytes(plan: &Plan, b: BufferId) -> i64 {
    let Buffer { layout, dtype, storage, .. } = &plan.buffers[b];
    let counted = matches!(storage, Storage::Arena);
    let elements = layout.alloc_elements().as_const().filter(|_| counted);
    elements.unwrap_or(0).saturating_mul(dtype.size() as i64)
}

/// What a step touches, if its grid begins with images.
fn candidate(plan: &Plan, step: &Step) -> Option<Candidate> {
    let Step::Launch { kernel, args, sizes, .. } = step else { return None };
    let kernel = &plan.kernels[*kernel].kernel;
    let first = kernel.grid.first()?;
    let images = first.extent.as_const().filter(|&n| n > 1)?;
    if !sizes.is_empty() {
        return None;
    }
    let mut found = Candidate { images, touches: Vec::new(), weights: 0 };
    for ((id, param), &buffer) in kernel.params.iter().zip(args) {
        match &plan.buffers[buffer].storage {
            Storage::State(_) => return None,
            Storage::Const(tensor) => {
                found.weights += i64::try_from(tensor.bytes().len()).unwrap_or(i64::MAX / 8);
                continue;
            }
            _ => {}
        }
        let distance = distance(kernel, id, &first.name, images);
        if param.access != Access::Out && param.access != Access::In {
            return None;
        }
        found.touches.push(Touch { buffer, written: param.access == Access::Out, distance });
    }
    Some(found)
}

/// How many elements images of a parameter are apart, when a block touches image number `index` of `images` only.
fn distance(kernel: &Kernel, id: ParamId, index: &str, images: i64) -> Option<i64> {
    let layout = &kernel.params[id].layout;
    let is_image = |a: &usize| {
        layout.axes[*a].extent.is(images)
            && layout.axes[*a].block.is_none()
            && only_at(kernel, &kernel.body, id, *a, &Dim::sym(index))
    };
    let axis = (0..layout.axes.len()).find(is_image)?;
    // The farthest element of an image from its first one.
    let mut reach = layout.offset.as_const().filter(|&o| o >= 0)?;
    for (i, a) in layout.axes.iter().enumerate().filter(|(i, _)| *i != axis) {
        let (extent, stride) = (a.extent.as_const()?, a.stride.as_const()?);
        let (count, within) = match &a.block {
            None => (extent, 0),
            Some(b) => {
                ((extent + b.size - 1) / b.size, (b.size - 1).checked_mul(b.stride.as_const()?)?)
            }
        };
        if extent < 1 || stride < 0 || within < 0 {
            return None;
        }
        debug_assert!(i != axis);
        reach = reach.checked_add((count - 1).checked_mul(stride)?)?.checked_add(within)?;
    }
    layout.axes[axis].stride.as_const().filter(|&d| d > reach)
}

/// Whether each load and store of `param` is one element long along `axis`, at `index`.
fn only_at(kernel: &Kernel, block: &Block, param: ParamId, axis: usize, index: &Dim) -> bool {
    let one = |at: &[Dim], shape: &[Dim]| at[axis] == *index && shape[axis].is(1);
    block.stmts.iter().all(|stmt| match stmt {
        Stmt::Let(tile, TileOp::Load { param: p, index: at, .. }) if *p == param => {
            one(at, &kernel.ty(*tile).shape)
        }
        Stmt::Let(_, TileOp::Gather { param: p, .. }) => *p != param,
        Stmt::Let(..) => true,
        Stmt::Store { param: p, index: at, value } => {
            *p != param || one(at, &kernel.ty(*value).shape)
        }
        Stmt::AtomicAdd { param: p, .. } => *p != param,
        Stmt::For(f) => only_at(kernel, &f.body, param, axis, index),
        Stmt::If(i) => {
            only_at(kernel, &i.then, param, axis, index)
                && only_at(kernel, &i.otherwise, param, axis, index)
        }
    })
}
