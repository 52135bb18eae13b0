"""Caption and alt text made one by a language model, as VeCap does (Lai et al., arXiv 2310.07699).

A captioner says what can be seen but knows no names; the text found beside a picture knows names but speaks of much
that is not there. The captioner is an option, the language model the argument: a checkpoint with a chat template, or
`BASE_URL#MODEL`. The alt text is the sample's `caption`. Where one of the two is missing, or both are alike, there is
nothing to fuse: what there is stays as it is, and so does the caption where the model answers nothing. The prompt is
ours.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Protocol

import torch
from PIL import Image
from pydantic import Field, PositiveInt, field_validator
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloc_mllm.data.tar_shards import Sample
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.captioners.existing import name_of, own_captions
from cloc_mllm.labeling.captioners.prompts import FUSE
from cloc_mllm.labeling.captioners.transformers_model import GREEDY
from cloc_mllm.labeling.chat_endpoint import ChatEndpoint, EndpointOptions
from cloc_mllm.labeling.checkpoints import (
    Dtype,
    checkpoint_identity,
    load_config,
    load_model,
    prepare_tokenizer,
    versions,
)
from cloc_mllm.labeling.stage_options import StageOptions, read_options
from cloc_mllm.labeling.stages import CAPTIONERS, Captioner, build_stage

LONGEST_TEXT = 2000
"""Characters of caption and alt text that are shown to the language model."""


class _Fusing(StageOptions):
    captioner: str
    captioner_options: Annotated[dict[str, Any], Field(default_factory=dict)]
    prompt: str = FUSE

    @field_validator("prompt")
    @classmethod
    def _has_both_places(cls, prompt: str) -> str:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
        except ValueError as error:
            raise ValueError(f"it is no template: {error}") from None
        if set(fields) != {"caption", "alt_text"}:
            raise ValueError("it needs the places {caption} and {alt_text}, and no others")
        return prompt


class FuseModelOptions(_Fusing):
    """Options of `fuse:MODEL`.

    Attributes:
        captioner: Specification of the captioner that looks at the pictures.
        captioner_options: Its options.
        prompt: With the places `{caption}` and `{alt_text}`.
        max_new_tokens: Longest answer in tokens.
        dtype: Number format; `auto` is the checkpoint's own.
        revision: Branch, tag or commit on the hub.
    """

    max_new_tokens: PositiveInt = 128
    dtype: Dtype = "auto"
    revision: str | None = None


class FuseEndpointOptions(_Fusing, EndpointOptions):
    """Options of `fuse:BASE_URL#MODEL`: `captioner`, `captioner_options` and `prompt`, and those of every endpoint."""


class Writer(Protocol):
    """A language model that follows an instruction."""

    def write(self, prompts: Sequence[str], names: Sequence[str]) -> list[str]:
        """Answer each prompt; names are for messages."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What its answers depend on."""
        ...


class CausalWriter:
    """A language model of transformers; its weights are loaded with the first prompt.

    Args:
        path: Folder or name on the hub.
        device: Where it runs.
        options: How it is asked.

    Raises:
        ClocError: There is no such checkpoint, or it has no chat template.
    """

    def __init__(self, path: str, device: str, options: FuseModelOptions) -> None:
        self._path, self._device, self._options = path, device, options
        self._config = load_config(path, options.revision)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, revision=options.revision)
        except (OSError, ValueError) as error:
            raise ClocError(f"no tokenizer can be loaded: {error}", file=path) from error
        if self._tokenizer.chat_template is None:
            raise ClocError("the language model has no chat template", file=path, remedy="Take one tuned to chat.")
        prepare_tokenizer(self._tokenizer, path)

    @cached_property
    def _model(self) -> Any:
        options = self._options
        return load_model(AutoModelForCausalLM, self._path, self._device, options.dtype, options.revision)

    @torch.inference_mode()
    def write(self, prompts: Sequence[str], names: Sequence[str]) -> list[str]:
        """Answer each prompt, greedily."""
        turns = [[{"role": "user", "content": prompt}] for prompt in map(self._harmless, prompts)]
        inputs = self._tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            enable_thinking=False,  # templates that know no such thing do not read it
        ).to(self._model.device)
        generated = self._model.generate(**inputs, **GREEDY, max_new_tokens=self._options.max_new_tokens)
        answers = self._tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def _harmless(self, text: str) -> str:
        """A prompt in which nobody ends the turn: texts of the web may hold the tokens that do."""
        for token in sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True):
            if token.strip():
                text = text.replace(token, " ")
        return text

    def identity(self) -> Mapping[str, Any]:
        """Checkpoint, how it is decoded, versions."""
        return {
            "model": checkpoint_identity(self._path, self._config),
            "max_new_tokens": self._options.max_new_tokens,
            "dtype": self._options.dtype,
            "decoding": "greedy",
            "versions": versions(),
        }


