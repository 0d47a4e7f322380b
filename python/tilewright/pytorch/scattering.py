"""Rules for operators that write to places which data name, and for sorting.

Our kernels have none for them, but for sums that a product with zeros and ones makes: plans for processors run them on the host, one element after the other. That is worth it for small
tensors only (`HOST_MAX` elements), where leaving the group would cost more; larger ones and those on GPUs are PyTorch's.
"""

from __future__ import annotations

import math

import torch

from .gradients import EMBEDDINGS_MAX
from .shapes import axis_of
from .sizes import Unsupported, text
from .writer import Value, Writer, literal, rule, used_results, wide

aten = torch.ops.aten

# Elements of all operands together, up to which the host is not slower than a cut between groups.
HOST_MAX = 8192


# On a GPU each element looks at the updates that may be for it: so many comparisons, and so many updates one after the other, at most.
LOOKS_MAX, UPDATES_MAX = 2**26, 1024


def small(w: Writer, *values: Value, looks: int | None = None) -> None:
    """Refuses what the host should not do, and what a GPU should not: `looks` is the number of updates that each element looks at."""
    counts = [math.prod(v.shape) if all(isinstance(n, int) for n in v.shape) else -1 for v in values]
    if min(counts) <= 0:
        raise Unsupported("writing to computed places, or sorting, of no elements, or of symbolic sizes")
    if w.device == "cpu" and sum(counts) <= HOST_MAX:
        return
    if w.device == "cuda" and looks is not None and looks <= UPDATES_MAX and counts[0] * looks <= LOOKS_MAX:
        return
    raise Unsupported("writing to computed places, or sorting, of more than a few elements")


def positive(w: Writer, indices: Value, size: int) -> Value:
    """Positions from the front."""
    text = f"where({{a}} < 0, {{a}} + {size}, {{a}})"
    return Value(w.map(text, w.cast(indices, torch.int64), dtype=torch.int64).number, torch.int64, indices.shape)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(w, node, a, indices, values, accumulate=False):
    given = [axis for axis, i in enumerate(indices) if i is not None]
    tensors = [indices[axis] for axis in given]
    if len(given) == 1 and given[0] == 0 and tensors[0].dtype is torch.bool:
        return masked_put(w, node, a, tensors[0], values, accumulate)
    if not given or any(t.dtype not in (torch.int64, torch.int32) for t in tensors) or a.dtype is torch.bool:
        raise Unsupported("writing by several masks, or to truth values")
    if not all(isinstance(n, int) for t in tensors for n in t.shape):
        raise Unsupported("writing to computed places of symbolic sizes")
    if accumulate and len(given) == 1 and (found := put_as_product(w, a, given[0], tensors[0], values)) is not None:
        return found
    small(w, a, values, *tensors, looks=math.prod(torch.broadcast_shapes(*(t.shape for t in tensors))))
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


def put_as_product(w: Writer, a: Value, axis: int, indices: Value, values: Value) -> Value | None:
    """Adding to computed places of one axis (gradients of lookups: tables of positions, weights of experts) as a product with zeros and ones;
    `None` where the host does it, or where that is more than PyTorch's kernel takes."""
    numbers = [*a.shape, *indices.shape]
    if w.device != "cpu" or not a.dtype.is_floating_point or not all(isinstance(n, int) for n in numbers) or 0 in numbers:
        return None
    count, size = math.prod(indices.shape), a.shape[axis]
    rest = [*a.shape[:axis], *a.shape[axis + 1 :]]
    columns = math.prod(rest)
    if (size + count) * columns <= HOST_MAX or count * size * columns > EMBEDDINGS_MAX["cpu"].get(a.dtype.itemsize, 0):
        return None
    spread = w.expand(w.cast(values, a.dtype), [*a.shape[:axis], *indices.shape, *a.shape[axis + 1 :]])
    places = list(range(axis, axis + indices.rank))
    order = [*places, *(i for i in range(len(rest) + indices.rank) if i not in places)]
    updates = Value(w.reshape(w.permute(spread, order), [count, columns]).number, a.dtype, (count, columns))
    row = w.op("iota axis=1", dtype=torch.int64, result=f"i64[{count},{size}]")
    one, none = literal(1, a.dtype), literal(0, a.dtype)
    hit = w.map(f"where({{a}} == {{b}}, {one}, {none})", w.reshape(positive(w, indices, size), [count, 1]), row, dtype=a.dtype)
    total = w.reshape(w.contract("ps,pc->sc", Value(hit.number, a.dtype, (count, size)), updates), [size, *rest])
    total = w.permute(Value(total.number, a.dtype, (size, *rest)), [*range(1, axis + 1), 0, *range(axis + 1, a.rank)])
    return w.map("{a} + {b}", a, Value(total.number, a.dtype, tuple(a.shape)), dtype=a.dtype)


