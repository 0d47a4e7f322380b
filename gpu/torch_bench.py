#!/usr/bin/env python3
"""Models under `torch.compile` on a GPU: this backend beside eager PyTorch and Inductor, in one process, in turns.

    gpu/torch_bench.py --out FOLDER [--warm | --cold] [--work FOLDER] [--peers eager default reduce-overhead max-autotune] [CASE...]

A case is a model of transformers or torchvision with random weights in bf16, in inference (`bert`, `gpt2`, `vit`, `llama`,
`resnet50`), or forward and backward (`bert-train`, ...; `--step`: also with PyTorch's fused AdamW behind it, on all sides). A side is `eager`, `tilewright`, `tilewright-graphs` (its mode `reduce-overhead`), or a mode of Inductor. Measured is the time between two events around
--calls calls, in rounds that alternate; the median of the rounds counts, and ratios are taken within rounds. First calls are
timed apart: that is compilation. The host's time is that of putting calls into the stream. `--kernels N` lists the N kernels that
take most of a call (with `--step` of one with the optimizer), as PyTorch's profiler sees them; `--dropout` leaves models their dropout. Results are compared with eager float32 without TF32, relative to the norm. `--warm`
compiles everything and measures nothing (Inductor keeps what it compiled below TORCHINDUCTOR_CACHE_DIR).

A record is made in pieces, each in two steps: `--cold --work W CASE` compiles one case with caches of its own below W, empty at first, one process
for each of `tilewright` and `default` (their modes with recorded graphs behind them, not timed), side by side; without `--cold`, the case is measured, and its first calls are those of a second process,
which finds the caches full; `--with-cold` starts both steps at once, and each measuring process waits for a compiler's cold one before it takes that
compiler. Rows get both (`cold_s`, `first_s`; eager mode and a small function
under `aot_eager` have run before either, so that libraries and what traces are loaded), and a second call of the same
day and commit adds its rows to the record in place of those of the same cases. bench/readme.py writes the table of docs/src/pytorch.md from it.
"""

import argparse
import contextlib
import copy
import datetime
import fcntl
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch
import transformers

import tilewright  # noqa: F401
from tilewright.pytorch import backend
from tilewright.pytorch.group import Group

transformers.logging.set_verbosity_error()
LLAMA = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=4096,
)


def tokens(vocabulary, *shape):
    return torch.randint(0, vocabulary, shape, device="cuda")


def bert(layers):
    config = transformers.BertConfig(num_hidden_layers=layers or 12)
    return transformers.BertModel(config), (tokens(30522, 32, 128),), {}


def gpt2(layers):
    config = transformers.GPT2Config(n_layer=layers or 12)
    return transformers.GPT2LMHeadModel(config), (tokens(50257, 8, 512),), {"use_cache": False}


def llama(layers):
    config = transformers.LlamaConfig(**{**LLAMA, **({"num_hidden_layers": layers} if layers else {})})
    return transformers.LlamaForCausalLM(config), (tokens(128256, 1, 2048),), {"use_cache": False}


def vit(layers):
    import torchvision

    if layers:
        sizes = dict(image_size=224, patch_size=16, num_heads=12, hidden_dim=768, mlp_dim=3072)
        model = torchvision.models.VisionTransformer(num_layers=layers, **sizes)
    else:
        model = torchvision.models.vit_b_16()
    # Its own are zeros, with which nothing has a gradient.
    torch.nn.init.normal_(model.heads[0].weight, std=0.02)
    return model, (torch.randn(64, 3, 224, 224, device="cuda", dtype=torch.bfloat16),), {}


def resnet50(layers):
    import torchvision

    return torchvision.models.resnet50(), (torch.randn(32, 3, 224, 224, device="cuda", dtype=torch.bfloat16),), {}


# Whose first calls are timed with empty caches, and what the same process compiles behind that, so that its caches are full.
COLD = {"tilewright": "tilewright-graphs", "default": "reduce-overhead"}
CASES = {f.__name__: f for f in (bert, gpt2, vit, llama, resnet50)}


