"""The order of samples: whole batches, no repetition within an epoch, the same however many processes read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.training.config import plan_batch
from cloc_mllm.training.stream import StepStream


class Recorder:
    """A data set whose items tell the epoch they were read in."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, epoch: int) -> tuple[int, int]:
        return epoch, index


@given(length=st.integers(4, 40), batch=st.integers(1, 4), steps=st.integers(1, 30), seed=st.integers(0, 5))
def test_epochs_are_permutations_cut_to_whole_batches(length: int, batch: int, steps: int, seed: int) -> None:
    stream = StepStream(Recorder(length), plan_batch(batch, None, 1), steps=steps, seed=seed)
    items = [stream[position] for position in range(len(stream))]
    assert len(items) == steps * batch
    for step in range(steps):
        of_step = items[step * batch : (step + 1) * batch]
        assert len({epoch for epoch, _ in of_step}) == 1, "a batch spans two epochs"
        assert of_step[0][0] == step // (length // batch)
    for epoch in {epoch for epoch, _ in items}:
        indices = [index for e, index in items if e == epoch]
        assert len(set(indices)) == len(indices)


@given(micro=st.integers(1, 3), accumulation=st.integers(1, 3), world=st.integers(1, 4), step=st.integers(0, 5))
def test_processes_share_each_step_without_gap_or_overlap(micro: int, accumulation: int, world: int, step: int) -> None:
    plan = plan_batch(micro * accumulation * world, micro, world)
    stream = StepStream(Recorder(100), plan, steps=6)
    read = [
        position
        for window in range(accumulation)
        for rank in range(world)
        for position in stream.positions(step * accumulation + window, rank)
    ]
    assert sorted(read) == list(range(step * plan.global_batch, (step + 1) * plan.global_batch))


def test_seeds_and_epochs_order_differently() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        stream = StepStream(Recorder(64), plan_batch(8, None, 1), steps=16, seed=seed)
        return [stream[position][1] for position in range(epoch * 64, (epoch + 1) * 64)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(each) for each in orders}) == 3
    assert order(0, 1) == orders[1]


def test_epochs_set_the_number_of_steps() -> None:
    plan = plan_batch(4, None, 1)
    assert StepStream(Recorder(19), plan, epochs=2).steps == 8
    assert StepStream(Recorder(19), plan, epochs=0.01).steps == 1


def test_fewer_samples_than_a_batch_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ClocError, match=r"holds 3 samples, fewer than one batch of 4\. Use run\.batch_size=3"):
        StepStream(Recorder(3), plan_batch(4, None, 1), steps=1)
