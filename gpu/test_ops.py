"""The operator pack on a GPU: values against float64, PyTorch's own checks, host time per call, speed beside eager, Inductor and Liger.

    python gpu/test_ops.py check | triton | time [--seconds N] [--out FILE] [--jobs N] [--only WORD]

`check` includes `triton`, the cases with `impl="triton"`. Cases of both are shared out over --jobs processes: most of their time is compilation.

Prints one line per case and ends with exit code 1 when a value is wrong. Times are medians of replayed CUDA graphs that
run over enough copies of the tensors to leave the second-level cache, interleaved between the candidates.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback

import torch
import torch.nn.functional as F

from tilewright import ops

DEVICE = "cuda"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def made(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)


def rms64(x, w, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


# Name, function of the pack, the same in PyTorch (differentiable in any type), tensors from rows, columns and type.
def cases(impl="cuda"):
    def matrix(m, n, d, seed=0):
        return made(m, n, dtype=d, seed=seed)

    def vector(n, d, seed=9):
        return made(n, dtype=d, seed=seed)

    quick = ops.elementwise("x * sigmoid(1.702 * x)", impl=impl)
    three = ops.elementwise("a * b + tanh(c)", impl=impl)
    return {
        "rms_norm": (lambda x, w: ops.rms_norm(x, w, impl=impl), rms64, lambda m, n, d: (matrix(m, n, d), vector(n, d))),
        "add_rms_norm": (
            lambda x, r, w: ops.rms_norm(x, w, residual=r, impl=impl),
            lambda x, r, w: (rms64(x + r, w), x + r),
            lambda m, n, d: (matrix(m, n, d), matrix(m, n, d, 1), vector(n, d)),
        ),
        "layer_norm": (
            lambda x, w, b: ops.layer_norm(x, w, b, impl=impl),
            lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5),
            lambda m, n, d: (matrix(m, n, d), vector(n, d), vector(n, d, 8)),
        ),
        "add_layer_norm": (
            lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r, impl=impl),
            lambda x, r, w, b: (F.layer_norm(x + r, w.shape, w, b, 1e-5), x + r),
            lambda m, n, d: (matrix(m, n, d), matrix(m, n, d, 1), vector(n, d), vector(n, d, 8)),
        ),
        "softmax": (lambda x: ops.softmax(x, impl=impl), lambda x: torch.softmax(x, -1), lambda m, n, d: (matrix(m, n, d),)),
        "log_softmax": (lambda x: ops.log_softmax(x, impl=impl), lambda x: torch.log_softmax(x, -1), lambda m, n, d: (matrix(m, n, d),)),
        "gelu": (lambda x: ops.gelu(x, impl=impl), F.gelu, lambda m, n, d: (matrix(m, n, d),)),
        "gelu_tanh": (
            lambda x: ops.gelu(x, "tanh", impl=impl),
            lambda x: F.gelu(x, approximate="tanh"),
            lambda m, n, d: (matrix(m, n, d),),
        ),
        "swiglu": (lambda x, y: ops.swiglu(x, y, impl=impl), lambda x, y: F.silu(x) * y, lambda m, n, d: (matrix(m, n, d), matrix(m, n, d, 1))),
        "geglu": (lambda x, y: ops.geglu(x, y, impl=impl), lambda x, y: F.gelu(x) * y, lambda m, n, d: (matrix(m, n, d), matrix(m, n, d, 1))),
        "quick_gelu": (quick, lambda x: x * torch.sigmoid(1.702 * x), lambda m, n, d: (matrix(m, n, d),)),
        "formula of three": (three, lambda a, b, c: a * b + torch.tanh(c), lambda m, n, d: tuple(matrix(m, n, d, i) for i in range(3))),
    }


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def sdpa(q, k, v, causal=False):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def after_a_cache(q, k, v):
    s, t = q.shape[2], k.shape[1]
    seen = torch.ones(s, t, dtype=torch.bool, device=DEVICE).tril(t - s)
    return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, enable_gqa=True)


# Name, function, the same in PyTorch, tensors of a type; those after the number of differentiable ones are tables.
def others(d):
    angles = made(2, 33, 64, seed=5)
    t = torch.arange(66, device=DEVICE) % 500
    t[7] = -100
    return {
        "rotary": (ops.rotary, rotated, (made(2, 4, 33, 64, dtype=d),), (angles.cos().to(d), angles.sin().to(d))),
        "linear": (ops.linear, F.linear, (made(66, 128, dtype=d), made(256, 128, dtype=d, seed=1), made(256, dtype=d, seed=2)), ()),
        "linear, gelu, residual": (
            lambda x, w, b, r: ops.linear(x, w, b, "gelu", r),
            lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r,
            (made(66, 128, dtype=d), made(256, 128, dtype=d, seed=1), made(256, dtype=d, seed=2), made(66, 256, dtype=d, seed=3)),
            (),
        ),
        "linear_cross_entropy": (
            lambda x, w, t: ops.linear_cross_entropy(x, w, t, rows=24),
            lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
            (made(66, 128, dtype=d), made(500, 128, dtype=d, seed=1)),
            (t,),
        ),
        "attention": (ops.attention, sdpa, tuple(made(2, 4, 100, 64, dtype=d, seed=i) for i in range(3)), ()),
        "attention, causal, shared heads": (
            lambda q, k, v: ops.attention(q, k, v, causal=True),
            lambda q, k, v: sdpa(q, k, v, True),
            (made(2, 4, 100, 64, dtype=d), made(2, 2, 100, 64, dtype=d, seed=1), made(2, 2, 100, 64, dtype=d, seed=2)),
            (),
        ),
        "attention, causal after a cache, rows before heads": (
            lambda q, k, v: ops.attention(q, k.transpose(1, 2), v.transpose(1, 2), causal=True),
            after_a_cache,
            (made(2, 6, 77, 128, dtype=d), made(2, 200, 2, 128, dtype=d, seed=1), made(2, 200, 2, 128, dtype=d, seed=2)),
            (),
        ),
        "attention, depth 48": (
            ops.attention,
            sdpa,
            (made(1, 4, 130, 48, dtype=d), made(1, 2, 65, 48, dtype=d, seed=1), made(1, 2, 65, 48, dtype=d, seed=2)),
            (),
        ),
    }


def losses(impl="cuda"):
    def targets(m, n):
        t = torch.randint(0, n, (m,), device=DEVICE, generator=torch.Generator(device=DEVICE).manual_seed(3))
        t[:: max(2, m // 3)] = -100
        return t

    def plain(x, t):
        return F.cross_entropy(x, t)

    def rich(x, t):
        v = torch.tanh(x / 30.0) * 30.0
        l = torch.logsumexp(v, -1)
        kept = t != -100
        loss = F.cross_entropy(v, t, label_smoothing=0.1, reduction="none") + 1e-4 * l * l
        return torch.where(kept, loss, 0).sum() / kept.sum()

    return {
        "cross_entropy": (lambda x, t: ops.cross_entropy(x, t, impl=impl), plain, targets),
        "cross_entropy_rich": (
            lambda x, t: ops.cross_entropy(x, t, label_smoothing=0.1, z_loss=1e-4, softcap=30.0, impl=impl),
            rich,
            targets,
        ),
    }


def flat(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def error(ours, reference):
    """The largest distance, in parts of the reference's size."""
    scale = max(reference.abs().max().item(), 1e-6)
    return (ours.double() - reference).abs().max().item() / scale


