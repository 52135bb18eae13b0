"""LVIS v1 as region-text samples: COCO's pictures, 1,203 categories with long-tailed names.

Source: https://www.lvisdataset.org/dataset; annotations CC BY 4.0. Boxes there are [x, y, width, height] in pixels of
the picture. Pictures are COCO 2017's: `--images` is the folder that holds `train2017` and `val2017` (LVIS splits them
in its own way).

Policy beyond COCO's: a category's text is its name without underscores and without what stands in brackets after it
("bow_(weapon)" is "bow"). Without `--captions` the sample's caption is made of those names.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path, PurePosixPath
from typing import Any

from cloc_mllm.data.importers.coco import CocoSource, add_masks_argument
from cloc_mllm.data.importers.conversion import ConvertOptions, add_common_arguments
from cloc_mllm.data.importers.conversion import convert as convert_source

SUMMARY = "LVIS v1: boxes with 1,203 category names on COCO's pictures"
EXAMPLE = "cloc-mllm data convert lvis --images coco --instances lvis_v1_train.json --out data/lvis"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert lvis`."""
    parser.add_argument("--instances", required=True, type=Path, help="lvis_v1_*.json")
    parser.add_argument("--captions", type=Path, help="COCO's captions file of the same pictures")
    add_masks_argument(parser)
    add_common_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_source(LvisSource(args.instances, args.captions, args.masks), ConvertOptions.of(args))


class LvisSource(CocoSource):
    """LVIS's JSON."""

    kind = "lvis"
    expected = {
        "lvis_v1_train": {"images_listed": 100_170, "categories": 1_203},
        "lvis_v1_val": {"images_listed": 19_809, "categories": 1_203},
    }

    def category_name(self, item: dict[str, Any]) -> str:
        """Return `trash can` for `trash_can`, `bow` for `bow_(weapon)`."""
        return _spoken(item["name"])

    def synonyms(self, item: dict[str, Any]) -> list[str]:
        """Return the category's name and its synonyms, each once."""
        return list(dict.fromkeys([self.category_name(item), *map(_spoken, item.get("synonyms", ()))]))

    def file_name(self, item: dict[str, Any]) -> str:
        """Return `train2017/000000391895.jpg` from the picture's address."""
        return str(item["file_name"]) if "file_name" in item else "/".join(PurePosixPath(item["coco_url"]).parts[-2:])


def _spoken(name: Any) -> str:
    return re.sub(r"_?\(.*?\)", "", str(name)).replace("_", " ").strip()
