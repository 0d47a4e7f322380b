"""Rotary position embedding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .core import call, floats, need, same


def _rotary(g, x, cos, sin, back, mapped=None):
    x, cos, sin = g.spread(mapped, x, cos, sin)
    wide, axis = g.wide(x), len(g.shapes[x]) - 1
    half = g.shapes[x][-1] // 2
    # Tables have no axis of heads.
    tables = [g.reshape(t, (*g.shapes[t][:-2], 1, *g.shapes[t][-2:])) for t in (cos, sin)]
    halves = [[g.part(v, axis, first, half) for first in (0, half)] for v in (wide, *(g.cast(t, g.types[wide]) for t in tables))]
    (a, b), (cos0, cos1), (sin0, sin1) = halves
    if back:
        parts = g.map("a * c + b * d", a, b, cos0, sin1), g.map("a * c - b * d", b, a, cos1, sin0)
    else:
        parts = g.map("a * c - b * d", a, b, cos0, sin0), g.map("a * c + b * d", b, a, cos1, sin1)
    return g.op(f"concat axis={axis}", *(g.cast(p, g.types[x]) for p in parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotary_of(x, cos, sin, back):
    return call(_rotary, x, cos, sin, back=back)[0]


def _forward(x, cos, sin, back):
    return call(_rotary, x, cos, sin, back=back)[0], (cos, sin)


def _backward(back, tables, dy):
    return call(_rotary, dy, *tables, back=not back)[0], *map(jnp.zeros_like, tables)


_rotary_of.defvjp(_forward, _backward)


def rotary(x, cos, sin):
    """Rotates the pairs `(x[..., j], x[..., j + d/2])` of `x`: `[batch, heads, s, d]` by `cos` and `sin`: `[batch or 1, s, d]`, as Llama
    does (Su et al., 2021). The tables have no gradient: it is zero."""
    x, cos, sin = floats(x=x, cos=cos, sin=sin)
    shape, table = x.shape, cos.shape
    need(len(shape) == 4 and shape[3] % 2 == 0, f"x has shape {shape}; it must be [batch, heads, s, d] with an even d")
    fits = table == sin.shape and table in ((shape[0], *shape[2:]), (1, *shape[2:]))
    need(fits, f"cos has shape {table} and sin {sin.shape}; they must be [{shape[0]} or 1, {shape[2]}, {shape[3]}]")
    return _rotary_of(*same(x, cos, sin), False)


__all__ = ["rotary"]
