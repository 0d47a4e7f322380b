"""Writes our graphs from PyTorch's operators: `Writer`, and the table of rules that it follows.

A rule is a function of the writer, the FX node and the node's arguments, registered with `@rule(aten.relu.default)`.
Tensors arrive as `Value`s, symbolic sizes as `SymInt`s, the rest as it is; a rule returns a `Value`, or a tuple
with `None` for results that nobody uses. What a rule cannot say it refuses with `Unsupported`, and the operator
runs in PyTorch. The type of each result is checked against what PyTorch says it is.

To add an operator: a rule in `elementwise.py`, `shapes.py`, `sums.py`, `layers.py`,
`pools.py`, `resampling.py`, `scattering.py`, `searching.py` or `attentions.py`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any, Callable

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from .. import _native
from . import sizes
from .sizes import Unsupported

NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}

RULES: dict[Any, Callable] = {}

# Multiplications of a product that may be a sum.
SUMS_MAX = 2**22


def rule(*targets):
    """Registers a rule for operators."""

    def register(function):
        for target in targets:
            RULES[target] = function
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the graph: its number in the builder, its type in PyTorch's words, its sizes as text."""

    number: int
    dtype: torch.dtype
    shape: tuple

    @property
    def rank(self) -> int:
        return len(self.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """Our name for an element type."""
    if dtype not in NAMES:
        raise Unsupported(f"tensors of {dtype}")
    return NAMES[dtype]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which PyTorch computes on this one."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def type_text(tensor: torch.Tensor, order=None) -> str:
    """The type of a tensor, with its axes in the given order."""
    shape = sizes.texts(tensor.shape)
    if order is not None:
        shape = [shape[axis] for axis in order]
    return f"{dtype_name(tensor.dtype)}[{','.join(shape)}]"


def literal(value, dtype: torch.dtype) -> str:
    """A number in the text of an elementwise function."""
    name = dtype_name(dtype)
    if dtype is torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        if isinstance(value, float) and not value.is_integer():
            raise Unsupported(f"the number {value} as {dtype}")
        return f"{name}({int(value)})"
    value = float(value)
    if math.isnan(value):
        return f"{name}(nan)"
    if math.isinf(value):
        return f"{name}({'-' if value < 0 else ''}inf)"
    # Rounded here to the type that PyTorch rounds to, so that the text holds a number of that type. (While PyTorch traces, a tensor of one
    # number takes it a millisecond.)
    if dtype is torch.float32:
        value = ctypes.c_float(value).value
    elif dtype is not torch.float64:
        value = torch.tensor(value, dtype=dtype).double().item()
    return f"{name}({value!r})"


class Script:
    """A builder that writes down what it is told, so that the graph can be built again (`built`)."""

    def __init__(self, name: str):
        self.name = name
        self.calls: list[tuple] = []
        self.builder = _native.Builder(name)

    def symbol(self, *args):
        return self._told("symbol", *args)

    def input(self, *args):
        return self._told("input", *args)

    def scalar(self, *args):
        return self._told("scalar", *args)

    def op(self, *args):
        return self._told("op", *args)

    def output(self, *args):
        return self._told("output", *args)

    def constant(self, name: str, kind: str, memory: torch.Tensor):
        """Known data, contiguous."""
        self.calls.append(("constant", name, kind, memory))
        return self.builder.constant(name, kind, memory.data_ptr(), memory.numel() * memory.element_size(), memory)

    def _told(self, what: str, *args):
        self.calls.append((what, *args))
        return getattr(self.builder, what)(*args)

    def type_of(self, number: int):
        return self.builder.type_of(number)

    def has_type(self, number: int, text: str) -> bool:
        return self.builder.has_type(number, text)

    @staticmethod
    def built(name: str, calls: list[tuple], known: dict[int, torch.Tensor] | None = None) -> "Script":
        """The same again, with the inputs of these numbers as known data."""
        script, inputs = Script(name), 0
        for what, *args in calls:
            if what == "input":
                inputs += 1
                if known and inputs - 1 in known:
                    script.constant(*args, known[inputs - 1])
                    continue
            getattr(script, what)(*args)
        return script


class Writer:
    """A graph under construction."""

    def __init__(self, name: str, symbols: dict[str, tuple[int, int | None]], device: str = "cpu"):
        self.device = device
        self.builder = Script(name)
        self.origin = ""
        # Whether small products are sums, see `Group`.
        self.sums = False
        # Inputs that hold positions, with the size that they must stay below, and a number beside that is allowed:
        # looked at before each run. Without a size: divisors, which must not be 0.
        self.positions: list[tuple[int, Any, int | None]] = []
        self._sources: dict[int, int] = {}
        # Values that are another one in a wider type: maps read that one.
        self._narrow: dict[int, Value] = {}
        # Those of the nodes that are written already.
        self.values: dict[fx.Node, Any] = {}
        for symbol, (low, high) in sorted(symbols.items()):
            self.builder.symbol(symbol, low, high)

    def input(self, name: str, tensor: torch.Tensor, order=None) -> Value:
        """An input of a tensor's type; `order` is that of its axes in memory."""
        number = self.builder.input(name, type_text(tensor, order))
        return self._in_logical_order(Value(number, tensor.dtype, tuple(tensor.shape)), tensor, order)

    def constant(self, name: str, like: torch.Tensor, data: torch.Tensor, order=None) -> Value:
        """Known data, of the type of `like`."""
        data = data.detach()
        memory = data if order is None else data.permute(order)
        if not memory.is_contiguous():
            memory = memory.contiguous()
        number = self.builder.constant(name, type_text(like, order), memory)
        return self._in_logical_order(Value(number, like.dtype, tuple(like.shape)), like, order)

    def table(self, name: str, make: Callable[[], torch.Tensor]) -> Value:
        """Known data that a rule computes, also while PyTorch traces with tensors that have none."""
        with _disable_current_modes():
            data = make()
            return self.constant(name, data, data)

    def lookup(self, positions: Value, size, ignored: int | None = None) -> None:
        """Positions must be in `0..size` or `ignored`, as PyTorch demands; checked where they are an argument."""
        if positions.number in self._sources and isinstance(size, int):
            self.positions.append((self._sources[positions.number], size, ignored))

    def divisor(self, value: Value) -> None:
        """Integers that divide: PyTorch refuses zeros, so they must be an argument, which is looked at before each run."""
        if value.number not in self._sources:
            raise Unsupported("integer division by something computed")
        self.positions.append((self._sources[value.number], None, None))

    def followed(self, value: Value, view: Value) -> Value:
        """A view holds the same positions as what it is a view of."""
        if value.number in self._sources:
            self._sources[view.number] = self._sources[value.number]
        return view

    def argument(self, number: int, value: Value) -> None:
        """Says that a value is argument `number`."""
        self._sources[value.number] = number

    def _in_logical_order(self, value: Value, tensor: torch.Tensor, order) -> Value:
        if order is None or list(order) == list(range(len(order))):
            return value
        inverse = [list(order).index(axis) for axis in range(len(order))]
        (number,) = self.builder.op(f"permute [{','.join(map(str, inverse))}]", [value.number])
        return Value(number, tensor.dtype, tuple(tensor.shape))

    def in_memory_order(self, value: Value, order) -> Value:
        """Axes reordered for an output whose axes lie in that order in memory."""
        if list(order) == list(range(len(order))):
            return value
        return self.permute(value, order)

    # ---- what rules write with -----------------------------------------------------------------

    def op(self, text: str, *inputs: Value, dtype: torch.dtype | None = None, result: str | None = None) -> Value:
        """A node with one result. Its type is read back from the graph."""
        (number,) = self.builder.op(text, [v.number for v in inputs], result, self.origin)
        _, shape = self.builder.type_of(number)
        return Value(number, dtype or inputs[0].dtype, tuple(shape))

    def map(self, text: str, *inputs: Value, dtype: torch.dtype) -> Value:
        """An elementwise function `{a} + {b}` of its operands, in their own types."""
        names = "abcdefgh"[: len(inputs)]
        words = {n: n for n in names}
        for name, value in zip(names, inputs):
            if value.number in self._narrow:
                words[name] = f"{dtype_name(value.dtype)}({name})"
        body = text.format(**words)
        inputs = [self._narrow.get(value.number, value) for value in inputs]
        return self.op(f"map {{ {', '.join(names)} -> {body} }}", *inputs, dtype=dtype)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Another element type."""
        if value.dtype == dtype:
            return value
        wider = self.map(f"{dtype_name(dtype)}({{a}})", value, dtype=dtype)
        if value.dtype in (torch.float16, torch.bfloat16) and dtype is torch.float32:
            self._narrow[wider.number] = value
        return wider

    def narrow(self, value: Value) -> Value:
        """The value that this one is in a wider type, which takes less memory; most are no such thing."""
        return self._narrow.get(value.number, value)

    def number(self, value, dtype: torch.dtype) -> Value:
        """A scalar: a number, or a size known when the program runs."""
        if isinstance(value, torch.SymInt):
            if value.node.expr.is_Integer:
                value = int(value.node.expr)
            else:
                size = self.op(f"dims [{sizes.text(value)}]", dtype=torch.int64)
                return self.cast(self.reshape(size, []), dtype)
        if not isinstance(value, (int, float, bool)):
            raise Unsupported(f"the number {value!r}")
        exact = int(value) if not dtype.is_floating_point and not isinstance(value, float) else None
        number = self.builder.scalar(dtype_name(dtype), float(value), exact)
        return Value(number, dtype, ())

    def reshape(self, value: Value, shape) -> Value:
        """Another shape."""
        wanted = sizes.texts(shape) if not all(isinstance(s, str) for s in shape) else list(shape)
        return self.op(f"reshape [{','.join(wanted)}]", value)

    def expand(self, value: Value, shape) -> Value:
        """Broadcast to a shape."""
        return self.op(f"expand [{','.join(sizes.texts(shape))}]", value)

    def permute(self, value: Value, order) -> Value:
        """Axes reordered."""
        return self.op(f"permute [{','.join(map(str, order))}]", value)

    def slice(self, value: Value, axis: int, start, length, step: int = 1) -> Value:
        """Part of an axis; `start` and `length` are sizes or text."""
        words = [s if isinstance(s, str) else sizes.text(s) for s in (start, length)]
        lens = [s if isinstance(s, str) else sizes.text(s) for s in value.shape]
        starts, steps = ["0"] * len(lens), ["1"] * len(lens)
        starts[axis], lens[axis], steps[axis] = words[0], words[1], str(step)
        lists = (f"{name}=[{','.join(items)}]" for name, items in (("starts", starts), ("lens", lens), ("steps", steps)))
        return self.op("slice " + " ".join(lists), value)

    def reduce(self, kind: str, value: Value, axes, keep: bool) -> Value:
        """A reduction over axes."""
        axes = sorted({axis % value.rank for axis in axes}) if value.rank else []
        if not axes:
            return value
        return self.op(f"reduce {kind} axes=[{','.join(map(str, axes))}]{' keep' if keep else ''}", value)

    def contract(self, spec: str, a: Value, b: Value) -> Value:
        """An einsum of two operands of one type, summed as PyTorch sums that type."""
        if a.dtype != b.dtype:
            raise Unsupported("a product of two types")
        acc = wide(a.dtype)
        if self.sums and (found := self._summed(spec, a, b)) is not None:
            return found
        return self.op(f'contract "{spec}" acc={dtype_name(acc)}', a, b)

    def _summed(self, spec: str, a: Value, b: Value) -> Value | None:
        """A small product as a sum of products element by element; `None` where it is large, or of symbolic sizes."""
        left, result = spec.split("->")
        lengths: dict[str, int] = {}
        for letters, value in zip(left.split(","), (a, b)):
            for letter, length in zip(letters, value.shape):
                if not str(length).isdigit():
                    return None
                lengths[letter] = int(length)
        if math.prod(lengths.values()) > SUMS_MAX:
            return None
        order = result + "".join(sorted(set(lengths) - set(result)))
        spread = []
        for letters, value in zip(left.split(","), (a, b)):
            there = [letter for letter in order if letter in letters]
            turned = self.permute(value, [letters.index(letter) for letter in there])
            spread.append(self.reshape(turned, [lengths[letter] if letter in there else 1 for letter in order]))
        score = wide(a.dtype)
        each = self.map("{a} * {b}", *(self.cast(Value(v.number, a.dtype, v.shape), score) for v in spread), dtype=score)
        each = Value(each.number, score, tuple(lengths[letter] for letter in order))
        return self.cast(self.reduce("sum", each, range(len(result), len(order)), False), a.dtype)

    # ---- whole nodes ---------------------------------------------------------------------------

    def node(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """What a node computes: a `Value`, or a tuple of them. `values` holds those of its operands."""
        follow = RULES.get(node.target)
        if follow is None:
            raise Unsupported("no rule for this operator")
        self.origin, self.values = origin(node), values

        def argument(item):
            if isinstance(item, fx.Node):
                found = values.get(item)
                if found is None:
                    held = item.meta.get("val")
                    if isinstance(held, (torch.SymInt, int, float)):
                        return held
                    raise Unsupported(f"the operand {item}")
                return found
            if isinstance(item, (list, tuple)):
                return type(item)(argument(i) for i in item)
            return item

        args = [argument(a) for a in node.args]
        kwargs = {key: argument(a) for key, a in node.kwargs.items()}
        result = follow(self, node, *args, **kwargs)
        wanted = node.meta["val"]
        if isinstance(result, tuple):
            return tuple(None if r is None else self._checked(r, wanted[i]) for i, r in enumerate(result))
        return self._checked(result, wanted)

    def _checked(self, value: Value, wanted: torch.Tensor) -> Value:
        if self.builder.has_type(value.number, type_text(wanted)):
            return Value(value.number, wanted.dtype, tuple(wanted.shape))
        dtype, shape = self.builder.type_of(value.number)
        if dtype != dtype_name(wanted.dtype) or len(shape) != wanted.dim():
            raise Unsupported(f"the rule gives {dtype}{shape} where PyTorch gives {type_text(wanted)}")
        # The same sizes in other words.
        return Value(self.reshape(value, wanted.shape).number, wanted.dtype, tuple(wanted.shape))


def origin(node: fx.Node) -> str:
    """Where a node comes from, in the user's words: the module, or the operator's name."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = list(stack.values())[-1][0]
        path = path.replace("L['self'].", "").replace("L['self']", "model").replace("_modules.", "")
        return f"{path}/{node.name}".replace("\n", " ")
    return node.name


def used_results(node: fx.Node) -> set[int]:
    """Which results of a node with several are used."""
    return {user.args[1] for user in node.users if user.args and isinstance(user.args[1], int) and user.users}
