"""Builds the encoder a preset asks for: tokenizer, processor and `ClocModel`, from scratch or from a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig, PreTrainedTokenizerBase

from cloc_mllm.data.files import may_be_hub_name
from cloc_mllm.errors import ClocError
from cloc_mllm.models.configuration_cloc import ClocConfig
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.processing_cloc import ClocProcessor
from cloc_mllm.training.presets.config import PretrainConfig
from cloc_mllm.training.presets.options import EncoderModelOptions, TokenizerOptions
from cloc_mllm.training.pretraining.tokenizer import TEXT_TOKENS, build_tokenizer, corpus, train_text_tokenizer
from cloc_mllm.training.pretraining.towers import (
    BARE_TOWERS,
    CLIP_LOGIT_SCALE_MAX,
    FAMILIES,
    image_statistics,
    load_towers,
    prompter_config,
    require_complete,
    resize_frame,
    set_frame,
    tower_config,
    tower_tokenizer,
)
from cloc_mllm.training.running import launch


def build_encoder(config: PretrainConfig, world: launch.World) -> tuple[ClocModel, ClocProcessor]:
    """Build or load the encoder to train and its processor, the same on every process.

    Args:
        config: The preset.
        world: This process's place.

    Returns:
        The model in fp32 on the CPU, in training mode, and its processor.

    Raises:
        ClocError: A checkpoint is missing, incomplete, or of another model.
    """
    kind, _, path = config.model.init.partition(":")
    if kind == "cloc":
        return _go_on(path, config)
    if kind in FAMILIES:
        torch.manual_seed(config.run.seed)
        return stock_encoder(kind, path, config.model, config.tokenizer, announce=world.is_main)
    tokenizer = build_tokenizer(
        config.tokenizer,
        lambda: train_text_tokenizer(corpus(config.tokenizer.corpus or config.data.train), config.tokenizer),
        Path(config.run.output) / "tokenizer",
        world,
    )
    require_text_tokens(tokenizer, config.tokenizer.path)
    torch.manual_seed(config.run.seed)
    model = ClocModel(encoder_config(config.model, config.tokenizer, tokenizer))
    if config.model.position_init == "sincos":
        start_from_sincos_positions(model)
    images = ClocImageProcessor(size=config.model.frame_size, resize_mode=config.model.resize_mode)
    processor = ClocProcessor(
        images, tokenizer, max_length=config.tokenizer.max_length, lower_case=config.tokenizer.lowercase
    )
    return model.train(), processor


def planned_config(config: PretrainConfig) -> ClocConfig:
    """Return the configuration of the encoder a preset asks for, without reading weights or training a tokenizer.

    Args:
        config: The preset.

    Raises:
        ClocError: A checkpoint is missing or of another kind.
    """
    kind, _, path = config.model.init.partition(":")
    if kind in FAMILIES:
        return tower_config(kind, path, config.model)
    if kind == "scratch":
        return encoder_config(config.model, config.tokenizer)
    require_model_type(path, "cloc")
    planned: ClocConfig = ClocConfig.from_pretrained(path)
    if config.model.image_size is not None:
        set_frame(planned.vision_config, config.model.image_size, path)
    if config.model.logit_bias_init is not None and planned.logit_bias_init_value is None:
        planned.logit_bias_init_value = config.model.logit_bias_init
    return planned


def require_text_tokens(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Refuse a tokenizer that a CLIP text encoder from scratch cannot be trained with.

    Args:
        tokenizer: Any of transformers'; T5's, say, which has no token for the beginning of a text.
        path: Where it is from, for the message.

    Raises:
        ClocError: It has no padding or no end of text, does not write that end, or has it at 2.
    """
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ClocError(f"has no {name}, which the text encoder needs", file=path)
    end = tokenizer.eos_token_id
    if end == 2:
        raise ClocError(
            "has its end of text at id 2, which transformers' CLIP takes as a sign of an old checkpoint: it would read "
            "texts at their largest id instead",
            file=path,
            remedy="Use a tokenizer with another eos_token_id, such as T5's (1).",
        )
    if tokenizer("a")["input_ids"][-1] != end:
        raise ClocError(
            f"does not end texts with {tokenizer.eos_token}, where the text encoder reads them",
            file=path,
            remedy="Use a tokenizer that adds its eos_token, such as T5's or CLIP's.",
        )


