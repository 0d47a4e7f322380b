#!/usr/bin/env python3
"""Whole models on a GPU: `tw --device cuda` beside PyTorch, the same weights and inputs, in turns; writes a record.

    gpu/models.py --tw bin/tw --out records [bert vit gpt2 minilm llama=graphs resnet50 mobilenetv3]

`model_zoo.py` has the models. One process per model makes it ready (exports it, lets `tw` and PyTorch compile), all side by
side; then they are timed one after another, alone. Measured is a run on the device between two events. In each round every
side runs --runs times, the first one of a round goes last in the next; a side's figure is the median of its rounds' medians,
the ratio is taken within rounds. `tw` replays graphs; PyTorch (under `inference_mode`) has the forms of --peers: `eager`,
`compile` (`torch.compile`), `graphs` (its mode `reduce-overhead`, which replays graphs, too), `autotune` (`max-autotune`, graphs
and tuned kernels, minutes to compile; what is compiled stays in --work). `MODEL=PEERS` has peers of its own, `MODEL@8x512` inputs of other
sizes, `MODEL:f32` another precision; all of them: `bert@8x512:f16=graphs`.

Outputs are compared with PyTorch in float32 without TF32: error relative to the largest magnitude. Memory: for `tw` the
sum of its blocks (weights, arena, workspace); for PyTorch the allocator's peak in eager mode, and per form what it allocated at
its peak and what it holds afterwards (graphs keep their pools, which the peak of a replay does not count). `first_s` is the time to the
first result with empty caches: for `tw` the whole process, for PyTorch the first call. `compile_ratio` is that of `tw` over that of
`max-autotune`, `memory_ratio` the blocks of `tw` over the least that a form of PyTorch takes (eager: its peak; graphs: weights and
what its reserve grew by).

`max-autotune` compiles for minutes. `--prepare --patience S` compiles what it can in that time, `--compiled` then measures the forms
that were ready. Prepared again, what was ended goes on from its caches; its time is marked (`first_s_at_least`), for it lacks what went before.

A second call of the same day and commit adds its rows to the record, in place of those of the same models.
"""

import argparse
import datetime
import gc
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MODES = {"compile": "default", "graphs": "reduce-overhead", "autotune": "max-autotune"}
PRECISIONS = ["f32", "tf32", "f16", "bf16"]
# What is measured when no models are named.
MODELS = ["bert", "minilm", "gpt2", "vit", "llama", "llama8b=eager", "resnet50", "mobilenetv3", "efficientnet", "resnext50",
          "bert@1x128=graphs", "vit@1=graphs", "resnet50@1=graphs", "mobilenetv3@1=graphs", "efficientnet@1=graphs",
          "resnet50:f32=graphs", "resnet50:tf32=graphs"]