def compare(ours, reference, tensors, tables=()):
    """Errors of results and gradients against float64."""
    mine = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors] + list(tables)
    wide = [t.double().clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    wide += [t.double() if t.is_floating_point() else t for t in tables]
    with torch.no_grad():
        fused = flat(ours(*mine))
    given, wanted = flat(ours(*mine)), flat(reference(*wide))
    seeds = [made(*g.shape, seed=20 + i) for i, g in enumerate(given)]
    torch.autograd.backward(given, [s.to(g.dtype) for s, g in zip(seeds, given)])
    torch.autograd.backward(wanted, [s.to(g.dtype).double() for s, g in zip(seeds, given)])
    found = {f"y{i}": error(a, b) for i, (a, b) in enumerate(zip(given, wanted))}
    found |= {f"y{i} without gradients": error(a, b) for i, (a, b) in enumerate(zip(fused, wanted))}
    for i, (a, b) in enumerate(zip(mine, wide)):
        if a.requires_grad:
            found[f"d{i}"] = error(a.grad, b.grad)
    return found


class Report:
    """Runs cases: of several processes, each runs its own share."""

    def __init__(self, part=0, parts=1, only=""):
        self.bad = self.ran = self.met = 0
        self.part, self.parts, self.only = part, parts, only

    def case(self, name, run):
        if self.only not in name:
            return
        mine = self.met % self.parts == self.part
        self.met += 1
        if not mine:
            return
        self.ran += 1
        start = time.perf_counter()
        try:
            text = run()
            good = True
        except Exception as problem:  # noqa: BLE001
            good, text = False, f"{type(problem).__name__}: {str(problem)[:400]}"
            if not isinstance(problem, (AssertionError, RuntimeError, NotImplementedError)):
                text += "\n" + traceback.format_exc()
        self.bad += not good
        print(f"{'ok ' if good else 'BAD'} {name}: {text} [{time.perf_counter() - start:.1f} s]", flush=True)


def values(report, shapes, dtypes, impl="cuda"):
    mark = "" if impl == "cuda" else f"{impl}: "
    for name, (ours, reference, tensors) in cases(impl).items():
        for m, n in shapes:
            for dtype in dtypes:

                def run():
                    found = compare(ours, reference, tensors(m, n, dtype))
                    # Sums over rows grow their errors with the root of the number of rows.
                    worst = max(found.values())
                    assert worst < TOLERANCE[dtype] * 4, found
                    return f"{worst:.1e}"

                report.case(f"{mark}{name} {m}x{n} {str(dtype)[6:]}", run)
    for name, (ours, reference, targets) in losses(impl).items():
        for m, n in shapes:
            for dtype in dtypes:

                def run():
                    found = compare(ours, reference, (made(m, n, dtype=dtype), targets(m, n)))
                    worst = max(found.values())
                    assert worst < TOLERANCE[dtype] * 4, found
                    return f"{worst:.1e}"

                report.case(f"{mark}{name} {m}x{n} {str(dtype)[6:]}", run)


def totals(report):
    """Sums and means of cross-entropy: rows of one block and of many, rows that do not count, nothing at all, graphs, compiled."""

    def given(rows, columns, dtype, ignored):
        t = torch.randint(0, columns, (rows,), device=DEVICE, generator=torch.Generator(device=DEVICE).manual_seed(rows))
        t[1::3] = ignored
        return made(rows, columns, dtype=dtype).requires_grad_(), t

    def agree(x, t, dtype, ignored, reduction):
        with torch.no_grad():
            alone = ops.cross_entropy(x, t, ignored, reduction=reduction)
        mine = ops.cross_entropy(x, t, ignored, reduction=reduction)
        assert torch.equal(mine, alone) and mine.dtype == (dtype if dtype == torch.float64 else torch.float32)
        exact = x.detach().double().requires_grad_()
        theirs = F.cross_entropy(exact, t, ignore_index=ignored, reduction=reduction)
        (a,), (b,) = torch.autograd.grad(mine, x), torch.autograd.grad(theirs, exact)
        found = max(error(mine, theirs), error(a, b))
        assert found < TOLERANCE[dtype] * 4, found
        again = ops.cross_entropy(x, t, ignored, reduction=reduction)
        assert torch.equal(again, mine) and torch.equal(torch.autograd.grad(again, x)[0], a)
        return f"{found:.1e}"

    for rows in (5, 4099, 40000, 900_001):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) if rows < 1 << 19 else (torch.bfloat16,):
            for ignored in (-100, 3):
                for reduction in ("mean", "sum"):
                    name = f"cross_entropy {reduction} {rows}x8 {str(dtype)[6:]}, {ignored} ignored"
                    report.case(name, lambda: agree(*given(rows, 8, dtype, ignored), dtype, ignored, reduction))

    def nothing():
        x = made(6, 8).requires_grad_()
        hidden = torch.full((6,), -100, device=DEVICE)
        for rows in (6, 0):
            mean, total = (ops.cross_entropy(x[:rows], hidden[:rows], reduction=r) for r in ("mean", "sum"))
            assert mean.isnan() and total == 0
            for loss in (mean, total):
                assert (torch.autograd.grad(loss, x)[0] == 0).all()
        return "no number, and no gradient"

    report.case("cross_entropy of rows that do not count", nothing)

    def graphed():
        x, t = given(50, 64, torch.float32, -100)
        ops.cross_entropy(x, t).backward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        x.grad = None
        with torch.cuda.graph(graph):
            loss = ops.cross_entropy(x, t)
            loss.backward()
        for count in (50, 7, 1):
            t.fill_(-100)
            t[:count] = torch.arange(count, device=DEVICE)
            graph.replay()
            exact = x.detach().double().requires_grad_()
            wanted = F.cross_entropy(exact, t)
            assert max(error(loss, wanted), error(x.grad, torch.autograd.grad(wanted, exact)[0])) < 1e-5
        return "counts anew in each replay"

    report.case("cross_entropy in a CUDA graph", graphed)

    def compiled():
        x, t = given(50, 64, torch.float32, -100)
        fast = torch.compile(lambda x: ops.cross_entropy(x * 2, t), fullgraph=True)
        mine, theirs = fast(x), F.cross_entropy(x * 2, t)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(torch.autograd.grad(mine, x), torch.autograd.grad(theirs, x))
        torch.library.opcheck(torch.ops.tilewright.cross_entropy_total.default, (x, t, -100, 0.1, 1e-3, 5.0, True))
        return "as eager"

    report.case("cross_entropy compiled", compiled)


