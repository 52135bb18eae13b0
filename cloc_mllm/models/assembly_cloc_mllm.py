"""Puts an encoder and a language model together into an MLLM: configuration, weights, vocabulary, generation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_cloc import ClocPrompterConfig, has_class_token
from .configuration_cloc_mllm import CONTROL_TOKENS, ClocMllmConfig, feature_strategy
from .image_tokens import ImageTokens

VOCABULARY_MULTIPLE = 64
WEIGHT_SHAPING = (
    "kind",
    "hidden_size",
    "projection_dim",
    "intermediate_size",
    "num_attention_heads",
    "num_pos_feats",
    "max_frequency",
    "image_positions",
    "box_head_hidden_size",
)
"""What two Prompter configurations must agree on for one's weights to mean the same in the other."""


@dataclass(frozen=True)
class EncoderParts:
    """What an MLLM takes of an encoder, whatever its kind.

    Attributes:
        vision_config: The tower's configuration.
        projection_dim: Dimension of the space that its regions and texts share; a bare tower's own width.
        prompter_config: Its Prompter's configuration, if it is CLOC's.
        vision_model: The tower; ``None`` where only configurations are asked for.
        prompter: Its Prompter.
        box_head: Its BoxHead.
    """

    vision_config: Any
    projection_dim: int
    prompter_config: ClocPrompterConfig | None = None
    vision_model: nn.Module | None = None
    prompter: nn.Module | None = None
    box_head: nn.Module | None = None

    @classmethod
    def planned(cls, config: PreTrainedConfig) -> EncoderParts:
        """Parts of an encoder that is known by its configuration only."""
        vision = getattr(config, "vision_config", config)
        dim = getattr(config, "projection_dim", None) or vision.hidden_size
        return cls(vision, dim, getattr(config, "prompter_config", None))

    @classmethod
    def of(cls, encoder: PreTrainedModel) -> EncoderParts:
        """Parts of a CLOC encoder, of transformers' CLIP or SigLIP, or of one of their image towers alone."""
        whole = hasattr(encoder.config, "vision_config")
        return replace(
            cls.planned(encoder.config),
            vision_model=encoder.vision_model if whole else encoder,
            prompter=getattr(encoder, "prompter", None),
            box_head=getattr(encoder, "box_head", None),
        )


def assemble(
    model_class: Any,
    encoder: PreTrainedModel,
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    region_encoder: str,
    grounding: str,
    prompter_config: ClocPrompterConfig | None = None,
    grounding_config: ClocPrompterConfig | None = None,
    grounding_init: str = "encoder",
    **llava: Any,
) -> Any:
    """Build the model of ``ClocMllmForConditionalGeneration.from_parts``, where the arguments are described."""
    if grounding_init not in ("encoder", "new"):
        raise ValueError(f"grounding_init is {grounding_init!r}, not one of encoder, new")
    ids = control_ids(tokenizer)
    head = _head_of(llm)
    parts = EncoderParts.of(encoder)
    asked = llava.pop("vision_feature_select_strategy", None)
    config = ClocMllmConfig(
        vision_config=copy.deepcopy(parts.vision_config),
        text_config=copy.deepcopy(llm.config),
        region_encoder=region_encoder,
        prompter_config=None if region_encoder == "none" else prompter_config or prompter_like(parts, region_encoder),
        grounding=grounding,
        grounding_config=None if grounding == "text" else grounding_config or prompter_like(parts, "prompter"),
        image_token_index=ids["<image>"],
        region_token_index=ids["<region>"],
        ground_token_index=ids["<ground>"],
        vision_feature_select_strategy=feature_strategy(parts.vision_config, asked),
        lm_head_bias=head.bias is not None,
        **llava,
    )
    config.image_seq_length = ImageTokens.of(config).per_tile
    model = model_class(config).to(device=llm.device, dtype=llm.dtype).eval()
    assert parts.vision_model is not None
    model.model.vision_tower.load_state_dict(parts.vision_model.state_dict())
    _copy_language_model(model, llm)
    _copy_region_encoder(model.model, parts)
    if grounding_init == "encoder":
        _copy_grounding_head(model.model, parts)
    _check_same_logits(model, llm)
    _extend_vocabulary(model, tokenizer, ids)
    model.generation_config = _generation_config(model, llm, tokenizer, ids)
    return model


def control_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the control tokens.

    Raises:
        ValueError: If the tokenizer has not all of them.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)}: pass the one of the processor, "
            "`ClocMllmProcessor.from_parts(...).tokenizer`"
        )
    return {token: vocabulary[token] for token in CONTROL_TOKENS}


