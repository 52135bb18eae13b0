"""`cloc-mllm eval`: score a checkpoint on a suite and write `report.json` and `report.md`."""

from __future__ import annotations

import argparse
from typing import Any

from cloc_mllm.evaluation.suites.registry import SUITES, find_suite, run_suite

_EPILOG = """examples:
  cloc-mllm eval scenes --model runs/cloc/export --data data/scenes --out runs/cloc/eval
  cloc-mllm eval scenes --model runs/mllm/export --data data/scenes --limit 400 --out runs/mllm/eval
  cloc-mllm eval region --model runs/cloc/export --data data/coco --out runs/cloc/coco --method prompter
  cloc-mllm eval image --model openai/clip-vit-base-patch16 --data data/coco --set captions=5 --out runs/clip/retrieval
  cloc-mllm eval detection --model runs/cloc/export --data data/coco --set categories=ov-coco --out runs/cloc/ov_coco

suites:
"""


def add_parser(subparsers: Any) -> None:
    """Add `eval` to the command line."""
    parser = subparsers.add_parser(
        "eval",
        help="score an encoder or an MLLM on a suite",
        description=__doc__,
        epilog=_EPILOG + "".join(f"  {suite.name:14s} {suite.summary}\n" for suite in SUITES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", metavar="SUITE", help="which suite; see below")
    parser.add_argument("--model", required=True, metavar="M", help="a checkpoint folder; see docs/evaluation.md")
    parser.add_argument("--data", metavar="D", help="scenes: folder of all splits; otherwise the suite's data")
    parser.add_argument("--split", metavar="S", help="scenes: train, validation or test (default: test)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.json and report.md")
    parser.add_argument(
        "--method",
        choices=("prompter", "roi", "value", "crop"),
        help="encoders: read regions in this way only (default: the Prompter, or without one every way)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="a setting of that suite alone; may be given several times",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="images, or questions of each task (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw and interval (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images or questions at a time")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="MLLMs: default %(default)s")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code in the checkpoint run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the suite that parsed arguments ask for and print its table."""
    import shlex
    import sys

    from cloc_mllm.apps.outputs import prepare_output_folder
    from cloc_mllm.evaluation.suites.options import EvalOptions, settings_from_words

    find_suite(args.suite)
    options = EvalOptions(
        model=args.model,
        data=args.data,
        out=str(prepare_output_folder(args.out)),
        split=args.split,
        method=args.method,
        limit=args.limit,
        seed=args.seed,
        device=args.device,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        trust_remote_code=args.trust_remote_code,
        settings=settings_from_words(args.settings),
    )
    report = run_suite(args.suite, options, command=shlex.join(["cloc-mllm", *sys.argv[1:]]))
    for name, entry in report["metrics"].items():
        if entry["value"] is not None:
            low, high = ("–" if end is None else f"{100 * end:.1f}" for end in entry["ci95"])
            print(f"{name:28s} {100 * entry['value']:6.1f}   [{low}, {high}]   n={entry['n']}")
    print(f"{options.out}/report.md")
    return 0
