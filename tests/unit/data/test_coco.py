"""The COCO importer: exact counts, exact boxes, and files that do not fit together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.apps.cli import main
from cloc_mllm.data.importers import json_stream
from cloc_mllm.data.importers.coco import convert_coco
from cloc_mllm.data.importers.json_stream import stream_lists
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.readers import open_samples
from cloc_mllm.errors import ClocError
from tests.builders import noise_image

COCO50 = Path(os.environ.get("CLOC_COCO50", Path(__file__).resolve().parents[4] / "shared" / "data" / "coco50"))


class Made:
    """A small COCO of three pictures, written on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30, "license": 1} for k in (7, 3, 5)]
        for image in self.images:
            noise_image(seed=image["id"]).save(folder / image["file_name"])
        self.annotations = [
            self.box(1, 7, [1.1, 2.2, 10.33, 20.44], 2),
            self.box(2, 7, [30, 20, 10.5, 10], 1),
            self.box(3, 3, [0, 0, 40, 30], 1, iscrowd=1, segmentation={"counts": [1, 2], "size": [30, 40]}),
            self.box(4, 3, [5, 5, 0, 5], 1),
        ]
        self.categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "traffic light"}]
        self.captions = [
            {"id": 12, "image_id": 7, "caption": "Second  one.\n"},
            {"id": 11, "image_id": 7, "caption": "First one."},
            {"id": 13, "image_id": 3, "caption": "Only one."},
            {"id": 14, "image_id": 3, "caption": " "},
        ]

    @staticmethod
    def box(identity: int, image: int, box: list[float], category: int, **more: Any) -> dict[str, Any]:
        return {"id": identity, "image_id": image, "bbox": box, "category_id": category, "iscrowd": 0, **more}

    def write(self) -> list[str]:
        instances = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        (self.folder / "instances.json").write_text(json.dumps({"info": {}, **instances}))
        captions = {"images": self.images, "annotations": self.captions}
        (self.folder / "captions.json").write_text(json.dumps(captions, indent=1))
        words = ["--images", self.folder, "--instances", self.folder / "instances.json"]
        return [str(word) for word in [*words, "--captions", self.folder / "captions.json"]]

    def convert(self, **options: Any) -> dict[str, int]:
        self.write()
        files = (self.folder / "instances.json", self.folder / "captions.json")
        return convert_coco(self.folder, *files, self.folder / "out", **options)["counts"]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_counts_and_boxes(made: Made, file_format: str) -> None:
    assert made.convert(file_format=file_format) == {
        "images_listed": 3,
        "categories": 2,
        "images_written": 2,
        "images_without_objects": 1,
        "images_without_caption_left_out": 1,
        "images_bad_left_out": 0,
        "captions_read": 3,
        "captions_empty_left_out": 1,
        "boxes_written": 2,
        "boxes_clipped": 1,
        "boxes_crowd_left_out": 1,
        "boxes_without_area_left_out": 1,
        "texts_cleaned": 0,
    }
    source = open_samples(made.folder / "out")
    first, second = source[0], source[1]
    assert first["id"] == "7"
    assert first["caption"] == "First one."
    assert first["captions"] == ["First one.", "Second one."]
    assert first["regions"] == [
        {"box": [1.1, 2.2, 11.43, 22.64], "text": "traffic light"},
        {"box": [30, 20, 40, 30], "text": "cat"},
    ]
    assert (first["width"], first["height"], first["source"]) == (40, 30, "coco")
    assert (second["id"], second["regions"]) == ("3", [])
    report = check_data(made.folder / "out")
    assert report.faults == []
    assert report.samples == 2


def test_command_line(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "convert", "coco", *made.write(), "--out", str(made.folder / "out"), "--copy-images"]
    assert main(words) == 0
    assert "boxes crowd left out                 1\n" in capsys.readouterr().out
    assert sorted(p.name for p in (made.folder / "out" / "images").iterdir()) == ["3.png", "7.png"]
    assert json.loads((made.folder / "out" / "dataset.json").read_text())["kind"] == "coco"
    (made.folder / "7.png").unlink()
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "7.png: sample '7': the image does not exist" in message
    assert "Traceback" not in message
    assert main([*words, "--on-bad-sample", "skip"]) == 0
    assert "images bad left out                  1\n" in capsys.readouterr().out


