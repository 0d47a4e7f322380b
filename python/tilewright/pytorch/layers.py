"""Rules for the operators of neural networks that our graphs have whole: convolutions, pooling, norms, softmax, losses."""

from __future__ import annotations

import math

import torch
from torch import fx

from .sizes import Unsupported, text
from .sums import mean_over
from .writer import Value, Writer, dtype_name, rule, used_results, wide

aten = torch.ops.aten


def per_axis(value, rank: int) -> list[int]:
    """A setting for each spatial axis; one number stands for all."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    items = items * rank if len(items) == 1 else items
    if len(items) != rank or not all(isinstance(i, int) for i in items):
        raise Unsupported(f"the setting {value} for {rank} axes")
    return items


def listed(**lists) -> str:
    """Attributes that are lists of numbers."""
    return " ".join(f"{key}=[{','.join(map(str, items))}]" for key, items in lists.items())


def ones(w: Writer, shape, dtype) -> Value:
    """A tensor of ones."""
    return w.expand(w.number(1, dtype), shape)


@rule(aten.convolution.default)
def convolution(w, node, a, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if a.rank < 3:
        raise Unsupported("a convolution of one sample")
    rank = a.rank - 2
    if transposed:
        return transposed_convolution(w, a, weight, bias, stride, padding, dilation, output_padding, groups)
    pads = per_axis(padding, rank)
    attributes = listed(strides=per_axis(stride, rank), pads_lo=pads, pads_hi=pads, dilations=per_axis(dilation, rank))
    y = w.op(f"conv {attributes} groups={groups}", a, weight)
    if bias is None:
        return y
    return w.map("{a} + {b}", y, w.reshape(bias, [bias.shape[0], *[1] * rank]), dtype=a.dtype)


# Multiplications up to which a transposed convolution with strides is one over zeros: less than leaving the group costs.
ZEROS_MAX = 2**22


def transposed_convolution(w, a, weight, bias, stride, padding, dilation, output_padding, groups):
    """A convolution with zeros between the elements, and the weights the other way round."""
    rank = a.rank - 2
    stride, padding, dilation = per_axis(stride, rank), per_axis(padding, rank), per_axis(dilation, rank)
    more = per_axis(output_padding, rank)
    sizes = [*a.shape, *weight.shape]
    if not all(isinstance(n, int) for n in sizes) or 0 in sizes:
        raise Unsupported("a transposed convolution with symbolic sizes or of nothing")
    if math.prod(stride) > 1 and math.prod(a.shape) * math.prod(stride) * math.prod(weight.shape[1:]) > ZEROS_MAX:
        raise Unsupported("a large transposed convolution, most of which are zeros")
    kernel = weight.shape[2:]
    low = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding)]
    high = [edge + extra for edge, extra in zip(low, more)]
    if min(low) < 0:
        raise Unsupported("a transposed convolution that is cut at the edges")
    x, shape = a, list(a.shape)
    for i, step in enumerate(stride):
        axis = 2 + i
        if step == 1:
            continue
        apart = [*shape[: axis + 1], 1, *shape[axis + 1 :]]
        pads = ["0"] * len(apart)
        pads[axis + 1] = str(step - 1)
        x = w.op(f"pad lo=[{','.join(['0'] * len(apart))}] hi=[{','.join(pads)}] constant={'0.0' if a.dtype.is_floating_point else '0'}", w.reshape(x, apart))
        shape[axis] = shape[axis] * step
        x = w.reshape(x, shape)
        shape[axis] -= step - 1
        x = Value(x.number, a.dtype, tuple(shape[:axis] + [shape[axis] + step - 1] + shape[axis + 1 :]))
        x = w.slice(x, axis, 0, shape[axis])
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    y = w.reshape(weight, [groups, inputs, outputs, *kernel])
    y = w.permute(y, [0, 2, 1, *range(3, 3 + rank)])
    y = w.reshape(y, [groups * outputs, inputs, *kernel])
    y = Value(y.number, weight.dtype, (groups * outputs, inputs, *kernel))
    for i, size in enumerate(kernel):
        y = Value(w.slice(y, 2 + i, size - 1, size, -1).number, weight.dtype, y.shape)
    attributes = listed(strides=[1] * rank, pads_lo=low, pads_hi=high, dilations=dilation)
    result = w.op(f"conv {attributes} groups={groups}", x, y)
    if bias is None:
        return result
    return w.map("{a} + {b}", result, w.reshape(bias, [bias.shape[0], *[1] * rank]), dtype=a.dtype)


@rule(aten._softmax.default, aten._log_softmax.default, aten.softmax.int, aten.log_softmax.int)
def softmax(w, node, a, dim, *_, **options):
    result = node.meta["val"].dtype
    if a.rank == 0:
        raise Unsupported("softmax of a scalar")
    log = " log" if node.target in (aten._log_softmax.default, aten.log_softmax.int) else ""
    return w.cast(w.op(f"softmax axis={dim % a.rank}{log}", w.cast(a, wide(result))), result)


@rule(aten._safe_softmax.default)
def safe_softmax(w, node, a, dim, dtype=None):
    """Softmax with zeros where a whole row is minus infinity."""
    result = node.meta["val"].dtype
    x = w.cast(a, wide(result))
    y = w.op(f"softmax axis={dim % a.rank}", x)
    largest = w.reduce("max", x, [dim], True)
    return w.cast(w.map("where({a} == -inf, 0, {b})", largest, y, dtype=x.dtype), result)


def row_norm(w: Writer, op: str, a: Value, shape, weight, bias=None) -> Value:
    """A norm of rows, computed in the wide type and rounded once; vectors of another type than the rows are converted."""
    given = [v for v in (weight, bias) if v is not None]
    compute = a.dtype if all(v.dtype == a.dtype for v in given) else wide(a.dtype)
    scale = ones(w, shape, compute) if weight is None else w.cast(weight, compute)
    operands = [w.cast(a, compute), scale] + ([] if bias is None else [w.cast(bias, compute)])
    return w.cast(w.op(op, *operands), a.dtype)


@rule(aten.native_layer_norm.default)
def layer_norm(w, node, a, shape, weight, bias, eps):
    axis = a.rank - len(shape)
    wanted = node.meta["val"]
    if not 0 <= eps < math.inf:
        raise Unsupported("a norm with an epsilon below zero")
    y = row_norm(w, f"layer_norm axis={axis} eps={eps!r}", a, shape, weight, bias)
    used = used_results(node)
    if not used & {1, 2}:
        return y, None, None
    x = w.cast(a, wide(a.dtype))
    axes = list(range(axis, a.rank))
    x = Value(x.number, x.dtype, a.shape)
    mean = mean_over(w, x, axes, True)
    centred = w.map("{a} - {b}", x, mean, dtype=x.dtype)
    square = Value(w.map("{a} * {a}", centred, dtype=x.dtype).number, x.dtype, a.shape)
    variance = mean_over(w, square, axes, True)
    scale = w.map(f"rsqrt({{a}} + {eps!r})", variance, dtype=x.dtype)
    return y, w.cast(mean, wanted[1].dtype), w.cast(scale, wanted[2].dtype)


@rule(aten._fused_rms_norm.default)
def rms_norm(w, node, a, shape, weight, eps):
    wanted = node.meta["val"]
    eps = torch.finfo(a.dtype).eps if eps is None else eps
    axis = a.rank - len(shape)
    y = row_norm(w, f"rms_norm axis={axis} eps={eps!r}", a, shape, weight)
    if 1 not in used_results(node):
        return y, None
    x = w.cast(a, wide(a.dtype))
    square = Value(w.map("{a} * {a}", x, dtype=x.dtype).number, x.dtype, a.shape)
    factor = w.map(f"rsqrt({{a}} + {eps!r})", mean_over(w, square, range(axis, a.rank), True), dtype=x.dtype)
    return y, w.cast(factor, wanted[1].dtype)


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm(w, node, a, weight, bias, mean, variance, momentum, eps):
    if used_results(node) & {1, 2}:
        raise Unsupported("batch norm with its saved results")
    channels, given = [a.shape[1]], [v for v in (weight, bias, mean, variance) if v is not None]
    # Rows in 16 bits beside statistics in f32, as under autocast, are rounded once.
    compute = a.dtype if all(v.dtype == a.dtype for v in given) else wide(a.dtype)
    scale = ones(w, channels, compute) if weight is None else w.cast(weight, compute)
    shift = w.expand(w.number(0, compute), channels) if bias is None else w.cast(bias, compute)
    y = w.op(f"batch_norm eps={eps!r}", w.cast(a, compute), scale, shift, w.cast(mean, compute), w.cast(variance, compute))
    return w.cast(y, a.dtype), None, None


@rule(aten.native_group_norm.default)
def group_norm(w, node, a, weight, bias, n, c, hw, groups, eps):
    if not 0 <= eps < math.inf:
        raise Unsupported("a norm with an epsilon below zero")
    x = w.cast(a, wide(a.dtype))
    scale = ones(w, [a.shape[1]], x.dtype) if weight is None else w.cast(weight, x.dtype)
    shift = w.expand(w.number(0, x.dtype), [a.shape[1]]) if bias is None else w.cast(bias, x.dtype)
    y = w.cast(w.op(f"group_norm groups={groups} eps={eps!r}", x, scale, shift), a.dtype)
    if not used_results(node) & {1, 2}:
        return y, None, None
    wanted = node.meta["val"]
    shape = [a.shape[0], groups, c // groups, hw]
    rows = Value(w.reshape(x, shape).number, x.dtype, tuple(shape))
    mean = mean_over(w, rows, [2, 3], True)
    square = w.map("({a} - {b}) * ({a} - {b})", rows, mean, dtype=x.dtype)
    variance = mean_over(w, Value(square.number, x.dtype, tuple(shape)), [2, 3], True)
    factor = w.map(f"rsqrt({{a}} + {eps!r})", variance, dtype=x.dtype)
    both = [w.cast(w.reshape(v, part.shape), part.dtype) for v, part in zip((mean, factor), wanted[1:])]
    return y, *both


def _weights(w: Writer, a: Value, target: Value, weight: Value, score) -> Value:
    """The weight of each target's class; of what is no class, any."""
    size = w.number(a.shape[-1], torch.int64)
    at = w.map("where({a} < 0, 0, where({a} >= {b}, 0, {a}))", target, size, dtype=torch.int64)
    return w.cast(w.op("gather axis=0", weight, at), score)


