"""Host time per call of the operator pack beside PyTorch's own operators, forward, forward that is recorded, and backward.

    python bench/host_overhead.py [--device cpu|cuda] [--only WORD] [--rounds N] [--calls N] [--json FILE] [--most MICROSECONDS]

Tensors are tiny, so that on a GPU the device is never the limit, and on a processor (one thread) both compute next to nothing. All candidates take turns, some
calls each, in many short rounds: medians, and the median of the differences within a round. `built-in` is what one writes with PyTorch
for the same: one operator for some rows, several for others (`x + r` and a norm). `--most` ends with exit code 1 where ours costs so
much more than a single operator's.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

from tilewright import ops


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def cases(device):
    """Name, ours, built-in, tensors that take gradients, others, whether the built-in is a single operator."""

    def made(*shape):
        return torch.randn(shape, device=device)

    n = 64
    x, r, w, b = made(4, n), made(4, n), made(n), made(n)
    x4, table = made(1, 2, 4, 16), made(1, 4, 16)
    q, k, v = (made(1, 2, 16, 32) for _ in range(3))
    targets = torch.randint(0, n, (4,), device=device)
    wide, bias = made(n, n), made(n)
    rows, places = torch.randint(0, 32, (8,), device=device), torch.tensor([0, 3, 5], device=device)
    quick = ops.elementwise("x * sigmoid(1.702 * x)")
    yield "softmax", ops.softmax, lambda x: torch.softmax(x, -1), [x], [], True
    yield "log_softmax", ops.log_softmax, lambda x: torch.log_softmax(x, -1), [x], [], True
    yield "rms_norm", ops.rms_norm, lambda x, w: F.rms_norm(x, (n,), w), [x, w], [], True
    yield "layer_norm", ops.layer_norm, lambda x, w, b: F.layer_norm(x, (n,), w, b), [x, w, b], [], True
    yield "gelu", ops.gelu, F.gelu, [x], [], True
    yield "silu", ops.silu, F.silu, [x], [], True
    yield "dropout", lambda x: ops.dropout(x, 0.1), lambda x: F.dropout(x, 0.1), [x], [], True
    yield "cross_entropy", ops.cross_entropy, F.cross_entropy, [x], [targets], True
    yield "linear", ops.linear, F.linear, [x, wide, bias], [], True
    yield "embedding_bag", lambda t, i, o: ops.embedding_bag(i, t, o), lambda t, i, o: F.embedding_bag(i, t, o), [made(32, 16)], [rows, places], True
    yield "attention", ops.attention, F.scaled_dot_product_attention, [q, k, v], [], True
    yield "swiglu", ops.swiglu, lambda g, u: F.silu(g) * u, [x, r], [], False
    yield "geglu", ops.geglu, lambda g, u: F.gelu(g) * u, [x, r], [], False
    yield "quick_gelu", quick, lambda x: x * torch.sigmoid(1.702 * x), [x], [], False
    yield "rotary", ops.rotary, rotated, [x4], [table, table], False
    yield "rms_norm, residual", lambda x, r, w: ops.rms_norm(x, w, residual=r)[0], lambda x, r, w: F.rms_norm(x + r, (n,), w), [x, r, w], [], False
    yield "layer_norm, residual", lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r)[0], lambda x, r, w, b: F.layer_norm(x + r, (n,), w, b), [x, r, w, b], [], False
    yield "linear, gelu", lambda x, w, b: ops.linear(x, w, b, "gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b)), [x, wide, bias], [], False
    yield "linear_cross_entropy", lambda x, w, t: ops.linear_cross_entropy(x, w, t), lambda x, w, t: F.cross_entropy(F.linear(x, w), t), [x, wide], [targets], False


def in_turns(functions, calls, rounds, device):
    """Microseconds per call of each function, a list per function."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = [[] for _ in functions]
    for function in functions:
        for _ in range(3):
            function()
    for _ in range(rounds):
        for function, found in zip(functions, times):
            wait()
            start = time.perf_counter_ns()
            for _ in range(calls):
                function()
            found.append((time.perf_counter_ns() - start) / calls / 1e3)
    wait()
    return times


def backward_in_turns(functions, inputs, calls, rounds, device):
    """The same of the backward pass of each function, whose graphs are made before."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = [[] for _ in functions]
    for round in range(rounds + 1):
        for function, found in zip(functions, times):
            results = [function() for _ in range(calls)]
            down = torch.ones_like(results[0])
            wait()
            start = time.perf_counter_ns()
            for result in results:
                torch.autograd.grad(result, inputs, down)
            if round:
                found.append((time.perf_counter_ns() - start) / calls / 1e3)
    wait()
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--json")
    parser.add_argument("--most", type=float)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept, slow = [], []
    kinds = ("forward", "recorded", "backward")
    print(f"PyTorch {torch.__version__}, {given.device}; microseconds a call: ours, built-in, difference; * built-in of several operators")
    print(f"{'':22}" + "".join(f"{kind:>27}" for kind in kinds))
    for name, ours, theirs, wanted, rest, single in cases(given.device):
        if given.only not in name:
            continue
        held = [t.clone().requires_grad_() for t in wanted]
        plain = [lambda f=f: f(*wanted, *rest) for f in (ours, theirs)]
        recorded = [lambda f=f: f(*held, *rest) for f in (ours, theirs)]
        times = {
            "forward": in_turns(plain, given.calls, given.rounds, given.device),
            "recorded": in_turns(recorded, given.calls, given.rounds, given.device),
            "backward": backward_in_turns(recorded, held, given.calls, max(3, given.rounds // 3), given.device),
        }
        line = f"{name + ('' if single else ' *'):22}"
        for kind, (a, b) in times.items():
            difference = statistics.median(p - q for p, q in zip(a, b))
            a, b = statistics.median(a), statistics.median(b)
            line += f"{a:9.2f}{b:9.2f}{difference:+9.2f}"
            kept.append({"case": name, "kind": kind, "ours_us": a, "builtin_us": b, "difference_us": difference, "single": single})
            if single and given.most is not None and difference > given.most:
                slow.append(f"{name}, {kind}: {difference:+.2f}")
        print(line, flush=True)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"torch": torch.__version__, "device": given.device, "cases": kept}, file, indent=1)
    if slow:
        raise SystemExit("more than allowed: " + "; ".join(slow))


if __name__ == "__main__":
    main()
