"""Ferret-Bench: oracles before a real local judge, replies without marks, going on after a stop, its own layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.mllms.answerers import MllmSettings
from cloc_mllm.evaluation.mllms.judge import Judge, ReplyFile
from cloc_mllm.evaluation.suites.ferret_bench import (
    CATEGORIES,
    RULES,
    answer_for_judge,
    evaluate_bench,
    load_bench,
    read_marks,
    with_regions,
)
from cloc_mllm.models.answer_text import AnswerText
from tests.builders import noise_image
from tests.unit.evaluation.judge_server import serving
from tests.unit.evaluation.oracles import ScriptedAnswerer, asked_text

QUIET = MllmSettings(progress=False, batch_size=4, max_new_tokens=4)
FOLDERS = dict(zip(("refer_caption", "refer_reason", "ground_conv"), CATEGORIES, strict=True))
"""The published folders and what their questions call themselves."""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Three questions of each category in the published layout; contexts stand in another order than questions."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        noise_image(40, 20, number).save(tmp_path / "images" / f"{number}.png")
    for folder, category in FOLDERS.items():
        (tmp_path / folder).mkdir()
        box = "" if category == "ground_conv" else " [0.250, 0.500, 0.750, 1.000]"
        for name, texts in {
            "question": [f"{category} {k}: what is the object{box} doing?" for k in range(3)],
            "answer": [f"reference of {category} {k}" for k in range(3)],
            "context": [f"context of {category} {k}" for k in range(3)],
        }.items():
            rows = [
                {"question_id": 10 * k, "image": f"{k}.png", "category": category, "text": text}
                for k, text in enumerate(texts)
            ]
            lines = [json.dumps(row) for row in (rows[::-1] if name == "context" else rows)]
            (tmp_path / folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def marks(prompt: str) -> str:
    """A judge that checks that everything belongs together, and takes the reference's own words for as good as it."""
    name = re.search(r"\[Question\]\n(\w+ \d)", prompt)
    assert name is not None
    assert f"context of {name[1]}\n" in prompt
    assert f"[Assistant 1]\nreference of {name[1]}\n" in prompt
    return f"8 {8 if f'[Assistant 2]{chr(10)}reference of {name[1]}{chr(10)}' in prompt else 2}\nBecause."


def parrot(messages: Any) -> AnswerText:
    return AnswerText("reference of " + asked_text(messages).split(":")[0])


def test_the_reference_itself_scores_100(bench: Path, tmp_path: Path) -> None:
    loaded = load_bench(bench, bench / "images")
    assert loaded.ref.label == "all subset (9 of 120 questions)"
    with serving(marks) as server:
        judge = Judge(server.url, "marker")
        found = evaluate_bench(ScriptedAnswerer(parrot), loaded, judge, ReplyFile(tmp_path / "judge.jsonl"), QUIET)
        nothing = evaluate_bench(
            ScriptedAnswerer(lambda messages: AnswerText()), loaded, judge, ReplyFile(tmp_path / "none.jsonl"), QUIET
        )
    names = ["ferret_bench_average", *(f"ferret_bench_{category}" for category in CATEGORIES)]
    assert {name: metric.value for name, metric in found.metrics.items()} == dict.fromkeys(names, 1.0)
    assert [metric.n for metric in found.metrics.values()] == [9, 3, 3, 3]
    assert found.unparsed == 0.0
    assert {metric.value for metric in nothing.metrics.values()} == {0.25}
    assert found.details["mean marks"]["refer_desc"] == "reference 8.00, model 8.00, 3 answers"
    assert {message["messages"][1]["content"].count(RULES["ground_conv"]) for message in server.bodies} == {0, 1}


def test_replies_without_marks_are_left_out_and_counted(bench: Path, tmp_path: Path) -> None:
    loaded = load_bench(bench, bench / "images")

    def moody(prompt: str) -> str:
        if "ground_conv" in prompt:
            return "I cannot judge that."
        return "no marks today" if "refer_desc 1" in prompt else marks(prompt)

    with serving(moody) as server:
        judge = Judge(server.url, "marker")
        found = evaluate_bench(ScriptedAnswerer(parrot), loaded, judge, ReplyFile(tmp_path / "judge.jsonl"), QUIET)
    assert found.metrics["ferret_bench_refer_desc"].value == 1.0
    assert [found.metrics[f"ferret_bench_{category}"].n for category in CATEGORIES] == [2, 3, 0]
    # The mean of two categories would not be the mean of three.
    assert found.metrics["ferret_bench_average"].n == 0
    assert found.unparsed == pytest.approx(4 / 9)
    assert found.details["judge"]["replies without marks, left out"] == {"refer_desc": 1, "ground_conv": 3}


