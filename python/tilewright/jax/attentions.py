"""Attention without stored scores. Its gradient takes some queries at a time, or is cuDNN's."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from .core import call, computed, floats, in_chunks, need, same, wide


def _attention(g, q, k, v, *mask, causal, scale, mapped=None):
    if mapped is not None:
        return _of_batches(g, q, k, v, *mask, causal=causal, scale=scale, mapped=mapped)
    score = "f64" if g.types[q] == "f64" else "f32"
    formula = f"{{ s -> s * {score}({scale!r}) }}"
    if mask and g.types[mask[0]] == "bool":
        formula = f"{{ s, m -> where(m, s * {score}({scale!r}), {score}(-inf)) }}"
    elif mask:
        mask = (g.cast(mask[0], score),)
        formula = f"{{ s, m -> s * {score}({scale!r}) + m }}"
    return g.op(f"attention score={score} {formula}{' causal' if causal else ''} zeros", q, k, v, *mask)


def _of_batches(g, q, k, v, *mask, causal, scale, mapped):
    """Two batch axes are one."""
    parts = g.spread(mapped[:3], q, k, v)
    outer, inner = g.shapes[parts[0]][:2]
    folded = [g.reshape(t, (outer * inner, *g.shapes[t][2:])) for t in parts]
    if mask and (mapped[3] or g.shapes[mask[0]][0] > 1):
        (whole,) = g.spread(mapped[3:], *mask)
        shape = g.shapes[whole]
        if shape[1] != inner:
            whole = g.op(f"expand [{','.join(map(str, (outer, inner, *shape[2:])))}]", whole)
        mask = (g.reshape(whole, (outer * inner, *shape[2:])),)
    y = _attention(g, *folded, *mask, causal=causal, scale=scale)
    return g.reshape(y, (outer, inner, *g.shapes[y][1:]))


def _rows(g, s, dp, mapped=None):
    """From rows of scores and the gradient of their softmax: the softmax, and their own gradient. Both are 0 where all scores are minus
    infinity."""
    s, dp = g.spread(mapped, s, dp)
    axis = len(g.shapes[s]) - 1
    power = g.map("where(b == -inf, 0, exp(a - b))", s, g.max(s, axis))
    p = g.map("where(b > 0, a / b, 0)", power, g.sum(power, [axis], True))
    return p, g.map("a * (b - c)", p, dp, g.sum(g.map("a * b", p, dp), [axis], True))


# Scores that are there at a time.
SCORES = 1 << 24


def _product(spec, a, b):
    """A product of arrays of one type, in the wide one. XLA's processors have none of narrow types with a wide result."""
    c = wide(a.dtype)
    if a.dtype == c:
        return jnp.einsum(spec, a, b, precision="highest")
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: jnp.einsum(spec, a.astype(c), b.astype(c), precision="highest"),
        default=lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=c),
    )


def _by_cudnn(q, k, v, dy, causal, scale):
    def forward(q, k, v):
        rows_first = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
        y = jax.nn.dot_product_attention(*rows_first, scale=scale, is_causal=causal, implementation="cudnn")
        return jnp.swapaxes(y, 1, 2)

    return jax.vjp(forward, q, k, v)[1](dy)


def _has_cudnn(q, k, v, mask, causal) -> bool:
    """Whether CUDA devices of this process have XLA's fused gradient for these: it is faster than products with kernels between them."""
    even = q.shape[2] == k.shape[2] or not causal
    fits = q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    if mask or not even or not fits or q.dtype.itemsize != 2 or 0 in q.shape or jax.default_backend() != "gpu":
        return False
    try:
        jax.eval_shape(functools.partial(_by_cudnn, causal=causal, scale=1.0), q, k, v, q)
    except Exception:  # What is missing, JAX says in several types.
        return False
    return True


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _fused(q, k, v, dy, causal, scale):
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        dy,
        cuda=functools.partial(_by_cudnn, causal=causal, scale=scale),
        default=lambda *a: _in_blocks(causal, scale, (*a[:3], ()), a[3])[:3],
    )


@_fused.defjvp
def _(causal, scale, primals, tangents):
    blocks = lambda q, k, v, dy: _in_blocks(causal, scale, (q, k, v, ()), dy)[:3]  # noqa: E731
    return _fused(*primals, causal, scale), jax.jvp(blocks, primals, tangents)[1]


def _gradient(causal, scale, saved, dy):
    if _has_cudnn(*saved, causal):
        return *_fused(*saved[:3], dy, causal, scale), ()
    return _in_blocks(causal, scale, saved, dy)


