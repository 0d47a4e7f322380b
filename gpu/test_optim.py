"""Optimizers, dropout, embedding bags, losses and gradients of norms on a GPU: values against PyTorch's, CUDA graphs, speed beside eager, Inductor and Liger.

    python gpu/test_optim.py check | time [--only NAME,...] [--out FILE]

Prints one line per case and ends with exit code 1 when a value is wrong. Times are medians of replayed CUDA graphs, interleaved between
the candidates; the tensors of each case are larger than the second-level cache, or several copies of them are used.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
import traceback

import torch
import torch.nn.functional as F

from tilewright import ops, optim
from tilewright.ops import dropouts

DEVICE = "cuda"
PACK = torch.ops.tilewright


class Report:
    def __init__(self, out):
        self.bad, self.out = 0, out

    def case(self, name, run):
        start = time.perf_counter()
        try:
            text, good = run(), True
        except Exception as problem:  # noqa: BLE001
            good, text = False, f"{type(problem).__name__}: {str(problem)[:600]}"
            if not isinstance(problem, AssertionError):
                text += "\n" + traceback.format_exc()[-800:]
        self.bad += not good
        print(f"{'ok ' if good else 'BAD'} {name}: {text} [{time.perf_counter() - start:.1f} s]", flush=True)


def made(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


def recorded(f, warm=2):
    """A CUDA graph of `f`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            f()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        f()
    return graph


def timed(f):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def race(forms, rounds=7, graphs=True):
    """Medians in microseconds."""
    runs = {}
    for name, f in forms.items():
        try:
            runs[name] = recorded(f).replay if graphs else f
        except Exception as problem:  # noqa: BLE001
            print(f"    no {name}: {type(problem).__name__} {str(problem)[:200]}", flush=True)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, f in runs.items():
            times[name].append(timed(f))
    return {name: statistics.median(t) for name, t in times.items()}


# ---- shapes --------------------------------------------------------------------------------------------


