"""Checks and times the row and elementwise kernels that `show_rows --json` printed.

    cargo run --release -p tilewright-kernels --example show_rows -- --json gpu/rows.txt > rows.json
    python3 gpu/explore_rows.py rows.json [-DTW_STORE_CACHE='".cs"']

Every kernel runs on fresh inputs into outputs filled with a poison, with guard elements around them, and is
compared with float64. Times are medians of interleaved repetitions against PyTorch eager and torch.compile;
"of copy" is the logical bytes per second over those of a device-to-device copy of the same run.
"""
import ctypes, json, os, sys, time
from concurrent.futures import ThreadPoolExecutor

import torch
from cuda.bindings import driver as cu, nvrtc

here = os.path.dirname(os.path.abspath(__file__))
lib = os.path.join(os.path.dirname(here), "device-lib")
HEADERS = [(f"tw/{n}", open(f"{lib}/{n}").read()) for n in sorted(os.listdir(lib)) if n.endswith(".cuh")]
DEFINES = [a for a in sys.argv[2:] if a.startswith("-D")]
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
COMPILE = "--no-compile" not in sys.argv


def ck(r):
    if r[0].value != 0:
        raise RuntimeError(str(r[0]))
    return r[1] if len(r) == 2 else r[1:]


def cubin(text):
    p = ck(nvrtc.nvrtcCreateProgram(text.encode(), b"k.cu", len(HEADERS), [t.encode() for _, t in HEADERS],
                                    [n.encode() for n, _ in HEADERS]))
    major, minor = torch.cuda.get_device_capability()
    arch = "90a" if major == 9 else f"{major}{minor}"
    o = [f"--gpu-architecture=sm_{arch}".encode(), b"-std=c++17", b"-default-device"] + [d.encode() for d in DEFINES]
    r = nvrtc.nvrtcCompileProgram(p, len(o), o)
    if r[0].value != 0:
        n = ck(nvrtc.nvrtcGetProgramLogSize(p))
        b = b" " * n
        nvrtc.nvrtcGetProgramLog(p, b)
        return b.decode()
    n = ck(nvrtc.nvrtcGetCUBINSize(p))
    b = b" " * n
    nvrtc.nvrtcGetCUBIN(p, b)
    return b


def guarded(rows, cols, ld, dtype):
    """A poisoned [rows, cols] with row distance `ld`, in the middle of a larger poisoned buffer."""
    pad = 256
    buffer = torch.full((rows * ld + 2 * pad,), float("nan"), device="cuda", dtype=dtype)
    return buffer, buffer[pad:pad + rows * ld].view(rows, ld)[:, :cols]


def untouched(buffer, view):
    """Nothing was written outside the view."""
    copy = buffer.clone()
    inner = torch.as_strided(copy, view.shape, view.stride(), view.storage_offset())
    inner.fill_(float("nan"))
    return bool(torch.isnan(copy).all())


def random(rows, cols, ld, dtype):
    full = torch.randn(rows, ld, device="cuda").to(dtype)
    return full[:, :cols]


