"""How many images or expressions the public splits have, so that a part of one is never called by its name.

Sources: for COCO and LVIS what their importers check, for the others the sets' own pages. The Karpathy splits of COCO
and the splits of Flickr30k are those of Karpathy and Fei-Fei (arXiv 1412.2306). Pictures of RefCOCO and RefCOCO+ are
counted in UNC's partition and those of RefCOCOg in UMD's, as the catalogue of TensorFlow Datasets has them (ref_coco).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from cloc_mllm.data.files import is_url
from cloc_mllm.data.importers.coco import CocoSource
from cloc_mllm.data.importers.lvis import LvisSource
from cloc_mllm.data.importers.refcoco import KNOWN
from cloc_mllm.errors import ClocError

SET_FILE = "dataset.json"

KNOWN_SPLITS: dict[str, dict[str, int]] = {
    "lvis": {split: counts["images_listed"] for split, counts in LvisSource.expected.items()},
    "coco": {
        **{split: counts["images_listed"] for split, counts in CocoSource.expected.items()},
        "train2014": 82_783,
        "val2014": 40_504,
    },
    "coco-karpathy": {"val": 5_000, "test": 5_000},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
    "flickr30k-entities": {"train": 29_783, "val": 1_000, "test": 1_000},
    "refcoco": {"train": 16_994, "val": 1_500, "testA": 750, "testB": 750},
    "refcoco+": {"train": 16_992, "val": 1_500, "testA": 750, "testB": 750},
    "refcocog": {"train": 21_899, "val": 1_300, "test": 2_600},
    "imagenet": {"val": 50_000},
    "imagenet-v2": {"matched-frequency": 10_000, "threshold-0.7": 10_000, "top-images": 10_000},
}
"""Images by set, as ``dataset.json`` names it, and by split."""

KNOWN_EXPRESSIONS: dict[str, dict[str, int]] = {
    name: {split: counts[1] for (owner, _, split), counts in KNOWN.items() if owner == name}
    for name in dict.fromkeys(owner for owner, _, _ in KNOWN)
}
"""Referring expressions by data set and split, in the partitions that are reported on: UNC's of RefCOCO and RefCOCO+,
UMD's of RefCOCOg."""

ALL = "all"
"""What data are called that are known to be no split."""

_DRAWN_FROM = {("coco", "coco-karpathy"), ("flickr30k-entities", "flickr30k")}
"""Sets as an importer names them, and others whose pictures are the same ones, under which a person may report them."""


def set_facts(data: str | PathLike[str]) -> dict[str, Any]:
    """Read what an importer wrote into ``dataset.json`` about the set at a path; nothing where there is no such file.

    Raises:
        ClocError: The file is there and cannot be read.
    """
    if is_url(data):
        return {}
    path = Path(data)
    file = (path if path.is_dir() else path.parent) / SET_FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot be read: {error}", file=file) from error
    return found if isinstance(found, dict) else {}


def stated_set(facts: Mapping[str, Any]) -> str | None:
    """Return which public set ``dataset.json`` says that the data are; None if it does not tell."""
    # One importer writes RefCOCO, RefCOCO+ and RefCOCOg: its kind does not say which.
    kind = facts.get("set") or (None if facts.get("kind") == "refcoco" else facts.get("kind"))
    return None if kind is None else str(kind)


def named_split(data: str | PathLike[str], kind: str | None = None, split: str | None = None) -> tuple[str | None, str]:
    """Return which set and which split data are: what is asked for, where ``dataset.json`` does not say otherwise.

    Args:
        data: The data.
        kind: The public set that they are said to be; default what ``dataset.json`` says.
        split: The split that they are said to be; default what ``dataset.json`` says, or ``all``.

    Raises:
        ClocError: ``dataset.json`` says otherwise, or the set has no such split.
    """
    facts = set_facts(data)
    own, stated = stated_set(facts), facts.get("split")
    remedy = f"Name other data, or take the name from {SET_FILE} by leaving it out."
    if kind and own and kind != own and (own, kind) not in _DRAWN_FROM:
        raise ClocError(f"the data are of {own}, {SET_FILE} says, and not of {kind}", file=data, remedy=remedy)
    fixed = "set" in facts or stated in KNOWN_SPLITS.get(own or "", {})
    if split and stated and split != stated and fixed:
        problem = f"the data are the split '{stated}' of {own}, {SET_FILE} says, and not '{split}'"
        raise ClocError(problem, file=data, remedy=remedy)
    kind, split = kind or own, split or str(stated or ALL)
    known = KNOWN_SPLITS.get(kind or "")
    if known and split not in (ALL, *known):
        remedy = f"It has {', '.join(known)}; leave --split out for other data, which are then called '{ALL}'."
        raise ClocError(f"{kind} has no split '{split}'", file=data, remedy=remedy)
    return kind, split


def known_total(kind: str | None, split: str, images: int) -> int:
    """Return how many images a split has: what is known of it, or else what there are.

    Args:
        kind: The kind of set; None if that is unknown.
        split: The split's name.
        images: How many images the data at hand hold.

    Raises:
        ClocError: There are more images than the split has, so it cannot be that split.
    """
    known = KNOWN_SPLITS.get(kind or "", {}).get(split)
    if known is not None and images > known:
        raise ClocError(
            f"there are {images:,} images, and the split '{split}' of {kind} has {known:,}",
            remedy="Check which split was converted.",
        )
    return images if known is None else known
