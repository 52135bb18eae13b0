"""A finished MLLM that answers conversations: messages in, text and boxes in pixels out.

The chat, the browser UI and the evaluation all ask through this class, so that a checkpoint answers alike everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from cloc_mllm.errors import ClocError
from cloc_mllm.models.answer_text import AnswerText as Answer
from cloc_mllm.models.conversation_cloc_mllm import ConversationError

MODEL_TYPE = "cloc_mllm"

Conversation = Sequence[Mapping[str, Any]]


class Predictor:
    """A model and its processor.

    Args:
        model: A :class:`ClocMllmForConditionalGeneration`.
        processor: Its :class:`ClocMllmProcessor`.

    Raises:
        ClocError: If the two do not belong together.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor
        config = model.config
        for what, of_model, of_processor in (
            ("grounding", config.grounding, processor.grounding),
            ("tokens an image", config.image_seq_length, processor.num_image_tokens),
            ("id of <image>", config.image_token_index, processor.image_token_id),
            ("id of <region>", config.region_token_index, processor.region_token_id),
            ("id of <ground>", config.ground_token_index, processor.ground_token_id),
        ):
            if of_model != of_processor:
                raise ClocError(
                    f"model and processor do not belong together: {what} is {of_model} for one, {of_processor} for "
                    "the other",
                    remedy="Save both from the same run into one folder.",
                )

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], device: str | None = None, trust_remote_code: bool = False
    ) -> Predictor:
        """Load a checkpoint.

        Args:
            path: A folder with model and processor, such as a run's ``export``, or a name on the hub.
            device: Where it runs; default a GPU if there is one.
            trust_remote_code: Whether code in the checkpoint may run. This package's own models need none.

        Raises:
            ClocError: If there is no such checkpoint, it is of another model, or weights are missing.
        """
        _check_folder(path)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ClocError(f"no model can be loaded: {error}", file=path) from error
        if config.model_type != MODEL_TYPE:
            raise ClocError(
                f"this is a checkpoint of another model: '{config.model_type}', not '{MODEL_TYPE}'",
                file=path,
                remedy="Give the export of an alignment or instruction-tuning run.",
            )
        try:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
            model, info = AutoModelForImageTextToText.from_pretrained(
                path,
                trust_remote_code=trust_remote_code,
                dtype="auto",
                output_loading_info=True,
                use_safetensors=True,  # never a pickle
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ClocError(f"the checkpoint cannot be loaded: {error}", file=path) from error
        lost = sorted(info["missing_keys"])
        if lost:
            raise ClocError(f"{len(lost)} weights are missing, the first being '{lost[0]}'", file=path)
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor)

    def chat(
        self, conversations: Sequence[Conversation], max_new_tokens: int = 256, batch_size: int = 16
    ) -> list[Answer]:
        """Answer the last turn of each conversation, greedily.

        Args:
            conversations: Conversations that end with a user's turn, in messages format. Images and regions differ in
                number, or are absent, as they please.
            max_new_tokens: Longest answer in tokens.
            batch_size: How many are answered together; the answers do not depend on it.

        Returns:
            For each the ``text``, with coordinates printed; the ``boxes``, ``{"phrase", "box", "image"}`` in pixels of
            the original image; what could not be read, ``unparsed``; and the ``message`` to go on from.

        Raises:
            ClocError: If a conversation is malformed; the error names its number.
        """
        answers: list[Answer] = []
        for start in range(0, len(conversations), batch_size):
            inputs, sizes = self._prepare(conversations[start : start + batch_size], max_new_tokens, start)
            generated = self.model.generate_grounded(**inputs, max_new_tokens=max_new_tokens)
            answers += self.processor.post_process_grounding(generated, sizes)
        return answers

    def stream(self, conversation: Conversation, max_new_tokens: int = 256) -> AnswerStream:
        """Answer one conversation piece by piece.

        Returns:
            An iterator over pieces of text; its ``answer`` is the whole, boxes included. Boxes of a grounding head come
            with the whole only: they are found when the text is complete.

        Raises:
            ClocError: As :meth:`chat`, at once.
        """
        inputs, sizes = self._prepare([conversation], max_new_tokens)
        return AnswerStream(self.model, self.processor, inputs, sizes, max_new_tokens)

    def _prepare(
        self, conversations: Sequence[Conversation], max_new_tokens: int, first: int = 0
    ) -> tuple[dict[str, Any], list[list[tuple[int, int]]]]:
        """Model inputs on the model's device, and the sizes of the images."""
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        for number, conversation in enumerate(conversations):
            if not conversation or conversation[-1].get("role") != "user":
                raise ClocError(
                    "the conversation does not end with a user's turn, so there is nothing to answer",
                    sample=first + number,
                )
        try:
            inputs = self.processor.encode(
                list(conversations),
                add_generation_prompt=True,
                return_original_sizes=True,
                max_length=None if limit is None else max(1, limit - max_new_tokens),
            )
        except ConversationError as error:
            raise ClocError(error.problem, sample=first + error.index) from error
        sizes = inputs.pop("original_sizes")
        return dict(inputs.to(self.model.device)), sizes


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


def _check_folder(path: str | PathLike[str]) -> None:
    """Say plainly what is wrong with a folder that holds no model; names on the hub are left to the hub."""
    folder = Path(path)
    if folder.is_dir() and (folder / "adapter_config.json").exists():
        merge = f"Merge it first: cloc-mllm merge {folder} --out DIR."
        raise ClocError("this is an adapter, not a model", file=folder, remedy=merge)
    if folder.is_dir() and not (folder / "config.json").exists():
        inner = folder / "export"
        remedy = f"Did you mean '{inner}'?" if (inner / "config.json").exists() else None
        raise ClocError("the folder holds no model: there is no config.json", file=folder, remedy=remedy)
    if not folder.exists() and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise ClocError("there is no such folder", file=path)
