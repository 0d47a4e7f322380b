"""Attention: kept whole on its way through AOTAutograd, and its rules.

PyTorch takes `scaled_dot_product_attention` apart before a backend sees it, into the operator of the kernel that it would run itself:
masks of truth values become numbers as large as the scores, shared heads of keys are repeated, and where no kernel takes a mask as it lies
in memory, attention becomes products and a softmax with a square of the length in memory. So `prepare` rewrites Dynamo's graph:

- in inference each call becomes `tilewright::whole_attention`, which has a rule here; where the rule refuses, PyTorch runs its own.
- in training on a Hopper GPU, calls that our library has a gradient for become `tilewright::attention_lse` of the operator pack, whose
  gradient is `tilewright::attention_backward`; both have rules here, so that attention does not cut a group. Of others, masks are made
  contiguous, so that PyTorch's memory-efficient kernels, forward and backward, take them. Where Dynamo does not look into a function that calls
  it (`multi_head_attention_forward`), the graph has no such call: there the operators that PyTorch takes it apart into are decomposed into
  the same two (`DECOMPOSITIONS`).
- in training on processors attention is taken apart, and its gradient is made of operators that are ours.

Rows of which a mask hides everything give 0, as PyTorch's do.
"""

from __future__ import annotations

import contextlib
import math
import operator

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops  # noqa: F401  (registers the operators)
from ..ops.attentions import _has_kernels
from .sizes import Unsupported
from .writer import Value, Writer, dtype_name, rule, type_text, used_results, wide

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
        k, v = _shared(q, k, v)
        mask, causal = _plain(mask, causal)
        with gm.graph.inserting_before(node):
            if trains and _in_library(q, k, v, mask, dropout, causal, scale):
                length = _held(q).shape[-1]
                factor = float(length**-0.5 if scale is None else scale)
                both = gm.graph.call_function(torch.ops.tilewright.attention_lse.default, (q, k, v, mask, factor, causal))
                _stands_for(gm.graph.call_function(operator.getitem, (both, 0)), node)
            elif trains:
                if isinstance(mask, fx.Node):
                    node.replace_input_with(mask, gm.graph.call_method("contiguous", (mask,)))
                    changed = True
                continue
            else:
                ranks = [_rank(t) for t in (q, k, v)]
                plain = ranks == [4, 4, 4] and dropout == 0.0 and isinstance(causal, bool) and isinstance(shared, bool)
                if not plain or not (scale is None or isinstance(scale, (int, float))):
                    continue
                given = None if scale is None else float(scale)
                shared = shared or _held(q).shape[1] != _held(k).shape[1]
                arguments = (q, k, v, mask, causal, given, shared)
                _stands_for(gm.graph.call_function(torch.ops.tilewright.whole_attention.default, arguments), node)
        gm.graph.erase_node(node)
        changed = True
    if changed:
        gm.recompile()


def _stands_for(new: fx.Node, node: fx.Node) -> None:
    """The new node is read in place of the other one. Its kind of value is said: PyTorch's cache of graphs refuses methods of what it does not
    know to be a tensor."""
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _held(node) -> torch.Tensor | None:
    held = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return held if isinstance(held, torch.Tensor) else None


def _rank(node) -> int | None:
    held = _held(node)
    return None if held is None else held.dim()


# What masks are made with. Nothing here draws numbers.
_MASKS = frozenset(
    "arange full ones zeros full_like ones_like zeros_like new_full new_ones new_zeros tensor le lt ge gt eq ne and_ or_ not_ invert "
    "logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not __and__ __or__ __invert__ __le__ __lt__ __ge__ __gt__ __eq__ "
    "add sub mul neg cumsum diff sum all any tril triu where masked_fill getitem expand expand_as unsqueeze squeeze reshape view "
    "transpose permute contiguous clone to bool int long float index_select cat stack iadd isub broadcast_to".split()
)

# Nodes behind a mask, and its elements, at most.
_MASK_NODES, _MASK_ELEMENTS = 500, 1 << 27


