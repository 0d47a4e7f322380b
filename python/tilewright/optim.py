"""Optimizers whose step over all parameters of a group is one kernel.

    from tilewright.optim import AdamW, Lion
    optimizer = AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, max_norm=1.0)

They are `torch.optim.Optimizer`s: groups, schedulers and state dicts as usual; a state dict of `torch.optim.AdamW` loads into
`AdamW` and the other way round. Parameters of 16 bits get a float32 copy (a master) that is what is updated. A step can be
recorded in a CUDA graph after one that ran eagerly: the number of the step is on the device, the rate is where it is a tensor.
It needs PyTorch 2.10 or later.
"""

from __future__ import annotations

import contextlib
import math
import sys
from operator import is_
from typing import Any, Callable

from . import _torch

_torch("optim")

import torch  # noqa: E402

from .ops import _define  # noqa: E402

_PACK = torch.ops.tilewright


def _nothing(*_: Any) -> None:
    return None


def _norm_composed(grads, max_norm):
    wide = _define.wide(grads[0].dtype)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in grads])).float()
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _adamw_composed(
    params, grads, first, second, masters, maxima, step, lr_tensor, factor, found, lr, beta1, beta2, eps, decay, maximize
):  # fmt: skip
    if found is not None and found.item() != 0:
        return
    rate = lr if lr_tensor is None else lr_tensor.item()
    t = step.item()
    size, root = rate / -math.expm1(t * math.log(beta1)), math.sqrt(-math.expm1(t * math.log(beta2)))
    for i, (p, g, m, v) in enumerate(zip(params, grads, first, second)):
        w = masters[i] if masters else p
        g = _scaled(g.to(m.dtype), factor, maximize)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if maxima:
            v = torch.maximum(maxima[i], v, out=maxima[i])
        w.copy_(w.to(m.dtype) * (1 - rate * decay) - size * (m / (v.sqrt() / root + eps)))
        if masters:
            p.copy_(w)


def _lion_composed(params, grads, first, masters, lr_tensor, factor, found, lr, beta1, beta2, decay, maximize):
    if found is not None and found.item() != 0:
        return
    rate = lr if lr_tensor is None else lr_tensor.item()
    for i, (p, g, m) in enumerate(zip(params, grads, first)):
        w = masters[i] if masters else p
        g = _scaled(g.to(m.dtype), factor, maximize)
        sign = (beta1 * m + (1 - beta1) * g).sign()
        m.mul_(beta2).add_(g, alpha=1 - beta2)
        w.copy_(w.to(m.dtype) * (1 - rate * decay) - rate * sign)
        if masters:
            p.copy_(w)


def _scaled(g, factor, maximize):
    g = g if factor is None else g * factor
    return -g if maximize else g


def _norm_fake(grads, max_norm):
    made = [grads[0].new_empty((), dtype=torch.float32) for _ in range(2)]
    return made[0], made[1]


_define.single("adamw_", fake=_nothing, composed=_adamw_composed)
_define.single("lion_", fake=_nothing, composed=_lion_composed)
_define.single("gradient_norm", fake=_norm_fake, composed=_norm_composed)


def _is_part(*tensors: torch.Tensor) -> bool:
    """Whether a tensor among them is spread over processes (`DTensor`, as of FSDP)."""
    spread = sys.modules.get("torch.distributed.tensor")
    return spread is not None and any(isinstance(t, spread.DTensor) for t in tensors)


def _own(tensors: list[torch.Tensor], like: list[torch.Tensor]) -> list[torch.Tensor]:
    """This process's parts of spread tensors, as `like` is spread."""
    return [
        (t if t.placements == p.placements else t.redistribute(p.device_mesh, p.placements)).to_local() for t, p in zip(tensors, like)
    ]


