"""Rules for operators that write to places which data name, and for sorting.

Our kernels have none for them: plans for processors run them on the host, one element after the other. That is worth it for small
tensors only (`HOST_MAX` elements), where leaving the group would cost more; larger ones and those on GPUs are PyTorch's.
"""

from __future__ import annotations

import math

import torch

from .shapes import axis_of
from .sizes import Unsupported
from .writer import Value, Writer, rule, used_results

aten = torch.ops.aten

# Elements of all operands together, up to which the host is not slower than a cut between groups.
HOST_MAX = 8192


def small(w: Writer, *values: Value) -> None:
    """Refuses what the host should not do."""
    counts = [math.prod(v.shape) if all(isinstance(n, int) for n in v.shape) else HOST_MAX + 1 for v in values]
    if w.device != "cpu" or sum(counts) > HOST_MAX:
        raise Unsupported("writing to computed places, or sorting, of more than a few elements")
    if 0 in counts:
        raise Unsupported("writing to computed places, or sorting, of no elements")


def positive(w: Writer, indices: Value, size: int) -> Value:
    """Positions from the front."""
    text = f"where({{a}} < 0, {{a}} + {size}, {{a}})"
    return Value(w.map(text, w.cast(indices, torch.int64), dtype=torch.int64).number, torch.int64, indices.shape)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(w, node, a, indices, values, accumulate=False):
    given = [axis for axis, i in enumerate(indices) if i is not None]
    tensors = [indices[axis] for axis in given]
    if not given or any(t.dtype not in (torch.int64, torch.int32) for t in tensors) or a.dtype is torch.bool:
        raise Unsupported("writing by a mask, or to truth values")
    small(w, a, values, *tensors)
    common = list(torch.broadcast_shapes(*(t.shape for t in tensors)))
    rest = [axis for axis in range(a.rank) if axis not in given]
    side_by_side = given == list(range(given[0], given[-1] + 1))
    # The axes of the values: those of the positions stand where the first of theirs does, or in front.
    front = given[0] if side_by_side else 0
    before, after = [a.shape[axis] for axis in rest[:front]], [a.shape[axis] for axis in rest[front:]]
    spread = w.expand(w.cast(values, a.dtype), [*before, *common, *after])
    places = list(range(front, front + len(common)))
    order = places + [i for i in range(len(before) + len(common) + len(after)) if i not in places]
    updates = w.permute(spread, order)
    columns = [w.reshape(w.expand(positive(w, t, a.shape[axis]), common), [*common, 1]) for axis, t in zip(given, tensors)]
    where = columns[0] if len(columns) == 1 else w.op(f"concat axis={len(common)}", *columns)
    to_front = [*given, *rest]
    written = w.op(f"scatter_nd {'add' if accumulate else 'set'}", w.permute(a, to_front), where, updates)
    return w.permute(written, [to_front.index(axis) for axis in range(a.rank)])


def scatter_to(w: Writer, a: Value, dim: int, indices: Value, source: Value, kind: str) -> Value:
    """Elements of `source` (a part as large as `indices`) to the places of an axis."""
    if a.dtype is torch.bool or a.rank == 0 or indices.rank != a.rank:
        raise Unsupported("writing to truth values or to a scalar")
    small(w, a, indices)
    axis = axis_of(dim, a.rank)
    for i, (have, want) in enumerate(zip(source.shape, indices.shape)):
        if have != want:
            cut = w.slice(source, i, 0, want)
            source = Value(cut.number, source.dtype, (*source.shape[:i], want, *source.shape[i + 1 :]))
    return w.op(f"scatter_elements axis={axis} {kind}", a, w.cast(indices, torch.int64), w.cast(source, a.dtype))


@rule(aten.scatter.src, aten.scatter_add.default, aten.scatter.reduce)
def scatter(w, node, a, dim, indices, source, reduce=None):
    kinds = {None: "set", "add": "add", "multiply": "mul"}
    kind = "add" if node.target is aten.scatter_add.default else kinds[reduce]
    return scatter_to(w, a, dim, indices, source, kind)


@rule(aten.scatter.value, aten.scatter.value_reduce)
def scatter_value(w, node, a, dim, indices, value, reduce=None):
    kinds = {None: "set", "add": "add", "multiply": "mul"}
    return scatter_to(w, a, dim, indices, w.expand(w.number(value, a.dtype), indices.shape), kinds[reduce])


@rule(aten.scatter_reduce.two)
def scatter_reduce(w, node, a, dim, indices, source, reduce, include_self=True):
    kinds = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    if reduce not in kinds:
        raise Unsupported("the mean of what is written to one place")
    if not include_self:
        # What is written to starts from the neutral element.
        info = torch.finfo(a.dtype) if a.dtype.is_floating_point else torch.iinfo(a.dtype)
        low, high = (-math.inf, math.inf) if a.dtype.is_floating_point else (info.min, info.max)
        neutral = {"sum": 0, "prod": 1, "amax": low, "amin": high}[reduce]
        start = w.expand(w.number(neutral, a.dtype), indices.shape)
        a = scatter_to(w, a, dim, indices, start, "set")
    return scatter_to(w, Value(a.number, a.dtype, tuple(node.meta["val"].shape)), dim, indices, source, kinds[reduce])


@rule(aten.sort.default, aten.sort.stable)
def sort(w, node, a, dim=-1, descending=False, *, stable=False, **_):
    if node.target is aten.sort.stable:
        dim, descending = node.kwargs.get("dim", -1), node.kwargs.get("descending", False)
    if 1 in used_results(node) and not stable:
        raise Unsupported("positions in sorted order: which of equal ones, PyTorch does not say")
    return sorted_first(w, node, a, dim, None, descending)


@rule(aten.topk.default)
def topk(w, node, a, k, dim=-1, largest=True, sorted=True):
    if 1 in used_results(node):
        raise Unsupported("positions of the largest: which of equal ones, PyTorch does not say")
    return sorted_first(w, node, a, dim, k, largest)


def sorted_first(w, node, a, dim, count, largest):
    """The first ones in order; equal ones keep theirs, and NaN is larger than all."""
    if a.rank == 0 or a.dtype is torch.bool:
        raise Unsupported("sorting a scalar or truth values")
    small(w, a)
    axis = axis_of(dim, a.rank)
    count = a.shape[axis] if count is None else count
    values, places = w.builder.op(f"top_k axis={axis} k=[{count}]{' largest' if largest else ''}", [a.number], None, w.origin)
    shape = tuple(node.meta["val"][0].shape)
    return Value(values, a.dtype, shape), Value(places, torch.int64, shape)
