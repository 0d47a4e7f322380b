"""Printed by `tw inspect --tile FILE --emit triton --set BC=1024 --set BR=4` from

kernel @softmax_bf16(%X: bf16[R,C], out %Y: bf16[R,C])
    sizes(R in 1.., C in 1..)
    tile(BR, BC) grid(p in ceil(R/BR)) {
  %low = full -inf : f32[BR]
  %none = full 0.0 : f32[BR]
  %max, %sum = for j in 0 .. ceil(C/BC) carry(%m = %low, %s = %none) {
    %x0 = load %X[BR*p, BC*j] fill -inf : bf16[BR,BC]
    %x = map(%x0) { x -> f32(x) } : f32[BR,BC]
    %new = reduce max %x axis 1 limit -BC*j + C : f32[BR]
    %m1 = map(%m, %new) { a, b -> max(a, b) } : f32[BR]
    %e = map(%x, %m1 along (0)) { x, m -> exp(x - m) } : f32[BR,BC]
    %part = reduce sum %e axis 1 limit -BC*j + C : f32[BR]
    %s1 = map(%s, %m, %m1, %part) { s, m, m1, p -> s * exp(m - m1) + p } : f32[BR]
    yield %m1, %s1
  }
  for j in 0 .. ceil(C/BC) {
    %again = load %X[BR*p, BC*j] : bf16[BR,BC]
    %y = map(%again, %max along (0), %sum along (0)) { x, m, s -> bf16(exp(f32(x) - m) / s) } : bf16[BR,BC]
    store %Y[BR*p, BC*j], %y
  }
}
"""

import contextlib

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Masks were left out where they are not needed for these sizes.
BC = 1024
BR = 4


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def map_x(x):
    t1 = x.to(tl.float32)
    return t1


@triton.jit
def map_m1(a, b):
    t2 = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return t2


@triton.jit
def map_e(x, m):
    t2 = x - m
    t3 = libdevice.exp(t2)
    return t3


@triton.jit
def map_sum_2(s, m, m1, p):
    t3 = m - m1
    t4 = libdevice.exp(t3)
    t5 = s * t4
    t7 = t5 + p
    return t7


@triton.jit
def map_y(x, m, s):
    t1 = x.to(tl.float32)
    t3 = t1 - m
    t4 = libdevice.exp(t3)
    t6 = libdevice.div_rn(t4, s)
    t7 = t6.to(tl.float32).to(tl.bfloat16).to(tl.float32)
    return t7


@triton.jit
def softmax_bf16(
    X_ptr, Y_ptr,
    R, C,
    X_stride0, X_stride1, Y_stride0, Y_stride1,
    BC: tl.constexpr,
    BR: tl.constexpr,
    INDEX: tl.constexpr,
):
    p = tl.program_id(0)
    low = tl.full((BR,), float("-inf"), tl.float32)
    none = tl.full((BR,), 0.0, tl.float32)
    max_2, sum_2 = low, none
    offs_r = (p * BR + tl.arange(0, BR)).to(INDEX)
    for j in range(tl.cdiv(C, BC)):
        offs_c = (j * BC + tl.arange(0, BC)).to(INDEX)
        x0 = tl.load(
            X_ptr + offs_r[:, None] * X_stride0 + offs_c[None, :] * X_stride1,
            mask=(offs_r[:, None] < R) & (offs_c[None, :] < C),
            other=float("-inf"),
        )
        x = map_x(x0.to(tl.float32))
        new_of = tl.where(tl.arange(0, BC)[None, :] < C - j * BC, x, float("-inf"))
        new = tl.reduce(new_of, 1, nan_max)
        m1 = map_m1(max_2, new)
        e = map_e(x, m1[:, None])
        part_of = tl.where(tl.arange(0, BC)[None, :] < C - j * BC, e, 0.0)
        part = tl.sum(part_of, axis=1)
        sum_2 = map_sum_2(sum_2, max_2, m1, part)
        max_2 = m1
    for j in range(tl.cdiv(C, BC)):
        offs_c_2 = (j * BC + tl.arange(0, BC)).to(INDEX)
        again = tl.load(
            X_ptr + offs_r[:, None] * X_stride0 + offs_c_2[None, :] * X_stride1,
            mask=(offs_r[:, None] < R) & (offs_c_2[None, :] < C),
            other=0.0,
        )
        y = map_y(again.to(tl.float32), max_2[:, None], sum_2[:, None]).to(tl.bfloat16)
        tl.store(
            Y_ptr + offs_r[:, None] * Y_stride0 + offs_c_2[None, :] * Y_stride1,
            y,
            mask=(offs_r[:, None] < R) & (offs_c_2[None, :] < C),
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


def launch(X, Y, *, num_warps=4, num_stages=3, enable_fp_fusion=True, stream=None):
    X_shape = _shape("X", X, "bfloat16", 2)
    Y_shape = _shape("Y", Y, "bfloat16", 2)
    R = X_shape[0]
    if not R >= 1:
        raise ValueError(f"R is {R}, not R >= 1")
    C = X_shape[1]
    if not C >= 1:
        raise ValueError(f"C is {C}, not C >= 1")
    _expect("X", X_shape, (R, C))
    _expect("Y", Y_shape, (R, C))
    grid = triton.cdiv(R, BR)
    if grid <= 0:
        return
    index = tl.int64 if max(_last(X), _last(Y)) >= 2**31 - 2**20 else tl.int32
    with _on(stream):
        softmax_bf16[(grid,)](
            X, Y,
            R, C,
            X.stride(0), X.stride(1), Y.stride(0), Y.stride(1),
            BC=BC, BR=BR, INDEX=index,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=enable_fp_fusion,
        )
