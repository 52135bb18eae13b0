"""Judged tasks: refused without a judge, and calls that fail are counted, never scored."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.results import metrics_of
from cloc_mllm.evaluation.lmms.runs import Found, Run, evaluate_here
from tests import builders_lmms
from tests.unit.evaluation.lmms.conftest import Told


class Judge(ThreadingHTTPServer):
    """An OpenAI-compatible server that fails for some questions.

    Attributes:
        fails: Words; a question that holds one of them is answered with an error.
        asked: The requests, by path and body.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fails: tuple[str, ...] = ()
        self.asked: list[tuple[str, dict[str, Any]]] = []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        said = body["messages"][-1]["content"]
        if any(word in said for word in self.server.fails):
            self.send_error(500)
            return
        answer = {"model": body["model"], "choices": [{"message": {"role": "assistant", "content": "8 6\nwell"}}]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def judge() -> Iterator[Judge]:
    server = Judge()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def asked(folder: Path, **options: Any) -> Found:
    run = Run("told", ("ferret",), str(folder / "out"), include_path=str(folder), device="cpu", **options)
    found = evaluate_here(run, Told(lambda question, _: "It is."))
    assert found is not None
    return found


def test_failed_calls_are_left_out_and_counted(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the calls fail. lmms-eval would report (6 - 1) / (8 - 1), 71.4; the calls that went well say 75."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    builders_lmms.ferret(tmp_path, 4)
    judge.fails = ("object 1 ", "object 3 ")
    metrics, details = metrics_of(asked(tmp_path, judge=judge.base, judge_model="the-judge"))
    assert details["judge"] == {"ferret": {"calls": 4, "failed": 2}}
    assert metrics["ferret/gpt_eval_ferret_all"].value == pytest.approx(0.75)
    assert metrics["ferret/gpt_eval_ferret_all"].n == 2
    assert metrics["ferret/gpt_eval_ferret_ground_conv"].n == 1
    assert "ferret/gpt_eval_ferret_refer_reason" not in metrics, "its only call failed"
    assert {path for path, _ in judge.asked} == {"/v1/chat/completions"}
    assert {body["model"] for _, body in judge.asked} == {"the-judge"}


def test_no_score_where_every_call_failed(judge: Judge, tmp_path: Path) -> None:
    builders_lmms.ferret(tmp_path, 1)
    judge.fails = ("object",)
    found = asked(tmp_path, judge=judge.base)
    assert found.scores["ferret"]["gpt_eval_ferret_all,none"] == 100.0, "what lmms-eval makes of nothing"
    with pytest.raises(ClocError, match="every call of the judge failed"):
        metrics_of(found)


def test_no_judge_no_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    builders_lmms.ferret(tmp_path, 1)
    with pytest.raises(ClocError, match="'ferret' is scored by a judge, and there is none"):
        asked(tmp_path)


@pytest.mark.parametrize("name", ["mm-vet", "llava-w"])
def test_the_shipped_judged_tasks_are_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ClocError, match="is scored by a judge, and there is none"):
        evaluate_here(Run("told", (name,), str(tmp_path)), Told(lambda *_: ""))


def test_a_judge_whose_failures_cannot_be_told_is_refused(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMBench with a judge asks it while it adds up: no sample says which calls failed."""
    shipped = builders_lmms.SHIPPED / "mmbench" / "mmbench_en_dev.yaml"
    (tmp_path / "mmbench_en_dev.yaml").write_text(f"include: {shipped}\ntask: mmbench_en_dev\n")
    run = Run("told", ("mmbench_en_dev",), str(tmp_path), include_path=str(tmp_path), judge=judge.base)
    with pytest.raises(ClocError, match="do not tell failed calls from scores"):
        evaluate_here(run, Told(lambda *_: ""))
    assert not judge.asked


def test_mm_vets_failed_calls_have_no_judges_name() -> None:
    """The task scores a failed call 0, as it does a wrong answer."""

    def sample(number: int, score: float, by: str) -> dict[str, Any]:
        metrics = {"gpt_eval_score": {"score": score, "eval_model": by, "question_id": f"v{number}"}}
        return {"doc_id": number, "doc": {}, "target": "", "answer": "", "tokens": None, "metrics": metrics}

    rows = [sample(0, 0.8, "judge"), sample(1, 0.0, ""), sample(2, 0.4, "judge"), sample(3, 0.0, "judge")]
    metrics, details = metrics_of(
        Found({"mmvet": {"gpt_eval_score,none": 30.0}}, {"mmvet": rows}, {"mmvet": 4}, {}, "0")
    )
    assert details["judge"]["mmvet"] == {"calls": 4, "failed": 1}
    assert metrics["mmvet/gpt_eval_score"].value == pytest.approx(0.4)
    assert metrics["mmvet/gpt_eval_score"].n == 3
