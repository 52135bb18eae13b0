"""A conversation about one image, with boxes in and boxes out: what `cloc-mllm chat` is made of.

Boxes are pixels of the original image on both sides. The session keeps the turns; the terminal loop only reads lines,
so a test can hold a conversation through it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TextIO

from PIL import Image

from cloc_mllm.errors import ClocError
from cloc_mllm.inference.templates import REGION, question_items
from cloc_mllm.models.image_processing_cloc import load_image
from cloc_mllm.pages.drawing import PALETTE, PROMPT_COLOUR, DrawnBox, draw_boxes

DEFAULT_QUESTION = f"What is {REGION}?"
HELP = """\
Ask a question, or:
  /image FILE           look at another image (starts a new conversation)
  /box x1,y1,x2,y2 …    boxes, in pixels, for the next question; <region> in it says where each belongs
  /clear                forget the conversation, keep the image
  /draw FILE            save the image with the boxes asked about and found in the last answer
  /help                 this text
  /quit                 leave (so does Ctrl-D)"""

Box = list[float]


class Answerer(Protocol):
    """The part of :class:`cloc_mllm.inference.predictor.Predictor` that a chat needs."""

    def chat(self, conversations: Sequence[Any], max_new_tokens: int = ...) -> list[Any]:
        """Answer the last user turn of each conversation."""
        ...

    def stream(self, conversation: Any, max_new_tokens: int = ...) -> Any:
        """Answer one conversation piece by piece; the whole is its `answer`."""
        ...


@dataclass
class Reply:
    """One answer.

    Attributes:
        question: What was asked, with `<region>` where boxes stood.
        boxes_in: The boxes asked about, pixels.
        text: The answer as the model gave it, coordinates printed.
        boxes: Boxes in the answer: `{"phrase": str, "box": [x1, y1, x2, y2]}`, pixels.
        unparsed: Pieces of the answer that looked like boxes and could not be read.
    """

    question: str
    boxes_in: list[Box]
    text: str
    boxes: list[dict[str, Any]] = field(default_factory=list)
    unparsed: list[str] = field(default_factory=list)

    def to_dict(self, image: str | None) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "image": image,
            "question": self.question,
            "boxes_in": self.boxes_in,
            "answer": self.text,
            "boxes": self.boxes,
            "unparsed": self.unparsed,
            "frame": "pixels of the original image, x1 y1 x2 y2",
        }


class ChatSession:
    """The turns of a conversation about at most one image.

    Args:
        answerer: Usually a Predictor.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, answerer: Answerer, max_new_tokens: int = 128) -> None:
        self.answerer = answerer
        self.max_new_tokens = max_new_tokens
        self.picture: Image.Image | None = None
        self.image_name: str | None = None
        self.last: Reply | None = None
        self._messages: list[dict[str, Any]] = []

    def open_image(self, path: str | PathLike[str]) -> None:
        """Look at an image from now on; the conversation so far is forgotten.

        Raises:
            ClocError: There is no such file, or it is not an image that can be read.
        """
        self.picture = load_picture(path)
        self.image_name = str(path)
        self.clear()

    def clear(self) -> None:
        """Forget the turns, keep the image."""
        self._messages = []
        self.last = None

    def ask(self, question: str, boxes: Sequence[Box] = (), on_piece: Callable[[str], None] | None = None) -> Reply:
        """Ask about the image, the boxes, or neither.

        Args:
            question: May hold one `<region>` for each box; without any, the boxes are put after it. Empty: the boxes
                are asked about with the question that the demo's models were trained on.
            boxes: Pixels of the original image.
            on_piece: Called with each piece of text as it is generated.

        Returns:
            The answer.

        Raises:
            ClocError: A box cannot be one, boxes without an image, or another number of `<region>` than of boxes.
        """
        given = [self.check_box(box) for box in boxes]
        text = place_regions(question, len(given))
        content = question_items(text, given)
        if self.picture is not None and not self._messages:
            content.insert(0, {"type": "image", "image": self.picture})
        turn = {"role": "user", "content": content}
        answer = self._answer([*self._messages, turn], on_piece)
        self._messages += [turn, answer.message]
        boxes_out = [{"phrase": item["phrase"], "box": [round(v, 2) for v in item["box"]]} for item in answer.boxes]
        self.last = Reply(text, given, answer.text, boxes_out, list(answer.unparsed))
        return self.last

    def _answer(self, conversation: list[dict[str, Any]], on_piece: Callable[[str], None] | None) -> Any:
        if on_piece is None:
            return self.answerer.chat([conversation], max_new_tokens=self.max_new_tokens)[0]
        stream = self.answerer.stream(conversation, max_new_tokens=self.max_new_tokens)
        for piece in stream:
            on_piece(piece)
        return stream.answer

    def check_box(self, box: Sequence[float]) -> Box:
        """Return a box as a list if it is one on the image.

        Raises:
            ClocError: It is not, or there is no image; the text says why.
        """
        name = ",".join(f"{value:g}" for value in box)
        if self.picture is None:
            raise ClocError(f"box {name}: there is no image for it", remedy="Give one with --image (or /image).")
        if len(box) != 4 or not all(math.isfinite(value) for value in box):
            raise ClocError(f"box {name} is not four numbers", remedy="Write x1,y1,x2,y2 in pixels.")
        x1, y1, x2, y2 = box
        if x2 <= x1 or y2 <= y1:
            raise ClocError(
                f"box {name} has no area: x2 must be greater than x1 and y2 than y1",
                remedy="Write the left upper corner, then the right lower one.",
            )
        width, height = self.picture.size
        if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            raise ClocError(
                f"box {name} reaches outside the image, which is {width} x {height} pixels", file=self.image_name
            )
        return [float(value) for value in box]

    def drawn(self) -> Image.Image:
        """Return the image with the boxes of the last question and answer.

        Raises:
            ClocError: There is no image, or nothing was asked yet.
        """
        if self.picture is None or self.last is None:
            raise ClocError("there is nothing to draw", remedy="Open an image and ask something first.")
        asked = [
            DrawnBox(box, f"region {number}" if len(self.last.boxes_in) > 1 else "asked", PROMPT_COLOUR, dashed=True)
            for number, box in enumerate(self.last.boxes_in, 1)
        ]
        colours = [colour for colour in PALETTE if colour != PROMPT_COLOUR]
        found = [
            DrawnBox(item["box"], item.get("phrase") or "", colours[number % len(colours)])
            for number, item in enumerate(self.last.boxes)
        ]
        return draw_boxes(self.picture, [*asked, *found])


