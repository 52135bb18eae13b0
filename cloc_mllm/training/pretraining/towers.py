"""Trained CLIP and SigLIP checkpoints as what an encoder starts from: configuration, weights, tokenizer, images.

The configuration alone is enough to explain a preset; building the encoder reads the weights as well. Both are decided
here, so what is explained is what is built.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from cloc_mllm.errors import ClocError
from cloc_mllm.models.configuration_cloc import ClocConfig, ClocPrompterConfig, has_class_token
from cloc_mllm.models.modeling_cloc import SIGLIP_LOGIT_SCALE_MAX, ClocModel
from cloc_mllm.models.position_embeddings import POSITION_KEY, resize_positions
from cloc_mllm.training.presets.options import EncoderModelOptions

CLIP_LOGIT_SCALE_MAX = 100.0


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one family have in common.

    Attributes:
        name: In messages.
        model_class: Of transformers.
        has_projections: Whether matrices lead from its towers to the shared space.
        fixed_length: Whether its texts are padded to full length, and the padding is attended to.
        logit_scale_max: Largest multiplier of the cosines, where the preset names none.
        mean: Of each channel, for a checkpoint that comes without an image processor.
        std: The deviations.
    """

    name: str
    model_class: type[PreTrainedModel]
    has_projections: bool
    fixed_length: bool
    logit_scale_max: float
    mean: list[float]
    std: list[float]


FAMILIES = {
    "clip": Family("CLIP", CLIPModel, True, False, CLIP_LOGIT_SCALE_MAX, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip": Family(
        "SigLIP",
        SiglipModel,
        False,
        True,
        math.exp(SIGLIP_LOGIT_SCALE_MAX),
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_STD,
    ),
}
"""By the kind in `model.init`, which is the `model_type` of the checkpoint too."""

