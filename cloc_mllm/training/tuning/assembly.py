"""From an image tower and a language model to an MLLM and its processor, in one call.

    model, processor = assemble_mllm("openai/clip-vit-large-patch14-336", "Qwen/Qwen2.5-0.5B-Instruct")

The tower is a CLOC encoder's export, a CLIP or SigLIP (SigLIP2 of a fixed resolution included), or the image tower of
one; the language model any causal one that transformers' Auto classes load. The connectors between them are new: what
comes out is where alignment starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cloc_mllm.errors import ClocError
from cloc_mllm.models.assembly_cloc_mllm import EncoderParts
from cloc_mllm.models.configuration_cloc import ClocPrompterConfig, has_class_token
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from cloc_mllm.training.pretraining.encoder import encoder_kind, load_any_encoder, stock_images
from cloc_mllm.training.pretraining.towers import BARE_TOWERS, require_complete


def assemble_mllm(
    tower: str | Path,
    llm: str | Path | Callable[[PreTrainedTokenizerBase], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    region_encoder: str = "prompter",
    region_format: str = "both",
    grounding: str = "head",
    box_mode: str = "norm1000",
    chat_style: str = "auto",
    vision_feature_layer: int | list[int] = -2,
    projector_type: str = "mlp2x_gelu",
    pixel_shuffle_factor: int = 2,
    image_mode: str | None = None,
    image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
    num_region_tokens: int = 1,
    boxes_per_phrase: int = 1,
    prompter: dict[str, Any] | None = None,
    grounding_init: str = "encoder",
    seed: int = 0,
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """Put an MLLM together; everything is copied, the connectors are new.

    Args:
        tower: Folder or hub name of an encoder: CLOC's export, a CLIP or SigLIP, or an image tower of these alone.
        llm: Folder or hub name of a causal language model; or a function that makes one for a tokenizer.
        tokenizer: The language model's; default the one beside it.
        region_encoder: ``prompter``, ``roi_align`` or ``none``; its weights are the encoder's where it has them.
        region_format: How a user's region is written: ``token``, ``coords`` or ``both``; with no region encoder always
            ``coords``.
        grounding: ``head`` or ``text``: how boxes come out.
        box_mode: How coordinates are written; see :class:`cloc_mllm.models.boxes.BoxCodec`.
        chat_style: Which markers are around turns; see :mod:`cloc_mllm.models.chat_template`.
        vision_feature_layer: Layer(s) of the tower the language model sees.
        projector_type: ``mlp2x_gelu``, ``linear`` or ``pixel_shuffle``.
        pixel_shuffle_factor: Patches along each side that ``pixel_shuffle`` makes one token of.
        image_mode: ``pad``, ``resize`` or ``anyres``; default the encoder's.
        image_grid_pinpoints: Resolutions ``[height, width]`` of ``anyres``; default LLaVA-NeXT's for the tower's size.
        num_region_tokens: Tokens that a region becomes.
        boxes_per_phrase: Most boxes that the grounding head tells apart for one phrase.
        prompter: Fields of the grounding head's own Prompter, where it should differ from the encoder's.
        grounding_init: ``encoder`` or ``new``: what the head starts from.
        seed: Of the new weights.

    Returns:
        The model in fp32 on the CPU and in evaluation mode, and its processor.

    Raises:
        ClocError: A part is missing or incomplete, or the parts do not go together.
    """
    encoder, images = load_tower(tower)
    if tokenizer is None:
        tokenizer = load_tokenizer(llm)
    plan = EncoderParts.planned(encoder.config)
    own_head = head_config(plan, prompter) if prompter is not None and grounding == "head" else None
    try:
        processor = ClocMllmProcessor.from_parts(
            images,
            tokenizer,
            plan.vision_config,
            region_format="coords" if region_encoder == "none" else region_format,
            grounding=grounding,
            box_mode=box_mode,
            chat_style_name=chat_style,
            projector_type=projector_type,
            pixel_shuffle_factor=pixel_shuffle_factor,
            image_mode=image_mode,
            image_grid_pinpoints=None if image_grid_pinpoints is None else [list(one) for one in image_grid_pinpoints],
            num_region_tokens=num_region_tokens,
        )
        torch.manual_seed(seed)
        language_model = llm(processor.tokenizer) if callable(llm) else load_language_model(llm)
        model = ClocMllmForConditionalGeneration.from_parts(
            encoder.eval(),
            language_model,
            processor.tokenizer,
            region_encoder=region_encoder,
            grounding=grounding,
            vision_feature_layer=vision_feature_layer,
            projector_type=projector_type,
            pixel_shuffle_factor=pixel_shuffle_factor,
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
            grounding_config=own_head,
            grounding_init=grounding_init,
            num_region_tokens=num_region_tokens,
            boxes_per_phrase=boxes_per_phrase,
        )
    except ValueError as error:
        raise ClocError(f"encoder and LLM do not go together: {error}", file=tower) from error
    return model, processor


def load_tower(path: str | Path) -> tuple[PreTrainedModel, ClocImageProcessor]:
    """Load what an MLLM sees with, and how its images are made.

    Args:
        path: As `tower` of :func:`assemble_mllm`.

    Returns:
        The encoder, or the bare tower, in fp32, and its image processor.

    Raises:
        ClocError: There is none, it is of another model, or weights are missing.
    """
    kind = encoder_kind(path)
    if kind not in BARE_TOWERS:
        encoder, processor = load_any_encoder(path)
        return encoder, processor.image_processor
    try:
        model, info = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClocError(f"cannot be loaded as an image tower: {error}", file=path) from error
    require_complete(info, path)
    return model, stock_images(BARE_TOWERS[kind], str(path), model.config.image_size, "pad")


def head_config(encoder: EncoderParts, fields: dict[str, Any]) -> ClocPrompterConfig:
    """Return a grounding head's own Prompter configuration, so that towers without one get the same head.

    Args:
        encoder: The encoder, or the plan of it.
        fields: All but the widths, which are the encoder's.
    """
    return ClocPrompterConfig(
        **fields,
        hidden_size=encoder.vision_config.hidden_size,
        projection_dim=encoder.projection_dim,
        has_class_token=has_class_token(encoder.vision_config),
    )


def load_tokenizer(path: Any) -> PreTrainedTokenizerBase:
    """Return a language model's tokenizer.

    Raises:
        ClocError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ClocError(f"holds no tokenizer: {error}", file=path) from error


def load_language_model(path: Any) -> PreTrainedModel:
    """Return a causal language model in fp32, completely or not at all.

    Raises:
        ClocError: There is none, or weights are missing.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClocError(f"cannot be loaded as a causal LM: {error}", file=path) from error
    if info["missing_keys"]:
        require_complete({"missing_keys": info["missing_keys"]}, path)
    return model
