"""Every number this project reports is computed here, and each comes with a 95 % interval.

The functions take plain arrays (scores, hits, boxes), so that a test can feed them an oracle, and they are pessimistic
where a lenient choice would flatter a broken model: a tie with a wrong candidate is a miss, an answer that could not be
read is a miss, and a similarity that is not finite is an error. (Under "first of the ties wins" an encoder that maps
everything to one point scores above chance, and one that returns NaN scores 100.)

Intervals are percentile bootstraps over *images*, not over items: the regions and questions of one image are not
independent, and resampling them one by one gives intervals that are too narrow.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cloc_mllm.errors import ClocError

BOOTSTRAP_RESAMPLES = 1000

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ROWS = 512
"""Queries compared with the gallery at a time, to bound the memory: whole COCO is 5,000 images x 25,000 captions."""
_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class Items:
    """What a metric averages, so that two models can be compared item by item.

    Attributes:
        scores: (N,) hits or scores.
        images: (N,) what each item was seen in.
        classes: (N,) for a mean over classes, the class of each item; else None.
        weights: (N,) what the sum of the scores is divided by the sum of; None for one each.
        keys: (N,) what tells each item from all others, so that two models which saw different items can be compared
            on those that both saw; None where all see the same.
    """

    scores: NDArray[np.float64]
    images: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    weights: NDArray[np.float64] | None = None
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Metric:
    """One reported number.

    Attributes:
        value: The point estimate, in [0, 1] for every metric of this module.
        ci95: Lower and upper end of the 95 % interval.
        n: The number of items (not of images) that the value averages over.
        items: The items themselves, where the value is a mean over them.
    """

    value: float
    ci95: tuple[float, float]
    n: int
    items: Items | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int | list[float | None] | None]:
        """Return the form that ``report.json`` holds: six decimals, and None for NaN, which JSON does not have."""
        return {"value": _rounded(self.value), "ci95": [_rounded(end) for end in self.ci95], "n": self.n}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


# --- hits: one boolean an item -----------------------------------------------------------------------------------


def topk_hits(scores: ArrayLike, targets: ArrayLike, k: int = 1) -> NDArray[np.bool_]:
    """Tell for each row whether the true class is among the k highest scores.

    Args:
        scores: (N, C) similarity of each item to each class.
        targets: (N,) index of the true class.
        k: How many places count.

    Returns:
        (N,) booleans; ties with other classes count against the true one, so with k = 1 a tie is a miss.

    Raises:
        ValueError: A score is not finite, or the shapes do not fit.
    """
    table = np.asarray(scores)
    truth = np.asarray(targets, dtype=np.int64)
    if table.ndim != 2 or truth.shape != (len(table),):
        raise ValueError(f"scores must be (N, C) and targets (N,), not {table.shape} and {truth.shape}")
    hits = np.zeros(len(table), dtype=bool)
    for start in range(0, len(table), _ROWS):
        part = _finite(table[start : start + _ROWS], "scores")
        own = np.take_along_axis(part, truth[start : start + _ROWS, None], axis=1)
        hits[start : start + _ROWS] = (part >= own).sum(axis=1) <= k  # the true class itself is one of them
    return hits


def top1_hits(scores: ArrayLike, targets: ArrayLike) -> NDArray[np.bool_]:
    """Tell for each row whether the true class has strictly the highest score; see :func:`topk_hits`."""
    return topk_hits(scores, targets, 1)


def recall_hits(similarity: ArrayLike, relevant: ArrayLike, k: int = 1) -> NDArray[np.bool_]:
    """Tell for each query whether one of its right answers is among the best k of the gallery; see :func:`misplaced`.

    Args:
        similarity: (Q, G) score of each gallery item for each query.
        relevant: (Q, G) boolean, which gallery items are right; see :func:`same_item`.
        k: How many places count.

    Returns:
        (Q,) booleans.
    """
    return misplaced(similarity, relevant) < k


def misplaced(similarity: ArrayLike, relevant: ArrayLike) -> NDArray[np.int64]:
    """Count for each query the wrong gallery items before its best right one; R@k is a hit if these are fewer than k.

    A query may have several right answers (identical captions belong to the same item): the best-placed counts, and
    right answers do not push each other down. Ties count against the query.

    Args:
        similarity: (Q, G) score of each gallery item for each query.
        relevant: (Q, G) boolean, which gallery items are right; see :func:`same_item`.

    Returns:
        (Q,) counts.

    Raises:
        ValueError: A query has no right answer, a score is not finite, or the shapes differ.
    """
    table = np.asarray(similarity)
    right = np.asarray(relevant, dtype=bool)
    if table.shape != right.shape or table.ndim != 2:
        raise ValueError(f"similarity {table.shape} and relevant {right.shape} must both be (queries, gallery)")
    orphans = ~right.any(axis=1)
    if orphans.any():
        raise ValueError(f"{int(orphans.sum())} queries have no right answer in the gallery")
    counts = np.zeros(len(table), dtype=np.int64)
    for start in range(0, len(table), _ROWS):
        part, good = _finite(table[start : start + _ROWS], "similarity"), right[start : start + _ROWS]
        best = np.where(good, part, -np.inf).max(axis=1, initial=-np.inf)
        counts[start : start + _ROWS] = (~good & (part >= best[:, None])).sum(axis=1)
    return counts


def same_item(query_items: Sequence[Hashable], gallery_items: Sequence[Hashable]) -> NDArray[np.bool_]:
    """Return the (Q, G) relevance in which an item is right when it equals the query's (a caption, a text, an id)."""
    index = {item: number for number, item in enumerate(dict.fromkeys([*query_items, *gallery_items]))}
    queries = np.array([index[item] for item in query_items], dtype=np.int64)
    gallery = np.array([index[item] for item in gallery_items], dtype=np.int64)
    return queries[:, None] == gallery[None, :]


