"""Printed by `tw inspect --tile FILE --emit triton --set BA=1 --set BB=4 --set BC=512` from

kernel @map_group_bf16(%X: bf16[A,B,C], %row: bf16[C], %column: bf16[B,1], out %Y: bf16[A,B,C])
    sizes(A in 1.., B in 1.., C in 1..)
    tile(BA, BB, BC) grid(pa in ceil(A/BA), pb in ceil(B/BB), pc in ceil(C/BC)) {
  %x = load %X[BA*pa, BB*pb, BC*pc] : bf16[BA,BB,BC]
  %r = load %row[BC*pc] : bf16[BC]
  %c = load %column[BB*pb, 0] : bf16[BB,1]
  %y = map(%x, %r along (2), %c along (1,2)) { x, r, c -> bf16(tanh(f32(x) * f32(r)) + f32(c)) } : bf16[BA,BB,BC]
  store %Y[BA*pa, BB*pb, BC*pc], %y
}
"""

import contextlib

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Masks were left out where they are not needed for these sizes.
BA = 1
BB = 4
BC = 512


@triton.jit
def map_y(x, r, c):
    t1 = x.to(tl.float32)
    t3 = r.to(tl.float32)
    t4 = t1 * t3
    t5 = libdevice.tanh(t4)
    t7 = c.to(tl.float32)
    t8 = t5 + t7
    t9 = t8.to(tl.float32).to(tl.bfloat16).to(tl.float32)
    return t9


@triton.jit
def map_group_bf16(
    X_ptr, row_ptr, column_ptr, Y_ptr,
    A, B, C,
    X_stride0, X_stride1, X_stride2, row_stride0, column_stride0, column_stride1,
    Y_stride0, Y_stride1, Y_stride2,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    INDEX: tl.constexpr,
):
    pid = tl.program_id(0)
    pc = pid % tl.cdiv(C, BC)
    pid = pid // tl.cdiv(C, BC)
    pb = pid % tl.cdiv(B, BB)
    pa = pid // tl.cdiv(B, BB)
    offs_b = (pb * BB + tl.arange(0, BB)).to(INDEX)
    offs_c = (pc * BC + tl.arange(0, BC)).to(INDEX)
    x = tl.load(
        X_ptr
        + tl.cast(pa * BA, INDEX) * X_stride0
        + offs_b[:, None] * X_stride1
        + offs_c[None, :] * X_stride2,
        mask=(offs_b[:, None] < B) & (offs_c[None, :] < C),
        other=0.0,
    )
    r = tl.load(row_ptr + offs_c * row_stride0, mask=offs_c < C, other=0.0)
    c = tl.load(column_ptr + offs_b * column_stride0, mask=offs_b < B, other=0.0)
    y = map_y(
        x.to(tl.float32),
        r[None, :].to(tl.float32),
        c[:, None].to(tl.float32),
    ).to(tl.bfloat16)
    tl.store(
        Y_ptr
        + tl.cast(pa * BA, INDEX) * Y_stride0
        + offs_b[:, None] * Y_stride1
        + offs_c[None, :] * Y_stride2,
        y,
        mask=(offs_b[:, None] < B) & (offs_c[None, :] < C),
    )


def _shape(name, tensor, dtype, rank):
    if str(tensor.dtype).removeprefix("torch.") != dtype:
        raise TypeError(f"{name} is of type {tensor.dtype}, not {dtype}")
    if len(tensor.shape) != rank:
        raise ValueError(f"{name} has {len(tensor.shape)} axes, not {rank}")
    if any(extent >= 2**31 - 2**20 for extent in tensor.shape):
        raise ValueError(f"{name} has an axis of 2**31 elements or more")
    return tuple(tensor.shape)


def _expect(name, shape, expected):
    if shape != expected:
        raise ValueError(f"{name} has shape {shape}, not {expected}")


def _last(tensor):  # offset of the last element
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))


def _on(stream):
    if stream is None:
        return contextlib.nullcontext()
    import torch

    return torch.cuda.stream(stream)


def launch(X, row, column, Y, *, num_warps=4, num_stages=3, enable_fp_fusion=True, stream=None):
    X_shape = _shape("X", X, "bfloat16", 3)
    row_shape = _shape("row", row, "bfloat16", 1)
    column_shape = _shape("column", column, "bfloat16", 2)
    Y_shape = _shape("Y", Y, "bfloat16", 3)
    A = X_shape[0]
    if not A >= 1:
        raise ValueError(f"A is {A}, not A >= 1")
    B = X_shape[1]
    if not B >= 1:
        raise ValueError(f"B is {B}, not B >= 1")
    C = X_shape[2]
    if not C >= 1:
        raise ValueError(f"C is {C}, not C >= 1")
    _expect("X", X_shape, (A, B, C))
    _expect("row", row_shape, (C,))
    _expect("column", column_shape, (B, 1))
    _expect("Y", Y_shape, (A, B, C))
    grid = triton.cdiv(A, BA) * triton.cdiv(B, BB) * triton.cdiv(C, BC)
    if grid <= 0:
        return
    index = tl.int64 if max(_last(X), _last(row), _last(column), _last(Y)) >= 2**31 - 2**20 else tl.int32
    with _on(stream):
        map_group_bf16[(grid,)](
            X, row, column, Y,
            A, B, C,
            X.stride(0), X.stride(1), X.stride(2), row.stride(0), column.stride(0),
            column.stride(1), Y.stride(0), Y.stride(1), Y.stride(2),
            BA=BA, BB=BB, BC=BC, INDEX=index,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=enable_fp_fusion,
        )
