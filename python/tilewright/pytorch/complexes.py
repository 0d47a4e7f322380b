"""Complex numbers between real ones, as pairs.

Rotary embeddings are often written with complex numbers: halves of a head become complex, are multiplied with `polar(1, angles)`, and become
real again. Our graphs have no such type. What leads to a `view_as_real` through the operators below is computed with real tensors whose last
axis holds the real and the imaginary part; where the way begins at something else (an argument), that is viewed as real. In training this is
done before the graph is divided, so that pairs are kept for the backward graph.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

# Operators that do the same to pairs, with the place of what follows the operand: an axis, or a list of sizes.
AXIS = {aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, aten.squeeze.dim}
SIZES = {aten.view.default, aten.expand.default}
SAME = {aten.clone.default, aten.alias.default, aten.detach.default}
SUMS = {aten.add.Tensor, aten.sub.Tensor}
CONJUGATES = {aten._conj.default, aten.conj_physical.default, aten._conj_physical.default}


def in_pairs(gm: fx.GraphModule) -> None:
    """See the module's head; in place."""
    graph, pairs = gm.graph, _Pairs(gm.graph)
    found = graph.find_nodes(op="call_function", target=aten.view_as_real.default)
    for node in found:
        if _known(node.args[0]):
            node.replace_all_uses_with(pairs.of(node.args[0]))
    if found:
        graph.eliminate_dead_code()


def _complex(node) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_complex()


def _known(node: fx.Node) -> bool:
    """Whether an operator that makes a complex tensor has a form for pairs."""
    target, args = node.target, node.args
    if target in SAME or target in CONJUGATES or target in AXIS or target in SIZES or target is aten.permute.default:
        return True
    if target is aten.mul.Tensor or target in SUMS:
        # A sum's real operand would have to be added to one of the parts only.
        dtype = node.meta["val"].dtype
        kinds = (dtype, dtype.to_real()) if target is aten.mul.Tensor else (dtype,)
        if target is aten.mul.Tensor and isinstance(args[1], (int, float)):
            return not node.kwargs
        return not node.kwargs and all(isinstance(a, fx.Node) and a.meta["val"].dtype in kinds for a in args)
    if target is aten.view_as_complex.default:
        return True
    # Parts of other sizes are repeated.
    return target in (aten.polar.default, aten.complex.default) and args[0].meta["val"].shape == args[1].meta["val"].shape


class _Pairs:
    """Writes the pairs of complex nodes behind them, each once."""

    def __init__(self, graph: fx.Graph):
        self.graph, self.made, self.like = graph, {}, None

    def call(self, target, *args) -> fx.Node:
        new = self.graph.call_function(target, args)
        given = fx.node.map_arg(args, lambda n: n.meta["val"])
        fake = next(n for n in new.all_input_nodes).meta["val"].fake_mode
        with fake:
            new.meta = {**self.like.meta, "val": target(*given)}
        return new

    def of(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            after = node.next
            while after.op == "placeholder":
                after = after.next
            with self.graph.inserting_before(after):
                self.like, before = node, self.like
                self.made[node] = self._made(node)
                self.like = before
        return self.made[node]

    def parts(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The real and the imaginary part; a real tensor has none."""
        if not _complex(node):
            return node, None
        pair = self.of(node)
        return self.call(aten.select.int, pair, -1, 0), self.call(aten.select.int, pair, -1, 1)

    def joined(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        shape = real.meta["val"].shape
        return self.call(aten.cat.default, [self.call(aten.unsqueeze.default, p, len(shape)) for p in (real, imaginary)], len(shape))

    def _made(self, node: fx.Node) -> fx.Node:
        target, args, call = node.target, node.args, self.call
        if not _known(node):
            return call(aten.view_as_real.default, node)
        rank = node.args[0].meta["val"].dim()
        if target in SAME:
            return self.of(args[0])
        if target in CONJUGATES:
            real, imaginary = self.parts(args[0])
            return self.joined(real, call(aten.neg.default, imaginary))
        if target in AXIS:
            axis = args[1] if len(args) > 1 else 0
            axes = rank + 1 if target is aten.unsqueeze.default else rank
            return call(target, self.of(args[0]), axis % axes, *args[2:])
        if target in SIZES:
            return call(target, self.of(args[0]), [*node.meta["val"].shape, 2])
        if target is aten.permute.default:
            return call(target, self.of(args[0]), [*(axis % rank for axis in args[1]), rank])
        if target is aten.view_as_complex.default:
            return args[0]
        if target is aten.polar.default:
            size, angle = args
            return self.joined(call(aten.mul.Tensor, size, call(aten.cos.default, angle)), call(aten.mul.Tensor, size, call(aten.sin.default, angle)))
        if target is aten.complex.default:
            return self.joined(*args)
        if not isinstance(args[1], fx.Node):
            return call(target, self.of(args[0]), args[1])
        (a, b), (c, d) = (self.parts(x) for x in args)
        if target in SUMS:
            return self.joined(call(target, a, c), call(target, b, d))
        if b is None or d is None:
            return self.joined(call(aten.mul.Tensor, a, c), call(aten.mul.Tensor, a if b is None else b, c if d is None else d))
        real = call(aten.sub.Tensor, call(aten.mul.Tensor, a, c), call(aten.mul.Tensor, b, d))
        return self.joined(real, call(aten.add.Tensor, call(aten.mul.Tensor, a, d), call(aten.mul.Tensor, b, c)))
