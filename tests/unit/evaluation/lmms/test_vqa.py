"""The suite `vqa`: what is asked on the command line, and what the report says of it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageFile

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms import runs
from cloc_mllm.evaluation.lmms.benchmarks import note_on
from cloc_mllm.evaluation.lmms.results import dataset_of, metrics_of, unparsed_of
from cloc_mllm.evaluation.lmms.runs import Found
from cloc_mllm.evaluation.suites.vqa import VqaSettings
from cloc_mllm.inference.predictor import Predictor
from tests import builders_lmms
from tests.builders import tiny_cloc

POPE = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")


@pytest.fixture(scope="module")
def checkpoint(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mllm")
    predictor.model.save_pretrained(folder)
    predictor.processor.save_pretrained(folder)
    return str(folder)


def words(model: str, out: Path, *settings: str) -> list[str]:
    """The command, without what it is about."""
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["eval", "vqa", "--model", model, "--out", str(out), "--device", "cpu", "--batch-size", "4", *sets]


def test_a_report_of_two_benchmarks(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builders_lmms.pope(tmp_path, ["yes", "no", "yes"])
    builders_lmms.mme(tmp_path, [("existence", "a", "Yes"), ("existence", "a", "No")])
    command = words(
        checkpoint, tmp_path / "out", "tasks=pope,mme", f"include_path={tmp_path}", "gen_kwargs=max_new_tokens=2"
    )
    assert main([*command, "--limit", "2"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["suite"] == "vqa"
    assert report["dataset"] == {
        "name": "lmms-eval",
        "split": "mme [a copy of 2, the published split has 2374], pope (the first 2 of 3) "
        "[a copy of 3, the published split has 9000]: a subset (4 of 11374 questions)",
        "n": 4,
        "of": 11_374,
        "unit": "questions",
    }
    assert report["metrics"]["pope/pope_accuracy"] == {"value": 0.0, "ci95": [0.0, 0.0], "n": 2}
    assert report["metrics"]["pope/pope_recall"]["ci95"] == [None, None]
    # What an untrained model says in two tokens is neither yes nor no.
    assert set(report["metrics"]) == {f"pope/pope_{name}" for name in POPE}
    assert report["details"]["points"] == {"mme/mme_perception_score": 0.0}
    assert report["details"]["lmms_eval"] == metadata.version("lmms_eval")
    assert report["unparsed"] is None
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(line["task"], line["doc_id"]) for line in lines] == [("mme", 0), ("mme", 1), ("pope", 0), ("pope", 1)]
    assert all(0 < line["tokens"]["output_tokens"] <= 2 for line in lines)
    printed = capsys.readouterr().out
    assert "pope/pope_accuracy" in printed
    assert "pope/pope_f1_score" in printed
    assert "Unreadable answers: not counted." in (tmp_path / "out" / "report.md").read_text()
    assert "unreadable boxes not counted" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "no task is named"),
        (["tasks=pope", "processes=0"], "processes is 0"),
        (["tasks=pope", "box_format=xywh"], "no box_format 'xywh'"),
        (["task=pope"], "Did you mean 'tasks'?"),
        (["tasks=ferret"], "'ferret' is scored by a judge, and there is none"),
    ],
)
def test_what_cannot_be_run_fails(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    said: str,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(words(checkpoint, tmp_path / "out", *settings)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()


def test_other_models_and_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = tiny_cloc()
    model.save_pretrained(tmp_path / "encoder")
    assert main(words(str(tmp_path / "encoder"), tmp_path / "out", "tasks=pope")) == 2
    assert "holds a 'cloc' model" in capsys.readouterr().err
    assert main([*words("m", tmp_path / "out", "tasks=pope"), "--data", "d"]) == 2
    assert "--data means nothing here" in capsys.readouterr().err


def test_without_lmms_eval_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PACKAGES", ("lmms_eval", "no_such_package"))
    with pytest.raises(ClocError, match=r"no_such_package is not installed.*docs/lmms-eval.md"):
        runs.require_lmms_eval()


def test_tasks_are_listed_in_either_form() -> None:
    assert VqaSettings(tasks="gqa, pope,").names == VqaSettings(tasks=["gqa", "pope"]).names == ("gqa", "pope")


def sample(number: int, image: str, **metrics: Any) -> dict[str, Any]:
    doc = {"imageId": image}
    return {"doc_id": number, "doc": doc, "target": "", "answer": "", "tokens": None, "metrics": metrics}


def test_intervals_are_over_pictures_and_for_means_only() -> None:
    """Ten questions on one picture and one on another: resampling pictures gives 0 and 1, questions would not."""
    rows = [sample(k, "a", exact_match=1.0, f1=0.5) for k in range(10)] + [sample(10, "b", exact_match=0.0, f1=0.5)]
    scores = {"t": {"alias": "t", "exact_match,none": 10 / 11, "exact_match_stderr,none": 0.1, "f1,none": 0.7}}
    metrics, details = metrics_of(Found(scores, {"t": rows}, {"t": 11}, {"t": ["exact_match"]}, "0"))
    assert set(metrics) == {"t/exact_match", "t/f1"}
    assert metrics["t/exact_match"].ci95 == (0.0, 1.0)
    assert details["without_interval"] == {"t/f1": "not a mean over questions"}
    assert metrics["t/f1"].to_dict()["ci95"] == [None, None]


def test_boxes_that_could_not_be_read_are_counted_where_a_task_tells() -> None:
    def share(**samples: list[dict[str, Any]]) -> float | None:
        return unparsed_of(Found({}, samples, {}, {}, "0"))

    def box(*pred: float) -> dict[str, Any]:
        entry = {"answer": "x", "pred": list(pred), "ann_id": "0", "bbox": [0, 0, 1, 1]}
        return sample(0, "a", refcoco_IoU=entry, Center_ACC=entry)

    words = [sample(0, "a", exact_match=1.0)]
    assert share(gqa=words) is None
    rec = {"refcoco+_bbox_rec_testA": [box(0, 0, 0, 0), box(0, 0, 0.5, 0.5), box(0, 0, 1, 1), box(0, 0, 0, 0)]}
    assert share(**rec) == 0.5
    assert share(**rec, gqa=words) == 0.5, "questions that ask for no box are not counted"
    own = [sample(0, "a", unparsed={"score": flag}) for flag in (1.0, 0.0)]
    assert share(cloc_refcoco_rec_val=own) == 0.5
    assert share(cloc_refcoco_rec_val=own[:1], refcoco_grounding_testA=[box(1, 1, 2, 2)]) == 0.5
    assert share(refcoco_bbox_val=[box(0, 0, 0, 0)]) is None, "captions"


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("refcoco_bbox_val_lite", "captioning of a boxed region"),
        ("refcoco_bbox_test", "captioning of a boxed region"),
        ("refcoco+_bbox_testB", "captioning of a boxed region"),
        ("refcocog_seg_val", "captioning of a region with its outline"),
        ("refcoco+_seg_testA", "captioning of a region with its outline"),
        ("refcoco_bbox_rec_testA", "boxes are asked for"),
        ("refcocog_bbox_rec_val", "mixture"),
        ("refcoco_plus_grounding_testB", "inflated"),
    ],
)
def test_what_must_be_known_of_refcocos_tasks_is_noted(task: str, said: str) -> None:
    assert said in note_on(task)
    assert ("boxes are asked for" in note_on(task)) == ("_rec_" in task)


def test_a_split_is_named_by_what_was_asked() -> None:
    full = Found({}, {"pope": [sample(k, "a") for k in range(9000)]}, {"pope": 9000}, {}, "0")
    assert dataset_of(full).label == "pope"
    part = Found({}, {"pope": full.samples["pope"][:5], "mine": [sample(0, "a")]}, {"pope": 9000, "mine": 1}, {}, "0")
    assert dataset_of(part).label == "pope (the first 5 of 9000), mine: a subset (6 of 9001 questions)"
    assert (dataset_of(part).n, dataset_of(part).total) == (6, 9001)


def test_pictures_that_are_cut_off_stay_faults(tmp_path: Path) -> None:
    """The import of lmms-eval lets Pillow read them as if they were whole, in the whole process."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ClocError, match="no task 'none'"):
        runs.find_tasks(runs.Run(model="m", tasks=("none",), out=str(tmp_path), include_path=str(tmp_path)))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