def attention_repeats(report):
    """Gradients of attention are the same bits each time."""

    def run():
        q, k, v = (made(2, n, 700, 128, dtype=torch.bfloat16, seed=n).requires_grad_() for n in (8, 4, 2))
        v = v.repeat_interleave(2, 1)
        y = ops.attention(q, k, v, causal=True)
        down = made(*y.shape, dtype=torch.bfloat16, seed=7)
        first = torch.autograd.grad(y, (q, k, v), down, retain_graph=True)
        for _ in range(20):
            for a, b in zip(first, torch.autograd.grad(y, (q, k, v), down, retain_graph=True)):
                assert torch.equal(a, b)
        return "20 times"

    report.case("gradient of attention repeats", run)


def other_values(report):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (ours, reference, tensors, tables) in others(dtype).items():

            def run():
                found = compare(ours, reference, tensors, tables)
                worst = max(found.values())
                assert worst < TOLERANCE[dtype] * (8 if dtype != torch.float32 else 40), found
                return f"{worst:.1e}"

            report.case(f"{name} {str(dtype)[6:]}", run)


def triton(report):
    """`impl="triton"`: rotary, products, attention, dropout, rows that go in pieces, second derivatives, tensors that it refuses."""
    x, cos, sin = made(2, 3, 40, 64), made(1, 40, 64, seed=1), made(1, 40, 64, seed=2)
    report.case("triton: rotary", lambda: small(compare(lambda x, c, s: ops.rotary(x, c, s, impl="triton"), rotated, (x,), (cos, sin)), 4e-5))

    def layer(x, w, b, r, impl="triton"):
        return ops.linear(x, w, b, "silu", r, impl=impl)

    def plain_layer(x, w, b, r):
        return F.silu(F.linear(x, w, b)) + r

    for dtype, most in ((torch.float32, 4e-5), (torch.bfloat16, 2e-2)):
        tensors = [made(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(70, 256), (136, 256), (136,), (70, 136)])]
        report.case(f"triton: linear {str(dtype)[6:]}", lambda t=tensors, m=most: small(compare(layer, plain_layer, t), m))
        for causal in (False, True):
            heads = [made(2, n, 90, 64, dtype=dtype, seed=n) for n in (4, 2, 2)]
            report.case(
                f"triton: attention {str(dtype)[6:]}{', causal' * causal}",
                lambda t=heads, m=most, c=causal: small(
                    compare(
                        lambda q, k, v: ops.attention(q, k, v, causal=c, impl="triton"),
                        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=c, enable_gqa=True), t,
                    ), m,
                ),
            )  # fmt: skip

    def dropped():
        found = []
        for impl in ("cuda", "triton"):
            torch.manual_seed(5)
            t, r = made(33, 257, dtype=torch.bfloat16).requires_grad_(), made(33, 257, dtype=torch.bfloat16, seed=1)
            y, h = ops.dropout_rms_norm(t, r, None, p=0.3, impl=impl)
            found.append((y, h, torch.autograd.grad(h.sum(), t)[0]))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        assert torch.equal(found[0][2] == 0, found[1][2] == 0)
        return f"{(found[0][2] == 0).float().mean():.3f} dropped, the same ones"

    report.case("triton: dropout with a residual and a norm", dropped)
    long = made(5, 70001)
    report.case("triton: softmax 5x70001", lambda: small(compare(lambda x: ops.softmax(x, impl="triton"), lambda x: torch.softmax(x, -1), (long,)), 8e-5))

    def beside():
        y, z = ops.softmax(long, impl="triton"), ops.softmax(long)
        return small({"difference": error(y, z.double())}, 2e-5)

    def twice():
        given = made(3, 50, dtype=torch.float64).requires_grad_()
        torch.autograd.gradgradcheck(lambda x: ops.softmax(x, impl="triton"), (given,))
        return "gradgradcheck passes"

    def compiled():
        f = torch.compile(lambda x: ops.softmax(x * 2, impl="triton") + 1)
        return small({"y": error(f(x), torch.softmax(x.double() * 2, -1) + 1)}, 2e-5)

    def on_cpu():
        try:
            ops.softmax(x.cpu(), impl="triton")
        except RuntimeError as problem:
            assert "CUDA tensors" in str(problem), problem
            return "refused"
        raise AssertionError("a tensor of the CPU was taken")

    for name, run in {"beside cuda": beside, "second derivative": twice, "compiled": compiled, "on the CPU": on_cpu}.items():
        report.case(f"triton: {name}", run)


