"""Runs the cases of gpu_cases.rs: CUDA through NVRTC (CuPy), Triton, and, with the name of a C++
compiler as second argument, the CUDA text compiled for the host instead (no GPU needed).

Prints one line per case that differs: how many elements, the largest error in units of the last
place of the type, and the first example. Exit code 0 whatever it finds: it is a report.
"""
import collections, math, os, sys, tempfile, importlib.util
import numpy as np

scope = {}
exec(open(sys.argv[1]).read(), scope)
cases, helpers = scope["CASES"], scope["HELPERS"]
FLOATS = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8, "f8e4m3": 4, "f8e5m2": 3}
C = {"f64": "double", "i64": "long long", "i32": "int", "i16": "short", "i8": "signed char", "i4": "signed char",
     "u64": "unsigned long long", "u32": "unsigned int", "u16": "unsigned short", "u8": "unsigned char",
     "u4": "unsigned char", "bool": "bool"}


def wide(t):
    return np.float64 if t in FLOATS else np.int64


def report(kind, case, got, totals):
    want = np.array(case["want"], dtype=wide(case["result"]))
    if case["result"] not in FLOATS:
        bad = np.flatnonzero(got != want)
        ulps = len(bad)
    else:
        same = (got == want) & (np.signbit(got) == np.signbit(want)) | (np.isnan(got) & np.isnan(want))
        bad = np.flatnonzero(~same)
        ulps = 0.0
        for i in bad:
            w, g = want[i], got[i]
            if not (math.isfinite(w) and math.isfinite(g)):
                ulps = math.inf
            else:
                e = math.frexp(w)[1] if w else -126
                ulps = max(ulps, abs(g - w) / 2.0 ** (max(e, -125) - FLOATS[case["result"]]))
    op = case["name"]
    totals["equal" if len(bad) == 0 else "differ"] += 1
    if len(bad):
        i = bad[0]
        args = [c[i] for c in case["inputs"]]
        print(f"{kind}: {op}: {len(bad)} of {len(want)} differ, at most {ulps:.3g} ulp; f{args} = {got[i]!r}, want {want[i]!r}")


