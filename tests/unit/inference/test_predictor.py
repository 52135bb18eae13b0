"""The Predictor: batches answer as single questions do, streams say the same, and bad checkpoints are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.inference.predictor import Predictor
from tests.builders import tiny_cloc
from tests.builders_mllm import assistant, grounding_turn, image, region, text, tiny_mllm, user

QUESTIONS = [
    [user(image(1), text("what is "), region(3, 4, 20, 25), text("?"))],
    [user("how many crosses are there")],
    [user(image(2), text("where?")), grounding_turn(), user("and "), assistant("there"), user("why")],
    [user(image(3, 20, 50), text("what is "), {"type": "region", "point": [5, 6]}, text(" and "), region(1, 1, 9, 30))],
]


def test_a_batch_answers_as_its_questions_alone(predictor: Predictor) -> None:
    together = predictor.chat(QUESTIONS, max_new_tokens=12)
    assert len(together) == len(QUESTIONS)
    assert any(answer.boxes for answer in together)
    assert any(answer.unparsed for answer in together)  # the text-only question has nothing to ground on
    for alone_or_in_pairs in (1, 2):
        again = predictor.chat(QUESTIONS, max_new_tokens=12, batch_size=alone_or_in_pairs)
        for ours, theirs in zip(again, together, strict=True):
            assert [box["phrase"] for box in ours.boxes] == [box["phrase"] for box in theirs.boxes]
            for mine, other in zip(ours.boxes, theirs.boxes, strict=True):
                assert mine["box"] == pytest.approx(other["box"], abs=1e-3)
                assert mine["image"] == other["image"]
            assert ours.unparsed == theirs.unparsed
            assert ours.text == theirs.text


def test_boxes_are_pixels_of_the_original(predictor: Predictor) -> None:
    answer = next(one for one in predictor.chat(QUESTIONS[3:], max_new_tokens=12) if one.boxes)
    for box in answer.boxes:
        x1, y1, x2, y2 = box["box"]
        assert 0 <= x1 <= x2 <= 20
        assert 0 <= y1 <= y2 <= 50


def test_no_question_no_answer(predictor: Predictor) -> None:
    assert predictor.chat([]) == []


def test_the_answer_is_a_turn_to_go_on_from(predictor: Predictor) -> None:
    question = QUESTIONS[0]
    answer = predictor.chat([question], max_new_tokens=6)[0]
    assert (
        predictor.chat([[*question, answer.message, user("why")]], max_new_tokens=4)[0].message["role"] == "assistant"
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stream_says_what_chat_says(predictor: Predictor, question: Any) -> None:
    stream = predictor.stream(question, max_new_tokens=12)
    pieces = list(stream)
    expected = predictor.chat([question], max_new_tokens=12)[0]
    assert stream.answer == expected
    plain = "".join(part["text"] for part in expected.content if part["type"] == "text")
    assert "".join(pieces).strip() == plain.strip()
    assert all(pieces)


def test_a_stream_can_be_left(predictor: Predictor) -> None:
    stream = predictor.stream(QUESTIONS[1], max_new_tokens=200)
    next(stream)
    stream.close()
    assert not stream._thread.is_alive()
    assert len(predictor.processor.tokenizer(stream.answer.text)["input_ids"]) < 190


def test_an_error_in_a_stream_is_not_lost(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(predictor.model.model.language_model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(predictor.stream(QUESTIONS[1]))


@pytest.mark.parametrize(
    ("conversation", "problem"),
    [
        ([], "does not end with a user's turn"),
        ([user("hi"), assistant("ho")], "does not end with a user's turn"),
        ([user(image(), region(9, 9, 3, 3))], "corners out of order"),
        ([user({"type": "image", "image": "nowhere.png"})], "does not exist"),
        ([user("word " * 600)], "needs [0-9]+ tokens, but max_length is 502"),
    ],
)
def test_a_malformed_question_is_named(predictor: Predictor, conversation: Any, problem: str) -> None:
    with pytest.raises(ClocError, match=problem) as caught:
        predictor.chat([QUESTIONS[1], QUESTIONS[1], conversation], max_new_tokens=10, batch_size=2)
    assert caught.value.sample == "2"
    with pytest.raises(ClocError, match=problem):
        predictor.stream(conversation, max_new_tokens=10)


def test_from_pretrained_answers_as_before(predictor: Predictor, tmp_path: Path) -> None:
    odd = tmp_path / "not-a-telling-name"
    predictor.model.save_pretrained(odd)
    predictor.processor.save_pretrained(odd)
    again = Predictor.from_pretrained(odd, device="cpu")
    assert again.chat(QUESTIONS, max_new_tokens=8) == predictor.chat(QUESTIONS, max_new_tokens=8)


def test_what_is_no_model_is_told_apart(predictor: Predictor, tmp_path: Path) -> None:
    for path, problem in (
        (tmp_path / "absent", "there is no such folder"),
        (tmp_path, "holds no model: there is no config.json"),
    ):
        with pytest.raises(ClocError, match=problem):
            Predictor.from_pretrained(path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ClocError, match="this is an adapter, not a model"):
        Predictor.from_pretrained(tmp_path)
    encoder, processor = tiny_cloc()
    encoder.save_pretrained(tmp_path / "run" / "export")
    processor.save_pretrained(tmp_path / "run" / "export")
    with pytest.raises(ClocError, match=r"Did you mean '.*export'"):
        Predictor.from_pretrained(tmp_path / "run")
    with pytest.raises(ClocError, match="another model: 'cloc', not 'cloc_mllm'"):
        Predictor.from_pretrained(tmp_path / "run" / "export")


def test_a_checkpoint_without_all_its_weights_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    predictor.model.save_pretrained(tmp_path)
    predictor.processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.region_projector.linear_1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ClocError, match=r"1 weights are missing, the first being 'model.region_projector.linear_1.weight'"
    ):
        Predictor.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ClocError, match="the checkpoint cannot be loaded"):
        Predictor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ClocError, match="no model can be loaded"):
        Predictor.from_pretrained(tmp_path)


def test_model_and_processor_must_belong_together(predictor: Predictor) -> None:
    _, other = tiny_mllm(grounding="text")
    with pytest.raises(ClocError, match="grounding is head for one, text for the other"):
        Predictor(predictor.model, other)
