"""Layer norm and RMS norm, with an optional addition before them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .core import call, floats, need, same


def _layer_norm(g, x, weight, bias, eps, mapped=None):
    x, weight, bias = _of_rows(g, mapped, x, weight, bias)
    axis = len(g.shapes[x]) - 1
    y = g.op(f"layer_norm axis={axis} eps={eps!r}", g.wide(x), *(g.cast(v, g.types[g.wide(x)]) for v in (weight, bias)))
    return g.cast(y, g.types[x])


def _of_rows(g, mapped, x, *vectors):
    """Rows and the vectors that go with them, where some have a batch axis in front."""
    if mapped is None:
        return x, *vectors
    rank = len(g.shapes[x]) - mapped[0]
    (x,) = g.spread(mapped[:1], x)
    return x, *(g.lifted(v, m, rank) for v, m in zip(vectors, mapped[1:]))


def _of_gradient(g, mapped, x, weight, dy):
    """As `_of_rows`, for a gradient; and the axes of rows, over which gradients of the vectors are sums."""
    if mapped is None:
        return x, weight, dy, range(len(g.shapes[x]) - 1)
    x, weight = _of_rows(g, mapped[:2], x, weight)
    (dy,) = g.spread(mapped[2:], dy)
    return x, weight, dy, range(1, len(g.shapes[x]) - 1)


def _layer_norm_gradient(g, x, weight, dy, eps, mapped=None):
    x, weight, dy, rows = _of_gradient(g, mapped, x, weight, dy)
    axis = len(g.shapes[x]) - 1
    wide = g.wide(x)
    d, scale = g.cast(dy, g.types[wide]), g.cast(weight, g.types[wide])
    centred = g.map("a - b", wide, g.mean(wide, [axis]))
    factor = g.map(f"rsqrt(a + {eps!r})", g.mean(g.map("a * a", centred), [axis]))
    normal, weighted = g.map("a * b", centred, factor), g.map("a * b", d, scale)
    along = g.mean(g.map("a * b", weighted, normal), [axis])
    dx = g.map("a * (b - c - d * e)", factor, weighted, g.mean(weighted, [axis]), normal, along)
    dweight, dbias = g.sum(g.map("a * b", d, normal), rows), g.sum(d, rows)
    return g.cast(dx, g.types[x]), g.cast(dweight, g.types[weight]), g.cast(dbias, g.types[weight])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm_of(x, weight, bias, eps):
    return call(_layer_norm, x, weight, bias, eps=eps)[0]


def _layer_norm_forward(x, weight, bias, eps):
    return call(_layer_norm, x, weight, bias, eps=eps)[0], (x, weight)


def _layer_norm_backward(eps, saved, dy):
    return tuple(call(_layer_norm_gradient, *saved, dy, eps=eps))


_layer_norm_of.defvjp(_layer_norm_forward, _layer_norm_backward)


def layer_norm(x, weight=None, bias=None, eps: float = 1e-5, residual=None):
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis (Ba et al., 2016). `weight` and `bias`: `[n]`.

    With `residual`, of the shape of `x`: of `h = x + residual`, and the result is the pair `(y, h)`, from one kernel.
    """
    x, weight = _checked(x, weight, "weight", jnp.ones)
    x, bias = _checked(x, bias, "bias", jnp.zeros)
    x, vectors = same(x, (weight, bias.astype(weight.dtype)))
    return _layer_norm_of(x, *vectors, float(eps)) if residual is None else _added(x, residual, vectors, float(eps))


def _rms_norm(g, x, weight, eps, mapped=None):
    x, weight = _of_rows(g, mapped, x, weight)
    axis, wide = len(g.shapes[x]) - 1, g.wide(x)
    return g.cast(g.op(f"rms_norm axis={axis} eps={eps!r}", wide, g.cast(weight, g.types[wide])), g.types[x])


