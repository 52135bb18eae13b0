"""The demo in miniature: the real launcher, the real programs, every stage, a few steps each.

What the numbers are worth is the full demo's business. This proves that the parts fit: what one stage leaves behind is
what the next one takes, and a person ends up with a report, a model to talk with, and a tower to export.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.integration.test_cli import expect_refusal, run_cli

pytestmark = pytest.mark.demo

ENCODER_METRICS = {
    "image_i2t_r1",
    "image_t2i_r1",
    "region_top1",
    "region_macc",
    "region_r2t_r1",
    "region_t2r_r1",
    "pointing_acc",
    "grounding_zeroshot_acc50",
    "region_size_acc",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished miniature demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = run_cli("demo", "--preset", "miniature", "--out", folder, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_report_keeps_the_contract(report: dict[str, Any]) -> None:
    assert set(report["encoder"]) == {"clip", "cloc"}
    assert set(report["mllm"]) == {"clip", "cloc_prompter"}
    for entry in report["encoder"].values():
        assert set(entry["metrics"]) >= ENCODER_METRICS
    assert "grounding_acc50" in report["encoder"]["cloc"]["metrics"]
    for entry in report["mllm"].values():
        assert {"vqa_acc", "referring_acc", "grounding_acc50"} <= set(entry["metrics"])
    for entry in [*report["encoder"].values(), *report["mllm"].values()]:
        for metric in entry["metrics"].values():
            low, high = metric["ci95"]
            assert metric["value"] is None or 0 <= low <= metric["value"] <= high <= 1
            assert metric["n"] > 0
    assert report["dataset"]["split"] == "test"
    assert report["grounding_mode"] == "head"
    assert report["baselines"]["encoder"]["region_top1"]["chance"] > 0
    assert report["baselines"]["mllm"]["vqa_acc"]["majority"]["value"] > 0


def test_models_that_are_compared_saw_the_same(report: dict[str, Any]) -> None:
    stages = {stage["name"]: stage for stage in report["stages"]}
    for one, two in (("encoders/clip", "encoders/cloc"), ("mllm/clip/instruct", "mllm/cloc_prompter/instruct")):
        for key in ("images", "steps", "seed", "world_size", "zero_stage"):
            assert stages[one][key] == stages[two][key]
    assert stages["encoders/cloc"]["world_size"] == 2
    assert all(stage["seconds"] > 0 for stage in stages.values())


def test_page_holds_pictures_and_curves(out: Path, report: dict[str, Any]) -> None:
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= len({s["image"] for s in report["samples"]}) // 2
    assert "pre-training: loss_region" in page
    assert "instruction tuning: loss" in page
    with Image.open(out / "report.png") as picture:
        assert picture.width > 600


def test_a_second_run_repeats_nothing(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    done = run_cli("demo", "--preset", "miniature", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == 11
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_chat_takes_boxes_and_gives_json_and_a_picture(out: Path, tmp_path: Path) -> None:
    model = out / "mllm" / "cloc_prompter" / "instruct" / "export"
    image = next((out / "data" / "test" / "images").iterdir())
    drawn = tmp_path / "drawn.png"
    words = ("--image", image, "--box", "10,10,60,60", "--json", "--draw", drawn, "--max-new-tokens", 8)
    done = run_cli("chat", model, *words)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert reply["question"] == "What is <region>?"
    assert reply["boxes_in"] == [[10, 10, 60, 60]]
    assert isinstance(reply["answer"], str)
    with Image.open(drawn) as picture:
        assert picture.width >= 96
    done = run_cli("chat", model, "--max-new-tokens", 4, "How many objects are there?")
    assert done.returncode == 0, done.stderr


def test_chat_refuses_a_box_outside_and_a_model_of_another_kind(out: Path) -> None:
    image = next((out / "data" / "test" / "images").iterdir())
    model = out / "mllm" / "clip" / "instruct" / "export"
    expect_refusal(run_cli("chat", model, "--image", image, "--box", "10,10,600,60"), "outside the image")
    expect_refusal(run_cli("chat", out / "encoders" / "clip" / "export", "What?"), "cloc_mllm")


def test_tower_exports_as_clip(out: Path, tmp_path: Path) -> None:
    done = run_cli("export", out / "encoders" / "cloc" / "export", "--format", "clip", "--out", tmp_path / "tower")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model"
    mllm = out / "mllm" / "clip" / "instruct" / "export"
    expect_refusal(run_cli("export", mllm, "--format", "clip", "--out", tmp_path / "no"), "takes an encoder")
