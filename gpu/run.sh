#!/usr/bin/env bash
# Tests, then measures, on this machine's GPU. From an unpacked archive of `make gpu-bundle`: no Rust needed.
#
#   gpu/run.sh [tests|edges|sanitizer|triton|ops|bench|models|tune|all] [arguments for tw-gpu-test, tw edges, tw-gpu-bench,
#                                                                   models.py or tw-gpu-tune]               default: all
#
# tests:  the driver, launches, programs of graphs, row kernels against float64, matrix products of every kind, order, odd size, stride and batch, and attention
# edges:  small graphs at the edges in four precisions: rows of one element, NaN and infinities, ignored targets, odd vocabularies,
#         empty batches, computed places, tensors of more than 2^31 elements, wrong inputs, too little memory (also in tests);
#         and runs that cannot be recorded as graphs
# sanitizer: a few products of every kind under NVIDIA's compute-sanitizer, where the toolkit is installed
# triton: the modules of gpu/triton, where PyTorch and Triton are installed
# ops:    the operators for PyTorch: values, PyTorch's checks, host time, speed beside eager and Inductor, where PyTorch is installed
# models: tiny models against float64, in four precisions (also in tests); where PyTorch is installed, large
#         ones beside it (gpu/models.py), with a record
# bench:  the cost of a launch, row kernels against a copy and beside PyTorch's compiler, matrix products against cuBLASLt, with endings against cuBLASLt and a kernel behind it; models beside PyTorch where it is installed; records under $RECORDS (default: records)
# tune:   searches for faster schedules; records under $RECORDS/tuned, all in one file $RECORDS/tuned.jsonl. Not part of all
#
# Every part runs, whatever came of the one before; the exit code says whether all passed. Kernels are
# compiled once and kept in $TILEWRIGHT_CACHE (default: .cache).
set -uo pipefail
cd "$(dirname "$0")/.."

export TILEWRIGHT_COMMAND="gpu/run.sh${*:+ $*}"
part="${1:-all}"
[ $# -eq 0 ] || shift
case "$part" in tests | edges | sanitizer | triton | ops | bench | models | tune | all) ;; *) echo "unknown part '$part'" >&2; exit 2 ;; esac

for program in tw tw-gpu-bench tw-gpu-launch tw-gpu-rows tw-gpu-test tw-gpu-attention tw-gpu-tune cuda-gpu-tests launch-gpu-tests launch-rows-tests; do
  [ -x "bin/$program" ] || { echo "bin/$program is missing: this is for an archive of \`make gpu-bundle\`" >&2; exit 2; }
done
records="${RECORDS:-records}"
cache="${TILEWRIGHT_CACHE:-$PWD/.cache}"
mkdir -p "$records" "$cache"
export TILEWRIGHT_COMMIT="${TILEWRIGHT_COMMIT:-$(cat COMMIT)}"
# What is missing is a failure here, not a reason to skip.
export TILEWRIGHT_REQUIRE_GPU=1 TILEWRIGHT_REQUIRE_NVRTC=1

