"""The measurement of labels: perfect labels score 100, wrong names and wrong places do not count."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cloc_mllm.labeling.filtering import FilterOptions
from cloc_mllm.labeling.stages import Detection
from tests.builders import noise_image

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "benchmarks"
CATEGORIES = ["person", "dog", "cell phone", "tv"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("label_quality", SCRIPTS / "label_quality.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["label_quality"] = module  # its data classes look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def test_words_for_categories(script: ModuleType) -> None:
    words = script.vocabulary(CATEGORIES)
    for phrase, name in [
        ("two old women", "person"),
        ("a crowd of people", "person"),
        ("puppies", "dog"),
        ("his phone", "cell phone"),
        ("the cell phones", "cell phone"),
        ("a flat screen", "tv"),
        ("a sofa", None),  # names a category of COCO that is not among these
        ("the dog house", None),
    ]:
        hit = script.classes_of(phrase, words)
        assert (None if hit is None else [CATEGORIES[k] for k in hit[1]]) == (None if name is None else [name]), phrase


def test_perfect_and_wrong_labels(script: ModuleType) -> None:
    truths = {
        "1": script.Truth((100, 100), torch.tensor([[0.0, 0, 40, 40], [50, 50, 90, 90]]).double(), ["dog", "person"]),
        "2": script.Truth((100, 100), torch.tensor([[10.0, 10, 100, 100]]).double(), ["tv"]),
    }
    phrases = {"1": ["a dog", "a man"], "2": ["a monitor", "the sky"]}

    def measure(labels: dict[str, list[Detection]]) -> dict[str, float]:
        figures = script.measure_source(labels, phrases, truths, CATEGORIES)
        return {name: metric.value for name, metric in figures.items()}

    dog, man = Detection((0, 0, 40, 40), "a dog", 0.9), Detection((50, 50, 90, 90), "a man", 0.8)
    tv, sky = Detection((10, 10, 100, 100), "a monitor", 0.7), Detection((0, 0, 100, 20), "the sky", 0.6)
    perfect = measure({"1": [dog, man], "2": [tv, sky]})
    assert perfect["precision"] == perfect["recall"] == perfect["mean_iou"] == perfect["boxes_asked_for"] == 1
    assert perfect["any_box"] == 0.75  # the sky is no object of COCO's, and is not judged by name
    assert perfect["labels_an_image"] == perfect["words_a_label"] == 2
    assert perfect["precision_of_the_whole_picture"] == pytest.approx(1 / 3)  # the television fills its picture
    swapped = measure({"1": [Detection(man.box, "a dog", 0.9), Detection(dog.box, "a man", 0.8)], "2": []})
    assert (swapped["precision"], swapped["recall"], swapped["any_box"]) == (0, 0, 1)
    twice = measure({"1": [dog, dog], "2": []})
    assert (twice["precision"], twice["recall"]) == (1, pytest.approx(1 / 3))


def test_coco_is_read_and_labelled(script: ModuleType, tmp_path: Path) -> None:
    noise_image(40, 30).save(tmp_path / "7.png")
    entry = {"id": 1, "image_id": 7, "bbox": [5, 5, 20, 10], "category_id": 1, "iscrowd": 0}
    images = [{"id": 7, "file_name": "7.png", "width": 40, "height": 30, "license": 1}]
    instances = {"images": images, "annotations": [entry], "categories": [{"id": 1, "name": "dog"}]}
    captions = {"images": images, "annotations": [{"id": 1, "image_id": 7, "caption": "A dog."}]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    args = Namespace(
        images=tmp_path, instances=tmp_path / "instances.json", captions=tmp_path / "captions.json", limit=None
    )
    samples, truths, names = script.read_coco(args, tmp_path / "out")
    assert names == ["dog"]
    assert truths["7"].boxes.tolist() == [[5, 5, 25, 15]]

    def detector(pictures: list[object], phrases: list[list[str]]) -> list[list[Detection]]:
        assert (len(pictures), phrases) == (1, [["a dog"]])
        return [[Detection((5, 5, 25, 15), "a dog", 0.9), Detection((0, 0, 9, 9), "a dog", 0.05)]]

    labels, dropped = script.label(samples, [["a dog"]], detector, FilterOptions(), batch=4)
    assert [one.score for one in labels["7"]] == [0.9]
    assert dropped == {"score": 1}
