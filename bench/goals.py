#!/usr/bin/env python3
"""What is aimed at, and what the newest records say about it: writes docs/src/goals.md.

    python3 bench/goals.py [--check]

A goal reads the newest record of its kind, names the cases that miss it, and says where their time goes. `--check` only compares.
"""

import json
import pathlib
import statistics
import sys
from typing import Callable, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "src" / "goals.md"
LARGE = 64 * 10**6
SMALL = 10**6


class Case(NamedTuple):
    """One measured figure of a goal."""

    name: str
    value: float
    met: bool


class Goal(NamedTuple):
    """A figure to reach, the record that has it, and why some cases miss it."""

    area: str
    text: str
    kind: str
    cases: Callable[[dict], list[Case]]
    why: str = ""
    form: Callable[[float], str] = lambda value: f"{value:.3f}" if 0.99 <= value < 1 else f"{value:.2f}"


def newest(kind: str) -> pathlib.Path | None:
    """The record of this kind with the latest date."""
    found = [p for p in (ROOT / "records").glob(f"{kind}-2*.json")]
    return max(found, key=lambda p: (json.loads(p.read_text())["date"], p.name), default=None)


def percent(value: float) -> str:
    return f"{value:.1%}"


def rows_case(row: dict) -> str:
    return f"{row['operation']} {row['type']} {row['rows']} x {row['columns']}"


def of_copy(operations: Callable[[str], bool], goal: float) -> Callable[[dict], list[Case]]:
    """Large cases of some operations, against a part of the copy bandwidth of the same run."""

    def cases(record: dict) -> list[Case]:
        rows = [r for r in record["rows"] if r["bytes"] >= LARGE and operations(r["operation"]) and r["operation"] != "copy"]
        return [Case(rows_case(r), r["of_copy"], r["of_copy"] >= goal) for r in rows]

    return cases


def peer_of_copy(names: tuple[str, ...], goal: float) -> Callable[[dict], list[Case]]:
    """As `of_copy`, of the record beside Inductor."""

    def cases(record: dict) -> list[Case]:
        rows = [r for r in record["rows"] if r["bytes"] >= LARGE and r["line"].split()[0] in names]
        return [Case(r["line"], r["of_copy"], r["of_copy"] >= goal) for r in rows]

    return cases


def beside_inductor(wanted: Callable[[dict], bool], goal: float) -> Callable[[dict], list[Case]]:
    """Inductor's time over ours."""

    def cases(record: dict) -> list[Case]:
        rows = [r for r in record["rows"] if "inductor_over_tw" in r and wanted(r)]
        return [Case(r["line"], r["inductor_over_tw"], r["inductor_over_tw"] >= goal) for r in rows]

    return cases


def model_name(row: dict) -> str:
    return f"{row['model'].partition('@')[0]} {row['type']} {' x '.join(map(str, row['shape']))}"


def beside_torch(record: dict) -> list[Case]:
    """PyTorch's fastest form over ours."""
    rows = [(r, 1 / r["latency_ratio"][1]) for r in record["rows"]]
    return [Case(f"{model_name(r)} ({r['fastest_peer']})", v, v >= 1) for r, v in rows]


def beside_autotune(record: dict) -> list[Case]:
    rows = [r for r in record["rows"] if r.get("autotune", {}).get("ms")]
    values = [(r, r["autotune"]["ms"][1] / r["tw"]["ms"][1]) for r in rows]
    return [Case(model_name(r), v, v >= 1) for r, v in values]


def compile_time(record: dict) -> list[Case]:
    rows = [r for r in record["rows"] if "autotune" in r]
    values = [(r, r["tw"]["first_s"] / r["autotune"]["first_s"]) for r in rows]
    return [Case(model_name(r), v, v <= 1 / 3) for r, v in values]


def memory(record: dict) -> list[Case]:
    return [Case(model_name(r), r["memory_ratio"], r["memory_ratio"] <= 1) for r in record["rows"] if "memory_ratio" in r]


def decode_floor(record: dict) -> list[Case]:
    """The time of reading the weights and the cache once, over the time of a step with one sequence."""
    cases = []
    for name, row in record["models"].items():
        if " x " in name:
            continue
        value = row["tilewright"]["floor_us"] / row["tilewright"]["step_us"]
        cases.append(Case(name, value, value >= 0.75))
    return cases


def beside_onnxruntime(names: Callable[[str], bool], goal: float) -> Callable[[dict], list[Case]]:
    """ONNX Runtime's time over ours."""

    def cases(record: dict) -> list[Case]:
        rows = [(r["model"], 1 / r["latency_ratio"][1]) for r in record["rows"] if names(r["model"]) and "latency_ratio" in r]
        return [Case(name, value, value >= goal) for name, value in rows]

    return cases


def beside_copy(record: dict) -> list[Case]:
    rows = [(r["model"], 1 / r["copy_latency_ratio"][1]) for r in record["rows"] if "copy_latency_ratio" in r]
    return [Case(name, value, value >= 0.9) for name, value in rows]


def beside_compiled(ours: str, peer: str) -> Callable[[dict], list[Case]]:
    """A mode of Inductor over one of ours, for each case of `gpu/torch_bench.py`."""

    def cases(record: dict) -> list[Case]:
        key = f"us_{ours}_over_this"
        rows = [(r["case"], 1 / r[key][1]) for r in record["rows"] if r.get("side") == peer and key in r]
        return [Case(name, value, value >= 1) for name, value in rows]

    return cases


