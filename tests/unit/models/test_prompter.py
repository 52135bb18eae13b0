"""The Prompter's shared form against its plain twin, whatever prompts fall on which images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.models.configuration_cloc import ClocPrompterConfig
from cloc_mllm.models.prompter import ClocPrompter, PromptTable

WIDTH, PATCHES, SPACE = 16, 9, 8


def prompter(pooling: str, heads: int = 1) -> ClocPrompter:
    torch.manual_seed(0)
    config = ClocPrompterConfig(
        hidden_size=WIDTH, projection_dim=SPACE, num_attention_heads=heads, pooling=pooling, num_pos_feats=4
    )
    return ClocPrompter(config).double()


indices = st.integers(1, 5).flatmap(
    lambda images: st.tuples(st.just(images), st.lists(st.integers(0, images - 1), min_size=0, max_size=12))
)


@given(indices)
@settings(max_examples=60, deadline=None)
def test_the_table_holds_every_prompt_once(case: tuple[int, list[int]]) -> None:
    images, index = case
    table = PromptTable.of(torch.tensor(index, dtype=torch.long), images)
    prompts = torch.arange(len(index)).double()[:, None] + 1
    filled = table.fill(prompts)
    assert torch.equal(table.pick(filled), prompts)
    assert filled.sum() == prompts.sum()
    rows = table.of_rows(torch.arange(images))
    for number, image in enumerate(index):
        row = (filled[:, :, 0] == number + 1).nonzero()
        assert len(row) == 1
        assert rows[row[0, 0]] == image
    assert filled.shape[0] * filled.shape[1] <= 2 * max(1, len(index)), "mostly empty"


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pooling", ["mean", "prompt"])
@pytest.mark.parametrize("tokens_a_prompt", [1, 2])
@pytest.mark.parametrize(
    "index",
    [[0, 0, 1, 1, 2, 2], [2, 0, 2, 1], [1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]],
    ids=["full", "ragged and out of order", "one", "nearly all on one image"],
)
def test_sharing_changes_neither_values_nor_gradients(
    index: list[int], tokens_a_prompt: int, pooling: str, heads: int
) -> None:
    model = prompter(pooling, heads)
    image_index = torch.tensor(index)
    tokens = torch.randn(3, 1 + PATCHES, WIDTH, dtype=torch.float64, requires_grad=True)
    prompts = torch.randn(len(index), tokens_a_prompt, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(index), WIDTH, dtype=torch.float64)
    used = [tokens, prompts, *model.layer.parameters(), *model.layer_norm.parameters()]
    found = []
    for plain in (False, True):
        out = model(tokens, prompts, image_index, plain=plain)
        found.append((out, torch.autograd.grad((out * weight).sum(), used)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
    for ours, reference in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pooling", ["mean", "prompt"])
def test_no_prompt_gives_no_feature(pooling: str) -> None:
    model = prompter(pooling)
    none = torch.zeros(0, 2, WIDTH, dtype=torch.float64)
    out = model(torch.randn(3, 1 + PATCHES, WIDTH, dtype=torch.float64), none, torch.zeros(0, dtype=torch.long))
    assert out.shape == (0, WIDTH)


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    model = prompter("mean").train()
    tokens = torch.randn(2, 1 + PATCHES, WIDTH, dtype=torch.float64, requires_grad=True)
    prompts = model.embed_boxes(torch.rand(6, 4)).detach().double()
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing = True
            model._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                f, *a, use_reentrant=False
            )
        kept: list[int] = []

        def note(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = model(tokens, prompts, index)
        results.append((out, torch.autograd.grad(out.square().sum(), tokens)[0], max(kept)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-12)
    per_prompt = len(prompts) * PATCHES * WIDTH
    assert results[0][2] >= per_prompt, "the plain pass keeps every prompt's image tokens"
    assert results[1][2] < per_prompt


@pytest.mark.parametrize("pooling", ["mean", "prompt"])
@pytest.mark.parametrize("index", [[0, 0, 1, 1], [2, 0, 2, 1, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
def test_prompts_of_different_lengths_read_as_each_alone(index: list[int], pooling: str) -> None:
    """Padding is neither seen nor counted, and no gradient comes of it; an empty place of the table does no harm."""
    model = prompter(pooling, 2)
    lengths = [2 + number % 4 for number in range(len(index))]
    tokens = torch.randn(3, 1 + PATCHES, WIDTH, dtype=torch.float64, requires_grad=True)
    prompts = torch.randn(len(index), 5, WIDTH, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(5) >= torch.tensor(lengths)[:, None]
    together = model(tokens, prompts, torch.tensor(index), padding=padding)
    alone = torch.cat(
        [
            model(tokens[image][None], prompts[number, None, :length], torch.tensor([0]), plain=True)
            for number, (image, length) in enumerate(zip(index, lengths, strict=True))
        ]
    )
    torch.testing.assert_close(together, alone)
    weights = torch.randn_like(alone)
    ours = torch.autograd.grad((together * weights).sum(), [tokens, prompts])
    theirs = torch.autograd.grad((alone * weights).sum(), [tokens, prompts])
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted)
