"""Reads the samples of a `LaneOrder` from shards: for each lane one block in memory, and nothing else.

A reader has no state that matters. Asked for a chunk anywhere in the run it reads the blocks that hold it, so that
resuming is asking for the next chunk, in whatever process, and costs one block a lane.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.data.dataset import BadSample, SkipCount, require_bad_sample
from cloc_mllm.data.lanes import CYCLE, Block, Draw, LaneOrder
from cloc_mllm.data.readers import Sample, sample_name
from cloc_mllm.data.shards import SampleBlock, ShardReader, ShardSet
from cloc_mllm.errors import ClocError

BROKEN_BLOCKS = 16
"""So many blocks without a single whole sample are no matter of skipping any more."""

MakeItem = Callable[[Sample, str | None, str, Path | None, random.Random], dict[str, Any]]
"""Turns a raw sample into an item: gets its file, its name, the folder of its images and what to draw from."""


class ShardStream:
    """The samples of a run, from one source or a mixture.

    Args:
        sources: The sources.
        order: The order, made from their counts.
        make_item: What to make of each sample; `ClocError` if it is broken.
        seed: Seed of what is drawn from a sample.
        on_bad_sample: "error" stops at a broken sample; "skip" has another whole sample of the same block stand in and
            counts it (`skipped`).
    """

    def __init__(
        self,
        sources: Sequence[ShardSet],
        order: LaneOrder,
        make_item: MakeItem,
        *,
        seed: int = 0,
        on_bad_sample: BadSample = "error",
    ) -> None:
        require_bad_sample(on_bad_sample)
        self.sources, self.order, self.make_item = list(sources), order, make_item
        self.seed, self.on_bad_sample = seed, on_bad_sample
        self._skips = SkipCount()

    @property
    def skipped(self) -> int:
        """How often a broken sample was replaced by another, in this process and its workers."""
        return self._skips.total

    def describe(self) -> str:
        """What the order depends on besides the seed and the contents of the shards, wherever these are."""
        held = [
            f"{share}/{CYCLE} from {sum(source.counts)} samples in {len(source.counts)} files"
            for source, share in zip(self.sources, self.order.shares, strict=True)
        ]
        order = f"{self.order.lanes} lanes, chunks of {self.order.chunk}, blocks of {self.order.block}"
        return f"{order}, {' and '.join(held)}"

    def reader(self) -> ShardStreamReader:
        """A reader of chunks, for one worker."""
        return ShardStreamReader(self)

    def where(self, draw: Draw) -> str:
        """File and place of a sample, for messages."""
        return self.sources[draw.source].where(*self.order.sources[draw.source].locate(draw))

    def item(self, block: HeldBlock, draw: Draw, turn: int) -> dict[str, Any] | None:
        """The item of a sample, or of one of its block that stands in for it; None if all of them are broken."""
        others = len(block.turns) - 1
        # From half a block on, where the next ones of this batch are not.
        for step in range(others + 1):
            number = turn if step == 0 else turn + 1 + (others // 2 + step) % others
            try:
                return self._item(block, draw, block.turns[number % (others + 1)])
            except ClocError:
                if self.on_bad_sample == "error":
                    raise
                self._skips.add()
        return None

    def _item(self, block: HeldBlock, draw: Draw, number: int) -> dict[str, Any]:
        shard, piece, row, inner = block.find(number)
        raw = piece.sample(inner)
        file, place = piece.where(inner)
        rng = random.Random(f"{self.seed}-{draw.epoch}-{draw.source}-{shard}-{row}")
        return self.make_item(raw, file, sample_name(raw, place), piece.folder(inner), rng)


class HeldBlock:
    """A block in memory: the order of its samples, and each shard it lies in, with the first row and what was read."""

    def __init__(self, epoch: int, number: int, turns: list[int], pieces: list[tuple[int, int, SampleBlock]]) -> None:
        self.epoch, self.number, self.turns = epoch, number, turns
        self._pieces = pieces
        self._starts = [0]
        for _, _, piece in pieces:
            self._starts.append(self._starts[-1] + len(piece))

    def find(self, number: int) -> tuple[int, SampleBlock, int, int]:
        """The shard of a sample, the piece that holds it, its row in the shard, and its number in the piece."""
        at = bisect_right(self._starts, number) - 1
        shard, first, piece = self._pieces[at]
        inner = number - self._starts[at]
        return shard, piece, first + inner, inner


class ShardStreamReader:
    """Reads chunks, and holds the block that each lane is in.

    Args:
        stream: What to read.
    """

    def __init__(self, stream: ShardStream) -> None:
        self._stream = stream
        self._held: dict[tuple[int, int], HeldBlock] = {}
        self._open: dict[tuple[int, int], tuple[int, ShardReader]] = {}

    def chunk(self, number: int) -> list[dict[str, Any]]:
        """The items of one chunk of the run.

        Raises:
            ClocError: A shard cannot be read; or a sample is broken, and broken ones are errors.
        """
        return [self._next(draw) for draw in self._stream.order.draws(number)]

    def _next(self, draw: Draw) -> dict[str, Any]:
        block, turn = self._stream.order.sources[draw.source].block_of(draw.lane, draw.number)
        key = (draw.source, draw.lane)
        held = self._held.get(key)
        if held is None or (held.epoch, held.number) != (draw.epoch, block.number):
            self._held.pop(key, None)  # two blocks of one lane are never held together
            held = self._held[key] = self._read(draw, block)
        item = self._stream.item(held, draw, turn)
        if item is None:
            item = self._from_further_on(draw, block)
        if turn == block.length - 1:
            # Done with. At an epoch's end the lane may go on in another worker: what is held here would stay.
            del self._held[key]
        return item

    def _from_further_on(self, draw: Draw, block: Block) -> dict[str, Any]:
        """A whole sample of the blocks that follow one without any, which is short or in a bad place."""
        order = self._stream.order.sources[draw.source]
        for _ in range(BROKEN_BLOCKS):
            block = order.block_after(block)
            item = self._stream.item(self._read(draw, block), draw, 0)
            if item is not None:
                return item
        name, remedy = self._stream.sources[draw.source].name, "Run `cloc-mllm data check`."
        raise ClocError(f"{BROKEN_BLOCKS} blocks of samples in a row are all broken", file=name, remedy=remedy)

    def _read(self, draw: Draw, block: Block) -> HeldBlock:
        order = self._stream.order.sources[draw.source]
        pieces = [
            (shard, first, self._shard(draw, shard).block(first, after))
            for shard, first, after in order.pieces(draw.epoch, block)
        ]
        return HeldBlock(draw.epoch, block.number, order.permutation(draw.epoch, block), pieces)

    def _shard(self, draw: Draw, shard: int) -> ShardReader:
        key = (draw.source, draw.lane)
        if key not in self._open or self._open[key][0] != shard:
            self._open[key] = (shard, self._stream.sources[draw.source].open(shard))
        return self._open[key][1]
