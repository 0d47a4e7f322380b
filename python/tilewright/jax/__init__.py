"""Tilewright's kernels inside JAX: functions that work under `jit`, `grad` and `vmap`, on CPUs and CUDA devices.

    import tilewright.jax as tj

    y = tj.rms_norm(x, weight)
    loss = jax.jit(jax.grad(lambda w: tj.softmax(tj.linear(x, w)).sum()))(w)

Each function writes a graph for the shapes and types of its arguments, once; XLA carries the graph's text in a custom call
(its typed foreign function interface), and the handler compiles the text for the device of the call when it first runs.
On a GPU it runs in XLA's stream and memory. Narrow floats (f16, bf16) are computed in f32 and rounded once.

Gradients are graphs of the same kind, except that of `attention`, which JAX derives from the textbook's formula.
Under `vmap` a call stays one call: the mapped axis goes in front, as more rows, or as a batch axis of a product whose weight
is mapped too.

JAX is needed for this module, and imported nowhere else in the package.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .core import TARGET, axis_of, call, need
from .losses import cross_entropy
from .rotations import rotary

# ---- softmax ---------------------------------------------------------------------------------------


def _softmax(g, x, axis, log, mapped=None):
    axis += mapped is not None
    return g.cast(g.op(f"softmax axis={axis}{' log' if log else ''}", g.wide(x)), g.types[x])


def _softmax_gradient(g, y, dy, axis, log, mapped=None):
    y, dy = g.spread(mapped, y, dy)
    axis += mapped is not None
    p, d = g.wide(y), g.wide(dy)
    if log:
        dx = g.map("a - exp(b) * c", d, p, g.sum(d, [axis], True))
    else:
        dx = g.map("a * (b - c)", p, d, g.sum(g.map("a * b", p, d), [axis], True))
    return g.cast(dx, g.types[y])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _softmax_of(x, axis, log):
    return call(_softmax, x, axis=axis, log=log)[0]


def _softmax_forward(x, axis, log):
    y = _softmax_of(x, axis, log)
    return y, y


def _softmax_backward(axis, log, y, dy):
    return (call(_softmax_gradient, y, dy, axis=axis, log=log)[0],)


_softmax_of.defvjp(_softmax_forward, _softmax_backward)


def softmax(x, axis: int = -1):
    """`exp(x - max) / sum(exp(x - max))` along an axis, in one pass over each row. As `jax.nn.softmax`."""
    return _softmax_of(x, axis_of(axis, jnp.ndim(x)), False)


def log_softmax(x, axis: int = -1):
    """The logarithm of `softmax`, computed without taking it. As `jax.nn.log_softmax`."""
    return _softmax_of(x, axis_of(axis, jnp.ndim(x)), True)


# ---- normalisations --------------------------------------------------------------------------------


def _layer_norm(g, x, weight, bias, eps, mapped=None):
    x, weight, bias = _of_rows(g, mapped, x, weight, bias)
    axis = len(g.shapes[x]) - 1
    y = g.op(f"layer_norm axis={axis} eps={eps!r}", g.wide(x), *(g.cast(v, g.types[g.wide(x)]) for v in (weight, bias)))
    return g.cast(y, g.types[x])


def _of_rows(g, mapped, x, *vectors):
    """Rows and the vectors that go with them, where some have a batch axis in front."""
    if mapped is None:
        return x, *vectors
    rank = len(g.shapes[x]) - mapped[0]
    (x,) = g.spread(mapped[:1], x)
    return x, *(g.lifted(v, m, rank) for v, m in zip(vectors, mapped[1:]))


def _of_gradient(g, mapped, x, weight, dy):
    """As `_of_rows`, for a gradient; and the axes of rows, over which gradients of the vectors are sums."""
    if mapped is None:
        return x, weight, dy, range(len(g.shapes[x]) - 1)
    x, weight = _of_rows(g, mapped[:2], x, weight)
    (dy,) = g.spread(mapped[2:], dy)
    return x, weight, dy, range(1, len(g.shapes[x]) - 1)


def _layer_norm_gradient(g, x, weight, dy, eps, mapped=None):
    x, weight, dy, rows = _of_gradient(g, mapped, x, weight, dy)
    axis = len(g.shapes[x]) - 1
    wide = g.wide(x)
    d, scale = g.cast(dy, g.types[wide]), g.cast(weight, g.types[wide])
    centred = g.map("a - b", wide, g.mean(wide, [axis]))
    factor = g.map(f"rsqrt(a + {eps!r})", g.mean(g.map("a * a", centred), [axis]))
    normal, weighted = g.map("a * b", centred, factor), g.map("a * b", d, scale)
    along = g.mean(g.map("a * b", weighted, normal), [axis])
    dx = g.map("a * (b - c - d * e)", factor, weighted, g.mean(weighted, [axis]), normal, along)
    dweight, dbias = g.sum(g.map("a * b", d, normal), rows), g.sum(d, rows)
    return g.cast(dx, g.types[x]), g.cast(dweight, g.types[weight]), g.cast(dbias, g.types[weight])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm_of(x, weight, bias, eps):
    return call(_layer_norm, x, weight, bias, eps=eps)[0]


def _layer_norm_forward(x, weight, bias, eps):
    return _layer_norm_of(x, weight, bias, eps), (x, weight)


def _layer_norm_backward(eps, saved, dy):
    return tuple(call(_layer_norm_gradient, *saved, dy, eps=eps))


_layer_norm_of.defvjp(_layer_norm_forward, _layer_norm_backward)


def layer_norm(x, weight, bias=None, eps: float = 1e-5, residual=None):
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis (Ba et al., 2016). `weight` and `bias`: `[n]`.

    With `residual`, of the shape of `x`: of `h = x + residual`, and the result is the pair `(y, h)`, from one kernel.
    """
    bias = jnp.zeros_like(weight) if bias is None else bias
    need(jnp.shape(weight) == jnp.shape(bias) == jnp.shape(x)[-1:], "weight and bias have the last axis of x")
    bias = jnp.asarray(bias, jnp.asarray(weight).dtype)
    if residual is not None:
        return _added(x, residual, (weight, bias), float(eps))
    return _layer_norm_of(x, weight, bias, float(eps))


