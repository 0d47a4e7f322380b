"""`tilewright.explain`: what happened to a model, as data that prints as a report."""

from __future__ import annotations

import dataclasses
import html
import os
import time
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import backend
from .group import Group
from .partition import PACKED, VIEWS


@dataclasses.dataclass
class Fallback:
    """Nodes of one operator that PyTorch runs."""

    operator: str
    reason: str
    count: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Step:
    """One kernel (or host step) of a group."""

    label: str
    anchor: str
    nodes: list[str]
    seconds: float = 0.0
    # What the ceilings of the machine allow: the least time, and the ceiling ("compute", "memory" or "launch").
    least: float = 0.0
    roof: str = ""

    @property
    def fraction(self) -> float:
        """The time that the ceiling allows, of the time taken; above 1 where data stayed in a cache."""
        return self.least / self.seconds if self.seconds else 0.0

    @property
    def reached(self) -> str:
        """The fraction in words."""
        if self.roof == "launch" and self.fraction >= 1:
            return "below a launch"
        return f"{100 * self.fraction:.0f} % of {self.roof}"


@dataclasses.dataclass
class GroupReport:
    """One group: how many of PyTorch's operators became how many kernels."""

    name: str
    operators: int
    kernels: int
    seconds: float
    compile_seconds: float
    failure: str | None
    steps: list[Step]


@dataclasses.dataclass
class Explanation:
    """What happened to a model. `str()` of it is the report."""

    model: str
    graphs: int
    graph_breaks: list[str]
    groups: list[GroupReport]
    fallbacks: list[Fallback]
    seconds: float

    @property
    def fallback_share(self) -> float:
        """The part of the time inside compiled graphs that operators of PyTorch take."""
        others = (f for f in self.fallbacks if f.reason != PACKED)
        outside = sum(f.seconds for f in others) + sum(g.seconds for g in self.groups if g.failure)
        return outside / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.graphs} graph(s), {len(self.groups)} group(s), {self.seconds * 1e3:.3f} ms, "
            f"{100 * self.fallback_share:.1f} % of it in PyTorch"
        ]
        lines += [f"graph break: {reason}" for reason in self.graph_breaks] or ["no graph breaks"]
        if self.fallbacks:
            lines.append(f"{'outside of groups':<52} {'calls':>5} {'time':>10} {'share':>6}  why")
        for f in sorted(self.fallbacks, key=lambda f: -f.seconds):
            lines.append(f"  {f.operator:<50} {f.count:>5} {f.seconds * 1e6:>8.0f}us {self._share(f.seconds):>6}  {f.reason}")
        for g in self.groups:
            left = f", left to PyTorch: {g.failure.splitlines()[0]}" if g.failure else ""
            lines.append(
                f"{g.name}: {g.operators} operators in {g.kernels} kernels, {g.seconds * 1e6:.0f} us "
                f"({self._share(g.seconds)}), compiled in {g.compile_seconds:.2f} s{left}"
            )
            for step in g.steps:
                lines.append(
                    f"  {step.anchor:<10} {step.label:<40.40} {step.seconds * 1e6:>8.0f}us {self._share(step.seconds):>6}"
                    f"  {step.reached:>17}"
                )
        return "\n".join(lines)

    def html(self, path: str | os.PathLike | None = None) -> str:
        """The report as a page that needs nothing else; written to `path` where one is given."""
        text = _page(self)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    def _repr_html_(self) -> str:
        """In notebooks: the page's body."""
        return _body(self)

    def _share(self, seconds: float) -> str:
        return f"{100 * seconds / self.seconds:.1f} %" if self.seconds else "-"


_STYLE = """body{font:14px system-ui;margin:2em;max-width:70em}table{border-collapse:collapse;margin:.5em 0 1.5em}
td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #8884}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:inline-block;height:.7em;background:#48c;vertical-align:baseline}.bad{color:#b30}details{margin:.3em 0}"""


