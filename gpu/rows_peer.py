"""Row, elementwise and reduction kernels beside PyTorch's compiler, in one run, with cold caches.

    cargo run --release -p tilewright-kernels --example show_rows -- --json gpu/rows.txt > rows.json
    python3 gpu/rows_peer.py check rows.json           # against float64, with guard elements around outputs
    python3 gpu/rows_peer.py warm rows.json [I/N]      # compiles PyTorch's side (part I of N), to save time later
    python3 gpu/rows_peer.py bench rows.json [--record FILE] [--seconds S]

Arms of a line: our kernels (`tw`), and torch.compile of the same computation (`inductor`; lines with `peer=0` have
none). Each arm is a CUDA graph that runs once on every set of tensors; the sets together are more than five times the
second-level cache, outputs included. Arms take turns, medians are of one pass over the sets. "of copy" is the logical
bytes per second over those of a device-to-device copy of the same run; every tensor counts once (gradients beyond
the second-level cache that are clipped to their own norm twice).
"""
import ctypes, datetime, json, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor

import torch
from cuda.bindings import driver as cu, nvrtc

F = torch.nn.functional
here = os.path.dirname(os.path.abspath(__file__))
lib = os.environ.get("TILEWRIGHT_DEVICE_LIB") or os.path.join(os.path.dirname(here), "device-lib")
HEADERS = [(f"tw/{n}", open(f"{lib}/{n}").read()) for n in sorted(os.listdir(lib)) if n.endswith(".cuh")]
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# As a result of this type may differ from float64, in the Euclidean norm.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# Bytes of all sets together, and sets at most.
SETS_BYTES, SETS_MAX = 320 << 20, 200
GUARD = 256


def ck(r):
    if r[0].value != 0:
        raise RuntimeError(str(r[0]))
    return r[1] if len(r) == 2 else r[1:]


def cubin(text):
    """Machine code, or the compiler's complaint as a string."""
    p = ck(nvrtc.nvrtcCreateProgram(text.encode(), b"k.cu", len(HEADERS), [t.encode() for _, t in HEADERS],
                                    [n.encode() for n, _ in HEADERS]))
    o = [b"--gpu-architecture=sm_90a", b"-std=c++17", b"-default-device", b"-fmad=false"]
    r = nvrtc.nvrtcCompileProgram(p, len(o), o)
    if r[0].value != 0:
        b = b" " * ck(nvrtc.nvrtcGetProgramLogSize(p))
        nvrtc.nvrtcGetProgramLog(p, b)
        return b.decode()
    b = b" " * ck(nvrtc.nvrtcGetCUBINSize(p))
    nvrtc.nvrtcGetCUBIN(p, b)
    return b


def parse(line):
    """Operation, type, and the pairs `key=value`; distances between rows that are not given are the rows' lengths."""
    words = line.split()
    keys = dict(w.split("=") for w in words[2:])
    s = {k: int(v) for k, v in keys.items() if k[0].isupper() or k.startswith("ld")}
    for name in ("ldx", "ldy", "ld0", "ld1", "ld"):
        s.setdefault(name, s.get("N", 1))
    return words[0], TYPES[words[1]], keys, s


