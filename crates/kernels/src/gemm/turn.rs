//! Heads of a product's result that turn: rotary positions of queries and keys, behind the product that makes them.
//!
//! ```text
//! C[m, h * width + i], C[m, h * width + width / 2 + i] = f, g (both of them as the epilogue leaves them, tables[m % rows, i])     h < heads
//! ```
//!
//! A schedule whose tiles are whole heads turns them in its registers, where lines of tables do not begin again within a tile. Products that are run
//! another way leave their result in the workspace, and a kernel behind them turns it.

use crate::gemm::plan::{EXTRA_LAUNCH_US, Place, Workspace, aligned_elements, lines, sizes};
use crate::gemm::problem::Problem;
use crate::gemm::program::{Order, matrix};
use tilewright_base::{DType, Result};
use tilewright_device::Arch;
use tilewright_expr::Func;
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_lower_gpu::GpuSchedule;
use tilewright_target::Gpu;
use tilewright_tile::{Access, Kernel, KernelBuilder, ParamId, TileId, Turn};

/// Tile size of a program that turns heads: heads in a tile.
pub(super) const TILE_HEADS: &str = "BH";
/// Bytes of a line of the chunks in which a tile leaves: heads do not go across.
const CHUNK_BYTES: i64 = 128;
/// Size symbol: lines of the tables.
pub(super) const TABLE_LINES: &str = "T";

/// Which heads of a result turn, and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Turned {
    /// Columns of a head; even.
    pub width: i64,
    /// How many turn: the first ones of a line. The others stay as they are.
    pub heads: i64,
    /// From elements of the result in both halves, and of each table, to the new ones.
    pub halves: [Func; 2],
    /// Types of the tables, `[rows, width / 2]` each, dense.
    pub tables: Vec<DType>,
    /// Their lines: where there are fewer than of the result, they begin again.
    pub rows: i64,
}

impl Turned {
    /// Text for keys of records.
    pub(super) fn text(&self) -> String {
        let [f, g] = &self.halves;
        let Turned { width, heads, tables, rows, .. } = self;
        format!(" turns {heads} of {width} by {tables:?} of {rows}: {f}, {g}")
    }

    /// Whether tiles of so many rows and columns are whole heads, with tables that do not begin again within.
    pub(super) fn fits(&self, problem: &Problem, (bm, bn): (i64, i64)) -> bool {
        let whole = self.width % 32 == 0 && self.width * problem.result_bytes() <= CHUNK_BYTES;
        whole && bn % self.width == 0 && (self.rows >= problem.m || self.rows % bm == 0)
    }

    /// Declares the tables.
    pub(super) fn declare(&self, k: &mut KernelBuilder) -> Vec<ParamId> {
        let layout = Layout::row_major(&[Dim::sym(TABLE_LINES), Dim::new(self.width / 2)]);
        let types = self.tables.iter().enumerate();
        types.map(|(i, t)| k.param(&format!("T{i}"), *t, layout.clone(), Access::In)).collect()
    }

    /// Turns a tile of rows from `row0` and heads from `head0` on.
    pub(super) fn turn(
        &self,
        k: &mut KernelBuilder,
        tables: &[ParamId],
        tile: TileId,
        (row0, head0): (&Dim, Dim),
        (rows, heads): (&Dim, &Dim),
    ) -> TileId {
        let at = vec![row0.modulo(&Dim::sym(TABLE_LINES)), Dim::new(0)];
        let shape = vec![rows.clone(), Dim::new(self.width / 2)];
        let tables = tables.iter().map(|t| k.load(*t, at.clone(), shape.clone())).collect();
        let first = head0 - &Dim::new(self.heads);
        let halves = self.halves.clone();
        k.turn(&Turn { tile, width: self.width, first, halves, tables }, rows, heads)
    }

    /// Instructions of a thread per element of the result, loads of the tables among them.
    pub(super) fn instructions(&self) -> i64 {
        super::model::instructions(&self.halves[0]) + self.tables.len() as i64
    }
}

/// Gives a schedule the tile size that programs with turned heads have.
pub(super) fn with_heads(turned: &Turned, mut schedule: GpuSchedule) -> GpuSchedule {
    let bn = schedule.tiles.get("BN").copied().unwrap_or(turned.width);
    schedule.tiles.insert(TILE_HEADS.into(), bn / turned.width);
    schedule
}

