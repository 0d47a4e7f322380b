"""RMS norm and layer norm, with an optional addition before them."""

from __future__ import annotations

from typing import overload

import torch

from ._define import again, pair, promoted, single, traced, wide


def _statistics(x):
    return x.new_empty((*x.shape[:-1], 1), dtype=wide(x.dtype))


def _fresh(x):
    return x.new_empty(x.shape)


def _vector_like(vector, x):
    return x.new_empty((0,)) if vector is None else vector.new_empty(vector.shape)


# ---- the same from PyTorch's operators ---------------------------------------------------------------


def _rms(x, weight, eps):
    f = x.to(wide(x.dtype))
    rstd = torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    y = f * rstd
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype), rstd


def _add_rms(x, residual, weight, eps):
    h = (x.to(wide(x.dtype)) + residual.to(wide(x.dtype))).to(x.dtype)
    y, rstd = _rms(h, weight, eps)
    return y, h, rstd


def _layer(x, weight, bias, eps):
    f = x.to(wide(x.dtype))
    mean = f.mean(-1, keepdim=True)
    d = f - mean
    rstd = torch.rsqrt(d.square().mean(-1, keepdim=True) + eps)
    y = d * rstd
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype), mean, rstd


def _add_layer(x, residual, weight, bias, eps):
    h = (x.to(wide(x.dtype)) + residual.to(wide(x.dtype))).to(x.dtype)
    y, mean, rstd = _layer(h, weight, bias, eps)
    return y, h, mean, rstd


def _norm_backward(dy, x, mean, rstd, dh, weight, bias, centred):
    c = wide(x.dtype)
    d = dy.to(c)
    z = (x.to(c) - (mean if centred else 0)) * rstd
    g = d if weight is None else d * weight.to(c)
    dx = g - z * (g * z).mean(-1, keepdim=True)
    if centred:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    if dh is not None:
        dx = dx + dh.to(c)
    rows = tuple(range(x.dim() - 1))
    dw = x.new_empty((0,)) if weight is None else _over_rows(d * z, rows).to(weight.dtype)
    db = x.new_empty((0,)) if bias is None else _over_rows(d, rows).to(bias.dtype)
    return dx.to(x.dtype), dw, db


def _over_rows(x, rows):
    return x.sum(rows) if rows else x.clone()


# ---- the operators -----------------------------------------------------------------------------------

_rms_norm_backward = single(
    "rms_norm_backward",
    fake=lambda dy, x, rstd, dh, weight, eps: (_fresh(x), _vector_like(weight, x)),
    composed=lambda dy, x, rstd, dh, weight, eps: _norm_backward(dy, x, None, rstd, dh, weight, None, False)[:2],
)
_layer_norm_backward = single(
    "layer_norm_backward",
    fake=lambda dy, x, mean, rstd, dh, weight, bias, eps: (_fresh(x), _vector_like(weight, x), _vector_like(bias, x)),
    composed=lambda dy, x, mean, rstd, dh, weight, bias, eps: _norm_backward(dy, x, mean, rstd, dh, weight, bias, True),
)


def _save_rms(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    y, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)


