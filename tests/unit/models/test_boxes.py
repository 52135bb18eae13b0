"""Box arithmetic against pycocotools and transformers; the codec by properties that hold for any box and any text."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers.loss.loss_for_object_detection import generalized_box_iou

from cloc_mllm.models.boxes import (
    BOX_MODES,
    BoxCodec,
    box_area,
    box_iou,
    cxcywh_to_xyxy,
    paired_giou,
    paired_iou,
    xyxy_to_cxcywh,
)

coordinate = st.floats(0, 1000, allow_nan=False).map(lambda v: round(v, 3))
size_in_pixels = st.integers(1, 5000)


@st.composite
def ordered_box(draw: st.DrawFn, width: float = 1000, height: float = 1000) -> list[float]:
    """A box in an image of the given size; some have no area, some fill the image."""
    x1, x2 = sorted(draw(st.tuples(*[st.floats(0, 1) | st.sampled_from([0.0, 1.0])] * 2)))
    y1, y2 = sorted(draw(st.tuples(*[st.floats(0, 1) | st.sampled_from([0.0, 1.0])] * 2)))
    return [x1 * width, y1 * height, x2 * width, y2 * height]


@st.composite
def boxes_with_area(draw: st.DrawFn, rows: int | None = None) -> Tensor:
    """``(rows, 4)`` float64 boxes with sides of at least 0.5."""
    count = draw(st.integers(0, 6)) if rows is None else rows
    corners = [draw(st.tuples(coordinate, coordinate)) for _ in range(count)]
    sides = [draw(st.tuples(*[st.floats(0.5, 400)] * 2)) for _ in range(count)]
    flat = [[x, y, x + w, y + h] for (x, y), (w, h) in zip(corners, sides, strict=True)]
    return torch.tensor(flat, dtype=torch.float64).reshape(count, 4)


@settings(max_examples=60, deadline=None)
@given(first=boxes_with_area(), second=boxes_with_area())
def test_iou_is_that_of_pycocotools(first: Tensor, second: Tensor) -> None:
    iou = box_iou(first, second)
    assert iou.shape == (len(first), len(second))
    if len(first) and len(second):
        as_xywh = [np.hstack([b[:, :2].numpy(), (b[:, 2:] - b[:, :2]).numpy()]) for b in (first, second)]
        expected = coco_mask.iou(as_xywh[0], as_xywh[1], [0] * len(second))
        torch.testing.assert_close(iou, torch.from_numpy(np.asarray(expected)), rtol=1e-9, atol=1e-12)
        paired = paired_iou(first[:, None].expand(-1, len(second), -1), second[None].expand(len(first), -1, -1))
        assert paired.equal(iou)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6))
def test_giou_is_that_of_transformers(data: st.DataObject, rows: int) -> None:
    first, second = data.draw(boxes_with_area(rows)), data.draw(boxes_with_area(rows))
    torch.testing.assert_close(paired_giou(first, second), generalized_box_iou(first, second).diag())


@given(first=boxes_with_area(1), second=boxes_with_area(1))
def test_iou_is_symmetric_bounded_and_one_only_for_itself(first: Tensor, second: Tensor) -> None:
    iou, giou = paired_iou(first, second), paired_giou(first, second)
    assert 0 <= iou <= 1 + 1e-12
    assert -1 <= giou <= iou + 1e-12
    assert iou.equal(paired_iou(second, first))
    assert paired_iou(first, first).item() == pytest.approx(1, abs=1e-12)
    assert paired_giou(first, first).item() == pytest.approx(1, abs=1e-12)


def test_boxes_without_area_give_finite_values_and_gradients() -> None:
    point = torch.full((1, 4), 0.5, requires_grad=True)
    for other in (point.detach(), torch.tensor([[0.0, 0.0, 1.0, 1.0]])):
        value = paired_giou(point, other) + paired_iou(point, other)
        (gradient,) = torch.autograd.grad(value.sum(), point)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
    assert paired_iou(point, point).item() == 0.0


def test_giou_pulls_disjoint_boxes_together() -> None:
    left = torch.tensor([[0.0, 0.0, 0.2, 0.2]], requires_grad=True)
    (gradient,) = torch.autograd.grad(paired_giou(left, torch.tensor([[0.7, 0.0, 0.9, 0.2]])).sum(), left)
    assert gradient[0, 2] > 0


@given(boxes=boxes_with_area())
def test_centre_form_and_back(boxes: Tensor) -> None:
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    torch.testing.assert_close(box_area(boxes), xyxy_to_cxcywh(boxes)[:, 2:].prod(-1))


def test_a_box_out_of_order_has_no_area() -> None:
    assert box_area(torch.tensor([[3.0, 3.0, 1.0, 1.0], [3.0, 0.0, 1.0, 1.0]])).tolist() == [0.0, 0.0]


# ---- codec ---------------------------------------------------------------------------------------------------------


def step(mode: str, side: float) -> float:
    """Pixels between two neighbouring coordinates that a mode can write."""
    return {"norm1000": side / 999, "norm1": side / 1000, "pixel": 1.0}[mode]


@pytest.mark.parametrize("mode", BOX_MODES)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=size_in_pixels, height=size_in_pixels)
def test_round_trip_errs_by_half_a_step_at_most(mode: str, data: st.DataObject, width: int, height: int) -> None:
    box = data.draw(ordered_box(width, height))
    codec = BoxCodec(mode)
    text = codec.encode(box, width, height)
    found = codec.decode(text, width, height)
    assert found.unparsed == []
    assert found.spans == [(0, len(text))]
    for read, written, side in zip(found.boxes[0], box, (width, height) * 2, strict=True):
        assert abs(read - written) <= step(mode, side) / 2 * (1 + 1e-9)
        assert 0 <= read <= side
    # What was read is written the same way again: text to box to text changes nothing.
    assert codec.encode(found.boxes[0], width, height) == text


@pytest.mark.parametrize("mode", BOX_MODES)
@given(data=st.data(), width=size_in_pixels, height=size_in_pixels)
def test_boxes_are_found_in_a_sentence(mode: str, data: st.DataObject, width: int, height: int) -> None:
    codec = BoxCodec(mode)
    texts = [codec.encode(box, width, height) for box in data.draw(st.lists(ordered_box(width, height), max_size=4))]
    words = st.text(st.characters(blacklist_characters="[]()"), max_size=8)
    sentence = data.draw(words) + "".join(text + data.draw(words) for text in texts)
    found = codec.decode(sentence, width, height)
    assert [sentence[start:end] for start, end in found.spans] == texts
    assert [codec.encode(box, width, height) for box in found.boxes] == texts
    assert found.unparsed == []


def bracketed_groups_with_digits(text: str) -> int:
    """How many runs of text after an opening bracket, up to the next bracket of any kind or the end, hold a digit."""
    groups, inside, digit = 0, False, False
    for character in text + "]":
        if character in "[]()":
            groups += inside and digit
            inside, digit = character in "[(", False
        else:
            digit = digit or character.isdecimal()
    return groups


noisy_text = st.text(st.sampled_from("[[]](),;. -+0123456789e\n\tx٣²"), max_size=60) | st.text(max_size=60)
group_like = st.lists(st.sampled_from(["[", "]", "(", ")", "1", "0.5", ", ", " ", "999", "-3", "box", "1e9"])).map(
    "".join
)


# Ten thousand readings in all: each text in all modes, because making up a text takes longer than reading it.
@settings(max_examples=3400, deadline=None)
@given(text=noisy_text | group_like, width=size_in_pixels, height=size_in_pixels)
def test_any_text_is_read_or_reported(text: str, width: int, height: int) -> None:
    groups = bracketed_groups_with_digits(text)
    for mode in BOX_MODES:
        found = BoxCodec(mode).decode(text, width, height)
        assert len(found.boxes) == len(found.spans)
        # Never silent: what looks like a box is either read or reported.
        assert len(found.boxes) + len(found.unparsed) == groups
        assert all(piece in text for piece in found.unparsed)
        ends = [0, *(end for _, end in found.spans)]
        assert all(start >= end for (start, _), end in zip(found.spans, ends, strict=False))
        for x1, y1, x2, y2 in found.boxes:
            assert 0 <= x1 <= x2 <= width
            assert 0 <= y1 <= y2 <= height


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[100, 200, 300, 400]", [100.1, 200.2, 300.3, 400.4]),
        ("[ 100 ,200,\n300  ;400 ]", [100.1, 200.2, 300.3, 400.4]),
        ("(100, 200, 300, 400)", [100.1, 200.2, 300.3, 400.4]),
        ("[100 200 300 400]", [100.1, 200.2, 300.3, 400.4]),
        ("[[100, 200, 300, 400]]", [100.1, 200.2, 300.3, 400.4]),
        ("(100, 200, 300, 400]", [100.1, 200.2, 300.3, 400.4]),
        ("[0, 0, 999, 999]", [0, 0, 1000, 1000]),
        ("[5, 5, 5, 5]", [5.005, 5.005, 5.005, 5.005]),
    ],
)
def test_tolerant_of_spacing_and_brackets(text: str, box: list[float]) -> None:
    found = BoxCodec().decode(f"the dog {text} runs", 1000, 1000)
    assert found.unparsed == []
    assert found.boxes == [pytest.approx(box, rel=1e-3)]


@pytest.mark.parametrize(
    "text",
    [
        "[300, 200, 100, 400]",
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[1, 2, 3, 1200]",
        "[-1, 2, 3, 4]",
        "[1, 2, three, 4]",
        "[1, 2, 1e2, 4]",
        "[12, 40, 53",
        "(12, 40, 53",
        "[12,, 40, 53, 60]",
        "[" + "9" * 5000 + ", 1, 2, 3]",
    ],
)
def test_what_cannot_be_read_is_reported(text: str) -> None:
    found = BoxCodec().decode(f"the dog {text}", 1000, 1000)
    assert found.boxes == []
    assert found.unparsed == [text]


def test_a_group_left_open_before_the_next_one_is_reported() -> None:
    found = BoxCodec().decode("a dog [12, 40, and a cat [10, 10, 20, 20] there", 1000, 1000)
    assert found.unparsed == ["[12, 40, and a cat "]
    assert len(found.boxes) == 1


def test_brackets_without_digits_are_prose() -> None:
    found = BoxCodec().decode("a dog (brown) [sic] {1, 2, 3, 4} 5, 6, 7, 8", 1000, 1000)
    assert (found.boxes, found.unparsed) == ([], [])


@pytest.mark.parametrize("text", ["[" + "1" * 20000 + "(", "[1" + " " * 20000 + "x]", "[" * 20000, "[1,2,3" * 4000])
def test_long_nonsense_is_read_in_no_time(text: str) -> None:
    start = time.process_time()
    BoxCodec().decode(text, 1000, 1000)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("mode", "text"),
    [("norm1000", "[0, 250, 500, 999]"), ("norm1", "[0.000, 0.250, 0.501, 1.000]"), ("pixel", "[0, 50, 321, 200]")],
)
def test_the_written_form_of_each_mode(mode: str, text: str) -> None:
    assert BoxCodec(mode).encode([-3, 50, 320.5, 230], width=640, height=200) == text


@pytest.mark.parametrize(
    "box", [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, math.nan, 4], [1, 2, math.inf, 4], [3, 2, 1, 4], [1, 4, 3, 2]]
)
def test_boxes_that_are_none_are_refused(box: list[float]) -> None:
    with pytest.raises(ValueError, match=r"four finite|out of order"):
        BoxCodec().encode(box, 10, 10)


def test_unknown_mode_and_empty_image_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown box mode 'percent'"):
        BoxCodec("percent")
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        BoxCodec().encode([0, 0, 0, 0], 0, 5)
    with pytest.raises(ValueError, match="5 x -1 pixels"):
        BoxCodec().decode("nothing", 5, -1)


@settings(max_examples=60, deadline=None)
@given(first=boxes_with_area(), second=boxes_with_area())
def test_iou_and_giou_are_torchvisions(first: Tensor, second: Tensor) -> None:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    torch.testing.assert_close(box_iou(first, second), ops.box_iou(first, second), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(box_area(first), ops.box_area(first))
    rows, columns = first[:, None].expand(-1, len(second), -1), second[None].expand(len(first), -1, -1)
    expected = ops.generalized_box_iou(first, second)
    torch.testing.assert_close(paired_giou(rows, columns, eps=0.0), expected, rtol=1e-9, atol=1e-12)
