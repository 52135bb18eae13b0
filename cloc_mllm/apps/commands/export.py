"""`cloc-mllm export`: write a checkpoint in a layout other programs load."""

from __future__ import annotations

import argparse

EPILOG = """\
example:
  cloc-mllm export runs/demo/encoders/cloc/export --format clip --out cloc-tower
  cloc-mllm export runs/demo/encoders/cloc/export --format clip --part encoder --out cloc-clip
  cloc-mllm export runs/demo/mllm/cloc_prompter/instruct/export --format llava --out cloc-llava

formats:
  clip   of an encoder, the image tower as a stock CLIPVisionModel, or with --part encoder both sides as a CLIPModel
  llava  of an MLLM, tower, projector and language model as a stock LlavaForConditionalGeneration, for inference servers

What a layout has no place for is left out and named."""


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
    parser.add_argument("--format", required=True, choices=("clip", "llava"), help="see below")
    parser.add_argument("--part", choices=("tower", "encoder"), help="clip: what to write (default: tower)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the export, print where it lies and, on the lines before, what is not in it."""
    from cloc_mllm.errors import ClocError

    if args.format == "clip":
        from cloc_mllm.apps.exporters.clip import export_clip

        done = export_clip(args.model, args.out, args.part or "tower")
    else:
        if args.part is not None:
            raise ClocError("--part goes with --format clip only")
        from cloc_mllm.apps.exporters.llava import export_llava

        done = export_llava(args.model, args.out)
    for note in done.notes:
        print(note)
    print(done.folder)
    return 0
