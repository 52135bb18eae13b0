"""`cloc-mllm data check|stats|draw|leaks|filter`: what a data set holds, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError

_PATH = "a .jsonl, .json, .parquet or .tar file, or a folder of them"
_DISTANCE = "bits of 64 in which the looks of two pictures may differ (default: %(default)s)"


def add_parsers(commands: Any) -> None:
    """Adds the sub-commands to `cloc-mllm data`."""
    check = _add(
        commands,
        "check",
        "list every fault of a data set",
        "cloc-mllm data check data/scenes --draw sheet.png\n\nExit code 2 if there is a fault.",
        _check,
    )
    check.add_argument("path", type=Path, help=_PATH)
    check.add_argument("--draw", type=Path, metavar="SHEET", help="also draw pictures with their boxes and texts")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_workers(check)

    stats = _add(
        commands,
        "stats",
        "faults, oddities, duplicates, lengths and sizes in one pass",
        "cloc-mllm data stats data/scenes --tokenizer openai/clip-vit-base-patch16 --html stats.html\n\n"
        "Exit code 0, faults or not: `data check` is the one that judges.",
        _stats,
    )
    stats.add_argument("path", type=Path, help=_PATH)
    stats.add_argument("--json", action="store_true", help="print the report as JSON")
    stats.add_argument("--html", type=Path, metavar="REPORT", help="also write a page with charts and pictures")
    stats.add_argument("--tokenizer", metavar="M", help="checkpoint or hub name: count tokens, not words alone")
    stats.add_argument(
        "--limit-tokens",
        type=int,
        metavar="N",
        help="tokens a text may have (default: 77 for captions and region texts, none for conversations)",
    )
    stats.add_argument("--distance", type=int, default=4, help=_DISTANCE)
    _add_workers(stats)

    draw = _add(
        commands,
        "draw",
        "draw a contact sheet: pictures with their boxes and texts",
        "cloc-mllm data draw data/scenes/train --out sheet.png --n 12 --seed 1",
        _draw,
    )
    draw.add_argument("path", type=Path, help=_PATH)
    draw.add_argument("--out", required=True, type=Path, metavar="SHEET", help="the picture to write")
    draw.add_argument("--n", type=int, default=24, help="most samples to show (default: %(default)s)")
    which = draw.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, help="draw them at random (default: evenly spread over each file)")
    which.add_argument("--ids", nargs="+", metavar="ID", help="show the samples of these ids")
    draw.add_argument("--font", type=Path, help="a .ttf or .otf file; Pillow's own font has plain Latin letters only")
    draw.add_argument("--cell", type=int, default=256, help="pixels of a picture's longer side (default: %(default)s)")
    _add_leaks(commands)

    clean = _add(
        commands,
        "filter",
        "write a data set without the samples of a list",
        "cloc-mllm data filter data/train --exclude leaks.jsonl --out data/clean",
        _filter,
    )
    clean.add_argument("path", type=Path, help=_PATH)
    clean.add_argument("--exclude", required=True, type=Path, help="ids, one a line, or a list of `data leaks`")
    clean.add_argument("--out", required=True, type=Path, help="folder to write to")
    clean.add_argument("--format", choices=("jsonl", "parquet", "webdataset"), help="default: that of each file")
    clean.add_argument("--copy-images", action="store_true", help="with jsonl: copy the pictures into OUT/images")


def _add_leaks(commands: Any) -> None:
    leaks = _add(
        commands,
        "leaks",
        "find pictures and texts of evaluation sets in a training set",
        "cloc-mllm data leaks data/train --eval data/test --mirrored --write-exclude leaks.jsonl\n\n"
        "Exit code 2 if there is a leak, unless --report-only.",
        _leaks,
    )
    leaks.add_argument("train", type=Path, help=f"the training set: {_PATH}")
    leaks.add_argument("--eval", required=True, nargs="+", type=Path, help="evaluation sets, the same")
    leaks.add_argument("--distance", type=int, default=4, help=_DISTANCE)
    leaks.add_argument("--mirrored", action="store_true", help="also find pictures seen in a mirror")
    leaks.add_argument(
        "--texts", default="count", choices=("count", "report", "skip"), help="texts as leaks (default: %(default)s)"
    )
    leaks.add_argument("--min-words", type=int, default=8, help="shorter texts do not count (default: %(default)s)")
    leaks.add_argument("--json", action="store_true", help="print the report as JSON")
    leaks.add_argument("--html", type=Path, metavar="REPORT", help="also write a page")
    leaks.add_argument("--write-exclude", type=Path, metavar="FILE", help="list the training samples to leave out")
    leaks.add_argument("--report-only", action="store_true", help="exit code 0 in any case")
    _add_workers(leaks)


def _add(commands: Any, name: str, summary: str, example: str, run: Any) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, formatter_class=raw, epilog=f"example:\n  {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes; changes nothing but the time")


def _check(args: argparse.Namespace) -> int:
    from cloc_mllm.data.inspection.check import check_data
    from cloc_mllm.data.inspection.sheet import draw_sheet

    report = check_data(args.path, workers=args.workers)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print("\n".join(report.lines()))
    sys.stdout.flush()
    if args.draw is not None:
        shown = draw_sheet(args.path, args.draw)
        print(f"drew {shown} samples: {args.draw}", file=sys.stderr)
    if report.faults:
        problem = f"{len(report.faults)} faults in {report.broken} of {report.samples} samples"
        raise ClocError(problem, file=args.path, remedy="Mend them, or train with on_bad_sample: skip.")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from cloc_mllm.apps.outputs import prepare_output_file
    from cloc_mllm.data.inspection.statistics import inspect_data

    if args.html is not None:
        prepare_output_file(args.html)
    tokenizer = None
    if args.tokenizer is not None:
        from cloc_mllm.training.pretraining.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
    found = inspect_data(
        args.path, tokenizer=tokenizer, limit=args.limit_tokens, distance=args.distance, workers=args.workers
    )
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from cloc_mllm.data.inspection.summary import summary_lines

        print("\n".join(summary_lines(found.to_dict())))
    if args.html is not None:
        from cloc_mllm.data.inspection.page import write_report

        write_report(found, args.html, _command_line())
        print(f"report: {args.html}", file=sys.stderr)
    return 0


def _command_line() -> str:
    return shlex.join(["cloc-mllm", *sys.argv[1:]])


def _draw(args: argparse.Namespace) -> int:
    from cloc_mllm.data.inspection.sheet import draw_sheet

    if args.n < 1 or args.cell < 32:
        raise ClocError(f"--n {args.n} --cell {args.cell}", remedy="Draw one sample or more, 32 pixels wide or more.")
    shown = draw_sheet(args.path, args.out, args.n, seed=args.seed, ids=args.ids, font=args.font, cell=args.cell)
    print(f"drew {shown} samples: {args.out}")
    return 0


def _leaks(args: argparse.Namespace) -> int:
    from cloc_mllm.apps.outputs import prepare_output_file
    from cloc_mllm.data.inspection.leaks import LeakOptions, find_leaks, write_exclude

    for file in (args.html, args.write_exclude):
        if file is not None:
            prepare_output_file(file)
    options = LeakOptions(args.distance, args.mirrored, args.texts, args.min_words, args.workers)
    report = find_leaks(args.train, args.eval, options)
    found = report.to_dict()
    print(json.dumps(found, indent=2) if args.json else "\n".join(_leak_lines(found)))
    if args.html is not None:
        from cloc_mllm.data.inspection.page import leak_pictures, write_leaks

        write_leaks(found, leak_pictures(report), args.html)
        print(f"report: {args.html}", file=sys.stderr)
    if args.write_exclude is not None:
        print(f"{write_exclude(report, args.write_exclude)} samples listed: {args.write_exclude}", file=sys.stderr)
    sys.stdout.flush()
    if report.leaks and not args.report_only:
        remedy = "Leave them out: --write-exclude FILE, then `cloc-mllm data filter`; or --report-only."
        raise ClocError(found["summary"], file=args.train, remedy=remedy)
    return 0


def _leak_lines(found: Mapping[str, Any]) -> list[str]:
    """Every hit on a line of its own, then the numbers of each set."""
    from cloc_mllm.data.inspection.summary import printable

    lines = []
    for hit in found["pictures"]["hits"]:
        how = hit["kind"] if hit["distance"] in (None, 0) else f"{hit['kind']}, {hit['distance']} bits apart"
        lines.append(f"{_where(hit['evaluation'])} is {_where(hit['training'])} ({how})")
    for hit in found["texts"]["hits"]:
        text = json.dumps(hit["text"], ensure_ascii=False)
        lines.append(f"{_where(hit['evaluation'])} has the text of {_where(hit['training'])}: {text}")
    for each in found["sets"]:
        kinds = ", ".join(f"{number} {kind}" for kind, number in each["by_kind"].items() if number) or "none"
        counts = f"{each['pictures']} pictures, in the training set: {kinds}"
        lines.append(f"{each['path']}: {counts}; texts: {each['texts']}, formulas apart: {each['formulas']}")
    lines.append(f"{found['summary']}; {found['training_samples_to_leave_out']} training samples to leave out")
    return [printable(line) for line in lines]


def _where(place: Mapping[str, Any]) -> str:
    return f"{place['file']}: sample '{place['sample']}'"


def _filter(args: argparse.Namespace) -> int:
    from cloc_mllm.apps.outputs import empty_output_folder
    from cloc_mllm.data.inspection.exclusion import filter_data

    out = empty_output_folder(args.out)
    counts = filter_data(args.path, args.exclude, out, file_format=args.format, copy_images=args.copy_images)
    print(f"{counts.read} samples read, {counts.left_out} left out, {counts.written} written to {args.out}")
    if counts.unmatched:
        print(f"{counts.unmatched} lines of {args.exclude} name no sample of {args.path}", file=sys.stderr)
    return 0