def load_picture(path: str | PathLike[str]) -> Image.Image:
    """Read an image file, upright and RGB.

    Raises:
        ClocError: There is no such file, or it cannot be read as an image.
    """
    try:
        return load_image(Path(path).expanduser())
    except ValueError as error:
        raise ClocError(str(error)) from error


def parse_box(text: str) -> Box:
    """Read `x1,y1,x2,y2`; spaces and brackets around the numbers are let pass.

    Raises:
        ClocError: It is not four numbers.
    """
    words = [word for word in re.split(r"[,\s]+", text.strip().strip("[]()")) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise ClocError(f"'{text}' is not a box", remedy="Write x1,y1,x2,y2 in pixels, as in 12,30,80,96.")
    return numbers


def place_regions(question: str, count: int) -> str:
    """Return the question with exactly `count` `<region>` in it.

    Raises:
        ClocError: The question holds another number, or nothing is asked at all.
    """
    question = question.strip()
    found = question.count(REGION)
    if found == count and question:
        return question
    if found:
        raise ClocError(
            f"wrong number of {REGION}: the question holds {found}, {count} boxes are given",
            remedy=f"Give one box for each {REGION}, in order.",
        )
    if not count:
        raise ClocError("there is no question", remedy='Give one, as in: cloc-mllm chat M --image F "What is this?"')
    regions = " and ".join([REGION] * count)
    return f"{question} {regions}" if question else DEFAULT_QUESTION.replace(REGION, regions)


def converse(session: ChatSession, lines: Iterable[str], out: TextIO, boxes: Sequence[Box] = ()) -> None:
    """Hold a conversation line by line until the lines end or `/quit`.

    A mistake in a line is answered with what was wrong, and the conversation goes on.

    Args:
        session: The conversation.
        lines: What the user types.
        out: Where answers go.
        boxes: Boxes for the first question.
    """
    pending = list(boxes)
    for line in lines:
        words = line.strip().split(maxsplit=1)
        if not words and not pending:
            continue
        try:
            if words and words[0] == "/quit":
                return
            if words and words[0].startswith("/"):
                pending = _command(session, words[0], words[1] if len(words) > 1 else "", pending, out)
                continue
            print(_ask_aloud(session, line, pending, out), file=out, flush=True)
            pending = []
        except ClocError as error:
            print(f"! {error}", file=out, flush=True)


def _ask_aloud(session: ChatSession, line: str, boxes: Sequence[Box], out: TextIO) -> str:
    """Ask, and on a terminal show the answer while it is generated; return what is left to show."""
    if not out.isatty():
        return format_reply(session.ask(line, boxes))

    def show(piece: str) -> None:
        print(piece, end="", file=out, flush=True)

    reply = session.ask(line, boxes, on_piece=show)
    return "".join(f"\n{line}" for line in box_lines(reply))


def _command(session: ChatSession, name: str, rest: str, pending: list[Box], out: TextIO) -> list[Box]:
    """Do one slash command; return the boxes that wait for the next question."""
    if name == "/image":
        session.open_image(rest)
        assert session.picture is not None
        print(f"{rest}: {session.picture.width} x {session.picture.height} pixels", file=out, flush=True)
        return []
    if name == "/box":
        return [*pending, *(session.check_box(parse_box(word)) for word in rest.split() or [""])]
    if name == "/clear":
        session.clear()
        return []
    if name == "/draw":
        save_picture(session.drawn(), rest)
        print(f"wrote {rest}", file=out, flush=True)
        return pending
    if name != "/help":
        raise ClocError(f"there is no command {name}", remedy="Try /help.")
    print(HELP, file=out, flush=True)
    return pending


def save_picture(picture: Image.Image, path: str | PathLike[str]) -> None:
    """Write a picture in the format that the file's name asks for.

    Raises:
        ClocError: The name's ending is no picture format, or the place cannot be written to.
    """
    try:
        picture.save(path)
    except (ValueError, OSError) as error:
        raise ClocError(
            f"cannot save a picture here ({error})", file=path, remedy="Try a name like out.png."
        ) from error


def format_reply(reply: Reply) -> str:
    """Return an answer as the terminal shows it: the text, then each box in pixels."""
    return "\n".join([reply.text, *box_lines(reply)])


def box_lines(reply: Reply) -> list[str]:
    """Return a line for each box of an answer, in pixels, and for each that could not be read."""
    lines = []
    for item in reply.boxes:
        corners = ", ".join(f"{value:.0f}" for value in item["box"])
        lines.append(f"  {item.get('phrase') or 'box'}: [{corners}] px")
    return lines + [f"  could not be read as a box: {piece}" for piece in reply.unparsed]
