"""Rules for reductions, scans and matrix products."""

from __future__ import annotations

import math

import torch

from .elementwise import formula, in_result_type
from .shapes import axis_of
from .sizes import Unsupported, text
from .writer import Value, rule, used_results, wide

aten = torch.ops.aten


def axes_of(a, dims) -> list[int]:
    """The axes of a reduction; none given means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(a.rank))
    return [axis_of(d, a.rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


@rule(aten.sum.default, aten.sum.dim_IntList)
def sum_(w, node, a, dims=None, keepdim=False, **options):
    result = node.meta["val"].dtype
    return w.cast(w.reduce("sum", w.cast(a, wide(result)), axes_of(a, dims), keepdim), result)


@rule(aten.mean.default, aten.mean.dim)
def mean(w, node, a, dims=None, keepdim=False, **options):
    result = node.meta["val"].dtype
    axes = axes_of(a, dims)
    return w.cast(mean_over(w, w.cast(a, wide(result)), axes, keepdim), result)


def mean_over(w, a, axes, keep):
    """The mean over axes, in the operand's type."""
    total = w.reduce("sum", a, axes, keep)
    count = "*".join(text(a.shape[axis]) if not isinstance(a.shape[axis], str) else f"({a.shape[axis]})" for axis in axes)
    if not axes:
        return a
    if all(isinstance(a.shape[axis], int) for axis in axes):
        number = 1
        for axis in axes:
            number *= a.shape[axis]
        return w.map(f"{{a}} / {float(number)!r}", total, dtype=a.dtype)
    size = w.reshape(w.op(f"dims [{count}]", dtype=torch.int64), [])
    return w.map("{a} / {b}", total, w.cast(size, a.dtype), dtype=a.dtype)


@rule(aten.var.correction, aten.var_mean.correction)
def variance(w, node, a, dims=None, *, correction=1, keepdim=False):
    result = a.dtype
    axes = axes_of(a, dims)
    correction = 1 if correction is None else correction
    x = w.cast(a, wide(result))
    mean = mean_over(w, Value(x.number, x.dtype, a.shape), axes, True)
    square = w.map("({a} - {b}) * ({a} - {b})", x, mean, dtype=x.dtype)
    total = w.reduce("sum", Value(square.number, x.dtype, a.shape), axes, keepdim)
    if all(isinstance(a.shape[axis], int) for axis in axes):
        freedom = float(max(math.prod(a.shape[axis] for axis in axes) - correction, 0))
        spread = w.map(f"{{a}} / {freedom!r}", total, dtype=x.dtype)
    else:
        count = "*".join(f"({text(a.shape[axis])})" for axis in axes)
        count = w.cast(w.reshape(w.op(f"dims [{count}]", dtype=torch.int64), []), x.dtype)
        spread = formula(w, "{a} / max({b} - {c}, 0)", (total, count, float(correction)), x.dtype, x.dtype)
    spread = w.cast(spread, result)
    if node.target is aten.var.correction:
        return spread
    wanted = node.meta["val"][1]
    return spread, w.cast(w.reshape(mean, wanted.shape), result)


def numbers(w, a):
    """Truth values as numbers, which have extremes."""
    return w.cast(a, torch.int32) if a.dtype is torch.bool else a


@rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def extreme(w, node, a, dims=None, keepdim=False):
    kind = "max" if node.target in (aten.amax.default, aten.max.default) else "min"
    return w.cast(w.reduce(kind, numbers(w, a), axes_of(a, dims), keepdim), a.dtype)


@rule(aten.max.dim, aten.min.dim)
def extreme_with_position(w, node, a, dim, keepdim=False):
    kind = "max" if node.target is aten.max.dim else "min"
    axis = axis_of(dim, a.rank)
    used = used_results(node)
    if a.rank == 0:
        return a, w.number(0, torch.int64)
    keep = " keep" if keepdim else ""
    result, a = a.dtype, numbers(w, a)
    value = w.cast(w.reduce(kind, a, [axis], keepdim), result) if 0 in used else None
    position = None
    if 1 in used:
        position = w.op(f"arg_reduce {kind} axis={axis}{keep}", a, dtype=torch.int64)
    return value, position