def cuda():
    import cupy as cp
    totals = collections.Counter()
    text = [helpers]
    for k, case in enumerate(cases):
        text.append(case["cuda"].replace(" f(", f" f{k}(", 1))
        ins = ", ".join(f"const {'double' if t in FLOATS else 'long long'}* p{i}" for i, t in enumerate(case["types"]))
        args = ", ".join(f"({C.get(t, 'float')})p{i}[i]" for i, t in enumerate(case["types"]))
        out = "double" if case["result"] in FLOATS else "long long"
        text.append(f'extern "C" __global__ void k{k}({ins}, {out}* y, int n) {{ int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) y[i] = ({out})f{k}({args}); }}')
    module = cp.RawModule(code="\n".join(text), options=("-fmad=false", "-std=c++17"), backend="nvrtc")
    for k, case in enumerate(cases):
        ins = [cp.asarray(np.array(c, dtype=wide(t))) for c, t in zip(case["inputs"], case["types"])]
        n = len(case["want"])
        y = cp.zeros(n, dtype=wide(case["result"]))
        module.get_function(f"k{k}")((n // 128 + 1,), (128,), (*ins, y, np.int32(n)))
        report("cuda", case, y.get(), totals)
    print("cuda", dict(totals))


SHIM = """#include <cmath>
#include <cstring>
using std::isinf;
#define __device__
#define __forceinline__ inline
#define __global__
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static double __longlong_as_double(long long u) { double f; memcpy(&f, &u, 8); return f; }
static float __double2float_rz(double x) {
  float r = (float)x;
  return std::fabs((double)r) > std::fabs(x) ? nextafterf(r, 0.0f) : r;
}
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static double rsqrt(double x) { return 1.0 / sqrt(x); }
"""


def host():
    import ctypes, re, subprocess
    totals = collections.Counter()
    f16 = re.compile(r'  float r;\n  asm\(.*?\n  return r;', re.S)
    text = [SHIM, f16.sub("  return (float)(_Float16)x;", helpers)]
    for k, case in enumerate(cases):
        text.append(case["cuda"].replace(" f(", f" f{k}(", 1))
        ins = ", ".join(f"const {'double' if t in FLOATS else 'long long'}* p{i}" for i, t in enumerate(case["types"]))
        args = ", ".join(f"({C.get(t, 'float')})p{i}[i]" for i, t in enumerate(case["types"]))
        out = "double" if case["result"] in FLOATS else "long long"
        text.append(f'extern "C" void k{k}({ins}, {out}* y, int n) {{ for (int i = 0; i < n; i++) y[i] = ({out})f{k}({args}); }}')
    folder = tempfile.mkdtemp()
    open(folder + "/cases.cpp", "w").write("\n".join(text))
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fwrapv", "-mfma", "-shared", "-fPIC"]
    subprocess.run([sys.argv[2], *flags, folder + "/cases.cpp", "-o", folder + "/cases.so", "-lm"], check=True)
    library = ctypes.CDLL(folder + "/cases.so")
    pointer = lambda a: ctypes.c_void_p(a.ctypes.data)
    for k, case in enumerate(cases):
        ins = [np.array(c, dtype=wide(t)) for c, t in zip(case["inputs"], case["types"])]
        y = np.zeros(len(case["want"]), dtype=wide(case["result"]))
        getattr(library, f"k{k}")(*map(pointer, ins), pointer(y), len(y))
        report("host", case, y, totals)
    print("host", dict(totals))


def triton():
    import torch
    chosen = [c for c in cases if c["triton"] and {*c["types"], c["result"]} <= {"f64", "f32", "bf16", "i32", "i64", "bool", "u8"}]
    lines = ["import triton, triton.language as tl", "from triton.language.extra import libdevice", ""]
    T = {"f64": "tl.float64", "i64": "tl.int64", "i32": "tl.int32", "u8": "tl.uint8", "bool": "tl.int1"}
    for k, case in enumerate(chosen):
        lines += ["@triton.jit", case["triton"].replace("def f(", f"def f{k}(", 1)]
        names = [f"p{i}" for i in range(len(case["types"]))]
        cast = lambda n, t: f"(tl.load({n} + o, mask=o < n) != 0)" if t == "bool" else f"tl.load({n} + o, mask=o < n).to({T.get(t, 'tl.float32')})"
        lines += ["@triton.jit", f"def k{k}({', '.join(names)}, y, n, B: tl.constexpr):",
                  "    o = tl.program_id(0) * B + tl.arange(0, B)",
                  f"    v = f{k}({', '.join(cast(n, t) for n, t in zip(names, case['types']))})",
                  f"    tl.store(y + o, v.to({'tl.float64' if case['result'] in FLOATS else 'tl.int64'}), mask=o < n)", ""]
    path = os.path.join(tempfile.mkdtemp(), "kernels.py")
    open(path, "w").write("\n".join(lines))
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    totals = collections.Counter()
    for k, case in enumerate(chosen):
        ins = [torch.tensor(np.array(c, dtype=wide(t))).cuda() for c, t in zip(case["inputs"], case["types"])]
        n = len(case["want"])
        y = torch.zeros(n, dtype=torch.float64 if case["result"] in FLOATS else torch.int64).cuda()
        try:
            getattr(module, f"k{k}")[((n + 127) // 128,)](*ins, y, n, B=128)
        except Exception as e:
            totals["failed"] += 1
            print("triton:", case["name"], "FAILED:", str(e).strip().splitlines()[-1][:160])
            continue
        report("triton", case, y.cpu().numpy(), totals)
    print("triton", dict(totals), flush=True)


for run in (host,) if len(sys.argv) > 2 else (cuda, triton):
    try:
        run()
    except Exception as e:
        print(run.__name__, "FAILED", str(e)[:3000])
