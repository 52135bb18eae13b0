"""Batches: the names, shapes and dtypes that training relies on, and every tensor where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig

from cloc_mllm.data.collate import ConversationCollator, RegionTextCollator
from cloc_mllm.data.dataset import SkipCount
from cloc_mllm.errors import ClocError
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.processing_cloc import ClocProcessor
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from tests.builders import noise_image, tiny_tokenizer

PROCESSOR = ClocProcessor(ClocImageProcessor(size=32), tiny_tokenizer())


def region(text: str, box: list[float], unique: bool = True) -> dict[str, Any]:
    return {"text": text, "box": box, "unique": unique}


def item(identity: str, regions: list[dict[str, Any]], width: int = 40, height: int = 30) -> dict[str, Any]:
    image = noise_image(width, height)
    return {"id": identity, "image": image, "caption": f"a red circle {identity}", "regions": regions}


ITEMS = [
    item("a", [region("red ring", [0, 0, 40, 30]), region("blue star", [10, 5, 20, 25], unique=False)]),
    item("b", []),
    item("c", [region("red ring", [5, 0, 10, 60])], width=15, height=60),
]


def test_names_shapes_and_types() -> None:
    batch = RegionTextCollator(PROCESSOR)(ITEMS)
    length, texts = batch["input_ids"].shape[1], batch["region_input_ids"].shape[1]
    expected = {
        "pixel_values": ((3, 3, 32, 32), torch.float32),
        "input_ids": ((3, length), torch.int64),
        "attention_mask": ((3, length), torch.int64),
        "input_boxes": ((3, 4), torch.float32),
        "box_image_index": ((3,), torch.int64),
        "region_input_ids": ((2, texts), torch.int64),
        "region_attention_mask": ((2, texts), torch.int64),
        "region_text_index": ((3,), torch.int64),
        "region_valid": ((3,), torch.bool),
        "region_unique": ((3,), torch.bool),
        "has_regions": ((3,), torch.bool),
    }
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == expected


def test_everything_is_where_it_belongs() -> None:
    batch = RegionTextCollator(PROCESSOR)(ITEMS)
    assert batch["box_image_index"].tolist() == [0, 0, 2]
    assert batch["region_text_index"].tolist() == [0, 1, 0]
    assert batch["region_valid"].tolist() == [True, True, True]
    assert batch["region_unique"].tolist() == [True, False, True]
    assert batch["has_regions"].tolist() == [True, False, True]
    texts = PROCESSOR.tokenizer.batch_decode(batch["region_input_ids"], skip_special_tokens=True)
    assert [text.strip() for text in texts] == ["red ring", "blue star"]
    for k, (number, box) in enumerate([(0, [0, 0, 40, 30]), (0, [10, 5, 20, 25]), (2, [5, 0, 10, 60])]):
        place = PROCESSOR.geometry(ITEMS[number]["image"])
        assert torch.allclose(place.boxes_from_model(batch["input_boxes"][k]), torch.tensor(box).double(), atol=1e-3)
    for k, sample in enumerate(ITEMS):
        alone = PROCESSOR(images=[sample["image"]])["pixel_values"][0]
        assert torch.equal(batch["pixel_values"][k], alone)


def test_without_any_region_there_is_one_dummy() -> None:
    batch = RegionTextCollator(PROCESSOR)([item("a", []), item("b", [])])
    assert batch["input_boxes"].tolist() == [[0, 0, 1, 1]]
    assert batch["input_boxes"].dtype == torch.float32
    assert batch["box_image_index"].tolist() == batch["region_text_index"].tolist() == [0]
    assert batch["region_valid"].tolist() == batch["region_unique"].tolist() == [False]
    assert batch["has_regions"].tolist() == [False, False]
    assert batch["region_input_ids"].shape[0] == 1
    assert set(batch) == set(RegionTextCollator(PROCESSOR)(ITEMS))


def test_clip_batches_hold_no_regions() -> None:
    batch = RegionTextCollator(PROCESSOR, regions=False)(ITEMS)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    full = RegionTextCollator(PROCESSOR)(ITEMS)
    assert all(torch.equal(batch[name], full[name]) for name in batch)


def test_what_the_processor_refuses_is_named() -> None:
    with pytest.raises(ClocError, match=r"sample 'a, bad'.*outside the image"):
        RegionTextCollator(PROCESSOR)([ITEMS[0], item("bad", [region("x", [0, 0, 400, 10])])])


def mllm_processor() -> ClocMllmProcessor:
    vision = CLIPVisionConfig(image_size=32, patch_size=8)
    return ClocMllmProcessor.from_parts(ClocImageProcessor(size=32), tiny_tokenizer(), vision)


def talk(identity: str, answer: str) -> dict[str, Any]:
    question = [{"type": "image", "image": noise_image()}, {"type": "text", "text": "Where is the ring?"}]
    reply = [{"type": "text", "text": "the ring "}, {"type": "region", "box": [0, 0, 9, 9], "phrase": "the ring"}]
    return {
        "id": identity,
        "file": "talks.jsonl",
        "sample": f"{identity} (line 1)",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [*reply, {"type": "text", "text": answer}]},
        ],
    }


def test_conversations_are_encoded_by_the_processor() -> None:
    processor = mllm_processor()
    samples = [talk("a", " yes"), talk("b", " no no")]
    batch = ConversationCollator(processor)(samples)
    direct = processor.encode([sample["messages"] for sample in samples], return_labels=True)
    assert set(batch) == set(direct)
    assert torch.equal(batch["labels"], direct["labels"])
    assert batch["ground_phrases"] == ["the ring", "the ring"]
    assert (batch["labels"] != -100).any(1).all()


def test_a_refused_conversation_is_named() -> None:
    broken = talk("b", " yes")
    broken["messages"][0]["content"].append({"type": "region", "box": [0, 0, 400, 9]})
    with pytest.raises(ClocError, match="outside the image") as caught:
        ConversationCollator(mllm_processor())([talk("a", " yes"), broken])
    assert caught.value.file == "talks.jsonl"
    assert caught.value.sample == "b (line 1)"
    with pytest.raises(ClocError, match="max_length"):
        ConversationCollator(mllm_processor(), max_length=4)([talk("a", " yes")])


def test_what_is_refused_is_left_out_and_counted_if_so_wished() -> None:
    broken = talk("b", " yes")
    broken["messages"][0]["content"].append({"type": "region", "box": [0, 0, 400, 9]})
    skips = SkipCount()
    whole = [talk("a", " yes"), talk("c", " no no")]
    batch = ConversationCollator(mllm_processor(), skips=skips)([whole[0], broken, whole[1], broken])
    assert skips.total == 2
    wanted = ConversationCollator(mllm_processor())(whole)
    assert set(batch) == set(wanted)
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["pixel_values"], wanted["pixel_values"])


@pytest.mark.parametrize("packing", [False, True])
def test_where_nothing_is_left_there_is_still_a_batch_and_nothing_is_learnt(packing: bool) -> None:
    broken = talk("b", " yes")
    broken["messages"][0]["content"].append({"type": "region", "box": [0, 0, 400, 9]})
    skips = SkipCount()
    batch = ConversationCollator(mllm_processor(), packing=packing, skips=skips)([broken, broken])
    assert skips.total == 2
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].numel() > 1
    assert (batch["labels"] == -100).all()
    assert "pixel_values" not in batch


def test_packed_rows_are_as_long_as_asked_for() -> None:
    short = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]
    samples = [talk(name, " yes" * (20 * k)) for k, name in enumerate("abc", 1)] + [{"messages": short}] * 4
    padded = ConversationCollator(mllm_processor())(samples)
    longest, total = padded["input_ids"].shape[1], int(padded["attention_mask"].sum())
    for options, limit in (({}, longest), ({"max_length": longest + 9}, longest + 9), ({"pack_length": total}, total)):
        batch = ConversationCollator(mllm_processor(), packing=True, **options)(samples)
        rows, width = batch["input_ids"].shape
        assert total / rows <= width <= limit
        assert rows < len(samples)
        assert sorted(batch["ground_phrases"]) == sorted(padded["ground_phrases"])
        assert int((batch["labels"] != -100).sum()) == int((padded["labels"] != -100).sum())