def test_a_judge_that_never_replies_gives_no_score(bench: Path, tmp_path: Path) -> None:
    loaded = load_bench(bench, bench / "images", limit=1)
    replies = ReplyFile(tmp_path / "judge.jsonl")
    with serving(lambda prompt: 503) as server:
        judge = Judge(server.url, "marker", retries=1, wait=0.001)
        with pytest.raises(ClocError, match=r"answered 503.*tried 2 times"):
            evaluate_bench(ScriptedAnswerer(parrot), loaded, judge, replies, QUIET)


def test_the_suite_with_a_real_model_goes_on_where_it_was(
    bench: Path, mllm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    out = tmp_path / "out"
    words = ["eval", "ferret-bench", "--model", str(mllm_folder), "--data", str(bench), "--out", str(out)]
    words += ["--limit", "2", "--max-new-tokens", "4", "--set", f"images={bench / 'images'}"]
    assert main(words) == 2
    assert "this suite needs a judge, and there is none" in capsys.readouterr().err
    seen: list[str] = []

    def first_four(prompt: str) -> str | int:
        seen.append(prompt)
        return marks(prompt) if len(seen) <= 4 else 401

    with serving(first_four) as server:
        words += ["--set", f"judge_url={server.url}", "--set", "judge_model=marker", "--set", "judge_key=MY_KEY"]
        assert main(words) == 2
        assert "the endpoint answered 401" in capsys.readouterr().err
        assert len((out / "judge.jsonl").read_text().splitlines()) == 4
        seen.clear()
        assert main(words) == 0
    assert len(seen) == 2
    report = json.loads((out / "report.json").read_text())
    assert report["details"]["judge"]["replies asked for now"] == 2
    assert report["metrics"]["ferret_bench_average"] == {"value": 0.25, "ci95": [0.25, 0.25], "n": 6}
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6
    assert all(b"s3cret" not in file.read_bytes() for file in out.iterdir())


def test_rules_of_the_data_are_used(bench: Path) -> None:
    assert load_bench(bench, bench).own_rules
    rules = {category: {"role": "Assistant", "prompt": f"rule of {category}"} for category in CATEGORIES}
    (bench / "rule.json").write_text(json.dumps(rules))
    assert load_bench(bench, bench).rules["ground_conv"] == "rule of ground_conv"
    (bench / "rule.json").write_text("{}")
    with pytest.raises(ClocError, match=r"rule\.json: holds no rules for the judge"):
        load_bench(bench, bench)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("8 7\nGood.", (8.0, 7.0)),
        ("  8.5, 7  ", (8.5, 7.0)),
        ("8 7 6", None),
        ("8", None),
        ("8 7. Both are good", None),
        ("Assistant 1: 8", None),
        ("8 11", None),
        ("-1 -1", None),
        ("0 5", None),
        ("nan 5", None),
        ("", None),
        ("\n\n9 9", (9.0, 9.0)),
    ],
)
def test_marks_are_read_from_the_first_line_or_not_at_all(reply: str, expected: tuple[float, float] | None) -> None:
    assert read_marks(reply) == expected


def test_regions_of_a_question_are_pixels() -> None:
    items = with_regions("What is [0.250, 0.500, 0.750, 1.000] to [0, 0, 0.5, 0.5]?", (40, 20))
    assert [item["type"] for item in items] == ["text", "region", "text", "region", "text"]
    assert [item["box"] for item in items if item["type"] == "region"] == [[10, 10, 30, 20], [0, 0, 20, 10]]
    assert with_regions("Where is the man?", (40, 20)) == [{"type": "text", "text": "Where is the man?"}]


def test_the_judge_sees_boxes_as_shares_or_not_at_all() -> None:
    boxes = [{"phrase": "man", "box": [10, 10, 30, 20]}, {"phrase": "dog", "box": [0, 0, 20, 10]}]
    answer = AnswerText("A man [249, 500, 749, 999] and (9, 8, 7, 6) a dog [0, 0, 500, 500].", boxes, ["(9, 8, 7, 6)"])
    assert answer_for_judge("ground_conv", answer, (40, 20)) == (
        "A man [0.250, 0.500, 0.750, 1.000] and a dog [0.000, 0.000, 0.500, 0.500]."
    )
    assert answer_for_judge("refer_desc", answer, (40, 20)) == "A man and a dog."
    assert answer_for_judge("refer_desc", AnswerText("In 1999 [sic] a cat."), (40, 20)) == "In 1999 [sic] a cat."


def test_faults_of_the_files_are_named(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="no folder of Ferret-Bench"):
        load_bench(tmp_path / "images", bench)
    file = bench / "refer_reason" / "answer.jsonl"
    lines = file.read_text().splitlines()
    for content, problem in (
        (lines[:2], r"sample '20': has no answer"),
        ([*lines[:2], lines[2].replace("2.png", "1.png")], "sample '20': its answer is about another picture"),
        ([*lines, lines[0]], "question 0 stands there twice"),
        (['{"question_id": 0}'], "has no image"),
    ):
        file.write_text("\n".join(content) + "\n")
        with pytest.raises(ClocError, match=problem):
            load_bench(bench, bench)
