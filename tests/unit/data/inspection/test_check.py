"""`cloc-mllm data`: all faults in one pass, exit codes, the contact sheet, scenes from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.apps.cli import main
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.inspection.sheet import draw_sheet
from cloc_mllm.data.scenes.generator import generate_scenes
from cloc_mllm.errors import ClocError
from tests.builders import noise_image

REGION = {"box": [0, 0, 5, 5], "text": "cat"}
SAMPLE = {"id": "ok", "image": "whole.jpg", "caption": "a cat", "regions": [REGION]}
TURNS = [{"from": "human", "value": "<image>\nWhat is <region>?"}, {"from": "gpt", "value": "A cat."}]
TALK = {"id": "ok", "image": "whole.jpg", "conversations": TURNS, "regions": [[0, 0, 5, 5]]}

REGION_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"image": "none.jpg"}, "does not exist"),
    ({"image": "cut.jpg"}, "cannot be read"),
    ({"image": "text.jpg"}, "not a picture"),
    ({"regions": [{"box": [0, 0, 41, 5], "text": "a"}]}, "outside the image, which is 40 x 30 pixels"),
    ({"regions": [{"box": [5, 0, 1, 5], "text": "a"}]}, "x2 < x1"),
    ({"regions": [{"box": [0, 5, 5, 1], "text": "a"}]}, "y2 < y1"),
    ({"regions": [{"box": [0, 5, 5, 5], "text": "a"}]}, "no area"),
    ({"regions": [{"box": [0, 0, 5, 5], "text": " "}]}, "empty text"),
    ({"captoin": "a"}, "unknown key 'captoin'"),
    ({"width": 30}, "width is stated as 30"),
]


def write_lines(path: Path, samples: list[Any]) -> Path:
    path.write_text("".join(s if isinstance(s, str) else json.dumps(s) + "\n" for s in samples))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise_image().save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("no picture")
    return tmp_path


def test_every_class_of_fault_is_listed_in_one_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [{**SAMPLE, "id": f"bad{k}", **changes} for k, (changes, _) in enumerate(REGION_FAULTS)]
    talks = [{**TALK, "id": "bad-count", "regions": []}, TALK]
    path = write_lines(folder / "all.jsonl", [SAMPLE, *broken, "{broken\n", *talks, SAMPLE])
    assert main(["data", "check", str(path)]) == 2
    output = capsys.readouterr()
    for k, (_, message) in enumerate(REGION_FAULTS):
        (line,) = [line for line in output.out.splitlines() if f"bad{k} (line {k + 2})" in line]
        assert message in line
        assert str(path) in line
    assert "sample 'line 12': not valid JSON" in output.out
    assert "bad-count (line 13)': wrong number of <region>: the texts have 1, the sample gives 0" in output.out
    assert output.out.count("\n") == len(REGION_FAULTS) + 2 + 1
    assert "12 faults in 12 of 15 samples" in output.err
    assert "Traceback" not in output.err


def test_several_faults_of_one_sample_are_all_listed(folder: Path) -> None:
    region = {"box": [5, 0, 1, 5], "text": ""}
    path = write_lines(folder / "a.jsonl", [{"image": "none.jpg", "regions": [region], "capton": "a"}])
    report = check_data(path)
    assert len(report.faults) == 5
    assert (report.samples, report.broken) == (1, 1)


def test_json_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(folder / "a.jsonl", [SAMPLE, {**SAMPLE, "image": "none.jpg"}])
    assert main(["data", "check", str(path), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 2
    assert report["broken"] == 1
    assert report["files"] == [{"file": str(path), "kind": "region-text", "samples": 2, "regions": 2, "broken": 1}]
    (fault,) = report["faults"]
    assert fault["file"] == str(path)
    assert fault["sample"] == "ok (line 2)"


def test_scenes_from_the_command_line_are_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scenes"
    words = ["data", "scenes", "--n", "6", "--n-val", "3", "--n-test", "2", "--seed", "4", "--preset", "full"]
    assert main([*words, "--out", str(out)]) == 0
    assert "11 scenes (6 train, 3 validation, 2 test)" in capsys.readouterr().out
    assert main(["data", "check", str(out), "--draw", str(tmp_path / "sheet.png")]) == 0
    assert "train/regions.jsonl: 6 samples (region-text)" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").width > 500
    generate_scenes(tmp_path / "same", "full", n=6, seed=4, n_val=3, n_test=2)
    assert (tmp_path / "same/test/questions.jsonl").read_bytes() == (out / "test/questions.jsonl").read_bytes()
    assert main([*words, "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_sheet_shows_boxes_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "black").save(tmp_path / "black.png")
    sample = {"image": "black.png", "caption": "c", "regions": [{"box": [16, 32, 48, 48], "text": "t"}]}
    write_lines(tmp_path / "regions.jsonl", [sample])
    assert draw_sheet(tmp_path, tmp_path / "sheet.png") == 1
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    # One cell of 256 pixels for 64 of the picture, behind a margin of 6: corners are scaled by 4 and shifted by 6.
    for x, y in ((16, 40), (48, 40), (30, 48)):
        assert sum(sheet.getpixel((x * 4 + 6, y * 4 + 6))) > 100
    for x, y in ((12, 40), (52, 40), (30, 52), (30, 40)):
        assert sum(sheet.getpixel((x * 4 + 6, y * 4 + 6))) < 20


def test_broken_samples_do_not_stop_a_sheet(folder: Path) -> None:
    broken = [{**SAMPLE, **changes} for changes, _ in REGION_FAULTS]
    talks = [TALK, {**TALK, "regions": []}, {"messages": [{"content": 3}]}]
    write_lines(folder / "a.jsonl", [*broken, "{broken\n", *talks, SAMPLE])
    assert draw_sheet(folder / "a.jsonl", folder / "sheet.png", count=30) == len(broken) - 3 + 2


def test_what_cannot_be_checked_or_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(folder / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["data", "check", str(folder)]) == 2
    assert "holds no samples" in capsys.readouterr().err
    write_lines(folder / "a.jsonl", [{**SAMPLE, "image": "none.jpg"}])
    with pytest.raises(ClocError, match="no sample has a picture"):
        draw_sheet(folder, folder / "sheet.png")
    write_lines(folder / "a.jsonl", [SAMPLE])
    with pytest.raises(ClocError, match="cannot write the sheet"):
        draw_sheet(folder, folder / "a.jsonl" / "sheet.png")
    (folder / "b.jsonl").touch()
    assert [fault.problem for fault in check_data(folder).faults] == ["the file holds no samples"]
