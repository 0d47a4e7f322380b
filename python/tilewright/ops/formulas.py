"""Formulas on tensors: any activation, gated ones, and their symbolic derivatives, one kernel each."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Callable, Iterator

import torch

from .. import _native
from ._define import _compiling, again, chosen, direct, elsewhere, fast, pair, recorded, single, traced, wide, with_derivative


def _on_tensors(function):
    """`function`, which takes numbers for tensors as well."""

    def run(*values):
        like = next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()), None)
        return function(*(v if isinstance(v, torch.Tensor) or like is None else like.new_tensor(v) for v in values))

    return run


# Names of our formula language, for `_forward_composed`.
_NAMES = {"pi": math.pi, "e": math.e, "inf": math.inf, "nan": math.nan}
for _name in (
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt",
    "tanh", "sigmoid", "erf", "erfc", "floor", "ceil", "trunc", "abs", "sign", "relu", "pow", "where", "atan2", "hypot", "clamp",
):  # fmt: skip
    _NAMES[_name] = _on_tensors(getattr(torch, _name))
for _name in ("relu6", "silu", "gelu", "softplus", "logsigmoid", "softsign", "mish", "hardtanh", "hardsigmoid", "hardswish", "selu"):
    _NAMES[_name] = getattr(torch.nn.functional, _name)
_NAMES["max"], _NAMES["min"] = _on_tensors(torch.maximum), _on_tensors(torch.minimum)
_NAMES["leaky_relu"] = _on_tensors(lambda x, a: torch.where(x > 0, x, a * x))
_NAMES["elu"] = _on_tensors(lambda x, a: torch.where(x > 0, x, a * torch.expm1(x)))
_NAMES["gelu_tanh"] = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
_NAMES["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)


_KNOWN: dict[str, tuple[str, ...]] = {}
_EVALUATORS: dict[str, Callable] = {}


@torch.compiler.assume_constant_result
def _variables(formula: str) -> tuple[str, ...]:
    """The formula's variables. Inside of a compiled function this is a constant."""
    if formula not in _KNOWN:
        _KNOWN[formula] = tuple(_native.formula_variables(formula))
    return _KNOWN[formula]


@contextlib.contextmanager
def _differentiating() -> Iterator[None]:
    """PyTorch's autograd, which it leaves out inside of an operator's kernel."""
    keys = torch._C.DispatchKey
    with contextlib.ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def _forward_composed(xs, formula):
    """The formula by Python's own evaluation: for formulas that both languages read alike."""
    if formula.startswith("d") and ": " in formula:
        mark, _, rest = formula.partition(": ")
        return _backward_composed(torch.ones_like(torch.broadcast_tensors(*xs)[0]), xs, rest)[int(mark[1:])]
    c = wide(xs[0].dtype)
    try:
        y = _evaluator(formula)(*(x.to(c) for x in xs))
    except (NameError, SyntaxError, TypeError, ZeroDivisionError) as error:
        raise NotImplementedError(
            f"the formula {formula!r} is not one that PyTorch's operators compute ({error}): torch.func, forward derivatives and "
            "wheels without a compiler for processors need one of arithmetic and common functions"
        ) from error
    return torch.as_tensor(y, dtype=xs[0].dtype, device=xs[0].device).expand(torch.broadcast_shapes(*(x.shape for x in xs)))


def _evaluator(formula: str) -> Callable:
    """The formula as a function of Python's; what it cannot read is a SyntaxError."""
    if formula not in _EVALUATORS:
        text = f"lambda {', '.join(_variables(formula))}: {formula.strip()}"
        _EVALUATORS[formula] = eval(compile(text, "<formula>", "eval"), {"__builtins__": {}, "__name__": __name__, **_NAMES})  # noqa: S307
    return _EVALUATORS[formula]


def _backward_composed(dy, xs, formula):
    with _differentiating():
        held = [x.detach().requires_grad_() for x in xs]
        y = _forward_composed(held, formula)
        grads = torch.autograd.grad(y, held, dy, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads)]


_map_backward = single(
    "map_backward",
    fake=lambda dy, xs, formula: [x.new_empty(x.shape) for x in xs],
    composed=_backward_composed,
)
_map1_backward = single(
    "map1_backward",
    fake=lambda dy, x, formula: x.new_empty(x.shape),
    composed=lambda dy, x, formula: _backward_composed(dy, [x], formula)[0],
)
_map2_backward = single(
    "map2_backward",
    fake=lambda dy, x, y, formula: (x.new_empty(x.shape), y.new_empty(y.shape)),
    composed=lambda dy, x, y, formula: tuple(_backward_composed(dy, [x, y], formula)),
)