def _rms_norm(g, x, weight, eps, mapped=None):
    x, weight = _of_rows(g, mapped, x, weight)
    axis, wide = len(g.shapes[x]) - 1, g.wide(x)
    return g.cast(g.op(f"rms_norm axis={axis} eps={eps!r}", wide, g.cast(weight, g.types[wide])), g.types[x])


def _rms_norm_gradient(g, x, weight, dy, eps, mapped=None):
    x, weight, dy, rows = _of_gradient(g, mapped, x, weight, dy)
    axis, wide = len(g.shapes[x]) - 1, g.wide(x)
    d, scale = g.cast(dy, g.types[wide]), g.cast(weight, g.types[wide])
    factor = g.map(f"rsqrt(a + {eps!r})", g.mean(g.map("a * a", wide), [axis]))
    normal, weighted = g.map("a * b", wide, factor), g.map("a * b", d, scale)
    dx = g.map("a * (b - c * d)", factor, weighted, normal, g.mean(g.map("a * b", weighted, normal), [axis]))
    dweight = g.sum(g.map("a * b", d, normal), rows)
    return g.cast(dx, g.types[x]), g.cast(dweight, g.types[weight])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm_of(x, weight, eps):
    return call(_rms_norm, x, weight, eps=eps)[0]


def _rms_norm_forward(x, weight, eps):
    return _rms_norm_of(x, weight, eps), (x, weight)


def _rms_norm_backward(eps, saved, dy):
    return tuple(call(_rms_norm_gradient, *saved, dy, eps=eps))


_rms_norm_of.defvjp(_rms_norm_forward, _rms_norm_backward)


