"""Rules for operators that move elements and do no arithmetic: views, slices, joins, counting, looking up."""

from __future__ import annotations

import torch

from .sizes import Unsupported, order_in_memory, text
from .writer import Value, rule

aten = torch.ops.aten


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis % rank if rank else 0


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_copy.default,
    aten.unsqueeze_copy.default,
    aten.squeeze_copy.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    aten._reshape_copy.default,
)
def reshape(w, node, a, *_):
    return w.followed(a, w.reshape(a, node.meta["val"].shape))


@rule(aten.permute.default, aten.permute_copy.default)
def permute(w, node, a, order):
    return w.permute(a, [axis_of(axis, a.rank) for axis in order])


@rule(aten.t.default, aten.t_copy.default)
def transpose_matrix(w, node, a):
    return w.permute(a, [1, 0]) if a.rank == 2 else a


@rule(aten.transpose.int, aten.transpose_copy.int)
def transpose(w, node, a, first, second):
    order = list(range(a.rank))
    first, second = axis_of(first, a.rank), axis_of(second, a.rank)
    order[first], order[second] = order[second], order[first]
    return w.permute(a, order)


@rule(aten.expand.default, aten.expand_copy.default)
def expand(w, node, a, *_, **options):
    return w.expand(a, node.meta["val"].shape)


def first_of_slice(a: Value, axis: int, start):
    """The first coordinate of a slice, negative starts counted from the end."""
    size = a.shape[axis]
    if start is None:
        return 0
    if isinstance(start, int):
        if isinstance(size, int):
            return max(0, min(start + size if start < 0 else start, size))
        return f"max(0, {text(size)} - {-start})" if start < 0 else f"min({start}, {text(size)})"
    if isinstance(start, torch.SymInt) and bool(start.node.expr.is_negative):
        return f"max(0, {text(size)} - ({text(-start.node.expr)}))"
    if isinstance(start, torch.SymInt) and bool(start.node.expr.is_nonnegative):
        return f"min({text(start)}, {text(size)})"
    raise Unsupported(f"a slice from {start}")


@rule(aten.slice.Tensor, aten.slice_copy.Tensor)
def slice_(w, node, a, dim=0, start=None, end=None, step=1):
    axis = axis_of(dim, a.rank)
    if not isinstance(step, int):
        raise Unsupported("a slice with a symbolic step")
    return w.slice(a, axis, first_of_slice(a, axis, start), node.meta["val"].shape[axis], step)


@rule(aten.select.int, aten.select_copy.int)
def select(w, node, a, dim, index):
    axis = axis_of(dim, a.rank)
    if not isinstance(index, int):
        raise Unsupported("selecting a symbolic index")
    at = text(index) if index >= 0 else f"{text(a.shape[axis])} - {-index}"
    return w.reshape(w.slice(a, axis, at, 1), node.meta["val"].shape)


@rule(aten.narrow_copy.default)
def narrow(w, node, a, dim, start, length):
    axis = axis_of(dim, a.rank)
    return w.slice(a, axis, first_of_slice(a, axis, start), node.meta["val"].shape[axis])


@rule(aten.diagonal.default, aten.diagonal_copy.default)
def diagonal(w, node, a, offset=0, dim1=0, dim2=1):
    """The two axes as one, in which the elements of a diagonal stand a row and a column apart."""
    dim1, dim2 = axis_of(dim1, a.rank), axis_of(dim2, a.rank)
    rows, columns = a.shape[dim1], a.shape[dim2]
    wanted = node.meta["val"].shape
    if not isinstance(rows, int) or not isinstance(columns, int):
        raise Unsupported("the diagonal of symbolic sizes")
    others = [axis for axis in range(a.rank) if axis not in (dim1, dim2)]
    matrix = w.permute(a, [*others, dim1, dim2])
    flat = w.reshape(matrix, [*(a.shape[axis] for axis in others), rows * columns])
    flat = Value(flat.number, a.dtype, (*(a.shape[axis] for axis in others), rows * columns))
    first = offset if offset >= 0 else -offset * columns
    return w.slice(flat, a.rank - 2, first if wanted[-1] else 0, wanted[-1], columns + 1)


