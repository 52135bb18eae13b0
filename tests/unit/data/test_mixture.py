"""Mixtures: every source as often as its weight says, and a pass that is a function of seed, index and pass alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.data.dataset import ConversationDataset, SkipCount
from cloc_mllm.data.lengths import LETTERS_A_TOKEN, REGION_TOKENS, sample_length
from cloc_mllm.data.mixture import MixtureDataset
from cloc_mllm.errors import ClocError
from tests.builders_training import write_conversations


class Source:
    """A data set whose items tell index and pass; sample k has k images and 10 k tokens."""

    on_bad_sample = "skip"

    def __init__(self, length: int, skipped: int = 0) -> None:
        self.length, self.skips = length, SkipCount()
        for _ in range(skipped):
            self.skips.add()

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        return {"own": index, "epoch": epoch}

    def where(self, index: int) -> tuple[str, str]:
        return f"file of {self.length}", f"sample {index}"

    def lengths(self, image_tokens: Any, epoch: int = 0) -> Any:
        return np.stack([np.arange(self.length), 10 * np.arange(self.length)], axis=1)

    @property
    def skipped(self) -> int:
        return self.skips.total


weights = st.sampled_from([0.2, 0.5, 1.0, 1.25, 2.0, 3.0, 3.4])


@given(
    sources=st.lists(st.tuples(st.integers(5, 30), weights), min_size=1, max_size=4),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 7),
)
def test_every_source_is_seen_as_often_as_its_weight_says(
    sources: list[tuple[int, float]], seed: int, epoch: int
) -> None:
    mixture = MixtureDataset([Source(n) for n, _ in sources], [w for _, w in sources], seed=seed)
    again = MixtureDataset([Source(n) for n, _ in sources], [w for _, w in sources], seed=seed)
    seen: list[Counter[int]] = [Counter() for _ in sources]
    draws: list[set[tuple[int, int]]] = [set() for _ in sources]
    lengths = mixture.lengths(1, epoch)
    assert lengths.shape == (len(mixture), 2)
    for index in range(len(mixture)):
        source, inner, own_pass = mixture.locate(index, epoch)
        assert again.locate(index, epoch) == (source, inner, own_pass)
        assert mixture.item(index, epoch) == {"own": inner, "epoch": own_pass, "index": index}
        assert mixture.where_at(index, epoch) == (f"file of {sources[source][0]}", f"sample {inner}")
        assert lengths[index].tolist() == [inner, 10 * inner]
        seen[source][inner] += 1
        draws[source].add((inner, own_pass))
    for (length, weight), counted, drawn in zip(sources, seen, draws, strict=True):
        whole = math.floor(weight)
        assert counted.total() == whole * length + round((weight - whole) * length)
        assert len(drawn) == counted.total(), "a sample was drawn twice in the same way"
        assert all(whole <= counted[k] <= whole + 1 for k in range(length))


def test_a_fifth_a_pass_is_another_fifth_until_all_is_seen() -> None:
    mixture = MixtureDataset([Source(20), Source(7)], [0.2, 1.0], seed=3)
    passes = [{mixture.item(k, epoch)["own"] for k in range(4)} for epoch in range(5)]
    assert set.union(*passes) == set(range(20))
    assert all(len(one) == 4 for one in passes)
    assert passes[0] != set(range(4)), "the fifth is not drawn at all"
    other = MixtureDataset([Source(20), Source(7)], [0.2, 1.0], seed=4)
    assert [other.item(k, 0)["own"] for k in range(4)] != [mixture.item(k, 0)["own"] for k in range(4)]


def test_counts_are_told_and_skips_are_summed() -> None:
    mixture = MixtureDataset([Source(1000, 2), Source(10, 1)], [3, 0.2], names=["grit", "vg"])
    assert mixture.describe() == ["grit: 1,000 samples x 3 = 3,000 a pass", "vg: 10 samples x 0.2 = 2 a pass"]
    assert mixture.skipped == 3
    mixture.skips.add()
    assert mixture.skipped == 4
    assert mixture.on_bad_sample == "skip"


def test_what_makes_no_mixture_is_refused() -> None:
    with pytest.raises(ClocError, match="leaves none of its 2 samples"):
        MixtureDataset([Source(2)], [0.1])
    with pytest.raises(ClocError, match="1 sources with 2 weights"):
        MixtureDataset([Source(2)], [1, 1])


def test_lengths_are_told_without_decoding_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:50])  # the header, and next to none of the pixels
    said = {"from": "gpt", "value": "x" * 40}
    llava = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\n" + "y" * 20}, said]}
    text = round(60 / LETTERS_A_TOKEN)
    assert sample_length(llava, tmp_path, 576) == (1, 576 + text)
    assert sample_length(llava, tmp_path, lambda width, height: width * height) == (1, 600 + text)
    assert sample_length({**llava, "width": 7, "height": 3}, None, lambda w, h: w * h) == (1, 21 + text)
    items = [
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "z" * 12},
        {"type": "region", "box": [0] * 4},
    ]
    assert sample_length({"messages": [{"role": "user", "content": items}]}, None, 9) == (1, 9 + 3 + REGION_TOKENS)
    assert sample_length({"messages": [{"role": "user", "content": "w" * 8}]}, None, 9) == (0, 2)
    assert sample_length({"image": "a.png", "caption": "c" * 16, "regions": []}, None, 5) == (1, 9)
    for broken in ({"messages": None}, {"conversations": [{"value": 3}]}, {"messages": [3]}):
        assert sample_length(broken, None, 5) == (0, 0)


def test_estimates_are_near_what_the_processor_makes(tmp_path: Path) -> None:
    data = ConversationDataset(write_conversations(tmp_path, 30))
    lengths = data.lengths(100)
    assert lengths.shape == (30, 2)
    for index in range(30):
        shown = sum(i["type"] == "image" for m in data[index]["messages"] for i in m["content"])
        assert lengths[index, 0] == shown
        assert 100 * shown < lengths[index, 1] < 100 * shown + 60
    assert data.lengths(100) is lengths, "the file was read again"
