"""PyTorch's scaled_dot_product_attention (flash, cuDNN) on the shapes of `tw-gpu-attention bench`, cold, as graphs.

    python3 gpu/attention_peer.py [--decode | --f32 | --tf32]

With `--f32` and `--tf32` (products of PyTorch's may round to TF32): the memory-efficient kernel, and two products with a softmax.

One line of JSON per shape and back end: median microseconds, TFLOP/s of what is visible, TB/s of all tensors.
"""

import json
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
WIDE = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "parts": SDPBackend.MATH}


def time_us(sets, run):
    """Median time of one call, over graphs that call it once on each set."""
    run_all = lambda: [run(*tensors) for tensors in sets]
    run_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_all()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        kept = run_all()
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    del graph, kept
    return sorted(times[1:])[len(times[1:]) // 2]


def measure(batch, heads, groups, rows, keys, depth, causal, dtype=torch.bfloat16):
    make = lambda h, n: torch.randn(batch, h, n, depth, device="cuda", dtype=dtype)
    size = dtype.itemsize * batch * depth * (2 * heads * rows + 2 * groups * keys)
    count = min(64, max(2, -(-250_000_000 // size)))
    sets = [(make(heads, rows), make(groups, keys), make(groups, keys)) for _ in range(count)]
    pairs = rows * (rows + 1) / 2 if causal else rows * keys
    for name, backend in (BACKENDS if dtype == torch.bfloat16 else WIDE).items():
        row = {"case": f"B{batch} H{heads}/{groups} S{rows} T{keys} D{depth}", "causal": causal, "backend": name}
        grouped = {"enable_gqa": True} if heads != groups else {}
        try:
            with sdpa_kernel(backend):
                us = time_us(sets, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped))
            row |= {"us": us, "tflops": 4 * batch * heads * depth * pairs / us / 1e6, "tb_per_s": size / us / 1e6}
        except RuntimeError as error:
            row["why"] = str(error)[:120]
        print(json.dumps(row), flush=True)


def main():
    torch.manual_seed(0)
    if "--decode" in sys.argv:
        for batch, heads, groups, rows, keys in [
            (1, 32, 8, 1, 2048),
            (1, 32, 8, 1, 32768),
            (16, 32, 8, 1, 8192),
            (128, 32, 8, 1, 8192),
            (16, 32, 32, 1, 8192),
            (16, 32, 8, 4, 8192),
        ]:
            # Several queries: without the causal mask, which differs in the last few keys only.
            measure(batch, heads, groups, rows, keys, 128, False)
        return
    wide = "--f32" in sys.argv or "--tf32" in sys.argv
    torch.backends.cuda.matmul.allow_tf32 = "--tf32" in sys.argv
    for batch, length in [(64, 128), (32, 256), (16, 512), (8, 1024), (8, 2048), (2, 8192)]:
        for depth in [64, 128]:
            for causal in [False, True]:
                measure(batch, 16, 16, length, length, depth, causal, torch.float32 if wide else torch.bfloat16)


main()
