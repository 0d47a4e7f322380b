"""Dropout that fuses: which elements stay is a function of a seed that PyTorch's generator draws, and of an element's position.

PyTorch's own dropout draws one number after the other, so nothing can be fused with it. Here a graph draws one seed per dropout,
all at once, each time that it runs (`tilewright::seeds`, the only operator with an effect), and `tilewright::kept` says of a seed and
a position whether the element stays. So numbers follow `torch.manual_seed`, differ from step to step and from dropout to
dropout, and are recorded in graphs with PyTorch's generator; they are not those of eager mode (`options={"eager_random": True}`
keeps PyTorch's operators). The forward graph keeps which elements stay for the backward graph, one byte each.

Numbers are words of Philox2x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; seven rounds are the fewest
that pass BigCrush): the key is the low half of the seed, the counter a position and the seed's high half.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from .sizes import Unsupported
from .writer import Value, Writer, rule

aten = torch.ops.aten

ROUNDS = 7
MULTIPLIER, STEP, LOW = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF


@torch.library.custom_op("tilewright::seeds", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def seeds(count: int, device: torch.device) -> torch.Tensor:
    """`count` seeds from PyTorch's generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


@seeds.register_fake
def _(count, device):
    return torch.empty(count, dtype=torch.int64, device=device)


@torch.library.custom_op("tilewright::kept", mutates_args=())
def kept(seed: torch.Tensor, shape: list[int], p: float) -> torch.Tensor:
    """Which elements of a tensor stay where each is dropped with probability `p`; `seed` has one element."""
    position = torch.arange(math.prod(shape), dtype=torch.int64, device=seed.device)
    x, y, key = position & LOW, (seed >> 32) & LOW, seed & LOW
    for _ in range(ROUNDS):
        # 32 by 32 bits from two halves, since int64 has no room for the product's sign.
        upper = x * (MULTIPLIER >> 16)
        lower = x * (MULTIPLIER & 0xFFFF) + ((upper & 0xFFFF) << 16)
        high = (upper >> 16) + (lower >> 32)
        x, y = high ^ key ^ y, lower & LOW
        key = (key + STEP) & LOW
    return (x >= threshold(p)).reshape(shape)


@kept.register_fake
def _(seed, shape, p):
    return torch.empty(shape, dtype=torch.bool, device=seed.device)


def threshold(p: float) -> int:
    """Words below it drop their element."""
    return min(round(p * 2**32), LOW)


def dropout(x: torch.Tensor, p: float, train: bool | None):
    """The decomposition of `native_dropout`."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1 or not x.dtype.is_floating_point:
        return NotImplemented
    stays = torch.ops.tilewright.kept(torch.ops.tilewright.seeds(1, x.device), list(x.shape), float(p))
    return scaled(x, stays, 1 / (1 - p)), stays


def dropout_backward(gradient: torch.Tensor, mask: torch.Tensor, scale: float):
    """The decomposition of `native_dropout_backward`."""
    return scaled(gradient, mask, scale)


def scaled(x: torch.Tensor, stays: torch.Tensor, scale: float) -> torch.Tensor:
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return torch.where(stays, x.to(wide) * scale, 0.0).to(x.dtype)


DECOMPOSITIONS = {aten.native_dropout.default: dropout, aten.native_dropout_backward.default: dropout_backward}


def drawn_together(gm: fx.GraphModule) -> None:
    """All seeds of a graph with one operator, in place."""
    graph = gm.graph
    drawn = [n for n in graph.nodes if n.target is torch.ops.tilewright.seeds.default and n.args[0] == 1]
    by_device: dict = {}
    for node in drawn:
        by_device.setdefault(node.args[1], []).append(node)
    for device, nodes in by_device.items():
        if len(nodes) == 1:
            continue
        fake = nodes[0].meta["val"]
        with graph.inserting_before(nodes[0]):
            together = graph.call_function(torch.ops.tilewright.seeds.default, (len(nodes), device))
            together.meta = dict(nodes[0].meta)
            with fake.fake_mode:
                together.meta["val"] = fake.new_empty(len(nodes))
        for number, node in enumerate(nodes):
            with graph.inserting_after(together):
                one = graph.call_function(aten.slice.Tensor, (together, 0, number, number + 1))
            one.meta = dict(node.meta)
            node.replace_all_uses_with(one)
            graph.erase_node(node)


# ---- rules -------------------------------------------------------------------------------------------


@rule(torch.ops.tilewright.kept.default)
def kept_rule(w: Writer, node, seed: Value, shape, p):
    if not shape or not all(isinstance(n, int) for n in shape) or math.prod(shape) > LOW:
        raise Unsupported("dropout of a scalar, of symbolic sizes or of more than four billion elements")
    word, sizes = torch.uint32, ",".join(map(str, shape))
    along = [w.op(f"iota axis={axis}", dtype=word, result=f"u32[{sizes}]") for axis in range(len(shape))]
    names = "abcdefgh"[: len(shape)]
    if len(names) < len(shape):
        raise Unsupported("dropout of more than eight axes")
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    position = " + ".join(name if step == 1 else f"{name} * u32({step})" for name, step in zip(names, steps))
    lets = [f"let x0 = {position}", "let y0 = u32(s >> i64(32))", "let k0 = u32(s)"]
    for i in range(ROUNDS):
        lets.append(f"let p{i} = u64(x{i}) * u64({MULTIPLIER})")
        lets.append(f"let x{i + 1} = u32(p{i} >> u64(32)) ^ k{i} ^ y{i}")
        lets.append(f"let y{i + 1} = u32(p{i})")
        lets.append(f"let k{i + 1} = k{i} + u32({STEP})")
    body = "; ".join(lets) + f"; x{ROUNDS} >= u32({threshold(p)})"
    return w.op(f"map {{ {', '.join([*names, 's'])} -> {body} }}", *along, seed, dtype=torch.bool)
