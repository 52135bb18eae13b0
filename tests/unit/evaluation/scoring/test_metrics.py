"""The metrics against oracles, brute force, scipy and pycocotools, and against the ways a broken model could score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy import stats

from cloc_mllm.evaluation.scoring import metrics as m


def boxes(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    corner = rng.uniform(0, 60, size=(n, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 36, size=(n, 2))], axis=1)


# --- oracles -----------------------------------------------------------------------------------------------------


def test_right_answers_score_100_and_wrong_ones_0() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 7, 50)
    right = np.eye(7)[targets]
    true = boxes(rng, 50)
    centre = (true[:, :2] + true[:, 2:]) / 2
    texts = [f"text {number % 11}" for number in range(50)]
    relevant = m.same_item(texts, texts)
    for hits in (
        m.top1_hits(right, targets),
        m.recall_hits(relevant.astype(float), relevant),
        m.iou_hits(true, true),
        m.pointing_hits(centre, true),
        m.exact_match_hits(texts, texts),
    ):
        assert m.mean_metric(hits, range(50)) == m.Metric(1.0, (1.0, 1.0), 50)
        assert m.class_mean_metric(hits, targets.tolist(), range(50)).value == 1.0
    for hits in (
        m.top1_hits(-right, targets),
        m.recall_hits(-relevant.astype(float), relevant),
        m.iou_hits(true + 100, true),
        m.pointing_hits(centre + 100, true),
        m.exact_match_hits([text + " no" for text in texts], texts),
    ):
        assert m.mean_metric(hits, range(50)) == m.Metric(0.0, (0.0, 0.0), 50)


# --- top-1 and retrieval -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_recall_equals_brute_force(k: int) -> None:
    rng = np.random.default_rng(1)
    similarity = rng.normal(size=(40, 25))
    queries = rng.integers(0, 8, 40).tolist()
    gallery = [*range(8), *rng.integers(0, 8, 17).tolist()]

    expected = []
    for row, item in zip(similarity, queries, strict=True):
        right = [score for score, other in zip(row, gallery, strict=True) if other == item]
        wrong = [score for score, other in zip(row, gallery, strict=True) if other != item]
        expected.append(sum(score > max(right) for score in wrong) < k)

    assert m.recall_hits(similarity, m.same_item(queries, gallery), k).tolist() == expected
    assert 0 < sum(expected) < 40


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_retrieval_does_not_depend_on_the_order_of_queries_or_gallery(seed: int, q: int, g: int) -> None:
    rng = np.random.default_rng(seed)
    similarity = rng.normal(size=(q, g)).round(1)
    relevant = rng.random((q, g)) < 0.3
    relevant[np.arange(q), rng.integers(0, g, q)] = True
    rows, columns = rng.permutation(q), rng.permutation(g)
    hits = m.recall_hits(similarity, relevant, 2)
    assert (m.recall_hits(similarity[rows][:, columns], relevant[rows][:, columns], 2) == hits[rows]).all()


def test_identical_captions_are_one_item() -> None:
    captions = ["a dog", "a cat", "a dog"]
    similarity = np.array([[0.1, 0.2, 0.9], [0.0, 1.0, 0.0], [0.9, 0.2, 0.1]])
    assert m.recall_hits(similarity, m.same_item(captions, captions)).all()
    assert m.recall_hits(similarity, np.eye(3, dtype=bool)).tolist() == [False, True, False]


def test_an_encoder_that_maps_all_to_one_point_scores_0() -> None:
    flat = np.ones((6, 6))
    assert not m.top1_hits(flat, np.zeros(6)).any()
    assert not m.recall_hits(flat, np.eye(6, dtype=bool)).any()


def test_scores_that_are_not_finite_are_refused() -> None:
    broken = np.full((2, 2), np.nan)
    with pytest.raises(ValueError, match="not finite"):
        m.top1_hits(broken, [0, 1])
    with pytest.raises(ValueError, match="not finite"):
        m.recall_hits(broken, np.eye(2, dtype=bool))


def test_a_query_without_right_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="1 queries have no right answer"):
        m.recall_hits(np.zeros((2, 2)), np.array([[True, False], [False, False]]))


# --- boxes -------------------------------------------------------------------------------------------------------


def test_iou_equals_pycocotools() -> None:
    rng = np.random.default_rng(2)
    first = boxes(rng, 200)
    second = first + rng.normal(scale=4, size=first.shape)
    second[:, 2:] = np.maximum(second[:, 2:], second[:, :2] + 0.5)
    as_xywh = [np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1) for b in (first, second)]
    coco = np.array([coco_mask.iou(a[None], b[None], [0])[0, 0] for a, b in zip(*as_xywh, strict=True)])
    assert np.allclose(m.box_ious(first, second), coco, atol=1e-9)
    assert (m.iou_hits(first, second, 0.5) == (coco >= 0.5)).all()
    assert 20 < (coco >= 0.5).sum() < 180


def test_unusable_boxes_are_misses() -> None:
    true = [[0, 0, 10, 10]] * 5
    guesses = [None, [0, 0, float("nan"), 10], [10, 10, 0, 0], [0, 0, 0, 10], [0, 0, 10, 10]]
    assert m.iou_hits(guesses, true).tolist() == [False, False, False, False, True]
    assert m.pointing_hits([[math.nan, 5], [10, 10]], true[:2]).tolist() == [False, True]


def test_as_many_boxes_as_truths_are_needed() -> None:
    with pytest.raises(ValueError, match="1 predicted boxes for 2"):
        m.box_ious([[0, 0, 1, 1]], [[0, 0, 1, 1]] * 2)
    with pytest.raises(ValueError, match="1 points for 2"):
        m.pointing_hits([[0, 0]], [[0, 0, 1, 1]] * 2)


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_are_normalised() -> None:
    truth = ["red circle", "2", "yes", "circle", "striped"]
    given_answers = ["A red  circle.", "Two", "Yes!", "red circle", None]
    assert m.exact_match_hits(given_answers, truth).tolist() == [True, True, True, False, False]
    assert m.exact_match_hits([""], ["the"]).tolist() == [False]


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = m.normalise_answer(text)
    assert m.normalise_answer(once) == once


def test_majority_and_chance_are_by_kind() -> None:
    pairs = [("count", "2"), ("count", "two"), ("count", "3"), ("colour", "red"), ("colour", "blue")]
    majority = m.majority_answers(pairs)
    assert majority == {"count": "2", "colour": "blue"}
    assert m.chance_of(pairs) == {"count": 0.5, "colour": 0.5}
    hits = m.majority_hits(["count", "count", "colour", "shape"], ["2", "3", "blue", "ring"], majority)
    assert hits.tolist() == [True, False, True, False]


def test_mean_box_is_in_shares_of_the_image() -> None:
    assert m.mean_box([[0, 0, 50, 50], [50, 50, 200, 100]], [[100, 100], [200, 100]]).tolist() == [
        0.125,
        0.25,
        0.75,
        0.75,
    ]


# --- means and intervals -----------------------------------------------------------------------------------------


def test_interval_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    scores = rng.random(300) < 0.3
    ours = m.mean_metric(scores, range(300), seed=5)
    theirs = stats.bootstrap(
        (scores.astype(float),), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.value == scores.mean()
    assert ours.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_items_of_one_image_are_resampled_together() -> None:
    rng = np.random.default_rng(4)
    per_image = rng.random(60) < 0.5
    scores = np.repeat(per_image, 10)
    clustered = m.mean_metric(scores, np.repeat(np.arange(60), 10).tolist())
    apart = m.mean_metric(scores, range(600))
    images_only = m.mean_metric(per_image, range(60))
    width = [metric.ci95[1] - metric.ci95[0] for metric in (clustered, apart, images_only)]
    assert clustered.ci95 == images_only.ci95
    assert width[0] > 2.5 * width[1]
    assert clustered.n == 600


def test_class_mean_weighs_classes_alike() -> None:
    hits = [True] * 90 + [False] * 10
    classes = ["common"] * 90 + ["rare"] * 10
    assert m.mean_metric(hits, range(100)).value == pytest.approx(0.9)
    metric = m.class_mean_metric(hits, classes, range(100))
    assert metric.value == pytest.approx(0.5)
    assert metric.ci95[0] <= metric.value <= metric.ci95[1]


def test_class_mean_equals_a_loop() -> None:
    rng = np.random.default_rng(6)
    hits, classes = rng.random(200) < 0.4, rng.integers(0, 9, 200)
    expected = np.mean([hits[classes == c].mean() for c in np.unique(classes)])
    assert m.class_mean_metric(hits, classes.tolist(), range(200)).value == pytest.approx(expected)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30), st.randoms())
@settings(max_examples=30, deadline=None)
def test_values_do_not_depend_on_order_and_lie_between_0_and_1(rows: list[tuple[bool, int, int]], random) -> None:
    shuffled = random.sample(rows, len(rows))
    for measure in (
        lambda data: m.mean_metric([r[0] for r in data], [r[2] for r in data]),
        lambda data: m.class_mean_metric([r[0] for r in data], [r[1] for r in data], [r[2] for r in data]),
    ):
        first, second = measure(rows), measure(shuffled)
        assert first.value == pytest.approx(second.value)
        assert 0 <= first.ci95[0] <= first.ci95[1] <= 1


def test_the_same_seed_gives_the_same_interval() -> None:
    hits = np.arange(50) % 3 == 0
    assert m.mean_metric(hits, range(50), seed=1) == m.mean_metric(hits, range(50), seed=1)
    assert m.mean_metric(hits, range(50), seed=1).ci95 != m.mean_metric(hits, range(50), seed=2).ci95


def test_nothing_to_score_is_nan_with_n_0() -> None:
    for metric in (m.mean_metric([], []), m.class_mean_metric([], [], [])):
        assert math.isnan(metric.value)
        assert metric.n == 0


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="must be as many"):
        m.mean_metric([True], ["a", "b"])


def test_a_relative_score_is_the_ratio_of_means_in_each_class() -> None:
    scores, references, classes = [4.0, 8.0, 9.0, 3.0], [8.0, 8.0, 9.0, 9.0], ["a", "a", "b", "b"]
    found = m.relative_metric(scores, references, classes, range(4))
    assert found.value == pytest.approx((12 / 16 + 12 / 18) / 2)
    assert found.n == 4
    assert found.ci95[0] < found.value < found.ci95[1]
    assert m.relative_metric(references, references, classes, range(4)).value == 1.0
    assert m.relative_metric(scores, np.ones(4), classes, range(4)) == m.class_mean_metric(scores, classes, range(4))
    assert m.relative_metric([], [], [], []).n == 0
    with pytest.raises(ValueError, match="not positive"):
        m.relative_metric([1.0], [0.0], ["a"], ["x"])
