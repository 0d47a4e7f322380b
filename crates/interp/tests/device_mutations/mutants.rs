//! Weaker variants of a device program: every synchronising step taken away, weakened and moved.
//!
//! What is done to a step is the table of [`weaker`] (what it may be replaced by) and of [`direction`]
//! (where it may be moved: a step that waits goes later, one that releases goes earlier, every distance
//! within its block). To add a mutation, add it there.

use tilewright_device::*;

/// A program, and what was done to it.
pub(crate) struct Mutant {
    pub(crate) name: String,
    pub(crate) program: Program,
}

/// Whether a step synchronises.
fn synchronises(stmt: &Stmt) -> bool {
    matches!(
        stmt,
        Stmt::Wait { .. }
            | Stmt::Arrive { .. }
            | Stmt::ExpectBytes { .. }
            | Stmt::FenceAsync
            | Stmt::FenceBarrierInit
            | Stmt::BarrierInit
            | Stmt::SyncBlock
            | Stmt::SyncCluster
            | Stmt::NamedSync { .. }
            | Stmt::NamedArrive { .. }
            | Stmt::WgmmaFence
            | Stmt::WgmmaCommit
            | Stmt::WgmmaWait { .. }
            | Stmt::TmaCommit
            | Stmt::TmaWait { .. }
            | Stmt::CopyCommit
            | Stmt::CopyWait { .. }
            | Stmt::GridWait
            | Stmt::Advance { .. }
    )
}

/// Where a step becomes weaker: later (1), earlier (-1), or both ways. A block for one thread is moved
/// as what it holds.
fn direction(stmt: &Stmt) -> &'static [isize] {
    match stmt {
        Stmt::Wait { .. }
        | Stmt::WgmmaWait { .. }
        | Stmt::TmaWait { .. }
        | Stmt::CopyWait { .. }
        | Stmt::GridWait
        | Stmt::WgmmaFence
        | Stmt::BarrierInit => &[1],
        Stmt::Arrive { .. }
        | Stmt::FenceAsync
        | Stmt::FenceBarrierInit
        | Stmt::ExpectBytes { .. }
        | Stmt::NamedArrive { .. }
        | Stmt::WgmmaCommit
        | Stmt::CopyCommit
        | Stmt::TmaCommit => &[-1],
        Stmt::NamedSync { .. } | Stmt::SyncBlock | Stmt::SyncCluster | Stmt::Advance { .. } => {
            &[-1, 1]
        }
        Stmt::Once(body) if body.len() == 1 => direction(&body[0]),
        _ => &[],
    }
}

fn other(slot: &Slot) -> Option<Slot> {
    match slot {
        Slot::Ring(ring) => Some(Slot::Before(*ring)),
        Slot::Before(ring) => Some(Slot::Ring(*ring)),
        Slot::At(_) => None,
    }
}

