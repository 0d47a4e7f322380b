//! Steps that move a tile between global memory, shared memory and registers, where threads do it
//! themselves: loads and stores of fragments, asynchronous copies, staging through shared memory.
//!
//! Convention: as in `stmts.rs`. What the copy engine moves is one call there; fragments that are spread
//! in lines are in `lines.rs`.

use crate::lines::Access;
use crate::memory_type;
use crate::stmts::{Printer, constant};
use std::fmt::Write;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Extent, Frag, FragRef, SmemTile, Spread};
use tilewright_expr::Value;
use tilewright_layout::Dim;
use tilewright_tile::ParamId;

impl Printer<'_> {
    /// Threads copy a tile from global to shared memory without passing through registers.
    pub(crate) fn copy_in(
        &mut self,
        param: ParamId,
        at: &[Dim],
        axes: (usize, usize),
        to: &SmemTile,
        (vector, ends): (u32, bool),
    ) -> Result<()> {
        self.pointers.insert(param);
        let p = self.program.params[param].clone();
        let smem = self.program.smem[to.smem].clone();
        let threads = self.role.map_or(self.program.threads, |r| r.warps * 32);
        let along_cols = smem.contiguous == 1;
        let (line_axis, along_axis) = if along_cols { axes } else { (axes.1, axes.0) };
        let (lines, along) = if along_cols { (to.rows, to.cols) } else { (to.cols, to.rows) };
        let buffer_lines = if along_cols { smem.rows } else { smem.cols };
        let (line0, along0) = if along_cols { (&to.row, &to.col) } else { (&to.col, &to.row) };
        let mut fixed = self.scope.wide(&p.layout.offset);
        for (axis, coordinate) in at.iter().enumerate() {
            if axis != axes.0 && axis != axes.1 {
                let _ = write!(
                    fixed,
                    " + {} * {}",
                    self.scope.wide(coordinate),
                    self.scope.wide(&p.layout.axes[axis].stride)
                );
            }
        }
        let stride = |axis: usize| &p.layout.axes[axis].stride;
        // Contiguous across the tile's lines: groups of 8 lines and 4 elements of 4 bytes.
        if stride(line_axis).is(1)
            && !stride(along_axis).is(1)
            && p.dtype.bits() == 32
            && lines.is_multiple_of(8)
            && along.is_multiple_of(4)
        {
            let text = format!(
                "tw::copy_tile_turned<{}, {threads}, {lines}, {along}, {}, {buffer_lines}>({}, {}, {}, p_{} + {fixed}, {}, {}, {}, {}, {});",
                memory_type(p.dtype),
                smem.swizzle.span_bytes(),
                self.slot_address(to),
                self.scope.text(line0),
                self.scope.text(along0),
                p.name,
                self.scope.text(&at[line_axis]),
                self.scope.text(&at[along_axis]),
                self.scope.text(&p.layout.axes[line_axis].extent),
                self.scope.text(&p.layout.axes[along_axis].extent),
                self.scope.wide(stride(along_axis)),
            );
            self.line(&text);
            return Ok(());
        }
        let text = format!(
            "tw::copy_tile<{}, {vector}, {threads}, {lines}, {along}, {}, {buffer_lines}{}>({}, {}, {}, p_{} + {fixed}, {}, {}, {}, {}, {}, {});",
            memory_type(p.dtype),
            smem.swizzle.span_bytes(),
            if ends { ", true" } else { "" },
            self.slot_address(to),
            self.scope.text(line0),
            self.scope.text(along0),
            p.name,
            self.scope.text(&at[line_axis]),
            self.scope.text(&at[along_axis]),
            self.scope.text(&p.layout.axes[line_axis].extent),
            self.scope.text(&p.layout.axes[along_axis].extent),
            self.scope.wide(&p.layout.axes[line_axis].stride),
            self.scope.wide(&p.layout.axes[along_axis].stride),
        );
        self.line(&text);
        Ok(())
    }
    /// A load (with `fill`) or a store between a fragment and global memory.
    pub(crate) fn global(
        &mut self,
        frag_ref: &FragRef,
        param: ParamId,
        at: &[Dim],
        axes: (Option<usize>, Option<usize>),
        vector: u32,
        fill: Option<Value>,
    ) -> Result<()> {
        self.pointers.insert(param);
        let p = self.program.params[param].clone();
        let frag = self.program.frags[frag_ref.frag].clone();
        if matches!(frag.spread, Spread::Lines { .. }) {
            let access = Access { param, at, axes, steps: (1, 1), rows: None, vector };
            return self.global_lines(frag_ref, &access, fill);
        }
        let cols = self.cols(frag_ref);
        let spread = Self::spread(&frag, cols);
        let count = Self::count(&frag, cols);
        let ty = memory_type(p.dtype);
        let store = fill.is_none();
        let (row, col) = match frag.extent {
            Extent::Tile => ("row(i)", "col(i)"),
            Extent::PerRow => ("row_of(i)", "0"),
            Extent::PerCol => ("0", "col_of(i)"),
        };
        let mut wide_at = self.scope.wide(&p.layout.offset);
        let mut inside = Vec::new();
        let mut lets = Vec::new();
        for (axis, coordinate) in at.iter().enumerate() {
            let a = &p.layout.axes[axis];
            if a.block.is_some() {
                return Err(Error::unsupported(format!("{} has a blocked axis", p.name)));
            }
            let offset = if axes.0 == Some(axis) && frag.extent != Extent::PerCol {
                Some(row)
            } else if axes.1 == Some(axis) && frag.extent != Extent::PerRow {
                Some(col)
            } else {
                None
            };
            let name = format!("x{axis}");
            let value = match offset {
                Some(text) if text != "0" => {
                    format!("{} + {spread}::{text}", self.scope.text(coordinate))
                }
                _ => self.scope.text(coordinate),
            };
            lets.push(format!("const int {name} = {value};"));
            let _ = write!(wide_at, " + (tw::i64){name} * {}", self.scope.wide(&a.stride));
            if self.scope.bounds(coordinate).min < 0 {
                inside.push(format!("{name} >= 0"));
            }
            inside.push(format!("{name} < {}", self.scope.text(&a.extent)));
        }
        let vector = match frag.spread {
            Spread::Wgmma | Spread::MmaSync { .. } => vector.min(2),
            Spread::Lines { .. } => 1,
            Spread::Outer { block_n, .. } => vector.min(block_n),
        };
        let vector = if frag.extent == Extent::PerRow { 1 } else { vector.max(1) };
        // Neighbours in memory must not tie the sums of plain multiply-adds to neighbouring registers.
        let sums = matches!(frag.spread, Spread::Outer { .. }) && frag.dtype == DType::F32;
        let detach = store && vector > 1 && sums;
        // A store of a vector fragment is made by every thread that holds the element: same value.
        let registers = (0..vector)
            .map(|k| {
                let at = if k == 0 { "i".to_owned() } else { format!("i + {k}") };
                let register = self.register(frag_ref, &at)?;
                Ok(if detach { format!("tw::detached({register})") } else { register })
            })
            .collect::<Result<Vec<_>>>()?;
        self.line("#pragma unroll");
        self.line(&format!("for (int i = 0; i < {count}; i += {vector}) {{"));
        for text in lets {
            self.line(&format!("  {text}"));
        }
        self.line(&format!("  if ({}) {{", inside.join(" && ")));
        if store {
            if vector == 2 {
                self.line(&format!(
                    "    *reinterpret_cast<tw::Pair<{ty}>*>(p_{} + {wide_at}) = tw::narrow_pair<{ty}>({}, {});",
                    p.name, registers[0], registers[1]
                ));
            } else {
                let values: Vec<String> =
                    registers.iter().map(|r| format!("tw::narrow_to<{ty}>::from({r})")).collect();
                self.line(&format!(
                    "    tw::store_run<{ty}, {vector}>(p_{} + {wide_at}, tw::Run<{ty}, {vector}>{{{{{}}}}});",
                    p.name,
                    values.join(", ")
                ));
            }
            self.line("  }");
        } else {
            self.line(&format!(
                "    const tw::Run<{ty}, {vector}> run = tw::load_run<{ty}, {vector}>(p_{} + {wide_at});",
                p.name
            ));
            for (k, r) in registers.iter().enumerate() {
                self.line(&format!("    {r} = tw::widen(run.at[{k}]);"));
            }
            let value = constant(fill.unwrap_or(Value::Int(0)), frag.dtype);
            self.line("  } else {");
            for r in &registers {
                self.line(&format!("    {r} = {value};"));
            }
            self.line("  }");
        }
        self.line("}");
        Ok(())
    }

    /// Registers to a tile in shared memory.
    pub(crate) fn store_smem(&mut self, to: &SmemTile, src: &FragRef) -> Result<()> {
        let smem = self.program.smem[to.smem].clone();
        let frag = self.program.frags[src.frag].clone();
        let cols = self.cols(src);
        let register = self.register(src, "i")?;
        let span = smem.swizzle.span_bytes();
        let lines = if smem.contiguous == 1 { smem.rows } else { smem.cols };
        let (row, col) = (self.scope.text(&to.row), self.scope.text(&to.col));
        let slot = self.slot_address(to);
        let ty = memory_type(smem.dtype);
        match frag.spread {
            Spread::Wgmma if frag.extent == Extent::Tile => {
                let eights = smem.dtype.bits() == 16 && cols % 16 == 8 && cols > 8;
                self.line(&format!(
                    "tw::wgmma_to_smem{}<{ty}, {}, {cols}, {span}, {lines}, {}>({slot}, {row}, {col}, [&](int i) {{ return {register}; }});",
                    if eights { "_eights" } else { "" },
                    frag.rows,
                    smem.contiguous == 1
                ));
            }
            Spread::Outer { block_m: run @ 4, .. }
                if smem.contiguous == 0
                    && smem.dtype == DType::F32
                    && frag.extent == Extent::Tile =>
            {
                // Neighbouring rows lie in the thread's registers, a row of them apart.
                let spread = Self::spread(&frag, cols);
                let values = (0..run)
                    .map(|k| self.register(src, &format!("i + {k} * {spread}::CN")))
                    .collect::<Result<Vec<_>>>()?;
                self.line("#pragma unroll");
                self.line(&format!("for (int j = 0; j < {spread}::TILE / {run}; ++j) {{"));
                self.line(&format!(
                    "  const int i = j / {spread}::CN * ({run} * {spread}::CN) + j % {spread}::CN;"
                ));
                self.line(&format!(
                    "  tw::smem_store_run<{ty}, {run}>(tw::smem_at<4, {span}, {lines}>({slot}, {col} + {spread}::col(i), {row} + {spread}::row(i)), tw::Run<{ty}, {run}>{{{{{}}}}});",
                    values.join(", ")
                ));
                self.line("}");
            }
            _ => {
                let spread = Self::spread(&frag, cols);
                let size = smem.dtype.bits() / 8;
                let (line, along) = if smem.contiguous == 1 {
                    (format!("{row} + {spread}::row(i)"), format!("{col} + {spread}::col(i)"))
                } else {
                    (format!("{col} + {spread}::col(i)"), format!("{row} + {spread}::row(i)"))
                };
                let run = if smem.contiguous == 1 { neighbours(&frag, smem.dtype) } else { 1 };
                let values = (0..run)
                    .map(|k| {
                        Ok(format!(
                            "tw::narrow_to<{ty}>::from({})",
                            self.register(src, &format!("i + {k}"))?
                        ))
                    })
                    .collect::<Result<Vec<_>>>()?;
                self.line("#pragma unroll");
                self.line(&format!(
                    "for (int i = 0; i < {spread}::TILE; i += {run}) tw::smem_store_run<{ty}, {run}>(tw::smem_at<{size}, {span}, {lines}>({slot}, {line}, {along}), tw::Run<{ty}, {run}>{{{{{}}}}});",
                    values.join(", ")
                ));
            }
        }
        Ok(())
    }

    /// A tile in shared memory to registers.
    pub(crate) fn load_smem(&mut self, dst: &FragRef, from: &SmemTile) -> Result<()> {
        let smem = self.program.smem[from.smem].clone();
        let frag = self.program.frags[dst.frag].clone();
        let spread = Self::spread(&frag, self.cols(dst));
        let span = smem.swizzle.span_bytes();
        let lines = if smem.contiguous == 1 { smem.rows } else { smem.cols };
        let (row, col) = (self.scope.text(&from.row), self.scope.text(&from.col));
        let slot = self.slot_address(from);
        let size = smem.dtype.bits() / 8;
        let ty = memory_type(smem.dtype);
        let (r, c) = match frag.extent {
            Extent::Tile => {
                (format!("{row} + {spread}::row(i)"), format!("{col} + {spread}::col(i)"))
            }
            Extent::PerRow => (format!("{row} + {spread}::row_of(i)"), col),
            Extent::PerCol => (row, format!("{col} + {spread}::col_of(i)")),
        };
        let (line, along) = if smem.contiguous == 1 { (r, c) } else { (c, r) };
        let along_columns = smem.contiguous == 1 && frag.extent != Extent::PerRow;
        let run = if along_columns { neighbours(&frag, smem.dtype) } else { 1 };
        let count = Self::count(&frag, self.cols(dst));
        self.line("#pragma unroll");
        self.line(&format!("for (int i = 0; i < {count}; i += {run}) {{"));
        self.line(&format!(
            "  const tw::Run<{ty}, {run}> run = tw::smem_load_run<{ty}, {run}>(tw::smem_at<{size}, {span}, {lines}>({slot}, {line}, {along}));"
        ));
        for k in 0..run {
            let register = self.register(dst, &format!("i + {k}"))?;
            self.line(&format!("  {register} = tw::widen(run.at[{k}]);"));
        }
        self.line("}");
        Ok(())
    }
}

/// How many neighbouring columns one access to shared memory takes: those that neighbouring registers
/// hold, 4 to 16 bytes of them, or one element.
fn neighbours(frag: &Frag, dtype: DType) -> u32 {
    let held = match frag.spread {
        Spread::Wgmma | Spread::MmaSync { .. } => 2,
        Spread::Lines { vector, .. } => vector,
        Spread::Outer { block_n, .. } => block_n,
    };
    let size = dtype.bits() / 8;
    (1..=held.min(16 / size))
        .rev()
        .find(|run| held.is_multiple_of(*run) && (run * size).is_power_of_two() && run * size >= 4)
        .unwrap_or(1)
}
