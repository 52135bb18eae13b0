"""`cloc-mllm label`: region-text labels for pictures, by captions, their phrases, and open-vocabulary detection."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cloc_mllm.errors import ClocError

_EPILOG = """examples:
  cloc-mllm label photos --out data/photos --config scripts/labeling/vesl.yaml
  cloc-mllm label 'cc12m/*.tar' --out data/cc12m --detector owlv2:google/owlv2-base-patch16-ensemble filter.score=0.2
  cloc-mllm label photos --out data/photos --captioner hf:Salesforce/blip-image-captioning-base --on-bad-sample skip

captioners: existing, hf:MODEL, openai:ADDRESS, fuse        phrases: textblob, spacy, ngrams
detectors: owlv2:MODEL, grounding-dino:MODEL, cam:MODEL     or a module of your own: my_stages.blip:ARGUMENT

The same command goes on where a run was stopped. With another detector, captions and phrases are used again.
"""


def add_parser(subparsers: Any) -> None:
    """Add `label` to the command line."""
    parser = subparsers.add_parser(
        "label",
        help="label pictures with region texts",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of pictures, region-text data, or tar or Parquet shards"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--config", metavar="YAML", help="as scripts/labeling/vesl.yaml")
    parser.add_argument("--captioner", metavar="STAGE", help="default: existing")
    parser.add_argument("--phrases", metavar="STAGE", help="default: textblob")
    parser.add_argument("--detector", metavar="STAGE", help="default: owlv2:google/owlv2-base-patch16-ensemble")
    parser.add_argument("--format", choices=("parquet", "webdataset", "jsonl"), help="default: parquet")
    parser.add_argument("--shard", type=int, metavar="N", help="samples of the source to a shard (default: 1024)")
    parser.add_argument("--regions", choices=("ignore", "keep"), help="of the source (default: ignore)")
    parser.add_argument(
        "--on-bad-sample", choices=("error", "skip"), help="a sample that cannot be labelled (default: error)"
    )
    parser.add_argument("--engine", choices=("local", "ray"), help="default: local")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; 0: this one (default: one a GPU)")
    parser.add_argument("--devices", nargs="+", metavar="D", help="such as cuda:0 cuda:1 (default: all GPUs, or cpu)")
    parser.add_argument(
        "--shards", metavar="K/N", help="every N-th shard from the K-th on (from 0), beside N - 1 others"
    )
    parser.add_argument(
        "--finish", action="store_true", help="write dataset.json and report of shards that are all there"
    )
    parser.add_argument(
        "--overwrite", action="store_true", default=None, help="replace a finished set of other options"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Label what parsed arguments ask for, and print the counts."""
    part = _part(args.shards)
    if args.finish and part is not None:
        raise ClocError("--finish is of all shards, --shards of some", remedy="Give one of them.")
    from cloc_mllm.apps.outputs import prepare_output_folder
    from cloc_mllm.labeling.config import load_label_config
    from cloc_mllm.labeling.pipeline import label

    names = ("source", "format", "shard", "regions", "on_bad_sample", "engine", "workers", "devices", "overwrite")
    given = {name: getattr(args, name) for name in names}
    stages = {f"{name}.stage": getattr(args, name) for name in ("captioner", "phrases", "detector")}
    config = load_label_config(args.config, {**given, **stages, "out": args.out}, args.overrides)
    prepare_output_folder(config.out)
    result = label(config, part, finish_only=args.finish, progress=sys.stderr.isatty())
    if result is None:
        print(f"part {args.shards} is done; others are not yet: {args.out}")
        return 0
    for name, count in result["counts"].items():
        print(f"{name.replace('_', ' '):36} {count}")
    print(f"written to {args.out} ({result['format']}); see {args.out}/report.html")
    return 0


def _part(text: str | None) -> tuple[int, int] | None:
    """`K/N` as two numbers."""
    if text is None:
        return None
    numbers = text.split("/")
    if len(numbers) == 2 and all(number.isdigit() for number in numbers) and int(numbers[0]) < int(numbers[1]):
        return int(numbers[0]), int(numbers[1])
    raise ClocError(f"--shards is '{text}'", remedy="Write K/N with K from 0 to N - 1, as in 0/4.")
