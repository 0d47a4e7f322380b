//! Packing: copies a row-major tensor into another layout, once, when a plan is loaded.

use crate::memory::AlignedBuffer;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_layout::{Dim, Env, Layout};
use tilewright_plan::Buffer;

/// One loop of the copy: how many steps, and how far each moves in source and destination.
#[derive(Clone, Copy)]
struct Loop {
    count: usize,
    src: usize,
    dst: usize,
}

/// The tensor's elements placed as `layout` says. Elements of whole blocks beyond the shape are
/// zero. Numbers of 4 bits stay two in a byte; in the layout they count as elements. Errors on a symbolic or negative
/// layout, and when out of memory.
pub fn pack(tensor: &Tensor, layout: &Layout) -> Result<AlignedBuffer> {
    let bytes = packed_bytes(tensor.dtype(), layout)?;
    let mut out = AlignedBuffer::new(bytes, "a packed constant")?;
    pack_into(tensor, layout, &mut out)?;
    Ok(out)
}

/// Bytes of a tensor of this type in this layout.
pub(crate) fn packed_bytes(dtype: DType, layout: &Layout) -> Result<usize> {
    let elements = layout.alloc_elements().eval(&Env::new());
    elements
        .and_then(|n| usize::try_from(n).ok())
        .and_then(|n| dtype.bytes_for(n))
        .ok_or_else(|| Error::bug(format!("constant with layout {layout}")))
}

/// As [`pack`], into zero memory of [`packed_bytes`].
pub(crate) fn pack_into(tensor: &Tensor, layout: &Layout, out: &mut AlignedBuffer) -> Result<()> {
    let none = Env::new();
    let eval = |d: &tilewright_layout::Dim| {
        d.eval(&none)
            .and_then(|v| usize::try_from(v).ok())
            .ok_or_else(|| Error::bug(format!("constant with layout {layout}")))
    };
    let (dtype, size) = (tensor.dtype(), tensor.dtype().size());
    let nibbles = dtype.bits() == 4;
    if out.len() != packed_bytes(dtype, layout)? {
        return Err(Error::bug(format!("{} bytes for a constant with layout {layout}", out.len())));
    }
    let shape = tensor.shape();
    if shape.len() != layout.rank() {
        return Err(Error::bug(format!("a constant of shape {shape:?} with layout {layout}")));
    }
    if tensor.is_empty() {
        return Ok(());
    }
    // Row-major source strides; a blocked axis gives two loops and perhaps a shorter last block.
    let mut loops: Vec<Loop> = Vec::new();
    let mut tails: Vec<Vec<Loop>> = vec![Vec::new()];
    let mut starts: Vec<(usize, usize)> = vec![(0, eval(&layout.offset)?)];
    let mut src_stride = 1;
    for (axis, &extent) in layout.axes.iter().zip(shape).rev() {
        let stride = eval(&axis.stride)?;
        let pieces: Vec<((usize, usize), Vec<Loop>)> = match &axis.block {
            None => vec![((0, 0), vec![Loop { count: extent, src: src_stride, dst: stride }])],
            Some(block) => {
                let (width, inner) = (block.size as usize, eval(&block.stride)?);
                let (whole, rest) = (extent / width, extent % width);
                let mut pieces = Vec::new();
                if whole > 0 {
                    let outer = Loop { count: whole, src: src_stride * width, dst: stride };
                    let within = Loop { count: width, src: src_stride, dst: inner };
                    pieces.push(((0, 0), vec![outer, within]));
                }
                if rest > 0 {
                    let at = (whole * width * src_stride, whole * stride);
                    pieces.push((at, vec![Loop { count: rest, src: src_stride, dst: inner }]));
                }
                pieces
            }
        };
        let mut new_tails = Vec::new();
        let mut new_starts = Vec::new();
        for (tail, start) in tails.iter().zip(&starts) {
            for (at, piece) in &pieces {
                new_tails.push(tail.iter().chain(piece).copied().collect());
                new_starts.push((start.0 + at.0, start.1 + at.1));
            }
        }
        (tails, starts) = (new_tails, new_starts);
        src_stride *= extent;
    }
    for (nest, (src, dst)) in tails.into_iter().zip(starts) {
        loops.clear();
        loops.extend(nest);
        loops.retain(|l| l.count != 1);
        // Widest destination steps outermost: the inner loop then writes consecutive elements.
        loops.sort_by_key(|l| std::cmp::Reverse(l.dst));
        let (source, target) = (tensor.bytes(), out.bytes_mut());
        match size {
            1 if nibbles => copy_nibbles(source, target, src, dst, &loops),
            1 => copy::<1>(source, target, src, dst, &loops),
            2 => copy::<2>(source, target, src, dst, &loops),
            4 => copy::<4>(source, target, src, dst, &loops),
            _ => copy::<8>(source, target, src, dst, &loops),
        }
    }
    Ok(())
}