def rms_norm(x, weight, eps: float = 1e-6, residual=None):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (Zhang and Sennrich, 2019). `weight`: `[n]`.

    With `residual`, of the shape of `x`: of `h = x + residual`, and the result is the pair `(y, h)`, from one kernel.
    """
    need(jnp.shape(weight) == jnp.shape(x)[-1:], "weight has the last axis of x")
    if residual is not None:
        return _added(x, residual, (weight,), float(eps))
    return _rms_norm_of(x, weight, float(eps))


def _norm_of_sum(g, x, residual, *vectors, eps, mapped=None):
    """The norm of a sum, and the sum: with two vectors a layer norm."""
    if mapped is not None:
        x, residual = g.spread(mapped[:2], x, residual)
        mapped = (True, *mapped[2:])
    h = g.cast(g.map("a + b", g.wide(x), g.wide(residual)), g.types[x])
    norm = _layer_norm if len(vectors) == 2 else _rms_norm
    return norm(g, h, *vectors, eps=eps, mapped=mapped), h


def _norm_of_sum_gradient(g, h, weight, dy, dh, eps, shifts, mapped=None):
    before = mapped and mapped[:3]
    gradient = _layer_norm_gradient if shifts else _rms_norm_gradient
    dx, *others = gradient(g, h, weight, dy, eps=eps, mapped=before)
    if mapped is not None:
        (dh,) = g.spread(mapped[3:], dh)
    return g.cast(g.map("a + b", g.wide(dx), g.wide(dh)), g.types[h]), *others


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_of_sum_of(x, residual, vectors, eps):
    return tuple(call(_norm_of_sum, x, residual, *vectors, eps=eps))


def _norm_of_sum_forward(x, residual, vectors, eps):
    y, h = _norm_of_sum_of(x, residual, vectors, eps)
    return (y, h), (h, vectors)


def _norm_of_sum_backward(eps, saved, grads):
    h, vectors = saved
    dx, *others = call(_norm_of_sum_gradient, h, vectors[0], *grads, eps=eps, shifts=len(vectors) == 2)
    return dx, dx, tuple(others)


_norm_of_sum_of.defvjp(_norm_of_sum_forward, _norm_of_sum_backward)


def _added(x, residual, vectors, eps):
    need(jnp.shape(x) == jnp.shape(residual), "residual has the shape of x")
    return _norm_of_sum_of(x, jnp.asarray(residual, jnp.asarray(x).dtype), vectors, eps)


# ---- activations and products ----------------------------------------------------------------------

# Value and derivative, in the language of `tw expr`.
ACTIVATIONS = {
    "relu": ("max(a, 0)", "where(a > 0, 1, 0)"),
    "silu": ("a * sigmoid(a)", "sigmoid(a) * (1 + a * (1 - sigmoid(a)))"),
    "gelu": (
        "0.5 * a * (1 + erf(a * 0.7071067811865476))",
        "0.5 * (1 + erf(a * 0.7071067811865476)) + a * 0.3989422804014327 * exp(-0.5 * a * a)",
    ),
    "gelu_tanh": (
        "0.5 * a * (1 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))",
        "0.5 * (1 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))"
        " + 0.5 * a * (1 - tanh(0.7978845608028654 * (a + 0.044715 * a * a * a))"
        " * tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))"
        " * 0.7978845608028654 * (1 + 0.134145 * a * a)",
    ),
    "tanh": ("tanh(a)", "1 - tanh(a) * tanh(a)"),
    "sigmoid": ("sigmoid(a)", "sigmoid(a) * (1 - sigmoid(a))"),
}


def _glu(g, gate, up, kind, mapped=None):
    gate, up = g.spread(mapped, gate, up)
    value = ACTIVATIONS[kind][0]
    return g.cast(g.map(f"({value}) * b", g.wide(gate), g.wide(up)), g.types[gate])


def _glu_gradient(g, gate, up, dy, kind, mapped=None):
    gate, up, dy = g.spread(mapped, gate, up, dy)
    value, slope = ACTIVATIONS[kind]
    a, b, d = g.wide(gate), g.wide(up), g.wide(dy)
    dgate, dup = g.map(f"c * b * ({slope})", a, b, d), g.map(f"b * ({value})", a, d)
    return g.cast(dgate, g.types[gate]), g.cast(dup, g.types[up])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _glu_of(gate, up, kind):
    return call(_glu, gate, up, kind=kind)[0]


_glu_of.defvjp(
    lambda gate, up, kind: (_glu_of(gate, up, kind), (gate, up)),
    lambda kind, saved, dy: tuple(call(_glu_gradient, *saved, dy, kind=kind)),
)


def swiglu(gate, up):
    """`silu(gate) * up` (Shazeer, 2020)."""
    return glu(gate, up, "silu")


def geglu(gate, up):
    """`gelu(gate) * up` (Shazeer, 2020)."""
    return glu(gate, up, "gelu")


def glu(gate, up, activation: str = "sigmoid"):
    """`activation(gate) * up`; activations: those of `ACTIVATIONS`."""
    need(activation in ACTIVATIONS, f"no activation {activation!r}; there are {sorted(ACTIVATIONS)}")
    need(jnp.shape(gate) == jnp.shape(up), "gate and up have one shape")
    return _glu_of(gate, jnp.asarray(up, jnp.asarray(gate).dtype), activation)


def _linear(g, x, weight, *bias, kind, mapped=None):
    x, each, letters, bias = _of_product(g, mapped, x, weight, bias)
    y = g.contract(f"{letters}k,{each}kn->{letters}n", x, weight)
    operands = [g.wide(y), *(g.wide(b) for b in bias)]
    value = "a + b" if bias else "a"
    if kind:
        body = ACTIVATIONS[kind][0]
        z = g.map(value, *operands) if bias else operands[0]
        return g.cast(g.map(body, z), g.types[x])
    return g.cast(g.map(value, *operands), g.types[x]) if bias else y


def _of_product(g, mapped, x, weight, bias):
    """`x` and the bias where some have a batch axis in front, the weight's letter for it, and the letters of the axes of `x`."""
    if mapped is None:
        return x, "", "abcdefgh"[: len(g.shapes[x]) - 1], bias
    rank = len(g.shapes[x]) - mapped[0]
    (x,) = g.spread(mapped[:1], x)
    bias = tuple(g.lifted(b, m, rank) for b, m in zip(bias, mapped[2:]))
    return x, "z" if mapped[1] else "", "zabcdefgh"[:rank], bias


