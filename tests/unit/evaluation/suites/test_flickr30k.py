"""The Flickr30k Entities suite: oracles by phrase and by sentence, both protocols, alignment by id, a real MLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.mllms.answerers import MllmSettings
from cloc_mllm.evaluation.suites.flickr30k import (
    Flickr30kSettings,
    Wanted,
    as_regions,
    boxes_of_phrases,
    evaluate_flickr30k,
    first_right,
    load_captions,
    said_within,
    score_located,
)
from cloc_mllm.evaluation.suites.options import EvalOptions
from cloc_mllm.evaluation.suites.registry import run_suite
from cloc_mllm.models.answer_text import AnswerText
from tests.builders import noise_image
from tests.unit.evaluation.oracles import ScriptedAnswerer, asked_text, silent

QUIET = MllmSettings(progress=False, batch_size=2, max_new_tokens=6)

SENTENCES = {
    "30": (
        "[/EN#1/people A man] and [/EN#2/people a man] hold [/EN#3/other a red , long rope] in [/EN#9/scene a park] .",
        "Nothing is marked here .",
        "[/EN#4/people/clothing Two uniforms] shine .",
    ),
    "7": ("[/EN#5/animals A dog] runs .",),
}
BOXES = {"1": [(1, 1, 11, 21)], "2": [(21, 1, 31, 21)], "3": [(5, 8, 25, 14)], "4": [(1, 1, 5, 9), (31, 1, 41, 21)]}
"""Boxes of the entities as the files have them, counted from 1."""


def _object(entity: str, box: tuple[int, ...]) -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object><name>{entity}</name><bndbox>{inner}</bndbox></object>"


@pytest.fixture(scope="module")
def entities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures in the set's own layout; ids do not come in the order of file names."""
    root = tmp_path_factory.mktemp("flickr30k")
    for name in ("Sentences", "Annotations", "images"):
        (root / name).mkdir()
    boxes = {"30": BOXES, "7": {"5": [(3, 3, 23, 13)]}}
    for number, (image, sentences) in enumerate(SENTENCES.items()):
        noise_image(50, 40, number).save(root / "images" / f"{image}.jpg")
        (root / "Sentences" / f"{image}.txt").write_text("\n".join(sentences) + "\n")
        objects = "".join(_object(entity, box) for entity, some in boxes[image].items() for box in some)
        scene = "<object><name>9</name><nobndbox>1</nobndbox><scene>1</scene></object>"
        size = "<size><width>50</width><height>40</height><depth>3</depth></size>"
        (root / "Annotations" / f"{image}.xml").write_text(f"<annotation>{size}{objects}{scene}</annotation>")
    (root / "test.txt").write_text("30\n7\n")
    return root


def knowing(split: Any, boxes: Callable[[Wanted], list[list[float]]]) -> ScriptedAnswerer:
    """An answerer that says for each phrase the boxes it is told to, phrase first, as models write them."""
    told = [(caption.phrases, caption) for caption in split.captions]

    def answer(messages: Any) -> AnswerText:
        words = asked_text(messages).lower()
        (phrases,) = [
            phrases for phrases, _ in told if all(part.text.lower().replace(" ,", "") in words for part in phrases)
        ]
        found = [{"phrase": phrase.text.upper(), "box": box} for phrase in phrases for box in boxes(phrase)]
        return AnswerText("", boxes=found)

    return ScriptedAnswerer(answer)


def merged(phrase: Wanted) -> list[list[float]]:
    array = np.array(phrase.boxes)
    return [[*array[:, :2].min(axis=0).tolist(), *array[:, 2:].max(axis=0).tolist()]]


def test_what_is_asked_for_and_what_is_left_out_is_counted(entities: Path) -> None:
    split = load_captions(entities, entities / "images")
    assert [(one.image, one.number) for one in split.captions] == [("30", 0), ("30", 2), ("7", 0)]
    assert split.counts == {
        "captions_read": 4,
        "phrases_read": 6,
        "phrases_without_box_left_out": 1,
        "captions_without_phrase_left_out": 1,
        "phrases_asked_for": 5,
    }
    assert split.ref.label == "test subset (2 of 1000 images)"
    assert split.captions[2].phrases[0].boxes == [[2.0, 2.0, 22.0, 12.0]]
    assert split.captions[1].phrases[0].types == ("people", "clothing")


