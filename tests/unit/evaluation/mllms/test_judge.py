"""The judge behind a real local server: what is sent, what is repeated, what is refused, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.mllms.judge import Judge, ReplyFile, judge_of
from tests.unit.evaluation.judge_server import serving


def test_what_is_sent_is_a_chat_completion() -> None:
    with serving(lambda prompt: f"{len(prompt)} 7") as server:
        judge = Judge(server.url + "/", "marker", key="s3cret")
        assert judge.reply("four") == "4 7"
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("marker", 0.2, 1024)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_asked_again(status: int) -> None:
    replies = iter([status, status, "8 9"])
    with serving(lambda prompt: next(replies)) as server:
        assert Judge(server.url, "marker", wait=0.001).reply("x") == "8 9"
    assert len(server.bodies) == 3


def test_a_failure_that_stays_ends_by_name() -> None:
    with serving(lambda prompt: 503) as server:
        with pytest.raises(ClocError, match=r"answered 503.*tried 3 times.*The replies so far are kept"):
            Judge(server.url, "marker", retries=2, wait=0.001).reply("x")
        assert len(server.bodies) == 3
    with pytest.raises(ClocError, match=r"cannot be reached.*refused.*tried 2 times"):
        Judge(server.url, "marker", retries=1, wait=0.001).reply("x")  # nobody serves there any more


@pytest.mark.parametrize(("reply", "problem"), [(401, "answered 401"), (b"<html>", "no chat completion")])
def test_what_will_not_pass_is_not_asked_again(reply: int | bytes, problem: str) -> None:
    with serving(lambda prompt: reply) as server:
        with pytest.raises(ClocError, match=problem):
            Judge(server.url, "marker").reply("x")
        assert len(server.bodies) == 1


def test_a_judge_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("A_KEY", "s3cret")
    with pytest.raises(ClocError, match=r"needs a judge, and there is none \(judge_url and judge_model not given\)"):
        judge_of(None, None, "A_KEY")
    with pytest.raises(ClocError, match=r"there is none \(judge_model not given\)"):
        judge_of("http://x/v1", None, "A_KEY")
    with pytest.raises(ClocError, match="no http or https address"):
        judge_of("x/v1", "marker", "A_KEY")
    assert judge_of("http://x/v1", "marker", "A_KEY").key == "s3cret"
    assert judge_of("http://x/v1", "marker", "NO_SUCH_KEY").key is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://y/v1")
    assert judge_of(None, "marker", "A_KEY").url == "http://y/v1"


def test_replies_are_kept_and_not_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    with serving(lambda prompt: f"reply to {prompt}") as server:
        judge = Judge(server.url, "marker", key="s3cret")
        first = ReplyFile(path)
        assert [first.reply(judge, prompt, {"id": prompt}) for prompt in "aba"] == [f"reply to {one}" for one in "aba"]
        assert first.asked == 2
        path.write_text(path.read_text() + '{"digest": "cut o')  # as a crash leaves it
        again = ReplyFile(path)
        assert [again.reply(judge, prompt, {"id": prompt}) for prompt in "abc"] == [f"reply to {one}" for one in "abc"]
        assert again.asked == 1
        # Another judge has not replied yet.
        assert again.reply(Judge(server.url, "other"), "a", {}) == "reply to a"
        assert len(server.bodies) == 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("id") for line in lines] == ["a", "b", "c", None]
    assert "s3cret" not in path.read_text()
    path.write_text('{"reply": 3}\n')
    with pytest.raises(ClocError, match=r"judge\.jsonl: sample '1': holds no replies of a judge"):
        ReplyFile(path)
