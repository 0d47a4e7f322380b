"""Gradients of slices that fill a tensor: written side by side instead of added to zeros.

AOTAutograd writes the gradients of `x[:, :n]` and `x[:, i]` as zeros with a part written over. Where such parts fill an axis and are added (the
halves that rotary embeddings turn; queries, keys and values of one product), they are a concatenation: no zeros, no sums.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten


VIEWS = {aten.view.default, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}

# Views between a join and its reader, and axes, at most.
MOST_VIEWS, MOST_AXES = 8, 6

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


def joined(graph: fx.Graph, parts: list[tuple], node: fx.Node) -> fx.Node:
    """The concatenation of parts that fill an axis of what `node` makes, in order."""
    dim, held, values = parts[0][0], node.meta["val"], [p[3] for p in parts]

    def call(target, first, *args, like: fx.Node) -> fx.Node:
        new = graph.call_function(target, (first, *args))
        given = [v.meta["val"] for v in first] if isinstance(first, list) else first.meta["val"]
        new.meta = {**like.meta, "val": target(given, *args)}
        return new

    with held.fake_mode:
        if any(v.meta["val"].dim() == held.dim() for v in values):
            # Stretches of the axis, and perhaps single positions between them.
            values = [v if v.meta["val"].dim() == held.dim() else call(aten.unsqueeze.default, v, dim, like=v) for v in values]
            return call(aten.cat.default, values, dim, like=node)
        # Whole positions of an axis: in memory they stand where the product that reads them wants them.
        order, copies = wanted_order(node)
        at, rest = order.index(dim), [axis - (axis > dim) for axis in order if axis != dim]
        if at == len(rest):
            return call(aten.cat.default, [call(aten.unsqueeze.default, v, dim, like=v) for v in values], dim, like=node)
        turned = [v if rest == sorted(rest) else call(aten.permute.default, v, rest, like=v) for v in values]
        whole = call(aten.cat.default, turned, at, like=node)
        for copy in copies:
            copy.replace_all_uses_with(call(aten.view.default, whole, list(copy.meta["val"].shape), like=copy))
        whole = call(aten.view.default, whole, [held.shape[axis] for axis in order], like=node)
        return call(aten.permute.default, whole, [order.index(axis) for axis in range(len(order))], like=node)


def wanted_order(node: fx.Node) -> tuple[list[int], list[fx.Node]]:
    """The order of axes in memory in which a product can read what views make of a tensor, without a copy, and the copies that are needless then;
    else the axes as they are."""
    rank = node.meta["val"].dim()
    plain = list(range(rank))
    paths, ends = [[node]], []
    while paths:
        path = paths.pop()
        for user in path[-1].users:
            if user.target in VIEWS and len(path) < MOST_VIEWS:
                paths.append([*path, user])
            elif user.target is aten.clone.default and _multiplied(user):
                ends.append((path[1:], user))
    for order in itertools.permutations(plain) if rank <= MOST_AXES else ():
        needless = [copy for path, copy in ends if _contiguous(node, order, path)]
        if needless:
            return list(order), needless
    return plain, []


def _contiguous(node: fx.Node, order: tuple[int, ...], path: list[fx.Node]) -> bool:
    """Whether views of a tensor whose axes lie in that order in memory end in one that is contiguous."""
    with _disable_current_modes():
        value = torch.empty([node.meta["val"].shape[axis] for axis in order], device="meta")
        value = value.permute([order.index(axis) for axis in range(len(order))])
        for view in path:
            try:
                value = view.target(value, *view.args[1:], **view.kwargs)
            except (RuntimeError, ValueError):
                # No view of a tensor in that order.
                return False
    return value.is_contiguous()


def _multiplied(node: fx.Node) -> bool:
    """Whether views of a tensor are a product's operand."""
    return any(u.target in PRODUCTS or u.target in VIEWS and _multiplied(u) for u in node.users)


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
            total = joined(graph, [p for _, p in ordered], node)
            for leaf in added:
                if leaf not in parts:
                    total = graph.call_function(aten.add.Tensor, (leaf, total))
                    total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        changed = True
    if changed:
        graph.eliminate_dead_code()
