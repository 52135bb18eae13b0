"""From what the language model said to text with boxes in it: phrases, coordinates, and what could not be read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .boxes import BoxCodec

_CLAUSE_END = re.compile(r"[.!?;:,\n\])]")
_CONNECTIVES = re.compile(r"^(?:(?:and|or|then|also|plus)(?:\s+|$))+", re.IGNORECASE)
_ABSENT = re.compile(
    r"\b(?:there\s+(?:is|are|was|were)\s+no|i\s+(?:see|find|found)\s+no"
    r"|there\s+(?:(?:is|are)n['’]t|(?:is|are)\s+not)\s+(?:an?|any)"
    r"|(?:can['’]t|cannot|can\s+not|could\s+not|couldn['’]t)\s+(?:see|find)\s+(?:an?|any|the))"
    r"\s+(?P<phrase>[^.!?;:,\n\[\](]+)",
    re.IGNORECASE,
)
_TURN = re.compile(r"\s+(?:but|because|though|although|however|while)\b.*$", re.IGNORECASE)
_WHERE = re.compile(
    r"\s+(?:here|there|anywhere|visible|present|(?:in|on|within)\s+(?:the|this|that)\s+(?:\w+\s+)?"
    r"(?:image|picture|photo|photograph|scene))\s*$",
    re.IGNORECASE,
)


def phrase_before(text: str) -> str:
    """The phrase that ends a text: what follows the last comma, sentence end or box, without a leading "and".

    >>> phrase_before("Two things: a red cube, and a blue ball ")
    'a blue ball'
    """
    clause = _CLAUSE_END.split(text.rstrip(" \t\n.,:;"))[-1].strip()
    return _CONNECTIVES.sub("", clause).strip()


def absent_answer(phrase: str) -> str:
    """How an answer says that what was asked for is not there; :func:`absent_phrases` reads it.

    >>> absent_answer("red cube")
    'There is no red cube.'
    """
    return f"There is no {phrase.strip()}."


def absent_phrases(text: str) -> list[str]:
    """What a text says is not there, in English.

    >>> absent_phrases("There is no red cube in the picture. There are no dogs, but a cat.")
    ['red cube', 'dogs']
    """
    found = []
    for match in _ABSENT.finditer(text):
        phrase, before = _TURN.sub("", match.group("phrase")).strip(), ""
        while phrase != before:
            phrase, before = _WHERE.sub("", f" {phrase}").strip(), phrase
        if phrase:
            found.append(phrase)
    return found


@dataclass
class AnswerText:
    """An answer put together from pieces of text and boxes.

    Attributes:
        text: What is shown, coordinates printed as the codec writes them.
        boxes: ``{"phrase", "box", "image"}`` with the box in pixels of the original image and the image counted
            within the conversation.
        unparsed: What looks like a box and cannot be read, or was to be a box on no image.
        content: The same as items of a message: as an assistant's turn it renders to what was generated.
        absent: What the answer says is not there: a whole answer without boxes, where ``unparsed`` is a failed one.
        num_tokens: How many tokens were generated, without the one that ends an answer.
        num_prompt_tokens: How many the question took, those of images and regions included.
    """

    text: str = ""
    boxes: list[dict[str, Any]] = field(default_factory=list)
    unparsed: list[str] = field(default_factory=list)
    content: list[dict[str, Any]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    # What an answer cost is not part of what it says: answers that say the same are equal.
    num_tokens: int = field(default=0, compare=False, repr=False)
    num_prompt_tokens: int = field(default=0, compare=False, repr=False)

    @property
    def boxes_by_phrase(self) -> dict[str, list[list[float]]]:
        """All boxes of each phrase, in order; none for a phrase that the answer says is not there."""
        found: dict[str, list[list[float]]] = {phrase: [] for phrase in self.absent}
        for entry in self.boxes:
            found.setdefault(entry["phrase"], []).append(entry["box"])
        return found

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a turn, for the conversation to go on from."""
        return {"role": "assistant", "content": self.content or [{"type": "text", "text": self.text}]}

    def add_text(self, text: str) -> None:
        """Go on with text."""
        if text:
            self.text += text
            self.content.append({"type": "text", "text": text})

    def add_box(self, box: list[float], size: tuple[int, int], image: int, codec: BoxCodec) -> None:
        """Print a box, in pixels, behind the text so far."""
        self.note_box(self.text, box, image)
        space = "" if not self.text or self.text[-1].isspace() else " "
        self.text += space + codec.encode(box, *size)
        if box[0] < box[2] and box[1] < box[3]:  # a box that fell wholly into the padding has no area left
            self.content.append({"type": "region", "box": box, "image": image})

    def note_box(self, before: str, box: list[float], image: int) -> None:
        """Note a box that the text already shows, for the phrase that ends ``before``."""
        # Boxes that follow each other are of one phrase, said before the first.
        phrase = phrase_before(before) or (self.boxes[-1]["phrase"] if self.boxes else "")
        self.boxes.append({"phrase": phrase, "box": box, "image": image})


def read_answer(text: str, size: tuple[int, int] | None, image: int, codec: BoxCodec) -> AnswerText:
    """Find the boxes that were generated as text.

    Args:
        text: The answer.
        size: Width and height of the image it is about, in pixels; ``None`` without one, and then nothing is a box.
        image: The number of that image.
        codec: Reads the boxes.
    """
    answer = AnswerText()
    answer.add_text(text)
    answer.absent = absent_phrases(text)
    if size is None:
        return answer
    found = codec.decode(text, *size)
    end = 0
    for box, (start, stop) in zip(found.boxes, found.spans, strict=True):
        answer.note_box(text[end:start], box, image)
        end = stop
    answer.unparsed = list(found.unparsed)
    return answer
