"""Attention, and the form that models of transformers call."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._define import autocast, batched, chosen, elsewhere, pair, single, wide


def _hidden(mask, hidden):
    """A mask that hides more."""
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))


def _composed(q, k, v, mask, scale, causal):
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if causal and q.shape[2] != k.shape[2]:
        s, t = q.shape[2], k.shape[2]
        hidden = torch.arange(t, device=q.device) > torch.arange(s, device=q.device).unsqueeze(1) + (t - s)
        mask, causal = ~hidden if mask is None else _hidden(mask, hidden), False
    if causal and mask is not None:
        s = q.shape[2]
        mask, causal = _hidden(mask, torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)), False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)


def _rows_composed(s, dp, before, after):
    c = wide(s.dtype)
    f = s.to(c) * before
    none = f.amax(-1, keepdim=True) == float("-inf")
    p = torch.softmax(f, -1).masked_fill(none, 0.0)
    d = dp.to(c)
    return p.to(s.dtype), (p * (d - (p * d).sum(-1, keepdim=True)) * after).to(s.dtype)


_attention_rows = single(
    "attention_rows",
    fake=lambda s, dp, *_: (s.new_empty(s.shape), s.new_empty(s.shape)),
    composed=_rows_composed,
)

# Scores that are there at a time.
SCORES = 1 << 24


def _gradient_at_once(q, k, v, scale, dy):
    """The same without a mask where all scores may be there at once and are computed in the type of the tensors: five products, and the rows between them."""
    (b, h, length, d), (g, keys), e = q.shape, k.shape[1:3], v.shape[-1]
    n, rows = b * g, h // g * length
    q, dy = q.reshape(n, rows, d), dy.reshape(n, rows, e)
    k, v = k.reshape(n, keys, d), v.reshape(n, keys, e)
    p, ds = _attention_rows(torch.bmm(q, k.mT), torch.bmm(dy, v.mT), scale, scale)
    dq, dk, dv = torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, dy)
    return dq.view(b, h, length, d), dk.view(b, g, keys, d), dv.view(b, g, keys, e), None


def _blocked_gradient(q, k, v, mask, scale, causal, dy, mask_wanted):
    """The gradients of all but the numbers, some queries at a time: scores are never all there. Computed in the wide type."""
    (b, h, length, d), (g, keys), e = q.shape, k.shape[1:3], v.shape[-1]
    c = wide(q.dtype)
    each = h // g
    if mask is None and not causal and q.dtype == c and b * h * length * keys <= SCORES:
        return _gradient_at_once(q, k, v, scale, dy)
    wide_k, wide_v = k.to(c), v.to(c)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dmask = torch.zeros(mask.shape, dtype=c, device=q.device) if mask_wanted else None
    block = max(1, SCORES // max(1, b * h * keys))
    for first in range(0, length, block):
        last = min(length, first + block)
        n = last - first
        # Queries of the heads that share keys stand one after the other.
        part = q[:, :, first:last].to(c).reshape(b, g, each * n, d)
        down = dy[:, :, first:last].to(c).reshape(b, g, each * n, e)
        s = part @ wide_k.mT
        before = scale
        if mask is not None or causal:
            before = 1.0
            seen = s.mul_(scale).view(b, h, n, keys)
            if mask is not None and mask.dtype == torch.bool:
                seen.masked_fill_(~mask[:, :, first:last], float("-inf"))
            elif mask is not None:
                seen += mask[:, :, first:last].to(c)
            if causal:
                at = torch.arange(first, last, device=q.device).unsqueeze(1) + (keys - length)
                seen.masked_fill_(torch.arange(keys, device=q.device) > at, float("-inf"))
        p, ds = _attention_rows(s, down @ wide_v.mT, before, 1.0)
        if dmask is not None:
            one = ds.view(b, h, n, keys)
            over = [i for i in range(2) if mask.shape[i] == 1]
            dmask[:, :, first:last] = one.sum(over, keepdim=True) if over else one
        dv += p.mT @ down
        dk += (ds.mT @ part).mul_(scale)
        dq[:, :, first:last] = (ds @ wide_k).mul_(scale).view(b, h, n, d)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None if dmask is None else dmask.to(mask.dtype)


def _save(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, mask)


def _gradient(ctx, dy):
    q, k, v, mask = ctx.saved_tensors
    if dy is None:
        return (None,) * 6
    several = batched(dy)
    if not several and (mask is not None or q.dtype not in (torch.bfloat16, torch.float16) or q.device.type == "cpu"):
        needs = ctx.needs_input_grad
        found = _blocked_gradient(q, k, v, mask, ctx.scale, ctx.causal, dy, mask is not None and needs[3])
        return *(f if needed else None for f, needed in zip(found, needs)), None, None
    # PyTorch's fused kernels for 16 bits are faster than products with a kernel for rows between them: they run again, where the
    # library has no kernels of its own (`attention_lse`).
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:4]) if needed]
    held = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate((q, k, v, mask))]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if several else contextlib.nullcontext():
        y = _composed(*held, ctx.scale, ctx.causal)
    found = iter(torch.autograd.grad(y, [held[i] for i in wanted], dy))
    return *(next(found) if i in wanted else None for i in range(4)), None, None


_attention = pair(
    "attention",
    fake=lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[-1])),
    composed=_composed,
    save=_save,
    gradient=_gradient,
)


# ---- training of 16-bit types on Hopper ------------------------------------------------------------


def _beside(sizes, like):
    """As `beside` in crates/torch-ops/src/ops/attention_training.rs: rows before heads where `like` lies so."""
    b, h, s, e = sizes
    if h > 1 and s > 1 and like.stride(1) < like.stride(2):
        return like.new_empty_strided((b, h, s, e), (h * s * e, e, h * e, 1))
    return like.new_empty((b, h, s, e))


def _lse_fake(q, k, v, *_):
    y = _beside((*q.shape[:3], v.shape[-1]), q)
    return y, q.new_empty(q.shape[:3], dtype=torch.float32)


def _scores(q, k, mask, scale, causal):
    s = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask
    if causal:
        at = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + (k.shape[2] - q.shape[2])
        s = s.masked_fill(torch.arange(k.shape[2], device=q.device) > at, float("-inf"))
    return s


def _lse_composed(q, k, v, mask, scale, causal):
    full = None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
    return _composed(q, k, v, full, scale, causal), torch.logsumexp(_scores(q, k, mask, scale, causal), -1)


def _backward_composed(dy, q, k, v, y, lse, mask, scale, causal):
    full = None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
    return _blocked_gradient(q, k, v, full, scale, causal, dy, False)[:3]


_attention_backward = single(
    "attention_backward",
    fake=lambda dy, q, k, v, *_: tuple(_beside(t.shape, t) for t in (q, k, v)),
    composed=_backward_composed,
)


def _lse_save(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, mask)


def _lse_gradient(ctx, dy, _):
    if dy is None:
        return (None,) * 6
    found = _attention_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *(f if needed else None for f, needed in zip(found, ctx.needs_input_grad)), None, None, None


_attention_lse = pair("attention_lse", fake=_lse_fake, composed=_lse_composed, save=_lse_save, gradient=_lse_gradient)


@torch.compiler.assume_constant_result
def _is_hopper(device):
    # Tensors without values may claim a device that is not there.
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def _has_kernels(q, k, v, mask):
    """Whether the library has kernels for the gradient: `backward_plan` in crates/kernels/src/attention."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or 0 in (*q.shape, *k.shape, *v.shape):
        return False
    if not _is_hopper(q.get_device()):
        return False
    if mask is not None and (mask.requires_grad or mask.dtype == torch.float64):
        return False
    # Tiles along a depth: 16 elements, or whole 32s.
    widths = [16 if n <= 16 else -(-n // 32) * 32 for n in (q.shape[-1], v.shape[-1])]
    return widths[0] == widths[1] <= 256 and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    impl: str = "cuda",
) -> torch.Tensor:
    """`softmax(q k^T * scale + mask) v` of `q [B, H, S, D]`, `k [B, G, T, D]` and `v [B, G, T, E]`, `H` a multiple of `G`.

    `mask` is added (float) or says where attention is allowed (bool), and has the shape `[B or 1, H or 1, S, T]`. With `causal`, query
    `s` sees keys up to `s + T - S`. `scale` is `1 / sqrt(D)` unless given. Rows that see no key give 0, as PyTorch's. The gradient takes
    some queries at a time and never has all scores; for 16-bit types it is our own kernels' on Hopper (the same bits each time), unless
    the mask asks for one, and without a mask PyTorch's on other GPUs. As Triton it is the forward kernel; the gradient has products of
    PyTorch's, or PyTorch's own kernel for 16 bits without a mask.
    """
    chosen(impl)
    q, k, v = autocast(q, k, v)
    scale = float(max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if impl == "triton":
        return _attention.triton(q, k, v, mask, scale, causal)
    if trains and scale > 0 and _has_kernels(q, k, v, mask) and not elsewhere():
        return _attention_lse(q, k, v, mask, scale, causal)[0]
    return _attention(q, k, v, mask, scale, causal)


def _in_full(module, query, key, value, mask, dropout, scaling, is_causal, cap, sinks):
    """Attention whose scores are capped, or whose rows share their weights with a sink for each head: all scores at once, by PyTorch's operators."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])[None, None]
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            # Added, as models do themselves: rows that see nothing have the same weights and gradients.
            mask = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill(~mask, torch.finfo(scores.dtype).min)
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1, dtype=wide(scores.dtype)).to(query.dtype)
    weights = F.dropout(weights[..., : key.shape[2]], dropout, getattr(module, "training", False))
    return (weights @ value).transpose(1, 2).contiguous()


def transformers_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """The attention function that `attn_implementation="tilewright"` names."""
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if cap is not None or sinks is not None:
        return _in_full(module, query, key, value, attention_mask, dropout, scaling, is_causal, cap, sinks), None
    if dropout or kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # As PyTorch's: a mask says it all, and a single query sees every key.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and query.shape[2] != key.shape[2]:
        length = query.shape[2]
        attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        causal = False
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        attention_mask = attention_mask[..., : key.shape[2]]
    if attention_mask is not None and attention_mask.shape[2] == 1 and query.shape[2] != 1:
        attention_mask = attention_mask.expand(-1, -1, query.shape[2], -1)
    y = attention(query, key, value, attention_mask, scaling, causal)
    return y.transpose(1, 2).contiguous(), None
