"""The order in which a stream reads its shards: a pure function of seed and position, computed without listing samples.

**Epochs.** A source has shards of c_0, …, c_{S-1} samples, T in all. Epoch e permutes the shards by (seed, e), lays
their samples end to end, and turns this circle of T by an offset of (seed, e), so that what an epoch has to leave out,
and where its lanes and blocks begin, is another part of the data each time.

**Lanes.** L lanes read the circle from L places at once: lane l has a range of consecutive samples, which may begin and
end inside a shard. Inside a lane, samples come in blocks of B, each in a permutation of (seed, e, l, block); the first
block of lane l is shorter by ⌊l·B / L⌋, so that lanes do not all come to the end of a block at once. What anybody has
to hold is a block for each lane it reads, at most L·B samples over all processes, whatever T is. What anybody has to
know is the S lengths.

**Chunks.** Samples are dealt in chunks of u from one lane; a batch of G samples is K = G / u chunks, and K divides L.

* *One source.* An epoch is ⌊T / G⌋ whole batches, C = K·⌊T / G⌋ chunks, so that no batch has an image twice (in a
  contrastive batch its copy would be a negative). Chunk k belongs to epoch e = ⌊k / C⌋ and is, with k' = k mod C,
  number ⌊k' / L⌋ of lane k' mod L. Lane l has ⌈(C - l) / L⌉ chunks; the lanes' ranges follow each other on the circle.
* *A mixture.* Chunk k is number ⌊k / L⌋ of lane k mod L for the whole run. The t-th sample of a lane comes from a
  source drawn without replacement: every cycle of 1,024 samples of a lane holds each source as often as its weight
  says, in a permutation of (seed, lane, cycle); so how many came from a source before t is one look-up. Each source has
  its own epochs, in which every lane has ⌊T / L⌋ of its samples (fewer than L are left out each time). A batch may span
  two epochs of a source, as their ends do not coincide.

**Processes and workers.** With micro-batches of c·u samples, W processes and n workers each, process r's m-th
micro-batch is the chunks (m·W + r)·c, …, (m·W + r)·c + c - 1, and its worker m mod n makes it. Two chunks of one lane
(and, of one source, one epoch) are a multiple of L apart. If c·n·W divides L, that is a multiple of c·n·W, so that the
same worker of the same process makes them both: every lane is read by exactly one worker, and no shard is read twice
but where lanes meet. As the order itself knows nothing of W and n, batches are the same for all that divide.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloc_mllm.errors import ClocError

CYCLE = 1024
"""Samples of a lane in which the sources of a mixture stand exactly in the ratio of their weights."""


@dataclass(frozen=True)
class Draw:
    """One sample as the order knows it: the `number`-th that a lane takes from a source in an epoch."""

    source: int
    epoch: int
    lane: int
    number: int


@dataclass(frozen=True)
class Block:
    """Samples of a lane that are read at once and shuffled: `length` from the lane's `first` on."""

    lane: int
    number: int
    first: int
    length: int


@dataclass(frozen=True)
class _Circle:
    """Shards in the order of an epoch, the place where each begins, and by how much the circle is turned."""

    shards: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    offset: int


