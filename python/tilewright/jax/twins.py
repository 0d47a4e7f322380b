"""What a graph computes, by JAX's own operators: for derivatives that no kernel has.

`Twin` takes the place of `Graph` (`core`): a function that writes a graph then computes it. JAX differentiates what it does,
to any order.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import types

import jax
import jax.numpy as jnp

from .core import DTYPES, NAMES, Graph, call


class Twin(Graph):
    """A graph whose values are there."""

    def __init__(self, arrays, mapped=None):
        self.batch = next((a.shape[0] for a, m in zip(arrays, mapped or ()) if m), None)
        self.types, self.shapes, self.values = {}, {}, []
        self.arguments = [self._kept(a) for a in arrays]

    def _kept(self, array) -> int:
        number = len(self.values)
        self.values.append(array)
        self.types[number], self.shapes[number] = NAMES[array.dtype.name], tuple(array.shape)
        return number

    def op(self, text: str, *inputs: int, result: str | None = None) -> int:
        kind, _, rest = text.partition(" ")
        if kind not in _OPERATORS:
            raise NotImplementedError(f"tilewright has no derivative of the operator {kind!r}")
        return self._kept(_OPERATORS[kind](rest, result, *(self.values[i] for i in inputs)))

    def inline(self, write, *values: int, **settings) -> int:
        return self._kept(call(write, *(self.values[i] for i in values), **settings)[0])

    def finish(self, *values: int):
        return [self.values[v] for v in values]


# ---- operators ---------------------------------------------------------------------------------------


def _numbers(name: str, text: str) -> list[int]:
    """The whole numbers of `name=[...]`."""
    found = re.search(rf"{name}=\[([^\]]*)\]", text)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _number(name: str, text: str) -> float:
    found = re.search(rf"{name}=(\S+)", text)
    return float(found[1])


def _softmax(text, _, x):
    return (jax.nn.log_softmax if " log" in text else jax.nn.softmax)(x, int(_number("axis", text)))


def _layer_norm(text, _, x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _number("eps", text)) * weight + bias


def _rms_norm(text, _, x, weight):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _number("eps", text)) * weight


def _reduce(text, _, x):
    kind = jnp.max if text.startswith("max") else jnp.sum
    return kind(x, tuple(_numbers("axes", text)), keepdims=text.endswith(" keep"))


def _contract(text, _, a, b):
    spec, wide = re.match(r'"([^"]*)" acc=(\S+)', text).groups()
    return jnp.einsum(spec, a, b, precision="highest", preferred_element_type=DTYPES[wide]).astype(a.dtype)


def _iota(text, result):
    name, shape = re.match(r"(\w+)\[([^\]]*)\]", result).groups()
    return jax.lax.broadcasted_iota(jnp.dtype(DTYPES[name]), [int(n) for n in shape.split(",")], int(_number("axis", text)))


def _slice(text, _, x):
    starts, lens, steps = (_numbers(name, text) for name in ("starts", "lens", "steps"))
    return x[tuple(slice(start, start + n * step, step) for start, n, step in zip(starts, lens, steps))]


def _sizes(text):
    return [int(n) for n in text.strip("[] ").split(",") if n]


def _attention(text, _, q, k, v, *mask):
    formula = text[text.index("{") : text.index("}") + 1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(t.astype(wide), q.shape[1] // k.shape[1], axis=1) for t in (k, v))
    score = computed(formula, jnp.einsum("bhqd,bhkd->bhqk", q.astype(wide), k, precision="highest"), *mask)
    if "causal" in text:
        rows, columns = score.shape[-2:]
        score = jnp.where(jnp.tril(jnp.ones((rows, columns), bool), columns - rows), score, -jnp.inf)
    # Rows that see nothing are 0.
    seen = score.max(-1, keepdims=True) > -jnp.inf
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, 0.0), -1), 0.0)
    return jnp.einsum("bhqk,bhkd->bhqd", p, v, precision="highest").astype(q.dtype)


_OPERATORS = {
    "attention": _attention,
    "concat": lambda text, _, *xs: jnp.concatenate(xs, int(_number("axis", text))),
    "contract": _contract,
    "expand": lambda text, _, x: jnp.broadcast_to(x, _sizes(text)),
    "iota": _iota,
    "layer_norm": _layer_norm,
    "map": lambda text, _, *xs: computed(text, *xs),
    "reduce": _reduce,
    "reshape": lambda text, _, x: jnp.reshape(x, _sizes(text)),
    "rms_norm": _rms_norm,
    "slice": _slice,
    "softmax": _softmax,
}


# ---- formulas ----------------------------------------------------------------------------------------


def computed(function: str, *arrays):
    """A function of the formula language, `{ a, b -> let c = a + b; c * c }`, of arrays that broadcast."""
    names, lines = _read(function)
    known = dict(_FUNCTIONS, **dict(zip(names, arrays)))
    for name, code in lines:
        known[name] = eval(code, known)  # noqa: S307
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    return jnp.broadcast_to(known[""], shape)


class _Arrays(ast.NodeTransformer):
    """Python's words for truth values, which arrays do not take."""

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        name = "_and" if isinstance(node.op, ast.And) else "_or"
        return functools.reduce(lambda a, b: _call(name, a, b), node.values)

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        return _call("_not", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        return _call("_rem", node.left, node.right) if isinstance(node.op, ast.Mod) else node


def _call(name, *args):
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


@functools.lru_cache(maxsize=4096)
def _read(function: str) -> tuple[list[str], list[tuple[str, types.CodeType]]]:
    """The names of a function's parameters, and Python's code for its lines: names, the last one none."""
    head, _, body = function.strip().removeprefix("{").removesuffix("}").partition("->")
    *lets, result = body.split(";")
    lines = []
    for line in (*lets, f"let = {result}"):
        name, _, text = line.strip().removeprefix("let").partition("=")
        text = re.sub(r"!(?!=)", " not ", text.replace("&&", " and ").replace("||", " or "))
        tree = ast.fix_missing_locations(_Arrays().visit(ast.parse(text.strip(), mode="eval")))
        lines.append((name.strip(), compile(tree, "<formula>", "eval")))
    return [name.strip() for name in head.split(",")], lines


def _typed(name):
    return lambda a: jnp.asarray(a).astype(DTYPES[name])


_FUNCTIONS = {
    "__builtins__": {}, "inf": math.inf, "nan": math.nan, "pi": math.pi,
    "_and": jnp.logical_and, "_or": jnp.logical_or, "_not": jnp.logical_not, "_rem": jnp.fmod,
    "where": jnp.where, "select": jnp.where, "min": jnp.minimum, "max": jnp.maximum, "pow": jnp.power, "mod": jnp.mod, "atan2": jnp.arctan2,
    "fma": lambda a, b, c: a * b + c,
    "sigmoid": jax.nn.sigmoid, "erf": jax.scipy.special.erf, "rsqrt": jax.lax.rsqrt,
    "asin": jnp.arcsin, "acos": jnp.arccos, "atan": jnp.arctan, "asinh": jnp.arcsinh, "acosh": jnp.arccosh, "atanh": jnp.arctanh,
    **{name: getattr(jnp, name) for name in (
        "abs", "sign", "floor", "ceil", "round", "trunc", "sqrt", "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "tan",
        "sinh", "cosh", "tanh", "isnan", "isinf",
    )},
    **{name: _typed(name) for name in DTYPES},
}  # fmt: skip