def _targets(w: Writer, node, a: Value, target: Value, ignore: int):
    """The targets; beside the rows of `a`, the targets that are classes (others -1) and the numbers of the classes, in 32 bits: wider numbers
    would make kernels read fewer elements at once."""
    if a.rank not in (1, 2):
        raise Unsupported("a loss of classes over more axes")
    w.lookup(target, a.shape[-1], ignore)
    shape = ",".join(text(s) for s in a.shape)
    classes = w.op(f"iota axis={a.rank - 1}", dtype=torch.int32, result=f"i32[{shape}]")
    wide_target = w.cast(target, torch.int64)
    size = w.number(a.shape[-1], torch.int64)
    known = w.map("i32(where({a} < 0, -1, where({a} >= {b}, -1, {a})))", wide_target, size, dtype=torch.int32)
    return wide_target, w.reshape(known, [*target.shape, 1]), classes


# What leaves its result in memory, whoever reads it.
STORED = {aten.mm.default, aten.addmm.default, aten.bmm.default}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def _looked_up(w: Writer, node, a: Value, column: Value) -> Value | None:
    """The logarithms at the targets, of logits that lie in memory: looked up there and made probabilities as all of the row is (`losses`), so
    that no row is compared with its target. None where the logits are computed on the way."""
    logits, steps, rows = node.args[0], [], (a.shape[0], 1)
    while isinstance(logits, fx.Node) and logits.op == "call_function":
        held = logits.meta["val"]
        if logits.target is aten._to_copy.default and held.dtype.is_floating_point:
            steps.append(held.dtype)
        elif logits.target is aten.sub.Tensor and not logits.kwargs and isinstance(logits.args[1], fx.Node):
            lost = w.values.get(logits.args[1])
            if not isinstance(lost, Value) or lost.shape != rows or lost.dtype != held.dtype:
                return None
            steps.append(lost)
        elif logits.target not in VIEWS:
            break
        logits = logits.args[0]
    lies = isinstance(logits, fx.Node) and (logits.op == "placeholder" or logits.target in STORED)
    value = w.values.get(logits) if lies else None
    if not isinstance(value, Value):
        return None
    size, row = text(a.shape[1]), text(a.shape[0])
    step = w.reshape(w.op(f"dims [{size}]", dtype=torch.int64), [])
    count = w.op("iota axis=0", dtype=torch.int64, result=f"i64[{row},1]")
    at = w.map("{a} * {b} + where({c} < 0, 0, i64({c}))", count, step, column, dtype=torch.int64)
    found = w.op("gather axis=0", w.op(f"reshape [({row})*({size})]", value), at)
    for step in reversed(steps):
        if isinstance(step, Value):
            found = w.map("{a} - {b}", w.cast(found, step.dtype), step, dtype=step.dtype)
        else:
            found = w.cast(found, step)
    return w.reshape(found, [a.shape[0]])


