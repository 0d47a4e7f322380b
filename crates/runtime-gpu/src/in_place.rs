//! Which results may lie in the memory of an operand, on a GPU.
//!
//! A tile program says so itself ([`may_overwrite`]): what one block reads, only it writes. Its device program may
//! spread a block over a cluster, each member with columns of its own, so nothing changes by that. A matrix product
//! reads its residual, and stores its result, tile by tile and element by element at the same place; the other
//! operands are read by many blocks. Every form that a kernel may take must allow it.

use std::collections::BTreeSet;
use tilewright_plan::arena::Live;
use tilewright_plan::{BufferId, Form, Plan, PlanKernel, Product, Step};
use tilewright_tile::{Access, Kernel, ParamId, may_overwrite};

/// Parameters of a kernel, by number: an operand, and a result that may lie in its memory.
pub(crate) type Pair = (usize, usize);

fn of_program(kernel: &Kernel) -> BTreeSet<Pair> {
    let with = |access| kernel.params.iter().filter(move |(_, p)| p.access == access);
    let pairs =
        with(Access::In).flat_map(|(from, _)| with(Access::Out).map(move |(to, _)| (from, to)));
    pairs
        .filter(|&(from, to)| may_overwrite(kernel, from, to))
        .map(|(from, to)| (from.index(), to.index()))
        .collect()
}

/// A residual that lies as the result does, in the memory of a parameter of its own.
fn of_product(product: &Product, kernel: &Kernel) -> BTreeSet<Pair> {
    let Some(residual) = &product.residual else { return BTreeSet::new() };
    let params = [residual.param, product.c.param].map(|p| &kernel.params[ParamId(p as u32)]);
    let same = residual.dtype == product.c.dtype
        && residual.offset == product.c.offset
        && params[0].layout == params[1].layout;
    let others = [Some(product.a.param), Some(product.b.param)]
        .into_iter()
        .chain([&product.cols, &product.rows].map(|v| v.as_ref().map(|v| v.param)));
    let vectors = product.prologue.iter().flat_map(|p| &p.vectors).map(|d| Some(d.vector.param));
    let others = others.chain(vectors);
    let read_again = others.flatten().any(|p| p == residual.param);
    let pair = (residual.param, product.c.param);
    BTreeSet::from_iter((same && !read_again).then_some(pair))
}

/// The pairs that every form of a kernel allows.
pub(crate) fn pairs(planned: &PlanKernel) -> BTreeSet<Pair> {
    let kernel = &planned.kernel;
    let mut of_forms = planned.forms.iter().map(|form| match form {
        Form::Product(product) => of_product(product, kernel),
        Form::Program { kernel, params } => {
            of_program(kernel).into_iter().map(|(a, b)| (params[a], params[b])).collect()
        }
        Form::Attention(_) => BTreeSet::new(),
    });
    // Products and attention never run as their tile program.
    let only_forms = planned.forms.iter().any(|f| !matches!(f, Form::Program { .. }));
    let own = if only_forms { of_forms.next() } else { Some(of_program(kernel)) };
    of_forms.fold(own.unwrap_or_default(), |all, one| all.intersection(&one).copied().collect())
}

/// Joins the lives of operands and results that may share memory: the result of joining, and for each buffer the
/// buffer whose life is its own.
///
/// A step must be the operand's last reader and the result's first writer, and each of the two one argument only.
pub(crate) fn join(
    plan: &Plan,
    on_device: &dyn Fn(usize) -> bool,
    lives: &[Option<Live>],
) -> (Vec<Option<Live>>, Vec<usize>) {
    let (mut joined, mut home): (Vec<_>, Vec<usize>) = (lives.to_vec(), (0..lives.len()).collect());
    let kernels: Vec<BTreeSet<Pair>> = plan.kernels.iter().map(|(_, k)| pairs(k)).collect();
    for (number, step) in plan.steps.iter().enumerate() {
        let Step::Launch { kernel, args, .. } = step else { continue };
        if !on_device(number) {
            continue;
        }
        let mut given_up: Vec<BufferId> = Vec::new();
        for &(from, to) in &kernels[kernel.index()] {
            let (from, to) = (args[from], args[to]);
            let (Some(old), Some(new)) = (lives[from.index()], lives[to.index()]) else { continue };
            let once = |b: BufferId| args.iter().filter(|&&a| a == b).count() == 1;
            let apart = home[to.index()] == to.index() && !given_up.contains(&from);
            // Inputs and outputs keep memory of their own: a run may be repeated.
            let inside =
                |b: BufferId| matches!(plan.buffers[b].storage, tilewright_plan::Storage::Arena);
            let now = old.last == number && new.first == number && inside(from) && inside(to);
            if !apart || !now || !once(from) || !once(to) {
                continue;
            }
            given_up.push(from);
            let at = home[from.index()];
            if let Some(life) = &mut joined[at] {
                life.bytes = life.bytes.max(new.bytes);
                life.last = new.last;
            }
            home[to.index()] = at;
            joined[to.index()] = None;
        }
    }
    (joined, home)
}
