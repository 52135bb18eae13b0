"""The ``easy-vqa`` suite: short questions about one drawn shape, from the files that the package `easy-vqa` carries.

An answer is right when it equals the true one after normalisation. The kind of a question (yes or no, a shape, a
colour) is told by its answer. Beside the model stand the majority answer of each kind, learned on the train split, and
an even guess among the answers of the kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloc_mllm.data.dataset import ConversationDataset
from cloc_mllm.data.importers.easy_vqa import (
    COLOURS,
    SHAPES,
    SPLITS,
    data_folder,
    kind_of_answer,
    read_questions,
)
from cloc_mllm.data.readers import InMemory, resolve_image
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import draw
from cloc_mllm.evaluation.mllms.answerers import Answerer, MllmSettings
from cloc_mllm.evaluation.mllms.questions import Question, QuestionSplit, evaluate_mllm
from cloc_mllm.evaluation.reporting.report import DatasetRef
from cloc_mllm.evaluation.scoring.metrics import (
    exact_match_hits,
    majority_answers,
    mean_metric,
    normalise_answer,
)
from cloc_mllm.evaluation.suites.asking import AskingSettings, load_answerer, mllm_settings
from cloc_mllm.evaluation.suites.options import EvalOptions, Outcome, settings_of

ANSWERS = ("yes", "no", *SHAPES, *COLOURS)


def run(options: EvalOptions) -> Outcome:
    """Ask the MLLM that a folder holds."""
    settings = settings_of(AskingSettings, options)
    folder = data_folder(options.data)
    split = load_easy_vqa(folder, options.split or "test", options.limit, options.seed, settings.suffix)
    known = load_easy_vqa(folder, "train")
    answerer = load_answerer(options, settings, needs_boxes=False)
    return evaluate_easy_vqa(answerer, split, known, mllm_settings(options))


def load_easy_vqa(
    folder: str | Path, split: str = "test", limit: int | None = None, seed: int = 0, suffix: str = ""
) -> QuestionSplit:
    """Read the questions of a split.

    Args:
        folder: Holds ``train`` and ``test``.
        split: Which of them.
        limit: So many questions, drawn with ``seed``; None takes all.
        seed: Of the draw.
        suffix: Put behind every question.

    Raises:
        ClocError: There is no such split, or its file cannot be read.
    """
    if split not in SPLITS:
        raise ClocError(f"easy-VQA has no split '{split}'", remedy=f"Choose one of {', '.join(SPLITS)}.")
    file = Path(folder) / split / "questions.json"
    samples: list[dict[str, Any]] = []
    for raw, where in read_questions(file):
        ((asked, answer),) = raw["asked"]
        try:
            kind = kind_of_answer(answer)
        except ClocError as error:
            raise ClocError(error.problem, file=file, sample=where) from error
        shown = {"type": "image", "image": f"images/{raw['image']}"}
        text = {"type": "text", "text": f"{asked}\n{suffix}" if suffix else asked}
        turn = {"role": "user", "content": [shown, text]}
        samples.append({"id": raw["id"], "messages": [turn], "task": "vqa", "kind": kind, "answer": answer})
    chosen = draw(len(samples), limit, seed)
    # The known size counts, so that a file that lacks questions is not called by the split's name.
    drawn = seed if len(chosen) < len(samples) else None
    ref = DatasetRef("easy-vqa", split, len(chosen), max(SPLITS[split][1], len(samples)), drawn, "questions")
    questions = []
    for row in chosen:
        one = samples[row]
        image = one["messages"][0]["content"][0]["image"]
        questions.append(Question(row, one["id"], image, "vqa", one["kind"], one["answer"], None, False))
    return QuestionSplit(ref, questions, ConversationDataset(InMemory(samples, file.parent)))


def evaluate_easy_vqa(
    answerer: Answerer, split: QuestionSplit, known: QuestionSplit, settings: MllmSettings | None = None
) -> Outcome:
    """Ask the questions of a split.

    Args:
        answerer: Who is asked.
        split: The questions.
        known: Those of the train split, from which the baselines learn.
        settings: How to ask.
    """
    settings = settings or MllmSettings()
    metrics, _, details, records = evaluate_mllm(answerer, split, known, settings)
    for record, asked in zip(records, split.questions, strict=True):
        record["picture"] = str(resolve_image(asked.image, split.dataset.source.folder(asked.row)))
    truths = [question.answer for question in split.questions]
    (most,) = majority_answers(("", question.answer) for question in known.questions).values()
    blind = exact_match_hits([most] * len(truths), truths)
    images = [question.image for question in split.questions]
    strange = sum(normalise_answer(record["answer"]) not in ANSWERS for record in records)
    details = {
        "baselines": details["baselines"],
        f"always '{most}'": {"vqa_acc": mean_metric(blind, images, seed=settings.seed)},
        "answers": {"none of the 13": strange, "questions of each kind": _kinds(split)},
    }
    return Outcome(split.ref, metrics, details, strange / len(records), records)


def _kinds(split: QuestionSplit) -> dict[str, int]:
    kinds = [question.kind for question in split.questions]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