class EndpointWriter:
    """A language model behind an endpoint.

    Args:
        target: `BASE_URL#MODEL`.
        options: How it is asked.
    """

    def __init__(self, target: str, options: FuseEndpointOptions) -> None:
        self._endpoint = ChatEndpoint(target, options)

    def write(self, prompts: Sequence[str], names: Sequence[str]) -> list[str]:
        """Answer each prompt."""
        return self._endpoint.answer([[{"role": "user", "content": prompt}] for prompt in prompts], names)

    def identity(self) -> Mapping[str, Any]:
        """Model and request."""
        return self._endpoint.identity()


class Fusion:
    """Fuses a captioner's captions with alt texts; see the top of this file.

    Args:
        captioner: Who looks at the pictures.
        writer: Who fuses.
        prompt: With the places `{caption}` and `{alt_text}`.
    """

    def __init__(self, captioner: Captioner, writer: Writer, prompt: str = FUSE) -> None:
        self._captioner, self._writer, self._prompt = captioner, writer, prompt

    def __call__(self, images: Sequence[Image.Image], samples: Sequence[Sample]) -> list[list[str]]:
        """Caption a batch.

        Args:
            images: RGB pictures, upright.
            samples: The samples they are of, with their alt texts.

        Returns:
            For each picture the fused caption; where there was nothing to fuse, what there was.

        Raises:
            ClocError: The captioner or the language model failed.
        """
        found = [list(captions) for captions in self._captioner(images, samples)]
        prompts: dict[int, str] = {}
        for k, (captions, sample) in enumerate(zip(found, samples, strict=True)):
            own = own_captions(sample)[:1]
            if not captions:
                found[k] = own
            elif own and own[0] != captions[0]:
                caption, alt_text = captions[0][:LONGEST_TEXT], own[0][:LONGEST_TEXT]
                prompts[k] = self._prompt.format(caption=caption, alt_text=alt_text)
        if prompts:
            answers = self._writer.write(list(prompts.values()), [name_of(samples[k]) for k in prompts])
            for k, answer in zip(prompts, answers, strict=True):
                found[k] = [" ".join(answer.split())] if answer else found[k]
        return found

    def identity(self) -> Mapping[str, Any]:
        """Captioner, language model and prompt."""
        return {
            "name": "fuse",
            "captioner": dict(self._captioner.identity()),
            "writer": dict(self._writer.identity()),
            "prompt": self._prompt,
            "rules": 1,
        }


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> Captioner:
    """Build `fuse:MODEL` or `fuse:BASE_URL#MODEL`; the option `captioner` has to be given.

    Raises:
        ClocError: No language model is named, it or the captioner cannot be built, or an option is wrong.
    """
    if argument is None:
        remedy = f"Name its folder, hub name or address, as in {name}:http://localhost:8000/v1#MODEL."
        raise ClocError(f"'{name}' needs a language model", remedy=remedy)
    if "captioner" not in options:
        remedy = "Give the option 'captioner', such as hf:Salesforce/blip-image-captioning-base."
        raise ClocError(f"'{name}' needs a captioner that looks at the pictures", remedy=remedy)
    read: FuseModelOptions | FuseEndpointOptions
    writer: Writer
    if "://" in argument:
        read = read_options(FuseEndpointOptions, options, name)
        writer = EndpointWriter(argument, read)
    else:
        read = read_options(FuseModelOptions, options, name)
        writer = CausalWriter(argument, device, read)
    captioner = build_stage(CAPTIONERS, read.captioner, device, read.captioner_options)
    return Fusion(captioner, writer, read.prompt)
