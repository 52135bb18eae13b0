"""lmms-eval's view of an MLLM of this package: requests in, answers out, all of them through the `Predictor`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from cloc_mllm.data.messages import image_items
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.frames import AUTO, codec_for, reprinted, require_box_format
from cloc_mllm.inference.images import read_image
from cloc_mllm.inference.predictor import Conversation, Predictor
from cloc_mllm.models.answer_text import AnswerText

SAMPLING = ("temperature", "top_p", "top_k")
GENERATION = (*SAMPLING, "do_sample", "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
"""What of a task's generation options `generate` is given; the rest means something to other models only."""

_HARNESS_STOP = ["\n\n"]
"""What lmms-eval puts where a task names no stop: it would cut answers of several paragraphs short."""


class ClocMllmChat(lmms):  # type: ignore[misc]
    """A finished MLLM behind lmms-eval's interface for chat models.

    Args:
        pretrained: A checkpoint, as :meth:`.Predictor.from_pretrained` takes it.
        predictor: A loaded model instead.
        batch_size: Questions answered together; answers do not depend on it.
        device: Where it runs; default a GPU if there is one. With several processes each takes the device that
            accelerate gives it.
        max_new_tokens: Longest answer in tokens where the task names none, as those of RefCOCO and TextVQA do.
        box_format: The coordinates that boxes are printed in; see :func:`.frames.codec_for`.
        constrain_boxes: Whether boxes written as text must come out well-formed.
        trust_remote_code: Whether code in the checkpoint may run.
        cache_mib: Memory for the features of pictures that several questions are about.

    Raises:
        ClocError: If the checkpoint cannot be used, or an argument makes no sense.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        predictor: Predictor | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 128,
        box_format: str = AUTO,
        constrain_boxes: bool = False,
        trust_remote_code: bool = False,
        cache_mib: float = 256.0,
    ) -> None:
        super().__init__()
        require_box_format(box_format)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ClocError(f"batch_size is '{batch_size}'", remedy="Write a positive whole number.")
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self.box_format, self.constrain_boxes = box_format, constrain_boxes
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if predictor is None:
            if pretrained is None:
                raise ClocError("no model is named", remedy="Add --model_args pretrained=DIR.")
            own = str(self.accelerator.device) if self._world_size > 1 else device
            predictor = Predictor.from_pretrained(
                pretrained, device=own, trust_remote_code=trust_remote_code, cache_mib=cache_mib
            )
        self.predictor = predictor
        self.left_out: Counter[str] = Counter()

    @property
    def device(self) -> Any:
        """Where the model lies; lmms-eval gathers counts from there."""
        return self.predictor.model.device

    def clean(self) -> None:
        """Free what generation has left behind. The model stays, so that it can be evaluated again.

        The base class would look for reference cycles, twice: most of what lmms-eval costs where questions are few.
        """
        self.predictor.cache.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests, in batches of those that share task and generation options.

        Args:
            requests: Each with `args` `(context, doc_to_messages, generation options, doc id, task, split)`.

        Returns:
            For each request, in order, the text and the tokens that question and answer took.

        Raises:
            ClocError: A question cannot be put to the model; the error names task and document.
        """
        results = [GenerationResult("")] * len(requests)
        groups: dict[tuple[str, str], list[int]] = {}
        for number, request in enumerate(requests):
            # What lmms-eval adds to even out the processes is never looked at.
            if not (request.metadata or {}).get("__padding_only__"):
                options = json.dumps(request.args[2], sort_keys=True, default=str)
                groups.setdefault((request.args[4], options), []).append(number)
        total = sum(len(group) for group in groups.values())
        with tqdm(total=total, desc="answering", disable=self._rank != 0) as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    numbers = group[start : start + self.batch_size]
                    for number, result in zip(numbers, self._answer([requests[k] for k in numbers]), strict=True):
                        results[number] = result
                    bar.update(len(numbers))
        for name, count in self.left_out.items():
            logger.info(f"generation option '{name}' is not for this model: left out for {count} questions")
        self.left_out.clear()
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: none of the tasks about pictures here goes on over several rounds."""
        raise _unsupported("generate_until_multi_round", requests)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: lmms-eval puts no such request to chat models."""
        raise _unsupported("loglikelihood", requests)

    def _answer(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests of one task with the same options."""
        _, _, asked, _, task, _ = requests[0].args
        options, longest, stops = self._options(asked or {}, len(requests))
        conversations = [self._conversation(request) for request in requests]
        try:
            answers = self.predictor.chat(
                conversations,
                max_new_tokens=longest,
                batch_size=len(conversations),
                constrain_boxes=self.constrain_boxes,
                **options,
            )
        except ClocError as error:
            known = error.sample is not None and error.sample.isdigit() and int(error.sample) < len(requests)
            doc = requests[int(error.sample)].args[3] if known and error.sample is not None else None
            raise ClocError(error.problem, file=f"task {task}", sample=doc, remedy=error.remedy) from error
        return [
            GenerationResult(
                _until(self._text(answer, task, conversation), stops),
                TokenCounts(input_tokens=answer.num_prompt_tokens, output_tokens=answer.num_tokens),
            )
            for answer, conversation in zip(answers, conversations, strict=True)
        ]

    def _conversation(self, request: Instance) -> Conversation:
        """The messages of a request, as conversations of this package."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        try:
            return [_message(message) for message in messages]
        except ClocError as error:
            raise ClocError(error.problem, file=f"task {task}", sample=doc_id, remedy=error.remedy) from error

    def _text(self, answer: AnswerText, task: str, conversation: Conversation) -> str:
        """What the task is told: the answer, its boxes in the coordinates that the task reads."""
        codec = codec_for(task, self.box_format)
        if codec is None:
            return answer.text
        sizes = [picture.size for picture in image_items([dict(message) for message in conversation])]
        return reprinted(answer, self.predictor.processor.codec, codec, sizes)

    def _options(self, asked: Mapping[str, Any], questions: int) -> tuple[dict[str, Any], int, list[str]]:
        """Return what `generate` is given, the longest answer in tokens, and where answers end."""
        options = {name: asked[name] for name in GENERATION if asked.get(name) is not None}
        options["do_sample"] = bool(options.get("do_sample", float(options.get("temperature", 0) or 0) > 0))
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in SAMPLING}
        stops = asked.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        for name in asked:
            if name not in (*GENERATION, "until", "max_new_tokens"):
                self.left_out[name] += questions
        longest = int(asked.get("max_new_tokens") or self.max_new_tokens)
        limit = getattr(self.predictor.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and longest > limit // 2:
            # Some tasks allow as many tokens as LLaVA has positions in all, which would leave none for the question.
            logger.warning(f"answers may take {limit // 2} tokens, not {longest}: the model has {limit} positions")
            longest = limit // 2
        return options, longest, [] if stops == _HARNESS_STOP else stops


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as lmms-eval writes it, in this package's form; regions are passed on.

    Raises:
        ClocError: It holds what this model cannot take, such as a video.
    """
    content = message["content"]
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    items: list[dict[str, Any]] = []
    for item in content:
        kind = item["type"]
        if kind == "image":
            items.append({"type": "image", "image": read_image(item["url"])})
        elif kind in ("text", "region"):
            items.append(dict(item))
        else:
            raise ClocError(f"the question shows a {kind}: this model sees pictures only")
    return {"role": message["role"], "content": items}


def _until(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop in it."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def _unsupported(kind: str, requests: Sequence[Instance]) -> ClocError:
    """What is said of a kind of request that is not answered."""
    task = requests[0].task_name if requests else None
    return ClocError(
        f"this model does not answer requests of the kind {kind}",
        file=f"task {task}",
        remedy="Choose a task whose output_type is generate_until.",
    )
