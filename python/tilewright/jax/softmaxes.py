"""Softmax and its logarithm along an axis."""

from __future__ import annotations

import functools

import jax

from .core import axis_of, call, floats


def _softmax(g, x, axis, log, mapped=None):
    axis += mapped is not None
    return g.cast(g.op(f"softmax axis={axis}{' log' if log else ''}", g.wide(x)), g.types[x])


def _softmax_gradient(g, y, dy, axis, log, mapped=None):
    y, dy = g.spread(mapped, y, dy)
    axis += mapped is not None
    p, d = g.wide(y), g.wide(dy)
    if log:
        dx = g.map("a - exp(b) * c", d, p, g.sum(d, [axis], True))
    else:
        dx = g.map("a * (b - c)", p, d, g.sum(g.map("a * b", p, d), [axis], True))
    return g.cast(dx, g.types[y])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _softmax_of(x, axis, log):
    return call(_softmax, x, axis=axis, log=log)[0]


def _softmax_forward(x, axis, log):
    y = call(_softmax, x, axis=axis, log=log)[0]
    return y, y


def _softmax_backward(axis, log, y, dy):
    return (call(_softmax_gradient, y, dy, axis=axis, log=log)[0],)


_softmax_of.defvjp(_softmax_forward, _softmax_backward)


def softmax(x, axis: int = -1):
    """`exp(x - max) / sum(exp(x - max))` along an axis, in one pass over each row. As `jax.nn.softmax`."""
    (x,) = floats(x=x)
    return _softmax_of(x, axis_of(axis, x.shape), False)


def log_softmax(x, axis: int = -1):
    """The logarithm of `softmax`, computed without taking it. As `jax.nn.log_softmax`."""
    (x,) = floats(x=x)
    return _softmax_of(x, axis_of(axis, x.shape), True)


__all__ = ["log_softmax", "softmax"]
