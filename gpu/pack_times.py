#!/usr/bin/env python3
"""Every operator of the pack on a GPU beside eager PyTorch, Inductor and Liger-Kernel (where it is installed), in one run.

    python gpu/pack_times.py [--only PATTERN] [--jobs N] [--seconds N] [--short] [--warm] [--out FILE]

Each case is timed forward (without gradients), and forward and backward together, as medians of replayed CUDA graphs that alternate
between the candidates and run over two copies of the tensors, which are far larger than the second-level cache; they are started while
the device is busy, so that the host's part is not counted. Liger-Kernel's losses wait
for the device in each call and cannot be recorded: they are called. The cases are prepared in
--jobs processes at once and timed one after the other, so all of them are in memory together: seven processes with all cases do not fit 140 GB, parts of
the list (`--only`) do. `--warm` compiles everything and times nothing (Inductor keeps its kernels below
TORCHINDUCTOR_CACHE_DIR). One line per case: how many times as fast as the best of the others we are, forward what part of a copy's bytes per second we
reach (what must be read and written counts), and microseconds. `--table` prints them as the page of the operators has them.
"""

import argparse
import functools
import json
import multiprocessing
import re
import statistics
import sys
import time

ROUNDS = 11
# Cycles of the device, about a tenth of a millisecond.
AHEAD = 200_000
COPY = "copy 16384x4096"
FORMS = ("ours", "eager", "inductor", "liger")


