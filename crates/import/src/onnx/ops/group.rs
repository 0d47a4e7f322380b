//! ONNX Runtime's product with weights of few bits: `com.microsoft.MatMulNBits`.
//!
//! `B` holds codes in rows of `N`, in blocks of `block_size` of the depth, as unsigned integers, low half of a byte first;
//! a block of the last few is padded. Without zero points the middle code stands for zero, so that the codes are kept as
//! signed ones. With `accuracy_level` 4 activations are rounded to 8 bits, block by block, as there.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Tensor, from_i64, read_i64};
use tilewright_graph::Op;

pub(crate) fn mat_mul_n_bits(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let size = |name: &str| -> Result<usize> {
        let value = n.int(name, 0)?;
        let positive = usize::try_from(value).ok().filter(|v| (1..1 << 31).contains(v));
        positive.ok_or_else(|| Error::user(format!("`{name}` is {value}")))
    };
    let (depth, rows, block) = (size("K")?, size("N")?, size("block_size")?);
    let bits = n.int("bits", 4)?;
    let (unsigned, signed) = match bits {
        4 => (DType::U4, DType::I4),
        8 => (DType::U8, DType::I8),
        _ => return Err(Error::unsupported(format!("codes of {bits} bits"))),
    };
    if n.opt(4)?.is_some() {
        return Err(Error::unsupported("groups in another order (`g_idx`)"));
    }
    let blocks = depth.div_ceil(block);
    let packed = cx.tensor(n.x(1)?, "codes")?;
    let row_bytes = (block * bits as usize).div_ceil(8) * blocks;
    if packed.dtype() != DType::U8 || packed.len() != rows.saturating_mul(row_bytes) {
        let (is, shape) = (packed.dtype(), packed.shape());
        let message =
            format!("codes are {is}{shape:?}, and should be {rows} rows of {row_bytes} bytes");
        return Err(Error::user(message));
    }
    let zeros = n.opt(3)?;
    let dtype = if zeros.is_some() { unsigned } else { signed };
    let middle = if zeros.is_some() { 0 } else { 1i64 << (bits - 1) };
    let mut codes = Tensor::zeros(dtype, [rows, depth])?;
    let block_bytes = row_bytes / blocks;
    let (from, to) = (packed.bytes(), codes.bytes_mut());
    for row in 0..rows {
        for k in 0..depth {
            let start = row * row_bytes + k / block * block_bytes;
            let code = read_i64(unsigned, &from[start..start + block_bytes], k % block);
            from_i64(dtype, to, row * depth + k, code - middle);
        }
    }
    let x = n.x(0)?;
    let per_group = |t: &Tensor, what: &str| {
        if t.len() == rows * blocks {
            return t.reshaped(vec![rows, blocks]);
        }
        let shape = t.shape();
        Err(Error::user(format!("{what} of shape {shape:?} for {rows} rows of {blocks} groups")))
    };
    let scales = cx.tensor(n.x(2)?, "scales")?;
    let scales = per_group(&scales, "scales")?;
    // Level 4 allows activations in 8 bits: a code for each, a scale for each block.
    let level = n.int("accuracy_level", 0)?;
    let coded = level == 4 && bits == 4 && depth % block == 0 && cx.dtype(x) == DType::F32;
    let group = i64::try_from(block).unwrap_or(i64::MAX);
    let mut operands = vec![x, cx.constant(codes), cx.constant(scales)];
    if coded {
        let [codes, own] = cx.b.in_codes(x, group)?;
        operands[0] = codes;
        operands.push(own);
    }
    if let Some(zeros) = zeros {
        let zeros = cx.tensor(zeros, "zero points")?;
        let zeros = match zeros.dtype() {
            // A row of them is padded to whole bytes.
            DType::U8 => {
                let line = (blocks * bits as usize).div_ceil(8);
                if zeros.len() != rows * line {
                    let shape = zeros.shape();
                    return Err(Error::user(format!("zero points of shape {shape:?}")));
                }
                let bytes = zeros.bytes();
                let value =
                    |i: usize| read_i64(unsigned, &bytes[i / blocks * line..], i % blocks) as f64;
                let values: Vec<f64> = (0..rows * blocks).map(value).collect();
                Tensor::from_f64s(DType::F32, &[rows, blocks], &values)?
            }
            _ => per_group(&zeros, "zero points")?,
        };
        operands.push(cx.constant(zeros));
    }
    let y = cx.op(Op::GroupProduct { group }, &operands)?;
    match n.opt(5)? {
        Some(bias) => one(cx.add(y, bias)?),
        None => one(y),
    }
}
