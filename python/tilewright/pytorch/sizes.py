"""Sizes: PyTorch's symbolic integers in the words of our graphs.

    s0*s1 + 1        a sum of products of symbols
    floor(s0/2)      FloorDiv, CleanDiv
    s0 % 4           Mod of sizes, which are not negative
    max(a, b)        Max and Min, two at a time

What has no such form raises `Unsupported`; the operator that wants it runs in PyTorch.
"""

from __future__ import annotations

import sympy
import torch
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo

LARGEST = 2**62

_FLOOR = tuple(getattr(functions, name) for name in ("FloorDiv", "CleanDiv") if hasattr(functions, name))
_MODULO = tuple(getattr(functions, name) for name in ("Mod", "PythonMod") if hasattr(functions, name))


class Unsupported(Exception):
    """Something that our graphs cannot say; it runs in PyTorch."""


def expression(size) -> sympy.Expr:
    """The expression of a size."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


def text(size) -> str:
    """A size (an int, a SymInt or an expression) as text."""
    if isinstance(size, int):
        return str(size)
    return _text(size if isinstance(size, sympy.Basic) else expression(size))


def texts(sizes) -> list[str]:
    """Sizes as text."""
    return [text(size) for size in sizes]


def _text(e) -> str:
    if e.is_Integer:
        return str(int(e))
    if e.is_Symbol:
        return e.name
    if e.is_Add:
        return "(" + " + ".join(map(_text, e.args)) + ")"
    if e.is_Mul:
        return "*".join(map(_text, e.args))
    if e.is_Pow and e.exp.is_Integer and 0 < int(e.exp) < 8:
        return "*".join([_text(e.base)] * int(e.exp))
    if isinstance(e, _FLOOR):
        return f"floor(({_text(e.args[0])})/({_text(e.args[1])}))"
    if isinstance(e, _MODULO):
        return f"(({_text(e.args[0])}) % ({_text(e.args[1])}))"
    for kind, name in ((functions.Max, "max"), (sympy.Max, "max"), (functions.Min, "min"), (sympy.Min, "min")):
        if isinstance(e, kind):
            first, *rest = map(_text, e.args)
            for other in rest:
                first = f"{name}({first}, {other})"
            return first
    raise Unsupported(f"the size {e}")


def symbols(size) -> set[str]:
    """Names of the symbols in a size."""
    return {s.name for s in expression(size).free_symbols} if isinstance(size, torch.SymInt) else set()


def ranges(graph: torch.fx.Graph) -> dict[str, tuple[int, int | None]]:
    """Each symbol of a graph's values with its inclusive bounds."""
    found: dict[str, tuple[int, int | None]] = {}
    for node in graph.nodes:
        for value in tensors_and_sizes(node.meta.get("val")):
            sizes = list(value.shape) + list(value.stride()) if isinstance(value, torch.Tensor) else [value]
            for size in sizes:
                if not isinstance(size, torch.SymInt):
                    continue
                known = size.node.shape_env.var_to_range
                for symbol in size.node.expr.free_symbols:
                    found[symbol.name] = bounds(known[symbol]) if symbol in known else (0, None)
    return found


def bounds(interval) -> tuple[int, int | None]:
    """The ends of an interval of PyTorch's; sizes are not negative."""
    return max(_bound(interval.lower, 0), 0), _bound(interval.upper, None)


def _bound(value, default):
    if value in (int_oo, -int_oo, sympy.oo, -sympy.oo) or abs(int(value)) > LARGEST:
        return default
    return int(value)


def tensors_and_sizes(value) -> list:
    """The tensors and symbolic sizes in a node's value."""
    if isinstance(value, (torch.Tensor, torch.SymInt)):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in tensors_and_sizes(item)]
    return []


def order_in_memory(tensor: torch.Tensor) -> list[int] | None:
    """Axes from the one with the largest stride, when a tensor in that order of axes is contiguous."""
    shape = [expression(s) for s in tensor.shape]
    strides = [expression(s) for s in tensor.stride()]
    if tensor.layout is not torch.strided:
        return None
    contiguous = range(len(shape))
    if _is_contiguous(shape, strides, contiguous):
        return list(contiguous)
    hint = {s: sympy.Integer(64 + 2 * i) for i, s in enumerate(sorted(set().union(*(e.free_symbols for e in strides), set()), key=str))}
    sized = [int(e.subs(hint)) if e.subs(hint).is_Integer else 0 for e in strides]
    order = sorted(contiguous, key=lambda axis: (-sized[axis], axis))
    return order if _is_contiguous(shape, strides, order) else None


def _is_contiguous(shape, strides, order) -> bool:
    expected = sympy.Integer(1)
    for axis in reversed(list(order)):
        if shape[axis] == 1:
            continue
        if strides[axis] != expected and sympy.expand(strides[axis] - expected) != 0:
            return False
        expected = expected * shape[axis]
    return True
