"""Builds the MLLM a preset asks for, and the conversations it is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cloc_mllm.data.collate import ConversationCollator
from cloc_mllm.data.dataset import ConversationDataset, RegionTextDataset
from cloc_mllm.errors import ClocError
from cloc_mllm.models.answer_text import absent_answer
from cloc_mllm.models.assembly_cloc_mllm import EncoderParts, prompter_like
from cloc_mllm.models.chat_template import has_generation_block
from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig, feature_strategy
from cloc_mllm.models.image_tokens import checked_pinpoints, default_pinpoints
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from cloc_mllm.models.projectors import set_image_grid
from cloc_mllm.training import launch
from cloc_mllm.training.assembly import assemble_mllm, head_config, load_tokenizer
from cloc_mllm.training.config import AlignConfig, InstructConfig
from cloc_mllm.training.encoder import require_complete, require_model_type, tower_plan
from cloc_mllm.training.options import AlignDataOptions, MllmModelOptions
from cloc_mllm.training.tokenizer import build_tokenizer, corpus, train_chat_tokenizer

TuneConfig = AlignConfig | InstructConfig


def build_mllm(config: TuneConfig, world: launch.World) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """Build or load the MLLM to train and its processor, the same on every process.

    Args:
        config: The preset.
        world: This process's place.

    Returns:
        The model in fp32 on the CPU, in training mode, and its processor.

    Raises:
        ClocError: A part is missing, incomplete or unfit.
    """
    kind, _, path = config.model.init.partition(":")
    if kind == "mllm":
        model, processor = load_mllm(path)
        _set_image_mode(config, model, processor)
    else:
        model, processor = _from_parts(config, world)
    if not has_generation_block(processor.chat_template):
        raise ClocError(
            "its chat template lacks {% generation %} around what the assistant says: nothing could be learnt with it",
            file=path or None,
            remedy="Mend chat_template.jinja.",
        )
    if config.model.blind:
        blind(model, tower_mode=config.parts.vision_tower.mode)
    return model.train(), processor


def mllm_skeleton(config: TuneConfig) -> ClocMllmForConditionalGeneration:
    """Build the MLLM a preset asks for without its weights, for counting; call it under the meta device.

    Args:
        config: The preset.

    Raises:
        ClocError: The configuration of a part is not there, or the parts do not go together.
    """
    options = config.model
    kind, _, path = options.init.partition(":")
    if kind == "mllm":
        require_model_type(path, "cloc_mllm")
        finished = ClocMllmConfig.from_pretrained(path)
        if options.image_mode is not None:
            finished.image_grid_pinpoints = _grid_pinpoints(options, finished.vision_config.image_size)
        return ClocMllmForConditionalGeneration(finished)
    assert options.encoder is not None  # `MllmModelOptions` has checked it
    encoder = EncoderParts.planned(tower_plan(options.encoder))
    own = options.grounding_head
    head = prompter_like(encoder, "prompter") if own is None else head_config(encoder, own.model_dump())
    reader = options.region_encoder
    text = _language_config(options, vocabulary=config.tokenizer.vocab_size)
    try:
        planned = ClocMllmConfig(
            vision_config=encoder.vision_config,
            text_config=text,
            lm_head_bias=AutoModelForCausalLM.from_config(text).get_output_embeddings().bias is not None,
            region_encoder=reader,
            prompter_config=None if reader == "none" else prompter_like(encoder, reader),
            grounding=options.grounding,
            grounding_config=head if options.grounding == "head" else None,
            vision_feature_layer=options.vision_layer,
            vision_feature_select_strategy=feature_strategy(encoder.vision_config, None),
            projector_type=options.projector,
            pixel_shuffle_factor=options.pixel_shuffle_factor,
            image_grid_pinpoints=_grid_pinpoints(options, encoder.vision_config.image_size),
            num_region_tokens=options.num_region_tokens,
            boxes_per_phrase=options.boxes_per_phrase,
        )
    except StrictDataclassClassValidationError as error:
        raise ClocError(f"encoder and LLM do not go together: {error.__cause__}", file=options.encoder) from error
    return ClocMllmForConditionalGeneration(planned)


def _grid_pinpoints(options: MllmModelOptions, size: int) -> list[list[int]] | None:
    """Return the resolutions that images are cut into tiles of `size` pixels at, or ``None``.

    Raises:
        ClocError: Tiles of that size do not fill one that the preset names.
    """
    if options.image_mode != "anyres":
        return None
    if options.grid_pinpoints is None:
        return default_pinpoints(size)
    try:
        return checked_pinpoints(options.grid_pinpoints, size)
    except ValueError as error:
        raise ClocError(f"'model.grid_pinpoints': {error}") from error


def _set_image_mode(config: TuneConfig, model: ClocMllmForConditionalGeneration, processor: ClocMllmProcessor) -> None:
    """Show images to a finished MLLM as the preset says: LLaVA-NeXT is tuned on tiles, but aligned without.

    Raises:
        ClocError: The tower's images cannot be cut into the tiles asked for.
    """
    options = config.model
    if options.image_mode is None:
        return
    images = processor.image_processor
    pinpoints = _grid_pinpoints(options, images.size)
    torch.manual_seed(config.run.seed)
    try:
        processor.image_processor = images.in_mode(options.image_mode, pinpoints)
        set_image_grid(model.model, processor.image_processor.image_grid_pinpoints)
    except ValueError as error:
        raise ClocError(f"'model.image_mode: {options.image_mode}' does not fit this model: {error}") from error


def load_mllm(path: str | Path) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """Load an MLLM's export, completely or not at all.

    Args:
        path: The folder.

    Raises:
        ClocError: There is none, it is of another model, or weights are missing.
    """
    require_model_type(path, "cloc_mllm")
    try:
        model, info = ClocMllmForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        processor = ClocMllmProcessor.from_pretrained(path)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ClocError(f"cannot be loaded as an MLLM: {error}", file=path) from error
    require_complete(info, path)
    return model, processor


@torch.no_grad()
def blind(model: nn.Module, tower_mode: str) -> None:
    """Make a model that sees no image, now and wherever it is loaded: the control of a language model's guessing.

    Every image then looks the same to the tower, hence to everything behind it: projector, region encoder, grounding
    head. Nothing else changes, so the control runs through the same programs, data and evaluation.

    Args:
        model: The MLLM; its tower's patch embedding is zeroed.
        tower_mode: How the preset treats the tower; only `frozen` keeps it blind.

    Raises:
        ClocError: The tower would learn to see again, or has no patch embedding.
    """
    if tower_mode != "frozen":
        raise ClocError("'model.blind' needs 'parts.vision_tower: frozen': a trained tower would learn to see again")
    patches = [module for name, module in model.named_modules() if name.endswith("patch_embedding")]
    if not patches:
        raise ClocError("'model.blind': this tower has no patch embedding to blind")
    for module in patches:
        for parameter in module.parameters():
            parameter.zero_()


def _from_parts(config: TuneConfig, world: launch.World) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    options = config.model
    assert options.encoder is not None  # `MllmModelOptions` has checked it
    plan = EncoderParts.planned(tower_plan(options.encoder))
    tokenizer = _llm_tokenizer(config, world)

    def scratch_llm(extended: PreTrainedTokenizerBase) -> PreTrainedModel:
        ids = {"eos_token_id": extended.eos_token_id, "pad_token_id": extended.pad_token_id}
        return LlamaForCausalLM(_language_config(options, len(tokenizer), **ids))

    return assemble_mllm(
        options.encoder,
        scratch_llm if options.llm == "scratch" else options.llm,
        tokenizer,
        region_encoder=options.region_encoder,
        region_format=options.region_format,
        grounding=options.grounding,
        box_mode=options.box_format,
        chat_style=options.chat_style,
        vision_feature_layer=options.vision_layer,
        projector_type=options.projector,
        pixel_shuffle_factor=options.pixel_shuffle_factor,
        image_mode=options.image_mode,
        image_grid_pinpoints=_grid_pinpoints(options, plan.vision_config.image_size),
        num_region_tokens=options.num_region_tokens,
        boxes_per_phrase=options.boxes_per_phrase,
        prompter=None if options.grounding_head is None else options.grounding_head.model_dump(),
        grounding_init=options.grounding_init,
        seed=config.run.seed,
    )


def _llm_tokenizer(config: TuneConfig, world: launch.World) -> Any:
    """Return the LLM's own tokenizer, or one trained on the preset's texts for an LLM from scratch."""
    if config.model.llm != "scratch":
        return load_tokenizer(config.model.llm)
    files = ("regions.jsonl", "conversations.jsonl")
    return build_tokenizer(
        config.tokenizer,
        lambda: train_chat_tokenizer(
            corpus(config.tokenizer.corpus or config.data.train, files=files), config.tokenizer
        ),
        Path(config.run.output) / "tokenizer",
        world,
    )


def _language_config(options: MllmModelOptions, vocabulary: int, **ids: int | None) -> PreTrainedConfig:
    """Return the language model's configuration; `vocabulary` and token ids are for one from scratch."""
    if options.llm == "scratch":
        size = options.scratch_llm.model_dump()
        size["num_key_value_heads"] = size["num_key_value_heads"] or size["num_attention_heads"]
        return LlamaConfig(**size, vocab_size=vocabulary, bos_token_id=None, **ids)
    try:
        return AutoConfig.from_pretrained(options.llm)
    except (OSError, ValueError) as error:
        raise ClocError(
            f"cannot be read as the configuration of a language model: {error}", file=options.llm
        ) from error