def prompter_like(encoder: EncoderParts, kind: str) -> ClocPrompterConfig:
    """The encoder's own Prompter configuration, or a fresh one of its widths."""
    own = encoder.prompter_config
    if own is not None:
        return ClocPrompterConfig.from_dict({**own.to_dict(), "kind": kind})
    return ClocPrompterConfig(
        hidden_size=encoder.vision_config.hidden_size,
        projection_dim=encoder.projection_dim,
        kind=kind,
        has_class_token=has_class_token(encoder.vision_config),
    )


def _head_of(llm: PreTrainedModel) -> nn.Linear:
    """The language model's head.

    Raises:
        ValueError: If it is not one linear layer.
    """
    head = llm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(llm).__name__} has no output of one linear layer: a causal language model that has is needed"
        )
    return head


def _copy_language_model(model: Any, llm: PreTrainedModel) -> None:
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.lm_head.load_state_dict(_head_of(llm).state_dict())
    model.tie_weights()


def _copy_region_encoder(model: Any, encoder: EncoderParts) -> None:
    """Start the region encoder from the encoder's Prompter, where it fits."""
    own = encoder.prompter_config
    if encoder.prompter is not None and model.prompter is not None and _same(model.config.prompter_config, own):
        _load_part(model.prompter, encoder.prompter)


def _copy_grounding_head(model: Any, encoder: EncoderParts) -> None:
    """Start the grounding head from the encoder's Prompter and BoxHead, where they fit."""
    own = encoder.prompter_config
    if encoder.prompter is None or encoder.box_head is None or model.grounding_head is None:
        return
    if _same(model.config.grounding_config, own):
        _load_part(model.grounding_head.localizer, encoder.prompter)
        model.grounding_head.box_head.load_state_dict(encoder.box_head.state_dict())


def _same(config: ClocPrompterConfig, own: ClocPrompterConfig | None) -> bool:
    return own is not None and all(getattr(config, name) == getattr(own, name) for name in WEIGHT_SHAPING)


def _load_part(part: nn.Module, source: nn.Module) -> None:
    """Copy the weights that ``part`` has; the source may have more (see the region encoder), never less."""
    weights = source.state_dict()
    part.load_state_dict({name: weights[name] for name in part.state_dict()})


@torch.no_grad()
def _check_same_logits(model: Any, llm: PreTrainedModel) -> None:
    """Some language models do more to their logits than is known here: better to hear of it now.

    Raises:
        ValueError: If text alone gives other logits than it gave before.
    """
    was_training = llm.training
    ids = torch.arange(8, device=llm.device)[None] % llm.config.vocab_size
    alone, together = llm.eval()(input_ids=ids).logits, model(input_ids=ids).logits
    llm.train(was_training)
    scale = alone.float().abs().max().clamp(min=1e-6)
    if float((alone.float() - together.float()).abs().max() / scale) > 1e-2:
        raise ValueError(
            f"{type(llm).__name__} does something to its logits, beyond one linear layer with a scale or a cap, that "
            "is not known here: another language model is needed"
        )


@torch.no_grad()
def _extend_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]) -> None:
    """Rows for the new tokens, at the mean of the old ones; never fewer rows than the language model had."""
    before = model.get_input_embeddings().weight.shape[0]
    # Ids may have gaps, so that the highest one lies beyond the number of tokens.
    needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if needed > before:
        try:
            model.resize_token_embeddings(needed, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
        except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the language model has embeddings for {before} tokens and cannot be given more, but the tokenizer "
                f"with <image>, <region> and <ground> needs {needed}: {error}"
            ) from error
    have = min(m.weight.shape[0] for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    if have < needed:
        raise ValueError(f"the language model has embeddings for {have} tokens, but the tokenizer needs {needed}")
    weights = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in weights.values():
        fresh = sorted({*range(before, len(weight)), *ids.values()})
        old = weight[:before].float()
        # Not all alike: a placeholder is told from its neighbours by its embedding where there are no ids.
        noise = torch.randn(len(fresh), weight.shape[1], device=weight.device) * old.std(0) * 0.1
        weight[fresh] = (old.mean(0) + noise).to(weight.dtype)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        bias[fresh] = bias[:before].mean()


def _generation_config(
    model: Any, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]
) -> GenerationConfig:
    """Greedy; stops where the chat template ends a turn; never emits what only the processor may write."""
    text = model.config.text_config
    text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    stops = [tokenizer.eos_token_id]
    own = llm.generation_config.eos_token_id if llm.generation_config is not None else None
    # Only where it names a token made for it: the default of a configuration may be any letter of this vocabulary.
    special = tokenizer.added_tokens_decoder
    stops += [token for token in (own if isinstance(own, list) else [own]) if token in special and token not in stops]
    never = [ids["<image>"], ids["<region>"], *([ids["<ground>"]] if model.config.grounding == "text" else [])]
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted({*never, *range(len(tokenizer), text.vocab_size)}),
    )
