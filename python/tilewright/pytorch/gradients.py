"""Rules for gradients that PyTorch has as operators of their own: convolutions, pooling by maxima, embeddings.

    of the data of a convolution     a convolution of the gradient with the weights turned round; with steps one for each residue of
                                     the positions ("phase"), which are then put between each other
    of its weights                   a product for each tap of the window
    of both, of windows side by side a product of the patches, on processors (patch embeddings)
    of pooling by maxima             for each phase, the gradients of the windows that name the position
    of an embedding                  a product with a matrix of zeros and ones, where that is less than a cut between groups costs
"""

from __future__ import annotations

import itertools
import math

import torch

from .layers import listed, per_axis
from .sizes import Unsupported
from .writer import Value, Writer, literal, rule, used_results, wide

aten = torch.ops.aten


def known(*values: Value) -> None:
    """Refuses symbolic sizes, and tensors of nothing."""
    for value in values:
        if not all(isinstance(n, int) for n in value.shape) or 0 in value.shape:
            raise Unsupported("a gradient with symbolic sizes, or of nothing")


def padded(w: Writer, x: Value, low: list[int], high: list[int], number: str) -> Value:
    """Spatial axes grown or cut on both sides."""
    if not any((*low, *high)):
        return x
    front = [0] * (x.rank - len(low))
    lists = listed(lo=[*front, *low], hi=[*front, *high])
    shape = [n + a + b for n, a, b in zip(x.shape, [*front, *low], [*front, *high])]
    return Value(w.op(f"pad {lists} constant={number}", x).number, x.dtype, tuple(shape))


def zero(dtype: torch.dtype) -> str:
    return "0.0" if dtype.is_floating_point else "0"


class Phase:
    """Along one axis, the positions `step * i + residue` of the data, and the taps of the window that reach them.

    Tap `first - t * apart` meets element `i + shift + t * dilation` of the gradient, for `t` below `taps`.
    """

    def __init__(self, residue: int, size: int, kernel: int, step: int, pad: int, dilation: int):
        self.length = len(range(residue, size, step))
        reached = [k for k in range(kernel) if (residue + pad - k * dilation) % step == 0]
        self.taps = len(reached)
        if reached:
            common = math.gcd(step, dilation)
            self.first, self.apart, self.dilation = reached[-1], step // common, dilation // common
            self.shift = (residue + pad - self.first * dilation) // step

    def edges(self, size: int) -> tuple[int, int]:
        """How far the gradient, of so many elements, must be grown on both sides."""
        reach = self.length + self.dilation * (self.taps - 1)
        return -self.shift, reach + self.shift - size


def phases(sizes, kernel, steps, pads, dilations) -> list[list[Phase]]:
    """For each axis its phases."""
    axes = zip(sizes, kernel, steps, pads, dilations)
    return [[Phase(r, n, k, s, p, d) for r in range(s)] for n, k, s, p, d in axes]


