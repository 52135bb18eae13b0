"""Packing: a packed batch means what its conversations mean one by one, to the loss, the boxes and every gradient."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from cloc_mllm.models.packed_attention import BLOCKS, packed_inputs
from cloc_mllm.models.packing import pack_rows, packed_tensors, sequence_numbers
from cloc_mllm.objectives import grounding_loss
from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_llm, tiny_mllm, user

TALKS = [
    [user("how many?"), assistant("two")],
    [user(image(1), text("where?")), grounding_turn()],
    [
        user(image(2), text("what is "), region(3, 4, 20, 25), text("?")),
        assistant("a ring"),
        user("and?"),
        assistant("no"),
    ],
    [
        user(image(3), image(4), text("which is "), region(1, 2, 9, 9, image=0)),
        grounding_turn("blue star", (1, 2, 9, 9)),
    ],
    [user("hello"), assistant("well, well"), user("again"), assistant("a red circle")],
    [user(image(5), text("look")), assistant("a blue star"), user("where?"), grounding_turn("a", (0, 0, 30, 20))],
]
FAMILIES = [
    ("llama", False, "eager"),
    ("llama", True, "sdpa"),
    ("llama", True, BLOCKS),
    ("qwen2", True, "eager"),
    ("qwen2", False, "sdpa"),
    ("qwen2", False, BLOCKS),
]

indices = st.lists(st.integers(0, len(TALKS) - 1), min_size=1, max_size=6)


@functools.lru_cache
def mllm(family: str, tied: bool, attention: str) -> tuple[Any, Any]:
    model, processor = tiny_mllm(family, tied=tied)
    model.model.language_model.set_attn_implementation(attention)
    return model.train(), processor


def queries(phrases: list[str], width: int) -> torch.Tensor:
    """Made-up text embeddings, the same for the same phrase."""
    rows = [torch.randn(width, generator=torch.Generator().manual_seed(len(p))) for p in phrases]
    return torch.stack(rows) if rows else torch.zeros(0, width)


def objective(model: Any, batch: Any, tokens: int, grounds: int) -> tuple[torch.Tensor, Any]:
    """Language loss by all tokens plus the sum of box losses by all `<ground>`."""
    fed = model_inputs(batch)
    fed["ground_queries"] = queries(batch["ground_phrases"], model.config.grounding_config.projection_dim)
    output = model(**fed, num_items_in_batch=tokens)
    loss, mine = output.loss, len(batch["ground_phrases"])
    for boxes in (output.pred_boxes, output.text_prompted_boxes):
        if mine:
            loss = loss + grounding_loss(boxes, batch["ground_boxes"], kind="l1_giou") * mine / grounds
    return loss, output


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("family", "tied", "attention"), FAMILIES)
@settings(max_examples=5, deadline=None)
@given(chosen=indices, spare=st.integers(0, 60))
@example(chosen=[0, 0, 3, 4, 5], spare=0)
def test_packed_equals_separate(family: str, tied: bool, attention: str, chosen: list[int], spare: int) -> None:
    model, processor = mllm(family, tied, attention)
    alone = [processor.encode([TALKS[k]], return_labels=True) for k in chosen]
    lengths = [one["input_ids"].shape[1] for one in alone]
    rows = pack_rows(lengths, max(lengths) + spare)
    packed = processor.encode(
        [TALKS[k] for k in chosen], return_labels=True, packing=True, pack_length=max(lengths) + spare
    )
    assert packed["input_ids"].shape == packed["position_ids"].shape
    assert len(packed["input_ids"]) == len(rows)
    assert "attention_mask" not in packed
    tokens = sum(int((one["labels"][:, 1:] != -100).sum()) for one in alone)
    assert int((packed["labels"] != -100).sum()) == tokens
    grounds = sum(len(one["ground_phrases"]) for one in alone)
    loss, output = objective(model, packed, tokens, grounds)
    loss.backward()
    together = gradients(model)
    total, boxes = torch.zeros(()), []
    for k in [k for row in rows for k in row]:
        part, out = objective(model, alone[k], tokens, grounds)
        part.backward()
        total, boxes = total + part.detach(), [*boxes, out.pred_boxes.detach()]
    torch.testing.assert_close(loss.detach(), total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.pred_boxes.detach(), torch.cat(boxes), atol=1e-5, rtol=1e-5)
    for name, wanted in gradients(model).items():
        # Sums over many tokens, in another order: measured by the largest entry.
        largest = max(1.0, float(wanted.abs().max()))
        assert float((together[name] - wanted).abs().max()) < 1e-5 * largest, name


@pytest.mark.parametrize("attention", ["sdpa", BLOCKS])
def test_a_neighbour_changes_nothing_to_the_last_bit(attention: str) -> None:
    """Also with a model whose configuration asks for a cache, which would turn the blocks off."""
    model, processor = mllm("llama", True, attention)
    assert model.config.text_config.use_cache
    other = [
        user(image(9), text("look")),
        assistant("a blue star"),
        user("where?"),
        grounding_turn("a", (0, 0, 30, 20)),
    ]
    seen = []
    for neighbour in (TALKS[5], other):
        batch = processor.encode([neighbour, TALKS[1]], return_labels=True, packing=True, pack_length=999)
        output = model(**model_inputs(batch))
        mine = sequence_numbers(batch["position_ids"])[0] == 1
        seen.append((output.logits[0, mine], output.pred_boxes[1], output.pred_boxes[0]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1]), "a <ground> looked at its neighbour's image"
    assert not torch.equal(seen[0][2], seen[1][2]), "the neighbour did not change, so this shows nothing"


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_blocks_keep_a_sliding_window(family: str) -> None:
    """Transformers' own mask of blocks and windows is the oracle."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_llm(family).config)
    config.sliding_window = 5
    llm = AutoModel.from_config(config).eval()
    positions = torch.cat([torch.arange(n) for n in (11, 3, 8)] + [torch.arange(n) for n in (4, 18)]).view(2, 22)
    embeds = torch.randn(2, 22, 32)
    with torch.no_grad():
        llm.set_attn_implementation("sdpa")
        wanted = llm(inputs_embeds=embeds, position_ids=positions, **packed_inputs(llm, positions)).last_hidden_state
        llm.set_attn_implementation(BLOCKS)
        found = llm(inputs_embeds=embeds, position_ids=positions, **packed_inputs(llm, positions)).last_hidden_state
        unpacked = llm(inputs_embeds=embeds[:, :18], use_cache=False).last_hidden_state
        llm.set_attn_implementation("sdpa")
        plain = llm(inputs_embeds=embeds[:, :18], use_cache=False).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(unpacked, plain), "a batch that is not packed is sdpa's"


