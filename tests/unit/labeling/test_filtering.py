"""Filtering of finds: every one is accounted for, and suppression is what its definition says."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.filtering import REASONS, FilterOptions, filter_detections
from cloc_mllm.labeling.stages import Detection

SIZE = (40, 30)
OPEN = FilterOptions(score=0.0, min_side=0.0, one_phrase_per_box=False, nms="none")
"""Keeps whatever has a score."""

# Few values, so that equal boxes, equal scores and boxes that touch turn up all the time.
corners_x = st.lists(st.sampled_from([0.0, 4.0, 10.5, 20.0, 39.0, 40.0]), min_size=2, max_size=2).map(sorted)
corners_y = st.lists(st.sampled_from([0.0, 0.5, 10.0, 15.0, 29.5, 30.0]), min_size=2, max_size=2).map(sorted)
detections = st.lists(
    st.builds(
        lambda x, y, text, score: Detection((x[0], y[0], x[1], y[1]), text, score),
        corners_x,
        corners_y,
        st.sampled_from(["a dog", "dog", "ein Hund", "狗"]),
        st.sampled_from([0.05, 0.1, 0.2, 0.5, 0.9]),
    ),
    max_size=12,
)
any_options = st.builds(
    FilterOptions,
    score=st.sampled_from([0.0, 0.1, 0.3]),
    min_side=st.sampled_from([0.0, 1.0, 5.0]),
    min_area=st.sampled_from([0.0, 0.01, 0.1]),
    max_area=st.sampled_from([0.5, 1.0]),
    drop_whole_image=st.booleans(),
    one_phrase_per_box=st.booleans(),
    nms=st.sampled_from(["all", "text", "none"]),
    nms_iou=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    max_per_image=st.sampled_from([None, 1, 3]),
)


def iou(a: Detection, b: Detection) -> float:
    """Overlap in plain numbers."""
    wide = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    high = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    both = max(wide, 0) * max(high, 0)
    areas = sum((d.box[2] - d.box[0]) * (d.box[3] - d.box[1]) for d in (a, b))
    return both / (areas - both) if areas > both else 0.0


def brute_force_nms(found: list[Detection], limit: float, per_text: bool) -> list[Detection]:
    """What is left of a list: again and again the best goes to the keepers and takes along what overlaps it."""
    left, keepers = list(found), []
    while left:
        best = min(left, key=lambda d: (-d.score, d.box, d.text))
        left.remove(best)
        keepers.append(best)
        left = [d for d in left if iou(best, d) <= limit or (per_text and d.text != best.text)]
    return keepers


@given(detections, any_options)
@settings(max_examples=100, deadline=None)
def test_every_find_is_kept_or_counted_once(found: list[Detection], options: FilterOptions) -> None:
    kept, dropped = filter_detections(found, SIZE, options)
    assert len(kept) + dropped.total() == len(found)
    assert set(dropped) <= set(REASONS)
    assert all(count > 0 for count in dropped.values())
    assert not Counter(kept) - Counter(found)
    assert [d.score for d in kept] == sorted((d.score for d in kept), reverse=True)
    for d in kept:
        wide, high = d.box[2] - d.box[0], d.box[3] - d.box[1]
        assert d.score > options.score
        assert min(wide, high) >= options.min_side
        assert options.min_area <= wide * high / 1200 <= options.max_area
        assert not (options.drop_whole_image and d.box == (0, 0, 40, 30))
    if options.max_per_image is not None:
        assert len(kept) <= options.max_per_image


@given(detections, any_options, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_does_not_matter_and_twice_is_once(
    found: list[Detection], options: FilterOptions, chance: random.Random
) -> None:
    kept, dropped = filter_detections(found, SIZE, options)
    shuffled = list(found)
    chance.shuffle(shuffled)
    assert filter_detections(shuffled, SIZE, options) == (kept, dropped)
    assert filter_detections(kept, SIZE, options) == (kept, Counter())


@given(detections, st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_suppression_against_brute_force(found: list[Detection], limit: float, per_text: bool) -> None:
    options = replace(OPEN, nms="text" if per_text else "all", nms_iou=limit)
    kept, dropped = filter_detections(found, SIZE, options)
    expected = brute_force_nms(found, limit, per_text)
    assert kept == expected
    assert dropped == +Counter(overlap=len(found) - len(expected))


def test_each_rule_takes_what_it_is_for() -> None:
    box = (0.0, 0.0, 20.0, 10.0)
    found = [
        Detection(box, "kept", 0.9),
        Detection(box, "the same box", 0.8),
        Detection((0.0, 0.0, 20.0, 9.0), "nearly the same box", 0.7),
        Detection((0.0, 20.0, 20.0, 30.0), "the eleventh", 0.3),
        Detection((0.0, 20.0, 20.0, 30.0), "not above the threshold", 0.1),
        Detection((5.0, 5.0, 5.5, 25.0), "a sliver", 0.9),
        Detection((5.0, 5.0, 7.0, 7.0), "a speck", 0.9),
        Detection((0.0, 0.0, 39.9, 29.9), "all of it", 0.9),
        Detection((0.0, 0.0, 40.0, 28.0), "nearly all of it", 0.9),
    ]
    options = FilterOptions(min_area=0.01, drop_whole_image=True, max_per_image=1)
    kept, dropped = filter_detections(found, SIZE, replace(options, max_area=0.9))
    assert kept == found[:1]
    assert dropped == Counter(score=1, side=1, area_small=1, area_large=2, same_box=1, overlap=1, cap=1)
    kept, dropped = filter_detections(found[-2:], SIZE, options)
    assert ([d.text for d in kept], dropped) == (["nearly all of it"], Counter(whole_image=1))


def test_a_broken_detector_is_named() -> None:
    for box, score in [((0.0, 0.0, 41.0, 3.0), 0.5), ((5.0, 0.0, 4.0, 3.0), 0.5)]:
        with pytest.raises(ClocError, match=r"'x' was found at .* outside the picture of 40 x 30"):
            filter_detections([Detection(box, "x", score)], SIZE, OPEN)
    for box, score in [((0.0, 0.0, 4.0, 3.0), float("nan")), ((0.0, float("nan"), 4.0, 3.0), 0.5)]:
        with pytest.raises(ClocError, match="not finite"):
            filter_detections([Detection(box, "x", score)], SIZE, OPEN)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": 1.5}, "filter.score is 1.5"),
        ({"nms_iou": -0.1}, "filter.nms_iou is -0.1"),
        ({"min_side": float("nan")}, "filter.min_side is nan"),
        ({"min_area": 0.6, "max_area": 0.5}, r"filter.min_area \(0.6\) is above"),
        ({"nms": "class"}, "filter.nms is 'class'. Use one of all, text, none"),
        ({"max_per_image": 0}, "filter.max_per_image is 0"),
    ],
)
def test_options_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(ClocError, match=message):
        FilterOptions(**values)
