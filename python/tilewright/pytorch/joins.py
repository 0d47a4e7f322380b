"""Gradients of slices that fill a tensor: written side by side instead of added to zeros.

AOTAutograd writes the gradients of `x[:, :n]` and `x[:, i]` as zeros with a part written over. Where such parts fill an axis and are added (the
halves that rotary embeddings turn; queries, keys and values of one product), they are a concatenation: no zeros, no sums.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten


# The operators that write over a part, and the names of their arguments.
WRITERS = {
    aten.slice_scatter.default: ("base", "part", "dim", "start", "end", "step"),
    aten.select_scatter.default: ("base", "part", "dim", "index"),
}


def part(node) -> tuple | None:
    """Of zeros with a part written over: the axis, where the part begins and ends, and the part (without the axis, where it is one of
    its positions)."""
    if not isinstance(node, fx.Node) or node.target not in WRITERS or len(node.users) != 1:
        return None
    given = {"dim": 0, "start": None, "end": None, "step": 1, **dict(zip(WRITERS[node.target], node.args)), **node.kwargs}
    base, held = given["base"], node.meta["val"]
    dim = given["dim"] % held.dim()
    size = held.shape[dim]
    start, end = given["start"] or 0, given["end"]
    if "index" in given and isinstance(size, int) and isinstance(given["index"], int):
        start = given["index"] % size
        end = start + 1
    zeros = isinstance(base, fx.Node) and base.target is aten.full.default and base.args[1] == 0
    if not zeros or given["step"] != 1 or not all(isinstance(n, int) for n in (size, start)) or not isinstance(end, (int, type(None))):
        return None
    end = size if end is None or end > size else end
    whole = given["part"].meta["val"].dtype == held.dtype and 0 <= start < end
    return (dim, start, end, given["part"]) if whole else None


def joined(graph: fx.Graph, parts: list[tuple], meta: dict) -> fx.Node:
    """The concatenation of parts that fill an axis, in order."""
    dim, given = parts[0][0], []
    for _, _, _, value in parts:
        if value.meta["val"].dim() < meta["val"].dim():
            at = graph.call_function(aten.unsqueeze.default, (value, dim))
            at.meta = {**value.meta, "val": value.meta["val"].unsqueeze(dim)}
            value = at
        given.append(value)
    total = graph.call_function(aten.cat.default, (given, dim))
    total.meta = dict(meta)
    return total


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
        fills = 1 < len(ordered) and len(set(added)) == len(added) and [p[1] for _, p in ordered] == ends[:-1] and ends[-1] == node.meta["val"].shape[dim]
        if not fills:
            continue
        with graph.inserting_before(node):
            total = joined(graph, [p for _, p in ordered], node.meta)
            for leaf in added:
                if leaf not in parts:
                    total = graph.call_function(aten.add.Tensor, (leaf, total))
                    total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        changed = True
    if changed:
        graph.eliminate_dead_code()
