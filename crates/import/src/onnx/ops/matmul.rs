//! Matrix products and einsum.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use super::quant;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Tensor, element_count};
use tilewright_graph::{Op, ReduceKind, ValueId};
use tilewright_layout::Dim;

/// `a @ b` under NumPy's rules, batch axes broadcast.
pub(crate) fn product(cx: &mut Cx, a: ValueId, b: ValueId) -> Result<ValueId> {
    cx.same_dtype(&[a, b])?;
    let dtype = cx.dtype(a);
    product_in(cx, a, b, dtype)
}

/// As [`product`], with a result of type `dtype`, in whose compute form it sums.
fn product_in(cx: &mut Cx, a: ValueId, b: ValueId, dtype: DType) -> Result<ValueId> {
    let (ra, rb) = (cx.rank(a), cx.rank(b));
    if ra == 0 || rb == 0 || ra > 20 || rb > 20 {
        return Err(Error::user(format!("a matrix product of {} and {}", cx.ty(a), cx.ty(b))));
    }
    // Batch letters A, B, ... are counted from the right.
    let batch = |rank: usize| -> String {
        (0..rank.saturating_sub(2)).rev().map(|i| char::from(b'A' + i as u8)).collect()
    };
    let lhs = if ra == 1 { "k".to_string() } else { batch(ra) + "mk" };
    let rhs = if rb == 1 { "k".to_string() } else { batch(rb) + "kn" };
    let mut out = batch(ra.max(rb));
    if ra > 1 {
        out.push('m');
    }
    if rb > 1 {
        out.push('n');
    }
    // A vector times a batch of matrices: only the batch of the matrices remains.
    if ra == 1 {
        out = batch(rb) + if rb > 1 { "n" } else { "" };
    } else if rb == 1 {
        out = batch(ra) + "m";
    }
    let acc = dtype.compute();
    cx.op(Op::Contract { lhs, rhs, out, acc, dtype }, &[a, b])
}

pub(crate) fn matmul(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    one(product(cx, n.x(0)?, n.x(1)?)?)
}

pub(crate) fn gemm(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (a, b) = (n.x(0)?, n.x(1)?);
    let lhs = if n.flag("transA", false)? { "km" } else { "mk" };
    let rhs = if n.flag("transB", false)? { "nk" } else { "kn" };
    let (alpha, beta) = (n.float("alpha", 1.0)?, n.float("beta", 1.0)?);
    let v = cx.contract(&format!("{lhs},{rhs}->mn"), a, b)?;
    let dtype = cx.dtype(v);
    let scale = |cx: &mut Cx, v: ValueId, by: f64| -> Result<ValueId> {
        if by == 1.0 {
            Ok(v)
        } else {
            cx.map_as(
                &[v],
                if dtype.is_float() { dtype.compute() } else { DType::F64 },
                dtype,
                |p| p[0] * by,
            )
        }
    };
    let Some(c) = n.opt(2)? else {
        return one(scale(cx, v, alpha)?);
    };
    cx.same_dtype(&[v, c])?;
    if alpha == 1.0 && beta == 1.0 {
        return one(cx.add(v, c)?);
    }
    if dtype.is_float() {
        return one(cx.fmap(&[v, c], |p| {
            let x = if alpha == 1.0 { p[0] } else { p[0] * alpha };
            let y = if beta == 1.0 { p[1] } else { p[1] * beta };
            x + y
        })?);
    }
    let (v, c) = (scale(cx, v, alpha)?, scale(cx, c, beta)?);
    one(cx.add(v, c)?)
}

/// Operand minus its zero point, as `i32`. A vector of zero points lies along `axis`.
fn centred(cx: &mut Cx, x: ValueId, zero: Option<ValueId>, axis: usize) -> Result<ValueId> {
    let wide = cx.cast(x, DType::I32)?;
    let Some(zero) = zero else { return Ok(wide) };
    let zero = cx.cast(zero, DType::I32)?;
    let zero = if cx.rank(zero) == 1 && !cx.shape(zero)[0].is(1) {
        cx.along(zero, axis, cx.rank(x))?
    } else if cx.rank(zero) == 1 {
        cx.reshape(zero, &[])?
    } else {
        zero
    };
    cx.sub(wide, zero)
}