@rule(aten.argmax.default, aten.argmin.default)
def position(w, node, a, dim=None, keepdim=False):
    kind = "max" if node.target is aten.argmax.default else "min"
    wanted = node.meta["val"].shape
    if a.rank == 0:
        return w.number(0, torch.int64)
    a = numbers(w, a)
    if dim is None:
        count = "*".join(f"({text(s)})" for s in a.shape)
        a, dim = w.op(f"reshape [{count}]", a), 0
        found = w.op(f"arg_reduce {kind} axis=0", a, dtype=torch.int64)
        return w.reshape(found, wanted) if keepdim else found
    keep = " keep" if keepdim else ""
    return w.op(f"arg_reduce {kind} axis={dim % max(a.rank, 1)}{keep}", a, dtype=torch.int64)


@rule(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)
def any_or_all(w, node, a, dims=None, keepdim=False):
    kind = "max" if node.target in (aten.any.default, aten.any.dim, aten.any.dims) else "min"
    numbers = w.cast(w.cast(a, torch.bool), torch.int32)
    found = w.reduce(kind, numbers, axes_of(a, dims), keepdim)
    # Of nothing, the extremes of i32: any is false, all is true.
    return w.map("{a} > 0", found, dtype=torch.bool)


@rule(aten.prod.default, aten.prod.dim_int)
def prod(w, node, a, dims=None, keepdim=False, **options):
    result = node.meta["val"].dtype
    return w.cast(w.reduce("prod", w.cast(a, wide(result)), axes_of(a, dims), keepdim), result)


@rule(aten.cumsum.default)
def cumsum(w, node, a, dim, **options):
    result = node.meta["val"].dtype
    if a.rank == 0:
        return w.cast(a, result)
    scanned = w.op(f"scan sum axis={axis_of(dim, a.rank)}", w.cast(a, wide(result)))
    return w.cast(type(scanned)(scanned.number, wide(result), a.shape), result)


@rule(aten.cumprod.default)
def cumprod(w, node, a, dim, **options):
    result = node.meta["val"].dtype
    if a.rank == 0:
        return w.cast(a, result)
    scanned = w.op(f"scan prod axis={axis_of(dim, a.rank)}", w.cast(a, wide(result)))
    return w.cast(Value(scanned.number, wide(result), a.shape), result)


@rule(aten.cummax.default, aten.cummin.default)
def running_extreme(w, node, a, dim):
    """The extremes so far, and where the last of equal ones lies; NaN is beyond all."""
    kind = "max" if node.target is aten.cummax.default else "min"
    shape = tuple(a.shape)
    if a.rank == 0:
        return a, w.number(0, torch.int64)
    if a.dtype is torch.bool or 0 in shape:
        raise Unsupported("running extremes of truth values, or of nothing")
    axis = axis_of(dim, a.rank)
    found = Value(w.op(f"scan {kind} axis={axis}", a).number, a.dtype, shape)
    if 1 not in used_results(node):
        return found, None
    count = w.op(f"iota axis={axis}", dtype=torch.int64, result=f"i64[{','.join(text(n) for n in shape)}]")
    hit = "({a} == {b}) | ({a} != {a})" if a.dtype.is_floating_point else "{a} == {b}"
    at = w.map(f"where({hit}, {{c}}, 0)", a, found, count, dtype=torch.int64)
    return found, w.op(f"scan max axis={axis}", Value(at.number, torch.int64, shape))


