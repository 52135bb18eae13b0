"""How many images or expressions the public splits have, so that a part of one is never called by its name.

Sources: for COCO and LVIS what their importers check, for the others the sets' own pages. The Karpathy splits of COCO
and the splits of Flickr30k are those of Karpathy and Fei-Fei (arXiv 1412.2306).
"""

from __future__ import annotations

import json
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
    **{
        source.kind: {split: counts["images_listed"] for split, counts in source.expected.items()}
        for source in (CocoSource, LvisSource)
    },
    "coco-karpathy": {"val": 5_000, "test": 5_000},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
    "flickr30k-entities": {"train": 29_783, "val": 1_000, "test": 1_000},
    "imagenet": {"val": 50_000},
    "imagenet-v2": {"matched-frequency": 10_000, "threshold-0.7": 10_000, "top-images": 10_000},
}
"""By kind of set, as ``dataset.json`` has it, and by split."""

KNOWN_EXPRESSIONS: dict[str, dict[str, int]] = {
    name: {split: counts[1] for (owner, _, split), counts in KNOWN.items() if owner == name}
    for name in dict.fromkeys(owner for owner, _, _ in KNOWN)
}
"""Referring expressions by data set and split, in the partitions that are reported on: UNC's of RefCOCO and RefCOCO+,
UMD's of RefCOCOg."""


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
            remedy="Give the data another name with --split.",
        )
    return images if known is None else known
