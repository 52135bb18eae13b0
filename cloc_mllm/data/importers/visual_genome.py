"""Visual Genome (1.2 or 1.4) as region-text samples: region descriptions, objects, relationships.

Source: https://homes.cs.washington.edu/~ranjay/visualgenome/api.html; CC BY 4.0. Boxes there are x, y, width (`width`
or `w`) and height in pixels of the picture. Pictures lie in `VG_100K` and `VG_100K_2`; `--images` is the folder that
holds both, or one that holds all pictures.

Policy, all of it counted: a region's text is its phrase; an object's its first name; a relationship's is "subject
predicate object" around the box that encloses both. The caption, which the set lacks, is the phrase of the largest
region: it says what most of the picture shows. Without `--regions` it is made of the objects' names.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.importers.annotation_index import Event
from cloc_mllm.data.importers.coco import caption_of_names
from cloc_mllm.data.importers.conversion import ConvertOptions, RawSample, Source, add_common_arguments, reading
from cloc_mllm.data.importers.conversion import convert as convert_source
from cloc_mllm.data.importers.json_stream import stream_items
from cloc_mllm.errors import ClocError

SUMMARY = "Visual Genome: region descriptions, objects, relationships"
EXAMPLE = (
    "cloc-mllm data convert visual-genome --images vg --image-data image_data.json --regions region_descriptions.json "
    "--objects objects.json --out data/visual-genome"
)
FOLDERS = ("", "VG_100K", "VG_100K_2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert visual-genome`."""
    parser.add_argument("--image-data", required=True, type=Path, help="image_data.json")
    parser.add_argument("--regions", type=Path, help="region_descriptions.json")
    parser.add_argument("--objects", type=Path, help="objects.json")
    parser.add_argument("--relationships", type=Path, help="relationships.json")
    add_common_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    source = VisualGenomeSource(args.images, args.image_data, args.regions, args.objects, args.relationships)
    return convert_source(source, ConvertOptions.of(args))


class VisualGenomeSource(Source):
    """Visual Genome's JSON files.

    Args:
        images: Folder of the pictures, to see in which of the set's two folders each lies.
        image_data: Sizes of the pictures.
        regions: Region descriptions.
        objects: Objects.
        relationships: Relationships.

    Raises:
        ClocError: None of the last three is given.
    """

    kind = "visual-genome"
    frame = "xywh pixels of the picture"
    licence = "CC BY 4.0"
    expected = {"image_data": {"images_listed": 108_077}}

    def __init__(
        self,
        images: Path,
        image_data: Path,
        regions: Path | None = None,
        objects: Path | None = None,
        relationships: Path | None = None,
    ) -> None:
        self.images, self.image_data = images, image_data
        self.regions, self.objects, self.relationships = regions, objects, relationships
        if not (regions or objects or relationships):
            raise ClocError(
                "nothing to convert", remedy="Give at least one of --regions, --objects and --relationships."
            )

    @property
    def files(self) -> list[Path]:
        """The files that are given."""
        return [file for file in (self.image_data, self.regions, self.objects, self.relationships) if file is not None]

    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Read the files one after the other."""
        for item in stream_items(self.image_data):
            with reading(self.image_data, "images", item):
                image = item.get("image_id", item.get("id"))
                if image is None:
                    raise KeyError("image_id")
                yield "image", image, {"size": [int(item["width"]), int(item["height"])]}
        for file, name, read in (
            (self.regions, "regions", _region),
            (self.objects, "objects", _object),
            (self.relationships, "relationships", _relationship),
        ):
            if file is None:
                continue
            for item in stream_items(file):
                with reading(file, name, item):
                    image = item.get("image_id", item.get("id"))
                    for part in item[name]:
                        note = read(part)
                        counts[f"{name}_read"] += 1
                        if note["text"]:
                            yield name, image, note
                        else:
                            counts[f"{name}_without_text_left_out"] += 1

    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample:
        """Descriptions, then objects, then relationships."""
        phrases = [note for kind, note in notes if kind == "regions"]
        if phrases:
            largest = max(phrases, key=lambda note: _area(note["box"]))
            captions = [largest["text"]]
        else:
            captions = caption_of_names([note["text"] for kind, note in notes if kind == "objects"])
        name = f"{image}.jpg"
        folder = next((one for one in FOLDERS if (self.images / one / name).is_file()), "")
        return RawSample(
            f"{folder}/{name}".lstrip("/"),
            (facts["size"][0], facts["size"][1]),
            captions,
            [note for _, note in notes],
        )


def _region(item: dict[str, Any]) -> dict[str, Any]:
    return {"box": _box(item), "text": _clean(item["phrase"])}


def _object(item: dict[str, Any]) -> dict[str, Any]:
    return {"box": _box(item), "text": _clean(_name(item))}


def _relationship(item: dict[str, Any]) -> dict[str, Any]:
    a, b = _box(item["subject"]), _box(item["object"])
    words = (_name(item["subject"]), str(item["predicate"]).lower(), _name(item["object"]))
    box = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
    return {"box": box, "text": _clean(" ".join(words))}


def _name(item: dict[str, Any]) -> str:
    """The first name; files of version 1.2 give a list of `names`, some relationships one `name`."""
    names = item["names"] if "names" in item else [item["name"]]
    return str(names[0]) if names else ""


def _box(item: dict[str, Any]) -> list[float]:
    x, y = float(item["x"]), float(item["y"])
    width = item["w"] if "w" in item else item["width"]
    height = item["h"] if "h" in item else item["height"]
    return [x, y, x + float(width), y + float(height)]


def _clean(text: Any) -> str:
    return " ".join(str(text).split())


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
