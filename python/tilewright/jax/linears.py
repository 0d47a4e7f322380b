"""A linear layer with bias, activation and residual, and the loss of a linear layer whose logits are never all there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .core import call, floats, in_chunks, need, same, wide
from .formulas import ACTIVATIONS, PLAIN, known, slope_of, value_of
from .losses import checked_targets, losses_and_gradient, numbers_of, sums_of

# ---- products ----------------------------------------------------------------------------------------


def _linear(g, x, weight, *others, kind, biased, sums=False, mapped=None):
    """`activation(x @ weight + bias) + residual`, and what the activation is of where `sums` asks for it."""
    bias, residual = others[:biased], others[biased:]
    x, each, letters, bias = _of_product(g, mapped, x, weight, bias)
    if mapped is not None and residual:
        residual = g.spread(mapped[-1:], *residual)
    y = g.contract(f"{letters}k,{each}kn->{letters}n", x, weight)
    if not (bias or kind or residual):
        return y
    z = g.map("a + b", g.wide(y), g.wide(bias[0])) if bias else g.wide(y)
    value = value_of(g, ACTIVATIONS[kind], z) if kind else z
    if residual:
        value = g.map("a + b", value, g.wide(residual[0]))
    value = g.cast(value, g.types[x])
    return (value, g.cast(z, g.types[x])) if sums else value


def _of_product(g, mapped, x, weight, bias):
    """`x` and the bias where some have a batch axis in front, the weight's letter for it, and the letters of the axes of `x`."""
    if mapped is None:
        return x, "", "abcdefgh"[: len(g.shapes[x]) - 1], bias
    rank = len(g.shapes[x]) - mapped[0]
    (x,) = g.spread(mapped[:1], x)
    bias = tuple(g.lifted(b, m, rank) for b, m in zip(bias, mapped[2:]))
    return x, "z" if mapped[1] else "", "zabcdefgh"[:rank], bias


def _linear_gradient(g, x, weight, *rest, kind, biased, mapped=None):
    """Of operand, weight and bias. `rest`: the bias, what the activation was of, the gradient of the result."""
    bias, sums, dy = rest[:biased], rest[biased:-1], rest[-1]
    x, each, letters, _ = _of_product(g, mapped, x, weight, ())
    batch = "" if mapped is None else "z"
    if mapped is not None:
        dy, *sums = g.spread((mapped[-1], *mapped[2 + biased : -1]), dy, *sums)
    d = g.wide(dy)
    if kind:
        d = g.map("a * b", d, slope_of(g, ACTIVATIONS[kind], sums[0]))
    narrow = g.cast(d, g.types[x])
    dx = g.contract(f"{letters}n,{each}kn->{letters}k", narrow, weight)
    dweight = g.contract(f"{letters}k,{letters}n->{batch}kn", x, narrow)
    dbias = (g.cast(g.sum(d, range(len(batch), len(letters))), g.types[bias[0]]),) if biased else ()
    return (dx, dweight, *dbias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _linear_of(x, weight, bias, residual, kind, precision):
    return call(_linear, x, weight, *bias, *residual, kind=kind, biased=len(bias), precision=precision)[0]


def _linear_forward(x, weight, bias, residual, kind, precision):
    sums = kind is not None
    y, *z = call(_linear, x, weight, *bias, *residual, kind=kind, biased=len(bias), sums=sums, precision=precision)
    return y, (x, weight, bias, z, len(residual))


def _linear_backward(kind, precision, saved, dy):
    x, weight, bias, z, residuals = saved
    found = call(_linear_gradient, x, weight, *bias, *z, dy, kind=kind, biased=len(bias), precision=precision)
    return found[0], found[1], tuple(found[2:]), (dy,) * residuals


_linear_of.defvjp(_linear_forward, _linear_backward)


def _product(x, weight, bias):
    x, weight = floats(x=x, weight=weight)
    need(weight.ndim == 2 and x.ndim >= 2, f"x has shape {x.shape} and weight {weight.shape}; they must be [..., k] and [k, n]")
    need(x.shape[-1] == weight.shape[0], f"x has shape {x.shape} and weight {weight.shape}: the last axis of x is the first of weight")
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}; they must have one type")
    if bias is not None:
        (bias,) = floats(bias=bias)
        need(bias.shape == weight.shape[1:], f"bias has shape {bias.shape}; it must be {weight.shape[1:]}, the last axis of weight")
    return x, weight, bias