class SourceOrder:
    """The order of one source: where the `number`-th sample of a lane stands in an epoch.

    Args:
        counts: Samples of each shard.
        units: The epoch is dealt to the lanes in so many units, as evenly as they divide …
        unit: … of so many samples each; `units * unit` is at most the sum of `counts`.
        lanes: L.
        block: B.
        seed: Text or number that the permutations are seeded with.
    """

    def __init__(
        self, counts: Sequence[int], *, units: int, unit: int, lanes: int, block: int, seed: int | str
    ) -> None:
        self._counts = np.asarray(counts, np.int64)
        self.samples = int(self._counts.sum())
        self.block = block
        self._units, self._unit, self._lanes, self._seed = units, unit, lanes, seed
        self._circles: dict[int, _Circle] = {}

    def lane_range(self, lane: int) -> tuple[int, int]:
        """First place and number of samples of a lane in every epoch."""
        each, more = divmod(self._units, self._lanes)
        return self._unit * (lane * each + min(lane, more)), self._unit * (each + (lane < more))

    def block_of(self, lane: int, number: int) -> tuple[Block, int]:
        """The block that holds the `number`-th sample of a lane, and the sample's turn in it."""
        early = lane * self.block // self._lanes
        block = (number + early) // self.block
        first = max(0, block * self.block - early)
        after = min((block + 1) * self.block - early, self.lane_range(lane)[1])
        return Block(lane, block, first, after - first), number - first

    def block_after(self, block: Block) -> Block:
        """The next block of the same lane, or the first of the next lane that has any."""
        lane, number = block.lane, block.first + block.length
        while number >= self.lane_range(lane)[1]:
            lane, number = (lane + 1) % self._lanes, 0
        return self.block_of(lane, number)[0]

    def permutation(self, epoch: int, block: Block) -> list[int]:
        """The order of the samples of a block: which of them has the k-th turn."""
        rng = random.Random(f"{self._seed}-{epoch}-{block.lane}-{block.number}")
        return rng.sample(range(block.length), block.length)

    def pieces(self, epoch: int, block: Block) -> list[tuple[int, int, int]]:
        """The shards that hold a block, each with its first row and the row after its last, in reading order."""
        circle = self._circle(epoch)
        place, left = (self.lane_range(block.lane)[0] + block.first + circle.offset) % self.samples, block.length
        found = []
        while left:
            at = int(np.searchsorted(circle.starts, place, side="right")) - 1
            shard, first = int(circle.shards[at]), place - int(circle.starts[at])
            taken = min(left, int(self._counts[shard]) - first)
            found.append((shard, first, first + taken))
            left, place = left - taken, (place + taken) % self.samples
        return found

    def locate(self, draw: Draw) -> tuple[int, int]:
        """Shard and row of a sample."""
        block, turn = self.block_of(draw.lane, draw.number)
        place = self.permutation(draw.epoch, block)[turn]
        for shard, first, after in self.pieces(draw.epoch, block):
            if place < after - first:
                return shard, first + place
            place -= after - first
        raise IndexError(draw)

    def _circle(self, epoch: int) -> _Circle:
        if epoch not in self._circles:
            rng = random.Random(f"{self._seed}-{epoch}")
            shards = np.asarray(rng.sample(range(len(self._counts)), len(self._counts)), np.int64)
            shards = shards[self._counts[shards] > 0]
            starts = np.cumsum(self._counts[shards]) - self._counts[shards]
            # Lanes may be an epoch apart where there are several sources; more than two are never needed at a time.
            self._circles = {k: v for k, v in self._circles.items() if abs(k - epoch) == 1}
            self._circles[epoch] = _Circle(shards, starts, rng.randrange(self.samples))
        return self._circles[epoch]


