"""Captions by an OpenAI-compatible endpoint, over real HTTP: what is sent, what is tried again, what is refused."""

from __future__ import annotations

import base64
import io
import socket
import threading
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.captioners import prompts
from cloc_mllm.labeling.stages import CAPTIONERS, build_stage
from tests.builders import noise_image
from tests.chat_server import chat_server, failed, said

IMAGES = [noise_image(40, 30, seed) for seed in range(4)]
SAMPLES = [{"id": f"s{k}"} for k in range(4)]
QUICK = {"backoff": 0.01, "timeout": 5, "retries": 2}


def captioner(address: str, **options: Any) -> Any:
    return build_stage(CAPTIONERS, f"openai:{address}#tiny/model", options={**QUICK, **options})


def picture_of(body: dict[str, Any]) -> Image.Image:
    uri = body["messages"][0]["content"][0]["image_url"]["url"]
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_what_is_sent_and_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    wide = noise_image(400, 100)
    with chat_server(lambda body, number: said(" a  red\ncircle ")) as server:
        found = captioner(server.address, max_side=200, max_new_tokens=9)([wide], [{"id": "w"}])
    assert found == [["a red circle"]]
    (body,) = server.bodies
    assert body["path"] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    expected = {"model": "tiny/model", "temperature": 0, "max_tokens": 9, "stream": False}
    assert {name: body[name] for name in expected} == expected
    assert body["messages"][0]["content"][1] == {"type": "text", "text": prompts.DESCRIBE}
    assert picture_of(body).size == (200, 50)
    assert wide.size == (400, 100)


def test_answers_are_in_order_whatever_order_they_come_in() -> None:
    everyone = threading.Barrier(4, timeout=10)  # nobody is answered before all have asked
    with chat_server(lambda body, number: (everyone.wait(), said(str(picture_of(body).size[0])))[1]) as server:
        images = [noise_image(20 + k, 20) for k in range(4)]
        assert captioner(server.address, concurrency=4)(images, SAMPLES) == [["20"], ["21"], ["22"], ["23"]]
    assert server.most_at_once == 4
    with chat_server(lambda body, number: said("x")) as server:
        captioner(server.address, concurrency=1)(IMAGES, SAMPLES)
    assert server.most_at_once == 1
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("reply", [failed(429, Retry_After="0.01"), failed(500), failed(503, Retry_After="later")])
def test_what_may_pass_is_tried_again(reply: Any) -> None:
    with chat_server(lambda body, number: reply if number < 2 else said("at last")) as server:
        assert captioner(server.address)([IMAGES[0]], [SAMPLES[0]]) == [["at last"]]
        assert len(server.bodies) == 3
    with (
        chat_server(lambda body, number: reply) as server,
        pytest.raises(ClocError, match=r"sample 's0'.*answered (429|5..): no \(tried 3 times\)"),
    ):
        captioner(server.address)([IMAGES[0]], [SAMPLES[0]])
    assert len(server.bodies) == 3


def test_a_timeout_and_a_dead_server_are_named() -> None:
    release = threading.Event()
    with chat_server(lambda body, number: (release.wait(10), said("late"))[1]) as server:
        with pytest.raises(ClocError, match=r"sample 's1'.*cannot be reached.*tried 2 times"):
            captioner(server.address, timeout=0.2, retries=1)([IMAGES[0]], [SAMPLES[1]])
        release.set()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ClocError, match="cannot be reached"):
        captioner(f"http://127.0.0.1:{port}/v1")([IMAGES[0]], [SAMPLES[0]])


def test_a_refusal_is_not_repeated_and_stops_the_others() -> None:
    with chat_server(lambda body, number: failed(400, "too large") if number == 0 else said("x")) as server:
        with pytest.raises(ClocError, match="sample 's0': the endpoint answered 400: too large"):
            captioner(server.address, concurrency=1)(IMAGES, SAMPLES)
        assert len(server.bodies) <= 2
    with (
        chat_server(lambda body, number: failed(401)) as server,
        pytest.raises(ClocError, match="Set the environment variable OPENAI_API_KEY"),
    ):
        captioner(server.address)([IMAGES[0]], [SAMPLES[0]])


def test_no_answer_is_no_caption_and_nonsense_is_an_error() -> None:
    with chat_server(lambda body, number: said([None, "", "a dog"][number])) as server:
        assert captioner(server.address, concurrency=1)(IMAGES[:3], SAMPLES[:3]) == [[], [], ["a dog"]]
    for content in (b"<html>", {"choices": []}, {"choices": [{"message": None}]}, b"\xff"):
        with (
            chat_server(lambda body, number, content=content: (200, content, {})) as server,
            pytest.raises(ClocError, match="sample 's0': the endpoint's answer is no chat completion"),
        ):
            captioner(server.address)([IMAGES[0]], [SAMPLES[0]])


def test_further_fields_of_the_request() -> None:
    body = {"max_tokens": None, "max_completion_tokens": 5, "temperature": 0.5}
    with chat_server(lambda body, number: said("x")) as server:
        captioner(server.address, body=body)([IMAGES[0]], [SAMPLES[0]])
    asked = server.bodies[0]
    assert "max_tokens" not in asked
    assert (asked["max_completion_tokens"], asked["temperature"]) == (5, 0.5)


def test_identity_is_of_the_model_and_not_of_its_place() -> None:
    here, there = (build_stage(CAPTIONERS, f"openai:http://{host}/v1#m").identity() for host in ("a", "b:1"))
    assert here == there
    for options in ({"prompt": "what"}, {"max_new_tokens": 7}, {"revision": "q4"}, {"body": {"seed": 1}}):
        assert build_stage(CAPTIONERS, "openai:http://a/v1#m", options=options).identity() != here
    assert build_stage(CAPTIONERS, "openai:http://a/v1#n").identity() != here
    # How hard it is tried changes no answer.
    assert build_stage(CAPTIONERS, "openai:http://a/v1#m", options={"retries": 1, "concurrency": 2}).identity() == here


@pytest.mark.parametrize("spec", ["openai", "openai:http://a/v1", "openai:a#m", "openai:http://a/v1#"])
def test_addresses_that_are_none(spec: str) -> None:
    with pytest.raises(ClocError, match="address"):
        build_stage(CAPTIONERS, spec)
