"""Rows of products in the order in which they lie in memory.

`MultiheadAttention` with the batch first turns its tensors, so that positions come before samples, and makes them contiguous before each
product; from there on the whole residual stream lies in the other order. The rows of a product may stand in any order if those of its
result do: here such products read their operand as it lies, and their results are turned, which is a view. Products that sum over
rows (gradients of weights) take both operands in one order.

    x [64, 197, 768] -> permute [197, 64, 768] -> clone -> view [12608, 768] -> mm -> view [197, 64, n]
    x [64, 197, 768] -> view [12608, 768] -> mm -> view [64, 197, n] -> permute [197, 64, n]
"""

from __future__ import annotations

import dataclasses
import math
import operator

import torch
from torch import fx

aten = torch.ops.aten

# Products, with the place of the left operand, whose rows are those of the result.
LEFT = {aten.mm.default: 0, aten.addmm.default: 1}


@dataclasses.dataclass
class Matrix:
    """A matrix whose rows are the leading axes of a tensor that is made contiguous for it."""

    node: fx.Node
    copy: fx.Node
    # The sizes of those axes, and the order in which they are to stand; `None` while any order is as good.
    sizes: tuple[int, ...]
    order: tuple[int, ...] | None


def in_order(gm: fx.GraphModule) -> None:
    """See the module's head; in place. Values of nodes are made again where strides have changed."""
    graph = gm.graph
    if not _plain(graph):
        return
    found = {m.node: m for m in map(_matrix, graph.find_nodes(op="call_function", target=aten.view.default)) if m is not None}
    if all(m.order in (None, _same(m)) for m in found.values()):
        return
    _adopt(found)
    chosen = {n: m for n, m in found.items() if m.order is not None and m.order != _same(m)}
    while True:
        refused = [n for n, m in chosen.items() if not all(_fits(m, u, chosen) for u in n.users)]
        if not refused:
            break
        for node in refused:
            del chosen[node]
    if not chosen:
        return
    made: set[fx.Node] = set()
    for matrix in chosen.values():
        _turn(graph, matrix, made)
    graph.eliminate_dead_code()
    _strides(graph, made)
    gm.recompile()


def _plain(graph: fx.Graph) -> bool:
    """Whether all sizes are numbers, and each node's strides can be made again from its operands'."""
    for node in graph.nodes:
        held = node.meta.get("val")
        if node.op == "placeholder" and not (isinstance(held, torch.Tensor) and all(isinstance(n, int) for n in held.shape)):
            return False
        known = node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
        if node.op == "call_function" and (not known or node.target is aten.as_strided.default):
            return False
    return True


def _same(matrix: Matrix) -> tuple[int, ...]:
    return tuple(range(len(matrix.sizes)))


def _matrix(node: fx.Node) -> Matrix | None:
    held = node.meta["val"]
    copy = node.args[0]
    while copy.target is aten.view.default:
        copy = copy.args[0]
    if held.dim() != 2 or copy.target is not aten.clone.default or copy.args[0].meta["val"].is_contiguous():
        return None
    source = copy.args[0]
    shape, strides = source.meta["val"].shape, source.meta["val"].stride()
    rows = next((i for i in range(2, len(shape)) if math.prod(shape[:i]) == held.shape[0]), None)
    if rows is None or not copy.meta["val"].is_contiguous() or 0 in shape or any(n == 1 for n in shape[:rows]):
        return None
    order = tuple(sorted(range(rows), key=lambda axis: -strides[axis]))
    lies = source.meta["val"].permute([*order, *range(rows, len(shape))]).is_contiguous()
    free = order == tuple(range(rows)) and not lies
    return Matrix(node, copy, tuple(shape[:rows]), None if free else order)


