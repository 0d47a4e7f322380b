//! Which axes of tiles are rows and which are columns.
//!
//! Threads see every tile as part of one plane of rows and columns: a thread holds runs of columns of
//! some rows. Tile programs know only axes. Axes that an operation sets side by side are the same
//! direction (a union), two long axes of one tile are different directions (an edge), and so each
//! connected part of the program has two directions. What is reduced runs along columns, unless what is read
//! of it is contiguous across the sums: then the sums run along columns. Where nothing is reduced, the axis that
//! is contiguous in memory does.

use tilewright_base::{Error, Result};
use tilewright_tile::{Block, Kernel, ParamId, Stmt, TileId, TileOp};

/// Direction of a tile's axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Different rows.
    Row,
    /// Along a row.
    Col,
}

impl Direction {
    fn other(self) -> Direction {
        match self {
            Direction::Row => Direction::Col,
            Direction::Col => Direction::Row,
        }
    }
}

/// Directions of all axes of all tiles.
#[derive(Clone, Debug)]
pub(crate) struct Directions {
    /// Per tile and axis; `None` for axes of extent 1.
    of: Vec<Vec<Option<Direction>>>,
    /// Something is reduced.
    pub(crate) reduces: bool,
}

impl Directions {
    /// The directions of a tile's axes.
    pub(crate) fn of(&self, tile: TileId) -> &[Option<Direction>] {
        &self.of[tile.index()]
    }

    /// The axis of a tile with this direction.
    pub(crate) fn axis(&self, tile: TileId, direction: Direction) -> Option<usize> {
        self.of(tile).iter().position(|d| *d == Some(direction))
    }
}

struct Classes {
    first: Vec<usize>,
    parent: Vec<usize>,
    reduced: Vec<usize>,
    /// Axes that are contiguous in memory: of stores, then of loads.
    near: [Vec<usize>; 2],
    /// Those of loads of two long axes.
    planes: Vec<usize>,
}

impl Classes {
    fn id(&self, tile: TileId, axis: usize) -> usize {
        self.first[tile.index()] + axis
    }

    fn find(&self, mut x: usize) -> usize {
        while self.parent[x] != x {
            x = self.parent[x];
        }
        x
    }

    fn union(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.parent[a.max(b)] = a.min(b);
    }

    fn same(&mut self, kernel: &Kernel, a: TileId, b: TileId) {
        for axis in 0..kernel.ty(a).shape.len().min(kernel.ty(b).shape.len()) {
            self.union(self.id(a, axis), self.id(b, axis));
        }
    }

    fn memory(&mut self, kernel: &Kernel, param: ParamId, tile: TileId, load: usize) {
        let axes = &kernel.params[param].layout.axes;
        let plane = load == 1 && long_axes(kernel, tile).len() == 2;
        for (axis, extent) in kernel.ty(tile).shape.iter().enumerate() {
            if axes.get(axis).is_some_and(|a| a.stride.is(1)) && !extent.is(1) {
                let id = self.id(tile, axis);
                self.near[load].push(id);
                if plane {
                    self.planes.push(id);
                }
            }
        }
    }

    fn block(&mut self, kernel: &Kernel, block: &Block) {
        for stmt in &block.stmts {
            match stmt {
                Stmt::Let(id, op) => self.operation(kernel, *id, op),
                Stmt::Store { param, value, .. } | Stmt::AtomicAdd { param, value, .. } => {
                    self.memory(kernel, *param, *value, 0);
                }
                Stmt::For(f) => {
                    self.block(kernel, &f.body);
                    for (i, (inner, init)) in f.carry.iter().enumerate() {
                        for other in [*init, f.yields[i], f.results[i]] {
                            self.same(kernel, *inner, other);
                        }
                    }
                }
                Stmt::If(f) => {
                    self.block(kernel, &f.then);
                    self.block(kernel, &f.otherwise);
                    for (i, result) in f.results.iter().enumerate() {
                        self.same(kernel, *result, f.then_yields[i]);
                        self.same(kernel, *result, f.otherwise_yields[i]);
                    }
                }
            }
        }
    }

    fn along(&mut self, kernel: &Kernel, from: TileId, along: &[usize], to: TileId) {
        for (axis, target) in along.iter().enumerate() {
            if !kernel.ty(from).shape[axis].is(1) {
                self.union(self.id(from, axis), self.id(to, *target));
            }
        }
    }

