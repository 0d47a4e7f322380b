"""Formulas of arrays: any activation, gated ones, and their symbolic derivatives, one kernel each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .. import _native
from .core import call, floats, need, same


@functools.lru_cache(maxsize=4096)
def _known(text: str, double: bool) -> tuple[str, list[str]]:
    """A formula and its derivatives, in the language of graphs."""
    return _native.formula_and_slopes(text, double)


def _parts(g, xs, text):
    func, slopes = _known(text, g.types[xs[0]] == "f64")
    return func, slopes, [g.wide(x) for x in xs]


def value_of(g, text, *xs):
    """A formula of values, as wide as they are computed."""
    func, _, wide = _parts(g, xs, text)
    return g.op(f"map {func}", *wide)


def slope_of(g, text, *xs, by: int = 0):
    """Its derivative by one of them."""
    _, slopes, wide = _parts(g, xs, text)
    return g.op(f"map {slopes[by]}", *wide)


def _formula(g, *xs, text, mapped=None):
    xs = g.spread(mapped, *xs)
    return g.cast(value_of(g, text, *xs), g.types[xs[0]])


def _formula_gradient(g, *xs, text, mapped=None):
    *xs, dy = g.spread(mapped, *xs)
    d = g.wide(dy)
    slopes = [g.map("a * b", d, slope_of(g, text, *xs, by=i)) for i in range(len(xs))]
    return tuple(g.cast(slope, g.types[x]) for slope, x in zip(slopes, xs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _formula_of(xs, text):
    return call(_formula, *xs, text=text)[0]


_formula_of.defvjp(
    lambda xs, text: (call(_formula, *xs, text=text)[0], xs),
    lambda text, xs, dy: (tuple(call(_formula_gradient, *xs, dy, text=text)),),
)


class Formula:
    """A formula as a function of arrays; `elementwise` makes one."""

    def __init__(self, text: str):
        self.text = text
        self.variables = tuple(_native.formula_variables(text))
        need(self.variables, f"the formula {text!r} has no variables")

    def __call__(self, *arrays):
        if len(arrays) != len(self.variables):
            raise TypeError(f"{len(arrays)} arrays for the variables {self.variables} of {self.text!r}")
        arrays = floats(**dict(zip(self.variables, arrays)))
        first = arrays[0]
        if any(a.shape != first.shape or a.dtype != first.dtype for a in arrays):
            dtype, shapes = jnp.result_type(*arrays), [a.shape for a in arrays]
            try:
                shape = jnp.broadcast_shapes(*shapes)
            except ValueError:
                raise ValueError(f"arrays of shapes {shapes} do not broadcast, for {self.text!r}") from None
            arrays = [jnp.broadcast_to(a, shape).astype(dtype) for a in arrays]
        return _formula_of(same(*arrays), self.text)

    def __repr__(self) -> str:
        return f"tilewright.jax.elementwise({self.text!r})"


def elementwise(formula: str) -> Formula:
    """A function of arrays from a formula: `elementwise("x * sigmoid(1.702 * x)")`.

    Its arguments are the formula's variables in the order in which they first occur; they broadcast. It is computed in f32 (f64 for f64) in
    one pass; its derivative is found symbolically, and is one pass, too. Raises ValueError for a text that is no formula.
    """
    return Formula(formula)


# The activations by name, in their variable.
ACTIVATIONS = {
    "relu": "max(x, 0)",
    "silu": "x * sigmoid(x)",
    "gelu": "0.5 * x * (1 + erf(x * 0.7071067811865476))",
    # (1 + tanh(u)) / 2 is sigmoid(2 u), which loses no digits below zero, and whose derivative costs less.
    "gelu_tanh": "x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))",
    "tanh": "tanh(x)",
    "sigmoid": "sigmoid(x)",
}
PLAIN = {name: Formula(text) for name, text in ACTIVATIONS.items()}
_GATED = {name: Formula(f"({text}) * y") for name, text in ACTIVATIONS.items()}


def known(activation: str | None) -> None:
    need(activation is None or activation in ACTIVATIONS, f"there is no activation {activation!r}; there are {sorted(ACTIVATIONS)}")


def silu(x):
    """`x * sigmoid(x)`. As `jax.nn.silu`."""
    return PLAIN["silu"](x)


def gelu(x, approximate: bool = True):
    """GELU, by `tanh` (as `jax.nn.gelu` unless told otherwise) or exact."""
    return PLAIN["gelu_tanh" if approximate else "gelu"](x)


def swiglu(gate, up):
    """`silu(gate) * up` (Shazeer, 2020)."""
    return glu(gate, up, "silu")


def geglu(gate, up, approximate: bool = False):
    """`gelu(gate) * up` (Shazeer, 2020)."""
    return glu(gate, up, "gelu_tanh" if approximate else "gelu")


def glu(gate, up, activation: str = "sigmoid"):
    """`activation(gate) * up`; activations: those of `ACTIVATIONS`."""
    known(activation)
    need(jnp.shape(gate) == jnp.shape(up), f"gate has shape {jnp.shape(gate)} and up {jnp.shape(up)}; they must have one")
    gate, up = floats(gate=gate, up=up)
    return _GATED[activation](gate, up.astype(gate.dtype))


__all__ = ["ACTIVATIONS", "Formula", "elementwise", "geglu", "gelu", "glu", "silu", "swiglu"]