def problem(v):
    """Tensors by name, outputs with their reference (a function of float64), eager function, logical bytes."""
    words = v["line"].split()
    op, t = words[0], TYPES[words[1]]
    keys = dict(w.split("=") for w in words[2:])
    s = v["sizes"]
    to = TYPES[keys.get("to", words[1])]
    size = torch.finfo(t).bits // 8
    T, outs = {}, {}

    def out(name, rows, cols, ld, dtype, ref):
        buffer, view = guarded(rows, cols, ld, dtype)
        T[name] = view
        outs[name] = (buffer, view, ref)

    F = torch.nn.functional
    if op == "gemv":
        N, K, m = s["N"], s["K"], int(keys.get("vectors", 1))
        deep = keys.get("deep", "1") == "1"
        T["B"] = random(N, K, s["ldb"], t) if deep else random(K, N, s["ldb"], t)
        T["A"] = random(m, K, s["lda"], t)
        w, x = T["B"] if deep else T["B"].t(), T["A"]
        out("C", m, N, s["ldc"], t, lambda: x.double() @ w.double().t())
        return T, outs, lambda: F.linear(x, w), N * K * size
    M, N = s["M"], s["N"]
    if op in ("softmax", "logsoftmax", "layernorm", "rmsnorm"):
        x = T["X"] = random(M, N, s["ldx"], t)
        streams = 2
        base = x
        if keys.get("residual") == "1":
            r = T["R"] = random(M, N, s["ldx"], t)
            base = None
            out("H", M, N, s["ldx"], t, lambda: (x + r).double())
            streams = 4
        h = (lambda: x) if base is not None else (lambda: x + r)
        g = T["scale"] = torch.randn(N, device="cuda").to(t)
        b = T["shift"] = torch.randn(N, device="cuda").to(t)
        eager = {
            "softmax": lambda: F.softmax(h(), -1), "logsoftmax": lambda: F.log_softmax(h(), -1),
            "layernorm": lambda: F.layer_norm(h(), (N,), g, b, 1e-5),
            "rmsnorm": lambda: F.rms_norm(h(), (N,), g, 1e-6)}[op]
        exact = {
            "softmax": lambda: F.softmax(h().double(), -1), "logsoftmax": lambda: F.log_softmax(h().double(), -1),
            "layernorm": lambda: F.layer_norm(h().double(), (N,), g.double(), b.double(), 1e-5),
            "rmsnorm": lambda: F.rms_norm(h().double(), (N,), g.double(), 1e-6)}[op]
        out("Y", M, N, s["ldy"], t, exact)
        fn = eager if base is not None else (lambda: (h(), eager()))
        return T, outs, fn, streams * M * N * size
    P, Q = s.get("P", M), s.get("Q", N)
    if "transpose" in op:
        x = T["X0"] = random(Q, P, s["ld0"], t).t()
    else:
        x = T["X0"] = random(P, Q, s["ld0"], t)
    tosize = torch.finfo(to).bits // 8
    count = M * N * tosize + min(M, P) * min(N, Q) * size
    if op in ("copy", "transpose"):
        out("Y", M, N, s["ldy"], to, lambda: x.double())
        y2 = torch.empty(M, N, device="cuda", dtype=to)
        return T, outs, lambda: y2.copy_(x), count
    if op in ("pad", "padtranspose"):
        cut = lambda: F.pad(x, (0, N - Q, 0, M - P)).to(to)
        out("Y", M, N, s["ldy"], to, lambda: F.pad(x.double(), (0, N - Q, 0, M - P)))
        return T, outs, cut, count
    if op == "biasgelu":
        b = T["X1"] = torch.randn(N, device="cuda").to(t)
        out("Y", M, N, s["ldy"], t, lambda: F.gelu(x.double() + b.double()))
        return T, outs, lambda: F.gelu(x + b), count
    if op == "swiglu":
        y = T["X1"] = random(M, N, s["ld1"], t)
        out("Y", M, N, s["ldy"], t, lambda: F.silu(x.double()) * y.double())
        return T, outs, lambda: F.silu(x) * y, count + M * N * size
    if op == "fused":
        y = T["X1"] = random(M, N, s["ld1"], t)
        g, b = (torch.randn(N, device="cuda").to(t) for _ in range(2))
        T["X2"], T["X3"] = g, b
        out("Y", M, N, s["ldy"], t, lambda: F.relu(x.double() * g.double() + b.double()) + y.double())
        return T, outs, lambda: F.relu(x * g + b) + y, count + M * N * size
    raise ValueError(op)


def launcher(v, code, T):
    module = ck(cu.cuModuleLoadData(code))
    fn = ck(cu.cuModuleGetFunction(module, v["entry"].encode()))
    if v["smem"] > 48 << 10:
        cu.cuFuncSetAttribute(fn, cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, v["smem"])
    values, types = [], []
    for a in v["arguments"]:
        if "pointer" in a:
            values.append(T[a["pointer"]].data_ptr())
            types.append(ctypes.c_void_p)
        else:
            values.append(v["sizes"][a["size"]])
            types.append(ctypes.c_int)
    args = (tuple(values), tuple(types))
    grid = v["items"]
    fit = ck(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(fn, v["threads"], v["smem"]))
    if v["persistent"]:
        grid = min(grid, fit * torch.cuda.get_device_properties(0).multi_processor_count)

    def go():
        c = cu.CUlaunchConfig()
        c.gridDimX, c.gridDimY, c.gridDimZ = grid * v["cluster"], 1, 1
        c.blockDimX, c.blockDimY, c.blockDimZ = v["threads"], 1, 1
        c.sharedMemBytes, c.hStream = v["smem"], cu.CUstream(torch.cuda.current_stream().cuda_stream)
        a = cu.CUlaunchAttribute()
        a.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        a.value.clusterDim.x, a.value.clusterDim.y, a.value.clusterDim.z = v["cluster"], 1, 1
        c.attrs, c.numAttrs = [a], 1
        ck0 = cu.cuLaunchKernelEx(c, fn, args, 0)
        if ck0[0].value != 0:
            raise RuntimeError(str(ck0[0]))
    return go, fit, module


