"""The MLLM's scenes suite with answerers that know the truth, its opposite, a constant, and nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.region_data import SceneTruth
from cloc_mllm.evaluation.mllms.questions import MllmSettings, QuestionSplit, evaluate_mllm, load_questions
from cloc_mllm.evaluation.scoring.metrics import iou_hits
from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.models.answer_text import AnswerText
from tests.builders_mllm import tiny_mllm
from tests.unit.evaluation.oracles import ScriptedAnswerer

QUIET = MllmSettings(progress=False, batch_size=16, max_new_tokens=4)


@pytest.fixture(scope="module")
def asked(scene_truth: SceneTruth) -> QuestionSplit:
    return load_questions(scene_truth.split_folder("test"), name="scenes", split="test")


@pytest.fixture(scope="module")
def known(scene_truth: SceneTruth) -> QuestionSplit:
    return load_questions(scene_truth.split_folder("validation"), name="scenes", split="validation")


def told(split: QuestionSplit, answer: Callable[[Any], AnswerText]) -> ScriptedAnswerer:
    """An answerer that is told which question it is asked; picture and text tell the questions of ``split`` apart."""

    def key(messages: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        items = messages[0]["content"]
        pixels = next(item["image"].tobytes() for item in items if item["type"] == "image")
        return pixels, *(item.get("text", tuple(item.get("box", ()))) for item in items if item["type"] != "image")

    truth = {key(split.dataset[question.row]["messages"]): question for question in split.questions}
    assert len(truth) == len(split.questions)
    return ScriptedAnswerer(lambda messages: answer(truth[key(messages)]))


def right(question: Any) -> AnswerText:
    if question.task != "grounding":
        return AnswerText(text=question.answer.upper() + ".")
    return AnswerText(text=question.answer, boxes=[{"phrase": "", "box": list(question.box)}])


def wrong(question: Any) -> AnswerText:
    if question.task != "grounding":
        return AnswerText(text="not " + question.answer)
    return AnswerText(text=question.answer, boxes=[{"phrase": "", "box": [value + 100 for value in question.box]}])


@pytest.mark.parametrize(("answer", "expected"), [(right, 1.0), (wrong, 0.0)])
def test_the_truth_scores_100_and_its_opposite_0(
    asked: QuestionSplit, known: QuestionSplit, answer: Callable[[Any], AnswerText], expected: float
) -> None:
    metrics, unparsed, details, answers = evaluate_mllm(told(asked, answer), asked, known, QUIET)
    assert {"vqa_acc", "referring_acc", "grounding_acc50", "vqa_acc_count", "vqa_acc_exists"} <= set(metrics)
    assert {name: metric.value for name, metric in metrics.items()} == dict.fromkeys(metrics, expected)
    assert metrics["vqa_acc"].n == sum(question.task == "vqa" for question in asked.questions)
    assert metrics["referring_acc_heldout"].n == sum(q.task == "referring" and q.heldout for q in asked.questions)
    assert unparsed == 0.0
    assert [record["id"] for record in answers] == [question.id for question in asked.questions]
    assert all(record["right"] == bool(expected) for record in answers)
    assert details["grounding_mode"] == "text"


def test_answers_without_a_box_are_wrong_and_counted(asked: QuestionSplit, known: QuestionSplit) -> None:
    silent = ScriptedAnswerer(lambda messages: AnswerText(text="", unparsed=["[1, 2"]))
    metrics, unparsed, _, answers = evaluate_mllm(silent, asked, known, QUIET)
    assert all(metric.value == 0.0 for metric in metrics.values())
    assert unparsed == 1.0
    assert answers[0]["unparsed"] == ["[1, 2"]


def test_the_constant_answer_scores_its_baseline(asked: QuestionSplit, known: QuestionSplit) -> None:
    boxes = [question.box for question in known.of_task("grounding")]
    mean = np.mean(np.array(boxes), axis=0)
    most = {
        kind: Counter(sorted(q.answer for q in known.questions if q.kind == kind)).most_common(1)[0][0]
        for kind in ("count", "colour", "exists", "referring")
    }

    def constant(question: Any) -> AnswerText:
        if question.task == "grounding":
            return AnswerText(boxes=[{"box": mean.tolist()}])
        return AnswerText(text=most[question.kind])

    metrics, _, details, _ = evaluate_mllm(told(asked, constant), asked, known, QUIET)
    for name in ("vqa_acc", "vqa_acc_count", "vqa_acc_colour", "referring_acc", "grounding_acc50"):
        majority = details["baselines"][name]["majority"]
        assert majority.value == pytest.approx(metrics[name].value), name
        assert majority.ci95 == pytest.approx(metrics[name].ci95), name
        assert majority.n == metrics[name].n
    assert details["baselines"]["vqa_acc"]["answers"].keys() == {"count", "colour", "exists"}
    assert details["baselines"]["vqa_acc_exists"]["chance"] == 0.5
    truth = [question.box for question in asked.of_task("grounding")]
    assert metrics["grounding_acc50"].value == pytest.approx(iou_hits([mean] * len(truth), truth).mean())


def test_baselines_never_learn_from_the_split_they_are_scored_on(asked: QuestionSplit, known: QuestionSplit) -> None:
    def answers(taught: QuestionSplit) -> Any:
        return evaluate_mllm(told(asked, right), asked, taught, QUIET)[2]["baselines"]["referring_acc"]["answers"]

    assert answers(known) != answers(asked)


def test_a_limit_is_for_each_task_and_shows_in_the_name(scene_truth: SceneTruth) -> None:
    folder = scene_truth.split_folder("test")
    some = load_questions(folder, name="scenes", split="test", limit=7, seed=1)
    assert Counter(question.task for question in some.questions) == {"vqa": 7, "referring": 7, "grounding": 7}
    assert some.ref.label.startswith("test subset (21 of ")
    assert "questions" in some.ref.label
    again = load_questions(folder, name="scenes", split="test", limit=7, seed=1)
    other = load_questions(folder, name="scenes", split="test", limit=7, seed=2)
    assert again.questions == some.questions
    assert other.questions != some.questions


def test_a_split_without_questions_or_truth_is_refused(scenes_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ClocError, match=r"no questions\.jsonl"):
        load_questions(scenes_folder / "train", name="scenes", split="train")
    question = json.loads((scenes_folder / "test" / "questions.jsonl").read_text().splitlines()[0])
    del question["answer"]
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    with pytest.raises(ClocError, match=r"questions\.jsonl: sample 'line 1': the question has no 'answer'"):
        load_questions(tmp_path, name="scenes", split="test")


@pytest.mark.parametrize("grounding", ["head", "text"])
def test_a_real_model_is_asked_through_the_predictor(
    scene_truth: SceneTruth, known: QuestionSplit, grounding: str
) -> None:
    some = load_questions(scene_truth.split_folder("test"), name="scenes", split="test", limit=4)
    metrics, unparsed, details, answers = evaluate_mllm(Predictor(*tiny_mllm(grounding=grounding)), some, known, QUIET)
    assert details["grounding_mode"] == grounding
    assert metrics["vqa_acc"].n == metrics["referring_acc"].n == metrics["grounding_acc50"].n == 4
    assert 0 <= unparsed <= 1
    assert len(answers) == 12