def small(found, most):
    assert max(found.values()) < most, found
    return f"{max(found.values()):.1e}"


def checks(report):
    """PyTorch's own checks, and the ways in which operators are used."""
    x, w = made(24, 64), made(64)
    inputs = {
        "rms_norm": (x.clone().requires_grad_(), w.clone().requires_grad_(), 1e-6),
        "softmax": (x.clone().requires_grad_(), False),
        "map2": (x.clone().requires_grad_(), x.clone().requires_grad_(), "x * sigmoid(x) * y"),
        "map": ([x.clone().requires_grad_() for _ in range(3)], "x * sigmoid(y) + z"),
        "cross_entropy": (x.clone().requires_grad_(), torch.arange(24, device=DEVICE), -100, 0.0, 0.0, 0.0),
    }
    for name, args in inputs.items():
        op = getattr(torch.ops.tilewright, name).default
        report.case(f"opcheck {name}", lambda: str(torch.library.opcheck(op, args)))

    def compiled():
        def f(x, w, r):
            y, h = ops.rms_norm(x, w, residual=r)
            return ops.swiglu(y, h).sum()

        fast = torch.compile(f, fullgraph=True)
        a = [t.clone().requires_grad_() for t in (x, w, x + 1)]
        b = [t.clone().requires_grad_() for t in (x, w, x + 1)]
        fast(*a).backward()
        f(*b).backward()
        assert all(torch.allclose(s.grad, t.grad, atol=1e-4) for s, t in zip(a, b))
        return "as eager"

    report.case("torch.compile(fullgraph=True), forward and backward", compiled)

    def graphed():
        static = x.clone()
        ops.rms_norm(static, w)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.rms_norm(static, w)
        static.copy_(x * 3 + 1)
        graph.replay()
        torch.testing.assert_close(y, rms64(static, w), rtol=1e-4, atol=1e-5)
        return "replayed on new values"

    report.case("CUDA graph", graphed)

    def streams():
        stream = torch.cuda.Stream()
        big = made(4096, 4096)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            big.mul_(0).add_(2)
            y = ops.rms_norm(big)
        stream.synchronize()
        torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-4, atol=1e-4)
        return "in the order of the stream"

    report.case("another stream", streams)

    def autocast():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = ops.rms_norm(x @ made(64, 64), w)
        assert y.dtype == torch.bfloat16
        return "bfloat16"

    report.case("autocast", autocast)

    def views():
        base = made(64, 130)
        for view in (base[:, 1:129], base.t()[1:129].t(), base[1::2, :128], base[3]):
            v = view.contiguous()
            torch.testing.assert_close(ops.softmax(view), torch.softmax(v, -1), rtol=1e-4, atol=1e-6)
        assert ops.softmax(made(0, 5)).shape == (0, 5)
        return "strided, shifted and empty"

    report.case("views", views)

    def refused():
        for call in (
            lambda: ops.rms_norm(x, w[:5]),
            lambda: ops.rms_norm(x, w.cpu()),
            lambda: ops.rms_norm(x.long(), w),
            lambda: ops.softmax(x.to(torch.complex64)),
            lambda: ops.softmax(x.to_sparse()),
        ):
            try:
                call()
            except (RuntimeError, NotImplementedError, ValueError):
                continue
            raise AssertionError("not refused")
        return "with an error"

    report.case("bad input", refused)


