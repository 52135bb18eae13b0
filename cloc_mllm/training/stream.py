"""The order in which samples are seen: a pure function of seed and position, so that a resumed run sees the rest of it.

`StepStream` turns a map-style dataset into one long map-style dataset of exactly `steps x global_batch` items. Position
alone decides epoch, order and sampled regions; nothing depends on how many processes read it, on workers, or on where a
run was interrupted.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.data import Dataset

from cloc_mllm.errors import ClocError
from cloc_mllm.training.config import BatchPlan


class StepStream(Dataset):
    """All samples of a run, in order.

    Every epoch is a new permutation, cut to whole batches, so that no batch holds an image twice (in a contrastive
    batch its copy would be a negative). What one epoch leaves out, another one has.

    Args:
        dataset: Map-style; if it has `set_epoch`, it is told the epoch before each item.
        plan: The batch arithmetic.
        steps: Optimiser steps; ``None`` derives them from `epochs`.
        epochs: Passes over the data.
        seed: Seed of the permutations.
        name: What to call the data in errors.

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
        self.steps_per_epoch = len(dataset) // plan.global_batch
        self.steps = steps if steps is not None else max(1, round((epochs or 1) * self.steps_per_epoch))

    def __len__(self) -> int:
        return self.steps * self.plan.global_batch

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch and the index into the dataset of one position."""
        epoch, offset = divmod(position, self.steps_per_epoch * self.plan.global_batch)
        return epoch, int(_permutation(len(self.dataset), self.seed, epoch)[offset])

    def __getitem__(self, position: int) -> Any:
        epoch, index = self.locate(position)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        return self.dataset[index]

    def positions(self, micro_step: int, rank: int) -> range:
        """Return the positions that one process reads in its n-th micro-step since the start of the run.

        Args:
            micro_step: Counted over the whole run, accumulation steps included.
            rank: The process.
        """
        start = (micro_step * self.plan.world_size + rank) * self.plan.micro_batch
        return range(start, start + self.plan.micro_batch)


@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (2**63))
    return torch.randperm(length, generator=generator)
