"""LVIS referred-object questions: fair pairs of classes, places that lie on the object, exact numbers."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.data.builders.lvis_referring import ReferringOptions, build_lvis_referring
from cloc_mllm.data.dataset import ConversationDataset
from cloc_mllm.data.importers.coco import clipped_outline
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.errors import ClocError
from cloc_mllm.models.region_shapes import read_mask
from tests.builders import noise_image

COCO50 = Path(os.environ.get("CLOC_COCO50", Path(__file__).resolve().parents[5] / "shared" / "data" / "coco50"))
CATEGORIES = [
    {"id": 1, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)"], "frequency": "r"},
    {"id": 2, "name": "trash_can", "synonyms": ["trash_can", "garbage_can"], "frequency": "c"},
    {"id": 3, "name": "can", "synonyms": ["can", "tin_can"], "frequency": "c"},
    {"id": 4, "name": "dog", "synonyms": ["dog"], "frequency": "f"},
]


def box(identity: int, image: int, category: int, corner: tuple[int, int], outline: Any = None) -> dict[str, Any]:
    x, y = corner
    square = [[x, y, x + 10, y, x + 10, y + 10, x, y + 10]]
    return {"id": identity, "image_id": image, "category_id": category, "bbox": [x, y, 10, 10], "area": 100.0,
            "segmentation": square if outline is None else outline}  # fmt: skip


ANNOTATIONS = [
    box(1, 7, 1, (0, 0)),
    box(2, 7, 4, (20, 10)),
    box(3, 8, 2, (0, 0)),  # "can" is in "trash can": no fair pair; a frequent class takes its place
    box(4, 8, 3, (20, 10)),
    box(5, 9, 1, (0, 0)),  # annotated twice, as a bow and as a dog
    box(6, 9, 4, (0, 0)),
    box(7, 10, 4, (5, 5), [[5, 5, 5.1, 5, 5.1, 5.1]]),  # holds the centre of no pixel
]


def lvis(folder: Path) -> Path:
    images = []
    for k in (7, 8, 9, 10):
        (folder / "val2017").mkdir(exist_ok=True)
        noise_image(40, 30, seed=k).save(folder / "val2017" / f"{k}.jpg")
        images.append(
            {"id": k, "width": 40, "height": 30, "coco_url": f"http://images.cocodataset.org/val2017/{k}.jpg"}
        )
    file = folder / "lvis_v1_val.json"
    file.write_text(json.dumps({"images": images, "annotations": ANNOTATIONS, "categories": CATEGORIES}))
    return file


def built(folder: Path, **options: Any) -> tuple[dict[str, int], list[dict[str, Any]]]:
    file = lvis(folder)
    with pytest.warns(UserWarning, match="images listed: 4 instead of 19,809; categories: 4 instead of 1,203"):
        result = build_lvis_referring(ReferringOptions(file, folder, folder / "out", progress=False, **options))
    assert not (folder / "out" / ".annotations.db").exists()
    assert result == json.loads((folder / "out" / "dataset.json").read_text())
    assert check_data(folder / "out").faults == []
    lines = (folder / "out" / "questions.jsonl").read_text().splitlines()
    return result["counts"], [json.loads(line) for line in lines]


def test_questions(tmp_path: Path) -> None:
    counts, questions = built(tmp_path, limit=2)
    assert counts["objects_asked_about"] * 3 == counts["questions_written"] == len(questions)
    assert counts["objects_without_pixels_left_out"] == 1
    assert sorted({question["id"].split("-")[0] for question in questions}) == ["7", "8", "9"]
    for number, question in enumerate(questions):
        text = "".join(item.get("text", "<region>") for item in question["messages"][0]["content"][1:])
        answer, negative = question["answer"], question["negative"]
        first, second = (answer, negative) if number // 3 % 2 == 0 else (negative, answer)
        assert text == f"Is the object <region> of the image a {first} or a {second}?"
        assert answer == question["synonyms"][0]
        for a, b in itertools.product(question["synonyms"], question["negative_synonyms"]):
            assert a not in b
            assert b not in a
        image, place, _ = question["id"].split("-", 2)
        truth = [one for one in ANNOTATIONS if one["image_id"] == int(image)][int(place)]
        x, y, width, height = truth["bbox"]
        assert question["boxes_in"] == [[x, y, x + width, y + height]]
        region = question["messages"][0]["content"][2]
        if question["kind"] == "point":
            column, row = region["point"]
            assert read_mask(truth["segmentation"], 40, 30)[int(row), int(column)]
        elif question["kind"] == "free-form":
            assert (read_mask(region["mask"], 40, 30) == read_mask(truth["segmentation"], 40, 30)).all()
        else:
            assert [region["box"]] == question["boxes_in"]
    of_image = {question["id"].split("-")[0]: {question["answer"], question["negative"]} for question in questions}
    assert of_image["7"] == {"bow", "dog"}
    assert {question["kind"] for question in questions} == {"box", "point", "free-form"}
    assert any(question["synonyms"] == ["trash can", "garbage can"] for question in questions)
    read = ConversationDataset(tmp_path / "out" / "questions.jsonl")
    assert read[0]["negative_synonyms"] == questions[0]["negative_synonyms"]


def test_numbers_and_seeds(tmp_path: Path) -> None:
    counts, questions = built(tmp_path, objects=2, location="box", seed=3)
    assert (counts["objects_asked_about"], len(questions)) == (2, 2)
    assert built(tmp_path, objects=2, location="box", seed=3)[1] == questions
    assert any(built(tmp_path, objects=2, location="box", seed=seed)[1] != questions for seed in range(4, 9))
    with pytest.raises(ClocError, match="9 objects were asked for, but only 3 qualify"):
        build_lvis_referring(ReferringOptions(lvis(tmp_path), tmp_path, tmp_path / "more", objects=9, progress=False))
    assert not list((tmp_path / "more").glob("*.json*l"))


def test_bad_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lvis(tmp_path)
    (tmp_path / "val2017" / "7.jpg").write_text("<!DOCTYPE html>")
    noise_image(30, 40).save(tmp_path / "val2017" / "8.jpg")
    words = ["data", "build", "lvis-referring", "--instances", file, "--images", tmp_path, "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "7.jpg: sample '7': the image cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "questions.jsonl").exists()
    assert main([*map(str, words), "--on-bad-sample", "skip"]) == 0
    assert "images bad left out                  2\n" in capsys.readouterr().out


@pytest.mark.skipif(not COCO50.is_dir(), reason=f"the 50 photographs of COCO are not at {COCO50} (set CLOC_COCO50)")
def test_on_photographs(tmp_path: Path) -> None:
    instances = COCO50 / "annotations" / "instances_train2017.json"
    options = ReferringOptions(instances, COCO50 / "train2017", tmp_path, limit=3, location="point", progress=False)
    counts = build_lvis_referring(options)["counts"]
    content = json.loads(instances.read_text())
    outlines = {(one["image_id"], tuple(one["bbox"])): one["segmentation"] for one in content["annotations"]}
    sizes = {one["id"]: (one["width"], one["height"]) for one in content["images"]}
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(lines) == counts["questions_written"] > 100
    for question in lines:
        image = int(question["id"].split("-")[0])
        x1, y1, x2, y2 = question["boxes_in"][0]
        near = min(
            (key for key in outlines if key[0] == image),
            key=lambda key: sum(abs(a - b) for a, b in zip(key[1], (x1, y1, x2 - x1, y2 - y1), strict=True)),
        )
        column, row = question["messages"][0]["content"][2]["point"]
        mask = read_mask(clipped_outline(outlines[near], sizes[image]), *sizes[image])
        assert mask[int(row), int(column)], question["id"]
    assert check_data(tmp_path).faults == []