def host_time(report, out):
    """Microseconds of the host per call, for tensors so small that the device is never the limit."""
    x, w = made(4, 64), made(64)
    b, nothing = made(64), made(0, 64)
    raw = torch.ops.tilewright.softmax.inference

    def per_call(f, n=2000):
        best = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(n):
                f()
            best.append((time.perf_counter() - start) / n * 1e6)
            torch.cuda.synchronize()
        return statistics.median(best)

    pairs = {
        "rms_norm": (lambda: ops.rms_norm(x, w), lambda: F.rms_norm(x, (64,), w, 1e-6)),
        "layer_norm": (lambda: ops.layer_norm(x, w, b), lambda: F.layer_norm(x, (64,), w, b)),
        "softmax": (lambda: ops.softmax(x), lambda: torch.softmax(x, -1)),
        "swiglu": (lambda: ops.swiglu(x, x), lambda: F.silu(x) * x),
        "softmax, without the function": (lambda: raw(x, False), lambda: torch.ops.aten._softmax.default(x, -1, False)),
        "softmax of nothing": (lambda: raw(nothing, False), lambda: torch.ops.aten._softmax.default(nothing, -1, False)),
        "an empty tensor": (lambda: torch.empty_strided((4, 64), (64, 1), device=DEVICE), lambda: torch.empty_like(x)),
        "gelu": (lambda: ops.gelu(x), lambda: F.gelu(x)),
    }
    with torch.no_grad():
        for name, (ours, theirs) in pairs.items():

            def run():
                for f in (ours, theirs):
                    per_call(f, 200)
                a, b = per_call(ours), per_call(theirs)
                out.append({"case": f"host {name}", "ours_us": a, "torch_us": b})
                return f"{a:.2f} us, PyTorch's {b:.2f} us"

            report.case(f"host time {name}", run)


