"""How an operator that Rust has put into PyTorch's dispatcher gets its Python half.

Rust (crates/torch-ops) registers schemas and the kernels for CPU and CUDA. Here each operator gets

* `fake`: shapes and types of its results, for `torch.compile`, `torch.export` and the meta device;
* `composed`: the same from PyTorch's operators. It is what tests compare with, what runs under the transforms of `torch.func` and
  forward derivatives, and on the CPU where the wheel has no compiler for it (built without LLVM);
* its derivative, whose formula calls other operators of the pack.

An operator with a derivative exists twice: `tilewright::name` has it, `tilewright::name.inference` is the same kernel without. The
public functions call the second where nothing asks for a gradient, since PyTorch runs derivatives that are registered from
Python in Python, in every call.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
from torch.autograd import forward_ad as _forward

from .. import _native
from . import _triton

_native.register_operators()

# Kernels that Python adds; they stay for as long as this exists.
_CPU = torch.library.Library("tilewright", "IMPL")


def _open_direct() -> None:
    """Lets calls in eager mode go past the dispatcher where that does nothing (crates/python/src/direct.rs); without PyTorch's functions for
    it none does.
    """
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not _native.direct_open(
        capsule, [torch.Tensor, torch.nn.Parameter], torch.Tensor.is_neg, vars(_forward)
    ):
        return
    with torch._C._DisableTorchDispatch():
        matters = _native.direct_state()
    states = [_native.direct_state()]
    with torch.inference_mode():
        states.append(_native.direct_state())
    for device in ("cpu", "cuda"):
        before = torch.is_autocast_enabled(device)
        torch.set_autocast_enabled(device, not before)
        try:
            states.append(_native.direct_state())
        finally:
            torch.set_autocast_enabled(device, before)
    # What is read is what it is taken for: nothing by default, and something where the dispatcher is told to behave differently.
    if states[0] == [0, 0] and matters not in (None, [0, 0]) and None not in states:
        _native.direct_allow(states)


_open_direct()

_below_autograd = torch._C._AutoDispatchBelowAutograd
_transformed = torch._C._are_functorch_transforms_active
_compiling = torch.compiler.is_compiling
# The same where Dynamo reads this text; it costs nothing otherwise.
traced = torch.compiler.is_dynamo_compiling


def recorded() -> bool:
    """Whether `torch.jit.trace` is at work. It names operators without their overloads, and takes the first form for each."""
    # Not all versions of Dynamo can read the question.
    return not traced() and torch._C._is_tracing()


def elsewhere() -> bool:
    """Whether one of `torch.func`'s transforms or a forward derivative is at work. Kernels know nothing of either, and would lose
    tangents without a word: PyTorch's operators run then (`composed`)."""
    return _forward._current_level >= 0 or _transformed()


_functorch = torch._C._functorch


def batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for several: under `vmap`, and where gradients are asked for in batches (`is_grads_batched`)."""
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def eager(*tensors: torch.Tensor | None) -> bool:
    """Whether plain tensors are computed with at once: nothing is traced, compiled, or seen by a mode."""
    plain = all(t is None or type(t) is torch.Tensor or type(t) is torch.nn.Parameter for t in tensors)
    return plain and not _compiling() and not torch._C._len_torch_dispatch_stack()


@torch._disable_dynamo
def _untraced(function: Callable, *args: Any) -> Any:
    return function(*args)


class Pair:
    """An operator with a derivative: called, it takes the form that this call needs."""

    def __init__(
        self,
        name: str,
        kept: int | None,
        direct: Callable | None,
        now: Callable,
        triton: type[torch.autograd.Function],
        composed: Callable,
    ):
        packet = getattr(torch.ops.tilewright, name)
        self.name = name
        self.kept = kept
        self.default = packet.default
        self.traced = packet.inference
        # The function behind the overload: calling that costs half a microsecond less. Graphs that are traced need the overload.
        self.inference = packet.inference._op
        self.direct = direct
        self._triton = triton
        self.now = now
        self.composed = composed

    def by(self, impl: str) -> Callable:
        """The operator as `impl` says: "cuda" for our own kernels, "triton" for Triton's."""
        chosen(impl)
        return self.triton if impl == "triton" else self

    def triton(self, *args: Any) -> Any:
        """The operator as Triton kernels, with its derivative. `torch.compile` breaks its graph here."""
        return _untraced(self._run_triton, *args) if _compiling() else self._run_triton(*args)

    def _run_triton(self, *args: Any) -> Any:
        refuse_transforms(self.name)
        _triton.demand(self.name, [a for a in _flat(args) if isinstance(a, torch.Tensor)])
        if torch.is_grad_enabled() and _asks_for_gradients(args):
            tensors, put = _apart(args)
            return _part(self._triton.apply(*tensors, put), self.kept)
        with _triton.entered():
            return self.inference(*args)

    def __call__(self, *args: Any) -> Any:
        if not traced():
            results = self.now(*args)
            if results is not None:
                return results
        if elsewhere():
            return _part(self.composed(*args), self.kept)
        if recorded():
            return _part(self.default(*args), self.kept)
        if torch.is_grad_enabled() and _asks_for_gradients(args):
            if self.direct is None or _compiling():
                return _part(self.default(*args), self.kept)
            return _part(self.direct(*args), self.kept)
        return self.traced(*args) if _compiling() else self.inference(*args)


