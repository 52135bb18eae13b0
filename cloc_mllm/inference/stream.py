"""An answer piece by piece, while it is generated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from cloc_mllm.models.answer_text import AnswerText as Answer


class AnswerStream(Iterator[str]):
    """The pieces of an answer as they are generated, in a thread of their own.

    Closing it, or dropping it half-way, ends the generation.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        sizes: list[list[tuple[int, int]]],
        max_new_tokens: int,
    ) -> None:
        self._processor, self._sizes = processor, sizes
        self._streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop = _Stop()
        self._generated: Any = None
        self._error: BaseException | None = None
        self._answer: Answer | None = None
        options = {
            "max_new_tokens": max_new_tokens,
            "streamer": self._streamer,
            "stopping_criteria": StoppingCriteriaList([self._stop]),
        }
        self._thread = threading.Thread(target=self._run, args=(model, {**inputs, **options}), daemon=True)
        self._thread.start()

    def _run(self, model: Any, arguments: dict[str, Any]) -> None:
        try:
            self._generated = model.generate_grounded(**arguments)
        except BaseException as error:
            self._error = error
        finally:
            self._streamer.end()

    def __next__(self) -> str:
        """The next piece; empty ones are left out."""
        for piece in self._streamer:
            if piece:
                return piece
        self._finish()
        raise StopIteration

    def close(self) -> None:
        """End the generation after the token it is at."""
        self._stop.asked = True
        self._finish()

    def __del__(self) -> None:
        self._stop.asked = True

    @property
    def answer(self) -> Answer:
        """The whole answer; waits for what has not been generated yet."""
        self._finish()
        assert self._answer is not None
        return self._answer

    def _finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._answer is None:
            self._answer = self._processor.post_process_grounding(self._generated, self._sizes)[0]


class _Stop(StoppingCriteria):
    """Stops the generation when asked to."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device, dtype=torch.bool)
