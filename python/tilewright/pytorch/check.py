"""`tilewright.verify`: eager PyTorch, Tilewright and float64 beside each other.

The budget of an output is Inductor's rule: an error against float64 (root of the mean square, relative to that of
the reference) of at most `FACTOR` times eager's own, or `FLOOR` units in the last place when that is more.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch.utils import _pytree as pytree

from . import backend

FACTOR = 3.0
FLOOR = 16.0


@dataclasses.dataclass
class OutputCheck:
    """One output: relative errors against float64, and ours as a multiple of the budget."""

    name: str
    dtype: str
    eager_error: float
    error: float
    ratio: float


@dataclasses.dataclass
class Verification:
    """True when all outputs are inside their budgets; `str()` is a table."""

    outputs: list[OutputCheck]

    def __bool__(self) -> bool:
        return all(o.ratio <= 1 for o in self.outputs)

    def __str__(self) -> str:
        lines = [f"{'output':<32} {'type':<10} {'eager':>10} {'tilewright':>10} {'of budget':>10}"]
        for o in self.outputs:
            verdict = "" if o.ratio <= 1 else "  FAIL"
            lines.append(f"{o.name:<32} {o.dtype:<10} {o.eager_error:>10.2e} {o.error:>10.2e} {o.ratio:>10.3f}{verdict}")
        return "\n".join(lines)


def verify(model, inputs, named, options) -> Verification:
    """See `tilewright.verify`."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify takes a torch.nn.Module, whose float64 copy it runs, not {type(model).__name__}")
    state, on_gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    runs = []
    compiled = torch.compile(copy.deepcopy(model), backend=backend.tilewright_backend, options=options)
    for run, arguments in (
        (copy.deepcopy(model), (inputs, named)),
        (compiled, (inputs, named)),
        (copy.deepcopy(model).double(), _double((inputs, named))),
    ):
        torch.set_rng_state(state)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        with torch.no_grad():
            args, kwargs = arguments
            runs.append(_tensors(run(*args, **kwargs)))
    return Verification([_compare(*item) for item in zip(*(r.items() for r in runs))])


def _double(tree):
    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


def _tensors(result) -> dict[str, torch.Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(result)
    return {pytree.keystr(path) or "result": leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def _compare(eager, ours, exact) -> OutputCheck:
    name, dtype = eager[0], eager[1].dtype
    if not dtype.is_floating_point:
        same = torch.equal(eager[1], ours[1])
        return OutputCheck(name, str(dtype), 0.0, float(not same), 0.0 if same else float("inf"))
    reference = exact[1].double()
    errors = [relative_error(t[1], reference) for t in (eager, ours)]
    budget = max(FACTOR * errors[0], FLOOR * torch.finfo(dtype).eps)
    return OutputCheck(name, str(dtype), *errors, errors[1] / budget)


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Root of the mean square of the difference, relative to the reference's; infinite where the kinds of
    numbers differ."""
    actual = actual.double()
    if actual.shape != reference.shape or not torch.equal(actual.isnan(), reference.isnan()):
        return float("inf")
    finite = reference.isfinite() & actual.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(0), reference[~finite].nan_to_num(0)):
        return float("inf")
    difference, size = (actual - reference)[finite], reference[finite]
    if difference.numel() == 0:
        return 0.0
    norm = size.square().mean().sqrt().item()
    return difference.square().mean().sqrt().item() / max(norm, torch.finfo(torch.float64).tiny)
