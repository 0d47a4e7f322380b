//! Which item of work is which block of the grid.
//!
//! Items are numbered `0..items`. The last two axes of the grid are walked as a raster: groups of
//! `raster` cluster rows, column by column within a group, so that the operands of neighbours in time
//! are shared in the cache. Axes before them run outermost. A cluster covers neighbouring tiles along
//! one of the two, or a matrix of tiles whose blocks are numbered row by row.

use crate::schedule::GpuSchedule;
use std::sync::Arc;
use tilewright_device::{CTA, Stmt};
use tilewright_layout::Dim;
use tilewright_tile::Kernel;

/// The number of items, and steps that name the grid indices of item `item`.
pub(crate) fn raster(kernel: &Kernel, schedule: &GpuSchedule, item: &Dim) -> (Dim, Vec<Stmt>) {
    let mut steps = Vec::new();
    let cluster = Dim::new(i64::from(schedule.cluster));
    let rank = kernel.grid.len();
    let name = |s: &str| -> Arc<str> { Arc::from(s) };
    let mut bind = |n: Arc<str>, value: Dim| {
        steps.push(Stmt::Let { name: n.clone(), value });
        Dim::sym(n)
    };
    if rank == 0 {
        return (Dim::new(1), steps);
    }
    if rank == 1 {
        let axis = &kernel.grid[0];
        let clusters = axis.extent.ceil_div(&cluster);
        let index = item.clone() * &cluster + Dim::sym(CTA);
        bind(axis.name.clone(), if schedule.cluster == 1 { item.clone() } else { index });
        return (clusters, steps);
    }
    let (rows, cols) = (&kernel.grid[rank - 2], &kernel.grid[rank - 1]);
    let (high, wide) = schedule.cluster_tiles();
    let per = |extent: &Dim, tiles: u32| match tiles {
        1 => extent.clone(),
        _ => extent.ceil_div(&Dim::new(i64::from(tiles))),
    };
    let tiles_m = per(&rows.extent, high);
    let tiles_n = per(&cols.extent, wide);
    let plane = tiles_m.clone() * &tiles_n;
    let mut items = plane.clone();
    let rest = if rank > 2 {
        let tiles_m = bind(name("tiles_m"), tiles_m.clone());
        let tiles_n = bind(name("tiles_n"), tiles_n.clone());
        let plane = bind(name("plane"), tiles_m * &tiles_n);
        let mut outer = bind(name("outer"), item.floor_div(&plane));
        for (i, axis) in kernel.grid[..rank - 2].iter().enumerate().rev() {
            items = items * &axis.extent;
            if i == 0 {
                bind(axis.name.clone(), outer.clone());
            } else {
                bind(axis.name.clone(), outer.modulo(&axis.extent));
                outer = bind(name(&format!("outer{i}")), outer.floor_div(&axis.extent));
            }
        }
        bind(name("rest"), item.modulo(&plane))
    } else {
        item.clone()
    };
    let width = Dim::new(i64::from(wide));
    let (row, column) = match (high, wide) {
        (1, _) | (_, 1) => (Dim::sym(CTA), Dim::sym(CTA)),
        _ => (Dim::sym(CTA).floor_div(&width), Dim::sym(CTA).modulo(&width)),
    };
    let spread = |index: Dim, tiles: u32, own: &Dim| match tiles {
        1 => index,
        _ => index * &Dim::new(i64::from(tiles)) + own,
    };
    if schedule.raster <= 1 {
        // Row by row: two divisions fewer, which each item would wait for.
        let tiles_n_now = bind(name("raster_cols"), tiles_n);
        let m = bind(name("cluster_m"), rest.floor_div(&tiles_n_now));
        let n = bind(name("cluster_n"), rest.modulo(&tiles_n_now));
        bind(rows.name.clone(), spread(m, high, &row));
        bind(cols.name.clone(), spread(n, wide, &column));
        return (items, steps);
    }
    let group = Dim::new(i64::from(schedule.raster));
    let tiles_m_now = bind(name("raster_rows"), tiles_m);
    let tiles_n_now = bind(name("raster_cols"), tiles_n);
    let span = bind(name("raster_span"), group.clone() * &tiles_n_now);
    let first = bind(name("raster_first"), rest.floor_div(&span) * &group);
    let size = bind(name("raster_size"), (tiles_m_now - &first).min_with(&group));
    let inside = bind(name("raster_inside"), rest.modulo(&span));
    let m = bind(name("cluster_m"), first + inside.modulo(&size));
    let n = bind(name("cluster_n"), inside.floor_div(&size));
    bind(rows.name.clone(), spread(m, high, &row));
    bind(cols.name.clone(), spread(n, wide, &column));
    (items, steps)
}
