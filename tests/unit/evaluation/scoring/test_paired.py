"""Paired differences, against scipy's paired permutation test and against what must hold for any data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.scoring.metrics import Items, class_mean_metric, mean_metric
from cloc_mllm.evaluation.scoring.paired import paired_difference


def items(scores: NDArray[np.float64], per_image: int = 1, classes: tuple[str, ...] | None = None) -> Items:
    return Items(scores.astype(np.float64), tuple(str(k // per_image) for k in range(len(scores))), classes)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.4])
def test_p_value_is_scipys(shift: float) -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=60)
    second = first + rng.normal(shift, 0.5, size=60)
    found = paired_difference(items(first), items(second))
    expected = stats.permutation_test(
        (second, first),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).pvalue
    # Both are estimates from random swaps: four standard errors of the two together.
    slack = 4 * np.sqrt(expected * (1 - expected) * (1 / 10_000 + 1 / 20_000)) + 3e-4
    assert found.p_value == pytest.approx(expected, abs=slack)
    assert found.value == pytest.approx((second - first).mean())


def test_the_interval_is_of_the_difference_and_not_of_each() -> None:
    """What is hard for both cancels out: two models that differ by a constant differ for certain."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    found = paired_difference(items(first), items(first + 0.01))
    assert found.ci95 == (pytest.approx(0.01), pytest.approx(0.01))
    assert found.p_value < 0.001


def test_images_are_swapped_whole() -> None:
    """Ten items of one image are one piece of evidence, not ten."""
    first = np.zeros(40)
    second = np.repeat([1.0, 1.0, 1.0, 0.0], 10)
    assert paired_difference(items(first), items(second)).p_value < 0.001
    assert paired_difference(items(first, 10), items(second, 10)).p_value > 0.2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abc")), min_size=1, max_size=60))
def test_value_is_the_difference_of_the_metrics_and_turns_with_them(rows: list[tuple[bool, bool, str]]) -> None:
    a, b, classes = (np.array(column) for column in zip(*rows, strict=True))
    images = [str(k // 3) for k in range(len(rows))]
    for metrics in (
        (mean_metric(a, images), mean_metric(b, images)),
        (class_mean_metric(a, classes.tolist(), images), class_mean_metric(b, classes.tolist(), images)),
    ):
        assert metrics[0].items is not None
        assert metrics[1].items is not None
        forth = paired_difference(metrics[0].items, metrics[1].items)
        back = paired_difference(metrics[1].items, metrics[0].items)
        assert forth.value == pytest.approx(metrics[1].value - metrics[0].value, abs=1e-12)
        assert forth.value == pytest.approx(-back.value, abs=1e-12)
        assert forth.p_value == pytest.approx(back.p_value)
        assert (forth.better, forth.worse) == (back.worse, back.better)
        assert forth.better + forth.worse + forth.equal == forth.n == len(rows)


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    """With no true difference p < 0.05 happens in about one of twenty comparisons."""
    rng = np.random.default_rng(0)
    alarms = [
        paired_difference(items(rng.integers(0, 2, 60)), items(rng.integers(0, 2, 60))).p_value < 0.05
        for _ in range(120)
    ]
    assert np.mean(alarms) < 0.12


def test_other_items_are_refused() -> None:
    with pytest.raises(ClocError, match="same items"):
        paired_difference(items(np.ones(4)), items(np.ones(4), 2))
    with pytest.raises(ClocError, match="no item"):
        paired_difference(items(np.ones(0)), items(np.ones(0)))


def keyed(scores: list[float], keys: list[str], classes: bool = False) -> Items:
    images = [key[0] for key in keys]
    metric = class_mean_metric(scores, images, images, keys=keys) if classes else mean_metric(scores, images, keys=keys)
    assert metric.items is not None
    return metric.items


@pytest.mark.parametrize("classes", [False, True])
def test_models_that_saw_different_items_are_compared_on_those_that_both_saw(classes: bool) -> None:
    """A read-out of crops sees a drawn part of the regions, the Prompter all of them."""
    part = keyed([1, 0, 0], ["b1", "a0", "c0"], classes)
    whole = keyed([1, 1, 1, 0, 1], ["a0", "a1", "b0", "b1", "c0"], classes)
    common = keyed([0, 1, 1], ["b1", "a0", "c0"], classes)
    assert paired_difference(part, whole) == paired_difference(part, common)
    assert paired_difference(part, whole).n == 3
    assert paired_difference(part, whole).value == pytest.approx(1 / 3)
    assert paired_difference(whole, part).value == pytest.approx(-1 / 3)
    # The same items in another order are the same items.
    assert paired_difference(common, keyed([1, 1, 0], ["c0", "a0", "b1"], classes)).equal == 3


def test_keys_that_pair_nothing_are_refused() -> None:
    with pytest.raises(ClocError, match="none in common"):
        paired_difference(keyed([1], ["a0"]), keyed([1], ["b0"]))
    with pytest.raises(ClocError, match="have the same key"):
        paired_difference(keyed([1, 0], ["a0", "a0"]), keyed([1], ["a0"]))
    other_image = Items(np.ones(1), ("z",), keys=("a0",))
    with pytest.raises(ClocError, match="same items"):
        paired_difference(keyed([1, 1], ["a0", "a1"]), other_image)