failed=()
step() { # name, command...
  local name="$1" start=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  if "$@"; then
    printf '== %s: ok, %d s\n' "$name" $((SECONDS - start))
  else
    printf '== %s: FAILED after %d s\n' "$name" $((SECONDS - start))
    failed+=("$name")
  fi
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader || true
if [ "$part" = tests ] || [ "$part" = all ]; then
  step "driver" bin/cuda-gpu-tests --test-threads 1
  step "launches" bin/launch-gpu-tests --test-threads 1
  step "programs of graphs" bin/launch-rows-tests --test-threads 1
  if [ "$part" = tests ]; then
    step "products" bin/tw-gpu-test --cache "$cache" "$@"
  else
    step "products" bin/tw-gpu-test --cache "$cache"
  fi
  step "attention" bin/tw-gpu-attention test --cache "$cache"
fi
tiny_models() {
  local model precision bad=0
  for model in models/*/; do
    for precision in f32 tf32 f16 bf16; do
      bin/tw verify "$model" --device cuda --precision "$precision" --cache "$cache" || bad=1
    done
  done
  return $bad
}
decoders() {
  local model bad=0
  for model in gpt2 llama mistral mistral_window qwen2 qwen2_window qwen3; do
    for batch in 1 3; do
      bin/tw generate "models/$model" --device cuda --cache "$cache" --tokens 5,9,1,17,3,3,20,8,11,2,4 --max-tokens 1 \
        --batch "$batch" --verify || bad=1
    done
    # The first prompt of generated.json, and what transformers makes of it.
    python3 - "$model" <<'PY' || bad=1
import json, subprocess, sys
folder = f"models/{sys.argv[1]}"
known = json.load(open(f"{folder}/generated.json"))
found = subprocess.run(["bin/tw", "--json", "generate", folder, "--device", "cuda", "--ignore-eos", "--max-tokens", "10", "--tokens",
                        ",".join(map(str, known["prompts"][0]))], capture_output=True, text=True, check=True).stdout
sys.exit(json.loads(found)["tokens"][0] != known["tokens"][0])
PY
  done
  python3 gpu/decode.py --tw bin/tw --check-prompts || bad=1
  return $bad
}
# The first choices of a model's first kernels do not compile: the next ones run, the results are right, and it is said.
schedules_give_way() {
  TILEWRIGHT_FAIL_FIRST=3 bin/tw verify models/llama --device cuda --precision bf16 --cache "$cache" || return 1
  TILEWRIGHT_FAIL_FIRST=3 bin/tw run models/llama --device cuda --precision bf16 --cache "$cache" 2>&1 | grep -F -A 3 'warning'
}
if [ "$part" = tests ] || [ "$part" = models ] || [ "$part" = all ]; then
  step "tiny models" tiny_models
  step "decoders" decoders
  step "kernels that do not compile give way" schedules_give_way
fi
# Nothing can be recorded: kernels are launched one by one, the results are right, and the reason is printed.
recordings_give_way() {
  local said
  TILEWRIGHT_FAIL_RECORDING=1 bin/tw verify models/bert --device cuda --precision bf16 --cache "$cache" || return 1
  said="$(TILEWRIGHT_FAIL_RECORDING=1 bin/tw run models/bert --device cuda --precision bf16 --cache "$cache" 2>&1)"
  grep -F 'are not recorded' <<<"$said" && grep -F 'in 0 graphs' <<<"$said"
}
if [ "$part" = tests ] || [ "$part" = edges ] || [ "$part" = all ]; then
  if [ "$part" = edges ]; then
    step "edges" bin/tw edges --device cuda --large --cache "$cache" "$@"
  else
    step "edges" bin/tw edges --device cuda --large --cache "$cache"
  fi
  step "recordings that fail give way" recordings_give_way
fi
has_torch() { python3 -c 'import torch; from cuda.bindings import nvrtc' 2>/dev/null; }
if [ "$part" = tests ] || [ "$part" = all ]; then
  if has_torch; then
    step "row kernels against float64" python3 gpu/rows_peer.py check gpu/rows.json
  else
    printf '\n== row kernels against float64: not run, python3 has no torch with cuda.bindings\n'
  fi
fi
large_models() {
  if python3 -c 'import torch' 2>/dev/null; then
    step "models beside PyTorch" python3 gpu/models.py --tw bin/tw --out "$records" "$@"
    step "decoding beside PyTorch" python3 gpu/decode.py --tw bin/tw --out "$records/gpu-decode.json"
  else
    printf '\n== models beside PyTorch: not run, python3 has no torch\n'
  fi
}
if [ "$part" = models ]; then
  large_models "$@"
fi
# One process per kind of numbers, side by side: the tools slow the host down more than the device.
sanitize() { # tool and its options
  local kind jobs=() bad=0
  for kind in bf16 f16 tf32 f32 f32x3 i8 f8 f8p f8e5m2; do
    "$sanitizer" --error-exitcode 1 --tool "$@" bin/tw-gpu-test --cache "$cache" --alone --types "$kind" \
      --groups sizes,orders,strides,batches,endings --every 60 >"$records/sanitizer-$1-$kind.log" 2>&1 &
    jobs+=("$!:$kind")
  done
  for job in "${jobs[@]}"; do
    wait "${job%%:*}" || bad=1
    printf '%s: %s\n' "${job#*:}" "$(tail -n 2 "$records/sanitizer-$1-${job#*:}.log" | tr '\n' ' ')"
  done
  return $bad
}
if [ "$part" = sanitizer ] || [ "$part" = all ]; then
  sanitizer="$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)"
  if [ -n "$sanitizer" ]; then
    # Asking a kernel for one parameter more than it has is how they are counted; that is no error of ours.
    for tool in "memcheck --report-api-errors no" racecheck synccheck; do
      # shellcheck disable=SC2086
      step "compute-sanitizer ${tool%% *}" sanitize $tool
    done
  else
    printf '\n== compute-sanitizer: not run, it is neither in PATH nor in /usr/local/cuda*/bin\n'
  fi
fi
if [ "$part" = triton ] || [ "$part" = all ]; then
  if python3 -c 'import torch, triton' 2>/dev/null; then
    step "Triton modules" python3 gpu/test_triton.py
  else
    printf '\n== Triton modules: not run, python3 has no torch with triton\n'
  fi
fi
if [ "$part" = ops ] || [ "$part" = all ]; then
  if python3 -c 'import torch, numpy' 2>/dev/null; then
    step "operators for PyTorch" env PYTHONPATH="python" TILEWRIGHT_CACHE="$cache" python3 gpu/test_ops.py check
    step "optimizers, dropout, bags and losses for PyTorch" env PYTHONPATH="python" TILEWRIGHT_CACHE="$cache" python3 gpu/test_optim.py check
    if python3 -c 'import transformers' 2>/dev/null; then
      step "training under torch.compile" env PYTHONPATH="python" TILEWRIGHT_CACHE="$cache" python3 gpu/test_training.py
    fi
    if python3 -c 'import torchvision, transformers' 2>/dev/null; then
      package=(env TILEWRIGHT_TORCH_PACKAGE="$PWD/python" TILEWRIGHT_CACHE="$cache")
      step "PyTorch: reports, files, patched models, bad input" "${package[@]}" python3 gpu/test_torch.py
      step "PyTorch: models, inference and training" "${package[@]}" python3 tests/python/torch_coverage.py --device cuda --jobs 8
      step "PyTorch: bad and odd input" "${package[@]}" python3 tests/python/test_torch_bad_input.py cuda --jobs 6
      if python3 -c 'import torch; raise SystemExit(torch.cuda.device_count() < 2)'; then
        step "PyTorch: two GPUs" "${package[@]}" python3 gpu/two_gpus.py
      fi
    fi
    if python3 -c 'import jax' 2>/dev/null; then
      step "functions for JAX" env TILEWRIGHT_PACKAGE="$PWD/python" TILEWRIGHT_CACHE="$cache" XLA_PYTHON_CLIENT_PREALLOCATE=false \
        python3 tests/python/test_jax.py cuda --jobs 8
    fi
    step "operators beside PyTorch's" env PYTHONPATH="python" TILEWRIGHT_CACHE="$cache" \
      python3 gpu/test_ops.py time --out "$records/gpu-ops.json"
    step "the pack beside PyTorch and Liger-Kernel" env PYTHONPATH="python" TILEWRIGHT_CACHE="$cache" \
      python3 gpu/pack_times.py --out "$records/gpu-pack.json"
  else
    printf '\n== operators for PyTorch: not run, python3 has no torch\n'
  fi
fi
if [ "$part" = bench ] || [ "$part" = all ]; then
  step "launch overhead" bin/tw-gpu-launch --out "$records"
  step "rows" bin/tw-gpu-rows --cache "$cache" --out "$records"
  if has_torch; then
    step "rows beside PyTorch" python3 gpu/rows_peer.py bench gpu/rows_peer.json --record "$records/gpu-rows-peer.json"
  else
    printf '\n== rows beside PyTorch: not run, python3 has no torch with cuda.bindings\n'
  fi
  step "bench" bin/tw-gpu-bench --cache "$cache" --out "$records" "$@"
  step "bench of endings" bin/tw-gpu-bench --cache "$cache" --out "$records" --shapes bench/gemm_endings.txt
  large_models
fi
if [ "$part" = tune ]; then
  [ $# -gt 0 ] || set -- --shapes bench/gemm_shapes.txt --seconds 300
  step "tune" bin/tw-gpu-tune --cache "$cache" --records "$records/tuned" --export "$records/tuned.jsonl" "$@"
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf '\nfailed: %s\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
printf '\nall passed in %d s\n' "$SECONDS"
