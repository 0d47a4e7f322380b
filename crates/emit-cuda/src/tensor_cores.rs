//! `wgmma` and `mma.sync`: which instruction, its descriptors, its operand walk.

use crate::stmts::Printer;
use std::fmt::Write;
use tilewright_base::{DType, Error, Result};
use tilewright_device::{Arch, Cond, FragRef, Smem, SmemTile, Spread, WgmmaA};

/// Types of one `wgmma`: `(operand, accumulator)` to PTX names, depth, and whether operands have
/// transpose bits. (PTX ISA, "wgmma.mma_async", tables of shapes and types.)
#[rustfmt::skip] // One row per instruction.
const WGMMA: &[(DType, DType, &str, u32, bool)] = &[
    (DType::BF16,   DType::F32, ".f32.bf16.bf16", 16, true),
    (DType::F16,    DType::F32, ".f32.f16.f16",   16, true),
    (DType::F32,    DType::F32, ".f32.tf32.tf32",  8, false),
    (DType::F8E4M3, DType::F32, ".f32.e4m3.e4m3", 32, false),
    (DType::F8E5M2, DType::F32, ".f32.e5m2.e5m2", 32, false),
    (DType::I8,     DType::I32, ".s32.s8.s8",     32, false),
    (DType::U8,     DType::I32, ".s32.u8.u8",     32, false),
];

/// Types of one `mma.sync`: operand, accumulator, and the first architecture that has it. (PTX ISA,
/// "mma", tables of shapes and types.)
#[rustfmt::skip] // One row per instruction.
const MMA: &[(DType, DType, Arch)] = &[
    (DType::BF16,   DType::F32, Arch::Sm80),
    (DType::F16,    DType::F32, Arch::Sm80),
    (DType::F32,    DType::F32, Arch::Sm80),
    (DType::I8,     DType::I32, Arch::Sm80),
    (DType::U8,     DType::I32, Arch::Sm80),
    (DType::F8E4M3, DType::F32, Arch::Sm89),
    (DType::F8E5M2, DType::F32, Arch::Sm89),
];

/// How an operand lies: its first byte for depth step `k` and the strides of its descriptor.
struct Walk {
    /// Address of the first element, an expression.
    base: String,
    /// Bytes from one depth step of the instruction to the next within a panel.
    step: u32,
    /// Depth steps in a panel, and bytes from panel to panel, when depth runs along panels.
    panel: Option<(u32, u32)>,
    /// Leading and stride byte offsets.
    leading: u32,
    stride: u32,
}