NET = ("resnet", "mobilenet", "efficientnet")
TEXT = ("bert", "gpt2", "vit", "minilm")
GOALS = [
    Goal("Rows on an H200", "softmax, norms and maps of 64 MB and more: 93% of the copy bandwidth of the same run", "gpu-rows",
         of_copy(lambda o: not o.startswith(("transpose", "sum")), 0.93),
         "Above 65536 elements the blocks of a cluster fetch their share of a row and only then begin; lines of 1023 elements start unaligned and are read one by one.", percent),
    Goal("Rows on an H200", "transposes: 85%", "gpu-rows", of_copy(lambda o: o.startswith("transpose"), 0.85),
         "Lines that start unaligned are read and written in words of 4 bytes.", percent),
    Goal("Rows on an H200", "sums: 95% of what a copy moves", "gpu-rows", of_copy(lambda o: o.startswith("sum"), 0.95),
         "Of 20.7 us the second kernel, which adds up the parts, takes 2.2, and starting and ending the first 3.5.", percent),
    Goal("Rows on an H200", "gradients of norms: 90%", "gpu-rows-peer", peer_of_copy(("rmsnormbwd", "layernormbwd"), 0.9),
         "A block's turn rather than memory: a variant without stores, or with one of two loads, was 15% faster only. The sums of the parts are 4%.", percent),
    Goal("Rows on an H200", "AdamW: 93%", "gpu-rows-peer", peer_of_copy(("adamw", "adamwtable"), 0.93),
         "The norm reads all gradients before the first is used, and tensors count once: 7/8 is the most.", percent),
    Goal("Rows on an H200", "cross-entropy with its gradient: twice as fast as Inductor", "gpu-rows-peer",
         beside_inductor(lambda r: r["line"].startswith("crossentropy"), 2.0), "Rows of 1024 are at 90 to 92% of the copy, where twice Inductor is 93%."),
    Goal("Rows on an H200", "never slower than Inductor", "gpu-rows-peer", beside_inductor(lambda r: r["bytes"] >= SMALL, 1.0),
         "Differences of 2 to 4% between kernels that both move the bytes once come and go with the run."),
    Goal("Rows on an H200", "tensors under 1 MB: never slower than Inductor", "gpu-rows-peer", beside_inductor(lambda r: r["bytes"] < SMALL, 1.0)),
    Goal("Models on an H200", "at least as fast as PyTorch's fastest form in the record", "gpu-models", beside_torch),
    Goal("Models on an H200", "at least as fast as `max-autotune`", "gpu-models", beside_autotune),
    Goal("Models on an H200", "the first result in a third of `max-autotune`'s time", "gpu-models", compile_time),
    Goal("Models on an H200", "no more memory than PyTorch's smallest form", "gpu-models", memory),
    Goal("Models on an H200", "a token of a decoder at batch 1: 75% of the rate at which a kernel can read the weights (`floor_us`)", "gpu-decode", decode_floor,
         "What each kernel waits for at its beginning and end; launches themselves cost next to nothing (a kernel of reads alone in as many launches takes 546 us). The record is older than attention in one launch: 1B takes 737 us since, 79% ([facts](facts.md)).", percent),
    Goal("`torch.compile` on an H200", "at least as fast as Inductor, launched kernel by kernel", "gpu-torch", beside_compiled("tilewright", "default")),
    Goal("`torch.compile` on an H200", "at least as fast as Inductor with recorded graphs (`reduce-overhead`)", "gpu-torch",
         beside_compiled("tilewright-graphs", "reduce-overhead")),
    Goal("Models on a CPU, two threads", "transformers: 1.15 times ONNX Runtime's speed", "cpu-peers", beside_onnxruntime(lambda m: m.startswith(TEXT), 1.15),
         "Products run at 86 to 92% of the multiply-add peak."),
    Goal("Models on a CPU, two threads", "convolutional networks: 1.1 times", "cpu-peers", beside_onnxruntime(lambda m: m.startswith(NET), 1.1),
         "Eight images: where their time goes was not looked into apart."),
    Goal("Models on a CPU, two threads", "softmax, LayerNorm, GELU, transpose of 4096 x 4096: 1.2 times", "cpu-rows", beside_onnxruntime(lambda m: True, 1.2)),
    Goal("Models on a CPU, two threads", "the same: 90% of the rate of PyTorch's copy", "cpu-rows", beside_copy),
    Goal("Models on a CPU, two threads", "products of f32: 0.95 times and more", "cpu-peers", beside_onnxruntime(lambda m: m.startswith("sgemm"), 0.95)),
]


def line(goal: Goal) -> str:
    path = newest(goal.kind)
    cases = goal.cases(json.loads(path.read_text())) if path else []
    if not cases:
        return f"| {goal.text} | not measured | | |"
    short = [c for c in cases if not c.met]
    middle = goal.form(statistics.median(c.value for c in cases))
    met = f"{len(cases) - len(short)} of {len(cases)}, median {middle}"
    named = "; ".join(f"{c.name} {goal.form(c.value)}" for c in short)
    return f"| {goal.text} | {met} | {named} | {goal.why if short else ''} |"


def page() -> str:
    out = [
        "# Goals and what is reached",
        "",
        "Written by `bench/goals.py` from the newest record of each kind, so a figure here is one that a record has. Ratios are the peer's time",
        "over ours: above 1 we are faster. What would close a gap stands in the [open points](open-points.md), what was tried in the [facts](facts.md).",
    ]
    for area in dict.fromkeys(g.area for g in GOALS):
        goals = [g for g in GOALS if g.area == area]
        kinds = {g.kind: newest(g.kind) for g in goals}
        names = ", ".join(f"`records/{p.name}`" for p in kinds.values() if p)
        out += ["", f"## {area}", "", f"From {names}." if names else "No record yet.", "", "| goal | met | short | where the time goes |", "|---|---|---|---|", *map(line, goals)]
    return "\n".join(out) + "\n"


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text() != text:
            print("docs/src/goals.md is not what the records say: run python3 bench/goals.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
