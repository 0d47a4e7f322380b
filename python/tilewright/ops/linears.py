"""A linear layer with bias, activation and residual, and the loss of a linear layer whose logits are never all there."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F

from . import formulas, losses
from ._define import again, autocast, chosen, eager, elsewhere, pair, recorded, single, single_by_triton

_ACTIVATIONS = {
    "relu": formulas.elementwise("relu(x)"),
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


def _composed_with_sums(x, weight, bias, residual, activation):
    s = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = s
    if activation:
        relu = activation == _ACTIVATIONS["relu"].text
        y = torch.relu(s) if relu else formulas._forward_composed([s], activation)
    y = y.clone() if residual is None and y is s else y if residual is None else y + residual
    return y, s if activation else x.new_empty((0,))


def _fake_with_sums(x, weight, bias, residual, activation):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if activation else x.new_empty((0,))


_column_sums = single(
    "column_sums",
    fake=lambda x, like: like.new_empty(like.shape),
    composed=lambda x, like: x.reshape(-1, x.shape[-1]).sum(0, dtype=losses.wide(x.dtype)).to(like.dtype),
)


def _save_linear(ctx, inputs, output):
    x, weight, bias, residual, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, residual, output[1])
    ctx.mark_non_differentiable(output[1])


def _linear_gradient(ctx, dy, _):
    x, weight, bias, residual, sums = ctx.saved_tensors
    if dy is None:
        return (None,) * 5
    if torch.is_grad_enabled():
        f = lambda *args: _composed_with_sums(*args, ctx.activation)[0]  # noqa: E731
        return again(f, (x, weight, bias, residual), (dy,)) + (None,)
    needs = ctx.needs_input_grad
    dz = formulas._map1_backward(dy, sums, ctx.activation) if ctx.activation else dy
    dx = dw = db = None
    if needs[0]:
        dx = dz @ weight
    flat = dz.reshape(-1, dz.shape[-1])
    if needs[1]:
        dw = flat.t() @ x.reshape(-1, x.shape[-1])
    if bias is not None and needs[2]:
        db = _column_sums(flat, bias) if flat.shape[0] else torch.zeros_like(bias)
    return dx, dw, db, dy if residual is not None and needs[3] else None, None


_linear_with_sums = pair(
    "linear_with_sums",
    fake=_fake_with_sums,
    composed=_composed_with_sums,
    save=_save_linear,
    gradient=_linear_gradient,
    kept=None,
    twice=True,
)


def _apart(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], residual: Optional[torch.Tensor], activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear_with_sums`, by PyTorch's product and a map."""
    s = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if residual is not None and (residual.shape != s.shape or residual.dtype != s.dtype):
        raise RuntimeError(f"residual is {residual.dtype} of shape {list(residual.shape)}; it must be {s.dtype} of shape {list(s.shape)}")
    if not activation:
        return s if residual is None else s.add_(residual), x.new_empty((0,))
    if residual is None:
        return formulas._map1.inference(s, activation), s
    return formulas._map2.inference(s, residual, f"{activation} + residual"), s


_linear_apart = torch.library.custom_op("tilewright::linear_apart", _apart, mutates_args=())
_linear_apart.register_fake(_fake_with_sums)


