"""Dropout, with a residual and a norm. The mask is never stored: gradients draw it again."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from .core import NAMES, call, floats, kernel, need, same
from .norms import layer_norm, rms_norm


def _draw() -> str:
    """The random word of element `i` under a key of the words `k` and `l`: word `i % 4` of Philox4x32-7 (Salmon et al., 2011) at counter
    `i / 4`, as in crates/torch-ops/src/ops/dropout.rs."""
    lines = ["c0 = u32(i >> i64(2))", "d0 = u32(i >> i64(34))", "e0 = u32(0)", "f0 = u32(0)", "k0 = k", "l0 = l"]
    for r in range(7):
        n = r + 1
        lines += [
            f"p{r} = u64(c{r}) * u64({0xD2511F53})", f"q{r} = u64(e{r}) * u64({0xCD9E8D57})",
            f"c{n} = u32(q{r} >> u64(32)) ^ d{r} ^ k{r}", f"d{n} = u32(q{r})",
            f"e{n} = u32(p{r} >> u64(32)) ^ f{r} ^ l{r}", f"f{n} = u32(p{r})",
            f"k{n} = k{r} + u32({0x9E3779B9})", f"l{n} = l{r} + u32({0xBB67AE85})",
        ]  # fmt: skip
    lines.append("w = i & i64(3)")
    lets = "".join(f"let {line}; " for line in lines)
    return f"{lets}where(w == i64(0), c7, where(w == i64(1), d7, where(w == i64(2), e7, f7)))"


_DRAW = _draw()


def _kept(g, key, size, p, mapped=None):
    """Which of `size` elements stay, under each key."""
    rows = g.shapes[key][:-1]
    low, high = (g.part(key, len(rows), word, 1) for word in range(2))
    places = ",".join(["1"] * len(rows) + [str(size)])
    i = g.op(f"iota axis={len(rows)}", result=f"i64[{places}]")
    threshold = min(math.floor(p * 2**32 + 0.5), 2**32 - 1)
    word = g.op(f"map {{ i, k, l -> {_DRAW} }}", i, low, high)
    return g.map(f"a >= u32({threshold})", word)


def _dropout(g, x, key, *residual, p, mapped=None):
    shape = g.shapes[x]
    size = math.prod(shape)
    if mapped is not None:
        x, *residual = g.spread((mapped[0], *mapped[2:]), x, *residual)
        shape = g.shapes[x]
        size = math.prod(shape[1:])
    flat = (*shape[:1], size) if mapped is not None else (size,)
    keyed = None if mapped is None or not mapped[1] else (True,)
    kept = g.inline(_kept, key, size=size, p=p, **({} if keyed is None else {"mapped": keyed}))
    values = [g.wide(g.reshape(t, flat)) for t in (x, *residual)]
    scale = 1 / (1 - p) if p < 1 else 0.0
    y = g.map(f"where(b, a * {scale!r}, 0)", values[0], kept)
    if residual:
        y = g.map("a + b", y, values[1])
    return g.reshape(g.cast(y, g.types[x]), shape)


def _by_hand(x, key, *residual, p):
    """The kernel of the operator pack, which draws four words at a time; under `vmap` it is the graph."""
    text = f"dropout dtype={NAMES[x.dtype.name]} share={p!r} residual={len(residual)}"
    return kernel(text, [x], x, key, *residual)


_dropout.by_hand = _by_hand


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dropout_of(x, key, residual, p):
    return call(_dropout, x, key, *residual, p=p)[0]


def _forward(x, key, residual, p):
    return call(_dropout, x, key, *residual, p=p)[0], (key, len(residual))


def _backward(p, saved, dy):
    key, residuals = saved
    return call(_dropout, dy, key, p=p)[0], None, (dy,) * residuals


_dropout_of.defvjp(_forward, _backward)


def key_words(key):
    """The two words of a key, the lower one first."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        if not -(2**63) <= key < 2**64:
            raise ValueError(f"the key {key} has more than 64 bits")
        return jnp.asarray(np.array([key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF], np.uint32))
    key = jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        need(key.shape == (), f"key is an array of keys of shape {key.shape}; it must be one (jax.random.split gives more)")
        data = jax.random.key_data(key)
        return data[::-1] if data.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)
    if key.shape == (2,) and key.dtype == jnp.uint32:
        return key[::-1]
    if key.shape != () or not jnp.issubdtype(key.dtype, jnp.integer):
        raise TypeError(f"key is {key.dtype} of shape {key.shape}; it must be a key of jax.random or one integer")
    if key.dtype.itemsize == 8:
        return jnp.stack([key.astype(jnp.uint32), (key >> 32).astype(jnp.uint32)])
    high = jnp.where(key < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    return jnp.stack([key.astype(jnp.int32 if jnp.issubdtype(key.dtype, jnp.signedinteger) else jnp.uint32).astype(jnp.uint32), high])


def dropout(x, key, p: float = 0.5, training: bool = True, residual=None):
    """Zero with probability `p`, else `x / (1 - p)`; plus `residual`. Without `training` it is `x`, plus `residual`.

    `key` is a key of `jax.random`, or an integer of up to 64 bits: the same integer gives the same numbers on every device, and those of
    `tilewright.ops` under that key; `jax.random.key(n)` is the integer `n`. No mask is stored; the gradient draws the same
    numbers again. The numbers are not those of `jax.random.bernoulli`.
    """
    p = float(p)
    need(0.0 <= p <= 1.0, f"p is {p}; it must be in 0..1")
    (x,) = floats(x=x)
    if residual is not None:
        (residual,) = floats(residual=residual)
        need(residual.shape == x.shape, f"residual has shape {residual.shape}; it must be {x.shape}, the shape of x")
        residual = residual.astype(x.dtype)
    if not training or p == 0.0:
        return x if residual is None else x + residual
    return _dropout_of(*same(x, key_words(key), () if residual is None else (residual,)), p)


def dropout_rms_norm(x, residual, key, weight=None, eps: float = 1e-6, p: float = 0.5, training: bool = True):
    """`h = residual + dropout(x)` and its RMS norm: `(y, h)`. Two kernels in training, one without dropout."""
    if not training or p == 0.0:
        return rms_norm(x, weight, eps, residual)
    h = dropout(x, key, p, training, residual)
    return rms_norm(h, weight, eps), h


def dropout_layer_norm(x, residual, key, weight=None, bias=None, eps: float = 1e-5, p: float = 0.5, training: bool = True):
    """`h = residual + dropout(x)` and its layer norm: `(y, h)`. Two kernels in training, one without dropout."""
    if not training or p == 0.0:
        return layer_norm(x, weight, bias, eps, residual)
    h = dropout(x, key, p, training, residual)
    return layer_norm(h, weight, bias, eps), h


__all__ = ["dropout", "dropout_layer_norm", "dropout_rms_norm"]
