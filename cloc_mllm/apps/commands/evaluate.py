"""`cloc-mllm eval`: score a checkpoint on a suite, compare two reports, lay reports out beside the paper's tables."""

from __future__ import annotations

import argparse
from typing import Any

from cloc_mllm.evaluation.suites.registry import SUITES, run_suite

_EPILOG = """examples:
  cloc-mllm eval scenes --model runs/cloc/export --data data/scenes --out runs/cloc/eval
  cloc-mllm eval scenes --model runs/mllm/export --data data/scenes --limit 400 --out runs/mllm/eval
  cloc-mllm eval region --model runs/cloc/export --data data/coco --out runs/cloc/coco --method prompter
  cloc-mllm eval image --model openai/clip-vit-base-patch16 --data data/coco --set captions=5 --out runs/clip/retrieval
  cloc-mllm eval detection --model runs/cloc/export --data data/coco --set categories=ov-coco --out runs/cloc/ov_coco
  cloc-mllm eval compare runs/clip/eval runs/cloc/eval --out runs/compared
"""


def add_parser(subparsers: Any) -> None:
    """Add `eval` to the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "eval", help="score an encoder or an MLLM on a suite", description=__doc__, epilog=_EPILOG, formatter_class=raw
    )
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    for suite in SUITES.values():
        _add_options(
            suites.add_parser(
                suite.name, help=suite.summary, description=suite.summary, epilog=_EPILOG, formatter_class=raw
            )
        )
    compare = suites.add_parser(
        "compare",
        help="two reports of one suite side by side: differences, their significance, answers that differ",
        epilog="example:\n  cloc-mllm eval compare runs/clip/eval runs/cloc/eval --out runs/compared",
        formatter_class=raw,
    )
    compare.add_argument("first", metavar="A", help="folder of a report")
    compare.add_argument("second", metavar="B", help="folder of a report of the same suite on the same data")
    compare.add_argument("--out", required=True, metavar="DIR", help="folder for comparison.json, .md and .html")
    compare.add_argument("--seed", type=int, default=0, help="of every interval and test (default: %(default)s)")
    compare.set_defaults(run=run_compare)
    paper = suites.add_parser(
        "paper",
        help="the paper's five tables, its figures beside those of your reports",
        epilog="example:\n  cloc-mllm eval paper runs/cloc runs/clip --out runs/paper",
        formatter_class=raw,
    )
    paper.add_argument("reports", nargs="*", metavar="DIR", help="folders with reports of suites, at any depth")
    paper.add_argument(
        "--open-llava-next",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders with reports of models that were tuned by that recipe, for the fifth table",
    )
    paper.add_argument("--out", required=True, metavar="DIR", help="folder for paper.md, .html and .json")
    paper.set_defaults(run=run_paper)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what all suites take."""
    parser.add_argument("--model", required=True, metavar="M", help="a checkpoint folder; see docs/evaluation.md")
    parser.add_argument("--data", metavar="D", help="scenes: folder of all splits; otherwise the suite's data")
    parser.add_argument("--split", metavar="S", help="scenes: train, validation or test (default: test)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.json, .md and .html")
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


def run_compare(args: argparse.Namespace) -> int:
    """Compare two reports and print the differences."""
    from cloc_mllm.apps.outputs import prepare_output_folder
    from cloc_mllm.evaluation.reporting.compare import compare_reports

    found = compare_reports(args.first, args.second, prepare_output_folder(args.out), seed=args.seed)
    for name, row in found["metrics"].items():
        if "difference" in row:
            entry = row["difference"]
            low, high = (f"{100 * end:+.1f}" for end in entry["ci95"])
            print(f"{name:28s} {100 * entry['value']:+6.1f}   [{low}, {high}]   p={entry['p_value']:.4f}")
        else:
            print(f"{name:28s}      –   {row['why_not']}")
    print(f"{args.out}/comparison.html")
    return 0


def run_paper(args: argparse.Namespace) -> int:
    """Lay reports out beside the paper's tables."""
    from cloc_mllm.apps.outputs import prepare_output_folder
    from cloc_mllm.evaluation.reporting.paper import write_paper

    for table in write_paper(args.reports, prepare_output_folder(args.out), args.open_llava_next):
        filled = sum(cell != "–" for row in table["rows"] if row["ours"] for cell in row["cells"])
        print(f"{table['title']}: {filled} cells of ours")
    print(f"{args.out}/paper.md")
    return 0