def between(w: Writer, parts: dict[tuple[int, ...], Value], sizes, steps) -> Value:
    """Puts the phases' values between each other: `parts[residues]` has one element in `steps` of each spatial axis."""
    rank = len(sizes)
    if math.prod(steps) == 1:
        return parts[(0,) * rank]
    longest = [-(-n // s) for n, s in zip(sizes, steps)]
    some = next(iter(parts.values()))
    front, dtype = list(some.shape[: some.rank - rank]), some.dtype
    spread = [1 if i % 2 else longest[i // 2] for i in range(2 * rank)]

    def joined(axis: int, residues: tuple[int, ...]) -> Value:
        if axis == rank:
            part = parts[residues]
            part = padded(w, part, [0] * rank, [n - have for n, have in zip(longest, part.shape[-rank:])], zero(dtype))
            return w.reshape(part, [*front, *spread])
        rows = [joined(axis + 1, (*residues, r)) for r in range(steps[axis])]
        return rows[0] if len(rows) == 1 else w.op(f"concat axis={len(front) + 2 * axis + 1}", *rows)

    whole = w.reshape(joined(0, ()), [*front, *(n * s for n, s in zip(longest, steps))])
    for i, n in enumerate(sizes):
        if longest[i] * steps[i] != n:
            whole = w.slice(whole, len(front) + i, 0, n)
    return Value(whole.number, dtype, (*front, *sizes))


# ---- convolutions -----------------------------------------------------------------------------------


@rule(aten.convolution_backward.default)
def convolution_backward(w, node, grad, a, weight, bias, stride, padding, dilation, transposed, output_padding, groups, mask):
    rank = a.rank - 2
    if rank < 1:
        raise Unsupported("the gradient of a convolution of one sample")
    known(grad, a, weight)
    settings = per_axis(stride, rank), per_axis(padding, rank), per_axis(dilation, rank)
    work = math.prod((a if transposed else grad).shape) * math.prod(weight.shape[1:])
    depthwise = weight.shape[1] == 1 and weight.shape[0] == groups
    patches = not transposed and side_by_side(w, weight.shape[2:], *settings, groups)
    plain = w.device == "cpu" and (depthwise or math.prod(weight.shape[2:]) == 1 or patches)
    if work > CONVOLUTIONS_MAX[w.device] and not plain:
        raise Unsupported("the gradient of a large convolution, for which PyTorch has faster kernels")
    used = used_results(node)
    wanted = [bool(m) and i in used for i, m in enumerate(mask)]
    if w.device == "cuda" and wanted[0] and not transposed and a.shape[1] == 1 and math.prod(settings[0]) > 1:
        raise Unsupported("the gradient of one channel of data in steps, which would be a product with one row, stored in steps")
    data = weights = shift = None
    if patches:
        space, taps = SPACE[:rank], TAPS[:rank]
        letters, seen = in_patches(w, a, weight.shape[2:], grad.shape[2:])
        if wanted[0]:
            filled = [n * k for n, k in zip(grad.shape[2:], weight.shape[2:])]
            data = w.reshape(w.contract(f"no{space},oc{taps}->{letters}", grad, weight), [*a.shape[:2], *filled])
            data = Value(data.number, grad.dtype, (*a.shape[:2], *filled))
            data = padded(w, data, [0] * rank, [n - have for n, have in zip(a.shape[2:], filled)], zero(grad.dtype))
        if wanted[1]:
            weights = w.contract(f"no{space},{letters}->oc{taps}", grad, seen)
    elif transposed:
        # A transposed convolution is the gradient of a convolution, so the gradient of its data is that convolution, and for its weights data and
        # gradient change places.
        attributes = listed(strides=settings[0], pads_lo=settings[1], pads_hi=settings[1], dilations=settings[2])
        if wanted[0]:
            data = w.op(f"conv {attributes} groups={groups}", grad, weight)
            # Output padding may be wide enough for another window.
            for axis in range(2, a.rank) if any(per_axis(output_padding, rank)) else ():
                data = w.slice(data, axis, 0, a.shape[axis])
        if wanted[1]:
            weights = weight_gradient(w, a, grad, weight.shape, settings, groups)
    else:
        data = data_gradient(w, grad, a.shape, weight, settings, groups) if wanted[0] else None
        weights = weight_gradient(w, grad, a, weight.shape, settings, groups) if wanted[1] else None
    if wanted[2]:
        axes = [0, *range(2, a.rank)]
        shift = w.cast(w.reduce("sum", w.cast(grad, wide(grad.dtype)), axes, False), grad.dtype)
    return data, weights, shift


# Multiplications up to which the gradients of a convolution are ours. On one thread of a Zen 4 those of 3x3 windows took 1.7 times
# oneDNN's time at 2^22 (0.4 times at 2^16), those of one tap 0.8 times at 2^26, depthwise ones 0.5 times at 2^21.
CONVOLUTIONS_MAX = {"cpu": 2**20, "cuda": 2**20}


# The last axis of windows side by side from which on a product of patches is not slower than oneDNN: on one thread of a Zen 4 gradients of
# 16 x 16 patches of pictures took half of its time with those of the data and as long without, of 2 x 2 five times as long.
PATCHES_MIN = 8

# Letters of spatial axes, and of the taps of windows along them.
SPACE, TAPS = "xyz", "klm"


def side_by_side(w: Writer, kernel, stride, padding, dilation, groups: int) -> bool:
    """Whether windows lie side by side, so that the gradients are products of patches. (On GPUs nobody has compared them.)"""
    alone = list(kernel) == list(stride) and not any(padding) and all(d == 1 for d in dilation) and groups == 1
    return w.device == "cpu" and alone and kernel[-1] >= PATCHES_MIN


def in_patches(w: Writer, a: Value, kernel, counts) -> tuple[str, Value]:
    """Windows that lie side by side, as axes of their own after each spatial axis; the letters of all axes with channels `c`."""
    for axis, (k, n) in enumerate(zip(kernel, counts)):
        if n * k != a.shape[2 + axis]:
            a = Value(w.slice(a, 2 + axis, 0, n * k).number, a.dtype, (*a.shape[: 2 + axis], n * k, *a.shape[3 + axis :]))
    shape = [*a.shape[:2], *(size for pair in zip(counts, kernel) for size in pair)]
    letters = "nc" + "".join(map("".join, zip(SPACE[: len(kernel)], TAPS)))
    return letters, Value(w.reshape(a, shape).number, a.dtype, tuple(shape))


def data_gradient(w: Writer, grad: Value, shape, weight: Value, settings, groups: int) -> Value:
    """What the gradient of the result says of the data."""
    stride, padding, dilation = settings
    rank, kernel, sizes = len(stride), weight.shape[2:], shape[2:]
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    # [O, C/g, ...] to [C, O/g, ...], a group at a time.
    turned = w.permute(w.reshape(weight, [groups, outputs, inputs, *kernel]), [0, 2, 1, *range(3, 3 + rank)])
    turned = Value(w.reshape(turned, [groups * inputs, outputs, *kernel]).number, weight.dtype, (groups * inputs, outputs, *kernel))
    axes, parts = phases(sizes, kernel, stride, padding, dilation), {}
    for residues in itertools.product(*(range(s) for s in stride)):
        chosen = [axis[r] for axis, r in zip(axes, residues)]
        lengths = [c.length for c in chosen]
        if 0 in lengths or any(c.taps == 0 for c in chosen):
            parts[residues] = w.expand(w.number(0, grad.dtype), [shape[0], shape[1], *lengths])
            parts[residues] = Value(parts[residues].number, grad.dtype, (shape[0], shape[1], *lengths))
            continue
        taps = turned
        for i, c in enumerate(chosen):
            taps = w.slice(taps, 2 + i, c.first, c.taps, -c.apart)
        edges = [c.edges(n) for c, n in zip(chosen, grad.shape[2:])]
        cut = padded(w, grad, [min(low, 0) for low, _ in edges], [min(high, 0) for _, high in edges], zero(grad.dtype))
        attributes = listed(
            strides=[1] * rank, pads_lo=[max(low, 0) for low, _ in edges], pads_hi=[max(high, 0) for _, high in edges],
            dilations=[c.dilation for c in chosen],
        )  # fmt: skip
        part = w.op(f"conv {attributes} groups={groups}", cut, taps)
        parts[residues] = Value(part.number, grad.dtype, (shape[0], shape[1], *lengths))
    return between(w, parts, sizes, stride)


def weight_gradient(w: Writer, grad: Value, a: Value, shape, settings, groups: int) -> Value:
    """What the gradient of the result says of the weights: for each tap, a product over samples and positions."""
    stride, padding, dilation = settings
    rank, kernel = len(stride), shape[2:]
    results = grad.shape[2:]
    outputs, inputs = shape[0] // groups, shape[1]
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(results, stride, kernel, dilation)]
    high = [max(r - n - p, 0) for r, n, p in zip(reach, a.shape[2:], padding)]
    x = padded(w, a, list(padding), high, zero(a.dtype))
    space = "xyz"[:rank]
    alone = outputs == 1 and inputs == 1
    wide_grad = w.cast(grad, wide(grad.dtype))
    by_group = None if alone else w.reshape(grad, [grad.shape[0], groups, outputs, *results])
    products = []
    for taps in itertools.product(*(range(k) for k in kernel)):
        seen = x
        for i, (t, n, s, d) in enumerate(zip(taps, results, stride, dilation)):
            seen = w.slice(seen, 2 + i, t * d, n, s)
        seen = Value(seen.number, a.dtype, (*a.shape[:2], *results))
        if alone:
            both = w.map("{a} * {b}", wide_grad, w.cast(seen, wide_grad.dtype), dtype=wide_grad.dtype)
            total = w.cast(w.reduce("sum", both, [0, *range(2, 2 + rank)], False), grad.dtype)
        else:
            seen = w.reshape(seen, [a.shape[0], groups, inputs, *results])
            total = w.contract(f"ngo{space},ngc{space}->goc", by_group, seen)
        products.append(w.reshape(total, [shape[0], inputs, 1]))
    whole = products[0] if len(products) == 1 else w.op("concat axis=2", *products)
    return w.reshape(whole, shape)


# ---- pooling by maxima ------------------------------------------------------------------------------


def largest_at(w: Writer, a: Value, kernel, strides, pads, sizes) -> Value:
    """Where in its plane (or space) the largest element of each window lies: the first of equals, the last of those that are no numbers."""
    known(a)
    rank = len(kernel)
    high = [max((n - 1) * s + k - size - p, 0) for n, s, k, size, p in zip(sizes, strides, kernel, a.shape[2:], pads)]
    x = padded(w, a, list(pads), high, "-inf")
    best = at = None
    for number, taps in enumerate(itertools.product(*(range(k) for k in kernel))):
        seen = x
        for i, (t, n, s) in enumerate(zip(taps, sizes, strides)):
            seen = w.slice(seen, 2 + i, t, n, s)
        seen = Value(seen.number, a.dtype, (*a.shape[:2], *sizes))
        if best is None:
            best, at = seen, w.expand(w.number(0, torch.int32), seen.shape)
            continue
        text = f"where(({{a}} > {{b}}) | ({{a}} != {{a}}), i32({number}), {{c}})"
        at = Value(w.map(text, seen, best, at, dtype=torch.int32).number, torch.int32, seen.shape)
        text = "where(({a} > {b}) | ({a} != {a}), {a}, {b})"
        best = Value(w.map(text, seen, best, dtype=a.dtype).number, a.dtype, seen.shape)
    # Only the first tap of a window can be chosen outside: where all that is inside is minus infinity.
    texts = []
    for i, (word, step, pad) in enumerate(zip("bcd", strides, pads)):
        inner = math.prod(kernel[i + 1 :])
        tap = "i64({a})" + (f" / {inner}" if inner > 1 else "") + (f" % {kernel[i]}" if i else "")
        texts.append(f"max({{{word}}} * {step} - {pad} + {tap}, i64(0))")
    found = w.map(in_row_major(texts, a.shape[2:]), at, *axes_of(w, at.shape, rank), dtype=torch.int64)
    return Value(found.number, torch.int64, at.shape)


def axes_of(w: Writer, shape, rank: int) -> list[Value]:
    """The positions of elements along each spatial axis."""
    text = ",".join(map(str, shape))
    return [w.op(f"iota axis={2 + i}", dtype=torch.int64, result=f"i64[{text}]") for i in range(rank)]


def in_row_major(texts: list[str], sizes) -> str:
    """The position in a plane or space of so many elements, of positions along its axes."""
    whole = texts[0]
    for text, size in zip(texts[1:], sizes[1:]):
        whole = f"({whole}) * {size} + ({text})"
    return whole


@rule(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default)
def max_pool_backward(w, node, grad, a, kernel, stride, padding, dilation, ceil_mode, indices):
    rank = 3 if node.target is aten.max_pool3d_with_indices_backward.default else 2
    if a.rank != rank + 2 or not a.dtype.is_floating_point:
        raise Unsupported("the gradient of pooling of one sample, or of integers")
    known(grad, a)
    kernel, pads, dilations = per_axis(kernel, rank), per_axis(padding, rank), per_axis(dilation, rank)
    strides = per_axis(stride, rank) if stride else kernel
    if math.prod(kernel) > WINDOW_MAX:
        raise Unsupported("the gradient of pooling over large windows")
    sizes, results, score = a.shape[2:], grad.shape[2:], wide(grad.dtype)
    axes, parts = phases(sizes, kernel, strides, pads, dilations), {}
    for residues in itertools.product(*(range(s) for s in strides)):
        chosen = [axis[r] for axis, r in zip(axes, residues)]
        shape = (*a.shape[:2], *(c.length for c in chosen))
        total = Value(w.expand(w.number(0, score), shape).number, score, shape)
        if 0 not in shape and all(c.taps for c in chosen):
            edges = [c.edges(n) for c, n in zip(chosen, results)]
            low, high = [e[0] for e in edges], [e[1] for e in edges]
            passed, named = padded(w, grad, low, high, "0.0"), padded(w, indices, low, high, "-1")
            texts = [f"{{{word}}} * {step} + {residue}" for word, step, residue in zip("abc", strides, residues)]
            here = w.map(in_row_major(texts, sizes), *axes_of(w, shape, rank), dtype=torch.int64)
            for taps in itertools.product(*(range(c.taps) for c in chosen)):
                pair = [passed, named]
                for i, (c, t) in enumerate(zip(chosen, taps)):
                    pair = [w.slice(p, 2 + i, t * c.dilation, c.length) for p in pair]
                added = f"{{a}} + where({{b}} == {{c}}, {{d}}, 0)"
                total = w.map(added, total, pair[1], here, w.cast(pair[0], score), dtype=score)
        parts[residues] = Value(w.cast(total, grad.dtype).number, grad.dtype, shape)
    return between(w, parts, sizes, strides)


@rule(aten.adaptive_max_pool2d_backward.default)
def adaptive_max_pool_backward(w, node, grad, a, indices):
    known(grad, a)
    if a.rank != 4 or any(have % want for have, want in zip(a.shape[2:], grad.shape[2:])):
        raise Unsupported("the gradient of adaptive pooling in windows of unequal sizes")
    kernel = [have // want for have, want in zip(a.shape[2:], grad.shape[2:])]
    return max_pool_backward(w, node, grad, a, kernel, [], 0, 1, False, indices)


# Elements of a window up to which its positions are ours: each is an operand.
WINDOW_MAX = 9


# ---- embeddings -------------------------------------------------------------------------------------

# Multiplications up to which a product is less than PyTorch's kernel and the cut, by the bytes of an element. On an H200 tables of 2 to 4096
# rows of 768, with 4096 positions, took 11 to 44 us in bf16 (PyTorch 105 to 132), and in f32 99 us at 2^30.6 (105).
EMBEDDINGS_MAX = {"cpu": {2: 2**21, 4: 2**21, 8: 2**21}, "cuda": {2: 2**33, 4: 2**30, 8: 2**24}}


@rule(aten.embedding_dense_backward.default)
def embedding_backward(w, node, grad, indices, rows, padding_idx, scale_by_frequency):
    if scale_by_frequency or not isinstance(rows, int):
        raise Unsupported("the gradient of an embedding that is scaled by frequency")
    known(grad, indices)
    if indices.rank == 0:
        raise Unsupported("the gradient of an embedding of one position")
    count, columns = math.prod(indices.shape), grad.shape[-1]
    if count * rows * columns > EMBEDDINGS_MAX[w.device].get(grad.dtype.itemsize, 0):
        raise Unsupported("the gradient of a large embedding")
    at = w.reshape(indices, [count, 1])
    row = w.op("iota axis=1", dtype=indices.dtype, result=f"{'i64' if indices.dtype is torch.int64 else 'i32'}[{count},{rows}]")
    one, none = literal(1, grad.dtype), literal(0, grad.dtype)
    where = "{a} == {b}" if padding_idx < 0 else f"({{a}} == {{b}}) & ({{a}} != {padding_idx})"
    text = f"where({where}, {one}, {none})"
    hit = w.map(text, at, row, dtype=grad.dtype)
    hit = Value(hit.number, grad.dtype, (count, rows))
    return w.contract("tv,td->vd", hit, w.reshape(grad, [count, columns]))
