"""Two reports side by side: the stored items give back the metrics, and what differs is found, drawn and escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.compare import compare_reports, short_names
from cloc_mllm.evaluation.reporting.gallery import worst
from cloc_mllm.evaluation.reporting.html import write_html
from cloc_mllm.evaluation.reporting.report import DatasetRef, build_report, write_report
from cloc_mllm.evaluation.reporting.scores import read_scores, write_scores
from cloc_mllm.evaluation.scoring.metrics import Metric, class_mean_metric, mean_metric
from tests.builders import noise_image

IMAGES = [str(k // 2) for k in range(8)]
HITS = {"a": [1, 1, 0, 0, 1, 1, 0, 0], "b": [1, 1, 1, 1, 1, 1, 0, 1]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight questions with pictures."""
    lines = []
    for k in range(8):
        noise_image(48, 40, seed=k).save(tmp_path / f"{k}.png")
        content = [{"type": "image", "image": f"{k}.png"}, {"type": "text", "text": "Where is it?"}]
        lines.append(json.dumps({"id": str(k), "messages": [{"role": "user", "content": content}]}))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write(folder: Path, model: str, data: Path, hits: list[int], split: str = "test", text: str = "there") -> Path:
    """Write a report as a suite does."""
    metrics = {
        "acc": mean_metric(hits, IMAGES),
        "macc": class_mean_metric(hits, ["x", "y"] * 4, IMAGES),
        "rate": Metric(0.5, (0.4, 0.6), 8),
    }
    ref = DatasetRef("set", split, 8, 8, unit="questions", path=str(data))
    report = build_report(
        suite="scenes", model=model, dataset=ref, metrics=metrics, seconds=1.0, command="cloc-mllm eval"
    )
    write_report(report, folder)
    write_scores(metrics, folder)
    answers: list[dict[str, Any]] = [
        {
            "id": str(k),
            "row": k,
            "question": "Where?",
            "answer": text,
            "right": bool(hit),
            "true_boxes": [[2, 2, 20, 20]],
        }
        for k, hit in enumerate(hits)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    write_html(report, folder, answers)
    return folder


def test_stored_items_give_back_the_metrics(tmp_path: Path, data: Path) -> None:
    folder = write(tmp_path / "a", "a", data, HITS["a"])
    found = read_scores(folder)
    assert set(found) == {"acc", "macc"}
    assert mean_metric(found["acc"].scores, found["acc"].images) == mean_metric(HITS["a"], IMAGES)
    assert found["macc"].classes == ("x", "y") * 4


def test_two_reports_are_compared(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, hits in HITS.items():
        write(tmp_path / name, f"runs/{name}/export", data, hits)
    words = ["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]
    assert main(words) == 0
    assert "acc" in capsys.readouterr().out
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [model["name"] for model in found["models"]] == ["a", "b"]
    entry = found["metrics"]["acc"]["difference"]
    assert entry["value"] == pytest.approx(np.mean(HITS["b"]) - np.mean(HITS["a"]))
    assert (entry["better"], entry["worse"], entry["equal"]) == (3, 0, 5)
    assert "no mean over items" in found["metrics"]["rate"]["why_not"]
    page = (tmp_path / "c" / "comparison.html").read_text()
    # Three answers are better, none is worse, one is wrong in both.
    assert page.count("<figure>") == 4
    assert "Better: b" in page
    assert "Better: a" not in page
    assert "| acc | 50.0 | 87.5 | +37.5 |" in (tmp_path / "c" / "comparison.md").read_text()


def report_on(folder: Path, hits: list[int], keys: list[str], ref: DatasetRef) -> Path:
    """Write the report of one metric whose items say which they are."""
    metrics = {"acc": mean_metric(hits, [key[0] for key in keys], keys=keys)}
    report = build_report(suite="scenes", model=folder.name, dataset=ref, metrics=metrics, seconds=1.0, command="c")
    write_report(report, folder)
    write_scores(metrics, folder)
    return folder


def test_items_that_one_model_alone_saw_are_left_out(tmp_path: Path) -> None:
    ref = DatasetRef("set", "test", 3, 3)
    first = report_on(tmp_path / "a", [0, 1], ["a0", "b1"], ref)
    second = report_on(tmp_path / "b", [1, 1, 0, 0], ["a0", "a1", "b0", "b1"], ref)
    entry = compare_reports(first, second, tmp_path / "c")["metrics"]["acc"]["difference"]
    assert (entry["n"], entry["better"], entry["worse"]) == (2, 1, 1)
    for name in ("comparison.md", "comparison.html"):
        assert "(the 2 items that both saw)" in (tmp_path / "c" / name).read_text()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (DatasetRef("set", "test", 2, 4, None, kind="coco"), "'of' is 3 and 4"),
        (DatasetRef("set", "test", 2, 3, None, kind="lvis"), "'kind' is coco and lvis"),
        (DatasetRef("set", "test", 2, 3, None), ""),
    ],
)
def test_data_of_one_name_are_told_apart(tmp_path: Path, other: DatasetRef, said: str) -> None:
    ref = DatasetRef("set", "test", 2, 3, None, kind="coco")
    folders = [report_on(tmp_path / str(k), [0, 1], ["a0", "b1"], one) for k, one in enumerate((ref, other))]
    for folder in folders:  # what is under test is not the name that a subset gets
        report = json.loads((folder / "report.json").read_text())
        report["dataset"]["split"] = "test"
        (folder / "report.json").write_text(json.dumps(report))
    if said:
        with pytest.raises(ClocError, match=said):
            compare_reports(*folders, tmp_path / "c")
    else:
        assert compare_reports(*folders, tmp_path / "c")["metrics"]["acc"]["difference"]["n"] == 2


def test_the_seed_of_a_draw_stands_in_the_report_and_no_other_number_is_one(tmp_path: Path) -> None:
    assert DatasetRef("set", "test", 2, 3, 5).to_dict()["seed"] == 5
    assert "seed" not in DatasetRef("set", "test", 3, 3, 5).to_dict()
    for seed in (None, -1, 1.0, True):
        with pytest.raises(ClocError, match="not a whole number from 0"):
            compare_reports(tmp_path, tmp_path, tmp_path, seed=seed)  # type: ignore[arg-type]


def test_texts_are_escaped(tmp_path: Path, data: Path) -> None:
    folder = write(tmp_path / "a", "a", data, HITS["a"], text="<script>alert(1)</script>")
    page = (folder / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


@pytest.mark.parametrize("fault", ["other split", "no scores", "broken scores", "no report", "broken report"])
def test_what_cannot_be_compared_is_refused(tmp_path: Path, data: Path, fault: str) -> None:
    first = write(tmp_path / "a", "a", data, HITS["a"])
    second = write(tmp_path / "b", "b", data, HITS["b"], split="validation" if fault == "other split" else "test")
    if fault == "no scores":
        (second / "scores.npz").unlink()
    elif fault == "broken scores":
        (second / "scores.npz").write_bytes((second / "scores.npz").read_bytes()[:100])
    elif fault == "no report":
        (second / "report.json").unlink()
    elif fault == "broken report":
        (second / "report.json").write_text('{"suite": "scenes"}')
    messages = {
        "other split": "'split' is test and validation",
        "no scores": "scores.npz: there are no scores",
        "broken scores": "cannot read the scores",
        "no report": "no report of a suite",
        "broken report": "no report of a suite",
    }
    with pytest.raises(ClocError, match=messages[fault]):
        compare_reports(first, second, tmp_path / "c")


def test_worst_answers_come_first_and_kinds_take_turns() -> None:
    records = [
        {"id": k, "kind": kind, "score": score}
        for k, (kind, score) in enumerate([("x", 0.4), ("x", 0.0), ("x", 0.1), ("y", 0.3), ("y", 1.0)])
    ]
    assert [record["id"] for record in worst(records)] == [1, 3, 2, 0]


def test_names_are_what_tells_two_paths_apart() -> None:
    assert short_names("runs/clip/export", "runs/cloc/export") == ("clip", "cloc")
    assert short_names("a/b", "a/b/c") == ("a/b", "a/b/c")
    assert short_names("x", "y") == ("x", "y")
