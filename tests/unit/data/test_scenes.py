"""Scenes: what is said must be true of what is drawn, and the same seed must give the same bytes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.data.english import plural
from cloc_mllm.data.scenes import generator
from cloc_mllm.data.scenes.generator import SceneSource, generate_scenes
from cloc_mllm.data.scenes.layout import overlap_of_smaller, sample_layout
from cloc_mllm.data.scenes.objects import SceneObject
from cloc_mllm.data.scenes.questions import Asker
from cloc_mllm.data.scenes.render import paint, shape_mask
from cloc_mllm.data.scenes.vocabulary import COLOURS, PRESETS, SHAPES, SIZES, heldout_pairs
from cloc_mllm.errors import ClocError

SINGULAR = {plural(shape): shape for shape in SHAPES}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module", params=["quick", "full"])
def scenes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    generate_scenes(out, request.param, n=120, seed=5, n_val=40, n_test=120)
    return out


def truth(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Attributes of every object, by the picture's path."""
    return {
        sample["image"]: [region["attributes"] for region in sample["regions"]]
        for sample in lines(folder / "regions.jsonl")
    }


def parse(phrase: str) -> dict[str, str]:
    """Attributes named by a phrase, found from the vocabulary alone."""
    named = {}
    for word in phrase.split():
        for attribute, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            if word in words:
                named[attribute] = word
        if word in ("solid", "striped", "dotted"):
            named["texture"] = word
    return named


def matching(phrase: str, objects: list[dict[str, str]]) -> list[int]:
    said = parse(phrase)
    return [k for k, thing in enumerate(objects) if all(thing[name] == word for name, word in said.items())]


def answer(question: dict[str, Any], regions: list[dict[str, Any]]) -> Any:
    """The right answer, from the question's words and the boxes' attributes."""
    objects = [region["attributes"] for region in regions]
    text = "".join(item.get("text", "<region>") for item in question["messages"][0]["content"] if "image" not in item)
    if found := re.fullmatch(r"How many (.+) are there\?", text):
        word = found[1].removesuffix(" objects")
        return str(len(objects) if word == "objects" else len(matching(SINGULAR.get(word, word), objects)))
    if found := re.fullmatch(r"Is there an? (.+)\?", text):
        return "yes" if matching(found[1], objects) else "no"
    if found := re.fullmatch(r"What colour is the (.+)\?", text):
        (only,) = matching(found[1], objects)
        return objects[only]["colour"]
    if found := re.fullmatch(r"Where is the (.+)\?", text):
        (only,) = matching(found[1], objects)
        return found[1], regions[only]["box"]
    assert text == "What is <region>?"
    (box,) = question["boxes_in"]
    thing = next(region["attributes"] for region in regions if region["box"] == box)
    return f"{thing['texture']} {thing['colour']} {thing['shape']}"


def test_questions_are_answered_as_the_truth_says(scenes: Path) -> None:
    regions = {sample["image"]: sample["regions"] for sample in lines(scenes / "test" / "regions.jsonl")}
    seen = Counter()
    for question in lines(scenes / "test" / "questions.jsonl"):
        given_answer = (question["answer"], question["box"]) if "box" in question else question["answer"]
        assert given_answer == answer(question, regions[question["image"]]), question
        seen[question["kind"]] += 1
    assert set(seen) == {"count", "colour", "exists", "referring", "grounding"}
    assert min(seen.values()) > 100


def test_training_turns_are_answered_as_the_truth_says(scenes: Path) -> None:
    regions = {sample["id"]: sample["regions"] for sample in lines(scenes / "train" / "regions.jsonl")}
    kinds = Counter()
    for sample in lines(scenes / "train" / "conversations.jsonl"):
        messages = sample["messages"]
        assert messages[0]["content"][0]["type"] == "image"
        assert len(messages) == 10
        assert len(sample["task"].split("+")) == 5
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            boxes = [item["box"] for item in user["content"] if item["type"] == "region"]
            reply = "".join(item.get("text", "") for item in assistant["content"]).strip()
            found = [item for item in assistant["content"] if item["type"] == "region"]
            expected = answer({"messages": [user], "boxes_in": boxes}, regions[sample["id"]])
            if found:
                assert found[0]["phrase"] == reply
                assert (reply, found[0]["box"]) == expected
            else:
                assert reply == expected
            kinds["grounding" if found else "referring" if boxes else "vqa"] += 1
    assert kinds["grounding"] >= 110
    assert kinds["referring"] >= 240
    assert kinds["vqa"] == 240


