"""Compare Tilewright with ONNX Runtime, and with PyTorch, on the CPU, model by model, and write a record under `records/`.

All run in this process, on the same threads' worth of cores, on the same inputs. The arms alternate
(A B, B A, A B, ...), so that drift of the machine meets all alike. The figure of an arm is the median of
its samples; the ratio is the median of the ratios of neighbouring samples, with its quartiles. Outputs are
compared before anything is timed, and a model whose outputs disagree has no speed.

With `--torch` there is a third arm: `torch.compile` of the module that the file was exported from, with its weights
as constants (`freezing`), or `torch.mm` for a plain product, or the function of PyTorch for a kernel over rows. Those have
a fourth arm: a copy of their input. With `--backend` models have another one: `torch.compile` of the module with `backend="tilewright"`.

Usage:  python bench/cpu_peers.py [--threads 2] [--seconds 8] [--torch] [--backend] [--models DIR] [--out FILE] [NAME ...]
Models come from `bench/export_models.py`. Without the `tilewright` module (`make bench` builds it) only
ONNX Runtime is measured, and no ratio is written.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from export_models import DEFAULT, MODELS, NETWORKS, PRODUCTS, ROWS, SEED, model_inputs, network  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIN_SAMPLES = 15
MAX_SAMPLES = 400
WARM_UP_SECONDS = 1.0
# Agreement of the two engines' float32 outputs: |a - b| <= TOLERANCE * (largest |b| of the output).
# The exact check, against float64, is `tw verify`; this one only refuses to time wrong results.
TOLERANCE = 1e-3

ONNX_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class Peer:
    """ONNX Runtime with every graph optimisation, one operator at a time, `threads` threads inside it."""

    name = "onnxruntime"

    def __init__(self, path: pathlib.Path, threads: int):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # Its workers would spin on the cores while the other arm is being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [(i.name, ONNX_TYPES[i.type], i.shape) for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def run(self, feeds):
        return dict(zip(self.outputs, self.session.run(None, feeds)))


class Torch:
    """PyTorch: `torch.compile` of the module behind the file, or `torch.mm`."""

    name = "torch"

    def __init__(self, name: str, outputs, threads: int, backend="inductor"):
        import torch

        self.torch, self.outputs = torch, outputs
        torch.set_num_threads(threads)
        if name in PRODUCTS:
            self.names, self.call = ["A", "B"], torch.mm
            return
        if name in ROWS:
            self.names, self.call = ["X"], ROWS[name](torch)
            return
        import torch._inductor.config

        torch._inductor.config.freezing = True
        net = network(name)
        self.names, self.call = net.input_names, torch.compile(net.module.eval(), backend=backend)

    def run(self, feeds):
        with self.torch.no_grad():
            result = self.call(*(self.torch.from_numpy(feeds[name]) for name in self.names))
        return {self.outputs[0]: result.numpy()}


class Backend(Torch):
    """The same module under `torch.compile` with this project's backend, which takes as many threads as PyTorch has."""

    name = "backend"

    def __init__(self, name: str, outputs, threads: int):
        # By its function: the name is known once a wheel is installed.
        from tilewright.pytorch.backend import tilewright_backend

        super().__init__(name, outputs, threads, tilewright_backend)


class Copy:
    """A copy of the input into memory that is there already: what a kernel that reads and writes once can reach."""

    name = "copy"

    def __init__(self, threads: int):
        import torch

        self.torch, self.to = torch, None
        torch.set_num_threads(threads)

    def run(self, feeds):
        source = self.torch.from_numpy(feeds["X"])
        if self.to is None:
            self.to = self.torch.empty_like(source)
        self.to.copy_(source)


class Ours:
    """The `tilewright` Python module: one compiled plan, the same number of threads."""

    name = "tilewright"

    def __init__(self, module, path: pathlib.Path, threads: int):
        self.model = module.load(str(path), threads=threads)

    def run(self, feeds):
        return self.model.run(feeds)


class Tool:
    """`tw` in the module's place: a sample is the median of a few runs of `tw bench`, in a process of its own."""

    name = "tilewright"

    def __init__(self, tool: pathlib.Path, path: pathlib.Path, threads: int, outputs):
        self.tool, self.path, self.outputs = tool, path, outputs
        self.tail = ["--threads", str(threads)]

    def run(self, feeds):
        with tempfile.TemporaryDirectory() as folder:
            call = [self.tool, "run", self.path, *self.tail, "--output", folder]
            for name, value in feeds.items():
                np.save(f"{folder}/in_{name}.npy", value)
                call += ["--input", f"{name}={folder}/in_{name}.npy"]
            subprocess.run(call, check=True, capture_output=True)
            return {name: np.load(f"{folder}/{name}.npy") for name in self.outputs}

    def sample_ms(self):
        call = [self.tool, "bench", self.path, *self.tail, "--runs", "5", "--warmup", "2", "--json"]
        done = subprocess.run(call, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)["median_ms"]


