"""Every Triton module that the emitter's goldens expect, without a GPU.

Compiled: by Triton for compute capability 9.0, down to machine code (Triton brings its own ptxas).
Run: in Triton's interpreter (TRITON_INTERPRET=1), on arrays with odd sizes, unusual strides and
poisoned outputs, against NumPy in float64. PyTorch is not needed: `Tensor` below is what a launcher
asks of a tensor. Triton keeps what it compiled below target/triton, found again by source and options.

To add one: a case in crates/emit-triton/tests/golden/*.txt, and here a function in CASES that makes
its arguments and what should come out.
"""

import importlib.util
import inspect
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "crates" / "emit-triton" / "tests" / "golden"
POISON = 113  # A byte; as float 3.4e30, as bfloat16 3.3e30.
RNG = np.random.default_rng(20260801)


# Tensors.


def to_bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Storage:
    """Memory that is in the right place already."""

    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.__array_interface__["data"][0]

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.data_ptr() == self.data_ptr()


class Tensor:
    """A NumPy array as the launcher and Triton's interpreter want to see it."""

    def __init__(self, array, dtype):
        self.array, self.dtype = array, dtype

    shape = property(lambda self: self.array.shape)

    def stride(self, axis=None):
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        return strides if axis is None else strides[axis]

    def numel(self):
        return self.array.size

    def is_contiguous(self):
        return self.array.flags.c_contiguous

    def data_ptr(self):
        return self.array.__array_interface__["data"][0]

    def untyped_storage(self):
        return Storage(self.array)

    def new_empty(self, *_, **__):
        return Tensor(self.array, self.dtype)

    def set_(self, *_):
        pass

    size = lambda self: self.shape
    storage_offset = lambda self: 0

    def value(self):
        return from_bf16(self.array) if self.dtype == "bfloat16" else self.array


def strided(shape, dtype):
    """Poisoned memory with gaps, the last two axes in column-major order."""
    if not shape:
        return np.zeros((), dtype)
    wide = [n + 3 for n in shape]
    if len(shape) >= 2:
        wide[-1], wide[-2] = wide[-2], wide[-1]
    memory = np.full(int(np.prod(wide)) * np.dtype(dtype).itemsize, POISON, np.uint8).view(dtype).reshape(wide)
    if len(shape) >= 2:
        memory = memory.swapaxes(-1, -2)
    return memory[tuple(slice(1, n + 1) for n in shape)]


def gaps_are_poisoned(tensor):
    """Whether only elements of the tensor were written."""
    memory = tensor.array
    if not memory.shape:
        return True
    while memory.base is not None:
        memory = memory.base
    kept = tensor.array.copy()
    tensor.array[...] = np.frombuffer(bytes([POISON]) * tensor.array.itemsize, tensor.array.dtype)
    clean = bool((memory.view(np.uint8) == POISON).all())
    tensor.array[...] = kept
    return clean


def tensor(values, dtype=None):
    values = np.asarray(values)
    dtype = dtype or str(values.dtype)
    raw = to_bf16(values) if dtype == "bfloat16" else values.astype(dtype)
    array = strided(raw.shape, raw.dtype)
    array[...] = raw
    return Tensor(array, dtype)


def output(shape, dtype="float32"):
    return Tensor(strided(shape, np.uint16 if dtype == "bfloat16" else dtype), dtype)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def f64(t):
    return np.asarray(t.value(), np.float64)


# The cases: by the kernel's name, a function that gives the arguments of `launch`, and for each output
# its position, what should be there and how far off it may be (relative to the largest).


def erf(x):
    return np.vectorize(math.erf)(x)


def linear_gelu():
    m, n, k = 45, 21, 37
    a, b, bias = (tensor(normal(*s), "bfloat16") for s in ((m, k), (k, n), (n,)))
    x = f64(a) @ f64(b) + f64(bias)
    want = x * 0.5 * (1 + erf(x * 0.70710678))
    return [a, b, bias, output((m, n), "bfloat16")], {}, [(3, want, rounding("bfloat16"))]


