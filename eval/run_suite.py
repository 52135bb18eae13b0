"""Runs one suite from its YAML file: `python eval/run_suite.py eval/suites/scenes.yaml model=M data=D out=DIR`.

The file says what is measured, the `key=value` words say on which model; they win over the file. `cloc-mllm eval` does
the same from options alone.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the suite; exit code 2 with one line on stderr for bad usage or bad input."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    from cloc_mllm.errors import ClocError
    from cloc_mllm.evaluation.suites.options import options_from_yaml
    from cloc_mllm.evaluation.suites.registry import run_suite

    try:
        name, options = options_from_yaml(argv[0], argv[1:])
        report = run_suite(name, options, command=shlex.join(["python", "eval/run_suite.py", *argv]))
    except ClocError as error:
        print(f"run_suite: error: {error}", file=sys.stderr)
        return 2
    for metric, entry in report["metrics"].items():
        print(metric, entry["value"], entry["ci95"], entry["n"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