def training_host_time(report, out):
    """Microseconds of the host per forward and backward of tiny tensors."""
    x, y, w = made(4, 64).requires_grad_(), made(4, 64).requires_grad_(), made(64).requires_grad_()
    seed = made(4, 64)

    def per_call(f, held, n=200):
        best = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(n):
                torch.autograd.grad(f(), held, seed)
            best.append((time.perf_counter() - start) / n * 1e6)
        return min(best[1:])

    pairs = {
        "rms_norm": (lambda: ops.rms_norm(x, w), lambda: F.rms_norm(x, (64,), w, 1e-6), (x, w)),
        "softmax": (lambda: ops.softmax(x), lambda: torch.softmax(x, -1), (x,)),
        "swiglu": (lambda: ops.swiglu(x, y), lambda: F.silu(x) * y, (x, y)),
    }
    for name, (ours, theirs, held) in pairs.items():

        def run():
            a, b = per_call(ours, held), per_call(theirs, held)
            out.append({"case": f"host both ways {name}", "ours_us": a, "torch_us": b})
            return f"{a:.1f} us, PyTorch's {b:.1f} us"

        report.case(f"host time both ways {name}", run)


def losses_and_attention(report, out, deadline):
    d = torch.bfloat16

    def race(name, forms, first, work, unit):
        def run():
            sets = [tuple(t.clone() for t in first) for _ in range(2)]
            with torch.no_grad():
                graphs = {k: graph_of(f, sets, 2) for k, f in forms.items()}
                times = {k: [] for k in graphs}
                for _ in range(7):
                    for k, g in graphs.items():
                        times[k].append(timed(g, 2))
            medians = {k: statistics.median(v) for k, v in times.items()}
            out.append({"case": name, "us": medians})
            return ", ".join(f"{k} {v:.1f} us" for k, v in medians.items()) + f"; {work / medians['ours'] / 1e6:.2f} {unit}"

        if time.perf_counter() < deadline:
            report.case(name, run)

    logits, t = made(8192, 32768, dtype=d), torch.arange(8192, device=DEVICE) % 32768
    race(
        "forward cross_entropy 8192x32768 bf16",
        {"ours": ops.cross_entropy, "eager": F.cross_entropy, "inductor": torch.compile(F.cross_entropy)},
        (logits, t),
        logits.numel() * 2,
        "TB/s",
    )
    loss, lse = torch.ops.tilewright.cross_entropy(logits, t, -100, 0.0, 0.0, 0.0)
    down = torch.ones_like(loss)
    race(
        "gradient of cross_entropy 8192x32768 bf16",
        {"ours": lambda x, t: torch.ops.tilewright.cross_entropy_backward(down, x, t, lse, -100, 0.0, 0.0, 0.0)},
        (logits, t),
        logits.numel() * 4,
        "TB/s",
    )
    q = tuple(made(4, 16, 4096, 128, dtype=d, seed=i) for i in range(3))
    race(
        "attention 4x16x4096x128 bf16",
        {"ours": ops.attention, "eager": F.scaled_dot_product_attention},
        q,
        4 * 4 * 16 * 4096 * 4096 * 128,
        "TFLOPS",
    )
    for causal in (False, True):
        gradients = attention_gradients(*q, made(4, 16, 4096, 128, dtype=d, seed=3), causal)
        work = 10 * 4 * 16 * 4096 * 4096 * 128 // (2 if causal else 1)
        race(f"gradient of attention{', causal,' if causal else ''} 4x16x4096x128 bf16", gradients, q, work, "TFLOPS")
    x, w, b = made(4096, 4096, dtype=d), made(4096, 4096, dtype=d, seed=1), made(4096, dtype=d, seed=2)
    race(
        "linear with gelu 4096^3 bf16",
        {"ours": lambda x, w, b: ops.linear(x, w, b, "gelu"), "eager": lambda x, w, b: F.gelu(F.linear(x, w, b))},
        (x, w, b),
        2 * 4096**3,
        "TFLOPS",
    )


