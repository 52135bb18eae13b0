"""Grouping: the same samples a pass, alike within a step, whatever the number of processes and interruptions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.training.presets.config import plan_batch
from cloc_mllm.training.running.grouping import Grouping
from cloc_mllm.training.running.stream import StepStream


class Lengths:
    """A data set of nothing but lengths; every fifth sample has no image."""

    def __init__(self, length: int, seed: int = 0) -> None:
        tokens = np.random.default_rng(seed).integers(1, 500, length)
        self.known = np.stack([(np.arange(length) % 5 > 0).astype(np.int64), tokens], axis=1)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.known)

    def item(self, index: int, epoch: int) -> tuple[int, int]:
        return epoch, index

    def lengths(self, image_tokens: Any, epoch: int = 0) -> Any:
        self.asked.append(epoch)
        return self.known


def stream(
    data: Lengths, plan: Any, steps: int, by_modality: bool = False, window: int = 4, seed: int = 0
) -> StepStream:
    grouping = Grouping(data, 1, by_modality, window, seed)
    return StepStream(data, plan, steps=steps, seed=seed, grouping=grouping)


def batches(ordered: StepStream) -> list[list[int]]:
    size = ordered.plan.global_batch
    return [[ordered[k][1] for k in range(s * size, (s + 1) * size)] for s in range(ordered.steps)]


@given(
    length=st.integers(8, 90),
    batch=st.integers(1, 8),
    window=st.integers(1, 6),
    by_modality=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_pass_holds_the_samples_it_held_before(
    length: int, batch: int, window: int, by_modality: bool, seed: int
) -> None:
    plan, data = plan_batch(batch, None, 1), Lengths(length)
    steps = length // batch
    plain = batches(StepStream(data, plan, steps=2 * steps, seed=seed))
    grouped = batches(stream(data, plan, 2 * steps, by_modality, window, seed))
    for first in (0, steps):
        mine, theirs = (Counter(k for b in found[first : first + steps] for k in b) for found in (grouped, plain))
        assert mine == theirs
        # No sample leaves its window, so a group never reaches over more than `window` steps.
        for start in range(first, first + steps, window):
            end = min(start + window, first + steps)
            assert {k for b in grouped[start:end] for k in b} == {k for b in plain[start:end] for k in b}
    assert max(data.asked) <= 1


def padding(data: Lengths, found: list[list[int]]) -> float:
    longest = sum(max(data.known[k, 1] for k in batch) * len(batch) for batch in found)
    return 1 - sum(data.known[k, 1] for batch in found for k in batch) / longest


def test_grouped_batches_have_little_padding() -> None:
    data, plan = Lengths(512), plan_batch(8, None, 1)
    assert padding(data, batches(StepStream(data, plan, steps=64))) > 0.35
    assert padding(data, batches(stream(data, plan, 64, window=16))) < 0.06
    # Within a step alone, what is spared is between its micro-batches.
    accumulated = stream(data, plan_batch(64, 8, 1), 8, window=1)
    micro = [[data_index for _, data_index in items] for items in accumulated.micro_batches(0, 0, 1)]
    assert padding(data, micro) < 0.15


def test_modalities_share_a_batch_at_most_once_a_window() -> None:
    data, plan = Lengths(400), plan_batch(8, None, 1)
    has_image = data.known[:, 0] > 0

    def mixed(found: list[list[int]]) -> int:
        return sum(len({bool(has_image[k]) for k in batch}) == 2 for batch in found)

    assert mixed(batches(stream(data, plan, 50, window=10))) > 10
    assert mixed(batches(stream(data, plan, 50, by_modality=True, window=10))) <= 5


def test_steps_of_a_window_are_shuffled() -> None:
    data, plan = Lengths(320), plan_batch(8, None, 1)
    first = [data.known[batch, 1].mean() for batch in batches(stream(data, plan, 40, window=40))]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)
    assert batches(stream(data, plan, 40, seed=1)) != batches(stream(data, plan, 40, seed=2))


@pytest.mark.parametrize(("micro", "world"), [(4, 1), (2, 2), (1, 4), (1, 1)])
def test_processes_see_the_same_steps_and_equal_work(micro: int, world: int) -> None:
    data, steps = Lengths(64), 32
    reference = batches(stream(data, plan_batch(4, None, 1), steps))
    plan = plan_batch(4, micro, world)
    ordered = stream(data, plan, steps)
    read = [list(ordered.micro_batches(rank, 0, 1)) for rank in range(world)]
    for step in range(steps):
        windows = range(step * plan.accumulation, (step + 1) * plan.accumulation)
        found = [index for window in windows for rank in range(world) for _, index in read[rank][window]]
        assert found == reference[step]
        lengths = data.known[found, 1].tolist()
        assert lengths == sorted(lengths, reverse=True), "neighbours are not alike"


def test_a_resumed_stream_sees_what_has_not_been_seen() -> None:
    data, plan = Lengths(60), plan_batch(6, 3, 2)
    whole = list(stream(data, plan, 20).micro_batches(1, 0, 1))
    rest = list(stream(data, plan, 20).micro_batches(1, 7, 1))
    assert rest == whole[7:]