BARE_TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""Types of checkpoints that hold an image tower alone, and the family it is of."""


def prompter_config(
    options: EncoderModelOptions, vision: PreTrainedConfig, projection_dim: int
) -> ClocPrompterConfig | None:
    """Return the Prompter's configuration for a tower; ``None`` for a plain CLIP.

    Args:
        options: The preset's `model` block.
        vision: The tower's configuration.
        projection_dim: Dimension of the shared space.
    """
    if options.prompter is None:
        return None
    return ClocPrompterConfig(
        **options.prompter.model_dump(),
        hidden_size=vision.hidden_size,
        projection_dim=projection_dim,
        has_class_token=has_class_token(vision),
    )


def tower_config(kind: str, path: str, options: EncoderModelOptions) -> ClocConfig:
    """Return the configuration of an encoder that starts from a trained CLIP or SigLIP, without reading its weights.

    Args:
        kind: `clip` or `siglip`.
        path: A local folder or a hub name.
        options: The preset's `model` block: the frame's size, the Prompter, temperatures.

    Raises:
        ClocError: There is no such checkpoint, it is of another kind, or the frame's size does not fit it.
    """
    family, source = FAMILIES[kind], _checkpoint_config(kind, path)
    vision, text = copy.deepcopy(source.vision_config), copy.deepcopy(source.text_config)
    if kind == "siglip" and not vision.vision_use_head:
        raise ClocError("this SigLIP tower has no pooling head, so it embeds no whole images", file=path)
    if options.image_size is not None:
        set_frame(vision, options.image_size, path)
    dim = source.projection_dim if family.has_projections else text.projection_size
    return ClocConfig(
        vision_config=vision,
        text_config=text,
        prompter_config=prompter_config(options, vision, dim),
        projection_dim=dim,
        has_projections=family.has_projections,
        logit_scale_init_value=math.log(options.logit_scale_init),
        logit_scale_max=math.log(options.logit_scale_max or family.logit_scale_max),
        logit_bias_init_value=options.logit_bias_init,
    )


def set_frame(vision: Any, image_size: int, path: str | Path) -> None:
    """Give a tower's configuration another frame.

    Args:
        vision: The configuration, changed in place.
        image_size: Side of the frame in pixels.
        path: The checkpoint, for the message.

    Raises:
        ClocError: The patches do not fill the frame.
    """
    if image_size != vision.image_size and image_size % vision.patch_size:
        raise ClocError(
            f"model.image_size {image_size} is not a multiple of this tower's patches of {vision.patch_size} pixels",
            file=path,
            remedy=f"Use {round(image_size / vision.patch_size) * vision.patch_size}, or null for the checkpoint's own "
            f"{vision.image_size}.",
        )
    vision.image_size = image_size


def load_towers(kind: str, path: str, config: ClocConfig) -> ClocModel:
    """Build an encoder whose towers come from a trained CLIP or SigLIP; the Prompter is new.

    Args:
        kind: `clip` or `siglip`.
        path: A local folder or a hub name.
        config: What :func:`tower_config` returned.

    Raises:
        ClocError: Weights are missing or of another model, or the cap on the temperature is below what it learnt.
    """
    family = FAMILIES[kind]
    try:
        source, info = family.model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClocError(f"cannot be loaded as a {family.name} model: {error}", file=path) from error
    require_complete(info, path)
    if float(source.logit_scale.detach()) > config.logit_scale_max + 1e-3:
        raise ClocError(
            f"has learnt to multiply cosines by {math.exp(float(source.logit_scale.detach())):.1f}, more than "
            f"model.logit_scale_max allows ({math.exp(config.logit_scale_max):.1f})",
            file=path,
            remedy="Raise model.logit_scale_max, or leave it out.",
        )
    model = ClocModel(config)
    model.copy_towers(source)
    return model


@torch.no_grad()
def resize_frame(model: ClocModel, image_size: int, path: str | Path) -> ClocModel:
    """Return an encoder with another frame: its position embeddings are interpolated, all else is kept.

    Args:
        model: An encoder.
        image_size: Side of the new frame in pixels.
        path: The checkpoint, for messages.

    Raises:
        ClocError: The patches do not fill the frame.
    """
    if image_size == model.config.vision_config.image_size:
        return model
    config = copy.deepcopy(model.config)
    set_frame(config.vision_config, image_size, path)
    resized, weights = ClocModel(config), model.state_dict()
    key = f"vision_model.{POSITION_KEY}"
    weights[key] = resize_positions(weights[key], len(resized.get_parameter(key)))
    resized.load_state_dict(weights)
    return resized


def tower_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return a checkpoint's own tokenizer.

    Raises:
        ClocError: It has none.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ClocError(f"holds no tokenizer: {error}", file=path) from error


def image_statistics(kind: str, path: str) -> tuple[list[float], list[float], bool]:
    """Return mean and deviation of the channels that a checkpoint's images were normalised with.

    Args:
        kind: `clip` or `siglip`.
        path: A local folder or a hub name.

    Returns:
        Mean, deviation, and whether the checkpoint says so itself; otherwise they are its family's.
    """
    family = FAMILIES[kind]
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except (OSError, ValueError):
        found = {}
    mean, std = found.get("image_mean"), found.get("image_std")
    known = mean is not None and std is not None
    return (list(mean), list(std), True) if known else (list(family.mean), list(family.std), False)


def require_complete(info: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint that lacks weights of the model, or holds weights the model has no place for.

    Args:
        info: The loading info of `from_pretrained`.
        path: The checkpoint, for the message.

    Raises:
        ClocError: Something is missing, unexpected, or of another shape.
    """
    for key, words in (
        ("missing_keys", "lacks weights"),
        ("unexpected_keys", "holds weights of another model"),
        ("mismatched_keys", "holds weights of another shape"),
    ):
        names = sorted(str(name) for name in info.get(key) or [])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ClocError(f"{words}: {', '.join(names[:3])}{more}", file=path)


def _checkpoint_config(kind: str, path: str) -> Any:
    family = FAMILIES[kind]
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ClocError(f"cannot be loaded as a {family.name} model: {error}", file=path) from error
    if config.model_type == "siglip2":
        raise ClocError(
            "is a NaFlex SigLIP2 (type 'siglip2'), whose tower takes patches of any aspect ratio with a mask: "
            "boxes have no square frame there, so it is not supported",
            file=path,
            remedy="Use a SigLIP2 of fixed resolution, such as google/siglip2-so400m-patch14-384 (type 'siglip').",
        )
    if config.model_type != kind:
        raise ClocError(f"cannot be loaded as a {family.name} model: its type is '{config.model_type}'", file=path)
    return config
