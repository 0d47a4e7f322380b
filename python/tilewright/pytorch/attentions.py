"""Attention: kept whole on its way through AOTAutograd, and its rules.

PyTorch takes `scaled_dot_product_attention` apart before a backend sees it, into the operator of the kernel that it would run itself:
masks of truth values become numbers as large as the scores, shared heads of keys are repeated, and where no kernel takes a mask as it lies
in memory, attention becomes products and a softmax with a square of the length in memory. So `prepare` rewrites Dynamo's graph:

- in inference each call becomes `tilewright::whole_attention`, which has a rule here; where the rule refuses, PyTorch runs its own.
- in training on a GPU, masks are made contiguous, so that PyTorch's memory-efficient kernels, forward and backward, take them; on
  processors attention is taken apart, and its gradient is made of operators that are ours.

Rows of which a mask hides everything give 0, as PyTorch's do.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import fx

from .sizes import Unsupported
from .writer import Value, Writer, dtype_name, rule, used_results, wide

aten = torch.ops.aten


@torch.library.custom_op("tilewright::whole_attention", mutates_args=())
def whole_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float | None, shared: bool
) -> torch.Tensor:
    """`scaled_dot_product_attention` without dropout; `shared`: heads of queries share those of keys. Rows are outside of heads
    in memory."""
    options = {"enable_gqa": True} if shared else {}
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **options)
    return result.transpose(1, 2).contiguous().transpose(1, 2)


@whole_attention.register_fake
def _(q, k, v, mask, causal, scale, shared):
    b, h, s, _ = q.shape
    return q.new_empty(b, s, h, v.shape[3]).transpose(1, 2)


def _call(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The arguments of a call by their names."""
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


def prepare(gm: fx.GraphModule, trains: bool) -> None:
    """See the module's head. What is not plain (heads as a single axis, dropout, arguments that are computed) stays as it is."""
    changed = False
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
            continue
        q, k, v, mask, dropout, causal, scale, shared = _call(*node.args, **node.kwargs)
        with gm.graph.inserting_before(node):
            if trains:
                if isinstance(mask, fx.Node):
                    node.replace_input_with(mask, gm.graph.call_method("contiguous", (mask,)))
                    changed = True
                continue
            ranks = [_rank(t) for t in (q, k, v)]
            plain = ranks == [4, 4, 4] and dropout == 0.0 and isinstance(causal, bool) and isinstance(shared, bool)
            if not plain or not (scale is None or isinstance(scale, (int, float))):
                continue
            given = None if scale is None else float(scale)
            arguments = (q, k, v, mask, causal, given, shared)
            node.replace_all_uses_with(gm.graph.call_function(torch.ops.tilewright.whole_attention.default, arguments))
        gm.graph.erase_node(node)
        changed = True
    if changed:
        gm.recompile()


def _rank(node) -> int | None:
    held = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return held.dim() if isinstance(held, torch.Tensor) else None


def in_parts(trains: bool, device: torch.device):
    """On processors, attention in training as products and a softmax."""
    if not trains or device.type != "cpu":
        return contextlib.nullcontext()
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


# ---- rules -------------------------------------------------------------------------------------------


def attended(w: Writer, q: Value, k: Value, v: Value, mask: Value | None, causal: bool, scale, source=None) -> Value:
    """Attention with a mask that is added or says what is seen. `source`: the mask's node."""
    if causal and q.shape[2] is not k.shape[2] and q.shape[2] != k.shape[2]:
        # PyTorch counts both from the beginning.
        if mask is not None or not all(isinstance(n, int) for n in (q.shape[2], k.shape[2])):
            raise Unsupported("causal attention over keys of another length")
        rows, columns = (w.op(f"iota axis={i}", dtype=torch.int64, result=f"i64[{q.shape[2]},{k.shape[2]}]") for i in (0, 1))
        mask, causal = w.map("{b} <= {a}", rows, columns, dtype=torch.bool), False
    if not isinstance(q.shape[3], int):
        raise Unsupported("attention over heads of symbolic width")
    score = wide(q.dtype)
    name = dtype_name(score)
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    body, extras = f"{{ s -> s * {name}({factor!r}) }}", []
    if mask is not None:
        mask = unexpanded(w, mask, source)
        if mask.dtype is torch.bool:
            body, extras = f"{{ s, m -> where(m, s * {name}({factor!r}), {name}(-inf)) }}", [mask]
        else:
            body, extras = f"{{ s, m -> s * {name}({factor!r}) + m }}", [w.cast(mask, score)]
    # A row that sees nothing gives 0, as PyTorch's do.
    words = " causal" * causal + " zeros" * (mask is not None)
    return w.op(f"attention{words} score={name} {body}", q, k, v, *extras)


def unexpanded(w: Writer, mask: Value, source) -> Value:
    """A mask without the axes along which it repeats itself, and with all four; keys stay."""
    while source is not None and source.target is aten.expand.default and isinstance(source.args[0], fx.Node):
        before = w.values.get(source.args[0])
        if not isinstance(before, Value) or not before.rank or before.shape[-1] != mask.shape[-1]:
            break
        mask, source = before, source.args[0]
    if mask.rank < 4:
        mask = w.reshape(mask, [1] * (4 - mask.rank) + list(mask.shape))
    return mask


@rule(torch.ops.tilewright.whole_attention.default)
def whole(w, node, q, k, v, mask, causal, scale, shared):
    source = node.args[3]
    return attended(w, q, k, v, mask, causal, scale, source)


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def attention(w, node, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    if dropout_p or used_results(node) - {0}:
        raise Unsupported("attention with dropout, or with its logarithms of sums")
    return attended(w, q, k, v, attn_mask, is_causal, scale, node.kwargs.get("attn_mask")), None


@rule(aten._scaled_dot_product_flash_attention.default)
def flash_attention(w, node, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    return results(attention(w, node, q, k, v, dropout_p, is_causal, scale=scale)[0], node)


@rule(aten._scaled_dot_product_efficient_attention.default)
def efficient_attention(w, node, q, k, v, bias, logarithms, dropout_p=0.0, is_causal=False, *, scale=None):
    return results(attention(w, node, q, k, v, dropout_p, is_causal, attn_mask=bias, scale=scale)[0], node)


@rule(aten._scaled_dot_product_cudnn_attention.default)
def cudnn_attention(w, node, q, k, v, bias, logarithms, dropout_p=0.0, is_causal=False, debug=False, *, scale=None):
    return results(attention(w, node, q, k, v, dropout_p, is_causal, attn_mask=bias, scale=scale)[0], node)


def results(first: Value, node) -> tuple:
    """The results of an operator of which only the first is used."""
    return (first, *[None] * (len(node.meta["val"]) - 1))