def _nobody(*args: Any) -> None:
    """In place of a direct call where there is none."""


def direct(name: str, kept: int | None = None, alike: int = 0) -> Any:
    """An operator past the dispatcher, for calls in eager mode: its `call` gives `None` where the dispatcher has to be asked."""
    return _native.Direct.of(name, kept, alike)


def with_derivative(operator: Callable, now: Callable, save: Callable, gradient: Callable) -> Callable:
    """The same derivative without the dispatcher's way through Python: for calls in eager mode that have no lists of tensors.

    `operator` has no derivative of its own.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            results = now(*args)
            if results is None:
                results = operator(*args)
            # `set_materialize_grads` and nothing else.
            ctx.materialize_grads = False
            save(ctx, args, results)
            return results

        backward = staticmethod(gradient)

    # What `Direct.apply` ends in; before, it looks for functions' transforms, which the caller has done.
    return super(torch.autograd.Function, Direct).apply


def by_triton(form: type[torch.autograd.Function], *args: Any) -> Any:
    """`triton_form`'s function on its arguments."""
    return _untraced(form.apply, *args) if _compiling() else form.apply(*args)


def refuse_transforms(name: str) -> None:
    """For Triton's kernels, which stand for themselves."""
    if elsewhere():
        raise NotImplementedError(f"{name}: impl='triton' has no torch.func and no forward derivatives; leave impl out")


def chosen(impl: str) -> None:
    """Refuses an `impl` that there is not."""
    if impl not in ("cuda", "triton"):
        raise ValueError(f"impl is {impl!r}; it must be 'cuda' or 'triton'")


def _apart(args: tuple) -> tuple[list, Callable]:
    """The values of arguments, those of lists as well, and what puts such values together again."""
    sizes = [len(a) if isinstance(a, (list, tuple)) else None for a in args]

    def put(values):
        values = iter(values)
        return tuple(next(values) if n is None else [next(values) for _ in range(n)] for n in sizes)

    return list(_flat(args)), put