/// As [`copy`], for elements of half a byte, low one first. What is written was zero before.
fn copy_nibbles(source: &[u8], target: &mut [u8], src: usize, dst: usize, loops: &[Loop]) {
    let [outer, rest @ ..] = loops else {
        target[dst / 2] |= (source[src / 2] >> (4 * (src % 2)) & 15) << (4 * (dst % 2));
        return;
    };
    // The destination of a panel stays in the cache while sixteen lines of the source are walked.
    if let [inner] = rest
        && inner.src > 1
    {
        for line in (0..outer.count).step_by(16) {
            let lines = (outer.count - line).min(16);
            for j in 0..inner.count {
                for i in line..line + lines {
                    let s = src + i * outer.src + j * inner.src;
                    let d = dst + i * outer.dst + j * inner.dst;
                    target[d / 2] |= (source[s / 2] >> (4 * (s % 2)) & 15) << (4 * (d % 2));
                }
            }
        }
        return;
    }
    for i in 0..outer.count {
        copy_nibbles(source, target, src + i * outer.src, dst + i * outer.dst, rest);
    }
}

fn copy<const N: usize>(source: &[u8], target: &mut [u8], src: usize, dst: usize, loops: &[Loop]) {
    match loops {
        [] => target[dst * N..dst * N + N].copy_from_slice(&source[src * N..src * N + N]),
        [only] if only.src == 1 && only.dst == 1 => {
            let len = only.count * N;
            target[dst * N..dst * N + len].copy_from_slice(&source[src * N..src * N + len]);
        }
        [only] => {
            for i in 0..only.count {
                let (s, d) = ((src + i * only.src) * N, (dst + i * only.dst) * N);
                target[d..d + N].copy_from_slice(&source[s..s + N]);
            }
        }
        // A transposition: go through the source in lines of 16 so that both sides stay in cache.
        [outer, inner] if inner.src > 1 && outer.count > 16 => {
            for line in (0..outer.count).step_by(SIDE) {
                let lines = (outer.count - line).min(SIDE);
                let (mut j, plain) = (0, outer.src == 1 && inner.dst == 1 && lines == SIDE);
                while plain && inner.count - j >= SIDE {
                    let (s, d) = (src + line + j * inner.src, dst + line * outer.dst + j);
                    turn::<N>(&source[s * N..], &mut target[d * N..], inner.src, outer.dst);
                    j += SIDE;
                }
                for j in j..inner.count {
                    for i in line..line + lines {
                        let s = (src + i * outer.src + j * inner.src) * N;
                        let d = (dst + i * outer.dst + j * inner.dst) * N;
                        target[d..d + N].copy_from_slice(&source[s..s + N]);
                    }
                }
            }
        }
        [outer, rest @ ..] => {
            for i in 0..outer.count {
                copy::<N>(source, target, src + i * outer.src, dst + i * outer.dst, rest);
            }
        }
    }
}

/// Side of the squares that transpositions go through.
const SIDE: usize = 16;

