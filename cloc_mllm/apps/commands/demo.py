"""`cloc-mllm demo`: the whole path once, from data to chat, and a report of what came out."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

EPILOG = """\
examples:
  cloc-mllm demo                                   # quick: 2 processes, at most 10 minutes on 2 idle cores
  cloc-mllm demo --preset reproduce --out runs/reproduce
  cloc-mllm demo --llm smollm2 --out runs/smollm2  # a real language model behind the tower (extra: demo)

Stages that are done are not done again: after an interruption, give the same command."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "demo",
        help="run the whole path once, from data to chat, and write a report",
        description="Make scenes, pre-train encoders, align and tune MLLMs, score them, write report.html.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything goes (default: runs/demo)")
    parser.add_argument(
        "--preset",
        default="quick",
        choices=("quick", "reproduce", "miniature"),
        help="quick: CLIP against CLOC, one seed; reproduce: all controls, three seeds; "
        "miniature: a few steps, to see that every part runs (default: quick)",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="processes of a training stage (default: preset's)")
    parser.add_argument("--llm", default="scratch", choices=("scratch", "smollm2"), help="the language model")
    parser.add_argument("--seed", type=int, metavar="S", help="first seed (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="do every stage anew")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 1 if a stage fails, after the end of its log was shown."""
    from cloc_mllm.apps.demo.plan import make_plan, with_language_model
    from cloc_mllm.apps.demo.progress import Progress
    from cloc_mllm.apps.demo.runner import run_demo
    from cloc_mllm.apps.demo.stages import StageFailedError

    # `kill` and a closed terminal end the stages too, as Ctrl-C does: left alone they would go on for minutes.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    plan = make_plan(args.preset, world_size=args.world_size, seed=args.seed)
    if args.llm == "smollm2":
        from cloc_mllm.apps.demo.smollm2 import unpacked_smollm2

        plan = with_language_model(plan, str(unpacked_smollm2(say=Progress(sys.stderr).say)))
    try:
        page = run_demo(plan, args.out, fresh=args.fresh, progress=Progress(sys.stderr))
    except StageFailedError as error:
        print(f"cloc-mllm: {error}", file=sys.stderr)
        return 1
    print(page)
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
