"""Compiled graphs in PyTorch's cache of traced functions, so that a second process traces a model with Dynamo only.

AOTAutograd keeps what it made of a graph of Dynamo's (`torch._functorch._aot_autograd.autograd_cache`, on disk below
`TORCHINDUCTOR_CACHE_DIR`) where a backend's results can be written down. Ours are: the graph around the groups as code, each group as a digest of
its graph, the calls that wrote it, and the same operators as PyTorch's own, for the case that it has to step in. On a GPU what a group became (machine
code, launches, arguments) comes out of our own cache under the digest when it first runs; where it is not there, and on processors, the plan is made
again, and kernels come out of the cache.

The key holds the settings and the package itself (`stamp`), beside PyTorch's version, the graph and the types of its arguments. It leaves
out what only Inductor's code depends on ([`_key_of`]). Weights that are known data (inference on processors, see `Settings.freeze`) are inputs of
what is kept, and known again when it runs. Not kept: graphs with sizes as symbols.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import threading

import torch
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._inductor.codecache import FxGraphHashDetails
from torch._inductor.output_code import OutputCode
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from . import graphs


@functools.cache
def stamp() -> str:
    """What this package is: a change of any file of it changes the stamp."""
    root = pathlib.Path(__file__).resolve().parent.parent
    text = hashlib.sha256()
    for path in sorted([*root.glob("*.so"), *root.glob("*.pyd"), *root.glob("pytorch/*.py")]):
        about = path.stat()
        text.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return text.hexdigest()


class Root:
    """What the code of a graph that was read from the cache calls `self`: groups and constants by name."""


class Code(OutputCode):
    """A compiled graph as AOTAutograd calls it and keeps it."""

    def __init__(self, run, module: torch.fx.GraphModule, keeps: bool, recording: graphs.Recording | None):
        super().__init__()
        self.module, self.keeps, self.recording = module, keeps, recording
        self.source, self.held = None, None
        self._boxed_call = True
        self.run = self._recorded(run)

    def _recorded(self, run):
        return run if self.recording is None else graphs.recorded(run, self.recording)

    def __call__(self, inputs):
        return self.run(inputs)

    def __getstate__(self):
        state = {**self.__dict__, "run": None, "module": None}
        if self.module is not None:
            code = self.module.graph.python_code("self")
            state["source"] = _format_import_block(code.globals, sys_importer) + code.src
            named = [n.target for n in self.module.graph.nodes if n.op in ("call_module", "get_attr")]
            state["held"] = {name: getattr(self.module, name) for name in named}
        return state

    def prepare_for_serialization(self) -> None:
        """`__getstate__` leaves out what is made again."""
        if not self.keeps:
            raise BypassAOTAutogradCache("a graph of tilewright with sizes as symbols")

    def post_compile(self, example_inputs, constants, graph_kwargs) -> None:
        """After it was read from the cache."""
        if self.run is not None:
            return
        root, names = Root(), {}
        root.__dict__.update(self.held)
        exec(compile(self.source, "<a graph of tilewright>", "exec"), names)  # noqa: S102  (our own text)
        self.run = self._recorded(boxed(functools.partial(names["forward"], root)))

    def set_triton_bundle(self, triton_bundle) -> None:
        """There is none."""


def boxed(function):
    """A function of one list, which it empties, so that memory is free as soon as nothing reads it."""

    def run(args):
        return function(args if isinstance(args, list) else list(args))

    run._boxed_call = True
    return run


def compiler(compile_graph):
    """`compile_graph(graph module, arguments)`, which gives a [`Code`], in the form that AOTAutograd keeps results of."""
    from torch._functorch.aot_autograd import SerializableAOTDispatchCompiler

    return SerializableAOTDispatchCompiler(Code, compile_graph)


@contextlib.contextmanager
def keeping(gm: torch.fx.GraphModule, device: torch.device, settings):
    """While a graph is compiled: its results are kept, under a key that has our settings. The backward graph is compiled
    with the forward graph, since both are kept together."""
    # What rules ask of a GPU.
    gpu = (torch.version.cuda, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    gm._tilewright = f"{stamp()} {settings} {gpu}"
    before, OURS.compiles = OURS.compiles, True
    try:
        with torch._functorch.config.patch(bundled_autograd_cache=True, force_non_lazy_backward_lowering=True):
            yield
    finally:
        OURS.compiles = before
        del gm._tilewright


class _Ours(threading.local):
    compiles = False


# Whether this thread compiles a graph for us.
OURS = _Ours()

# What of PyTorch makes the graphs that are kept.
TRACERS = ("_decomp", "_dispatch", "_dynamo", "_functorch", "_higher_order_ops", "_prims", "_prims_common", "_refs", "_subclasses", "fx")


@functools.cache
def pytorch_stamp() -> str:
    """Which PyTorch this is: its version, and the sizes and times of the files that trace and take apart."""
    root, text = pathlib.Path(torch.__file__).parent, hashlib.sha256()
    text.update(f"{torch.__version__} {torch.version.git_version}\n".encode())
    for part in TRACERS:
        for folder, inside, files in os.walk(root / part):
            inside.sort()
            for file in sorted(f for f in files if f.endswith(".py")):
                about = os.stat(os.path.join(folder, file))
                text.update(f"{file} {about.st_size} {about.st_mtime_ns}\n".encode())
    return text.hexdigest()


def _key_of(of_inductor):
    """PyTorch's part of the key of a kept graph without what Inductor's code alone depends on: its settings, the sources of PyTorch and
    of Triton, its templates. Collecting that takes several times as long as tracing a small graph."""

    @functools.wraps(of_inductor)
    def details(self, gm, example_inputs, fx_kwargs, *rest, **more):
        plain = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool, type(None))
        known = gm is not None and all(isinstance(a, plain) for a in example_inputs)
        if not OURS.compiles or not known or any("triton" in str(n.target) for m in gm.modules() if hasattr(m, "graph") for n in m.graph.nodes):
            return of_inductor(self, gm, example_inputs, fx_kwargs, *rest, **more)
        self.gm, self.example_inputs = gm, list(example_inputs)
        self.fx_kwargs = sorted((key, repr(value)) for key, value in fx_kwargs.items())
        self.pytorch, self.default_dtype = pytorch_stamp(), torch.get_default_dtype()
        self.deterministic_algorithms_settings = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        self.matmul_precision = torch.get_float32_matmul_precision()
        self.cache_key_tag = getattr(torch.compiler.config, "cache_key_tag", "")

    return details


FxGraphHashDetails.__init__ = _key_of(FxGraphHashDetails.__init__)
