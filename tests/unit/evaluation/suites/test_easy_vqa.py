"""easy-VQA: its converter, its suite with oracles and a real tiny MLLM, and the counts of the published set."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.data.dataset import ConversationDataset
from cloc_mllm.data.importers.easy_vqa import SPLITS, data_folder, kind_of_answer, read_questions
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.mllms.answerers import MllmSettings
from cloc_mllm.evaluation.suites.easy_vqa import ANSWERS, evaluate_easy_vqa, load_easy_vqa
from cloc_mllm.evaluation.suites.options import EvalOptions
from cloc_mllm.evaluation.suites.registry import run_suite
from cloc_mllm.models.answer_text import AnswerText
from tests.builders import noise_image
from tests.unit.evaluation.oracles import ScriptedAnswerer, asked_text, silent

QUIET = MllmSettings(progress=False, batch_size=4, max_new_tokens=4)
ENTRIES = [
    ["what is the blue shape?", "rectangle", 0],
    ["what color is the shape?", "blue", 0],
    ["is there a triangle in the image?", "no", 0],
    ["is there a circle?", "yes", 1],
    ["does the image not contain a circle?", "no", 1],
    ["what shape is in the image?", "circle", 1],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions a split about two pictures, in the published layout."""
    root = tmp_path_factory.mktemp("easy")
    for split in SPLITS:
        (root / split / "images").mkdir(parents=True)
        for number in (0, 1):
            noise_image(64, 64, number).save(root / split / "images" / f"{number}.png")
        (root / split / "questions.json").write_text(json.dumps(ENTRIES))
    return root


def test_the_truth_scores_100_and_silence_0(folder: Path) -> None:
    split, known = load_easy_vqa(folder), load_easy_vqa(folder, "train")
    truth = {question: answer for question, answer, _ in ENTRIES}
    right = evaluate_easy_vqa(
        ScriptedAnswerer(lambda messages: AnswerText(truth[asked_text(messages)].title() + ".")), split, known, QUIET
    )
    names = ("vqa_acc", "vqa_acc_yesno", "vqa_acc_shape", "vqa_acc_colour")
    assert {name: metric.value for name, metric in right.metrics.items()} == dict.fromkeys(names, 1.0)
    assert [right.metrics[name].n for name in names] == [6, 3, 2, 1]
    assert right.unparsed == 0.0
    nothing = evaluate_easy_vqa(silent(), split, known, QUIET)
    assert {metric.value for metric in nothing.metrics.values()} == {0.0}
    assert nothing.unparsed == 1.0
    assert nothing.details["answers"]["none of the 13"] == 6


def test_the_constant_answers_stand_beside(folder: Path) -> None:
    split, known = load_easy_vqa(folder), load_easy_vqa(folder, "train")
    details = evaluate_easy_vqa(silent(), split, known, QUIET).details
    assert details["always 'no'"]["vqa_acc"].value == pytest.approx(2 / 6)
    majority = {name: entry["majority"].value for name, entry in details["baselines"].items()}
    assert majority == {
        "vqa_acc": pytest.approx(4 / 6),
        "vqa_acc_yesno": pytest.approx(2 / 3),
        "vqa_acc_shape": 0.5,
        "vqa_acc_colour": 1.0,
    }
    assert len(ANSWERS) == 13


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="the package easy-vqa is not installed")
def test_the_published_set_is_whole() -> None:
    folder = data_folder()
    for name, (pictures, questions) in SPLITS.items():
        entries = [raw for raw, _ in read_questions(folder / name / "questions.json")]
        assert len(entries) == questions
        assert len({raw["image"] for raw in entries}) == pictures
        assert {raw["asked"][0][1] for raw in entries} == set(ANSWERS)
    yes_no = sum(kind_of_answer(raw["asked"][0][1]) == "yesno" for raw in entries)
    assert yes_no == 7_136  # the figure that the set's README gives
    split = load_easy_vqa(folder, limit=3)
    assert split.ref.label == "test subset (3 of 9673 questions, seed 0)"
    asked = load_easy_vqa(folder).questions
    assert sum(question.answer == "yes" for question in asked) == 3_611


@pytest.mark.parametrize(("more", "samples", "turns"), [((), 6, 2), (("--together",), 2, 6)])
def test_questions_become_conversations(
    folder: Path, tmp_path: Path, more: tuple[str, ...], samples: int, turns: int
) -> None:
    words = ["data", "convert", "easy-vqa", "--split", "train", "--data", str(folder), "--out", str(tmp_path), *more]
    with pytest.warns(UserWarning, match=rf"not the whole split: {samples} "):
        assert main(words) == 0
    dataset = ConversationDataset(tmp_path)
    assert len(dataset) == samples
    messages = dataset[0]["messages"]
    assert len(messages) == turns
    assert messages[0]["content"][1]["text"] == ENTRIES[0][0]
    assert messages[0]["content"][0]["image"].size == (64, 64)
    assert messages[1]["content"][0]["text"] == "rectangle"
    said = [message["content"][-1]["text"] for k in range(samples) for message in dataset[k]["messages"]]
    assert said == [text for question, answer, _ in ENTRIES for text in (question, answer)]
    counts = json.loads((tmp_path / "dataset.json").read_text())["counts"]
    assert (counts["answers_yesno"], counts["answers_shape"], counts["answers_colour"]) == (3, 2, 1)


def test_a_real_model_is_asked(folder: Path, mllm_folder: Path, tmp_path: Path) -> None:
    report = run_suite("easy-vqa", EvalOptions(str(mllm_folder), str(folder), str(tmp_path), max_new_tokens=4))
    assert report["dataset"]["split"] == "test subset (6 of 9673 questions)"
    assert report["metrics"]["vqa_acc"]["n"] == 6
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6


def test_bad_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="no easy-VQA folder"):
        data_folder(tmp_path)
    with pytest.raises(ClocError, match="has no split 'val'"):
        load_easy_vqa(folder, "val")
    for entry, problem in (
        (["what?", "red"], "not a .question, answer"),
        (["what?", " ", 0], "not a .question, answer"),
        (["what?", "purple", 0], "none of the 13 answers"),
    ):
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test" / "questions.json").write_text(json.dumps([ENTRIES[0], entry]))
        with pytest.raises(ClocError, match=rf"questions\.json: sample 'entry 1'.*{problem}"):
            load_easy_vqa(tmp_path)


def test_the_answer_counts_only_as_a_whole(folder: Path) -> None:
    split, known = load_easy_vqa(folder), load_easy_vqa(folder, "train")
    hedging: Any = ScriptedAnswerer(lambda messages: AnswerText("yes no red blue rectangle circle"))
    assert evaluate_easy_vqa(hedging, split, known, QUIET).metrics["vqa_acc"].value == 0.0
