"""The backend of `torch.compile`: Dynamo's graph, made functional by AOTAutograd, becomes groups and eager operators.

    torch.compile(model, backend="tilewright")
    torch.compile(model, backend="tilewright", mode="reduce-overhead")
    torch.compile(model, backend="tilewright", options={"threads": 2, "freeze": False})

Options: `threads` (0: as many as PyTorch), `cache` (compiled kernels on disk), `precision` ("f32", "tf32", "f16" or
"bf16": arithmetic that f32 may be computed in, see the numerics contract; default: f32 on CPUs, on GPUs what
`torch.get_float32_matmul_precision` says), `freeze` (in inference on CPUs, parameters are known data), `device`
(default: that of the first tensor on a GPU, or the CPU), `eager_random` (dropout draws the numbers of eager PyTorch, which fuses
with nothing). Operators on other devices stay PyTorch's.

Composites stay whole where our graphs have them (softmax, layer norm, GELU, attention): the table of decompositions
leaves them out. The mode records forward and backward graphs on a GPU (`graphs`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from contextlib import nullcontext

import torch
from torch import fx
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._dynamo.backends.common import aot_autograd

from . import attentions, cached, complexes, encoders, graphs, joins, kept, losses, norms, randoms, scalars
from .group import Group
from .partition import divide, has_effects
from .sizes import ranges

aten = torch.ops.aten

log = logging.getLogger("tilewright")

# Composites that our graphs have whole, and operators that PyTorch runs better as one than in parts.
KEPT = [
    aten.gelu,
    aten.silu,
    aten.hardswish,
    aten.hardsigmoid,
    aten.hardtanh,
    aten.leaky_relu,
    aten.elu,
    aten.mish,
    aten.softplus,
    aten._softmax,
    aten._log_softmax,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._fused_rms_norm,
    aten._native_batch_norm_legit_no_training,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._safe_softmax,
    aten.addmm,
    aten.addmv,
    aten.baddbmm,
    aten.stack,
    aten.select_scatter,
    aten.masked_fill,
    aten.clamp_min,
    aten.clamp_max,
    aten.addcmul,
    aten.addcdiv,
    aten.rsub,
    aten.square,
    aten.embedding_dense_backward,
    aten.nll_loss_forward,
    aten.nll_loss_backward,
    aten.native_dropout,
    aten.bernoulli,
    aten.upsample_bilinear2d,
    aten.upsample_nearest2d,
]


PRECISIONS = ("f32", "tf32", "f16", "bf16")
# As many as a pool of ours has at most.
THREADS_MAX = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user may choose."""

    threads: int = 0
    cache: bool = True
    precision: str | None = None
    freeze: bool = True
    device: torch.device | str | None = None
    eager_random: bool = False

    def check(self) -> None:
        """What is no setting at all is refused here; later it would only leave groups to PyTorch."""
        if not isinstance(self.threads, int) or not 0 <= self.threads <= THREADS_MAX:
            raise ValueError(f"threads={self.threads!r}: a number from 0 (as many as PyTorch has) to {THREADS_MAX}")
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(f"precision={self.precision!r}: one of {', '.join(PRECISIONS)}")
        for name in ("cache", "freeze", "eager_random"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: True or False")

    @staticmethod
    def of(options, examples=()) -> "Settings":
        """From the dictionary that `torch.compile` takes, and the arguments."""
        known = {f.name for f in dataclasses.fields(Settings)}
        unknown = sorted(set(options or {}) - known)
        if unknown:
            raise ValueError(f"unknown options {unknown}; tilewright takes {sorted(known)}")
        settings = Settings(**(options or {}))
        settings.check()
        if settings.device is None:
            on_gpu = (t.device for t in examples if isinstance(t, torch.Tensor) and t.device.type == "cuda")
            device = next(on_gpu, torch.device("cpu"))
        else:
            device = torch.device(settings.device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"tilewright compiles for CPUs and NVIDIA GPUs, not for {device}")
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("the options ask for a GPU, and PyTorch finds none")
            if (device.index or 0) >= torch.cuda.device_count():
                raise ValueError(f"the options ask for GPU {device.index}, and PyTorch finds {torch.cuda.device_count()}")
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        precision = settings.precision
        if precision is None:
            exact = device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
            precision = "f32" if exact else "tf32"
        # On a GPU, parameters are read where they lie: nothing is folded or packed, and nothing is twice in memory.
        freeze = settings.freeze and device.type == "cpu"
        return dataclasses.replace(settings, device=device, precision=precision, freeze=freeze)


def decompositions(eager_random: bool = False, trains: bool = False) -> dict:
    """PyTorch's decompositions without the composites that we keep, and ours: of dropout unless it is to be eager's, and of what is taken
    apart in training only."""
    table = dict(core_aten_decompositions())
    for packet in (
        aten._native_batch_norm_legit,
        aten._native_batch_norm_legit_functional,
        aten._batch_norm_with_update,
        aten._batch_norm_with_update_functional,
        aten._batch_norm_no_update,
        aten.batch_norm_backward,
        aten.native_batch_norm_backward,
        aten.native_layer_norm_backward,
        aten._fused_rms_norm_backward,
        aten.native_group_norm_backward,
        aten.linalg_vector_norm,
        aten.adaptive_max_pool2d,
        aten.adaptive_max_pool3d,
        aten.grid_sampler_2d,
        aten.rrelu_with_noise_backward,
    ):
        for overload in packet.overloads():
            if getattr(packet, overload) in decomposition_table:
                table[getattr(packet, overload)] = decomposition_table[getattr(packet, overload)]
    for packet in KEPT:
        for overload in packet.overloads():
            table.pop(getattr(packet, overload), None)
    table.update(encoders.DECOMPOSITIONS)
    if trains:
        table.update(norms.DECOMPOSITIONS)
        table.update(losses.DECOMPOSITIONS)
        table.update(attentions.DECOMPOSITIONS)
    if not eager_random:
        table.update(randoms.DECOMPOSITIONS)
    return table


class Decompositions(dict):
    """The table, made when somebody first looks into it: nobody does where a graph comes out of the cache."""

    def __init__(self, eager_random: bool, trains: bool):
        super().__init__()
        self.made = functools.partial(decompositions, eager_random, trains)

    def _filled(self) -> "Decompositions":
        if self.made is not None:
            made, self.made = self.made, None
            self.update(made())
        return self

    def __bool__(self):
        return True

    def __contains__(self, operator):
        return dict.__contains__(self._filled(), operator)

    def __getitem__(self, operator):
        return dict.__getitem__(self._filled(), operator)

    def get(self, operator, default=None):
        return dict.get(self._filled(), operator, default)

    def __iter__(self):
        return dict.__iter__(self._filled())

    def __len__(self):
        return dict.__len__(self._filled())

    def keys(self):
        return dict.keys(self._filled())

    def values(self):
        return dict.values(self._filled())

    def items(self):
        return dict.items(self._filled())

    def copy(self):
        return dict(self.items())


class Compiled:
    """A compiled FX graph: what is ours in groups, the rest as it was."""

    def __init__(self, kind: str, module: fx.GraphModule, groups: list[Group], reasons):
        self.kind = kind
        self.module = module
        self.groups = groups
        self.reasons = reasons
        # What AOTAutograd calls.
        self.run = cached.boxed(module)


# Those who want to know of each compiled graph (`explain`, tests).
OBSERVERS: list = []


def compile_fx(gm: fx.GraphModule, kind: str, static: set[int], settings: Settings, bounds=None) -> Compiled:
    """Divides a functional graph and puts our groups in place.

    `static`: placeholders that do not change; `bounds`: those of symbols, where the user gave others than the
    graph's.

    A graph that a rewrite fails on is compiled as it came, and one that cannot be divided is left to PyTorch; both with a warning, since
    what the user asked for is a model that runs.
    """
    before = kept.copied(gm.graph)
    compiled = None
    for rewrites in (REWRITES, ()):
        try:
            for rewrite in rewrites:
                rewrite(gm, settings)
            compiled = _divided(gm, kind, static, settings, bounds)
            break
        except Exception as why:
            step = "is compiled without rewrites" if rewrites else "is left to PyTorch"
            log.warning("the %s graph %s: %s: %s", kind, step, type(why).__name__, str(why).strip().partition("\n")[0])
            gm.graph = kept.copied(before)
    if compiled is None:
        before.set_codegen(fx.graph._BoxedCodeGen())
        reasons = {n: "its graph could not be divided" for n in before.nodes if is_operator(n)}
        compiled = Compiled(kind, fx.GraphModule(gm, before, f"Tilewright_{kind}"), [], reasons)
    for observe in OBSERVERS:
        observe(compiled)
    for group in compiled.groups:
        group.begin()
    return compiled


# Of a functional graph, in order and in place.
REWRITES = (
    lambda gm, settings: randoms.drawn_together(gm),
    lambda gm, settings: complexes.in_pairs(gm),
    lambda gm, settings: joins.join_parts(gm),
    lambda gm, settings: losses.sum_picked(gm),
    lambda gm, settings: scalars.fill_parts(gm),
    lambda gm, settings: scalars.fold_numbers(gm, settings.device),
)


def _divided(gm: fx.GraphModule, kind: str, static: set[int], settings: Settings, bounds) -> Compiled:
    graph = gm.graph
    known = {**ranges(graph), **(bounds or {})}
    division = divide(graph, settings.device, known)
    placeholders = graph.find_nodes(op="placeholder")
    frozen = {p for i, p in enumerate(placeholders) if i in static} if settings.freeze else set()
    if settings.device.type == "cpu":
        frozen |= set(graph.find_nodes(op="get_attr"))
    root, groups = torch.nn.Module(), []
    for node in graph.find_nodes(op="get_attr"):
        setattr(root, node.target, getattr(gm, node.target))
    member = {}
    for number, nodes in enumerate(division.groups):
        group = Group(f"{kind}_{number}", nodes, division.free, known, frozen, settings)
        groups.append(group)
        setattr(root, f"group_{number}", group)
        member.update({n: number for n in nodes if n not in division.free})
    new = _rebuilt(graph, groups, member, division.free)
    return Compiled(kind, fx.GraphModule(root, new, f"Tilewright_{kind}"), groups, division.reasons)


def _rebuilt(graph: fx.Graph, groups: list[Group], member, free) -> fx.Graph:
    """The graph with a call in place of each group's nodes. Groups run as soon as what they read is there."""
    new, copies = fx.Graph(), {}
    # One list of arguments, which the function empties.
    new.set_codegen(fx.graph._BoxedCodeGen())
    sizes: dict[str, fx.Node] = {}
    waiting = []
    for number, group in enumerate(groups):
        inside = set(group.nodes)
        waiting.append({n for node in group.nodes for n in node.all_input_nodes if n not in inside})
    # Views of others' tensors that only groups read are not needed outside.
    needless: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in free and all(u in member or u in needless for u in node.users):
            needless.add(node)
    pending = [n for n in graph.nodes if n not in member and n not in needless and n.op != "placeholder"]
    for node in graph.find_nodes(op="placeholder"):
        copies[node] = new.node_copy(node)
    done: set[int] = set()

    def size(symbol: str) -> fx.Node:
        if symbol not in sizes:
            sizes[symbol] = _symbol_value(new, copies, graph, symbol)
        return sizes[symbol]

    def run_groups() -> None:
        for number, group in enumerate(groups):
            if number in done or not all(n in copies for n in waiting[number]):
                continue
            done.add(number)
            args = [copies[n] for n in group.inputs] + [size(s) for s in group.symbols]
            call = new.call_module(f"group_{number}", tuple(args))
            for i, node in enumerate(group.outputs):
                copies[node] = new.call_function(operator.getitem, (call, i))
                copies[node].meta = dict(node.meta)
            for node in group.views:
                copies[node] = new.node_copy(node, lambda n: copies[n])

    while pending or len(done) < len(groups):
        before = (len(pending), len(done))
        run_groups()
        later, effects_wait = [], False
        for node in pending:
            # Effects stay in their order; results are returned last.
            effects = has_effects(node)
            if node.op == "output" and (later or len(done) < len(groups)):
                later.append(node)
                continue
            if (effects and effects_wait) or not all(n in copies for n in node.all_input_nodes):
                effects_wait |= effects
                later.append(node)
                continue
            copies[node] = new.node_copy(node, lambda n: copies[n])
        pending = later
        if (len(pending), len(done)) == before:
            raise RuntimeError("tilewright: a group waits for itself")
    return new


def _symbol_value(new: fx.Graph, copies, graph: fx.Graph, symbol: str) -> fx.Node:
    """The node that holds a symbol's value: an argument, or a size of one."""
    placeholders = graph.find_nodes(op="placeholder")
    for node in placeholders:
        held = node.meta.get("val")
        if isinstance(held, torch.SymInt) and str(held.node.expr) == symbol:
            return copies[node]
    for node in placeholders:
        held = node.meta.get("val")
        for axis, extent in enumerate(held.shape if isinstance(held, torch.Tensor) else ()):
            if isinstance(extent, torch.SymInt) and str(extent.node.expr) == symbol:
                return new.call_function(aten.sym_size.int, (copies[node], axis))
    raise RuntimeError(f"tilewright: nothing has the size {symbol}")


def is_operator(node: fx.Node) -> bool:
    """Whether a node of a compiled graph is an operator that PyTorch runs on tensors."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and "sym_" not in str(node.target)


def _static_inputs() -> set[int]:
    """Arguments of the graph being compiled that are parameters and buffers which nothing writes."""
    context = torch._guards.TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    if metadata is None:
        return set()
    written = {i for i, info in enumerate(metadata.input_info) if info.mutates_data or info.mutates_metadata}
    return set(metadata.static_input_indices) - written


def _nothing_is_donated() -> None:
    """Tells AOTAutograd that our backward graphs do not write over what they were given: they may be kept and run again."""
    metadata = getattr(torch._guards.TracingContext.try_get(), "fw_metadata", None)
    if getattr(metadata, "bw_donated_idxs", None):
        metadata.bw_donated_idxs = []


def tilewright_backend(gm: fx.GraphModule, example_inputs, *, options=None, mode=None):
    """The backend itself: what `torch.compile(..., backend="tilewright")` calls."""
    if mode not in (None, "default", "reduce-overhead"):
        raise ValueError(f"tilewright has no mode {mode!r}; it takes options, and the mode 'reduce-overhead'")
    # A graph whose arguments are no tensors on a GPU may make its own there.
    held = (n.meta.get("example_value") for n in gm.graph.nodes)
    settings = Settings.of(options, [*example_inputs, *(t for t in held if isinstance(t, torch.Tensor))])
    records = mode == "reduce-overhead" and settings.device.type == "cuda"

    trains = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs)
    # Those who observe want graphs with their nodes; groups with symbols are not kept.
    keeps = settings.cache and not OBSERVERS and not any(isinstance(a, torch.SymInt) for a in example_inputs)

    def compiled(graph_module, kind, static, fixed):
        made = compile_fx(graph_module, kind, static, settings)
        recording = graphs.Recording.of(graph_module, fixed(), settings.device, kind) if records else None
        return cached.Code(made.run, made.module, keeps and all(g.can_be_kept for g in made.groups), recording)

    def forward(graph_module, _inputs):
        _nothing_is_donated()
        return compiled(graph_module, "forward", set(), graphs.static_arguments)

    def backward(graph_module, _inputs):
        return compiled(graph_module, "backward", set(), lambda: graphs.saved_arguments(graph_module.graph))

    def inference(graph_module, _inputs):
        return compiled(graph_module, "inference", _static_inputs(), graphs.static_arguments)

    def form(compile_graph):
        return cached.compiler(compile_graph) if keeps else compile_graph

    compiler = aot_autograd(
        fw_compiler=form(forward),
        bw_compiler=form(backward),
        inference_compiler=form(inference),
        decompositions=Decompositions(settings.eager_random, trains),
        partition_fn=kept.partition,
    )
    attentions.prepare(gm, trains)
    with attentions.in_parts(trains, settings.device), cached.keeping(gm, settings.device, (settings, mode, trains)) if keeps else nullcontext():
        return compiler(gm, example_inputs)


# What `torch.compiler.reset` calls.
tilewright_backend.reset = graphs.reset
