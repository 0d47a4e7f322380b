"""Write the benchmark sections of README.md and of pages below docs/src, and their graphs, from the newest records under `records/`.

Each section lies between two comment lines; nothing between them is typed by hand. With no record it says
so. `--check` changes nothing and fails when a section or a graph is out of date. To add a section: its lines
in README.md or a page, and its row in `SECTIONS`.

Usage:  python bench/readme.py [--check]        (standard library only)
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import sys
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TORCH_PAGE = ROOT / "docs" / "src" / "pytorch.md"
IMAGES = ROOT / "docs" / "src" / "images"
GRAPH = IMAGES / "cpu-peers.svg"
GPU_GRAPH = IMAGES / "gpu-gemm.svg"
MODELS_GRAPH = IMAGES / "gpu-models.svg"

TITLES = {
    "sgemm512": "SGEMM 512 x 512 x 512",
    "sgemm1024": "SGEMM 1024 x 1024 x 1024",
    "softmax4096": "Softmax 4096 x 4096",
    "layernorm4096": "LayerNorm 4096 x 4096",
    "minilm": "MiniLM, sequence 128",
    "bert_base": "BERT-base, sequence 128",
    "mobilenetv3": "MobileNetV3-Large",
    "resnet50": "ResNet-50",
    "efficientnet_b0": "EfficientNet-B0",
    "vit_b": "ViT-B/16",
    "bert_base_384": "BERT-base, 384 tokens",
    "gpt2": "GPT-2, 512 tokens",
    "sgemm2048": "SGEMM 2048 x 2048 x 2048",
    "sgemm4096": "SGEMM 4096 x 4096 x 4096",
}


def newest_record(kind: str) -> tuple[pathlib.Path, dict] | None:
    """The newest record of a comparison that measured both sides."""
    found = []
    for path in sorted((ROOT / "records").glob("*.json")):
        record = json.loads(path.read_text())
        if record.get("kind") == kind and any("latency_ratio" in row or "us" in row for row in record["rows"]):
            found.append((record["date"], path, record))
    if not found:
        return None
    _, path, record = max(found, key=lambda entry: (entry[0], entry[1].name))
    return path, record


def title(row: dict) -> str:
    """How a model is called in tables."""
    base, eight, _ = row["model"].partition("_batch8")
    return TITLES.get(base, base) + (", eight inputs" if eight else "")


def three_digits(x: float) -> str:
    """At least three digits, never as a power of ten."""
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def milliseconds(row: dict, key: str) -> str:
    return three_digits(row[key][1]) if key in row else "-"


def section(path: pathlib.Path, record: dict) -> str:
    machine = record["machine"]
    features = ", ".join(machine["features"]) or "none of note"
    lines = [
        f"Measured {record['date'][:10]} at commit `{record['commit']}` on {machine['cpu']}"
        f" ({machine['logical_cpus']} logical CPUs; {features}), {record['threads']} threads,"
        f" float32, batch 1 where nothing else is said, against ONNX Runtime {record['versions']['onnxruntime']}."
        f" The record: [{path.name}](records/{path.name}).",
        *([record["note"]] if "note" in record else []),
        "",
        "| model | Tilewright, ms | ONNX Runtime, ms | ratio (quartiles) |",
        "|---|---:|---:|---:|",
    ]
    for row in record["rows"]:
        if "latency_ratio" in row:
            low, middle, high = row["latency_ratio"]
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        else:
            ratio = "not run" if "error" not in row else "error, see the record"
        ours, theirs = milliseconds(row, "tilewright_ms"), milliseconds(row, "onnxruntime_ms")
        lines.append(f"| {title(row)} | {ours} | {theirs} | {ratio} |")
    lines += [
        "",
        "Ratio: Tilewright's latency over ONNX Runtime's, so below 1 is faster.",
        "",
        f"![Latency relative to ONNX Runtime]({GRAPH.relative_to(ROOT).as_posix()})",
    ]
    return "\n".join(lines)


def graph(record: dict) -> str:
    """The ratio of each model."""
    rows = [(title(row), row["latency_ratio"]) for row in record["rows"] if "latency_ratio" in row]
    note = f"{record['machine']['cpu']}, {record['threads']} threads, {record['date'][:10]}"
    return bars("Latency relative to ONNX Runtime", "Latency of Tilewright relative to ONNX Runtime, per model", note, rows)


GPU_KINDS = {
    "bf16": "bf16",
    "f16": "f16",
    "tf32": "f32 as TF32",
    "f32": "f32",
    "f32x3": "f32 in three TF32 products",
    "i8": "int8 to int32",
    "f8": "fp8 (e4m3) to bf16",
}
# The shapes that the README shows; the record has all.
GPU_SHAPES = [
    (1024, 1024, 1024, 1),
    (4096, 4096, 4096, 1),
    (8192, 8192, 8192, 1),
    (16384, 16384, 16384, 1),
    (4096, 14336, 4096, 1),
    (8192, 1024, 8192, 1),
    (64, 8192, 8192, 1),
    (1, 8192, 28672, 1),
    (5000, 3333, 2222, 1),
    (512, 64, 512, 64),
]


def gpu_counted(row: dict) -> bool:
    """Measured on both sides, with a right result."""
    return "latency_ratio" in row and "problem" not in row


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def gpu_kinds(record: dict) -> list[tuple[str, list[float]]]:
    """Kinds of numbers in the order of their first row, with the ratios of their rows."""
    kinds: dict[str, list[float]] = {}
    for row in record["rows"]:
        ratios = kinds.setdefault(row["type"], [])
        if gpu_counted(row):
            ratios.append(row["latency_ratio"][1])
    return list(kinds.items())


def gpu_section(path: pathlib.Path, record: dict) -> str:
    machine = record["machine"]
    picks = record["protocol"]["candidates_timed"]
    how = "what the planner picks, nothing tuned" if picks == 1 else f"the fastest of the planner's first {picks} picks"
    lines = [
        f"Matrix products, measured {record['date'][:10]} at commit `{record['commit']}` on {machine['gpu']} (driver"
        f" {machine['driver']}) against cuBLASLt {machine['cublaslt']}, the fastest of the algorithms it proposes. Ours:"
        f" {how}. The record: [{path.name}](records/{path.name}).",
        "",
        "| numbers | shapes | geometric mean of ratios | at most 1 | not counted |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, ratios in gpu_kinds(record):
        total = sum(row["type"] == kind for row in record["rows"])
        mean = f"{geometric_mean(ratios):.2f}" if ratios else "-"
        ahead = sum(ratio <= 1 for ratio in ratios)
        lines.append(f"| {GPU_KINDS.get(kind, kind)} | {len(ratios)} | {mean} | {ahead} | {total - len(ratios)} |")
    lines += [
        "",
        "Ratio: our time over cuBLASLt's, so below 1 is faster. Not counted: one side has no kernel, or the result was wrong.",
        "",
        "| bf16, M x N x K | Tilewright, us | cuBLASLt, us | TFLOP/s | ratio (quartiles) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        if row["type"] != "bf16" or (row["m"], row["n"], row["k"], row["batch"]) not in GPU_SHAPES:
            continue
        shape = gpu_shape(row)
        if gpu_counted(row):
            low, middle, high = row["latency_ratio"]
            lines.append(
                f"| {shape} | {row['tilewright_us'][1]:.1f} | {row['cublaslt_us'][1]:.1f} | {row['tilewright_tflops']:.0f}"
                f" | {middle:.2f} ({low:.2f} to {high:.2f}) |"
            )
        else:
            lines.append(f"| {shape} | - | - | - | see the record |")
    lines += ["", f"![Time relative to cuBLASLt]({GPU_GRAPH.relative_to(ROOT).as_posix()})"]
    return "\n".join(lines)


def gpu_shape(row: dict) -> str:
    shape = f"{row['m']} x {row['n']} x {row['k']}"
    return shape if row["batch"] == 1 else f"{row['batch']} of {shape}"


def gpu_graph(record: dict) -> str:
    """The ratios of each kind of numbers: geometric mean, whiskers for the quartiles over its shapes."""
    rows = []
    for kind, ratios in gpu_kinds(record):
        if ratios:
            low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            rows.append((f"{GPU_KINDS.get(kind, kind)}, {len(ratios)} shapes", [low, geometric_mean(ratios), high]))
    note = f"{record['machine']['gpu']}, {record['date'][:10]}; geometric means, quartiles over shapes"
    return bars("Time relative to cuBLASLt", "Time of matrix products relative to cuBLASLt, per kind of numbers", note, rows)


GPU_MODELS = {
    "bert": "BERT-base",
    "minilm": "MiniLM",
    "gpt2": "GPT-2, no head",
    "vit": "ViT-B/16",
    "llama": "Llama 1B, prefill, no head",
    "llama8b": "Llama 8B, prefill, no head",
    "resnext50": "ResNeXt-50",
    "resnet50": "ResNet-50",
    "mobilenetv3": "MobileNetV3-Large",
    "efficientnet": "EfficientNet-B0",
}
MODES = {"eager": "eager", "compile": "compiled", "graphs": "`reduce-overhead`", "autotune": "`max-autotune`"}


def model_name(row: dict) -> str:
    """`bert@1x128` is BERT-base with inputs of another size, which the row's shape says."""
    model = row["model"].partition("@")[0]
    return GPU_MODELS.get(model, model)