/// A zero point as `i32` beside the data, less `shift`; `None` when it is known to be 0.
fn offset(
    cx: &mut Cx,
    zero: Option<ValueId>,
    shift: i64,
    axis: usize,
    rank: usize,
) -> Result<Option<ValueId>> {
    let known = match zero {
        None => Some(vec![0]),
        Some(z) => cx.as_const(z).map(Tensor::to_i64s),
    };
    if known.is_some_and(|all| all.iter().all(|&z| z == shift)) {
        return Ok(None);
    }
    let shift = cx.scalar(DType::I32, shift as f64);
    let none = cx.scalar(DType::I32, 0.0);
    let zero = match zero {
        None => none,
        Some(zero) => {
            let zero = cx.cast(zero, DType::I32)?;
            match cx.rank(zero) {
                1 if cx.shape(zero)[0].is(1) => cx.reshape(zero, &[])?,
                1 => cx.along(zero, axis, rank)?,
                _ => zero,
            }
        }
    };
    cx.sub(zero, shift).map(Some)
}

/// The sums of the columns of signed bytes, in `i32`, their axis kept.
fn sums_of_columns(b: &Tensor) -> Result<Tensor> {
    let mut shape = b.shape().to_vec();
    let rank = shape.len();
    let (depth, columns) = (shape[rank - 2], shape[rank - 1]);
    shape[rank - 2] = 1;
    let mut sums = vec![0i32; element_count(&shape)?];
    for (i, row) in b.bytes().chunks_exact(columns.max(1)).enumerate() {
        let matrix = i / depth.max(1);
        let sums = &mut sums[matrix * columns..][..columns];
        for (sum, &byte) in sums.iter_mut().zip(row) {
            *sum = sum.wrapping_add(i32::from(byte as i8));
        }
    }
    Tensor::from_slice(&shape, &sums)
}

/// The product of 8-bit matrices less their zero points, in `i32`. The bytes are multiplied as they
/// are, which matrix units do, and what the zero points contribute is taken off:
///
/// ```text
/// sum (a - za) * (b - zb) = sum a * b  -  za * sum b  -  zb * sum (a - za)
/// ```
///
/// All of it wraps in 32 bits, so the two sides are equal, not only near. An unsigned right operand
/// becomes a signed one with another zero point: before, when it is constant, else where it is read.
pub(crate) fn byte_product(
    cx: &mut Cx,
    a: ValueId,
    za: Option<ValueId>,
    b: ValueId,
    zb: Option<ValueId>,
) -> Result<ValueId> {
    let (ra, rb) = (cx.rank(a), cx.rank(b));
    let bytes = |d: DType| matches!(d, DType::I8 | DType::U8);
    let turns = cx.dtype(b) == DType::U8;
    let turned = cx.as_const(b).filter(|_| turns).cloned();
    let direct = bytes(cx.dtype(a)) && bytes(cx.dtype(b)) && ra >= 2 && rb >= 2;
    if !direct {
        let a = centred(cx, a, za, ra.saturating_sub(2))?;
        let b = centred(cx, b, zb, rb.saturating_sub(1))?;
        return product(cx, a, b);
    }
    let (b, shift) = match turned {
        None if turns => {
            let wide = cx.cast(b, DType::I32)?;
            let by = cx.constant(Tensor::from_i64s(DType::I32, &[], &[128])?);
            let moved = cx.sub(wide, by)?;
            (cx.cast(moved, DType::I8)?, 128)
        }
        None => (b, 0),
        Some(tensor) => {
            let values: Vec<i64> = tensor.to_i64s().iter().map(|v| v - 128).collect();
            (cx.constant(Tensor::from_i64s(DType::I8, tensor.shape(), &values)?), 128)
        }
    };
    let mut v = product_in(cx, a, b, DType::I32)?;
    if let Some(zero) = offset(cx, za, 0, ra - 2, ra)? {
        let known = cx.as_const(b).map(sums_of_columns).transpose()?;
        let sums = match known {
            Some(sums) => cx.constant(sums),
            None => {
                let wide = cx.cast(b, DType::I32)?;
                cx.reduce(ReduceKind::Sum, wide, &[rb - 2], true)?
            }
        };
        let part = cx.mul(zero, sums)?;
        v = cx.sub(v, part)?;
    }
    if let Some(zero) = offset(cx, zb, shift, rb - 1, rb)? {
        let centred = centred(cx, a, za, ra - 2)?;
        let sums = cx.reduce(ReduceKind::Sum, centred, &[ra - 1], true)?;
        let part = cx.mul(sums, zero)?;
        v = cx.sub(v, part)?;
    }
    Ok(v)
}

