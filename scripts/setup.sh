#!/usr/bin/env bash
# Installs what the commands need. Nothing happens when everything is there already.
#
#   scripts/setup.sh [system] [test] [wheel] [torch] [jax] [demo] [bench] [triton] [browser] [docs]     default: system
#
# system: LLVM 22 with its static libraries, a C compiler for linking, Python's venv module.
#         Through apt-get where its sources offer llvm-22-dev (Debian 12 and later); elsewhere this
#         says what to install. LLVM in another place: set LLVM_SYS_221_PREFIX to its prefix.
# test, demo, bench: the pinned packages of python/requirements-<name>.txt, in .venv. `test` also takes
#         requirements-gpu-check.txt: the CUDA compiler, which needs no GPU.
# wheel: maturin, which builds the wheel, in .venv.
# torch: PyTorch and the models of the backend's tests, in .venv-torch. PyTorch's own index has a build for processors (200 MB);
#         where it is not reached, the registry's comes, which on Linux brings CUDA's libraries with it (several GB).
#         TILEWRIGHT_TORCH_PYTHON names an interpreter that has all of requirements-torch.txt already, and nothing is installed.
# jax: JAX for processors, in .venv-jax.
# triton: those of python/requirements-triton.txt, in .venv-triton; only on Linux, where Triton exists.
# browser: Chromium, for the test that looks at HTML reports.
# docs: mdbook, built with cargo. Only for `make docs`: it takes a minute to build, and what can break in
#   the book (its table of contents, its links) is checked by `cargo xtask tidy` without it.
set -euo pipefail
cd "$(dirname "$0")/.."

llvm_major=22
mdbook_version=0.5.4
system_packages=(
  "llvm-$llvm_major-dev"       # headers, static libraries, llvm-config-22
  "libpolly-$llvm_major-dev"   # llvm-config lists Polly among the libraries to link
  zlib1g-dev libzstd-dev       # LLVM's own dependencies
  g++                          # cc for linking, and libstdc++, which LLVM is written against
  python3-venv
)

fail() {
  printf '\nsetup: %s\n' "$1" >&2
  exit 1
}

have_llvm() {
  local config
  for config in "${LLVM_SYS_221_PREFIX:+$LLVM_SYS_221_PREFIX/bin/llvm-config}" \
    "llvm-config-$llvm_major" llvm-config; do
    [ -n "$config" ] || continue
    case "$("$config" --version 2>/dev/null)" in
      "$llvm_major".*) [ -f "$("$config" --includedir)/llvm-c/Core.h" ] && return 0 ;;
    esac
  done
  return 1
}

missing_packages() {
  local package
  for package in "${system_packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || printf '%s\n' "$package"
  done
}

explain_llvm() {
  fail "LLVM $llvm_major with development files was not found, and it cannot be installed from here${1:+ ($1)}.
Install it and run the command again:
  Debian 12 or later:  apt-get install ${system_packages[*]}
  Ubuntu 24.04:        add the LLVM project's package archive for your release (its script: \`llvm.sh $llvm_major\`),
                       then the same packages as above
  Fedora:              dnf install llvm-devel llvm-static polly-devel zlib-devel libzstd-devel (release with LLVM $llvm_major)
  anywhere:            any LLVM $llvm_major install; set LLVM_SYS_221_PREFIX to its prefix"
}

# Sets `as_root` to what runs a command as root: nothing, or sudo.
as_root=()
find_root() {
  [ "$(id -u)" -eq 0 ] && return 0
  command -v sudo >/dev/null || return 1
  as_root=(sudo)
}

apt_install() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

