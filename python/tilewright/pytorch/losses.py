"""Cross-entropy in training: taken apart so that a backward graph computes it again from the logits.

Whole, `log_softmax` and the gradient of `nll_loss` make AOTAutograd keep the logarithms of all probabilities, in float32: for a language model
several times what its logits take. Taken apart, what is kept are the logits as they are and two numbers per row, and both graphs have one
kernel that reads the logits.

The gradient needs the sum of each row's gradient, which is zero but for the target: `sum_picked` writes that as the one number that it is, so
that no row is walked for it. Columns are counted in 32 bits: a kernel has no more elements at once than its widest vector allows, and one of 64 bits
would make it read two logits at a time.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def log_softmax(x, dim, half_to_float):
    """The decomposition of `_log_softmax`."""
    if not x.dim() or not x.numel():
        return NotImplemented
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    shifted = wide - torch.amax(wide, dim, keepdim=True)
    y = shifted - torch.log(torch.sum(torch.exp(shifted), dim, keepdim=True))
    return y if half_to_float else y.to(x.dtype)


def nll_loss_backward(gradient, x, target, weight, reduction, ignore_index, total_weight):
    """The decomposition of `nll_loss_backward`, for rows of classes that weigh the same."""
    if x.dim() != 2 or weight is not None:
        return NotImplemented
    if reduction == 1:
        gradient = gradient / total_weight
    gradient = gradient.reshape(-1, 1) if reduction == 0 else gradient.reshape(1, 1)
    target = target.reshape(-1, 1)
    of_row = torch.where(target != ignore_index, -gradient, 0.0)
    # What is no position of 32 bits is none at all.
    here = torch.where((target >= 0) & (target < x.shape[1]), target, -1).to(torch.int32)
    classes = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    return torch.where(classes == here, of_row, 0.0).to(x.dtype)


DECOMPOSITIONS = {aten._log_softmax.default: log_softmax, aten.nll_loss_backward.default: nll_loss_backward}


def _picked(node) -> tuple | None:
    """Of `where(arange(n) == target, value, 0)` over rows: the targets, the values, both `[rows, 1]`, and `n`."""
    if not isinstance(node, fx.Node) or node.target is not aten.where.self:
        return None
    same, value, other = node.args
    zero = isinstance(other, fx.Node) and other.target in (aten.scalar_tensor.default, aten.full.default) and other.args[-1] == 0
    if not zero or not isinstance(same, fx.Node) or same.target is not aten.eq.Tensor or not isinstance(value, fx.Node):
        return None
    classes, target = same.args
    if not isinstance(classes, fx.Node) or classes.target is not aten.arange.start_step or not isinstance(target, fx.Node):
        return None
    first, count, *step = classes.args
    rows = tuple(node.meta["val"].shape)
    column = (*rows[:1], 1)
    plain = first == 0 and step in ([], [1]) and isinstance(count, int) and len(rows) == 2 and rows[1:] == (count,)
    fits = plain and tuple(target.meta["val"].shape) == column and tuple(value.meta["val"].shape) == column
    return (target, value, count) if fits and value.meta["val"].dtype == node.meta["val"].dtype else None


def sum_picked(gm: fx.GraphModule) -> None:
    """Sums of rows of which at most one element is not zero, as that element; in place."""
    graph, changed = gm.graph, False
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        found = _picked(node.args[0])
        keeps = list(node.args[1:]) == [[1], True] and not node.kwargs
        if found is None or not keeps:
            continue
        target, value, count = found
        with graph.inserting_before(node):
            inside = None
            for compare, bound in ((aten.ge.Scalar, 0), (aten.lt.Scalar, count)):
                told = _like(graph.call_function(compare, (target, bound)), target, torch.bool)
                inside = told if inside is None else _like(graph.call_function(aten.logical_and.default, (inside, told)), target, torch.bool)
            picked = _like(graph.call_function(aten.where.self, (inside, value, node.args[0].args[2])), node, node.meta["val"].dtype)
        node.replace_all_uses_with(picked)
        changed = True
    if changed:
        graph.eliminate_dead_code()


def _like(new: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The new node, of another one's shape."""
    new.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
    return new