def triton_form(operator: Callable, setup_context: Callable, gradient: Callable) -> type[torch.autograd.Function]:
    """An operator and its derivative, both as Triton kernels. Its last argument puts the others together (`_apart`)."""

    class Triton(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            # What puts the values together comes last, so that places in `needs_input_grad` are theirs.
            *values, put = values
            args = put(values)
            with _below_autograd(), _triton.entered():
                results = operator(*args)
            setup_context(ctx, args, results)
            return results

        @staticmethod
        def backward(ctx, *grads):
            with _triton.entered():
                return *_flat(gradient(ctx, *grads)), None

    return Triton


def _asks_for_gradients(args: tuple) -> bool:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and any(isinstance(t, torch.Tensor) and t.requires_grad for t in arg):
            return True
    return False


def _part(results: Any, kept: int | None) -> Any:
    """The first results, or all."""
    if kept is None or isinstance(results, torch.Tensor):
        return results
    return results[0] if kept == 1 else tuple(results[:kept])


def single(name: str, fake: Callable, composed: Callable) -> Any:
    """An operator without a derivative of its own, such as the gradient of another."""
    _add(name, fake, composed)
    packet, _, overload = name.partition(".")
    overloaded = getattr(getattr(torch.ops.tilewright, packet), overload or "default")
    way = direct(name)
    if way is None:
        return overloaded
    now = way.call

    def called(*args):
        if not traced():
            results = now(*args)
            if results is not None:
                return results
        return overloaded(*args)

    called.operator, called.now = overloaded, way
    return called


def single_by_triton(name: str, operator: Callable, *args: Any) -> Any:
    """An operator without a derivative as Triton kernels. `torch.compile` breaks its graph here."""

    def run(*args):
        refuse_transforms(name)
        _triton.demand(name, [a for a in _flat(args) if isinstance(a, torch.Tensor)])
        with _triton.entered():
            return operator(*args)

    return _untraced(run, *args) if _compiling() else run(*args)


def fast(operator: Any) -> Callable:
    """An operator's function for calls in eager mode; graphs that are traced need the operator itself."""
    return getattr(operator, "operator", operator)._op


def pair(
    name: str,
    fake: Callable,
    composed: Callable,
    save: Callable,
    gradient: Callable,
    kept: int | None = None,
    twice: bool = False,
    alike: int = 0,
    apply: Callable | None = None,
) -> Pair:
    """An operator with a derivative. Without gradients it has its first `kept` results only.

    `save(ctx, inputs, output)` keeps what `gradient(ctx, *grads)` needs, which gives one gradient per input. A second
    derivative is refused, unless `twice` says that the gradient is made of operators that have one. `apply` is what calls in eager mode
    with a gradient end in, if not `with_derivative`.
    """
    _add(name, fake, composed)
    _add(name + ".inference", lambda *args: _part(fake(*args), kept), lambda *args: _part(composed(*args), kept))
    packet = getattr(torch.ops.tilewright, name)
    # All results without the derivative.
    raw = packet.inference
    if "raw" in packet.overloads():
        _add(name + ".raw", fake, composed)
        raw = packet.raw
    elif kept is not None:
        raise RuntimeError(f"tilewright::{name} has no overload without a derivative")

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    def backward(ctx, *grads):
        if not twice and torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in _flat(grads)):
            raise NotImplementedError(
                f"tilewright::{name} has no second derivative; use PyTorch's own operator where one is needed"
            )
        return gradient(ctx, *grads)

    torch.library.register_autograd(f"tilewright::{name}", backward, setup_context=setup_context)
    lists = any("List" in str(a.type) for a in packet.default._schema.arguments)
    if lists:
        return Pair(name, kept, None, _nobody, triton_form(packet.default, setup_context, backward), composed)
    # Without gradients a kernel that leaves results out, where there is one.
    plain = direct(name + ".inference", kept, alike) or direct(name, kept, alike)
    apply = apply or with_derivative(raw._op, direct(name).call, save, gradient if twice else backward)
    plain.differentiated(apply)
    return Pair(name, kept, apply, plain.call, triton_form(packet.default, setup_context, backward), composed)


def _add(name: str, fake: Callable, composed: Callable) -> None:
    torch.library.register_fake(f"tilewright::{name}", _on_one_device(name, fake))
    if not _native.HAS_CPU:
        _CPU.impl(name, composed, "CPU")


def _on_one_device(name: str, fake: Callable) -> Callable:
    """`fake` where all tensors are without values or none is: PyTorch asks it as soon as one is on the meta device."""

    @functools.wraps(fake)
    def checked(*args):
        tensors = [t for t in _flat(args) if isinstance(t, torch.Tensor)]
        if len({t.device.type == "meta" for t in tensors}) > 1:
            raise RuntimeError(f"tilewright::{name}: tensors lie on {', '.join(sorted({str(t.device) for t in tensors}))}; they must be on one device")
        return fake(*args)

    return checked


def again(function: Callable, tensors: tuple, grads: tuple) -> tuple:
    """The gradients of `function(*tensors)` by PyTorch's own operators, which can be differentiated once more: for
    `create_graph=True`. A tensor that has no gradient gives None.
    """
    # Each is seen as one of its own, since one may have been computed from another.
    held = [t.view_as(t) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in tensors]
    with torch.enable_grad():
        results = function(*held)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(r, g) for r, g in zip(results, grads) if g is not None and r.requires_grad]
    wanted = [i for i, t in enumerate(held) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(tensors)
    found = torch.autograd.grad(
        [r for r, _ in pairs], [held[i] for i in wanted], [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    by_place = dict(zip(wanted, found))
    return tuple(by_place.get(i) for i in range(len(tensors)))


def _flat(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """All in the type of autocast, as PyTorch's own products take them; as they are outside of it."""
    given = (x, *others)
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return given
    to = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or not t.is_floating_point() else t.to(to) for t in given)


def promoted(x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the type that PyTorch gives their sum (mixed types occur under autocast)."""
    if x.dtype == other.dtype:
        return x, other
    dtype = torch.result_type(x, other)
    return x.to(dtype), other.to(dtype)