/// Transposes a square: its rows are `from` elements apart in the source and become columns, whose rows are `to` elements
/// apart in the target.
fn turn<const N: usize>(source: &[u8], target: &mut [u8], from: usize, to: usize) {
    let mut square = [[[0; N]; SIDE]; SIDE];
    for (j, row) in square.iter_mut().enumerate() {
        row.as_flattened_mut().copy_from_slice(&source[j * from * N..][..SIDE * N]);
    }
    for i in 0..SIDE {
        let mut turned = [[0; N]; SIDE];
        for (to, row) in turned.iter_mut().zip(&square) {
            *to = row[i];
        }
        target[i * to * N..][..SIDE * N].copy_from_slice(turned.as_flattened());
    }
}

/// The elements of a buffer in row-major order: the inverse of [`pack`], for looking at
/// intermediate results.
pub(crate) fn unpack(bytes: &[u8], buffer: &Buffer, shape: &[usize], env: &Env) -> Result<Tensor> {
    let size = buffer.dtype.size();
    let mut tensor = Tensor::zeros(buffer.dtype, shape)?;
    let count = tensor.len();
    let eval = |d: &Dim| d.eval(env).ok_or_else(|| Error::bug(format!("size `{d}` is not known")));
    let mut axes = Vec::with_capacity(shape.len());
    for a in &buffer.layout.axes {
        let block = match &a.block {
            None => (1, eval(&a.stride)?),
            Some(b) => (b.size, eval(&b.stride)?),
        };
        axes.push((eval(&a.stride)?, block));
    }
    let base = eval(&buffer.layout.offset)?;
    let out = tensor.bytes_mut();
    let mut at = vec![0i64; shape.len()];
    for i in 0..count {
        let mut rest = i;
        for (x, &d) in at.iter_mut().zip(shape).rev() {
            *x = (rest % d) as i64;
            rest /= d;
        }
        let offset = at.iter().zip(&axes).fold(base, |acc, (&x, &(stride, (block, inner)))| {
            acc + x / block * stride + x % block * inner
        });
        let from =
            usize::try_from(offset).ok().map(|o| o * size).filter(|o| o + size <= bytes.len());
        let from =
            from.ok_or_else(|| Error::bug(format!("`{}` leaves its memory", buffer.name)))?;
        out[i * size..(i + 1) * size].copy_from_slice(&bytes[from..from + size]);
    }
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Post-condition: element `x` of the tensor lies at `layout.offset_of(x)`.
    #[test]
    fn every_element_lies_where_the_layout_says() {
        // The second has whole squares and parts of squares to turn.
        for shape in [[5usize, 7, 3], [50, 37, 1]] {
            elements_lie_where_layouts_say(shape);
        }
    }

    fn elements_lie_where_layouts_say(shape: [usize; 3]) {
        let dims: Vec<Dim> = shape.iter().map(|&d| Dim::from(d)).collect();
        let n: usize = shape.iter().product();
        let values: Vec<i32> = (1..=n as i32).collect();
        let tensor = Tensor::from_slice(&shape, &values).unwrap();
        let transposed = Layout::row_major(&[dims[2].clone(), dims[0].clone(), dims[1].clone()])
            .permute(&[1, 2, 0]);
        for layout in [
            Layout::row_major(&dims),
            transposed,
            Layout::blocked(&dims, 1, 4),
            Layout::panels(&dims, 0, 2),
            Layout::panels(&dims, 2, 16),
            Layout::panels(&dims, 0, 32),
            Layout::grouped_panels(&dims, 1, 4, 0, 2),
            Layout::grouped_panels(&dims, 0, 2, 2, 4),
        ] {
            let out = pack(&tensor, &layout).unwrap();
            let mut sum = 0i64;
            for (i, v) in values.iter().enumerate() {
                let (last, rows) = (shape[2], shape[1]);
                let at = [i / (last * rows), i / last % rows, i % last].map(Dim::from);
                let offset = layout.offset_of(&at).as_const().unwrap() as usize;
                let got = i32::from_le_bytes(out.bytes()[offset * 4..][..4].try_into().unwrap());
                assert_eq!(got, *v, "{layout} at {at:?}");
                sum += i64::from(got);
            }
            let all: i64 = out
                .bytes()
                .chunks(4)
                .map(|c| i64::from(i32::from_le_bytes(c.try_into().unwrap())))
                .sum();
            assert_eq!(sum, all, "{layout}: the rest is zero");
        }
    }
}
