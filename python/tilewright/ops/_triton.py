"""`impl="triton"`: the pack's operators as Triton kernels.

Rust plans an operator's graph, prints its tile programs as Triton modules, and calls `_launch` here with the modules and
where their tensors lie. Triton is looked for when the first operator asks for it, and compiles what it has not met before; modules
are kept as files beside our other caches, since Triton reads a kernel's source from its file.

With TRITON_INTERPRET=1 tensors may lie on the CPU: Triton then runs its kernels in its interpreter. That is for tests: it is slow, and
knows no libdevice.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import inspect
import os
import pathlib
import sys
import tempfile
from typing import Any, Callable, Iterator

import torch

from .. import _native

_TYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
# By source: the function `launch`, and the sizes that it asks for by name.
_LOADED: dict[str, tuple[Callable, list[str]]] = {}


class _Memory:
    """What a module's launcher, and Triton, ask of a tensor on a GPU."""

    __slots__ = ("address", "dtype", "shape", "strides")

    def __init__(self, address: int, dtype: torch.dtype, shape: list[int], strides: list[int]):
        self.address, self.dtype, self.shape, self.strides = address, dtype, tuple(shape), tuple(strides)

    def data_ptr(self) -> int:
        return self.address

    def stride(self, axis: int | None = None) -> Any:
        return self.strides if axis is None else self.strides[axis]

    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    def is_contiguous(self) -> bool:
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides)):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True


def _on_cpu(address: int, dtype: torch.dtype, shape: list[int], strides: list[int]) -> torch.Tensor:
    """The same as a tensor, for the interpreter."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if all(shape) else 0
    if elements == 0:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _folder() -> pathlib.Path:
    """Where modules are kept: beside what Rust keeps (`cache_dir`)."""
    own = os.environ.get("TILEWRIGHT_CACHE")
    folder = pathlib.Path(own) if own else pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tilewright"
    folder = folder / "triton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="tilewright-triton-"))
    return folder


def _module(source: str) -> tuple[Callable, list[str]]:
    """The function `launch` of a module, and the sizes that it asks for by name."""
    if source not in _LOADED:
        digest = hashlib.sha256(source.encode()).hexdigest()[:24]
        file = _folder() / f"tw_{digest}.py"
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(source)
            part.replace(file)
        spec = importlib.util.spec_from_file_location(f"tilewright_triton_{digest}", file)
        if spec is None or spec.loader is None:
            raise RuntimeError(f"{file} cannot be loaded")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
        parameters = inspect.signature(loaded.launch).parameters.values()
        named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        _LOADED[source] = loaded.launch, named
    return _LOADED[source]


def _launch(device: int | None, launches: list[tuple]) -> None:
    """Starts kernels, one after the other, in the current stream."""
    with contextlib.nullcontext() if device is None else torch.cuda.device(device):
        for source, tensors, sizes in launches:
            form = _on_cpu if device is None else _Memory
            launch, named = _module(source)
            given = {name: value for name, value in sizes if name in named}
            launch(*(form(at, _TYPES[dtype], shape, strides) for at, dtype, shape, strides in tensors), **given)


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Operators of the pack that this thread calls run as Triton kernels."""
    before = _native.triton_enter(True)
    try:
        yield
    finally:
        _native.triton_enter(before)


_READY = False


def demand(what: str, tensors: list[torch.Tensor]) -> None:
    """Raises what stands in the way of Triton: that it is not installed, or where the tensors lie."""
    global _READY
    for t in tensors:
        if t.device.type != "cuda" and not (t.device.type == "cpu" and interpreted()):
            raise RuntimeError(
                f"{what}: impl='triton' is for CUDA tensors, and one lies on {t.device}; leave impl out for the kernels of {t.device.type}"
            )
    if not _READY:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{what}: impl='triton' needs Triton, which is not installed (pip install triton)") from error
        _native.triton_launcher(_launch)
        _READY = True
