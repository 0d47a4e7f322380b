#!/usr/bin/env bash
# `make test`. Runs every check and stops at the first step that fails; prints how long each took. Without --only the last
# step is one pool of everything that builds nothing: format, structure, Rust and Python tests side by side, longest first.
#
#   scripts/test.sh [--only lint|rust|python|fuzz|torch|torch-core|jax]
#
# To add a Rust test: `cargo test` finds it. To add a Python-driven test: tests/python/README.md.
# To add a fuzz target: a test named fuzz_* in crates/testkit/tests/fuzz/; each runs for
# TILEWRIGHT_FUZZ_SECONDS (default here: 1), beside the others.
#
# Every build names the whole workspace and the release profile: the features of the dependencies are
# then the same each time, what is tested is what runs, and nothing is compiled twice. (Clippy only type
# checks, so it shares nothing with the builds.) Tests keep compiled kernels below target/, found again by
# their content: the first run compiles them all, a later one those that changed.
set -euo pipefail
cd "$(dirname "$0")/.."

only=all
if [ "${1:-}" = --only ]; then only="${2:?--only needs a name}"; fi
case "$only" in all | lint | rust | python | fuzz | torch | torch-core | jax) ;; *) echo "unknown part '$only'" >&2; exit 2 ;; esac

export CARGO_TERM_PROGRESS_WHEN=never
# setup.sh installed NVRTC, so a test that does not find it fails instead of being skipped.
export TILEWRIGHT_REQUIRE_NVRTC=1
export RUST_BACKTRACE="${RUST_BACKTRACE:-1}"
export TILEWRIGHT_FUZZ_SECONDS="${TILEWRIGHT_FUZZ_SECONDS:-1}"

step() { # name, command...
  local name="$1" ended=0
  shift
  printf '\n== %s\n' "$name"
  local TIMEFORMAT="== $name: %1R s, of processors %1U s user and %1S s system"
  time "$@" || ended=$?
  if [ "$ended" -ne 0 ]; then
    printf '\n== %s: FAILED with exit code %d\n' "$name" "$ended" >&2
    exit 1
  fi
}

lint() {
  step "format" cargo fmt --all --check
  step "clippy" cargo clippy --release --locked --workspace --all-targets --quiet -- -D warnings
  step "structure" cargo xtask tidy
}

build() {
  step "build" cargo build --release --locked --workspace --quiet
}

cases() {
  # The official ONNX cases come with the `onnx` package; the conformance test reads them as files.
  step "ONNX backend cases" .venv/bin/python tests/onnx_backend/dump.py target/onnx_backend
}

rust() {
  build
  cases
  # As `cargo test --release --workspace`, with several test programs at a time.
  step "Rust tests" cargo xtask test
}

# The commands of the Python tests that can run here, one a line.
python_tests() {
  local test interpreter
  for test in tests/python/test_*.py; do
    [ -e "$test" ] || continue
    interpreter=.venv/bin/python
    case "$test" in *test_torch_short*)
      # PyTorch's packages are large, so nothing of `make test` installs them.
      interpreter="${TILEWRIGHT_TORCH_PYTHON:-.venv-torch/bin/python}"
      if ! "$interpreter" -c 'import torch' 2>/dev/null; then
        printf '\n== %s: not run, no PyTorch (scripts/setup.sh torch, or TILEWRIGHT_TORCH_PYTHON)\n' "$test" >&2
        continue
      fi
      ;;
    *test_torch* | *test_jax*) continue ;; *triton*)
      interpreter=.venv-triton/bin/python
      if ! [ -x "$interpreter" ]; then
        printf '\n== %s: not run, no .venv-triton (scripts/setup.sh triton, on Linux)\n' "$test" >&2
        continue
      fi
      ;;
    esac
    printf '%s %s\n' "$interpreter" "$test"
  done
}

python() {
  build
  local commands command
  mapfile -t commands < <(python_tests)
  for command in "${commands[@]}"; do
    # shellcheck disable=SC2086  # Words are arguments.
    step "$command" $command
  done
}

everything() {
  step "clippy" cargo clippy --release --locked --workspace --all-targets --quiet -- -D warnings
  build
  cases
  local commands command beside=(--beside "cargo fmt --all --check" --beside "${CARGO_TARGET_DIR:-target}/release/xtask tidy")
  mapfile -t commands < <(python_tests)
  for command in "${commands[@]}"; do beside+=(--beside "$command"); done
  step "tests" cargo xtask test "${beside[@]}"
}

# The PyTorch backend. Not part of "all": PyTorch's packages are several GB (`make test-torch`).
torch() {
  local test interpreter="${TILEWRIGHT_TORCH_PYTHON:-.venv-torch/bin/python}"
  step "build" cargo build --release --locked --workspace --quiet
  for test in tests/python/test_torch_*.py; do
    step "$test" "$interpreter" "$test"
  done
}

# What of the above fits into a few minutes, for continuous integration.
torch_core() {
  local test interpreter="${TILEWRIGHT_TORCH_PYTHON:-.venv-torch/bin/python}"
  step "build" cargo build --release --locked --workspace --quiet
  for test in $torch_core_tests; do
    step "tests/python/test_torch_$test.py" "$interpreter" "tests/python/test_torch_$test.py"
  done
}
torch_core_tests="short bad_input docs ops optim transforms late triton reports gradients behaviour"

# The functions for JAX. Not part of "all" (`make test-jax`).
jax() {
  step "build" cargo build --release --locked --workspace --quiet
  step "tests/python/test_jax.py" .venv-jax/bin/python tests/python/test_jax.py
}

fuzz() {
  step "fuzzing" cargo test --release --locked --workspace --quiet --test fuzz --test onnx_damage
}

start_of_all=$SECONDS
if [ "$only" = all ]; then
  parts=(system test wheel)
  if compgen -G 'tests/python/test_*triton*.py' >/dev/null; then parts+=(triton); fi
  if compgen -G 'tests/python/test_*html*.py' >/dev/null; then parts+=(browser); fi
  step "setup" ./scripts/setup.sh "${parts[@]}"
  everything
else
  "${only//-/_}"
fi
printf '\nAll checks passed in %d s.\n' $((SECONDS - start_of_all))