def test_answers_are_spread(scenes: Path) -> None:
    questions = [q for split in ("validation", "test") for q in lines(scenes / split / "questions.jsonl")]
    exists = Counter(q["answer"] for q in questions if q["kind"] == "exists")
    assert exists["yes"] == exists["no"]
    counts = Counter(q["answer"] for q in questions if q["kind"] == "count")
    assert max(counts.values()) < 0.45 * counts.total()
    assert len(counts) >= 4
    trained = Counter()
    for sample in lines(scenes / "train" / "conversations.jsonl"):
        for message in sample["messages"][1::2]:
            trained[message["content"][0]["text"]] += 1
    assert 0.6 < trained["yes"] / trained["no"] < 1.6


def test_confusable_things_are_asked_about(scenes: Path) -> None:
    objects = truth(scenes / "test")
    hard = 0
    for question in lines(scenes / "test" / "questions.jsonl"):
        if question["kind"] == "exists" and question["answer"] == "no":
            said = parse(question["messages"][0]["content"][1]["text"].rstrip("?"))
            hard += len(said) == 2 and all(
                any(thing[name] == word for thing in objects[question["image"]]) for name, word in said.items()
            )
    assert hard >= 15


def test_captions_are_true(scenes: Path) -> None:
    for sample in lines(scenes / "train" / "regions.jsonl"):
        found = re.fullmatch(r"an? (.+?) (left of|right of|above|below) an? (.+?)(?: and an? (.+))?", sample["caption"])
        assert found, sample["caption"]
        objects = [region["attributes"] for region in sample["regions"]]
        centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (region["box"] for region in sample["regions"])]
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[found[2]]
        assert any(
            a != b and (centres[a][axis] - centres[b][axis]) * sign > 0
            for a in matching(found[1], objects)
            for b in matching(found[3], objects)
        ), sample
        assert (found[4] is None) == (len(objects) == 2)
        assert found[4] is None or matching(found[4], objects)


def test_region_texts_are_true_and_unique_is_right(scenes: Path) -> None:
    named = Counter()
    for sample in lines(scenes / "train" / "regions.jsonl"):
        objects = [region["attributes"] for region in sample["regions"]]
        for k, region in enumerate(sample["regions"]):
            fits = matching(region["text"], objects)
            assert k in fits
            assert region["unique"] == (fits == [k])
            named.update(parse(region["text"]).keys())
    assert named["shape"] > named["colour"] > 0.9 * named["shape"]
    assert 0.6 < named["texture"] / named["shape"] < 0.95
    assert 0.1 < named["size"] / named["shape"] < 0.5


def test_heldout_pairs_occur_in_the_test_split_only(scenes: Path) -> None:
    heldout = {tuple(pair) for pair in json.loads((scenes / "dataset.json").read_text())["heldout_pairs"]}
    counts = Counter()
    for split in ("train", "validation", "test"):
        for objects in truth(scenes / split).values():
            counts[split] += sum((thing["shape"], thing["colour"]) in heldout for thing in objects)
    assert counts["train"] == counts["validation"] == 0
    assert counts["test"] > 10
    for split in ("train", "validation"):
        said = " ".join(p.read_text() for p in sorted((scenes / split).glob("*.jsonl")))
        for shape, colour in heldout:
            assert f"{colour} {shape}" not in said


def test_questions_say_which_are_about_heldout_pairs(scenes: Path) -> None:
    heldout = {tuple(pair) for pair in json.loads((scenes / "dataset.json").read_text())["heldout_pairs"]}
    for question in lines(scenes / "test" / "questions.jsonl"):
        if question["task"] in ("referring", "grounding"):
            thing = parse(question["answer"])
            if "colour" in thing:
                assert question["heldout"] == ((thing["shape"], thing["colour"]) in heldout)


def alpha_extent(thing: SceneObject, side: int) -> tuple[int, int, int, int]:
    """Tight box of the pixels that painting an object changes by at least half, on a far away background."""
    canvas = np.full((side, side, 3), -10_000.0, np.float32)
    paint(canvas, thing, np.random.default_rng(0))
    rows, columns = np.nonzero(canvas.max(-1) > -5_100)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("preset", ["quick", "full"])
@given(seed=st.integers(0, 10**6), side=st.sampled_from([96, 160]))
@settings(max_examples=30, deadline=None)
def test_layout(preset: str, seed: int, side: int) -> None:
    chosen = PRESETS[preset]
    objects = sample_layout(chosen, np.random.default_rng(seed), side)
    assert chosen.objects[0] <= len(objects) <= chosen.objects[1]
    for k, thing in enumerate(objects):
        assert alpha_extent(thing, side) == thing.box
        low, high = SIZES[thing.size]
        longest = max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])
        assert low - 0.6 <= longest * 96 / side <= high + 0.6
        for other in objects[:k]:
            assert overlap_of_smaller(thing.box, other.box) <= 0.18