def _save_apart(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _save_linear(ctx, inputs, output)


_linear_apart.register_autograd(_linear_gradient, setup_context=_save_apart)

# Results of 16 bits from which, in training, sums and activation are two kernels: the end of a product that stores both takes longer than
# a map (4096^3 in bf16 on an H200: 212 to 239 us, PyTorch's product 174 to 206 and the map 19 to 22). Below, a launch counts.
MANY = 1 << 21


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    impl: str = "cuda",
) -> torch.Tensor:
    """`activation(x @ weight.T + bias) + residual` of `x [..., K]`, `weight [N, K]`, `bias [N]` and `residual [..., N]`; without gradients
    that is one kernel.

    `activation` is `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"` or nothing. Where a gradient is asked for, the sums before the
    activation are stored beside the result, many of 16 bits by PyTorch's product and a kernel behind it; in the gradient the activation is one
    kernel, the bias another, and the products are PyTorch's.
    """
    chosen(impl)
    if activation is not None and (not isinstance(activation, str) or activation not in _ACTIVATIONS):
        raise ValueError(f"activation is {activation!r}; it must be one of {list(_ACTIVATIONS)}, or None")
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    given = [t for t in (x, weight, bias, residual) if t is not None]
    text = "" if activation is None else _ACTIVATIONS[activation].text
    if recorded() or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        if impl == "cuda" and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight.dim() == 2:
            if x.numel() // max(1, x.shape[-1]) * weight.shape[0] >= MANY:
                return _linear_apart(x, weight, bias, residual, text)[0]
        return _linear_with_sums.by(impl)(x, weight, bias, residual, text)[0]
    if impl == "triton":
        return single_by_triton("linear", _linear, x, weight, bias, residual, text)
    if elsewhere():
        return _composed(x, weight, bias, residual, text)
    return _linear(x, weight, bias, residual, text)


def _loss_and_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    mean: bool,
    rows: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and the gradients of `x`, `weight` and `bias` that are wanted (others are empty), chunk by chunk."""
    wide = losses.wide(x.dtype)
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    if 0 < x.shape[0] <= rows and x.dtype != torch.float16:
        return _at_once(x, weight, bias, targets, (*numbers, mean), wanted)
    total = x.new_zeros((), dtype=wide)
    scale = losses.divisor(targets, ignore_index, mean, wide)
    # Half has no room for small gradients: there they are divided at the end.
    late = x.dtype == torch.float16
    down = torch.ones_like(targets, dtype=wide) if late else scale.expand(targets.shape).contiguous()
    dx = torch.empty_like(x) if wanted[0] else x.new_empty((0,))
    dw, db = weight.new_empty((0,)), x.new_empty((0,))
    count = -(-x.shape[0] // rows) if x.shape[0] else 0
    rows = -(-x.shape[0] // count) if count else rows
    for first in range(0, x.shape[0], rows):
        part, t, d = (v[first : first + rows] for v in (x, targets, down))
        logits = F.linear(part, weight, bias)
        if not any(wanted):
            total += losses._cross_entropy.inference(logits, t, *numbers)[0].sum()
            continue
        loss, dz = losses._cross_entropy_both(d, logits, t, *numbers)
        del logits
        total += loss.sum()
        if wanted[0]:
            torch.mm(dz, weight, out=dx[first : first + rows])
        if wanted[1]:
            dw = _added(dw, dz.t(), part, count)
        if wanted[2] and bias is not None:
            sums = dz.sum(0, dtype=wide)
            db = sums if first == 0 else db.add_(sums)
    if wanted[1]:
        dw = dw.to(weight.dtype) if count else torch.zeros_like(weight)
    if wanted[2] and bias is not None:
        db = db.to(bias.dtype) if count else torch.zeros_like(bias)
    if late and any(wanted):
        for g in (dx, dw, db):
            torch.ops.tilewright.scale_(g, scale)
    return total * scale, dx, dw, db


def _at_once(x, weight, bias, targets, numbers, wanted):
    """The same where all logits are one chunk."""
    logits = F.linear(x, weight, bias)
    nothing = x.new_empty((0,))
    if True not in wanted:
        return losses.total_alone(logits, targets, *numbers), nothing, weight.new_empty((0,)), nothing.clone()
    total, dz = losses.total_and_gradient(logits, targets, *numbers)
    del logits
    dx = torch.mm(dz, weight) if wanted[0] else nothing
    dw = torch.mm(dz.t(), x) if wanted[1] else weight.new_empty((0,))
    db = dz.sum(0, dtype=losses.wide(x.dtype)).to(bias.dtype) if wanted[2] and bias is not None else x.new_empty((0,))
    return total, dx, dw, db


def _added(sum, a, b, count):
    """`sum + a @ b`: a few chunks in the type of the tensors, many in float32."""
    if sum.numel() == 0:
        first = torch.mm(a, b)
        return first if count <= FEW_CHUNKS else first.to(losses.wide(a.dtype))
    if count <= FEW_CHUNKS:
        return torch.addmm(sum, a, b, out=sum)
    return sum.add_(torch.mm(a, b))


# So many chunks are added up in the type of the tensors: each addition rounds once.
FEW_CHUNKS = 4

_linear_cross_entropy = torch.library.custom_op("tilewright::linear_cross_entropy", _loss_and_gradients, mutates_args=())


@_linear_cross_entropy.register_fake
def _(x, weight, bias, targets, ignore_index, label_smoothing, z_loss, softcap, mean, rows, wanted):
    def like(t, which):
        return torch.empty_like(t, memory_format=torch.contiguous_format) if wanted[which] and t is not None else x.new_empty((0,))

    return x.new_empty((), dtype=losses.wide(x.dtype)), like(x, 0), like(weight, 1), like(bias, 2)


_linear_cross_entropy.register_autograd(losses.scaled_gradients, setup_context=losses.save_gradients)


class _LinearLoss(torch.autograd.Function):
    """`tilewright::linear_cross_entropy` and its derivative without the dispatcher's way through Python."""

    @staticmethod
    def forward(ctx, x, weight, bias, args):
        total, *gradients = _loss_and_gradients(x, weight, bias, *args)
        ctx.materialize_grads = False
        ctx.save_for_backward(*gradients)
        ctx.wanted, ctx.others = args[-1], 1
        return total

    @staticmethod
    def backward(ctx, dtotal):
        return losses.scaled_gradients(ctx, dtotal)


