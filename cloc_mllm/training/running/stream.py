"""The samples of a run in the order in which they are seen: a pure function of seed and position.

Whatever the data, a run is a row of `steps x accumulation` micro-batches on each process, and a stream says which
samples each of them holds; so a resumed run, in whatever process and worker, sees exactly what has not been seen yet.
`StepStream` orders a map-style dataset by permutations, which takes 8 bytes a sample; `LaneStream` streams shards with
constant memory (the order is :mod:`cloc_mllm.data.lanes`'). `TrainLoader` reads either.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from cloc_mllm.data.streaming import ShardStream
from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import BatchPlan
from cloc_mllm.training.running import launch
from cloc_mllm.training.running.grouping import Grouping

Item = Any


@dataclass(frozen=True)
class SampleName:
    """What a sample is called: its number in the training data if it has one, its id or place, and its file."""

    index: int | None
    file: str | None
    name: str | None

    def __str__(self) -> str:
        known = " in ".join(part for part in (self.name, self.file) if part)
        if self.index is None:
            return known
        return f"{self.index} ({known})" if known else str(self.index)


class SampleStream(Protocol):
    """What a trainer needs of its training samples."""

    plan: BatchPlan
    steps: int
    steps_per_epoch: int
    dataset: Any

    def micro_batches(self, rank: int, first: int, stride: int) -> Iterator[list[Item]]:
        """Yield a process's micro-batches `first`, `first + stride`, … to the end of the run, as lists of items."""
        ...

    def names(self, micro_step: int, rank: int) -> Iterator[SampleName]:
        """Yield what the samples of a micro-batch are called, for messages."""
        ...

    @property
    def skipped(self) -> int | None:
        """How often another sample stood in for a broken one, on this process; ``None`` if that is an error."""
        ...


class StepStream(Dataset):
    """All samples of a run, in order.

    Every epoch is a new permutation, cut to whole batches, so that no batch holds an image twice (in a contrastive
    batch its copy would be a negative). What one epoch leaves out, another one has.

    Args:
        dataset: Map-style; if it has `item(index, epoch)`, that is what items are taken from.
        plan: The batch arithmetic.
        steps: Optimiser steps; ``None`` derives them from `epochs`.
        epochs: Passes over the data.
        seed: Seed of the permutations.
        name: What to call the data in errors.
        grouping: Puts samples of like length into a step; ``None``: as they come.

    Raises:
        ClocError: The dataset is smaller than one batch.
    """

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        seed: int = 0,
        name: str = "the training data",
        grouping: Grouping | None = None,
    ) -> None:
        if len(dataset) < plan.global_batch:
            raise ClocError(
                f"holds {len(dataset)} samples, fewer than one batch of {plan.global_batch}",
                file=name,
                remedy=f"Use run.batch_size={max(1, len(dataset))} or less, or more data.",
            )
        self.dataset = dataset
        self.plan = plan
        self.seed = seed
        self.grouping = grouping
        self._grouped: tuple[int, torch.Tensor] | None = None
        self.steps_per_epoch = len(dataset) // plan.global_batch
        self.steps = steps if steps is not None else max(1, round((epochs or 1) * self.steps_per_epoch))

    def __len__(self) -> int:
        return self.steps * self.plan.global_batch

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch and the index into the dataset of one position."""
        epoch, offset = divmod(position, self.steps_per_epoch * self.plan.global_batch)
        return epoch, int(self._order(epoch)[offset])

    def _order(self, epoch: int) -> torch.Tensor:
        order = _permutation(len(self.dataset), self.seed, epoch)
        if self.grouping is None:
            return order
        if self._grouped is None or self._grouped[0] != epoch:
            self._grouped = epoch, self.grouping.order(order, self.plan.global_batch, epoch)
        return self._grouped[1]

    def __getitem__(self, position: int) -> Any:
        epoch, index = self.locate(position)
        return self.dataset.item(index, epoch) if hasattr(self.dataset, "item") else self.dataset[index]

    def positions(self, micro_step: int, rank: int) -> range:
        """Return the positions that one process reads in its n-th micro-step since the start of the run.

        Args:
            micro_step: Counted over the whole run, accumulation steps included.
            rank: The process.
        """
        start = (micro_step * self.plan.world_size + rank) * self.plan.micro_batch
        return range(start, start + self.plan.micro_batch)

    def micro_batches(self, rank: int, first: int, stride: int) -> Iterator[list[Item]]:
        """See `SampleStream`."""
        for micro_step in range(first, self.steps * self.plan.accumulation, stride):
            yield [self[position] for position in self.positions(micro_step, rank)]

    def names(self, micro_step: int, rank: int) -> Iterator[SampleName]:
        """See `SampleStream`."""
        where, where_at = getattr(self.dataset, "where", None), getattr(self.dataset, "where_at", None)
        for position in self.positions(micro_step, rank):
            epoch, index = self.locate(position)
            file, name = None, None
            if where_at is not None:
                file, name = where_at(index, epoch)
            elif where is not None:
                file, name = where(index)
            yield SampleName(index, file, name)

    @property
    def skipped(self) -> int | None:
        """See `SampleStream`."""
        return self.dataset.skipped if getattr(self.dataset, "on_bad_sample", "error") == "skip" else None


@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (2**63))
    return torch.randperm(length, generator=generator)


class LaneStream:
    """All samples of a run, streamed from shards.

    Args:
        data: The shards and their order.
        plan: The batch arithmetic.
        steps: Optimiser steps; ``None`` derives them from `epochs`.
        epochs: Passes over the data; in a mixture, over as many samples as all sources have.
        workers: Loader workers of each process.

    Raises:
        ClocError: Processes and workers do not divide the lanes.
    """

    def __init__(
        self,
        data: ShardStream,
        plan: BatchPlan,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        workers: int = 0,
    ) -> None:
        self.data, self.plan = data, plan
        self._chunks = data.order.require_split(plan.micro_batch, plan.world_size, workers)
        self.steps_per_epoch = max(1, data.order.batches_per_epoch)
        self.steps = steps if steps is not None else max(1, round((epochs or 1) * self.steps_per_epoch))
        self.dataset = range(data.order.samples)

    def __len__(self) -> int:
        return self.steps * self.plan.global_batch

    def chunks(self, micro_step: int, rank: int) -> range:
        """Return the chunks of one process's n-th micro-batch since the start of the run."""
        start = (micro_step * self.plan.world_size + rank) * self._chunks
        return range(start, start + self._chunks)

    def micro_batches(self, rank: int, first: int, stride: int) -> Iterator[list[Item]]:
        """See `SampleStream`."""
        reader = self.data.reader()
        for micro_step in range(first, self.steps * self.plan.accumulation, stride):
            yield [item for chunk in self.chunks(micro_step, rank) for item in reader.chunk(chunk)]

    def names(self, micro_step: int, rank: int) -> Iterator[SampleName]:
        """See `SampleStream`."""
        for chunk in self.chunks(micro_step, rank):
            for draw in self.data.order.draws(chunk):
                yield SampleName(None, None, self.data.where(draw))

    @property
    def skipped(self) -> int | None:
        """See `SampleStream`."""
        return self.data.skipped if self.data.on_bad_sample == "skip" else None

    def keep_order(self, folder: Path, *, resumed: bool, write: bool) -> None:
        """Note in the run folder what the order depends on, or see that it still is what was noted; on every process.

        Args:
            folder: The run folder.
            resumed: Whether the run goes on from a checkpoint.
            write: Whether this process writes.

        Raises:
            ClocError: The run is resumed with another order: samples would be seen twice or never.
        """
        keep_order(folder, self.data.describe(), resumed=resumed, write=write)


