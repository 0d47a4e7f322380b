//! Which registers a tile needs: the whole plane, one value per row, or one per column.
//!
//! A tile has what its axes say, and more where it must: the result of a map has a column for each column of any
//! operand, and all tiles of a carried value are alike.

use crate::axes::{Direction, Directions};
use tilewright_device::Extent;
use tilewright_tile::{Block, Kernel, Stmt, TileId, TileOp};

/// Extents of all tiles.
pub(crate) struct Extents {
    of: Vec<Extent>,
}

/// What has the rows and the columns of both.
fn join(a: Extent, b: Extent) -> Extent {
    if a == b { a } else { Extent::Tile }
}

impl Extents {
    /// Works them out; with a single row, columns alone are the whole plane.
    pub(crate) fn new(kernel: &Kernel, directions: &Directions, rows: u32) -> Extents {
        let natural = |tile: TileId| {
            let has = |d| directions.axis(tile, d).is_some();
            match (has(Direction::Row), has(Direction::Col)) {
                (true, true) => Extent::Tile,
                (false, true) if rows == 1 => Extent::Tile,
                (false, true) => Extent::PerCol,
                (_, false) => Extent::PerRow,
            }
        };
        let mut extents =
            Extents { of: kernel.values.iter().map(|(tile, _)| natural(tile)).collect() };
        while extents.block(directions, &kernel.body) {}
        extents
    }

    /// The extent of a tile.
    pub(crate) fn of(&self, tile: TileId) -> Extent {
        self.of[tile.index()]
    }

    /// Makes a tile at least as large; whether that changed it.
    fn grow(&mut self, tile: TileId, by: Extent) -> bool {
        let old = self.of[tile.index()];
        self.of[tile.index()] = join(old, by);
        self.of[tile.index()] != old
    }

    fn put(&mut self, tile: TileId, extent: Extent) -> bool {
        std::mem::replace(&mut self.of[tile.index()], extent) != extent
    }

    fn block(&mut self, directions: &Directions, block: &Block) -> bool {
        let mut changed = false;
        for stmt in &block.stmts {
            match stmt {
                Stmt::Let(id, op) => changed |= self.operation(directions, *id, op),
                Stmt::Store { .. } | Stmt::AtomicAdd { .. } => {}
                Stmt::For(f) => {
                    for (i, (inner, init)) in f.carry.iter().enumerate() {
                        let all = [*inner, *init, f.yields[i], f.results[i]];
                        let most = all.iter().map(|t| self.of(*t)).reduce(join);
                        for tile in [*inner, f.results[i]] {
                            changed |= most.is_some_and(|most| self.grow(tile, most));
                        }
                    }
                    changed |= self.block(directions, &f.body);
                }
                Stmt::If(f) => {
                    changed |= self.block(directions, &f.then);
                    changed |= self.block(directions, &f.otherwise);
                    for (i, result) in f.results.iter().enumerate() {
                        for from in [f.then_yields[i], f.otherwise_yields[i]] {
                            changed |= self.grow(*result, self.of(from));
                        }
                    }
                }
            }
        }
        changed
    }

    fn operation(&mut self, directions: &Directions, id: TileId, op: &TileOp) -> bool {
        match op {
            TileOp::Map { args, .. } => {
                args.iter().fold(false, |c, a| self.grow(id, self.of(a.tile)) || c)
            }
            TileOp::Broadcast(arg) => self.grow(id, self.of(arg.tile)),
            TileOp::Gather { rows, .. } => self.grow(id, self.of(*rows)),
            TileOp::Permute { x, .. } | TileOp::Reshape(x) => self.put(id, self.of(*x)),
            TileOp::Reduce { x, axis, .. } => match directions.of(*x)[*axis] {
                None => self.put(id, self.of(*x)),
                Some(Direction::Col) => self.put(id, Extent::PerRow),
                Some(Direction::Row) => self.put(id, Extent::PerCol),
            },
            TileOp::ArgReduce { .. } => self.put(id, Extent::PerRow),
            TileOp::Scan { x, axis, .. } => match directions.of(*x)[*axis] {
                None => self.put(id, self.of(*x)),
                Some(_) => self.put(id, Extent::Tile),
            },
            TileOp::Full(_)
            | TileOp::Load { .. }
            | TileOp::Iota { .. }
            | TileOp::Random { .. }
            | TileOp::Mma { .. } => false,
        }
    }
}