def _page(e: Explanation) -> str:
    title = html.escape(f"{e.model}: explained")
    return f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style></head><body>{_body(e)}</body></html>"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """Cells that start with a digit stand on the right. Cells are HTML already."""

    def cell(kind: str, text: str) -> str:
        return f"<{kind}{' class=n' if text[:1].isdigit() else ''}>{text}</{kind}>"

    head = "".join(cell("th", h) for h in heads)
    body = "".join("<tr>" + "".join(cell("td", c) for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _body(e: Explanation) -> str:
    def share(seconds: float) -> str:
        width = 100 * seconds / e.seconds if e.seconds else 0.0
        return f"{width:.1f} % <span class=bar style='width:{width:.1f}px'></span>"

    parts = [
        f"<h1>{html.escape(e.model)}</h1>",
        f"<p>{e.graphs} graph(s), {len(e.groups)} group(s), {e.seconds * 1e3:.3f} ms, {100 * e.fallback_share:.1f} % of it in PyTorch</p>",
        "<h2>Graph breaks</h2>",
        "<ul>" + "".join(f"<li>{html.escape(b)}</li>" for b in e.graph_breaks) + "</ul>" if e.graph_breaks else "<p>none</p>",
        "<h2>Left to PyTorch</h2>",
    ]
    rows = [
        [html.escape(f.operator), str(f.count), f"{f.seconds * 1e6:.0f} us", share(f.seconds), html.escape(f.reason)]
        for f in sorted(e.fallbacks, key=lambda f: -f.seconds)
    ]
    parts.append(_table(["operator", "calls", "time", "share", "why"], rows) if rows else "<p>nothing</p>")
    parts.append("<h2>Groups</h2>")
    for g in e.groups:
        failed = f" <span class=bad>left to PyTorch: {html.escape(g.failure)}</span>" if g.failure else ""
        parts.append(
            f"<details open><summary><b>{html.escape(g.name)}</b>: {g.operators} operators in {g.kernels} kernels, "
            f"{g.seconds * 1e6:.0f} us, compiled in {g.compile_seconds:.2f} s{failed}</summary>"
        )
        rows = [
            [
                html.escape(s.anchor), html.escape(s.label), f"{s.seconds * 1e6:.1f} us", share(s.seconds),
                s.reached, html.escape(", ".join(s.nodes)),
            ]
            for s in g.steps
        ]  # fmt: skip
        parts.append(_table(["kind", "kernel", "time", "share", "roofline", "operators"], rows) + "</details>")
    return "".join(parts)


class _Profile(fx.Interpreter):
    """Runs a compiled graph node by node with a clock."""

    def __init__(self, compiled: backend.Compiled):
        super().__init__(compiled.module)
        on_gpu = (g.device for g in compiled.groups if g.device.type == "cuda")
        self.device = next(on_gpu, torch.device("cpu"))
        self.seconds: dict[fx.Node, float] = {}
        self.steps: dict[str, list[float]] = {}
        self.least: dict[str, list[tuple[float, str]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and isinstance(group := self.fetch_attr(n.target), Group):
            args, _ = self.fetch_args_kwargs_from_env(n)
            group(*args)
            start = _now(group.device)
            result = group(*args)
            self.seconds[n] = _now(group.device) - start
            _, times = group.timed(*args)
            if group.program is not None:
                self.least[n.target] = group.program.least_times([int(s) for s in args[len(group.inputs) :]])
            self.steps[n.target] = [seconds for _, seconds in times]
            return result
        if n.target in VIEWS:
            # Nothing moves; a clock would show what the interpreter costs.
            return super().run_node(n)
        start = _now(self.device)
        result = super().run_node(n)
        self.seconds[n] = _now(self.device) - start
        return result


def _now(device: torch.device) -> float:
    """The time when everything on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _backward(model, inputs, results) -> None:
    """The gradients of the mean of the results' squares, which are not kept."""
    found = [t for t in pytree.tree_leaves(results) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not found:
        raise ValueError("no result of this model has a gradient")
    leaves = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    leaves += [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.is_leaf and t.requires_grad]
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        sum(t.float().square().mean() for t in found).backward()
    finally:
        for leaf, grad in zip(leaves, before):
            leaf.grad = grad


def explain(model, inputs, named, options, runs: int, gradients: bool = False) -> Explanation:
    """See `tilewright.explain`."""
    if not callable(model):
        raise TypeError(f"explain takes a module or a function, not {type(model).__name__}")
    if runs < 1:
        raise ValueError(f"runs is {runs}; it must be at least 1")
    seen: list[backend.Compiled] = []
    # Statistics of norms change with each run of a model in training: they are put back.
    buffers = [(b, b.clone()) for b in model.buffers()] if isinstance(model, torch.nn.Module) else []
    samples: dict[int, list[_Profile]] = {}

    def observe(compiled: backend.Compiled) -> None:
        seen.append(compiled)
        number = len(seen) - 1
        samples[number] = []

        def profiled(args):
            values = list(args)
            args.clear()
            profile = _Profile(compiled)
            result = profile.run(*values)
            samples[number].append(profile)
            return result

        profiled._boxed_call = True
        compiled.run = profiled

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend.OBSERVERS.append(observe)
    try:
        compiled = torch.compile(model, backend=backend.tilewright_backend, options=options)
        for _ in range(runs + 1):
            results = compiled(*inputs, **named)
            if gradients:
                _backward(model, (inputs, named), results)
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
    finally:
        backend.OBSERVERS.remove(observe)
        torch._dynamo.reset()
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    groups, fallbacks, total = [], {}, 0.0
    for number, graph in enumerate(seen):
        profiles = samples[number][1:] or samples[number]
        if not profiles:
            continue
        for node in graph.module.graph.nodes:
            seconds = _median([p.seconds.get(node, 0.0) for p in profiles])
            if node.op == "call_module":
                total += seconds
                groups.append(_group_report(graph, node, seconds, profiles))
            elif backend.is_operator(node):
                total += seconds
                reason = _reason(graph, node)
                key = (str(node.target), reason)
                entry = fallbacks.setdefault(key, Fallback(*key))
                entry.count += 1
                entry.seconds += seconds
    name = type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", str(model))
    reasons = [f"{text.splitlines()[0]} ({count} times)" for text, count in sorted(breaks.items())]
    return Explanation(name, len(seen), reasons, groups, list(fallbacks.values()), total)


def _group_report(graph: backend.Compiled, node: fx.Node, seconds: float, profiles) -> GroupReport:
    group: Group = getattr(graph.module, node.target)
    steps = []
    if group.program is not None:
        for i, (label, anchor, nodes) in enumerate(group.program.steps):
            taken = _median([p.steps[node.target][i] for p in profiles if i < len(p.steps.get(node.target, []))])
            least, roof = profiles[-1].least[node.target][i]
            steps.append(Step(label, anchor, nodes, taken, least, roof))
    kernels = len(steps)
    return GroupReport(group.name, len(group.nodes), kernels, seconds, group.compile_seconds, group.failure, steps)


def _reason(graph: backend.Compiled, node: fx.Node) -> str:
    by_name = {n.name: why for n, why in graph.reasons.items()}
    return by_name.get(node.name, "a view, which costs nothing there")


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