def linear(x, weight, bias=None, activation: str | None = None, precision: str = "f32", residual=None):
    """`activation(x @ weight + bias) + residual` as one kernel. `x`: `[..., k]`, `weight`: `[k, n]`, `bias`: `[n]`.

    `precision`: what products of f32 may be computed in ("f32", "tf32", "f16", "bf16"). Where a gradient is asked for, the sums before the
    activation are stored beside the result. A product of f64 is XLA's.
    """
    known(activation)
    need(precision in PRECISIONS, f"precision is {precision!r}; it must be one of {PRECISIONS}")
    x, weight, bias = _product(x, weight, bias)
    if residual is not None:
        (residual,) = floats(residual=residual)
        shape = (*x.shape[:-1], weight.shape[1])
        need(residual.shape == shape, f"residual has shape {residual.shape}; it must be {shape}, as the result")
        residual = residual.astype(x.dtype)
    if x.dtype == jnp.float64:
        # On GPUs there is no kernel for products of doubles.
        z = jnp.matmul(x, weight, precision="highest")
        z = z if bias is None else z + bias
        value = PLAIN[activation](z) if activation else z
        return value if residual is None else value + residual
    others = [() if t is None else (t,) for t in (bias, residual)]
    return _linear_of(*same(x, weight, *others), activation, precision)


PRECISIONS = ("f32", "tf32", "f16", "bf16")

# ---- losses ------------------------------------------------------------------------------------------

# Logits of a chunk, at most: half a gigabyte of 16-bit numbers.
CHUNK = 1 << 28
# So many chunks are added up in the type of the arrays: each addition rounds once.
FEW_CHUNKS = 4


def _logits(x, weight, bias):
    z = x @ weight
    return z if bias is None else z + bias.astype(z.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _total_of(x, weight, bias, targets, scale, numbers, rows):
    """The sum of the losses, times `scale`."""
    b = bias[0] if bias else None

    def step(total, x, targets):
        return total + sums_of(_logits(x, weight, b), targets, numbers), []

    total, _ = in_chunks(step, jnp.zeros((), wide(x.dtype)), rows, x, targets)
    return total * scale


def _total_forward(x, weight, bias, targets, scale, numbers, rows):
    b, dtype = bias[0] if bias else None, wide(x.dtype)
    # Half has no room for small gradients: there they are divided at the end.
    late = x.dtype == jnp.float16
    each = jnp.ones((), dtype) if late else scale
    chunks = -(-x.shape[0] // rows)
    kept = weight.dtype if chunks <= FEW_CHUNKS else wide(weight.dtype)

    def step(carried, x, targets):
        total, dw, db = carried
        loss, dz = losses_and_gradient(_logits(x, weight, b), targets, jnp.broadcast_to(each, targets.shape), numbers)
        dw = dw + (x.T @ dz).astype(dw.dtype)
        db = [d + dz.sum(0, dtype=dtype) for d in db]
        return (total + loss.sum(), dw, db), [dz @ weight.T]

    begin = jnp.zeros((), dtype), jnp.zeros(weight.shape, kept), [jnp.zeros(b.shape, dtype)] if bias else []
    (total, dw, db), found = in_chunks(step, begin, rows, x, targets)
    dx = found[0] if found else jnp.zeros_like(x)
    last = scale if late else jnp.ones((), dtype)
    dx, dw = (dx * last.astype(dx.dtype)) if late else dx, ((dw * last) if late else dw).astype(weight.dtype)
    return total * scale, (dx, dw, tuple((d * last).astype(v.dtype) for d, v in zip(db, bias)), scale)


def _total_backward(numbers, rows, saved, dtotal):
    dx, dw, db, scale = saved
    dx, dw, *db = ((d.astype(dtotal.dtype) * dtotal).astype(d.dtype) for d in (dx, dw, *db))
    return dx, dw, tuple(db), None, jnp.zeros_like(scale)


_total_of.defvjp(_total_forward, _total_backward)


def linear_cross_entropy(
    x,
    weight,
    targets,
    bias=None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    rows: int | None = None,
):
    """`cross_entropy(x @ weight + bias, targets)` without ever storing all logits.

    `x`: `[..., k]`, `weight`: `[k, n]`, integer `targets`: `[...]`, `bias`: `[n]`. Rows are taken in chunks of `rows` (by default as many as
    make 256 Mi logits at most); loss and gradients of a chunk are computed together, so that in training each product is done once.
    `reduction` is "mean" or "sum". The products are XLA's, in the precision that JAX is set to.
    """
    need(reduction in ("mean", "sum"), f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
    x = jnp.asarray(x)
    need(x.ndim >= 1, "x has no axes; it must be [..., k]")
    lead = x.shape[:-1]
    x, weight, bias = _product(x.reshape(-1, x.shape[-1]), weight, bias)
    targets = checked_targets(targets, lead, "x").reshape(-1)
    need(weight.shape[1] > 0, f"weight has shape {weight.shape}: rows of no logits")
    if rows is None:
        # Chunks of one size, or nearly.
        most = max(256, CHUNK // weight.shape[1])
        rows = -(-x.shape[0] // -(-x.shape[0] // most)) if x.shape[0] else 1
    need(rows >= 1, f"rows is {rows}; it must be at least 1")
    numbers = numbers_of(ignore_index, label_smoothing, z_loss, softcap)
    dtype = wide(x.dtype)
    scale = jnp.ones((), dtype)
    if reduction == "mean":
        scale = 1 / (targets != ignore_index).sum().astype(dtype)
    operands = same(x, weight, () if bias is None else (bias,), targets, scale)
    return _total_of(*operands, numbers, int(rows))


__all__ = ["linear", "linear_cross_entropy"]
