//! Results in the memory of operands that nobody reads again.

use crate::images::Inside;
use crate::session::BoundStep;
use tilewright_plan::BufferId;
use tilewright_plan::arena::Live;
use tilewright_tile::{Access, Kernel, ParamId, may_overwrite};

/// Operands and results of a kernel that may share memory.
pub(crate) fn shareable(kernel: &Kernel) -> Vec<(ParamId, ParamId)> {
    let of = |access| kernel.params.iter().filter(move |(_, p)| p.access == access);
    of(Access::Out)
        .flat_map(|(to, _)| of(Access::In).map(move |(from, _)| (from, to)))
        .filter(|&(from, to)| may_overwrite(kernel, from, to))
        .collect()
}

/// Lives in which a result and the operand that it may overwrite are one, and each buffer's life.
///
/// That is so where the step is the operand's last reader and the result's first writer, and each
/// of the two is one argument only.
pub(crate) fn join_in_place(
    shareable: &[Vec<(ParamId, ParamId)>],
    steps: &[BoundStep],
    inside: &Inside<'_>,
    lives: &[Live],
    live_of: &[Option<usize>],
) -> (Vec<Live>, Vec<Option<usize>>) {
    let (mut joined, mut joined_of) = (lives.to_vec(), live_of.to_vec());
    for (number, step) in steps.iter().enumerate() {
        let BoundStep::Launch { kernel, args, .. } = step else { continue };
        let mut given_up: Vec<BufferId> = Vec::new();
        for &(from, to) in &shareable[kernel.index()] {
            let (from, to) = (args[from.index()], args[to.index()]);
            let (Some(old), Some(new)) = (live_of[from.index()], live_of[to.index()]) else {
                continue;
            };
            let once = |b: BufferId| args.iter().filter(|&&a| a == b).count() == 1;
            let apart = joined_of[to.index()] == Some(new) && !given_up.contains(&from);
            let now = lives[old].last == number && lives[new].first == number;
            if !apart || !now || !once(from) || !once(to) || !inside.together([from, to]) {
                continue;
            }
            given_up.push(from);
            let Some(home) = joined_of[from.index()] else { continue };
            joined[home].bytes = joined[home].bytes.max(lives[new].bytes);
            joined[home].last = lives[new].last;
            joined_of[to.index()] = Some(home);
            // Nobody has this life any more.
            joined[new].bytes = 0;
        }
    }
    (joined, joined_of)
}
