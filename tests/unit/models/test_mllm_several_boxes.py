"""Several boxes of a phrase, several phrases a turn, and none: said, learnt, localised and read back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.models.answer_text import AnswerText, absent_answer, absent_phrases, read_answer
from cloc_mllm.models.boxes import BoxCodec
from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig
from cloc_mllm.models.conversation_cloc_mllm import in_reading_order
from cloc_mllm.models.grounding_head import places_in_run
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.prompter import ClocPrompter
from cloc_mllm.training.tuning.mllm import load_mllm
from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_mllm, user
from tests.unit.models.test_mllm_grounding import says

LEFT, RIGHT, BELOW, OTHER = (1, 8, 9, 15), (20, 2, 30, 12), (20, 15, 31, 25), (3, 4, 20, 25)
QUESTION = user(image(1), text("where are they?"))
ANSWER = assistant(
    text("Two: red ring "),
    region(*BELOW, phrase="red ring"),
    region(*LEFT),
    region(*RIGHT, phrase="red ring"),
    text(", and a cross "),
    region(*OTHER),
    text(" here."),
)


def test_the_phrase_of_several_boxes_is_said_once() -> None:
    said = {mode: tiny_mllm(grounding=mode)[1] for mode in ("head", "text")}
    assert "Two: red ring<ground><ground><ground>, and a cross<ground> here." in said["head"].apply_chat_template(
        [QUESTION, ANSWER]
    )
    written = [said["text"].codec.encode(box, 40, 30) for box in (BELOW, LEFT, RIGHT, OTHER)]
    expected = "Two: red ring {} {} {}, and a cross {} here.".format(*written)
    assert expected in said["text"].apply_chat_template([QUESTION, ANSWER])


def test_what_is_learnt_is_in_reading_order() -> None:
    processor = tiny_mllm()[1]
    batch = processor.encode([QUESTION, ANSWER], return_labels=True)
    place = processor.image_processor.geometry(40, 30)
    assert torch.equal(batch["ground_boxes"], place.boxes_to_model([LEFT, RIGHT, BELOW, OTHER]))
    assert batch["ground_phrases"] == ["red ring", "red ring", "red ring", "a cross"]
    as_text = tiny_mllm(grounding="text")[1]
    labels = as_text.encode([QUESTION, ANSWER], return_labels=True)["labels"]
    written = " ".join(as_text.codec.encode(box, 40, 30) for box in (LEFT, RIGHT, BELOW))
    assert f"red ring {written}, and" in as_text.tokenizer.decode(labels[labels != -100])
    # Without labels the conversation is what it was.
    assert batch["input_ids"].tolist() == processor.encode([QUESTION, ANSWER])["input_ids"].tolist()


@given(st.permutations([LEFT, RIGHT, BELOW]))
def test_the_order_in_the_file_does_not_matter(order: list[tuple[int, ...]]) -> None:
    first, *others = (region(*box) for box in order)
    turn = assistant(text("a ring "), {**first, "phrase": "a ring"}, text(", "), *others, text(" and a star "), first)
    ((sorted_turn),) = in_reading_order([turn])
    regions = [item for item in sorted_turn["content"] if item["type"] == "region"]
    assert [item["box"] for item in regions] == [list(box) for box in (LEFT, RIGHT, BELOW, order[0])]
    assert regions[0]["phrase"] == "a ring"
    assert [item["type"] for item in sorted_turn["content"]] == [item["type"] for item in turn["content"]]


def test_other_phrases_other_images_and_users_are_left_in_their_order() -> None:
    a, b = {**region(*RIGHT), "phrase": "a"}, {**region(*LEFT), "phrase": "b"}
    c, d = region(*RIGHT, image=1), region(*LEFT, image=0)
    for turn in (assistant(a, b), assistant(text("a "), c, d), user(text("which of "), region(*RIGHT), region(*LEFT))):
        assert in_reading_order([turn]) == [turn]
    assert in_reading_order([user("well?"), assistant("yes")]) == [user("well?"), assistant("yes")]


def test_places_in_a_run() -> None:
    at = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1, 1]]).bool()
    assert places_in_run(at)[at].tolist() == [0, 1, 0, 1, 2, 0, 0, 1, 2]
    assert places_in_run(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def known_head(boxes: int) -> tuple[Any, Any]:
    model, processor = tiny_mllm(boxes_per_phrase=boxes)
    with torch.no_grad():
        torch.nn.init.normal_(model.model.grounding_head.ordinals)
    return model, processor


def test_a_new_head_answers_as_one_that_knows_one_box() -> None:
    one, processor = tiny_mllm()
    several, _ = tiny_mllm(boxes_per_phrase=4)
    assert several.model.grounding_head.ordinals.shape == (3, 48)
    new = {"model.grounding_head.ordinals": several.model.grounding_head.ordinals.detach().clone()}
    several.load_state_dict(one.state_dict() | new)
    batch = model_inputs(processor.encode([QUESTION, ANSWER], return_labels=True))
    queries = torch.randn(4, 24)
    with torch.no_grad():
        was, now = (model(**batch, ground_queries=queries) for model in (one, several))
    assert torch.equal(was.pred_boxes, now.pred_boxes)
    assert torch.equal(was.text_prompted_boxes, now.text_prompted_boxes)


def test_the_place_in_the_row_asks_for_another_box() -> None:
    model, processor = known_head(3)
    batch = model_inputs(processor.encode([QUESTION, ANSWER], return_labels=True))
    phrase = torch.randn(1, 24)
    with torch.no_grad():
        boxes = model(**batch, ground_queries=phrase.expand(4, -1)).text_prompted_boxes
        head, tokens = model.model.grounding_head, model.model.vision_tower(batch["pixel_values"]).last_hidden_state
        asked = torch.nn.functional.normalize(phrase, dim=-1)
        prompt = head.localizer.embed_texts(asked)[0]
        offsets = [torch.zeros(48), head.ordinals[0], head.ordinals[1], torch.zeros(48)]
        read = partial(ClocPrompter.forward, head.localizer, tokens)
        expected = [head.box_head(read((prompt + offset)[None], torch.tensor([0]))) for offset in offsets]
    torch.testing.assert_close(boxes, torch.cat(expected))
    assert torch.equal(boxes[0], boxes[3])
    assert (boxes[:3, None] - boxes[None, :3]).abs().sum(-1)[~torch.eye(3).bool()].min() > 1e-4


def test_more_boxes_than_are_known_ask_for_the_last() -> None:
    model, processor = known_head(2)
    ids = processor.tokenizer.encode("a ring" + "<ground>" * 4, return_tensors="pt")
    prompt = processor.encode([user(image(1), text("where?"))], add_generation_prompt=True)
    ids = torch.cat([prompt["input_ids"], ids], dim=1)
    with torch.no_grad():
        boxes = model(
            input_ids=ids, pixel_values=prompt["pixel_values"], ground_queries=torch.ones(4, 24)
        ).text_prompted_boxes
    assert not torch.allclose(boxes[0], boxes[1], atol=1e-4)
    assert torch.allclose(boxes[1], boxes[2], atol=1e-6)
    assert torch.allclose(boxes[1], boxes[3], atol=1e-6)


def test_every_step_teaches_the_ordinals_even_where_nothing_is_asked() -> None:
    """A weight that takes part on one process only would hang the others."""
    model, processor = known_head(3)
    for turns in ([QUESTION, ANSWER], [user(image(2), text("a")), grounding_turn()], [user("a"), assistant("b")]):
        batch = model_inputs(processor.encode(turns, return_labels=True))
        model.zero_grad()
        model.train()(**batch, ground_queries=torch.zeros(len(batch["ground_image_index"]), 24)).loss.backward()
        assert model.model.grounding_head.ordinals.grad is not None
    model.eval()


def test_an_older_checkpoint_can_be_given_ordinals(tmp_path: Path) -> None:
    old, processor = tiny_mllm()
    old.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_mllm(tmp_path)
    assert again.model.grounding_head.ordinals is None
    grown, info = ClocMllmForConditionalGeneration.from_pretrained(
        tmp_path, boxes_per_phrase=4, output_loading_info=True
    )
    assert sorted(info["missing_keys"]) == ["model.grounding_head.ordinals"]
    assert torch.equal(grown.model.grounding_head.ordinals, torch.zeros(3, 48))
    grown.save_pretrained(tmp_path)
    assert load_mllm(tmp_path)[0].model.grounding_head.ordinals.shape == (3, 48)


def test_numbers_of_boxes_that_are_none_are_refused() -> None:
    with pytest.raises(StrictDataclassClassValidationError, match="boxes_per_phrase is 0"):
        ClocMllmConfig(boxes_per_phrase=0)
    with pytest.raises(StrictDataclassClassValidationError, match="boxes_per_phrase is the grounding head's"):
        ClocMllmConfig(boxes_per_phrase=2)


@pytest.fixture(scope="module")
def mllm() -> tuple[Any, Any]:
    return known_head(3)


def answered(mllm: tuple[Any, Any], spoken: str) -> tuple[AnswerText, list[dict[str, Any]], torch.Tensor]:
    model, processor = mllm
    question = [user(image(2), text("find all"))]
    inputs = processor.encode(question, add_generation_prompt=True, return_original_sizes=True)
    sizes = inputs.pop("original_sizes")
    output = model.generate_grounded(
        **inputs, logits_processor=says(processor, [spoken], inputs["input_ids"].shape[1]), max_new_tokens=40
    )
    return processor.post_process_grounding(output, sizes)[0], question, output.sequences


def test_boxes_of_an_answer_by_phrase(mllm: tuple[Any, Any]) -> None:
    spoken = "a cross<ground><ground> and a star<ground>. There is no red ring."
    answer, question, sequence = answered(mllm, spoken)
    assert [box["phrase"] for box in answer.boxes] == ["a cross", "a cross", "a star"]
    assert {phrase: len(boxes) for phrase, boxes in answer.boxes_by_phrase.items()} == {
        "red ring": 0,
        "a cross": 2,
        "a star": 1,
    }
    assert answer.absent == ["red ring"]
    assert answer.unparsed == []
    again = mllm[1].encode([*question, answer.message])["input_ids"][0].tolist()
    assert again[: sequence.shape[1]] == sequence[0].tolist()


def test_not_there_is_not_unread(mllm: tuple[Any, Any]) -> None:
    absent = answered(mllm, absent_answer("red cube"))[0]
    assert (absent.boxes, absent.absent, absent.unparsed) == ([], ["red cube"], [])
    assert absent.boxes_by_phrase == {"red cube": []}
    codec = BoxCodec()
    for said, boxes, missing, unread in (
        ("There is no red cube.", 0, ["red cube"], []),
        ("red cube [1, 2, 3", 0, [], ["[1, 2, 3"]),
        ("red cube", 0, [], []),
        ("a ball [1, 2, 3, 4] [5, 6, 7, 8], but there is no red cube", 2, ["red cube"], []),
    ):
        answer = read_answer(said, (40, 30), 0, codec)
        assert (len(answer.boxes), answer.absent, answer.unparsed) == (boxes, missing, unread), said
    assert [box["phrase"] for box in answer.boxes] == ["a ball", "a ball"]


@pytest.mark.parametrize(
    ("said", "phrases"),
    [
        ("There are no dogs in the picture.", ["dogs"]),
        ("There isn't a red cube here.", ["red cube"]),
        ("I cannot find the small star, sorry", ["small star"]),
        ("I see no cat but a dog", ["cat"]),
        ("There is no red cube. There are not any blue ones in this image!", ["red cube", "blue ones"]),
        ("there is no cup on the table in the image", ["cup on the table"]),
        ("There is a red cube.", []),
        ("No.", []),
        ("There is nothing", []),
        ("", []),
    ],
)
def test_what_an_answer_says_is_not_there(said: str, phrases: list[str]) -> None:
    assert absent_phrases(said) == phrases


@given(st.lists(st.sampled_from(["red", "ring", "of", "the", "small", "star"]), min_size=1, max_size=5).map(" ".join))
def test_the_sentence_for_it_is_read_back(phrase: str) -> None:
    assert absent_phrases(absent_answer(phrase)) == [phrase]


@pytest.mark.parametrize("known", [1, 3])
def test_one_phrase_can_be_taught_several_boxes_by_its_embedding_alone(known: int) -> None:
    """The text embedding is the same for all of them: a head without ordinals can only answer with their middle."""
    model, processor = tiny_mllm(boxes_per_phrase=known)
    batch = processor.encode([QUESTION, ANSWER], return_labels=True)
    head, targets = model.model.grounding_head, batch["ground_boxes"][:3]
    with torch.no_grad():
        tokens = model.model.vision_tower(batch["pixel_values"]).last_hidden_state
    torch.manual_seed(0)
    phrase, optimizer = torch.randn(1, 24).expand(3, -1), torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(80):
        boxes = head(torch.zeros(3, 32), tokens, torch.zeros(3, dtype=torch.long), phrase, torch.arange(3))[2]
        loss = (boxes - targets).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (float(loss.detach()) < 0.03) == (known > 1)