class AlignConversations(Dataset):
    """Region-text samples as short conversations: tell what is seen, name what is shown, find what is named.

    Args:
        dataset: The samples, with all regions they are to have.
        options: How many turns of which kind an image has at most: regions that are shown and must be named
            (`referring`), phrases that name one region and must be found (`grounding`), phrases that name several
            (`several`: as far as the texts say), and phrases that are not there (`absent`).
        seed: Seed of which regions play which part.
    """

    def __init__(self, dataset: RegionTextDataset, options: AlignDataOptions, seed: int) -> None:
        self.dataset, self.options, self.seed = dataset, options, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data this is."""
        self._epoch = epoch
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self._epoch)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """The conversation at an index in a given pass over the data."""
        item = self.dataset.item(index, epoch)
        order = np.random.default_rng([self.seed, epoch, index]).permutation(len(item["regions"]))
        regions = [item["regions"][int(k)] for k in order]
        to_find = [region for region in regions if region["unique"]][: self.options.grounding]
        to_name = [region for region in regions if not any(region is found for found in to_find)]
        if len(to_name) < self.options.referring:
            to_name += to_find
        messages = _turn([{"type": "image", "image": item["image"]}, _text("Describe the image.")], item["caption"])
        for region in to_name[: self.options.referring]:
            question = [_text("What is "), {"type": "region", "box": region["box"]}, _text("?")]
            messages += _turn(question, str(region["text"]))
        for region in to_find:
            answer = [_text(f"{region['text']} "), {"type": "region", "box": region["box"], "phrase": region["text"]}]
            messages += _turn([_text(f"Where is the {region['text']}?")], answer)
        for phrase, boxes in self._several(regions):
            found = [{"type": "region", "box": box, "phrase": phrase} for box in boxes]
            messages += _turn([_text(f"Where is every {phrase}?")], [_text(f"{phrase} "), *found])
        for phrase in self._absent(item, index, epoch):
            messages += _turn([_text(f"Where is the {phrase}?")], absent_answer(phrase))
        return {"messages": messages, "id": item["id"], "sample": item["id"], "index": index}

    def _several(self, regions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
        """Phrases that fit several regions, and the boxes of all of them.

        A phrase fits a region whose text holds all of its words, as in `unique_regions`.
        """
        ambiguous = dict.fromkeys(str(region["text"]) for region in regions if not region["unique"])
        fitting = ((phrase, [r["box"] for r in regions if _words(phrase) <= _words(r["text"])]) for phrase in ambiguous)
        yield from itertools.islice(((p, boxes) for p, boxes in fitting if len(boxes) > 1), self.options.several)

    def _absent(self, item: Mapping[str, Any], index: int, epoch: int) -> list[str]:
        """Phrases of other images that share no word with this one's texts: what is there may go unsaid."""
        said = _words(" ".join([item["caption"], *(str(region["text"]) for region in item["regions"])]))
        found: list[str] = []
        draws = _ABSENT_DRAWS * self.options.absent
        for other in np.random.default_rng([self.seed, epoch, index, 1]).integers(len(self), size=draws):
            regions = self.dataset.source[int(other)].get("regions")
            for region in regions if isinstance(regions, (list, tuple)) else ():
                text = region.get("text") if isinstance(region, Mapping) else None
                # What else may be wrong with that sample is found when it is read itself.
                if (
                    isinstance(text, str)
                    and text.strip()
                    and not _words(text) & said
                    and len(found) < self.options.absent
                ):
                    found.append(text)
                    said |= _words(text)
        return found


