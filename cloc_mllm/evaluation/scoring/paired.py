"""Whether two models differ: both are resampled on the same images, so that what is hard for both cancels out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.metrics import Items, class_means, resamples, sums_by_image

PERMUTATIONS = 10_000
_BLOCK = 500


@dataclass(frozen=True)
class Difference:
    """How much a second model is better than a first one, on the same items.

    Attributes:
        value: The second's metric less the first's.
        ci95: Its 95 % interval: percentile bootstrap over images.
        p_value: Share of random swaps of the two models, image by image, that give a difference at least as large in
            either direction (a paired randomisation test; one is counted for the data themselves, so it is never 0).
        better, worse, equal: Items on which the second model's score is higher, lower, the same.
        n: Number of items that both models saw.
    """

    value: float
    ci95: tuple[float, float]
    p_value: float
    better: int
    worse: int
    equal: int
    n: int


def paired_difference(first: Items, second: Items, *, seed: int = 0) -> Difference:
    """Compare two models on the same items, or on those that both saw if the items say which is which.

    Args:
        first: The first model's items.
        second: The second's: the same in the same order, or others with ``keys``.
        seed: Of resamples and swaps.

    Raises:
        ClocError: They are not the same items, or have none in common.
    """
    if first.keys != second.keys and first.keys is not None and second.keys is not None:
        first, second = _in_common(first, second)
    if first.images != second.images or first.classes != second.classes:
        raise ClocError("the two models were not measured on the same items in the same order")
    if not np.array_equal(_weights(first), _weights(second)):
        raise ClocError("what the scores of the two models are divided by differs, item by item")
    if not len(first.scores):
        raise ClocError("there is no item to compare the models on")
    total_a, count = sums_by_image(first)
    total_b, _ = sums_by_image(second)
    value = float(_means(total_b.sum(0), count.sum(0)) - _means(total_a.sum(0), count.sum(0)))
    drawn = [
        class_means(weights @ total_b, weights @ count) - class_means(weights @ total_a, weights @ count)
        for weights in resamples(len(count), seed)
    ]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    gain = second.scores - first.scores
    return Difference(
        value,
        (float(low), float(high)),
        _swap_test(total_b - total_a, count.sum(0), value, seed),
        int((gain > 0).sum()),
        int((gain < 0).sum()),
        int((gain == 0).sum()),
        len(gain),
    )


def _in_common(first: Items, second: Items) -> tuple[Items, Items]:
    """Leave the items that both sides have, in the order of the first: a read-out may see a drawn part only."""
    places = [{key: k for k, key in enumerate(items.keys or ())} for items in (first, second)]
    if any(len(place) < len(items.keys or ()) for place, items in zip(places, (first, second), strict=True)):
        raise ClocError("the two models saw different items, and several of one model have the same key")
    both = [key for key in places[0] if key in places[1]]
    if not both:
        raise ClocError("the two models were not measured on the same items: they have none in common")
    mine, other = (_rows(items, [place[k] for k in both]) for items, place in zip((first, second), places, strict=True))
    return mine, other


def _rows(items: Items, rows: list[int]) -> Items:
    def some(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(names[k] for k in rows)

    weights = None if items.weights is None else items.weights[rows]
    return Items(items.scores[rows], some(items.images) or (), some(items.classes), weights, some(items.keys))


def _weights(items: Items) -> NDArray[np.float64]:
    return np.ones(len(items.scores)) if items.weights is None else items.weights


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    return float(class_means(sums[None], counts[None])[0])


def _swap_test(gains: NDArray[np.float64], count: NDArray[np.float64], value: float, seed: int) -> float:
    """Swap the two models on a random half of the images, over and over: an image's gain changes its sign."""
    rng = np.random.default_rng(seed + 1)
    moved = gains[np.any(gains != 0, axis=1)]
    extreme = 0
    for start in range(0, PERMUTATIONS, _BLOCK):
        size = min(_BLOCK, PERMUTATIONS - start)
        signs = rng.integers(0, 2, size=(size, len(moved))) * 2.0 - 1.0
        swapped = (signs @ moved / count).mean(axis=1)
        # A hair of slack: sums in another order differ in the last bit, and an equal difference has to count.
        extreme += int((np.abs(swapped) >= abs(value) - 1e-12).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)