def encoder_config(
    options: EncoderModelOptions, text: TokenizerOptions, tokenizer: PreTrainedTokenizerBase | None = None
) -> ClocConfig:
    """Return the configuration of an encoder from scratch.

    Args:
        options: The preset's `model` block.
        text: Its `tokenizer` block.
        tokenizer: The tokenizer; ``None`` assumes one of the largest size allowed.
    """
    vision = CLIPVisionConfig(
        **options.vision.model_dump(),
        image_size=options.frame_size,
        patch_size=options.patch_size,
        projection_dim=options.projection_dim,
    )
    ids = {f"{name}_token_id": TEXT_TOKENS.index(f"<{name}>") for name in ("bos", "eos", "pad")}
    if tokenizer is not None:
        ids = {key: getattr(tokenizer, key) for key in ids}
    language = CLIPTextConfig(
        **options.text.model_dump(),
        vocab_size=text.vocab_size if tokenizer is None else len(tokenizer),
        max_position_embeddings=text.max_length,
        projection_dim=options.projection_dim,
        **ids,
    )
    return ClocConfig(
        vision_config=vision,
        text_config=language,
        prompter_config=prompter_config(options, vision, options.projection_dim),
        projection_dim=options.projection_dim,
        logit_scale_init_value=math.log(options.logit_scale_init),
        logit_scale_max=math.log(options.logit_scale_max or CLIP_LOGIT_SCALE_MAX),
        logit_bias_init_value=options.logit_bias_init,
    )


@torch.no_grad()
def start_from_sincos_positions(model: ClocModel, amplitude: float = 0.5) -> None:
    """Start the tower's learned position embeddings as sinusoids of row and column instead of as small noise.

    Only the starting point differs: the embeddings are trained and stored as in any CLIP. A short run otherwise spends
    its first hundreds of steps on finding out where patches are.

    Args:
        model: An encoder whose tower is a CLIP vision model.
        amplitude: Height of the waves; about the size of a patch embedding at initialisation.
    """
    weight = model.vision_model.embeddings.position_embedding.weight
    side, waves = math.isqrt(len(weight) - 1), weight.shape[1] // 4
    exponent = torch.linspace(0, 1, waves)
    angle = torch.arange(side)[:, None] / side * math.pi * side**exponent
    code = torch.cat([angle.sin(), angle.cos()], dim=-1)
    rows, columns = code[:, None].expand(side, side, -1), code[None].expand(side, side, -1)
    weight[1:, : 4 * waves] = amplitude * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def load_encoder(path: str | Path, *, want_prompter: bool | None = None) -> tuple[ClocModel, ClocProcessor]:
    """Load an encoder's export or checkpoint, completely or not at all.

    Args:
        path: The folder.
        want_prompter: Whether it has to have a Prompter; ``None`` accepts both.

    Raises:
        ClocError: There is none, it is of another model, or weights are missing.
    """
    require_model_type(path, "cloc")
    try:
        model, info = ClocModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        processor = ClocProcessor.from_pretrained(path)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ClocError(f"cannot be loaded as an encoder: {error}", file=path) from error
    require_complete(info, path)
    if want_prompter is not None and want_prompter != (model.prompter is not None):
        has = "has a" if model.prompter is not None else "has no"
        raise ClocError(
            f"this encoder {has} Prompter, and the preset asks for the opposite",
            file=path,
            remedy="Set model.prompter accordingly ({} or null); sizes come from the checkpoint.",
        )
    return model.train(), processor


def load_any_encoder(path: str | Path) -> tuple[ClocModel, ClocProcessor]:
    """Load an encoder of this package, or a trained CLIP or SigLIP as one without a Prompter.

    Args:
        path: A local folder; a hub name too for CLIP and SigLIP.

    Raises:
        ClocError: There is none, it is of another model, or weights are missing.
    """
    kind = encoder_kind(path)
    if kind in BARE_TOWERS:
        raise ClocError(
            "is an image tower alone, which embeds no phrases: the grounding head cannot be taught by them",
            file=path,
            remedy="Name a whole CLIP or SigLIP, or set model.grounding=text.",
        )
    if kind not in FAMILIES:
        return load_encoder(path)
    options = stock_options(kind, path)
    return stock_encoder(kind, str(path), options, TokenizerOptions())


