"""The paper's tables: its figures stand as they are, ours only where a report fits, and a part of a split is marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.paper import find_reports, lay_out, paper_tables
from cloc_mllm.evaluation.suites.registry import SUITES

ALL_OF_THEM = {"gallery": "all", "categories": "known"}


def write(
    folder: Path,
    suite: str,
    name: str,
    split: str,
    metrics: dict[str, float],
    n: int = 10,
    of: int = 10,
    kind: str | None = None,
    details: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    report = {
        "suite": suite,
        "model": "runs/mine",
        "dataset": {"name": name, "split": split, "n": n, "of": of, "unit": "questions"}
        | ({"kind": kind} if kind else {}),
        "metrics": {key: {"value": value, "ci95": [0, 1], "n": n} for key, value in metrics.items()},
        "details": {"protocol": ALL_OF_THEM} if details is None else details,
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def cells(folder: Path, table: int) -> dict[str, str]:
    """Return our row of a table by column; nothing where we have none."""
    found = lay_out(find_reports([folder]))[table]
    if not found["rows"][-1]["ours"]:
        return {}
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


@pytest.mark.parametrize(
    ("table", "suite", "set_", "split", "metric", "protocol"),
    [
        (0, "image", ("coco", "coco"), "train2017", "image_i2t_r1", {}),
        (0, "image", ("refcoco", "coco"), "testA", "image_i2t_r1", {}),
        (0, "image", ("imagenet", "imagenet-v2"), "top-images", "image_top1", {}),
        (0, "region", ("coco", "coco"), "train2017", "region_macc", ALL_OF_THEM),
        (0, "region", ("coco", "coco"), "val2017", "region_macc", {"gallery": "all", "categories": "occurring"}),
        (0, "region", ("refcoco", "coco"), "val2017", "region_macc", ALL_OF_THEM),
        (0, "region", ("lvis", "lvis"), "lvis_v1_train", "region_macc", ALL_OF_THEM),
        (0, "region", ("grit", "grit"), "all", "region_r2t_r10", {"gallery": "pools", "categories": "none"}),
        (0, "region", ("grit", "grit"), "all", "region_t2r_r10", {}),
        (2, "grounding", ("refcoco (google)", "refcoco"), "val", "grounding_acc50", {}),
        (2, "grounding", (None, "refcoco_testA"), "testA", "grounding_acc50", {}),
    ],
)
def test_what_was_measured_otherwise_fills_no_cell(
    tmp_path: Path,
    table: int,
    suite: str,
    set_: tuple[str | None, str],
    split: str,
    metric: str,
    protocol: dict[str, str],
) -> None:
    kind, name = set_
    write(tmp_path / "a", suite, name, split, {metric: 0.5}, kind=kind, details={"protocol": protocol})
    assert cells(tmp_path, table) == {}


@pytest.mark.parametrize(("kind", "column"), [("refcoco", "ra"), ("refcoco+", "pa"), ("refcocog", None)])
def test_the_three_refcocos_are_told_apart_by_their_kind(tmp_path: Path, kind: str, column: str | None) -> None:
    write(tmp_path / "a", "grounding", "refcoco", "testA", {"grounding_acc50": 0.5}, kind=kind)
    filled = {key for key, cell in cells(tmp_path, 2).items() if cell != "–"}
    assert filled == ({column} if column else set())


def test_karpathys_test_split_is_coco(tmp_path: Path) -> None:
    write(tmp_path / "a", "image", "mine", "test", {"image_i2t_r1": 0.5}, kind="coco-karpathy")
    assert {key for key, cell in cells(tmp_path, 0).items() if cell == "50.0"} == {"i2t"}


def test_of_several_tasks_each_is_marked_by_its_own_questions(tmp_path: Path) -> None:
    """One suite asks several benchmarks: a part of one leaves the other whole, and a small copy is a part."""
    tasks = {
        "gqa": {"n": 12_578, "of": 12_578, "published_split": 12_578},
        "pope": {"n": 10, "of": 9_000, "published_split": 9_000},
        "textvqa_val": {"n": 100, "of": 100, "published_split": 5_000},
    }
    metrics = {"gqa/exact_match": 0.5, "pope/pope_f1_score": 0.5, "textvqa_val/exact_match": 0.5}
    label = "gqa, pope (the first 10 of 9000), …: a subset (12688 of 26578 questions)"
    write(tmp_path / "a", "vqa", "lmms-eval", label, metrics, 12_688, 26_578, details={"tasks": tasks})
    found = cells(tmp_path, 3)
    assert (found["gqa"], found["pope"], found["textvqa"]) == ("50.0", "50.0*", "50.0*")


def test_the_command_writes_all_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "runs" / "coco", "region", "coco", "val2017", {"region_macc": 0.5})
    assert main(["eval", "paper", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "Table 2: images and regions: 1 cells of ours" in capsys.readouterr().out
    text = (tmp_path / "out" / "paper.md").read_text()
    assert text.count("## ") == 5
    assert text.count("Nothing of ours was run.") == 4
    assert "<table>" in (tmp_path / "out" / "paper.html").read_text()
    assert main(["eval", "paper", str(tmp_path / "none"), "--out", str(tmp_path / "other")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_model_stands_in_the_table_of_its_recipe(tmp_path: Path) -> None:
    tasks = {"gqa": {"n": 12_578, "of": 12_578, "published_split": 12_578}}
    for name in ("plain", "tiled"):
        write(
            tmp_path / name,
            "vqa",
            "lmms-eval",
            "gqa",
            {"gqa/exact_match": 0.5},
            12_578,
            12_578,
            details={"tasks": tasks},
        )
    tables = lay_out(find_reports([tmp_path / "plain"]), find_reports([tmp_path / "tiled"]))
    for table, folder in ((tables[3], "plain"), (tables[4], "tiled")):
        assert [row["ours"] for row in table["rows"]] == [False, False, True]
        assert folder in table["notes"][0]
