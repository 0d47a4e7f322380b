#!/usr/bin/env bash
# `make gpu-bundle`: everything that tests and measures on a GPU, as programs that need no Rust, in one
# archive: target/gpu-bundle.tar.gz. On the machine with the GPU: unpack it anywhere and start gpu/run.sh.
#
# That machine needs NVIDIA's driver, NVRTC and cuBLASLt (both come with the toolkit and with PyTorch), and
# a C library that is not older than this machine's.
set -euo pipefail
cd "$(dirname "$0")/.."

limit_mib=60
target="${CARGO_TARGET_DIR:-target}"
out="$target/gpu-bundle.tar.gz"
stage="$(mktemp -d)"
trap 'rm -rf "$stage"' EXIT

# The path of the test program `$2` of the package `$1`.
test_program() {
  cargo test --release --locked --no-run --message-format=json --package "$1" --test "$2" 2>/dev/null \
    | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == sys.argv[1] and "test" in message["target"]["kind"]:
        print(message["executable"])
' "$2"
}

cargo build --release --locked --package tilewright-bench-gpu --package tilewright-tune
# Without LLVM: models and operators on GPUs only. The files are replaced by the next ordinary build.
cargo build --release --locked --package tilewright-cli --no-default-features
cargo build --release --locked --package tilewright-python --no-default-features
mkdir -p "$stage/bin" "$stage/gpu" "$stage/bench" "$stage/records"
for name in tw tw-gpu-bench tw-gpu-launch tw-gpu-rows tw-gpu-test tw-gpu-attention tw-gpu-tune; do
  strip -o "$stage/bin/$name" "$target/release/$name"
done
for part in cuda-gpu launch-gpu launch-rows; do
  program="$(test_program "tilewright-${part%-*}" "${part#*-}")"
  [ -x "$program" ] || { echo "gpu_bundle: the tests of $part were not built" >&2; exit 1; }
  strip -o "$stage/bin/$part-tests" "$program"
done
cp -r gpu/. "$stage/gpu/"
mkdir -p "$stage/python"
cp -r python/tilewright "$stage/python/"
strip -o "$stage/python/tilewright/_native.abi3.so" "$target/release/libtilewright_python.so"
mkdir -p "$stage/tests/python" "$stage/demo"
cp tests/python/torch_{coverage,models,opinfo,package}.py tests/python/test_{jax,torch_bad_input,torch_ops}.py "$stage/tests/python/"
cp -r demo/digits "$stage/demo/digits"
find "$stage/gpu" "$stage/python" -name __pycache__ -prune -exec rm -rf {} +
# Row kernels as text, for gpu/rows_peer.py.
cp -r device-lib "$stage/device-lib"
for list in rows rows_peer; do
  cargo run --release --locked --package tilewright-kernels --example show_rows -- --json "gpu/$list.txt" >"$stage/gpu/$list.json"
done
mkdir -p "$stage/models"
for model in tests/hf/*/config.json; do
  cp -r "$(dirname "$model")" "$stage/models/"
done
cp bench/gemm_shapes.txt bench/gemm_endings.txt bench/rows_shapes.txt "$stage/bench/"
commit="$(git rev-parse --short=12 HEAD)"
[ -z "$(git status --porcelain --untracked-files=no)" ] || commit="$commit-changed"
printf '%s\n' "$commit" >"$stage/COMMIT"
# The same input gives the same archive: sorted names, no times and owners.
tar -C "$stage" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -c . | gzip -9n >"$out"
mib=$(($(stat -c %s "$out") / 1048576))
[ "$mib" -lt "$limit_mib" ] || { echo "gpu_bundle: $out has $mib MiB, the limit is $limit_mib" >&2; exit 1; }
echo "$out: $mib MiB, commit $commit; on the machine with the GPU: tar xzf, then gpu/run.sh"