def fault(made: Made, message: str) -> None:
    with pytest.raises(ClocError, match=message):
        made.convert()
    assert not (made.folder / "out" / "regions.jsonl").exists()


def test_a_picture_of_another_size(made: Made) -> None:
    noise_image(30, 40).save(made.folder / "7.png")
    fault(made, r"instances.json: sample '7': the file says 40 x 30 pixels, but 7.png is 30 x 40")


def test_a_turned_picture_is_measured_as_it_is_shown(made: Made) -> None:
    picture = noise_image(30, 40)
    turned = picture.getexif()
    turned[0x0112] = 6
    picture.save(made.folder / "7.png", exif=turned)
    assert made.convert()["images_written"] == 2
    assert check_data(made.folder / "out").faults == []


def test_a_file_that_is_no_picture(made: Made) -> None:
    (made.folder / "7.png").write_text("no picture")
    fault(made, "7.png: sample '7': the image cannot be read")


def test_annotations_of_unknown_images(made: Made) -> None:
    made.annotations.append(made.box(9, 99, [0, 0, 5, 5], 1))
    fault(made, "refer to 1 images that no file lists, the first of them 99")


def test_an_unlisted_category(made: Made) -> None:
    made.annotations.append(made.box(9, 7, [0, 0, 5, 5], 9))
    fault(made, "category 9 is used but not listed")


def test_the_wrong_file(made: Made) -> None:
    made.captions[0].pop("caption")
    fault(made, r"captions.json: sample '12': an item of 'annotations' lacks 'caption'")
    made.annotations[0]["bbox"] = ["a", 1, 2, 3]
    fault(made, r"instances.json: sample '1': an item of 'annotations' is malformed")


def test_an_output_that_cannot_be_written(made: Made) -> None:
    made.write()
    (made.folder / "out").write_text("a file")
    fault(made, "cannot write")


numbers = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), st.text())
values = st.recursive(
    st.one_of(numbers, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=3), values, max_size=3), st.lists(values), st.integers(1, 9), st.booleans())
@settings(max_examples=80, deadline=None)
def test_streaming_reads_what_json_reads(other: dict[str, Any], items: list[Any], window: int, indent: bool) -> None:
    import tempfile

    whole = {**other, "wanted": items}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_WINDOW", window)
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(whole, indent=2 if indent else None))
        assert list(stream_lists(path, ["wanted"])) == [("wanted", item) for item in items]


@pytest.mark.parametrize("text", ["", "[1]", '{"a"', '{"a": [1, 2', '{"a": [1 2]}', '{"a": 1', '{"a": {]}', '{"a": 1}'])
def test_streaming_names_what_is_broken(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ClocError, match=r"a.json: (not valid JSON|'a' is not a list)"):
        list(stream_lists(tmp_path / "a.json", ["a"]))


@pytest.mark.skipif(not COCO50.is_dir(), reason=f"the 50 photographs of COCO are not at {COCO50} (set CLOC_COCO50)")
def test_real_photographs(tmp_path: Path) -> None:
    annotations = COCO50 / "annotations"
    instances, captions = annotations / "instances_train2017.json", annotations / "captions_train2017.json"
    counts = convert_coco(COCO50 / "train2017", instances, captions, tmp_path)["counts"]
    truth = json.loads(instances.read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    kept = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    assert counts["images_written"] == 50
    assert counts["captions_read"] == 250
    assert counts["boxes_written"] == len(kept)
    assert counts["boxes_crowd_left_out"] == len(truth["annotations"]) - len(kept)
    source = open_samples(tmp_path)
    found = sorted(
        (source[k]["id"], region["text"], *region["box"]) for k in range(50) for region in source[k]["regions"]
    )
    expected = sorted(
        (str(entry["image_id"]), names[entry["category_id"]], x, y, x + w, y + h)
        for entry in kept
        for x, y, w, h in [entry["bbox"]]
    )
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], abs=0.01)
    report = check_data(tmp_path)
    assert (report.samples, report.broken) == (50, 0)
