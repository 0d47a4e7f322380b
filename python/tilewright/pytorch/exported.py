"""`tilewright.compile`: programs of `torch.export` as callables.

Parameters, buffers and constants of the program are known data, as in inference with the backend. Buffers that the
program writes are arguments, and written back after each call.
"""

from __future__ import annotations

import os
import zipfile

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from . import backend, sizes


class CompiledProgram:
    """A compiled exported program; called like the exported module."""

    def __init__(self, program: torch.export.ExportedProgram, options: dict | None):
        if isinstance(program, (str, os.PathLike)):
            program = _loaded(os.fspath(program))
        if not isinstance(program, torch.export.ExportedProgram):
            raise TypeError(f"compile takes what torch.export.export gives or a .pt2 file, not {type(program).__name__}")
        state = [*program.state_dict.values(), *program.constants.values()]
        settings = backend.Settings.of(options, state)
        program = program.run_decompositions(backend.decompositions(eager_random=True))
        self._program = program
        signature = program.graph_signature
        written = {s.target for s in signature.output_specs if s.kind in _WRITTEN}
        self._inputs = signature.input_specs
        self._outputs = signature.output_specs
        unsupported = [s.kind.name for s in self._inputs if s.kind not in _KNOWN and s.kind is not InputKind.USER_INPUT]
        if unsupported:
            raise NotImplementedError(f"programs with inputs of kinds {sorted(set(unsupported))}")
        results = [s.kind.name for s in self._outputs if s.kind not in (*_WRITTEN, OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION)]
        if results:
            raise NotImplementedError(f"programs with results of kinds {sorted(set(results))}")
        held = {**program.state_dict, **program.constants}
        self._state = [None if s.kind is InputKind.USER_INPUT else held[s.target] for s in self._inputs]
        self._places = {s.target: i for i, s in enumerate(self._inputs) if s.target is not None}
        static = {i for i, s in enumerate(self._inputs) if s.kind in _KNOWN and s.target not in written}
        self._compiled = backend.compile_fx(program.graph_module, "exported", static, settings, _bounds(program))

    def __reduce_ex__(self, protocol):
        raise TypeError("a compiled program is neither copied nor pickled; compile the exported program again")

    def __call__(self, *args, **kwargs):
        """Run on arguments of the structure that was exported."""
        checked = self._program._get_flat_args_with_check(args, kwargs)[0]
        for placeholder, value in zip(self._user_placeholders(), checked):
            _check(placeholder, value)
        user = iter(checked)
        values = [next(user) if s.kind is InputKind.USER_INPUT else self._state[i] for i, s in enumerate(self._inputs)]
        with torch.no_grad():
            results = self._compiled.run(list(values))
        returned = []
        for spec, result in zip(self._outputs, results):
            if spec.kind in _WRITTEN:
                with torch.no_grad():
                    self._state[self._places[spec.target]].copy_(result)
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                position = [s.arg.name for s in self._inputs].index(spec.target)
                with torch.no_grad():
                    values[position].copy_(result)
            else:
                returned.append(result)
        return pytree.tree_unflatten(returned, self._program.call_spec.out_spec)

    def _user_placeholders(self):
        nodes = self._program.graph.find_nodes(op="placeholder")
        return [n for n, s in zip(nodes, self._inputs) if s.kind is InputKind.USER_INPUT]


def _loaded(path: str) -> torch.export.ExportedProgram:
    """PyTorch says what is wrong with a file in many lines; what is no such file at all is said here."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not a file of torch.export.save, or a damaged one")
    return torch.export.load(path)


def _bounds(program) -> dict[str, tuple[int, int | None]]:
    """The ranges that the user gave the dynamic dimensions."""
    return {str(symbol): sizes.bounds(r) for symbol, r in program.range_constraints.items() if symbol.is_Symbol}


_KNOWN = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# What is written back into the state.
_WRITTEN = tuple(getattr(OutputKind, name) for name in ("BUFFER_MUTATION", "PARAMETER_MUTATION") if hasattr(OutputKind, name))


def _check(placeholder, value) -> None:
    """The argument is what the program was exported for."""
    held = placeholder.meta.get("val")
    if not isinstance(held, torch.Tensor):
        return
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"argument {placeholder.name} is {type(value).__name__}, the program takes a tensor")
    wrong = (
        value.dtype != held.dtype
        or value.device.type != held.device.type
        or value.dim() != held.dim()
        or any(isinstance(want, int) and want != have for want, have in zip(held.shape, value.shape))
    )
    if wrong:
        raise ValueError(
            f"argument {placeholder.name} is {value.dtype}{list(value.shape)} on {value.device}, "
            f"the program takes {held.dtype}{[str(s) for s in held.shape]} on {held.device}"
        )


def compile_exported(program, options) -> CompiledProgram:
    """See `tilewright.compile`."""
    return CompiledProgram(program, options)
