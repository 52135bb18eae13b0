#!/usr/bin/env bash
# Several nodes from a hostfile, with DeepSpeed's launcher.
#
#   bash scripts/launch/hostfile.sh HOSTFILE train/pretrain_cloc.py --config … run.zero=2
#       from one node, which reaches the others by pdsh over ssh without a password
#   bash scripts/launch/hostfile.sh HOSTFILE --no_ssh 3 train/pretrain_cloc.py --config … run.zero=2
#       on every node, each with its own number: its line in the hostfile, counted from 0 (containers, Kubernetes)
#
# A hostfile names a node a line, with its number of GPUs:
#   worker-0 slots=8
#   worker-1 slots=8
# The repository and the run folder (run.output) have to lie at the same place on all nodes, on shared storage.
# Variables a person may set:
#   PYTHON          the interpreter (default: .venv of the repository, else python3)
#   MASTER_ADDR     the node where the processes meet (default: the first of the hostfile)
#   MASTER_PORT     and the port there (default: 29500)
# pdsh passes on variables that begin with PYTHON or NCCL; for others write VAR=VALUE lines into .deepspeed_env.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

[ $# -ge 2 ] || fail "usage: $0 HOSTFILE [--no_ssh NODE] PROGRAM [ARGUMENTS]; see the head of this file"
hostfile="$1"
shift
[ -f "$hostfile" ] || fail "there is no hostfile $hostfile"
entries="$(grep -vE '^[[:space:]]*(#.*)?$' "$hostfile" || true)"
[ -n "$entries" ] || fail "$hostfile names no node"
bad="$(grep -vE '^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*(#.*)?$' <<<"$entries" | head -n 1 || true)"
[ -z "$bad" ] || fail "$hostfile holds '$bad', which is not of the form 'node slots=8'"
twice="$(awk '{print $1}' <<<"$entries" | sort | uniq -d | head -n 1)"
[ -z "$twice" ] || fail "$hostfile names $twice twice"
nodes="$(wc -l <<<"$entries")"

node=""
if [ "$1" = --no_ssh ]; then
  [ $# -ge 3 ] || fail "--no_ssh needs the number of this node, then a program"
  node="$2"
  shift 2
  [[ "$node" =~ ^[0-9]+$ ]] && [ "$node" -lt "$nodes" ] || fail "this node is '$node', not a number from 0 to $((nodes - 1))"
else
  command -v pdsh >/dev/null || fail "pdsh is not installed; install it, or start this on every node with --no_ssh NODE"
fi
program="$1"
shift
[ -f "$program" ] || fail "there is no program $program"

if [ -z "${PYTHON:-}" ]; then
  PYTHON="$ROOT/.venv/bin/python"
  [ -x "$PYTHON" ] || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || fail "there is no interpreter $PYTHON; set PYTHON"

address="${MASTER_ADDR:-$(awk 'NR == 1 {print $1}' <<<"$entries")}"
options=(--hostfile "$hostfile" --master_addr "$address" --master_port "${MASTER_PORT:-29500}")
[ -z "$node" ] || options+=(--no_ssh --node_rank "$node")

exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" "$program" "$@"
