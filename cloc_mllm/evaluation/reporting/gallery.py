"""Pictures of single answers: the question, what was asked about, the true box and the model's, drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from cloc_mllm.data.dataset import open_image
from cloc_mllm.data.messages import image_items, messages_of
from cloc_mllm.data.readers import SampleSource, open_samples, sample_name
from cloc_mllm.data.schema import kind_of
from cloc_mllm.errors import ClocError
from cloc_mllm.pages.drawing import PREDICTED_COLOUR, PROMPT_COLOUR, TRUE_COLOUR, DrawnBox, draw_boxes
from cloc_mllm.pages.page import data_uri

ANSWERS_FILE = "answers.jsonl"
SHOWN = 24
_SIDE = 384

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """One entry of a gallery.

    Attributes:
        data: The drawn picture, as an `<img>` takes it.
        question: What was asked.
        truth: What is right.
        answers: What each model said, with whether it is right; by the model's name.
    """

    data: str
    question: str
    truth: str
    answers: Mapping[str, tuple[str, bool]]


class Pictures:
    """The pictures that answers are about.

    Args:
        path: The very samples that records' `row` counts in, a file or a pattern; opened when they are needed.
    """

    def __init__(self, path: str | PathLike[str] | None) -> None:
        self._path = path
        self._source: SampleSource | None = None

    def has(self, record: Record) -> bool:
        """Whether a record says which picture it is about: its file as `picture`, or `row`, its sample."""
        return "picture" in record or ("row" in record and self._path is not None)

    def __call__(self, record: Record) -> Image.Image:
        """Return the (first) picture that an answer is about, decoded.

        Raises:
            ClocError: There is no such sample, or its picture cannot be read.
        """
        if "picture" in record:
            return open_image(record["picture"], None, None, str(record.get("id", "")))
        if self._source is None:
            self._source = open_samples(str(self._path))
        row = record["row"]
        if not 0 <= row < len(self._source):
            raise ClocError(f"there are {len(self._source)} samples, and no sample {row}: the data have changed")
        sample = self._source[row]
        file, place = self._source.where(row)
        first: Any = sample.get("image")
        if kind_of(sample) != "region-text" and first is None:
            first = next(iter(image_items(messages_of(sample))), None)
        return open_image(first, self._source.folder(row), file, sample_name(sample, place))


def read_answers(folder: str | PathLike[str]) -> list[dict[str, Any]]:
    """Read the answers that a suite wrote beside its report; empty if it wrote none.

    Raises:
        ClocError: The file cannot be read.
    """
    path = Path(folder) / ANSWERS_FILE
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot read the answers ({error})", file=path, remedy="Run the suite again.") from error


def score_of(record: Record) -> float:
    """Return how good an answer is: its `score`, or else 1 if it is right and 0 if not."""
    return float(record.get("score", record.get("right", 0.0)))


def worst(records: Sequence[Record], count: int = SHOWN) -> list[Record]:
    """Return the worst answers: the lowest scores first, taking turns between kinds so that no kind hides another.

    Answers that are right (score 1) are never among them.
    """
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=score_of):
        if score_of(record) < 1:
            groups.setdefault(f"{record.get('task', '')} {record.get('kind', '')}", []).append(record)
    turns = [
        group[k]
        for k in range(max(map(len, groups.values()), default=0))
        for group in groups.values()
        if k < len(group)
    ]
    return turns[:count]


def draw_answers(
    pictures: Pictures, answered: Mapping[str, Record], colours: Mapping[str, str] | None = None
) -> Picture:
    """Draw what one or several models answered to one question.

    Args:
        pictures: Of the data set that the question is of.
        answered: By the model's name its record; all of one question.
        colours: The colour of each model's boxes.
    """
    first = next(iter(answered.values()))
    boxes = [DrawnBox(box, "asked", PROMPT_COLOUR) for box in first.get("boxes_in") or ()]
    boxes += [DrawnBox(box, colour=TRUE_COLOUR, dashed=True) for box in first.get("true_boxes") or ()]
    for name, record in answered.items():
        colour = (colours or {}).get(name, PREDICTED_COLOUR)
        boxes += [DrawnBox(found["box"], colour=colour) for found in record.get("boxes") or ()]
    drawn = draw_boxes(pictures(first), boxes, smallest_side=_SIDE)
    drawn.thumbnail((_SIDE, _SIDE))
    return Picture(
        data_uri(drawn, photograph=True),
        str(first.get("question", first["id"])),
        str(first.get("truth", "")),
        {name: (str(record.get("answer", "")), bool(record.get("right"))) for name, record in answered.items()},
    )
