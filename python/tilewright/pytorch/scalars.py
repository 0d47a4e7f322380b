"""Numbers that a model writes into tensors, as numbers.

`mask[a:b] = 3` arrives as a tensor of one number on the processor, a constant of the graph, that is copied over the part. On a GPU
that is a transfer for each part; here it is a fill.
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
