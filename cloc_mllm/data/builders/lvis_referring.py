"""LVIS referred-object questions: "Is the object <region> of the image a A or a B?", asked of annotated objects.

Source: LVIS v1's own JSON (https://www.lvisdataset.org/dataset, CC BY 4.0), or COCO's instances, which lack synonyms.
The question file of the published protocol was never released; this builds one of the same form. A is the object's
class, B another class that is in the image, else a frequent one; with every other question they change places. B is
never a class one of whose names holds a name of A or the other way round (a scorer that looks for substrings could not
tell the answers apart), nor one that is annotated on the same box. Objects and classes are drawn by seed.

An object is located by its box, by a point on its mask, or free-form, by its mask; `--location all` asks each object
in all three ways. Objects whose outline holds the centre of no pixel have neither point nor mask and are left out,
counted. What comes out is `questions.jsonl`, in the form docs/data-formats.md calls questions, with the keys `answer`,
`negative`, `synonyms`, `negative_synonyms` and, whatever the location, the object's box in `boxes_in`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.builders.templates import LVIS_REFERRING
from cloc_mllm.data.importers.annotation_index import AnnotationIndex
from cloc_mllm.data.importers.coco import clipped_outline
from cloc_mllm.data.importers.conversion import compared
from cloc_mllm.data.importers.lvis import LvisSource
from cloc_mllm.data.importers.pictures import picture_in, picture_size
from cloc_mllm.data.messages import question_items
from cloc_mllm.data.readers import Sample
from cloc_mllm.errors import ClocError

SUMMARIES = {"lvis-referring": "evaluation: which of two classes a box, point or mask of LVIS shows"}
EXAMPLES = {
    "lvis-referring": "cloc-mllm data build lvis-referring --instances lvis_v1_val.json --images coco "
    "--out data/lvis-referring --location all"
}

KINDS = ("box", "point", "free-form")
COUNTS = ("images_listed", "images_asked_about", "images_bad_left_out", "objects_asked_about", "questions_written")
_FREQUENT, _SAME_BOX = 50, 0.8


@dataclass(frozen=True)
class ReferringOptions:
    """What a person decides about the questions.

    Attributes:
        instances: LVIS's annotations.
        images: Folder that their names start from.
        out: Folder to write to.
        location: "box", "point", "free-form", or "all".
        objects: How many objects must be asked about, no more and no less; `None` takes what there is.
        limit: Most objects of an image.
        seed: Of every draw.
        on_bad_sample: "error" stops at a picture that is missing or of another size; "skip" leaves it out, counted.
        progress: Show a progress bar, if standard error is a terminal.
    """

    instances: Path
    images: Path
    out: Path
    location: str = "all"
    objects: int | None = None
    limit: int = 1
    seed: int = 0
    on_bad_sample: str = "error"
    progress: bool = True


def add_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Declares the arguments of `cloc-mllm data build lvis-referring`."""
    parser.add_argument("--instances", required=True, type=Path, help="lvis_v1_*.json")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of train2017 and val2017")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--location", default="all", choices=(*KINDS, "all"), help="default: %(default)s")
    parser.add_argument("--objects", type=int, metavar="N", help="ask about exactly N objects (default: what there is)")
    parser.add_argument("--limit-per-image", type=int, default=1, help="most objects (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: %(default)s)")
    parser.add_argument("--on-bad-sample", default="error", choices=("error", "skip"), help="skip: leave out and count")


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Builds what parsed arguments ask for."""
    return build_lvis_referring(
        ReferringOptions(
            args.instances,
            args.images,
            args.out,
            args.location,
            args.objects,
            args.limit_per_image,
            args.seed,
            args.on_bad_sample,
        )
    )


def build_lvis_referring(options: ReferringOptions) -> dict[str, Any]:
    """Writes questions about objects of LVIS.

    Args:
        options: About which, and how.

    Returns:
        What is also written to `dataset.json`: exact counts, source, licence and options.

    Raises:
        ClocError: Files that cannot be read or written; fewer objects than asked for; without "skip", a bad picture.
    """
    from cloc_mllm.data.writers import JsonlWriter

    counts: Counter[str] = Counter()
    database = options.out / ".annotations.db"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        source = LvisSource(options.instances, masks=True)
        asker = _Asker(AnnotationIndex.build(database, source.events(counts), options.instances), options, counts)
        with JsonlWriter(options.out, "questions") as writer:
            for question in asker.questions():
                counts["questions_written"] += 1
                counts[f"questions_{question['kind']}".replace("-", "_")] += 1
                writer.write(question)
            if options.objects is not None and counts["objects_asked_about"] != options.objects:
                problem = f"{options.objects} objects were asked for, but only {counts['objects_asked_about']} qualify"
                raise ClocError(problem, file=options.instances, remedy="Raise --limit-per-image, or ask for fewer.")
        result = _report(options, counts)
        (options.out / "dataset.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ClocError(f"cannot write: {error.strerror or error}", file=error.filename or options.out) from error
    finally:
        database.unlink(missing_ok=True)
    return result


class _Asker:
    """Draws objects, classes and places, and writes the questions."""

    def __init__(self, index: AnnotationIndex, options: ReferringOptions, counts: Counter[str]) -> None:
        self.index, self.options, self.counts = index, options, counts
        about = index.about()
        self.names: Mapping[str, str] = about["categories"]
        self.synonyms: Mapping[str, list[str]] = about["synonyms"]
        self.frequent = self._frequent()
        counts["images_listed"] = len(index)

    def _frequent(self) -> list[str]:
        """The classes that are in most images."""
        seen: Counter[str] = Counter()
        for _, _, notes in self.index.images(0, len(self.index)):
            seen.update({str(note["category"]) for _, note in notes})
        return [category for category, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:_FREQUENT]]

    def questions(self) -> Iterator[Sample]:
        """All questions: in the order of the images, or, of a stated number of objects, in an order drawn by seed."""
        from tqdm import tqdm

        wanted = self.options.objects
        numbers = list(range(len(self.index)))
        if wanted is not None:
            random.Random(self.options.seed).shuffle(numbers)
        asked = 0
        for number in tqdm(numbers, unit="image", disable=None if self.options.progress else True):
            if asked == wanted:
                break
            ((image, facts, notes),) = self.index.images(number, number + 1)
            try:
                picture = self._picture(image, facts)
            except ClocError:
                if self.options.on_bad_sample == "error":
                    raise
                self.counts["images_bad_left_out"] += 1
                continue
            most = self.options.limit if wanted is None else min(self.options.limit, wanted - asked)
            about = list(itertools.islice(self._objects(image, facts, notes), most))
            self.counts["images_asked_about"] += bool(about)
            for found in about:
                yield from self._asked(image, facts, picture, found, asked)
                asked += 1
                self.counts["objects_asked_about"] += 1
                shown = any(str(note["category"]) == found.negative for _, note in notes)
                self.counts["negatives_of_the_image" if shown else "negatives_that_are_frequent"] += 1

    def _picture(self, image: str, facts: Mapping[str, Any]) -> Path:
        try:
            picture = picture_in(self.options.images, facts["file"])
            size = picture_size(picture)
        except ClocError as error:
            raise ClocError(error.problem, file=error.file, sample=image, remedy=error.remedy) from error
        if size != tuple(facts["size"]):
            stated = f"{facts['size'][0]} x {facts['size'][1]}"
            problem = f"the file says {stated} pixels, but {picture.name} is {size[0]} x {size[1]}"
            raise ClocError(problem, file=self.options.instances, sample=image, remedy="Use the pictures of the set.")
        return picture

    def _objects(self, image: str, facts: Mapping[str, Any], notes: list[tuple[str, Any]]) -> Iterator[_Object]:
        """Objects of an image that can be asked about, in random order."""
        draw = random.Random(f"{self.options.seed}-{image}")
        things = [note for _, note in notes]
        size = (int(facts["size"][0]), int(facts["size"][1]))
        for place in draw.sample(range(len(things)), len(things)):
            negative = self._negative(things, place, draw)
            if negative is None:
                self.counts["objects_without_negative_left_out"] += 1
                continue
            box = [round(min(max(v, 0.0), float(size[k % 2])), 2) for k, v in enumerate(things[place]["box"])]
            outline = clipped_outline(things[place]["outline"], size)
            point = None
            if self.options.location != "box":
                point = _point(outline, size, draw)
            if not (box[2] > box[0] and box[3] > box[1]) or (point is None and self.options.location != "box"):
                self.counts["objects_without_pixels_left_out"] += 1
                continue
            yield _Object(place, str(things[place]["category"]), negative, box, point, outline)

    def _negative(self, things: list[dict[str, Any]], place: int, draw: random.Random) -> str | None:
        """A class that the object is not: one that is in the image, else a frequent one that is not."""
        own = str(things[place]["category"])
        here = sorted({str(thing["category"]) for thing in things} - {own})
        same = {str(thing["category"]) for thing in things if _overlap(thing["box"], things[place]["box"]) >= _SAME_BOX}
        fair = [category for category in here if category not in same and self._are_apart(own, category)]
        if fair:
            return draw.choice(fair)
        rest = [
            category for category in self.frequent if category not in {own, *here} and self._are_apart(own, category)
        ]
        return draw.choice(rest) if rest else None

    def _are_apart(self, one: str, other: str) -> bool:
        """Whether no name of a class holds a name of the other."""
        pairs = itertools.product(self.synonyms[one], self.synonyms[other])
        return not any(a.lower() in b.lower() or b.lower() in a.lower() for a, b in pairs)

    def _asked(
        self, image: str, facts: Mapping[str, Any], picture: Path, found: _Object, number: int
    ) -> Iterator[Sample]:
        """The questions about an object, one for each way to locate it; the true class comes first in every other."""
        location = self.options.location
        names = (self.names[found.category], self.names[found.negative])
        first, second = names if number % 2 == 0 else names[::-1]
        text = LVIS_REFERRING.format(first=first, second=second)
        regions = {"box": {"box": found.box}, "point": {"point": found.point}, "free-form": {"mask": found.outline}}
        for kind in KINDS if location == "all" else (location,):
            items = question_items(text, [regions[kind]])
            yield {
                "id": f"{image}-{found.place}-{kind}",
                "image": str(picture.absolute()),
                "width": int(facts["size"][0]),
                "height": int(facts["size"][1]),
                "task": "referring",
                "kind": kind,
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": str(picture.absolute())}, *items]}
                ],
                "answer": names[0],
                "negative": names[1],
                "synonyms": self.synonyms[found.category],
                "negative_synonyms": self.synonyms[found.negative],
                "boxes_in": [found.box],
                "source": "lvis",
            }


@dataclass(frozen=True)
class _Object:
    """An annotation to be asked about: its place in its image, classes by their ids, box, point on it and outline."""

    place: int
    category: str
    negative: str
    box: list[float]
    point: list[float] | None
    outline: Any


def _point(outline: Any, size: tuple[int, int], draw: random.Random) -> list[float] | None:
    """One of a few points spread over the inside of an outline; `None` if it holds the centre of no pixel."""
    from cloc_mllm.models.region_shapes import mask_shape  # brings all of transformers

    try:
        points = mask_shape(outline, *size).points
    except ValueError:
        return None
    return [float(value) for value in points[draw.randrange(len(points))]]


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes, xyxy."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (areas[0] + areas[1] - width * height)


def _report(options: ReferringOptions, counts: Counter[str]) -> dict[str, Any]:
    shown = {name: counts[name] for name in COUNTS}
    shown |= {name: count for name, count in sorted(counts.items()) if name not in COUNTS}
    result: dict[str, Any] = {
        "kind": "built: lvis-referring",
        "format": "jsonl",
        "frame": "xyxy pixels of the original image",
        "licence": LvisSource.licence,
        "files": [options.instances.name],
        "seed": options.seed,
        "location": options.location,
        "limit_per_image": options.limit,
        "objects": options.objects,
        "counts": shown,
    }
    for split, wanted in LvisSource.expected.items():
        if split in options.instances.name:
            result |= compared(options.instances, f"lvis {split}", split, wanted, shown)
    return result
