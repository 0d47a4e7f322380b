"""A linear layer with bias, activation and residual, and the loss of a linear layer whose logits are never all there."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import formulas, losses
from ._define import single

_ACTIVATIONS = {
    "relu": formulas.elementwise("max(x, 0.0)"),
    "gelu": formulas._GELU,
    "gelu_tanh": formulas._GELU_TANH,
    "silu": formulas._SILU,
}


def _composed(x, weight, bias, residual, activation):
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if activation:
        relu = activation == _ACTIVATIONS["relu"].text
        y = torch.relu(y) if relu else formulas._forward_composed([y], activation)
    return y if residual is None else y + residual


_linear = single(
    "linear",
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    composed=_composed,
)


def linear(x, weight, bias=None, activation=None, residual=None):
    """`activation(x @ weight.T + bias) + residual`; without gradients that is one kernel.

    `activation` is `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"` or nothing. Where a gradient is asked for, the product is
    PyTorch's and what follows it the pack's: the gradient needs the sums before the activation.
    """
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {list(_ACTIVATIONS)}, or None")
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        y = F.linear(x, weight, bias)
        if activation == "relu":
            y = torch.relu(y)
        elif activation is not None:
            y = _ACTIVATIONS[activation](y)
        return y if residual is None else y + residual
    return _linear(x, weight, bias, residual, "" if activation is None else _ACTIVATIONS[activation].text)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk: of the logits only one chunk's are there at a time."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, numbers, rows):
        total = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        needs = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs[0] else None
        # Summed in the wide type: many chunks add up.
        dw = torch.zeros_like(weight, dtype=total.dtype) if needs[1] else None
        db = None if bias is None or not needs[2] else torch.zeros_like(bias, dtype=total.dtype)
        for first in range(0, x.shape[0], rows):
            part, t = x[first : first + rows], targets[first : first + rows]
            logits = F.linear(part, weight, bias)
            loss, lse = losses._cross_entropy.inference(logits, t, *numbers)
            total += loss.sum()
            if not any(needs[:3]):
                continue
            dz = losses._cross_entropy_backward(torch.ones_like(loss), logits, t, lse, *numbers)
            del logits
            if dx is not None:
                torch.mm(dz, weight, out=dx[first : first + rows])
            if dw is not None:
                dw += torch.mm(dz.t(), part)
            if db is not None:
                db += dz.sum(0)
        kept = [None if g is None else g.to(like.dtype) for g, like in ((dx, x), (dw, weight), (db, x if bias is None else bias))]
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        return *(None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def linear_cross_entropy(
    x, weight, targets, bias=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean", rows=None
):
    """`cross_entropy(x @ weight.T + bias, targets)` without ever storing all logits.

    `x [..., K]`, `weight [N, K]`, `targets [...]` (int64). Tokens are taken in chunks of `rows` (by default as many as make 64 Mi
    logits at most); loss and gradients of a chunk are computed together, so that in training each product is done once. `reduction`
    is `"mean"` or `"sum"`. The products are PyTorch's.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if rows is None:
        rows = max(256, (1 << 26) // max(1, weight.shape[0]))
    numbers = (ignore_index, float(label_smoothing), float(z_loss), float(softcap))
    flat, t = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    total = _LinearCrossEntropy.apply(flat, weight, bias, t, numbers, rows)
    return total if reduction == "sum" else total / (t != ignore_index).sum().to(total.dtype)
