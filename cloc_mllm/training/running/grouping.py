"""Samples of like length in a batch, so that little of it is padding, in an order that the seed decides alone.

An epoch's permutation is taken in windows of so many steps. The samples of a window are sorted and dealt out to its
steps, longest first within each, and the steps of the window are shuffled. So every sample stays within its window,
a pass holds the samples it held before, and neighbours (the micro-batches and processes of a step) are alike. As
LLaVA's sampler, which sorts within one step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cloc_mllm.data.lengths import TokensOfImage


class Grouping:
    """How samples are grouped.

    Args:
        dataset: Map-style, with `lengths(image_tokens, epoch)`: images and tokens of every index, (N, 2).
        image_tokens: What an image takes.
        by_modality: Whether samples without an image are kept apart from the others.
        steps: Steps whose samples are sorted with each other.
        seed: Seed of the order of a window's steps.
    """

    def __init__(
        self, dataset: Any, image_tokens: TokensOfImage, by_modality: bool = False, steps: int = 16, seed: int = 0
    ) -> None:
        self.dataset, self.image_tokens = dataset, image_tokens
        self.by_modality, self.steps, self.seed = by_modality, steps, seed
        self._lengths: tuple[int, npt.NDArray[np.int64]] | None = None

    def lengths(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return images and tokens of every index in a pass, (N, 2)."""
        if self._lengths is None or self._lengths[0] != epoch:
            self._lengths = epoch, self.dataset.lengths(self.image_tokens, epoch)
        return self._lengths[1]

    def order(self, permutation: torch.Tensor, batch: int, epoch: int) -> torch.Tensor:
        """Return a pass's indices, grouped.

        Args:
            permutation: The pass's indices, (N,), in order; those behind the last whole batch stay where they are.
            batch: Samples a step: the global batch.
            epoch: Which pass it is.
        """
        found = self.lengths(epoch)
        # Longest first; samples with an image before those without.
        key = -found[:, 1] + (found[:, 0] == 0) * self.by_modality * (1 + int(found[:, 1].max(initial=0)))
        drawn = np.random.default_rng([self.seed, epoch])
        indices = permutation.numpy()
        whole = len(indices) // batch * batch
        parts = []
        for start in range(0, whole, self.steps * batch):
            window = indices[start : min(start + self.steps * batch, whole)]
            steps = window[np.argsort(key[window], kind="stable")].reshape(-1, batch)
            parts.append(steps[drawn.permutation(len(steps))].reshape(-1))
        return torch.from_numpy(np.concatenate([*parts, indices[whole:]]))
