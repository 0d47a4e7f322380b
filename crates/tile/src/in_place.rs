//! Whether a kernel's result may lie in the memory of one of its operands.
//!
//! Tiles are values, but back ends compute them late: a load runs where its elements are used, or
//! anywhere between its definition and there. So a store over the loaded memory is harmless only when
//! nothing that runs later, in this block or in another, reads what it overwrote. [`may_overwrite`]
//! proves that from the program:
//!
//! * Both parameters have one type and one layout, so that equal coordinates are one place.
//! * **Other blocks**: along some axes the store starts at `g * T`, with `g` a grid index and `T` the
//!   tile's extent there, and every grid index has such an axis. Every load of the operand has the
//!   same start and extent along those axes: a block reads only what it writes itself.
//! * **Earlier values**: a reduction, scan, product, carried tile or store takes the values of its
//!   operands where it stands. What stands before the store (and, when the store is in a loop, before
//!   the outermost one) has been computed.
//! * **At the store**, and anywhere in the loops around it, the operand is read only at the
//!   coordinates that are stored, element by element: through maps, and through reshapes and
//!   broadcasts that only add or drop axes of extent 1. Loops around the store move it, by whole
//!   tiles.
//! * **After the store** nobody reads the operand.
//! * In a kernel with products the store may run early, piece by piece: there nothing but the
//!   store reads the operand.
//!
//! What does not have this form is refused, though it may be harmless.

use crate::ir::{Block, Kernel, Operand, ParamId, Stmt, TileId, TileOp};
use std::collections::BTreeMap;
use tilewright_layout::Dim;

/// How a tile, computed late, depends on the operand's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    /// Each element only on the element that the store puts in its place.
    Same,
    /// On others, too.
    Other,
}

/// Where a statement stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zone {
    Before,
    /// In the loops and branches around the store, before it.
    Around,
    After,
}

struct Proof<'k> {
    kernel: &'k Kernel,
    input: ParamId,
    output: ParamId,
    /// The only store of the output.
    index: &'k [Dim],
    shape: &'k [Dim],
    /// The axes that tell blocks apart.
    apart: Vec<usize>,
    reads: BTreeMap<TileId, Reads>,
    zone: Zone,
    /// How often something took values that depend on the operand.
    taken: u32,
}

/// True when `output` may have the memory of `input`: see the head of this file. The kernel must be
/// well-formed, and the operand's memory must be of no further use afterwards.
pub fn may_overwrite(kernel: &Kernel, input: ParamId, output: ParamId) -> bool {
    let (from, to) = (&kernel.params[input], &kernel.params[output]);
    let same = from.dtype == to.dtype && from.dtype.bits() >= 8 && from.layout == to.layout;
    let roles = (from.access, to.access) == (crate::Access::In, crate::Access::Out);
    if !same || !roles || input == output {
        return false;
    }
    let mut stores = Vec::new();
    find_stores(&kernel.body, output, &mut Vec::new(), &mut stores);
    let [(index, value, loops)] = stores.as_slice() else { return false };
    let shape = kernel.ty(*value).shape.as_slice();
    let moved_by =
        |name: &str| (0..shape.len()).rfind(move |&d| index[d] == Dim::sym(name) * &shape[d]);
    // Each index of the grid and of the loops around moves the store by whole tiles.
    let mut apart = Vec::new();
    for axis in kernel.grid.iter().filter(|axis| !axis.extent.is(1)) {
        match moved_by(&axis.name) {
            Some(d) => apart.push(d),
            None => return false,
        }
    }
    if loops.iter().any(|name| moved_by(name).is_none()) {
        return false;
    }
    let mut proof = Proof {
        kernel,
        input,
        output,
        index,
        shape,
        apart,
        reads: BTreeMap::new(),
        zone: Zone::Before,
        taken: 0,
    };
    proof.block(&kernel.body) && (proof.taken == 1 || !has_product(&kernel.body))
}

/// Every store to `param`: where, what, and the variables of the loops around it. An atomic
/// addition counts twice, so that it is never the only store.
fn find_stores<'k>(
    block: &'k Block,
    param: ParamId,
    loops: &mut Vec<&'k str>,
    found: &mut Vec<(&'k [Dim], TileId, Vec<&'k str>)>,
) {
    for stmt in &block.stmts {
        match stmt {
            Stmt::Store { param: p, index, value } if *p == param => {
                found.push((index, *value, loops.clone()));
            }
            Stmt::AtomicAdd { param: p, index, value } if *p == param => {
                found.extend([(&**index, *value, vec![]), (&**index, *value, vec![])]);
            }
            Stmt::For(f) => {
                loops.push(&f.var);
                find_stores(&f.body, param, loops, found);
                loops.pop();
            }
            Stmt::If(i) => {
                find_stores(&i.then, param, loops, found);
                find_stores(&i.otherwise, param, loops, found);
            }
            _ => {}
        }
    }
}