def _linear_gradient(g, x, weight, *rest, kind, biased, mapped=None):
    bias, dy = rest[:-1], rest[-1]
    x, each, letters, lifted = _of_product(g, mapped, x, weight, bias)
    batch = "" if mapped is None else "z"
    if mapped is not None:
        (dy,) = g.spread(mapped[-1:], dy)
    d = g.wide(dy)
    if kind:
        z = g.wide(g.contract(f"{letters}k,{each}kn->{letters}n", x, weight))
        z = g.map("a + b", z, g.wide(lifted[0])) if biased else z
        d = g.map(f"b * ({ACTIVATIONS[kind][1]})", z, d)
    narrow = g.cast(d, g.types[x])
    dx = g.contract(f"{letters}n,{each}kn->{letters}k", narrow, weight)
    dweight = g.contract(f"{letters}k,{letters}n->{batch}kn", x, narrow)
    dbias = (g.cast(g.sum(d, range(len(batch), len(letters))), g.types[bias[0]]),) if biased else ()
    return (dx, dweight, *dbias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear_of(x, weight, bias, kind, precision):
    return call(_linear, x, weight, *bias, kind=kind, precision=precision)[0]


def _linear_forward(x, weight, bias, kind, precision):
    return _linear_of(x, weight, bias, kind, precision), (x, weight, bias)


def _linear_backward(kind, precision, saved, dy):
    x, weight, bias = saved
    found = call(_linear_gradient, x, weight, *bias, dy, kind=kind, biased=bool(bias), precision=precision)
    return found[0], found[1], tuple(found[2:])


_linear_of.defvjp(_linear_forward, _linear_backward)


def linear(x, weight, bias=None, activation: str | None = None, precision: str = "f32"):
    """`activation(x @ weight + bias)` as one kernel. `x`: `[..., k]`, `weight`: `[k, n]`, `bias`: `[n]`.

    `precision`: what products of f32 may be computed in ("f32", "tf32", "f16", "bf16").
    """
    need(activation is None or activation in ACTIVATIONS, f"no activation {activation!r}; there are {sorted(ACTIVATIONS)}")
    need(jnp.ndim(weight) == 2 and jnp.ndim(x) >= 2, "x is [..., k] and weight is [k, n]")
    need(jnp.shape(x)[-1] == jnp.shape(weight)[0], "the last axis of x is the first of weight")
    need(bias is None or jnp.shape(bias) == jnp.shape(weight)[1:], "bias has the last axis of weight")
    need(jnp.asarray(x).dtype == jnp.asarray(weight).dtype, "x and weight have one type")
    return _linear_of(x, weight, () if bias is None else (bias,), activation, precision)


# ---- attention -------------------------------------------------------------------------------------


def _attention(g, q, k, v, causal, scale, mapped=None):
    if mapped is not None:
        # Two batch axes are one.
        parts = g.spread(mapped, q, k, v)
        outer, inner = g.shapes[parts[0]][:2]
        y = _attention(g, *(g.reshape(t, (outer * inner, *g.shapes[t][2:])) for t in parts), causal, scale)
        return g.reshape(y, (outer, inner, *g.shapes[y][1:]))
    score = "f64" if g.types[q] == "f64" else "f32"
    text = f"attention{' causal' if causal else ''} score={score} {{ s -> s * {score}({scale!r}) }}"
    return g.op(text, q, k, v)


def _textbook(q, k, v, causal, scale):
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    repeat = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(t, repeat, axis=1) for t in (k, v))
    score = jnp.einsum("bhqd,bhkd->bhqk", q.astype(wide), k.astype(wide), precision="highest") * scale
    if causal:
        rows, columns = score.shape[-2:]
        score = jnp.where(jnp.tril(jnp.ones((rows, columns), bool)), score, -jnp.inf)
    y = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(score, -1), v.astype(wide), precision="highest")
    return y.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention_of(q, k, v, causal, scale):
    return call(_attention, q, k, v, causal=causal, scale=scale)[0]