def test_all_shapes_differ() -> None:
    masks = [np.asarray(Image.fromarray(shape_mask(shape, 44, 0)).resize((44, 44))) > 0.5 for shape in SHAPES]
    for k, a in enumerate(masks):
        for b in masks[:k]:
            assert (a & b).sum() / (a | b).sum() < 0.9


def test_textures_and_colours_can_be_told_apart() -> None:
    """Mean colours of painted squares differ for any two colours, and a texture is a visible share of the square."""
    means = {}
    for colour in COLOURS:
        for texture in ("solid", "striped", "dotted"):
            canvas = np.zeros((44, 44, 3), np.float32)
            paint(
                canvas,
                SceneObject("square", colour, "large", texture, (0, 0, 44, 44), 44, 0),
                np.random.default_rng(0),
            )
            means[colour, texture] = canvas.mean((0, 1))
            spread = canvas.std((0, 1)).max()
            assert (spread < 1) if texture == "solid" else (spread > 30)
        for other in list(COLOURS)[: list(COLOURS).index(colour)]:
            for texture in ("solid", "striped", "dotted"):
                assert np.abs(means[colour, texture] - means[other, texture]).max() > 20


def test_full_vocabulary_is_large() -> None:
    full = PRESETS["full"]
    assert len(full.shapes) >= 12
    assert len(full.colours) >= 10
    assert len(full.sizes) == len(full.textures) == 3


@given(st.integers(0, 10**6), st.sampled_from(["quick", "full"]))
@settings(max_examples=40)
def test_heldout_pairs_leave_every_shape_and_colour_known(seed: int, preset: str) -> None:
    chosen = PRESETS[preset]
    pairs = heldout_pairs(chosen, seed)
    assert len(pairs) == round(len(chosen.shapes) * len(chosen.colours) / 9)
    for words, part in ((chosen.colours, 1), (chosen.shapes, 0)):
        assert max(Counter(pair[part] for pair in pairs).values()) <= -(-len(pairs) // len(words))


def test_same_seed_same_bytes_whatever_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_scenes(tmp_path / "a", "full", n=30, seed=1, n_val=3, n_test=3)
    monkeypatch.setattr(generator, "_CHUNK", 7)
    generate_scenes(tmp_path / "b", "full", n=30, seed=1, n_val=3, n_test=3)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    generate_scenes(tmp_path / "c", "full", n=30, seed=2, n_val=3, n_test=3)
    assert tree(tmp_path / "a")["train/regions.jsonl"] != tree(tmp_path / "c")["train/regions.jsonl"]


def test_more_pictures_keep_the_earlier_ones_and_splits_share_none(tmp_path: Path) -> None:
    generate_scenes(tmp_path / "few", "quick", n=8, seed=1, n_val=8, n_test=8, image_format="png")
    generate_scenes(tmp_path / "many", "quick", n=12, seed=1, n_val=8, n_test=8, image_format="png")
    few, many = tree(tmp_path / "few"), tree(tmp_path / "many")
    pictures = {name: data for name, data in few.items() if name.endswith(".png")}
    assert len(pictures) == 24
    assert all(many[name] == data for name, data in pictures.items())
    assert len(set(pictures.values())) == 24
    assert many["train/regions.jsonl"].startswith(few["train/regions.jsonl"])


def test_wording_does_not_change_pictures() -> None:
    """Each scene has separate random streams for what is drawn and for what is said."""
    preset = PRESETS["quick"]
    source = SceneSource(preset, 0, 96, "png", frozenset())
    objects = source.objects("train", 3)
    before = source.picture("train", 3, objects)
    source.records("train", 3, objects)
    assert np.array_equal(np.asarray(before), np.asarray(source.picture("train", 3, source.objects("train", 3))))


def test_forbidden_pairs_are_not_even_asked_about() -> None:
    preset = PRESETS["quick"]
    rng = np.random.default_rng(0)
    forbidden = frozenset((shape, colour) for shape in preset.shapes[:3] for colour in preset.colours)
    objects = sample_layout(preset, rng, 96, forbidden)
    asker = Asker(objects, preset, forbidden)
    for _ in range(200):
        turn = asker.exists(rng, wanted=False)
        assert turn.pair not in forbidden


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "easy"}, "no scene preset 'easy'"),
        ({"n": 0}, "train split would have 0"),
        ({"side": 32}, "too small"),
        ({"image_format": "gif"}, "unknown image format"),
    ],
)
def test_bad_requests(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClocError, match=message):
        generate_scenes(tmp_path / "out", **{"n": 2, **options})
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ClocError, match="not empty"):
        generate_scenes(tmp_path, n=1)
    with pytest.raises(ClocError, match="is a file"):
        generate_scenes(tmp_path / "file", n=1)
    with pytest.raises(ClocError, match="cannot write"):
        generate_scenes(tmp_path / "file" / "below", n=1)
    assert (tmp_path / "file").read_text() == "mine"
