"""Rules for pooling, and for resizing that is a mean over windows.

Windows of one size are our `window`. Others (adaptive pooling to sizes that do not divide) are a product with a matrix of weights for each axis.
"""

from __future__ import annotations

import math

import torch

from .gradients import WINDOW_MAX, largest_at
from .layers import listed, per_axis
from .sizes import Unsupported
from .sums import mean_over
from .writer import Value, rule, used_results, wide

aten = torch.ops.aten


@rule(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool(w, node, a, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
    if not a.dtype.is_floating_point:
        raise Unsupported("pooling of integers")
    rank = 2 if node.target is aten.max_pool2d_with_indices.default else 3
    results = node.meta["val"]
    if a.rank == rank + 1:
        a = Value(w.reshape(a, [1, *a.shape]).number, a.dtype, (1, *a.shape))
    kernel, pads = per_axis(kernel, rank), per_axis(padding, rank)
    strides = per_axis(stride, rank) if stride else kernel
    high = pads
    if ceil_mode:
        extents = [*a.shape[2:], *results[0].shape[-rank:]]
        if not all(isinstance(n, int) for n in extents) or 0 in extents:
            raise Unsupported("pooling with sizes rounded up and symbolic ones")
        # The last window may reach beyond the padding.
        windows = zip(extents[rank:], strides, kernel, per_axis(dilation, rank), extents[:rank], pads)
        high = [max((n - 1) * s + (k - 1) * d + 1 - size - p, 0) for n, s, k, d, size, p in windows]
    attributes = listed(kernel=kernel, strides=strides, pads_lo=pads, pads_hi=high, dilations=per_axis(dilation, rank))
    found = w.reshape(w.op(f"window max {attributes}", a), results[0].shape)
    if 1 not in used_results(node):
        return found, None
    if per_axis(dilation, rank) != [1] * rank or math.prod(kernel) > WINDOW_MAX:
        raise Unsupported("the positions of the largest elements of large windows, or of windows with holes")
    return found, w.reshape(largest_at(w, a, kernel, strides, pads, results[1].shape[-rank:]), results[1].shape)


@rule(aten.avg_pool2d.default, aten.avg_pool3d.default, aten.avg_pool1d.default)
def avg_pool(w, node, a, kernel, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor=None):
    rank = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}[node.target]
    kernel, pads = per_axis(kernel, rank), per_axis(padding, rank)
    strides = per_axis(stride, rank) if stride else kernel
    one = a.rank == rank + 1
    if one:
        a = w.reshape(a, [1, *a.shape])
    wanted = node.meta["val"].shape[-rank:]
    if not ceil_mode and divisor is None and a.dtype.is_floating_point:
        kind = "mean_with_pad" if count_include_pad else "mean"
        attributes = listed(kernel=kernel, strides=strides, pads_lo=pads, pads_hi=pads, dilations=[1] * rank)
        y = w.op(f"window {kind} {attributes}", a)
        return w.reshape(y, node.meta["val"].shape) if one else y
    extents = [*a.shape[-rank:], *wanted]
    if not all(isinstance(n, int) for n in extents) or 0 in extents:
        raise Unsupported("average pooling with sizes rounded up and symbolic ones")
    # The last window may reach beyond the padding: what lies there counts neither as element nor as padding.
    sizes = a.shape[-rank:]
    high = [max((n - 1) * s + k - size - p, 0) for n, s, k, size, p in zip(wanted, strides, kernel, sizes, pads)]
    attributes = listed(kernel=kernel, strides=strides, pads_lo=pads, pads_hi=high, dilations=[1] * rank)
    total = w.op(f"window sum {attributes}", w.cast(a, wide(a.dtype)))

    def counts():
        whole = torch.ones([1] * rank, dtype=torch.float64)
        for axis, (n, s, k, size, p) in enumerate(zip(wanted, strides, kernel, sizes, pads)):
            first = torch.arange(n) * s - p
            last = torch.minimum(first + k, torch.tensor(size + p))
            if not count_include_pad:
                first, last = first.clamp(min=0), last.clamp(max=size)
            whole = whole * (last - first).double().reshape([-1 if i == axis else 1 for i in range(rank)])
        return whole.expand(list(wanted)).to(wide(a.dtype)).contiguous()

    number = w.table(f"{node.name}_counts", counts) if divisor is None else w.number(divisor, wide(a.dtype))
    y = w.cast(w.map("{a} / {b}", total, number, dtype=wide(a.dtype)), a.dtype)
    return w.reshape(y, node.meta["val"].shape) if one else y


@rule(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default, aten.adaptive_avg_pool1d.default)
def adaptive_avg_pool(w, node, a, size):
    rank = len(size)
    extents = a.shape[-rank:]
    if not a.dtype.is_floating_point or 0 in size:
        raise Unsupported("adaptive pooling of integers or to nothing")
    if list(size) == [1] * rank:
        return mean_over(w, a, list(range(a.rank - rank, a.rank)), True)
    if not all(isinstance(n, int) for n in (*extents, *size)) or 0 in extents:
        raise Unsupported("adaptive pooling of symbolic sizes")
    if rank == 2 and a.rank == 4 and all(have % want == 0 for have, want in zip(extents, size)):
        kernel = [have // want for have, want in zip(extents, size)]
        attributes = listed(kernel=kernel, strides=kernel, pads_lo=[0] * rank, pads_hi=[0] * rank, dilations=[1] * rank)
        return w.op(f"window mean {attributes}", a)
    if max(math.prod(extents), math.prod(size)) > 4096:
        raise Unsupported("adaptive pooling in large windows of unequal sizes")
    x = w.cast(a, wide(a.dtype))
    for i, (have, want) in enumerate(zip(extents, size)):
        axis = a.rank - rank + i

        def weights(have=have, want=want):
            matrix = torch.zeros(have, want, dtype=torch.float64)
            for j in range(want):
                first, last = j * have // want, -(-(j + 1) * have // want)
                matrix[first:last, j] = 1 / (last - first)
            return matrix.to(wide(a.dtype))

        letters = "abcdefgh"[: a.rank]
        inside = letters[axis]
        spec = f"{letters},{inside}z->{letters.replace(inside, 'z')}"
        x = w.contract(spec, x, w.table(f"{node.name}_weights{i}", weights))
    return w.cast(Value(x.number, wide(a.dtype), tuple(node.meta["val"].shape)), a.dtype)
