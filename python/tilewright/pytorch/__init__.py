"""Tilewright inside PyTorch: `torch.compile(model, backend="tilewright")`.

The way of a model, one module per step:

    backend      Dynamo's graph through AOTAutograd: functional, forward and backward apart
    partition    which operators we take; the rest stay PyTorch's, operator by operator
    writer       the operators that we take, as our graph (rules in elementwise, shapes, sums, layers, resampling, searching)
    group        a compiled graph as a function of tensors: no copies, memory of PyTorch's allocator
    kept         what a training graph keeps for its backward graph;  rows: products that take turned rows as they lie
    cached       compiled graphs in PyTorch's cache;  joins, losses, norms, randoms, encoders, complexes: what graphs have rewritten
    graphs       recordings of all of it (`mode="reduce-overhead"`)
    report       `tilewright.explain`;  check: `tilewright.verify`;  exported: `tilewright.compile`

PyTorch is needed for all of it, and imported nowhere else in the package.
"""

from .. import _torch

_torch("pytorch")

from .backend import compile_fx, tilewright_backend  # noqa: E402

__all__ = ["compile_fx", "tilewright_backend"]