def cases(large=True):
    """Name: (forms, tensors with gradients, other tensors, largest relative distance between the forms, whether also without gradients)."""
    import torch
    import torch.nn.functional as F

    from tilewright import ops

    d = torch.bfloat16

    def made(*shape, seed=0, dtype=d):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        return torch.randn(shape, device="cuda", generator=generator, dtype=torch.float32).to(dtype)

    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.softmax import LigerSoftmaxFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        # These want tensors that can be written to: Liger keeps gradients in its inputs.
        liger = {
            "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
            "rms_norm, residual": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6, 0.0, "llama", False),
            "layer_norm": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5),
            "swiglu": lambda x, y: LigerSiLUMulFunction.apply(x, y),
            "geglu_tanh": lambda x, y: LigerGELUMulFunction.apply(x, y),
            "softmax": lambda x: LigerSoftmaxFunction.apply(x),
            # Target, weight, ignored index, square of the logarithm, smoothing, reduction, cap.
            "cross_entropy": lambda x, t: LigerCrossEntropyFunction.apply(x, t, None)[0],
            "cross_entropy, smoothed": lambda x, t: LigerCrossEntropyFunction.apply(x, t, None, -100, 0.0, 0.1)[0],
            "cross_entropy, everything": lambda x, t: LigerCrossEntropyFunction.apply(x, t, None, -100, 1e-4, 0.1, "mean", 30.0)[0],
            "linear_cross_entropy": lambda x, w, t: LigerFusedLinearCrossEntropyFunction.apply(x, w, t)[0],
            "rotary": lambda x, c, s: LigerRopeFunction.apply(x, x[:, :1].contiguous(), c, s)[0],
        }
    except Exception as problem:  # noqa: BLE001
        print("no Liger-Kernel:", problem, flush=True)
        liger = {}

    quick = ops.elementwise("x * sigmoid(1.702 * x)")

    def rms(x, w):
        return F.rms_norm(x, (x.shape[-1],), w, 1e-6)

    def layer(x, w, b):
        return F.layer_norm(x, (x.shape[-1],), w, b)

    def turned(x, c, s):
        a, b = x.chunk(2, -1)
        return x * c.unsqueeze(1) + torch.cat((-b, a), -1) * s.unsqueeze(1)

    # What moves as many bytes as there are.
    found = {COPY: ({"ours": lambda x: x.clone()}, (lambda: made(16384, 4096),), (), None, True)}

    def rich(x, t):
        v = torch.tanh(x.float() / 30.0) * 30.0
        return F.cross_entropy(v, t, label_smoothing=0.1) + 1e-4 * torch.logsumexp(v, -1).square().mean()

    def case(name, size, ours, eager, differentiable, others=(), near=2e-2, kind=None, forward=True):
        forms = {"ours": ours, "eager": eager, "inductor": torch.compile(eager, dynamic=False)}
        if (kind or name) in liger:
            forms["liger"] = liger[kind or name]
        found[f"{name} {size}"] = (forms, differentiable, others, near, forward)

    for m, n in ((16384, 4096), (8192, 8192)) if large else ((16384, 4096),):
        def x(seed=0, m=m, n=n):
            return lambda: made(m, n, seed=seed)

        def w(seed=5, n=n):
            return lambda: made(n, seed=seed)

        size = f"{m}x{n}"
        case("rms_norm", size, lambda x, w: ops.rms_norm(x, w), rms, (x(), w()))
        case("rms_norm, residual", size, lambda x, r, w: ops.rms_norm(x, w, residual=r), lambda x, r, w: (rms(x + r, w), x + r), (x(), x(1), w()))
        case("layer_norm", size, lambda x, w, b: ops.layer_norm(x, w, b), layer, (x(), w(), w(6)))
        case("softmax", size, ops.softmax, lambda x: torch.softmax(x, -1), (x(),))
        case("swiglu", size, ops.swiglu, lambda x, y: F.silu(x) * y, (x(), x(1)))
    m, n = 16384, 4096
    size = f"{m}x{n}"

    def x(seed=0):
        return lambda: made(m, n, seed=seed)

    def w(seed=5):
        return lambda: made(n, seed=seed)

    case("layer_norm, residual", size, lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r), lambda x, r, w, b: (layer(x + r, w, b), x + r),
         (x(), x(1), w(), w(6)))
    case("log_softmax", size, ops.log_softmax, lambda x: torch.log_softmax(x, -1), (x(),))
    case("gelu", size, ops.gelu, F.gelu, (x(),))
    case("gelu_tanh", size, lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), (x(),))
    case("silu", size, ops.silu, F.silu, (x(),))
    case("geglu", size, ops.geglu, lambda x, y: F.gelu(x) * y, (x(), x(1)))
    case("geglu_tanh", size, lambda x, y: ops.geglu(x, y, "tanh"), lambda x, y: F.gelu(x, approximate="tanh") * y, (x(), x(1)))
    case("quick_gelu", size, quick, lambda x: x * torch.sigmoid(1.702 * x), (x(),))
    case("dropout", size, lambda x: ops.dropout(x, 0.1), lambda x: F.dropout(x, 0.1), (x(),), near=None)
    case("dropout, residual", size, lambda x, r: ops.dropout(x, 0.1, residual=r), lambda x, r: F.dropout(x, 0.1) + r, (x(), x(1)), near=None)
    case("dropout_rms_norm", size, lambda x, r, w: ops.dropout_rms_norm(x, r, w, p=0.1),
         lambda x, r, w: (lambda h: (rms(h, w), h))(F.dropout(x, 0.1) + r), (x(), x(1), w()), near=None)

    def targets(m, n):
        return lambda: torch.randint(0, n, (m,), device="cuda", generator=torch.Generator(device="cuda").manual_seed(3))

    for m2, n2 in ((8192, 32768), (4096, 128256)) if large else ((8192, 32768),):
        matrix, at = (lambda m2=m2, n2=n2: made(m2, n2),), (targets(m2, n2),)
        case("cross_entropy, smoothed", f"{m2}x{n2}", lambda x, t: ops.cross_entropy(x, t, label_smoothing=0.1),
             lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1), matrix, at)
        case("cross_entropy, everything", f"{m2}x{n2}", lambda x, t: ops.cross_entropy(x, t, label_smoothing=0.1, z_loss=1e-4, softcap=30.0),
             rich, matrix, at)
        case("cross_entropy", f"{m2}x{n2}", ops.cross_entropy, F.cross_entropy, (lambda m2=m2, n2=n2: made(m2, n2),), (targets(m2, n2),))

    def table(f):
        def make():
            angles = torch.outer(torch.arange(4096, device="cuda"), 1e4 ** -(torch.arange(64, device="cuda") / 64))
            return f(torch.cat((angles, angles), -1))[None].expand(4, -1, -1).contiguous().to(d)
        return make

    case("rotary", "4x32x4096x128", ops.rotary, turned, (lambda: made(4, 32, 4096, 128),), (table(torch.cos), table(torch.sin)))
    case("linear, gelu", "4096^3", lambda x, w, b: ops.linear(x, w, b, "gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b)),
         (lambda: made(4096, 4096), lambda: made(4096, 4096, seed=1), w()))
    if large:
        case("linear_cross_entropy", "4096x4096x128256", ops.linear_cross_entropy, lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
             (lambda: made(4096, 4096), lambda: made(128256, 4096, seed=1) * 0.02), (targets(4096, 128256),), forward=False)
    return found


def prepared(forms, differentiable, others, backward, near, waits):
    """A replayable graph of each form over two copies of the tensors, or what calls it; the distances between results; the bytes of tensors and results."""
    import torch

    def filled():
        return [([make().requires_grad_(backward) for make in differentiable], [make() for make in others]) for _ in range(2)]

    def run(form, sets, seeds):
        for a, b in sets:
            with torch.set_grad_enabled(backward):
                y = form(*a, *b)
            if backward:
                ys = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
                grads = torch.autograd.grad(ys, a, seeds)
            else:
                grads = y if isinstance(y, tuple) else (y,)
        return grads

    shared, pool = filled(), torch.cuda.graph_pool_handle()
    graphs, results = {}, {}
    for name, form in forms.items():
        # Liger writes gradients into its tensors.
        sets = filled() if name == "liger" else shared
        seeds = None
        try:
            stream = torch.cuda.Stream()
            # The tensors are made in another.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if backward:
                    y = form(*sets[0][0], *sets[0][1])
                    ys = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
                    generator = torch.Generator(device="cuda").manual_seed(17)
                    seeds = [torch.randn(t.shape, device="cuda", generator=generator).to(t.dtype) if t.dim() else torch.ones_like(t) for t in ys]
                    del y, ys
                    if name == "liger":
                        sets = filled()
                results[name] = [g.clone() for g in run(form, sets, seeds)]
                run(form, sets, seeds)
            stream.synchronize()
            if name == "liger" and waits:
                graphs[name] = (functools.partial(run, form, sets, seeds), sets, seeds)
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, pool=pool):
                run(form, sets, seeds)
            # The graph reads all of these for as long as it is replayed.
            graphs[name] = (graph, sets, seeds)
        except Exception as problem:  # noqa: BLE001
            print(f"   {name}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
    distance = {}
    if near is not None and "ours" in results:
        for name, values in results.items():
            pairs = zip(values, results["ours"])
            distance[name] = max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)
    held = [t for group in shared[0] for t in group] + results.get("ours", [])
    moved = sum(t.numel() * t.element_size() for t in held)
    del results, held
    torch.cuda.empty_cache()
    return graphs, distance, moved


