//! The rules of device programs that need no run; all violations are reported at once.
//!
//! Sources are sections of the PTX ISA (8.x) and of the CUDA C++ Programming Guide (CPG).
//!
//! 1. Ids exist, names are bound before they are used; [`THREAD`] only decides branches of `setup`
//!    and `teardown`.
//! 2. A block has whole warps, at most 1024 threads; roles are disjoint and inside; clusters have 1 to 16
//!    blocks (CPG, "Thread Block Clusters"); shared memory fits the architecture.
//! 3. `setmaxnreg` ("Miscellaneous Instructions: setmaxnreg"): 24 to 256 in steps of 8, for whole warpgroups; all
//!    together no more than the launch gives.
//! 4. Tensor maps ("Tensors: Tensor Dimension, Size and Format", "Swizzling Modes"): 1 to 5 axes, boxes of 1 to
//!    256 along each, the contiguous axis of stride 1, its bytes a multiple of 16 and at most a
//!    span of the swizzle.
//! 5. A copy is one box of the buffer's element type and swizzle, and starts at a whole panel and, when
//!    swizzled, at a whole group of 8 lines.
//! 6. Buffers have whole panels, and whole groups of 8 lines when swizzled; tiles lie inside where that is known.
//! 7. `wgmma` ("Asynchronous Warpgroup Level Matrix Instructions") follows the table in `wgmma.rs`: element types, depth, columns; 64
//!    rows at a time; an operand whose depth is not contiguous has 16 bits ("Register Fragments and
//!    Shared Memory Matrix Layouts"); buffers are swizzled; the role is an aligned warpgroup.
//! 8. Columns of fragments are numbers once unrolled, and inside; spreads fit the role; operands of a step agree in extent, spread and type.
//! 9. Barriers take 1 to 2^20 - 1 arrivals ("mbarrier: Contents of the mbarrier object"); who is waited for, arrives somewhere. Announced bytes are those of the
//!    copies in the same straight run of steps. A wait for the phase of a ring position is at the slot of that position.
//! 10. Copies, their groups and what starts them belong to one thread; registers, `wgmma` and
//!     barriers of threads to all of them; hardware barriers are 1 to 15, for whole warps ("bar").
//! 11. Before `sm_90a` there are no tensor maps, mbarriers, clusters, `wgmma`, `setmaxnreg` and dependent launches.
//!
//! To add a rule: a sentence above, its check, and a row in the table of `tests/verify.rs`.

mod declarations;
mod steps;
mod wgmma;

use crate::ir::*;
use std::sync::Arc;
use tilewright_base::{Error, Result};
use tilewright_layout::{Dim, Env};
use tilewright_tile::ParamId;

/// Checks every rule in the module's head. The error is our bug (programs are made by lowering) and notes
/// every violation.
///
/// # Errors
/// When a rule is broken.
pub fn verify(program: &Program) -> Result<()> {
    let mut checker = Checker {
        program,
        found: Vec::new(),
        names: program.symbols.iter().map(|s| s.name.clone()).collect(),
        unrolled: Env::new(),
        role: None,
        once: false,
        whole: true,
    };
    checker.names.extend([CTA, CLUSTER, CLUSTERS].map(Arc::from));
    checker.declarations();
    checker.block(&program.setup);
    for role in &program.roles {
        checker.role = Some(role);
        checker.names.push(role.instance.clone());
        checker.block(&role.body);
        checker.names.pop();
    }
    checker.role = None;
    checker.block(&program.teardown);
    checker.arrivals();
    let found = checker.found;
    if found.is_empty() {
        return Ok(());
    }
    let (name, count) = (&program.name, found.len());
    let error = Error::bug(format!("device program `{name}` breaks {count} rules"));
    Err(found.into_iter().fold(error, Error::with_note))
}

struct Checker<'a> {
    program: &'a Program,
    found: Vec<String>,
    names: Vec<Arc<str>>,
    /// Values of the variables of enclosing unrolled loops.
    unrolled: Env,
    role: Option<&'a Role>,
    /// Inside of [`Stmt::Once`].
    once: bool,
    /// All threads are here (not inside of a branch on the thread).
    whole: bool,
}

