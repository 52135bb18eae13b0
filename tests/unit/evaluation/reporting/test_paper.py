"""The paper's tables: its figures stand as they are, ours only where a report fits, and a part of a split is marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.paper import find_reports, lay_out, paper_tables
from cloc_mllm.evaluation.suites.registry import SUITES


def write(
    folder: Path, suite: str, name: str, split: str, metrics: dict[str, float], n: int = 10, of: int = 10
) -> Path:
    folder.mkdir(parents=True)
    report = {
        "suite": suite,
        "model": "runs/mine",
        "dataset": {"name": name, "split": split, "n": n, "of": of, "unit": "questions"},
        "metrics": {key: {"value": value, "ci95": [0, 1], "n": n} for key, value in metrics.items()},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def cells(folder: Path, table: int) -> dict[str, str]:
    """Return our row of a table by column."""
    found = lay_out(find_reports([folder]))[table]
    return dict(zip(paper_tables()[table]["columns"], found["rows"][-1]["cells"], strict=True))


def test_the_papers_figures_fit_its_columns() -> None:
    tables = paper_tables()
    assert len(tables) == 5
    for table in tables:
        for values in table["paper"].values():
            assert set(values) <= set(table["columns"])
        assert {column["suite"] for column in table["columns"].values() if "suite" in column} <= set(SUITES)
    assert tables[0]["paper"]["CLOC B/16, regions of WiT"]["coco"] == 70.1


def test_a_report_fills_its_cell_and_no_other(tmp_path: Path) -> None:
    write(tmp_path / "coco", "region", "coco", "val2017", {"region_macc": 0.5})
    found = cells(tmp_path, 0)
    assert found["coco"] == "50.0"
    assert set(found.values()) == {"50.0", "–"}


def test_imagenet_and_its_second_version_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "1", "image", "imagenet", "val", {"image_top1": 0.5})
    write(tmp_path / "2", "image", "imagenet-v2", "matched-frequency", {"image_top1": 0.25})
    found = cells(tmp_path, 0)
    assert (found["in1"], found["in2"]) == ("50.0", "25.0")


def test_a_part_of_a_split_is_marked(tmp_path: Path) -> None:
    write(
        tmp_path / "a", "grounding", "refcoco", "testA subset (5 of 10 questions, seed 0)", {"grounding_acc50": 0.5}, 5
    )
    assert cells(tmp_path, 2)["ra"] == "50.0*"


def test_the_average_needs_every_part(tmp_path: Path) -> None:
    for name, splits in {
        "refcoco": ("val", "testA", "testB"),
        "refcoco+": ("val", "testA", "testB"),
        "refcocog": ("val", "test"),
    }.items():
        for split in splits:
            write(tmp_path / name / split, "grounding", name, split, {"grounding_acc50": 0.8})
    for split in ("val", "test"):
        write(tmp_path / "flickr" / split, "flickr30k", "flickr30k-entities", split, {"flickr30k_merged_r1": 0.6})
    assert cells(tmp_path, 2)["average"] == "–"
    metrics = {f"referring_acc_ferret_{kind}": 0.9 for kind in ("box", "point", "free_form")}
    write(tmp_path / "lvis", "referring", "lvis", "val", metrics)
    assert cells(tmp_path, 2)["average"] == f"{(3 * 90 + 8 * 80 + 2 * 60) / 13:.1f}"


def test_points_are_not_shares(tmp_path: Path) -> None:
    folder = write(tmp_path / "mme", "vqa", "mme", "test", {"gqa/exact_match": 0.5})
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(
        json.dumps({**report, "details": {"points": {"mme/mme_perception_score": 1234.5}}})
    )
    found = cells(tmp_path, 3)
    assert (found["mme_p"], found["gqa"], found["mme_c"]) == ("1234.5", "50.0", "–")


def test_two_reports_for_one_cell_are_refused_and_the_larger_wins(tmp_path: Path) -> None:
    write(tmp_path / "a", "region", "coco", "val2017", {"region_macc": 0.5}, 10)
    write(tmp_path / "b", "region", "coco", "val2017", {"region_macc": 0.6}, 5)
    assert cells(tmp_path, 0)["coco"] == "50.0"
    write(tmp_path / "c", "region", "coco", "val2017", {"region_macc": 0.7}, 10)
    with pytest.raises(ClocError, match="two reports fill the cell 'COCO mAcc'"):
        cells(tmp_path, 0)


def test_the_command_writes_all_five_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "runs" / "coco", "region", "coco", "val2017", {"region_macc": 0.5})
    assert main(["eval", "paper", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "Table 2: images and regions: 1 cells of ours" in capsys.readouterr().out
    text = (tmp_path / "out" / "paper.md").read_text()
    assert text.count("## ") == 5
    assert text.count("Nothing of ours was run.") == 4
    assert "<table>" in (tmp_path / "out" / "paper.html").read_text()
    assert main(["eval", "paper", str(tmp_path / "none"), "--out", str(tmp_path / "other")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
