"""COCO's instance and caption annotations as region-text samples.

Source: https://cocodataset.org/#download; annotations CC BY 4.0, photographs under their Flickr terms. Boxes there are
[x, y, width, height] in pixels of the picture.

Policy, all of it counted in the result: a box becomes [x1, y1, x2, y2], clipped to the picture; its text is the
category's name; crowd boxes (`iscrowd`: 1) cover several things at once and are left out; so are boxes without area.
The caption with the lowest id is the sample's caption, the others go to `captions`. Images without a caption are left
out, images without objects are kept with no region. With `--masks` a region's outline is kept in its `attributes` as
`mask`: polygons in pixels, clipped to the picture, or the run-length code as it stands.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.annotation_index import Event
from cloc_mllm.data.importers.conversion import (
    ConvertOptions,
    RawSample,
    Source,
    add_common_arguments,
    reading,
)
from cloc_mllm.data.importers.conversion import (
    convert as convert_source,
)
from cloc_mllm.data.importers.json_stream import stream_lists
from cloc_mllm.errors import ClocError

SUMMARY = "COCO: instances (boxes with category names) and captions"
EXAMPLE = (
    "cloc-mllm data convert coco --images train2017 --instances annotations/instances_train2017.json "
    "--captions annotations/captions_train2017.json --out data/coco"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert coco`."""
    parser.add_argument("--instances", required=True, type=Path, help="instances_*.json")
    parser.add_argument("--captions", required=True, type=Path, help="captions_*.json")
    add_masks_argument(parser)
    add_common_arguments(parser)


def add_masks_argument(parser: argparse.ArgumentParser) -> None:
    """Declares `--masks`, for the sets in COCO's layout that have outlines."""
    parser.add_argument("--masks", action="store_true", help="keep outlines, as the attribute `mask` of regions")


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_source(CocoSource(args.instances, args.captions, args.masks), ConvertOptions.of(args))


def convert_coco(
    images: str | Path, instances: str | Path, captions: str | Path, out: str | Path, **options: Any
) -> dict[str, Any]:
    """Converts COCO to region-text samples; see the top of this file for what becomes of what.

    Args:
        images: Folder of the pictures.
        instances: The instances file.
        captions: The captions file.
        out: Folder to write to.
        **options: Fields of :class:`cloc_mllm.data.importers.conversion.ConvertOptions`.

    Returns:
        Exact counts and what else is known of the set, also written to `dataset.json` in `out`.

    Raises:
        ClocError: Files that cannot be read or do not fit together, or that cannot be written.
    """
    return convert_source(CocoSource(instances, captions), ConvertOptions(Path(images), Path(out), **options))


