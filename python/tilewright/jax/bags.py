"""Embedding bags: sums, means and maxima of rows of a table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .core import NAMES, floats, kernel, need, same, wide

_MODES = {"sum": 0, "mean": 1, "max": 2}
_NONE = -(2**31)


def _text(name, dtype, table, positions, bags, weights, mode, padding):
    sizes = f"rows={table[0]} columns={table[1]} positions={positions} bags={bags}"
    return f"{name} dtype={NAMES[dtype.name]} mode={mode} {sizes} padding={padding} weights={len(weights)}"


def _shaped(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def _forward_twin(table, weights, indices, bag_of, count, place, mode, padding):
    c = wide(table.dtype)
    if mode == 2:
        rows = jnp.where(place < 0, 0, indices[jnp.maximum(place, 0)])
        found = table[rows, jnp.arange(table.shape[1])]
        return jnp.where(place < 0, 0, found)
    rows = table[indices].astype(c)
    if weights:
        rows = rows * weights[0].astype(c)[:, None]
    rows = jnp.where((indices == padding)[:, None], 0, rows)
    y = jnp.zeros((count.shape[0], table.shape[1]), c).at[bag_of].add(rows)
    return (y / jnp.maximum(count, 1)[:, None] if mode == 1 else y).astype(table.dtype)


def _table_twin(dy, weights, indices, bag_of, count, place, rows, mode, padding):
    c = wide(dy.dtype)
    g = dy.astype(c)[bag_of]
    if mode == 1:
        g = g / jnp.maximum(count, 1)[bag_of][:, None]
    if weights:
        g = g * weights[0].astype(c)[:, None]
    if mode == 2:
        g = jnp.where(place[bag_of] == jnp.arange(indices.shape[0])[:, None], g, 0)
    g = jnp.where((indices == padding)[:, None], 0, g)
    return jnp.zeros((rows, dy.shape[1]), c).at[indices].add(g).astype(dy.dtype)


def _weights_twin(dy, table, indices, bag_of, padding):
    c = wide(dy.dtype)
    g = (table[indices].astype(c) * dy[bag_of].astype(c)).sum(1)
    return jnp.where(indices == padding, 0, g).astype(dy.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _bags(table, weights, indices, offsets, mode, padding):
    positions, bags, columns = indices.shape[0], offsets.shape[0], table.shape[1]
    text = _text("bags", table.dtype, table.shape, positions, bags, weights, mode, padding)
    short = jnp.int32
    results = [
        _shaped((bags, columns), table.dtype), _shaped((positions,), short), _shaped((bags,), short),
        _shaped((bags, columns) if mode == 2 else (0,), short),
    ]  # fmt: skip
    # What is in no bag is in the first: those positions are there before.
    return tuple(kernel(text, results, table, indices, offsets, *weights, jnp.zeros(positions, short), aliases={3 + len(weights): 1}))


@_bags.defjvp
def _bags_slope(mode, padding, primals, tangents):
    table, weights, indices, offsets = primals
    y, *lists = _bags(table, weights, indices, offsets, mode, padding)
    _, dy = jax.jvp(lambda t, w: _forward_twin(t, w, indices, *lists, mode, padding), (table, weights), tangents[:2])
    return (y, *lists), (dy, *(_no_slope(one) for one in lists))


def _no_slope(x):
    return np.zeros(x.shape, jax.dtypes.float0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def _table_gradient(dy, weights, indices, bag_of, count, place, rows, mode, padding):
    positions, bags, columns = indices.shape[0], *dy.shape
    text = _text("bags_table", dy.dtype, (rows, columns), positions, bags, weights, mode, padding)
    order, position = jax.lax.sort((indices, jnp.arange(positions, dtype=jnp.int32)), num_keys=1, is_stable=True)
    zeros = jnp.zeros((rows, columns), dy.dtype)
    given = (dy, order, position, *weights, bag_of, count, place, zeros)
    return kernel(text, [zeros], *given, aliases={len(given) - 1: 0})[0]


@_table_gradient.defjvp
def _(rows, mode, padding, primals, tangents):
    dy, weights, *lists = primals
    _, slope = jax.jvp(lambda d, w: _table_twin(d, w, *lists, rows, mode, padding), (dy, weights), tangents[:2])
    return _table_gradient(*primals, rows, mode, padding), slope


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _weights_gradient(dy, table, indices, bag_of, padding):
    text = _text("bags_weights", dy.dtype, table.shape, indices.shape[0], dy.shape[0], (), 0, padding)
    return kernel(text, [_shaped(indices.shape, dy.dtype)], dy, table, indices, bag_of)[0]


@_weights_gradient.defjvp
def _(padding, primals, tangents):
    _, slope = jax.jvp(lambda d, t: _weights_twin(d, t, *primals[2:], padding), primals[:2], tangents[:2])
    return _weights_gradient(*primals, padding), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _bag(table, weights, indices, offsets, mode, padding):
    return _bags(table, weights, indices, offsets, mode, padding)[0]


def _forward(table, weights, indices, offsets, mode, padding):
    y, *lists = _bags(table, weights, indices, offsets, mode, padding)
    return y, (table, weights, indices, lists)


def _backward(mode, padding, saved, dy):
    table, weights, indices, lists = saved
    slope = _table_gradient(dy, weights, indices, *lists, table.shape[0], mode, padding)
    return slope, tuple(_weights_gradient(dy, table, indices, lists[0], padding) for _ in weights), None, None


_bag.defvjp(_forward, _backward)


def embedding_bag(
    indices, weight, offsets=None, mode: str = "mean", per_sample_weights=None, padding_idx: int | None = None, include_last_offset: bool = False
):
    """Sums, means or maxima of rows of `weight`: `[rows, columns]`, as `torch.nn.functional.embedding_bag`.

    `indices` is one axis of row numbers with `offsets`, where each bag begins, or a matrix, a bag per line. With `include_last_offset` the last
    offset is where the last bag ends. `per_sample_weights`, of the shape of `indices`, are for sums. The gradient of `weight` is dense,
    and its sums have one order. On the CPU a number outside of the table is refused; on a GPU its bag is NaN.
    """
    need(mode in _MODES, f"mode is {mode!r}; it must be one of {list(_MODES)}")
    (weight,) = floats(weight=weight)
    need(weight.ndim == 2, f"weight has shape {weight.shape}; it must be [rows, columns]")
    indices = _whole(indices, "indices")
    need(per_sample_weights is None or mode == "sum", "per_sample_weights are for mode='sum' only")
    weights = ()
    if per_sample_weights is not None:
        weights = floats(per_sample_weights=per_sample_weights)
        need(weights[0].shape == indices.shape, f"per_sample_weights has shape {weights[0].shape}, and indices {indices.shape}")
        weights = (weights[0].reshape(-1).astype(weight.dtype),)
    if indices.ndim == 2:
        need(offsets is None, "a matrix of row numbers takes no offsets")
        lines, length = indices.shape
        offsets = jnp.arange(lines, dtype=jnp.int32) * length
        indices, include_last_offset = indices.reshape(-1), False
    need(indices.ndim == 1, f"indices have shape {indices.shape}; they must have one axis or two")
    need(offsets is not None, "row numbers of one axis need offsets")
    offsets = _whole(offsets, "offsets")
    need(offsets.ndim == 1, f"offsets have shape {offsets.shape}; they must have one axis")
    need(not include_last_offset or offsets.shape[0] > 0, "include_last_offset needs at least one offset")
    padding = _NONE if padding_idx is None else padding_idx + weight.shape[0] if padding_idx < 0 else padding_idx
    # What follows the last offset is a bag that nobody asked for.
    y = _bag(*same(weight, weights, indices, offsets), _MODES[mode], int(padding))
    return y[:-1] if include_last_offset else y


def _whole(numbers, name):
    numbers = jnp.asarray(numbers)
    if not jnp.issubdtype(numbers.dtype, jnp.signedinteger):
        raise TypeError(f"{name} are {numbers.dtype}; they must be signed integers")
    return numbers.astype(jnp.int32)


__all__ = ["embedding_bag"]