def disagreement(ours: dict, theirs: dict) -> float:
    """The largest difference of any output, relative to that output's largest magnitude."""
    worst = 0.0
    for name, expected in theirs.items():
        actual = np.asarray(ours[name])
        if actual.shape != expected.shape:
            return float("inf")
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        if not np.isfinite(difference).all():
            return float("inf")
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-30)
        worst = max(worst, float(difference.max(initial=0.0)) / scale)
    return worst


def timed_ms(arm, feeds) -> float:
    if isinstance(arm, Tool):
        return arm.sample_ms()
    start = time.perf_counter()
    arm.run(feeds)
    return (time.perf_counter() - start) * 1e3


def warm_up(arm, feeds) -> None:
    if isinstance(arm, Tool):
        return
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        arm.run(feeds)


def interleaved(arms, feeds, seconds: float) -> list[list[float]]:
    """Samples of each arm in milliseconds; sample `i` of all arms were taken next to each other."""
    samples: list[list[float]] = [[] for _ in arms]
    order = list(range(len(arms)))
    end = time.monotonic() + seconds
    while len(samples[0]) < MIN_SAMPLES or (
        time.monotonic() < end and len(samples[0]) < MAX_SAMPLES
    ):
        for index in order:
            samples[index].append(timed_ms(arms[index], feeds))
        order.reverse()
    return samples


def quartiles(values) -> list[float]:
    """First quartile, median, third quartile, rounded to what a reader can use."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{v:.4g}") for v in (first, median, third)]


def measure(name: str, path: pathlib.Path, module, threads: int, seconds: float, with_torch: bool, with_backend: bool) -> dict:
    start = time.perf_counter()
    peer = Peer(path, threads)
    feeds = model_inputs(peer.inputs)
    expected = peer.run(feeds)
    row: dict = {"model": name, "onnxruntime_first_result_ms": round((time.perf_counter() - start) * 1e3, 1)}
    arms = [peer]
    if module is not None:
        start = time.perf_counter()
        try:
            if isinstance(module, pathlib.Path):
                ours = Tool(module, path, threads, peer.outputs)
            else:
                ours = Ours(module, path, threads)
            actual = ours.run(feeds)
        except Exception as error:  # The module's errors are the finding: keep them in the record.
            row["error"] = str(error).strip()[:2000]
        else:
            row["tilewright_first_result_ms"] = round((time.perf_counter() - start) * 1e3, 1)
            row["relative_difference"] = float(f"{disagreement(actual, expected):.3g}")
            if row["relative_difference"] <= TOLERANCE:
                arms.append(ours)
            else:
                row["error"] = f"outputs differ by {row['relative_difference']} of the largest value"
    compiled = name.partition("_batch")[0] in NETWORKS
    kinds = [Torch] if with_torch and (name in PRODUCTS or name in ROWS or compiled) else []
    kinds += [Backend] if with_backend and compiled else []
    for kind in kinds:
        other = kind(name, peer.outputs, threads)
        difference = disagreement(other.run(feeds), expected)
        if difference <= TOLERANCE:
            arms.append(other)
        else:
            row[f"{kind.name}_error"] = f"outputs differ by {difference} of the largest value"
    if with_torch and name in ROWS:
        arms.append(Copy(threads))
    for arm in arms:
        warm_up(arm, feeds)
    samples = interleaved(arms, feeds, seconds)
    row["n_samples"] = len(samples[0])
    for arm, values in zip(arms, samples):
        row[f"{arm.name}_ms"] = quartiles(values)
    by_name = {arm.name: values for arm, values in zip(arms, samples)}
    pairs = (("latency_ratio", "onnxruntime"), ("torch_latency_ratio", "torch"), ("copy_latency_ratio", "copy"))
    for key, other in pairs:
        if "tilewright" in by_name and other in by_name:
            row[key] = quartiles([b / a for a, b in zip(by_name[other], by_name["tilewright"])])
    if "backend" in by_name and "torch" in by_name:
        row["backend_torch_ratio"] = quartiles([b / a for a, b in zip(by_name["torch"], by_name["backend"])])
    return row


def machine() -> dict:
    """What a reader must know to judge the figures."""
    cpu, flags = platform.processor(), set()
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass
    notable = ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"]
    return {
        "cpu": cpu,
        "logical_cpus": os.cpu_count(),
        "features": [flag for flag in notable if flag in flags],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of what is measured: `TILEWRIGHT_COMMIT` where it was built elsewhere."""
    if said := os.environ.get("TILEWRIGHT_COMMIT"):
        return said
    try:
        arguments = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_text(arguments) -> str:
    """The command as another machine would run it: from the repository's root, no path outside it."""
    words = ["python bench/cpu_peers.py", f"--threads {arguments.threads}", f"--seconds {arguments.seconds:g}"]
    models = arguments.models.resolve()
    if models != ROOT / "bench" / "models":
        inside = models.is_relative_to(ROOT)
        words.append(f"--models {models.relative_to(ROOT).as_posix() if inside else 'DIR'}")
    words += ["--torch"] if arguments.torch else []
    words += ["--backend"] if arguments.backend else []
    words += ["--tw target/release/tw"] if arguments.tw else []
    return " ".join(words + arguments.names)