def _known(node: fx.Node):
    """The value of a node that depends on no argument of the graph, computed; `None` where it may."""
    order, open_nodes, seen = [], [(node, False)], set()
    while open_nodes:
        here, done = open_nodes.pop()
        if done:
            order.append(here)
            continue
        if here in seen:
            continue
        seen.add(here)
        name = here.target if here.op == "call_method" else getattr(here.target, "__name__", "")
        if here.op not in ("call_function", "call_method") or name not in _MASKS or len(seen) > _MASK_NODES:
            return None
        open_nodes += [(here, True), *((n, False) for n in here.all_input_nodes)]
    values: dict[fx.Node, object] = {}
    try:
        with _disable_current_modes(), torch.no_grad():
            for here in order:
                args, kwargs = fx.node.map_arg((here.args, here.kwargs), values.__getitem__)
                call = getattr(args[0], here.target) if here.op == "call_method" else here.target
                values[here] = call(*(args[1:] if here.op == "call_method" else args), **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return values[node]


def _plain(mask, causal):
    """A mask that says nothing but what `causal` says, or nothing at all, as that: models make theirs from positions alone."""
    held = _held(mask) if isinstance(mask, fx.Node) else None
    if held is None or causal is not False or held.dtype is not torch.bool or held.dim() < 2:
        return mask, causal
    if not all(isinstance(n, int) for n in held.shape) or not 0 < held.numel() <= _MASK_ELEMENTS:
        return mask, causal
    found = _known(mask)
    if not isinstance(found, torch.Tensor) or found.shape != held.shape or found.dtype is not torch.bool:
        return mask, causal
    s, t = found.shape[-2:]
    with _disable_current_modes():
        if bool(found.all()):
            return None, False
        earlier = torch.ones(s, t, dtype=torch.bool, device=found.device).tril()
        return (None, True) if s == t and bool((found == earlier).all()) else (mask, causal)


def _unrepeated(node):
    """The heads of keys or values that models repeat with `x[:, :, None].expand(...).reshape(...)`; other nodes themselves."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target != "reshape":
        return node
    wide = node.args[0]
    if not isinstance(wide, fx.Node) or wide.op != "call_method" or wide.target != "expand":
        return node
    inner = wide.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not operator.getitem:
        return node
    base, whole = inner.args[0], slice(None, None, None)
    held = [_held(n) for n in (node, wide, inner, base)]
    if inner.args[1] != (whole, whole, None, whole, whole) or any(h is None for h in held):
        return node
    out, five, _, four = (tuple(h.shape) for h in held)
    known = len(four) == 4 and all(isinstance(n, int) for n in out + five + four)
    repeats = known and five == (*four[:2], five[2], *four[2:]) and out == (four[0], four[1] * five[2], *four[2:])
    return base if repeats else node


def _shared(q, k, v):
    """Keys and values without repeated heads, where both are repeated alike."""
    few = _unrepeated(k), _unrepeated(v)
    heads = [_held(t) for t in (q, *few)]
    if few[0] is k or few[1] is v or any(h is None or h.dim() != 4 for h in heads):
        return k, v
    return few if heads[1].shape[1] == heads[2].shape[1] and heads[0].shape[1] % heads[1].shape[1] == 0 else (k, v)


def _in_library(q, k, v, mask, dropout, causal, scale) -> bool:
    """Whether a call in training is one that the library has, forward and backward, and that means the same to PyTorch."""
    tensors = [_held(t) for t in (q, k, v)]
    seen = None if mask is None else _held(mask)
    if any(t is None or t.dim() != 4 for t in tensors) or (mask is not None and seen is None):
        return False
    known = all(isinstance(n, int) for t in tensors + [seen] * (seen is not None) for n in t.shape)
    if not known or dropout != 0.0 or not isinstance(causal, bool) or not (scale is None or isinstance(scale, (int, float))):
        return False
    return _means_the_same(*tensors, seen, causal, scale)


def _means_the_same(q, k, v, mask, causal: bool, scale) -> bool:
    """Whether tensors of four axes of known sizes are what the library has kernels for, with PyTorch's meaning."""
    (b, h, s, d), (kb, g, t, kd), (vb, vg, vt, _) = (x.shape for x in (q, k, v))
    if (kb, vb, vg, vt, kd) != (b, b, g, t, d) or g == 0 or h % g or len({x.dtype for x in (q, k, v)}) != 1:
        return False
    # PyTorch counts queries and keys from the beginning, the library from the end.
    if causal and (s != t or mask is not None):
        return False
    if mask is not None:
        fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape, (b, h, s))) and mask.shape[3] == t
        if not fits or mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
            return False
    return (scale is None or 0 < scale < math.inf) and _has_kernels(q, k, v, mask)


# ---- what PyTorch has taken apart already ------------------------------------------------------------