def _slopes(dy, xs, formula):
    """The gradients in operators that have a derivative: `d0: f` is the derivative of the formula `f` by its first variable."""
    if not _native.HAS_CPU and dy.device.type == "cpu":
        # Inside of an operator's kernel PyTorch differentiates nothing, so the derivative cannot be one.
        return list(again(lambda *xs: _forward_composed(xs, formula), tuple(xs), (dy,)))
    if len(xs) == 1:
        return [dy * _map1(xs[0], f"d0: {formula}")]
    if len(xs) == 2:
        return [dy * _map2(*xs, f"d{i}: {formula}") for i in range(2)]
    return [dy * _map(list(xs), f"d{i}: {formula}") for i in range(len(xs))]


def _save_list(ctx, inputs, output):
    xs, ctx.formula = inputs
    ctx.save_for_backward(*xs)


def _save(ctx, inputs, output):
    *xs, ctx.formula = inputs
    ctx.save_for_backward(*xs)


def _list_gradient(ctx, dy):
    if dy is None:
        return [None] * len(ctx.saved_tensors), None
    if torch.is_grad_enabled():
        return _slopes(dy, ctx.saved_tensors, ctx.formula), None
    return _map_backward(dy, list(ctx.saved_tensors), ctx.formula), None


def _one_gradient(ctx, dy):
    if dy is not None and torch.is_grad_enabled():
        return *_slopes(dy, ctx.saved_tensors, ctx.formula), None
    return None if dy is None else _map1_backward(dy, *ctx.saved_tensors, ctx.formula), None


def _two_gradients(ctx, dy):
    if dy is None:
        return None, None, None
    if torch.is_grad_enabled():
        return *_slopes(dy, ctx.saved_tensors, ctx.formula), None
    return *_map2_backward(dy, *ctx.saved_tensors, ctx.formula), None


_map = pair(
    "map",
    fake=lambda xs, formula: xs[0].new_empty(xs[0].shape),
    composed=_forward_composed,
    save=_save_list,
    gradient=_list_gradient,
    twice=True,
)
_map1 = pair(
    "map1",
    fake=lambda x, formula: x.new_empty(x.shape),
    composed=lambda x, formula: _forward_composed([x], formula),
    save=_save,
    gradient=_one_gradient,
    twice=True,
)
_map2 = pair(
    "map2",
    fake=lambda x, y, formula: x.new_empty(x.shape),
    composed=lambda x, y, formula: _forward_composed([x, y], formula),
    save=_save,
    gradient=_two_gradients,
    twice=True,
)


# Eager calls name a formula by its number in this process; graphs that are traced have its text.
def _composed_numbered(*args):
    *xs, number = args
    return _forward_composed(xs, _TEXTS[number])


_TEXTS: dict[int, str] = {}
_numbered1 = single("map1.numbered", fake=lambda x, number: x.new_empty(x.shape), composed=_composed_numbered)
_numbered2 = single("map2.numbered", fake=lambda x, y, number: x.new_empty(x.shape), composed=_composed_numbered)


def _save_numbered(ctx, inputs, output):
    *xs, number = inputs
    ctx.formula = _TEXTS[number]
    ctx.save_for_backward(*xs)


_one, _two = direct("map1.numbered"), direct("map2.numbered", alike=2)
_now1, _now2 = _one.call, _two.call
_one.differentiated(with_derivative(fast(_numbered1), _now1, _save_numbered, _one_gradient))
_two.differentiated(with_derivative(fast(_numbered2), _now2, _save_numbered, _two_gradients))


@torch.compiler.assume_constant_result
def _number(text: str) -> int:
    number = _native.formula_number(text)
    _TEXTS[number] = text
    return number


def _kept() -> bool:
    """Whether somebody writes calls down, perhaps for another process, in which a formula has another number."""
    return _compiling() or recorded() or torch._C._len_torch_dispatch_stack() > 0


