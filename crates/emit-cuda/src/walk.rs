//! Walks over a program's steps: every step of a body, and the names that they use.

use crate::stmts::identifier;
use std::collections::BTreeSet;
use tilewright_device::{
    CLUSTER, CLUSTERS, CTA, FragId, Phase, Program, RingId, Slot, Stmt, WgmmaA,
};

/// Calls `f` on every step, nested ones included.
pub(crate) fn visit(stmts: &[Stmt], f: &mut dyn FnMut(&Stmt)) {
    for stmt in stmts {
        f(stmt);
        match stmt {
            Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => visit(body, f),
            Stmt::If { then, otherwise, .. } => {
                visit(then, f);
                visit(otherwise, f);
            }
            _ => {}
        }
    }
}

/// Identifiers that sizes, loops, roles' indices, buffers and barriers have.
pub(crate) fn names_of_integers(program: &Program) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = program.symbols.iter().map(|s| s.name.to_string()).collect();
    names.extend([CTA, CLUSTER, CLUSTERS].map(str::to_owned));
    names.extend(program.roles.iter().map(|r| identifier(&r.instance)));
    names.extend(program.smem.iter().map(|(_, s)| identifier(&s.name)));
    names.extend(program.barriers.iter().map(|(_, b)| identifier(&b.name)));
    let bodies = program.roles.iter().map(|r| &r.body);
    for body in bodies.chain([&program.setup, &program.teardown]) {
        visit(body, &mut |stmt| match stmt {
            Stmt::Let { name, .. } => drop(names.insert(identifier(name))),
            Stmt::For { var, .. } | Stmt::Unroll { var, .. } => drop(names.insert(identifier(var))),
            _ => {}
        });
    }
    names
}

/// Rings and fragments that one step names.
pub(crate) fn stmt_names(stmt: &Stmt, rings: &mut BTreeSet<RingId>, frags: &mut BTreeSet<FragId>) {
    let mut slot = |s: &Slot| {
        if let Slot::Ring(r) | Slot::Before(r) = s {
            rings.insert(*r);
        }
    };
    match stmt {
        Stmt::Wait { barrier, phase } => {
            slot(&barrier.slot);
            if let Phase::Of(r) | Phase::Before(r) = phase {
                rings.insert(*r);
            }
        }
        Stmt::Arrive { barrier, .. } | Stmt::ExpectBytes { barrier, .. } => slot(&barrier.slot),
        Stmt::Advance { ring, .. } => {
            rings.insert(*ring);
        }
        Stmt::TmaLoad { to, barrier, .. } => {
            slot(&to.slot);
            slot(&barrier.slot);
        }
        Stmt::TmaStore { from, .. } => slot(&from.slot),
        Stmt::CopyIn { to, .. } => slot(&to.slot),
        Stmt::Wgmma { acc, a, b, .. } | Stmt::Mma { acc, a, b, .. } => {
            frags.insert(acc.frag);
            slot(&b.slot);
            match a {
                WgmmaA::Smem(a) => slot(&a.slot),
                WgmmaA::Frag(a) => {
                    frags.insert(a.frag);
                }
            }
        }
        Stmt::Fill { dst, .. } | Stmt::Iota { dst, .. } | Stmt::Load { dst, .. } => {
            frags.insert(dst.frag);
        }
        Stmt::Map { dst, args, .. } => {
            frags.insert(dst.frag);
            frags.extend(args.iter().map(|a| a.frag));
        }
        Stmt::Reduce { dst, src, .. } => {
            frags.extend([dst.frag, src.frag]);
        }
        Stmt::Store { src, .. } => {
            frags.insert(src.frag);
        }
        Stmt::ToSmem { to, src } => {
            slot(&to.slot);
            frags.insert(src.frag);
        }
        Stmt::FromSmem { dst, from } => {
            slot(&from.slot);
            frags.insert(dst.frag);
        }
        Stmt::Line(step) => {
            frags.extend(step.reads().into_iter().chain(step.writes()).map(|f| f.frag));
        }
        _ => {}
    }
}
