"""A language model that marks answers, behind any OpenAI-compatible endpoint, and the file of all that it replied.

Every reply is written to a file as it comes, with a digest of what was asked, so that an evaluation that was stopped
goes on where it was and a reply is never taken for one to another question. Requests that fail for a passing reason are
repeated, waiting longer each time; others stop the evaluation by name. A reply is never made up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.chat_endpoint import ChatEndpoint, EndpointOptions

SYSTEM = "You judge the quality of answers. You are exact, fair, and brief."


@dataclass(frozen=True)
class Judge:
    """Where a judge is reached and how it is asked.

    Attributes:
        url: Base address, such as ``https://host/v1``; ``/chat/completions`` is added.
        model: Its name there.
        key: What to send as a bearer token; None sends none. It is never written anywhere.
        temperature: Of its sampling.
        max_tokens: Longest reply in tokens.
        timeout: Seconds that a reply may take.
        retries: How often a request that failed for a passing reason is repeated.
        wait: Seconds before the first repetition, doubled with each up to a minute; the server may ask for more.
    """

    url: str
    model: str
    key: str | None = None
    temperature: float = 0.2
    max_tokens: int = 1024
    timeout: float = 120.0
    retries: int = 6
    wait: float = 1.0

    def digest(self, prompt: str) -> str:
        """What tells a request from every other one: the model, how it is asked, and the prompt."""
        asked = json.dumps([self.model, self.temperature, self.max_tokens, SYSTEM, prompt])
        return hashlib.sha256(asked.encode()).hexdigest()

    def reply(self, prompt: str) -> str:
        """Ask, and return what is replied.

        Raises:
            ClocError: The endpoint cannot be reached, refuses, or answers something other than a chat completion.
        """
        asking = EndpointOptions(
            max_new_tokens=self.max_tokens,
            concurrency=1,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.wait,
            body={"temperature": self.temperature},
        )
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        try:
            (reply,) = ChatEndpoint(f"{self.url}#{self.model}", asking, key=self.key).answer([asked], ["judge"])
        except ClocError as error:
            kept = "The replies so far are kept: the same command goes on from there."
            raise ClocError(error.problem, file=error.file, sample=error.sample, remedy=error.remedy or kept) from error
        return reply


def judge_of(url: str | None, model: str | None, key_variable: str, **options: Any) -> Judge:
    """Make a judge out of settings, its key out of the environment.

    Args:
        url: Its base address; default the environment's ``OPENAI_BASE_URL``.
        model: Its name.
        key_variable: The environment variable that holds the key.
        **options: See :class:`Judge`.

    Raises:
        ClocError: It is not said who judges.
    """
    url = url or os.environ.get("OPENAI_BASE_URL")
    missing = [name for name, value in (("judge_url", url), ("judge_model", model)) if not value]
    if not url or not model:
        raise ClocError(
            f"this suite needs a judge, and there is none ({' and '.join(missing)} not given)",
            remedy="Add --set judge_url=https://HOST/v1 --set judge_model=NAME; the key is read from the environment "
            f"variable {key_variable}.",
        )
    if not url.startswith(("http://", "https://")):
        raise ClocError(f"the judge's address '{url}' is no http or https address")
    return Judge(url, model, os.environ.get(key_variable) or None, **options)


class ReplyFile:
    """The replies of a judge, one a line, kept as they come.

    Args:
        path: The file; it may exist, and then its replies are not asked for again.

    Raises:
        ClocError: The file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = {record["digest"]: record for record in self._read()}
        self.asked = 0

    def _read(self) -> Iterator[dict[str, Any]]:
        """The records of the file; a last line that was cut off, as by a crash, is taken away."""
        if not self.path.is_file():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if not isinstance(record["digest"], str) or not isinstance(record["reply"], str):
                    raise TypeError("digest and reply are texts")
            except (ValueError, KeyError, TypeError) as error:
                remedy = "Move it away to ask the judge anew."
                raise ClocError("holds no replies of a judge", file=self.path, sample=number, remedy=remedy) from error
            yield record

    def reply(self, judge: Judge, prompt: str, about: dict[str, Any]) -> str:
        """Return the judge's reply, from the file if it was given before.

        Args:
            judge: Who is asked.
            prompt: What is asked.
            about: What else the file's line says of it.

        Raises:
            ClocError: As :meth:`Judge.reply`.
        """
        digest = judge.digest(prompt)
        if digest not in self.known:
            reply = judge.reply(prompt)
            self.asked += 1
            asked = {"judge": judge.model, "temperature": judge.temperature}
            self.known[digest] = {**about, **asked, "reply": reply, "digest": digest}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.known[digest]) + "\n")
        return str(self.known[digest]["reply"])
