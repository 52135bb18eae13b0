"""The ``scenes`` suite for MLLMs: visual questions, referring and grounding, asked through the Predictor.

Answers in words are right when they equal the truth after normalisation, boxes when their IoU with the truth is at
least 0.5. A grounding answer in which no box can be read is wrong, and the share of those is reported. Beside the model
stand the answers that look at no picture, the most frequent one of each kind of question and the mean box, learned on
another split than the one they are scored on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloc_mllm.data.dataset import ConversationDataset
from cloc_mllm.data.messages import Message, image_items, region_boxes, turn_text
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import draw
from cloc_mllm.evaluation.mllms.answerers import Answered, Answerer, MllmSettings, answer_record, ask_each, first_boxes
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import (
    Metric,
    box_ious,
    chance_of,
    exact_match_hits,
    iou_hits,
    majority_answers,
    majority_hits,
    mean_box,
    mean_metric,
    pointing_hits,
)

Metrics = dict[str, Metric]

TASKS = ("vqa", "referring", "grounding")
_TASK_METRICS = {"vqa": "vqa_acc", "referring": "referring_acc", "grounding": "grounding_acc50"}


@dataclass(frozen=True)
class Question:
    """One question with its truth.

    Attributes:
        row: Where it stands in its data set.
        id: What to call it.
        image: The picture it is about, as the file names it.
        task: ``vqa``, ``referring`` or ``grounding``.
        kind: What is asked within the task.
        answer: The right answer in words.
        box: The right box, xyxy in pixels of the original; for grounding.
        heldout: Whether it is about a pair of attributes that never occurs in training.
    """

    row: int
    id: str
    image: str
    task: str
    kind: str
    answer: str
    box: tuple[float, ...] | None
    heldout: bool


@dataclass(frozen=True)
class QuestionSplit:
    """Some or all questions of one split.

    Attributes:
        ref: What to call it; counts questions.
        questions: The questions, by task.
        dataset: Where their messages and pictures come from.
    """

    ref: DatasetRef
    questions: list[Question]
    dataset: ConversationDataset

    def of_task(self, task: str) -> list[Question]:
        """Return the questions of one task."""
        return [question for question in self.questions if question.task == task]


def load_questions(
    folder: str | PathLike[str], *, name: str, split: str, limit: int | None = None, seed: int = 0
) -> QuestionSplit:
    """Read ``questions.jsonl`` of a split.

    Args:
        folder: The split's folder.
        name: What to call the data set.
        split: The split's name.
        limit: Questions of each task, drawn with ``seed``; None takes all.
        seed: Of the draw.

    Raises:
        ClocError: The file cannot be read, or a question lacks its truth.
    """
    file = Path(folder) / "questions.jsonl"
    if not file.is_file():
        raise ClocError(
            "there are no questions to ask (no questions.jsonl)",
            file=folder,
            remedy="Use the validation or test split.",
        )
    dataset = ConversationDataset(file)
    every = [_question(dataset, row) for row in range(len(dataset))]
    chosen: list[Question] = []
    for task in TASKS:
        mine = [question for question in every if question.task == task]
        chosen += [mine[k] for k in draw(len(mine), limit, seed)]
    return QuestionSplit(
        DatasetRef(name, split, len(chosen), len(every), seed, "questions", str(file)), chosen, dataset
    )


def _question(dataset: ConversationDataset, row: int) -> Question:
    raw = dataset.source[row]
    file, place = dataset.source.where(row)
    task = raw.get("task")
    missing = [key for key in ("id", "image", "kind", "answer") if not isinstance(raw.get(key), str)]
    if task == "grounding" and not isinstance(raw.get("box"), (list, tuple)):
        missing.append("box")
    if missing or task not in TASKS:
        problem = f"the question has no '{missing[0]}'" if missing else f"the question is of an unknown task {task!r}"
        raise ClocError(problem, file=file, sample=place, remedy="Make the scenes anew: cloc-mllm data scenes.")
    box = tuple(float(value) for value in raw["box"]) if task == "grounding" else None
    return Question(
        row, raw["id"], raw["image"], task, raw["kind"], raw["answer"], box, bool(raw.get("heldout", False))
    )


def evaluate_mllm(
    predictor: Answerer, split: QuestionSplit, known: QuestionSplit, settings: MllmSettings | None = None
) -> tuple[Metrics, float, dict[str, Any], list[dict[str, Any]]]:
    """Ask an MLLM the questions of a split.

    Args:
        predictor: Who is asked.
        split: The questions.
        known: Questions of another split, from which the baselines learn the majority answers and the mean box.
        settings: How to ask.

    Returns:
        The metrics; the share of grounding answers in which no box could be read; the details (baselines, and the
        mode of grounding); and every answer beside its truth.
    """
    settings = settings or MllmSettings()
    answers = ask(predictor, split, settings)
    metrics: Metrics = {}
    for task in TASKS:
        if mine := split.of_task(task):
            hits = hits_of(mine, [answers[question.row] for question in mine])
            metrics |= _task_metrics(task, mine, hits, settings.seed)
    grounding = split.of_task("grounding")
    given = [answers[question.row] for question in grounding]
    if grounding:
        metrics |= _box_metrics(grounding, given, settings.seed)
    details = {
        "grounding_mode": getattr(getattr(getattr(predictor, "model", None), "config", None), "grounding", "text"),
        "baselines": baselines(split, known, settings.seed),
    }
    unparsed = sum(not answer.boxes for answer in given) / len(given) if given else 0.0
    records = [
        _record(question, answers[question.row], split.dataset.source[question.row]["messages"][-1])
        for question in split.questions
    ]
    return metrics, unparsed, details, records


def ask(predictor: Answerer, split: QuestionSplit, settings: MllmSettings) -> dict[int, Answered]:
    """Return the answer to every question, by its row. A batch holds one task: answers differ in length by task."""
    answers: dict[int, Answered] = {}
    for task in TASKS:
        mine = split.of_task(task)
        found = ask_each(
            predictor,
            len(mine),
            lambda k, mine=mine: split.dataset[mine[k].row]["messages"],  # type: ignore[misc]
            settings,
            f"{split.ref.split} {task}",
        )
        answers |= {question.row: answer for question, answer in zip(mine, found, strict=True)}
    return answers


def hits_of(questions: Sequence[Question], answers: Sequence[Answered]) -> NDArray[np.bool_]:
    """Tell which answers are right: by the box for grounding, by the words for everything else."""
    if questions and questions[0].task == "grounding":
        return iou_hits(first_boxes(answers), _boxes(questions))
    return exact_match_hits([answer.text for answer in answers], [question.answer for question in questions])


def _boxes(questions: Sequence[Question]) -> NDArray[np.float64]:
    return np.array([question.box for question in questions], dtype=np.float64).reshape(-1, 4)


def _task_metrics(task: str, questions: Sequence[Question], hits: NDArray[np.bool_], seed: int) -> Metrics:
    """Return the task's accuracy, that of each kind of question if there are several, and that on held-out pairs."""
    name = _TASK_METRICS[task]
    images = [question.image for question in questions]
    parts = {name: list(range(len(questions)))}
    kinds = sorted({question.kind for question in questions})
    if len(kinds) > 1:
        parts |= {f"{name}_{kind}": [k for k, q in enumerate(questions) if q.kind == kind] for kind in kinds}
    new = [k for k, question in enumerate(questions) if question.heldout]
    if new:
        parts[f"{name}_heldout"] = new
    return {part: mean_metric(hits[rows], [images[k] for k in rows], seed=seed) for part, rows in parts.items()}


