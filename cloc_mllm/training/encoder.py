"""Builds the encoder a preset asks for: tokenizer, processor and `ClocModel`, from scratch or from a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from cloc_mllm.errors import ClocError
from cloc_mllm.models.configuration_cloc import ClocConfig, ClocPrompterConfig
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.processing_cloc import ClocProcessor
from cloc_mllm.training import launch
from cloc_mllm.training.config import PretrainConfig
from cloc_mllm.training.options import EncoderModelOptions, TokenizerOptions
from cloc_mllm.training.tokenizer import TEXT_TOKENS, build_tokenizer, corpus, train_text_tokenizer


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
        model, processor = load_encoder(path, want_prompter=config.model.prompter is not None)
        return _with_biases(model, config), processor
    if kind == "clip":
        model, processor = _from_clip(path, config)
        return _with_biases(model, config), processor
    tokenizer = build_tokenizer(
        config.tokenizer,
        lambda: train_text_tokenizer(corpus(config.tokenizer.corpus or config.data.train), config.tokenizer),
        Path(config.run.output) / "tokenizer",
        world,
    )
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ClocError(f"has no {name}, which the text encoder needs", file=config.tokenizer.path)
    torch.manual_seed(config.run.seed)
    model = ClocModel(encoder_config(config.model, config.tokenizer, tokenizer))
    if config.model.position_init == "sincos":
        start_from_sincos_positions(model)
    images = ClocImageProcessor(size=config.model.image_size, resize_mode=config.model.resize_mode)
    processor = ClocProcessor(
        images, tokenizer, max_length=config.tokenizer.max_length, lower_case=config.tokenizer.lowercase
    )
    return model.train(), processor


def encoder_config(
    options: EncoderModelOptions, text: TokenizerOptions, tokenizer: PreTrainedTokenizerFast | None = None
) -> ClocConfig:
    """Return the configuration of an encoder from scratch.

    Args:
        options: The preset's `model` block.
        text: Its `tokenizer` block.
        tokenizer: The tokenizer; ``None`` assumes one of the largest size allowed.
    """
    vision = CLIPVisionConfig(
        **options.vision.model_dump(),
        image_size=options.image_size,
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
        prompter_config=prompter_config(options, vision.hidden_size, options.projection_dim),
        projection_dim=options.projection_dim,
        logit_scale_init_value=math.log(options.logit_scale_init),
        logit_scale_max=math.log(options.logit_scale_max),
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


def prompter_config(options: EncoderModelOptions, width: int, projection_dim: int) -> ClocPrompterConfig | None:
    """Return the Prompter's configuration for a tower of this width; ``None`` for a plain CLIP."""
    if options.prompter is None:
        return None
    return ClocPrompterConfig(**options.prompter.model_dump(), hidden_size=width, projection_dim=projection_dim)


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
    except (OSError, ValueError, TypeError, RuntimeError) as error:
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


def require_model_type(path: str | Path, model_type: str) -> None:
    """Refuse a folder that does not hold a model of this type.

    Args:
        path: A local folder.
        model_type: `model_type` of its config.json.

    Raises:
        ClocError: No folder, no config.json, or another type.
    """
    file = Path(path) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise ClocError("there is no model here (no config.json)", file=path) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ClocError(f"is not a readable model configuration: {error}", file=file) from None
    if found != model_type:
        raise ClocError(f"holds a model of type '{found}', not '{model_type}'", file=path)


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


def _from_clip(path: str, config: PretrainConfig) -> tuple[ClocModel, ClocProcessor]:
    """Start from a trained CLIP, a local folder or a hub name; the Prompter is new."""
    try:
        clip, info = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClocError(f"cannot be loaded as a CLIP model: {error}", file=path) from error
    require_complete(info, path)
    vision = clip.config.vision_config
    torch.manual_seed(config.run.seed)
    model = ClocModel.from_clip(clip, prompter_config(config.model, vision.hidden_size, clip.config.projection_dim))
    images = ClocImageProcessor(size=vision.image_size, resize_mode=config.model.resize_mode)
    length = min(config.tokenizer.max_length, clip.config.text_config.max_position_embeddings)
    return model.train(), ClocProcessor(images, tokenizer, max_length=length, lower_case=config.tokenizer.lowercase)
