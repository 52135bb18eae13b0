"""What all importers of region-text data share: from a source's annotations to checked, sharded samples.

A source says what it reads (`events`) and how the notes on an image become a sample (`sample`); everything else
happens here, the same for all: annotations are sorted by image on disk, pictures are measured, boxes are clipped and
counted, shards are written side by side, and a conversion that was stopped goes on where it was. A shard appears under
its name when it is complete, and its counts with it, so nothing is lost or written twice.
"""

from __future__ import annotations

import argparse
import json
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from cloc_mllm.data.importers.annotation_index import AnnotationIndex, Event
from cloc_mllm.data.importers.pictures import picture_in, picture_size
from cloc_mllm.data.schema import cleaned
from cloc_mllm.data.sharded_output import Placed, ShardedOutput, require_positive
from cloc_mllm.errors import ClocError

COUNTS = (
    "images_written",
    "images_without_objects",
    "images_without_caption_left_out",
    "images_bad_left_out",
    "captions_read",
    "captions_empty_left_out",
    "boxes_written",
    "boxes_clipped",
    "boxes_crowd_left_out",
    "boxes_without_area_left_out",
    "texts_cleaned",
)
"""Counted by every importer, reported at zero too."""


@dataclass(frozen=True)
class ConvertOptions:
    """What a person decides about a conversion, whatever the source.

    Attributes:
        images: Folder of the pictures; `None` where the source holds them.
        out: Folder to write to.
        file_format: "jsonl", "parquet" or "webdataset".
        copy_images: With "jsonl", copy the pictures beside it instead of referring to them.
        on_bad_sample: "error" stops at a picture that is missing, unreadable or of another size than annotated; "skip"
            leaves it out and counts it.
        workers: Processes that measure pictures and write shards.
        shard: Images of the source to a shard.
        progress: Show a progress bar, if standard error is a terminal.
    """

    images: Path | None
    out: Path
    file_format: str = "jsonl"
    copy_images: bool = False
    on_bad_sample: str = "error"
    workers: int = 1
    shard: int = 4096
    progress: bool = True

    def __post_init__(self) -> None:
        require_positive(shard=self.shard, workers=self.workers)

    @classmethod
    def of(cls, args: argparse.Namespace) -> ConvertOptions:
        """Return the options that parsed arguments hold."""
        return cls(
            getattr(args, "images", None),
            args.out,
            args.format,
            args.copy_images,
            args.on_bad_sample,
            args.workers,
            args.shard,
        )