def text_row(row: dict) -> str:
    def cell(key):
        return f"{row[key][1]:9.3f}" if key in row else "        -"

    ratio = "" if "latency_ratio" not in row else "  ratio {1:.3f} ({0:.3f} .. {2:.3f})".format(*row["latency_ratio"])
    if "torch_latency_ratio" in row:
        ratio += f"  torch {cell('torch_ms')} ms  ratio {row['torch_latency_ratio'][1]:.3f}"
    if "backend_ms" in row:
        ratio += f"  backend {cell('backend_ms')} ms"
    if "backend_torch_ratio" in row:
        ratio += f"  of torch {row['backend_torch_ratio'][1]:.3f}"
    if "copy_latency_ratio" in row:
        ratio += f"  copy {cell('copy_ms')} ms  ratio {row['copy_latency_ratio'][1]:.3f}"
    error = f"  {row['error'].splitlines()[0]}" if row.get("error") else ""
    return f"{row['model']:14s} onnxruntime {cell('onnxruntime_ms')} ms  tilewright {cell('tilewright_ms')} ms{ratio}{error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which models (default: {', '.join(DEFAULT)})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="sampling time per model")
    parser.add_argument("--models", type=pathlib.Path, default=ROOT / "bench" / "models")
    parser.add_argument("--out", type=pathlib.Path, help="the record (default: records/cpu-peers-DATE-COMMIT.json)")
    parser.add_argument("--torch", action="store_true", help="measure torch.compile, too")
    parser.add_argument("--backend", action="store_true", help="measure torch.compile with the backend tilewright, too")
    parser.add_argument("--tw", type=pathlib.Path, help="measure this `tw` instead of the Python module")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(MODELS)}")

    try:
        module = arguments.tw or importlib.import_module("tilewright")
        if arguments.tw is None and not hasattr(module, "load"):
            raise ImportError("the imported `tilewright` has no `load`")
    except ImportError as error:
        module = None
        print(f"tilewright is not measured: {error}", file=sys.stderr)

    rows = []
    for name in arguments.names or DEFAULT:
        path = arguments.models / f"{name}.onnx"
        if not path.exists():
            print(f"{name}: {path} is missing (python bench/export_models.py {name})", file=sys.stderr)
            continue
        rows.append(measure(name, path, module, arguments.threads, arguments.seconds, arguments.torch, arguments.backend))
        print(text_row(rows[-1]), flush=True)
    if not rows:
        return 1

    # The README shows models: kernels over rows alone have a record of their own.
    kind = "cpu-rows" if all(row["model"] in ROWS for row in rows) else "cpu-peers"
    record = {
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "command": command_text(arguments),
        "machine": machine(),
        "threads": arguments.threads,
        "seed": SEED,
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            **({"torch": sys.modules["torch"].__version__} if arguments.torch or arguments.backend else {}),
            "numpy": np.__version__,
            "tilewright": getattr(module, "__version__", None) if module else None,
        },
        "columns": "*_ms, latency_ratio (tilewright / onnxruntime), torch_latency_ratio and copy_latency_ratio, and backend_torch_ratio (torch.compile with our backend / with Inductor) are [first quartile, median, third quartile]",
        "rows": rows,
    }
    if not arguments.no_record:
        name = f"{kind}-{record['date'][:10]}-{record['commit']}.json"
        out = arguments.out or ROOT / "records" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.rename(out)
        print(f"record: {os.path.relpath(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
