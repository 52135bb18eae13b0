# Shared by demo.sh and test.sh: the repository's own virtual environment, made and filled only when needed.
#
# Variables a person may set:
#   PYTHON       the interpreter to make the environment with (default: the first of python3, python3.13 … 3.10 that is new enough)
#   CLOC_VENV    where the environment lies (default: .venv in the repository)
#   TORCH_SPEC   what to ask pip for as PyTorch, e.g. TORCH_SPEC='torch==2.9.1' (default: see choose_torch)
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) hold as usual.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${CLOC_VENV:-$ROOT/.venv}"
VENV_PYTHON="$VENV/bin/python"
INSTALL_LOG="$VENV/install.log"

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# Print the first interpreter that is new enough.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
    if command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
    [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.10 or newer."
  done
  fail "no Python 3.10 or newer found. Install one, or name it: PYTHON=/path/to/python3 bash $0"
}

# Make the virtual environment unless a working one is there.
make_venv() {
  if "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 && is_new_enough "$VENV_PYTHON"; then
    return
  fi
  local python
  python="$(find_python)"
  "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    fail "$python lacks the venv module. On Debian or Ubuntu: apt-get install python3-venv"
  say "making a virtual environment in $VENV with $("$python" --version)"
  "$python" -m venv --clear "$VENV" || fail "cannot make $VENV. Name another place: CLOC_VENV=/some/folder bash $0"
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; }

# Print what to ask pip for as PyTorch. On Linux the default build carries CUDA, several GB of it; where no NVIDIA GPU is
# and one of pip's configured sources offers a CPU build, take the newest of those instead.
choose_torch() {
  local required lowest cpu_build
  required="$(sed -n 's/^ *"\(torch[><=!~][^"]*\)".*/\1/p' "$ROOT/pyproject.toml" | head -n 1)"
  if [ -n "${TORCH_SPEC:-}" ]; then
    echo "$TORCH_SPEC"
  elif [ "$(uname -s)" != Linux ] || has_nvidia_gpu; then
    echo "$required"
  else
    lowest="$(echo "$required" | sed -n 's/^torch>=\([0-9.]*\).*/\1/p')"
    cpu_build="$("$VENV_PYTHON" -m pip index versions torch 2>/dev/null | grep -o '[0-9.]*+cpu' | head -n 1 || true)"
    if [ -n "$cpu_build" ] && [ "$(printf '%s\n' "$lowest" "${cpu_build%+cpu}" | sort -V | head -n 1)" = "$lowest" ]; then
      echo "torch==$cpu_build"
    else
      say "no NVIDIA GPU here, and none of pip's sources offers a CPU build of PyTorch: the default build may take"
      say "several GB. To avoid it, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU builds, or set TORCH_SPEC."
      echo "$required"
    fi
  fi
}

run_pip() {
  "$VENV_PYTHON" -m pip install --disable-pip-version-check "$@" >>"$INSTALL_LOG" 2>&1 || {
    tail -n 25 "$INSTALL_LOG" >&2
    fail "pip failed; the whole log is in $INSTALL_LOG"
  }
}

# install_package EXTRAS: install the repository (editable) with these extras, unless the same was done before.
# The stamp covers all that decides what gets installed, so a changed pyproject.toml or a moved folder installs anew.
install_package() {
  local extras="$1" stamp="$VENV/.installed-${1:-base}" fingerprint started torch
  # One script at a time: a second one waits here, then finds the work done.
  exec 9<"$ROOT/pyproject.toml"
  if command -v flock >/dev/null 2>&1; then flock 9; fi
  make_venv
  fingerprint="$( (echo "$ROOT $extras ${TORCH_SPEC:-} $("$VENV_PYTHON" --version)"; cat "$ROOT/pyproject.toml") | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
    [ -w "$VENV" ] || fail "no permission to install into $VENV. Name another place: CLOC_VENV=/some/folder bash $0"
    started=$SECONDS
    : >"$INSTALL_LOG"
    if [ -n "${TORCH_SPEC:-}" ] || ! "$VENV_PYTHON" -c 'import torch' >/dev/null 2>&1; then
      torch="$(choose_torch)"
      say "installing $torch (log: $INSTALL_LOG)"
      run_pip "$torch"
    fi
    say "installing cloc-mllm${extras:+[$extras]} and what it needs; a few minutes the first time"
    run_pip --editable "$ROOT${extras:+[$extras]}"
    echo "$fingerprint" >"$stamp"
    say "installed in $((SECONDS - started)) s"
  fi
  exec 9>&-
}

# install_lmms_eval: lmms-eval without what it depends on, for the tests of the `vqa` suite. Its dependencies take 7 GB (a
# second PyTorch among them, wandb, yt-dlp, linters); what the tests need of them is in the extra `dev`.
install_lmms_eval() {
  if ! "$VENV_PYTHON" -c 'import importlib.util as u; exit(u.find_spec("lmms_eval") is None)'; then
    say "installing lmms-eval without its dependencies"
    run_pip --no-deps 'lmms-eval>=0.7.3,<0.8'
  fi
}
