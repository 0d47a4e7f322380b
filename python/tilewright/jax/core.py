"""Graphs as custom calls of XLA, with their rules for `vmap` and for derivatives of derivatives: what the functions of `tilewright.jax` are written with."""

from __future__ import annotations

import ctypes
import functools
import math

import jax
import jax.numpy as jnp

from .. import _native

# Graphs, and kernels that are written by hand (crates/xla-ffi/src/written.rs).
TARGET, KERNEL = "tilewright_graph", "tilewright_kernel"

NAMES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int16": "i16", "int8": "i8", "uint64": "u64", "uint32": "u32", "uint16": "u16", "uint8": "u8", "bool": "bool",
}  # fmt: skip
FLOATS = ("float32", "bfloat16", "float16", "float64")
DTYPES = {ours: name for name, ours in NAMES.items()}


def _register() -> None:
    for target, platform, address in _native.xla_handlers():
        pointer = ctypes.cast(address, ctypes.CFUNCTYPE(None))
        handler = jax.ffi.pycapsule(pointer)
        # On a GPU the same function compiles what a call needs before XLA runs it, or records it in a command buffer.
        stages = handler if platform == "cpu" else {"initialize": handler, "execute": handler}
        jax.ffi.register_ffi_target(target, stages, platform=platform, api_version=1)


_register()


class Graph:
    """A graph under construction."""

    def __init__(self, name: str, arguments, mapped=None):
        self.builder = _native.Builder(name)
        # The extent of the axis that `vmap` puts in front.
        self.batch = next((shape[0] for (_, shape), m in zip(arguments, mapped or ()) if m), None)
        self.types: dict[int, str] = {}
        self.shapes: dict[int, tuple] = {}
        self.arguments = []
        for i, (dtype, shape) in enumerate(arguments):
            number = self.builder.input(f"x{i}", f"{dtype}[{','.join(map(str, shape))}]")
            self.arguments.append(self._known(number))

    def _known(self, number: int) -> int:
        dtype, shape = self.builder.type_of(number)
        self.types[number], self.shapes[number] = dtype, tuple(int(s) for s in shape)
        return number

    def op(self, text: str, *inputs: int, result: str | None = None) -> int:
        return self._known(self.builder.op(text, list(inputs), result)[0])

    def map(self, text: str, *inputs: int) -> int:
        """A formula of operands a, b, c and so on, which broadcast."""
        return self.op(f"map {{ {', '.join('abcdef'[: len(inputs)])} -> {text} }}", *inputs)

    def cast(self, value: int, dtype: str) -> int:
        return value if self.types[value] == dtype else self.map(f"{dtype}(a)", value)

    def wide(self, value: int) -> int:
        """As f32 where it is narrower."""
        return self.cast(value, "f32") if self.types[value] in ("f16", "bf16") else value

    def sum(self, value: int, axes, keep: bool = False) -> int:
        axes = list(axes)
        if not axes:
            return value
        return self.op(f"reduce sum axes=[{','.join(map(str, axes))}]{' keep' if keep else ''}", value)

    def mean(self, value: int, axes) -> int:
        """The mean over axes, which stay with size one."""
        count = math.prod(self.shapes[value][a] for a in axes)
        return self.map(f"a / {float(max(count, 1))!r}", self.sum(value, axes, True))

    def contract(self, spec: str, a: int, b: int) -> int:
        dtype = self.types[a]
        acc = "f32" if dtype in ("f16", "bf16") else dtype
        return self.op(f'contract "{spec}" acc={acc}', a, b)

    def max(self, value: int, axis: int) -> int:
        """The largest along an axis, which stays with size one."""
        return self.op(f"reduce max axes=[{axis}] keep", value)

    def places(self, like: int, dtype: str) -> int:
        """The place of each element along the last axis of a value, to broadcast over it."""
        *rows, columns = self.shapes[like]
        return self.op(f"iota axis={len(rows)}", result=f"{dtype}[{','.join(['1'] * len(rows) + [str(columns)])}]")

    def part(self, value: int, axis: int, start: int, length: int) -> int:
        """Some elements along an axis that lie one behind the other."""
        shape = self.shapes[value]
        starts = [start if a == axis else 0 for a in range(len(shape))]
        lens = [length if a == axis else n for a, n in enumerate(shape)]
        listed = ["[" + ",".join(map(str, v)) + "]" for v in (starts, lens, [1] * len(shape))]
        return self.op("slice starts={} lens={} steps={}".format(*listed), value)

    def inline(self, write, *values: int, **settings) -> int:
        """What another function writes of values, as a part of this graph. It has no derivative."""
        return write(self, *values, **settings)

    def reshape(self, value: int, shape) -> int:
        return self.op(f"reshape [{','.join(map(str, shape))}]", value)

    def spread(self, mapped, *values: int) -> tuple[int, ...]:
        """Values with the batch axis in front: those that lack it are repeated. `mapped` says which have it, or is `None`."""
        if mapped is None:
            return values
        return tuple(v if m else self.repeated(v, self.batch) for v, m in zip(values, mapped))

    def repeated(self, value: int, size: int) -> int:
        return self.op(f"expand [{','.join(map(str, (size, *self.shapes[value])))}]", value)

    def lifted(self, value: int, mapped: bool, rank: int) -> int:
        """A vector for each batch, to broadcast over arrays of `rank` axes beside the batch axis."""
        if not mapped:
            return value
        size, *rest = self.shapes[value]
        return self.reshape(value, (size, *[1] * (rank - len(rest)), *rest))

    def finish(self, *values: int):
        for i, value in enumerate(values):
            self.builder.output(f"y{i}", value)
        return self.builder.text(), [(self.types[v], self.shapes[v]) for v in values]


