"""The truth an encoder is measured against: images, captions and regions of one split, and what scenes know beyond.

Texts and boxes are read (and checked) first and all at once; pictures are decoded batch by batch when they are encoded.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cloc_mllm.data.dataset import RegionTextDataset, unique_regions
from cloc_mllm.data.readers import data_files, sample_name
from cloc_mllm.data.scenes.language import words
from cloc_mllm.data.schema import raise_first, region_text_problems
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.known_splits import known_total, named_split
from cloc_mllm.evaluation.reporting.report import DatasetRef

CLASS_ATTRIBUTES = ("texture", "colour", "shape")
"""What a class of scenes is made of. Size is left out: a box prompt gives it away and a crop destroys it."""


@dataclass(frozen=True)
class Region:
    """One region of a split.

    Attributes:
        image: Which of the split's images it is in.
        box: xyxy in pixels of the original.
        text: What the data say it is.
        unique: Whether the text fits no other region of its image.
        attributes: What scenes know of it: shape, colour, size, texture. Empty for other data.
    """

    image: int
    box: tuple[float, float, float, float]
    text: str
    unique: bool
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RegionSplit:
    """Some or all images of one split.

    Attributes:
        ref: What to call it.
        ids: (B,) sample ids.
        captions: (B,) every caption of each.
        sizes: (B,) width and height of each original in pixels.
        regions: All regions, in order of images.
        dataset: Where the pictures come from.
        rows: (B,) the sample of the data set that each image is.
    """

    ref: DatasetRef
    ids: list[str]
    captions: list[list[str]]
    sizes: list[tuple[int, int]]
    regions: list[Region]
    dataset: RegionTextDataset
    rows: list[int]

    @property
    def image_keys(self) -> list[str]:
        """(B,) what images are resampled and paired by: the ids, numbered where several images have the same."""
        times = Counter(self.ids)
        return [one if times[one] == 1 else f"{one} ({number})" for number, one in enumerate(self.ids)]

    def pictures(self, batch_size: int) -> Iterator[tuple[range, list[Image.Image]]]:
        """Decode the pictures in batches: which images they are, and the RGB pictures."""
        for start in range(0, len(self.rows), batch_size):
            batch = range(start, min(start + batch_size, len(self.rows)))
            yield batch, [self.dataset[self.rows[number]]["image"] for number in batch]


def draw(total: int, limit: int | None, seed: int) -> list[int]:
    """Return all of range(total), or ``limit`` of it drawn with a seed, ascending."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).permutation(total)[:limit].tolist())


def load_region_split(
    path: str | PathLike[str],
    *,
    name: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    kind: str | None = None,
) -> RegionSplit:
    """Read the texts and boxes of region-text data.

    Args:
        path: A folder with ``regions.jsonl`` or Parquet files, or such a file.
        name: What to call the data; default the folder's or file's name.
        split: The split's name; default what ``dataset.json`` says, or ``all``. The images are counted against those
            that a known split has.
        limit: Use so many images, drawn with ``seed``, instead of all.
        seed: Of that draw.
        kind: The public set that this is; default what ``dataset.json`` says.

    Raises:
        ClocError: The data cannot be read, a sample breaks the schema, or the data are no such split.
    """
    dataset = RegionTextDataset(str(path), max_regions=None)
    rows = draw(len(dataset), limit, seed)
    ids, captions, sizes, regions = [], [], [], []
    for number, row in enumerate(rows):
        sample = dataset.source[row]
        file, place = dataset.source.where(row)
        raise_first(region_text_problems(sample, None), file, sample_name(sample, place))
        ids.append(str(sample.get("id", place)))
        captions.append(list(dict.fromkeys([sample["caption"], *(sample.get("captions") or ())])))
        stated = (int(sample.get("width") or 0), int(sample.get("height") or 0))
        sizes.append(stated if all(stated) else dataset[row]["image"].size)
        for region, unique in zip(sample["regions"], unique_regions(sample["regions"]), strict=True):
            box = tuple(float(value) for value in region["box"])
            regions.append(Region(number, box, region["text"], unique, dict(region.get("attributes") or {})))  # type: ignore[arg-type]
    drawn = seed if len(rows) < len(dataset) else None
    ref = dataset_ref(path, split, len(rows), len(dataset), name=name, seed=drawn, kind=kind)
    ref = dataclasses.replace(ref, path=opened_path(path))
    return RegionSplit(ref, ids, captions, sizes, regions, dataset, rows)


def opened_path(path: str | PathLike[str], preferred: str = "regions.jsonl") -> str:
    """Return the path of exactly the samples that are read from a path, in which rows count.

    A folder may hold regions and questions; whoever opens it for the other ones counts in another file.

    Args:
        path: A file, a folder or a pattern.
        preferred: The file to take in a folder that holds several.

    Raises:
        ClocError: See :func:`cloc_mllm.data.readers.data_files`.
    """
    files = data_files(str(path), preferred)
    if len(files) == 1:
        return str(files[0])
    return str(Path(glob.escape(str(path))) / f"*{files[0].suffix}") if Path(path).is_dir() else str(path)