@rule(aten.nll_loss_forward.default)
def nll_loss(w, node, a, target, weight, reduction, ignore):
    """Minus the logarithms at the targets; targets that are no class give NaN where nobody can look at them before."""
    result, score = node.meta["val"][0].dtype, wide(a.dtype)
    target, column, classes = _targets(w, node, a, target, ignore)
    picked = _looked_up(w, node, a, column) if w.device == "cuda" and a.rank == 2 else None
    if picked is None:
        at_target = w.map("where({a} == {b}, {c}, 0)", classes, column, w.cast(a, score), dtype=score)
        picked = w.reduce("sum", Value(at_target.number, score, a.shape), [a.rank - 1], False)
    picked = w.cast(picked, score)
    size = w.number(a.shape[-1], torch.int64)
    name = dtype_name(score)
    inside = f"where({{a}} < 0, {name}(nan), where({{a}} >= {{c}}, {name}(nan), -{{b}}))"
    losses = w.map(f"where({{a}} == {ignore}, 0, {inside})", target, picked, size, dtype=score)
    weights = None if weight is None else _weights(w, a, target, weight, score)
    if weights is not None:
        losses = w.map(f"where({{a}} == {ignore}, 0, {{b}} * {{c}})", target, losses, weights, dtype=score)
    if reduction == 0:
        return w.cast(losses, result), w.number(0, result)
    if weights is None:
        counted = w.map(f"where({{a}} == {ignore}, {name}(0), {name}(1))", target, dtype=score)
    else:
        counted = w.map(f"where({{a}} == {ignore}, {name}(0), {{b}})", target, weights, dtype=score)
    axes = range(target.rank)
    count = w.reduce("sum", Value(counted.number, score, target.shape), axes, False)
    total = w.reduce("sum", Value(losses.number, score, target.shape), axes, False)
    loss = w.map("{a} / {b}", total, count, dtype=score) if reduction == 1 else total
    return w.cast(loss, result), w.cast(count, result)


@rule(aten.nll_loss_backward.default)
def nll_loss_backward(w, node, grad, a, target, weight, reduction, ignore, total):
    result, score = node.meta["val"].dtype, wide(a.dtype)
    target, column, classes = _targets(w, node, a, target, ignore)
    grad = w.cast(grad, score)
    if reduction == 1:
        grad = w.map("{a} / {b}", grad, w.cast(total, score), dtype=score)
    if weight is not None:
        grad = w.map("{a} * {b}", grad, _weights(w, a, target, weight, score), dtype=score)
    of_row = w.map(f"where({{a}} == {ignore}, 0, -{{b}})", target, grad, dtype=score)
    of_row = w.reshape(of_row, [*target.shape, 1])
    return w.cast(w.map("where({a} == {b}, {c}, 0)", classes, column, of_row, dtype=score), result)
