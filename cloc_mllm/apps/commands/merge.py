"""`cloc-mllm merge`: put an adapter on its base and write one checkpoint."""

from __future__ import annotations

import argparse

EPILOG = """\
example:
  cloc-mllm merge checkpoints/instruct/adapter --out merged

The base is the one the adapter names, or --base. Any other than the one it was trained on is refused: base.json in the
adapter's folder holds the shapes of the base's weights and hashes of some of their values."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "merge",
        help="put an adapter on its base and write one checkpoint",
        description="Put an adapter (LoRA or tokens) on its base and write one checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's folder (adapter/ of a run)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--base", metavar="DIR", help="the base, where it has moved")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, and print where the checkpoint lies."""
    from cloc_mllm.training.tuning.adapters import merge_adapter

    print(merge_adapter(args.adapter, args.out, args.base))
    return 0