def timed(graph):
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The device is busy for as long as the host takes to start the graph, which for random numbers sets a seed first.
    torch.cuda._sleep(AHEAD)
    start.record()
    if callable(graph):
        graph()
    else:
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / 2


def worker(given, job, jobs, barrier, lock, rows):
    import torch

    begin = time.perf_counter()
    ready = []
    wanted = [case for case in cases(not given.short).items() if re.search(given.only, case[0])]
    for name, (forms, differentiable, others, near, forward) in wanted[job::jobs]:
        for backward in (False, True) if forward and name != COPY else (not forward,):
            if time.perf_counter() - begin > given.seconds:
                print(f"job {job}: time is up before {name}", flush=True)
                break
            graphs, distance, moved = prepared(forms, differentiable, others, backward, near, "cross_entropy" in name)
            ready.append((f"{name}{', both ways' if backward else ''}", graphs, distance, near, None if backward else moved))
    torch.cuda.synchronize()
    print(f"job {job}: {len(ready)} cases after {time.perf_counter() - begin:.1f} s, {torch.cuda.memory_allocated() >> 20} MiB", flush=True)
    barrier.wait(timeout=120)
    if given.warm:
        return
    for name, graphs, distance, near, moved in ready:
        with lock:
            times = {form: [] for form in graphs}
            for _ in range(ROUNDS):
                for form, (graph, *_) in graphs.items():
                    times[form].append(timed(graph))
        medians = {form: statistics.median(t[1:]) for form, t in times.items()}
        others = [v for form, v in medians.items() if form != "ours"]
        row = {"case": name, "us": medians, "distance": distance, "bytes": moved}
        if "ours" in medians and others:
            row["times_the_best"] = min(others) / medians["ours"]
        row["right"] = "ours" in medians and (near is None or all(v <= near for v in distance.values()))
        rows.append(row)


def table(rows):
    """The rows as Markdown, in the order of the cases' names."""
    found = {r["case"]: r for r in rows}
    lines = ["| | size | ours | eager | Inductor | Liger-Kernel | of a copy | both ways: ours | eager | Inductor | Liger-Kernel |", "|---" * 11 + "|"]
    for name in sorted({n.removesuffix(", both ways") for n in found} - {COPY}):
        what, _, size = name.rpartition(" ")
        one, two = found.get(name, {"us": {}}), found.get(f"{name}, both ways", {"us": {}})
        cells = [f"{r['us'][f]:.{0 if r['us'][f] >= 100 else 1}f}" if f in r["us"] else "" for r in (one, two) for f in FORMS]
        share = f"{100 * one['of_copy']:.0f}%" if "of_copy" in one else ""
        lines.append(f"| `{what}` | {size.replace('x', ' x ')} | {' | '.join(cells[:4])} | {share} | {' | '.join(cells[4:])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--short", action="store_true", help="one size each")
    parser.add_argument("--seconds", type=float, default=300, help="how long cases may be prepared")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--out")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        rows, lock, barrier = manager.list(), manager.Lock(), manager.Barrier(given.jobs)
        workers = [context.Process(target=worker, args=(given, j, given.jobs, barrier, lock, rows)) for j in range(given.jobs)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
            if w.exitcode:
                barrier.abort()
        failed = sum(w.exitcode != 0 for w in workers)
        rows = sorted(rows, key=lambda r: r.get("times_the_best", 0))
    rate = next((r["bytes"] / r["us"]["ours"] for r in rows if r["case"] == COPY), None)
    for row in rows:
        if rate and row["bytes"] and "ours" in row["us"]:
            row["of_copy"] = row["bytes"] / row["us"]["ours"] / rate
        text = ", ".join(f"{form} {us:.1f}" for form, us in row["us"].items())
        far = "" if row["right"] else f"  FAR APART: {row['distance']}"
        print(f"{row.get('times_the_best', 0):6.3f}  {row.get('of_copy', 0):5.2f}  {row['case']:<48} {text}{far}")
    if given.table:
        print(table(rows))
    if given.out:
        with open(given.out, "w") as file:
            json.dump(rows, file, indent=1)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
