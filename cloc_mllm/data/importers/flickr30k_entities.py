"""Flickr30k Entities as region-text samples: the phrases of five captions, and their boxes.

Source: https://github.com/BryanPlummer/flickr30k_entities; annotations for non-commercial research and education,
pictures under Flickr's terms. Boxes there are xmin, ymin, xmax, ymax in pixels counted from 1; as in the set's own
reader, 1 is taken off each. The set's own files are read: `Sentences/<id>.txt`, `Annotations/<id>.xml` and the lists
of ids `train.txt`, `val.txt`, `test.txt`.

Policy, all of it counted: each phrase of each caption whose entity has boxes is a region. Where an entity has several
boxes the region is the box that encloses them (the MERGED-BOXES protocol); `--each-box` makes a region of every one.
Phrases without a box (scenes, things that are not shown) are left out. A phrase that several captions use for the same
box counts once. Annotations and sentences belong together by their id, never by the order of files.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cloc_mllm.data.importers.annotation_index import Event
from cloc_mllm.data.importers.conversion import ConvertOptions, RawSample, Source, add_common_arguments
from cloc_mllm.data.importers.conversion import convert as convert_source
from cloc_mllm.errors import ClocError

SUMMARY = "Flickr30k Entities: phrases of captions and their boxes"
EXAMPLE = (
    "cloc-mllm data convert flickr30k-entities --images flickr30k-images --entities flickr30k_entities --split train "
    "--out data/flickr30k"
)

_PHRASE = re.compile(r"\[/EN#(?P<entity>\d+)(?P<types>(?:/[^\s/\]]+)+) (?P<words>[^\]]*)\]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cloc-mllm data convert flickr30k-entities`."""
    parser.add_argument("--entities", required=True, type=Path, help="folder with Annotations, Sentences and lists")
    parser.add_argument("--split", required=True, help="train, val or test: the list of ids, ENTITIES/<split>.txt")
    parser.add_argument("--each-box", action="store_true", help="a region for every box of a phrase")
    add_common_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion that parsed arguments ask for."""
    return convert_source(Flickr30kSource(args.entities, args.split, args.each_box), ConvertOptions.of(args))


@dataclass(frozen=True)
class Phrase:
    """A phrase of a caption.

    Attributes:
        entity: Id of the thing it names; the same over all captions of a picture.
        types: What kind of thing, such as `people`.
        text: The words.
        start: First character in the caption.
    """

    entity: str
    types: tuple[str, ...]
    text: str
    start: int


def read_sentence(line: str) -> tuple[str, list[Phrase]]:
    """Return a caption without its mark-up, and its phrases.

    Args:
        line: Such as `[/EN#1/people A man] sits on [/EN#2/other a bench] .`
    """
    caption, phrases, at = "", [], 0
    for found in _PHRASE.finditer(line):
        caption += line[at : found.start()]
        types = tuple(found["types"].strip("/").split("/"))
        phrases.append(Phrase(found["entity"], types, found["words"], len(caption)))
        caption, at = caption + found["words"], found.end()
    return caption + line[at:], phrases


def read_boxes(path: Path) -> tuple[tuple[int, int], dict[str, list[list[float]]]]:
    """Return width and height of a picture, and the boxes of every entity that has any.

    Args:
        path: `Annotations/<id>.xml`.

    Raises:
        ClocError: The file cannot be read, or is not such an annotation.
    """
    try:
        root = ElementTree.parse(path).getroot()
        size = (int(_text(root, "size/width")), int(_text(root, "size/height")))
        boxes: dict[str, list[list[float]]] = {}
        for item in root.iter("object"):
            corners = item.find("bndbox")
            if corners is not None:
                box = [float(_text(corners, key)) - 1 for key in ("xmin", "ymin", "xmax", "ymax")]
                for name in item.findall("name"):
                    boxes.setdefault(str(name.text), []).append(box)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ClocError(f"cannot be read as an annotation: {error}", file=path, remedy="Fetch it again.") from error
    return size, boxes


def _text(node: ElementTree.Element, path: str) -> str:
    found = node.find(path)
    if found is None or found.text is None:
        raise ValueError(f"there is no {path}")
    return found.text


class Flickr30kSource(Source):
    """Flickr30k Entities' folder.

    Args:
        entities: The folder.
        split: Name of the list of ids.
        each_box: Whether every box of a phrase is a region.
    """

    kind = "flickr30k-entities"
    frame = "xyxy pixels of the picture, counted from 1"
    licence = "annotations for non-commercial research and education"
    expected = {
        "train": {"images_listed": 29_783, "captions_read": 148_915},
        "val": {"images_listed": 1_000, "captions_read": 5_000},
        "test": {"images_listed": 1_000, "captions_read": 5_000},
    }

    def __init__(self, entities: str | Path, split: str, each_box: bool = False) -> None:
        self.entities, self.split, self.each_box = Path(entities), split, each_box

    @property
    def files(self) -> list[Path]:
        """The list of ids."""
        return [self.entities / f"{self.split}.txt"]

    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Name the images; their two files are read when their sample is made."""
        try:
            ids = self.files[0].read_text(encoding="utf-8").split()
        except OSError as error:
            raise ClocError(f"cannot read the list of ids: {error}", file=self.files[0]) from error
        for image in ids:
            yield "image", image, {}

    def sentences(self, image: str) -> list[str]:
        """Return the captions of an image with their mark-up.

        Raises:
            ClocError: They cannot be read.
        """
        file = self.entities / "Sentences" / f"{image}.txt"
        try:
            return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ClocError(f"cannot read the sentences: {error}", file=file, remedy="Fetch it again.") from error

    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample:
        """Read the image's sentences and boxes."""
        size, boxes = read_boxes(self.entities / "Annotations" / f"{image}.xml")
        captions = []
        seen: dict[tuple[str, tuple[float, ...]], dict[str, Any]] = {}
        for line in self.sentences(image):
            caption, phrases = read_sentence(line)
            captions.append(" ".join(caption.split()))
            counts["captions_read"] += 1
            for phrase in phrases:
                counts["phrases_read"] += 1
                found = boxes.get(phrase.entity, [])
                counts["phrases_without_box_left_out"] += not found
                for box in found if self.each_box else [enclosing(found)] if found else []:
                    key = (phrase.text.lower(), tuple(box))
                    counts["regions_repeated_left_out"] += key in seen
                    seen.setdefault(key, {"box": box, "text": phrase.text})
        return RawSample(f"{image}.jpg", size, captions, list(seen.values()))


def enclosing(boxes: list[list[float]]) -> list[float]:
    """Return the smallest box around some boxes."""
    lows, highs = ([pick(box[k] for box in boxes) for k in keys] for pick, keys in ((min, (0, 1)), (max, (2, 3))))
    return [*lows, *highs]
