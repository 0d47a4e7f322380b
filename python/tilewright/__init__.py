"""Tilewright: compiles tensor programs to fast, verified kernels.

    import tilewright
    model = tilewright.load("model.onnx", threads=2)
    outputs = model.run({"input": array})          # names to NumPy arrays
"""

from __future__ import annotations

import os

import numpy as np

from . import _native

__all__ = ["Model", "load"]


class Model:
    """A compiled model; `load` makes one. It may be shared by threads: runs take turns."""

    def __init__(self, native):
        self._native = native
        self.inputs: list[str] = [name for name, _ in native.inputs]
        self.outputs: list[str] = list(native.outputs)
        self._types = [(name, np.dtype(kind)) for name, kind in native.inputs]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on named arrays; the result maps output names to arrays.

        Arrays that are not contiguous are copied first; element types must be the model's. Do not write
        to an input from another thread while it runs. Raises ValueError for wrong names, types or shapes.
        """
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


def load(path: str | os.PathLike, threads: int = 0, cache: bool = True) -> Model:
    """Read and compile a .onnx file, a Hugging Face directory or a .tw graph text.

    `threads` of 0 uses all; `cache` keeps compiled kernels on disk. Raises ValueError for a bad file,
    NotImplementedError for an unsupported model.
    """
    return Model(_native.load(os.fspath(path), threads, cache))