def test_layers_that_do_not_pass_the_bounds_on_are_told() -> None:
    model, _ = tiny_mllm()
    llm = model.model.language_model
    llm.set_attn_implementation(BLOCKS)
    positions = torch.arange(12)[None] % 6
    inputs = packed_inputs(llm, positions)
    assert inputs.pop("block_bounds") == [[0, 6, 12]]
    with pytest.raises(ValueError, match="is not told where the blocks of packed rows are"):
        llm(inputs_embeds=torch.randn(1, 12, 32), position_ids=positions, **inputs)


def test_activation_checkpointing_keeps_the_blocks() -> None:
    model, processor = tiny_mllm()
    batch = model_inputs(processor.encode(TALKS, return_labels=True, packing=True, pack_length=200))
    plain = model.train()(**batch).loss
    plain.backward()
    before = gradients(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again = model(**batch).loss
    again.backward()
    torch.testing.assert_close(again, plain)
    for name, wanted in gradients(model).items():
        torch.testing.assert_close(before[name], wanted, atol=1e-6, rtol=1e-4, msg=name)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), capacity=st.one_of(st.none(), st.integers(1, 120))
)
def test_rows_hold_every_sequence_once_and_never_too_much(lengths: list[int], capacity: int | None) -> None:
    rows = pack_rows(lengths, capacity)
    limit = max(capacity or 0, max(lengths))
    assert sorted(k for row in rows for k in row) == list(range(len(lengths)))
    assert all(sum(lengths[k] for k in row) <= limit for row in rows)
    places = len(rows) * max(sum(lengths[k] for k in row) for row in rows)
    assert sum(lengths) <= places <= len(lengths) * max(lengths), "more than padding takes"
    first_fit: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [r for r, used in enumerate(first_fit) if used + length <= limit]
        if fits:
            first_fit[fits[0]] += length
        else:
            first_fit.append(length)
    assert places <= len(first_fit) * max(first_fit)
    assert rows == pack_rows(lengths, capacity)


def test_rows_are_made_alike() -> None:
    assert pack_rows([4, 4, 2, 2], 8) == [[0, 2], [1, 3]]
    assert pack_rows([10, 1, 1], 5) == [[0], [1, 2]]
    assert pack_rows([3] * 8, 11) == [[0, 4], [1, 5], [2, 6], [3, 7]], "three rows of nine have an empty place"


def test_what_cannot_be_packed_is_refused() -> None:
    _, processor = tiny_mllm()
    for options in ({"add_generation_prompt": True}, {"padding_side": "left"}):
        with pytest.raises(ValueError, match="packed conversations are for training"):
            processor.encode([TALKS[0]], packing=True, **options)
    with pytest.raises(ValueError, match="at least one token"):
        pack_rows([3, 0])


def test_positions_start_again_and_no_first_token_is_learnt() -> None:
    made = packed_tensors([[5, 6], [7, 8, 9], [4]], [[5, 6], [7, -100, 9], [4]], [[0, 1], [2]], pad_id=0)
    assert made["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]]
    assert made["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert made["labels"].tolist() == [[-100, 6, -100, -100, 9], [-100] * 5]
    assert sequence_numbers(made["position_ids"]).tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