def _in_blocks(causal, scale, saved, dy):
    q, k, v, mask = saved
    (b, h, length, d), (groups, keys) = q.shape, k.shape[1:3]
    c = wide(q.dtype)
    each = h // groups

    def step(carried, at, q, dy, *mask):
        dk, dv = carried
        q, dy = (t.reshape(-1, b, groups, each, t.shape[-1]) for t in (q, dy))
        s = _product("nbged,bgtd->bgent", q, k) * scale
        if mask:
            # From [queries, batches, heads, keys] to [batches, groups, heads of a group, queries, keys].
            m = jnp.moveaxis(mask[0], 0, 2)
            m = m.reshape(m.shape[0], *((1, 1) if m.shape[1] == 1 else (groups, each)), *m.shape[2:])
            s = jnp.where(m, s, -jnp.inf) if m.dtype == jnp.bool_ else s + m.astype(c)
        if causal:
            s = jnp.where(jnp.arange(keys) > (at + keys - length)[:, None], -jnp.inf, s)
        p, ds = call(_rows, s, _product("nbgef,bgtf->bgent", dy, v))
        found = []
        if mask and mask[0].dtype != jnp.bool_:
            whole = ds.reshape(b, h, *ds.shape[3:])
            over = tuple(i for i in range(2) if mask[0].shape[i + 1] == 1)
            found = [jnp.moveaxis(whole.sum(over, keepdims=True), 2, 0)]
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dv = dv + _product("bgent,nbgef->bgtf", p, dy)
        dk = dk + _product("bgent,nbged->bgtd", ds, q) * scale
        dq = _product("bgent,bgtd->nbged", ds, k) * scale
        return (dk, dv), [dq.astype(q.dtype).reshape(-1, b, h, d), *found]

    rows = [jnp.moveaxis(t, 2, 0) for t in (q, dy, *mask)]
    block = max(1, min(length, SCORES // max(1, b * h * keys)))
    begin = jnp.zeros(k.shape, c), jnp.zeros(v.shape, c)
    (dk, dv), (dq, *dmask) = in_chunks(step, begin, block, jnp.arange(length), *rows)
    dmask = tuple(jnp.moveaxis(g, 0, 2).astype(m.dtype) for g, m in zip(dmask, mask)) or (None,) * len(mask)
    return jnp.moveaxis(dq, 0, 2), dk.astype(k.dtype), dv.astype(v.dtype), dmask


def _value(q, k, v, mask, causal, scale):
    if q.dtype != jnp.float64:
        return call(_attention, q, k, v, *mask, causal=causal, scale=scale)[0]
    # On GPUs there is no kernel for products of doubles.
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        *mask,
        cpu=lambda *arrays: call(_attention, *arrays, causal=causal, scale=scale)[0],
        default=lambda *arrays: computed(_attention, *arrays, causal=causal, scale=scale)[0],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention_of(q, k, v, mask, causal, scale):
    return _value(q, k, v, mask, causal, scale)


def _forward(q, k, v, mask, causal, scale):
    return _value(q, k, v, mask, causal, scale), (q, k, v, mask)


_attention_of.defvjp(_forward, _gradient)


def attention(q, k, v, causal: bool = False, scale: float | None = None, mask=None):
    """`softmax(scale * q k^T + mask) v` without storing the scores (Dao et al., 2022). `q`: `[batch, heads, queries, width]`,
    `k`: `[batch, kv heads, keys, width]`, `v`: `[batch, kv heads, keys, any width]`; `scale` defaults to `1 / sqrt(width)`.

    `mask` is added (floats) or says where attention is allowed (bool): `[batch or 1, heads or 1, queries, keys]`. With `causal`, query
    `s` sees keys up to `s + keys - queries`. Rows that see no key give 0. The gradient takes some queries at a time and never has
    all scores; its products are XLA's. For 16-bit types without a mask on CUDA devices it is XLA's fused one (cuDNN).
    For f64 on GPUs XLA computes all of it, and stores the scores.
    """
    q, k, v = floats(q=q, k=k, v=v)
    shapes = f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}"
    need(q.ndim == k.ndim == v.ndim == 4, f"{shapes}; they must be [batch, heads, length, width]")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must have one type")
    need(k.shape[:3] == v.shape[:3], f"{shapes}: k and v must have one batch, heads and length")
    need(q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3], f"{shapes}: q and k must have one batch and one width")
    need(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, f"{shapes}: the heads of q must be a multiple of those of k")
    need(k.shape[2] > 0 and k.shape[3] > 0, f"{shapes}: attention to no keys")
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    need(math.isfinite(scale), f"scale is {scale}")
    if mask is None:
        return _attention_of(*same(q, k, v, ()), bool(causal), scale)
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        (mask,) = floats(mask=mask)
    (b, h, s, _), t = q.shape, k.shape[2]
    fits = mask.ndim == 4 and mask.shape[0] in (1, b) and mask.shape[1] in (1, h) and mask.shape[2:] == (s, t)
    need(fits, f"mask has shape {mask.shape}; it must be [{b} or 1, {h} or 1, {s}, {t}]")
    return _attention_of(*same(q, k, v, (mask,)), bool(causal), scale)


__all__ = ["attention"]
