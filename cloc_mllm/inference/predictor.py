"""A finished MLLM that answers: messages in, or one line for one task; text and boxes in pixels out.

The chat, the browser UI and the evaluation all ask through this class, so that a checkpoint answers alike everywhere.
Regions and boxes are pixels of the original image. A picture is a path, a URL, a PIL image, an array or bytes, and is
encoded once, however many turns, questions and regions are about it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

from cloc_mllm.data.files import may_be_hub_name
from cloc_mllm.errors import ClocError
from cloc_mllm.inference.feature_cache import FeatureCache
from cloc_mllm.inference.images import read_image, with_pictures
from cloc_mllm.inference.stream import AnswerStream
from cloc_mllm.inference.templates import Templates, is_region, question_items, region_item
from cloc_mllm.models.answer_text import AnswerText as Answer
from cloc_mllm.models.conversation_cloc_mllm import ConversationError
from cloc_mllm.models.image_tokens import ImageTokens

MODEL_TYPE = "cloc_mllm"
BATCH_SIZE = 16
"""Questions that are answered, and pictures that are encoded, together."""

REGIONS_AT_ONCE = 64
"""Regions that are embedded together: with mean pooling each takes image tokens of its own, 5 MiB with a ViT-B/16."""
_IMAGES = ("pixel_values", "image_sizes")

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Grounding:
    """Where a phrase was found.

    Attributes:
        phrase: What was looked for.
        boxes: ``[x1, y1, x2, y2]`` each, in pixels of the original image; empty if it was not found.
        answer: All that the model said.
    """

    phrase: str
    boxes: list[list[float]]
    answer: Answer

    @property
    def found(self) -> bool:
        """Whether there is a box."""
        return bool(self.boxes)


class Predictor:
    """A model and its processor.

    Beside conversations (:meth:`chat`, :meth:`stream`) there is a line for each task: :meth:`vqa`, :meth:`describe`,
    :meth:`refer`, :meth:`ground` and :meth:`embed_regions`. Each takes one picture and one prompt, or lists: several
    prompts on one picture; one prompt on several pictures; or for each picture its prompt, or its list of prompts. What
    comes back has the same form.

    Args:
        model: A :class:`ClocMllmForConditionalGeneration`.
        processor: Its :class:`ClocMllmProcessor`.
        cache_mib: Memory for features of pictures that were asked about lately, in MiB on the model's device.
        templates: The questions behind the tasks.

    Attributes:
        cache: The features; :meth:`.FeatureCache.clear` it if the model's weights change.

    Raises:
        ClocError: If model and processor do not belong together.
    """

    def __init__(
        self, model: Any, processor: Any, *, cache_mib: float = 256.0, templates: Templates | None = None
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.templates = templates or Templates()
        self.cache = FeatureCache(self.model, cache_mib)
        config = model.config
        for what, of_model, of_processor in (
            ("grounding", config.grounding, processor.grounding),
            ("tokens an image", config.image_seq_length, processor.num_image_tokens),
            ("resolutions of tiles", ImageTokens.of(config).pinpoints, processor.image_layout.pinpoints),
            ("tokens a region", config.num_region_tokens, processor.num_region_tokens),
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
        cls,
        path: str | PathLike[str],
        device: str | None = None,
        trust_remote_code: bool = False,
        cache_mib: float = 256.0,
        templates: Templates | None = None,
    ) -> Predictor:
        """Load a checkpoint.

        Args:
            path: A folder with model and processor, such as a run's ``export``, or a name on the hub.
            device: Where it runs; default a GPU if there is one.
            trust_remote_code: Whether code in the checkpoint may run. This package's own models need none.
            cache_mib: As in the class.
            templates: As in the class.

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
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, processor, cache_mib=cache_mib, templates=templates)

    def chat(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int = 256,
        batch_size: int = BATCH_SIZE,
        constrain_boxes: bool = False,
        **options: Any,
    ) -> list[Answer]:
        """Answer the last turn of each conversation, greedily unless the options say otherwise.

        Args:
            conversations: Conversations that end with a user's turn, in messages format. Images and regions differ in
                number, or are absent, as they please. An image may be a URL.
            max_new_tokens: Longest answer in tokens.
            batch_size: How many are answered together; the answers do not depend on it.
            constrain_boxes: Whether a box that is written as text must come out well-formed: once one is begun, only
                what continues it can be said. A box cut off by ``max_new_tokens`` is all that stays unread.
            **options: What else ``generate`` takes, such as ``num_beams``.

        Returns:
            For each the ``text``, with coordinates printed; the ``boxes``, ``{"phrase", "box", "image"}`` in pixels of
            the original image; what could not be read, ``unparsed``; what is said not to be there, ``absent``; and the
            ``message`` to go on from; and how many tokens question and answer took.

        Raises:
            ClocError: If a conversation is malformed; the error names its number.
        """
        answers: list[Answer] = []
        for start in range(0, len(conversations), batch_size):
            inputs, sizes = self._prepare(conversations[start : start + batch_size], max_new_tokens, start)
            if constrain_boxes:
                inputs["logits_processor"] = self.processor.constrain_boxes(inputs["input_ids"].shape[1], sizes)
            generated = self.model.generate_grounded(**inputs, max_new_tokens=max_new_tokens, **options)
            found = self.processor.post_process_grounding(generated, sizes)
            for answer, count in zip(found, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
                answer.num_prompt_tokens = count
            answers += found
        return answers

    def stream(
        self, conversation: Conversation, max_new_tokens: int = 256, constrain_boxes: bool = False
    ) -> AnswerStream:
        """Answer one conversation piece by piece; the arguments are those of :meth:`chat`.

        Returns:
            An iterator over pieces of text; its ``answer`` is the whole, boxes included. Boxes of a grounding head come
            with the whole only: they are found when the text is complete.

        Raises:
            ClocError: As :meth:`chat`, at once.
        """
        inputs, sizes = self._prepare([conversation], max_new_tokens)
        if constrain_boxes:
            inputs["logits_processor"] = self.processor.constrain_boxes(inputs["input_ids"].shape[1], sizes)
        return AnswerStream(self.model, self.processor, inputs, sizes, max_new_tokens)

    def vqa(self, image: Any, question: Any, max_new_tokens: int = 64) -> Any:
        """Answer questions about pictures.

        >>> predictor.vqa("scene.png", "how many crosses are there?").text
        '...'
        >>> answers = predictor.vqa("scene.png", ["what is this?", "how many are there?"])
        >>> len(answers)
        2

        Args:
            image: One picture or a list.
            question: One question or a list; see the class for how they pair up with pictures.
            max_new_tokens: Longest answer in tokens.

        Returns:
            An answer, as :meth:`chat` gives it, for each question.

        Raises:
            ClocError: If a picture cannot be read, or a question is blank.
        """
        return self._each(image, question, _is_text, question_items, max_new_tokens)

    def describe(self, image: Any, region: Any = None, max_new_tokens: int = 128) -> Any:
        """Describe regions of pictures, or whole pictures.

        >>> predictor.describe("scene.png", [3, 4, 20, 25]).text
        '...'
        >>> by_point = predictor.describe("scene.png", [12, 9])
        >>> whole = predictor.describe("scene.png")

        Args:
            image: One picture or a list.
            region: A box ``[x1, y1, x2, y2]``, a point ``[x, y]``, or any item that conversations know, such as
                ``{"point": [x, y]}``; a list of them; ``None`` for the whole picture.
            max_new_tokens: Longest answer in tokens.

        Returns:
            An answer for each region.

        Raises:
            ClocError: If a picture cannot be read, or a region is none or lies outside its picture.
        """
        if region is None:
            return self.vqa(image, self.templates.describe_image, max_new_tokens)
        return self._each(
            image, region, is_region, lambda one: question_items(self.templates.describe, [one]), max_new_tokens
        )

    def refer(self, image: Any, region: Any, question: str | None = None, max_new_tokens: int = 64) -> Any:
        """Say what is in regions, or answer one question about them.

        >>> predictor.refer("scene.png", [3, 4, 20, 25]).text
        '...'
        >>> names = predictor.refer("scene.png", [[3, 4, 20, 25], [1, 1, 9, 30]])
        >>> answer = predictor.refer(
        ...     "scene.png", [[3, 4, 20, 25], [1, 1, 9, 30]], "is <region> left of <region>?"
        ... )

        Args:
            image: One picture or a list.
            region: As in :meth:`describe`. With a question, all regions that it is about; for a list of pictures, a
                list with those of each.
            question: With one ``<region>`` for each region; without any, they are put after it.
            max_new_tokens: Longest answer in tokens.

        Returns:
            Without a question, an answer for each region; with one, an answer for each picture.

        Raises:
            ClocError: As :meth:`describe`, and if the question has another number of ``<region>``.
        """
        if question is None:
            return self._each(
                image, region, is_region, lambda one: question_items(self.templates.refer, [one]), max_new_tokens
            )
        several, pictures, groups = _paired(image, region, is_region)
        asked = [question_items(question, [group] if is_region(group) else _listed(group)) for group in groups]
        answers = self._ask(list(zip(pictures, asked, strict=True)), max_new_tokens)
        return answers if several else answers[0]

    def ground(self, image: Any, phrase: Any, max_new_tokens: int = 128) -> Any:
        """Find what phrases name.

        >>> found = predictor.ground("scene.png", ["red circle", "yellow star"])
        >>> [one.phrase for one in found]
        ['red circle', 'yellow star']
        >>> boxes = predictor.ground("scene.png", "a red circle").boxes

        Args:
            image: One picture or a list.
            phrase: One phrase or a list. Each is asked for by itself.
            max_new_tokens: Longest answer in tokens.

        Returns:
            A :class:`Grounding` for each phrase; one that was not found has no boxes. A box that is empty once it is
            clipped to the picture does not count: the answer's own ``boxes`` still hold it.

        Raises:
            ClocError: If a picture cannot be read, or a phrase is blank.
        """

        def asked(one: str) -> list[dict[str, Any]]:
            return question_items(self.templates.where_is(one))

        def read(one: str, answer: Answer) -> Grounding:
            boxes = [found["box"] for found in answer.boxes]
            return Grounding(one, [[*box] for box in boxes if box[0] < box[2] and box[1] < box[3]], answer)

        return self._each(image, phrase, _is_text, asked, max_new_tokens, read)

    @torch.no_grad()
    def embed_regions(self, image: Any, regions: Any) -> Any:
        """Embed regions in the space that CLOC's texts share.

        They are what the MLLM's own Prompter gives. :meth:`ClocModel.get_region_features` gives an encoder's.

        >>> embeds = predictor.embed_regions("scene.png", [[3, 4, 20, 25], [12, 9]])
        >>> embeds.shape, float(embeds[0].norm().round())
        (torch.Size([2, 24]), 1.0)

        Args:
            image: One picture or a list.
            regions: R regions as in :meth:`describe`, or one; for a list of pictures, a list with those of each.

        Returns:
            ``(R, D)`` float32, L2-normalised, on the model's device; for a list of pictures, a list of such.

        Raises:
            ClocError: As :meth:`describe`, and if the model has no region encoder.
        """
        if self._inner.prompter is None:
            raise ClocError(
                "this model has no region encoder (region_encoder is 'none'): it embeds no regions",
                remedy="Use a model with a Prompter, or the encoder it was made with.",
            )
        several, pictures, groups = _paired(image, regions, is_region)
        listed = [[group] if is_region(group) else _listed(group) for group in groups]
        embeds: list[torch.Tensor] = []
        for start in range(0, len(pictures), BATCH_SIZE):
            some = slice(start, start + BATCH_SIZE)
            embeds += self._embed(pictures[some], listed[some], start)
        return embeds if several else embeds[0]

    def _embed(self, pictures: Sequence[Any], regions: Sequence[list[Any]], first: int) -> list[torch.Tensor]:
        """Embeddings of the regions of each picture."""
        inner, counts = self._inner, [len(of_one) for of_one in regions]
        items = [[region_item(one) for one in of_one] or question_items("?") for of_one in regions]
        if not sum(counts):
            width = inner.config.prompter_config.projection_dim
            return [torch.zeros(0, width, device=self.model.device) for _ in regions]
        # The processor places regions of any kind, whether or not the language model is told of them by tokens.
        processor = copy.copy(self.processor)
        processor.region_format = "token"
        turns = [_turn(picture, of_one) for picture, of_one in zip(pictures, items, strict=True)]
        inputs, _ = self._encoded(processor, turns, None, first)
        names = [name for name in inspect.signature(inner.get_image_features).parameters if name.startswith("region_")]
        given = [inputs.pop(name).split(REGIONS_AT_ONCE) for name in names if name in inputs]
        tokens = self.model.encode_inputs(inputs)["mm_encoder_outputs"]["image"].last_hidden_state
        parts = []
        for boxes, index, *more in zip(*given, strict=True):
            low, high = int(index[0]), int(index[-1])
            parts.append(inner.prompter(tokens[low : high + 1], boxes, index - low, *more))
        return list(functional.normalize(torch.cat(parts).float(), dim=-1).split(counts))

    @property
    def _inner(self) -> Any:
        """The model without its head, within adapters or not."""
        unwrapped = getattr(self.model, "get_base_model", None)
        return (unwrapped() if unwrapped else self.model).base_model

    def _each(
        self,
        image: Any,
        given: Any,
        is_one: Callable[[Any], bool],
        question: Callable[[Any], list[dict[str, Any]]],
        max_new_tokens: int,
        read: Callable[[Any, Answer], Any] = lambda one, answer: answer,
    ) -> Any:
        """Pair prompts with pictures, ask, and give the answers the form that the prompts had.

        Args:
            image: One picture or a list.
            given: One prompt or a list, or for a list of pictures a list with those of each.
            is_one: Whether something is one prompt.
            question: Makes the items of a question out of a prompt.
            max_new_tokens: Longest answer in tokens.
            read: Makes what is returned out of a prompt and its answer.
        """
        several, pictures, groups = _paired(image, given, is_one)
        listed = [[group] if is_one(group) else _listed(group) for group in groups]
        asked = [(picture, question(one)) for picture, group in zip(pictures, listed, strict=True) for one in group]
        answers = iter(self._ask(asked, max_new_tokens))
        results = [[read(one, next(answers)) for one in group] for group in listed]
        formed = [result[0] if is_one(group) else result for result, group in zip(results, groups, strict=True)]
        return formed if several else formed[0]

    def _ask(self, asked: Sequence[tuple[Any, list[dict[str, Any]]]], max_new_tokens: int) -> list[Answer]:
        """Answers to questions, each about a picture."""
        return self.chat([_turn(picture, items) for picture, items in asked], max_new_tokens)

    def _prepare(
        self, conversations: Sequence[Conversation], max_new_tokens: int, first: int = 0
    ) -> tuple[dict[str, Any], list[list[tuple[int, int]]]]:
        """Model inputs on the model's device, images encoded or remembered, and the sizes of the images."""
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        ready = []
        for number, conversation in enumerate(conversations, first):
            if not conversation or conversation[-1].get("role") != "user":
                raise ClocError(
                    "the conversation does not end with a user's turn, so there is nothing to answer", sample=number
                )
            try:
                ready.append(with_pictures(conversation))
            except ClocError as error:
                raise ClocError(error.problem, file=error.file, sample=number, remedy=error.remedy) from error
        return self._encoded(self.processor, ready, None if limit is None else max(1, limit - max_new_tokens), first)

    def _encoded(
        self, processor: Any, conversations: Sequence[Conversation], max_length: int | None, first: int
    ) -> tuple[dict[str, Any], list[list[tuple[int, int]]]]:
        """As :meth:`_prepare`, of conversations in order."""
        try:
            inputs = processor.encode(
                conversations, add_generation_prompt=True, return_original_sizes=True, max_length=max_length
            )
        except ConversationError as error:
            raise ClocError(error.problem, sample=first + error.index) from error
        sizes = inputs.pop("original_sizes")
        # Under ZeRO-3 every rank has to run the tower in every call, whatever it remembers.
        may_remember = "pixel_values" in inputs and not is_deepspeed_zero3_enabled()
        images = {name: inputs.pop(name) for name in _IMAGES if may_remember and name in inputs}
        data = dict(inputs.to(self.model.device))
        if images:
            of_all = [(height, width) for of_one in sizes for width, height in of_one]
            rows = processor._get_num_multimodal_tokens(of_all).num_image_patches
            data["mm_encoder_outputs"] = {"image": self.cache.features(**images, rows=rows)}
        return data, sizes


def _turn(picture: Any, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with one question about one picture."""
    return [{"role": "user", "content": [{"type": "image", "image": picture}, *items]}]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _listed(prompts: Any) -> list[Any]:
    """Several prompts as a list.

    Raises:
        ClocError: They are no list.
    """
    if isinstance(prompts, (list, tuple)) or (hasattr(prompts, "tolist") and getattr(prompts, "ndim", 0) == 2):
        return list(prompts)
    raise ClocError(f"{prompts!r} is neither a prompt nor a list of prompts")


def _paired(image: Any, given: Any, is_one: Callable[[Any], bool]) -> tuple[bool, list[Any], list[Any]]:
    """Whether there is a list of pictures; the pictures, opened; and for each its prompt, or its list of prompts.

    Raises:
        ClocError: A picture cannot be read, or prompts are given for more or fewer pictures than there are.
    """
    if not isinstance(image, (list, tuple)):
        return False, [read_image(image)], [given]
    groups = [given] * len(image) if is_one(given) else _listed(given)
    if len(groups) != len(image):
        raise ClocError(
            f"{len(image)} pictures, but prompts for {len(groups)}",
            remedy="For a list of pictures give one prompt, or a list with those of each picture.",
        )
    return True, [read_image(one) for one in image], groups


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
    if not folder.exists() and not may_be_hub_name(path):
        raise ClocError("there is no such folder", file=path)
