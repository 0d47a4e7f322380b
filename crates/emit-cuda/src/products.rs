//! Sums of products: which planes in registers are products of others, so that sums of them can be multiply-adds.

use crate::walk::{stmt_names, visit};
use std::collections::{BTreeMap, BTreeSet};
use tilewright_base::DType;
use tilewright_device::{Extent, FragId, FragRef, Program, Spread, Stmt};
use tilewright_expr::{Func, Node, Op};
use tilewright_tile::ReduceKind;

/// The factors of each plane that is the product of two fragments.
#[derive(Debug, Default)]
pub(crate) struct Products(BTreeMap<FragId, [FragId; 2]>);

impl Products {
    /// The factors of a plane.
    pub(crate) fn of(&self, frag: FragId) -> Option<[FragId; 2]> {
        self.0.get(&frag).copied()
    }

    /// Bodies of steps start with nothing known.
    pub(crate) fn before(&mut self, stmt: &Stmt) {
        if has_body(stmt) {
            self.0.clear();
        }
    }

    /// Follows a step that was printed.
    pub(crate) fn after(&mut self, program: &Program, stmt: &Stmt) {
        match stmt {
            _ if has_body(stmt) => self.0.clear(),
            // They read planes, and write what has one value a row or column.
            Stmt::Store { .. } => {}
            Stmt::Reduce { dst, .. } => self.forget(&BTreeSet::from([dst.frag])),
            Stmt::Map { dst, func, args } => {
                self.forget(&BTreeSet::from([dst.frag]));
                if let Some(factors) = factors(program, dst, func, args)
                    && !factors.contains(&dst.frag)
                {
                    self.0.insert(dst.frag, factors);
                }
            }
            _ => {
                let mut named = BTreeSet::new();
                stmt_names(stmt, &mut BTreeSet::new(), &mut named);
                self.forget(&named);
            }
        }
    }

    fn forget(&mut self, frags: &BTreeSet<FragId>) {
        let known = |f: &FragId| frags.contains(f);
        self.0.retain(|of, factors| !known(of) && !factors.iter().any(known));
    }
}

/// Fragments that maps make and nothing reads, once sums of products read the factors: their maps are not printed.
pub(crate) fn unread(program: &Program) -> BTreeSet<FragId> {
    let mut unread = BTreeSet::new();
    loop {
        let mut reads = Reads {
            program,
            unread: &unread,
            products: Products::default(),
            read: BTreeSet::new(),
        };
        let roles = program.roles.iter().map(|r| &r.body);
        for body in roles.chain([&program.setup, &program.teardown]) {
            reads.follow(body);
        }
        let read = reads.read;
        let known = unread.len();
        let bodies = program.roles.iter().map(|r| &r.body);
        for body in bodies.chain([&program.setup, &program.teardown]) {
            visit(body, &mut |stmt| match stmt {
                Stmt::Map { dst, .. } if !read.contains(&dst.frag) => {
                    unread.insert(dst.frag);
                }
                _ => {}
            });
        }
        if unread.len() == known {
            return unread;
        }
    }
}

/// What is read by the steps that are printed, in their order.
struct Reads<'a> {
    program: &'a Program,
    unread: &'a BTreeSet<FragId>,
    products: Products,
    read: BTreeSet<FragId>,
}

impl Reads<'_> {
    fn follow(&mut self, stmts: &[Stmt]) {
        for stmt in stmts {
            self.products.before(stmt);
            match stmt {
                Stmt::Map { dst, .. } if self.unread.contains(&dst.frag) => {}
                Stmt::Map { args, .. } => self.read.extend(args.iter().map(|a| a.frag)),
                Stmt::Reduce { dst, src, kind: ReduceKind::Sum, .. }
                    if self.program.frags[dst.frag].extent == Extent::PerRow
                        && self.products.of(src.frag).is_some() =>
                {
                    self.read.insert(dst.frag);
                    self.read.extend(self.products.of(src.frag).into_iter().flatten());
                }
                _ => stmt_names(stmt, &mut BTreeSet::new(), &mut self.read),
            }
            match stmt {
                Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => {
                    self.follow(body);
                }
                Stmt::If { then, otherwise, .. } => {
                    self.follow(then);
                    self.follow(otherwise);
                }
                _ => {}
            }
            self.products.after(self.program, stmt);
        }
    }
}

fn has_body(stmt: &Stmt) -> bool {
    matches!(stmt, Stmt::For { .. } | Stmt::Unroll { .. } | Stmt::Once(_) | Stmt::If { .. })
}

/// The factors when a map is nothing but a product of two f32, on lines.
fn factors(program: &Program, dst: &FragRef, func: &Func, args: &[FragRef]) -> Option<[FragId; 2]> {
    let Node::Op(Op::Mul, of) = func.node(func.result()) else { return None };
    let Node::Param(a) = func.node(of[0]) else { return None };
    let Node::Param(b) = func.node(of[1]) else { return None };
    let frag = &program.frags[dst.frag];
    let fits = |r: &FragRef| {
        let f = &program.frags[r.frag];
        f.dtype == DType::F32
            && r.cols.is_none()
            && f.spread == frag.spread
            && (f.rows, f.cols) == (frag.rows, frag.cols)
    };
    let pair = [args.get(*a as usize)?, args.get(*b as usize)?];
    let plain = matches!(frag.spread, Spread::Lines { .. }) && frag.extent == Extent::Tile;
    (plain && fits(dst) && pair.iter().all(|r| fits(r))).then(|| pair.map(|r| r.frag))
}