/// What a step may be replaced by, with a word for it.
fn weaker(p: &Program, stmt: &Stmt) -> Vec<(String, Stmt)> {
    let mut out = Vec::new();
    let mut slot_of = |barrier: &BarrierRef, make: &dyn Fn(BarrierRef) -> Stmt| {
        if let Some(slot) = other(&barrier.slot) {
            let barrier = BarrierRef { barrier: barrier.barrier, slot };
            out.push(("other barrier slot".to_string(), make(barrier)));
        }
    };
    match stmt {
        Stmt::Wait { barrier, phase } => {
            slot_of(barrier, &|barrier| Stmt::Wait { barrier, phase: phase.clone() });
            let phase = match phase {
                Phase::Of(ring) => Phase::Before(*ring),
                Phase::Before(ring) => Phase::Of(*ring),
                Phase::Parity(parity) => Phase::Parity(parity + 1),
            };
            out.push(("other phase".into(), Stmt::Wait { barrier: barrier.clone(), phase }));
        }
        Stmt::Arrive { barrier, reach } => {
            slot_of(barrier, &|barrier| Stmt::Arrive { barrier, reach: reach.clone() });
            if p.cluster > 1 {
                let barrier = barrier.clone();
                out.push(("own block only".into(), Stmt::Arrive { barrier, reach: Reach::Own }));
            }
        }
        Stmt::ExpectBytes { barrier, bytes } => {
            slot_of(barrier, &|barrier| Stmt::ExpectBytes { barrier, bytes: *bytes });
            for bytes in [bytes - 16, bytes + 16] {
                let expect = Stmt::ExpectBytes { barrier: barrier.clone(), bytes };
                out.push((format!("{bytes} bytes"), expect));
            }
        }
        Stmt::TmaLoad { map, at, to, barrier, reach, cache } => {
            let load = |to: &SmemTile, barrier: &BarrierRef, reach: &Reach| Stmt::TmaLoad {
                map: *map,
                at: at.clone(),
                to: to.clone(),
                barrier: barrier.clone(),
                reach: reach.clone(),
                cache: *cache,
            };
            slot_of(barrier, &|barrier| load(to, &barrier, reach));
            if *reach == Reach::All {
                out.push(("own block only".into(), load(to, barrier, &Reach::Own)));
            }
            if let Some(slot) = other(&to.slot) {
                let to = SmemTile { slot, ..to.clone() };
                out.push(("other slot".into(), load(&to, barrier, reach)));
            }
        }
        Stmt::Wgmma { acc, a, b, turned, zero_if } => {
            let (acc, turned, zero_if) = (acc.clone(), *turned, zero_if.clone());
            if let (WgmmaA::Smem(tile), Some(slot)) = (a, other(&b.slot)) {
                let b = SmemTile { slot: slot.clone(), ..b.clone() };
                let a = WgmmaA::Smem(SmemTile { slot, ..tile.clone() });
                out.push(("other slot".into(), Stmt::Wgmma { acc, a, b, turned, zero_if }));
            }
        }
        Stmt::WgmmaWait { pending } => {
            out.push(("one more pending".into(), Stmt::WgmmaWait { pending: pending + 1 }));
        }
        Stmt::TmaWait { pending, reads_only } => {
            let wait = Stmt::TmaWait { pending: pending + 1, reads_only: *reads_only };
            out.push(("one more pending".into(), wait));
        }
        Stmt::CopyWait { pending } => {
            out.push(("one more pending".into(), Stmt::CopyWait { pending: pending + 1 }));
        }
        Stmt::Line(LineStep::Fetch { to, param, at, axes, fill }) => {
            let to = ShelfRef { shelf: to.shelf, slot: &to.slot + 1 };
            let (at, axes) = (at.clone(), *axes);
            let fetch = LineStep::Fetch { to, param: *param, at, axes, fill: *fill };
            out.push(("next slot".into(), Stmt::Line(fetch)));
        }
        Stmt::Line(LineStep::Recall { dst, from }) => {
            let from = ShelfRef { shelf: from.shelf, slot: &from.slot + 1 };
            let recall = LineStep::Recall { dst: dst.clone(), from };
            out.push(("next slot".into(), Stmt::Line(recall)));
        }
        Stmt::CopyIn { param, at, axes, to, vector, ends } => {
            if let Some(slot) = other(&to.slot) {
                let (at, to) = (at.clone(), SmemTile { slot, ..to.clone() });
                let (param, axes, vector, ends) = (*param, *axes, *vector, *ends);
                let copy = Stmt::CopyIn { param, at, axes, to, vector, ends };
                out.push(("other slot".into(), copy));
            }
        }
        Stmt::Mma { acc, a: WgmmaA::Smem(a), b, split } => {
            if let (Some(slot), Some(_)) = (other(&a.slot), other(&b.slot)) {
                let (acc, split) = (acc.clone(), *split);
                let a = WgmmaA::Smem(SmemTile { slot: slot.clone(), ..a.clone() });
                let b = SmemTile { slot, ..b.clone() };
                out.push(("other slot".into(), Stmt::Mma { acc, a, b, split }));
            }
        }
        Stmt::SyncCluster if p.cluster > 1 => out.push(("block only".into(), Stmt::SyncBlock)),
        Stmt::NamedSync { id, threads } => {
            for threads in [threads - 32, threads + 32] {
                let sync = Stmt::NamedSync { id: id.clone(), threads };
                out.push((format!("{threads} threads"), sync));
            }
            let arrive = Stmt::NamedArrive { id: id.clone(), threads: *threads };
            out.push(("arrives only".into(), arrive));
        }
        Stmt::NamedArrive { id, threads } => {
            for threads in [threads - 32, threads + 32] {
                let arrive = Stmt::NamedArrive { id: id.clone(), threads };
                out.push((format!("{threads} threads"), arrive));
            }
            let sync = Stmt::NamedSync { id: id.clone(), threads: *threads };
            out.push(("waits, too".into(), sync));
        }
        Stmt::Advance { ring, by } => {
            let twice = Stmt::Advance { ring: *ring, by: by + 1 };
            out.push(("one more".into(), twice));
        }
        _ => {}
    }
    out
}