def attention_gradients(q, k, v, down, causal):
    """Ways to the gradients of attention, from what their forward kernels keep."""
    aten, scale = torch.ops.aten, q.shape[-1] ** -0.5
    y, lse = torch.ops.tilewright.attention_lse.inference(q, k, v, None, scale, causal)
    o, l, cq, ck, most_q, most_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return {
        "ours": lambda q, k, v: torch.ops.tilewright.attention_backward(down, q, k, v, y, lse, None, scale, causal),
        "eager": lambda q, k, v: aten._scaled_dot_product_flash_attention_backward(
            down, q, k, v, o, l, cq, ck, most_q, most_k, 0.0, causal, seed, offset, scale=scale
        ),
    }


def graph_of(f, tensors, copies):
    """A CUDA graph that runs `f` over all copies; its time per run in microseconds is asked for with `timed`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in tensors[:2]:
            f(*t)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for t in tensors[:copies]:
            f(*t)
    return graph


def timed(graph, copies):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / copies


def speed(report, out, deadline):
    d = torch.bfloat16
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        liger = {
            "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
            "swiglu": LigerSiLUMulFunction.apply,
        }
    except Exception as problem:  # noqa: BLE001
        print("no Liger:", problem)
        liger = {}
    eager = {
        "rms_norm": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6),
        "layer_norm": lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b),
        "add_rms_norm": lambda x, r, w: (F.rms_norm(x + r, (x.shape[-1],), w, 1e-6), x + r),
        "softmax": lambda x: torch.softmax(x, -1),
        "swiglu": lambda x, y: F.silu(x) * y,
        "gelu": F.gelu,
    }
    for m, n in ((16384, 4096), (8192, 8192)):
        for name, plain in eager.items():
            if time.perf_counter() > deadline:
                print(f"time is up before {name} {m}x{n}")
                return
            ours, _, tensors = cases()[name]

            def run():
                first = tensors(m, n, d)
                bytes_once = sum(t.numel() * t.element_size() for t in first) + first[0].numel() * 2 * (2 if "add" in name else 1)
                copies = 4
                sets = [tuple(t.clone() for t in first) for _ in range(copies)]
                triton = cases("triton")[name][0]
                forms = {"ours": ours, "triton": triton, "eager": plain, "inductor": torch.compile(plain, dynamic=False)}
                if name in liger:
                    forms["liger"] = liger[name]
                with torch.no_grad():
                    graphs = {k: graph_of(f, sets, copies) for k, f in forms.items()}
                    times = {k: [] for k in graphs}
                    for _ in range(9):
                        for k, g in graphs.items():
                            times[k].append(timed(g, copies))
                medians = {k: statistics.median(v) for k, v in times.items()}
                out.append({"case": f"{name} {m}x{n} bf16 forward", "us": medians, "bytes": bytes_once})
                rate = bytes_once / medians["ours"] / 1e6
                return ", ".join(f"{k} {v:.1f} us" for k, v in medians.items()) + f"; {rate:.2f} TB/s"

            report.case(f"forward {name} {m}x{n} bf16", run)
            if name in ("rms_norm", "layer_norm", "swiglu", "softmax") and m == 16384:
                report.case(
                    f"both ways {name} {m}x{n} bf16",
                    lambda: both_ways(out, name, ours, plain, tensors(m, n, d), liger.get(name)),
                )


def gradient_graph(f, tensors, seed):
    """A CUDA graph of forward and backward together, so that the host's time does not count."""
    held = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for h in held:
            torch.autograd.grad(f(*h), h, seed)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for h in held:
            torch.autograd.grad(f(*h), h, seed)
    return graph, held