/// Turns a result that another kernel stored: `X [M, N]` dense, to `C`. Tile sizes `BR` (lines) and, for each half, `BC`.
fn turn_program(turned: &Turned, result: DType) -> Kernel {
    let mut k = KernelBuilder::new("turn_heads");
    for size in ["M", "H", "ldx", "ldc", TABLE_LINES] {
        k.symbol(Symbol { name: size.into(), range: Range { min: 1, max: i32::MAX.into() } });
    }
    let br = k.tile("BR");
    let half = turned.width / 2;
    let layout = |leading: &str| {
        let mut layout = matrix("M", "H", Order::Row, leading, None);
        let columns = |extent: i64, stride: i64| tilewright_layout::Axis {
            extent: Dim::new(extent),
            stride: Dim::new(stride),
            block: None,
        };
        layout.axes[1].stride = Dim::new(turned.width);
        layout.axes.extend([columns(2, half), columns(half, 1)]);
        layout
    };
    let x = k.param("X", result, layout("ldx"), Access::In);
    let tables = turned.declare(&mut k);
    let c = k.param("C", result, layout("ldc"), Access::Out);
    let head = k.grid("head", Dim::sym("H"));
    let row0 = k.grid("pm", Dim::sym("M").ceil_div(&br)) * &br;
    // One line after the other where tables may begin again.
    let flat = vec![br.clone(), Dim::new(half)];
    let side = |side: i64| vec![row0.clone(), head.clone(), Dim::new(side), Dim::new(0)];
    let four = vec![br.clone(), Dim::new(1), Dim::new(1), Dim::new(half)];
    let old = [0, 1].map(|s| {
        let t = k.load(x, side(s), four.clone());
        k.reshape(t, flat.clone())
    });
    let lines = k.iota(DType::I64, 0, row0.clone(), vec![br.clone()]);
    let around = k.iota(DType::I64, 0, Dim::sym(TABLE_LINES), vec![Dim::new(1)]);
    let args = vec![k.plain(lines), k.plain(around)];
    let lines = k.map(Func::binary(tilewright_expr::Op::Rem, DType::I64), args, vec![br.clone()]);
    let mut args = old.map(|t| k.plain(t)).to_vec();
    for table in tables {
        let t = k.gather(table, 0, lines, vec![Dim::new(0), Dim::new(0)], flat.clone());
        args.push(k.plain(t));
    }
    let number = k.iota(DType::I64, 0, head.clone() - &Dim::new(turned.heads), vec![Dim::new(1)]);
    for (s, func) in turned.halves.iter().enumerate() {
        let new = k.map(func.clone(), args.clone(), flat.clone());
        let args = vec![k.plain(number), k.plain(new), k.plain(old[s])];
        let new = k.map(first_if_below_zero(result), args, flat.clone());
        let new = k.reshape(new, four.clone());
        k.store(c, side(s as i64), new);
    }
    k.finish()
}

fn first_if_below_zero(dtype: DType) -> Func {
    let mut f = tilewright_expr::FuncBuilder::new();
    let number = f.param("number", DType::I64);
    let [x, y] = ["x", "y"].map(|name| f.param(name, dtype));
    let zero = f.constant_int(0, DType::I64);
    let below = f.op(tilewright_expr::Op::Lt, &[number, zero]);
    let y = f.op(tilewright_expr::Op::Select, &[below, x, y]);
    f.finish(y)
}

/// Adds the kernel that turns what a candidate without it leaves.
pub(super) fn behind(
    problem: &Problem,
    turned: &Turned,
    gpu: &Gpu,
    candidate: &mut crate::gemm::plan::Candidate,
) -> Result<()> {
    let arch = Arch::of_capability(gpu.capability);
    let size = problem.result_bytes();
    let mut workspace = Workspace { bytes: candidate.workspace_bytes.next_multiple_of(256) };
    let whole = workspace.take(problem.m * problem.leading.2 * size);
    for place in candidate.steps.iter_mut().flat_map(|s| &mut s.operands) {
        if *place == Place::C {
            *place = whole;
        }
    }
    candidate.workspace_bytes = workspace.bytes;
    let values = sizes(&[
        ("M", problem.m),
        ("H", problem.n / turned.width),
        ("ldx", problem.leading.2),
        ("ldc", problem.leading.2),
        (TABLE_LINES, turned.rows),
    ]);
    let mut operands = vec![whole];
    operands.extend((0..turned.tables.len()).map(Place::Table));
    operands.push(Place::C);
    let aligned = aligned_elements(problem.align.2, size);
    let kernel = turn_program(turned, problem.result);
    candidate.steps.push(lines(arch, kernel, values, operands, aligned)?);
    let bytes = (2 * problem.m * problem.n * size) as f64;
    candidate.estimate_us += bytes / gpu.copy_bytes_per_s * 1e6 + EXTRA_LAUNCH_US;
    Ok(())
}