_linear_loss = super(torch.autograd.Function, _LinearLoss).apply


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    rows: int | None = None,
) -> torch.Tensor:
    """`cross_entropy(x @ weight.T + bias, targets)` without ever storing all logits.

    `x [..., K]`, `weight [N, K]`, `targets [...]` (int64). Tokens are taken in chunks of `rows` (by default as many as make 256 Mi
    logits at most); loss and gradients of a chunk are computed together, so that in training each product is done once. `reduction`
    is `"mean"` or `"sum"`. The products are PyTorch's. Targets must be below `N`: on the CPU others raise IndexError, on a GPU they are not noticed.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    if not x.dim():
        raise ValueError("x has no axes; it must have at least one")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [N, {x.shape[-1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{weight.shape[0]}]")
    if targets.dtype != torch.int64 or targets.shape != x.shape[:-1]:
        raise ValueError(f"targets are {targets.dtype} of shape {list(targets.shape)}; they must be int64 of shape {list(x.shape[:-1])}")
    if rows is None:
        rows = max(256, CHUNK // max(1, weight.shape[0]))
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"linear_cross_entropy: x lies on {x.device}, and {name} on {tensor.device}")
    x, weight, bias = autocast(x, weight, bias)
    if elsewhere() or recorded():
        logits = F.linear(x, weight, bias)
        return losses.cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, softcap, reduction)
    flat, t = x, targets
    if x.dim() != 2:
        flat, t = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    given = (flat, weight, bias)
    asked = torch.is_grad_enabled()
    wanted = [g is not None and g.requires_grad and asked for g in given]
    args = (t, ignore_index, float(label_smoothing), float(z_loss), float(softcap), reduction == "mean", rows, wanted)
    if not eager(flat, weight, bias, t):
        losses.check_targets(targets, ignore_index, weight.shape[0])
        return _linear_cross_entropy(flat, weight, bias, *args)[0]
    if not 0 < t.shape[0] <= rows or x.dtype == torch.float16:
        # Targets of one chunk are looked at by the kernel of its loss.
        losses.check_targets(targets, ignore_index, weight.shape[0])
    elif True not in wanted:
        return losses.total_alone(F.linear(flat, weight, bias), *args[:6])
    return _linear_loss(flat, weight, bias, args) if True in wanted else _loss_and_gradients(flat, weight, bias, *args)[0]


# Logits of a chunk, at most: half a gigabyte of 16-bit numbers.
CHUNK = 1 << 28