def both_ways(out, name, ours, plain, first, liger):
    """Forward and backward together."""
    triton = cases("triton")[name][0]
    forms = {"ours": ours, "triton": triton, "eager": plain, "inductor": torch.compile(plain, dynamic=False)}
    if liger is not None:
        forms["liger"] = liger
    seed = made(*first[0].shape, dtype=first[0].dtype, seed=30)
    graphs = {k: gradient_graph(f, first, seed) for k, f in forms.items()}
    times = {k: [] for k in forms}
    for _ in range(7):
        for k, (g, _) in graphs.items():
            times[k].append(timed(g, 2))
    medians = {k: statistics.median(v) for k, v in times.items()}
    out.append({"case": f"{name} both ways", "us": medians})
    return ", ".join(f"{k} {v:.1f} us" for k, v in medians.items())


def shared_out(given):
    """One process for each share; the exit code says whether all passed."""
    start = time.perf_counter()
    call = [sys.executable, __file__, given.what, "--jobs", str(given.jobs), "--only", given.only, "--part"]
    started = [subprocess.Popen([*call, str(part)]) for part in range(given.jobs)]
    failed = sum(process.wait() != 0 for process in started)
    print(f"{given.what}: {failed} of {given.jobs} processes failed, {time.perf_counter() - start:.0f} s")
    return failed > 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["check", "triton", "time"])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--out")
    parser.add_argument("--jobs", type=int, default=6, help="processes for `check` and `triton`")
    parser.add_argument("--only", default="", help="cases whose names have this")
    parser.add_argument("--part", type=int, help="which of their shares this process runs")
    given = parser.parse_args()
    if given.what != "time" and given.part is None and given.jobs > 1:
        sys.exit(shared_out(given))
    report, out = Report(*((0, 1) if given.part is None else (given.part, given.jobs)), only=given.only), []
    print(torch.__version__, torch.cuda.get_device_name(0), flush=True)
    if given.what == "check":
        values(report, [(33, 256), (7, 1000)], [torch.float32, torch.bfloat16])
        values(report, [(130, 4096)], [torch.float16])
        other_values(report)
        totals(report)
        attention_repeats(report)
        checks(report)
    if given.what in ("check", "triton"):
        triton(report)
        values(report, [(33, 256), (7, 1000)], [torch.float32, torch.bfloat16], "triton")
    if given.what == "time":
        host_time(report, out)
        training_host_time(report, out)
        deadline = time.perf_counter() + given.seconds
        losses_and_attention(report, out, deadline)
        speed(report, out, deadline)
        from tilewright import _native

        print("\n".join(_native.operator_schedules(0, [16384])))
    if given.out:
        with open(given.out, "w") as file:
            json.dump(out, file, indent=1)
    print(f"{report.ran} of {report.met} cases, {report.bad} bad")
    sys.exit(report.bad > 0)


if __name__ == "__main__":
    main()