def dataset_ref(
    path: str | PathLike[str],
    split: str | None,
    used: int,
    present: int,
    *,
    name: str | None = None,
    seed: int | None = None,
    kind: str | None = None,
) -> DatasetRef:
    """Name what was used of a set: its images are counted against a known split's, if it is one.

    Args:
        path: The data.
        split: The split's name; default what ``dataset.json`` says, or ``all``.
        used: Images measured on.
        present: Images in the data.
        name: What to call them; default the folder's or file's name.
        seed: Of the draw, if one was made.
        kind: The public set that this is; default what ``dataset.json`` says.

    Raises:
        ClocError: See :func:`cloc_mllm.evaluation.reporting.known_splits.named_split`.
    """
    kind, split = named_split(path, kind, split)
    total = known_total(kind, split, present)
    return DatasetRef(name or Path(path).resolve().name, split, used, total, seed, path=str(path), kind=kind)


@dataclass(frozen=True)
class SceneTruth:
    """What ``dataset.json`` of procedural scenes says of all splits.

    Attributes:
        name: Preset and seed.
        vocabulary: The words of each attribute.
        heldout: (shape, colour) pairs that occur in the test split only.
        folder: Where it was read.
    """

    name: str
    vocabulary: dict[str, list[str]]
    heldout: frozenset[tuple[str, str]]
    folder: Path

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> SceneTruth:
        """Read ``dataset.json``.

        Raises:
            ClocError: The folder is not a finished set of procedural scenes.
        """
        path = Path(folder) / "dataset.json"
        remedy = "Make one with: cloc-mllm data scenes --n 1000 --seed 0 --out DIR"
        if not path.is_file():
            raise ClocError("this is no set of procedural scenes (no dataset.json)", file=folder, remedy=remedy)
        try:
            summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            vocabulary = {name: list(summary["vocabulary"][name]) for name in (*CLASS_ATTRIBUTES, "size")}
            heldout = frozenset((shape, colour) for shape, colour in summary["heldout_pairs"])
            name = f"scenes {summary['preset']['name']} (seed {summary['seed']})"
        except (ValueError, KeyError, TypeError) as error:
            raise ClocError(
                f"does not describe procedural scenes ({type(error).__name__}: {error})", file=path, remedy=remedy
            ) from error
        return cls(name, vocabulary, heldout, Path(folder))

    @property
    def classes(self) -> list[str]:
        """Every name an object can have, size apart, in the order of the vocabulary."""
        combinations = itertools.product(*(self.vocabulary[attribute] for attribute in CLASS_ATTRIBUTES))
        return [words(dict(zip(CLASS_ATTRIBUTES, combination, strict=True))) for combination in combinations]

    def load_split(self, split: str, limit: int | None = None, seed: int = 0) -> RegionSplit:
        """Read one split; see :func:`load_region_split`.

        Raises:
            ClocError: There is no such split, or its regions do not say their attributes.
        """
        folder = self.split_folder(split)
        loaded = load_region_split(folder, name=self.name, split=split, limit=limit, seed=seed)
        wanted = {*CLASS_ATTRIBUTES, "size"}
        for region in loaded.regions:
            if not wanted <= set(region.attributes):
                missing = ", ".join(sorted(wanted - set(region.attributes)))
                raise ClocError(f"a region does not say its {missing}", file=folder, sample=loaded.ids[region.image])
        return loaded

    def split_folder(self, split: str) -> Path:
        """Return the folder of a split.

        Raises:
            ClocError: There is none.
        """
        folder = self.folder / split
        if not folder.is_dir():
            present = sorted(path.parent.name for path in self.folder.glob("*/regions.jsonl"))
            raise ClocError(
                f"there is no split '{split}'", file=self.folder, remedy=f"Choose one of {', '.join(present)}."
            )
        return folder


def canonical_name(attributes: dict[str, str]) -> str:
    """Return the class of a region: its texture, colour and shape as they are spoken."""
    return words({name: attributes[name] for name in CLASS_ATTRIBUTES})


def describes(texts: Sequence[str], attributes: Sequence[dict[str, str]]) -> NDArray[np.bool_]:
    """Tell for each scene text and each object whether every word of the text is true of the object: ``(T, R)``."""
    said = [set(text.split()) for text in texts]
    true = [set(words_of.values()) for words_of in attributes]
    column = {word: k for k, word in enumerate(sorted(set().union(*said, *true)))}
    says, holds = np.zeros((len(said), len(column))), np.zeros((len(true), len(column)))
    for table, bags in ((says, said), (holds, true)):
        for row, bag in enumerate(bags):
            table[row, [column[word] for word in bag]] = 1
    return says @ (1 - holds).T == 0