def iou_hits(
    predicted: Sequence[Sequence[float] | None] | NDArray[np.float64],
    truth: ArrayLike,
    threshold: float = 0.5,
) -> NDArray[np.bool_]:
    """Tell for each box whether it overlaps its truth with an IoU of at least ``threshold``.

    Args:
        predicted: N boxes xyxy; None (nothing could be read), a box that is not finite and one of no area are misses.
        truth: (N, 4) boxes in the same frame.
        threshold: The IoU that counts, inclusive.

    Returns:
        (N,) booleans.
    """
    return box_ious(predicted, truth) >= threshold


def box_ious(
    predicted: Sequence[Sequence[float] | None] | NDArray[np.float64], truth: ArrayLike
) -> NDArray[np.float64]:
    """Return the (N,) IoU of each predicted box with its own truth; 0 where there is no usable prediction."""
    true = np.asarray(truth, dtype=np.float64).reshape(-1, 4)
    guess = np.array([[np.nan] * 4 if box is None else box for box in predicted], dtype=np.float64).reshape(-1, 4)
    if guess.shape != true.shape:
        raise ValueError(f"{len(guess)} predicted boxes for {len(true)} true ones")
    low, high = np.maximum(guess[:, :2], true[:, :2]), np.minimum(guess[:, 2:], true[:, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=1)
    sides = guess[:, 2:] - guess[:, :2]
    usable = np.isfinite(guess).all(axis=1) & (sides > 0).all(axis=1)
    union = sides.prod(axis=1) + (true[:, 2:] - true[:, :2]).prod(axis=1) - inter
    return np.divide(inter, union, out=np.zeros(len(true)), where=usable & (union > 0))


def pointing_hits(points: ArrayLike, truth: ArrayLike) -> NDArray[np.bool_]:
    """Tell for each point (N, 2) whether it lies in its true box (N, 4), border included; a NaN point is a miss."""
    at = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    true = np.asarray(truth, dtype=np.float64).reshape(-1, 4)
    if len(at) != len(true):
        raise ValueError(f"{len(at)} points for {len(true)} boxes")
    inside = (at >= true[:, :2]) & (at <= true[:, 2:])
    return inside[:, 0] & inside[:, 1]


# --- answers in words --------------------------------------------------------------------------------------------


def normalise_answer(text: str) -> str:
    """Bring an answer to the form in which it is compared.

    Lower case, no punctuation, no articles, number words up to ten as digits, single spaces: "A red  circle." and
    "red circle" are one answer, so are "Two" and "2". Nothing else is forgiven.
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match_hits(answers: Sequence[str | None], truths: Sequence[str]) -> NDArray[np.bool_]:
    """Tell for each answer whether it equals the truth after :func:`normalise_answer`; None and empty are misses."""
    if len(answers) != len(truths):
        raise ValueError(f"{len(answers)} answers for {len(truths)} truths")
    pairs = (
        (normalise_answer(given or ""), normalise_answer(truth)) for given, truth in zip(answers, truths, strict=True)
    )
    return np.array([bool(given) and given == truth for given, truth in pairs], dtype=bool)


def majority_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the most frequent normalised answer of each kind of question; ties go to the alphabet, so it is stable.

    Args:
        pairs: (kind, answer) of questions of a split that is *not* the one to be scored.
    """
    counts: dict[str, Counter[str]] = {}
    for kind, answer in pairs:
        counts.setdefault(kind, Counter())[normalise_answer(answer)] += 1
    return {kind: min(counter, key=lambda text: (-counter[text], text)) for kind, counter in counts.items()}


def chance_of(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Return for each kind of question 1 / (number of distinct answers seen for it)."""
    seen: dict[str, set[str]] = {}
    for kind, answer in pairs:
        seen.setdefault(kind, set()).add(normalise_answer(answer))
    return {kind: 1.0 / len(answers) for kind, answers in seen.items()}


def majority_hits(kinds: Sequence[str], truths: Sequence[str], majority: Mapping[str, str]) -> NDArray[np.bool_]:
    """Score the rule "always give the majority answer of the kind"; a kind without one is a miss."""
    return exact_match_hits([majority.get(kind) for kind in kinds], truths)


def mean_box(boxes: ArrayLike, sizes: ArrayLike) -> NDArray[np.float64]:
    """Return the (4,) mean of (N, 4) pixel boxes as shares of their images' (N, 2) width and height."""
    scale = np.tile(np.asarray(sizes, dtype=np.float64).reshape(-1, 2), 2)
    if len(scale) == 0:
        raise ValueError("the mean box needs at least one box")
    return (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) / scale).mean(axis=0)


def check_seed(seed: object) -> None:
    """Refuse what NumPy's generators do not take as a seed, or take as "another one each time".

    Raises:
        ClocError: It is no whole number from 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ClocError(f"seed is {seed!r}, not a whole number from 0")


# --- from hits to a metric ---------------------------------------------------------------------------------------


def mean_metric(
    hits: ArrayLike, images: Sequence[Hashable], *, seed: int = 0, keys: Sequence[Hashable] | None = None
) -> Metric:
    """Average hits (or any per-item scores) and bootstrap the mean over images.

    Args:
        hits: (N,) booleans or floats.
        images: (N,) what each item was seen in; items of one image are resampled together.
        seed: Of the resampling.
        keys: (N,) what tells each item from all others, where models may see different ones.

    Returns:
        The metric; with no item at all its value and interval are NaN and n is 0.
    """
    scores = np.asarray(hits, dtype=np.float64)
    return _ratio_metric(Items(scores, tuple(map(str, images)), keys=_keys(keys)), seed)


def class_mean_metric(
    hits: ArrayLike,
    classes: Sequence[Hashable],
    images: Sequence[Hashable],
    *,
    seed: int = 0,
    keys: Sequence[Hashable] | None = None,
) -> Metric:
    """Average hits inside each class, then over the classes that occur (mAcc), with an interval over images.

    A class that a resample happens to miss is left out of that resample's mean, as absent classes are of the value.
    """
    scores = np.asarray(hits, dtype=np.float64)
    return _ratio_metric(Items(scores, tuple(map(str, images)), tuple(map(str, classes)), keys=_keys(keys)), seed)


def _keys(keys: Sequence[Hashable] | None) -> tuple[str, ...] | None:
    return None if keys is None else tuple(map(str, keys))


def relative_metric(
    scores: ArrayLike, references: ArrayLike, classes: Sequence[Hashable], images: Sequence[Hashable], *, seed: int = 0
) -> Metric:
    """Mean score over mean reference score inside each class, averaged over classes, with an interval over images.

    Args:
        scores: (N,) what was scored.
        references: (N,) positive, what the reference scored on the same item.
        classes: (N,) class of each item; one for all makes it the plain ratio of means.
        images: (N,) what each item was seen in.
        seed: Of the resampling.

    Returns:
        The metric, 1 where score and reference are as good as each other; NaN with no item.

    Raises:
        ValueError: A reference is not positive.
    """
    weights = np.asarray(references, dtype=np.float64)
    if (weights <= 0).any():
        raise ValueError("the reference of an item is not positive")
    items = Items(
        np.asarray(scores, dtype=np.float64), tuple(map(str, images)), tuple(map(str, classes)), weights=weights
    )
    return _ratio_metric(items, seed)


def _ratio_metric(items: Items, seed: int) -> Metric:
    """Mean over classes of (sum of scores / sum of weights), bootstrapped over images; one class if none are named."""
    if len(items.scores) == 0 and not items.images:
        return Metric(math.nan, (math.nan, math.nan), 0, items)
    total, count = sums_by_image(items)
    value = float((total.sum(axis=0) / count.sum(axis=0)).mean())
    means = np.concatenate([class_means(weights @ total, weights @ count) for weights in resamples(len(total), seed)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Metric(value, (float(low), float(high)), len(items.scores), items)


def sums_by_image(items: Items) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums of the scores and of the weights, by image and class: ``(images, classes)`` each.

    Raises:
        ValueError: There are not as many scores as images and classes.
    """
    classes = items.classes if items.classes is not None else ("",) * len(items.scores)
    if not len(items.scores) == len(classes) == len(items.images):
        lengths = f"{len(items.scores)} scores, {len(classes)} classes and {len(items.images)} image ids"
        raise ValueError(f"{lengths} must be as many")
    rows, columns = _codes(items.images), _codes(classes)
    total, count = np.zeros((2, int(rows.max()) + 1, int(columns.max()) + 1))
    np.add.at(total, (rows, columns), items.scores)
    np.add.at(count, (rows, columns), 1.0 if items.weights is None else items.weights)
    return total, count


def class_means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over classes of sum / count, ``(B, classes)`` to ``(B,)``; a class without items is left out."""
    ratios = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    means: NDArray[np.float64] = np.nanmean(ratios, axis=1)
    return means


def _codes(names: Sequence[str]) -> NDArray[np.int64]:
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([index[name] for name in names], dtype=np.int64)


def resamples(clusters: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each cluster is drawn in each resample, in blocks ``(b, clusters)`` to bound the memory."""
    rng = np.random.default_rng(seed)
    block = 100
    offset = np.arange(block)[:, None] * clusters
    for _ in range(BOOTSTRAP_RESAMPLES // block):
        drawn = rng.integers(0, clusters, size=(block, clusters))
        counts = np.bincount((drawn + offset).ravel(), minlength=block * clusters)
        yield counts.reshape(block, clusters).astype(np.float64)