def _rms_norm_gradient(g, x, weight, dy, eps, mapped=None):
    x, weight, dy, rows = _of_gradient(g, mapped, x, weight, dy)
    axis, wide = len(g.shapes[x]) - 1, g.wide(x)
    d, scale = g.cast(dy, g.types[wide]), g.cast(weight, g.types[wide])
    factor = g.map(f"rsqrt(a + {eps!r})", g.mean(g.map("a * a", wide), [axis]))
    normal, weighted = g.map("a * b", wide, factor), g.map("a * b", d, scale)
    dx = g.map("a * (b - c * d)", factor, weighted, normal, g.mean(g.map("a * b", weighted, normal), [axis]))
    dweight = g.sum(g.map("a * b", d, normal), rows)
    return g.cast(dx, g.types[x]), g.cast(dweight, g.types[weight])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm_of(x, weight, eps):
    return call(_rms_norm, x, weight, eps=eps)[0]


def _rms_norm_forward(x, weight, eps):
    return call(_rms_norm, x, weight, eps=eps)[0], (x, weight)


def _rms_norm_backward(eps, saved, dy):
    return tuple(call(_rms_norm_gradient, *saved, dy, eps=eps))


_rms_norm_of.defvjp(_rms_norm_forward, _rms_norm_backward)


def rms_norm(x, weight=None, eps: float = 1e-6, residual=None):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (Zhang and Sennrich, 2019). `weight`: `[n]`.

    With `residual`, of the shape of `x`: of `h = x + residual`, and the result is the pair `(y, h)`, from one kernel.
    """
    x, weight = _checked(x, weight, "weight", jnp.ones)
    x, weight = same(x, weight)
    return _rms_norm_of(x, weight, float(eps)) if residual is None else _added(x, residual, (weight,), float(eps))


def _checked(x, vector, name, absent):
    """`x` and a vector for its last axis."""
    (x,) = floats(x=x)
    need(x.ndim >= 1, "x has no axes; it must be [..., n]")
    if vector is None:
        return x, absent(x.shape[-1:], x.dtype)
    (vector,) = floats(**{name: vector})
    need(vector.shape == x.shape[-1:], f"{name} has shape {vector.shape}; it must be {x.shape[-1:]}, the last axis of x")
    return x, vector


def _norm_of_sum(g, x, residual, *vectors, eps, mapped=None):
    """The norm of a sum, and the sum: with two vectors a layer norm."""
    if mapped is not None:
        x, residual = g.spread(mapped[:2], x, residual)
        mapped = (True, *mapped[2:])
    h = g.cast(g.map("a + b", g.wide(x), g.wide(residual)), g.types[x])
    norm = _layer_norm if len(vectors) == 2 else _rms_norm
    return norm(g, h, *vectors, eps=eps, mapped=mapped), h


def _norm_of_sum_gradient(g, h, weight, dy, dh, eps, shifts, mapped=None):
    before = mapped and mapped[:3]
    gradient = _layer_norm_gradient if shifts else _rms_norm_gradient
    dx, *others = gradient(g, h, weight, dy, eps=eps, mapped=before)
    if mapped is not None:
        (dh,) = g.spread(mapped[3:], dh)
    return g.cast(g.map("a + b", g.wide(dx), g.wide(dh)), g.types[h]), *others


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_of_sum_of(x, residual, vectors, eps):
    return tuple(call(_norm_of_sum, x, residual, *vectors, eps=eps))


def _norm_of_sum_forward(x, residual, vectors, eps):
    y, h = call(_norm_of_sum, x, residual, *vectors, eps=eps)
    return (y, h), (h, vectors)


def _norm_of_sum_backward(eps, saved, grads):
    h, vectors = saved
    dx, *others = call(_norm_of_sum_gradient, h, vectors[0], *grads, eps=eps, shifts=len(vectors) == 2)
    return dx, dx, tuple(others)


_norm_of_sum_of.defvjp(_norm_of_sum_forward, _norm_of_sum_backward)


def _added(x, residual, vectors, eps):
    (residual,) = floats(residual=residual)
    need(x.shape == residual.shape, f"residual has shape {residual.shape}; it must be {x.shape}, the shape of x")
    return _norm_of_sum_of(*same(x, residual.astype(x.dtype), vectors), eps)


__all__ = ["layer_norm", "rms_norm"]
