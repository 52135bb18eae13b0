"""Where the tasks' questions come from: this package's own data, one flat document a question.

lmms-eval loads a data set by name and hands it to `process_docs`. Ours lie in folders that only a run knows, so the
tasks load a placeholder whose split is named after the questions wanted, and :func:`documents` puts these in its place.
Documents hold no picture: they say where it is, and are read from there when they are asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from loguru import logger
from PIL import Image

from cloc_mllm.data.dataset import ConversationDataset, RegionTextDataset
from cloc_mllm.data.importers.pictures import picture_in
from cloc_mllm.data.messages import messages_of
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import SceneTruth, load_region_split
from cloc_mllm.evaluation.mllms.questions import load_questions
from cloc_mllm.evaluation.suites.flickr30k import load_captions
from cloc_mllm.evaluation.suites.grounding import load_expressions
from cloc_mllm.evaluation.suites.referring import load_referring
from cloc_mllm.inference.images import read_image

Document = dict[str, Any]

SCENES, REFCOCO, FLICKR30K, LVIS_REFERRING = (
    "CLOC_SCENES",
    "CLOC_REFCOCO",
    "CLOC_FLICKR30K",
    "CLOC_LVIS_REFERRING",
)
"""Environment variables that say where the data lie."""

LAYOUTS = {
    SCENES: "the folder that `cloc-mllm data scenes` wrote",
    REFCOCO: "a folder with refcoco/testA, refcocog/test and so on, each from `cloc-mllm data convert refcoco`",
    FLICKR30K: "a folder with Annotations, Sentences, test.txt, and the pictures in images",
    LVIS_REFERRING: "the folder that `cloc-mllm data build lvis-referring` wrote",
}


@dataclass(frozen=True)
class Source:
    """The questions of one task.

    Attributes:
        variable: The environment variable that says where they are.
        read: Makes documents out of what is there.
        part: Which of them.
    """

    variable: str
    read: Callable[[Path, str], list[Document]]
    part: str


def documents(placeholder: Dataset) -> Dataset:
    """Return the questions that the placeholder's split is named after; lmms-eval's `process_docs`.

    Raises:
        ClocError: It is not said where they are, or they cannot be read.
    """
    source = SOURCES[str(placeholder.split)]
    place = os.environ.get(source.variable)
    if not place:
        raise ClocError(
            f"it is not said where the data of '{placeholder.split}' are",
            remedy=f"Set {source.variable} to {LAYOUTS[source.variable]}.",
        )
    if not Path(place).exists():
        raise ClocError(f"{source.variable} names what is not there", file=place)
    found = source.read(Path(place), source.part)
    if not found:
        raise ClocError(f"there is no question of '{placeholder.split}'", file=place)
    return Dataset.from_list(found)


def scene_questions(folder: Path, task: str) -> list[Document]:
    """The questions of one task of the test split of procedural scenes."""
    truth = SceneTruth.load(folder)
    split = load_questions(truth.split_folder("test"), name=truth.name, split="test")
    file = str(truth.split_folder("test") / "questions.jsonl")
    return [
        {
            "id": question.id,
            "image": question.image,
            "file": file,
            "row": question.row,
            "kind": question.kind,
            "answer": question.answer,
            "boxes": [list(question.box)] if question.box else [],
        }
        for question in split.of_task(task)
    ]


def expressions(folder: Path, part: str) -> list[Document]:
    """The referring expressions of one split of converted RefCOCO, RefCOCO+ or RefCOCOg; `part` is its folder."""
    name, split = part.split("/")
    found = load_expressions(load_region_split(folder / part, split=split), name)
    return [
        {
            "id": f"{found.data.ids[region.image]}-{number}",
            "image": found.data.ids[region.image],
            "file": str(folder / part),
            "row": found.data.rows[region.image],
            "phrase": region.text,
            "size": list(found.data.sizes[region.image]),
            "boxes": [list(region.box)],
        }
        for number, region in enumerate(found.regions)
    ]


def entities(folder: Path, part: str) -> list[Document]:
    """The phrases of Flickr30k Entities that have a box, each as often as the captions say it."""
    found = load_captions(folder, folder / "images", part)
    logger.info(f"flickr30k entities, {part}: {found.counts}")
    return [
        {
            "id": f"{caption.image}-{caption.number}-{number}",
            "image": caption.image,
            "file": str(picture_in(found.pictures, f"{caption.image}.jpg")),
            "phrase": phrase.text.lower(),
            "kind": phrase.types[0],
            "boxes": phrase.boxes,
        }
        for caption in found.captions
        for number, phrase in enumerate(caption.phrases)
    ]


def referring_questions(file: Path, kind: str) -> list[Document]:
    """The questions of LVIS referred-object classification whose object is shown in one way: box, point, free-form."""
    split = load_referring(file)
    return [
        {
            "id": one.id,
            "image": one.image,
            "file": str(file),
            "row": one.row,
            "kind": kind,
            "answer": one.pair[0],
            "synonyms": list(one.pair[1]),
            "negative": one.pair[2],
            "negative_synonyms": list(one.pair[3]),
        }
        for one in split.questions
        if one.kind == kind
    ]


def picture(doc: Mapping[str, Any]) -> Image.Image:
    """The picture that a document with a phrase is about."""
    row = doc.get("row")
    return read_image(doc["file"]) if row is None else _regions(doc["file"])[row]["image"]


def question_items(doc: Mapping[str, Any], *, opened: bool) -> list[dict[str, Any]]:
    """The items of a document that is a question of its own.

    Args:
        doc: The document.
        opened: Whether image items hold the picture, or only name it.

    Raises:
        ClocError: The question has several turns.
    """
    dataset = _conversations(doc["file"])
    turns = dataset[doc["row"]]["messages"] if opened else messages_of(dataset.source[doc["row"]])
    if len(turns) != 1:
        raise ClocError(f"the question has {len(turns)} turns, not one", file=doc["file"], sample=doc["id"])
    content = turns[0]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def picture_size(doc: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height in pixels of the picture that a document is about."""
    if doc.get("size"):
        return int(doc["size"][0]), int(doc["size"][1])
    shown = (
        [picture(doc)]
        if "phrase" in doc
        else [item["image"] for item in question_items(doc, opened=True) if item["type"] == "image"]
    )
    return shown[0].size


@lru_cache(maxsize=4)
def _conversations(file: str) -> ConversationDataset:
    return ConversationDataset(file, preferred="questions.jsonl")


@lru_cache(maxsize=4)
def _regions(folder: str) -> RegionTextDataset:
    return RegionTextDataset(folder, max_regions=None)


_REFCOCO_SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}

SOURCES = {
    **{f"scenes_{task}": Source(SCENES, scene_questions, task) for task in ("vqa", "referring", "grounding")},
    **{
        f"{name.replace('+', '_plus')}_{split}": Source(REFCOCO, expressions, f"{name}/{split}")
        for name, splits in _REFCOCO_SPLITS.items()
        for split in splits
    },
    "flickr30k_test": Source(FLICKR30K, entities, "test"),
    **{
        f"lvis_{kind.replace('-', '_')}": Source(LVIS_REFERRING, referring_questions, kind)
        for kind in ("box", "point", "free-form")
    },
}
"""By the name of the placeholder's split."""