# Records as they were before this call.
EARLIER = {}
CLOCKS = ["clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "clocks_event_reasons.active"]


def nvidia_smi(fields):
    done = subprocess.run(["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader", "--id=0"], capture_output=True, text=True)
    return dict(zip(fields, [f.strip() for f in done.stdout.split(",")])) if done.returncode == 0 else {}


def quartiles(values):
    values = sorted(values)
    if len(values) < 3:
        return [values[0], statistics.median(values), values[-1]]
    return statistics.quantiles(values, n=4, method="inclusive")


class FirstTimes:
    """Seconds to the first result of each side, kept beside the caches: only the first time they are empty.

    `begin` leaves a mark until `keep`: one that is found was left by an attempt that was ended, whose work is in the caches, and the
    time that is kept then is less than the whole (`cut`)."""

    def __init__(self, work, name, precision):
        self.path = work / f"first-{name}-{precision}.json"
        self.seconds = json.loads(self.path.read_text()) if self.path.exists() else {}

    def mark(self, side):
        return self.path.with_name(f"{self.path.stem}-{side}.begun")

    def begin(self, side):
        if side not in self.seconds:
            if self.mark(side).exists():
                self.seconds[f"{side} was cut"] = True
            self.mark(side).touch()

    def cut(self, side):
        return f"{side} was cut" in self.seconds

    def keep(self, side, seconds):
        if side not in self.seconds:
            self.seconds[side] = seconds
            self.path.write_text(json.dumps(self.seconds))
            self.mark(side).unlink(missing_ok=True)
        return self.seconds[side]


class Tw:
    """The command, for one model; `turn` measures with a process that stays."""

    def __init__(self, args, model, folder, inputs, precision):
        self.tail = [str(model), "--device", "cuda", "--precision", precision, "--json", "--cache", str(args.work / f"cache-{folder.name}")]
        for name in inputs:
            self.tail += ["--input", f"{name}={folder / (name + '.npy')}"]
        self.args, self.bench = args, None

    def call(self, command, *more):
        done = subprocess.run([self.args.tw, command, *self.tail, *more], capture_output=True, text=True)
        if done.stderr.strip():
            print("   tw says:", done.stderr.strip()[:2000], file=sys.stderr)
        if done.returncode != 0:
            raise RuntimeError(f"tw {command} ended with {done.returncode}: {done.stdout[:800]}")
        return json.loads(done.stdout)

    def turn(self):
        if self.bench is None:
            call = [self.args.tw, "bench", *self.tail, "--turns", "--runs", str(self.args.runs), "--warmup", "3"]
            self.bench = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.answer()
        print(file=self.bench.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.bench.stdout.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"tw bench said {line!r}")
        return json.loads(line)


def worker(args, name):
    """Makes one model ready, says so, and measures a round for every line of the standard input."""
    import numpy as np
    import torch

    import model_zoo

    say = lambda value: print(json.dumps(value), flush=True)
    precision = args.precision
    folder = args.work / name.replace(":", "-")
    name = name.partition(":")[0]
    row = {"model": name, "type": precision, "shape": model_zoo.case_of(name)["shape"]}
    first = FirstTimes(args.work, name, precision)
    model, inputs = model_zoo.make(name)
    path = folder / "model.onnx" if isinstance(model, model_zoo.Net) else folder
    if not (folder / "ready").exists():
        path = model_zoo.export(name, model, folder)
        for key, t in inputs.items():
            np.save(folder / f"{key}.npy", t.numpy())
        (folder / "ready").touch()
    tw = Tw(args, path, folder, inputs, precision)
    given = model_zoo.given(name, inputs)
    allow = lambda tf32: (setattr(torch.backends.cuda.matmul, "allow_tf32", tf32), setattr(torch.backends.cudnn, "allow_tf32", tf32))

    def error(got):
        got = got.astype(np.float64)
        return float(np.abs(got - want).max() / np.abs(want).max())

    def events(step):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    with torch.inference_mode():
        allow(False)
        want = model(*given).double().cpu().numpy()
        allow(precision == "tf32")
        model = model.to({"f16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32))
        if isinstance(model, model_zoo.Net):
            model = model.to(memory_format=torch.channels_last)
        row["torch_weight_bytes"] = sum(p.nbytes for p in model.parameters())

        began = time.monotonic()
        ran = tw.call("run", "--output", str(folder / f"out-{precision}"))
        first_s = first.keep("tw", time.monotonic() - began)
        out = np.load(folder / f"out-{precision}" / ("output.npy" if isinstance(model, model_zoo.Net) else "last_hidden_state.npy"))
        row["tw"] = {"error": error(out), "first_s": first_s, "host_steps": ran["host_steps"], "round_ms": []}

        peers = {}
        forms = [p for p in args.peers.split(",") if p != "eager" and not (args.compiled and p not in first.seconds)]
        # Something is beside `tw` in any case.
        timed = [p for p in args.peers.split(",") if p in ["eager", *forms]] or ["eager"]
        for peer in ["eager", *forms]:
            # Each mode compiles anew, of an instance of its own.
            run = model if peer == "eager" else torch.compile(model, mode=MODES[peer], dynamic=False)
            gc.collect()
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved()
            first.begin(peer)
            began = time.monotonic()
            run(*given)
            torch.cuda.synchronize()
            first_s = first.keep(peer, time.monotonic() - began)
            for _ in range(3):
                got = run(*given).float().cpu().numpy()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run(*given)
            row[peer] = {
                "error": error(got), "first_s": first_s, "round_ms": [], "peak_bytes": torch.cuda.max_memory_allocated(),
                "grown_bytes": torch.cuda.memory_reserved() - held,
            }
            if first.cut(peer):
                row[peer]["first_s_at_least"] = True
            if peer in timed:
                peers[peer] = run
        sides = {p: (lambda run=run: statistics.median(events(lambda: run(*given)) for _ in range(args.runs))) for p, run in peers.items()}
        if not args.prepare:
            tw.turn()
            sides["tw"] = lambda: tw.turn()
        say({"ready": name})
        for number, _ in enumerate(sys.stdin):
            names = list(sides)
            shift = number % len(names)
            for side in names[shift:] + names[:shift]:
                if side == "tw":
                    bench = sides[side]()
                    row["tw"]["round_ms"].append(bench["median_ms"])
                    row["tw"] |= {k: bench[k] for k in ("memory_bytes", "weight_bytes", "arena_bytes", "workspace_bytes", "launches", "graphs")}
                else:
                    for _ in range(3):
                        peers[side](*given)
                    row[side]["round_ms"].append(sides[side]())
            say(row)
    if tw.bench:
        tw.bench.stdin.close()
        tw.bench.wait()


def peers_of(row):
    return [p for p in ["eager", *MODES] if p in row and row[p]["round_ms"]]


def finish(row):
    """Figures from the rounds."""
    peers = peers_of(row)
    for side in ["tw", *peers]:
        if row[side]["round_ms"]:
            row[side]["ms"] = quartiles(row[side]["round_ms"])
    fastest = min(peers, key=lambda p: row[p]["ms"][1])
    row["fastest_peer"] = fastest
    row["latency_ratio"] = quartiles([a / b for a, b in zip(row["tw"]["round_ms"], row[fastest]["round_ms"])])
    if "autotune" in row:
        row["compile_ratio"] = row["tw"]["first_s"] / row["autotune"]["first_s"]
    # A form that grows by nothing found room that an earlier one had left.
    held = [row["torch_weight_bytes"] + row[p]["grown_bytes"] for p in peers if p != "eager" and row[p]["grown_bytes"] > 0]
    row["memory_ratio"] = row["tw"]["memory_bytes"] / min([row["eager"]["peak_bytes"], *held])


def summary(row):
    tw = row["tw"]
    line = (f"{row['model']} {row['type']}: tw {tw['ms'][1]:.3f} ms (error {tw['error']:.1e}, {tw['memory_bytes'] / 1e6:.0f} MB of which"
            f" {tw['weight_bytes'] / 1e6:.0f} weights, first {tw['first_s']:.1f} s, {len(tw['host_steps'])} host steps)")
    for peer in peers_of(row):
        p = row[peer]
        line += (f"; {peer} {p['ms'][1]:.3f} ms ({p['ms'][1] / tw['ms'][1]:.2f}x, error {p['error']:.1e}, peak {p['peak_bytes'] / 1e6:.0f} MB,"
                 f" grown {p['grown_bytes'] / 1e6:.0f} MB, first {p['first_s']:.1f} s)")
    line += f"; eager peak {row['eager']['peak_bytes'] / 1e6:.0f} MB; memory {row['memory_ratio']:.2f} of PyTorch's"
    return line + (f"; compiled in {row['compile_ratio']:.2f} of max-autotune's time" if "compile_ratio" in row else "")


def record(args, rows, before, after):
    import torch

    properties = torch.cuda.get_device_properties(0)
    date = datetime.datetime.now(datetime.timezone.utc)
    commit_file = pathlib.Path(__file__).resolve().parent.parent / "COMMIT"
    commit = os.environ.get("TILEWRIGHT_COMMIT") or (commit_file.read_text().strip() if commit_file.exists() else "unknown")
    return date, commit, {
        "kind": "gpu-models",
        "date": date.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "command": os.environ.get("TILEWRIGHT_COMMAND") or " ".join(["gpu/models.py", *sys.argv[1:]]),
        "machine": {
            "gpu": properties.name, "sms": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "driver": nvidia_smi(["driver_version"]).get("driver_version"), "torch": torch.__version__, "torch_cuda": torch.version.cuda,
        },
        "clocks_before": before,
        "protocol": {
            "timing": "between two events around one run; medians within a round, quartiles over rounds; rounds alternate between the sides",
            "runs": args.runs, "rounds": args.rounds, "weights": "random, the same on both sides",
            "memory": "tw: its blocks; PyTorch: the allocator's peak, and what its reserve grew by",
            "first_s": f"to the first result with empty caches, {len(rows)} models side by side",
        },
        "clocks_after": after,
        "rows": rows,
    }


def save(args, rows, before):
    """Writes what is measured so far: rows of another call of the same day and commit stay, but for those measured again."""
    date, commit, value = record(args, rows, before, nvidia_smi(CLOCKS))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-models-{date:%Y-%m-%d}-{commit}.json"
    if path not in EARLIER:
        EARLIER[path] = json.loads(path.read_text()) if path.exists() else None
    if earlier := EARLIER[path]:
        new = {(r["model"], r["type"]): r for r in rows}
        value["rows"] = [new.pop((r["model"], r["type"]), r) for r in earlier["rows"]] + list(new.values())
        value["command"] = f"{earlier['command']}; {value['command']}"
        value["clocks_before"] = earlier["clocks_before"]
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path


def listen(lines, said):
    """Puts a worker's JSON lines into a queue, and None at their end; PyTorch's tuner prints others."""
    for line in lines:
        if line.startswith("{"):
            said.put(json.loads(line))
    said.put(None)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*")
    p.add_argument("--tw", default="tw")
    p.add_argument("--work", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "tw-models")
    p.add_argument("--precision", default="bf16", choices=PRECISIONS)
    p.add_argument("--runs", type=int, default=20)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--peers", default="graphs,autotune")
    p.add_argument("--out", type=pathlib.Path, help="folder for the record")
    p.add_argument("--patience", type=float, help="seconds after which models that are not ready are left out")
    p.add_argument("--prepare", action="store_true", help="only compile, into the caches")
    p.add_argument("--compiled", action="store_true", help="only forms of PyTorch that were compiled before")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.worker:
        return worker(args, args.worker)
    import model_zoo

    named = dict((m.split("=") + [args.peers])[:2] for m in args.models or MODELS)
    names = list(named)
    types = {n: n.partition(":")[2] or args.precision for n in names}
    unknown = [n for n in names if n.partition(":")[0].partition("@")[0] not in model_zoo.CASES or types[n] not in PRECISIONS]
    if unknown:
        p.error(f"no model {', '.join(unknown)}: there are {', '.join(model_zoo.CASES)}, in {', '.join(PRECISIONS)}")
    before = nvidia_smi(CLOCKS)
    workers, said = {}, {}
    for name in names:
        # One cache of compiled kernels per model, so that each is made ready at the same time as the others.
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(args.work / f"inductor-{name}")}
        call = [sys.executable, __file__, "--worker", name, "--tw", args.tw, "--work", str(args.work), "--precision", types[name],
                "--runs", str(args.runs), "--peers", named[name]] + ["--prepare"] * args.prepare + ["--compiled"] * args.compiled
        workers[name] = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        said[name] = queue.Queue()
        threading.Thread(target=listen, args=(workers[name].stdout, said[name]), daemon=True).start()

    def answer(name, until=None):
        """The worker's next line of JSON. None when it ended, or `until` is past."""
        try:
            return said[name].get(timeout=None if until is None else max(0, until - time.monotonic()))
        except queue.Empty:
            return None

    rows, failed, path = [], 0, None
    until = time.monotonic() + args.patience if args.patience else None
    live = [name for name in names if answer(name, until)]
    for name in set(names) - set(live):
        print(f"{name}: not ready", flush=True)
        workers[name].kill()
    began = time.monotonic()
    for name in live if not args.prepare else []:
        row = None
        for _ in range(args.rounds):
            print(file=workers[name].stdin, flush=True)
            row = answer(name) or row
        if row and row["tw"]["round_ms"]:
            finish(row)
            print(summary(row), flush=True)
            rows.append(row)
            path = args.out and save(args, rows, before)
    for name, process in workers.items():
        process.stdin.close()
        if process.wait() != 0:
            failed += 1
            print(f"{name}: failed with {process.returncode}", flush=True)
    print(f"{len(live)} of {len(names)} models ready, timed in {time.monotonic() - began:.0f} s", flush=True)
    if path:
        print(path)
    return 1 if failed or (not args.prepare and len(rows) < len(names)) else 0


if __name__ == "__main__":
    sys.exit(main())
