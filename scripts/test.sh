#!/usr/bin/env bash
# Run all tests on a fresh machine: make .venv if it is missing, install what is needed, run pytest.
#
#   bash scripts/test.sh                              # unit tests, integration tests, the demo in miniature
#   bash scripts/test.sh tests/unit -k boxes          # arguments go to pytest
#
# Lint, format and type checks are tests too (tests/unit/test_code_quality.py).

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install_package dev

# Tests compare CPU results, start several processes on few cores, and must not wait for a network.
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"
export HF_HUB_OFFLINE=1

say "running pytest $*"
cd "$ROOT"
exec "$VENV_PYTHON" -m pytest "$@"
