"""Builds the MLLM a preset asks for, and the conversations it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torch.utils.data import Subset
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
from cloc_mllm.data.lengths import TokensOfImage
from cloc_mllm.data.mixture import MixtureDataset
from cloc_mllm.errors import ClocError
from cloc_mllm.models.assembly_cloc_mllm import EncoderParts, prompter_like
from cloc_mllm.models.chat_template import caption_template, has_generation_block
from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig, feature_strategy
from cloc_mllm.models.conversation_cloc_mllm import ConversationError
from cloc_mllm.models.image_tokens import checked_pinpoints, default_pinpoints
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from cloc_mllm.models.projectors import set_image_grid
from cloc_mllm.training.presets.config import AlignConfig, InstructConfig
from cloc_mllm.training.presets.options import MllmModelOptions
from cloc_mllm.training.pretraining.encoder import require_complete, require_model_type, tower_plan
from cloc_mllm.training.pretraining.tokenizer import build_tokenizer, corpus, train_chat_tokenizer
from cloc_mllm.training.running import launch
from cloc_mllm.training.running.grouping import Grouping
from cloc_mllm.training.tuning.alignment import AlignConversations
from cloc_mllm.training.tuning.assembly import assemble_mllm, head_config, load_tokenizer

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


def conversations(config: TuneConfig, path: str) -> Any:
    """Return the map-style dataset of conversations that a preset's stage trains on.

    Args:
        config: The preset.
        path: Its data, or its validation data.
    """
    bad = config.data.on_bad_sample
    if isinstance(config, InstructConfig):
        return ConversationDataset(path, seed=config.run.seed, on_bad_sample=bad)
    return AlignConversations(
        RegionTextDataset(path, max_regions=None, seed=config.run.seed, on_bad_sample=bad), config.data, config.run.seed
    )


def training_conversations(config: TuneConfig) -> Any:
    """Return what a preset trains on: one dataset, or a mixture of several."""
    sources = config.data.sources
    if len(sources) == 1 and sources[0].weight == 1:
        return conversations(config, sources[0].path)
    opened = [conversations(config, source.path) for source in sources]
    weights, names = [source.weight for source in sources], [source.path for source in sources]
    return MixtureDataset(opened, weights, names, config.run.seed)


def tuning_grouping(config: TuneConfig, processor: ClocMllmProcessor, dataset: Any) -> Grouping | None:
    """Return how a preset groups its samples, or ``None``.

    Args:
        config: The preset.
        processor: The MLLM's, which knows how many tokens an image takes.
        dataset: What :func:`training_conversations` returned.
    """
    data = config.data
    if data.grouping == "none":
        return None
    by_modality = data.grouping == "modality_length"
    grouping = Grouping(dataset, image_tokens(processor), by_modality, data.grouping_steps, config.run.seed)
    grouping.lengths(0)  # now, not in each worker of the loader
    return grouping


def image_tokens(processor: ClocMllmProcessor) -> TokensOfImage:
    """Return how many tokens an image takes: a number where its size does not matter."""
    return processor.image_tokens if processor.image_layout.pinpoints else processor.num_image_tokens


def describe_order(config: TuneConfig) -> dict[str, Any]:
    """Return what the order of a preset's samples depends on, beside seed, batch and number of samples."""
    data = config.data
    return {
        "sources": [[source.path, source.weight] for source in data.sources],
        "grouping": [data.grouping, data.grouping_steps],
    }


def validation_conversations(config: TuneConfig) -> Subset | None:
    """Return the validation samples of a preset, or ``None``."""
    if config.data.validation is None:
        return None
    dataset = conversations(config, config.data.validation)
    return Subset(dataset, range(min(len(dataset), config.data.validation_samples)))


def conversation_collator(processor: ClocMllmProcessor, config: TuneConfig, dataset: Any) -> ConversationCollator:
    """Return the collator of training batches.

    Args:
        processor: The MLLM's.
        config: The preset.
        dataset: The training data, which count what is skipped.
    """
    data = config.data
    return ConversationCollator(
        processor,
        data.max_length,
        packing=data.packing,
        pack_length=data.pack_length,
        chat_template=preset_template(processor, config),
        skips=dataset.skips if data.on_bad_sample == "skip" else None,
    )


def preset_template(processor: ClocMllmProcessor, config: TuneConfig) -> str | None:
    """Return the chat template that a preset is trained with, where it is not the processor's own."""
    plain = isinstance(config, AlignConfig) and config.data.prompts == "plain"
    return caption_template(processor.tokenizer) if plain else None


def first_sample_report(
    processor: ClocMllmProcessor, item: Mapping[str, Any], most: int = 1200, template: str | None = None
) -> str:
    """Return the first sample as the model will see it, what is learnt in brackets.

    Args:
        processor: The MLLM's.
        item: An item of the dataset.
        most: Characters shown.
        template: A chat template in the place of the processor's own.
    """
    batch = processor.encode([item["messages"]], return_labels=True, return_original_sizes=True, chat_template=template)
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


def first_report(processor: ClocMllmProcessor, dataset: Any, template: str | None = None, tries: int = 10) -> str:
    """Return the report of the first sample that the processor takes.

    Args:
        processor: The MLLM's.
        dataset: What :func:`training_conversations` returned.
        template: A chat template in the place of the processor's own.
        tries: Samples that are tried where refused ones are to be skipped.

    Raises:
        ClocError: The processor refuses the first one, and `on_bad_sample` is "error".
    """
    for index in range(min(tries, len(dataset))):
        item = dataset[index]
        try:
            return first_sample_report(processor, item, template=template)
        except ConversationError as error:
            if dataset.on_bad_sample == "error":
                raise ClocError(error.problem, file=item.get("file"), sample=item.get("sample")) from error
    return f"none of the first {tries} can be shown: the processor refuses them"
