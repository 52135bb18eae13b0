#!/usr/bin/env bash
#SBATCH --job-name=cloc-label
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
#
# Labelling under SLURM: the jobs of an array share the shards out; the last one to end writes dataset.json and the report.
#
#   sbatch --array 0-15 --gpus 1 --time 24:00:00 scripts/launch/slurm_label.sh photos --out data/photos --config …
#
# Submit from the root of the repository; source and output folder have to lie on shared storage with locks (flock).
# Every job of the array gets the same arguments, those of `cloc-mllm label`. A job that is preempted goes back into the
# queue and on where it was; one that failed is submitted again, alone or with the others: what is done is not done again.
# Variables a person may set (sbatch --export=ALL,NAME=VALUE):
#   PYTHON            the interpreter (default: .venv of the repository, else python3)

set -euo pipefail

# SLURM runs a copy of this file: where it lies says nothing.
ROOT="${SLURM_SUBMIT_DIR:-$PWD}"
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "this is for sbatch --array; on one machine use cloc-mllm label"
[ $# -ge 1 ] || fail "usage: sbatch --array 0-N [OPTIONS] $0 SOURCE --out DIR [ARGUMENTS]; see the head of this file"
first="${SLURM_ARRAY_TASK_MIN:-0}" last="${SLURM_ARRAY_TASK_MAX:-$SLURM_ARRAY_TASK_ID}"
parts=$((last - first + 1))
[ "$parts" -eq "${SLURM_ARRAY_TASK_COUNT:-$parts}" ] || fail "the numbers of the array have to follow each other, as in 0-15"
cd "$ROOT"

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$ROOT/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi
exec "$PYTHON" -m cloc_mllm.apps.cli label "$@" --shards "$((SLURM_ARRAY_TASK_ID - first))/$parts"