def us(fn, n):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    for _ in range(n):
        fn()
    b.record()
    b.synchronize()
    return a.elapsed_time(b) / n * 1e3


def graphed(fn):
    """The function as a CUDA graph of 8 calls, so that the host's pace does not show."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            fn()
    return graph.replay


def main():
    variants = json.load(open(sys.argv[1]))
    torch.zeros(1, device="cuda")
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda v: cubin(v["text"]), variants))
    big = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
    to = torch.empty_like(big)
    copy_us = sorted(us(lambda: to.copy_(big), 20) for _ in range(9))[4]
    copy = 2 * big.numel() / copy_us / 1e6
    del big, to
    print(f"{torch.cuda.get_device_name()}, copy of 256 MiB: {copy:.2f} TB/s; {' '.join(DEFINES)}")
    table = []
    for v, code in zip(variants, codes):
        if isinstance(code, str):
            print("DOES NOT COMPILE", v["line"], code[:600])
            continue
        torch.manual_seed(len(table))
        T, outs, eager, count = problem(v)
        go, fit, keep = launcher(v, code, T)
        go()
        torch.cuda.synchronize()
        worst, notes = 0.0, ""
        for name, (buffer, view, ref) in outs.items():
            want = ref()
            error = ((view.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
            worst = max(worst, error if error == error else float("inf"))
            if not untouched(buffer, view):
                notes += f" {name}: WROTE OUTSIDE"
            del want
        limit = 1e-5 if "f32" in v["line"] and "bf16" not in v["line"] else 6e-3 if "bf16" in v["line"] else 1e-3
        if not worst < limit:
            notes += f" WRONG (limit {limit})"
        arms = {"tw": go, "eager": eager}
        if COMPILE and "time=0" not in v["line"]:
            arms["compile"] = torch.compile(eager, dynamic=False)
        med = {}
        if "time=0" not in v["line"]:
            replay = {}
            for name, fn in arms.items():
                try:
                    fn(), fn()
                    replay[name] = graphed(fn)
                except Exception as error:
                    notes += f" {name}: {str(error)[:80]}"
            n = max(1, int(2e3 / (8 * (count / 3e6 + 3))))
            times = {a: [] for a in replay}
            for rep in range(11):
                for a in list(replay)[::-1 if rep % 2 else 1]:
                    times[a].append(us(replay[a], n) / 8)
            med = {a: sorted(x)[len(x) // 2] for a, x in times.items()}
        table.append((v["line"], v["schedule"], count, med, worst, notes, fit))
        print(v["line"], "|", v["schedule"], f"| {fit} blocks, error {worst:.1e}{notes}", flush=True)
        del T, outs, arms, keep
        torch._dynamo.reset()
    print(f"\n{'kernel':58} {'us':>8} {'TB/s':>6} {'of copy':>7} {'eager':>6} {'compile':>7}  error")
    for line, _, count, med, worst, notes, _ in table:
        if "tw" not in med:
            print(f"{line:58} {'':>8} {'':>6} {'':>7} {'':>6} {'':>7}  {worst:.1e}{notes}")
            continue
        t = med["tw"]
        rate = count / t / 1e6
        ratio = lambda a: f"{med[a] / t:.2f}x" if a in med else "-"
        print(f"{line:58} {t:8.1f} {rate:6.2f} {rate / copy * 100:6.1f}% {ratio('eager'):>6} {ratio('compile'):>7}  {worst:.1e}{notes}")


main()
