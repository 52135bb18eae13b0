"""The shipped tasks on local copies of their data: their figures against figures worked out by hand."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from cloc_mllm.data.messages import image_items
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.results import answers_of, dataset_of, metrics_of
from cloc_mllm.evaluation.lmms.runs import Found, Run, evaluate_here
from tests import builders_lmms
from tests.unit.evaluation.lmms.conftest import Say, Told


def asked(folder: Path, tasks: tuple[str, ...], say: Say, **options: Any) -> Found:
    """Evaluate what says it on the tasks of a folder."""
    run = Run("told", tasks, str(folder / "out"), include_path=str(folder), batch_size=2, device="cpu", **options)
    found = evaluate_here(run, Told(say))
    assert found is not None
    return found


def numbered(answers: list[str]) -> Say:
    """Say the k-th answer to the question whose first line ends with the number k and a question mark."""

    def say(question: str, _: Any) -> str:
        found = re.search(r"(\d+)\?", question)
        assert found is not None
        return answers[int(found.group(1))]

    return say


def listed(answers: list[str]) -> Say:
    """Say the k-th answer to the question that holds the number k."""
    return lambda question, _: answers[int("".join(filter(str.isdigit, question)))]


def test_pope(tmp_path: Path) -> None:
    builders_lmms.pope(tmp_path, ["yes", "yes", "yes", "no", "no"])
    found = asked(tmp_path, ("pope",), listed(["Yes", "yes", "no", "yes", "No"]))
    metrics, details = metrics_of(found)
    assert {name: round(metric.value, 6) for name, metric in metrics.items()} == {
        "pope/pope_accuracy": 0.6,
        "pope/pope_precision": 0.666667,
        "pope/pope_recall": 0.666667,
        "pope/pope_f1_score": 0.666667,
        "pope/pope_yes_ratio": 0.6,
    }
    # Five questions about three pictures: the interval is over pictures, and only a mean has one.
    low, high = metrics["pope/pope_accuracy"].ci95
    assert low < 0.6 < high
    assert details["without_interval"]["pope/pope_f1_score"] == "not a mean over questions"
    named = "pope [a copy of 5, the published split has 9000]: a subset (5 of 9000 questions)"
    assert dataset_of(found).label == named
    assert "yes." in details["tasks"]["pope"]["note"]
    assert [answer["answer"] for answer in answers_of(found)] == ["Yes", "yes", "no", "yes", "No"]


def test_popes_answer_must_be_the_bare_word(tmp_path: Path) -> None:
    """As the note says: the task does not cut at the first sentence."""
    builders_lmms.pope(tmp_path, ["yes", "no"])
    metrics, _ = metrics_of(asked(tmp_path, ("pope",), listed(["Yes.", "no"])))
    assert metrics["pope/pope_accuracy"].value == 0.5
    metrics, _ = metrics_of(asked(tmp_path, ("pope",), lambda *_: "yes"))
    assert metrics["pope/pope_yes_ratio"].value == 0.5, "of the truths, though every answer is yes"


def test_mme(tmp_path: Path) -> None:
    """A picture with both answers right counts 100 + 100, with one right 50 + 0; categories add up."""
    questions = [
        ("existence", "a", "Yes"),
        ("existence", "a", "No"),
        ("existence", "bb", "Yes"),
        ("existence", "bb", "No"),
        ("code_reasoning", "ccc", "Yes"),
        ("code_reasoning", "ccc", "No"),
    ]
    builders_lmms.mme(tmp_path, questions)
    found = asked(tmp_path, ("mme",), listed(["yes", "no", "Yes.", "yes", "No", "yes"]))
    metrics, details = metrics_of(found)
    assert details["points"] == {"mme/mme_perception_score": 125.0, "mme/mme_cognition_score": 0.0}
    assert not metrics, "points are never taken for shares, not even none"


def test_textvqa_and_gqa(tmp_path: Path) -> None:
    builders_lmms.textvqa(tmp_path, [["stop"] * 2 + ["halt"] * 8, ["exit"] * 10])
    builders_lmms.gqa(tmp_path, ["cat", "left", "red"])

    def say(question: str, conversation: Any) -> str:
        return listed(["stop", "EXIT"] if "said" in question else ["Cat.", "right", "red"])(question, conversation)

    metrics, _ = metrics_of(asked(tmp_path, ("textvqa", "gqa"), say))
    # The two who said "stop" find one other, the eight find two: (2 * 1/3 + 8 * 2/3) / 10; all agree on "exit".
    assert metrics["textvqa_val/exact_match"].value == pytest.approx((0.6 + 1.0) / 2)
    assert metrics["gqa/exact_match"].value == pytest.approx(2 / 3)
    assert (tmp_path / "out" / "submissions").is_dir()


def test_refcoco_reads_boxes_in_the_tasks_frame(tmp_path: Path) -> None:
    """The model says 0 to 999; the shipped parsers would read that as a miss."""
    builders_lmms.refcoco(tmp_path, [(["thing 0", "a thing 0"], [10, 6, 20, 12]), (["thing 1"], [0, 0, 40, 15])])
    # Of a picture of 40 x 30: the first box exactly, the second with a third of its height too much.
    say = listed(["thing 0 [250, 200, 749, 599]", "[0, 0, 999, 666]"])

    def once(question: str, conversation: Any) -> str:
        return say(question[-7:] if "sentence describes" in question else "1" if "thing 1" in question else "0", None)

    metrics, details = metrics_of(asked(tmp_path, ("refcoco_bbox_rec_testA", "refcoco_grounding_testA"), once))
    assert metrics["refcoco_bbox_rec_testA/refcoco_ACC@0.5"].value == 1.0
    assert metrics["refcoco_bbox_rec_testA/refcoco_ACC@0.9"].value == pytest.approx(2 / 3)
    assert metrics["refcoco_grounding_testA/refcoco_grounding_ACC@0.5"].value == 1.0
    assert "inflated" in details["tasks"]["refcoco_grounding_testA"]["note"]
    metrics, _ = metrics_of(asked(tmp_path, ("refcoco_bbox_rec_testA",), once, box_format="model"))
    assert metrics["refcoco_bbox_rec_testA/refcoco_ACC@0.5"].value == 0.0


def test_seedbench(tmp_path: Path) -> None:
    """The first letter counts; `seed_all` mixes the frames of videos in, `seed_image` is the pictures'."""
    builders_lmms.seedbench(tmp_path, [("A", "image"), ("B", "image"), ("C", "image"), ("D", "video")])
    seen: list[int] = []

    def say(question: str, conversation: Any) -> str:
        seen.append(len(image_items(list(conversation))))
        return numbered(["A", "b.", "Definitely C", "A"])(question, conversation)

    metrics, details = metrics_of(asked(tmp_path, ("seedbench",), say))
    assert {name: round(metric.value, 6) for name, metric in metrics.items()} == {
        "seedbench/seed_image": 0.666667,
        "seedbench/seed_video": 0.0,
        "seedbench/seed_all": 0.5,
    }
    assert sorted(seen) == [1, 1, 1, 3]
    assert [metrics[f"seedbench/seed_{kind}"].n for kind in ("image", "video", "all")] == [3, 1, 4]
    assert "video questions" in details["tasks"]["seedbench"]["note"]


