"""Write the benchmark section of README.md, and its graph, from the newest record under `records/`.

The section lies between two comment lines (`BEGIN`, `END`); nothing between them is typed by hand. With no
record it says so. `--check` changes nothing and fails when the section or the graph is out of date.

Usage:  python bench/readme.py [--check]        (standard library only)
"""

from __future__ import annotations

import json
import pathlib
import sys
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GRAPH = ROOT / "docs" / "src" / "images" / "cpu-peers.svg"
BEGIN = "<!-- bench/readme.py: begin -->"
END = "<!-- bench/readme.py: end -->"

TITLES = {
    "sgemm1024": "SGEMM 1024 x 1024 x 1024",
    "softmax4096": "Softmax 4096 x 4096",
    "layernorm4096": "LayerNorm 4096 x 4096",
    "minilm": "MiniLM, sequence 128",
    "bert_base": "BERT-base, sequence 128",
    "mobilenetv3": "MobileNetV3-Large",
    "resnet50": "ResNet-50",
}


def newest_record() -> tuple[pathlib.Path, dict] | None:
    """The newest record of a comparison that measured both engines."""
    found = []
    for path in sorted((ROOT / "records").glob("*.json")):
        record = json.loads(path.read_text())
        is_comparison = record.get("kind") == "cpu-peers"
        if is_comparison and any("latency_ratio" in row for row in record["rows"]):
            found.append((record["date"], path, record))
    if not found:
        return None
    _, path, record = max(found, key=lambda entry: (entry[0], entry[1].name))
    return path, record


def title(row: dict) -> str:
    return TITLES.get(row["model"], row["model"])


def milliseconds(row: dict, key: str) -> str:
    return f"{row[key][1]:.3g}" if key in row else "-"


def section(path: pathlib.Path, record: dict) -> str:
    machine = record["machine"]
    features = ", ".join(machine["features"]) or "none of note"
    lines = [
        f"Measured {record['date'][:10]} at commit `{record['commit']}` on {machine['cpu']}"
        f" ({machine['logical_cpus']} logical CPUs; {features}), {record['threads']} threads,"
        f" float32, batch 1, against ONNX Runtime {record['versions']['onnxruntime']}."
        f" The record: [{path.name}](records/{path.name}).",
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
    """Horizontal bars of the ratio, a line at 1, whiskers for the quartiles."""
    rows = [row for row in record["rows"] if "latency_ratio" in row]
    left, right, top, pitch, bar = 240, 90, 66, 38, 20
    width, height = 820, top + pitch * len(rows) + 44
    largest = max(1.25, *(row["latency_ratio"][2] for row in rows)) * 1.05
    scale = (width - left - right) / largest

    def x(value: float) -> str:
        return f"{left + value * scale:.1f}"

    bottom = top + pitch * len(rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-labelledby="title" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial,'
        ' sans-serif">',
        '<title id="title">Latency of Tilewright relative to ONNX Runtime, per model</title>',
        "<style>.card{fill:#fff;stroke:#e5e7eb}.name{font-size:15px;font-weight:600;fill:#111827}"
        ".note{font-size:12px;fill:#4b5563}.label{font-size:13px;fill:#111827}.faster{fill:#0d9488}"
        ".slower{fill:#d97706}.one{stroke:#111827;stroke-width:1.5}.grid{stroke:#e5e7eb}"
        ".spread{stroke:#111827;stroke-width:1.5}</style>",
        f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="14"/>',
        '<text class="name" x="24" y="32">Latency relative to ONNX Runtime</text>',
        f'<text class="note" x="24" y="50">shorter is faster; {escape(record["machine"]["cpu"])},'
        f" {record['threads']} threads, {record['date'][:10]}</text>",
    ]
    step = 0.25 if largest <= 2 else 0.5 if largest <= 4 else 1.0 if largest <= 9 else 5.0
    ticks = [step * i for i in range(int(largest / step) + 1)]
    for tick in ticks:
        out.append(f'<path class="grid" d="M{x(tick)} {top}V{bottom}"/>')
        out.append(f'<text class="note" x="{x(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for index, row in enumerate(rows):
        low, middle, high = row["latency_ratio"]
        y = top + index * pitch + (pitch - bar) / 2
        kind = "faster" if middle <= 1 else "slower"
        centre = y + bar / 2
        out += [
            f'<text class="label" x="{left - 12}" y="{centre + 4:g}" text-anchor="end">{escape(title(row))}</text>',
            f'<rect class="{kind}" x="{left}" y="{y:g}" width="{middle * scale:.1f}" height="{bar}" rx="3"/>',
            f'<path class="spread" d="M{x(low)} {centre:g}H{x(high)}"/>',
            f'<text class="label" x="{float(x(high)) + 8:.1f}" y="{centre + 4:g}">{middle:.2f}</text>',
        ]
    out += [f'<path class="one" d="M{x(1)} {top - 4}V{bottom}"/>', "</svg>"]
    return "\n".join(out) + "\n"


def main() -> int:
    found = newest_record()
    if found is None:
        body, picture = "Not measured yet: `make bench` writes a record, and this section is made from it.", None
    else:
        body, picture = section(*found), graph(found[1])

    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"README.md must hold one '{BEGIN}' and one '{END}'", file=sys.stderr)
        return 2
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new_text = f"{before}{BEGIN}\n{body}\n{END}{after}"

    old_picture = GRAPH.read_text() if GRAPH.exists() else None
    if "--check" in sys.argv[1:]:
        if new_text != text or picture != old_picture:
            print("README.md's benchmark section is out of date: python bench/readme.py", file=sys.stderr)
            return 1
        return 0
    README.write_text(new_text)
    if picture is not None:
        GRAPH.write_text(picture)
    elif old_picture is not None:
        GRAPH.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