class Problem:
    """One set of tensors of a line: `T` by name, `outs` of (buffer, view, reference), and the peer's call."""

    def __init__(self, line, guarded=False):
        self.line, self.guarded = line, guarded
        self.op, self.t, self.keys, self.s = parse(line)
        self.T, self.outs, self.peer, self.prepare = {}, {}, None, None
        self.bytes = 0
        getattr(self, "make_" + self.op)()

    def draw(self, rows, cols, ld, dtype):
        x = torch.randn(rows, ld, device="cuda").to(dtype)
        # What lies between rows is no data.
        if self.guarded:
            x[:, cols:] = float("nan")
        return x[:, :cols]

    def given(self, name, tensor):
        self.T[name] = tensor
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def out(self, name, rows, cols, ld, dtype, ref, count=True):
        """A poisoned output [rows, cols] with row distance `ld`; when checked, in the middle of a larger buffer."""
        pad = GUARD if self.guarded else 0
        buffer = torch.full((rows * ld + 2 * pad,), float("nan"), device="cuda", dtype=dtype)
        view = buffer[pad:pad + rows * ld].view(rows, ld)[:, :cols]
        self.T[name] = view
        self.outs[name] = (buffer, view, ref)
        if count:
            self.bytes += rows * cols * view.element_size()
        return view

    def inout(self, name, value, ref, ld=None):
        """A tensor that is changed in place, its rows `ld` elements apart: the reference is a function of float64 of what was there."""
        before = value.clone() if self.guarded else None
        view = self.out(name, *value.shape, ld or value.shape[1], value.dtype, ref and (lambda: ref(before)))
        view.copy_(value)
        self.bytes += view.numel() * view.element_size()
        return view

    def scratch(self, name, elements):
        self.T[name] = torch.empty(elements, device="cuda")

    # Operations, as `show_rows` names them.

    def rows_op(self, eager, exact, scales):
        s, t = self.s, self.t
        M, N = s["M"], s["N"]
        x = self.given("X", self.draw(M, N, s["ldx"], t))
        r = None
        if self.keys.get("residual") == "1":
            r = self.given("R", self.draw(M, N, s["ldx"], t))
            self.out("H", M, N, s["ldx"], t, lambda: (x + r).double())
        v = [self.given(n, torch.randn(N, device="cuda").to(t)) for n in scales]
        h = (lambda: x + r) if r is not None else (lambda: x)
        self.out("Y", M, N, s["ldy"], t, lambda: exact(h().double(), *[a.double() for a in v]))
        if r is not None:
            def call(x, r, *v):
                h = x + r
                return h, eager(h, *v)
            self.peer = (call, (x, r, *v))
        else:
            self.peer = (eager, (x, *v))

    def make_softmax(self):
        f = lambda x: F.softmax(x, -1)
        self.rows_op(f, f, [])

    def make_logsoftmax(self):
        f = lambda x: F.log_softmax(x, -1)
        self.rows_op(f, f, [])

    def make_layernorm(self):
        N = self.s["N"]
        f = lambda x, g, b: F.layer_norm(x, (N,), g, b, 1e-5)
        self.rows_op(f, f, ["scale", "shift"])

    def make_rmsnorm(self):
        N = self.s["N"]
        f = lambda x, g: F.rms_norm(x, (N,), g, 1e-6)
        self.rows_op(f, f, ["scale"])

    def map_op(self, f, operands, transposed=False):
        """`operands`: 2 for a matrix, 1 for a vector along columns."""
        s, t = self.s, self.t
        to = TYPES[self.keys["to"]] if "to" in self.keys else t
        M, N = s["M"], s["N"]
        P, Q = s.get("P", M), s.get("Q", N)
        X = []
        for i, rank in enumerate(operands):
            if rank == 1:
                X.append(self.given(f"X{i}", torch.randn(N, device="cuda").to(t)))
            elif transposed:
                X.append(self.given(f"X{i}", self.draw(Q, P, s[f"ld{i}"], t).t()))
            else:
                X.append(self.given(f"X{i}", self.draw(P, Q, s[f"ld{i}"], t)))
        call = lambda *a: f(*a).to(to).contiguous() if transposed else f(*a).to(to)
        self.out("Y", M, N, s["ldy"], to, lambda: f(*[a.double() for a in X]))
        self.peer = (call, tuple(X))

    def make_copy(self):
        self.map_op(lambda x: x.clone(), [2])

    def make_transpose(self):
        self.map_op(lambda x: x, [2], True)

    def cut(self, transposed):
        s = self.s
        self.map_op(lambda x: F.pad(x, (0, s["N"] - s["Q"], 0, s["M"] - s["P"])), [2], transposed)

    def make_pad(self):
        self.cut(False)

    def make_padtranspose(self):
        self.cut(True)

    def make_biasgelu(self):
        self.map_op(lambda x, b: F.gelu(x + b), [2, 1])

    def make_swiglu(self):
        self.map_op(lambda x, y: F.silu(x) * y, [2, 2])

    def make_fused(self):
        self.map_op(lambda x, y, g, b: F.relu(x * g + b) + y, [2, 2, 1, 1])

    def make_sumall(self):
        s, t = self.s, self.t
        x = self.given("X", self.draw(s["M"], s["N"], s["N"], t))
        self.scratch("P", self.keys_max("P"))
        self.out("Y", 1, 1, 1, torch.float32, lambda: x.double().sum().view(1, 1))
        self.peer = (lambda x: x.sum(dtype=torch.float32), (x,))

    def make_sumrows(self):
        s, t = self.s, self.t
        x = self.given("X", self.draw(s["M"], s["N"], s["ldx"], t))
        self.scratch("P", self.keys_max("P") * s["N"])
        self.out("Y", 1, s["N"], s["N"], torch.float32, lambda: x.double().sum(0, keepdim=True))
        self.peer = (lambda x: x.sum(0, dtype=torch.float32), (x,))

    def keys_max(self, name):
        return SIZES[self.line].get(name, 1)

    def make_crossentropy(self):
        s, t = self.s, self.t
        M, N = s["M"], s["N"]
        targets = torch.randint(0, N, (M,), device="cuda")
        targets[::7] = -100
        self.given("T", targets)
        scale, form = 1.0 / M, self.keys.get("form", "inplace")
        # The factor of each row's gradient.
        rows = torch.rand(M, device="cuda") * scale if form == "beside" else torch.full((M,), scale, device="cuda")
        self.T["S"] = rows if form == "beside" else rows[:1].clone()

        def gradient(x):
            g = F.softmax(x.double(), -1)
            g[torch.arange(M), targets.clamp_min(0)] -= 1
            g[targets < 0] = 0
            return g * rows.double().view(M, 1)

        if form == "inplace":
            x = self.inout("X", self.draw(M, N, N, t), gradient, s["ldx"])
        else:
            x = self.given("X", self.draw(M, N, s["ldx"], t))
        before = x.double() if self.guarded else None
        if form == "beside":
            self.out("G", M, N, s["ldx"], t, lambda: gradient(before))
        if form == "losses":
            self.out("Z", 1, M, M, torch.float32, lambda: torch.logsumexp(before, -1).view(1, M))
        self.out("L", 1, M, M, torch.float32,
                 lambda: F.cross_entropy(before, targets, reduction="none", ignore_index=-100).view(1, M))
        # The peer's own tensors, with a gradient.
        leaf = x.detach().clone().requires_grad_(True)
        forward = lambda x, t: F.cross_entropy(x.float(), t, reduction="none", ignore_index=-100).sum() * scale
        self.peer = (forward, (leaf, targets))
        self.backward = lambda loss: torch.autograd.grad(loss, leaf)

    def norm_backward(self, forward, vectors):
        s, t = self.s, self.t
        M, N = s["M"], s["N"]
        x = self.given("X", self.draw(M, N, s["ld"], t))
        dy = self.given("DY", self.draw(M, N, s["ld"], t))
        v = [torch.randn(N, device="cuda").to(t) for _ in range(vectors)]
        self.given("scale", v[0])

        def exact(which):
            wide = [a.double().requires_grad_(True) for a in (x, *v)]
            grads = torch.autograd.grad(forward(*wide), wide, dy.double())
            return grads[which].view(-1, N)

        self.out("DX", M, N, s["ld"], t, lambda: exact(0))
        for i, name in enumerate("WB"[:vectors]):
            self.scratch("P" + name, self.keys_max("P") * N)
            self.out("D" + name, 1, N, N, t, lambda i=i: exact(1 + i))
        leaves = [a.detach().clone().requires_grad_(True) for a in (x, *v)]
        self.peer = (forward, tuple(leaves))
        # Only the gradient is timed: the forward pass runs before.
        self.backward = lambda y: torch.autograd.grad(y, leaves, dy, retain_graph=True)
        self.forward_once = True

    def make_layernormbwd(self):
        N = self.s["N"]
        self.norm_backward(lambda x, g, b: F.layer_norm(x, (N,), g, b, 1e-5), 2)

    def make_rmsnormbwd(self):
        N = self.s["N"]
        self.norm_backward(lambda x, g: F.rms_norm(x, (N,), g, 1e-6), 1)

    def make_adamw(self):
        s, t = self.s, self.t
        N = s["N"]
        rate, b1, b2, eps, decay, clip, step = 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.5, 3
        c1, c2 = 1 / (1 - b1 ** step), 1 / (1 - b2 ** step)
        self.T["H"] = torch.tensor([rate, b1, b2, eps, decay, clip, c1, c2], device="cuda")
        g = self.given("G", torch.randn(N, device="cuda").to(t))
        w0, m0, v0 = torch.randn(N, device="cuda"), torch.randn(N, device="cuda"), torch.rand(N, device="cuda")

        def exact():
            d = g.double() * clip
            m = b1 * m0.double() + (1 - b1) * d
            v = b2 * v0.double() + (1 - b2) * d * d
            w = w0.double()
            return w - rate * (m * c1 / ((v * c2).sqrt() + eps) + decay * w), m, v

        for i, (name, value) in enumerate([("W", w0), ("M", m0), ("V", v0)]):
            self.inout(name, value.view(1, N), lambda _, i=i: exact()[i].view(1, N))
        copy = t != torch.float32
        if copy:
            self.out("P", 1, N, N, t, lambda: exact()[0].view(1, N))

        def call(g, w, m, v, *p):
            g = g.float() * clip
            m.lerp_(g, 1 - b1)
            v.lerp_(g * g, 1 - b2)
            w.sub_(rate * (m * c1 / ((v * c2).sqrt() + eps) + decay * w))
            if p:
                p[0].copy_(w)

        mine = [w0, m0, v0] + ([torch.empty(N, device="cuda", dtype=t)] if copy else [])
        self.peer = (call, (g, *mine))

    def make_adamwtable(self):
        """Three groups of parameters, tensors of different lengths; gradients clipped to a norm of 1."""
        s, t = self.s, self.t
        R, B, K = s["R"], s["B"], s["K"]
        table = torch.sort(torch.randint(0, K, (R,), device="cuda", dtype=torch.int32)).values
        self.given("T", table)
        h = torch.tensor([[1e-3 * (i + 1), 0.9, 0.999, 1e-8, 0.01 * i, 1.0, 3.7, 333.6] for i in range(K)], device="cuda")
        self.T["H"] = h
        g = torch.randn(R, B, device="cuda").to(t)
        # What lies behind the end of a tensor is zero.
        g[:, B - 5:] = 0
        self.given("G", g)
        # The norm needs all gradients before the first is used, so what no cache holds is read twice.
        if g.numel() * g.element_size() > torch.cuda.get_device_properties(0).L2_cache_size:
            self.bytes += g.numel() * g.element_size()
        w0, m0, v0 = (torch.randn(R, B, device="cuda") for _ in range(3))
        v0.abs_()
        self.scratch("PARTS", self.keys_max("P"))
        norm = lambda: g.double().norm().view(1, 1)
        factor = lambda: (1.0 / (norm() + 1e-6)).clamp_max(1.0)
        self.out("Y", 1, 1, 1, torch.float32, norm)
        self.out("S", 1, 1, 1, torch.float32, factor)

        def exact():
            rate, b1, b2, eps, decay, clip, c1, c2 = (x.view(R, 1) for x in h.double()[table.long()].unbind(1))
            d = g.double() * clip * factor()
            m = b1 * m0.double() + (1 - b1) * d
            v = b2 * v0.double() + (1 - b2) * d * d
            w = w0.double()
            return w - rate * (m * c1 / ((v * c2).sqrt() + eps) + decay * w), m, v

        for i, (name, value) in enumerate([("W", w0), ("M", m0), ("V", v0)]):
            self.inout(name, value, lambda _, i=i: exact()[i])
        if t != torch.float32:
            self.out("P", R, B, B, t, lambda: exact()[0])
        # Beside it, PyTorch's fused optimiser on tensors of 1 MiB, without clipping: less work.
        parts = [w0.view(-1)[i:i + (1 << 18)] for i in range(0, R * B, 1 << 18)]
        for p in parts:
            p.grad = torch.randn_like(p)
        fused = torch.optim.AdamW(parts, fused=True, capturable=True)
        self.peer, self.eager = (lambda: fused.step(), ()), True

    def make_topk(self):
        s, t = self.s, self.t
        M, N, K = s["M"], s["N"], int(self.keys.get("count", 8))
        x = self.given("X", self.draw(M, N, s["ldx"], t))
        # A row of few finite elements; among equals the first comes first.
        if self.guarded:
            x[0, 3:] = float("-inf")
        order = lambda: torch.sort(x.float(), dim=1, descending=True, stable=True)
        self.out("V", M, K, K, t, lambda: order().values[:, :K].nan_to_num(neginf=-1e4).double())
        self.clean = lambda v: v.nan_to_num(neginf=-1e4, nan=float("nan"))
        self.T["I"] = torch.full((M, K), -1, device="cuda")
        self.positions = lambda: torch.equal(self.T["I"], order().indices[:, :K])
        self.peer = (lambda x: torch.topk(x, K), (x,))

    def make_dropout(self):
        s, t = self.s, self.t
        N, drop = s["N"], 0.25
        x = self.given("X", torch.randn(N, device="cuda").to(t))
        residual = self.keys.get("residual") == "1"
        r = self.given("R", torch.randn(N, device="cuda").to(t)) if residual else None

        def kept():
            """What was kept is exact; how much was kept is within five deviations, where that can be told."""
            base = r.double() if residual else 0.0
            both = torch.stack([base + 0 * x.double(), base + x.double() / (1 - drop)])
            keep = (y.double().view(-1) - both[1]).abs() < (y.double().view(-1) - both[0]).abs()
            clear = x.abs() > 0.2
            share, count = keep[clear].double().mean().item(), int(clear.sum())
            assert abs(share - (1 - drop)) < 5 * (drop * (1 - drop) / count) ** 0.5, share
            return torch.where(keep, both[1], both[0]).view(1, N)

        y = self.out("Y", 1, N, N, t, kept)
        self.peer = ((lambda x, r: F.dropout(x, drop) + r, (x, r)) if residual else (lambda x: F.dropout(x, drop), (x,)))

    def make_gemv(self):
        s, t = self.s, self.t
        N, K, m = s["N"], s["K"], int(self.keys.get("vectors", 1))
        deep = self.keys.get("deep", "1") == "1"
        self.given("B", self.draw(N, K, s["ldb"], t) if deep else self.draw(K, N, s["ldb"], t))
        x = self.given("A", self.draw(m, K, s["lda"], t))
        w = self.T["B"] if deep else self.T["B"].t()
        self.out("C", m, N, s["ldc"], t, lambda: x.double() @ w.double().t())
        self.peer = (lambda x, w: F.linear(x, w), (x, w))


