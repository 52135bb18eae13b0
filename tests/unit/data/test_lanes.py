"""The order of a stream: each sample once an epoch, the same over any processes and workers, mixtures as weighted."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.data.lanes import CYCLE, LaneOrder, cycle_shares
from cloc_mllm.errors import ClocError

Place = tuple[int, int, int, int]
"""Source, epoch, shard, row."""

counts = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda found: sum(found) >= 24)
# Batches that are chunks of a number that divides the lanes.
shapes = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sampled_from([4, 8, 16]))


def order_of(sources: list[list[int]], weights: list[float] | None = None, **changes: Any) -> LaneOrder:
    options: dict[str, Any] = {"batch": 4, "lanes": 4, "chunk": 1, "block": 5, "seed": 0}
    return LaneOrder(
        sources, weights or [1.0] * len(sources), names=[f"source{k}" for k in range(len(sources))], **options | changes
    )


def places(order: LaneOrder, chunk: int) -> list[Place]:
    return [(draw.source, draw.epoch, *order.sources[draw.source].locate(draw)) for draw in order.draws(chunk)]


@given(counts=counts, shape=shapes, block=st.integers(1, 40), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_each_sample_at_most_once_and_leaves_out_less_than_a_batch(
    counts: list[int], shape: tuple[int, int, int], block: int, seed: int
) -> None:
    chunks, chunk, lanes = shape
    batch = chunks * chunk
    order = order_of([counts], batch=batch, chunk=chunk, lanes=lanes, block=block, seed=seed)
    per_epoch = sum(counts) // batch * chunks
    for epoch in range(2):
        seen = [place for k in range(epoch * per_epoch, (epoch + 1) * per_epoch) for place in places(order, k)]
        assert {place[:2] for place in seen} == {(0, epoch)}
        assert len(set(seen)) == len(seen) == sum(counts) // batch * batch
        assert all(0 <= row < counts[shard] for *_, shard, row in seen)


@given(counts=counts, block=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_lane_reads_forwards_and_shuffles_within_blocks_only(counts: list[int], block: int) -> None:
    order = order_of([counts], block=block, lanes=4, batch=4)
    source = order.sources[0]
    for lane in range(4):
        length = source.lane_range(lane)[1]
        by_block: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        read: list[tuple[int, int]] = []
        for number in range(length):
            held, turn = source.block_of(lane, number)
            assert held.length <= block
            assert turn == len(by_block[held])
            draw = next(d for k in range(lane, 4 * length, 4) for d in order.draws(k) if d.number == number)
            by_block[held].append(source.locate(draw))
        for held, found in by_block.items():
            rows = [(shard, row) for shard, a, b in source.pieces(0, held) for row in range(a, b)]
            assert sorted(found) == sorted(rows), "a block is not what is read for it"
            read += rows
        # Laid end to end the blocks are one walk along shards: within a shard every row follows the one before.
        steps = [b[1] - a[1] for a, b in pairwise(read) if a[0] == b[0]]
        assert all(step == 1 or step == 1 - counts[read[0][0]] for step in steps)
        assert len(read) == length
    assert sum(source.lane_range(lane)[1] for lane in range(4)) == sum(counts) // 4 * 4


splits = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))


@given(counts=counts, split=splits, chunk=st.integers(1, 2), start=st.integers(0, 7), mixed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_batches_are_the_same_over_any_processes_and_workers_and_each_lane_has_one_reader(
    counts: list[int], split: tuple[int, int, int], chunk: int, start: int, mixed: bool
) -> None:
    world, workers, accumulation = split
    lanes, batch = 16, 8 * chunk
    sources = [counts, [40, 3]] if mixed else [counts]
    order = order_of(sources, [3.0, 1.0][: len(sources)], batch=batch, chunk=chunk, lanes=lanes, block=7)
    micro = batch // world // accumulation
    each = order.require_split(micro, world, workers) if lanes % (8 // accumulation * workers) == 0 else 0
    if not each:
        return
    readers: dict[Any, set[tuple[int, int]]] = defaultdict(set)
    for step in range(start, start + 4):
        seen: list[Place] = []
        for window in range(accumulation):
            micro_step = step * accumulation + window
            for rank in range(world):
                for k in range((micro_step * world + rank) * each, (micro_step * world + rank + 1) * each):
                    seen += places(order, k)
                    for draw in order.draws(k):
                        worker = (micro_step - start * accumulation) % workers
                        epoch = draw.epoch if not mixed else 0
                        readers[draw.source, epoch, draw.lane].add((rank, worker))
        assert seen == [place for k in range(step * 8, (step + 1) * 8) for place in places(order, k)]
    assert all(len(found) == 1 for found in readers.values()), "a lane has two readers"


@given(weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=5), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_mixture_is_exact_in_every_cycle(weights: list[float], seed: int) -> None:
    sizes = [[200], [90, 30], [64], [300], [70]][: len(weights)]
    shares = cycle_shares(weights)
    assert sum(shares) == CYCLE
    assert all(abs(share - CYCLE * w / sum(weights)) < 1 for share, w in zip(shares, weights, strict=True))
    order = order_of(sizes, weights, batch=8, chunk=8, lanes=2, seed=seed)
    for cycle in (0, 1):
        chunks = range(cycle * CYCLE // 8 * 2, (cycle + 1) * CYCLE // 8 * 2, 2)  # those of lane 0
        drawn = Counter(draw.source for k in chunks for draw in order.draws(k))
        assert [drawn[k] for k in range(len(weights))] == shares


def test_sources_of_a_mixture_have_their_own_epochs() -> None:
    order = order_of([[10, 7], [30]], [3.0, 1.0], batch=4, lanes=4, chunk=2)
    seen: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for k in range(400):
        for place in places(order, k):
            seen[place[:2]].append(place)
    reached = [order.draws(k)[-1] for k in range(300, 400)]  # all lanes are beyond the epochs of these samples
    for (source, epoch), found in seen.items():
        assert len(set(found)) == len(found), "a sample twice in an epoch"
        if epoch < min(draw.epoch for draw in reached if draw.source == source):
            assert len(found) == {0: 16, 1: 28}[source], "as many as divide over the lanes"
    epochs = {source: max(epoch for s, epoch in seen if s == source) for source in (0, 1)}
    assert epochs[0] > 3 * epochs[1] > 3


def test_what_an_epoch_leaves_out_and_the_order_change_with_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[Place]:
        order = order_of([[23]], seed=seed, chunk=1)
        return [(0, 0, *place[2:]) for k in range(20 * number, 20 * number + 20) for place in places(order, k)]

    found = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert len({tuple(order) for order in found}) == 3
    assert epoch(0, 1) == found[1]
    left = [frozenset(range(23)) - {row for *_, row in epoch(0, number)} for number in range(12)]
    assert len(frozenset().union(*left)) > 12, "some samples of the only shard would hardly ever be seen"


def test_nothing_grows_with_the_number_of_samples() -> None:
    """A million million samples in ten shards: an order that listed them would not come back."""
    order = order_of([[10**11] * 10], batch=1024, chunk=None, lanes=64)
    far = 10**9
    assert len({place for k in range(far, far + 64) for place in places(order, k)}) == 64 * order.chunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 3}, "data.chunk 3 does not divide run.batch_size 4"),
        ({"batch": 6, "chunk": 1}, "which do not divide data.lanes 4"),
        ({"batch": 40}, "holds 30 samples, fewer than one batch of 40"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClocError, match=message) as caught:
        order_of([[10, 20]], **{"chunk": None, **changes})
    assert caught.value.remedy


def test_splits_that_do_not_fit_are_refused_with_what_would() -> None:
    order = order_of([[100]], batch=64, chunk=None, lanes=64)
    assert order.chunk == 8
    assert [order.require_split(64 // world, world, 8) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ClocError, match="no multiple of the chunk of 8"):
        order.require_split(4, 16, 0)
    with pytest.raises(ClocError, match=r"1 processes with 16 workers take 128 chunks.*data\.lanes=128"):
        order.require_split(64, 1, 16)
    with pytest.raises(ClocError, match="source1: holds 3 samples, fewer than one for each of 4 lanes"):
        order_of([[10], [3]])
    with pytest.raises(ClocError, match="source1: its weight is less than"):
        order_of([[10], [10]], [1.0, 1e-5])


@given(batch=st.integers(1, 400), lanes=st.integers(1, 400))
def test_the_default_chunk_always_fits(batch: int, lanes: int) -> None:
    order = order_of([[1000]], batch=batch, lanes=lanes, chunk=None)
    assert batch % order.chunk == 0
    assert lanes % (batch // order.chunk) == 0
    assert lanes % 8 or math.gcd(batch, lanes // 8) == batch // order.chunk