def keep_order(folder: Path, order: Any, *, resumed: bool, write: bool) -> None:
    """Note in a run folder what the order of samples depends on, or see that it still is what was noted.

    Every process has to call this.

    Args:
        folder: The run folder.
        order: What it depends on, as JSON has it.
        resumed: Whether the run goes on from a checkpoint.
        write: Whether this process writes.

    Raises:
        ClocError: The run is resumed with another order: samples would be seen twice or never.
    """
    path = folder / ORDER_FILE
    if resumed and path.exists() and (noted := json.loads(path.read_text(encoding="utf-8"))["order"]) != order:
        raise ClocError(
            f"the stream had {noted}, and has {order} now",
            file=path,
            remedy="Set data.* and run.batch_size as they were, or start a new run from the checkpoint's weights.",
        )
    launch.barrier()  # nobody may still be reading
    if write:
        written = path.with_suffix(".part")
        written.write_text(json.dumps({"order": order}, indent=1) + "\n", encoding="utf-8")
        written.replace(path)


ORDER_FILE = "stream.json"


class TrainLoader:
    """One process's micro-batches, from where the run stands to its end, collated in worker processes or in this one.

    transformers' Trainer takes it as it is. A `DataLoader` of its own making would go through accelerate, which splits
    or dispatches what is already split, and would resume by reading what has been seen.

    Args:
        stream: The samples.
        collate: Makes a batch of a list of items.
        rank: The process.
        start: Returns the number of the next micro-batch; asked whenever iteration begins.
        workers: Worker processes; 0 for none.
        pin_memory: Whether batches are put into pinned memory.
    """

    def __init__(
        self,
        stream: SampleStream,
        collate: Callable[[Sequence[Item]], Any],
        rank: int,
        start: Callable[[], int],
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = stream
        self._collate, self._rank, self._start = collate, rank, start
        self._workers, self._pin_memory = workers, pin_memory

    def __len__(self) -> int:
        return self.dataset.steps * self.dataset.plan.accumulation

    def __iter__(self) -> Iterator[Any]:
        loader: DataLoader = DataLoader(
            _MicroBatches(self.dataset, self._collate, self._rank, self._start()),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            # Its own: an iterator draws from it, and the run's random state must not know whether it was resumed.
            generator=torch.Generator().manual_seed(0),
        )
        for batch in loader:
            if isinstance(batch, _Refusal):
                raise batch.error()
            yield batch


class _MicroBatches(IterableDataset):
    """A worker's share: `DataLoader` takes batches from its workers in turn, so worker w of n makes every n-th one."""

    def __init__(self, stream: SampleStream, collate: Callable[[Sequence[Item]], Any], rank: int, start: int) -> None:
        self._stream, self._collate, self._rank, self._first = stream, collate, rank, start

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for items in self._stream.micro_batches(self._rank, self._first + number, stride):
                yield self._collate(items)
        except ClocError as error:
            # As a value: an exception would reach the main process as the text of a traceback.
            yield _Refusal(error)


class _Refusal:
    """A `ClocError` on its way from a worker to the main process."""

    def __init__(self, error: ClocError) -> None:
        self._problem = error.problem
        self._details = {"file": error.file, "sample": error.sample, "remedy": error.remedy}

    def error(self) -> ClocError:
        return ClocError(self._problem, **self._details)


def _as_it_is(batch: Any) -> Any:
    return batch