@functools.lru_cache(maxsize=4096)
def _written(write, arguments, settings):
    """The text of a graph and the types of its results."""
    settings = dict(settings)
    graph = Graph(write.__name__.strip("_"), arguments, settings.get("mapped"))
    results = write(graph, *graph.arguments, **settings)
    return graph.finish(*(results if isinstance(results, tuple) else (results,)))


def _axes(array) -> frozenset:
    """The axes of devices that an array varies over, inside of `shard_map`."""
    kind = jax.typeof(array)
    # JAX has given it several names.
    return frozenset(getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", ()))


def same(*arrays):
    """Arrays, and tuples of them, that vary over the same axes of devices: what is one for all gets a gradient that is a sum over them."""
    whole = frozenset().union(*map(_axes, jax.tree.leaves(arrays)))
    if not whole:
        return arrays

    def spread(array):
        missing = tuple(sorted(whole - _axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(spread, arrays)


def kernel(text, results, *arrays, aliases=None):
    """A kernel that is written by hand; a list of results, like those that are given. `aliases`: results that take the memory of arrays."""
    results = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]
    call = jax.ffi.ffi_call(KERNEL, results, input_output_aliases=aliases, vmap_method="sequential")
    return same(list(call(*arrays, kernel=text)), arrays)[0]


def _bare(write, arrays, precision, settings):
    """The custom call of the graph that `write` writes for these arrays; a list of results."""
    if hasattr(write, "by_hand") and "mapped" not in dict(settings):
        return write.by_hand(*arrays, **dict(settings))
    arguments = tuple((NAMES[a.dtype.name], tuple(a.shape)) for a in arrays)
    text, types = _written(write, arguments, settings)
    results = [jax.ShapeDtypeStruct(shape, jnp.dtype(DTYPES[dtype])) for dtype, shape in types]
    return jax.ffi.ffi_call(TARGET, results)(*arrays, graph=text, precision=precision)


@functools.lru_cache(maxsize=4096)
def _mapped(write, precision, settings, mapped):
    """A call with its rule for `vmap`. `mapped` says for each argument whether it has a batch axis in front, or is `None`
    when nothing has: `write` then gets it as the setting `mapped`. Axes of nested `vmap`s are one axis for `write`.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        given = settings if mapped is None else (*settings, ("mapped", mapped))
        return _bare(write, arrays, precision, given)

    @call.def_vmap
    def rule(size, batched, *arrays):
        before = mapped or (False,) * len(arrays)
        after = tuple(bool(b) or old for b, old in zip(batched, before))
        inner = next((a.shape[int(bool(b))] for a, b, old in zip(arrays, batched, before) if old), None)
        folded = []
        for a, b, old in zip(arrays, batched, before):
            if inner is not None and (b or old):
                # One axis of `size * inner`: what has only one of the two is repeated along the other.
                a = a if b else a[None]
                a = a if old else a[:, None]
                a = jnp.broadcast_to(a, (size, inner, *a.shape[2:])).reshape(size * inner, *a.shape[2:])
            folded.append(a)
        results = _mapped(write, precision, settings, after)(*folded)
        if inner is not None:
            results = [r.reshape(size, inner, *r.shape[1:]) for r in results]
        return results, [True] * len(results)

    return call


def computed(write, *arrays, **settings):
    """What the graph computes that `write` writes, by JAX's own operators; a list of results."""
    from .twins import Twin

    graph = Twin(arrays)
    results = write(graph, *graph.arguments, **settings)
    return graph.finish(*(results if isinstance(results, tuple) else (results,)))


@functools.lru_cache(maxsize=4096)
def _differentiable(write, precision, settings):
    """A call whose derivative JAX finds in what the graph computes (`twins`). First derivatives of the functions of this package are
    kernels (`jax.custom_vjp`); this is for theirs."""
    inner = _mapped(write, precision, settings, None)

    @jax.custom_jvp
    def function(*arrays):
        # What varies over devices is forgotten on the way.
        return same(list(inner(*arrays)), arrays)[0]

    @function.defjvp
    def rule(primals, tangents):
        def twin(*arrays):
            return computed(write, *arrays, **dict(settings))

        return function(*primals), jax.jvp(twin, primals, tangents)[1]

    return function


def call(write, *arrays, precision: str = "f32", **settings):
    """Runs the graph that `write` writes for these arrays; a list of results."""
    arrays = [jnp.asarray(a) for a in arrays]
    for a in arrays:
        if a.dtype.name not in NAMES:
            raise TypeError(f"tilewright has no element type {a.dtype.name}")
    return _differentiable(write, precision, tuple(sorted(settings.items())))(*arrays)


def floats(**arrays) -> list:
    """Arrays of floats; TypeError for others, by their names."""
    found = [jnp.asarray(a) for a in arrays.values()]
    for name, a in zip(arrays, found):
        if a.dtype.name not in FLOATS:
            raise TypeError(f"{name} is {a.dtype.name}; it must be one of {', '.join(FLOATS)}")
    return found


def wide(dtype):
    """What sums are kept in."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def in_chunks(step, begin, rows, *arrays):
    """`step` on `rows` rows of the arrays at a time: what it carries, and its results of all rows."""
    begin, arrays = same(begin, arrays)
    count = arrays[0].shape[0]
    full = count // rows
    carried, parts = begin, []
    if full == 1:
        carried, found = step(carried, *(a[:rows] for a in arrays))
        parts.append(found)
    elif full:
        stacked = [a[: full * rows].reshape(full, rows, *a.shape[1:]) for a in arrays]
        carried, found = jax.lax.scan(lambda c, a: step(c, *a), carried, stacked)
        parts.append([f.reshape(full * rows, *f.shape[2:]) for f in found])
    if count > full * rows or not count:
        carried, found = step(carried, *(a[full * rows :] for a in arrays))
        parts.append(found)
    return carried, [jnp.concatenate(each) if len(parts) > 1 else each[0] for each in zip(*parts)]


def axis_of(axis: int, shape) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} of an array of shape {tuple(shape)}")
    return axis % len(shape)


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