def add_common_arguments(parser: argparse.ArgumentParser, *, images: bool = True) -> None:
    """Declare the arguments that all importers of region-text data take.

    Args:
        parser: Of one importer.
        images: Whether its pictures lie in a folder.
    """
    if images:
        parser.add_argument("--images", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--format", default="jsonl", choices=("jsonl", "parquet", "webdataset"), help="default: %(default)s"
    )
    parser.add_argument("--copy-images", action="store_true", help="with jsonl: copy the pictures into OUT/images")
    parser.add_argument(
        "--on-bad-sample", default="error", choices=("error", "skip"), help="a missing or mismatched picture"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--shard", type=int, default=4096, help="images to a shard (default: %(default)s)")


class Source(ABC):
    """A public data set in its own format.

    Attributes:
        kind: As `cloc-mllm data convert KIND` calls it.
        frame: How the source writes boxes.
        licence: Of the annotations.
        expected: For each known split, what it must count; a split whose name the annotation file's name contains.
        about: What `events` told of the whole set, by name; there when `sample` is called.
    """

    about: Mapping[str, Mapping[str, Any]] = {}

    kind: ClassVar[str]
    frame: ClassVar[str]
    licence: ClassVar[str]
    expected: Mapping[str, Mapping[str, int]] = {}

    def stated(self) -> dict[str, str]:
        """What else `dataset.json` says: `set`, the public set where `kind` covers several, and `split`."""
        return {}

    @property
    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The annotation files, the main one first."""

    @abstractmethod
    def events(self, counts: Counter[str]) -> Iterator[Event]:
        """Read the annotation files; what is left out here is counted here."""

    @abstractmethod
    def sample(
        self, image: str, facts: dict[str, Any], notes: list[tuple[str, dict[str, Any]]], counts: Counter[str]
    ) -> RawSample | None:
        """Put an image's notes together; `None` if it is left out, which is counted."""


@dataclass
class RawSample:
    """An image of a source, before it is measured and its boxes are clipped.

    Attributes:
        image: Name of its file within the folder of pictures, or its encoded bytes.
        size: Width and height that the source states.
        captions: At least one text.
        regions: `box` xyxy in pixels, or `share` xyxy as shares of width and height; and whatever else of the schema
            the source gives.
    """

    image: str | bytes
    size: tuple[int, int] | None
    captions: list[str]
    regions: list[dict[str, Any]]


class reading:  # noqa: N801 -- used like a function, in a `with` statement
    """Turns the errors of a malformed item into one that says where it is.

    Args:
        file: The annotation file.
        name: What kind of item it is.
        item: The item.
    """

    def __init__(self, file: str | Path, name: str, item: Any) -> None:
        self.file, self.name, self.item = file, name, item

    def __enter__(self) -> None:
        if not isinstance(self.item, dict):
            raise ClocError(f"an item of '{self.name}' is not an object", file=self.file, remedy="Check the file.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, IndexError)):
            what = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
            sample = next((self.item[key] for key in ("id", "image_id", "ref_id", "key") if key in self.item), None)
            raise ClocError(
                f"an item of '{self.name}' {what}",
                file=self.file,
                sample=sample,
                remedy="Is it the right kind of file?",
            ) from error


def convert(source: Source, options: ConvertOptions) -> dict[str, Any]:
    """Convert a data set to region-text samples.

    Args:
        source: The data set.
        options: What to write, and where.

    Returns:
        Exact counts and what else is known of the set, also written to `dataset.json` in the output folder.

    Raises:
        ClocError: Files that cannot be read or do not fit together, or that cannot be written.
    """
    output = ShardedOutput(options.out, "regions", options.file_format, options.copy_images, options.shard)
    try:
        files = [(str(file.resolve()), file.stat().st_size) if file.exists() else str(file) for file in source.files]
        output.begin([source.kind, vars(source), files, {**vars(options), "workers": 0, "progress": False}])
        index, counts = _open_index(source, output.state)
        source.about = index.about()
        shards = -(-len(index) // options.shard)
        write = partial(_write_shard, source, options, output)
        for found in output.run(write, shards, workers=options.workers, progress=options.progress, label=source.kind):
            counts += found
        result = _report(source, options, len(index), counts)
        output.finish(shards, result)
    except OSError as error:
        raise ClocError(f"cannot write: {error.strerror or error}", file=error.filename or options.out) from error
    return result


def _open_index(source: Source, state: Path) -> tuple[AnnotationIndex, Counter[str]]:
    """The annotations sorted by image, and what was counted while reading them."""
    path, counted = state / "annotations.db", state / "annotations.json"
    if path.exists():
        return AnnotationIndex(path), Counter(json.loads(counted.read_text()))
    counts: Counter[str] = Counter()

    def events() -> Iterator[Event]:
        yield from source.events(counts)
        counted.write_text(json.dumps(counts))

    return AnnotationIndex.build(path, events(), source.files[0]), counts


def _write_shard(source: Source, options: ConvertOptions, output: ShardedOutput, number: int) -> None:
    """Write the shard of a number, in whatever process this is."""

    def samples(counts: Counter[str]) -> Iterator[Placed]:
        index = AnnotationIndex(output.state / "annotations.db")
        for image, facts, notes in index.images(number * options.shard, (number + 1) * options.shard):
            sample = _sample(source, options, image, facts, notes, counts)
            if sample is not None:
                yield sample, None

    output.write(number, samples)


def _sample(
    source: Source,
    options: ConvertOptions,
    image: str,
    facts: dict[str, Any],
    notes: list[tuple[str, dict[str, Any]]],
    counts: Counter[str],
) -> dict[str, Any] | None:
    """The sample of one image, measured, its boxes clipped; `None` if it is left out, which is counted."""
    of_image: Counter[str] = Counter()
    try:
        raw = source.sample(image, facts, notes, of_image)
        captions = [] if raw is None else [text for one in raw.captions if (text := cleaned(one, of_image))]
        if raw is None or not captions:
            counts += of_image
            counts["images_without_caption_left_out"] += raw is not None
            return None
        picture = raw.image if isinstance(raw.image, bytes) else picture_in(options.images or Path(), raw.image)
        width, height = _measured(picture, raw, source.files[0])
    except ClocError as error:
        if options.on_bad_sample == "error":
            file, sample = error.file or source.files[0], error.sample or image
            raise ClocError(error.problem, file=file, sample=sample, remedy=error.remedy) from error
        counts["images_bad_left_out"] += 1
        return None
    counts += of_image
    counts["images_written"] += 1
    regions = list(clipped(_with_clean_texts(raw.regions, counts), width, height, counts))
    counts["images_without_objects"] += not regions
    return {
        "id": image,
        "image": picture,
        "width": width,
        "height": height,
        "caption": captions[0],
        "captions": captions,
        "regions": regions,
        "source": source.kind,
    }


def _with_clean_texts(regions: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for region in regions:
        if text := cleaned(region["text"], counts):
            yield {**region, "text": text}
        else:
            counts["boxes_without_text_left_out"] += 1


def _measured(picture: bytes | Path, raw: RawSample, file: Path) -> tuple[int, int]:
    """Width and height of a picture; `ClocError` if they are not what the source states."""
    width, height = picture_size(picture)
    if raw.size is not None and raw.size != (width, height):
        name = picture.name if isinstance(picture, Path) else "the picture"
        raise ClocError(
            f"the file says {raw.size[0]} x {raw.size[1]} pixels, but {name} is {width} x {height}",
            file=file,
            remedy="The boxes would be wrong: use the pictures that the annotations were made for, or skip it.",
        )
    return width, height


def clipped(
    regions: Iterable[dict[str, Any]], width: int, height: int, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Regions with their boxes clipped to the picture; those without area are left out and counted."""
    for region in regions:
        rest = {key: value for key, value in region.items() if key not in ("box", "share")}
        unit = (width, height) if "share" in region else (1, 1)
        found = region["share"] if "share" in region else region["box"]
        exact = [float(value) * side for value, side in zip(found, unit * 2, strict=True)]
        box = [min(max(value, 0.0), limit) for value, limit in zip(exact, (width, height) * 2, strict=True)]
        if not (box[2] > box[0] and box[3] > box[1]):
            counts["boxes_without_area_left_out"] += 1
            continue
        counts["boxes_clipped"] += any(abs(a - b) > 0.01 for a, b in zip(exact, box, strict=True))
        counts["boxes_written"] += 1
        # Annotations have two decimals; adding width to x must not show float dust such as 359.98999999999995.
        yield {"box": [round(value, 2) for value in box], **rest}


def _report(source: Source, options: ConvertOptions, listed: int, counts: Counter[str]) -> dict[str, Any]:
    """Every count by name, those that stayed at zero too, and a warning where a known split counts otherwise."""
    shown = {"images_listed": listed} | {k: v for k, v in sorted(counts.items()) if k not in COUNTS}
    shown |= {name: counts[name] for name in COUNTS}
    result: dict[str, Any] = {
        "kind": source.kind,
        "format": options.file_format,
        "frame": source.frame,
        "licence": source.licence,
        "files": [file.name for file in source.files],
        "counts": shown,
    }
    if names := source.about.get("categories"):
        rarity = source.about.get("frequency") or {}
        result["categories"] = [
            {"name": name} | ({"frequency": rarity[key]} if key in rarity else {}) for key, name in names.items()
        ]
    stated = source.stated()
    for split, wanted in source.expected.items():
        if split in source.files[0].name:
            what = f"{stated.get('set', source.kind)} {stated.get('split', split)}"
            result |= compared(source.files[0], what, split, wanted, shown)
            break
    return result | stated


def compared(file: Path, what: str, split: str, wanted: Mapping[str, int], found: Mapping[str, int]) -> dict[str, Any]:
    """Warn where a known split counts otherwise than it should.

    Args:
        file: The annotation file.
        what: What to call the split in the warning.
        split: Its name.
        wanted: What it must count.
        found: What was counted.

    Returns:
        `split` and `expected`, for `dataset.json`.
    """
    wrong = {k: f"{found.get(k, 0):,} instead of {n:,}" for k, n in wanted.items() if found.get(k) != n}
    if wrong:
        told = "; ".join(f"{name.replace('_', ' ')}: {text}" for name, text in wrong.items())
        warnings.warn(f"{file.name} is not the whole of {what}: {told}", stacklevel=4)
    return {"split": split, "expected": dict(wanted)}
