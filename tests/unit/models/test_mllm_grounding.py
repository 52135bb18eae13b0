"""Boxes out: every ``<ground>`` gets the box its hidden state asks for, on the image it is about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList

from cloc_mllm.models.grounding_head import image_before
from tests.builders import tiny_cloc
from tests.builders_mllm import (
    assistant,
    grounding_turn,
    image,
    model_inputs,
    region,
    text,
    tiny_mllm,
    user,
)

BOX = (3, 4, 20, 25)
CONVERSATIONS = [
    [user(image(1), text("where is it?")), grounding_turn("red ring", (1, 2, 9, 12))],
    [user("how many are there"), assistant("two")],
    [
        user(image(2), image(3), text("find both")),
        assistant(text("a cross "), region(*BOX, image=0), text(" and a star "), region(*BOX)),
        user(image(4), text("and here?")),
        grounding_turn(),
    ],
]


class Says(LogitsProcessor):
    """Makes ``generate`` say given tokens, row by row, as a trained model would."""

    def __init__(self, rows: list[list[int]], prompt_length: int) -> None:
        self.rows, self.prompt_length = rows, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self.prompt_length
        for row, wanted in enumerate(self.rows):
            keep = scores[row, wanted[at]].clone() if at < len(wanted) else None
            if keep is not None:
                scores[row] = float("-inf")
                scores[row, wanted[at]] = 0.0
        return scores


def says(processor: Any, texts: list[str], prompt_length: int) -> LogitsProcessorList:
    rows = [processor.tokenizer.encode(f"{one}<|im_end|>", add_special_tokens=False) for one in texts]
    return LogitsProcessorList([Says(rows, prompt_length)])


@pytest.fixture(scope="module")
def mllm() -> tuple[Any, Any]:
    return tiny_mllm()


def test_boxes_come_from_the_hidden_states_and_the_right_images(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = model_inputs(processor.encode(CONVERSATIONS, return_labels=True))
    assert batch["ground_image_index"].tolist() == [0, 1, 2, 3]
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        hidden = output.hidden_states[-1][batch["input_ids"] == processor.ground_token_id]
        head, tower = model.model.grounding_head, model.model.vision_tower
        queries = functional.normalize(head.query_projection(hidden), dim=-1)
        tokens = tower(batch["pixel_values"]).last_hidden_state
        boxes = [
            head.box_head(head.localizer(tokens[k : k + 1], queries[g : g + 1], torch.tensor([0])))
            for g, k in enumerate([0, 1, 2, 3])
        ]
    torch.testing.assert_close(output.ground_embeds, queries)
    torch.testing.assert_close(output.pred_boxes, torch.cat(boxes))
    assert output.pred_boxes.dtype == torch.float32
    assert output.text_prompted_boxes is None


def test_text_queries_give_what_the_encoder_predicts() -> None:
    encoder, encoder_processor = tiny_cloc()
    model, processor = tiny_mllm(encoder=encoder)
    batch = model_inputs(processor.encode(CONVERSATIONS, return_labels=True))
    words = encoder_processor.tokenize(["a red ring", "a cross", "a star", "red circle"])
    with torch.no_grad():
        queries = encoder.get_text_features(**words).pooler_output
        output = model(**batch, ground_queries=queries)
        tokens = encoder.get_image_features(batch["pixel_values"]).last_hidden_state
        expected = encoder.predict_boxes(tokens, queries, batch["ground_image_index"])
        alone = model(**batch)
    torch.testing.assert_close(output.text_prompted_boxes, expected)
    torch.testing.assert_close(output.pred_boxes, alone.pred_boxes)
    assert torch.equal(output.logits, alone.logits)


def test_the_image_is_by_default_the_one_shown_last(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = model_inputs(processor.encode(CONVERSATIONS, return_labels=True))
    given = batch.pop("ground_image_index")
    with torch.no_grad():
        output = model(**batch)
    assert given.tolist() == [0, 1, 2, 3]
    assert output.ground_image_index.tolist() == [0, 2, 2, 3]
    row = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
    assert image_before(row, [2, 2, 2]).tolist()[0] == [-1, -1, 0, 0, 0, 1, 1]
    assert image_before(row, [2, 2, 2])[1].tolist() == [-1] * 7
    assert image_before(row, [2, 2, 2])[2, 3:].tolist() == [2] * 4
    unlike = image_before(row, [1, 3, 2])
    assert unlike[0].tolist() == [-1, 0, 0, 0, 0, 1, 1]
    assert unlike[2, 3:].tolist() == [2] * 4
    assert image_before(torch.zeros(1, 3, dtype=torch.bool), []).tolist() == [[-1, -1, -1]]


def test_ground_without_an_image_has_no_box(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    ids = processor.tokenizer.encode("a star<ground>", return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=ids)
    assert output.ground_image_index.tolist() == [-1]
    assert output.pred_boxes.isnan().all()
    with pytest.raises(ValueError, match="1 of 1 <ground> tokens stand in a text without an image"):
        model.train()(input_ids=ids)
    model.eval()


def test_counts_that_do_not_match_are_named(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = model_inputs(processor.encode(CONVERSATIONS, return_labels=True))
    with pytest.raises(ValueError, match="4 <ground> tokens, but ground_image_index has 2 entries"):
        model(**{**batch, "ground_image_index": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="4 <ground> tokens, but ground_queries has 3 entries"):
        model(**batch, ground_queries=torch.zeros(3, 24))
    with pytest.raises(ValueError, match="points to image 4, but there are 4 images"):
        model(**{**batch, "ground_image_index": torch.tensor([0, 1, 2, 4])})


def test_ground_is_learnt_as_any_other_token(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(CONVERSATIONS, return_labels=True)
    at = batch["input_ids"] == processor.ground_token_id
    assert int(at.sum()) == 4
    assert torch.equal(batch["labels"][at], batch["input_ids"][at])
    model.zero_grad()
    model(**model_inputs(batch)).loss.backward()
    assert float(model.lm_head.weight.grad[processor.ground_token_id].abs().sum()) > 0
    model.zero_grad()


def test_generate_grounded_is_forward_over_the_finished_text(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    questions = [turns[:-1] if len(turns) > 2 else turns[:1] for turns in CONVERSATIONS]
    inputs = processor.encode(questions, add_generation_prompt=True, return_original_sizes=True)
    sizes = inputs.pop("original_sizes")
    length = inputs["input_ids"].shape[1]
    spoken = ["a red ring<ground>", "two", "a cross<ground> and a star<ground>."]
    output = model.generate_grounded(
        **inputs, logits_processor=says(processor, spoken, length), max_new_tokens=24, num_beams=1
    )
    assert output.prompt_length == length
    assert output.ground_row.tolist() == [0, 2, 2]
    assert output.ground_image_index.tolist() == [0, 3, 3]
    # Each row on its own, unpadded, without generating.
    for row, question in enumerate(questions):
        prompt = processor.encode(question, add_generation_prompt=True)
        extra = processor.tokenizer.encode(spoken[row], add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([prompt["input_ids"], extra], dim=1)
        rest = {name: prompt[name] for name in ("pixel_values", "region_boxes") if name in prompt}
        with torch.no_grad():
            alone = model(input_ids=ids, **rest)
        mine = output.pred_boxes[output.ground_row == row]
        torch.testing.assert_close(mine, alone.pred_boxes[len(alone.pred_boxes) - len(mine) :], atol=1e-5, rtol=1e-4)
    answers = processor.post_process_grounding(output, sizes)
    assert [[box["phrase"] for box in answer.boxes] for answer in answers] == [
        ["a red ring"],
        [],
        ["a cross", "a star"],
    ]
    assert [box["image"] for box in answers[2].boxes] == [2, 2]
    for answer in answers:
        for box in answer.boxes:
            assert processor.codec.encode(box["box"], 40, 30) in answer.text
            assert 0 <= box["box"][0] <= box["box"][2] <= 40
            assert 0 <= box["box"][1] <= box["box"][3] <= 30
    assert answers[1].text == "two"
    assert answers[2].text.endswith("].")


def test_the_answer_as_a_turn_renders_to_what_was_generated(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    question = [user(image(2), text("find both"))]
    inputs = processor.encode(question, add_generation_prompt=True, return_original_sizes=True)
    sizes, spoken = inputs.pop("original_sizes"), "a cross<ground> and a star<ground>."
    length = inputs["input_ids"].shape[1]
    output = model.generate_grounded(**inputs, logits_processor=says(processor, [spoken], length), max_new_tokens=24)
    turn = processor.post_process_grounding(output, sizes)[0].message
    again = processor.encode([*question, turn])["input_ids"][0].tolist()
    assert again[: output.sequences.shape[1]] == output.sequences[0].tolist()


def test_grounding_of_an_image_that_is_not_there_is_reported(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    inputs = processor.encode([user("find it")], add_generation_prompt=True, return_original_sizes=True)
    sizes = inputs.pop("original_sizes")
    length = inputs["input_ids"].shape[1]
    output = model.generate_grounded(
        **inputs, logits_processor=says(processor, ["a star<ground>"], length), max_new_tokens=9
    )
    answer = processor.post_process_grounding(output, sizes)[0]
    assert (answer.text, answer.boxes, answer.unparsed) == ("a star", [], ["<ground>"])


def test_earlier_turns_cost_no_boxes_and_do_no_harm(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    history = [*CONVERSATIONS[0], user("and now?")]
    inputs = processor.encode(history, add_generation_prompt=True)
    assert inputs["ground_image_index"].tolist() == [0]
    for beams in (1, 2):
        cached = model.generate(**inputs, max_new_tokens=4, num_beams=beams)
        assert torch.equal(cached, model.generate(**inputs, max_new_tokens=4, num_beams=beams, use_cache=False))
    calls: list[int] = []
    hook = model.model.grounding_head.register_forward_hook(lambda *args: calls.append(1))
    model.generate_grounded(
        **inputs,
        logits_processor=says(processor, ["yes"], inputs["input_ids"].shape[1]),
        max_new_tokens=4,
    )
    hook.remove()
    assert not calls


def test_generate_grounded_refuses_what_it_cannot_do(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    inputs = processor.encode([user("find it")], add_generation_prompt=True)
    with pytest.raises(ValueError, match="leave num_return_sequences out"):
        model.generate_grounded(**inputs, num_return_sequences=2, num_beams=2)
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate_grounded(inputs_embeds=torch.zeros(1, 3, 32))


def test_boxes_as_text() -> None:
    model, processor = tiny_mllm(grounding="text")
    assert model.model.grounding_head is None
    assert processor.ground_token_id in model.generation_config.suppress_tokens
    inputs = processor.encode(
        [[user(image(1), text("where?"))], [user("where?")]], add_generation_prompt=True, return_original_sizes=True
    )
    sizes = inputs.pop("original_sizes")
    spoken = ["a star [100, 200, 500, 600], and a ring [3, 4]", "[1, 2, 3, 4]"]
    output = model.generate_grounded(
        **inputs, logits_processor=says(processor, spoken, inputs["input_ids"].shape[1]), max_new_tokens=90
    )
    assert output.pred_boxes is None
    first, second = processor.post_process_grounding(output, sizes)
    assert first.text == spoken[0]
    assert [box["phrase"] for box in first.boxes] == ["a star"]
    assert first.boxes[0]["box"] == pytest.approx([4.0, 6.0, 20.0, 18.0], abs=0.05)
    assert first.unparsed == ["[3, 4]"]
    assert (second.text, second.boxes, second.unparsed) == (spoken[1], [], [])
