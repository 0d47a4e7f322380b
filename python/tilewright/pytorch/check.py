"""`tilewright.verify`: eager PyTorch, Tilewright and float64 beside each other.

The budget of an output is Inductor's rule: an error against float64 (root of the mean square, relative to that of
the reference) of at most `FACTOR` times eager's own, or `FLOOR` units in the last place when that is more.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import backend
from .group import Group

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
    # The groups, as they ran in this check, in order: each on its own inputs, beside PyTorch's operators on the same ones.
    groups: list[OutputCheck] = dataclasses.field(default_factory=list)
    # Whether the model drew random numbers: no two of the runs are then alike, unless it draws PyTorch's.
    draws: bool = False

    @property
    def responsible(self) -> OutputCheck | None:
        """The group that is farthest outside of its budget, if any is."""
        worst = max(self.groups, key=lambda g: g.ratio, default=None)
        return worst if worst is not None and worst.ratio > 1 else None

    def __bool__(self) -> bool:
        return all(o.ratio <= 1 for o in self.outputs)

    def __str__(self) -> str:
        lines = [f"{'output':<32} {'type':<10} {'eager':>10} {'tilewright':>10} {'of budget':>10}"]
        for o in self.outputs:
            verdict = "" if o.ratio <= 1 else "  FAIL"
            lines.append(f"{o.name:<32} {o.dtype:<10} {o.eager_error:>10.2e} {o.error:>10.2e} {o.ratio:>10.3f}{verdict}")
        if (group := self.responsible) is not None:
            lines.append(f"responsible: {group.name}, {group.ratio:.3f} of its budget on its own inputs")
        elif not self and self.draws:
            lines.append("the model draws random numbers, other ones in each of the runs: options={'eager_random': True} draws PyTorch's")
        elif not self:
            lines.append("each group is inside its budget on its own inputs: roundings add up, or an operator of PyTorch's differs")
        return "\n".join(lines)


def verify(model, inputs, named, options, gradients: bool = False) -> Verification:
    """See `tilewright.verify`."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify takes a torch.nn.Module, whose float64 copy it runs, not {type(model).__name__}")
    draws = [n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.training and m.p > 0]
    if draws and not (options or {}).get("eager_random"):
        raise ValueError(
            f"dropout ({', '.join(draws[:3])}{', ...' if draws[3:] else ''}) drops other elements in each of the runs: "
            "call model.eval(), or set its p to 0"
        )
    state, on_gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    runs, groups, draws = [], [], False

    def observe(graph: backend.Compiled) -> None:
        def watched(args):
            values = list(args)
            args.clear()
            return _Watch(graph, groups).run(*values)

        watched._boxed_call = True
        graph.run = watched

    # What was compiled before has nobody who watches its groups.
    torch._dynamo.reset()
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend=backend.tilewright_backend, options=options)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for module, run, arguments in (
        (eager, eager, (inputs, named)),
        (ours, compiled, (inputs, named)),
        (exact, exact, _double((inputs, named))),
    ):
        torch.set_rng_state(state)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        if run is compiled:
            backend.OBSERVERS.append(observe)
        try:
            runs.append(_results(module, run, arguments, gradients))
        finally:
            if run is compiled:
                backend.OBSERVERS.remove(observe)
                torch._dynamo.reset()
        draws = draws or (run is eager and not torch.equal(torch.get_rng_state(), state))
    drawn = draws and not (options or {}).get("eager_random")
    return Verification([_compare(*item) for item in zip(*(r.items() for r in runs))], groups, drawn)


def _results(module, run, arguments, gradients: bool) -> dict[str, torch.Tensor]:
    """The tensors that a run gives; with `gradients` also those of the parameters, of the mean of the results' squares."""
    args, kwargs = arguments
    if not gradients:
        with torch.no_grad():
            return _tensors(run(*args, **kwargs))
    found = _tensors(run(*args, **kwargs))
    loss = sum(t.square().mean() for t in found.values() if t.requires_grad)
    if not isinstance(loss, torch.Tensor):
        raise ValueError("no result of this model has a gradient")
    loss.backward()
    given = {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {n: t.detach() for n, t in found.items()} | given


class _Watch(fx.Interpreter):
    """Runs a compiled graph; each group beside PyTorch's operators, in its types and in float64."""

    def __init__(self, graph: backend.Compiled, found: list[OutputCheck]):
        super().__init__(graph.module)
        self.found = found

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        if n.op == "call_module" and isinstance(group := self.fetch_attr(n.target), Group) and group.eager is None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            module = group.as_module()
            eager = module(*args)
            try:
                exact = module(*_double(args))
            except RuntimeError:
                # Operators that name their types do not take others: what they give themselves is the reference then.
                exact = eager
            checks = [_compare((group.name, e), (group.name, o), (group.name, x)) for e, o, x in zip(eager, result, exact)]
            self.found.extend(sorted(checks, key=lambda c: -c.ratio)[:1])
        return result


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
    least = FLOOR * torch.finfo(dtype).eps
    if errors == [math.inf, math.inf]:
        # The type cannot hold these numbers, so ours must be eager's.
        budget, errors[1] = least, relative_error(ours[1], eager[1].double())
    else:
        budget = max(FACTOR * errors[0], least)
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
