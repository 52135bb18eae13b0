"""Captions by a model of transformers: a chat model that sees (LLaVA, Qwen-VL, our MLLM), or an image-to-text model.

Which of the two a checkpoint is, it says itself: its configuration names the class of model, and a chat model brings a
chat template. The others (BLIP, GIT, ViT-GPT2 and the like) are given pictures alone, or with the beginning of a
caption. Answers are greedy. Prompts are padded on the left, so an answer does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from pydantic import PositiveInt
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from cloc_mllm.data.tar_shards import Sample
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.captioners.prompts import DESCRIBE
from cloc_mllm.labeling.checkpoints import (
    Dtype,
    checkpoint_identity,
    load_config,
    load_model,
    prepare_tokenizer,
    versions,
)
from cloc_mllm.labeling.stage_options import StageOptions, read_options
from cloc_mllm.labeling.stages import Captioner, StageError

EXAMPLE = "hf:llava-hf/llava-1.5-7b-hf or hf:Salesforce/blip-image-captioning-base"
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
_WITHOUT_PROMPT = ("vision-encoder-decoder", "git")
"""The first has no place for a prompt; GIT's processor ends one as if the caption were over."""


class TransformersOptions(StageOptions):
    """Options of `hf`.

    Attributes:
        prompt: What a chat model is asked (default `DESCRIBE`); what another model's caption begins with (default
            nothing; it is not part of the answer).
        max_new_tokens: Longest caption in tokens.
        dtype: Number format; `auto` is the checkpoint's own.
        revision: Branch, tag or commit on the hub.
    """

    prompt: str | None = None
    max_new_tokens: PositiveInt = 128
    dtype: Dtype = "auto"
    revision: str | None = None


class TransformersCaptioner:
    """Captions by a checkpoint; its weights are loaded with the first picture.

    Args:
        path: Folder or name on the hub.
        device: Where it runs.
        options: How it is asked.

    Raises:
        ClocError: There is no such checkpoint, it does not write about pictures, or takes no prompt.
    """

    def __init__(self, path: str, device: str = "cpu", options: TransformersOptions | None = None) -> None:
        self._path, self._device, self._options = path, device, options or TransformersOptions()
        self._config = load_config(path, self._options.revision)
        if type(self._config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            problem = f"a model of type '{self._config.model_type}' does not write about pictures"
            raise ClocError(problem, file=path, remedy=f"Take one such as {EXAMPLE}.")
        self._processor, self._tokenizer = self._load_processor()
        self._is_chat = getattr(self._processor, "chat_template", None) is not None
        self._prompt = self._options.prompt or (DESCRIBE if self._is_chat else None)
        if self._prompt and not self._is_chat and self._config.model_type in _WITHOUT_PROMPT:
            problem = f"a model of type '{self._config.model_type}' takes no prompt here"
            raise ClocError(problem, file=path, remedy="Leave the option 'prompt' out.")
        prepare_tokenizer(self._tokenizer, path)

    def _load_processor(self) -> tuple[Any, Any]:
        """What turns pictures (and texts) into inputs, and what turns tokens into text."""
        revision = {"revision": self._options.revision}
        try:
            if self._config.model_type == "vision-encoder-decoder":  # its parts have no processor in common
                return AutoImageProcessor.from_pretrained(self._path, **revision), self._load_tokenizer()
            processor = AutoProcessor.from_pretrained(self._path, **revision)
        except (OSError, ValueError, ImportError) as error:  # some processors need torchvision and say so
            reason = " ".join(str(error).split())
            raise ClocError(f"no processor can be loaded: {reason}", file=self._path) from error
        if not isinstance(processor, ProcessorMixin) or getattr(processor, "tokenizer", None) is None:
            raise ClocError("the checkpoint has no processor for pictures and texts", file=self._path)
        return processor, processor.tokenizer

    def _load_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._path, revision=self._options.revision)

    @cached_property
    def _model(self) -> Any:
        options = self._options
        return load_model(AutoModelForImageTextToText, self._path, self._device, options.dtype, options.revision)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], samples: Sequence[Sample]) -> list[list[str]]:
        """Caption a batch.

        Args:
            images: RGB pictures, upright.
            samples: Not looked at.

        Returns:
            For each picture its caption; none if the model said nothing.

        Raises:
            ClocError: The weights cannot be loaded, or the checkpoint and its processor do not fit together.
        """
        if not images:
            return []
        try:
            inputs = self._chat_inputs(images) if self._is_chat else self._picture_inputs(images)
        except (ImportError, ValueError) as error:
            kind = StageError if isinstance(error, ImportError) else ClocError
            raise kind(f"its processor refuses the pictures: {error}", file=self._path) from error
        inputs = inputs.to(self._model.device, self._model.dtype)
        limit = self._options.max_new_tokens
        generated = self._model.generate(**inputs, **GREEDY, max_new_tokens=limit)
        texts = self._tokenizer.batch_decode(self._without_prompt(generated, inputs), skip_special_tokens=True)
        captions = [" ".join(text.split()) for text in texts]
        if self._prompt and not self._is_chat:  # some repeat it as text, with tokens of their own at its ends
            captions = [_without_beginning(caption, self._prompt) for caption in captions]
        return [[caption] if caption else [] for caption in captions]

    def _chat_inputs(self, images: Sequence[Image.Image]) -> Any:
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": self._prompt}]}]
            for image in images
        ]
        return self._processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def _picture_inputs(self, images: Sequence[Image.Image]) -> Any:
        texts = {"text": [self._prompt] * len(images), "padding": True} if self._prompt else {}
        return self._processor(images=list(images), return_tensors="pt", **texts)

    def _without_prompt(self, generated: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Cut off the prompt from where a model repeats it token by token, as decoders do."""
        given = inputs.get("input_ids")
        if given is None or self._config.is_encoder_decoder:
            return generated
        length = given.shape[1]
        return generated[:, length:] if torch.equal(generated[:, :length], given) else generated

    def identity(self) -> Mapping[str, Any]:
        """Checkpoint, prompt, how it is decoded, versions."""
        return {
            "name": "hf",
            "model": checkpoint_identity(self._path, self._config),
            "model_type": self._config.model_type,
            "prompt": self._prompt,
            "max_new_tokens": self._options.max_new_tokens,
            "dtype": self._options.dtype,
            "decoding": "greedy",
            "versions": versions(),
        }


def _without_beginning(text: str, beginning: str) -> str:
    start = " ".join(beginning.split())
    return text[len(start) :].strip() if text.lower().startswith(start.lower()) else text


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> Captioner:
    """Build `hf:MODEL`.

    Raises:
        ClocError: No model is named, it cannot be used, or an option is wrong.
    """
    if argument is None:
        raise ClocError(f"'{name}' needs a model", remedy=f"Name its folder or hub name, as in {EXAMPLE}.")
    return TransformersCaptioner(argument, device, read_options(TransformersOptions, options, name))
