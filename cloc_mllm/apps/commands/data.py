"""`cloc-mllm data`: make scenes, convert public data sets, build questions of them, inspect what a set holds."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from cloc_mllm.apps.commands import data_inspection
from cloc_mllm.data.builders import BUILDERS
from cloc_mllm.data.importers import IMPORTERS

_EPILOG = """examples:
  cloc-mllm data scenes --n 10000 --seed 0 --preset quick --out data/scenes
  cloc-mllm data convert coco --images train2017 --instances instances.json --captions captions.json --out data/coco
  cloc-mllm data build referring data/coco --out data/coco-referring
  cloc-mllm data check data/scenes --draw sheet.png
  cloc-mllm data stats data/scenes --html stats.html
  cloc-mllm data leaks data/train --eval data/test
"""


def add_parser(subparsers: Any) -> None:
    """Adds `data` and its sub-commands to the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("data", help="make, convert and inspect data", description=__doc__, epilog=_EPILOG)
    parser.formatter_class = raw
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    scenes = commands.add_parser(
        "scenes",
        help="draw procedural scenes",
        formatter_class=raw,
        epilog="example:\n  cloc-mllm data scenes --n 10000 --seed 0 --preset full --workers 2 --out data/scenes",
    )
    scenes.add_argument("--out", required=True, type=Path, help="folder to write to")
    scenes.add_argument("--n", type=int, default=10_000, help="pictures to train on (default: %(default)s)")
    scenes.add_argument("--n-val", type=int, help="pictures to validate on (default: a tenth of --n)")
    scenes.add_argument("--n-test", type=int, help="pictures to test on (default: a tenth of --n)")
    scenes.add_argument("--seed", type=int, default=0, help="decides everything (default: %(default)s)")
    scenes.add_argument("--preset", default="quick", help="vocabulary and difficulty: quick or full (default: quick)")
    scenes.add_argument("--size", type=int, default=96, help="width and height in pixels (default: %(default)s)")
    scenes.add_argument("--image-format", default="jpg", choices=("jpg", "png"), help="default: %(default)s")
    scenes.add_argument("--workers", type=int, default=1, help="processes that draw; changes nothing but the time")
    scenes.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    scenes.set_defaults(run=_scenes)

    convert = commands.add_parser("convert", help="convert a public data set")
    kinds = convert.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, name in IMPORTERS.items():
        module = importlib.import_module(name)
        command = kinds.add_parser(kind, help=module.SUMMARY, description=module.__doc__, formatter_class=raw)
        command.epilog = f"example:\n  {module.EXAMPLE}"
        module.add_arguments(command)
        command.set_defaults(run=_convert, importer=name)

    build = commands.add_parser("build", help="make conversations and questions of region-text data")
    kinds = build.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name in BUILDERS:
        module = importlib.import_module(name)
        for kind, summary in module.SUMMARIES.items():
            command = kinds.add_parser(kind, help=summary, description=module.__doc__, formatter_class=raw)
            command.epilog = f"example:\n  {module.EXAMPLES[kind]}"
            module.add_arguments(command, kind)
            command.set_defaults(run=_build, builder=name)

    data_inspection.add_parsers(commands)


def _scenes(args: argparse.Namespace) -> int:
    import time

    from cloc_mllm.data.scenes.generator import generate_scenes

    start = time.perf_counter()
    summary = generate_scenes(
        args.out,
        args.preset,
        args.n,
        args.seed,
        n_val=args.n_val,
        n_test=args.n_test,
        workers=args.workers,
        side=args.size,
        image_format=args.image_format,
        overwrite=args.overwrite,
    )
    seconds = time.perf_counter() - start
    total = sum(summary["counts"].values())
    parts = ", ".join(f"{count} {split}" for split, count in summary["counts"].items())
    pairs = ", ".join(f"{colour} {shape}" for shape, colour in summary["heldout_pairs"])
    print(f"{total} scenes ({parts}) in {seconds:.1f} s, {total / seconds:.0f} images/s: {args.out}")
    print(f"in the test split only: {pairs}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    return _print_counts(args, importlib.import_module(args.importer).convert(args))


def _build(args: argparse.Namespace) -> int:
    return _print_counts(args, importlib.import_module(args.builder).build(args))


def _print_counts(args: argparse.Namespace, result: dict[str, Any]) -> int:
    for name, count in result["counts"].items():
        print(f"{name.replace('_', ' '):36} {count}")
    print(f"written to {args.out} ({result['format']})")
    return 0
