"""Grounding DINO as a stage: which tokens are whose, and the same answer in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoImageProcessor, AutoTokenizer, GroundingDinoProcessor

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.detectors.grounding_dino import GroundingDinoDetector
from cloc_mllm.labeling.stages import DETECTORS, Detection, build_stage
from tests.builders import noise_image
from tests.builders_detectors import WORDS, save_tiny_grounding_dino, word_tokenizer

IMAGES = [noise_image(80, 60, 1), noise_image(50, 90, 2), noise_image(80, 60, 3), noise_image(64, 64, 4)]
PHRASES = [["a red cat", "the dog", "ball", "a red cat"], ["sky"], ["a very old man", "tree"], []]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("grounding_dino")
    return folder, save_tiny_grounding_dino(folder)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> GroundingDinoDetector:
    """A stage whose texts have 12 tokens at most."""
    folder = tmp_path_factory.mktemp("short")
    save_tiny_grounding_dino(folder, max_text_len=12)
    return detector(folder)


def detector(folder: Path, **options: Any) -> GroundingDinoDetector:
    stage: GroundingDinoDetector = build_stage(DETECTORS, f"grounding-dino:{folder}", options={"floor": 0, **options})
    return stage


def assert_same(ours: list[Detection], theirs: list[Detection]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.text == other.text
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.box == pytest.approx(other.box, abs=0.02)


def test_a_batch_is_each_picture_alone(checkpoint: tuple[Path, Any]) -> None:
    stage = detector(checkpoint[0])
    found = stage(IMAGES, PHRASES)
    assert found[3] == []
    for image, phrases, ours in zip(IMAGES[:3], PHRASES, found, strict=False):
        assert_same(ours, stage([image], [phrases])[0])


def test_a_single_picture_against_transformers(checkpoint: tuple[Path, Any]) -> None:
    """Same text, same boxes; and the score of a box whose best token is a phrase's is the one transformers gives."""
    folder, model = checkpoint
    processor = GroundingDinoProcessor(
        AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )
    phrases = ["a red cat", "the dog", "ball"]
    inputs = processor(images=IMAGES[0], text=[phrases], return_tensors="pt")
    stage = detector(folder)
    assert inputs.input_ids[0].tolist() == stage.texts(phrases)[0].ids
    with torch.no_grad():
        outputs = model(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=[(60, 80)])
    best_tokens = outputs.logits[0].argmax(dim=-1).tolist()
    (found,) = stage(IMAGES[:1], [phrases])
    assert len(found) == len(theirs["boxes"]) == 12
    owner = {place: phrase for phrase, start, stop in stage.texts(phrases)[0].spans for place in range(start, stop)}
    agreed = 0
    for box, score, token in zip(theirs["boxes"], theirs["scores"].tolist(), best_tokens, strict=True):
        cut = [min(max(v, 0.0), limit) for v, limit in zip(box.tolist(), (80, 60, 80, 60), strict=True)]
        ours = min(found, key=lambda d: sum(abs(a - b) for a, b in zip(d.box, cut, strict=True)))
        assert ours.box == pytest.approx(cut, abs=0.02)
        assert ours.score <= score + 1e-4
        if token in owner:
            agreed += 1
            assert ours.score == pytest.approx(score, abs=1e-4)
            assert ours.text == owner[token]
    assert agreed


words = st.lists(st.sampled_from([*WORDS, "unheard", "st.", "what?", "über", "狗"]), min_size=0, max_size=20)


@given(st.lists(words.map(" ".join), max_size=12))
@settings(max_examples=60, deadline=None)
def test_spans_hold_exactly_the_tokens_of_their_phrases(short: GroundingDinoDetector, phrases: list[str]) -> None:
    short.tally.clear()
    texts = short.texts(phrases)
    distinct = list(dict.fromkeys(phrases))
    read = [phrase for text in texts for phrase, _, _ in text.spans]
    assert read == [phrase for phrase in distinct if phrase.strip(" .?")]
    assert short.tally["given"] == len(distinct) == len(read) + short.tally["unreadable"]
    for text in texts:
        assert len(text.ids) <= 12
        assert (text.ids[0], text.ids[-1]) == (101, 102)
        covered = {0, len(text.ids) - 1}
        for phrase, start, stop in text.spans:
            own = short.tokenizer(phrase.replace(".", " ").replace("?", " "), add_special_tokens=False)["input_ids"]
            assert text.ids[start:stop] == own[:9]
            assert text.ids[stop] == 1012
            covered |= set(range(start, stop + 1))
        assert covered == set(range(len(text.ids)))


def test_too_many_phrases_for_one_text(short: GroundingDinoDetector) -> None:
    phrases = ["a red cat on the tree", "the dog", "a very small white ball", "sky"]
    assert len(short.texts(phrases)) == 2
    (found,) = short(IMAGES[:1], [phrases])
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    parts = [d for part in (phrases[:2], phrases[2:]) for d in short(IMAGES[:1], [part])[0]]
    assert_same(found, sorted(parts, key=lambda d: -d.score))


def test_long_and_empty_phrases_are_counted(short: GroundingDinoDetector) -> None:
    short.tally.clear()
    assert short(IMAGES[:1], [["...", "?"]]) == [[]]
    (found,) = short(IMAGES[:1], [["dog " * 30]])
    assert {d.text for d in found} == {"dog " * 30}
    assert short.tally == {"given": 3, "shortened": 1, "unreadable": 2}


def test_boxes_lie_in_the_picture(checkpoint: tuple[Path, Any]) -> None:
    stage = detector(checkpoint[0], size=48)
    for image, ours in zip(IMAGES, stage(IMAGES, PHRASES), strict=True):
        for d in ours:
            assert 0 <= d.box[0] < d.box[2] <= image.width
            assert 0 <= d.box[1] < d.box[3] <= image.height


def test_floor_and_identity(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    everything = detector(checkpoint[0])(IMAGES, PHRASES)
    middle = sorted(d.score for own in everything for d in own)[10]
    stage = detector(checkpoint[0], floor=middle)
    assert sum(map(len, stage(IMAGES, PHRASES))) < sum(map(len, everything))
    first = stage.identity()
    assert (first["floor"], first["size"]["shortest_edge"]) == (middle, 64)
    assert detector(checkpoint[0], size=48).identity()["size"] == {"shortest_edge": 48, "longest_edge": 79}
    save_tiny_grounding_dino(tmp_path, seed=1)
    assert detector(tmp_path, floor=middle).identity() == {**first, "model": detector(tmp_path).identity()["model"]}


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tiny_grounding_dino(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ClocError, match="are not among the model's separators"):
        detector(tmp_path)


def test_other_number_formats(checkpoint: tuple[Path, Any]) -> None:
    exact = detector(checkpoint[0])(IMAGES, PHRASES)
    rough = detector(checkpoint[0], dtype="bfloat16")(IMAGES, PHRASES)
    for ours, theirs in zip(exact, rough, strict=True):
        assert sum(d.score for d in theirs) == pytest.approx(sum(d.score for d in ours), rel=0.2)