def _box_metrics(questions: Sequence[Question], answers: Sequence[Answered], seed: int) -> Metrics:
    images = [question.image for question in questions]
    boxes = [(np.nan,) * 4 if box is None else tuple(box) for box in first_boxes(answers)]
    guess, truth = np.array(boxes, dtype=np.float64), _boxes(questions)
    centres = (guess[:, :2] + guess[:, 2:]) / 2
    return {
        "grounding_mean_iou": mean_metric(box_ious(guess, truth), images, seed=seed),
        "grounding_pointing_acc": mean_metric(pointing_hits(centres, truth), images, seed=seed),
    }


def _record(question: Question, answer: Answered, asked: Message) -> dict[str, Any]:
    right = bool(hits_of([question], [answer])[0])
    record = {
        "id": question.id,
        "row": question.row,
        "task": question.task,
        "kind": question.kind,
        "question": turn_text(asked),
        "boxes_in": region_boxes(asked),
        "truth": question.answer,
        "right": right,
    }
    if question.task == "grounding":
        iou = float(box_ious(first_boxes([answer]), _boxes([question]))[0])
        record |= {"true_boxes": [question.box], "score": 1.0 if right else round(iou, 4)}
    return record | answer_record(answer)


# --- answers that look at no picture -----------------------------------------------------------------------------


def baselines(split: QuestionSplit, known: QuestionSplit, seed: int = 0) -> dict[str, Any]:
    """Score the constant answers that ``known`` teaches on the questions of ``split``.

    Returns:
        By metric name ``majority`` (a metric) and, for answers in words, ``chance`` (a number: each kind's answers
        guessed evenly) and ``answers`` (the constant answer of each kind). The constant box is the mean one, as a share
        of the picture.
    """
    found: dict[str, Any] = {}
    for task in ("vqa", "referring"):
        mine = split.of_task(task)
        if not mine:
            continue
        pairs = [(question.kind, question.answer) for question in known.of_task(task)]
        majority, chance = majority_answers(pairs), chance_of(pairs)
        kinds, images = [question.kind for question in mine], [question.image for question in mine]
        hits = majority_hits(kinds, [question.answer for question in mine], majority)
        found |= {
            part: {
                "majority": mean_metric(hits[rows], [images[k] for k in rows], seed=seed),
                "chance": float(np.mean([chance.get(kinds[k], 0.0) for k in rows])) if rows else None,
                "answers": {kind: majority[kind] for kind in sorted({kinds[k] for k in rows}) if kind in majority},
            }
            for part, rows in _rows_by_metric(_TASK_METRICS[task], kinds).items()
        }
    mine, taught = split.of_task("grounding"), known.of_task("grounding")
    if mine and taught:
        share = mean_box(_boxes(taught), _sizes(known, taught))
        guess = np.tile(_sizes(split, mine), 2) * share
        images = [question.image for question in mine]
        found["grounding_acc50"] = {"majority": mean_metric(iou_hits(guess, _boxes(mine)), images, seed=seed)}
    return found


def _rows_by_metric(name: str, kinds: Sequence[str]) -> Mapping[str, list[int]]:
    parts = {name: list(range(len(kinds)))}
    if len(set(kinds)) > 1:
        parts |= {f"{name}_{kind}": [k for k, one in enumerate(kinds) if one == kind] for kind in sorted(set(kinds))}
    return parts


def _sizes(split: QuestionSplit, questions: Sequence[Question]) -> NDArray[np.float64]:
    """Return the (N, 2) width and height of each question's picture in pixels."""
    pictures = [image_items(split.dataset[question.row]["messages"])[0] for question in questions]
    return np.array([picture.size for picture in pictures], dtype=np.float64)