def _node_of(tensor) -> fx.Node | None:
    """The node of the graph that is being traced which made a tensor, before what autograd puts around it; `None` where that is not known."""
    mode = proxy_tensor.get_proxy_mode()
    slot = None if mode is None else proxy_tensor.get_proxy_slot(tensor, mode.tracer, None)
    node = getattr(getattr(slot, "proxy", None), "node", None)
    # Tensors that are saved for the backward graph are detached.
    while node is not None and node.target in (aten.detach.default, aten.alias.default):
        node = node.args[0]
    return node


def _asks_for_gradients(mask: torch.Tensor) -> bool:
    """Whether a mask may have a gradient: it is not known to come from positions and truth values alone."""
    start = _node_of(mask)
    if start is None:
        return True
    open_nodes, seen = [start], set()
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        held = node.meta.get("val")
        if node.op == "placeholder" and not (isinstance(held, torch.Tensor) and not (held.is_floating_point() or held.is_complex())):
            return True
        open_nodes += node.all_input_nodes
    return False


def _once(mask: torch.Tensor) -> torch.Tensor:
    """A mask without the elements that it repeats along axes of batches, heads and queries."""
    for axis in range(3):
        if mask.shape[axis] > 1 and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


def _by_library(q, k, v, mask, dropout, causal, scale):
    """The rows of attention and their log-sum-exps by the library's kernel; `None` where it has none for the gradient."""
    tensors = [q, k, v] if mask is None else [q, k, v, mask]
    known = all(t.dim() == 4 and all(isinstance(n, int) for n in t.shape) for t in tensors)
    if not known or dropout != 0.0 or not (scale is None or isinstance(scale, (int, float))):
        return None
    if mask is not None:
        if _asks_for_gradients(mask):
            return None
        mask = _once(mask)
    if not _means_the_same(q, k, v, mask, causal, scale):
        return None
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.ops.tilewright.attention_lse.default(q, k, v, mask, factor, causal)


def _no_numbers(q):
    """What stands for the state of a generator that nothing is drawn from."""
    return torch.zeros((), dtype=torch.long, device=q.device)


def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """The decomposition of `_scaled_dot_product_flash_attention`."""
    found = None if return_debug_mask else _by_library(q, k, v, None, dropout_p, is_causal, scale)
    if found is None:
        return NotImplemented
    nothing = q.new_empty(0)
    return *found, None, None, q.shape[2], k.shape[2], torch.zeros(2, dtype=torch.uint64, device=q.device), _no_numbers(q), nothing


def efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """The decomposition of `_scaled_dot_product_efficient_attention`, whose sums are padded to a multiple of 32 rows."""
    found = _by_library(q, k, v, attn_bias, dropout_p, is_causal, scale) if compute_log_sumexp else None
    if found is None:
        return NotImplemented
    y, lse = found
    if q.shape[2] % 32:
        lse = aten.constant_pad_nd(lse, [0, -q.shape[2] % 32], math.inf)
    return y, lse, _no_numbers(q), _no_numbers(q)


def cudnn(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """The decomposition of `_scaled_dot_product_cudnn_attention`, whose sums have one axis more."""
    wanted = compute_log_sumexp and not return_debug_mask
    found = _by_library(q, k, v, attn_bias, dropout_p, is_causal, scale) if wanted else None
    if found is None:
        return NotImplemented
    y, lse = found
    return y, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], _no_numbers(q), _no_numbers(q), None


def _library_gradient(dy, q, k, v, mask, y, lse, causal, scale):
    """The gradients by the library's kernel; `None` where the rows were not its own."""
    made = _node_of(y)
    if made is None or made.target is not operator.getitem or made.args[0].target is not torch.ops.tilewright.attention_lse.default:
        return None
    mask = None if mask is None else _once(mask)
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.ops.tilewright.attention_backward.default(dy.to(q.dtype), q, k, v, y, lse, mask, factor, causal)


def flash_backward(dy, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None):
    """The decomposition of `_scaled_dot_product_flash_attention_backward`."""
    found = _library_gradient(dy, q, k, v, None, out, lse, is_causal, scale)
    return NotImplemented if found is None else found


def efficient_backward(dy, q, k, v, bias, out, lse, seed, offset, dropout_p, wanted, is_causal=False, *, scale=None):
    """The decomposition of `_scaled_dot_product_efficient_attention_backward`."""
    found = None if wanted[3] else _library_gradient(dy, q, k, v, bias, out, lse.narrow(2, 0, q.shape[2]), is_causal, scale)
    if found is None:
        return NotImplemented
    return *(t if asked else None for t, asked in zip(found, wanted)), None