    fn operation(&mut self, kernel: &Kernel, id: TileId, op: &TileOp) {
        match op {
            TileOp::Load { param, .. } => self.memory(kernel, *param, id, 1),
            TileOp::Gather { param, axis, rows, .. } => {
                self.memory(kernel, *param, id, 1);
                self.union(self.id(id, *axis), self.id(*rows, 0));
            }
            TileOp::Map { args, .. } => {
                for arg in args {
                    self.along(kernel, arg.tile, &arg.along, id);
                }
            }
            TileOp::Broadcast(arg) => self.along(kernel, arg.tile, &arg.along, id),
            TileOp::Reduce { x, axis, .. } | TileOp::ArgReduce { x, axis, .. } => {
                let rank = kernel.ty(*x).shape.len();
                for (to, from) in (0..rank).filter(|a| a != axis).enumerate() {
                    self.union(self.id(*x, from), self.id(id, to));
                }
                self.reduced.push(self.id(*x, *axis));
            }
            TileOp::Scan { x, axis, .. } => {
                self.same(kernel, *x, id);
                self.reduced.push(self.id(*x, *axis));
            }
            TileOp::Permute { x, perm } => {
                for (to, from) in perm.iter().enumerate() {
                    self.union(self.id(*x, *from), self.id(id, to));
                }
            }
            TileOp::Reshape(x) => {
                for (from, to) in long_axes(kernel, *x).into_iter().zip(long_axes(kernel, id)) {
                    self.union(self.id(*x, from), self.id(id, to));
                }
            }
            TileOp::Full(_) | TileOp::Iota { .. } | TileOp::Random { .. } | TileOp::Mma { .. } => {}
        }
    }
}

/// The axes of a tile that have more than one element.
pub(crate) fn long_axes(kernel: &Kernel, tile: TileId) -> Vec<usize> {
    let shape = &kernel.ty(tile).shape;
    (0..shape.len()).filter(|a| !shape[*a].is(1)).collect()
}

/// Gives every axis its direction.
///
/// # Errors
/// Unsupported when a tile has more than two long axes, or an axis would need both directions.
pub(crate) fn directions(kernel: &Kernel) -> Result<Directions> {
    let mut first = Vec::new();
    let mut total = 0;
    for (_, info) in kernel.values.iter() {
        first.push(total);
        total += info.ty.shape.len();
    }
    let mut classes = Classes {
        first,
        parent: (0..total).collect(),
        reduced: Vec::new(),
        near: [Vec::new(), Vec::new()],
        planes: Vec::new(),
    };
    classes.block(kernel, &kernel.body);
    let mut edges: Vec<(usize, usize)> = Vec::new();
    let mut last: Vec<usize> = Vec::new();
    for (tile, info) in kernel.values.iter() {
        match long_axes(kernel, tile)[..] {
            [] => {}
            [a] => last.push(classes.find(classes.id(tile, a))),
            [a, b] => {
                let pair = (classes.find(classes.id(tile, a)), classes.find(classes.id(tile, b)));
                last.insert(0, pair.1);
                edges.push(pair);
            }
            _ => {
                return Err(Error::unsupported(format!(
                    "a tile {} with more than two long axes on a GPU",
                    info.ty
                )));
            }
        }
    }
    let mut colour: Vec<Option<Direction>> = vec![None; total];
    let reduced: Vec<usize> = classes.reduced.iter().map(|x| classes.find(*x)).collect();
    let [stored, loaded] =
        classes.near.clone().map(|v| v.into_iter().map(|x| classes.find(x)).collect::<Vec<_>>());
    // What is reduced and read across it: the other axis of its tiles runs along columns.
    let planes: Vec<usize> = classes.planes.iter().map(|x| classes.find(*x)).collect();
    let partner = |x: usize| {
        edges.iter().find_map(|(a, b)| match (*a == x, *b == x) {
            (true, false) => Some(*b),
            (false, true) => Some(*a),
            _ => None,
        })
    };
    let across = |x: usize| partner(x).filter(|y| planes.contains(y) && !planes.contains(&x));
    for reduced in &reduced {
        let (seed, direction) = match across(*reduced) {
            Some(other) => (other, Direction::Row),
            None => (*reduced, Direction::Col),
        };
        if colour[seed].is_none() {
            paint(&mut colour, &edges, seed)?;
        }
        if colour[*reduced] != Some(direction) {
            return Err(Error::unsupported("reductions along both axes of tiles in one program"));
        }
    }
    // Each list is only asked for parts of the program that the lists before left open.
    for seed in [&stored, &loaded, &last].into_iter().flatten() {
        if colour[*seed].is_none() {
            paint(&mut colour, &edges, *seed)?;
        }
    }
    let of = kernel
        .values
        .iter()
        .map(|(tile, info)| {
            (0..info.ty.shape.len())
                .map(|axis| {
                    let long = !info.ty.shape[axis].is(1);
                    long.then(|| colour[classes.find(classes.id(tile, axis))]).flatten()
                })
                .collect()
        })
        .collect();
    Ok(Directions { of, reduces: !reduced.is_empty() })
}

fn paint(colour: &mut [Option<Direction>], edges: &[(usize, usize)], seed: usize) -> Result<()> {
    colour[seed] = Some(Direction::Col);
    let mut work = vec![seed];
    while let Some(x) = work.pop() {
        let Some(mine) = colour[x] else { continue };
        for (a, b) in edges {
            let next = match (*a == x, *b == x) {
                (true, true) => {
                    return Err(Error::unsupported("a tile whose two axes run along each other"));
                }
                (true, _) => *b,
                (_, true) => *a,
                _ => continue,
            };
            match colour[next] {
                None => {
                    colour[next] = Some(mine.other());
                    work.push(next);
                }
                Some(d) if d == mine => {
                    return Err(Error::unsupported("tiles that need more than two directions"));
                }
                Some(_) => {}
            }
        }
    }
    Ok(())
}
