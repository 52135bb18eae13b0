"""Regions in: placeholders are filled by the right region of the right image, in every way of generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.generation import utils

from cloc_mllm.models.region_encoder import RegionPrompter
from tests.builders import tiny_cloc
from tests.builders_mllm import assistant, image, model_inputs, region, text, tiny_mllm, user

BOX = (3, 4, 20, 25)


def asked(*regions: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """A question about an image and any number of regions."""
    items = [part for one in regions for part in (text(" and "), one)]
    return [user(image(seed), text("what is"), *items, text("?"))]


RAGGED = [
    asked(region(*BOX), region(0, 0, 40, 30), seed=1),
    [user("how many are there")],
    asked(seed=2),
    asked(region(10, 10, 30, 20), seed=3),
]


@pytest.fixture(scope="module", params=["prompter", "roi_align"])
def mllm(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return tiny_mllm(region_encoder=request.param)


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_placeholders_hold_the_projected_region_embeddings(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(RAGGED)
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits(model, batch)
    hook.remove()
    at_regions = seen[0][batch["input_ids"] == processor.region_token_id]
    inner = model.model
    with torch.no_grad():
        tokens = inner.vision_tower(batch["pixel_values"]).last_hidden_state
        expected = [
            inner.region_projector(inner.prompter(tokens[i : i + 1], box[None], torch.tensor([0])))
            for box, i in zip(batch["region_boxes"], batch["region_image_index"].tolist(), strict=True)
        ]
    assert batch["region_image_index"].tolist() == [0, 0, 2]
    torch.testing.assert_close(at_regions, torch.cat(expected))


def test_the_prompter_gives_the_encoders_region_embeddings() -> None:
    encoder, _ = tiny_cloc()
    model, processor = tiny_mllm(encoder=encoder)
    batch = processor.encode(RAGGED)
    index = batch["region_image_index"]
    with torch.no_grad():
        tokens = encoder.get_image_features(batch["pixel_values"]).last_hidden_state
        theirs = encoder.get_region_features(tokens, input_boxes=batch["region_boxes"], image_index=index).pooler_output
        ours = model.model.prompter(tokens, batch["region_boxes"], index)
        points = batch["region_boxes"][:, :2]
        their_points = encoder.get_region_features(tokens, input_points=points, image_index=index).pooler_output
        our_points = model.model.prompter(tokens, torch.cat([points, points], dim=-1), index)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_points, their_points)


def test_a_point_reaches_the_model_as_a_point() -> None:
    model, processor = tiny_mllm()
    point = processor.encode(asked({"type": "region", "point": [12, 9]}))
    assert torch.equal(point["region_boxes"][:, :2], point["region_boxes"][:, 2:])
    box = processor.encode(asked(region(11.9, 8.9, 12.1, 9.1)))
    assert not torch.allclose(logits(model, point), logits(model, box), atol=1e-3)


def test_a_box_changes_what_follows_it_and_nothing_before(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    here, there = processor.encode(asked(region(*BOX))), processor.encode(asked(region(20, 5, 38, 28)))
    assert torch.equal(here["input_ids"], there["input_ids"])
    at = int((here["input_ids"][0] == processor.region_token_id).nonzero())
    ours, theirs = logits(model, here)[0], logits(model, there)[0]
    assert torch.equal(ours[:at], theirs[:at])
    assert (ours[at:] - theirs[at:]).abs().amax(-1).min() > 1e-4


def test_the_image_of_a_region_matters(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batches = [
        processor.encode([user(image(1), image(2), text("what is "), region(*BOX, image=k), text("?"))]) for k in (0, 1)
    ]
    assert [batch["region_image_index"].tolist() for batch in batches] == [[0], [1]]
    assert not torch.allclose(logits(model, batches[0]), logits(model, batches[1]), atol=1e-4)


def test_a_padded_batch_is_its_rows(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(RAGGED, add_generation_prompt=True)
    together = model.generate(**batch, max_new_tokens=6)
    for row, conversation in enumerate(RAGGED):
        alone = processor.encode(conversation, add_generation_prompt=True)
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], alone["input_ids"][0])
        generated = model.generate(**alone, max_new_tokens=6)[0, length:]
        theirs = together[row, batch["input_ids"].shape[1] :]
        assert torch.equal(theirs[: len(generated)], generated)


def test_the_cache_changes_nothing(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(RAGGED, add_generation_prompt=True)
    cached = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=6, use_cache=False))
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=6, cache_implementation="static"))
    assert torch.equal(
        cached,
        model.generate(
            **batch,
            max_new_tokens=6,
            past_key_values=StaticCache(model.config.text_config, max_cache_len=batch["input_ids"].shape[1] + 8),
        ),
    )
    one = processor.encode(RAGGED[0], add_generation_prompt=True)
    assert torch.equal(
        model.generate(**one, max_new_tokens=6), model.generate(**one, max_new_tokens=6, prompt_lookup_num_tokens=2)
    )


def test_greedy_generation_is_the_argmax_of_forward(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(RAGGED[0], add_generation_prompt=True)
    never = model.generation_config.suppress_tokens
    ids = batch["input_ids"]
    for _ in range(4):
        scores = logits(model, {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1]
        scores[:, never] = float("-inf")
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    generated = model.generate(**batch, max_new_tokens=4)
    assert torch.equal(generated, ids[:, : generated.shape[1]])


def test_beams_and_several_sequences_keep_their_regions(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(RAGGED, add_generation_prompt=True)
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 5}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert len(together) == 2 * len(RAGGED)
    for row, conversation in enumerate(RAGGED):
        alone = processor.encode(conversation, add_generation_prompt=True)
        expected = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(together[2 * row : 2 * row + 2], expected)
    assert torch.equal(model.generate(**batch, **options, use_cache=False)[:, batch["input_ids"].shape[1] :], together)


def test_generation_from_embeddings_alone(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = dict(processor.encode(RAGGED, add_generation_prompt=True))
    expected = model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(**batch, inputs_embeds=embeds, max_new_tokens=5), expected)
    beams: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2}
    assert torch.equal(
        model.generate(**batch, inputs_embeds=embeds, **beams),
        model.generate(**batch, input_ids=ids, **beams)[:, ids.shape[1] :],
    )


def test_chunked_prefill_is_refused_with_regions(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(asked(region(*BOX)), add_generation_prompt=True)
    with pytest.raises(ValueError, match="prefill_chunk_size=8 cannot be used with the 1 regions"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=8)
    config = type(model.generation_config)(**{**model.generation_config.to_dict(), "prefill_chunk_size": 8})
    with pytest.raises(ValueError, match="prefill_chunk_size=8"):
        model.generate(**batch, generation_config=config)


@pytest.mark.skipif(
    not hasattr(utils, "_slice_mm_encoder_output"), reason="this transformers cannot chunk images at all"
)
def test_chunked_prefill_without_regions(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    plain = processor.encode(asked(), add_generation_prompt=True)
    assert torch.equal(
        model.generate(**plain, max_new_tokens=4), model.generate(**plain, max_new_tokens=4, prefill_chunk_size=8)
    )


def test_counts_that_do_not_match_are_named(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = dict(processor.encode(asked(region(*BOX), region(0, 0, 9, 9))))
    without = {name: value for name, value in batch.items() if not name.startswith("region")}
    with pytest.raises(
        ValueError, match=r"2 <region> placeholders, but there are 0 region features\. Pass region_boxes"
    ):
        model(**without)
    with pytest.raises(ValueError, match="2 <region> placeholders, but there are 0"):
        model.generate(**without, max_new_tokens=2)
    fewer = {**batch, "region_boxes": batch["region_boxes"][:1], "region_image_index": torch.tensor([0])}
    with pytest.raises(ValueError, match="2 <region> placeholders, but there are 1 region features"):
        model(**fewer)
    with pytest.raises(
        ValueError, match=r"16 <image> placeholders, but there are 0 image features\. Pass pixel_values"
    ):
        model(input_ids=processor.encode(asked())["input_ids"])
    with pytest.raises(ValueError, match="16 <image> placeholders, but there are 32"):
        model(**{**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1), "region_boxes": None})
    with pytest.raises(ValueError, match="2 regions on 2 images need a region_image_index"):
        model(**{**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1), "region_image_index": None})
    with pytest.raises(ValueError, match="there are 2 regions, but region_image_index has 1"):
        model(**{**batch, "region_image_index": torch.tensor([0])})
    with pytest.raises(ValueError, match=r"points to images \[0, 1\], but there are 1 images"):
        model(**{**batch, "region_image_index": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="2 regions were given, but no image"):
        model(**{**batch, "pixel_values": None})
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="region_box"):
        model.generate(**batch, region_box=torch.zeros(1, 4))


def test_regions_are_refused_where_nothing_reads_them() -> None:
    model, processor = tiny_mllm(region_encoder="none", region_format="coords")
    batch = processor.encode(asked(region(*BOX)))
    assert "region_boxes" not in batch
    assert processor.codec.encode(BOX, 40, 30) in processor.apply_chat_template(asked(region(*BOX)))
    logits(model, batch)
    with pytest.raises(ValueError, match="1 regions were given, but region_encoder is 'none'"):
        model(**batch, region_boxes=torch.zeros(1, 4))


def test_a_placeholder_in_the_labels_is_refused(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = model_inputs(processor.encode([*asked(region(*BOX)), assistant("a cat")], return_labels=True))
    for token in (processor.image_token_id, processor.region_token_id):
        labels = torch.where(batch["input_ids"] == token, token, batch["labels"])
        with pytest.raises(ValueError, match="stands in the labels"):
            model(**{**batch, "labels": labels})


def test_attention_implementations_agree(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(RAGGED)
    before = logits(model, batch)
    try:
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model, batch), before, atol=2e-5, rtol=1e-4)
    finally:
        model.set_attn_implementation("sdpa")


def test_boxes_stay_float32_in_a_bf16_model(mllm: tuple[Any, Any]) -> None:
    model, processor = tiny_mllm(region_encoder=mllm[0].config.region_encoder)
    batch = processor.encode(asked(region(*BOX)))
    seen: list[torch.Tensor] = []
    reader = model.to(torch.bfloat16).model.prompter
    hook = reader.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    output = logits(model, batch)
    hook.remove()
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], batch["region_boxes"])
    if isinstance(reader, RegionPrompter):
        near = {**batch, "region_boxes": batch["region_boxes"] + 2e-3}  # less than one step of bfloat16 at 0.6
        assert not torch.equal(logits(model, near), output)


def test_output_as_a_tuple(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(RAGGED)
    with torch.no_grad():
        as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], logits(model, batch))
