"""A client of OpenAI-compatible endpoints: chat completions, several at a time, tried again where that may help.

vLLM, SGLang, llama.cpp, `transformers serve` and OpenAI speak this protocol
(https://platform.openai.com/docs/api-reference/chat). The standard library is enough for it.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.stage_options import StageOptions
from cloc_mllm.labeling.stages import StageError

API_KEY = "OPENAI_API_KEY"
_MAY_PASS = frozenset({408, 409, 425, 429})
_OF_THE_REQUEST = frozenset({400, 413, 415, 422})
_LONGEST_PAUSE = 60.0

Messages = list[dict[str, Any]]


class EndpointOptions(StageOptions):
    """How an endpoint is asked.

    Attributes:
        max_new_tokens: Longest answer in tokens (`max_tokens` of the request).
        concurrency: Requests under way at a time.
        timeout: Seconds to wait for an answer.
        retries: Further tries after 429, 408, 409, 425, 5xx, a timeout or a broken connection.
        backoff: Seconds before the second try, doubled with each further one; `Retry-After` comes first. 60 at most.
        body: Further fields of the request, or others in place of ours; one that is null is left out, such as
            `{"max_tokens": null, "max_completion_tokens": 128}`.
        revision: What tells the server's model from others of that name; only recorded.
    """

    max_new_tokens: PositiveInt = 128
    concurrency: PositiveInt = 8
    timeout: PositiveFloat = 120.0
    retries: NonNegativeInt = 5
    backoff: NonNegativeFloat = 1.0
    body: Annotated[dict[str, Any], Field(default_factory=dict)]
    revision: str | None = None


class ChatEndpoint:
    """A model behind an address.

    Args:
        target: `BASE_URL#MODEL`, such as `http://localhost:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct`.
        options: How it is asked.
        key: Sent as a bearer token, and written nowhere; default what the environment's `OPENAI_API_KEY` holds.

    Raises:
        ClocError: The target is not of that form.
    """

    def __init__(self, target: str, options: EndpointOptions, key: str | None = None) -> None:
        base, _, self.model = target.partition("#")
        if not base.startswith(("http://", "https://")) or not self.model:
            remedy = "Write BASE_URL#MODEL, as in http://localhost:8000/v1#NAME."
            raise ClocError(f"'{target}' is no address of a model", remedy=remedy)
        self.url, self.options = f"{base.rstrip('/')}/chat/completions", options
        self._key = key or os.environ.get(API_KEY)

    def answer(self, conversations: Sequence[Messages], names: Sequence[str]) -> list[str]:
        """Ask several questions at a time.

        Args:
            conversations: Messages in OpenAI's format.
            names: What each is about, for messages.

        Returns:
            The answers, stripped; an empty one where the model said nothing.

        Raises:
            StageError: A question was not answered in all tries, or the endpoint answers to none (401, 404 and the
                like). It names what the question is about.
            ClocError: One question was refused for what is in it (400, 413, 415, 422), or its answer is none.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            asked = [pool.submit(self._ask, *one, stop) for one in zip(conversations, names, strict=True)]
            try:
                return [one.result() for one in asked]
            finally:
                stop.set()  # after a failure those under way do not try again, and no further one begins
                pool.shutdown(wait=False, cancel_futures=True)

    def identity(self) -> Mapping[str, Any]:
        """Model and request; not the address, which says where a model is and not what it is."""
        return {
            "endpoint_model": self.model,
            "revision": self.options.revision,
            "request": self._fields(),
        }

    def _fields(self) -> dict[str, Any]:
        ours = {"model": self.model, "temperature": 0, "max_tokens": self.options.max_new_tokens, "stream": False}
        return {name: value for name, value in {**ours, **self.options.body}.items() if value is not None}

    def _ask(self, messages: Messages, name: str, stop: threading.Event) -> str:
        data = json.dumps({**self._fields(), "messages": messages}).encode()
        for attempt in range(self.options.retries + 1):
            try:
                return _text_of(self._post(data), self.url, name)
            except urllib.error.HTTPError as error:
                if error.code not in _MAY_PASS and error.code < 500:
                    raise self._refused(f"answered {error.code}: {_reason(error)}", name, error.code) from error
                problem, pause = f"answered {error.code}: {_reason(error)}", _retry_after(error)
            except (OSError, http.client.HTTPException) as error:
                problem, pause = f"cannot be reached: {getattr(error, 'reason', None) or error!r}", None
            wait = min(_LONGEST_PAUSE, self.options.backoff * 2**attempt if pause is None else pause)
            if attempt == self.options.retries or stop.wait(wait):
                break
        raise self._refused(f"{problem} (tried {attempt + 1} times)", name)

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data, headers)
        with urllib.request.urlopen(request, timeout=self.options.timeout) as answer:
            content: bytes = answer.read()
        return content

    def _refused(self, problem: str, name: str, code: int | None = None) -> ClocError:
        key = "Check the key." if self._key else f"Set the environment variable {API_KEY}."
        remedy = key if code in (401, 403) else None
        kind = ClocError if code in _OF_THE_REQUEST else StageError
        return kind(f"the endpoint {problem}", file=self.url, sample=name, remedy=remedy)


def _text_of(content: bytes, url: str, name: str) -> str:
    """The text of an answer."""
    try:
        text = json.loads(content)["choices"][0]["message"].get("content")
        return "" if text is None else str(text).strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"the endpoint's answer is no chat completion: {content[:200]!r}"
        raise ClocError(problem, file=url, sample=name, remedy="Does the address end as in http://HOST/v1?") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """What a server says is wrong, in one line."""
    text = _or_none(lambda: error.read().decode(errors="replace"), OSError, http.client.HTTPException) or ""
    said = _or_none(lambda: json.loads(text)["error"]["message"], ValueError, LookupError, TypeError)
    return " ".join(str(said or text or error.reason).split())[:500]


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that a server asks to wait; None if it says nothing, or a date."""
    seconds = _or_none(lambda: float(error.headers["Retry-After"]), ValueError, TypeError)
    return seconds if seconds is not None and 0 <= seconds < float("inf") else None


def _or_none(read: Callable[[], Any], *expected: type[Exception]) -> Any:
    try:
        return read()
    except expected:
        return None