def first(result):
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


class Arm:
    """One side: a function to call, and how long its first call took."""

    def __init__(self, name, model, arguments, named, trains):
        self.name, self.model, self.arguments, self.named, self.trains = name, model, arguments, named, trains
        self.optimizer, self.groups = None, []
        self.recorded = name in ("tilewright-graphs", "reduce-overhead", "max-autotune")
        mode = {} if name == "default" else {"mode": name}
        if name == "eager":
            self.run = model
        elif name == "tilewright":
            self.run = torch.compile(model, backend=backend.tilewright_backend)
        elif name == "tilewright-graphs":
            self.run = torch.compile(model, backend=backend.tilewright_backend, mode="reduce-overhead")
        else:
            self.run = torch.compile(model, **mode)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.call()
        torch.cuda.synchronize()
        self.first_seconds = time.perf_counter() - start

    def call(self):
        if self.recorded:
            torch.compiler.cudagraph_mark_step_begin()
        if self.trains:
            self.model.zero_grad(set_to_none=True)
            result = self.run(*self.arguments, **self.named)
            # Language models have their loss inside.
            loss = result.loss if "labels" in self.named else first(result).float().square().mean()
            loss.backward()
            if self.optimizer is not None:
                self.optimizer.step()
            return loss.detach()
        with torch.no_grad():
            return first(self.run(*self.arguments, **self.named))

    def host_microseconds(self, calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        passed = time.perf_counter() - start
        torch.cuda.synchronize()
        return 1e6 * passed / calls

    def kernels(self, most):
        """The kernels of one call: name, how many, microseconds of all; and the sum over all kernels."""
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            self.call()
            torch.cuda.synchronize()
        rows = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                count, us = rows.get(event.name, (0, 0.0))
                rows[event.name] = (count + 1, us + event.device_time_total)
        listed = sorted(((n, c, us) for n, (c, us) in rows.items()), key=lambda r: -r[2])
        return listed[:most], sum(us for _, _, us in listed), sum(c for _, c, _ in listed)

    def microseconds(self, calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            self.call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / calls


def load_tracers():
    """Dynamo and AOTAutograd, which all compilers share, are loaded by a small function: else the first compiler of a process would pay for it."""
    x = torch.ones(4, device="cuda", requires_grad=True)
    torch.compile(lambda t: (t * 2).sum(), backend="aot_eager")(x).backward()


def layers_of(model):
    """How many layers a transformer has."""
    if hasattr(model, "config"):
        return model.config.num_hidden_layers
    return len(model.encoder.layers) if hasattr(model, "encoder") else None


def distance(found, exact):
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())


def measure(name, args):
    torch.manual_seed(0)
    trains = name.endswith("-train")
    model, arguments, named = CASES[name.removesuffix("-train")](args.layers)
    model = model.cuda().train(trains)
    for module in [] if args.dropout else model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
    wide = lambda t: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    with torch.no_grad():
        exact = first(model.float()(*map(wide, arguments), **named)).clone()
    model = model.bfloat16()
    if trains and "use_cache" in named:
        named["labels"] = arguments[0]
    load_tracers()
    rows, arms = [], []
    sides = [*args.ours, *args.peers]
    # Libraries are loaded by eager mode.
    for peer in sorted(sides, key=lambda side: side != "eager"):
        cold = args.work / f"cold-{name}-{peer}.json" if args.work else None
        deadline = time.monotonic() + 600
        while args.with_cold and peer in COLD and not cold.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        side = copy.deepcopy(model) if trains else model
        # Who observes gets graphs that are traced again; without, what was kept is used.
        seen = []
        backend.OBSERVERS[:] = [seen.append] if args.left else []
        arm = Arm(peer, side, arguments, named, trains)
        # With gradients where it trains: that is compiled already.
        with torch.set_grad_enabled(trains):
            error = float("nan") if args.dropout else distance(first(arm.run(*arguments, **named)).detach(), exact)
        left = sorted({str(n.target) for g in seen for n in g.reasons if "getitem" not in str(n.target)})
        known = {id(g) for a in arms for g in a.groups}
        arm.groups = [g for g in gc.get_objects() if type(g) is Group and g.program is not None or type(g) is Group and g.failure]
        arm.groups = [g for g in arm.groups if id(g) not in known] if peer.startswith("tilewright") else []
        failed = [g.failure.splitlines()[0] for g in arm.groups if g.failure]
        own = sum(g.compile_seconds for g in arm.groups)
        row = {"cold_s": json.loads(cold.read_text())} if cold and cold.exists() and not args.cold else {}
        rows.append(row | {
            "case": name, "side": peer, "shape": list(arguments[0].shape), "layers": layers_of(model), "first_s": arm.first_seconds, "groups": len(arm.groups), "plans_s": own, "error": error,
            "peak_bytes": torch.cuda.max_memory_allocated(), "left_to_pytorch": left, "failed_groups": failed,
        })
        arms.append(arm)
        if args.cold and peer in COLD:
            cold.write_text(json.dumps(arm.first_seconds))
        print(f"   {name} {peer}: first call {arm.first_seconds:.1f} s ({len(arm.groups)} groups, plans {own:.1f} s), error {error:.1e} {left} {failed}", flush=True)
    if args.warm or args.cold:
        return []
    while args.go and not os.path.exists(args.go):
        time.sleep(0.05)
    with alone(args.lock):
        timed(name, rows, arms, args, "us")
        if args.step:
            for arm in arms:
                arm.optimizer = torch.optim.AdamW(arm.model.parameters(), lr=1e-6, fused=True)
            timed(f"{name} and optimizer", rows, arms, args, "step_us")
        listed(name, rows, arms, args)
    return rows


@contextlib.contextmanager
def alone(lock):
    """While nobody else holds this file: for several processes that compile beside each other."""
    if lock is None:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def timed(name, rows, arms, args, key):
    """Times of all arms in turns, into their rows."""
    for arm in arms:
        for _ in range(3):
            arm.call()
    times = {arm.name: [] for arm in arms}
    for number in range(args.rounds):
        turn = arms if number % 2 == 0 else arms[::-1]
        for arm in turn:
            times[arm.name].append(arm.microseconds(args.calls))
    for row, arm in zip(rows, arms):
        mine = times[row["side"]]
        row[key] = statistics.median(mine)
        row[f"{key}_quartiles"] = quartiles(mine)
        row[f"host_{key}"] = arm.host_microseconds(args.calls)
        said = f"{name:<12} {row['side']:<18} {row[key]:>10.1f} us, host {row[f'host_{key}']:>8.1f} us"
        for side in args.ours:
            ratios = [t / m for t, m in zip(times[side], mine)]
            row[f"{key}_{side}_over_this"] = quartiles(ratios)
            said += f"   {side}/this {statistics.median(ratios):.3f}"
        print(said, flush=True)


def quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def alone_in_a_process(name, side, args):
    """Another process that compiles this case for this side, with the case's caches."""
    call = [sys.executable, __file__, "--out", str(args.out), "--work", str(args.work), "--cold", "--layers", str(args.layers)]
    sides = [side, *(s for s in (*args.ours, *args.peers) if s == COLD[side])]
    call += ["--ours", *sides, "--peers", "eager"] if side == "tilewright" else ["--ours", "--peers", "eager", *sides]
    return subprocess.Popen([*call, *["--dropout"] * args.dropout, "--", name], env=os.environ | caches(args.work, name) | {"TILEWRIGHT_BENCH_CASE": name})


def caches(work, name):
    """Folders of a case alone."""
    folder = work / f"cache-{name}"
    return {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton", "TILEWRIGHT_CACHE": f"{folder}/tilewright"}


def listed(name, rows, arms, args):
    """The kernels of a call, where they are asked for."""
    for row, arm in zip(rows, arms):
        if args.kernels:
            longest, total, count = arm.kernels(args.kernels)
            row["kernels"], row["kernel_us"] = longest, total
            print(f"   {name} {row['side']}: {count} kernels, {total:.0f} us", flush=True)
            for kernel, times_run, us in longest:
                print(f"      {us:>9.1f} us {times_run:>5} x  {kernel[:110]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--cold", action="store_true", help="compile with empty caches, one process for each compiler, and measure nothing else")
    parser.add_argument("--with-cold", action="store_true", help="both at once")
    parser.add_argument("--work", type=pathlib.Path, help="where caches and the times of first calls are kept")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--step", action="store_true", help="also with an optimizer behind each call")
    parser.add_argument("--left", action="store_true", help="list the operators that are left to PyTorch")
    parser.add_argument("--lock", help="a file that is held while it measures")
    parser.add_argument("--go", help="a file: nothing is measured before it is there, so that the device can be left alone meanwhile")
    parser.add_argument("--layers", type=int, default=0, help="of transformers, instead of the model's own number")
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--ours", nargs="*", default=["tilewright"])
    parser.add_argument("--peers", nargs="*", default=["eager", "default"])
    parser.add_argument("cases", nargs="*")
    args = parser.parse_args()
    names = args.cases or [*CASES, *(f"{case}-train" for case in CASES if case != "resnet50")]
    args.work = args.work and args.work.absolute()
    if args.work and os.environ.get("TILEWRIGHT_BENCH_CASE") not in names:
        sys.exit(each_with_its_caches(names, args))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start, rows = time.time(), []
    for name in names:
        try:
            rows += measure(name, args)
        except Exception as error:  # one case must not take the others' figures
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            rows.append({"case": name, "side": "tilewright", "problem": f"{type(error).__name__}: {error}"[:400]})
        torch.cuda.empty_cache()
    if args.warm or args.cold:
        return
    written(rows, names, time.time() - start, args)


def each_with_its_caches(names, args):
    """A process for each case, side by side, whose environment names the case's caches; with --cold, one for each compiler."""
    args.work.mkdir(parents=True, exist_ok=True)
    started = []
    if args.cold or args.with_cold:
        compilers = [side for side in COLD if side in (*args.ours, *args.peers)]
        for cold in (args.work / f"cold-{name}-{side}.json" for name in names for side in compilers):
            cold.unlink(missing_ok=True)
        started += [alone_in_a_process(name, side, args) for name in names for side in compilers]
    if not args.cold:
        given = [a for a in sys.argv[1:] if a not in names]
        lock = [] if args.lock else ["--lock", str(args.work / "lock")]
        started += [
            subprocess.Popen([sys.executable, __file__, *lock, *given, *([] if "--" in given else ["--"]), name],
                             env=os.environ | caches(args.work, name) | {"TILEWRIGHT_BENCH_CASE": name})
            for name in names
        ]
    return max(process.wait() for process in started)


def written(rows, names, seconds, args):
    """Adds rows to the record of the day and the commit."""
    commit = os.environ.get("TILEWRIGHT_COMMIT") or os.environ.get("COMMIT", "unknown")
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-torch-{date}-{commit[:12]}.json"
    with alone(args.out / f".{path.name}.lock"):
        earlier = json.loads(path.read_text()) if path.exists() else {"rows": [], "command": "", "seconds": 0.0}
        command = f"gpu/torch_bench.py --out records --layers {args.layers} --rounds {args.rounds} --calls {args.calls}"
        command += f" --ours {' '.join(args.ours)} --peers {' '.join(args.peers)} -- {' '.join(names)}"
        command = os.environ.get("TILEWRIGHT_COMMAND") or command
        record = {
            "kind": "gpu-torch", "date": date, "commit": commit,
            "command": f"{earlier['command']}; {command}".strip("; "),
            "machine": {"gpu": torch.cuda.get_device_name(), "driver": driver.stdout.split("\n")[0], "torch": torch.__version__,
                        "transformers": transformers.__version__},
            "protocol": __doc__.strip(), "seconds": earlier["seconds"] + seconds,
            "rows": [*(row for row in earlier["rows"] if row["case"] not in names), *rows],
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
