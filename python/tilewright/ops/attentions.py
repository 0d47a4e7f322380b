"""Attention, and the form that models of transformers call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._define import pair


def _composed(q, k, v, mask, scale, causal):
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if causal and q.shape[2] != k.shape[2]:
        s, t = q.shape[2], k.shape[2]
        hidden = torch.arange(t, device=q.device) > torch.arange(s, device=q.device).unsqueeze(1) + (t - s)
        extra = torch.zeros(s, t, dtype=q.dtype, device=q.device).masked_fill(hidden, float("-inf"))
        mask, causal = extra if mask is None else mask.to(q.dtype) + extra, False
    if causal and mask is not None:
        s = q.shape[2]
        hidden = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
        mask, causal = mask.masked_fill(hidden, float("-inf")), False
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)


def _save(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, mask)


def _gradient(ctx, dy):
    q, k, v, mask = ctx.saved_tensors
    if dy is None:
        return (None,) * 6
    # The pack has no kernel for this yet: PyTorch's own attention is run again and differentiated.
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:4]) if needed]
    held = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate((q, k, v, mask))]
    with torch.enable_grad():
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


def attention(q, k, v, mask=None, scale=None, causal=False):
    """`softmax(q k^T * scale + mask) v` of `q [B, H, S, D]`, `k [B, G, T, D]` and `v [B, G, T, E]`, `H` a multiple of `G`.

    `mask` is added (float) or says where attention is allowed (bool), and has the shape `[B or 1, H or 1, S, T]`. With `causal`, query
    `s` sees keys up to `s + T - S`. `scale` is `1 / sqrt(D)` unless given. Rows that see no key give NaN. The gradient is
    PyTorch's: its attention is run again for it.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _attention(q, k, v, mask, scale, causal)


def transformers_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """The attention function that `attn_implementation="tilewright"` names."""
    if dropout or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
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