def decoder_1b():
    """Parameters of a decoder as Llama-3.2-1B: 147 tensors, 1.24 G numbers."""
    shapes = [(128256, 2048), (2048,)]
    for _ in range(16):
        shapes += [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return shapes


def resnet50():
    """Parameters of ResNet-50: 161 tensors, 25.6 M numbers."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = width * 4
            for a, b, k in ((inside, width, 1), (width, width, 3), (width, out, 1)):
                shapes += [(b, a, k, k), (b,), (b,)]
            if block == 0:
                shapes += [(out, inside, 1, 1), (out,), (out,)]
            inside = out
    return shapes + [(1000, 2048), (1000,)]


def parameters(shapes, dtype, seed=0):
    params = []
    for i, shape in enumerate(shapes):
        p = torch.empty(shape, device=DEVICE, dtype=dtype).normal_(std=0.02, generator=torch.Generator(device=DEVICE).manual_seed(seed + i))
        p.requires_grad_()
        p.grad = torch.empty_like(p).normal_(generator=torch.Generator(device=DEVICE).manual_seed(seed + 1000 + i))
        params.append(p)
    return params


# ---- values --------------------------------------------------------------------------------------------


def check_optimizers(report):
    shapes = [(300, 77), (5,), (3, 5, 7), (0,), (), (100_003,)] + [(7, i + 1) for i in range(700)]

    def steps(kind, other, dtype, tolerance, **options):
        def run():
            mine, theirs = parameters(shapes, dtype), parameters(shapes, torch.float32 if other is torch.optim.AdamW and dtype != torch.float64 else dtype)
            with torch.no_grad():
                for p, q in zip(mine, theirs):
                    q.copy_(p)
            a, b = kind(mine, lr=1e-2, weight_decay=0.1, **options), other(theirs, lr=1e-2, weight_decay=0.1)
            for step in range(5):
                for i, (p, q) in enumerate(zip(mine, theirs)):
                    p.grad = torch.empty_like(p).normal_(generator=torch.Generator(device=DEVICE).manual_seed(step * 1000 + i))
                    q.grad = p.grad.to(q.dtype)
                a.step()
                if "max_norm" in options:
                    norm = torch.nn.utils.clip_grad_norm_(theirs, options["max_norm"])
                    torch.testing.assert_close(a.grad_norm, norm.float(), rtol=1e-5, atol=1e-5)
                b.step()
            worst = 0.0
            for p, q in zip(mine, theirs):
                w = a.state[p].get("master", p) if p.numel() else p
                if p.numel():
                    worst = max(worst, (w.double() - q.double()).abs().max().item())
            assert worst < tolerance, worst
            return f"{worst:.1e}"

        return run

    report.case("AdamW float32, 706 tensors", steps(optim.AdamW, torch.optim.AdamW, torch.float32, 2e-6))
    report.case("AdamW float64", steps(optim.AdamW, torch.optim.AdamW, torch.float64, 1e-12))
    report.case("AdamW bfloat16 with masters", steps(optim.AdamW, torch.optim.AdamW, torch.bfloat16, 2e-6))
    report.case("AdamW float16 with masters", steps(optim.AdamW, torch.optim.AdamW, torch.float16, 2e-6))
    report.case("AdamW clipped", steps(optim.AdamW, torch.optim.AdamW, torch.float32, 2e-6, max_norm=1.0))

    def lion():
        params = parameters(shapes, torch.float32)
        copies = [p.detach().clone() for p in params]
        optimizer = optim.Lion(params, lr=1e-2, weight_decay=0.1)
        moments = [torch.zeros_like(p) for p in copies]
        for _ in range(3):
            optimizer.step()
            for w, p, m in zip(copies, params, moments):
                sign = torch.sign(0.9 * m + 0.1 * p.grad)
                w.mul_(1 - 1e-3).sub_(1e-2 * sign)
                m.mul_(0.99).add_(p.grad, alpha=0.01)
        worst = max((w - p).abs().max().item() for w, p in zip(copies, params) if p.numel())
        assert worst < 1e-6, worst
        return f"{worst:.1e}"

    report.case("Lion float32", lion)

    def graph():
        mine, theirs = parameters(shapes[:20], torch.float32), parameters(shapes[:20], torch.float32)
        rate = torch.tensor(1e-2, device=DEVICE)
        a, b = optim.AdamW(mine, lr=rate, max_norm=3.0), torch.optim.AdamW(theirs, lr=1e-2)
        replay = recorded(a.step).replay
        for _ in range(4):
            replay()
        rate.fill_(1e-3)
        replay()
        for step in range(7):
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in theirs]))
            kept = [p.grad.clone() for p in theirs]
            for p in theirs:
                p.grad.mul_(min(1.0, 3.0 / (norm.item() + 1e-6)))
            b.param_groups[0]["lr"] = 1e-3 if step == 6 else 1e-2
            b.step()
            for p, g in zip(theirs, kept):
                p.grad = g
        worst = max((p - q).abs().max().item() for p, q in zip(mine, theirs) if p.numel())
        assert worst < 1e-5, worst
        assert a.state[mine[0]]["step"].item() == 7
        return f"{worst:.1e}; steps counted on the device, the rate followed"

    report.case("AdamW in a CUDA graph, rate as a tensor", graph)


def check_others(report):
    def dropout(dtype):
        def run():
            x, key = made(1001, 67, dtype=dtype), torch.tensor([123456789], device=DEVICE)
            for r in (None, made(1001, 67, dtype=dtype, seed=1)):
                torch.testing.assert_close(PACK.dropout(x, r, key, 0.3), dropouts._composed(x, r, key, 0.3))
            return "the same numbers as the composed form"

        return run

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        report.case(f"dropout {dtype}", dropout(dtype))

    def repeated():
        x = made(333, 128)
        torch.manual_seed(5)
        a = ops.dropout(x, 0.5)
        torch.manual_seed(5)
        assert torch.equal(a, ops.dropout(x, 0.5))
        held = x.clone().requires_grad_()
        y = ops.dropout(held, 0.5)
        y.sum().backward()
        assert torch.equal(held.grad != 0, y != 0)
        box = []
        graph = recorded(lambda: box.append(ops.dropout(x, 0.5)))
        graph.replay()
        first = box[-1].clone()
        graph.replay()
        assert not torch.equal(first, box[-1]), "each replay draws the same numbers"
        return "by torch.manual_seed; gradient has the mask; replays draw anew"

    report.case("dropout repeats", repeated)

    def norms():
        x, r, w = made(64, 256).requires_grad_(), made(64, 256, seed=1), made(256, seed=2)
        f = torch.compile(lambda x, r, w: ops.dropout_rms_norm(x, r, w, p=0.2), fullgraph=True)
        y, h = f(x, r, w)
        torch.testing.assert_close(y, F.rms_norm(h, (256,), w, 1e-6), rtol=1e-4, atol=1e-4)
        (y.sum() + h.sum()).backward()
        assert x.grad is not None
        return "under torch.compile(fullgraph=True)"

    report.case("dropout + residual + norm", norms)

    def bags():
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        indices = torch.randint(0, 50, (300,), generator=generator, device=DEVICE)
        offsets = torch.tensor([0, 0, 5, 5, 17, 120, 299, 300], device=DEVICE)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float64, 1e-12)):
            for columns in (21, 64, 300):
                for mode in ("sum", "mean", "max"):
                    for padding in (None, 7):
                        start, seed = made(50, columns, dtype=dtype), made(8, columns, dtype=dtype, seed=3)
                        weights = torch.rand(300, device=DEVICE).to(dtype) if mode == "sum" else None
                        found = []
                        for bag in (ops.embedding_bag, F.embedding_bag):
                            wide = dtype if bag is ops.embedding_bag or dtype != torch.bfloat16 else torch.float32
                            table = start.to(wide).clone().requires_grad_()
                            w = None if weights is None else weights.to(wide).clone().requires_grad_()
                            y = bag(indices, table, offsets, mode=mode, per_sample_weights=w, padding_idx=padding)
                            y.backward(seed.to(wide))
                            found.append((y.detach(), table.grad, None if w is None else w.grad))
                        for a, b in zip(*found):
                            if a is not None:
                                torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * b.abs().max().item())
        return "sum, mean, max; gradients of table and weights"

    report.case("embedding bags", bags)

    def outside():
        table = made(5, 8)
        y = ops.embedding_bag(torch.tensor([[0, 9]], device=DEVICE), table)
        assert y.isnan().all()
        torch.cuda.synchronize()
        return "NaN, no crash"

    report.case("a row outside of the table", outside)

    def loss():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            x, w = made(130, 64, dtype=dtype), made(500, 64, dtype=dtype, seed=1)
            t = torch.arange(130, device=DEVICE) % 500
            t[7] = -100
            a = [v.clone().requires_grad_() for v in (x, w)]
            b = [v.double().requires_grad_() for v in (x, w)]
            mine = ops.linear_cross_entropy(a[0], a[1], t, rows=32)
            theirs = F.cross_entropy(F.linear(*b), t)
            mine.backward()
            theirs.backward()
            for p, q in zip([mine, a[0].grad, a[1].grad], [theirs, b[0].grad, b[1].grad]):
                error = ((p.double() - q).abs().max() / q.abs().max()).item()
                assert error < tolerance, error
        return "as float64"

    report.case("linear_cross_entropy", loss)

    def rows():
        x, t = made(5000, 32000, dtype=torch.bfloat16), torch.randint(0, 32000, (5000,), device=DEVICE)
        counts = (1, 2, 3, 7, 100, 130, 1000, 1001, 2047, 2048, 2049, 4096, 4097, 4500, 5000)
        for count in counts:
            a, b = x[:count].clone().requires_grad_(), x[:count].double().requires_grad_()
            mine, theirs = ops.cross_entropy(a, t[:count]), F.cross_entropy(b, t[:count])
            mine.backward()
            theirs.backward()
            assert abs(mine.item() - theirs.item()) < 1e-4 * theirs.item(), (count, mine, theirs)
            error = ((a.grad.double() - b.grad).norm() / b.grad.norm()).item()
            # Gradients are rounded to 8 bits.
            assert error < 4e-3, (count, error)
        kept = pathlib.Path(os.environ.get("TILEWRIGHT_CACHE", pathlib.Path.home() / ".cache" / "tilewright"), "cuda", "kernels")
        of_losses = [p for p in kept.glob("*/*/kernel.cu") if "cross_entropy" in p.read_text()[:200]]
        return f"{len(counts)} numbers of rows as float64; {len(of_losses)} kernels in the cache"

    report.case("cross_entropy of any number of rows", rows)


# ---- speed ---------------------------------------------------------------------------------------------


def line(report, name, medians, work=None, unit="TB/s"):
    report.out.append({"case": name, "us": medians})
    text = ", ".join(f"{k} {v:.1f}" for k, v in medians.items())
    best = min((v for k, v in medians.items() if k != "ours"), default=float("nan"))
    tail = "" if work is None else f"; {work / medians['ours'] / 1e6:.2f} {unit}"
    return f"{text} us; {best / medians['ours']:.2f} times the best other{tail}"


def time_optimizers(report):
    for model, shapes in (("decoder 1B", decoder_1b()), ("ResNet-50", resnet50())):

        def run(clip=None, wall=False):
            ours, theirs = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
            numbers = sum(p.numel() for p in ours)
            a = optim.AdamW(ours, lr=1e-4, max_norm=clip)
            b = torch.optim.AdamW(theirs, lr=1e-4, fused=True, capturable=True)
            c = optim.Lion(ours, lr=1e-4) if not wall and clip is None else None

            def torch_step():
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(theirs, clip, foreach=True)
                b.step()

            if wall:
                medians = {}
                for name, f in (("ours", a.step), ("torch fused", torch_step), ("ours", a.step), ("torch fused", torch_step)):
                    f()
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(10):
                        f()
                    host = (time.perf_counter() - start) / 10 * 1e6
                    torch.cuda.synchronize()
                    medians[name] = (time.perf_counter() - start) / 10 * 1e6
                    medians[name + ", host alone"] = host
                report.out.append({"case": f"AdamW wall {model}", "us": medians})
                return ", ".join(f"{k} {v:.0f} us" for k, v in medians.items())
            forms = {"ours": a.step, "torch fused": torch_step}
            medians = race(forms, 9)
            bytes_once = numbers * (28 + (4 if clip is not None else 0))
            text = line(report, f"AdamW {model} clip {clip}", medians, bytes_once)
            if c is not None:
                lion = race({"ours": c.step}, 5)
                text += f"; Lion {line(report, f'Lion {model}', lion, numbers * 20)}"
            return text

        report.case(f"AdamW float32 {model}", run)
        report.case(f"AdamW float32 {model}, clipped", lambda: run(1.0))
        report.case(f"AdamW float32 {model}, eager calls", lambda: run(wall=True))

        def narrow():
            ours, theirs = parameters(shapes, torch.bfloat16), parameters(shapes, torch.bfloat16)
            numbers = sum(p.numel() for p in ours)
            a, b = optim.AdamW(ours, lr=1e-4), torch.optim.AdamW(theirs, lr=1e-4, fused=True, capturable=True)
            medians = race({"ours": a.step, "torch fused, all in bf16": b.step}, 7)
            return line(report, f"AdamW bf16 with masters {model}", medians, numbers * 28)

        report.case(f"AdamW bfloat16 with masters {model}", narrow)
        torch.cuda.empty_cache()


def time_dropout(report):
    d = torch.bfloat16
    sets = [(made(16384, 4096, dtype=d), made(16384, 4096, dtype=d, seed=1)) for _ in range(3)]
    w = made(4096, dtype=d, seed=2)
    elements = sets[0][0].numel()

    def over(f):
        def run():
            with torch.no_grad():
                for s in sets:
                    f(*s)

        return run

    plain = lambda x, r: F.dropout(x, 0.1)  # noqa: E731
    added = lambda x, r: F.dropout(x, 0.1) + r  # noqa: E731

    def normed(x, r):
        h = F.dropout(x, 0.1) + r
        return F.rms_norm(h, (4096,), w, 1e-6), h

    for name, mine, theirs, traffic in (
        ("dropout 16384x4096 bf16", lambda x, r: ops.dropout(x, 0.1), plain, 4),
        ("dropout + residual 16384x4096 bf16", lambda x, r: ops.dropout(x, 0.1, residual=r), added, 6),
        ("dropout + residual + RMSNorm 16384x4096 bf16", lambda x, r: ops.dropout_rms_norm(x, r, w, p=0.1), normed, 8),
    ):

        def run():
            medians = race({"ours": over(mine), "eager": over(theirs), "inductor": over(torch.compile(theirs, dynamic=False))})
            medians = {k: v / 3 for k, v in medians.items()}
            return line(report, name, medians, elements * traffic)

        report.case(name, run)

    def both():
        x, r = (t.clone().requires_grad_() for t in sets[0])
        seed = sets[1][0]
        forms = {"ours": lambda x, r: ops.dropout(x, 0.1, residual=r), "eager": added, "inductor": torch.compile(added, dynamic=False)}
        medians = race({k: (lambda f=f: torch.autograd.grad(f(x, r), (x, r), seed)) for k, f in forms.items()})
        return line(report, "dropout + residual both ways", medians, elements * 10)

    report.case("dropout + residual 16384x4096 bf16, both ways", both)


def time_bags(report):
    table = made(1_000_000, 128)
    indices = torch.randint(0, 1_000_000, (32768, 32), device=DEVICE)
    for mode in ("sum", "mean", "max"):

        def run():
            with torch.no_grad():
                forms = {"ours": lambda: ops.embedding_bag(indices, table, mode=mode), "eager": lambda: F.embedding_bag(indices, table, mode=mode)}
                return line(report, f"embedding bag {mode}", race(forms), indices.numel() * 512)

        report.case(f"embedding bag {mode} 32768 x 32 of 1M x 128", run)

    def both():
        held = table.clone().requires_grad_()
        seed = made(32768, 128, seed=4)
        forms = {
            "ours": lambda: torch.autograd.grad(ops.embedding_bag(indices, held, mode="sum"), held, seed),
            "eager": lambda: torch.autograd.grad(F.embedding_bag(indices, held, mode="sum"), held, seed),
        }
        return line(report, "embedding bag sum both ways", race(forms, graphs=False))

    report.case("embedding bag sum, both ways", both)


def time_losses(report):
    d = torch.bfloat16
    logits, t = made(8192, 32768, dtype=d), torch.arange(8192, device=DEVICE) % 32768
    liger = {}
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        liger = {"ce": LigerCrossEntropyFunction, "linear": LigerFusedLinearCrossEntropyFunction}
    except Exception as problem:  # noqa: BLE001
        print("no Liger:", problem)

    def raw():
        loss = torch.ones(8192, device=DEVICE)
        return line(report, "cross_entropy_both", race({"ours": lambda: PACK.cross_entropy_both(loss, logits, t, -100, 0.0, 0.0, 0.0)}), logits.numel() * 4)

    report.case("loss and gradient in one pass 8192x32768 bf16", raw)

    def forward():
        with torch.no_grad():
            forms = {"ours": ops.cross_entropy, "eager": F.cross_entropy, "inductor": torch.compile(F.cross_entropy)}
            return line(report, "cross_entropy forward", race({k: (lambda f=f: f(logits, t)) for k, f in forms.items()}), logits.numel() * 2)

    report.case("cross_entropy 8192x32768 bf16", forward)

    def both():
        held = logits.clone().requires_grad_()
        forms = {"ours": ops.cross_entropy, "eager": F.cross_entropy, "inductor": torch.compile(F.cross_entropy)}
        if "ce" in liger:
            # It writes its gradient over the logits: the copy is part of what it takes where they are needed again.
            forms["liger, over the logits"] = lambda x, t: liger["ce"].apply(x, t, None)[0]
        medians = race({k: (lambda f=f: torch.autograd.grad(f(held, t), held)) for k, f in forms.items()})
        return line(report, "cross_entropy both ways", medians, logits.numel() * 6)

    report.case("cross_entropy 8192x32768 bf16, both ways", both)

    def linear():
        x, w = made(4096, 4096, dtype=d).mul_(0.02).requires_grad_(), made(128256, 4096, dtype=d, seed=1).mul_(0.02).requires_grad_()
        targets = torch.arange(4096, device=DEVICE) * 31
        forms = {
            "ours": lambda: torch.autograd.grad(ops.linear_cross_entropy(x, w, targets), (x, w)),
            "ours, 1024 rows": lambda: torch.autograd.grad(ops.linear_cross_entropy(x, w, targets, rows=1024), (x, w)),
            "ours, 2048 rows": lambda: torch.autograd.grad(ops.linear_cross_entropy(x, w, targets, rows=2048), (x, w)),
            "ours, 4096 rows": lambda: torch.autograd.grad(ops.linear_cross_entropy(x, w, targets, rows=4096), (x, w)),
            "eager": lambda: torch.autograd.grad(F.cross_entropy(F.linear(x, w).float(), targets), (x, w)),
        }
        if "linear" in liger:
            forms["liger"] = lambda: torch.autograd.grad(liger["linear"].apply(x, w, targets)[0], (x, w))
        peaks = {}
        for name, f in forms.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        text = line(report, "linear_cross_entropy both ways", race(forms, 5, graphs=False))
        return text + "; peak GiB " + ", ".join(f"{k} {v:.2f}" for k, v in peaks.items())

    report.case("linear_cross_entropy 4096x4096x128256 bf16, both ways", linear)


def time_norms(report):
    d = torch.bfloat16
    for m, n in ((16384, 4096), (8192, 8192)):
        x, r, seed = (made(m, n, dtype=d, seed=i).requires_grad_(i < 2) for i in range(3))
        w, b = made(n, dtype=d, seed=4).requires_grad_(), made(n, dtype=d, seed=5).requires_grad_()

        def added(x, r, w):
            h = x + r
            return F.rms_norm(h, (n,), w, 1e-6), h

        cases = {
            "rms_norm": (lambda x, w: ops.rms_norm(x, w), lambda x, w: F.rms_norm(x, (n,), w, 1e-6), (x, w), (seed,), 10),
            "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, (n,), w, b), (x, w, b), (seed,), 10),
            "rms_norm with residual": (lambda x, r, w: ops.rms_norm(x, w, residual=r), added, (x, r, w), (seed, seed), 16),
        }
        for name, (mine, theirs, held, seeds, traffic) in cases.items():

            def run():
                forms = {"ours": mine, "eager": theirs, "inductor": torch.compile(theirs, dynamic=False)}
                medians = race({k: (lambda f=f: torch.autograd.grad(f(*held), held, seeds)) for k, f in forms.items()})
                return line(report, f"{name} {m}x{n} both ways", medians, m * n * traffic)

            report.case(f"{name} {m}x{n} bf16, both ways", run)


def check_norms(report):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        for m, n in ((1000, 768), (33, 4096), (4097, 1023), (64, 8192)):

            def run():
                x, r = made(m, n, dtype=dtype), made(m, n, dtype=dtype, seed=1)
                w, b, seed = made(n, dtype=dtype, seed=2), made(n, dtype=dtype, seed=3), made(m, n, dtype=dtype, seed=4)
                worst = 0.0
                for mine, theirs, given in (
                    (ops.rms_norm, lambda x, w: F.rms_norm(x, (n,), w, 1e-6), (x, w)),
                    (ops.layer_norm, lambda x, w, b: F.layer_norm(x, (n,), w, b, 1e-5), (x, w, b)),
                    (lambda x, r, w: ops.rms_norm(x, w, residual=r), lambda x, r, w: (F.rms_norm(x + r, (n,), w, 1e-6), x + r), (x, r, w)),
                    (lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r), lambda x, r, w, b: (F.layer_norm(x + r, (n,), w, b, 1e-5), x + r), (x, r, w, b)),
                ):
                    held, wide = [t.clone().requires_grad_() for t in given], [t.double().requires_grad_() for t in given]
                    a, c = mine(*held), theirs(*wide)
                    a, c = (list(v) if isinstance(v, tuple) else [v] for v in (a, c))
                    ga = torch.autograd.grad(a, held, [seed] * len(a))
                    gc = torch.autograd.grad(c, wide, [seed.double()] * len(c))
                    for p, q in zip(ga, gc):
                        worst = max(worst, ((p.double() - q).abs().max() / q.abs().max()).item())
                assert worst < tolerance, worst
                return f"{worst:.1e}"

            report.case(f"gradients of norms {m}x{n} {dtype}", run)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--only", default="norms,optimizers,dropout,bags,losses")
    parser.add_argument("--out")
    given = parser.parse_args()
    report = Report([])
    print(torch.__version__, torch.cuda.get_device_name(0))
    if given.what == "check":
        check_optimizers(report)
        check_others(report)
        check_norms(report)
    else:
        for name in given.only.split(","):
            {"norms": time_norms, "optimizers": time_optimizers, "dropout": time_dropout, "bags": time_bags, "losses": time_losses}[name](report)
    if given.out:
        with open(given.out, "w") as file:
            json.dump(report.out, file, indent=1)
    print(f"{report.bad} bad")
    sys.exit(report.bad > 0)


if __name__ == "__main__":
    main()
