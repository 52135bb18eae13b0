#!/usr/bin/env bash
#SBATCH --job-name=cloc
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# Several nodes under SLURM: one torchrun a node, under srun.
#
#   sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 scripts/launch/slurm.sh train/pretrain_cloc.py --config … run.zero=2
#
# Submit from the root of the repository; it and the run folder (run.output) have to lie on shared storage.
# The job is put back into the queue three minutes before its time is over, when it is preempted, and when it fails, and
# goes on from the last complete checkpoint then: `--resume auto` is always passed. Set run.save_every.
# Variables a person may set (sbatch --export=ALL,NAME=VALUE):
#   PYTHON            the interpreter (default: .venv of the repository, else python3)
#   PROCESSES         processes a node (default: what SLURM says of its GPUs, else 1)
#   MAX_REQUEUES      a job that failed is put back unless it has been so often already, for whatever reason (default: 3)

set -euo pipefail

# SLURM runs a copy of this file: where it lies says nothing.
ROOT="${SLURM_SUBMIT_DIR:-$PWD}"
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is for sbatch; on one node use scripts/launch/torchrun.sh"
[ $# -ge 1 ] || fail "usage: sbatch [OPTIONS] $0 PROGRAM [ARGUMENTS]; see the head of this file"
cd "$ROOT"
[ -f "$1" ] || fail "there is no program $1 in $ROOT; submit from the root of the repository"

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$ROOT/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi
# "8" or "a100:8"
gpus="${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
processes="${PROCESSES:-${gpus##*:}}"
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "cannot tell the processes a node from '$processes'; set PROCESSES"
requeues="${MAX_REQUEUES:-3}"
[[ "$requeues" =~ ^[0-9]+$ ]] || fail "MAX_REQUEUES is '$requeues', not a number"

hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}"
[ -n "$MASTER_ADDR" ] || fail "scontrol names no node for '$SLURM_JOB_NODELIST'"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
[[ " $* " == *" --resume"* ]] || set -- "$@" --resume auto

step=""
requeue() {
  printf '==> %s: job %s goes back into the queue\n' "$1" "$SLURM_JOB_ID" >&2
  [ -z "$step" ] || kill "$step" 2>/dev/null || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap 'requeue "the time is nearly over"' USR1

# $SLURM_NODEID differs from node to node: the task's shell fills it in, not this one.
# shellcheck disable=SC2016
task='port="$1" address="$2" processes="$3" python="$4"; shift 4
exec "$python" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
  --nproc_per_node "$processes" --master_addr "$address" --master_port "$port" "$@"'

# In the background, so that the trap above is heard while the job runs.
srun --kill-on-bad-exit=1 bash -c "$task" bash "$MASTER_PORT" "$MASTER_ADDR" "$processes" "$PYTHON" "$@" &
step=$! code=0
wait "$step" || code=$?
step=""
[ "$code" -ne 0 ] || exit 0
if [ "${SLURM_RESTART_COUNT:-0}" -lt "$requeues" ]; then
  requeue "the run failed with exit code $code"
fi
exit "$code"