fn has_product(block: &Block) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        Stmt::Let(_, op) => matches!(op, TileOp::Mma { .. }),
        Stmt::For(f) => has_product(&f.body),
        Stmt::If(i) => has_product(&i.then) || has_product(&i.otherwise),
        _ => false,
    })
}

/// Extents other than 1, in order.
fn squeezed(shape: &[Dim]) -> Vec<&Dim> {
    shape.iter().filter(|d| !d.is(1)).collect()
}

impl Proof<'_> {
    fn holds_store(&self, stmt: &Stmt) -> bool {
        let inside = |b: &Block| b.stmts.iter().any(|s| self.holds_store(s));
        match stmt {
            Stmt::Store { param, .. } => *param == self.output,
            Stmt::For(f) => inside(&f.body),
            Stmt::If(i) => inside(&i.then) || inside(&i.otherwise),
            _ => false,
        }
    }

    /// Something takes the tile's values here; false when the operand may be overwritten by then.
    fn take(&mut self, tile: TileId) -> bool {
        let Some(reads) = self.reads.get(&tile) else { return true };
        self.taken += 1;
        match self.zone {
            Zone::Before => true,
            Zone::Around => *reads == Reads::Same,
            Zone::After => false,
        }
    }

    fn block(&mut self, block: &Block) -> bool {
        block.stmts.iter().all(|stmt| self.stmt(stmt))
    }

    fn stmt(&mut self, stmt: &Stmt) -> bool {
        let around = self.holds_store(stmt);
        if around {
            self.zone = Zone::Around;
        }
        match stmt {
            Stmt::Let(tile, op) => self.define(*tile, op),
            Stmt::Store { value, .. } | Stmt::AtomicAdd { value, .. } => {
                let fine = self.take(*value);
                if around {
                    self.zone = Zone::After;
                }
                fine
            }
            Stmt::For(f) => {
                // First values are taken here, or by the first product of the body.
                f.carry.iter().all(|(_, init)| self.take(*init))
                    && self.block(&f.body)
                    && f.yields.iter().all(|y| self.take(*y))
            }
            Stmt::If(i) => {
                let mut fine = true;
                let mut last = self.zone;
                for (block, yields) in
                    [(&i.then, &i.then_yields), (&i.otherwise, &i.otherwise_yields)]
                {
                    let zone = self.zone;
                    fine &= self.block(block) && yields.iter().all(|y| self.take(*y));
                    // Only one of the two runs.
                    if self.zone == Zone::After {
                        last = Zone::After;
                    }
                    self.zone = zone;
                }
                self.zone = last;
                fine
            }
        }
    }

    fn define(&mut self, tile: TileId, op: &TileOp) -> bool {
        let shape = &self.kernel.ty(tile).shape;
        let reads = match op {
            TileOp::Load { param, index, steps, .. } if *param == self.input => {
                let unit = steps.iter().all(|&s| s == 1);
                let equal = |d: usize| index[d] == self.index[d] && shape[d] == self.shape[d];
                if !unit || !self.apart.iter().all(|&d| equal(d)) {
                    return false;
                }
                Some(if (0..shape.len()).all(equal) { Reads::Same } else { Reads::Other })
            }
            TileOp::Gather { param, .. } if *param == self.input => return false,
            TileOp::Gather { rows, .. } => self.reads.get(rows).map(|_| Reads::Other),
            TileOp::Full(_) | TileOp::Load { .. } | TileOp::Iota { .. } | TileOp::Random { .. } => {
                None
            }
            TileOp::Map { args, .. } => {
                let all: Vec<Reads> = args.iter().filter_map(|a| self.along(a, shape)).collect();
                all.iter().copied().max_by_key(|r| *r == Reads::Other)
            }
            TileOp::Broadcast(x) => self.along(x, shape),
            TileOp::Reshape(x) => {
                self.kept(*x, squeezed(&self.kernel.ty(*x).shape) == squeezed(shape))
            }
            TileOp::Permute { x, perm } => {
                let from = &self.kernel.ty(*x).shape;
                let real: Vec<usize> = perm.iter().copied().filter(|&a| !from[a].is(1)).collect();
                self.kept(*x, real.is_sorted())
            }
            TileOp::Reduce { x, .. } | TileOp::ArgReduce { x, .. } | TileOp::Scan { x, .. } => {
                return self.take(*x);
            }
            TileOp::Mma { acc, a, b, .. } => {
                return [acc, a, b].into_iter().all(|t| self.take(*t));
            }
        };
        if let Some(reads) = reads {
            self.reads.insert(tile, reads);
        }
        true
    }

    /// What a tile reads whose elements are those of `x`, in order if `kept`.
    fn kept(&self, x: TileId, kept: bool) -> Option<Reads> {
        self.reads.get(&x).map(|&r| if kept { r } else { Reads::Other })
    }

    fn along(&self, operand: &Operand, shape: &[Dim]) -> Option<Reads> {
        let own = &self.kernel.ty(operand.tile).shape;
        self.kept(operand.tile, squeezed(own) == squeezed(shape))
    }
}
