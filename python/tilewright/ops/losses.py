"""Cross-entropy of logits, fused, and of a linear layer whose logits are never all there."""

from __future__ import annotations

import torch

from . import _triton
from ._define import _compiling, again, batched, by_triton, chosen, direct, elsewhere, pair, recorded, single, traced, triton_form, wide


def _parts(x, softcap):
    v = x.to(wide(x.dtype))
    return torch.tanh(v / softcap) * softcap if softcap > 0 else v


def _composed(x, targets, ignore_index, label_smoothing, z_loss, softcap):
    v = _parts(x, softcap)
    lse = torch.logsumexp(v, -1)
    inside = (targets >= 0) & (targets < v.shape[-1])
    picked = v.gather(-1, targets.where(inside, 0).unsqueeze(-1)).squeeze(-1).where(inside, 0)
    loss = lse - (1 - label_smoothing) * picked - label_smoothing * v.mean(-1) + z_loss * lse * lse
    return torch.where(targets == ignore_index, 0, loss), lse


def _backward_composed(dloss, x, targets, lse, ignore_index, label_smoothing, z_loss, softcap):
    v = _parts(x, softcap)
    n = v.shape[-1]
    # A truth value times a number would be a float32 whatever the type of the logits.
    hit = (targets.unsqueeze(-1) == torch.arange(n, device=x.device)).to(v.dtype)
    l = lse.unsqueeze(-1)
    g = torch.exp(v - l) * (1 + 2 * z_loss * l) - hit * (1 - label_smoothing) - label_smoothing / n
    if softcap > 0:
        g = g * (1 - (v / softcap) ** 2)
    g = torch.where((targets == ignore_index).unsqueeze(-1), 0, g * dloss.unsqueeze(-1))
    return g.to(x.dtype)


_cross_entropy_backward = single(
    "cross_entropy_backward",
    fake=lambda dloss, x, *_: x.new_empty(x.shape),
    composed=_backward_composed,
)


def _both_composed(dloss, x, targets, *numbers):
    loss, lse = _composed(x, targets, *numbers)
    return loss, _backward_composed(dloss, x, targets, lse, *numbers)


_cross_entropy_both = single(
    "cross_entropy_both",
    fake=lambda dloss, x, *_: (torch.empty_like(dloss), x.new_empty(x.shape)),
    composed=_both_composed,
)


def _fake(x, targets, *_):
    loss = x.new_empty(targets.shape, dtype=wide(x.dtype))
    return loss, torch.empty_like(loss)


def _save(ctx, inputs, output):
    x, targets, *ctx.numbers = inputs
    _, lse = output
    ctx.save_for_backward(x, targets, lse)
    ctx.mark_non_differentiable(lse)


def _gradient(ctx, dloss, _):
    x, targets, lse = ctx.saved_tensors
    if dloss is None:
        return (None,) * 6
    if torch.is_grad_enabled():
        return again(lambda x: _composed(x, targets, *ctx.numbers)[0], (x,), (dloss,)) + (None,) * 5
    return _cross_entropy_backward(dloss, x, targets, lse, *ctx.numbers), None, None, None, None, None


_cross_entropy = pair("cross_entropy", fake=_fake, composed=_composed, save=_save, gradient=_gradient, twice=True)


def _scale_composed(x, by):
    # As the kernel's, not a change that autograd sees: what it saved is meant to be scaled (`scaled_gradients`).
    x.data.mul_(by)


single("scale_", fake=lambda x, by: None, composed=_scale_composed)


def divisor(targets: torch.Tensor, ignore_index: int, mean: bool, dtype: torch.dtype) -> torch.Tensor:
    """By what the sum of the losses is multiplied."""
    if mean:
        return 1 / (targets != ignore_index).sum().to(dtype)
    return torch.ones((), dtype=dtype, device=targets.device)


