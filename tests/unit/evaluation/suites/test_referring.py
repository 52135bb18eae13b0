"""The referring suite: oracles, both scorers side by side, a real tiny MLLM, and question files with faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.mllms.answerers import MllmSettings
from cloc_mllm.evaluation.suites.options import EvalOptions
from cloc_mllm.evaluation.suites.referring import evaluate_referring, load_referring
from cloc_mllm.evaluation.suites.registry import run_suite
from cloc_mllm.models.answer_text import AnswerText
from tests.builders import noise_image
from tests.unit.evaluation.oracles import ScriptedAnswerer, asked_text, silent

QUIET = MllmSettings(progress=False, batch_size=4, max_new_tokens=4)
SHAPES: dict[str, dict[str, Any]] = {
    "box": {"box": [2, 3, 20, 25]},
    "point": {"point": [9, 8]},
    "free-form": {"scribble": [[4, 4], [9, 8], [12, 15]]},
}


def sample(number: int, kind: str) -> dict[str, Any]:
    """A question as `data build lvis-referring` writes it; the right name is said first by turns."""
    right, other = f"cat{number}_(tame)", f"dog{number}"
    first, second = (f"cat{number}", other)[:: 1 if number % 2 == 0 else -1]
    items = [
        {"type": "image", "image": f"{number // 3}.png"},
        {"type": "text", "text": "Is the object "},
        {"type": "region", **SHAPES[kind]},
        {"type": "text", "text": f" of the image a {first} or a {second}?"},
    ]
    return {
        "id": f"q{number}",
        "image": f"{number // 3}.png",
        "messages": [{"role": "user", "content": items}],
        "task": "referring",
        "kind": kind,
        "answer": f"cat{number}",
        "synonyms": [right, f"kitty{number}"],
        "negative": other,
        "negative_synonyms": [other],
    }


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions, four of each kind, about four pictures."""
    folder = tmp_path_factory.mktemp("lvis")
    for number in range(4):
        noise_image(40, 30, number).save(folder / f"{number}.png")
    lines = [json.dumps(sample(number, list(SHAPES)[number % 3])) for number in range(12)]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def number_of(messages: Any) -> str:
    return asked_text(messages).split("cat")[1].split(" ")[0].rstrip("?")


def test_the_truth_scores_100_and_silence_0(questions: Path) -> None:
    split = load_referring(questions)
    assert [one.first for one in split.questions] == [k % 2 == 0 for k in range(12)]
    right = evaluate_referring(
        ScriptedAnswerer(lambda messages: AnswerText(f"It is a kitty{number_of(messages)}.")), split, QUIET
    )
    names = {
        f"referring_acc_{who}{kind}" for who in ("ferret", "strict") for kind in ("", "_box", "_point", "_free_form")
    }
    assert {name: metric.value for name, metric in right.metrics.items()} == dict.fromkeys(names, 1.0)
    assert right.metrics["referring_acc_strict"].n == 12
    assert right.metrics["referring_acc_strict_point"].n == 4
    assert right.unparsed == 0.0
    nothing = evaluate_referring(silent(), split, QUIET)
    assert {metric.value for metric in nothing.metrics.values()} == {0.0}
    assert nothing.unparsed == 1.0
    assert nothing.details["named"] == {"right": 0, "other": 0, "both": 0, "neither": 12}


def test_the_scorers_part_where_they_should(questions: Path) -> None:
    split = load_referring(questions)

    def hedged(messages: Any) -> AnswerText:
        number = number_of(messages)
        return AnswerText(f"A cat{number} or a dog{number}")

    found = evaluate_referring(ScriptedAnswerer(hedged), split, QUIET)
    assert found.metrics["referring_acc_ferret"].value == 1.0
    assert found.metrics["referring_acc_strict"].value == 0.0
    assert found.details["an answer that names both"]["referring_acc_ferret"].value == 1.0
    assert found.details["an answer that names both"]["referring_acc_strict"].value == 0.0
    for name in ("referring_acc_ferret", "referring_acc_strict"):
        assert found.details["baselines"][name]["majority"].value == 0.5
    assert found.answers[0]["named"] == "both"
    assert found.answers[0]["ferret"] is True


def test_the_words_behind_the_question_are_asked_too(questions: Path) -> None:
    seen = []

    def answer(messages: Any) -> AnswerText:
        seen.append(asked_text(messages))
        return AnswerText()

    evaluate_referring(ScriptedAnswerer(answer), load_referring(questions, limit=3, seed=2), QUIET, "In one word.")
    assert len(seen) == 3
    assert all(words.endswith("?\nIn one word.") for words in seen)


def test_a_real_model_is_asked(questions: Path, mllm_folder: Path, tmp_path: Path) -> None:
    options = EvalOptions(str(mllm_folder), str(questions), str(tmp_path), split="val", limit=6, max_new_tokens=4)
    report = run_suite("referring", options)
    assert report["dataset"]["split"] == "val subset (6 of 12 questions, seed 0)"
    assert report["metrics"]["referring_acc_strict"]["n"] == 6
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    assert "an answer that names both" in (tmp_path / "report.md").read_text()


def test_a_file_of_one_kind_has_that_kinds_metric_and_its_split_from_dataset_json(tmp_path: Path) -> None:
    lines = [json.dumps(sample(k, "point")) for k in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    noise_image(40, 30, 0).save(tmp_path / "0.png")
    split = load_referring(tmp_path)
    assert split.ref.label == "all"
    found = evaluate_referring(silent(), split, QUIET).metrics
    assert set(found) == {f"referring_acc_{who}{kind}" for who in ("ferret", "strict") for kind in ("", "_point")}
    facts = {"kind": "lvis-referring", "split": "val", "counts": {"questions_written": 3}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert load_referring(tmp_path).ref.label == "val"
    assert load_referring(tmp_path, "mine").ref.label == "mine"
    facts["counts"] = {"questions_written": 5}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert load_referring(tmp_path).ref.label == "val subset (3 of 5 questions)"
    assert load_referring(tmp_path, limit=2).ref.label == "val subset (2 of 5 questions, seed 0)"
    facts["counts"] = {"questions_written": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(ClocError, match=r"hold 3 questions, but dataset\.json says that 2 were written"):
        load_referring(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"negative": None}, "the question has no 'negative'"),
        ({"answer": " "}, "the question has no 'answer'"),
        ({"synonyms": "cat"}, "'synonyms' is not a list of names"),
        ({"kind": "circle"}, "of the kind 'circle', none of box, point, free-form"),
    ],
)
def test_a_question_with_a_fault_is_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps({**sample(0, "box"), **change}) + "\n")
    with pytest.raises(ClocError, match=rf"questions\.jsonl: sample 'q0 \(line 1\)': .*{problem}"):
        load_referring(tmp_path)
