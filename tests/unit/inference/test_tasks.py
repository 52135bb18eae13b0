"""One line for each task: any source of pictures, one prompt or many, and the answers a conversation would give."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from cloc_mllm.data import messages
from cloc_mllm.errors import ClocError
from cloc_mllm.inference import predictor as module
from cloc_mllm.inference import templates
from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.inference.templates import Templates, is_region, question_items, region_item
from tests.builders import noise_image, tiny_cloc
from tests.builders_mllm import image, region, text, tiny_mllm, user

SCENES = [noise_image(40, 30, seed=1), noise_image(20, 50, seed=2)]
BOXES = [[3, 4, 18, 25], [1, 1, 9, 30]]
POINT = [5, 6]


def test_the_examples_in_the_docstrings_run(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SCENES[0].save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for where, names in ((module, {"predictor": predictor}), (templates, {}), (messages, {})):
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        for test in doctest.DocTestFinder().find(where, extraglobs=names):
            result = runner.run(test)
            assert result.failed == 0, test.name
            ran += bool(result.attempted)
    assert ran == 8


def same(ours: Any, theirs: Any) -> None:
    """The same answer; boxes to a thousandth of a pixel, since other batches may round otherwise."""
    assert ours.text == theirs.text
    assert ours.unparsed == theirs.unparsed
    for mine, other in zip(ours.boxes, theirs.boxes, strict=True):
        assert mine["box"] == pytest.approx(other["box"], abs=1e-3)


def test_tasks_are_conversations(predictor: Predictor) -> None:
    picture = {"type": "image", "image": SCENES[0]}
    point = {"type": "region", "point": POINT}
    tasks = [
        (predictor.vqa(SCENES[0], "what is this", 8), [user(picture, text("what is this"))]),
        (predictor.describe(SCENES[0], max_new_tokens=8), [user(picture, text("Describe the image."))]),
        (
            predictor.describe(SCENES[0], BOXES[0], 8),
            [user(picture, text("Describe "), region(*BOXES[0]), text("."))],
        ),
        (predictor.refer(SCENES[0], POINT, max_new_tokens=8), [user(picture, text("What is "), point, text("?"))]),
        (
            predictor.refer(SCENES[0], BOXES, "are <region> and <region> alike?", 8),
            [user(picture, text("are "), region(*BOXES[0]), text(" and "), region(*BOXES[1]), text(" alike?"))],
        ),
        (
            predictor.refer(SCENES[0], BOXES[1], "what is this", 8),
            [user(picture, text("what is this "), region(*BOXES[1]))],
        ),
        (
            predictor.ground(SCENES[0], "A red circle", 8).answer,
            [user(picture, text("Where is the red circle?"))],
        ),
    ]
    for answer, conversation in tasks:
        same(answer, predictor.chat([conversation], max_new_tokens=8)[0])


def test_sources_of_pictures_and_forms_of_regions_do_not_matter(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    SCENES[0].save(path)
    expected = predictor.describe(SCENES[0], BOXES[0], 6)
    for source in (path, str(path), np.asarray(SCENES[0]), path.read_bytes(), path.as_uri()):
        same(predictor.describe(source, BOXES[0], 6), expected)
    assert predictor.cache.misses == 1
    for box in (tuple(BOXES[0]), np.array(BOXES[0]), torch.tensor(BOXES[0]), {"box": BOXES[0]}):
        same(predictor.describe(SCENES[0], box, 6), expected)
    several = predictor.describe(SCENES[0], np.array(BOXES, dtype=np.float32), 6)
    same(several[0], expected)


def test_lists_have_the_form_of_what_was_asked(predictor: Predictor) -> None:
    alone = [[predictor.refer(scene, one, max_new_tokens=6) for one in (*BOXES, POINT)] for scene in SCENES]
    on_one = predictor.refer(SCENES[0], [*BOXES, POINT], max_new_tokens=6)
    on_all = predictor.refer(SCENES, BOXES[0], max_new_tokens=6)
    paired = predictor.refer(SCENES, [[*BOXES, POINT], BOXES[1]], max_new_tokens=6)
    for ours, theirs in zip(on_one, alone[0], strict=True):
        same(ours, theirs)
    for ours, theirs in zip(on_all, (alone[0][0], alone[1][0]), strict=True):
        same(ours, theirs)
    for ours, theirs in zip(paired[0], alone[0], strict=True):
        same(ours, theirs)
    same(paired[1], alone[1][1])
    asked = predictor.refer(SCENES, [BOXES, BOXES[:1]], "alike?", 6)
    same(asked[1], predictor.refer(SCENES[1], BOXES[0], "alike?", 6))
    assert len(asked) == 2
    assert predictor.vqa(SCENES[0], []) == []
    assert predictor.ground(SCENES, [[], ["red ring"]], 4)[0] == []


def test_what_is_found_is_in_the_picture_and_what_is_not_has_no_box(predictor: Predictor) -> None:
    phrases = ["red circle", "the blue star", "a cross", "yellow ring"]
    found = [one for of_one in predictor.ground(SCENES, [phrases, phrases], 16) for one in of_one]
    assert [one.phrase for one in found] == phrases * 2
    assert any(one.found for one in found)
    for number, one in enumerate(found):
        width, height = SCENES[number // len(phrases)].size
        assert one.found == bool(one.boxes)
        assert len(one.boxes) <= len(one.answer.boxes)
        for x1, y1, x2, y2 in one.boxes:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
    # One token is too short for a box.
    nothing = predictor.ground(SCENES[0], "red circle", 1)
    assert nothing.found == bool(nothing.answer.boxes)


def test_a_phrase_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_mllm(grounding="head")
    model.generation_config.suppress_tokens = [*model.generation_config.suppress_tokens, processor.ground_token_id]
    answer = Predictor(model, processor).ground(SCENES[0], "red circle", 6)
    assert (answer.found, answer.boxes) == (False, [])
    assert answer.answer.text


def test_embeddings_are_the_encoders(predictor: Predictor) -> None:
    encoder, encoder_processor = tiny_cloc()
    mine = Predictor(*tiny_mllm(encoder=encoder))
    inputs = encoder_processor(images=SCENES, input_boxes=[BOXES, BOXES[:1]])
    with torch.no_grad():
        expected = encoder.get_region_features(
            pixel_values=inputs["pixel_values"],
            input_boxes=inputs["input_boxes"],
            image_index=inputs["box_image_index"],
        ).pooler_output
        points = encoder_processor(images=SCENES[:1], input_points=[[POINT]])
        at_point = encoder.get_region_features(
            pixel_values=points["pixel_values"], input_points=points["input_points"]
        ).pooler_output
    ours = mine.embed_regions(SCENES, [BOXES, BOXES[0]])
    assert [len(one) for one in ours] == [2, 1]
    torch.testing.assert_close(torch.cat(ours), functional.normalize(expected, dim=-1))
    torch.testing.assert_close(mine.embed_regions(SCENES[0], POINT), functional.normalize(at_point, dim=-1))
    torch.testing.assert_close(mine.embed_regions(SCENES[0], torch.tensor(BOXES)), ours[0])
    assert mine.embed_regions(SCENES[0], []).shape == (0, 24)
    assert [one.shape[0] for one in mine.embed_regions(SCENES, [[], [POINT]])] == [0, 1]
    many = mine.embed_regions([SCENES[k % 2] for k in range(20)], POINT)
    assert len(many) == 20
    torch.testing.assert_close(many[18], many[0])


def test_thousands_of_boxes_are_embedded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(*tiny_mllm())
    corner = torch.rand(150, 2, generator=torch.Generator().manual_seed(0)) * 9
    boxes = torch.cat([corner, corner + 8], dim=1)
    asked = [boxes[:100], boxes[100:], [], boxes[:3]]
    scenes = [SCENES[0], SCENES[1], SCENES[0], SCENES[1]]
    seen: list[int] = []
    hook = predictor.model.model.prompter.register_forward_pre_hook(lambda module, args: seen.append(len(args[1])))
    found = predictor.embed_regions(scenes, asked)
    assert seen == [64, 64, 25]
    monkeypatch.setattr(module, "REGIONS_AT_ONCE", 1000)
    for ours, theirs in zip(found, predictor.embed_regions(scenes, asked), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert seen[3:] == [153]
    hook.remove()


def test_embeddings_in_bf16_are_float32_and_close() -> None:
    model, processor = tiny_mllm()
    expected = Predictor(model, processor).embed_regions(SCENES[0], BOXES)
    found = Predictor(model.to(torch.bfloat16), processor).embed_regions(SCENES[0], BOXES)
    assert found.dtype == torch.float32
    assert (found * expected).sum(-1).min() > 0.99
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (lambda p: p.vqa(SCENES[0], " "), "there is no question"),
        (lambda p: p.vqa(SCENES[0], 7), "7 is neither a prompt nor a list of prompts"),
        (lambda p: p.vqa("nowhere.png", "what"), "nowhere.png' does not exist"),
        (lambda p: p.vqa(SCENES, ["what"] * 3), "2 pictures, but prompts for 3"),
        (lambda p: p.describe(SCENES[0], [1, 2, 3]), r"\[1, 2, 3\] is not a region"),
        (lambda p: p.describe(SCENES[0], [9, 9, 3, 3]), "corners out of order"),
        (lambda p: p.describe(SCENES[0], [3, 3, 99, 9]), "outside the image of 40 x 30 pixels"),
        (lambda p: p.refer(SCENES[0], BOXES, "what is <region>?"), "the question holds 1, 2 regions are given"),
        (lambda p: p.ground(SCENES[0], ["ring", ""]), "there is no phrase to look for"),
        (lambda p: p.embed_regions(SCENES[0], [[3, 3, 99, 9]]), "outside the image of 40 x 30 pixels"),
        (lambda p: p.embed_regions(SCENES[0], [{"blob": "m.png"}]), "a region has exactly one of"),
        (lambda p: p.embed_regions(SCENES, [BOXES]), "2 pictures, but prompts for 1"),
        (lambda p: p.chat([[user("hi")], [user({"type": "image", "image": "no://x"})]]), "sample '1'"),
    ],
)
def test_what_cannot_be_asked_is_named(predictor: Predictor, work: Any, problem: str) -> None:
    with pytest.raises(ClocError, match=problem):
        work(predictor)


def test_no_region_encoder_no_embedding() -> None:
    predictor = Predictor(*tiny_mllm(region_encoder="none", region_format="coords", grounding="text"))
    with pytest.raises(ClocError, match="embeds no regions"):
        predictor.embed_regions(SCENES[0], BOXES)
    assert predictor.refer(SCENES[0], BOXES[0], max_new_tokens=4).text is not None


def test_a_model_that_is_told_of_regions_as_coordinates_embeds_them_alike() -> None:
    expected = Predictor(*tiny_mllm()).embed_regions(SCENES[0], BOXES)
    predictor = Predictor(*tiny_mllm(region_format="coords"))
    torch.testing.assert_close(predictor.embed_regions(SCENES[0], BOXES), expected)
    assert predictor.processor.region_format == "coords"


def test_questions_of_your_own(mllm: tuple[Any, Any]) -> None:
    asked: list[Any] = []
    predictor = Predictor(*mllm, templates=Templates(refer="<region> is a", ground="find {phrase} now"))
    predictor._ask = lambda some, length: asked.extend(some) or [None] * len(some)  # type: ignore[assignment, func-returns-value]
    predictor.refer(SCENES[0], POINT)
    assert asked[0][1] == [{"type": "region", "point": POINT}, text(" is a")]
    assert predictor.templates.where_is("the cat") == "find cat now"
    for wrong in ({"refer": "what is this?"}, {"ground": "where?"}, {"describe": "<region> and <region>"}):
        with pytest.raises(ClocError, match="exactly once"):
            Templates(**wrong)


def test_one_region_or_several() -> None:
    ones = [BOXES[0], tuple(POINT), np.array(POINT), torch.tensor(BOXES[0]), {"point": POINT}, [np.float32(3)] * 4]
    assert all(is_region(one) for one in ones)
    assert not any(is_region(many) for many in (BOXES, np.array(BOXES), torch.tensor(BOXES), [], [{"point": POINT}]))
    assert region_item(np.array(BOXES[0])) == {"type": "region", "box": BOXES[0]}
    assert region_item({"mask": "m.png", "image": 1}) == {"type": "region", "mask": "m.png", "image": 1}
    assert question_items("what?", [POINT, BOXES[0]]) == [
        text("what? "),
        {"type": "region", "point": POINT},
        text(" and "),
        region(*BOXES[0]),
    ]


def test_options_reach_generate(predictor: Predictor) -> None:
    question = [user(image(4), text("what is "), region(*BOXES[0]), text("?"))]
    model, processor = predictor.model, predictor.processor
    inputs = processor.encode(question, add_generation_prompt=True, return_original_sizes=True)
    sizes = inputs.pop("original_sizes")
    beams = processor.post_process_grounding(model.generate_grounded(**inputs, max_new_tokens=6, num_beams=3), sizes)
    same(predictor.chat([question], max_new_tokens=6, num_beams=3)[0], beams[0])
    assert beams[0].text != predictor.chat([question], max_new_tokens=6)[0].text


def test_a_model_with_an_adapter_answers_too() -> None:
    model, processor = tiny_mllm()
    expected = Predictor(model, processor)
    name, embeds = expected.refer(SCENES[0], BOXES[0], max_new_tokens=6), expected.embed_regions(SCENES[0], BOXES)
    pattern = r".*language_model.*\.(q_proj|v_proj)"
    adapted = Predictor(get_peft_model(model, LoraConfig(target_modules=pattern, r=2)), processor)
    same(adapted.refer(SCENES[0], BOXES[0], max_new_tokens=6), name)
    torch.testing.assert_close(adapted.embed_regions(SCENES[0], BOXES), embeds)
