"""The benchmarks run and measure what they say; what they measure is for documents, not for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_losses_are_the_same_work(tmp_path: Path) -> None:
    size = ("--rows", "96", "--width", "16", "--tile-size", "32", "--repeats", "1")
    printed = run("contrastive_losses.py", *size, "--out", str(tmp_path))
    report = json.loads((tmp_path / "contrastive_losses.json").read_text())
    found = {result["loss"]: result for result in report["results"]}
    assert report["machine"]["cores"] >= 1
    assert found["clip tiled"]["value"] == pytest.approx(found["clip plain"]["value"], rel=1e-5)
    assert found["region tiled"]["value"] == pytest.approx(found["region plain"]["value"], rel=1e-5)
    assert found["region plain"]["value"] < found["clip plain"]["value"], "the filter took nothing out"
    if util.find_spec("open_clip") is None:
        assert "No module named 'open_clip'" in found["open_clip ClipLoss"]["failed"]
        assert "open_clip ClipLoss at N = 96" in printed
    else:
        assert found["open_clip ClipLoss"]["value"] == pytest.approx(found["clip plain"]["value"], rel=1e-4)
    assert all(result["seconds"] > 0 for result in found.values() if "failed" not in result)


def test_a_case_that_cannot_fit_is_reported_not_tried(tmp_path: Path) -> None:
    run("contrastive_losses.py", "--rows", "64", "--memory-gib", "0", "--repeats", "1", "--out", str(tmp_path))
    results = json.loads((tmp_path / "contrastive_losses.json").read_text())["results"]
    failed = {result["loss"] for result in results if "expected to need" in result.get("failed", "")}
    assert failed == {"open_clip ClipLoss", "clip plain", "region plain"}


def test_steps_are_named_in_the_help() -> None:
    assert "against open_clip's at the same ViT" in run("encoder_step.py", "--help")


def test_shards_are_read_whole_and_with_the_same_memory(tmp_path: Path) -> None:
    size = ("--samples", "128", "--in-shard", "32", "--modes", "bytes", "--workers", "0", "--repeats", "1")
    printed = run("shard_reading.py", *size, "--sides", "cloc_mllm tar", "open_clip tar", "--out", str(tmp_path))
    results = json.loads((tmp_path / "shard_reading.json").read_text())["results"]
    whole, theirs, resumed, small, large = results
    assert (whole["what"], whole["seen"], resumed["what"]) == ("pass", 128, "resume")
    assert whole["images_per_second"] > 0
    assert resumed["seconds"] > 0
    assert (small["seen"], large["seen"]) == (128, 20 * 128)
    # The small set fits into the blocks of all lanes; the large one would need 20 times as much.
    assert large["peak_mib"] < small["peak_mib"] + 40
    if util.find_spec("webdataset") is None or util.find_spec("open_clip_train") is None:
        assert "No module named" in theirs["failed"]
        assert "open_clip tar, bytes, 0 workers: " in printed
    else:
        assert theirs["seen"] == 128


def test_regions_are_asked_on_every_side(tmp_path: Path) -> None:
    size = ("--model", "ViT-B-32", "--layers", "1", "--counts", "3", "--batch", "2", "--repeats", "1")
    printed = run("region_queries.py", *size, "--out", str(tmp_path))
    (found,) = json.loads((tmp_path / "region_queries.json").read_text())["results"]
    assert found["boxes"] == 3
    for name in ("mean", "prompt"):
        assert found[f"{name}_speedup"] == pytest.approx(found["crops_seconds"] / found[f"{name}_seconds"])
    assert "| boxes | CLIP on crops, s |" in printed


def test_regions_are_named_on_every_side(tmp_path: Path) -> None:
    printed = run("region_recognition.py", "--images", "1", "--layers", "1", "--repeats", "1", "--out", str(tmp_path))
    (found,) = json.loads((tmp_path / "region_recognition.json").read_text())["results"]
    assert found["prompt_speedup"] == pytest.approx(found["prompt_images_per_second"] / found["crop_images_per_second"])
    assert "| Prompter, mean" in printed


def test_packing_spares_padding(tmp_path: Path) -> None:
    printed = run(
        "packing.py", "--steps", "2", "--width", "32", "--layers", "1", "--repeats", "1", "--out", str(tmp_path)
    )
    sides = json.loads((tmp_path / "packing.json").read_text())["results"][0]["sides"]
    assert set(sides) == {"padded", "grouped", "masked", "packed", "packed long"}
    assert sides["padded"]["useful_share"] < sides["packed"]["useful_share"] <= 1
    assert sides["padded"]["ratio"] == 1
    assert "useful tokens a second" in printed


def test_a_conversion_is_timed_and_its_memory_read() -> None:
    found = json.loads(run("import_coco.py", "--case", json.dumps({"images": 10, "format": "jsonl", "repeats": 1})))
    assert found["boxes"] == 72
    assert found["processor_seconds"] > 0
    assert 10 < found["peak_mib"] < 1024
