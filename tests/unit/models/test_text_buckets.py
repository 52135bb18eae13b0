"""Texts encoded by length: the same embeddings, in the same order, in a number of calls that does not vary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.models.text_buckets import encode_in_buckets
from tests.builders import tiny_cloc

TEXTS = ["a", "a red circle left of a blue square", "two stars", "where is the small red ring", "yes", "no one"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.sampled_from([1, 4, 8]))
@settings(max_examples=80, deadline=None)
def test_every_text_comes_back_in_its_place(lengths: list[int], buckets: int, multiple: int) -> None:
    widths: list[int] = []
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(length) + 10 * (row + 1)

    def encode(some: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        widths.append(some.shape[1])
        return (some * mask).sum(dim=1, keepdim=True).double()

    out = encode_in_buckets(encode, ids, (ids > 0).long(), buckets, multiple, longest=10)
    assert out[:, 0].tolist() == ids.sum(dim=1).tolist()
    assert len(widths) == buckets
    assert all(width % multiple == 0 or width == 10 for width in widths)
    assert widths[: min(buckets, len(lengths))] == sorted(widths[: min(buckets, len(lengths))])


@pytest.mark.parametrize(("buckets", "multiple"), [(3, 1), (2, 8), (8, 1)])
def test_the_encoder_gives_the_same_embeddings_and_gradients(buckets: int, multiple: int) -> None:
    model, processor = tiny_cloc(kind=None)
    model.double()
    texts = processor.tokenize(TEXTS)
    pixels = torch.randn(1, 3, 32, 32)
    found = []
    for model.text_buckets, model.text_multiple_of in ((1, 1), (buckets, multiple)):
        out = model(pixels, **texts).text_embeds
        weight = torch.arange(out.numel()).double().view_as(out).cos()
        found.append((out, torch.autograd.grad((out * weight).sum(), list(model.text_model.parameters()))))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-12)
    for ours, reference in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
