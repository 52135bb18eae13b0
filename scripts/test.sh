#!/usr/bin/env bash
# Run all tests on a fresh machine: make .venv if it is missing, install what is needed, run pytest.
#
#   bash scripts/test.sh                              # unit tests, integration tests, the demo in miniature
#   bash scripts/test.sh tests/unit -k boxes          # arguments go to pytest
#   TEST_WORKERS=1 bash scripts/test.sh               # unit tests at a time (default: as many as cores, at most 4)
#
# Lint, format and type checks are tests too (tests/unit/test_code_quality.py).

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install_package dev
install_lmms_eval

# Tests compare CPU results, start several processes on few cores, and must not wait for a network.
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"
export HF_HUB_OFFLINE=1

cd "$ROOT"
if [ $# -gt 0 ]; then
  say "running pytest $*"
  exec "$VENV_PYTHON" -m pytest "$@"
fi

# Integration tests start processes of their own, so they take turns; the unit tests share out the cores.
cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
workers="${TEST_WORKERS:-$((cores < 4 ? cores : 4))}"
failed=0
say "running the integration tests, and the demo in miniature"
"$VENV_PYTHON" -m pytest tests/integration || failed=1
say "running the unit tests, $workers at a time"
"$VENV_PYTHON" -m pytest -n "$workers" tests/unit || failed=1
exit "$failed"
