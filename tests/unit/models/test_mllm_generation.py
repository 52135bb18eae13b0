"""Every way of generating says what plain greedy generation, or a row on its own, says; boxes as text or a head's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer

from tests.builders_mllm import grounding_turn, image, region, text, tiny_mllm, user

RAGGED: list[Any] = [
    [user(image(1), image(2, 20, 50), text("is "), region(3, 4, 20, 25, image=0), text(" in "), region(1, 1, 9, 30))],
    [user("how many are there")],
    [user(image(3), text("what is "), region(10, 10, 30, 20), text("?")), grounding_turn(), user("and why?")],
    [user(image(4), text("what is this?"))],
    [user(image(5), text("a "), *(region(k, k, k + 9, k + 9) for k in range(5)))],
]


@pytest.fixture(scope="module", params=["text", "head"])
def mllm(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return tiny_mllm(grounding=request.param)


@pytest.fixture(scope="module")
def batch(mllm: tuple[Any, Any]) -> dict[str, Any]:
    return dict(mllm[1].encode(RAGGED, add_generation_prompt=True))


def new_tokens(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def alone(processor: Any) -> list[Any]:
    return [processor.encode(one, add_generation_prompt=True) for one in RAGGED]


def test_rows_with_any_number_of_images_and_regions(mllm: tuple[Any, Any], batch: dict[str, Any]) -> None:
    model, processor = mllm
    together = new_tokens(model, batch)
    assert len({tuple(row.tolist()) for row in together}) > 1
    for row, one in enumerate(alone(processor)):
        assert torch.equal(together[row : row + 1], new_tokens(model, one)), row


def test_caches(mllm: tuple[Any, Any], batch: dict[str, Any]) -> None:
    model, _ = mllm
    expected = new_tokens(model, batch)
    length = batch["input_ids"].shape[1] + 8
    for options in (
        {"use_cache": False},
        {"past_key_values": DynamicCache(config=model.config.text_config)},
        {"cache_implementation": "static"},
        {"past_key_values": StaticCache(model.config.text_config, max_cache_len=length)},
    ):
        assert torch.equal(new_tokens(model, batch, **options), expected), options


def test_beams_and_several_sequences(mllm: tuple[Any, Any], batch: dict[str, Any]) -> None:
    model, processor = mllm
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    together = new_tokens(model, batch, **options)
    for row, one in enumerate(alone(processor)):
        assert torch.equal(together[2 * row : 2 * row + 2], new_tokens(model, one, **options)), row
    static = new_tokens(model, batch, **options, cache_implementation="static")
    assert torch.equal(static, together)


def test_samples_of_one_prompt_see_the_same_picture_and_regions(mllm: tuple[Any, Any], batch: dict[str, Any]) -> None:
    """Sampling from the likeliest token alone is greedy, so that every returned sequence is known."""
    model, _ = mllm
    sampled = new_tokens(model, batch, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, new_tokens(model, batch).repeat_interleave(3, dim=0))


def test_prompt_lookup(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    for one in alone(processor):
        expected = new_tokens(model, one)
        assert torch.equal(new_tokens(model, one, prompt_lookup_num_tokens=3), expected)


def test_a_streamer_gets_every_token(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    seen: list[str] = []

    class Heard(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            seen.append(text)

    one = alone(processor)[0]
    tokens = new_tokens(model, one, streamer=Heard(processor.tokenizer, skip_prompt=True))
    assert "".join(seen) == processor.tokenizer.decode(tokens[0])


def test_features_made_beforehand_serve_any_number_of_calls(mllm: tuple[Any, Any], batch: dict[str, Any]) -> None:
    model, _ = mllm
    with torch.no_grad():
        images = model.get_image_features(batch["pixel_values"])
    kept = [one.clone() for one in images.pooler_output]
    ready = {name: value for name, value in batch.items() if name != "pixel_values"}
    ready["mm_encoder_outputs"] = {"image": images}
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}, {"num_beams": 2}):
        assert torch.equal(new_tokens(model, ready, **options), new_tokens(model, batch, **options)), options
        assert len(images.pooler_output) == len(kept)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(images.pooler_output, kept, strict=True))
        assert images.region_features is None
    plain = {name: value for name, value in batch.items() if name != "ground_image_index"}
    encoded = model.encode_inputs({name: value for name, value in ready.items() if name != "ground_image_index"})
    with torch.no_grad():
        expected, found = model(**plain), model(**encoded)
        torch.testing.assert_close(found.logits, expected.logits)
        boxes = model(**encoded, predict_boxes=True).pred_boxes
    assert (boxes is None) == (expected.pred_boxes is None)
    if boxes is not None:
        torch.testing.assert_close(boxes, expected.pred_boxes)
        assert found.pred_boxes is None


def test_images_given_both_ways_are_refused(mllm: tuple[Any, Any], batch: dict[str, Any]) -> None:
    model, _ = mllm
    images = model.get_image_features(batch["pixel_values"])
    with pytest.raises(ValueError, match="not both"):
        model.generate(**batch, mm_encoder_outputs={"image": images})
    with pytest.raises(ValueError, match="not both"):
        model(**batch, mm_encoder_outputs={"image": images})
    regions = {name: value for name, value in batch.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="8 regions were given, but no image"):
        model.generate(**regions)


def test_grounded_generation_takes_beams_caches_and_features(mllm: tuple[Any, Any], batch: dict[str, Any]) -> None:
    model, processor = mllm
    ready = model.encode_inputs(batch)
    often: dict[str, Any] = {"max_new_tokens": 8, "sequence_bias": [[[processor.ground_token_id], 10.0]]}
    for more in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options = {**often, **more}
        expected = model.generate(**batch, **options)
        found = model.generate_grounded(**ready, **options)
        assert torch.equal(found.sequences, expected)
        raw = model.ground_sequences(
            expected,
            batch["input_ids"],
            batch["attention_mask"],
            **{name: batch[name] for name in ("pixel_values", "region_boxes", "region_image_index")},
        )
        assert (found.pred_boxes is None) == (raw.pred_boxes is None) == (model.config.grounding == "text")
        if raw.pred_boxes is not None:
            assert len(raw.pred_boxes) > 2
            torch.testing.assert_close(found.pred_boxes, raw.pred_boxes, equal_nan=True)
