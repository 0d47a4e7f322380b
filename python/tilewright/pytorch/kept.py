"""What a training graph keeps for its backward graph: results of operators, and no views of them.

PyTorch's partition weighs bytes, so that queries, keys and values that are views of one product are kept as three tensors. Groups read through
views for nothing, but a view that is an argument or a result of a group is a copy. So views, and copies that only make a view contiguous, are
made again in the backward graph.
"""

from __future__ import annotations

import logging
import operator

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

from . import complexes, rows
from .partition import ONE_VIEW

aten = torch.ops.aten

log = logging.getLogger("tilewright")

SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}


def partition(joint: fx.GraphModule, joint_inputs, **options):
    """PyTorch's division of a graph into forward and backward, see the module's head."""
    before = copied(joint.graph)
    try:
        complexes.in_pairs(joint)
        slices(joint)
        with_biases(joint)
        rows.in_order(joint)
        not_kept(joint.graph)
    except Exception as why:
        log.warning("a training graph is divided without rewrites: %s: %s", type(why).__name__, str(why).strip().partition("\n")[0])
        joint.graph = before
    with torch._functorch.config.patch(recompute_views=True):
        forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, **options)
    as_read(forward, backward, options["num_fwd_outputs"])
    return forward, backward


def copied(graph: fx.Graph) -> fx.Graph:
    """The same nodes once more, with their values."""
    new, copies = fx.Graph(), {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, lambda n: copies[n])
    return new


def as_read(forward: fx.GraphModule, backward: fx.GraphModule, results: int) -> None:
    """Keeps what the backward graph reads in another shape only in that shape."""
    arguments = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    (output,) = forward.graph.find_nodes(op="output")
    given = list(output.args[0])
    for place in range(results, len(given)):
        node = given[place]
        argument = arguments.get(node.name) if isinstance(node, fx.Node) and node.op != "placeholder" else None
        views = [] if argument is None else list(argument.users)
        if not views or any(v.target is not aten.view.default or v.args[1] != views[0].args[1] for v in views):
            continue
        shape, held = views[0].args[1], views[0].meta["val"]
        if not all(isinstance(n, int) for n in (*shape, *held.shape)) or not argument.meta["val"].is_contiguous():
            continue
        same = (u for u in node.users if u.target is aten.view.default and tuple(u.meta["val"].shape) == tuple(held.shape))
        given[place] = next(same, None)
        if given[place] is None:
            with forward.graph.inserting_before(output):
                given[place] = forward.graph.call_function(aten.view.default, (node, list(held.shape)))
            given[place].meta = {**node.meta, "val": held}
        argument.meta = {**argument.meta, **{key: views[0].meta[key] for key in ("val", "tensor_meta") if key in views[0].meta}}
        for view in views:
            view.replace_all_uses_with(argument)
            backward.graph.erase_node(view)
    output.args = (type(output.args[0])(given), *output.args[1:])
    forward.recompile()
    backward.recompile()


def slices(gm: fx.GraphModule) -> None:
    """Parts of a split as slices, each of which the partition knows as a view."""
    graph = gm.graph
    for node in [n for n in graph.nodes if n.target in SPLITS]:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        sizes = [part.shape[dim] for part in node.meta["val"]]
        if not all(isinstance(n, int) for n in sizes) or any(u.target is not operator.getitem for u in node.users):
            continue
        for user in list(node.users):
            begin = sum(sizes[: user.args[1]])
            with graph.inserting_before(user):
                new = graph.call_function(aten.slice.Tensor, (node.args[0], dim, begin, begin + sizes[user.args[1]]))
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)
    gm.recompile()


def with_biases(gm: fx.GraphModule) -> None:
    """A bias that is added to a product's view as part of the product: else the product is kept without it, and it is added again."""
    graph = gm.graph
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        view, bias = node.args
        if node.kwargs or not (isinstance(view, fx.Node) and isinstance(bias, fx.Node)):
            continue
        product = view.args[0] if view.target is aten.view.default else None
        if product is None or product.target is not aten.mm.default or bias.op != "placeholder" or len(view.users) + len(product.users) != 2:
            continue
        like, added = product.meta["val"], bias.meta["val"]
        if tuple(added.shape) != (like.shape[1],) or added.dtype != like.dtype or view.meta["val"].shape[-1] != like.shape[1]:
            continue
        with graph.inserting_before(product):
            whole = graph.call_function(aten.addmm.default, (bias, *product.args))
        whole.meta = dict(product.meta)
        product.replace_all_uses_with(whole)
        node.replace_all_uses_with(view)
        graph.erase_node(node)
        graph.erase_node(product)
    gm.recompile()


def not_kept(graph: fx.Graph) -> None:
    """Says of contiguous copies that the backward graph reads that it makes them again, unless the user says what is kept."""
    if any("recompute" in n.meta for n in graph.nodes):
        return
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and "tangents" in node.name) or any(n in backward for n in node.all_input_nodes):
            backward.add(node)
    # What the backward graph reads, through views.
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        views = (u for u in node.users if u.target in ONE_VIEW or u.target is aten.clone.default)
        if node not in backward and (any(u in backward for u in node.users if u.op != "output") or any(v in read for v in views)):
            read.add(node)
            if node.target is aten.clone.default and not _of_argument(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0


def _of_argument(node: fx.Node) -> bool:
    """Whether a copy is one of an argument's elements, which may be written to before the backward graph runs."""
    while node.target in ONE_VIEW or node.target is aten.clone.default:
        node = node.args[0]
    return node.op == "placeholder"