def test_the_truth_by_sentence_scores_100_and_silence_0(entities: Path) -> None:
    split = load_captions(entities, entities / "images")
    by_sentence = Flickr30kSettings(ask="sentence")
    right = evaluate_flickr30k(knowing(split, merged), split, by_sentence, QUIET)
    # The enclosing box of the two uniforms is neither of them.
    wanted = {f"flickr30k_merged_r{k}": 1.0 for k in (1, 5, 10)} | {f"flickr30k_any_r{k}": 0.8 for k in (1, 5, 10)}
    assert {name: metric.value for name, metric in right.metrics.items()} == wanted
    assert next(iter(right.metrics)) == "flickr30k_merged_r1"
    assert right.unparsed == 0.0
    assert right.details["asking"]["questions"] == 3
    each = evaluate_flickr30k(knowing(split, lambda phrase: phrase.boxes[:1]), split, by_sentence, QUIET)
    assert each.metrics["flickr30k_any_r1"].value == 1.0
    assert each.metrics["flickr30k_merged_r1"].value == 0.8
    for ask in ("sentence", "phrase"):
        nothing = evaluate_flickr30k(silent(), split, Flickr30kSettings(ask=ask), QUIET)
        assert {metric.value for metric in nothing.metrics.values()} == {0.0}
        assert nothing.unparsed == 1.0
        assert nothing.metrics["flickr30k_merged_r1"].n == 5


def test_the_truth_by_phrase_scores_100(entities: Path) -> None:
    split = load_captions(entities, entities / "images")
    split.captions[0].phrases.pop(0)  # two men are one text: only in a sentence can they be told apart
    order = iter([phrase for caption in split.captions for phrase in caption.phrases])
    answer = ScriptedAnswerer(lambda messages: AnswerText("", boxes=[{"phrase": "it", "box": merged(next(order))[0]}]))
    found = evaluate_flickr30k(answer, split, None, QUIET)
    assert found.metrics["flickr30k_merged_r1"].value == 1.0
    assert found.details["asking"]["questions"] == 4
    assert set(found.details["types"]) == {"people", "clothing", "other", "animals"}
    assert found.details["types"]["people"]["flickr30k_merged_r1"].n == 2


def test_questions_are_put_as_the_settings_say() -> None:
    phrases = ["A red , long rope", "Two men"]
    assert Flickr30kSettings(ask="sentence").words(phrases) == "What are the locations of a red long rope, two men?"
    assert Flickr30kSettings().words(phrases[:1]) == "Where is the red long rope?"
    assert Flickr30kSettings(question="Find {phrases}.").words(phrases[1:]) == "Find two men."
    with pytest.raises(ClocError, match="ask is 'word'"):
        Flickr30kSettings(ask="word")
    with pytest.raises(ClocError, match="exactly once"):
        Flickr30kSettings(question="Find it.")


def test_a_box_belongs_to_the_phrase_before_it() -> None:
    def said(*pairs: tuple[str, int]) -> AnswerText:
        return AnswerText("", boxes=[{"phrase": phrase, "box": [0, 0, at, at]} for phrase, at in pairs])

    def shared(phrases: list[str], answer: AnswerText) -> list[list[float]]:
        return [[box[2] for box in boxes] for boxes in boxes_of_phrases(phrases, answer)]

    two = said(("the dog", 1), ("A red rope.", 2), ("A red rope", 3), ("cat", 4))
    assert shared(["a red rope", "a dog", "a cow"], two) == [[2, 3], [1], []]
    assert shared(["a cow"], two) == [[1, 2, 3, 4]]  # asked for alone, everything answers it
    assert shared(["a man", "a hat", "a man"], said(("a man", 1), ("a hat", 2), ("a man", 3))) == [[1], [2], [3]]
    within = said(("The locations are a man", 1), ("and the big red rope", 2), ("a seaman", 3), ("a hat", 4))
    assert shared(["a man", "a rope", "a red rope", "the hat"], within) == [[1], [], [2], [4]]
    assert said_within(["a man", "a rope", "a red rope", "the hat"], within) == 2
    assert said_within(["a man"], within) == 0
    assert shared(["the", "a man"], within) == [[], [1]]
    assert shared(["a man", "a man"], said(("a man", 1), ("a man", 2), ("a man", 3))) == [[1, 2, 3], [1, 2, 3]]


