"""Several data sets as one, each seen as often as its weight says.

A pass over the mixture holds a source with weight 3 three times and one with weight 0.2 a fifth of its samples: the
next fifth of one fixed, seeded permutation at each pass, so that five passes have seen all of it. What an index means
is a function of index, pass and seed, so nothing has to be saved to resume.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from cloc_mllm.data.dataset import SkipCount
from cloc_mllm.errors import ClocError


class MixtureDataset(Dataset[dict[str, Any]]):
    """Map-style data sets with weights.

    Args:
        sources: Each with `item(index, epoch)`, as `ConversationDataset` has.
        weights: How often each is seen in a pass; above 0.
        names: What to call each, for messages.
        seed: Seed of which samples a pass takes where the weight is not whole.

    Raises:
        ClocError: There is no source, numbers differ, or a source has no sample in a pass.
    """

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float], names: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise ClocError(f"a mixture of {len(sources)} sources with {len(weights)} weights")
        self.sources, self.weights, self.seed = list(sources), list(weights), seed
        self.names = list(names or [f"source {k}" for k in range(len(sources))])
        self._whole = [math.floor(weight) for weight in weights]
        self._rest = [
            round((weight - whole) * len(source))
            for weight, whole, source in zip(weights, self._whole, sources, strict=True)
        ]
        self.counts = [
            whole * len(source) + rest
            for source, whole, rest in zip(self.sources, self._whole, self._rest, strict=True)
        ]
        for name, count, weight, source in zip(self.names, self.counts, weights, sources, strict=True):
            if count == 0:
                raise ClocError(
                    f"a weight of {weight:g} leaves none of its {len(source)} samples in a pass",
                    file=name,
                    remedy=f"Use at least {1 / len(source):.2g}, or leave the source out.",
                )
        self._starts = np.cumsum([0, *self.counts]).tolist()
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._epoch = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def set_epoch(self, epoch: int) -> None:
        """Says which pass over the data this is, for access by index alone."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self._epoch)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """The item at an index in a given pass; `index` in it counts within the mixture."""
        source, inner, own_pass = self.locate(index, epoch)
        return {**self.sources[source].item(inner, own_pass), "index": index}

    def locate(self, index: int, epoch: int) -> tuple[int, int, int]:
        """What an index means in a given pass.

        Returns:
            The number of the source, the index in it, and which time its samples are drawn from: a source that is
            seen three times a pass draws anew each time.
        """
        index = range(len(self))[index]
        source = bisect_right(self._starts, index) - 1
        offset, length, whole = index - self._starts[source], len(self.sources[source]), self._whole[source]
        times = whole + (self._rest[source] > 0)
        if offset < whole * length:
            return source, offset % length, epoch * times + offset // length
        first = epoch * self._rest[source]
        place = (first + offset - whole * length) % length
        return source, int(self._order(source)[place]), epoch * times + whole

    def _order(self, source: int) -> npt.NDArray[np.int64]:
        if source not in self._orders:
            self._orders[source] = np.random.default_rng([self.seed, source]).permutation(len(self.sources[source]))
        return self._orders[source]

    def lengths(self, image_tokens: Any, epoch: int) -> npt.NDArray[np.int64]:
        """See `ConversationDataset.lengths`: (N, 2) in the order of indices in a given pass."""
        parts = []
        for k, dataset in enumerate(self.sources):
            own = dataset.lengths(image_tokens)
            places = (epoch * self._rest[k] + np.arange(self._rest[k])) % len(dataset)
            rest = own[self._order(k)[places]] if self._rest[k] else own[:0]
            parts.append(np.concatenate([np.tile(own, (self._whole[k], 1)), rest]))
        return np.concatenate(parts)

    def where_at(self, index: int, epoch: int) -> tuple[str | None, str]:
        """File and name of the sample that an index means in a given pass, for messages."""
        source, inner, _ = self.locate(index, epoch)
        found: tuple[str | None, str] = self.sources[source].where(inner)
        return found

    @property
    def on_bad_sample(self) -> str:
        """What happens to a broken sample; the same in all sources."""
        return str(self.sources[0].on_bad_sample)

    @property
    def skips(self) -> SkipCount:
        """Where samples that a batch had to leave out are counted."""
        found: SkipCount = self.sources[0].skips
        return found

    @property
    def skipped(self) -> int:
        """How often a broken sample was left out or replaced, in this process and its workers."""
        return sum(source.skipped for source in self.sources)

    def describe(self) -> list[str]:
        """One line a source: its samples, its weight, and the samples of it in a pass."""
        return [
            f"{name}: {len(source):,} samples x {weight:g} = {count:,} a pass"
            for name, source, weight, count in zip(self.names, self.sources, self.weights, self.counts, strict=True)
        ]
