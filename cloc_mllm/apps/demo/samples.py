"""Lets MLLMs answer the first questions of a split, so that a reader sees answers and boxes and not only averages.

The questions are the first of the file: choosing them by result would show whatever one likes to show.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.evaluation.metrics import box_ious

CHAT_IMAGES = 4
GROUNDING_QUESTIONS = 8
MAX_NEW_TOKENS = 48


def choose_questions(questions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return every question about the first images, and the first grounding questions.

    Args:
        questions: The split's, in file order.
    """
    images = list(dict.fromkeys(question["image"] for question in questions))[:CHAT_IMAGES]
    grounding = [question["id"] for question in questions if question["task"] == "grounding"][:GROUNDING_QUESTIONS]
    return [question for question in questions if question["image"] in images or question["id"] in grounding]


def question_text(question: Mapping[str, Any]) -> str:
    """Return a question's text, with `<region>` where a box stands."""
    content = question["messages"][-1]["content"]
    spoken = {"text": lambda item: item["text"], "region": lambda item: "<region>"}
    return "".join(spoken[item["type"]](item) for item in content if item["type"] in spoken).strip()


def conversation_of(question: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return a question's messages with image paths that lead somewhere from here."""
    return [
        {
            **message,
            "content": [
                {**item, "image": str(folder / item["image"])} if item["type"] == "image" else item
                for item in message["content"]
            ],
        }
        for message in question["messages"]
    ]


def answer_samples(
    questions: Sequence[Mapping[str, Any]], folder: Path, predictors: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the samples of the report.

    Args:
        questions: What to ask.
        folder: The split's folder, which image paths are relative to.
        predictors: By name, objects with the Predictor's `chat`.

    Returns:
        For each question its text, truth and boxes, and by model the answer's text, boxes and IoU with the true box.
    """
    conversations = [conversation_of(question, folder) for question in questions]
    answers = {
        name: predictor.chat(conversations, max_new_tokens=MAX_NEW_TOKENS) for name, predictor in predictors.items()
    }
    samples = []
    for number, question in enumerate(questions):
        samples.append(
            {
                "id": question["id"],
                "image": question["image"],
                "task": question["task"],
                "question": question_text(question),
                "truth": question["answer"],
                "box": question.get("box"),
                "boxes_in": question.get("boxes_in", []),
                "answers": {name: _answer(answered[number], question.get("box")) for name, answered in answers.items()},
            }
        )
    return samples


def _answer(answer: Any, true_box: Sequence[float] | None) -> dict[str, Any]:
    boxes = [{"phrase": item.get("phrase"), "box": [round(v, 2) for v in item["box"]]} for item in answer.boxes]
    found: dict[str, Any] = {"text": answer.text, "boxes": boxes, "unparsed": list(answer.unparsed)}
    if true_box is not None:
        found["iou"] = round(float(box_ious([boxes[0]["box"] if boxes else None], [true_box])[0]), 4)
    return found


def main() -> None:
    """Write `samples.json` into a folder: `python -m cloc_mllm.apps.demo.samples --split S --out DIR NAME=PATH …`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", type=Path, required=True, help="folder with questions.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for samples.json")
    parser.add_argument("models", nargs="+", metavar="NAME=PATH", help="MLLMs to ask")
    args = parser.parse_args()

    from cloc_mllm.inference.predictor import Predictor

    lines = (args.split / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = choose_questions([json.loads(line) for line in lines])
    named = dict(model.split("=", 1) for model in args.models)
    predictors = {name: Predictor.from_pretrained(path) for name, path in named.items()}
    samples = answer_samples(questions, args.split, predictors)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