pub(crate) fn matmul_integer(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let v = byte_product(cx, n.x(0)?, n.opt(2)?, n.x(1)?, n.opt(3)?)?;
    one(v)
}

pub(crate) fn qlinear_matmul(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let v = byte_product(cx, n.x(0)?, Some(n.x(2)?), n.x(3)?, Some(n.x(5)?))?;
    let (sa, sb, sy) = (n.x(1)?, n.x(4)?, n.x(6)?);
    let rank = cx.rank(v);
    let sa = per_axis(cx, sa, rank.saturating_sub(2), rank)?;
    let sb = per_axis(cx, sb, rank.saturating_sub(1), rank)?;
    let sy = per_axis(cx, sy, rank.saturating_sub(2), rank)?;
    one(quant::requantise(cx, v, sa, sb, sy, n.x(7)?)?)
}

/// A scale for the whole tensor, or one per position of an axis.
pub(crate) fn per_axis(cx: &mut Cx, v: ValueId, axis: usize, rank: usize) -> Result<ValueId> {
    match cx.shape(v).as_slice() {
        [one] if one.is(1) => cx.reshape(v, &[]),
        [_] => cx.along(v, axis, rank),
        _ => Ok(v),
    }
}

/// One operand of an einsum while it is worked on: the value and a letter per axis.
type Term = (ValueId, Vec<char>);

pub(crate) fn einsum(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let equation: String = n.str("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match equation.split_once("->") {
        Some((l, r)) => (l.to_string(), Some(r.to_string())),
        None => (equation.clone(), None),
    };
    let values = n.all()?;
    let parts: Vec<&str> = left.split(',').collect();
    if parts.len() != values.len() {
        return Err(Error::user(format!("einsum `{equation}` of {} operands", values.len())));
    }
    // The axes of an ellipsis get digits as letters, counted from the right.
    let mut widest = 0;
    let mut terms: Vec<Term> = Vec::new();
    for (part, &v) in parts.iter().zip(&values) {
        let rank = cx.rank(v);
        let named = part.replace("...", "").chars().count();
        let Some(dots) = rank.checked_sub(named).filter(|d| part.contains("...") || *d == 0) else {
            return Err(Error::user(format!("einsum term `{part}` for {}", cx.ty(v))));
        };
        if dots > 10 || part.matches("...").count() > 1 {
            return Err(Error::user(format!("einsum term `{part}`")));
        }
        widest = widest.max(dots);
        let ellipsis: String = (0..dots).rev().map(|i| char::from(b'0' + i as u8)).collect();
        terms.push((v, part.replace("...", &ellipsis).chars().collect()));
    }
    let ellipsis: String = (0..widest).rev().map(|i| char::from(b'0' + i as u8)).collect();
    let out: Vec<char> = match right {
        Some(r) => r.replace("...", &ellipsis).chars().collect(),
        None => {
            // Implicit result: the ellipsis, then letters that occur once, in alphabetical order.
            let all: Vec<char> = left.chars().filter(char::is_ascii_alphabetic).collect();
            let mut once: Vec<char> = all
                .iter()
                .copied()
                .filter(|c| all.iter().filter(|d| *d == c).count() == 1)
                .collect();
            once.sort_unstable();
            ellipsis.chars().chain(once).collect()
        }
    };
    let (mut terms, out) = lettered(terms, out, &equation)?;
    for term in &mut terms {
        diagonal(cx, term)?;
    }
    let mut terms = terms.into_iter();
    let Some(mut acc) = terms.next() else { return Err(Error::user("einsum of nothing")) };
    let rest: Vec<Term> = terms.collect();
    for i in 0..rest.len() {
        let (b, letters) = &rest[i];
        // Keep what the result or a later term names.
        let mut kept: Vec<char> = Vec::new();
        for &c in acc.1.iter().chain(letters) {
            let later = out.contains(&c) || rest[i + 1..].iter().any(|(_, l)| l.contains(&c));
            if later && !kept.contains(&c) {
                kept.push(c);
            }
        }
        if i + 1 == rest.len() {
            kept = out.clone();
        }
        let text = |l: &[char]| l.iter().collect::<String>();
        let spec = format!("{},{}->{}", text(&acc.1), text(letters), text(&kept));
        acc = (cx.contract(&spec, acc.0, *b)?, kept);
    }
    // One operand: sum what is left out, then reorder.
    let gone: Vec<usize> = (0..acc.1.len()).filter(|&i| !out.contains(&acc.1[i])).collect();
    let v = cx.reduce(ReduceKind::Sum, acc.0, &gone, false)?;
    let letters: Vec<char> = acc.1.iter().copied().filter(|c| out.contains(c)).collect();
    let perm: Option<Vec<usize>> =
        out.iter().map(|c| letters.iter().position(|l| l == c)).collect();
    match perm {
        Some(perm) if perm.len() == letters.len() => one(cx.permute(v, &perm)?),
        _ => Err(Error::user(format!("einsum `{equation}`: a result letter is in no operand"))),
    }
}