@rule(aten.as_strided.default, aten.as_strided_copy.default)
def as_strided(w, node, a, size, stride, offset=None):
    """Elements of the memory behind a tensor: its axes in another order, or else a lookup."""
    base = node.args[0].meta["val"]
    order = order_in_memory(base)
    given = [*size, *stride, *base.shape, *base.stride(), base.storage_offset() if offset is None else offset, base.storage_offset()]
    if order is None or not all(isinstance(n, int) for n in given):
        raise Unsupported("strides in memory with gaps, or symbolic ones")
    first = given[-2] - given[-1]
    count = base.numel()
    if 0 in size:
        return w.expand(w.number(0, a.dtype), size)
    last = first + sum((n - 1) * s for n, s in zip(size, stride))
    if first < 0 or last >= count:
        raise Unsupported("strides that leave the tensor")
    flat = w.reshape(a if order == list(range(a.rank)) else w.permute(a, order), [count])
    # The axes from the largest stride on: when they are the tensor's memory in whole, this is a view.
    axes = sorted((axis for axis in range(len(size)) if size[axis] != 1), key=lambda axis: -stride[axis])
    expected = 1
    for axis in reversed(axes):
        expected = expected * size[axis] if stride[axis] == expected else 0
    if expected == count and first == 0:
        ones = [axis for axis in range(len(size)) if size[axis] == 1]
        places = [*ones, *axes]
        whole = w.reshape(flat, [size[axis] for axis in places])
        return w.permute(whole, [places.index(axis) for axis in range(len(size))]) if size else w.reshape(whole, [])
    shape = ",".join(map(str, size))
    at = w.expand(w.number(first, torch.int64), size)
    for axis, step in enumerate(stride):
        if step and size[axis] > 1:
            along = w.op(f"iota axis={axis}", dtype=torch.int64, result=f"i64[{shape}]")
            at = w.map(f"{{a}} + {{b}} * {step}", at, along, dtype=torch.int64)
    return w.op("gather axis=0", flat, at)


@rule(aten.unfold.default, aten.unfold_copy.default)
def unfold(w, node, a, dim, size, step):
    """Windows along an axis, as a last axis."""
    if a.rank == 0:
        return w.reshape(a, node.meta["val"].shape)
    axis, count = axis_of(dim, a.rank), node.meta["val"].shape[axis_of(dim, a.rank)]
    if not isinstance(count, int) or not isinstance(size, int):
        raise Unsupported("windows of symbolic sizes")
    shape = f"i64[{count},{size}]"
    rows, columns = (w.op(f"iota axis={i}", dtype=torch.int64, result=shape) for i in (0, 1))
    at = w.map(f"{{a}} * {step} + {{b}}", rows, columns, dtype=torch.int64)
    found = w.op(f"gather axis={axis}", a, at)
    order = [i for i in range(a.rank + 1) if i != axis + 1] + [axis + 1]
    return w.permute(found, order)


@rule(aten.tril_indices.default, aten.triu_indices.default)
def triangle(w, node, rows, columns, offset=0, **options):
    function = torch.tril_indices if node.target is aten.tril_indices.default else torch.triu_indices
    wanted = node.meta["val"]
    return w.table(node.name, lambda: function(rows, columns, offset, dtype=wanted.dtype))


@rule(aten.flip.default)
def flip(w, node, a, dims):
    for axis in {axis_of(d, a.rank) for d in dims}:
        a = w.slice(a, axis, f"{text(node.meta['val'].shape[axis])} - 1", node.meta["val"].shape[axis], -1)
    return a


@rule(aten.cat.default)
def cat(w, node, tensors, dim=0):
    wanted = node.meta["val"]
    axis = axis_of(dim, wanted.dim())
    turned = halves_turned(w, node, axis) if w.device == "cuda" else None
    if turned is not None:
        return turned
    # PyTorch lets vectors of no elements join anything.
    parts = [t for t in tensors if not (t.rank == 1 and wanted.dim() > 1)]
    parts = [w.cast(t, wanted.dtype) for t in parts]
    return parts[0] if len(parts) == 1 else w.op(f"concat axis={axis}", *parts)


