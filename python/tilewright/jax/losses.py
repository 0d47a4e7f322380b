"""Cross-entropy: losses of rows in one kernel, their gradient in another, or both in one."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from .core import call, floats, need, same


def _logits(g, x, softcap):
    z = g.wide(x)
    return g.map(f"{softcap!r} * tanh(a / {softcap!r})", z) if softcap else z


def _beside(g, each):
    """What there is one of for each row, to broadcast along it."""
    return g.reshape(each, (*g.shapes[each], 1))


def _losses(g, x, targets, ignore, smoothing, z_loss, softcap, mapped=None):
    x, targets = g.spread(mapped, x, targets)
    z, axis = _logits(g, x, softcap), len(g.shapes[x]) - 1
    top = g.max(z, axis)
    lse = g.map("a + log(b)", top, g.sum(g.map("exp(a - b)", z, top), [axis], True))
    target = _beside(g, targets)
    picked = g.sum(g.map("where(a == b, c, 0)", g.places(x, g.types[target]), target, z), [axis], True)
    loss = g.map(f"a - {1 - smoothing!r} * b", lse, picked)
    if smoothing:
        loss = g.map(f"a - {smoothing!r} * b", loss, g.mean(z, [axis]))
    if z_loss:
        loss = g.map(f"a + {z_loss!r} * b * b", loss, lse)
    loss = g.map(f"where(a == {ignore}, 0, b)", target, loss)
    return g.reshape(loss, g.shapes[x][:-1]), g.reshape(lse, g.shapes[x][:-1])


def _losses_gradient(g, x, targets, lse, dloss, ignore, smoothing, z_loss, softcap, mapped=None):
    x, targets, lse, dloss = g.spread(mapped, x, targets, lse, dloss)
    z, columns = _logits(g, x, softcap), g.shapes[x][-1]
    target, lse, dloss = (_beside(g, each) for each in (targets, lse, dloss))
    weight = f"(1 + {2 * z_loss!r} * b)" if z_loss else "1"
    slope = f"{weight} * exp(a - b) - where(c == d, {1 - smoothing!r}, 0) - {smoothing / max(columns, 1)!r}"
    dx = g.map(f"where(d == {ignore}, 0, e * ({slope}))", z, lse, g.places(x, g.types[target]), target, dloss)
    if softcap:
        dx = g.map(f"a * (1 - (b / {softcap!r}) * (b / {softcap!r}))", dx, z)
    return g.cast(dx, g.types[x])


def _losses_and_gradient(g, x, targets, dloss, mapped=None, **numbers):
    x, targets, dloss = g.spread(mapped, x, targets, dloss)
    whole = None if mapped is None else (True,) * 4
    loss, lse = _losses(g, x, targets, mapped=whole and whole[:2], **numbers)
    return loss, _losses_gradient(g, x, targets, lse, dloss, mapped=whole, **numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _losses_of(x, targets, numbers):
    return call(_losses, x, targets, **dict(numbers))[0]


def _forward(x, targets, numbers):
    loss, lse = call(_losses, x, targets, **dict(numbers))
    return loss, (x, targets, lse)


def _backward(numbers, saved, dloss):
    return call(_losses_gradient, *saved, dloss, **dict(numbers))[0], None


_losses_of.defvjp(_forward, _backward)


def sums_of(logits, targets, numbers):
    """The sum of the losses of rows."""
    return call(_losses, logits, targets, **dict(numbers))[0].sum()


def losses_and_gradient(logits, targets, dloss, numbers):
    """The losses of rows and the gradient of the logits, in one pass, for a gradient of the losses that is known before."""
    return call(_losses_and_gradient, logits, targets, dloss, **dict(numbers))


def numbers_of(ignore_index, label_smoothing, z_loss, softcap) -> tuple:
    """The numbers of a loss, to be hashed."""
    need(0.0 <= label_smoothing <= 1.0, f"label_smoothing is {label_smoothing}; it must be in 0..1")
    for name, number in (("z_loss", z_loss), ("softcap", softcap)):
        need(number >= 0.0 and math.isfinite(number), f"{name} is {number}; it must be a number of at least 0")
    numbers = dict(ignore=int(ignore_index), smoothing=float(label_smoothing), z_loss=float(z_loss), softcap=float(softcap))
    return tuple(sorted(numbers.items()))


def checked_targets(targets, shape, name):
    """Targets of rows, of signed integers."""
    targets = jnp.asarray(targets)
    need(targets.shape == shape, f"targets have shape {targets.shape}; they must have {shape}, the axes of {name} but the last")
    if not jnp.issubdtype(targets.dtype, jnp.signedinteger):
        raise TypeError(f"targets are {targets.dtype}; they must be signed integers")
    return targets


def cross_entropy(
    logits,
    targets,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
):
    """Cross-entropy of `logits`: `[..., n]` and integer `targets`: `[...]`, in f32 (f64 for f64).

    `softcap` replaces each logit by `softcap * tanh(x / softcap)`; `z_loss` times the square of the logarithm of the sum of
    exponentials is added. Rows whose target is `ignore_index` count neither in the loss nor in the mean. Targets outside of a row
    pick nothing, as nobody looks at values under `jit`. `reduction`: "mean", "sum" or "none".
    """
    need(reduction in ("mean", "sum", "none"), f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    (logits,) = floats(logits=logits)
    need(logits.ndim >= 1 and logits.shape[-1] > 0, f"logits have shape {logits.shape}; they must be [..., n], n above 0")
    targets = checked_targets(targets, logits.shape[:-1], "logits")
    losses = _losses_of(*same(logits, targets), numbers_of(ignore_index, label_smoothing, z_loss, softcap))
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum().astype(total.dtype)


__all__ = ["cross_entropy"]
