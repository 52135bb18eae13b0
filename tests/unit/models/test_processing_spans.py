"""Whatever is left out to fit a length, what is kept is whole: no image, no region and no turn is ever cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.models.conversation_cloc_mllm import ConversationError
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from tests.builders_mllm import assistant, image, region, text, tiny_mllm, user


@pytest.fixture(scope="module")
def processor() -> ClocMllmProcessor:
    return tiny_mllm(region_format="token")[1]


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One to four exchanges; each shows 0 to 2 images, then asks about 0 to 3 regions, and may point some out."""
    turns: list[dict[str, Any]] = []
    shown = 0
    for number in range(draw(st.integers(1, 4))):
        images = draw(st.integers(0, 2))
        sizes = [(draw(st.integers(8, 60)), draw(st.integers(8, 60))) for _ in range(images)]
        asked: list[Any] = [image(number, *size) for size in sizes]
        shown += images
        asked.append(text(f"q{number} " + "why " * draw(st.integers(0, 3))))
        answer: list[Any] = [text(f"a{number} it is so")]
        asked += [region(1, 2, 7, 8)] * (draw(st.integers(0, 3)) if shown else 0)
        for _ in range(draw(st.integers(0, 2)) if shown else 0):
            answer += [text(" thing "), region(1, 1, 8, 7, phrase="thing")]
        turns += [user(*asked), assistant(*answer)]
    return turns


def runs(ids: list[int], token: int) -> list[int]:
    """Lengths of the stretches in which a token stands again and again."""
    return [len(list(group)) for value, group in itertools.groupby(ids) if value == token]


@settings(deadline=None, max_examples=60)
@given(turns=conversations(), share=st.floats(0.05, 1.1), for_training=st.booleans())
def test_what_is_kept_is_whole(
    processor: ClocMllmProcessor, turns: list[dict[str, Any]], share: float, for_training: bool
) -> None:
    asked = turns if for_training else turns[:-1]
    options = {"return_labels": True} if for_training else {"add_generation_prompt": True}
    full = processor.encode(asked, **options)["input_ids"].shape[1]
    most = max(1, int(full * share))
    try:
        batch = processor.encode(asked, max_length=most, **options)
    except ConversationError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert f"but max_length is {most}" in refused
        assert most < full
        return
    ids = batch["input_ids"][0].tolist()
    said = processor.tokenizer.decode(ids)
    kept = [k for k in range(len(turns) // 2) if f"q{k} " in said]
    assert len(ids) <= most or full <= most
    # Whole exchanges: in training the first ones, else any with the last one.
    assert kept == list(range(len(kept))) if for_training else kept[-1] == len(turns) // 2 - 1
    kept_turns = [turn for k in kept for turn in turns[2 * k : 2 * k + 2]]
    answers = [k for k in kept if f"a{k} it is so" in said]
    assert answers == (kept if for_training else kept[:-1])
    items = [(turn["role"], item["type"]) for turn in kept_turns for item in turn["content"]]
    images, regions = items.count(("user", "image")), items.count(("user", "region"))
    # Every image that is shown has all of its tokens in one stretch, and its picture.
    assert runs(ids, processor.image_token_id) == [processor.num_image_tokens] * images
    assert len(batch.get("pixel_values", ())) == images
    assert ids.count(processor.region_token_id) == regions == len(batch.get("region_boxes", ()))
    if regions:
        assert int(batch["region_image_index"].max()) < images
    if for_training:
        grounds = items.count(("assistant", "region"))
        assert ids.count(processor.ground_token_id) == grounds == len(batch["ground_boxes"])
        learnt = set(batch["labels"][0].tolist())
        assert not learnt & {processor.image_token_id, processor.region_token_id}
    else:
        # The images that are still shown are never dropped to make room.
        assert images == sum(item["type"] == "image" for turn in asked for item in turn["content"])