setup_system() {
  command -v cargo >/dev/null || fail "cargo was not found: install Rust (1.89 or later) with rustup or your distribution"
  command -v python3 >/dev/null || fail "python3 was not found: install Python 3.10 or later"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or later is needed; this is $(python3 --version)"
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    have_llvm || explain_llvm "no apt-get"
    return
  fi
  local missing
  mapfile -t missing < <(missing_packages)
  [ "${#missing[@]}" -gt 0 ] || return 0
  # An LLVM from elsewhere, a compiler and venv: nothing to install.
  if have_llvm && command -v cc >/dev/null && python3 -c 'import ensurepip' 2>/dev/null; then
    return 0
  fi
  find_root || explain_llvm "not root, and no sudo"
  printf 'setup: installing %s\n' "${missing[*]}"
  "${as_root[@]}" apt-get update -qq || fail "apt-get update failed"
  apt-cache show "llvm-$llvm_major-dev" >/dev/null 2>&1 || have_llvm || explain_llvm "apt's sources do not offer llvm-$llvm_major-dev"
  apt_install "${missing[@]}" || fail "apt-get install failed; the packages are: ${missing[*]}"
  have_llvm || explain_llvm "apt-get installed its packages, but llvm-config-$llvm_major does not answer"
}

setup_python() { # name of the requirements, folder of the virtual environment
  local requirements="python/requirements-$1.txt" venv="$2" stamp
  [ -f "$requirements" ] || fail "there is no $requirements"
  if ! [ -x "$venv/bin/python" ]; then
    python3 -m venv "$venv" || fail "python3 -m venv failed (Debian and Ubuntu: install python3-venv)"
  fi
  # The stamp holds everything that decides what is installed: the files' text and the interpreter.
  stamp="$venv/.installed-$1-$( (cat python/requirements-*.txt; "$venv/bin/python" --version) | sha256sum | cut -c1-16)"
  [ -f "$stamp" ] && return 0
  printf 'setup: installing the Python packages of %s\n' "$requirements"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" \
    || fail "pip could not install $requirements"
  touch "$stamp"
}

setup_torch() {
  local venv=.venv-torch index=https://download.pytorch.org/whl/cpu pinned
  [ -z "${TILEWRIGHT_TORCH_PYTHON:-}" ] || return 0
  if [ "$(uname -s)" = Linux ] && ! [ -x "$venv/bin/python" ]; then
    python3 -m venv "$venv" || fail "python3 -m venv failed (Debian and Ubuntu: install python3-venv)"
    mapfile -t pinned < <(grep -E '^torch(vision)?==' python/requirements-torch.txt)
    # One short try: the requirements below are then met but for the rest, or not at all.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 15 --index-url "$index" \
      "${pinned[@]/%/+cpu}" 2>/dev/null \
      || printf 'setup: no build of PyTorch for processors alone is in reach; installing the one of the registry\n'
  fi
  setup_python torch "$venv"
}

setup_browser() {
  local name
  for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && return 0
  done
  command -v apt-get >/dev/null && find_root || fail "no Chromium was found: install it (package chromium)"
  printf 'setup: installing chromium\n'
  "${as_root[@]}" apt-get update -qq && apt_install chromium || fail "apt-get could not install chromium"
}

setup_docs() {
  command -v mdbook >/dev/null && return 0
  printf 'setup: installing mdbook\n'
  cargo install --quiet --locked "mdbook@$mdbook_version" || fail "cargo could not install mdbook"
  command -v mdbook >/dev/null || fail "mdbook is installed, but cargo's bin folder is not on PATH"
}

[ $# -gt 0 ] || set -- system
for part in "$@"; do
  case "$part" in
    system) setup_system ;;
    test)
      setup_python test .venv
      setup_python gpu-check .venv
      ;;
    torch) setup_torch ;;
    jax) setup_python jax .venv-jax ;;
    demo | bench | wheel) setup_python "$part" .venv ;;
    triton) [ "$(uname -s)" != Linux ] || setup_python triton .venv-triton ;;
    browser) setup_browser ;;
    docs) setup_docs ;;
    *) fail "unknown part '$part' (system, test, wheel, torch, jax, demo, bench, triton, browser, docs)" ;;
  esac
done
