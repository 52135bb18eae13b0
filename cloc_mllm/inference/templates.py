"""What is asked on a user's behalf, and questions with regions in them as the content of a turn.

The questions are those that alignment and the procedural scenes teach (``What is <region>?``, ``Where is the ...?``). A
model that was tuned on others is asked best in the words of its data: pass a :class:`Templates` of your own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cloc_mllm.errors import ClocError

REGION = "<region>"
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Templates:
    """The questions behind the one-line tasks.

    Attributes:
        describe: Asks for a description of ``<region>``.
        describe_image: Asks for a description of a whole picture.
        refer: Asks what ``<region>`` is.
        ground: Asks where ``{phrase}`` is; a leading article of the phrase is left out.
    """

    describe: str = "Describe <region>."
    describe_image: str = "Describe the image."
    refer: str = "What is <region>?"
    ground: str = "Where is the {phrase}?"

    def __post_init__(self) -> None:
        for name, part in (("describe", REGION), ("refer", REGION), ("ground", "{phrase}")):
            if getattr(self, name).count(part) != 1:
                raise ClocError(f"the template '{name}' needs {part} exactly once: {getattr(self, name)!r}")

    def where_is(self, phrase: str) -> str:
        """The question for a phrase.

        >>> Templates().where_is("a red circle")
        'Where is the red circle?'

        Raises:
            ClocError: The phrase is blank.
        """
        if not isinstance(phrase, str) or not phrase.strip():
            raise ClocError("there is no phrase to look for", remedy='Give one, such as "red circle".')
        return self.ground.replace("{phrase}", _ARTICLE.sub("", phrase.strip()))


def region_item(region: Any) -> dict[str, Any]:
    """A region as an item of a message.

    Args:
        region: ``[x1, y1, x2, y2]`` or ``[x, y]`` in pixels of the original image (a list, an array or a tensor); or an
            item, ``{"box": ...}``, ``{"point": ...}`` or any other kind that conversations know, which is passed on.

    >>> region_item([3, 4, 20, 25])
    {'type': 'region', 'box': [3, 4, 20, 25]}
    >>> region_item({"point": [5, 6]})
    {'type': 'region', 'point': [5, 6]}

    Raises:
        ClocError: It is none of these.
    """
    if isinstance(region, Mapping):
        return {"type": "region", **region}
    numbers = region.tolist() if hasattr(region, "tolist") else region
    if isinstance(numbers, (list, tuple)) and all(isinstance(value, Real) for value in numbers):
        if len(numbers) == 4:
            return {"type": "region", "box": list(numbers)}
        if len(numbers) == 2:
            return {"type": "region", "point": list(numbers)}
    raise ClocError(
        f"{region!r} is not a region",
        remedy="Give [x1, y1, x2, y2] or [x, y] in pixels of the original image, or an item of a message.",
    )


def is_region(value: Any) -> bool:
    """Whether something is one region rather than several."""
    if isinstance(value, Mapping):
        return True
    if hasattr(value, "ndim"):
        return bool(value.ndim == 1)
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Real) for v in value)


def question_items(question: str, regions: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """A question and the regions it is about, as items of a message.

    Args:
        question: With one ``<region>`` where each region belongs; without any, they are put after it.
        regions: As :func:`region_item` takes them.

    >>> question_items("What is <region>?", [[3, 4, 20, 25]])[1]
    {'type': 'region', 'box': [3, 4, 20, 25]}

    Raises:
        ClocError: Nothing is asked, or the question has another number of ``<region>``.
    """
    if not isinstance(question, str) or not question.strip():
        raise ClocError("there is no question")
    found = question.count(REGION)
    if found not in (0, len(regions)):
        raise ClocError(
            f"wrong number of {REGION}: the question holds {found}, {len(regions)} regions are given",
            remedy=f"Give one region for each {REGION}, in order.",
        )
    if regions and not found:
        question = f"{question.strip()} {' and '.join([REGION] * len(regions))}"
    items: list[dict[str, Any]] = []
    for number, part in enumerate(question.split(REGION)):
        if number:
            items.append(region_item(regions[number - 1]))
        if part:
            items.append({"type": "text", "text": part})
    return items