def _attention_backward(causal, scale, saved, dy):
    return jax.vjp(lambda q, k, v: _textbook(q, k, v, causal, scale), *saved)[1](dy)


_attention_of.defvjp(lambda q, k, v, causal, scale: (_attention_of(q, k, v, causal, scale), (q, k, v)), _attention_backward)


def attention(q, k, v, causal: bool = False, scale: float | None = None):
    """`softmax(scale * q k^T) v` without storing the scores (Dao et al., 2022). `q`: `[batch, heads, length, width]`,
    `k`, `v`: `[batch, kv heads, keys, width]`; `scale` defaults to `1 / sqrt(width)`. Causal: lengths are equal."""
    q, k, v = (jnp.asarray(t) for t in (q, k, v))
    need(q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape, "q, k and v are [batch, heads, length, width]")
    need(q.dtype == k.dtype == v.dtype, "q, k and v have one type")
    need(q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3], "q and k have one batch and one width")
    need(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, "heads are a multiple of the heads of k")
    need(not causal or q.shape[2] == k.shape[2], "causal attention has as many keys as queries")
    return _attention_of(q, k, v, bool(causal), float(q.shape[3] ** -0.5 if scale is None else scale))


__all__ = [
    "ACTIVATIONS", "TARGET", "attention", "cross_entropy", "geglu", "glu", "layer_norm", "linear", "log_softmax", "rms_norm", "rotary", "softmax", "swiglu",
]  # fmt: skip