class CocoSource(Source):
    """COCO's JSON, also where others use its layout (LVIS, Objects365).

    Args:
        instances: The file with `images`, `annotations` and `categories`.
        captions: The captions file; without one, the sample's caption is made of the names of what is on it.
        masks: Keep outlines.
    """

    kind = "coco"
    frame = "xywh pixels of the picture"
    licence = "annotations CC BY 4.0"
    expected = {
        "train2017": {"images_listed": 118_287, "captions_read": 591_753, "categories": 80},
        "val2017": {"images_listed": 5_000, "captions_read": 25_014, "categories": 80},
    }

    def __init__(self, instances: str | Path, captions: str | Path | None = None, masks: bool = False) -> None:
        self.instances = Path(instances)
        self.captions = None if captions is None else Path(captions)
        self.masks = masks

    @property
    def files(self) -> list[Path]:
        """Instances, then captions."""
        return [self.instances, *([] if self.captions is None else [self.captions])]

    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Read each file once."""
        names: dict[str, str] = {}
        synonyms: dict[str, list[str]] = {}
        frequency: dict[str, str] = {}
        used: set[int] = set()
        for name, item in stream_lists(self.instances, ("images", "annotations", "categories")):
            with reading(self.instances, name, item):
                if name == "images":
                    yield "image", item["id"], self._facts(item)
                elif name == "categories":
                    names[str(item["id"])] = self.category_name(item)
                    synonyms[str(item["id"])] = self.synonyms(item)
                    if "frequency" in item:
                        frequency[str(item["id"])] = str(item["frequency"])
                elif item.get("iscrowd"):
                    counts["boxes_crowd_left_out"] += 1
                else:
                    x, y, w, h = (float(value) for value in item["bbox"])
                    used.add(item["category_id"])
                    outline = {"outline": item["segmentation"]} if self.masks else {}
                    note = {"box": [x, y, x + w, y + h], "category": item["category_id"], **outline}
                    yield "region", item["image_id"], note
        if unknown := sorted(category for category in used if str(category) not in names):
            raise ClocError(
                f"category {unknown[0]} is used but not listed", file=self.instances, remedy="Fetch it again."
            )
        counts["categories"] = len(names)
        yield "about", "categories", names
        yield "about", "synonyms", synonyms
        yield "about", "frequency", frequency
        if self.captions is not None:
            yield from self._captions(self.captions, counts)

    def category_name(self, item: dict[str, Any]) -> str:
        """Return the text that boxes of a category get."""
        return str(item["name"])

    def synonyms(self, item: dict[str, Any]) -> list[str]:
        """Return all names of a category, the text of its boxes first."""
        return [self.category_name(item)]

    def file_name(self, item: dict[str, Any]) -> str:
        """Return the name of an image's file within the folder of pictures."""
        return str(item["file_name"])

    def _facts(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"file": self.file_name(item), "size": [int(item["width"]), int(item["height"])]}

    def _captions(self, file: Path, counts: Counter[str]) -> Iterator[Event]:
        for name, item in stream_lists(file, ("images", "annotations")):
            with reading(file, name, item):
                if name == "images":
                    yield "image", item["id"], self._facts(item)
                    continue
                text = " ".join(str(item["caption"]).split())
                counts["captions_read" if text else "captions_empty_left_out"] += 1
                if text:
                    yield "caption", item["image_id"], {"id": item["id"], "text": text}

    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample:
        """Boxes in the order of the file, captions in the order of their ids."""
        names = self.about["categories"]
        boxes = [note for kind, note in notes if kind == "region"]
        size = (facts["size"][0], facts["size"][1])
        regions = [
            {
                "box": note["box"],
                "text": names[str(note["category"])],
                **({"attributes": {"mask": clipped_outline(note["outline"], size)}} if "outline" in note else {}),
            }
            for note in boxes
        ]
        spoken = sorted((note["id"], note["text"]) for kind, note in notes if kind == "caption")
        captions = [text for _, text in spoken]
        if self.captions is None:
            captions = caption_of_names([region["text"] for region in regions])
        return RawSample(facts["file"], size, captions, regions)


def clipped_outline(outline: Any, size: tuple[int, int]) -> Any:
    """An outline whose polygons end at the borders of the picture; anything else is left for its reader to judge.

    Args:
        outline: Polygons `[[x1, y1, x2, y2, ...], ...]` in pixels, or a run-length code.
        size: Width and height of the picture.
    """
    if not isinstance(outline, list):
        return outline
    return [[min(max(float(value), 0.0), float(size[k % 2])) for k, value in enumerate(polygon)] for polygon in outline]


MADE_CAPTION = "a photo of "
"""How every caption begins that is made of names."""


def caption_of_names(names: list[str]) -> list[str]:
    """Return a caption that says what is on a picture, for sets that have none; empty if nothing is.

    Each name stands once, in order of appearance: "a photo of cat, traffic light and bus".
    """
    distinct = list(dict.fromkeys(names))
    if not distinct:
        return []
    listed = distinct[0] if len(distinct) == 1 else f"{', '.join(distinct[:-1])} and {distinct[-1]}"
    return [f"{MADE_CAPTION}{listed}"]
