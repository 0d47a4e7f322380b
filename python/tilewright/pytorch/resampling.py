"""Rules for resampling that is linear along each axis of its own, and for gradients of such.

What PyTorch's operator does along one axis is a matrix, which it is asked for itself: the operator on a picture whose columns are those
of the identity. The result is then a product with a small table for each axis, and the gradient one with its transpose.

    resizing      bicubic, and with antialiasing
    pooling       the gradients of means over windows and over adaptive windows
"""

from __future__ import annotations

import math

import torch

from .layers import per_axis
from .sizes import Unsupported
from .writer import Value, Writer, rule, wide

aten = torch.ops.aten

# Elements of a table, at most.
TABLE_MAX = 2**18


def along(function, size: int, axes: int) -> torch.Tensor:
    """The matrix `[size, result]` of an operator along the first of so many axes, of whom the others have one element."""
    eye = torch.eye(size, dtype=torch.float64).reshape(1, size, size, *[1] * (axes - 1))
    return function(eye).reshape(size, -1)


def resampled(w: Writer, node, a: Value, sizes, matrix, turned: bool = False) -> Value:
    """`a` with each of its last axes times a matrix. `matrix(i)` makes that of axis `i`, from the larger graph's side: `turned` takes its
    transpose. `sizes`: those of the result."""
    rank = len(sizes)
    extents = [*a.shape, *sizes]
    if not a.dtype.is_floating_point or not all(isinstance(n, int) for n in extents) or 0 in extents:
        raise Unsupported("resampling of integers, of symbolic sizes or of nothing")
    if any(have * want > TABLE_MAX for have, want in zip(a.shape[-rank:], sizes)):
        raise Unsupported("resampling of long axes")
    x = w.cast(a, wide(a.dtype))
    letters = "abcdefgh"[: a.rank]
    # Axes that shrink go first: less is left for the others.
    for i in sorted(range(rank), key=lambda i: sizes[i] / a.shape[a.rank - rank + i]):
        inside = letters[a.rank - rank + i]

        def table(i=i):
            made = matrix(i)
            return (made.t() if turned else made).to(wide(a.dtype)).contiguous()

        spec = f"{letters},{inside}z->{letters.replace(inside, 'z')}"
        x = w.contract(spec, x, w.table(f"{node.name}_along{i}", table))
    return w.cast(Value(x.number, wide(a.dtype), tuple(node.meta["val"].shape)), a.dtype)


RESIZED = (
    aten.upsample_bicubic2d.default,
    aten.upsample_bilinear2d.default,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default,
)
GRADIENTS = {
    aten._upsample_bilinear2d_aa_backward.default: aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa_backward.default: aten._upsample_bicubic2d_aa.default,
    aten.upsample_bicubic2d_backward.default: aten.upsample_bicubic2d.default,
    aten.upsample_bilinear2d_backward.default: aten.upsample_bilinear2d.default,
}


def resizing(operator, have, want, align_corners, scales):
    """The matrices of resizing from sizes to sizes."""

    def matrix(axis: int) -> torch.Tensor:
        # Two columns that are the same stay so. (Some of these operators confuse the axes of a picture with one.)
        wider = lambda x: x.expand(-1, -1, -1, 2).contiguous()  # noqa: E731
        return along(lambda x: operator(wider(x), [want[axis], 2], align_corners, scales[axis], None)[..., 0], have[axis], 2)

    return matrix


@rule(*RESIZED)
def resize(w, node, a, size, align_corners, scale_h=None, scale_w=None):
    matrix = resizing(node.target, a.shape[2:], size, align_corners, (scale_h, scale_w))
    return resampled(w, node, a, list(size), matrix)


@rule(*GRADIENTS)
def resize_backward(w, node, grad, size, input_size, align_corners, scale_h=None, scale_w=None):
    matrix = resizing(GRADIENTS[node.target], input_size[2:], size, align_corners, (scale_h, scale_w))
    return resampled(w, node, grad, list(input_size[2:]), matrix, turned=True)


@rule(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def adaptive_avg_pool_backward(w, node, grad, a):
    rank = 2 if node.target is aten._adaptive_avg_pool2d_backward.default else 3
    have, want = a.shape[-rank:], grad.shape[-rank:]
    if not all(isinstance(n, int) for n in (*have, *want)) or 0 in (*have, *want):
        raise Unsupported("the gradient of adaptive pooling of symbolic sizes")
    if all(n % m == 0 for n, m in zip(have, want)):
        # Each element is in one window.
        return spread(w, node, grad, [n // m for n, m in zip(have, want)])
    pool = aten._adaptive_avg_pool2d if rank == 2 else aten._adaptive_avg_pool3d

    def matrix(axis: int) -> torch.Tensor:
        return along(lambda x: pool(x, [want[axis], *[1] * (rank - 1)]), have[axis], rank)

    return resampled(w, node, grad, list(have), matrix, turned=True)


def spread(w: Writer, node, grad: Value, kernel) -> Value:
    """Each element divided among the elements of a window that no other window reads."""
    rank = len(kernel)
    front, sizes = list(grad.shape[: grad.rank - rank]), grad.shape[-rank:]
    share = w.map(f"{{a}} / {float(math.prod(kernel))!r}", w.cast(grad, wide(grad.dtype)), dtype=wide(grad.dtype))
    share = w.cast(Value(share.number, share.dtype, grad.shape), grad.dtype)
    apart = [n for size in sizes for n in (size, 1)]
    filled = [n for size, k in zip(sizes, kernel) for n in (size, k)]
    return w.reshape(w.expand(w.reshape(share, [*front, *apart]), [*front, *filled]), node.meta["val"].shape)


@rule(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
def avg_pool_backward(w, node, grad, a, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    rank = 2 if node.target is aten.avg_pool2d_backward.default else 3
    kernel, pads = per_axis(kernel, rank), per_axis(padding, rank)
    strides = per_axis(stride, rank) if stride else kernel
    have, want = a.shape[-rank:], grad.shape[-rank:]
    if not all(isinstance(n, int) for n in (*have, *want)) or 0 in (*have, *want):
        raise Unsupported("the gradient of pooling of symbolic sizes")
    exact = all(n == m * k and not p for n, m, k, p in zip(have, want, kernel, pads))
    if exact and strides == kernel and divisor is None:
        return spread(w, node, grad, kernel)

    # The number of elements of a window is a product of its sides', so windows are linear along each axis.
    def matrix(axis: int) -> torch.Tensor:
        found = torch.zeros(have[axis], want[axis], dtype=torch.float64)
        for j in range(want[axis]):
            first = j * strides[axis] - pads[axis]
            last = min(first + kernel[axis], have[axis] + pads[axis])
            inside = (max(first, 0), min(last, have[axis]))
            whole = last - first if count_include_pad else inside[1] - inside[0]
            found[inside[0] : inside[1], j] = 1.0 if divisor is not None else 1.0 / max(whole, 1)
        return found

    if divisor is not None:
        grad = Value(w.map(f"{{a}} / {float(divisor)!r}", w.cast(grad, wide(grad.dtype)), dtype=wide(grad.dtype)).number, wide(grad.dtype), grad.shape)
    return w.cast(resampled(w, node, grad, list(have), matrix, turned=True), a.dtype)