impl Checker<'_> {
    /// Notes a violation, once.
    fn wrong(&mut self, message: String) {
        if !self.found.contains(&message) {
            self.found.push(message);
        }
    }

    fn require(&mut self, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.wrong(message());
        }
    }

    /// A violation by a step.
    fn step(&mut self, stmt: &Stmt, holds: bool, what: &str) {
        if !holds {
            let text = self.program.step_text(stmt);
            let place = self.role.map_or("", |r| &r.name);
            let colon = if place.is_empty() { "" } else { ": " };
            self.wrong(format!("{place}{colon}`{text}`: {what}"));
        }
    }

    /// With the unrolled variables put in.
    fn put_in(&self, dim: &Dim) -> Dim {
        if self.unrolled.is_empty() {
            return dim.clone();
        }
        dim.substitute(&|name| self.unrolled.get(name).map(|&v| Dim::new(v)))
    }

    fn known(&mut self, stmt: &Stmt, dim: &Dim) {
        let mut unknown = Vec::new();
        dim.for_each_symbol(&mut |name| {
            if !self.names.contains(name) {
                unknown.push(name.clone());
            }
        });
        for name in unknown {
            self.step(stmt, false, &format!("`{name}` is not bound"));
        }
    }

    /// Whether one thread of the instance runs this.
    fn solo(&self) -> bool {
        self.once || self.role.is_some_and(|r| r.single_thread)
    }

    fn block(&mut self, block: &[Stmt]) {
        let names = self.names.len();
        self.announced_bytes(block);
        for stmt in block {
            match stmt {
                Stmt::Let { name, value } => {
                    self.known(stmt, value);
                    self.names.push(name.clone());
                }
                Stmt::For { var, lo, hi, step, body } => {
                    for dim in [lo, hi, step] {
                        self.known(stmt, dim);
                    }
                    let positive = step.as_const().is_none_or(|s| s > 0);
                    self.step(stmt, positive, "the step is not positive");
                    self.names.push(var.clone());
                    self.block(body);
                    self.names.pop();
                }
                Stmt::Unroll { var, count, body } => {
                    self.names.push(var.clone());
                    for value in 0..i64::from(*count) {
                        self.unrolled.insert(var.clone(), value);
                        self.block(body);
                    }
                    self.unrolled.remove(var);
                    self.names.pop();
                }
                Stmt::If { cond, then, otherwise } => {
                    let mut by_thread = false;
                    for side in [&cond.lhs, &cond.rhs] {
                        side.for_each_symbol(&mut |s| by_thread |= &**s == THREAD);
                    }
                    if self.role.is_none() {
                        self.names.push(THREAD.into());
                    }
                    self.known(stmt, &cond.lhs);
                    self.known(stmt, &cond.rhs);
                    if self.role.is_none() {
                        self.names.pop();
                    }
                    let whole = self.whole;
                    self.whole &= !by_thread;
                    self.block(then);
                    self.block(otherwise);
                    self.whole = whole;
                }
                Stmt::Once(body) => {
                    let once = std::mem::replace(&mut self.once, true);
                    self.block(body);
                    self.once = once;
                }
                _ => self.simple(stmt),
            }
        }
        self.names.truncate(names);
    }

    fn has_param(&mut self, stmt: &Stmt, param: ParamId) -> bool {
        let exists = self.program.params.get(param).is_some();
        self.step(stmt, exists, "the tensor does not exist");
        exists
    }
}

/// Every step of a block, those inside of others included.
fn walk<'a>(block: &'a [Stmt], visit: &mut dyn FnMut(&'a Stmt)) {
    for stmt in block {
        visit(stmt);
        match stmt {
            Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => {
                walk(body, visit);
            }
            Stmt::If { then, otherwise, .. } => {
                walk(then, visit);
                walk(otherwise, visit);
            }
            _ => {}
        }
    }
}
