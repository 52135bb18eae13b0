"""Pairs of 64-bit hashes that differ in few bits, found without comparing all with all; and groups of what is alike.

Two hashes that differ in at most d bits agree in at least one of any d + 1 groups of bits. So for each group of bits
the hashes are sorted by it and only those that agree there are compared. Exact for every distance; hashes evenly
spread take n²(d + 1) / 2^(64 / (d + 1)) comparisons, for d = 4 less than a thousandth of all pairs, for d = 9 an
eighth: beyond `LARGEST_DISTANCE` nothing would be saved, and what is found would not be alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cloc_mllm.data.inspection.pictures import HASH_BITS
from cloc_mllm.errors import ClocError

LARGEST_DISTANCE = 15
_BLOCK = 1 << 17

Hashes = npt.NDArray[np.uint64]
Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


def require_distance(distance: int) -> int:
    """Return a distance in bits; `ClocError` if it is none that can be asked for."""
    if not 0 <= distance <= LARGEST_DISTANCE:
        problem = f"a distance of {distance} bits cannot be searched for"
        raise ClocError(problem, remedy=f"Give 0 (the same hash) to {LARGEST_DISTANCE}; 4 is the default.")
    return distance


def bit_distance(left: Hashes, right: Hashes) -> npt.NDArray[np.int64]:
    """In how many bits hashes differ, element by element."""
    bits = np.bitwise_xor(left, right)
    for shift, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        some = np.uint64(mask)
        bits = (bits & some) + ((bits >> np.uint64(shift)) & some)
    return ((bits * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def near_matches(queries: Hashes, targets: Hashes, distance: int) -> Iterator[Pairs]:
    """All pairs of a query and a target that differ in at most `distance` bits, each once, in no set order.

    Args:
        queries: ``(Q,)``.
        targets: ``(T,)``; many equal ones cost time, so give each hash once.
        distance: In bits, up to `LARGEST_DISTANCE`.

    Yields:
        Blocks of indices of queries, indices of targets, and distances.
    """
    masks = _band_masks(require_distance(distance) + 1)
    for number, mask in enumerate(masks):
        # Both sides in the order of the bits they agree in, so that what is compared lies together in memory.
        rows, order = np.argsort(queries & mask, kind="stable"), np.argsort(targets & mask, kind="stable")
        sorted_queries, sorted_targets = queries[rows], targets[order]
        keys = sorted_targets & mask
        low = np.searchsorted(keys, sorted_queries & mask, side="left")
        counts = np.searchsorted(keys, sorted_queries & mask, side="right") - low
        for start, stop in _blocks(counts):
            some = counts[start:stop]
            left = np.repeat(np.arange(start, stop), some)
            right = np.arange(len(left)) + np.repeat(low[start:stop] - (np.cumsum(some) - some), some)
            kept = np.flatnonzero(bit_distance(sorted_queries[left], sorted_targets[right]) <= distance)
            left, right = left[kept], right[kept]
            bits = sorted_queries[left] ^ sorted_targets[right]
            fresh = np.ones(len(bits), np.bool_)
            for earlier in masks[:number]:  # those that agree there too were found there
                fresh &= bits & earlier != 0
            left, right = left[fresh], right[fresh]
            yield rows[left], order[right], bit_distance(sorted_queries[left], sorted_targets[right])


def near_pairs(hashes: Hashes, distance: int) -> Iterator[Pairs]:
    """All pairs of different places in `hashes`, the first before the second, as `near_matches` finds them."""
    for left, right, away in near_matches(hashes, hashes, distance):
        kept = left < right
        yield left[kept], right[kept], away[kept]


def _band_masks(bands: int) -> list[np.uint64]:
    """Masks that share out the bits of a hash; neighbours go to different ones, as they tell much the same."""
    return [np.uint64(sum(1 << bit for bit in range(band, HASH_BITS, bands))) for band in range(bands)]


def _blocks(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of queries that have some `_BLOCK` candidates together; one with more makes a run of its own."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        yield start, stop
        start = stop


def equal_groups(keys: npt.NDArray[np.int64 | np.uint64]) -> list[npt.NDArray[np.int64]]:
    """Places that hold equal rows, for rows that occur more than once; in order of the first place of each.

    Args:
        keys: ``(N,)`` or ``(N, K)``.
    """
    rows = keys[:, None] if keys.ndim == 1 else keys
    if not len(rows):
        return []
    order = np.lexsort((np.arange(len(rows)), *(rows[:, k] for k in range(rows.shape[1]))))
    edges = np.flatnonzero((rows[order][1:] != rows[order][:-1]).any(axis=1)) + 1
    groups = [group for group in np.split(order, edges) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def near_groups(looks: Hashes, distance: int) -> tuple[list[npt.NDArray[np.int64]], int]:
    """Groups of places whose hashes are joined by steps of at most `distance` bits.

    Args:
        looks: ``(N,)`` hashes; equal ones are joined.
        distance: In bits.

    Returns:
        The groups of two and more, in order of the first place of each; and the number of pairs of different hashes
        within the distance.
    """
    hashes, where = np.unique(looks, return_inverse=True)
    parents, pairs = np.arange(len(hashes)), 0
    for left, right, _ in near_pairs(hashes, distance):
        pairs += len(left)
        _join(parents, left.tolist(), right.tolist())
    roots = np.array([_root(parents, k) for k in range(len(parents))], np.int64)
    return equal_groups(roots[where] if len(looks) else np.empty(0, np.int64)), pairs


def _root(parents: npt.NDArray[np.int64], place: int) -> int:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = int(parents[place])
    return place


def _join(parents: npt.NDArray[np.int64], left: Sequence[int], right: Sequence[int]) -> None:
    for one, other in zip(left, right, strict=True):
        first, second = sorted((_root(parents, one), _root(parents, other)))
        parents[second] = first