SIZES = {}


class Kernels:
    """The loaded kernels of a line."""

    def __init__(self, case, codes):
        self.kernels = []
        self.fit = []
        for k, code in zip(case["kernels"], codes):
            module = ck(cu.cuModuleLoadData(code))
            fn = ck(cu.cuModuleGetFunction(module, k["entry"].encode()))
            attribute = cu.CUfunction_attribute
            if k["smem"]:
                cu.cuFuncSetAttribute(fn, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, k["smem"])
            if k["cluster"] > 8:
                cu.cuFuncSetAttribute(fn, attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
            registers = ck(cu.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, fn))
            stack = ck(cu.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, fn))
            fit = ck(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(fn, k["threads"], k["smem"]))
            self.fit.append(f"{registers}r{f'+{stack}b' if stack else ''}x{fit}")
            self.kernels.append((k, fn, module, fit))

    def call(self, T):
        """A function that launches all of them on these tensors."""
        ready = []
        for k, fn, _, fit in self.kernels:
            values, types = [], []
            for a in k["arguments"]:
                if "pointer" in a:
                    values.append(T[a["pointer"]].data_ptr())
                    types.append(ctypes.c_void_p)
                else:
                    values.append(k["sizes"][a["size"]])
                    types.append(ctypes.c_int)
            grid = k["items"]
            if k["persistent"]:
                grid = min(grid, fit * torch.cuda.get_device_properties(0).multi_processor_count // k["cluster"])
            c = cu.CUlaunchConfig()
            c.gridDimX, c.gridDimY, c.gridDimZ = grid * k["cluster"], 1, 1
            c.blockDimX, c.blockDimY, c.blockDimZ = k["threads"], 1, 1
            c.sharedMemBytes = k["smem"]
            if k["cluster"] > 1:
                # Also a cluster of one block costs: blocks then start at a lower rate.
                a = cu.CUlaunchAttribute()
                a.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                a.value.clusterDim.x, a.value.clusterDim.y, a.value.clusterDim.z = k["cluster"], 1, 1
                c.attrs, c.numAttrs = [a], 1
            ready.append((c, fn, (tuple(values), tuple(types))))

        def go():
            for c, fn, args in ready:
                c.hStream = cu.CUstream(torch.cuda.current_stream().cuda_stream)
                ck(cu.cuLaunchKernelEx(c, fn, args, 0))
        return go


def untouched(buffer, view):
    """Nothing was written outside the view."""
    copy = buffer.clone()
    torch.as_strided(copy, view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(torch.isnan(copy).all())


def load(path):
    cases = json.load(open(path))
    for case in cases:
        SIZES[case["line"]] = {k: v for kernel in case["kernels"] for k, v in kernel["sizes"].items()}
    texts = [k["text"] for case in cases for k in case["kernels"]]
    with ThreadPoolExecutor(16) as pool:
        codes = iter(list(pool.map(cubin, texts)))
    out = []
    for case in cases:
        own = [next(codes) for _ in case["kernels"]]
        bad = [c for c in own if isinstance(c, str)]
        if bad:
            print("DOES NOT COMPILE", case["line"], bad[0][:600])
        else:
            out.append((case, own))
    return out


def check(path):
    wrong = 0
    for n, (case, codes) in enumerate(load(path)):
        torch.manual_seed(n)
        problem = Problem(case["line"], guarded=True)
        kernels = Kernels(case, codes)
        kernels.call(problem.T)()
        torch.cuda.synchronize()
        worst, notes = 0.0, ""
        for name, (buffer, view, ref) in problem.outs.items():
            want = ref()
            clean = getattr(problem, "clean", lambda v: v)
            error = ((clean(view).double() - want).norm() / want.norm().clamp_min(1e-30)).item()
            if not error < LIMITS[view.dtype]:
                notes += f" {name}: WRONG"
            worst = max(worst, error if error == error else float("inf"))
            if not untouched(buffer, view):
                notes += f" {name}: WROTE OUTSIDE"
            del want
        if not getattr(problem, "positions", lambda: True)():
            notes += " positions: WRONG"
        wrong += bool(notes)
        plans = "; ".join(k["schedule"] for k in case["kernels"])
        print(f"{case['line']:60} {worst:.1e} {','.join(kernels.fit):>12} {plans}{notes}", flush=True)
        del problem
    print(f"{wrong} wrong")
    return wrong


def compiled(problem):
    fn, args = problem.peer
    if hasattr(problem, "eager"):
        return lambda p: p.peer[0]()
    f = torch.compile(fn, dynamic=False)
    backward = getattr(problem, "backward", None)
    if hasattr(problem, "forward_once"):
        def call(p):
            if not hasattr(p, "result"):
                p.result = f(*p.peer[1])
            return p.backward(p.result)
        return call
    return (lambda p: p.backward(f(*p.peer[1]))) if backward else (lambda p: f(*p.peer[1]))


def warm(path, part):
    i, n = map(int, part.split("/"))
    lines = [c["line"] for c in json.load(open(path)) if "peer=0" not in c["line"]]
    for case in json.load(open(path)):
        SIZES[case["line"]] = {k: v for kernel in case["kernels"] for k, v in kernel["sizes"].items()}
    for line in lines[i::n]:
        begin = time.time()
        torch._dynamo.reset()
        p = Problem(line)
        try:
            compiled(p)(p)
        except Exception as error:
            print(line, str(error)[:200], flush=True)
        print(f"{line} {time.time() - begin:.1f} s", flush=True)
        del p


def graphed(calls):
    """A graph of all calls; what they return stays alive, so that every call writes memory of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # A gradient runs on the stream of its forward pass.
    with torch.cuda.stream(side):
        calls[0]()
        for call in calls:
            getattr(call, "prepare", lambda: None)()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [call() for call in calls]
    return graph, kept


class Started:
    """Calls that are started one by one, with the face of a graph."""

    def __init__(self, calls):
        self.calls = calls

    def replay(self):
        for call in self.calls:
            call()


def time_us(replay, times):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    for _ in range(times):
        replay()
    b.record()
    b.synchronize()
    return a.elapsed_time(b) * 1e3 / times


def bench(path, seconds, record):
    loaded = load(path)
    big = torch.empty(512 << 20, device="cuda", dtype=torch.uint8)
    to = torch.empty_like(big)
    copy_us = sorted(time_us(lambda: to.copy_(big), 4) for _ in range(9))[4]
    copy = 2 * big.numel() / copy_us / 1e6
    del big, to
    name = torch.cuda.get_device_name()
    print(f"{name}, copy of 512 MiB: {copy:.2f} TB/s")
    print(f"{'kernel':60} {'us':>8} {'TB/s':>6} {'of copy':>7} {'inductor':>8}  plan")
    rows = []
    for case, codes in loaded:
        line = case["line"]
        torch._dynamo.reset()
        first = Problem(line)
        count = max(1, min(SETS_MAX, -(-SETS_BYTES // first.bytes)))
        if first.bytes > SETS_BYTES // 2:
            count = 1
        sets = [first] + [Problem(line) for _ in range(count - 1)]
        kernels = Kernels(case, codes)
        row = {"line": line, "bytes": first.bytes, "sets": count, "us": {},
               "plan": [k["schedule"] for k in case["kernels"]], "registers": kernels.fit}
        graphs = {}
        arms = {"tw": [kernels.call(p.T) for p in sets]}
        if "peer=0" not in line:
            f = compiled(first)
            arms["inductor"] = [lambda p=p: f(p) for p in sets]
            if hasattr(first, "forward_once"):
                for p, call in zip(sets, arms["inductor"]):
                    call.prepare = lambda p=p, call=call: (p.__dict__.pop("result", None), call())
        for arm, calls in arms.items():
            try:
                calls[0]()
                if arm == "inductor" and hasattr(first, "forward_once"):
                    # PyTorch's gradients are started one by one: its engine does not follow a recording here.
                    for call in calls:
                        call.prepare()
                    graphs[arm] = (Started(calls), calls)
                    row["peer_without_graph"] = True
                    continue
                graphs[arm] = graphed(calls)
            except Exception as error:
                row.setdefault("failed", {})[arm] = str(error)[:200]
        torch.cuda.synchronize()
        times = {arm: [] for arm in graphs}
        once = {arm: max(1.0, time_us(g[0].replay, 2)) for arm, g in graphs.items()}
        begin, n = time.time(), 0
        while n < 5 or (n < 60 and time.time() - begin < seconds):
            for arm in list(graphs)[::-1 if n % 2 else 1]:
                passes = max(1, int(150 / once[arm]))
                times[arm].append(time_us(graphs[arm][0].replay, passes) / count)
            n += 1
        for arm, x in times.items():
            x.sort()
            row["us"][arm] = [round(x[len(x) * q // 4], 3) for q in (1, 2, 3)]
        rows.append(row)
        if "tw" in row["us"]:
            t = row["us"]["tw"][1]
            rate = first.bytes / t / 1e6
            row["of_copy"] = round(rate / copy, 4)
            ratio = ""
            if "inductor" in row["us"]:
                row["inductor_over_tw"] = round(row["us"]["inductor"][1] / t, 3)
                ratio = f"{row['inductor_over_tw']:.2f}x"
            print(f"{line:60} {t:8.2f} {rate:6.2f} {rate / copy * 100:6.1f}% {ratio:>8}  "
                  f"{';'.join(row['plan'])} [{','.join(kernels.fit)}] {row.get('failed', '')}", flush=True)
        else:
            print(line, row.get("failed"), flush=True)
        del graphs, sets, first, arms, kernels
    ratios = sorted((r["inductor_over_tw"], r["line"]) for r in rows if "inductor_over_tw" in r)
    for ratio, line in ratios[:8]:
        print(f"  worst: {ratio:.2f}x {line}")
    if record:
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
                                 "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
        head = {"kind": "gpu-rows-peer", "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "commit": os.environ.get("TILEWRIGHT_COMMIT", "unknown"), "command": "python3 gpu/rows_peer.py bench",
                "machine": {"gpu": name, "driver": driver, "torch": torch.__version__},
                "protocol": __doc__.split("\n\n", 2)[2].strip(), "copy_tb_per_s": round(copy, 3), "rows": rows}
        json.dump(head, open(record, "w"), indent=1)


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


if __name__ == "__main__":
    torch.zeros(1, device="cuda")
    what = sys.argv[1]
    if what == "check":
        sys.exit(bool(check(sys.argv[2])))
    elif what == "warm":
        warm(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "0/1")
    elif what == "bench":
        bench(sys.argv[2], float(option("--seconds", "0.15")), option("--record", None))
    else:
        sys.exit(__doc__)