def test_scienceqa(tmp_path: Path) -> None:
    """A letter, or a letter and a full stop before what it says; nothing else."""
    builders_lmms.scienceqa(tmp_path, [0, 1, 2, 1])
    metrics, _ = metrics_of(asked(tmp_path, ("scienceqa_img",), numbered(["a", "B. that", "It is C", "A"])))
    metric = metrics["scienceqa_img/exact_match"]
    assert (metric.value, metric.n) == (0.5, 4)
    assert metric.ci95[0] < 0.5 < metric.ci95[1], "a mean over questions has an interval"


WITHOUT_SHEET = """metric_list:
  - metric: gpt_eval_score
    aggregation: !function lmms_eval.tasks.mmbench.en_utils.mmbench_aggregate_dev_results_static
    higher_is_better: true"""


def test_mmbench_is_scored_without_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    builders_lmms.mmbench(tmp_path, ["A", "B", "C", "A"], "" if find_spec("openpyxl") else WITHOUT_SHEET)
    say = numbered(["A", "The answer is B", "A", "apple"])
    found = asked(tmp_path, ("mmbench_en_dev_static",), say)
    metrics, details = metrics_of(found)
    assert {name: metric.value for name, metric in metrics.items()} == {"mmbench_en_dev_static/gpt_eval_score": 0.75}
    assert details["without_interval"] == {"mmbench_en_dev_static/gpt_eval_score": "not a mean over questions"}
    assert "without a judge" in details["tasks"]["mmbench_en_dev_static"]["note"]


@pytest.mark.skipif(find_spec("openpyxl") is not None, reason="openpyxl is installed")
def test_mmbench_is_refused_before_a_question_where_its_sheet_cannot_be_written(tmp_path: Path) -> None:
    builders_lmms.mmbench(tmp_path, ["A"])

    def never(*_: Any) -> str:
        raise AssertionError("a question was asked")

    with pytest.raises(ClocError, match="writes a spreadsheet, and openpyxl is not installed"):
        asked(tmp_path, ("mmbench_en_dev_static",), never)
