"""Who answers questions, and how many questions are put to whoever it is.

Whatever answers is reached through one method, :meth:`Answerer.chat`: conversations in, text and boxes in pixels out.
:class:`cloc_mllm.inference.predictor.Predictor` is one, :class:`cloc_mllm.evaluation.mllms.stock.StockAnswerer` lets
models of other projects be one, and a test's oracle another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm


class Answered(Protocol):
    """What is needed of an answer; :class:`cloc_mllm.models.answer_text.AnswerText` is one."""

    text: str
    boxes: list[dict[str, Any]]
    unparsed: list[str]


class Answerer(Protocol):
    """Who is asked; :class:`cloc_mllm.inference.predictor.Predictor` is one."""

    def chat(
        self, conversations: Sequence[Any], max_new_tokens: int = ..., batch_size: int = ...
    ) -> Sequence[Answered]:
        """Answer conversations that end with a user's turn."""
        ...


@dataclass(frozen=True)
class MllmSettings:
    """How much is asked.

    Attributes:
        limit: Questions of each task, drawn with ``seed``; None asks all.
        batch_size: Questions answered together.
        max_new_tokens: Longest answer in tokens.
        seed: Of the draw and of the bootstrap.
        progress: Show a progress bar, if stderr is a terminal.
    """

    limit: int | None = None
    batch_size: int = 128
    max_new_tokens: int = 48
    seed: int = 0
    progress: bool = True


def ask_each(
    answerer: Answerer,
    number: int,
    conversation: Callable[[int], Any],
    settings: MllmSettings,
    label: str,
) -> list[Answered]:
    """Ask question after question, batch by batch, so that no more than a batch of pictures is ever open.

    Args:
        answerer: Who is asked.
        number: How many questions there are.
        conversation: Makes the messages of the k-th one.
        settings: Batch size, longest answer, and whether to show progress.
        label: What the progress bar says.

    Returns:
        The answers, in the order of the questions.
    """
    answers: list[Answered] = []
    with tqdm(total=number, unit="question", desc=label, disable=None if settings.progress else True) as bar:
        for start in range(0, number, settings.batch_size):
            batch = [conversation(k) for k in range(start, min(start + settings.batch_size, number))]
            answers += answerer.chat(batch, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
            bar.update(len(batch))
    return answers


def first_boxes(answers: Sequence[Answered]) -> list[Sequence[float] | None]:
    """The first box of each answer, xyxy in pixels; None where there is none."""
    return [answer.boxes[0]["box"] if answer.boxes else None for answer in answers]


def answer_record(answer: Answered) -> dict[str, Any]:
    """What `answers.jsonl` holds of every answer: its words, its boxes, and what could not be read of it."""
    record: dict[str, Any] = {"answer": answer.text}
    if answer.boxes:
        record["boxes"] = [{"phrase": found.get("phrase", ""), "box": list(found["box"])} for found in answer.boxes]
    return record | ({"unparsed": list(answer.unparsed)} if answer.unparsed else {})