def model_case(row: dict) -> str:
    return f"{model_name(row)}, {row['type']}, {' x '.join(map(str, row['shape']))}"


def tuned_forms(record: dict) -> list[str]:
    """How PyTorch's slowest form to compile did, where the record has it."""
    cases = [
        f"{model_case(row)}: {row['autotune']['ms'][1]:.3f} ms after {'more than ' * row['autotune'].get('first_s_at_least', False)}{row['autotune']['first_s']:.0f} s (ours {row['tw']['ms'][1]:.3f} after {row['tw']['first_s']:.1f})"
        for row in record["rows"] if row.get("autotune", {}).get("ms")
    ]
    return ["", f"`max-autotune`, with the time to its first result: {'; '.join(cases)}."] if cases else []


def megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}"


def models_section(path: pathlib.Path, record: dict) -> str:
    machine = record["machine"]
    lines = [
        f"Whole models, measured {record['date'][:10]} at commit `{record['commit']}` on {machine['gpu']} (driver {machine['driver']}) beside"
        f" PyTorch {machine['torch']}, random weights, in turns. The record: [{path.name}](records/{path.name}).",
        "",
        "| model, input | Tilewright, ms | PyTorch, ms | ratio (quartiles) | error to f32: ours, PyTorch's | memory, MB: ours, PyTorch's eager peak"
        " | to the first result, s: ours, PyTorch's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        tw, peer = row["tw"], row[row["fastest_peer"]]
        low, middle, high = row["latency_ratio"]
        lines.append(
            f"| {model_case(row)} | {tw['ms'][1]:.3f} | {peer['ms'][1]:.3f} ({MODES[row['fastest_peer']]}) | {middle:.2f} ({low:.2f} to {high:.2f})"
            f" | {tw['error']:.1e}, {peer['error']:.1e} | {megabytes(tw['memory_bytes'])}, {megabytes(row['eager']['peak_bytes'])}"
            f" | {tw['first_s']:.1f}, {peer['first_s']:.1f} |"
        )
    lines += [
        "",
        "PyTorch is the fastest of the forms that the record has for the model. Ratio: our time over PyTorch's, so below 1 is faster. To the"
        " first result: with empty caches, ours from the file on, several models side by side.",
        *tuned_forms(record),
        "",
        f"![Time relative to PyTorch]({MODELS_GRAPH.relative_to(ROOT).as_posix()})",
    ]
    return "\n".join(lines)


def models_graph(record: dict) -> str:
    rows = [(model_case(row), row["latency_ratio"]) for row in record["rows"]]
    note = f"{record['machine']['gpu']}, {record['date'][:10]}"
    return bars("Time relative to PyTorch", "Time of whole models relative to PyTorch, per model", note, rows)


TORCH_MODELS = {"bert": "BERT-base", "gpt2": "GPT-2", "vit": "ViT-B/16", "llama": "Llama 1B"}


def torch_section(path: pathlib.Path, record: dict) -> str:
    """Compiled models in inference and in training, and what the first calls take."""
    machine = record["machine"]
    lines = [
        f"Measured {record['date'][:10]} at commit `{record['commit'][:12]}` on {machine['gpu']} (driver {machine['driver']}) with PyTorch"
        f" {machine['torch']} and transformers {machine['transformers']}: random weights in bf16, all sides in one process, in turns. The record:"
        f" `records/{path.name}`, by `gpu/torch_bench.py`.",
        "",
        "| model, layers, input | ours, ms | ours, recorded | eager | Inductor | Inductor, `reduce-overhead` | ratio (quartiles)"
        " | first call with empty caches, s: ours, Inductor | in a second process, s: ours, Inductor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    best: dict[bool, list[float]] = {False: [], True: []}
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        sides = {row["side"]: row for row in record["rows"] if row["case"] == case and "us" in row}
        ours = [side for side in sides if side.startswith("tilewright")]
        theirs = [side for side in sides if side not in ours]
        if not ours or not theirs:
            continue
        mine, peer = (min(group, key=lambda side: sides[side]["us"]) for group in (ours, theirs))
        ratio = sides[peer][f"us_{mine}_over_this"]
        trains = case.endswith("-train")
        best[trains].append(ratio[1])
        times = [three_digits(sides[s]['us'] / 1e3) if s in sides else "-" for s in TORCH_SIDES]

        def seconds(key: str) -> str:
            # Without a cold one before it, a first call is neither.
            found = [sides.get(s, {}) for s in ("tilewright", "default")]  # noqa: B023
            return ", ".join(f"{row[key]:.1f}" if "cold_s" in row else "-" for row in found)

        name = TORCH_MODELS.get(case.removesuffix("-train"), case)
        shape = " x ".join(map(str, sides[mine]["shape"]))
        lines.append(
            f"| {name}{', forward and backward' * trains}, {sides[mine]['layers']}, {shape} | {' | '.join(times)}"
            f" | {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f}) | {seconds('cold_s')} | {seconds('first_s')} |"
        )
    means = [f"{geometric_mean(found):.2f} in {what}" for what, found in (("inference", best[False]), ("training", best[True])) if found]
    lines += [
        "",
        "Ratio: the faster of our two forms over the fastest of PyTorch's, so below 1 is faster; geometric means " + " and ".join(means) + ". A first call"
        " with empty caches is of one compiler alone in its process, with other such processes beside it.",
    ]
    return "\n".join(lines)


# The columns of times.
TORCH_SIDES = ("tilewright", "tilewright-graphs", "eager", "default", "reduce-overhead")


def bars(heading: str, description: str, note: str, rows: list[tuple[str, list[float]]]) -> str:
    """Horizontal bars of ratios, a line at 1, whiskers for the quartiles."""
    left = max(240, 7 * max(len(name) for name, _ in rows) + 24)
    right, top, pitch, bar = 90, 66, 38, 20
    width, height = 820, top + pitch * len(rows) + 44
    largest = max(1.25, *(ratio[2] for _, ratio in rows)) * 1.05
    scale = (width - left - right) / largest

    def x(value: float) -> str:
        return f"{left + value * scale:.1f}"

    bottom = top + pitch * len(rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-labelledby="title" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial,'
        ' sans-serif">',
        f'<title id="title">{escape(description)}</title>',
        "<style>.card{fill:#fff;stroke:#e5e7eb}.name{font-size:15px;font-weight:600;fill:#111827}"
        ".note{font-size:12px;fill:#4b5563}.label{font-size:13px;fill:#111827;paint-order:stroke;stroke:#fff;stroke-width:4}.faster{fill:#0d9488}"
        ".slower{fill:#d97706}.one{stroke:#111827;stroke-width:1.5}.grid{stroke:#e5e7eb}"
        ".spread{stroke:#111827;stroke-width:1.5}</style>",
        f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="14"/>',
        f'<text class="name" x="24" y="32">{escape(heading)}</text>',
        f'<text class="note" x="24" y="50">shorter is faster; {escape(note)}</text>',
    ]
    step = 0.25 if largest <= 2 else 0.5 if largest <= 4 else 1.0 if largest <= 9 else 5.0
    ticks = [step * i for i in range(int(largest / step) + 1)]
    for tick in ticks:
        out.append(f'<path class="grid" d="M{x(tick)} {top}V{bottom}"/>')
        out.append(f'<text class="note" x="{x(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    # Figures stand over the line at one, on a ground of their own.
    figures = []
    for index, (name, (low, middle, high)) in enumerate(rows):
        y = top + index * pitch + (pitch - bar) / 2
        kind = "faster" if middle <= 1 else "slower"
        centre = y + bar / 2
        out += [
            f'<text class="label" x="{left - 12}" y="{centre + 4:g}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{left}" y="{y:g}" width="{middle * scale:.1f}" height="{bar}" rx="3"/>',
            f'<path class="spread" d="M{x(low)} {centre:g}H{x(high)}"/>',
        ]
        figures.append(f'<text class="label" x="{float(x(high)) + 8:.1f}" y="{centre + 4:g}">{middle:.2f}</text>')
    out += [f'<path class="one" d="M{x(1)} {top - 4}V{bottom}"/>', *figures, "</svg>"]
    return "\n".join(out) + "\n"


# Name of the section in its comment lines, kind of record, text, graph and its file (or none), what to do without a record, the page.
SECTIONS = [
    ("", "cpu-peers", section, graph, GRAPH, "`make bench` writes a record", README),
    ("gpu ", "gpu-gemm", gpu_section, gpu_graph, GPU_GRAPH, "`gpu/run.sh` of `make gpu-bundle` writes a record", README),
    ("gpu models ", "gpu-models", models_section, models_graph, MODELS_GRAPH, "`gpu/run.sh bench` writes a record", README),
    ("torch ", "gpu-torch", torch_section, None, None, "`gpu/torch_bench.py` writes a record", TORCH_PAGE),
]


def main() -> int:
    check = "--check" in sys.argv[1:]
    pages = {page: page.read_text() for *_, page in SECTIONS}
    new_pages = dict(pages)
    pictures = {}
    for name, kind, write, draw, path, hint, page in SECTIONS:
        found = newest_record(kind)
        body = f"Not measured yet: {hint}, and this section is made from it." if found is None else write(*found)
        if draw is not None:
            pictures[path] = None if found is None else draw(found[1])
        begin, end = f"<!-- bench/readme.py: {name}begin -->", f"<!-- bench/readme.py: {name}end -->"
        if new_pages[page].count(begin) != 1 or new_pages[page].count(end) != 1:
            print(f"{page.name} must hold one '{begin}' and one '{end}'", file=sys.stderr)
            return 2
        before, rest = new_pages[page].split(begin)
        new_pages[page] = f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"
    old_pictures = {path: path.read_text() if path.exists() else None for path in pictures}
    if check:
        if new_pages != pages or pictures != old_pictures:
            print("The benchmark sections of README.md and docs/src are out of date: python bench/readme.py", file=sys.stderr)
            return 1
        return 0
    for page, text in new_pages.items():
        page.write_text(text)
    for path, picture in pictures.items():
        if picture is not None:
            path.write_text(picture)
        elif old_pictures[path] is not None:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
