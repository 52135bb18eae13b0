"""Picks the questions whose answers the report shows one by one: a reader sees answers and boxes, not only averages.

They are the first of the test split, not chosen by result: that would show whatever one likes to show. The answers are
those the evaluation recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.data.messages import turn_text
from cloc_mllm.evaluation.scoring.metrics import box_ious

CHAT_IMAGES = 4
GROUNDING_QUESTIONS = 8


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file; none if the file is missing."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def collect_samples(split: Path, evaluations: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return the samples of the report.

    Args:
        split: The split's folder, with `questions.jsonl`.
        evaluations: By model the folder of its evaluation, with `answers.jsonl`.

    Returns:
        For each shown question its text, truth and boxes, and by model the answer's text, boxes and IoU with the true
        box. All boxes are pixels; `image` is relative to `split`.
    """
    answers = {
        name: {row["id"]: row for row in read_jsonl(path / "answers.jsonl")} for name, path in evaluations.items()
    }
    questions = read_jsonl(split / "questions.jsonl")
    asked = [question for question in questions if all(question["id"] in rows for rows in answers.values())]
    return [
        {
            "id": question["id"],
            "image": question["image"],
            "task": question["task"],
            "question": turn_text(question["messages"][-1]),
            "truth": question["answer"],
            "box": question.get("box"),
            "boxes_in": question.get("boxes_in", []),
            "answers": {name: _answer(rows[question["id"]], question.get("box")) for name, rows in answers.items()},
        }
        for question in choose_questions(asked)
    ]


def choose_questions(questions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return every question about the first images, and the first grounding questions.

    Args:
        questions: The split's, in file order.
    """
    images = list(dict.fromkeys(question["image"] for question in questions))[:CHAT_IMAGES]
    grounding = [question["id"] for question in questions if question["task"] == "grounding"][:GROUNDING_QUESTIONS]
    return [question for question in questions if question["image"] in images or question["id"] in grounding]


def _answer(row: Mapping[str, Any], true_box: Sequence[float] | None) -> dict[str, Any]:
    boxes = [{"box": [round(value, 2) for value in found["box"]]} for found in row.get("boxes", [])]
    found: dict[str, Any] = {"text": row["answer"], "boxes": boxes, "right": row["right"]}
    if true_box is not None:
        found["iou"] = round(float(box_ious([boxes[0]["box"] if boxes else None], [true_box])[0]), 4)
    return found
