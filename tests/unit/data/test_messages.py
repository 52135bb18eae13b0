"""LLaVA's format becomes messages, and only if its placeholders fit what the sample gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cloc_mllm.data.messages import image_items, messages_of, problems_before_messages, with_images

LLAVA: dict[str, Any] = {
    "id": "1",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is <region> beside <region>?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Where is the dog?"},
        {"from": "gpt", "value": "the dog <region>"},
    ],
    "regions": [[0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7]],
}


def test_llava_becomes_messages() -> None:
    assert list(problems_before_messages(LLAVA)) == []
    assert messages_of(LLAVA) == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.jpg"},
                {"type": "text", "text": "What is "},
                {"type": "region", "box": [0, 0, 5, 5]},
                {"type": "text", "text": " beside "},
                {"type": "region", "box": [1, 1, 6, 6]},
                {"type": "text", "text": "?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Where is the dog?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "the dog "}, {"type": "region", "box": [2, 2, 7, 7]}],
        },
    ]


def test_an_image_behind_the_text_and_several_images() -> None:
    sample = {
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nSame?\n<image>"},
            {"from": "gpt", "value": "No."},
        ],
    }
    problems = [problem.problem for problem in problems_before_messages(sample)]
    assert problems == ["wrong number of <image>: the texts have 3, the sample gives 2"]
    sample["image"] = ["a.jpg", "b.jpg", "c.jpg"]
    assert [item.get("text", item.get("image")) for item in messages_of(sample)[0]["content"]] == [
        "a.jpg",
        "b.jpg",
        "Same?",
        "c.jpg",
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("regions", [[0, 0, 5, 5]], "wrong number of <region>: the texts have 3, the sample gives 1"),
        ("regions", "none", "'regions' is not a list"),
        ("image", None, "wrong number of <image>: the texts have 1, the sample gives 0"),
        ("conversations", [], "'conversations' is not a list of turns"),
        ("conversations", [{"from": "bot", "value": "a"}], "turn 0 is from 'bot'"),
        ("conversations", [{"from": "gpt"}], "turn 0 has no text"),
        ("conversations", [{"from": "gpt", "value": "a", "weight": 1}], "unknown key 'weight'"),
    ],
)
def test_llava_faults(key: str, value: Any, message: str) -> None:
    problems = [problem.problem for problem in problems_before_messages({**LLAVA, key: value})]
    assert any(message in problem for problem in problems), problems


def test_image_items_take_the_samples_image() -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm?"}]}]
    sample = {"image": "a.jpg", "messages": messages}
    before = copy.deepcopy(sample)
    assert list(problems_before_messages(sample)) == []
    assert image_items(messages_of(sample)) == ["a.jpg"]
    assert sample == before
    for broken in ({"messages": messages}, {"images": ["a", "b"], "messages": messages}):
        assert "name no image" in next(problems_before_messages(broken)).problem
    silent = {"image": "a.jpg", "messages": [{"role": "user", "content": "Hm?"}]}
    assert "no message shows it" in next(problems_before_messages(silent)).problem


def test_with_images_copies() -> None:
    messages = messages_of(LLAVA)
    filled = with_images(messages, ["picture"])
    assert image_items(filled) == ["picture"]
    assert image_items(messages) == ["a.jpg"]