def save_gradients(ctx, inputs, output):
    """For operators whose results are a number and its gradients, computed with it. The last input says which are wanted."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.others = inputs[-1], len(inputs) - len(output) + 1
    ctx.mark_non_differentiable(*output[1:])


# Whether the graph that runs backwards is kept for another time; true where PyTorch does not say.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled_gradients(ctx, dtotal, *_):
    """Their derivative: the gradients times that of the number, in place where it is not 1 and nothing reads them again."""
    nothing = (None,) * ctx.others
    gradients = [g if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.wanted)]
    if dtotal is None:
        return *(None for _ in gradients), *nothing
    traced = any(g is not None and type(g) is not torch.Tensor for g in gradients)
    if torch.is_grad_enabled() and not traced and not torch.compiler.is_compiling():
        raise NotImplementedError("this loss has no second derivative; take cross_entropy with reduction='none' where one is needed")
    if traced or torch.compiler.is_compiling() or _graph_is_kept() or batched(dtotal):
        return *(None if g is None else (g * dtotal).to(g.dtype) for g in gradients), *nothing
    for g in gradients:
        if g is not None:
            torch.ops.tilewright.scale_(g, dtotal)
    return *gradients, *nothing


def check_targets(targets: torch.Tensor, ignore_index: int, classes: int) -> None:
    """Refuses targets that are no class, where the processor can see them."""
    if targets.device.type != "cpu" or _compiling() or recorded() or not targets.numel():
        return
    if elsewhere() or torch._C._len_torch_dispatch_stack() or type(targets).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # Targets without values, or with values that a trace must not keep.
        return
    kept = targets[targets != ignore_index]
    if kept.numel() and not 0 <= kept.min().item() <= kept.max().item() < classes:
        raise IndexError(f"targets reach from {kept.min().item()} to {kept.max().item()}, and there are {classes} logits")


def _total_composed(x, targets, *args):
    *numbers, mean = args
    scale = divisor(targets, numbers[0], mean, wide(x.dtype))
    loss, lse = _composed(x, targets, *numbers)
    return loss.sum() * scale, _backward_composed(scale.expand(targets.shape), x, targets, lse, *numbers)


def total_and_gradient(x: torch.Tensor, targets: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
    """`tilewright::cross_entropy_total` without a derivative."""
    both = _both_now(x, targets, *args)
    if both is not None:
        return both
    if x.dim():
        check_targets(targets, args[0], x.shape[-1])
    return _both(x, targets, *args)


def total_alone(x: torch.Tensor, targets: torch.Tensor, *args) -> torch.Tensor:
    """The same without the gradient."""
    total = _total_now(x, targets, *args)
    if total is not None:
        return total
    if x.dim():
        check_targets(targets, args[0], x.shape[-1])
    return _total.inference(x, targets, *args)


class _Total(torch.autograd.Function):
    """`tilewright::cross_entropy_total` and its derivative without the dispatcher's way through Python."""

    @staticmethod
    def forward(ctx, x, targets, *args):
        total, dx = total_and_gradient(x, targets, *args)
        ctx.materialize_grads = False
        ctx.save_for_backward(dx)
        ctx.wanted, ctx.others = (True,), 6
        return total

    @staticmethod
    def backward(ctx, dtotal):
        return scaled_gradients(ctx, dtotal)


def _save_total(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.wanted, ctx.others = (True,), 6


_total = pair(
    "cross_entropy_total",
    fake=lambda x, *_: (x.new_empty((), dtype=wide(x.dtype)), x.new_empty(x.shape)),
    composed=_total_composed,
    save=_save_total,
    gradient=scaled_gradients,
    kept=1,
    twice=True,
    apply=super(torch.autograd.Function, _Total).apply,
)
_total_now, _both_now, _both = _total.now, direct("cross_entropy_total").call, torch.ops.tilewright.cross_entropy_total.raw._op


def _total_and_gradient(
    x: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    mean: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum or mean of the losses, and its gradient, in one pass over the logits: for Triton's kernels."""
    scale = divisor(targets, ignore_index, mean, wide(x.dtype))
    # Half has no room for small gradients: there they are divided afterwards.
    late = x.dtype == torch.float16
    down = torch.ones_like(targets, dtype=scale.dtype) if late else scale.expand(targets.shape).contiguous()
    loss, dx = _cross_entropy_both(down, x, targets, ignore_index, label_smoothing, z_loss, softcap)
    if late:
        torch.ops.tilewright.scale_(dx, scale)
    return loss.sum() * scale, dx


_TritonTotal = triton_form(_total_and_gradient, save_gradients, scaled_gradients)


def cross_entropy(
    x: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    impl: str = "cuda",
) -> torch.Tensor:
    """Cross-entropy of logits `x[..., N]` and targets `[...]` (int64), computed in float32 (float64 for float64).

    `softcap` replaces each logit by `softcap * tanh(x / softcap)`; `z_loss` times the square of the logarithm of the sum of
    exponentials is added. Rows whose target is `ignore_index` count neither in the loss nor in the mean. With a sum or a
    mean, loss and gradient are one pass over the logits. Targets must lie inside the row: on the CPU others raise IndexError, on a GPU they are not noticed.
    """
    if impl == "cuda" and reduction in ("mean", "sum") and not traced():
        total = _total_now(x, targets, ignore_index, label_smoothing, z_loss, softcap, reduction == "mean")
        if total is not None:
            return total
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    chosen(impl)
    # Targets of another type are refused below.
    if targets.dtype == torch.int64 and x.dim():
        check_targets(targets, ignore_index, x.shape[-1])
    numbers = (ignore_index, float(label_smoothing), float(z_loss), float(softcap))
    if reduction != "none" and not elsewhere():
        if impl == "cuda":
            return _total(x, targets, *numbers, reduction == "mean")
        if x.requires_grad and torch.is_grad_enabled() and not recorded():
            _triton.demand("cross_entropy", [x, targets])
            return by_triton(_TritonTotal, x, targets, *numbers, reduction == "mean", lambda values: (*values, [True]))[0]
    loss, _ = _cross_entropy.by(impl)(x, targets, *numbers)
    if reduction == "none":
        return loss
    return loss.sum() * divisor(targets, ignore_index, reduction == "mean", loss.dtype)