/// All changes of one block and the blocks inside of it.
fn changes(p: &Program, block: &[Stmt], place: &str, out: &mut Vec<(String, Vec<Stmt>)>) {
    let with = |i: usize, stmt: Stmt| {
        let mut all = block.to_vec();
        all[i] = stmt;
        all
    };
    for (i, stmt) in block.iter().enumerate() {
        let name = match stmt {
            Stmt::Once(body) if body.len() == 1 => format!("once {}", p.step_text(&body[0])),
            _ => p.step_text(stmt),
        };
        if synchronises(stmt) {
            let mut without = block.to_vec();
            without.remove(i);
            out.push((format!("{place} without `{name}`"), without));
        }
        for (word, instead) in weaker(p, stmt).into_iter().filter(|w| w.1 != *stmt) {
            out.push((format!("{place} `{name}`: {word}"), with(i, instead)));
        }
        for &way in direction(stmt) {
            let room = if way < 0 { i } else { block.len() - 1 - i };
            for distance in 1..=room {
                let to = i.wrapping_add_signed(way * distance as isize);
                // Past a name is nowhere else.
                if matches!(block[to], Stmt::Let { .. }) {
                    continue;
                }
                let mut moved = block.to_vec();
                let taken = moved.remove(i);
                moved.insert(to, taken);
                let past = p.step_text(&block[to]);
                let side = if way < 0 { "before" } else { "after" };
                out.push((format!("{place} `{name}` {side} `{past}`"), moved));
            }
        }
        let mut inside = Vec::new();
        match stmt {
            Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => {
                changes(p, body, place, &mut inside);
            }
            Stmt::If { then, .. } => changes(p, then, place, &mut inside),
            _ => {}
        }
        for (name, changed) in inside {
            let mut stmt = stmt.clone();
            match &mut stmt {
                Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => {
                    *body = changed;
                }
                Stmt::If { then, .. } => *then = changed,
                _ => {}
            }
            out.push((name, with(i, stmt)));
        }
    }
}

/// Every variant of a program that one change makes.
pub(crate) fn mutants(p: &Program) -> Vec<Mutant> {
    let mut all = Vec::new();
    let mut add = |name: String, change: &dyn Fn(&mut Program)| {
        let mut program = p.clone();
        change(&mut program);
        all.push(Mutant { name, program });
    };
    let of = |block: &[Stmt], place: &str| {
        let mut out = Vec::new();
        changes(p, block, place, &mut out);
        out
    };
    for (name, block) in of(&p.setup, "setup") {
        add(name, &|p| p.setup = block.clone());
    }
    for (index, role) in p.roles.iter().enumerate() {
        for (name, block) in of(&role.body, &role.name) {
            add(name, &|p| p.roles[index].body = block.clone());
        }
    }
    for (name, block) in of(&p.teardown, "teardown") {
        add(name, &|p| p.teardown = block.clone());
    }
    for id in p.barriers.ids() {
        let Barrier { name, arrivals, .. } = &p.barriers[id];
        for arrivals in [arrivals - 1, arrivals + 1] {
            let change = |p: &mut Program| {
                for (other, barrier) in p.barriers.iter_mut() {
                    if other == id {
                        barrier.arrivals = arrivals;
                    }
                }
            };
            add(format!("barrier {name} takes {arrivals} arrivals"), &change);
        }
    }
    all
}
