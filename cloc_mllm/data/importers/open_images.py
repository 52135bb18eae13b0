"""Open Images V7 boxes as region-text samples.

Source: https://storage.googleapis.com/openimages/web/download_v7.html; annotations CC BY 4.0, pictures CC BY 2.0. Boxes
there are XMin, XMax, YMin, YMax as shares of width and height.

Policy, all of it counted: boxes of groups (`IsGroupOf`: 1) and of drawings (`IsDepiction`: 1, kept with `--depictions`)
are left out; a box's text is its class's display name in lower case. The caption is made of those names, since the set
has none. Pictures are `IMAGES/<ImageID>.jpg`; images without a box are not listed and do not occur.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.annotation_index import Event
from cloc_mllm.data.importers.coco import caption_of_names
from cloc_mllm.data.importers.conversion import ConvertOptions, RawSample, Source, add_common_arguments, reading
from cloc_mllm.data.importers.conversion import convert as convert_source
from cloc_mllm.errors import ClocError

SUMMARY = "Open Images: boxes with 600 class names"
EXAMPLE = (
    "cloc-mllm data convert open-images --images validation --boxes validation-annotations-bbox.csv "
    "--classes oidv7-class-descriptions-boxable.csv --out data/open-images"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert open-images`."""
    parser.add_argument("--boxes", required=True, type=Path, help="*-annotations-bbox.csv")
    parser.add_argument("--classes", required=True, type=Path, help="*class-descriptions-boxable.csv")
    parser.add_argument("--depictions", action="store_true", help="keep boxes around drawings of things")
    add_common_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_source(OpenImagesSource(args.boxes, args.classes, args.depictions), ConvertOptions.of(args))


class OpenImagesSource(Source):
    """Open Images' CSV files.

    Args:
        boxes: A split's boxes.
        classes: Labels and their display names.
        depictions: Whether boxes around drawings count.
    """

    kind = "open-images"
    frame = "shares of width and height"
    licence = "annotations CC BY 4.0"

    def __init__(self, boxes: str | Path, classes: str | Path, depictions: bool = False) -> None:
        self.boxes, self.classes, self.depictions = Path(boxes), Path(classes), depictions

    @property
    def files(self) -> list[Path]:
        """Boxes, then classes."""
        return [self.boxes, self.classes]

    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Read classes, then boxes; an image is listed when its first box is."""
        names = {}
        for row in _rows(self.classes):
            # With or without a line of heads, by version.
            if row[0] != "LabelName":
                names[row[0]] = row[1].lower()
        counts["categories"] = len(names)
        rows = _rows(self.boxes)
        heads = next(rows, [])
        last = None
        for row in rows:
            if len(row) != len(heads):
                problem = f"a line has {len(row)} fields, the first line {len(heads)}"
                raise ClocError(problem, file=self.boxes, sample=row[0] if row else None, remedy="Fetch it again.")
            item = dict(zip(heads, row, strict=True))
            with reading(self.boxes, "boxes", item):
                image, label = item["ImageID"], item["LabelName"]
                if image != last:
                    yield "image", image, {"file": f"{image}.jpg"}
                    last = image
                if item["IsGroupOf"] == "1":
                    counts["boxes_crowd_left_out"] += 1
                    continue
                if item["IsDepiction"] == "1" and not self.depictions:
                    counts["boxes_depiction_left_out"] += 1
                    continue
                if label not in names:
                    raise ClocError(f"the class {label} is used but not listed", file=self.boxes, sample=image)
                box = [float(item[key]) for key in ("XMin", "YMin", "XMax", "YMax")]
                yield "region", image, {"share": box, "text": names[label]}

    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample:
        """Boxes stay shares until the picture is measured."""
        regions = [note for _, note in notes]
        return RawSample(facts["file"], None, caption_of_names([region["text"] for region in regions]), regions)


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.reader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClocError(f"cannot read the file: {error}", file=path, remedy="Check the path.") from error
