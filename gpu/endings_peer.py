#!/usr/bin/env python3
"""PyTorch on the products with endings of bench/gemm_endings.txt: eager, and its compiler.

    python3 gpu/endings_peer.py [bench/gemm_endings.txt] [--seconds S]

Each call is recorded in a CUDA graph that goes round several sets of operands, together over five times the second-level
cache, as `tw-gpu-bench` does. A line a product: microseconds of eager PyTorch (cuBLAS and separate kernels), and of
torch.compile. Only bf16, f16 and tf32; Python's time is not measured.
"""
import argparse
import statistics

import torch
import torch.nn.functional as F

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def calls(ending):
    """A function of (x, w, w2, bias, bias2, residual)."""
    return {
        "bias-gelu": lambda x, w, w2, b, b2, r: F.gelu(F.linear(x, w, b)),
        "bias-silu": lambda x, w, w2, b, b2, r: F.silu(F.linear(x, w, b)),
        "bias-relu-residual": lambda x, w, w2, b, b2, r: F.relu(F.linear(x, w, b)) + r,
        "swiglu": lambda x, w, w2, b, b2, r: F.silu(F.linear(x, w)) * F.linear(x, w2),
        "geglu-bias": lambda x, w, w2, b, b2, r: F.gelu(F.linear(x, w, b)) * F.linear(x, w2, b2),
    }.get(ending)


def time_us(function, sets, seconds):
    for s in sets[:2]:
        for _ in range(3):
            function(*s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for s in sets:
            kept.append(function(*s))
    times = []
    spent = 0.0
    while len(times) < 5 or spent < seconds:
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1000 / len(sets))
        spent += a.elapsed_time(b) / 1000
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("list", nargs="?", default="bench/gemm_endings.txt")
    parser.add_argument("--seconds", type=float, default=0.1)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"{'type':<6}{'M x N x K':<22}{'ending':<20}{'eager us':>10}{'compiled us':>12}", flush=True)
    for line in open(args.list, encoding="utf-8"):
        words = line.split("#")[0].split()
        if len(words) < 6:
            continue
        m, n, k = map(int, words[1:4])
        function = calls(words[-1])
        for name in words[0].split(","):
            if name not in DTYPES or function is None:
                continue
            dtype = DTYPES[name]
            def random(*shape):
                return torch.randn(*shape, device="cuda", dtype=dtype)
            size = 2 * (m * k + 2 * n * k + 2 * m * n)
            count = max(2, min(64, 5 * l2 // size + 1))
            sets = [
                (random(m, k), random(n, k), random(n, k), random(n), random(n), random(m, n))
                for _ in range(count)
            ]
            compiled = torch.compile(function, dynamic=False)
            eager_us = time_us(function, sets, args.seconds)
            compiled_us = time_us(compiled, sets, args.seconds)
            shape = f"{m}x{n}x{k}"
            print(f"{name:<6}{shape:<22}{words[-1]:<20}{eager_us:>10.1f}{compiled_us:>12.1f}", flush=True)
            del sets
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
