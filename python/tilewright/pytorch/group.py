"""`Group`: a compiled part of a model, as a function of tensors.

Tensors go in and come out as addresses: nothing is copied, except inputs whose memory has gaps or another order
than the graph was compiled for (they are made contiguous first). Results lie in memory that PyTorch allocates, in
the order of axes that PyTorch would give them.

A group is compiled when it first runs; on a GPU, one whose sizes are known and that has no parameters as known data is planned as soon as
its graph is there (`begin`), and its kernels are compiled beside what PyTorch still does with the graph and with the one of the backward pass. Parameters that do not change (inference) are then known data: folded,
packed for the kernels. Their addresses and version counters are looked at before each run; when one has changed,
the group is compiled again with the new values (its kernels come out of the cache), and after `REFREEZES_MAX` times
once more with all parameters as inputs.

On a GPU the work goes into PyTorch's current stream, and nothing waits for it. Groups that compute the same share a
program; all memory of a run, also that between kernels, is PyTorch's. A program is kept under a digest of its graph, so that a group
that was written down for another process (`cached`) is neither written as a graph nor planned there.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import operator
import pickle
import re
import threading
import time
import weakref
from typing import Callable

import torch
from torch import fx
from torch.autograd import forward_ad

from .. import _native
from ..ops._define import batched
from .partition import device_of, inputs_of, memory_order, outputs_of
from .sizes import symbols, tensors_and_sizes
from .writer import Script, Writer

REFREEZES_MAX = 2

# What kernels for GPUs expect of addresses, in bytes.
ALIGNED = 16

log = logging.getLogger("tilewright")

# Programs on GPUs by what they compute; they go with the groups that hold them.
PROGRAMS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

# The compiler's library must not be unloaded while it works.
atexit.register(_native.wait_for_compilers)

# One thread at a time compiles groups; those that run them read one tuple (`Group.plan`), which is exchanged whole.
COMPILING = threading.RLock()

# What tells apart two texts of the same graph: names, and where nodes come from.
_NAMES = re.compile(r'"[^"]*": |  # .*|^graph @.*$', re.MULTILINE)


class Group(torch.nn.Module):
    """See the module's head. Called with its tensors, then with the values of its sizes."""

    def __init__(self, name, nodes, free, known_ranges, frozen, settings):
        super().__init__()
        self.name = name
        self.nodes = nodes
        self.settings = settings
        self.inputs = inputs_of(nodes)
        self.outputs, self.views = outputs_of(nodes, free)
        self.orders = [memory_order(n) for n in self.inputs]
        self.plain = [o == list(range(len(o))) for o in self.orders]
        self.out_orders = [memory_order(n) for n in self.outputs]
        self.inverses = [_inverse(o) for o in self.out_orders]
        self.turned = any(i is not None for i in self.inverses)
        self.live: list = []
        self.readers: list = []
        # Of a group that was written down: what its graph is, the calls that write it, and its operators as PyTorch's. The last two
        # are unpacked where they are needed only, since that takes longer than loading a program.
        self.digest: str | None = None
        self.calls: bytes | None = None
        self.kept_eager: bytes | None = None
        self.dtypes = [n.meta["val"].dtype for n in self.outputs]
        self.device = device_of(nodes[-1])
        self.on_cpu = settings.device.type == "cpu"
        used = set()
        for node in nodes:
            held = [node.meta["val"], *(a.meta.get("val") for a in node.all_input_nodes)]
            for value in (v for h in held for v in tensors_and_sizes(h)):
                for size in [value] if isinstance(value, torch.SymInt) else value.shape:
                    used |= symbols(size)
        self.ranges = {s: known_ranges[s] for s in sorted(used)}
        self.symbols = list(self.ranges)
        self.frozen = [i for i, n in enumerate(self.inputs) if n in frozen]
        self.program = None
        self.eager = None
        self.seal: list = []
        self.positions: list = []
        self.refreezes = 0
        # What a run reads: the program, its inputs, the frozen ones as they were, and results' shapes by sizes.
        self.plan: tuple | None = None
        self.compile_seconds = 0.0
        self.failure = None
        # Small products as sums: what is tried where the library has no kernel for one of them.
        self.sums = False

    def __call__(self, *args):
        if forward_ad._current_level >= 0:
            # Kernels know nothing of tangents.
            return self._as_pytorch()(*args)
        plan = self._current(args)
        if plan is None:
            return self.eager(*args)
        if self.on_cpu:
            for i, size, ignored in self.positions:
                _check_positions(args[i], size, ignored)
        try:
            return self._run(plan, args, False)[0]
        except NotImplementedError as why:
            # On a GPU, what cannot run there shows when sizes are known.
            with COMPILING:
                if self.plan is plan and not self._in_sums(args):
                    self._leave(why)
            return self(*args)
        except RuntimeError:
            if not any(isinstance(a, torch.Tensor) and batched(a) for a in args):
                raise
            # Tensors that stand for several have no memory.
            return self._as_pytorch()(*args)

    def timed(self, *args):
        """As a call; also the seconds of each step of the plan."""
        self(*args)
        plan = self._current(args)
        return (self.eager(*args), []) if plan is None else self._run(plan, args, True)

    def _current(self, args):
        """What to run on these arguments, or `None` where PyTorch runs the group."""
        plan = self.plan
        if plan is not None and (not plan[2] or _seal_holds(plan[2], args)):
            return plan
        if self.eager is not None:
            return None
        with COMPILING:
            # Another thread may have been here.
            plan = self.plan
            if plan is None and self.eager is None:
                self._compile(args)
            elif plan is not None and plan[2] and not _seal_holds(plan[2], args):
                self._refreeze(args)
            return self.plan

    def _run(self, plan, args, timed):
        program, readers, _, shapes = plan
        kept, addresses = self._addresses(readers, args)
        sizes = [int(s) for s in args[len(self.inputs) :]] if self.symbols else []
        times = None
        if self.on_cpu:
            results, _ = self._results(program, shapes, sizes, 0)
            run = program.run_timed if timed else program.run
            times = run(addresses, [r.data_ptr() for r in results], sizes)
        else:
            index = self.device.index
            if torch.cuda.current_device() != index:
                with torch.cuda.device(index):
                    return self._run(plan, args, timed)
            stream = torch._C._cuda_getCurrentRawStream(index)
            results, scratch_bytes = self._results(program, shapes, sizes, stream)
            # Memory of PyTorch's allocator, which gives it to later work of the stream only.
            scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=self.device) if scratch_bytes else None
            run = program.run_timed if timed else program.run
            outputs = [r.data_ptr() for r in results]
            times = run(addresses, outputs, 0 if scratch is None else scratch.data_ptr(), sizes, stream)
        del kept
        if self.turned:
            results = [r if inv is None else r.permute(inv) for r, inv in zip(results, self.inverses)]
        return tuple(results), times

    def _addresses(self, readers, args):
        """The addresses of the inputs; the first list keeps alive what had to be copied."""
        kept, addresses = [], []
        on_cpu = self.on_cpu
        for i, order in readers:
            memory = args[i]
            if order is not None:
                memory = memory.permute(order)
            if not memory.is_contiguous():
                memory = memory.contiguous()
                kept.append(memory)
            address = memory.data_ptr()
            if address % ALIGNED and not on_cpu:
                memory = memory.clone()
                kept.append(memory)
                address = memory.data_ptr()
            addresses.append(address)
        return kept, addresses

    def _results(self, program, shapes, sizes, stream):
        """Memory for the results, and how much scratch memory a run takes."""
        key = tuple(sizes)
        known = shapes.get(key)
        if known is None:
            if len(shapes) > 64:
                shapes.clear()
            known = (program.output_shapes(sizes), 0) if self.on_cpu else program.fit(sizes, stream)
            shapes[key] = known
        sizes, scratch_bytes = known
        return [torch.empty(s, dtype=d, device=self.device) for s, d in zip(sizes, self.dtypes)], scratch_bytes

    # ---- compiling -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Plans, and begins to compile kernels, where that needs no arguments."""
        if self.on_cpu or self.frozen or self.symbols:
            return
        self._compile(())
        if self.program is not None:
            self.program.compile_ahead([])

    def _compile(self, args) -> None:
        start = time.perf_counter()
        try:
            if self.nodes is None and self.digest is None:
                raise NotImplementedError("it was left to PyTorch when the graph was kept")
            if self.nodes is None:
                self.program = self._kept_program(args)
            else:
                self.program = self._program(self.write(args).builder.builder)
            if self.program.symbols != self.symbols:
                raise RuntimeError(f"sizes {self.program.symbols} where {self.symbols} are given")
            self.plan = self.program, self.readers, self.seal, {}
        except (NotImplementedError, RuntimeError, ValueError) as why:
            self.compile_seconds += time.perf_counter() - start
            if not self._in_sums(args):
                self._leave(why)
            return
        self.compile_seconds += time.perf_counter() - start

    def _in_sums(self, args) -> bool:
        """Compiles once more with small products as sums, for sizes that no kernel takes. Whether that was left to try."""
        if self.on_cpu or self.sums or self.nodes is None:
            return False
        self.sums, self.program, self.plan = True, None, None
        self._compile(args)
        return True

    def _leave(self, why: Exception) -> None:
        """Whatever our compiler cannot do, PyTorch does."""
        self.failure = str(why).strip() or type(why).__name__
        log.warning("%s is left to PyTorch: %s", self.name, self.failure.splitlines()[0])
        self.eager = self._as_pytorch()
        self.program, self.plan, self.seal = None, None, []

    def _as_pytorch(self) -> Callable:
        """The operators of the group as PyTorch's own."""
        return self.as_module() if self.nodes is not None else pickle.loads(self.kept_eager)

    def _program(self, builder):
        settings = self.settings
        if not self.on_cpu:
            return self._gpu_program(builder)
        if not _native.HAS_CPU:
            raise NotImplementedError("this build has no compiler for processors (LLVM)")
        threads = settings.threads or torch.get_num_threads()
        return builder.compile(threads=threads, cache=settings.cache, precision=settings.precision)

    def _gpu_program(self, builder):
        """Groups that differ in names only (layers of one model) share a plan and its kernels."""
        settings, graph = self.settings, digest(builder)
        key = self._key(graph)
        program = PROGRAMS.get(key)
        if program is None:
            # Opening a device makes it the current one.
            with torch.cuda.device(self.device):
                program = builder.compile_gpu(self.device.index, cache=settings.cache, precision=settings.precision, keep=graph)
            PROGRAMS[key] = program
        return program

    def _key(self, graph: str):
        return self.device.index, self.settings.cache, self.settings.precision, graph

    def _kept_program(self, args):
        """The program of a group that was written down: on GPUs as it was kept, else of the graph, which is written again."""
        program, key = None, self._key(self.digest)
        if not self.on_cpu:
            program = PROGRAMS.get(key)
            if program is None:
                try:
                    with torch.cuda.device(self.device):
                        program = _native.restore_gpu(self.digest, self.device.index, self.settings.precision)
                except (NotImplementedError, RuntimeError, ValueError) as why:
                    log.info("%s is planned again: %s", self.name, str(why).strip())
            if program is not None:
                PROGRAMS[key] = program
        if program is None:
            script = Script.built(self.name, pickle.loads(self.calls), self._known_data(args))
            program = self._program(script.builder)
        return program

    def _known_data(self, args) -> dict[int, torch.Tensor]:
        """Frozen inputs of a group that was written down, as they lie in memory; seals them."""
        known = {i: args[i] for i in self.frozen if _version(args[i]) is not None}
        self.seal = [(i, tensor.data_ptr(), _version(tensor)) for i, tensor in known.items()]
        self.live = [i for i in range(len(self.inputs)) if i not in known]
        self._read()
        return {i: tensor.detach().permute(self.orders[i]).contiguous() for i, tensor in known.items()}

    def _read(self) -> None:
        self.readers = [(i, None if self.plain[i] else self.orders[i]) for i in self.live]

    def write(self, args) -> Writer:
        """The graph. With `args`, frozen inputs are known data."""
        writer = Writer(self.name, self.ranges, self.device.type)
        writer.sums = self.sums
        values, self.live, self.seal = {}, [], []
        for i, (node, order) in enumerate(zip(self.inputs, self.orders)):
            held = node.meta["val"]
            if i in self.frozen and args is not None and _version(args[i]) is not None:
                values[node] = writer.constant(node.name, held, args[i], order)
                self.seal.append((i, args[i].data_ptr(), _version(args[i])))
            else:
                values[node] = writer.input(node.name, held, order)
                self.live.append(i)
            writer.argument(i, values[node])
        for node in self.nodes:
            if node.target is operator.getitem:
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = writer.node(node, values)
        for node, order in zip(self.outputs, self.out_orders):
            writer.builder.output(node.name, writer.in_memory_order(values[node], order).number)
        self.positions = sorted(set(writer.positions), key=str)
        self._read()
        return writer

    @property
    def can_be_kept(self) -> bool:
        """Whether the group can be written down for another process (`cached`)."""
        return not self.symbols

    def __getstate__(self):
        """Without the nodes: the calls that write the graph, and the operators as PyTorch's."""
        state = {**self.__dict__, "program": None, "eager": None, "failure": None, "plan": None, "compile_seconds": 0.0}
        state.update(seal=[], refreezes=0)
        if self.nodes is not None:
            running = self.live, self.seal, self.positions, self.readers
            try:
                # Frozen inputs as inputs: they are known data again when it runs.
                script = self.write(None).builder
                state.update(calls=pickle.dumps(script.calls), digest=digest(script.builder))
            except (NotImplementedError, RuntimeError, ValueError):
                pass
            state.update(live=self.live, positions=self.positions, readers=self.readers)
            self.live, self.seal, self.positions, self.readers = running
            state["kept_eager"] = pickle.dumps(self.as_module())
            state.update(nodes=None, inputs=[None] * len(self.inputs), outputs=[None] * len(self.outputs), views=None)
        return state

    def _refreeze(self, args) -> None:
        self.refreezes += 1
        if self.refreezes > REFREEZES_MAX:
            self.frozen = []
        self._compile(args)

    def as_module(self) -> fx.GraphModule:
        """The same nodes, run by PyTorch."""
        graph, copies = fx.Graph(), {}
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)
        sizes = {s: graph.placeholder(f"size_{s}") for s in self.symbols}
        for node in self.nodes:
            copies[node] = graph.node_copy(node, lambda n: _copy_size(graph, copies, sizes, n))
        graph.output(tuple(copies[n] for n in self.outputs))
        return fx.GraphModule(torch.nn.Module(), graph)


