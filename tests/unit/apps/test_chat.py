"""The chat: boxes in pixels on both sides, mistakes answered and survived, turns remembered."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.apps import cli
from cloc_mllm.apps.chat import (
    ChatSession,
    converse,
    format_reply,
    load_picture,
    parse_box,
    place_regions,
    save_picture,
)
from cloc_mllm.errors import ClocError


@dataclass
class _Answer:
    text: str
    boxes: list[dict[str, Any]] = field(default_factory=list)
    unparsed: list[str] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": [{"type": "text", "text": f"{self.text} as a turn"}]}


class _Stream:
    """An answer that comes word by word."""

    def __init__(self, answer: _Answer) -> None:
        self.answer = answer

    def __iter__(self) -> Iterator[str]:
        return iter(self.answer.text.split(" "))


class _Scripted:
    """Answers from a list and remembers what it was asked. The real model is talked with in tests/integration."""

    def __init__(self, *answers: _Answer) -> None:
        self.answers = list(answers)
        self.asked: list[list[dict[str, Any]]] = []

    def chat(self, conversations: Sequence[Any], max_new_tokens: int = 0) -> list[Any]:
        self.asked += conversations
        return [self.answers.pop(0)]

    def stream(self, conversation: Any, max_new_tokens: int = 0) -> _Stream:
        return _Stream(self.chat([conversation])[0])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.new("RGB", (120, 80), "#204060").save(path)
    return path


def _session(*answers: _Answer, image: Path | None = None) -> tuple[ChatSession, _Scripted]:
    model = _Scripted(*answers)
    session = ChatSession(model)
    if image is not None:
        session.open_image(image)
    return session, model


def test_regions_stand_where_the_question_puts_them(picture: Path) -> None:
    session, model = _session(_Answer("yes"), image=picture)
    session.ask("Is <region> above <region>?", [[0, 0, 10, 10], [20, 20, 60, 60]])
    (turn,) = model.asked[0]
    kinds = [item["type"] for item in turn["content"]]
    assert kinds == ["image", "text", "region", "text", "region", "text"]
    assert [item["box"] for item in turn["content"] if item["type"] == "region"] == [[0, 0, 10, 10], [20, 20, 60, 60]]


@pytest.mark.parametrize(
    ("question", "count", "placed"),
    [
        ("", 1, "What is <region>?"),
        ("", 2, "What is <region> and <region>?"),
        ("What colour is this?", 1, "What colour is this? <region>"),
        ("Name <region>.", 1, "Name <region>."),
        ("How many?", 0, "How many?"),
    ],
)
def test_a_box_without_a_place_is_put_after_the_question(question: str, count: int, placed: str) -> None:
    assert place_regions(question, count) == placed


@pytest.mark.parametrize(("question", "count"), [("<region>?", 0), ("<region> <region>", 1), ("  ", 0)])
def test_a_wrong_number_of_regions_is_refused(question: str, count: int) -> None:
    with pytest.raises(ClocError, match=r"wrong number of <region>|there is no question"):
        place_regions(question, count)


@pytest.mark.parametrize("text", ["1,2,30,40", "1 2 30 40", "[1, 2, 30, 40]", "1.0,2,3e1,40"])
def test_boxes_are_read_in_any_common_form(text: str) -> None:
    assert parse_box(text) == [1, 2, 30, 40]


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1;2;3;4"])
def test_what_is_no_box_is_refused(text: str) -> None:
    with pytest.raises(ClocError, match="is not a box"):
        parse_box(text)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([30, 0, 10, 10], "no area: x2 must be greater"),
        ([0, 5, 10, 5], "no area"),
        ([0, 0, 121, 10], r"outside the image, which is 120 x 80"),
        ([-1, 0, 10, 10], "outside the image"),
        ([0, 0, float("nan"), 10], "not four numbers"),
    ],
)
def test_a_box_that_cannot_be_is_refused(box: list[float], problem: str, picture: Path) -> None:
    session, model = _session(image=picture)
    with pytest.raises(ClocError, match=problem):
        session.ask("What is this?", [box])
    assert model.asked == []


def test_a_box_without_an_image_is_refused() -> None:
    with pytest.raises(ClocError, match="no image"):
        _session()[0].ask("What is this?", [[0, 0, 5, 5]])


def test_the_image_is_shown_once_and_turns_are_remembered(picture: Path) -> None:
    found = {"phrase": "the star", "box": [10.0, 20.0, 50.0, 60.0]}
    session, model = _session(_Answer("the star [83, 250, 416, 750]", [found]), _Answer("red"), image=picture)
    session.ask("Where is the star?")
    session.ask("What colour is it?")
    first, reply, second = model.asked[1]
    assert [item["type"] for item in first["content"]] == ["image", "text"]
    assert [item["type"] for item in second["content"]] == ["text"]
    assert reply["role"] == "assistant"
    assert reply["content"][0]["text"].endswith("as a turn"), "the answer goes back in the model's own form"


def test_another_image_starts_anew(picture: Path) -> None:
    session, model = _session(_Answer("a"), _Answer("b"), image=picture)
    session.ask("One?")
    session.open_image(picture)
    session.ask("Two?")
    assert len(model.asked[1]) == 1


def test_text_alone_is_enough() -> None:
    session, model = _session(_Answer("Paris"))
    assert session.ask("What is the capital of France?").text == "Paris"
    assert model.asked[0][0]["content"] == [{"type": "text", "text": "What is the capital of France?"}]


def test_interactive_commands_and_mistakes(picture: Path, tmp_path: Path) -> None:
    session, model = _session(_Answer("a star", [{"phrase": "a star", "box": [1, 2, 30, 40]}]), _Answer("two"))
    drawn = tmp_path / "drawn.png"
    lines = [
        "/box 1,2,3,4\n",  # no image yet
        f"/image {tmp_path / 'missing.png'}\n",
        f"/image {picture}\n",
        "/box 1,2,900,40\n",
        "/box 1,2,30,40\n",
        "\n",  # the default question about the box
        f"/draw {drawn}\n",
        "/nonsense\n",
        "/help\n",
        "/clear\n",
        "How many?\n",
        "/quit\n",
        "never asked\n",
    ]
    out = io.StringIO()
    converse(session, lines, out)
    text = out.getvalue()
    assert text.count("! ") == 4
    assert "120 x 80 pixels" in text
    assert "a star: [1, 2, 30, 40] px" in text
    assert Image.open(drawn).size[0] >= 120
    assert len(model.asked) == 2
    assert model.asked[0][0]["content"][1:] == [
        {"type": "text", "text": "What is "},
        {"type": "region", "box": [1, 2, 30, 40]},
        {"type": "text", "text": "?"},
    ]
    assert len(model.asked[1]) == 1, "/clear keeps nothing of the turns"
    assert model.asked[1][0]["content"][0]["type"] == "image", "/clear keeps the image"


def test_what_was_not_read_is_told(picture: Path) -> None:
    session, _ = _session(_Answer("at [1, 2, 3", [], ["[1, 2, 3"]), image=picture)
    assert "could not be read as a box: [1, 2, 3" in format_reply(session.ask("Where?"))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_answer_grow(picture: Path) -> None:
    answer = _Answer("the star", [{"phrase": "the star", "box": [1, 2, 30, 40]}])
    session, _ = _session(answer, image=picture)
    out = _Terminal()
    converse(session, ["Where is it?"], out)
    assert out.getvalue() == "thestar\n  the star: [1, 2, 30, 40] px\n"


def test_json_form_is_plain_json(picture: Path) -> None:
    session, _ = _session(_Answer("a star", [{"phrase": "a star", "box": [1.5, 2, 30, 40]}]), image=picture)
    reply = session.ask("", [[1, 2, 30, 40]])
    record = json.loads(json.dumps(reply.to_dict(str(picture))))
    assert record["boxes"] == [{"phrase": "a star", "box": [1.5, 2, 30, 40]}]
    assert record["boxes_in"] == [[1, 2, 30, 40]]
    assert "pixels of the original image" in record["frame"]


def test_broken_images_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    Image.new("RGB", (64, 64)).save(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    for path in (broken, tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(ClocError, match=path.name):
            load_picture(path)


def test_a_picture_can_only_be_saved_as_a_picture(tmp_path: Path) -> None:
    with pytest.raises(ClocError, match=r"out.nonsense.*out\.png"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "out.nonsense")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--image", "missing.png", "What?"], "missing.png"),
        (["--image", "{picture}", "--box", "1,2,3"], "is not a box"),
        (["--json"], "--json and --draw are for one question"),
        (["--draw", "out.png", "What?"], "--draw needs an image"),
        (["--max-new-tokens", "0", "What?"], "--max-new-tokens"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(
    words: list[str], problem: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", "no-such-model", *(word.format(picture=picture) for word in words)]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert len(err.splitlines()) == 1


def test_a_question_after_boxes_is_still_the_question() -> None:
    from cloc_mllm.apps.commands.chat import _boxes_and_question

    parser = cli.build_parser(["chat"])
    args = parser.parse_args(["chat", "M", "--image", "f", "--box", "1,2,3,4", "5,6,7,8", "What is it?"])
    assert _boxes_and_question(args) == [["1,2,3,4", "5,6,7,8"]]
    assert args.question == "What is it?"
    args = parser.parse_args(["chat", "M", "What?", "--box", "1,2,3,4", "--box", "5,6,7,8"])
    assert _boxes_and_question(args) == [["1,2,3,4"], ["5,6,7,8"]]
    assert args.question == "What?"