/// Renames axes so that those of an ellipsis have letters, too.
fn lettered(terms: Vec<Term>, out: Vec<char>, equation: &str) -> Result<(Vec<Term>, Vec<char>)> {
    let mut names: Vec<char> = Vec::new();
    for &c in terms.iter().flat_map(|t| &t.1).chain(&out) {
        if !c.is_ascii_alphanumeric() {
            return Err(Error::user(format!("einsum `{equation}`")));
        }
        if !names.contains(&c) {
            names.push(c);
        }
    }
    let letters: Vec<char> = ('a'..='z').chain('A'..='Z').collect();
    if names.len() > letters.len() {
        return Err(Error::unsupported(format!("einsum of {} different axes", names.len())));
    }
    let rename = |list: &[char]| -> Vec<char> {
        list.iter().filter_map(|c| names.iter().position(|n| n == c).map(|i| letters[i])).collect()
    };
    let out = rename(&out);
    Ok((terms.into_iter().map(|(v, l)| (v, rename(&l))).collect(), out))
}

/// Repeated letters in one term take the diagonal.
fn diagonal(cx: &mut Cx, term: &mut Term) -> Result<()> {
    while let Some((i, j)) = (0..term.1.len())
        .flat_map(|i| (i + 1..term.1.len()).map(move |j| (i, j)))
        .find(|&(i, j)| term.1[i] == term.1[j])
    {
        let dims = cx.shape(term.0);
        let rank = dims.len();
        let a = cx.iota(DType::I64, rank, i, &dims[i])?;
        let b = cx.iota(DType::I64, rank, j, &dims[j])?;
        let masked = cx.map(&[term.0, a, b], |p| p[1].eq(p[2]).select(p[0], 0.0))?;
        term.0 = cx.reduce(ReduceKind::Sum, masked, &[j], false)?;
        term.1.remove(j);
    }
    Ok(())
}

pub(crate) fn det(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let rank = cx.rank(x);
    if rank < 2 {
        return Err(Error::user("Det of a tensor with less than two axes"));
    }
    let dims = cx.shape(x);
    let size = cx.static_dim(&dims[rank - 1], "Det")?;
    if !(1..=4).contains(&size) || dims[rank - 2] != dims[rank - 1] {
        return Err(Error::unsupported(format!("Det of {}", cx.ty(x))));
    }
    one(minor(cx, x, rank, size)?)
}

/// Laplace expansion along the first row; fine for the few sizes that we take.
fn minor(cx: &mut Cx, x: ValueId, rank: usize, size: i64) -> Result<ValueId> {
    if size == 1 {
        let v = cx.pick(x, rank - 1, 0)?;
        return cx.pick(v, rank - 2, 0);
    }
    let below = cx.slice(x, rank - 2, Dim::new(1), Dim::new(size - 1))?;
    let row = cx.pick(x, rank - 2, 0)?;
    let mut sum: Option<ValueId> = None;
    for j in 0..size {
        let left = cx.slice(below, rank - 1, Dim::new(0), Dim::new(j))?;
        let right = cx.slice(below, rank - 1, Dim::new(j + 1), Dim::new(size - 1 - j))?;
        let rest = cx.op(Op::Concat(rank - 1), &[left, right])?;
        let m = minor(cx, rest, rank, size - 1)?;
        let head = cx.pick(row, rank - 2, j)?;
        let term = cx.mul(head, m)?;
        sum = Some(match sum {
            None => term,
            Some(s) if j % 2 == 0 => cx.add(s, term)?,
            Some(s) => cx.sub(s, term)?,
        });
    }
    sum.ok_or_else(|| Error::bug("a determinant of nothing"))
}
