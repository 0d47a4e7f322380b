"""Numbers that a model writes into tensors, as numbers.

`mask[a:b] = 3` arrives as a tensor of one number on the processor, a constant of the graph, that is copied over the part. On a GPU
that is a transfer for each part; here it is a fill. What a model computes of such numbers on the processor (the square root of a head's
width as a tensor) is computed when the graph is compiled.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

aten = torch.ops.aten
SAME = (aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default, aten.detach.default)


def number(gm: fx.GraphModule, node) -> int | float | bool | None:
    """What a node holds, where that is one number which the graph knows."""
    while isinstance(node, fx.Node) and node.target in SAME:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    held = gm
    for name in node.target.split("."):
        held = getattr(held, name, None)
    plain = isinstance(held, torch.Tensor) and not isinstance(held, FakeTensor)
    if not plain or held.dim() != 0 or held.device.type != "cpu" or held.is_complex():
        return None
    # Some versions of PyTorch compile under a mode in which tensors have no values.
    with unset_fake_temporarily():
        return held.item()


def fill_parts(gm: fx.GraphModule) -> None:
    """See the module's head; in place."""
    graph, changed = gm.graph, False
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        held, value = node.meta["val"], number(gm, node.args[1])
        sizes = list(held.shape)
        # A result of the graph has the strides that it was traced with.
        given = any(user.op == "output" for user in node.users)
        if value is None or given or not all(isinstance(n, int) for n in sizes):
            continue
        with graph.inserting_before(node):
            filled = graph.call_function(aten.full.default, (sizes, value), {"dtype": held.dtype, "device": held.device})
            filled.meta = dict(node.meta)
        node.replace_all_uses_with(filled)
        changed = True
    if changed:
        graph.eliminate_dead_code()


def fold_numbers(gm: fx.GraphModule, device: torch.device) -> None:
    """Numbers that are computed of constants on the processor and read on a GPU, as fills there; in place."""
    if device.type != "cuda":
        return
    graph, known = gm.graph, {}
    for node in list(graph.nodes):
        held = node.meta.get("val")
        if not isinstance(held, torch.Tensor) or held.dim() != 0 or held.device.type != "cpu" or held.is_complex():
            continue
        if node.op == "get_attr":
            value = number(gm, node)
            if value is not None:
                known[node] = torch.tensor(value, dtype=held.dtype)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:
            tags = node.target.tags
            if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in tags or not all(n in known for n in node.all_input_nodes):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            with unset_fake_temporarily():
                found = node.target(*args, **kwargs)
            if isinstance(found, torch.Tensor) and found.dtype == held.dtype and found.device.type == "cpu":
                known[node] = found
    changed = False
    for node, value in known.items():
        users = [u for u in node.users if u.op == "call_function" and u not in known and _is_on(u.meta.get("val"), "cuda")]
        if not users:
            continue
        fake = node.meta["val"]
        with graph.inserting_before(node):
            options = {"dtype": fake.dtype, "device": device}
            filled = graph.call_function(aten.full.default, ([], value.item()), options)
        with fake.fake_mode:
            filled.meta["val"] = torch.empty([], **options)
        for user in users:
            user.replace_input_with(node, filled)
        changed = True
    if changed:
        graph.eliminate_dead_code()


def _is_on(held, kind: str) -> bool:
    tensors = held if isinstance(held, (tuple, list)) else [held]
    return any(isinstance(t, torch.Tensor) and t.device.type == kind for t in tensors)