def halves_turned(w, node, axis) -> Value | None:
    """Two parts of tensors along the last axis, maybe with a minus, as one elementwise function of shifted tensors: rotary embeddings turn
    halves so, and what follows reads them where they are. `None` for other joins."""
    wanted = node.meta["val"]
    nodes = node.args[0]
    sizes = list(wanted.shape)
    if len(nodes) != 2 or axis != wanted.dim() - 1 or not all(isinstance(n, int) for n in sizes) or not wanted.dtype.is_floating_point:
        return None
    shifted, minus, begin = [], [], 0
    for part in nodes:
        size = part.meta["val"].shape[-1]
        minus.append(part.target is aten.neg.default)
        if minus[-1]:
            part = part.args[0]
        if part.target is not aten.slice.Tensor:
            return None
        names = ("base", "dim", "start", "end", "step")
        given = {"dim": 0, "start": None, "step": 1, **dict(zip(names, part.args)), **part.kwargs}
        if given["dim"] % len(sizes) != axis or given["step"] != 1:
            return None
        base, start = given["base"], given["start"] or 0
        value, held = w.values.get(base), base.meta["val"]
        if not isinstance(value, Value) or not isinstance(start, int) or start < 0 or held.dtype != wanted.dtype:
            return None
        low = begin - start
        low_text, high_text = ["0"] * len(sizes), ["0"] * len(sizes)
        low_text[axis], high_text[axis] = str(low), str(sizes[axis] - low - held.shape[-1])
        shifted.append(w.op(f"pad lo=[{','.join(low_text)}] hi=[{','.join(high_text)}] constant=0.0", value))
        begin += size
    first = nodes[0].meta["val"].shape[-1]
    column = w.op(f"iota axis={axis}", dtype=torch.int64, result=f"i64[{','.join(map(str, sizes))}]")
    a, b = ("-{b}" if minus[0] else "{b}"), ("-{c}" if minus[1] else "{c}")
    return w.map(f"where({{a}} < {first}, {a}, {b})", column, *shifted, dtype=wanted.dtype)


@rule(aten.stack.default)
def stack(w, node, tensors, dim=0):
    wanted = node.meta["val"]
    axis = axis_of(dim, wanted.dim())
    shape = [1 if i == axis else s for i, s in enumerate(wanted.shape)]
    return w.op(f"concat axis={axis}", *(w.reshape(w.cast(t, wanted.dtype), shape) for t in tensors))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split_copy.Tensor, aten.split_with_sizes_copy.default)
def split(w, node, a, _sizes, dim=0):
    axis = axis_of(dim, a.rank)
    start, parts = "0", []
    for part in node.meta["val"]:
        parts.append(w.slice(a, axis, start, part.shape[axis]))
        start = f"{start} + {text(part.shape[axis])}"
    return tuple(parts)


@rule(aten.unbind.int, aten.unbind_copy.int)
def unbind(w, node, a, dim=0):
    axis = axis_of(dim, a.rank)
    return tuple(
        w.reshape(w.slice(a, axis, index, 1), part.shape) for index, part in enumerate(node.meta["val"])
    )


@rule(aten.slice_scatter.default)
def slice_scatter(w, node, a, source, dim=0, start=None, end=None, step=1):
    axis = axis_of(dim, a.rank)
    size, part = a.shape[axis], source.shape[axis]
    if not isinstance(size, int) or not isinstance(part, int) or not isinstance(step, int):
        raise Unsupported("writing to part of a tensor of symbolic size")
    if step != 1 and part > 1:
        return scattered(w, a, source, axis, first_of_slice(a, axis, start), step)
    first = first_of_slice(a, axis, start)
    parts = [w.slice(a, axis, 0, first)] if first else []
    parts.append(w.cast(source, a.dtype))
    if first + part < size:
        parts.append(w.slice(a, axis, first + part, size - first - part))
    return parts[0] if len(parts) == 1 else w.op(f"concat axis={axis}", *parts)


def scattered(w, a, source, axis, first, step):
    """Every so many-th element of an axis replaced: the new ones spread out, and a table that says which."""
    size, part = a.shape[axis], source.shape[axis]
    shape = list(source.shape)
    apart = [*shape[: axis + 1], 1, *shape[axis + 1 :]]
    zero = "0.0" if a.dtype.is_floating_point else "0"

    def padded(value, low, high, at, rank):
        pads = [["0"] * rank, ["0"] * rank]
        pads[0][at], pads[1][at] = str(low), str(high)
        return w.op(f"pad lo=[{','.join(pads[0])}] hi=[{','.join(pads[1])}] constant={zero}", value)

    if a.dtype is torch.bool:
        raise Unsupported("writing to part of truth values with steps")
    spread = padded(w.reshape(w.cast(source, a.dtype), apart), 0, step - 1, axis + 1, len(apart))
    shape[axis] = part * step
    spread = Value(w.reshape(spread, shape).number, a.dtype, tuple(shape))
    inside = min(shape[axis], size - first)
    spread = padded(w.slice(spread, axis, 0, inside), first, size - first - inside, axis, a.rank)
    def table():
        seen = torch.zeros(size, dtype=torch.bool)
        seen[first : first + (part - 1) * step + 1 : step] = True
        return seen.reshape([size if i == axis else 1 for i in range(a.rank)])

    return w.map("where({a}, {b}, {c})", w.table("places", table), spread, a, dtype=a.dtype)


