"""Dropout, with a residual and a norm. The mask is never stored: gradients draw it again."""

from __future__ import annotations

import torch

from .. import _native
from ._define import _compiling, chosen, direct, elsewhere, fast, pair, promoted, single, traced
from .norms import layer_norm, rms_norm


def _words(n: int, key: torch.Tensor) -> torch.Tensor:
    """The first `n` words of Philox4x32-7 under the key, as int64: the same numbers as the kernels'."""
    low = 0xFFFFFFFF
    counter = torch.arange((n + 3) // 4, dtype=torch.int64, device=key.device)
    c = [counter & low, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    k = [key & low, (key >> 32) & low]

    def product(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # 32 by 32 bits from two halves, since int64 has no room for the product's sign.
        high, mid = a >> 16, a & 0xFFFF
        upper = x * high
        lower = x * mid + ((upper & 0xFFFF) << 16)
        return (upper >> 16) + (lower >> 32), lower & low

    for _ in range(7):
        (p_high, p_low), (q_high, q_low) = product(0xD2511F53, c[0]), product(0xCD9E8D57, c[2])
        c = [q_high ^ c[1] ^ k[0], q_low, p_high ^ c[3] ^ k[1], p_low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return torch.stack(c, -1).reshape(-1)[:n]


def _composed(x, residual, key, p):
    kept = _words(x.numel(), key.reshape(())).reshape(x.shape) >= min(round(p * 2**32), 2**32 - 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.where(kept, x.to(wide) * (1 / (1 - p) if p < 1 else 0.0), 0.0)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def _save(ctx, inputs, output):
    _, _, key, ctx.p = inputs
    ctx.save_for_backward(key)


def _gradient(ctx, dy):
    if dy is None:
        return None, None, None, None
    (key,) = ctx.saved_tensors
    dx = _dropout(dy, None, key, ctx.p) if ctx.needs_input_grad[0] else None
    return dx, dy if ctx.needs_input_grad[1] else None, None, None


_dropout = pair(
    "dropout",
    fake=lambda x, residual, key, p: x.new_empty(x.shape),
    composed=_composed,
    save=_save,
    gradient=_gradient,
    twice=True,
)


def _drawn_composed(x, residual, p):
    key = _key(x)
    return _composed(x, residual, key, p), key


# In eager mode the kernel draws its key itself. Graphs that are traced say so in an operator of PyTorch's, whose random numbers they know.
_drawn = fast(
    single("dropout_drawn", fake=lambda x, residual, p: (x.new_empty(x.shape), x.new_empty((1,), dtype=torch.int64)), composed=_drawn_composed)
)


_both_now = direct("dropout_drawn").call


class _Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, p):
        y, key = _both_now(x, residual, p) or _drawn(x, residual, p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(key)
        ctx.p = p
        return y

    @staticmethod
    def backward(ctx, dy):
        return _gradient(ctx, dy)[:2] + (None,)


_drawn_with_gradients = super(torch.autograd.Function, _Drawn).apply
_direct = direct("dropout_drawn", 1, 2)
_direct.differentiated(_drawn_with_gradients)
_now = _direct.call


def _key(x: torch.Tensor) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


# Whether the kernels of a kind of device can draw.
_DRAWS = dict(zip(("cpu", "cuda"), _native.operators_draw()))
_DRAWS["cpu"] &= _native.HAS_CPU
_DIRECT = any(_DRAWS.values())


def _checked(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p is {p}; it must be in 0..1")


def dropout(
    x: torch.Tensor, p: float = 0.5, training: bool = True, residual: torch.Tensor | None = None, impl: str = "cuda"
) -> torch.Tensor:
    """Zero with probability `p`, else `x / (1 - p)`; plus `residual`, of the shape of `x`. Without `training` it is `x`, plus `residual`.

    The key of the random numbers comes from PyTorch's generator of the device: `torch.manual_seed` repeats it, and a recorded CUDA graph
    draws new ones in each replay. No mask is stored; the gradient draws the same numbers again. The numbers are not those of
    `torch.nn.functional.dropout`, and the same for either `impl`. An element that is dropped is 0 even where it was not finite. Raises
    ValueError for a `p` outside of 0..1.
    """
    if impl == "cuda" and training and 0.0 < p <= 1.0 and _DIRECT and not traced():
        y = _now(x, residual, p)
        if y is not None:
            return y
    chosen(impl)
    _checked(p)
    if residual is not None:
        if residual.shape != x.shape:
            raise RuntimeError(f"residual has shape {list(residual.shape)}, and x {list(x.shape)}")
        x, residual = promoted(x, residual)
    if not training or p == 0.0:
        return x if residual is None else x + residual
    if impl == "triton":
        return _dropout.triton(x, residual, _key(x), float(p))
    if not _compiling() and not elsewhere() and _DRAWS.get(x.device.type, False):
        if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
            return _drawn_with_gradients(x, residual, float(p))
        return _drawn(x, residual, float(p))[0]
    return _dropout(x, residual, _key(x), float(p))


def dropout_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    p: float = 0.5,
    training: bool = True,
    impl: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = residual + dropout(x)` and its RMS norm: `(y, h)`. `x` and `residual` have one shape, `weight` is a vector of its last axis.
    Two kernels in training, one without dropout."""
    _checked(p)
    if not training or p == 0.0:
        return rms_norm(x, weight, eps=eps, residual=residual, impl=impl)
    h = dropout(x, p, training, residual, impl)
    return rms_norm(h, weight, eps=eps, impl=impl), h


def dropout_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    p: float = 0.5,
    training: bool = True,
    impl: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = residual + dropout(x)` and its layer norm: `(y, h)`. `x` and `residual` have one shape, `weight` and `bias` are vectors of its
    last axis. Two kernels in training, one without dropout."""
    _checked(p)
    if not training or p == 0.0:
        return layer_norm(x, weight, bias, eps=eps, residual=residual, impl=impl)
    h = dropout(x, p, training, residual, impl)
    return layer_norm(h, weight, bias, eps=eps, impl=impl), h