def digest(builder) -> str:
    """What a graph computes, whatever its names, and the package that plans it."""
    # `cached` needs parts of PyTorch that groups alone do not.
    from .cached import stamp

    text = _NAMES.sub("", builder.text())
    return hashlib.sha256(f"{stamp()}\n{text}".encode()).hexdigest()


def _copy_size(graph: fx.Graph, copies, sizes, node: fx.Node) -> fx.Node:
    """A symbolic size made outside of the group, from the symbols' values."""
    if node not in copies:
        expression = node.meta["val"].node.expr
        names = sorted(s.name for s in expression.free_symbols)
        function = size_function(expression, names)
        copies[node] = graph.call_function(function, tuple(sizes[n] for n in names))
    return copies[node]


def size_function(expression, names):
    """A function from the values of symbols to a size."""

    def size(*values):
        known = dict(zip(names, values))
        return int(expression.subs({s: known[s.name] for s in expression.free_symbols}))

    return size


def _inverse(order):
    if order == list(range(len(order))):
        return None
    return [order.index(axis) for axis in range(len(order))]


def _check_positions(positions: torch.Tensor, size: int | None, ignored: int | None) -> None:
    """PyTorch's error for lookups outside of a table, for targets that are no class, and for divisions of integers by zero."""
    if size is None:
        if positions.numel() and not positions.all():
            raise RuntimeError("ZeroDivisionError")
        return
    if ignored is not None and not 0 <= ignored < size:
        positions = positions[positions != ignored]
    if positions.numel() and not 0 <= positions.min().item() <= positions.max().item() < size:
        what = "index out of range in self" if ignored is None else f"Target {positions.max().item()} is out of bounds."
        raise IndexError(
            f"{what}: positions reach from {positions.min().item()} to {positions.max().item()} in a table of {size}"
        )


def _seal_holds(seal, args) -> bool:
    return all(args[i].data_ptr() == address and _version(args[i]) == version for i, address, version in seal)


def _version(tensor):
    """How often a tensor was written to; `None` where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version
