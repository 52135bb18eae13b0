#!/usr/bin/env bash
# One node, one process a GPU: torchrun.
#
#   bash scripts/launch/torchrun.sh 8 train/pretrain_cloc.py --config train/configs/pretrain_quick.yaml run.zero=2
#   bash scripts/launch/torchrun.sh 8 train/pretrain_cloc.py --config … --resume auto      # go on if there is something
#
# The first word is the number of processes, the second a program of train/; the rest is for the program.
# Variables a person may set:
#   PYTHON          the interpreter (default: .venv of the repository, else python3)
#   MAX_RESTARTS    how often a run that failed is started again, with --resume auto (default: 0)

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ $# -ge 2 ] || fail "usage: $0 PROCESSES PROGRAM [ARGUMENTS]; see the head of this file"
processes="$1" program="$2"
shift 2
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES is '$processes', not a positive number"
[ -f "$program" ] || fail "there is no program $program"
restarts="${MAX_RESTARTS:-0}"
[[ "$restarts" =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS is '$restarts', not a number"

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$ROOT/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || fail "there is no interpreter $PYTHON; set PYTHON"

# A process that is started again has to find what the one before it has done.
[ "$restarts" -eq 0 ] || [[ " $* " == *" --resume"* ]] || set -- "$@" --resume auto

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" --max-restarts "$restarts" \
  "$program" "$@"
