"""Printed by `tw inspect --tile FILE --emit triton --set BK=64 --set BM=128 --set BN=128 --set num_warps=8` from

kernel @gemm_gelu_bf16(%A: bf16[M,K], %B: bf16[K,N], %bias: bf16[N], out %C: bf16[M,N])
    sizes(M in 1.., N in 1.., K in 0..)
    tile(BM, BN, BK) grid(pm in ceil(M/BM), pn in ceil(N/BN)) {
  %zero = full 0.0 : f32[BM,BN]
  %acc = for k in 0 .. ceil(K/BK) carry(%c = %zero) {
    %a = load %A[BM*pm, BK*k] : bf16[BM,BK]
    %b = load %B[BK*k, BN*pn] : bf16[BK,BN]
    %d = mma %c, %a, %b limit -BK*k + K : f32[BM,BN]
    yield %d
  }
  %v = load %bias[BN*pn] : bf16[BN]
  %r = map(%acc, %v along (1)) { x, b -> let t0 = x + f32(b); bf16(t0 * 0.5 * (1.0 + erf(t0 * 0.70710677))) } : bf16[BM,BN]
  store %C[BM*pm, BN*pn], %r
}
"""

import contextlib

import triton
import triton.language as tl

# Masks were left out where they are not needed for these sizes.
BK = 64
BM = 128
BN = 128


@triton.jit
def map_r(x, b):
    t2 = b.to(tl.float32)
    t3 = x + t2
    t5 = t3 * tl.full((), 0.5, tl.float32)
    t8 = t3 * tl.full((), 0.7071067690849304, tl.float32)
    t9 = tl.erf(t8)
    t10 = tl.full((), 1.0, tl.float32) + t9
    t11 = t5 * t10
    t12 = t11.to(tl.float32).to(tl.bfloat16).to(tl.float32)
    return t12


@triton.jit
def gemm_gelu_bf16(
    A_ptr, B_ptr, bias_ptr, C_ptr,
    M, N, K,
    A_stride0, A_stride1, B_stride0, B_stride1, bias_stride0, C_stride0, C_stride1,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INDEX: tl.constexpr,
):
    pid = tl.program_id(0)
    pn = pid % tl.cdiv(N, BN)
    pm = pid // tl.cdiv(N, BN)
    zero = tl.full((BM, BN), 0.0, tl.float32)
    acc = zero
    offs_m = (pm * BM + tl.arange(0, BM)).to(INDEX)
    offs_n = (pn * BN + tl.arange(0, BN)).to(INDEX)
    for k in range(tl.cdiv(K, BK)):
        offs_k = (k * BK + tl.arange(0, BK)).to(INDEX)
        a = tl.load(
            A_ptr + offs_m[:, None] * A_stride0 + offs_k[None, :] * A_stride1,
            mask=(offs_m[:, None] < M) & (offs_k[None, :] < K),
            other=0.0,
        )
        b = tl.load(
            B_ptr + offs_k[:, None] * B_stride0 + offs_n[None, :] * B_stride1,
            mask=(offs_k[:, None] < K) & (offs_n[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(a, b, acc)
    v = tl.load(bias_ptr + offs_n * bias_stride0, mask=offs_n < N, other=0.0)
    r = map_r(acc, v[None, :].to(tl.float32)).to(tl.bfloat16)
    tl.store(
        C_ptr + offs_m[:, None] * C_stride0 + offs_n[None, :] * C_stride1,
        r,
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
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


def launch(A, B, bias, C, *, num_warps=8, num_stages=3, enable_fp_fusion=True, stream=None):
    A_shape = _shape("A", A, "bfloat16", 2)
    B_shape = _shape("B", B, "bfloat16", 2)
    bias_shape = _shape("bias", bias, "bfloat16", 1)
    C_shape = _shape("C", C, "bfloat16", 2)
    M = A_shape[0]
    if not M >= 1:
        raise ValueError(f"M is {M}, not M >= 1")
    N = B_shape[1]
    if not N >= 1:
        raise ValueError(f"N is {N}, not N >= 1")
    K = A_shape[1]
    _expect("A", A_shape, (M, K))
    _expect("B", B_shape, (K, N))
    _expect("bias", bias_shape, (N,))
    _expect("C", C_shape, (M, N))
    grid = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    if grid <= 0:
        return
    index = tl.int64 if max(_last(A), _last(B), _last(bias), _last(C)) >= 2**31 - 2**20 else tl.int32
    with _on(stream):
        gemm_gelu_bf16[(grid,)](
            A, B, bias, C,
            M, N, K,
            A.stride(0), A.stride(1), B.stride(0), B.stride(1), bias.stride(0), C.stride(0),
            C.stride(1),
            BK=BK, BM=BM, BN=BN, INDEX=index,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=enable_fp_fusion,
        )
