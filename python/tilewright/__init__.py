"""Tilewright: compiles tensor programs to fast, verified kernels.

    import tilewright
    model = tilewright.load("model.onnx", threads=2)
    outputs = model.run({"input": array})          # names to NumPy arrays
    result = model(array)                          # or called, with arrays or tensors

With PyTorch (which is imported only by these, and by `tilewright.ops`, the operator pack, and `tilewright.optim`, its optimizers):

    fast = torch.compile(model, backend="tilewright")
    print(tilewright.explain(model, *inputs))      # what is ours, what stays PyTorch's, where the time goes
    print(tilewright.verify(model, *inputs))       # eager, ours and float64
    program = tilewright.compile(exported_program)  # of torch.export
    print(tilewright.patch(model))                 # fused operators in a model of transformers
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _native

if TYPE_CHECKING:
    import torch

    from .patching import Patch
    from .pytorch.check import Verification
    from .pytorch.exported import CompiledProgram
    from .pytorch.report import Explanation

__all__ = ["Model", "compile", "explain", "load", "patch", "verify"]


class Model:
    """A compiled model; `load` makes one. It may be shared by threads: runs take turns."""

    def __init__(self, native: "_native.Native"):
        self._native = native
        self.inputs: list[str] = [name for name, _ in native.inputs]
        self.outputs: list[str] = list(native.outputs)
        self._types = [(name, np.dtype(kind)) for name, kind in native.inputs]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on named arrays; the result maps output names to arrays.

        Arrays that are not contiguous are copied first; element types must be the model's. Do not write
        to an input from another thread while it runs. Raises ValueError for wrong names, types or shapes.
        """
        if not isinstance(feeds, dict):
            raise TypeError(f"run takes names with their arrays, {{{self.inputs[0]!r}: array}} and so on, and not {type(feeds).__name__}")
        unknown = sorted(set(feeds) - set(self.inputs))
        missing = sorted(set(self.inputs) - set(feeds))
        if unknown or missing:
            raise ValueError(f"inputs missing: {missing}, unknown: {unknown}; the model takes {self.inputs}")
        arrays = []
        for name, kind in self._types:
            array = np.ascontiguousarray(feeds[name]).reshape(np.shape(feeds[name]))
            if array.dtype != kind:
                raise ValueError(f"input {name!r} is {array.dtype}, the model takes {kind}")
            arrays.append((array.dtype.str, array.shape, array.ctypes.data, array.nbytes, array))
        return dict(zip(self.outputs, map(np.asarray, self._native.run(arrays))))

    def __repr__(self) -> str:
        return f"tilewright.Model({', '.join(self.inputs)} -> {', '.join(self.outputs)})"

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run on arrays or PyTorch tensors, in the order of `inputs` or by name.

        Gives one result, or a tuple in the order of `outputs`: tensors if a tensor was given, on its device, else arrays. Tensors of
        a GPU are copied to the host and back; `torch.compile` and `tilewright.compile` run where they lie.
        """
        if len(args) > len(self.inputs):
            raise ValueError(f"{len(args)} inputs are given; the model takes {self.inputs}")
        feeds = dict(zip(self.inputs, args))
        twice = sorted(set(feeds) & set(named))
        if twice:
            raise ValueError(f"inputs given twice: {twice}")
        feeds.update(named)
        tensors = {name: value for name, value in feeds.items() if hasattr(value, "detach")}
        results = tuple(self.run({**feeds, **{k: _array(k, v) for k, v in tensors.items()}}).values())
        if tensors:
            torch = _torch("results as tensors")
            device = next(iter(tensors.values())).device
            results = tuple(torch.from_numpy(result).to(device) for result in results)
        return results[0] if len(results) == 1 else results


def _array(name: str, tensor: "torch.Tensor") -> np.ndarray:
    try:
        return tensor.detach().cpu().numpy()
    except (TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"input {name!r} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, which NumPy has no array for"
        ) from error


def load(
    path: str | os.PathLike, threads: int = 0, cache: bool = True, device: str = "cpu", precision: str = "f32"
) -> Model:
    """Read and compile a .onnx file, a Hugging Face directory or a .tw graph text.

    `threads` of 0 uses all; `cache` keeps compiled kernels on disk. `device` is "cpu", "cuda" or "cuda:1"; inputs and outputs are
    arrays of the host on any of them. `precision` is "f32" or "bf16", on a GPU also "tf32" and "f16". Raises ValueError for a bad file,
    NotImplementedError for an unsupported model, or where there is no such device.
    """
    path = os.fsdecode(path)
    if not isinstance(threads, int) or not 0 <= threads <= 1024:
        raise ValueError(f"threads={threads!r}: a number from 0 (all) to 1024")
    if path.endswith(".pt2"):
        raise ValueError(f"{path} is a program of torch.export: tilewright.compile({path!r}) takes it")
    return Model(_native.load(path, threads, cache, device, precision))


def explain(
    model: Any, *inputs: Any, options: dict | None = None, runs: int = 5, gradients: bool = False, **named: Any
) -> "Explanation":
    """Compile `model` with the backend, run it on these inputs, and say what happened.

    The result prints as a report: graph breaks, operators left to PyTorch with the reason, fused groups with their kernels, the share of
    time of each, and what part of the machine's ceiling each kernel reaches. `html(path)` of it writes a page. `options` are the
    backend's. With `gradients`, it is a training step: the gradients of the mean of the results' squares are part of it.
    """
    _torch("explain")
    from .pytorch.report import explain as run

    return run(model, inputs, named, options, runs, gradients)


def verify(
    model: Any, *inputs: Any, options: dict | None = None, gradients: bool = False, **named: Any
) -> "Verification":
    """Compare `model` run by PyTorch, by Tilewright and in float64 on these inputs.

    The result is true when Tilewright's error against float64 stays within the budget, and prints as a table; each group is also run on
    its own inputs beside PyTorch's operators, so that the one responsible for an error is named (`responsible`). With `gradients`, a
    training step is checked too: the gradients of the mean of the results' squares.
    """
    _torch("verify")
    from .pytorch.check import verify as run

    return run(model, inputs, named, options, gradients)


def compile(
    program: "torch.export.ExportedProgram | str | os.PathLike", options: dict | None = None
) -> "CompiledProgram":
    """Compile what `torch.export.export` gives, or a .pt2 file that `torch.export.save` wrote. The result is called like the exported
    module."""
    _torch("compile")
    from .pytorch.exported import compile_exported as run

    return run(program, options)


def patch(model: "torch.nn.Module", **which: bool) -> "Patch":
    """Put the operator pack into a model of transformers, in place, and list what was changed.

    `norms`, `activations`, `rotary`, `loss` and `attention` (all true) say what to change. `undo()` of the result takes it back.
    """
    _torch("patch")
    from .patching import patch as run

    return run(model, **which)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("tilewright")
        except PackageNotFoundError:
            return "unknown"
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")


def _torch(what: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"tilewright.{what} needs PyTorch 2.10 or later, which is not installed here: pip install torch"
            if not what.startswith("results")
            else f"{what} need PyTorch, which is not installed here: pip install torch"
        ) from error
    return torch