impl Printer<'_> {
    /// `depth_axis` is the axis of the tile along which the sum runs; `k` elements per instruction.
    fn walk(&self, tile: &SmemTile, depth_axis: usize, k: u32) -> Walk {
        let smem: &Smem = &self.program.smem[tile.smem];
        let size = smem.dtype.bits() / 8;
        let span = smem.swizzle.span_bytes();
        let slot = self.slot_address(tile);
        let depth_major = smem.contiguous == depth_axis;
        let (lines, other_dim, depth_dim) = if depth_axis == 1 {
            (if smem.contiguous == 1 { smem.rows } else { smem.cols }, &tile.row, &tile.col)
        } else {
            (if smem.contiguous == 1 { smem.rows } else { smem.cols }, &tile.col, &tile.row)
        };
        let other = self.scope.text(other_dim);
        let depth = self.scope.text(depth_dim);
        if depth_major {
            // Lines are the other axis; depth runs within the span, then from panel to panel.
            let per_panel = span / (k * size);
            let mut base = format!("{slot} + {other} * {span}");
            if depth != "0" {
                let _ = write!(
                    base,
                    " + ({depth} * {size} / {span}) * {} + {depth} * {size} % {span}",
                    lines * span
                );
            }
            Walk {
                base,
                step: k * size,
                panel: Some((per_panel, lines * span)),
                leading: 16,
                stride: 8 * span,
            }
        } else {
            // Lines are depth; the other axis runs within the span, then from panel to panel.
            let per_span = span / size;
            let base =
                format!("{slot} + ({other} / {per_span}) * {} + {depth} * {span}", lines * span);
            Walk { base, step: k * span, panel: None, leading: lines * span, stride: 8 * span }
        }
    }

    fn offset(walk: &Walk) -> String {
        match walk.panel {
            Some((per_panel, bytes)) if per_panel > 0 => {
                format!("(k / {per_panel} * {bytes} + k % {per_panel} * {}) / 16", walk.step)
            }
            _ => format!("k * {} / 16", walk.step),
        }
    }

    pub(crate) fn wgmma(
        &mut self,
        acc: &FragRef,
        a: &WgmmaA,
        b: &SmemTile,
        turned: bool,
        zero_if: Option<&Cond>,
    ) -> Result<()> {
        let frag = self.program.frags[acc.frag].clone();
        let b_smem = self.program.smem[b.smem].clone();
        let Some(&(_, _, types, k, has_transpose)) =
            WGMMA.iter().find(|row| row.0 == b_smem.dtype && row.1 == frag.dtype)
        else {
            return Err(Error::unsupported(format!(
                "wgmma of {} into {} has no instruction",
                b_smem.dtype, frag.dtype
            )));
        };
        let n = acc.cols.unwrap_or(frag.cols);
        let registers = n / 2;
        let span_b = b_smem.swizzle.span_bytes();
        let b_depth_axis = usize::from(turned);
        let b_transposed = u32::from(b_smem.contiguous != b_depth_axis);
        let (accumulator, bind) =
            if frag.dtype == DType::F32 { ("float", "TW_F") } else { ("int", "TW_I") };
        let integer = frag.dtype == DType::I32;
        let short = types.trim_start_matches('.').replace('.', "_");
        let blocks = frag.rows / 64;
        let keep = match zero_if {
            None => "1".to_owned(),
            Some(cond) => format!("(k > 0 || !({}))", self.cond(cond)),
        };
        let (acc_name, acc_col) = (self.frag_name(acc.frag), self.scope.text(&acc.col));
        let acc_at = |block: u32| {
            let start = format!("{} + {acc_col} / 2", block * frag.cols / 2);
            format!("*reinterpret_cast<{accumulator}(*)[{registers}]>(&{acc_name}[{start}])")
        };
        let walk_b = self.walk(b, b_depth_axis, k);
        let steps = if turned { b.cols } else { b.rows } / k;
        match a {
            WgmmaA::Smem(a) => {
                let a_smem = self.program.smem[a.smem].clone();
                let a_transposed = u32::from(a_smem.contiguous != 1);
                let span_a = a_smem.swizzle.span_bytes();
                let name = format!("wgmma_{short}_n{n}_t{a_transposed}{b_transposed}");
                let suffix = match (integer, has_transpose) {
                    (true, _) => String::new(),
                    (false, false) => ", 1, 1".to_owned(),
                    (false, true) => format!(", 1, 1, {a_transposed}, {b_transposed}"),
                };
                self.define(format!(
                    "TW_WGMMA_SS({name}, {registers}, \"m64n{n}k{k}\", \"{types}\", {accumulator}, {bind}, \"{suffix}\")"
                ));
                let walk_a = self.walk(a, 1, k);
                let block_bytes = if a_smem.contiguous == 1 {
                    64 * span_a
                } else {
                    64 * a_smem.dtype.bits() / 8 / span_a * a_smem.cols * span_a
                };
                self.line("{");
                self.line(&format!(
                    "  const tw::u64 a = tw::wgmma_descriptor<{span_a}>({}, {}, {});",
                    walk_a.base, walk_a.leading, walk_a.stride
                ));
                self.line(&format!(
                    "  const tw::u64 b = tw::wgmma_descriptor<{span_b}>({}, {}, {});",
                    walk_b.base, walk_b.leading, walk_b.stride
                ));
                self.line("#pragma unroll");
                self.line(&format!("  for (int k = 0; k < {steps}; ++k) {{"));
                for block in 0..blocks {
                    self.line(&format!(
                        "    {name}({}, a + ({} + {}), b + {}, {keep});",
                        acc_at(block),
                        Self::offset(&walk_a),
                        block * block_bytes / 16,
                        Self::offset(&walk_b),
                    ));
                }
                self.line("  }");
                self.line("}");
            }
            WgmmaA::Frag(a) => {
                let a_frag = self.program.frags[a.frag].clone();
                if a_frag.dtype.bits() != 16 {
                    return Err(Error::unsupported(format!(
                        "wgmma with A of {} in registers",
                        a_frag.dtype
                    )));
                }
                let name = format!("wgmma_{short}_n{n}_rs_t{b_transposed}");
                self.define(format!(
                    "TW_WGMMA_RS({name}, {registers}, \"m64n{n}k{k}\", \"{types}\", {accumulator}, {bind}, \", 1, 1, {b_transposed}\")"
                ));
                let pack = if a_frag.dtype == DType::BF16 { "tw::bf16" } else { "tw::f16" };
                let source = self.frag_name(a.frag);
                let first = self.scope.text(&a.col);
                self.line("{");
                self.line(&format!(
                    "  const tw::u64 b = tw::wgmma_descriptor<{span_b}>({}, {}, {});",
                    walk_b.base, walk_b.leading, walk_b.stride
                ));
                self.line("#pragma unroll");
                self.line(&format!("  for (int k = 0; k < {steps}; ++k) {{"));
                for block in 0..blocks {
                    // Accumulator registers 8k..8k+7 of 16 columns are the A fragment of one step.
                    let at = |i: u32| {
                        if self.packed.contains(&a.frag) {
                            let base = block * a_frag.cols / 4;
                            return format!("{source}[{base} + {first} / 4 + k * 4 + {i}]");
                        }
                        let base = format!(
                            "{block} * {} + {first} / 2 + k * 8 + {}",
                            a_frag.cols / 2,
                            i * 2
                        );
                        format!("tw::pack_pair<{pack}>({source}[{base}], {source}[{base} + 1])")
                    };
                    self.line(&format!(
                        "    const tw::u32 a{block}[4] = {{{}, {}, {}, {}}};",
                        at(0),
                        at(1),
                        at(2),
                        at(3)
                    ));
                    self.line(&format!(
                        "    {name}({}, a{block}, b + {}, {keep});",
                        acc_at(block),
                        Self::offset(&walk_b),
                    ));
                }
                self.line("  }");
                self.line("}");
            }
        }
        Ok(())
    }

    pub(crate) fn mma(
        &mut self,
        acc: &FragRef,
        a: &WgmmaA,
        b: &SmemTile,
        split: bool,
    ) -> Result<()> {
        let frag = self.program.frags[acc.frag].clone();
        let sb = self.program.smem[b.smem].clone();
        let left = match a {
            WgmmaA::Smem(a) => self.program.smem[a.smem].dtype,
            WgmmaA::Frag(a) => self.program.frags[a.frag].dtype,
        };
        if acc.cols.is_some_and(|cols| cols != frag.cols) {
            return Err(Error::unsupported("a product into part of its accumulators"));
        }
        let lines = |s: &Smem| if s.contiguous == 1 { s.rows } else { s.cols };
        let pair = (left, frag.dtype);
        let (tile, grid) = match frag.spread {
            Spread::MmaSync { warps_m, warps_n } => {
                let Some(row) = MMA.iter().find(|row| (row.0, row.1) == pair && sb.dtype == left)
                else {
                    return Err(Error::unsupported(format!(
                        "mma.sync of {left} and {} into {} has no instruction",
                        sb.dtype, frag.dtype
                    )));
                };
                if self.program.arch < row.2 {
                    return Err(Error::unsupported(format!(
                        "mma.sync of {left} on {}",
                        self.program.arch.name()
                    )));
                }
                let (operand, sum) = (crate::memory_type(pair.0), crate::memory_type(pair.1));
                let name = match (a, split) {
                    (WgmmaA::Frag(_), false) => "mma_tile_left",
                    (WgmmaA::Frag(_), true) => "mma_tile_left_split",
                    (WgmmaA::Smem(_), false) => "mma_tile",
                    (WgmmaA::Smem(_), true) => "mma_tile_split",
                };
                let types = match split {
                    true => String::new(),
                    false => format!("{operand}, {sum}, "),
                };
                (format!("tw::{name}<{types}"), format!("{warps_m}, {warps_n}"))
            }
            Spread::Outer { threads_m, threads_n, block_m, block_n } => {
                if pair != (DType::F32, DType::F32) || sb.dtype != DType::F32 {
                    return Err(Error::unsupported(format!(
                        "plain multiply-adds of {left} and {} into {}",
                        sb.dtype, frag.dtype
                    )));
                }
                (
                    "tw::fma_tile<".to_owned(),
                    format!("{threads_m}, {threads_n}, {block_m}, {block_n}"),
                )
            }
            Spread::Wgmma | Spread::Lines { .. } => {
                return Err(Error::unsupported("mma into this spread has no CUDA form"));
            }
        };
        let (left_form, left) = match a {
            WgmmaA::Smem(a) => {
                let sa = self.program.smem[a.smem].clone();
                let form = format!(
                    "{}, {}, {}, ",
                    sa.swizzle.span_bytes(),
                    lines(&sa),
                    sa.contiguous == 1
                );
                let (row, col) = (self.scope.text(&a.row), self.scope.text(&a.col));
                (form, format!("{}, {row}, {col}", self.slot_address(a)))
            }
            WgmmaA::Frag(a) => {
                let cols = self.program.frags[a.frag].cols;
                if a.cols.is_some_and(|c| c != cols) || matches!(frag.spread, Spread::Outer { .. })
                {
                    return Err(Error::unsupported("this left operand in registers"));
                }
                (String::new(), self.frag_name(a.frag))
            }
        };
        self.line(&format!(
            "{tile}{}, {}, {}, {grid}, {left_form}{}, {}, {}>({}, {left}, {}, {}, {});",
            frag.rows,
            frag.cols,
            b.rows,
            sb.swizzle.span_bytes(),
            lines(&sb),
            sb.contiguous == 0,
            self.frag_name(acc.frag),
            self.slot_address(b),
            self.scope.text(&b.row),
            self.scope.text(&b.col),
        ));
        Ok(())
    }
}
