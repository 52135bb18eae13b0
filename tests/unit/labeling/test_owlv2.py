"""OWLv2 as a stage, against transformers' own forward and post-processing on one picture at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Owlv2Processor, OwlViTProcessor

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.detectors import owlv2
from cloc_mllm.labeling.stages import DETECTORS, Detection, build_stage
from tests.builders import noise_image
from tests.builders_detectors import save_tiny_owl

FLOOR = 0.3
IMAGES = [noise_image(40, 30, 1), noise_image(25, 50, 2), noise_image(33, 33, 3), noise_image(64, 16, 4)]
PHRASES = [["a red cat", "the dog", "ball", "a red cat"], ["sky"], [], ["a very old man with a small dog", "tree"]]


@pytest.fixture(scope="module", params=["owlv2", "owlvit"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, request.param, save_tiny_owl(folder, request.param)


def detector(folder: Path, **options: Any) -> owlv2.OwlDetector:
    stage: owlv2.OwlDetector = build_stage(
        DETECTORS, f"owlv2:{folder}", options={"floor": FLOOR, "size": 48, **options}
    )
    return stage


def stock_processor(checkpoint: tuple[Path, str, Any]) -> Any:
    folder, kind, _ = checkpoint
    kind_class = Owlv2Processor if kind == "owlv2" else OwlViTProcessor
    return kind_class(AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


@torch.no_grad()
def stock(checkpoint: tuple[Path, str, Any], images: list[Image.Image], phrases: list[list[str]]) -> list[Any]:
    """What transformers says to a batch at 48 pixels, boxes cut off at the picture's edges."""
    processor, model = stock_processor(checkpoint), checkpoint[2]
    size = {"height": 48, "width": 48}
    text = processor(text=phrases, return_tensors="pt", padding="max_length", max_length=16)
    pixels = processor.image_processor(images, size=size, return_tensors="pt").pixel_values
    outputs = model(text.input_ids, pixels, text.attention_mask, interpolate_pos_encoding=True)
    sizes = [image.size[::-1] for image in images]
    return processor.post_process_grounded_object_detection(outputs, FLOOR, sizes, phrases)


def as_detections(answer: dict[str, Any], image: Image.Image) -> list[Detection]:
    limits = torch.tensor([*image.size, *image.size])
    boxes = torch.minimum(answer["boxes"].clamp(min=0), limits).tolist()
    found = zip(boxes, answer["text_labels"], answer["scores"].tolist(), strict=True)
    kept = [Detection(tuple(box), text, score) for box, text, score in found if box[0] < box[2] and box[1] < box[3]]
    return sorted(kept, key=lambda d: -d.score)


