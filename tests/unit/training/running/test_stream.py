"""The order of samples: whole batches, no repetition within an epoch, the same however many processes read."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.tar_shards import TarFile
from cloc_mllm.data.tar_writer import WebDatasetWriter
from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import PretrainConfig, load_config, plan_batch, write_config
from cloc_mllm.training.pretraining.pretrain_data import training_stream
from cloc_mllm.training.running.launch import World
from cloc_mllm.training.running.stream import LaneStream, StepStream, TrainLoader
from tests.builders_training import CONFIGS, TINY_ENCODER, write_regions


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


class Ids:
    """Makes a batch of what tells items apart."""

    def __call__(self, items: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
        return [(item["id"], item["caption"], str(item["regions"])) for item in items]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 samples in six tar shards."""
    folder = tmp_path_factory.mktemp("shards")
    source = open_samples(write_regions(folder / "json", 70, size=24))
    with WebDatasetWriter(folder / "tar", shard=13) as writer:
        for k in range(len(source)):
            writer.write(source[k], source.folder(k))
    return folder / "tar"


def preset(folder: Path | str, *overrides: str) -> PretrainConfig:
    words = (f"data.train={folder}", "run.batch_size=8", "run.steps=20", "data.lanes=32", "data.shuffle_block=4")
    config = load_config(CONFIGS / "pretrain_quick.yaml", [*TINY_ENCODER, *words, *overrides])
    assert isinstance(config, PretrainConfig)
    return config


def steps_of(config: PretrainConfig, world_size: int, first: int, last: int) -> list[list[Any]]:
    """What all processes together read for some steps, each through a loader of its own that is then left alone."""
    seen: list[list[Any]] = [[] for _ in range(first, last)]
    for rank in range(world_size):
        plan = plan_batch(config.run.batch_size, config.run.micro_batch_size, world_size)
        stream = training_stream(config, plan, World(rank, rank, world_size, world_size, True))
        loader = TrainLoader(stream, Ids(), rank, lambda: first * plan.accumulation, workers=config.run.workers)  # noqa: B023
        assert len(loader) == 20 * plan.accumulation
        batches = iter(loader)
        for step in seen:
            for _ in range(plan.accumulation):
                step += next(batches)
        del batches  # the workers have read ahead by now, and die
    return [sorted(step) for step in seen]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_run_stopped_and_resumed_over_other_workers_and_processes_sees_the_rest(shards: Path, streaming: str) -> None:
    def reading(world_size: int, workers: int, first: int, last: int, *overrides: str) -> list[list[Any]]:
        config = preset(shards, f"data.streaming={streaming}", f"run.workers={workers}", *overrides)
        return steps_of(config, world_size, first, last)

    whole = reading(1, 0, 0, 20)
    assert reading(1, 2, 0, 7) + reading(2, 1, 7, 12) + reading(2, 2, 12, 14) + reading(1, 0, 14, 20) == whole
    assert reading(2, 0, 3, 11, "run.micro_batch_size=2") == whole[3:11]
    for epoch in (0, 8):
        ids = [identity for step in whole[epoch : epoch + 8] for identity, *_ in step]
        assert len(set(ids)) == len(ids) == 64, "an epoch is 8 whole batches of 70 samples"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_broken_sample_reaches_the_main_process_as_what_it_is(tmp_path: Path, streaming: str, workers: int) -> None:
    folder = write_regions(tmp_path, 16)
    text = (folder / "regions.jsonl").read_text().replace('"images/5.png"', '"images/none.png"')
    (folder / "regions.jsonl").write_text(text)
    plan, world = plan_batch(8, None, 1), World(0, 0, 1, 1, True)
    words = (f"data.streaming={streaming}", f"run.workers={workers}", "run.steps=4")
    loader = TrainLoader(training_stream(preset(folder, *words), plan, world), Ids(), 0, lambda: 0, workers=workers)
    with pytest.raises(ClocError, match="does not exist") as caught:
        list(loader)
    assert caught.value.sample == "s5 (line 6)"
    assert caught.value.file == str(folder / "regions.jsonl")
    stream = training_stream(preset(folder, *words, "data.on_bad_sample=skip"), plan, world)
    batches = list(TrainLoader(stream, Ids(), 0, lambda: 0, workers=workers))
    assert [len(batch) for batch in batches] == [8] * 4
    assert stream.skipped == 2, "once an epoch"
    assert not any(identity == "s5" for batch in batches for identity, *_ in batch)


def test_samples_of_a_micro_batch_are_named(shards: Path) -> None:
    config, plan = preset(shards), plan_batch(8, None, 2)
    stream = training_stream(config, plan, World(1, 1, 2, 2, True))
    (batch,) = islice(TrainLoader(stream, Ids(), 1, lambda: 5), 1)
    named = [str(name) for name in stream.names(5, 1)]
    assert len(named) == len(batch) == 4
    for name, (identity, *_) in zip(named, batch, strict=True):
        file, place = name.split(": ")
        number = [TarFile(file).where(k)[1] for k in range(len(TarFile(file)))].index(place)
        assert TarFile(file)[number]["id"] == identity


def test_what_is_streamed_and_what_is_not(shards: Path, tmp_path: Path) -> None:
    plan, world = plan_batch(8, None, 1), World(0, 0, 1, 1, True)
    lines = write_regions(tmp_path, 40)

    def kind(*overrides: str) -> type:
        return type(training_stream(preset(*overrides), plan, world))

    assert kind(str(shards)) is LaneStream
    assert kind(f"{shards}/*-0000[12].tar") is LaneStream
    assert kind(str(lines)) is StepStream
    assert kind(str(lines), "data.streaming=true") is LaneStream
    mixture = f"[{{path: {lines}, weight: 2}}, {{path: {shards}}}]"
    assert kind(mixture) is LaneStream
    write_config(preset(mixture), tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == preset(mixture)
    with pytest.raises(ClocError, match="is a mixture, which is streamed"):
        preset(f"[{{path: {lines}}}, {{path: {shards}}}]", "data.streaming=false")
    with pytest.raises(ClocError, match="names no data"):
        preset("[]")


def test_a_run_is_not_resumed_with_another_order(shards: Path, tmp_path: Path) -> None:
    def keep(resumed: bool, *overrides: str) -> None:
        stream = training_stream(preset(shards, *overrides), plan_batch(8, None, 1), World(0, 0, 1, 1, True))
        assert isinstance(stream, LaneStream)
        stream.keep_order(tmp_path, resumed=resumed, write=True)

    keep(False)
    keep(True, "run.workers=2")
    assert "from 70 samples in 6 files" in (tmp_path / "stream.json").read_text()
    shutil.copytree(shards, tmp_path / "moved")
    keep(True, f"data.train={tmp_path / 'moved'}")
    with pytest.raises(ClocError, match=r"had 32 lanes, chunks of 2, blocks of 4,.*has 32 .* blocks of 8,"):
        keep(True, "data.shuffle_block=8")
    with pytest.raises(ClocError, match=r"stream\.json"):
        keep(True, f"data.train=[{{path: {shards}}}, {{path: {shards}}}]")
    keep(False, "data.shuffle_block=8")


def test_epochs_set_the_number_of_steps_of_a_stream(shards: Path) -> None:
    plan, world = plan_batch(8, None, 1), World(0, 0, 1, 1, True)
    assert training_stream(preset(shards, "run.steps=null", "run.epochs=2.5"), plan, world).steps == 20
    mixture = f"[{{path: {shards}, weight: 9}}, {{path: {shards}}}]"
    assert training_stream(preset(mixture, "run.steps=null", "run.epochs=1"), plan, world).steps == 140 // 8