@rule(aten.select_scatter.default)
def select_scatter(w, node, a, source, dim, index):
    axis = axis_of(dim, a.rank)
    if not isinstance(a.shape[axis], int) or not isinstance(index, int):
        raise Unsupported("writing to a symbolic index")
    shape = [1 if i == axis else s for i, s in enumerate(a.shape)]
    piece = w.cast(w.reshape(source, shape), a.dtype)
    along = ",".join(str(a.shape[axis]) if i == axis else "1" for i in range(a.rank))
    at = w.op(f"iota axis={axis}", dtype=torch.int64, result=f"i64[{along}]")
    return w.map(f"where({{a}} == {axis_of(index, a.shape[axis])}, {{b}}, {{c}})", at, piece, a, dtype=a.dtype)


@rule(aten.diagonal_scatter.default)
def diagonal_scatter(w, node, a, source, offset=0, dim1=0, dim2=1):
    """The diagonal of two axes replaced: the new one as a column (or a row), where row and column are as far apart."""
    dim1, dim2 = axis_of(dim1, a.rank), axis_of(dim2, a.rank)
    if not all(isinstance(n, int) for n in a.shape) or 0 in source.shape:
        raise Unsupported("writing to a diagonal of symbolic sizes, or of nothing")
    others = [axis for axis in range(a.rank) if axis not in (dim1, dim2)]
    order = [*others, dim1, dim2]
    matrix = w.permute(a, order)
    rows, columns = a.shape[dim1], a.shape[dim2]
    shape = [*(a.shape[axis] for axis in others), rows, columns]
    by_row = offset >= 0
    long, front = rows if by_row else columns, [a.shape[axis] for axis in others]
    lists = (["0"] * len(others) + [str(n)] for n in (0, long - source.shape[-1]))
    low, high = (",".join(items) for items in lists)
    spread = w.op(f"pad lo=[{low}] hi=[{high}] constant={'0.0' if a.dtype.is_floating_point else '0'}", w.cast(source, a.dtype))
    spread = w.reshape(spread, [*front, rows, 1] if by_row else [*front, 1, columns])
    sizes = ",".join(map(str, shape))
    row, column = (w.op(f"iota axis={axis}", dtype=torch.int64, result=f"i64[{sizes}]") for axis in (a.rank - 2, a.rank - 1))
    written = w.map(f"where({{a}} + {offset} == {{b}}, {{c}}, {{d}})", row, column, spread, matrix, dtype=a.dtype)
    return w.permute(Value(written.number, a.dtype, tuple(shape)), [order.index(axis) for axis in range(a.rank)])


# Elements of memory of which a table says where each comes from, at most.
STRIDED_MAX = 2**18


@rule(aten.as_strided_scatter.default)
def as_strided_scatter(w, node, a, source, size, stride, offset=None):
    """Elements of the memory behind a tensor replaced, whose places a table has."""
    base = node.args[0].meta["val"]
    given = [*size, *stride, *base.shape]
    if not all(isinstance(n, int) for n in given) or order_in_memory(base) != list(range(base.dim())) or base.numel() > STRIDED_MAX:
        raise Unsupported("writing by strides to memory with gaps, of symbolic sizes, or much of it")
    first = (base.storage_offset() if offset is None else offset) - base.storage_offset()
    count = base.numel()
    if 0 in size or 0 in base.shape:
        return a
    if first < 0 or first + sum((n - 1) * s for n, s in zip(size, stride)) >= count:
        raise Unsupported("strides that leave the tensor")

    def places() -> torch.Tensor:
        found = torch.full((count,), -1, dtype=torch.int64)
        parts = torch.arange(max(1, torch.Size(size).numel()), dtype=torch.int64).reshape(list(size))
        found.as_strided(list(size), list(stride), first).copy_(parts)
        return found

    at = w.table(f"{node.name}_places", places)
    flat = w.reshape(w.cast(source, a.dtype), [torch.Size(size).numel()])
    found = w.op("gather axis=0", flat, w.map("max({a}, 0)", at, dtype=torch.int64))
    written = w.map("where({a} < 0, {b}, {c})", at, w.reshape(a, [count]), found, dtype=a.dtype)
    return w.reshape(written, base.shape)


@rule(aten._new_zeros_with_same_feature_meta.default)
def new_zeros(w, node, *_, **__):
    wanted = node.meta["val"]
    return w.expand(w.number(0, wanted.dtype), wanted.shape)