class Formula:
    """A formula as a function of tensors; `elementwise` makes one."""

    def __init__(self, text: str, impl: str = "cuda"):
        chosen(impl)
        self.text = text
        self.impl = impl
        self.variables = _variables(text)
        if not self.variables:
            raise ValueError(f"the formula {text!r} has no variables")
        self.number = _number(text)
        with contextlib.suppress(SyntaxError):
            _evaluator(text)

    def __call__(self, *tensors: torch.Tensor, impl: str | None = None) -> torch.Tensor:
        if impl is None:
            impl = self.impl
        if impl == "cuda" and len(tensors) == len(self.variables) and not traced():
            y = None
            if len(tensors) == 1:
                y = _now1(tensors[0], self.number)
            elif len(tensors) == 2:
                y = _now2(tensors[0], tensors[1], self.number)
            if y is not None:
                return y
        if len(tensors) != len(self.variables):
            raise TypeError(f"{len(tensors)} tensors for the variables {self.variables} of {self.text!r}")
        for place, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{self.variables[place]} of {self.text!r} is a {type(tensor).__name__}; it must be a tensor")
        if len(tensors) == 1:
            x = tensors[0]
            if impl != "cuda":
                return _map1.by(impl)(x, self.text)
            if _kept() or (x.requires_grad and torch.is_grad_enabled()) or elsewhere():
                return _map1(x, self.text)
            return _numbered1(x, self.number)
        first = tensors[0]
        if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors):
            dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
            tensors = tuple(t.to(dtype) for t in torch.broadcast_tensors(*tensors))
        if len(tensors) == 2:
            x, y = tensors
            if impl != "cuda":
                return _map2.by(impl)(x, y, self.text)
            if _kept() or ((x.requires_grad or y.requires_grad) and torch.is_grad_enabled()) or elsewhere():
                return _map2(x, y, self.text)
            return _numbered2(x, y, self.number)
        return _map.by(impl)(list(tensors), self.text)

    def __reduce__(self) -> tuple:
        # Its number is this process's.
        return Formula, (self.text, self.impl)

    def __repr__(self) -> str:
        return f"tilewright.ops.elementwise({self.text!r})"


def elementwise(formula: str, impl: str = "cuda") -> Formula:
    """A function of tensors from a formula: `elementwise("x * sigmoid(1.702 * x)")`.

    Its arguments are the formula's variables in the order in which they first occur. It is computed in float32 (float64 for
    float64) in one pass; its derivative is found symbolically, and is one pass, too. Raises ValueError for a text that
    is no formula.
    """
    return Formula(formula, impl)


_GELU = elementwise("0.5 * x * (1.0 + erf(x * 0.7071067811865476))")
# (1 + tanh(u)) / 2 is sigmoid(2 u), which loses no digits below zero, and whose derivative costs less.
_GELU_TANH = elementwise("x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))")
_SILU = elementwise("x * sigmoid(x)")
_SWIGLU = elementwise("x * sigmoid(x) * y")
_GEGLU = elementwise("0.5 * x * (1.0 + erf(x * 0.7071067811865476)) * y")
_GEGLU_TANH = elementwise("x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) * y")


_gelu_number, _silu_number = _GELU.number, _SILU.number
_swiglu_number, _geglu_number = _SWIGLU.number, _GEGLU.number


def gelu(x: torch.Tensor, approximate: str = "none", impl: str = "cuda") -> torch.Tensor:
    """GELU of each element, exact (`"none"`) or by `"tanh"`, as `torch.nn.functional.gelu`. The result has the shape and type of `x`."""
    if impl == "cuda" and approximate == "none" and not traced():
        y = _now1(x, _gelu_number)
        if y is not None:
            return y
    return _kind(approximate, _GELU, _GELU_TANH)(x, impl=impl)


def silu(x: torch.Tensor, impl: str = "cuda") -> torch.Tensor:
    """`x * sigmoid(x)` of each element, in the shape and type of `x`."""
    if impl == "cuda" and not traced():
        y = _now1(x, _silu_number)
        if y is not None:
            return y
    return _SILU(x, impl=impl)


def swiglu(gate: torch.Tensor, up: torch.Tensor, impl: str = "cuda") -> torch.Tensor:
    """`gate * sigmoid(gate) * up` of tensors that broadcast, in one pass."""
    if impl == "cuda" and not traced():
        y = _now2(gate, up, _swiglu_number)
        if y is not None:
            return y
    return _SWIGLU(gate, up, impl=impl)


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none", impl: str = "cuda") -> torch.Tensor:
    """`gelu(gate) * up` of tensors that broadcast, in one pass."""
    if impl == "cuda" and approximate == "none" and not traced():
        y = _now2(gate, up, _geglu_number)
        if y is not None:
            return y
    return _kind(approximate, _GEGLU, _GEGLU_TANH)(gate, up, impl=impl)


def _kind(approximate, exact, tanh):
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; it must be 'none' or 'tanh'")
    return tanh if approximate == "tanh" else exact
