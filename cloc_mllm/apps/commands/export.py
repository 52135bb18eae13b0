"""`cloc-mllm export`: write a checkpoint in a layout other programs load."""

from __future__ import annotations

import argparse

EPILOG = """\
example:
  cloc-mllm export runs/demo/encoders/cloc/export --format clip --out cloc-tower

formats:
  clip   the image tower as a stock CLIPVisionModel, with its image processor: a drop-in replacement for CLIP's"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint in a layout other programs load",
        description="Write a checkpoint in a layout that other programs load.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="M", help="the checkpoint's folder (export/ of a run)")
    parser.add_argument("--format", required=True, choices=("clip",), help="see below")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the export and print where it lies."""
    from cloc_mllm.apps.export import export_clip

    print(export_clip(args.model, args.out))
    return 0
