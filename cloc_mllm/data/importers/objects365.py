"""Objects365 (v2) as region-text samples: 365 categories, COCO's layout.

Source: https://www.objects365.org/download.html; annotations CC BY 4.0. Boxes there are [x, y, width, height] in pixels
of the picture; pictures lie in folders `patch0`, `patch1`, … and `file_name` names them as `images/v1/patch8/….jpg`.

Three pictures that the training annotations list were never published (patch16/objects365_v2_00908726.jpg and
patch6/objects365_v1_00320532.jpg, …534.jpg), so 1,742,289 of 1,742,292 can be converted: `--on-bad-sample skip`.

Policy beyond COCO's: `--images` is the folder that holds the patches; boxes of groups (`iscrowd`: 1) are left out; the
caption is made of the names of what is there, since the set has none.
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath
from typing import Any

from cloc_mllm.data.importers.coco import CocoSource
from cloc_mllm.data.importers.conversion import ConvertOptions, add_common_arguments
from cloc_mllm.data.importers.conversion import convert as convert_source

SUMMARY = "Objects365: boxes with 365 category names"
EXAMPLE = "cloc-mllm data convert objects365 --images train --instances zhiyuan_objv2_train.json --out data/objects365"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert objects365`."""
    parser.add_argument("--instances", required=True, type=Path, help="zhiyuan_objv2_*.json")
    add_common_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_source(Objects365Source(args.instances), ConvertOptions.of(args))


class Objects365Source(CocoSource):
    """Objects365's JSON."""

    kind = "objects365"
    expected = {
        "zhiyuan_objv2_train": {"images_listed": 1_742_292, "categories": 365},
        "zhiyuan_objv2_val": {"images_listed": 80_000, "categories": 365},
    }

    def category_name(self, item: dict[str, Any]) -> str:
        """Return the name in lower case; of alternatives such as `Pot/Pan` the first."""
        return str(item["name"]).split("/")[0].strip().lower()

    def file_name(self, item: dict[str, Any]) -> str:
        """Return `patch8/objects365_v1_00420917.jpg`, the last two parts of what the file says."""
        return "/".join(PurePosixPath(str(item["file_name"])).parts[-2:])