def masked_put(w, node, a, mask, values, accumulate):
    """Writing by a mask of the first axes, the same to each place that it names."""
    rest = list(a.shape[mask.rank :])
    if values.rank > len(rest) and not all(n == 1 for n in values.shape[: values.rank - len(rest)]):
        raise Unsupported("writing values by a mask")
    if values.rank > len(rest):
        values = w.reshape(values, values.shape[values.rank - len(rest) :])
    if not all(isinstance(n, int) for n in values.shape):
        raise Unsupported("writing values of symbolic sizes by a mask")
    mask = w.reshape(mask, [*mask.shape, *[1] * len(rest)])
    text = "where({a}, {c} + {b}, {c})" if accumulate else "where({a}, {b}, {c})"
    return w.map(text, mask, w.cast(values, a.dtype), a, dtype=a.dtype)


# Updates of one line up to which each element is compared with all of them, in the kernel of what is around.
COMPARED_MAX = 8


def compared(w: Writer, a: Value, axis: int, indices: Value, source: Value, kind: str) -> Value | None:
    """The same as `scatter_to` where a line has few updates: the last one named stays, or all are combined. `None` where that is not so."""
    same = all(i == axis or str(n) == str(m) for i, (n, m) in enumerate(zip(indices.shape, a.shape)))
    count = indices.shape[axis]
    if kind not in ("set", "add") or not same or not isinstance(count, int) or not 1 <= count <= COMPARED_MAX:
        return None
    shape = ",".join(text(n) for n in a.shape)
    here = w.op(f"iota axis={axis}", dtype=torch.int64, result=f"i64[{shape}]")
    size = w.number(a.shape[axis], torch.int64)
    indices = w.map("where({a} < 0, {a} + {b}, {a})", w.cast(indices, torch.int64), size, dtype=torch.int64)
    indices = Value(indices.number, torch.int64, tuple(source.shape))
    score = wide(a.dtype) if kind == "add" else a.dtype
    total = w.cast(a, score)
    for i in range(count):
        at, new = (w.slice(v, axis, i, 1) for v in (indices, source))
        body = "where({a} == {b}, {c} + {d}, {c})" if kind == "add" else "where({a} == {b}, {d}, {c})"
        total = w.map(body, here, at, total, w.cast(new, score), dtype=score)
    return w.cast(Value(total.number, score, tuple(a.shape)), a.dtype)


def scatter_to(w: Writer, a: Value, dim: int, indices: Value, source: Value, kind: str) -> Value:
    """Elements of `source` (a part as large as `indices`) to the places of an axis."""
    if a.rank == 0 or indices.rank == 0:
        one = [w.reshape(v, [1]) for v in (a, indices, source) if v.rank == 0]
        if len(one) < 3:
            raise Unsupported("writing to a scalar")
        return w.reshape(scatter_to(w, one[0], 0, one[1], one[2], kind), [])
    axis = axis_of(dim, a.rank)
    for i, (have, want) in enumerate(zip(source.shape, indices.shape)):
        if have != want:
            cut = w.slice(source, i, 0, want)
            source = Value(cut.number, source.dtype, (*source.shape[:i], want, *source.shape[i + 1 :]))
    found = compared(w, a, axis, indices, source, kind)
    if found is not None:
        return found
    if a.dtype is torch.bool:
        raise Unsupported("writing to truth values")
    small(w, a, indices, looks=indices.shape[axis])
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
        distinct(a)
    return sorted_first(w, node, a, dim, None, descending)


@rule(aten.topk.default)
def topk(w, node, a, k, dim=-1, largest=True, sorted=True):
    if 1 in used_results(node):
        distinct(a)
    return sorted_first(w, node, a, dim, k, largest)


def distinct(a: Value) -> None:
    """Refuses numbers that are often equal. Which of equal ones comes first PyTorch does not say: ours is the first of them."""
    if a.dtype not in (torch.float32, torch.float64):
        raise Unsupported("positions in order among few different numbers: which of equal ones, PyTorch does not say")


# What the kernel for the largest elements of rows takes on a GPU: so many of them, of these types.
SELECTED_MAX, SELECTED = 64, (torch.float32, torch.float16, torch.bfloat16)


def sorted_first(w, node, a, dim, count, largest):
    """The first ones in order; equal ones keep theirs, and NaN is larger than all."""
    if a.rank == 0 or a.dtype is torch.bool:
        raise Unsupported("sorting a scalar or truth values")
    axis = axis_of(dim, a.rank)
    count = a.shape[axis] if count is None else count
    if w.device == "cpu":
        small(w, a)
    elif not all(isinstance(n, int) for n in (*a.shape, count)) or count > SELECTED_MAX or a.dtype not in SELECTED or a.shape[axis:] != a.shape[axis : axis + 1]:
        raise Unsupported("sorting, or many of the largest")
    values, places = w.builder.op(f"top_k axis={axis} k=[{count}]{' largest' if largest else ''}", [a.number], None, w.origin)
    shape = tuple(node.meta["val"][0].shape)
    return Value(values, a.dtype, shape), Value(places, torch.int64, shape)
