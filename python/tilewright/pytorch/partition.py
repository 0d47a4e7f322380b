"""Divides an FX graph between us and PyTorch.

Each node is tried against the rules, in order, on a graph that is thrown away (`probe`). Then nodes get a depth:
how often a path to them changes between what is ours and what is PyTorch's. All of our nodes of one depth form one
group; since a path that leaves a group gets deeper, groups never wait for each other.

What stays PyTorch's, on top of what the rules refuse: nodes on other devices, random numbers (so that they are
those of eager PyTorch) and other effects, in their order; and views of which only PyTorch reads the result, because
there they cost nothing. Views of tensors that are not ours are nobody's: each group that reads one has its own. Elementwise work goes to the group that
reads it (`sink`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from . import attentions, elementwise, gradients, layers, norms, pools, randoms, resampling, scattering, searching  # noqa: F401  (they register the rules)
from . import shapes, special, sums  # noqa: F401
from .sizes import Unsupported, order_in_memory, symbols, tensors_and_sizes
from .writer import NAMES, RULES, Writer

aten = torch.ops.aten

# Operators that PyTorch does without moving anything.
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
}

# Those of them with one result. A view of another shape (`_unsafe_view`, `reshape`) may be a copy in PyTorch.
ONE_VIEW = VIEWS - {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten._unsafe_view.default, aten.detach.default}

# Those that neither repeat nor leave out elements.
SAME_ELEMENTS = ONE_VIEW - {aten.expand.default, aten.slice.Tensor, aten.select.int, aten.alias.default}

# Elementwise, and not tagged so.
CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default, aten._unsafe_view.default}

# The forms of attention, with the place of the dropout's probability among their arguments.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    aten._scaled_dot_product_flash_attention.default: 3,
    aten._scaled_dot_product_efficient_attention.default: 5,
    aten._scaled_dot_product_cudnn_attention.default: 5,
}

# Why the operator pack's kernels are in no group.
PACKED = "a kernel of the operator pack"

# Tensors of one number, which are made where they are read.
FILLS = {aten.full.default, aten.scalar_tensor.default}

# Operators that a group is not worth on their own: less than a copy's work.
TRIVIAL = VIEWS | {aten.clone.default, aten.lift_fresh_copy.default, aten.full.default, aten.scalar_tensor.default}


@dataclasses.dataclass
class Division:
    """Which nodes are ours, in which group, and why the others are not."""

    groups: list[list[fx.Node]]
    reasons: dict[fx.Node, str]
    free: set[fx.Node]


def is_getitem(node: fx.Node) -> bool:
    """A result of a node with several."""
    return node.op == "call_function" and node.target is operator.getitem


def computes_tensors(node: fx.Node) -> bool:
    """Whether a node is an operator with tensors among its results."""
    if node.op != "call_function":
        return False
    return any(isinstance(v, torch.Tensor) for v in tensors_and_sizes(node.meta.get("val")))


def has_effects(node: fx.Node) -> bool:
    """Random numbers and whatever else must happen in order."""
    target = node.target
    if node.op != "call_function":
        return False
    if target in ATTENTION:
        place = ATTENTION[target]
        dropout = node.args[place] if len(node.args) > place else node.kwargs.get("dropout_p", 0.0)
        return dropout != 0.0
    if not isinstance(target, torch._ops.OpOverload):
        return target is not operator.getitem and computes_tensors(node)
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags


def divide(graph: fx.Graph, device: torch.device, known) -> Division:
    """Finds our groups. `known`: the symbols with their bounds."""
    reasons = probe(graph, device, known)
    ours = {n for n in graph.nodes if computes_tensors(n) and n not in reasons}
    # Views at the end of what is ours, from the last to the first.
    for node in reversed(graph.nodes):
        if node in ours and (node.target in VIEWS or is_getitem(node)) and not any(u in ours for u in node.users):
            base = node.args[0] if is_getitem(node) else node
            if is_getitem(node) and base.target not in VIEWS:
                continue
            ours.discard(node)
    for node in list(ours):
        # Results go with what makes them.
        if is_getitem(node) and node.args[0] not in ours:
            ours.discard(node)
        if is_getitem(node) is False and isinstance(node.meta["val"], (tuple, list)):
            for user in node.users:
                ours.add(user)
    free = views_of_others(graph, ours)
    groups = [with_views(group, free) for group in by_depth(graph, ours - free, free)]
    groups = [g for g in groups if not all(n.target in TRIVIAL or is_getitem(n) for n in g)]
    return Division(groups, reasons, free)


def views_of_others(graph: fx.Graph, ours: set[fx.Node]) -> set[fx.Node]:
    """Our views whose tensors are not ours (arguments, PyTorch's results, or other such views), and tensors of one number."""
    free: set[fx.Node] = set()
    for node in graph.nodes:
        single = node in ours and isinstance(node.meta["val"], torch.Tensor)
        before = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        view = node.target in VIEWS and before and all(n not in ours or n in free for n in before)
        if single and (view or (node.target in FILLS and not before)):
            free.add(node)
    return free


def with_views(group: list[fx.Node], free: set[fx.Node]) -> list[fx.Node]:
    """A group with the views of others' tensors that it reads, before their readers."""
    whole: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        for before in node.all_input_nodes:
            if before in free and before not in whole:
                add(before)
        whole[node] = None

    for node in group:
        add(node)
    return list(whole)


def by_depth(graph: fx.Graph, ours: set[fx.Node], free: set[fx.Node]) -> list[list[fx.Node]]:
    """Our nodes by depth; see the module's head."""
    depth: dict[fx.Node, int] = {}
    effect_depth = -1
    for node in graph.nodes:
        mine = node in ours
        if node.op in ("placeholder", "get_attr"):
            depth[node] = -1
            continue
        # What PyTorch makes of arguments alone comes before all groups.
        deepest = 0 if mine else -1
        for before in node.all_input_nodes:
            d = depth[before]
            crossed = d >= 0 and (before in ours) != mine
            deepest = max(deepest, d + crossed)
        if not mine and has_effects(node):
            deepest = effect_depth = max(deepest, effect_depth)
        depth[node] = deepest
    sink(graph, ours, depth)
    # Of one depth, a group for each device, in the order of their first nodes.
    groups: dict[int, dict[torch.device, list[fx.Node]]] = {}
    for node in graph.nodes:
        if node in ours:
            groups.setdefault(depth[node], {}).setdefault(device_of(node), []).append(node)
    return [group for d in sorted(groups) for group in groups[d].values()]


def device_of(node: fx.Node) -> torch.device:
    """Where the tensors are that one of our nodes makes."""
    return next(t.device for t in tensors_and_sizes(node.meta["val"]) if isinstance(t, torch.Tensor))


def sink(graph: fx.Graph, ours: set[fx.Node], depth: dict[fx.Node, int]) -> None:
    """Moves elementwise work to the group that reads it, so that it fuses there and its result is not stored.

    A backward graph has much that could be computed from the arguments long before it is wanted. A node moves to the first group that
    reads it, with the elementwise work that is done for it alone, if what they read does not make more tensors cross than it saves;
    arguments are there anyway.
    """
    for node in reversed(graph.nodes):
        here = depth[node]

        def moves(n: fx.Node) -> bool:
            return n in ours and depth[n] == here and is_elementwise(n)

        def stays(users) -> bool:
            return any(u not in ours or depth[u] <= here for u in users)

        if not moves(node) or not node.users or stays(node.users):
            continue
        cone = {node}
        found = True
        while found:
            before = {n for c in cone for n in c.all_input_nodes if n not in cone and moves(n)}
            found = {n for n in before if not stays(u for u in n.users if u not in cone)}
            cone |= found
        read = {n for c in cone for n in c.all_input_nodes if n not in cone and n in ours and depth[n] == here}
        crossing = [n for n in read if not any(u not in ours or depth[u] != here for u in n.users)]
        if sum(map(bytes_of, crossing)) <= bytes_of(node):
            first = min(depth[u] for c in cone for u in c.users if u not in cone)
            depth.update(dict.fromkeys(cone, first))


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node computes each element of its one result from one of each operand, or is a view."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in ONE_VIEW or node.target in CASTS


def bytes_of(node: fx.Node) -> int:
    """Bytes of a node's tensor; sizes that are symbols count as 64."""
    held = node.meta["val"]
    if not isinstance(held, torch.Tensor):
        return 0
    sizes = [n if isinstance(n, int) else 64 for n in held.shape]
    return math.prod(sizes) * held.dtype.itemsize


def probe(graph: fx.Graph, device: torch.device, known) -> dict[fx.Node, str]:
    """Tries each node against the rules; those that are refused, with the reason."""
    reasons: dict[fx.Node, str] = {}
    given = set()
    for node in graph.find_nodes(op="placeholder"):
        for value in tensors_and_sizes(node.meta.get("val")):
            plain = [value] if isinstance(value, torch.SymInt) else list(value.shape)
            given |= {str(s.node.expr) for s in plain if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol}
    writer = Writer("probe", known, device.type)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        held = node.meta.get("val")
        if node.op in ("placeholder", "get_attr") or not computes_tensors(node):
            _provide(writer, values, node, device)
            continue
        try:
            if is_getitem(node):
                source = node.args[0]
                if source in reasons:
                    raise Unsupported("a result of an operator that is not ours")
                values[node] = values[source][node.args[1]]
                continue
            _refuse(node, device, given)
            values[node] = writer.node(node, values)
        except (Unsupported, NotImplementedError, ValueError, KeyError, TypeError, IndexError, GuardOnDataDependentSymNode) as why:
            reasons[node] = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
            if isinstance(held, torch.Tensor):
                _provide(writer, values, node, device)
    return reasons


def _provide(writer: Writer, values, node: fx.Node, device) -> None:
    """A node that is not ours, as an input of the graph that is tried."""
    held = node.meta.get("val")
    if isinstance(held, torch.Tensor) and held.dtype in NAMES and held.device.type == device.type:
        try:
            values[node] = writer.input(node.name, held)
            writer.argument(len(values), values[node])
        except (Unsupported, ValueError):
            pass


def _refuse(node: fx.Node, device: torch.device, given: set[str]) -> None:
    """What is refused whatever the rules say."""
    if has_effects(node):
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        raise Unsupported("random numbers are PyTorch's" if random else "it has effects")
    if node.target in norms.PACK and device.type != "cuda":
        raise Unsupported(PACKED)
    if node.target not in RULES:
        raise Unsupported("no rule for this operator")
    tensors = [node.meta["val"], *(a.meta.get("val") for a in node.all_input_nodes)]
    for tensor in (t for held in tensors for t in tensors_and_sizes(held)):
        if not isinstance(tensor, torch.Tensor):
            missing = symbols(tensor) - given
        else:
            if tensor.device.type != device.type and tensor.dim() > 0:
                raise Unsupported(f"tensors on {tensor.device}")
            if tensor.device.type != device.type:
                raise Unsupported(f"a scalar on {tensor.device}")
            if tensor.device != device_of(node):
                raise Unsupported(f"tensors on {tensor.device} and {device_of(node)}")
            if tensor.layout is not torch.strided or tensor.dtype not in NAMES:
                raise Unsupported(f"tensors of {tensor.dtype}, {tensor.layout}")
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not isinstance(tensor, torch._subclasses.FakeTensor):
                raise Unsupported(f"tensors of class {type(tensor).__name__}")
            missing = set().union(*(symbols(s) for s in tensor.shape)) - given
        if missing:
            raise Unsupported(f"sizes that are only known while running: {', '.join(sorted(missing))}")


def outputs_of(group: list[fx.Node], free: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The tensors of a group that are read outside of it, and those of them that PyTorch makes as views of others.

    Views of others' tensors are made again where they are read. The second list is in order, and has the views in between too.
    """
    inside = set(group)
    made = [n for n in group if n not in free and isinstance(n.meta["val"], torch.Tensor)]
    chains: dict[fx.Node, list[fx.Node]] = {}
    for wanted in made:
        if all(u in inside for u in wanted.users):
            continue
        node, chain = wanted, [wanted]
        while (
            node.target in ONE_VIEW
            and isinstance(node.args[0], fx.Node)
            and node.args[0] in inside
            and node.args[0] not in free
            and order_in_memory(node.args[0].meta["val"]) is not None
        ):
            node = node.args[0]
            chain.append(node)
        chains[wanted] = chain
    bases = collections.Counter(chain[-1] for chain in chains.values())
    outputs: set[fx.Node] = set()
    views: set[fx.Node] = set()
    for wanted, chain in chains.items():
        # The only view of a tensor that has all its elements is made in the group: PyTorch's take the host's time.
        if bases[chain[-1]] == 1 and all(n.target in SAME_ELEMENTS for n in chain[:-1]):
            outputs.add(wanted)
        else:
            outputs.add(chain[-1])
            views.update(chain[:-1])
    return [n for n in made if n in outputs], [n for n in made if n in views]


def inputs_of(group: list[fx.Node]) -> list[fx.Node]:
    """Tensors that a group reads and does not make, in order of first use."""
    inside, found = set(group), {}
    for node in group:
        for before in node.all_input_nodes:
            if before not in inside and isinstance(before.meta.get("val"), torch.Tensor):
                found[before] = None
    return list(found)


def memory_order(node: fx.Node):
    """The order of a value's axes in memory; row-major where they have gaps or overlap."""
    held = node.meta["val"]
    order = order_in_memory(held)
    return list(range(held.dim())) if order is None else order