@rule(aten.constant_pad_nd.default)
def constant_pad(w, node, a, pad, value=0):
    low, high = ["0"] * a.rank, ["0"] * a.rank
    for i in range(len(pad) // 2):
        low[a.rank - 1 - i], high[a.rank - 1 - i] = text(pad[2 * i]), text(pad[2 * i + 1])
    number = float(value) if a.dtype.is_floating_point else int(value)
    return w.op(f"pad lo=[{','.join(low)}] hi=[{','.join(high)}] constant={number!r}", a)


@rule(aten.repeat.default)
def repeat(w, node, a, repeats):
    wanted = list(node.meta["val"].shape)
    shape = [1] * (len(wanted) - a.rank) + list(a.shape)
    apart = [size for times, size in zip([1] * len(shape), shape) for size in (times, size)]
    spread = [size for times, size in zip(repeats, shape) for size in (times, size)]
    return w.reshape(w.expand(w.reshape(a, apart), spread), wanted)


@rule(aten.arange.start_step, aten.arange.start, aten.arange.default)
def arange(w, node, *args, **options):
    wanted = node.meta["val"]
    start, step = (0, 1) if len(args) == 1 else (args[0], args[2] if len(args) > 2 else 1)
    if not all(isinstance(number, (int, torch.SymInt)) for number in (start, step)):
        if not all(isinstance(n, (int, float)) for n in (start, step, wanted.shape[0])):
            raise Unsupported("counting in fractions with symbolic sizes")
        return w.table(node.name, lambda: torch.arange(*args, dtype=wanted.dtype))
    count = w.op("iota axis=0", dtype=torch.int64, result=f"i64[{text(wanted.shape[0])}]")
    if step != 1:
        count = w.map("{a} * {b}", count, w.number(step, torch.int64), dtype=torch.int64)
    if start != 0:
        count = w.map("{a} + {b}", count, w.number(start, torch.int64), dtype=torch.int64)
    return w.cast(count, wanted.dtype)


@rule(aten.embedding.default)
def embedding(w, node, table, indices, *_, **options):
    w.lookup(indices, table.shape[0])
    return w.op("gather axis=0", table, indices)


@rule(aten.index_select.default)
def index_select(w, node, a, dim, indices):
    if a.rank == 0:
        return a
    if indices.rank == 0:
        indices = w.reshape(indices, [1])
    return w.op(f"gather axis={axis_of(dim, a.rank)}", a, indices)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(w, node, a, indices):
    """Lookups by one tensor, or by several for axes that stand side by side."""
    given = [axis for axis, i in enumerate(indices) if i is not None]
    tensors = [indices[axis] for axis in given]
    if not given or given != list(range(given[0], given[-1] + 1)):
        raise Unsupported("indexing of axes that do not stand side by side")
    if any(t.dtype not in (torch.int64, torch.int32) for t in tensors):
        raise Unsupported("indexing with a mask")
    first = given[0]
    if len(given) == 1:
        return w.op(f"gather axis={first}", a, tensors[0])
    # The axes as one, and the position in it.
    at = None
    for axis, tensor in zip(given, tensors):
        size = w.number(a.shape[axis], torch.int64)
        tensor = w.map("where({a} < 0, {a} + {b}, {a})", w.cast(tensor, torch.int64), size, dtype=torch.int64)
        at = tensor if at is None else w.map("{a} * {b} + {c}", at, size, tensor, dtype=torch.int64)
    joined = "*".join(f"({text(a.shape[axis])})" for axis in given)
    shape = [text(s) for s in a.shape]
    flat = w.reshape(a, [*shape[:first], joined, *shape[given[-1] + 1 :]])
    return w.op(f"gather axis={first}", flat, at)


@rule(aten.gather.default)
def gather(w, node, a, dim, indices, sparse_grad=False):
    """Each element from where its own index says: a lookup in the tensor as one axis."""
    if a.rank == 0 or indices.rank == 0:
        # A scalar as one element, and an index of it as that.
        wanted = node.meta["val"].shape
        flat = w.reshape(a, [a.shape[0] if a.rank else 1])
        return w.reshape(w.op("gather axis=0", flat, indices), wanted)
    dim, at, stride = axis_of(dim, a.rank), None, "1"
    index_shape = ",".join(text(s) for s in indices.shape)
    for axis in reversed(range(a.rank)):
        if axis == dim:
            place = w.cast(indices, torch.int64)
        else:
            place = w.op(f"iota axis={axis}", dtype=torch.int64, result=f"i64[{index_shape}]")
        if stride != "1":
            step = w.reshape(w.op(f"dims [{stride}]", dtype=torch.int64), [])
            place = w.map("{a} * {b}", place, step, dtype=torch.int64)
        at = place if at is None else w.map("{a} + {b}", at, place, dtype=torch.int64)
        stride = f"{stride}*({text(a.shape[axis])})"
    return w.op("gather axis=0", w.op(f"reshape [{stride}]", a), at)