_ABSENT_DRAWS = 8
"""Images looked at for each phrase that is to be absent; where none of them has one, the turn is left out."""


def _words(text: Any) -> frozenset[str]:
    return frozenset(str(text).lower().split())


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _turn(question: list[dict[str, Any]], answer: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    said = [_text(answer)] if isinstance(answer, str) else answer
    return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


def conversations(config: TuneConfig, path: str) -> Any:
    """Return the map-style dataset of conversations that a preset's stage trains on.

    Args:
        config: The preset.
        path: Its data, or its validation data.
    """
    if isinstance(config, InstructConfig):
        return ConversationDataset(path, seed=config.run.seed)
    return AlignConversations(
        RegionTextDataset(path, max_regions=None, seed=config.run.seed), config.data, config.run.seed
    )


def validation_conversations(config: TuneConfig) -> Subset | None:
    """Return the validation samples of a preset, or ``None``."""
    if config.data.validation is None:
        return None
    dataset = conversations(config, config.data.validation)
    return Subset(dataset, range(min(len(dataset), config.data.validation_samples)))


def conversation_collator(processor: ClocMllmProcessor, max_length: int | None) -> ConversationCollator:
    """Return the collator of training batches.

    Args:
        processor: The MLLM's.
        max_length: Longest sequence in tokens.
    """
    if max_length is None:
        return ConversationCollator(processor)
    return ConversationCollator(SimpleNamespace(encode=partial(processor.encode, max_length=max_length)))


def first_sample_report(processor: ClocMllmProcessor, item: Mapping[str, Any], most: int = 1200) -> str:
    """Return the first sample as the model will see it, what is learnt in brackets.

    Args:
        processor: The MLLM's.
        item: An item of the dataset.
        most: Characters shown.
    """
    batch = processor.encode([item["messages"]], return_labels=True, return_original_sizes=True)
    ids: Sequence[int] = batch["input_ids"][0].tolist()
    learnt = [label != -100 for label in batch["labels"][0].tolist()]
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learnt[end] != learnt[start]:
            piece = processor.tokenizer.decode(ids[start:end])
            text += f"⟦{piece}⟧" if learnt[start] else piece
            start = end
    start = 0
    for size in batch["original_sizes"][0]:
        count = processor.image_tokens(*size)
        at, short = text.index("<image>" * count, start), f"<image> x {count} "
        text = text[:at] + short + text[at + len("<image>") * count :]
        start = at + len(short)
    return text if len(text) <= most else text[:most] + " …"
