"""Rotary position embedding."""

from __future__ import annotations

import torch

from ._define import pair, traced, wide


def _composed(x, cos, sin, turned_back):
    c = wide(x.dtype)
    f, cos, sin = x.to(c), cos.to(c).unsqueeze(1), sin.to(c).unsqueeze(1)
    if turned_back:
        f, s = f * cos, f * sin
        a, b = s.chunk(2, -1)
        return (f + torch.cat((b, -a), -1)).to(x.dtype)
    a, b = f.chunk(2, -1)
    return (f * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.turned_back = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx, dy):
    cos, sin = ctx.saved_tensors
    if dy is None:
        return None, None, None, None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError("tilewright::rotary has no gradient for its tables")
    return _rotary(dy, cos, sin, not ctx.turned_back), None, None, None


_rotary = pair(
    "rotary",
    fake=lambda x, cos, sin, turned_back: x.new_empty(x.shape),
    composed=_composed,
    save=_save,
    gradient=_gradient,
    twice=True,
)


_now = _rotary.now


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str = "cuda") -> torch.Tensor:
    """Rotates the pairs `(x[..., j], x[..., j + D/2])` of `x [B, H, S, D]` by `cos` and `sin [B or 1, S, D]`, as Llama does.

    The tables have no gradient.
    """
    if impl == "cuda" and not traced():
        y = _now(x, cos, sin, False)
        if y is not None:
            return y
    return _rotary.by(impl)(x, cos, sin, False)


def _turned(x, cos, sin):
    """By PyTorch's operators; elements behind the tables' width stay as they are."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = x.chunk(2, -1)
    turned = x * cos + torch.cat((-b, a), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """What models of transformers call: queries and keys, rotated. For axes in another order PyTorch does it."""
    if unsqueeze_dim != 1 or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1] or cos.requires_grad:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _turned(q, cos, sin), _turned(k, cos, sin)
    return rotary(q, cos, sin), rotary(k, cos, sin)
