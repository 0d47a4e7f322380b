"""Rules for looking things up in order, and for what a mask picks: counted instead of searched, since elements are many and tables short.

    bucketize, searchsorted    the number of boundaries below
    nonzero_static             the number of elements before which so many are true
    masked_scatter             the number of true elements before, which is a place in the source
"""

from __future__ import annotations

import math

import torch

from .sizes import Unsupported
from .writer import Value, Writer, rule

aten = torch.ops.aten

# Comparisons, at most: beyond that a search is faster.
COMPARED_MAX = 2**24


def counted(w: Writer, node, boundaries: Value, values: Value, right: bool) -> Value:
    """How many of the last axis' boundaries are below each value, or not above it (`right`). NaN is beyond all."""
    sizes = [*boundaries.shape, *values.shape]
    if not all(isinstance(n, int) for n in sizes) or 0 in sizes:
        raise Unsupported("searching in symbolic sizes, or in nothing")
    count = boundaries.shape[-1]
    if math.prod(values.shape) * count > COMPARED_MAX:
        raise Unsupported("searching for many numbers in a long table")
    common = torch.promote_types(boundaries.dtype, values.dtype)
    result = node.meta["val"].dtype
    shape = (*values.shape, count)
    places = w.reshape(w.cast(values, common), [*values.shape, 1])
    if boundaries.rank > 1:
        boundaries = w.reshape(boundaries, [*boundaries.shape[:-1], 1, count])
    below = w.map(f"{{a}} {'<=' if right else '<'} {{b}}", w.cast(boundaries, common), places, dtype=torch.bool)
    if common.is_floating_point:
        below = w.map("{a} | ({b} != {b})", below, places, dtype=torch.bool)
    each = Value(w.cast(Value(below.number, torch.bool, shape), torch.int32).number, torch.int32, shape)
    return w.cast(w.reduce("sum", each, [len(shape) - 1], False), result)


@rule(aten.bucketize.Tensor)
def bucketize(w, node, values, boundaries, *, out_int32=False, right=False):
    return counted(w, node, boundaries, values, right)


@rule(aten.searchsorted.Tensor)
def searchsorted(w, node, boundaries, values, *, out_int32=False, right=False, side=None, sorter=None):
    if sorter is not None or (boundaries.rank > 1 and boundaries.rank != values.rank):
        raise Unsupported("searching with a table of positions")
    return counted(w, node, boundaries, values, right or side == "right")


@rule(aten.masked_scatter.default)
def masked_scatter(w, node, a, mask, source):
    wanted = node.meta["val"]
    if not all(isinstance(n, int) for n in (*wanted.shape, *source.shape)) or 0 in (*wanted.shape, *source.shape) or not wanted.dim():
        raise Unsupported("writing by a mask to symbolic sizes, or to nothing")
    # A mask that says the same of all elements of a row counts rows.
    count, row = wanted.numel(), row_of(node, wanted)
    rows = count // row
    if w.device == "cuda" and rows > SCANNED_MAX:
        raise Unsupported("writing by a long mask")
    whole = w.expand(w.cast(mask, torch.bool), wanted.shape)
    picked = w.reshape(whole, [rows, row])
    picked = Value(picked.number, torch.bool, (rows, row))
    first = w.reshape(w.slice(picked, 1, 0, 1), [rows])
    before = w.op("scan sum axis=0", Value(w.cast(first, torch.int64).number, torch.int64, (rows,)))
    last = math.prod(source.shape) // row - 1
    at = w.map(f"min(max({{a}} - 1, 0), {max(last, 0)})", before, dtype=torch.int64)
    found = w.op("gather axis=0", w.reshape(source, [math.prod(source.shape) // row, row]), Value(at.number, torch.int64, (rows,)))
    flat = w.reshape(w.expand(a, wanted.shape), [rows, row])
    return w.reshape(w.map("where({a}, {b}, {c})", picked, w.cast(found, a.dtype), flat, dtype=a.dtype), wanted.shape)


# Elements of a running count on a GPU, at most: it is one block's.
SCANNED_MAX = 2**14


def row_of(node, wanted) -> int:
    """How many neighbours of the result a mask says the same of, as its broadcast shows; of the source they are neighbours, too."""
    mask, source = node.args[1], node.args[2].meta["val"]
    while mask.target is aten.clone.default or mask.target is aten.alias.default:
        mask = mask.args[0]
    held = mask.args[0].meta["val"] if mask.target is aten.expand.default else mask.meta["val"]
    row, shape = 1, list(wanted.shape)
    ones = [1] * (len(shape) - held.dim()) + list(held.shape)
    for have, want in zip(reversed(ones), reversed(shape)):
        if have != 1:
            break
        row *= want
    return row if source.numel() % row == 0 and source.numel() >= row else 1


@rule(aten.nonzero_static.default)
def nonzero_static(w, node, a, *, size, fill_value=-1):
    sizes = list(a.shape)
    if not isinstance(size, int) or not all(isinstance(n, int) for n in sizes) or not sizes or 0 in sizes or size == 0:
        raise Unsupported("places of what is not zero, of symbolic sizes or of a scalar")
    count = math.prod(sizes)
    if count * size > COMPARED_MAX or (w.device == "cuda" and count > SCANNED_MAX):
        raise Unsupported("places of what is not zero in a large tensor")
    flat = Value(w.reshape(w.cast(a, torch.bool), [count]).number, torch.bool, (count,))
    seen = w.op("scan sum axis=0", Value(w.cast(flat, torch.int64).number, torch.int64, (count,)))
    number = w.op("iota axis=0", dtype=torch.int64, result=f"i64[{size},1]")
    # As many elements come before the one that is wanted as have seen no more.
    early = w.map("{a} <= {b}", w.reshape(seen, [1, count]), number, dtype=torch.bool)
    early = Value(w.cast(Value(early.number, torch.bool, (size, count)), torch.int64).number, torch.int64, (size, count))
    at = w.reduce("sum", early, [1], True)
    columns, step = [], 1
    for n in reversed(sizes):
        text = f"where({{a}} >= {count}, {int(fill_value)}, ({{a}} / {step}) % {n})"
        columns.insert(0, w.map(text, at, dtype=torch.int64))
        step *= n
    return columns[0] if len(columns) == 1 else w.op("concat axis=1", *columns)
