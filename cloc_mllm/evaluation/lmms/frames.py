"""In which coordinates a task reads boxes, and an answer's boxes printed in them.

The model's own text states boxes in the mode it was trained with; a task of lmms-eval reads one frame only and scores
everything else as a miss. So the boxes of an answer, known in pixels, are printed anew where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from cloc_mllm.errors import ClocError
from cloc_mllm.models.answer_text import AnswerText
from cloc_mllm.models.boxes import BOX_MODES, BoxCodec

AUTO, OWN = "auto", "model"
BOX_FORMATS = (AUTO, OWN, *BOX_MODES)

TASK_FRAMES = {
    "cloc_*": "norm1",
    "refcoco*_bbox_rec_*": "norm1",
    "refcoco*_grounding_*": "pixel",
}
"""The frame that tasks read, by pattern of their name; all others get what the model says."""


def require_box_format(name: str) -> None:
    """Check the name of a frame.

    Raises:
        ClocError: There is none of that name.
    """
    if name not in BOX_FORMATS:
        raise ClocError(f"there is no box_format '{name}'", remedy=f"Choose one of {', '.join(BOX_FORMATS)}.")


def codec_for(task: str, box_format: str = AUTO) -> BoxCodec | None:
    """Return what prints boxes for a task, or None to leave them as the model writes them.

    Args:
        task: The task's name.
        box_format: ``auto`` looks the task up in :data:`TASK_FRAMES`; ``model`` leaves boxes alone; a mode of
            :class:`.BoxCodec` is used for every task.
    """
    if box_format == AUTO:
        box_format = next((frame for name, frame in TASK_FRAMES.items() if fnmatchcase(task, name)), OWN)
    return None if box_format == OWN else BoxCodec(box_format)


def reprinted(answer: AnswerText, own: BoxCodec, codec: BoxCodec, sizes: Sequence[tuple[int, int]]) -> str:
    """Return an answer's text with its boxes in another frame.

    Args:
        answer: What the model said; its boxes are in pixels.
        own: What printed the boxes of its text.
        codec: What is to print them.
        sizes: Width and height in pixels of each picture of the conversation.

    Returns:
        The text. What looks like a box and cannot be read stays as it is, and stays unreadable.
    """
    if not sizes:
        return answer.text
    read = own.decode(answer.text, *sizes[-1])
    found = [(entry["box"], sizes[entry["image"]]) for entry in answer.boxes]
    # A grounding head's boxes are finer than their print. Where the model also typed a box of its own, or the boxes are
    # of several pictures in pixels, text and boxes may not pair up: then what the text says counts.
    if len(found) != len(read.boxes):
        found = [(box, sizes[-1]) for box in read.boxes]
    text, end = "", 0
    for (box, size), (start, stop) in zip(found, read.spans, strict=True):
        text += answer.text[end:start] + codec.encode(box, *size)
        end = stop
    return text + answer.text[end:]