def _norm_of_parts(grads: list[torch.Tensor], max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm over all processes."""
    meshes: dict[Any, list[torch.Tensor]] = {}
    for grad in grads:
        meshes.setdefault(grad.device_mesh if _is_part(grad) else None, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(part) for part in meshes.values()]
    whole = [n.full_tensor() if _is_part(n) else n for n in norms]
    norm = torch.linalg.vector_norm(torch.stack([n.float().to(whole[0].device) for n in whole]))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    raise TypeError(f"{name} is {value!r}; it must be a number")


def gradient_norm(grads: list[torch.Tensor], max_norm: float = math.inf) -> tuple[torch.Tensor, torch.Tensor]:
    """The Euclidean norm of all gradients together, and `min(1, max_norm / (norm + 1e-6))`: numbers on their device, in float32.

    A norm that is not finite gives a factor that is 0 or NaN. Each sum has one order.
    """
    if isinstance(grads, torch.Tensor):
        raise TypeError("gradient_norm takes a list of tensors, and not a tensor")
    if not grads:
        raise ValueError("the norm of no gradients")
    if _is_part(*grads):
        return _norm_of_parts(grads, max_norm)
    lists: dict[tuple, list[torch.Tensor]] = {}
    for grad in grads:
        lists.setdefault((grad.dtype, grad.device), []).append(grad)
    if len(lists) == 1:
        return _PACK.gradient_norm(grads, max_norm)
    first = grads[0].device
    parts = [_PACK.gradient_norm(part, math.inf)[0].to(first, non_blocking=True) for part in lists.values()]
    norm = torch.linalg.vector_norm(torch.stack(parts))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


class _Fused(torch.optim.Optimizer):
    """What both have in common: lists of tensors per step, state, masters, clipping, loading."""

    _moments: tuple[str, ...] = ()
    _counts = False
    # `torch.amp.GradScaler` then sets `grad_scale` and `found_inf` for the time of a step, and waits for neither.
    _step_supports_amp_scaling = True

    def __init__(self, params, defaults: dict[str, Any], max_norm: float | None, master: bool):
        if max_norm is not None and not _number("max_norm", max_norm) > 0:
            raise ValueError(f"max_norm is {max_norm}; it must be a number above 0, or None")
        self.max_norm = max_norm
        self.grad_norm: torch.Tensor | None = None
        self._last: tuple[list, list] | None = None
        # How often parameters with a master had been written to when it was made or updated last, by their identity.
        self._written: dict[int, int] = {}
        self._master = master
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0.0 <= _number("a beta", b) < 1.0 for b in betas):
            raise ValueError(f"betas are {betas}; they must be two numbers in 0..1")
        if isinstance(group["lr"], torch.Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr is a tensor of shape {list(group['lr'].shape)}; it must have one element")
        for name in ("lr", "eps", "weight_decay"):
            if name in group and not _number(name, group[name]) >= 0.0:
                raise ValueError(f"{name} is {group[name]}; it must be at least 0")
        if group.get("differentiable"):
            raise NotImplementedError("differentiable steps are not there; use torch.optim.AdamW")
        for p in group["params"]:
            if p.layout is not torch.strided:
                raise TypeError(f"a parameter is {p.layout}; it must be strided. torch.optim.SparseAdam takes sparse ones")
            if p.is_complex() or not p.is_floating_point():
                raise TypeError(f"a parameter is {p.dtype}; it must be float32, bfloat16, float16 or float64")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm, "_master": self._master}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("max_norm", None)
        self.__dict__.setdefault("grad_norm", None)
        self.__dict__.setdefault("_master", True)
        self._last, self._written = None, {}

    def _wide_copy(self, p: torch.Tensor) -> bool:
        return self._master and p.dtype in (torch.bfloat16, torch.float16)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments that a group's parameters have."""
        return (*self._moments, "max_exp_avg_sq") if group.get("amsgrad") else self._moments

    def _begin(self, p: torch.Tensor, state: dict[str, Any], steps: dict, group: dict[str, Any]) -> None:
        """The state of a parameter that has its first gradient. Parameters that begin together share the number of steps."""
        if self._counts:
            if p.device not in steps:
                steps[p.device] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["step"] = steps[p.device]
        for name in self._names(group):
            state[name] = torch.zeros_like(p, dtype=_define.wide(p.dtype), memory_format=torch.preserve_format)
        if self._wide_copy(p):
            state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
            self._written[id(p)] = p._version

    def _follow(self, call: list) -> None:
        """Parameters that were written to since their last step (loaded, clamped): masters become what was written, where that is not their
        own rounding."""
        versions = [p._version for p in call[0]]
        if versions == call[7]:
            return
        for p, master, version in zip(call[0], call[3], versions):
            if self._written.get(id(p)) != version:
                master.copy_(torch.where(master.to(p.dtype) == p, master, p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = self._known_calls() or self._new_calls()
        if not calls:
            return loss
        for call in calls:
            if call[3]:
                self._follow(call)
        grads_all = calls[0][1] if len(calls) == 1 else [g for call in calls for g in call[1]]
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        factor = None if scale is None else scale.reshape(()).double().reciprocal().float()
        if self.max_norm is not None:
            self.grad_norm, clip = gradient_norm(grads_all, self.max_norm)
            if factor is None:
                factor = clip
            else:
                # The gradients are still too large by the scale.
                factor = factor.to(self.grad_norm.device, non_blocking=True)
                self.grad_norm = self.grad_norm * factor
                factor = (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0) * factor
        counts = {id(call[5]): call[5] for call in calls if call[5] is not None}
        if counts and found is None:
            torch._foreach_add_(list(counts.values()), 1.0)
        for count in counts.values() if found is not None else ():
            count.add_((found.reshape(()) == 0).to(count.device, non_blocking=True))
        for call in calls:
            device = call[0][0].device
            rate = call[4]["lr"]
            on_device = isinstance(rate, torch.Tensor) and rate.device == device and device.type != "cpu"
            if isinstance(rate, torch.Tensor) and not on_device:
                rate = rate.item()
            f = factor if factor is None or factor.device == device else factor.to(device, non_blocking=True)
            skip = found if found is None else found.reshape(()).to(device, torch.float32, non_blocking=True)
            parts = call
            if _is_part(call[0][0]):
                params, grads, *moments, masters = (_own(tensors, call[0]) for tensors in (*call[:2], *call[2], call[3]))
                parts = [params, grads, moments, masters, *call[4:]]
            self._launch(parts, rate if on_device else None, f, skip, 0.0 if on_device else float(rate))
            torch.autograd.graph.increment_version(call[0])
            call[1] = []  # Gradients are not kept alive.
            if call[3]:
                call[7] = [p._version for p in call[0]]
                if self._last is None:
                    self._written.update(zip(map(id, call[0]), call[7]))
        return loss

    def _new_calls(self) -> list[list]:
        """The calls of a step, one for each group, device, type and number of steps: parameters, gradients, moments, masters, group,
        number of steps, states, and how often the parameters had been written to (with masters)."""
        for call in self._last[1] if self._last is not None else ():
            self._written.update(zip(map(id, call[0]), call[7]))
        self._last = None
        steps: dict = {}
        calls: dict[tuple, list] = {}
        whole = True
        for number, group in enumerate(self.param_groups):
            absent = set()
            for p in group["params"]:
                grad = p.grad
                state = self.state[p]
                if grad is None:
                    whole = False
                    if "step" in state:
                        absent.add(id(state["step"]))
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError("sparse gradients are not supported; use torch.optim.SparseAdam")
                if not state:
                    self._begin(p, state, steps, group)
                names = self._names(group)
                if len(names) > len(self._moments) and names[-1] not in state:
                    # The group has been switched to amsgrad since.
                    state[names[-1]] = torch.zeros_like(state[names[0]])
                key = (number, p.device, p.dtype, "master" in state, id(state.get("step")), _is_part(p))
                call = calls.get(key)
                if call is None:
                    call = calls[key] = [[], [], [[] for _ in names], [], group, state.get("step"), [], []]
                call[0].append(p)
                call[1].append(grad)
                for into, name in zip(call[2], names):
                    into.append(state[name])
                if key[3]:
                    call[3].append(state["master"])
                call[6].append(state)
            if absent:
                self._part(calls, absent)
        found = list(calls.values())
        if whole:
            self._last = [(group, list(group["params"])) for group in self.param_groups], found
        return found

    def _known_calls(self) -> list[list] | None:
        """The calls of the last step with the gradients of this one, if nothing else has changed."""
        if self._last is None:
            return None
        groups, calls = self._last
        if len(groups) != len(self.param_groups):
            return None
        for (group, params), now in zip(groups, self.param_groups):
            if group is not now or len(params) != len(now["params"]) or not all(map(is_, params, now["params"])):
                return None
        for call in calls:
            grads = [p.grad for p in call[0]]
            states = call[6]
            if any(g is None for g in grads):
                return None
            names = self._names(call[4])
            if len(names) != len(call[2]):
                return None
            for name, moments in zip(names, call[2]):
                if not all(map(is_, [s.get(name) for s in states], moments)):
                    return None
            if call[3] and not all(map(is_, [s.get("master") for s in states], call[3])):
                return None
            if call[5] is not None and not all(s["step"] is call[5] for s in states):
                return None
            if not all(map(is_, [self.state.get(p) for p in call[0]], states)):
                return None
            call[1] = grads
        return calls

    def _part(self, calls: dict[tuple, list], absent: set[int]) -> None:
        """Gives parameters a number of steps of their own where others that share it make no step."""
        for call in calls.values():
            if call[5] is not None and id(call[5]) in absent:
                own = call[5].clone()
                call[5] = own
                for state in call[6]:
                    state["step"] = own

    def _launch(
        self, call: list, rate: torch.Tensor | None, factor: torch.Tensor | None, found: torch.Tensor | None, value: float
    ) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's, which wants a number of steps for each parameter."""
        whole = super().state_dict()
        whole["state"] = {
            index: {**state, "step": state["step"].clone()} if isinstance(state, dict) and "step" in state else state
            for index, state in whole["state"].items()
        }
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of PyTorch's. Moments and masters keep their width."""
        needed = (*self._moments, "step") if self._counts else self._moments
        for index, state in state_dict["state"].items():
            missing = [name for name in needed if state and name not in state]
            if missing:
                raise ValueError(f"parameter {index} has no {' and no '.join(missing)}: this is no state of {type(self).__name__}")
        for number, group in enumerate(state_dict["param_groups"]):
            missing = [name for name in ("lr", "betas", "weight_decay") if name not in group]
            if missing:
                raise ValueError(f"group {number} has no {' and no '.join(missing)}: this is no state of {type(self).__name__}")
        super().load_state_dict(state_dict)
        self._last, self._written = None, {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        steps: dict[tuple, torch.Tensor] = {}
        for index, (p, group) in zip(saved, params):
            given = state_dict["state"].get(index)
            if not given:
                continue
            state = self.state[p]
            for name in self._names(group):
                if name in given or name in self._moments:
                    state[name] = self._like(p, given[name], _define.wide(p.dtype))
            if self._wide_copy(p):
                state["master"] = self._like(p, given.get("master", p), torch.float32)
                self._written[id(p)] = p._version
            else:
                state.pop("master", None)
            if self._counts:
                count = float(given["step"])
                # Parameters with the same number share it again.
                if (p.device, count) not in steps:
                    steps[p.device, count] = torch.full((), count, dtype=torch.float32, device=p.device)
                state["step"] = steps[p.device, count]

    @staticmethod
    def _like(p: torch.Tensor, given: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy that lies in memory as the parameter does."""
        return torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).copy_(given.detach())


class AdamW(_Fused):
    """AdamW with decoupled weight decay, as `torch.optim.AdamW`, also with `amsgrad`.

    `lr` may be a tensor of one element; on the parameters' device it is read there, so that a recorded step follows it. `max_norm` clips
    the gradients of all groups together to this norm, within the step (gradients stay as they are); the norm is then in
    `grad_norm`. With `master`, parameters of 16 bits are updated in float32 copies; without, in float32 from what they are.
    Under `torch.amp.GradScaler` the step divides by the scale itself and does nothing where a gradient is not finite, without waiting for the device.
    `foreach`, `capturable` and `fused` are taken for the sake of compatibility: a step is always fused and can always be recorded.
    """

    _moments = ("exp_avg", "exp_avg_sq")
    _counts = True

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        master: bool = True,
    ):
        if differentiable:
            raise NotImplementedError("differentiable steps are not there; use torch.optim.AdamW")
        # The keys of PyTorch's groups, so that it can load them: `fused` there means that steps are counted on the device.
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=None,
            capturable=capturable, differentiable=False, fused=True, decoupled_weight_decay=True,
        )  # fmt: skip
        super().__init__(params, defaults, max_norm, master)

    def _launch(self, call, rate, factor, found, value):
        params, grads, (first, second, *most), masters, group, step, *_ = call
        beta1, beta2 = group["betas"]
        _PACK.adamw_(
            params, grads, first, second, masters, most[0] if most else [], step, rate, factor, found, value, float(beta1), float(beta2), group["eps"],
            group["weight_decay"], group["maximize"],
        )  # fmt: skip


class Lion(_Fused):
    """Lion (Chen et al., "Symbolic discovery of optimization algorithms", 2023): steps of one size in the direction of a moment's sign.

    `max_norm` and `master` as for `AdamW`. Its state is one moment, `exp_avg`.
    """

    _moments = ("exp_avg",)

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        master: bool = True,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize), max_norm, master)

    def _launch(self, call, rate, factor, found, value):
        params, grads, (first,), masters, group, *_ = call
        beta1, beta2 = group["betas"]
        _PACK.lion_(
            params, grads, first, masters, rate, factor, found, value, float(beta1), float(beta2), group["weight_decay"], group["maximize"]
        )


__all__ = ["AdamW", "Lion", "gradient_norm"]
