"""The schema: what is right passes, what is wrong is named, and nothing a file may hold makes the checks fall over."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.data.inspection.faults import sample_problems
from cloc_mllm.data.inspection.pictures import PictureSizes
from cloc_mllm.data.messages import messages_of, problems_before_messages
from cloc_mllm.data.schema import (
    box_problems,
    cleaned,
    control_problems,
    conversation_problems,
    raise_first,
    region_text_problems,
    shape_problems,
)
from cloc_mllm.errors import ClocError
from tests.builders import noise_image

SIZE = (40, 30)
REGION_TEXT: dict[str, Any] = {
    "id": "one",
    "image": "one.png",
    "width": 40,
    "height": 30,
    "caption": "a cat",
    "regions": [{"box": [1, 2, 10, 20], "text": "cat", "score": 0.5}, {"box": [0, 0, 40, 30], "text": "all"}],
    "source": "test",
}
CONVERSATION: dict[str, Any] = {
    "id": "two",
    "task": "referring",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "one.png"},
                {"type": "text", "text": "What is "},
                {"type": "region", "box": [1, 2, 10, 20]},
                {"type": "region", "point": [3, 4], "image": 0},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "cat "}, {"type": "region", "box": [1, 2, 10, 20]}]},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
}


def region_problems(**changes: Any) -> list[str]:
    return [found.problem for found in region_text_problems({**REGION_TEXT, **changes}, SIZE)]


def talk_problems(sample: dict[str, Any], **options: Any) -> list[str]:
    found = list(problems_before_messages(sample))
    found = found or list(conversation_problems(sample, messages_of(sample), [SIZE], **options))
    return [problem.problem for problem in found]


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """`CONVERSATION` with one place of it replaced."""
    sample = copy.deepcopy(CONVERSATION)
    place: Any = sample
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return sample


def test_sound_samples_pass() -> None:
    assert region_problems() == []
    assert region_problems(regions=[]) == []
    assert region_problems(captions=["a cat", "one cat"]) == []
    assert talk_problems(CONVERSATION) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": ""}, "empty text: the caption is blank"),
        ({"caption": "  "}, "empty text: the caption is blank"),
        ({"caption": None}, "the caption is missing"),
        ({"captions": []}, "'captions' is not a list"),
        ({"captions": ["a", ""]}, "caption 1 is blank"),
        ({"regions": None}, "'regions' is missing"),
        ({"regions": ["cat"]}, "region 0 is not an object"),
        ({"regions": [{"box": [1, 2, 3, 4], "text": " "}]}, "empty text: the text of region 0 is blank"),
        ({"regions": [{"box": [1, 2, 3, 4]}]}, "the text of region 0 is missing"),
        ({"regions": [{"box": [1, 2, 3, 4], "text": "a", "score": "high"}]}, "the score of region 0"),
        ({"regions": [{"box": [1, 2, 3, 4], "text": "a", "unique": "yes"}]}, "'unique' of region 0 is 'yes', not true"),
        ({"regions": [{"box": [1, 2, 3, 4], "text": "a", "unique": 1}]}, "'unique' of region 0 is 1, not true"),
        ({"regions": [{"box": [1, 2, 3, 4], "text": "a", "bbox": []}]}, "unknown key 'bbox' in region 0"),
        ({"regions": [{"box": [1, 2, 3], "text": "a"}]}, "region 0's box [1, 2, 3] is not a list of 4 numbers"),
        ({"capton": "a"}, "unknown key 'capton'"),
        ({"width": 41}, "width is stated as 41, but the picture's is 40"),
        ({"height": 0}, "height is 0, not a positive number"),
    ],
)
def test_region_text_faults(changes: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in region_problems(**changes))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("messages",), [], "'messages' is not a list of turns"),
        (("messages", 1, "role"), "human", "role 'human'"),
        (("messages", 1, "role"), "assistant", "turn of the assistant, not of the user"),
        (("messages", 3, "role"), "system", "message 3 is a system message"),
        (("messages", 1, "content"), "", "empty text"),
        (("messages", 1, "content"), [], "neither a text nor a list"),
        (("messages", 1, "content", 1), {"type": "text", "text": ""}, "empty text"),
        (("messages", 2, "content"), [{"type": "text", "text": " "}], "empty text"),
        (("messages", 1, "content", 1), {"type": "video"}, "item of type 'video'"),
        (("messages", 1, "content", 1), {"type": "text", "text": "a", "txt": 1}, "unknown key 'txt'"),
        (("messages", 1, "content", 2), {"type": "region"}, "exactly one of 'box', 'point', 'mask', 'scribble'"),
        (("messages", 1, "content", 2), {"type": "region", "box": [5, 5, 1, 9]}, "x2 < x1"),
        (("messages", 1, "content", 2), {"type": "region", "box": [1, 1, 90, 9]}, "outside the image"),
        (("messages", 1, "content", 2), {"type": "region", "point": [1, 91]}, "outside the image"),
        (("messages", 1, "content", 2, "image"), 1, "is on image 1, but the conversation has 1 images"),
        (("messages", 1, "content", 0), {"type": "text", "text": "Look."}, "is on an image before it"),
        (
            ("messages", 1, "content", 2),
            {"type": "region", "mask": []},
            "a mask of message 1: the mask has no polygons",
        ),
        (("messages", 1, "content", 2), {"type": "region", "mask": "no.png"}, "mask 'no.png' does not exist"),
        (
            ("messages", 1, "content", 2),
            {"type": "region", "mask": {"size": [40, 30], "counts": [0, 1200]}},
            "the mask is 30 x 40 pixels, but its image is 40 x 30",
        ),
        (("messages", 1, "content", 2), {"type": "region", "scribble": [[1, 1], [41, 2]]}, "outside the image"),
        (("messages", 1, "content", 2), {"type": "region", "scribble": {"points": []}}, "a scribble is a list of"),
        (("messages", 2, "content", 1), {"type": "region", "scribble": [[1, 1], [2, 2]]}, "holds a scribble"),
        (("messages", 2, "content", 1), {"type": "region", "point": [1, 2]}, "the assistant's and holds a point"),
        (("messages", 2, "content", 1), {"type": "image", "image": "a.png"}, "the assistant's and holds an image"),
        (("messages", 2, "content", 1, "phrase"), "", "the phrase of a region"),
        (("messages", 0, "content"), [{"type": "region", "box": [1, 2, 3, 4]}], "a system message and holds a region"),
        (("messages", 3, "content"), "What is <region>?", "holds '<region>'"),
        (("messages", 4), {"role": "assistant"}, "neither a text nor a list"),
        (("task2",), 1, "unknown key 'task2'"),
    ],
)
def test_conversation_faults(path: tuple[Any, ...], value: Any, message: str) -> None:
    assert any(message in problem for problem in talk_problems(changed(path, value)))


def test_a_conversation_ends_with_an_answer_and_a_question_does_not() -> None:
    asked = changed(("messages",), CONVERSATION["messages"][:-1])
    assert any("the last message is not the assistant's" in problem for problem in talk_problems(asked))
    assert talk_problems(asked, answered=False) == []
    assert any("the last message is not the user's" in p for p in talk_problems(CONVERSATION, answered=False))


def test_a_region_is_on_the_image_shown_last() -> None:
    sample = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "One."}]},
            {"role": "assistant", "content": "Yes?"},
            {
                "role": "user",
                "content": [{"type": "image", "image": "b"}, {"type": "region", "box": [0, 0, 50, 50]}],
            },
            {"role": "assistant", "content": [{"type": "region", "box": [0, 0, 50, 50], "image": 0}]},
        ]
    }
    problems = [p.problem for p in conversation_problems(sample, messages_of(sample), [(20, 20), (60, 60)])]
    assert len(problems) == 1
    assert "message 3" in problems[0]
    assert "20 x 20" in problems[0]


coordinates = st.one_of(st.integers(-20, 60), st.floats(-20, 60, allow_nan=False))


@given(st.lists(coordinates, min_size=4, max_size=4))
def test_a_box_passes_exactly_if_it_is_ordered_and_inside(box: list[float]) -> None:
    x1, y1, x2, y2 = box
    right = 0 <= x1 < x2 <= SIZE[0] and 0 <= y1 < y2 <= SIZE[1]
    assert (next(box_problems(box, SIZE), None) is None) == right


@pytest.mark.parametrize("box", [[0, 0, 1, float("nan")], [0, 0, 1, True], "0011", None, [0, 0, 1], [[0, 0], [1, 1]]])
def test_what_is_no_box(box: Any) -> None:
    (found,) = box_problems(box, SIZE)
    assert "is not a list of 4 numbers" in found.problem


def test_the_first_problem_is_raised_with_file_and_sample() -> None:
    with pytest.raises(ClocError, match=r"data.jsonl: sample 'line 7'.*unknown key 'capton'.*'caption'"):
        raise_first(region_text_problems({**REGION_TEXT, "capton": "a"}, SIZE), "data.jsonl", "line 7")
    raise_first(region_text_problems(REGION_TEXT, SIZE), "data.jsonl", "line 7")


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
KEYS = sorted(
    {*REGION_TEXT, *CONVERSATION, "box", "text", "role", "content", "type", "conversations", "from", "value", "images"}
)
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "image", "region", "text", "<image>", "<region>"])
anything = st.recursive(
    st.one_of(scalars, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYS), anything, max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_object_is_judged_without_falling_over(sample: dict[str, Any]) -> None:
    """No object is a sound sample by chance: the strategies make no image file that exists."""
    assert isinstance(sample_problems(sample, None, PictureSizes()), list)


@given(st.sampled_from(["caption", "regions", "image", "messages"]), anything)
@settings(max_examples=200, deadline=None)
def test_a_sound_sample_with_any_value_in_one_place_is_judged(key: str, value: Any) -> None:
    base = CONVERSATION if key == "messages" else {**REGION_TEXT, "image": noise_image()}
    assert isinstance(sample_problems({**base, key: value}, None, PictureSizes()), list)


@given(
    st.sampled_from(["mask", "scribble"]),
    st.one_of(anything, st.fixed_dictionaries({"size": anything, "counts": anything})),
)
@settings(max_examples=300, deadline=None)
def test_a_shape_of_any_value_is_judged(kind: str, value: Any) -> None:
    assert isinstance(list(shape_problems(kind, value, SIZE, "it")), list)


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 4]), anything), min_size=1, max_size=3),
    st.sampled_from(["role", "content"]),
)
@settings(max_examples=200, deadline=None)
def test_messages_with_any_value_in_some_places_are_judged(edits: list[tuple[int, Any]], key: str) -> None:
    sample = copy.deepcopy(CONVERSATION)
    for number, value in edits:
        sample["messages"][number][key] = value
    assert isinstance(sample_problems(sample, None, PictureSizes()), list)


@given(st.text(st.sampled_from("ab \t\n\x00\x07\x85\ud800\u202e猫"), max_size=12))
def test_cleaning_takes_out_what_the_schema_refuses_and_nothing_else(text: str) -> None:
    counts: Counter[str] = Counter()
    clean = cleaned(text, counts)
    assert not list(control_problems(clean, "it"))
    assert bool(list(control_problems(text, "it"))) == (counts["texts_cleaned"] == 1) == (clean != text)
    kept = set("\x00\x07\x85\ud800 ")
    assert [letter for letter in clean if letter not in kept] == [letter for letter in text if letter not in kept]
    clean.encode()