def tower_plan(path: str | Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint that is to be an MLLM's encoder, without reading its weights.

    Args:
        path: A CLOC encoder's folder; or folder or hub name of a CLIP or SigLIP, or of an image tower of these.

    Raises:
        ClocError: There is none.
    """
    kind = encoder_kind(path)
    if kind in FAMILIES:
        return tower_config(kind, str(path), stock_options(kind, path))
    if kind not in BARE_TOWERS:
        require_model_type(path, "cloc")
    return AutoConfig.from_pretrained(path)


def encoder_kind(path: str | Path) -> str:
    """Return the `model_type` of a checkpoint that is to be an MLLM's encoder.

    Raises:
        ClocError: There is no checkpoint.
    """
    if Path(path).is_dir() or not may_be_hub_name(path):
        return model_type_of(path)
    try:
        return str(AutoConfig.from_pretrained(path).model_type)
    except (OSError, ValueError) as error:
        raise ClocError(f"no encoder can be loaded: {error}", file=path) from error


def stock_options(kind: str, path: str | Path) -> EncoderModelOptions:
    """Return the options under which a CLIP or SigLIP is taken as it is: its own frame, no Prompter."""
    return EncoderModelOptions(init=f"{kind}:{path}", prompter=None)


def require_model_type(path: str | Path, model_type: str) -> None:
    """Refuse a folder that does not hold a model of this type.

    Args:
        path: A local folder.
        model_type: `model_type` of its config.json.

    Raises:
        ClocError: No folder, no config.json, or another type.
    """
    found = model_type_of(path)
    if found != model_type:
        raise ClocError(f"holds a model of type '{found}', not '{model_type}'", file=path)


def model_type_of(path: str | Path) -> str:
    """Return the `model_type` that a folder's config.json states.

    Raises:
        ClocError: No folder, or no readable config.json.
    """
    file = Path(path) / "config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
    except FileNotFoundError:
        if (Path(path) / "adapter_config.json").exists():
            remedy = f"Merge it first: cloc-mllm merge {path} --out DIR."
            raise ClocError("this is an adapter, not a model", file=path, remedy=remedy) from None
        inside = Path(path) / "export"
        hint = f"Did you mean {inside}?" if (inside / "config.json").is_file() else None
        raise ClocError("there is no model here (no config.json)", file=path, remedy=hint) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ClocError(f"is not a readable model configuration: {error}", file=file) from None


def _with_biases(model: ClocModel, config: PretrainConfig) -> ClocModel:
    """Give a finished encoder the biases of the sigmoid loss, if it is to be trained with that and has none.

    Raises:
        ClocError: It has them, and they would be left untrained.
    """
    first = config.model.logit_bias_init
    if first is not None and model.logit_bias is None:
        model.add_logit_biases(first)
    if first is None and model.logit_bias is not None:
        raise ClocError(
            "this encoder was trained with the sigmoid loss and has biases that the softmax loss would not train",
            file=config.model.init.partition(":")[2],
            remedy="Set objective.contrast=sigmoid model.logit_bias_init=-10.",
        )
    return model


def _go_on(path: str, config: PretrainConfig) -> tuple[ClocModel, ClocProcessor]:
    """Go on from an encoder of this package, in another frame if the preset names one."""
    model, processor = load_encoder(path, want_prompter=config.model.prompter is not None)
    if config.model.image_size is not None:
        model = resize_frame(model, config.model.image_size, path)
        processor.image_processor.size = config.model.image_size
    return _with_biases(model, config).train(), processor


def stock_encoder(
    kind: str, path: str, options: EncoderModelOptions, text: TokenizerOptions, announce: bool = True
) -> tuple[ClocModel, ClocProcessor]:
    """Make an encoder of a trained CLIP or SigLIP; its Prompter, if it is to have one, is new.

    Args:
        kind: `clip` or `siglip`.
        path: A local folder or a hub name.
        options: Frame, Prompter, temperatures.
        text: Longest text and case.
        announce: Whether to say where the mean and deviation of the pixels were assumed.

    Raises:
        ClocError: There is no such checkpoint, or it does not fit the options.
    """
    family, planned = FAMILIES[kind], tower_config(kind, path, options)
    tokenizer = tower_tokenizer(path)
    model = load_towers(kind, path, planned)
    images = stock_images(kind, path, planned.vision_config.image_size, options.resize_mode, announce)
    longest = planned.text_config.max_position_embeddings
    processor = ClocProcessor(
        images,
        tokenizer,
        max_length=longest if family.fixed_length else min(text.max_length, longest),
        lower_case=text.lowercase,
        fixed_length=family.fixed_length,
    )
    return model.train(), processor


def stock_images(kind: str, path: str, size: int, resize_mode: str, announce: bool = True) -> ClocImageProcessor:
    """Return the image processor of a CLIP or SigLIP tower: its statistics, this package's frame."""
    mean, std, stated = image_statistics(kind, path)
    if not stated and announce:
        name = FAMILIES[kind].name
        print(f"{path} comes without an image processor: {name}'s mean {mean} and deviation {std} are taken")
    return ClocImageProcessor(size, resize_mode, mean, std)