def _rms_gradient(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    if dy is None:
        return None, None, None
    if torch.is_grad_enabled():
        return again(lambda x, w: _rms(x, w, ctx.eps)[0], (x, weight), (dy,)) + (None,)
    dx, dw = _rms_norm_backward(dy, x, rstd, None, weight, ctx.eps)
    return dx, None if weight is None else dw, None


def _save_add_rms(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    _, h, rstd = output
    ctx.save_for_backward(h, weight, rstd)
    ctx.mark_non_differentiable(rstd)


def _add_rms_gradient(ctx, dy, dh, _):
    h, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dh, dh, None, None
    if torch.is_grad_enabled():
        dx, dw = again(lambda h, w: _rms(h, w, ctx.eps)[0], (h, weight), (dy,))
        dx = dx if dh is None else dh if dx is None else dx + dh
        return dx, dx, dw, None
    dx, dw = _rms_norm_backward(dy, h, rstd, dh, weight, ctx.eps)
    return dx, dx, None if weight is None else dw, None


def _save_layer(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _layer_gradient(ctx, dy, _mean, _rstd):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:
        return None, None, None, None
    if torch.is_grad_enabled():
        return again(lambda x, w, b: _layer(x, w, b, ctx.eps)[0], (x, weight, bias), (dy,)) + (None,)
    dx, dw, db = _layer_norm_backward(dy, x, mean, rstd, None, weight, bias, ctx.eps)
    return dx, None if weight is None else dw, None if bias is None else db, None


def _save_add_layer(ctx, inputs, output):
    _, _, weight, bias, ctx.eps = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(h, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _add_layer_gradient(ctx, dy, dh, _mean, _rstd):
    h, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:
        return dh, dh, None, None, None
    if torch.is_grad_enabled():
        dx, dw, db = again(lambda h, w, b: _layer(h, w, b, ctx.eps)[0], (h, weight, bias), (dy,))
        dx = dx if dh is None else dh if dx is None else dx + dh
        return dx, dx, dw, db, None
    dx, dw, db = _layer_norm_backward(dy, h, mean, rstd, dh, weight, bias, ctx.eps)
    return dx, dx, None if weight is None else dw, None if bias is None else db, None


_rms_norm = pair(
    "rms_norm",
    fake=lambda x, weight, eps: (_fresh(x), _statistics(x)),
    composed=_rms,
    save=_save_rms,
    gradient=_rms_gradient,
    kept=1,
    twice=True,
)
_add_rms_norm = pair(
    "add_rms_norm",
    fake=lambda x, residual, weight, eps: (_fresh(x), _fresh(x), _statistics(x)),
    composed=_add_rms,
    save=_save_add_rms,
    gradient=_add_rms_gradient,
    kept=2,
    twice=True,
    alike=2,
)
_layer_norm = pair(
    "layer_norm",
    fake=lambda x, weight, bias, eps: (_fresh(x), _statistics(x), _statistics(x)),
    composed=_layer,
    save=_save_layer,
    gradient=_layer_gradient,
    kept=1,
    twice=True,
)
_add_layer_norm = pair(
    "add_layer_norm",
    fake=lambda x, residual, weight, bias, eps: (_fresh(x), _fresh(x), _statistics(x), _statistics(x)),
    composed=_add_layer,
    save=_save_add_layer,
    gradient=_add_layer_gradient,
    kept=2,
    twice=True,
    alike=2,
)


_rms_now, _add_rms_now = _rms_norm.now, _add_rms_norm.now
_layer_now, _add_layer_now = _layer_norm.now, _add_layer_norm.now


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, residual: None = None, impl: str = "cuda"
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, *, residual: torch.Tensor, impl: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, residual: torch.Tensor | None = None, impl: str = "cuda"
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`x / sqrt(mean(x * x) + eps) * weight` over the last axis, computed in float32 (float64 for float64), in the type of `x`.

    With `residual`, of the shape of `x`: the norm of `h = x + residual`, and the result is the pair `(y, h)`, from one pass
    over memory. `weight` is a vector of any float type.
    """
    if impl == "cuda" and not traced():
        y = _rms_now(x, weight, eps) if residual is None else _add_rms_now(x, residual, weight, eps)
        if y is not None:
            return y
    if residual is None:
        return _rms_norm.by(impl)(x, weight, eps)
    x, residual = promoted(x, residual)
    return _add_rms_norm.by(impl)(x, residual, weight, eps)


@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5, residual: None = None, impl: str = "cuda"
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5, *, residual: torch.Tensor, impl: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]: ...


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5, residual: torch.Tensor | None = None, impl: str = "cuda"
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, computed in float32 (float64 for float64).

    `weight` and `bias` are vectors of any float type. With `residual`, of the shape of `x`: of `h = x + residual`, and the result is the
    pair `(y, h)`.
    """
    if impl == "cuda" and not traced():
        y = _layer_now(x, weight, bias, eps) if residual is None else _add_layer_now(x, residual, weight, bias, eps)
        if y is not None:
            return y
    if residual is None:
        return _layer_norm.by(impl)(x, weight, bias, eps)
    x, residual = promoted(x, residual)
    return _add_layer_norm.by(impl)(x, residual, weight, bias, eps)