def cudnn_backward(dy, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, *, scale=None):
    """The decomposition of `_scaled_dot_product_cudnn_attention_backward`."""
    found = _library_gradient(dy, q, k, v, bias, out, lse.squeeze(-1), is_causal, scale)
    return NotImplemented if found is None else found


DECOMPOSITIONS = {
    aten._scaled_dot_product_flash_attention.default: flash,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten._scaled_dot_product_efficient_attention.default: efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._scaled_dot_product_cudnn_attention.default: cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: cudnn_backward,
}


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


# ---- training ----------------------------------------------------------------------------------------

# Between `[batch, head, row, column]` and the library's `[batch, row, head, column]`, in which models have it in memory.
ROWS_FIRST = [0, 2, 1, 3]

# The longest rows that the library's gradient of a norm takes.
LONGEST_ROW = 32768


def _call_library(w: Writer, name: str, attributes: str, operands: list[Value], results: list[str]) -> list[int]:
    """A host operator that a GPU's library has. `results`: types."""
    if w.device != "cuda":
        raise Unsupported("a kernel of a GPU's library")
    return w.builder.op(f'host "{name}" {attributes}', [o.number for o in operands], "; ".join(results), w.origin)


def _rows_first(w: Writer, number: int, like: torch.Tensor) -> Value:
    """A result of the library as PyTorch has it."""
    b, h, s, d = like.shape
    return w.permute(Value(number, like.dtype, (b, s, h, d)), ROWS_FIRST)


def _type_of(tensor: torch.Tensor, order=None) -> str:
    if not all(isinstance(n, int) for n in tensor.shape):
        raise Unsupported("attention of symbolic sizes in training")
    return type_text(tensor, order)


@rule(torch.ops.tilewright.attention_lse.default, torch.ops.tilewright.attention_lse.inference)
def attention_lse(w, node, q, k, v, mask, scale, causal):
    y, lse = node.meta["val"]
    operands = [w.permute(t, ROWS_FIRST) for t in (q, k, v)] + ([] if mask is None else [mask])
    types = [_type_of(y, ROWS_FIRST), _type_of(lse)]
    attributes = f"causal={int(causal)} scale={float(scale)!r}"
    first, second = _call_library(w, "attention_lse", attributes, operands, types)
    return _rows_first(w, first, y), Value(second, lse.dtype, tuple(lse.shape))


@rule(torch.ops.tilewright.attention_backward.default)
def attention_backward(w, node, dy, q, k, v, y, lse, mask, scale, causal):
    wanted = node.meta["val"]
    operands = [w.permute(t, ROWS_FIRST) for t in (dy, q, k, v, y)] + [lse] + ([] if mask is None else [mask])
    attributes = f"causal={int(causal)} scale={float(scale)!r}"
    numbers = _call_library(w, "attention_backward", attributes, operands, [_type_of(t, ROWS_FIRST) for t in wanted])
    return tuple(_rows_first(w, n, t) for n, t in zip(numbers, wanted))


@rule(torch.ops.tilewright.layer_norm_backward.default)
def layer_norm_backward(w, node, dy, x, mean, rstd, dh, weight, bias, eps):
    wanted = node.meta["val"]
    if weight is None or weight.dtype != x.dtype or dy.dtype != x.dtype or not all(isinstance(n, int) for n in wanted[0].shape):
        raise Unsupported("the gradient of a norm without a vector, in several types, or of symbolic sizes")
    if bias is not None and bias.dtype != x.dtype or wanted[0].shape[-1] > LONGEST_ROW:
        raise Unsupported("the gradient of a norm in several types, or of long rows")
    columns = wanted[0].shape[-1]
    rows = wanted[0].numel() // columns
    flat = [w.reshape(t, [rows, columns]) for t in (dy, x)]
    other = [] if dh is None else [w.reshape(dh, [rows, columns])]
    name = dtype_name(x.dtype)
    types = [f"{name}[{rows},{columns}]", f"{name}[{columns}]", f"{name}[{columns}]"]
    numbers = _call_library(w, "layer_norm_backward", f"eps={float(eps)!r}", [*flat, weight, *other], types)
    dx = w.reshape(Value(numbers[0], x.dtype, (rows, columns)), wanted[0].shape)
    return dx, *(Value(n, x.dtype, (columns,)) for n in numbers[1:])