class LaneOrder:
    """The order of a whole run over one source or several.

    Args:
        sources: For each source the number of samples in each of its shards.
        weights: How often each source is drawn from, in any unit; not looked at if there is but one source.
        names: What to call the sources in errors.
        batch: G, samples in a global batch.
        lanes: L.
        chunk: u; None for the smallest with which a batch takes from at most an eighth of the lanes, which leaves the
            rest to further processes and workers.
        block: B.
        seed: Seed of everything.

    Attributes:
        chunk: u.
        shares: How often each source is drawn from in a cycle of `CYCLE` samples.
        samples: Samples in all sources together.
        batches_per_epoch: Batches in a pass over the one source, or over as many samples as all sources have.

    Raises:
        ClocError: There are too few samples, or numbers that do not divide.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        names: Sequence[str],
        batch: int,
        lanes: int,
        chunk: int | None,
        block: int,
        seed: int,
    ) -> None:
        self.lanes, self.batch, self.block = lanes, batch, block
        self.chunk = batch // math.gcd(batch, lanes // math.gcd(lanes, 8)) if chunk is None else chunk
        self._require_divisible()
        totals = [sum(counts) for counts in sources]
        self.samples = sum(totals)
        self.batches_per_epoch = self.samples // batch
        self._mixture = _Mixture(weights, names, seed) if len(sources) > 1 else None
        self.shares = [CYCLE] if self._mixture is None else self._mixture.shares
        if self._mixture is None and totals[0] < batch:
            remedy = f"Use run.batch_size={max(1, totals[0])} or less, or more data."
            raise ClocError(f"holds {totals[0]} samples, fewer than one batch of {batch}", file=names[0], remedy=remedy)
        for total, name in zip(totals, names, strict=True):
            if self._mixture is not None and total < lanes:
                remedy = f"Use data.lanes={max(1, total)} or less, or more data."
                raise ClocError(
                    f"holds {total} samples, fewer than one for each of {lanes} lanes", file=name, remedy=remedy
                )
        self._chunks_per_epoch = batch // self.chunk * self.batches_per_epoch
        self.sources = [
            SourceOrder(
                counts,
                units=self._chunks_per_epoch if self._mixture is None else total // lanes * lanes,
                unit=self.chunk if self._mixture is None else 1,
                lanes=lanes,
                block=block,
                seed=f"{seed}-{number}",
            )
            for number, (counts, total) in enumerate(zip(sources, totals, strict=True))
        ]

    def _require_divisible(self) -> None:
        if self.batch % self.chunk:
            remedy = "Choose data.chunk to divide run.batch_size, or null."
            raise ClocError(f"data.chunk {self.chunk} does not divide run.batch_size {self.batch}", remedy=remedy)
        if self.lanes % (self.batch // self.chunk):
            raise ClocError(
                f"a batch of {self.batch} is {self.batch // self.chunk} chunks of {self.chunk}, which do not divide "
                f"data.lanes {self.lanes}",
                remedy="Choose data.lanes to be a multiple of run.batch_size / data.chunk, or data.chunk=null.",
            )

    def require_split(self, micro_batch: int, world_size: int, workers: int) -> int:
        """Check that every lane falls to exactly one worker of one process.

        Args:
            micro_batch: Samples a process takes at once.
            world_size: Number of processes.
            workers: Workers of each; 0 counts as 1.

        Returns:
            Chunks in a micro-batch.

        Raises:
            ClocError: It does not.
        """
        if micro_batch % self.chunk:
            remedy = (
                f"Use fewer processes or a larger run.micro_batch_size, or start the run with data.chunk={micro_batch} "
                "(which changes the order) or with more data.lanes."
            )
            problem = f"a process's micro-batch of {micro_batch} samples is no multiple of the chunk of {self.chunk}"
            raise ClocError(problem, remedy=remedy)
        chunks = micro_batch // self.chunk
        readers = chunks * world_size * max(1, workers)
        if self.lanes % readers:
            raise ClocError(
                f"data.lanes {self.lanes} cannot be dealt out evenly: {world_size} processes with {max(1, workers)} "
                f"workers take {readers} chunks at once",
                remedy=f"Use another run.workers, or start the run with data.lanes={math.lcm(self.lanes, readers)}.",
            )
        return chunks

    def draws(self, chunk: int) -> list[Draw]:
        """The samples of one chunk of the run, in order."""
        if self._mixture is None:
            epoch, inner = divmod(chunk, self._chunks_per_epoch)
            round_, lane = divmod(inner, self.lanes)
            return [Draw(0, epoch, lane, round_ * self.chunk + k) for k in range(self.chunk)]
        round_, lane = divmod(chunk, self.lanes)
        found = []
        for time in range(round_ * self.chunk, (round_ + 1) * self.chunk):
            source, number = self._mixture.draw(lane, time)
            epoch, inner = divmod(number, self.sources[source].lane_range(lane)[1])
            found.append(Draw(source, epoch, lane, inner))
        return found


class _Mixture:
    """Which source each sample of a lane comes from."""

    def __init__(self, weights: Sequence[float], names: Sequence[str], seed: int) -> None:
        self.shares = cycle_shares(weights)
        for share, name in zip(self.shares, names, strict=True):
            if share == 0:
                problem = f"its weight is less than 1 in {2 * CYCLE} of all: it would never be drawn from"
                raise ClocError(problem, file=name, remedy="Give it a larger weight, or leave it out.")
        self._seed = seed
        # For each lane the cycle it is in; looked up again and again while the others take their turns.
        self._cycles: dict[int, tuple[int, npt.NDArray[np.int16], npt.NDArray[np.int16]]] = {}

    def draw(self, lane: int, time: int) -> tuple[int, int]:
        """Source of a lane's `time`-th sample, and how many samples the lane has taken from that source before."""
        cycle, place = divmod(time, CYCLE)
        if self._cycles.get(lane, (-1,))[0] != cycle:
            self._cycles[lane] = (cycle, *self._lay_out(lane, cycle))
        _, order, before = self._cycles[lane]
        source = int(order[place])
        return source, cycle * self.shares[source] + int(before[place])

    def _lay_out(self, lane: int, cycle: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
        """Sources in the order of a cycle, and for each how often it stood before."""
        drawn = [source for source, share in enumerate(self.shares) for _ in range(share)]
        random.Random(f"{self._seed}-mixture-{lane}-{cycle}").shuffle(drawn)
        order = np.asarray(drawn, np.int16)
        before = np.zeros(CYCLE, np.int16)
        for source in range(len(self.shares)):
            own = order == source
            before[own] = np.arange(int(own.sum()))
        return order, before


def cycle_shares(weights: Sequence[float]) -> list[int]:
    """How often each source stands in a cycle: weights as whole numbers that sum to `CYCLE`, by largest remainders."""
    exact = [CYCLE * weight / sum(weights) for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: CYCLE - sum(shares)]:
        shares[k] += 1
    return shares
