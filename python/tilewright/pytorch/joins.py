"""Gradients of slices that fill a tensor: written side by side instead of added to zeros.

AOTAutograd writes the gradient of `x[:, :n]` as zeros with a part written over. Where such parts fill an axis and are added (the halves
that rotary embeddings turn), they are a concatenation: no zeros, no sums.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten


def part(node) -> tuple | None:
    """Of zeros with a part written over: the axis, where the part begins and ends, and the part."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice_scatter.default or len(node.users) != 1:
        return None
    names = ("base", "part", "dim", "start", "end", "step")
    given = {"dim": 0, "start": None, "end": None, "step": 1, **dict(zip(names, node.args)), **node.kwargs}
    base, held = given["base"], node.meta["val"]
    dim = given["dim"] % held.dim()
    size = held.shape[dim]
    start, end = given["start"] or 0, given["end"]
    zeros = isinstance(base, fx.Node) and base.target is aten.full.default and base.args[1] == 0
    if not zeros or given["step"] != 1 or not all(isinstance(n, int) for n in (size, start)) or not isinstance(end, (int, type(None))):
        return None
    end = size if end is None or end > size else end
    whole = given["part"].meta["val"].dtype == held.dtype and 0 <= start < end
    return (dim, start, end, given["part"]) if whole else None


def leaves(node: fx.Node) -> list:
    """What a sum adds, through sums that only it reads and that have its type and shape."""
    found = []
    for operand in node.args[:2]:
        same = (
            isinstance(operand, fx.Node)
            and operand.target is aten.add.Tensor
            and len(operand.users) == 1
            and not operand.kwargs
            and all(isinstance(a, fx.Node) for a in operand.args)
            and _type(operand) == _type(node)
        )
        found += leaves(operand) if same else [operand]
    return found


def _type(node: fx.Node) -> tuple:
    held = node.meta["val"]
    return held.dtype, tuple(held.shape)


def join_parts(gm: fx.GraphModule) -> None:
    """See the module's head; in place."""
    graph, changed = gm.graph, False
    for node in reversed(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            continue
        added = leaves(node)
        parts = {leaf: part(leaf) for leaf in added if part(leaf) is not None and _type(leaf) == _type(node)}
        ordered = sorted(parts.items(), key=operator.itemgetter(1, 1)) if len({p[0] for p in parts.values()}) == 1 else []
        ends = [0, *(p[2] for _, p in ordered)]
        dim = ordered[0][1][0] if ordered else 0
        fills = len(ordered) > 1 and [p[1] for _, p in ordered] == ends[:-1] and ends[-1] == node.meta["val"].shape[dim]
        if not fills:
            continue
        with graph.inserting_before(node):
            total = graph.call_function(aten.cat.default, ([p[3] for _, p in ordered], dim))
            total.meta = dict(node.meta)
            for leaf in added:
                if leaf not in parts:
                    total = graph.call_function(aten.add.Tensor, (leaf, total))
                    total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        changed = True
    if changed:
        graph.eliminate_dead_code()