def _summed(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two matrices whose rows a product of one's transpose with the other sums over."""
    if node.target is not aten.mm.default:
        return None
    left, right = node.args
    turned = left.target is aten.permute.default and list(left.args[1]) == [1, 0]
    return (left.args[0], right) if turned else None


def _adopt(found: dict[fx.Node, Matrix]) -> None:
    """Matrices that are copied anyway take the order of those that they are multiplied with."""
    for node, matrix in found.items():
        products = [p for u in node.users for p in (u, *u.users)] if matrix.order is None else []
        for pair in filter(None, map(_summed, products)):
            for mine, other in (pair, pair[::-1]):
                partner = found.get(other)
                if mine is node and partner is not None and partner.order is not None and partner.sizes == matrix.sizes:
                    matrix.order = partner.order


def _fits(matrix: Matrix, user: fx.Node, chosen: dict[fx.Node, Matrix]) -> bool:
    """Whether a reader can have the rows in the other order."""

    def partner(node: fx.Node) -> bool:
        other = chosen.get(node)
        return other is not None and other.sizes == matrix.sizes and other.order == matrix.order

    if user.target is aten.sum.dim_IntList:
        return list(user.args[1]) == [0]
    if user.target is aten.permute.default:
        pairs = [_summed(product) for product in user.users]
        return list(user.args[1]) == [1, 0] and all(p is not None and p[0] is matrix.node and partner(p[1]) for p in pairs)
    pair = _summed(user)
    if pair is not None and pair[1] is matrix.node:
        return partner(pair[0])
    place = LEFT.get(user.target)
    if place is None or [i for i, a in enumerate(user.args) if a is matrix.node] != [place] or user.kwargs:
        return False
    if place and user.args[0].meta["val"].dim() != 1:
        return False
    rows = len(matrix.sizes)
    return all(v.target is aten.view.default and tuple(v.meta["val"].shape[:rows]) == matrix.sizes for v in user.users)


def _turn(graph: fx.Graph, matrix: Matrix, made: set[fx.Node]) -> None:
    """The matrix in its order, and the results of products with it turned back."""
    node, source, order = matrix.node, matrix.copy.args[0], matrix.order
    rows, rank = len(order), source.meta["val"].dim()
    inverse = [order.index(axis) for axis in range(rows)]
    products = [u for u in node.users if u.target in LEFT and u.args[LEFT[u.target]] is node]

    def call(target, *args, like: fx.Node, **kwargs) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
        new.meta = {**like.meta, "val": target(*values, **kwargs)}
        made.add(new)
        return new

    places = [*order, *range(rows, rank)]
    while source.target is aten.permute.default:
        places = [source.args[1][axis] % rank for axis in places]
        source = source.args[0]
    with graph.inserting_before(matrix.copy), source.meta["val"].fake_mode:
        turned = source if places == sorted(places) else call(aten.permute.default, source, places, like=node)
        if not turned.meta["val"].is_contiguous():
            turned = call(aten.clone.default, turned, like=node, memory_format=torch.contiguous_format)
        turned = call(aten.view.default, turned, list(node.meta["val"].shape), like=node)
    node.replace_all_uses_with(turned)
    for total in _sums(matrix):
        with graph.inserting_before(total), turned.meta["val"].fake_mode:
            flat = call(aten.sum.dim_IntList, turned, [0], True, like=total)
            flat = call(aten.view.default, flat, list(total.meta["val"].shape), like=total)
        total.replace_all_uses_with(flat)
    for product in products:
        for view in list(product.users):
            rest = list(view.meta["val"].shape[rows:])
            with graph.inserting_before(view), view.meta["val"].fake_mode:
                as_lies = call(aten.view.default, product, [*(matrix.sizes[axis] for axis in order), *rest], like=view)
                back = call(aten.permute.default, as_lies, [*inverse, *range(rows, rows + len(rest))], like=view)
            view.replace_all_uses_with(back)


def _sums(matrix: Matrix) -> list[fx.Node]:
    """Sums over all rows that are taken of the matrix in its other shapes."""
    rows, width = list(range(len(matrix.sizes))), matrix.node.meta["val"].shape[1]
    views = [v for v in matrix.copy.users if v.target is aten.view.default and tuple(v.meta["val"].shape) == (*matrix.sizes, width)]
    sums = (u for v in views for u in v.users if u.target is aten.sum.dim_IntList)
    plain = (u for u in sums if not u.kwargs and u.meta["val"].dtype == matrix.node.meta["val"].dtype)
    return [u for u in plain if [axis % (len(rows) + 1) for axis in u.args[1]] == rows]


def _strides(graph: fx.Graph, made: set[fx.Node]) -> None:
    """Strides of what reads tensors whose strides have changed; results of the graph keep theirs."""
    before: dict[fx.Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node not in made and not any(n in before or n in made for n in node.all_input_nodes):
            continue
        if node.op == "output":
            _results(graph, node, before)
            continue
        mode = next(n.meta["val"].fake_mode for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
        with mode:
            try:
                value = _value(node)
            except (RuntimeError, ValueError):
                # A view that needed the other order.
                first = node.args[0]
                with graph.inserting_before(node):
                    copy = graph.call_function(aten.clone.default, (first,), {"memory_format": torch.contiguous_format})
                copy.meta = {**first.meta, "val": first.meta["val"].clone(memory_format=torch.contiguous_format)}
                node.update_arg(0, copy)
                value = _value(node)
        if _layout(value) != _layout(node.meta.get("val")):
            before[node] = node.meta.get("val")
            node.meta = {**node.meta, "val": value}


def _value(node: fx.Node):
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return node.target(*args, **kwargs)


def _layout(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return [_layout(v) for v in value] if isinstance(value, (tuple, list)) else None


def _results(graph: fx.Graph, output: fx.Node, before: dict[fx.Node, torch.Tensor]) -> None:
    """Copies of results whose strides have changed, with the strides that they had."""
    for node in [n for n in output.all_input_nodes if isinstance(before.get(n), torch.Tensor)]:
        strides = before[node].stride()
        order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        inverse = [order.index(axis) for axis in range(len(order))]
        copy = node
        with graph.inserting_before(output), node.meta["val"].fake_mode:
            for target, args, kwargs in (
                (aten.permute.default, (order,), {}),
                (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
                (aten.permute.default, (inverse,), {}),
            ):
                value = target(copy.meta["val"], *args, **kwargs)
                copy = graph.call_function(target, (copy, *args), kwargs)
                copy.meta = {**node.meta, "val": value}
        output.replace_input_with(node, copy)
