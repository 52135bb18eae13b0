"""Boxes printed anew in the coordinates that a task reads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.frames import BOX_FORMATS, codec_for, reprinted, require_box_format
from cloc_mllm.models.answer_text import AnswerText, read_answer
from cloc_mllm.models.boxes import BOX_MODES, BoxCodec

SIDES = st.integers(8, 2000)


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        ("refcoco_bbox_rec_testA", "norm1"),
        ("refcoco+_bbox_rec_val", "norm1"),
        ("refcocog_bbox_rec_test", "norm1"),
        ("refcoco_plus_grounding_testB", "pixel"),
        ("cloc_scenes_grounding", "norm1"),
        ("gqa", None),
        ("refcoco_bbox_val", None),
    ],
)
def test_each_task_gets_the_frame_it_reads(task: str, mode: str | None) -> None:
    codec = codec_for(task)
    assert (codec and codec.mode) == mode


def test_a_frame_of_ones_own_wins() -> None:
    assert codec_for("refcoco_bbox_rec_testA", "model") is None
    for mode in BOX_MODES:
        codec = codec_for("gqa", mode)
        assert codec is not None
        assert codec.mode == mode
    for name in BOX_FORMATS:
        require_box_format(name)
    with pytest.raises(ClocError, match="no box_format 'xywh'"):
        require_box_format("xywh")


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    SIDES,
    SIDES,
    st.sampled_from(BOX_MODES),
    st.sampled_from(BOX_MODES),
    st.text("ab [],(12", max_size=12),
)
def test_a_box_is_the_same_in_any_frame(
    data: st.DataObject, width: int, height: int, own: str, other: str, filler: str
) -> None:
    """What is read from the new text is the model's box to within half a step of either frame; the rest stays."""
    corners = [sorted(data.draw(st.lists(st.floats(0, side), min_size=2, max_size=2))) for side in (width, height)]
    box = [corners[0][0], corners[1][0], corners[0][1], corners[1][1]]
    answer = AnswerText("a thing")
    answer.add_box(box, (width, height), 0, BoxCodec(own))
    answer.add_text(" here")
    text = reprinted(answer, BoxCodec(own), BoxCodec(other), [(width, height)])
    found = BoxCodec(other).decode(text, width, height)
    step = {"norm1000": 1 / 999, "norm1": 1 / 1000, "pixel": 1 / min(width, height)}[other]
    assert len(found.boxes) == 1
    for value, true, side in zip(found.boxes[0], box, (width, height) * 2, strict=True):
        assert abs(value - true) <= 0.51 * step * side
    assert text.startswith("a thing [")
    assert text.endswith("] here")
    # Whatever is typed, nothing raises, and an answer without a box stays as it is.
    typed = read_answer(filler, (width, height), 0, BoxCodec(own))
    again = reprinted(typed, BoxCodec(own), BoxCodec(other), [(width, height)])
    assert typed.boxes or again == filler


def test_a_box_typed_beside_the_heads_own_is_not_mixed_up() -> None:
    answer = AnswerText("at [0, 0, 999, 999] or")
    answer.add_box([10.0, 10.0, 20.0, 20.0], (100, 100), 0, BoxCodec())
    text = reprinted(answer, BoxCodec(), BoxCodec("pixel"), [(100, 100)])
    assert text == "at [0, 0, 100, 100] or [10, 10, 20, 20]"


def test_without_a_picture_nothing_is_a_box() -> None:
    assert reprinted(AnswerText("[1, 2, 3, 4]"), BoxCodec(), BoxCodec("norm1"), []) == "[1, 2, 3, 4]"
