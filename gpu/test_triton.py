"""The Triton modules of gpu/triton on a GPU: right, and how fast, beside PyTorch.

    python gpu/test_triton.py [--quick] [MODULE...]

Needs PyTorch 2.11 with Triton 3.6 and one GPU; nothing of this repository but gpu/triton, whose
modules are printed from the tile programs beside them (crates/emit-triton/tests/goldens.rs keeps them
in step).

Right: on random inputs of odd sizes, in memory with gaps and transposed axes, into poisoned outputs,
against PyTorch in float64. The largest error, as a part of the largest value, may be at most twice that
of PyTorch's operators in the same precision on the same inputs; what lies between the elements of an
output must keep its poison. Times are medians with a cold second-level cache. `--quick` leaves the times
out. The exit code is 1 when a check fails.
"""

import importlib.util
import pathlib
import sys

import torch
import torch.nn.functional as F
import triton

HERE = pathlib.Path(__file__).resolve().parent / "triton"
POISON = 12345.0
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def module(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # Triton reads the source through it
    spec.loader.exec_module(loaded)
    return loaded


def poisoned(shape, dtype, transposed):
    """A view with gaps in poisoned memory, and that memory."""
    wide = [n + 5 for n in shape]
    if transposed and len(shape) > 1:
        wide[-1], wide[-2] = wide[-2], wide[-1]
    memory = torch.full(wide, POISON, dtype=dtype, device="cuda")
    view = memory.transpose(-1, -2) if transposed and len(shape) > 1 else memory
    return view[tuple(slice(2, n + 2) for n in shape)], memory


def randn(shape, dtype, transposed=False):
    view, _ = poisoned(shape, dtype, transposed)
    view.copy_(torch.randn(shape, device="cuda"))
    return view


# Operators: inputs for a size, what PyTorch computes from them, and what a call moves and computes.


def gemm_gelu(size, dtype, transposed):
    m, n, k = size
    return [randn((m, k), dtype, transposed), randn((k, n), dtype, not transposed), randn((n,), dtype)], (m, n)


def gemm_gelu_torch(a, b, bias):
    return F.gelu(torch.addmm(bias, a, b))


def softmax(size, dtype, transposed):
    return [randn(size, dtype, transposed)], size


def softmax_torch(x):
    return torch.softmax(x, dim=1)


def map_group(size, dtype, transposed):
    a, b, c = size
    return [randn(size, dtype, transposed), randn((c,), dtype), randn((b, 1), dtype)], size


def map_group_torch(x, row, column):
    return torch.tanh(x * row) + column


def layer_norm(size, dtype, transposed):
    return [randn(size, dtype, transposed), randn(size[1:], dtype), randn(size[1:], dtype)], size


def layer_norm_torch(x, gain, bias):
    return F.layer_norm(x, x.shape[1:], gain, bias, 1e-5)


GEMM_SIZES = [(1, 1, 1), (17, 33, 65), (129, 257, 515), (1000, 1001, 999), (3, 4097, 130)]
ROW_SIZES = [(1, 1), (5, 1023), (131, 2049), (777, 77), (33, 12345)]
MAP_SIZES = [(1, 1, 1), (3, 17, 513), (7, 129, 1000), (2, 5, 12345)]
# Module, inputs, the same by PyTorch, sizes to check, size to time, figure of merit of that size.
CASES = [
    ("gemm_gelu_bf16", gemm_gelu, gemm_gelu_torch, GEMM_SIZES, (4096, 4096, 4096), "TFLOP/s"),
    ("gemm_gelu_f32", gemm_gelu, gemm_gelu_torch, GEMM_SIZES, (4096, 4096, 4096), "TFLOP/s"),
    ("softmax_f32", softmax, softmax_torch, ROW_SIZES, (8192, 4096), "GB/s"),
    ("softmax_bf16", softmax, softmax_torch, ROW_SIZES, (8192, 4096), "GB/s"),
    ("layer_norm_f32", layer_norm, layer_norm_torch, ROW_SIZES[1:], (8192, 4096), "GB/s"),
    ("map_group_f32", map_group, map_group_torch, MAP_SIZES, (64, 1024, 1024), "GB/s"),
    ("map_group_bf16", map_group, map_group_torch, MAP_SIZES, (64, 1024, 1024), "GB/s"),
]


def check(name, inputs_of, torch_of, sizes):
    """Largest errors, ours and PyTorch's, over all sizes; and what is wrong beside."""
    dtype, launch = DTYPES[name.rsplit("_", 1)[1]], module(name).launch
    ours = theirs = 0.0
    wrong = []
    for size in sizes:
        for transposed in (False, True):
            inputs, shape = inputs_of(size, dtype, transposed)
            want = torch_of(*[x.double() for x in inputs])
            scale = want.abs().max().item()
            there = (torch_of(*inputs).double() - want).abs().max().item()
            view, memory = poisoned(shape, dtype, transposed)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            launch(*inputs, view, stream=stream)
            torch.cuda.synchronize()
            here = (view.double() - want).abs().max().item()
            if not here < float("inf"):
                wrong.append(f"{size}: not a number")
            ours, theirs = max(ours, here / scale), max(theirs, there / scale)
            view.fill_(POISON)
            if not bool((memory == torch.tensor(POISON, dtype=dtype)).all()):
                wrong.append(f"{size}: writes outside its output")
    if not ours <= 2 * theirs:
        wrong.append(f"error {ours:.1e} is over twice PyTorch's {theirs:.1e}")
    return ours, theirs, wrong


def check_large():
    """Over 2**31 elements: offsets need 64 bits."""
    launch, shape = module("map_group_bf16").launch, (3, 1, 2**30)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    row, column = randn(shape[2:], torch.bfloat16), randn((1, 1), torch.bfloat16)
    y = torch.full_like(x, POISON)
    launch(x, row, column, y)
    wrong = []
    for i in range(3):
        for part in (slice(0, 4096), slice(2**29, 2**29 + 4096), slice(-4096, None)):
            want = torch.tanh(x[i, :, part].float() * row[part].float()) + column.float()
            if not torch.equal(y[i, :, part], want.bfloat16()):
                off = (y[i, :, part].float() - want).abs().max().item()
                if not off <= 2**-8 * want.abs().max().item():
                    wrong.append(f"{shape}: row {i} from {part.start} is off by {off:.1e}")
    return wrong


def merit(inputs, output, size, unit, seconds):
    if unit == "TFLOP/s":
        m, n, k = size
        return 2 * m * n * k / seconds / 1e12
    return sum(t.numel() * t.element_size() for t in [*inputs, output]) / seconds / 1e9


def main():
    quick = "--quick" in sys.argv
    torch.manual_seed(int(torch.seed()) % 2**31)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}, seed {torch.initial_seed()}")
    rows, failed = [], []
    wanted = [arg for arg in sys.argv[1:] if not arg.startswith("--")]
    unknown = set(wanted) - {case[0] for case in CASES} - {"large"}
    if unknown:
        sys.exit(f"there is no module {', '.join(sorted(unknown))}")
    for name, inputs_of, torch_of, sizes, timed, unit in CASES:
        if wanted and name not in wanted:
            continue
        ours, theirs, wrong = check(name, inputs_of, torch_of, sizes)
        failed += [f"{name}: {what}" for what in wrong]
        row = [name, f"{ours:.1e}", f"{theirs:.1e}", "wrong" if wrong else "right"]
        if not quick:
            dtype, launch = DTYPES[name.rsplit("_", 1)[1]], module(name).launch
            inputs, shape = inputs_of(timed, dtype, False)
            inputs = [x.contiguous() for x in inputs]
            output = torch.empty(shape, dtype=dtype, device="cuda")
            bench = lambda f: triton.testing.do_bench(f, warmup=100, rep=300, return_mode="median") / 1e3
            here, there = bench(lambda: launch(*inputs, output)), bench(lambda: torch_of(*inputs))
            row += ["x".join(map(str, timed)), f"{here * 1e6:.1f}", f"{there * 1e6:.1f}", f"{there / here:.2f}"]
            row += [f"{merit(inputs, output, timed, unit, here):.0f} {unit}"]
        rows.append(row)
        print(" ".join(row), flush=True)
    if not wanted or "large" in wanted:
        large = check_large()
        failed += [f"large: {what}" for what in large]
        rows.append(["over 2**31 elements", "", "", "wrong" if large else "right"])
    heads = ["kernel", "error", "PyTorch's", "", "size", "us", "PyTorch us", "times as fast", "reached"]
    heads = heads[: max(map(len, rows))]
    rows = [row + [""] * (len(heads) - len(row)) for row in rows]
    widths = [max(len(r[i]) for r in [heads, *rows]) for i in range(len(heads))]
    print()
    for row in [heads, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for what in failed:
        print(f"FAILED {what}")
    print("all right" if not failed else f"{len(failed)} checks failed")
    sys.exit(bool(failed))


main()