def panels(w, size):
    k, n = w.shape
    padded = np.zeros((k, -(-n // size) * size), w.dtype)
    padded[:, :n] = w
    return np.ascontiguousarray(padded.reshape(k, -1, size).swapaxes(0, 1)).reshape(-1)


def packed_relu():
    m, n, k = 29, 43, 35
    a, w = tensor(normal(m, k)), normal(k, n)
    want = np.maximum(f64(a) @ w.astype(np.float64), 0)
    memory = Tensor(panels(w, 8), "float32")
    return [a, memory, output((m, n))], {}, [(2, want, 1e-6)]


def attention():
    h, s, d = 2, 21, 8
    q, k, v = (tensor(normal(h, s, d)) for _ in range(3))
    score = f64(q) @ f64(k).swapaxes(1, 2) * 0.5
    score = np.where(np.tri(s, dtype=bool), score, -np.inf)
    p = np.exp(score - score.max(axis=2, keepdims=True))
    want = p / p.sum(axis=2, keepdims=True) @ f64(v)
    return [q, k, v, output((h, s, d))], {}, [(3, want, 1e-6)]


def conv3x3():
    n, c, h, w, o = 2, 5, 5, 7, 6
    x, f = tensor(normal(n, c, h, w)), normal(o, c, 3, 3)
    padded = np.pad(f64(x), ((0, 0), (0, 0), (1, 1), (1, 1)))
    want = np.zeros((n, o, 3, 4))
    for ky in range(3):
        for kx in range(3):
            patch = padded[:, :, ky : ky + 2 * 2 + 1 : 2, kx : kx + 2 * 3 + 1 : 2]
            want += np.einsum("nchw,oc->nohw", patch, f[:, :, ky, kx].astype(np.float64))
    blocks = np.zeros((8, c, 3, 3), np.float32)
    blocks[:o] = f
    memory = Tensor(np.ascontiguousarray(blocks.reshape(2, 4, c, 3, 3).transpose(0, 2, 3, 4, 1)).reshape(-1), "float32")
    return [x, memory, output((n, o, 3, 4))], {}, [(2, want, 1e-6)]


def softmax():
    x = tensor(normal(7, 50) * 4)
    e = np.exp(f64(x) - f64(x).max(axis=1, keepdims=True))
    return [x, output((7, 50))], {}, [(1, e / e.sum(axis=1, keepdims=True), 1e-6)]


def softmax_nan():
    """A NaN spoils its row and no other."""
    values = normal(5, 33)
    values[2, 17] = np.nan
    x = tensor(values)
    e = np.exp(f64(x) - f64(x).max(axis=1, keepdims=True))
    return [x, output((5, 33))], {}, [(1, e / e.sum(axis=1, keepdims=True), 1e-6)]


def layer_norm():
    x, gain, bias = tensor(normal(6, 100) + 3, "float16"), tensor(normal(100), "float16"), tensor(normal(100), "float16")
    d = f64(x) - f64(x).mean(axis=1, keepdims=True)
    want = d / np.sqrt((d**2).mean(axis=1, keepdims=True) + 1e-5) * f64(gain) + f64(bias)
    return [x, gain, bias, output((6, 100), "float16")], {}, [(3, want, 2**-10)]


def scale_shift():
    a, b, c = 3, 11, 19
    x, row, column = tensor(normal(a, b, c)), tensor(normal(c)), tensor(normal(b, 1))
    scalar = tensor(np.float32(0.75))
    y = np.tanh(f64(x) * 0.75 + f64(row)) - f64(column)
    return [x, row, column, scalar, output((a, b, c)), output((a, b, c), "bool")], {}, [(4, y, 1e-6), (5, y > 0, 0)]


def embed():
    ids = tensor(np.array([3, -1, 0, 12, 13, 2**40 + 3, 7, 7, 1, -(2**33)], np.int64))
    table = tensor(normal(13, 21))
    want = np.full((10, 21), 7.0)
    for i, row in enumerate(ids.value()):
        if 0 <= row < 13:
            want[i] = table.value()[row]
    return [ids, table, output((10, 21))], {}, [(2, want, 0)]


def scans():
    values = normal(6, 12)
    values[1, 3] = values[1, 9] = 5.0  # ties
    values[1, 2] = values[1, 6] = -5.0
    values[2, 4] = np.nan
    values[3] = -np.inf
    x = tensor(values)
    limit = 8
    with np.errstate(invalid="ignore"):
        sums = np.cumsum(values.astype(np.float64), axis=1)
    back = np.full((6, 12), -np.inf)
    for j in range(10, -1, -1):
        back[:, j] = np.maximum(back[:, j + 1], values[:, j + 1])
    last = limit - 1 - np.argmin(values[:, limit - 1 :: -1], axis=1)
    prod = np.prod(values[:, :limit].astype(np.float64), axis=1)
    outputs = [output((6, 12)), output((6, 12)), output((6,), "int64"), output((6,), "int64"), output((6,))]
    want = [(1, sums, 1e-6), (2, back, 0), (3, np.argmax(values, axis=1), 0), (4, last, 0), (5, prod, 1e-6)]
    return [x, *outputs], {"L": limit}, want


def philox(counter, seed):
    c, key = [int(x) for x in counter], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ key[1], p0 & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def noise():
    assert philox([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # the authors' known answer
    r = 7
    u = np.array([philox([i // 4, 0, 0, 0], 1311768467463790320)[i % 4] >> 8 for i in range(r * 12)]) * 2.0**-24
    words = [philox([i // 2, 0, 0, 0], 9)[2 * (i % 2) :][:2] for i in range(r * 12)]
    d = np.array([((a << 32 | b) >> 11) * 2.0**-53 for a, b in words])
    t = np.broadcast_to(np.arange(r * 6, dtype=np.int32).reshape(1, r, 6), (2, r, 6))
    total, count = tensor(np.ones(12, np.float32)), tensor(np.array([40], np.int32))
    arguments = [output((r, 12)), output((r, 12), "float64"), output((2, r, 6), "int32"), total, count]
    u, d = u.reshape(r, 12), d.reshape(r, 12)
    return arguments, {}, [(0, u, 0), (1, d, 0), (2, t, 0), (3, 1 + u.sum(axis=0), 1e-6), (4, np.array([42]), 0)]


def bytes_():
    x = tensor(RNG.integers(-128, 128, 48), "int8")
    sums = np.cumsum(x.value().astype(np.int64).reshape(6, 8), axis=1).astype(np.int8).reshape(48)
    z = np.concatenate([np.full(8, 5) if (p - 2) // 3 == 0 else np.arange(8) + 10 * ((p - 2) // 3) for p in range(6)])
    arguments = [x, output((48,), "int8"), output((48,), "int32"), output((1,), "int8")]
    return arguments, {}, [(1, sums, 0), (2, z, 0), (3, x.value()[:8].max(keepdims=True), 0)]


def gpu_gemm(dtype):
    m, n, k = 131, 140, 70
    a, b, bias = (tensor(normal(*s), dtype) for s in ((m, k), (k, n), (n,)))
    x = f64(a) @ f64(b) + f64(bias)
    want = x * 0.5 * (1 + erf(x * 0.5**0.5))
    return [a, b, bias, output((m, n), dtype)], {}, [(3, want, rounding(dtype))]


def gpu_softmax(dtype):
    x = tensor(normal(5, 1100), dtype)
    e = np.exp(f64(x) - f64(x).max(axis=1, keepdims=True))
    return [x, output((5, 1100), dtype)], {}, [(1, e / e.sum(axis=1, keepdims=True), rounding(dtype))]


def gpu_layer_norm(dtype):
    x, gain, bias = (tensor(normal(*s), dtype) for s in ((3, 1100), (1100,), (1100,)))
    d = f64(x) - f64(x).mean(axis=1, keepdims=True)
    want = d / np.sqrt((d**2).mean(axis=1, keepdims=True) + 1e-5) * f64(gain) + f64(bias)
    return [x, gain, bias, output((3, 1100), dtype)], {}, [(3, want, rounding(dtype))]


def gpu_map_group(dtype):
    x, row, column = (tensor(normal(*s), dtype) for s in ((2, 7, 515), (515,), (7, 1)))
    want = np.tanh(f64(x) * f64(row)) + f64(column)
    return [x, row, column, output((2, 7, 515), dtype)], {}, [(3, want, rounding(dtype))]


def rounding(dtype):
    """What one rounding may cost: the interpreter cuts a bfloat16 off, a GPU rounds to the nearest."""
    return {"float32": 1e-6, "bfloat16": 2**-7}[dtype]


def in_types(case, *dtypes):
    return [lambda dtype=dtype: case(dtype) for dtype in dtypes]


CASES = {
    "gemm_gelu_bf16": in_types(gpu_gemm, "bfloat16"),
    "gemm_gelu_f32": in_types(gpu_gemm, "float32"),
    "softmax_bf16": in_types(gpu_softmax, "bfloat16"),
    "softmax_f32": in_types(gpu_softmax, "float32"),
    "layer_norm_f32": in_types(gpu_layer_norm, "float32"),
    "map_group_bf16": in_types(gpu_map_group, "bfloat16"),
    "map_group_f32": in_types(gpu_map_group, "float32"),
    "linear_gelu": [linear_gelu],
    "packed_relu": [packed_relu],
    "attention": [attention],
    "conv3x3": [conv3x3],
    "softmax": [softmax, softmax_nan],
    "layer_norm": [layer_norm],
    "scale_shift": [scale_shift],
    "embed": [embed],
    "scans": [scans],
    "noise": [noise],
    "bytes": [bytes_],
}


# Modules.


def modules(folder):
    """The Python parts of the goldens and the modules for the GPU test, by the kernel's name."""
    files = sorted((ROOT / "gpu" / "triton").glob("*.py"))
    for file in sorted(GOLDEN.glob("*.txt")):
        for case in file.read_text().split("\n==== ")[1:]:
            tile, _, expected = case.partition("\n----\n")
            if expected.startswith("error:"):
                continue
            name = tile.partition("kernel @")[2].partition("(")[0]
            files.append(pathlib.Path(folder, f"{name}.py"))
            files[-1].write_text(expected)
    found = {}
    for path in files:
        name = path.stem
        spec = importlib.util.spec_from_file_location(f"{name}_module", path)
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[f"{name}_module"] = found[name]
        spec.loader.exec_module(found[name])
    assert set(found) == set(CASES), set(found) ^ set(CASES)
    return found


class Recorder:
    """Stands where a kernel is and keeps what it is launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *arguments, **constants):
        self.arguments, self.constants = arguments, constants


def compile_all(folder):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    for name, module in modules(folder).items():
        kernel, recorder = getattr(module, name), Recorder()
        setattr(module, name, recorder)
        arguments, sizes, _ = CASES[name][0]()
        module.launch(*arguments, **sizes)
        signature, constants = {}, {}
        for i, parameter in enumerate(inspect.signature(kernel.fn).parameters.values()):
            if i < len(recorder.arguments):
                value = recorder.arguments[i]
                signature[parameter.name] = mangle_type(value)
            else:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = recorder.constants[parameter.name]
        options = {key: recorder.constants[key] for key in ("num_warps", "num_stages")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        if "nan_max" in dir(module):
            # The interpreter keeps NaN in any case, so only the text can tell.
            assert "max.NaN.f32" in compiled.asm["ptx"], f"{name}: the maximum loses NaN"
        print(f"  {name}: {len(compiled.asm['cubin'])} bytes of machine code")


class Libdevice:
    """What the interpreter lacks: functions of the target's library, in NumPy."""

    def __init__(self, tl):
        self.tl = tl

    def __getattr__(self, name):
        from triton.runtime.interpreter import TensorHandle

        functions = {"div_rn": np.divide, "sqrt_rn": np.sqrt, "tanh": np.tanh, "exp": np.exp}

        def call(*operands):
            values = [x.handle.data for x in operands]
            result = functions[name](*values).astype(values[0].dtype)
            scalar = operands[0].dtype
            shape = np.broadcast_shapes(*[tuple(int(n) for n in x.shape) for x in operands])
            ty = self.tl.block_type(scalar, list(shape)) if shape else scalar
            return self.tl.tensor(TensorHandle(result, scalar), ty)

        return call


def repair_interpreter():
    """The interpreter holds bfloat16 as bits and forgets it in products."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    import triton.language as tl

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        widen = lambda x: TensorHandle(from_bf16(x.data), tl.float32) if x.dtype == tl.bfloat16 else x
        return original(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def run_all(folder):
    import triton.language as tl

    repair_interpreter()

    failed = 0
    np.seterr(all="ignore")
    for name, module in modules(folder).items():
        if hasattr(module, "libdevice"):
            module.libdevice = Libdevice(tl)
        for case in CASES[name]:
            arguments, sizes, expected = case()
            with np.errstate(all="ignore"):
                module.launch(*arguments, **sizes)
            errors = []
            for at, want, bound in expected:
                got = arguments[at].value()
                assert got.shape == np.shape(want), (got.shape, np.shape(want))
                same = (got == want) | ((got != got) & (want != want))
                finite = np.isfinite(np.where(same, 0, got)) & np.isfinite(np.where(same, 0, want))
                off = np.where(same, 0, np.where(finite, np.abs(got - np.asarray(want, np.float64)), np.inf))
                scale = np.max(np.abs(want), where=np.isfinite(want), initial=1e-30)
                errors.append(off.max() / scale)
                if errors[-1] > bound:
                    failed += 1
                    where = np.unravel_index(off.argmax(), off.shape)
                    print(f"  {name}: output {at} is {got[where]} at {where}, not {np.asarray(want)[where]}")
                assert gaps_are_poisoned(arguments[at]), f"output {at} is written outside its elements"
            print(f"  {name}: largest error {max(errors):.1e}")
    assert failed == 0, f"{failed} outputs are wrong"


def main():
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            return {"compile": compile_all, "run": run_all}[sys.argv[1]](folder)
    kept = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "triton"
    for part, environment in (("compile", {}), ("run", {"TRITON_INTERPRET": "1"})):
        print(f"{part}:", flush=True)
        variables = os.environ | environment | {"TRITON_CACHE_DIR": str(kept)}
        subprocess.run([sys.executable, __file__, part], check=True, env=variables)


if __name__ == "__main__":
    main()