def assert_same(ours: list[Detection], theirs: list[Detection]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.text == other.text
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.box == pytest.approx(other.box, abs=1e-3)


def test_a_batch_is_what_transformers_says_to_each_picture_alone(checkpoint: tuple[Path, str, Any]) -> None:
    found = detector(checkpoint[0])(IMAGES, PHRASES)
    for image, phrases, ours in zip(IMAGES, PHRASES, found, strict=True):
        if not phrases:
            assert ours == []
            continue
        (theirs,) = stock(checkpoint, [image], [list(dict.fromkeys(phrases))])
        assert_same(ours, as_detections(theirs, image))


def test_transformers_lets_its_padding_win(checkpoint: tuple[Path, str, Any]) -> None:
    """The trap that the stage is built around: should this fail, transformers has mended it."""
    with pytest.raises(IndexError):
        stock(checkpoint, IMAGES[:2], [["a red cat", "the dog", "ball", "tree", "car"], ["sky"]])


def test_no_phrase_of_a_neighbour_wins(checkpoint: tuple[Path, str, Any]) -> None:
    """Beside a picture that has, first of all phrases, the very one that would win all boxes of this one."""
    stage = detector(checkpoint[0], floor=0.0)
    rivals = {word: stage(IMAGES[:1], [["sky", word]])[0] for word in ("cat", "ball", "tree", "car", "house", "man")}
    strongest = max(rivals, key=lambda word: sum(d.text == word for d in rivals[word]))
    assert any(d.text == strongest for d in rivals[strongest])
    _, ours = stage([IMAGES[1], IMAGES[0]], [[strongest, "dog"], ["sky"]])
    assert_same(ours, stage(IMAGES[:1], [["sky"]])[0])


def test_boxes_lie_in_the_picture_and_scores_descend(checkpoint: tuple[Path, str, Any]) -> None:
    found = detector(checkpoint[0], floor=0.0)(IMAGES, PHRASES)
    assert any(found)
    for image, phrases, ours in zip(IMAGES, PHRASES, found, strict=True):
        assert [d.score for d in ours] == sorted((d.score for d in ours), reverse=True)
        for d in ours:
            assert 0 <= d.box[0] < d.box[2] <= image.width
            assert 0 <= d.box[1] < d.box[3] <= image.height
            assert d.text in phrases


def test_many_phrases_in_pieces(checkpoint: tuple[Path, str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = detector(checkpoint[0])(IMAGES, PHRASES)
    monkeypatch.setattr(owlv2, "PHRASES_AT_ONCE", 2)
    for pieces, at_once in zip(detector(checkpoint[0])(IMAGES, PHRASES), whole, strict=True):
        if at_once or pieces:
            assert_same(pieces, at_once)


def test_long_phrases_are_counted_and_reported_whole(checkpoint: tuple[Path, str, Any]) -> None:
    stage = detector(checkpoint[0], floor=0.0)
    long = "dog " * 30
    found = stage(IMAGES[:2], [[long, "cat"], ["cat"]])
    assert stage.tally == {"given": 3, "shortened": 1, "unreadable": 0}
    assert {d.text for d in found[0]} <= {long, "cat"}


def test_the_count_of_phrases_does_not_depend_on_the_batch(checkpoint: tuple[Path, str, Any]) -> None:
    """Pictures share phrases, a long one too, and one of them has a phrase twice."""
    long = "dog " * 30
    phrases = [[long, "cat", "cat"], ["cat", long], [], ["cat"]]
    together, alone = detector(checkpoint[0]), detector(checkpoint[0])
    together(IMAGES, phrases)
    for image, own in zip(IMAGES, phrases, strict=True):
        alone([image], [own])
    assert together.tally == alone.tally == {"given": 5, "shortened": 2, "unreadable": 0}


def test_other_number_formats(checkpoint: tuple[Path, str, Any]) -> None:
    exact = detector(checkpoint[0], floor=0.0)(IMAGES, PHRASES)
    rough = detector(checkpoint[0], floor=0.0, dtype="bfloat16")(IMAGES, PHRASES)
    for phrases, ours, theirs in zip(PHRASES, exact, rough, strict=True):
        assert bool(ours) == bool(theirs)
        assert {d.text for d in theirs} <= set(phrases)
        if ours:
            assert theirs[0].score == pytest.approx(ours[0].score, abs=0.3)


def test_identity(checkpoint: tuple[Path, str, Any], tmp_path: Path) -> None:
    first = detector(checkpoint[0]).identity()
    assert detector(checkpoint[0]).identity() == first
    assert (first["name"], first["size"], first["dtype"], first["floor"]) == (checkpoint[1], 48, "float32", FLOOR)
    assert detector(checkpoint[0], size=None).identity()["size"] == 32
    save_tiny_owl(tmp_path, checkpoint[1], seed=1)
    other = detector(tmp_path).identity()
    assert {key for key in first if first[key] != other[key]} == {"model"}


def test_what_cannot_be_built(checkpoint: tuple[Path, str, Any], tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="the detector needs a model"):
        build_stage(DETECTORS, "owlv2")
    with pytest.raises(ClocError, match="there is no such folder"):
        build_stage(DETECTORS, f"owlv2:{tmp_path}/none")
    with pytest.raises(ClocError, match="no model can be loaded"):
        build_stage(DETECTORS, f"owlv2:{tmp_path}")
    with pytest.raises(ClocError, match=r"has no option 'threshold'. There are: floor, dtype, revision, size"):
        detector(checkpoint[0], threshold=0.1)
    with pytest.raises(ClocError, match=r"option 'floor' of 'owlv2' is 2: "):
        detector(checkpoint[0], floor=2)
    with pytest.raises(ClocError, match=r"size is 50, and its patches have 8 pixels. Use a multiple, such as size=48"):
        detector(checkpoint[0], size=50)
    with pytest.raises(ClocError, match="cannot be put on 'cuda:99'"):
        build_stage(DETECTORS, f"owlv2:{checkpoint[0]}", "cuda:99")
