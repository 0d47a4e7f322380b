"""The last step of the demo: latency of `tw bench` beside ONNX Runtime's, in alternating rounds.

A Hugging Face directory is first written as an ONNX file with the same weights (`export_minilm.py`), so that
both arms read one file. For figures to quote use `make bench`, which compares inside one process.

Usage:  python demo/beside_onnxruntime.py TW MODEL
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime

THREADS = 2
ROUNDS = 5
SECONDS_PER_ROUND = 1.0
HERE = pathlib.Path(__file__).parent


def onnxruntime_session(path: str) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    # Its workers would spin while the other arm runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feeds = {}
    for entry in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in entry.shape]
        if entry.type == "tensor(int64)":
            is_ids = entry.name == "input_ids"
            feeds[entry.name] = rng.integers(1000, 20000, shape) if is_ids else np.zeros(shape, np.int64)
        else:
            feeds[entry.name] = rng.standard_normal(shape, dtype=np.float32)
    return session, feeds


def onnxruntime_ms(session, feeds) -> float:
    samples = []
    end = time.monotonic() + SECONDS_PER_ROUND
    while time.monotonic() < end:
        start = time.perf_counter()
        session.run(None, feeds)
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def tilewright_ms(tw: str, path: str) -> float:
    command = [tw, "bench", path, "--threads", str(THREADS), "--seconds", str(SECONDS_PER_ROUND), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout)["median_ms"])


def main() -> int:
    tw, model = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as folder:
        path = model
        if pathlib.Path(model).is_dir():
            path = str(pathlib.Path(folder) / "model.onnx")
            subprocess.run([sys.executable, str(HERE / "export_minilm.py"), model, path], check=True)
        session, feeds = onnxruntime_session(path)
        onnxruntime_ms(session, feeds)
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(tilewright_ms(tw, path))
            theirs.append(onnxruntime_ms(session, feeds))
    ratios = [a / b for a, b in zip(ours, theirs)]
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
    print(f"inputs: {shapes}; {THREADS} threads; {ROUNDS} alternating rounds; medians")
    print(f"  tilewright   {statistics.median(ours):9.3f} ms")
    print(f"  onnxruntime  {statistics.median(theirs):9.3f} ms   (version {onnxruntime.__version__})")
    print(f"  ratio        {statistics.median(ratios):9.3f}      (rounds {min(ratios):.3f} .. {max(ratios):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
