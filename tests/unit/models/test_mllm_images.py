"""Any pictures, in any number, from messages to the model: a ragged batch is its rows, however images are shown."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.inference.predictor import Predictor
from tests.builders import noise_image
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
from tests.unit.models.test_mllm_grounding import says


def shown(picture: Any) -> dict[str, Any]:
    return {"type": "image", "image": picture}


def turned(width: int, height: int, seed: int) -> bytes:
    """A file whose pixels lie on their side: EXIF says to turn them to ``width`` x ``height``."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    noise_image(width, height, seed).transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def see_through(width: int, height: int) -> Image.Image:
    picture = noise_image(width, height, 9).convert("RGBA")
    picture.putalpha(Image.fromarray(np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)))
    return picture


DEEP = np.random.default_rng(5).integers(0, 65536, (20, 70), dtype=np.uint16)
QUESTIONS = [
    [
        user(image(1, 90, 33), shown(turned(30, 77, 2)), text("what is "), region(3, 4, 60, 25, image=0), text("?")),
        assistant("a ring"),
        user(text("and "), region(2, 40, 20, 70, image=1), text(" or "), region(1, 1, 20, 9), text("?")),
    ],
    [user("how many are there")],
    [user(shown(see_through(33, 40)), text("what?"))],
    [user(shown(DEEP), text("first")), assistant("yes"), user(image(3, 200, 9), region(0, 0, 60, 20, image=0))],
]
SIZES = [[(90, 33), (30, 77)], [], [(33, 40)], [(70, 20), (200, 9)]]
MODELS: dict[str, dict[str, Any]] = {
    "pad": {"image_mode": "pad"},
    "resize": {"image_mode": "resize", "projector_type": "linear"},
    "anyres": {"image_mode": "anyres"},
    "anyres, fewer tokens": {"image_mode": "anyres", "projector_type": "pixel_shuffle", "region_encoder": "roi_align"},
    "anyres, own grid": {"image_mode": "anyres", "image_grid_pinpoints": [[32, 32], [64, 96]], "family": "qwen2"},
}


@pytest.fixture(scope="module", params=list(MODELS))
def mllm(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return tiny_mllm(**MODELS[request.param])


def test_a_padded_batch_is_its_rows_greedily_and_in_beams(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(QUESTIONS, add_generation_prompt=True, return_original_sizes=True)
    assert batch.pop("original_sizes") == SIZES
    assert batch["attention_mask"][1, 0] == 0
    length = batch["input_ids"].shape[1]
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}]
    together = [model.generate(**batch, max_new_tokens=5, min_new_tokens=5, **way)[:, length:] for way in ways]
    assert torch.equal(together[0], together[1])
    for row, conversation in enumerate(QUESTIONS):
        alone = processor.encode(conversation, add_generation_prompt=True)
        counts = [processor.image_tokens(*size) for size in SIZES[row]]
        assert int((alone["input_ids"] == processor.image_token_id).sum()) == sum(counts)
        own = alone["input_ids"].shape[1]
        for rows, way in zip(together, ways, strict=True):
            expected = model.generate(**alone, max_new_tokens=5, min_new_tokens=5, **way)[:, own:]
            assert torch.equal(rows[row * len(expected) : (row + 1) * len(expected)], expected)


def test_right_padded_training_batches_are_their_rows_too(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    turns = [
        [*question, grounding_turn("it", (1, 1, 9, 8)) if SIZES[k] else assistant("two")]
        for k, question in enumerate(QUESTIONS)
    ]
    batch = model_inputs(processor.encode(turns, return_labels=True))
    assert batch.pop("ground_image_index").tolist() == [1, 2, 4]
    with torch.no_grad():
        together = model(**batch)
    assert together.ground_image_index.tolist() == [1, 2, 4]  # found by the model itself, from the counts
    boxes = iter(together.pred_boxes)
    for row, conversation in enumerate(turns):
        alone = model_inputs(processor.encode(conversation, return_labels=True))
        with torch.no_grad():
            expected = model(**alone)
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(together.logits[row, :length], expected.logits[0], atol=2e-5, rtol=1e-4)
        for box in expected.pred_boxes:
            torch.testing.assert_close(next(boxes), box, atol=1e-5, rtol=1e-4)


def test_generated_boxes_are_in_pixels_of_the_image_they_name(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    inputs = processor.encode(QUESTIONS, add_generation_prompt=True, return_original_sizes=True)
    sizes, length = inputs.pop("original_sizes"), inputs["input_ids"].shape[1]
    spoken = ["a ring<ground>", "two", "a cross<ground> and a star<ground>.", "it<ground>"]
    output = model.generate_grounded(**inputs, logits_processor=says(processor, spoken, length), max_new_tokens=24)
    assert output.ground_image_index.tolist() == [1, 2, 2, 4]
    answers = processor.post_process_grounding(output, sizes)
    assert [[box["image"] for box in answer.boxes] for answer in answers] == [[1], [], [0, 0], [1]]
    normalised = iter(output.pred_boxes)
    for answer, of_row in zip(answers, sizes, strict=True):
        for box in answer.boxes:
            place = processor.image_processor.geometry(*of_row[box["image"]])
            assert box["box"] == place.boxes_from_model(next(normalised)).tolist()


def test_the_predictor_answers_a_mixed_batch_as_one_by_one(mllm: tuple[Any, Any]) -> None:
    predictor = Predictor(*mllm)
    together = predictor.chat(QUESTIONS, max_new_tokens=5)
    assert together == [predictor.chat([question], max_new_tokens=5)[0] for question in QUESTIONS]


def test_a_turned_picture_is_the_upright_one_boxes_and_all(mllm: tuple[Any, Any]) -> None:
    _, processor = mllm
    sideways, upright = (
        processor.encode([user(shown(picture), text("what is "), region(2, 40, 20, 70), text("?"))])
        for picture in (turned(30, 77, 2), noise_image(30, 77, 2))
    )
    assert set(sideways) == set(upright)
    assert all(torch.equal(sideways[name], upright[name]) for name in upright)
    with pytest.raises(ValueError, match="outside the image of 30 x 77"):
        processor.encode([user(shown(turned(30, 77, 2)), text("what is "), region(40, 2, 70, 20))])


def test_a_region_reads_the_image_it_names(mllm: tuple[Any, Any]) -> None:
    """Of two images the one named is read, wherever it was shown; the other could be any."""
    model, processor = mllm
    seen = []
    for other in (7, 8):
        turns = [user(image(1, 90, 33), image(other, 30, 77), text("a "), region(3, 4, 60, 25, image=0))]
        batch = processor.encode(turns)
        with torch.no_grad():
            seen.append(
                model.model.get_image_features(
                    **{n: v for n, v in batch.items() if n in ("pixel_values", "image_sizes") or "region" in n}
                ).region_features
            )
    torch.testing.assert_close(*seen)