@rule(aten._cdist_forward.default)
def pairwise_distance(w, node, a, b, p, mode=None):
    """Distances of all pairs of rows, element by element."""
    wanted = node.meta["val"]
    forms = {
        0.0: ("where({a} != {b}, {c}, {d})", "sum"),
        1.0: ("abs({a} - {b})", "sum"),
        2.0: ("({a} - {b}) * ({a} - {b})", "sum"),
        math.inf: ("abs({a} - {b})", "max"),
    }
    if p not in forms or not a.dtype.is_floating_point:
        raise Unsupported("distances by another norm")
    if not all(isinstance(n, int) for n in (*a.shape, *b.shape)) or 0 in (*a.shape, *b.shape):
        raise Unsupported("distances of symbolic sizes, or of nothing")
    x = w.reshape(a, [*a.shape[:-1], 1, a.shape[-1]])
    y = w.reshape(b, [*b.shape[:-2], 1, *b.shape[-2:]])
    body, kind = forms[p]
    each = formula(w, body, (x, y, 1, 0), a.dtype, a.dtype)
    each = Value(each.number, a.dtype, (*wanted.shape, a.shape[-1]))
    total = w.reduce(kind, each, [wanted.dim()], False)
    return w.map("sqrt({a})", total, dtype=a.dtype) if p == 2.0 else total


@rule(aten.dist.default)
def dist(w, node, a, b, p=2):
    result = node.meta["val"].dtype
    if p != 2:
        raise Unsupported("distances by another norm")
    score = wide(result)
    square = w.map("({a} - {b}) * ({a} - {b})", w.cast(a, score), w.cast(b, score), dtype=score)
    return w.cast(w.map("sqrt({a})", w.reduce("sum", square, range(square.rank), False), dtype=score), result)


@rule(aten._trilinear.default)
def trilinear(w, node, a, b, c, expand1, expand2, expand3, sumdim, unroll_dim=1):
    """A product of three with axes put in, summed over some."""
    operands = []
    for tensor, axes in ((a, expand1), (b, expand2), (c, expand3)):
        shape = list(tensor.shape)
        for axis in axes:
            shape.insert(axis, 1)
        operands.append(w.reshape(w.cast(tensor, wide(a.dtype)), shape))
    product = w.map("{a} * {b} * {c}", *operands, dtype=wide(a.dtype))
    return w.cast(w.reduce("sum", product, sumdim, False), a.dtype)


@rule(aten.mm.default)
def mm(w, node, a, b):
    return w.contract("mk,kn->mn", a, b)


@rule(aten.bmm.default)
def bmm(w, node, a, b):
    return w.contract("bmk,bkn->bmn", a, b)


@rule(aten.mv.default)
def mv(w, node, a, b):
    return w.contract("mk,k->m", a, b)


@rule(aten.dot.default)
def dot(w, node, a, b):
    return w.contract("k,k->", a, b)


@rule(aten.linear.default)
def linear(w, node, a, weight, bias=None):
    letters = "abcdefgh"[: a.rank - 1]
    product = w.contract(f"{letters}k,nk->{letters}n", a, weight)
    return product if bias is None else w.map("{a} + {b}", product, bias, dtype=a.dtype)


SPECS = {
    aten.addmm.default: "mk,kn->mn",
    aten.baddbmm.default: "bmk,bkn->bmn",
    aten.addmv.default: "mk,k->m",
    aten.addbmm.default: "bmk,bkn->mn",
}


@rule(*SPECS)
def addmm(w, node, bias, a, b, beta=1, alpha=1):
    if not a.dtype.is_floating_point:
        # Factors of integers are integers for PyTorch.
        alpha, beta = int(alpha), int(beta)
    spec = SPECS[node.target]
    product = w.contract(spec, a, b)
    if beta == 0:
        return product if alpha == 1 else in_result_type(w, node, "{a} * {b}", product, alpha)
    if beta == 1 and alpha == 1:
        return in_result_type(w, node, "{a} + {b}", product, bias)
    return in_result_type(w, node, "{a} * {b} + {c} * {d}", product, alpha, bias, beta)