@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(21, 40)] * 2), min_size=1, max_size=4),
    noise=st.integers(0, 11),
)
def test_ranks_count_the_boxes_before_the_right_one(boxes: list[tuple[int, ...]], noise: int) -> None:
    phrase = Wanted("x", ("other",), [list(map(float, box)) for box in boxes])
    wrong = [[100.0 + k, 0.0, 101.0 + k, 1.0] for k in range(noise)]
    assert first_right([phrase], [[*wrong, *merged(phrase)]], "merged")[0] == noise + 1
    assert first_right([phrase], [[*wrong, phrase.boxes[-1]]], "any")[0] == noise + 1
    assert first_right([phrase], [wrong], "any")[0] == np.inf
    if len(boxes) == 1:
        both = [first_right([phrase], [[[0, 0, 30, 30]]], protocol)[0] for protocol in ("merged", "any")]
        assert both[0] == both[1]


def test_a_real_model_is_asked(entities: Path, mllm_folder: Path, tmp_path: Path) -> None:
    given_settings = {"images": str(entities / "images"), "ask": "sentence"}
    options = EvalOptions(str(mllm_folder), str(entities), str(tmp_path), settings=given_settings, max_new_tokens=6)
    report = run_suite("flickr30k", options)
    assert report["dataset"]["name"] == "flickr30k-entities"
    assert report["metrics"]["flickr30k_merged_r1"]["n"] == 5
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    assert "### people" in (tmp_path / "report.md").read_text()
    with pytest.raises(ClocError, match="pictures of Flickr30k are not named"):
        run_suite("flickr30k", EvalOptions(str(mllm_folder), str(entities), str(tmp_path)))


def test_what_an_encoder_found_is_scored_by_the_same_rule(entities: Path) -> None:
    split = load_captions(entities, entities / "images")
    data = as_regions(split)
    assert [region.text for region in data.regions] == [p.text for one in split.captions for p in one.phrases]
    assert data.sizes == [(50, 40), (50, 40)]
    found = score_located(split, {"box_head": [list(region.box) for region in data.regions]})
    assert {name: metric.value for name, metric in found.metrics.items()} == {
        "flickr30k_merged_r1": 1.0,
        "flickr30k_any_r1": 0.8,
    }
    assert [answer["question"] for answer in found.answers] == [region.text for region in data.regions]
    assert all(answer["right"] for answer in found.answers)


def test_a_real_encoder_searches(entities: Path, encoder_folder: Path, tmp_path: Path) -> None:
    options = EvalOptions(
        str(encoder_folder), str(entities), str(tmp_path), settings={"images": str(entities / "images")}
    )
    report = run_suite("flickr30k", options)
    assert report["metrics"]["flickr30k_merged_r1"]["n"] == 5
    assert report["details"]["choices"]["localizer"] == "box_head"
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [len(answer["boxes"]) for answer in answers] == [1] * 5
    assert (tmp_path / "report.html").read_text().count("<figure>") == sum(not answer["right"] for answer in answers)
    assert not all(answer["right"] for answer in answers), "a tiny encoder that never learned: something is drawn"
    images = {"images": str(entities / "images")}
    for asked in ({"ask": "sentence"}, {"question": "Find {phrases}."}, {"suffix": "Now."}, {"boxes": "norm1"}):
        (name,) = asked
        with pytest.raises(ClocError, match=f"{name} is for MLLMs"):
            run_suite("flickr30k", replace(options, settings=images | asked))
    with pytest.raises(ClocError, match="max-new-tokens is for MLLMs"):
        run_suite("flickr30k", replace(options, max_new_tokens=512))


def test_faults_of_the_files_are_named(entities: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("30\n30\n")
    with pytest.raises(ClocError, match=r"test\.txt: sample '30': an id stands there twice"):
        load_captions(tmp_path, tmp_path)
    (tmp_path / "val.txt").write_text("\n".join(map(str, range(1001))))
    with pytest.raises(ClocError, match="lists 1001 pictures, but the split has 1000"):
        load_captions(tmp_path, tmp_path, "val")
    (tmp_path / "test.txt").write_text("30\n")
    with pytest.raises(ClocError, match=r"30\.xml: cannot be read as an annotation"):
        load_captions(tmp_path, tmp_path)
