"""Softmax and its logarithm over the last axis."""

from __future__ import annotations

import torch

from ._define import pair, single, traced, wide


def _softmax_composed(x, log):
    f = x.to(wide(x.dtype))
    return (torch.log_softmax(f, -1) if log else torch.softmax(f, -1)).to(x.dtype)


def _backward_composed(dy, y, log):
    d, p = dy.to(wide(y.dtype)), y.to(wide(y.dtype))
    if log:
        dx = d - p.exp() * d.sum(-1, keepdim=True)
    else:
        dx = p * (d - (d * p).sum(-1, keepdim=True))
    return dx.to(y.dtype)


_softmax_backward = single("softmax_backward", fake=lambda dy, y, log: y.new_empty(y.shape), composed=_backward_composed)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.log = inputs[1]


def _gradient(ctx, dy):
    (y,) = ctx.saved_tensors
    if dy is not None and torch.is_grad_enabled():
        return _backward_composed(dy, y, ctx.log), None
    return None if dy is None else _softmax_backward(dy, y, ctx.log), None


_softmax = pair(
    "softmax",
    fake=lambda x, log: x.new_empty(x.shape),
    composed=_softmax_composed,
    save=_save,
    gradient=_gradient,
    twice=True,
)


_now = _softmax.now


def softmax(x: torch.Tensor, impl: str = "cuda") -> torch.Tensor:
    """`exp(x - max(x)) / sum(exp(x - max(x)))` over the last axis, computed in float32 (float64 for float64)."""
    if impl == "cuda" and not traced():
        y = _now(x, False)
        if y is not None:
            return y
    return _softmax.by(impl)(x, False)


def log_softmax(x: torch.Tensor, impl: str = "cuda") -> torch.Tensor:
    """The logarithm of `softmax(x)` over the last axis, without rounding in between; in the shape and type of `x`."""
    if impl == "cuda" and not traced():
        y = _now(x, True)
        if y is not None:
            return y
    return _softmax.by(impl)(x, True)
