"""Tiny real MLLMs for the tests: a random language model of a real family behind a tiny CLOC encoder."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers import Qwen2ForCausalLM as Qwen2

from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from tests.builders import CORPUS, noise_image, tiny_cloc

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_llm_tokenizer(special: tuple[str, ...] = CHATML, **tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as Qwen's and SmolLM2's, with ChatML markers unless told otherwise."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([f"user\n{line}" for line in CORPUS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **(tokens or {"eos_token": "<|im_end|>"}))


def tiny_llm(family: str = "llama", *, tied: bool = False, vocab_size: int = 350, seed: int = 1) -> PreTrainedModel:
    """A two-layer random language model, ``llama`` or ``qwen2``, in evaluation mode."""
    torch.manual_seed(seed)
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2)}[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        # Large enough for untrained logits to differ clearly from token to token.
        initializer_range=0.3,
    )
    return model_class(config).eval()


def tiny_mllm(
    family: str = "llama",
    *,
    tied: bool = False,
    encoder_kind: str | None = "prompter",
    region_encoder: str = "prompter",
    grounding: str = "head",
    region_format: str = "token",
    encoder: ClocModel | None = None,
    seed: int = 2,
    **options: Any,
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """A tiny random MLLM in evaluation mode and its processor."""
    own, encoder_processor = tiny_cloc(kind=encoder_kind)
    encoder = encoder or own
    processor = ClocMllmProcessor.from_parts(
        encoder_processor.image_processor,
        tiny_llm_tokenizer(),
        encoder.config.vision_config,
        region_format=region_format,
        grounding=grounding,
        vision_feature_select_strategy=options.get("vision_feature_select_strategy", "default"),
        num_region_tokens=options.get("num_region_tokens", 1),
    )
    torch.manual_seed(seed)
    model = ClocMllmForConditionalGeneration.from_parts(
        encoder,
        tiny_llm(family, tied=tied),
        processor.tokenizer,
        region_encoder=region_encoder,
        grounding=grounding,
        **options,
    )
    return model, processor


def text(value: str) -> dict[str, Any]:
    """A text item."""
    return {"type": "text", "text": value}


def image(seed: int = 0, width: int = 40, height: int = 30) -> dict[str, Any]:
    """An image item that holds noise."""
    return {"type": "image", "image": noise_image(width, height, seed)}


def region(*box: float, **extra: Any) -> dict[str, Any]:
    """A region item."""
    return {"type": "region", "box": list(box), **extra}


def user(*items: Any) -> dict[str, Any]:
    """A user's turn; a lone string is its text."""
    return {"role": "user", "content": items[0] if isinstance(items[0], str) else list(items)}


def assistant(*items: Any) -> dict[str, Any]:
    """An assistant's turn; a lone string is its text."""
    return {"role": "assistant", "content": items[0] if isinstance(items[0], str) else list(items)}


def grounding_turn(phrase: str = "red circle", box: tuple[float, ...] = (4, 5, 20, 22)) -> dict[str, Any]:
    """An assistant's turn that points out a phrase, as the scenes write it."""
    return assistant(text(f"{phrase} "), region(*box, phrase=phrase))


def model_inputs(batch: Any) -> dict[str, Any]:
    """What of a training batch ``forward`` takes; the rest is the trainer's."""
    return {name: value for name, value in batch.items() if name not in ("ground_boxes", "ground_phrases")}


def stock_llava(model: ClocMllmForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Transformers' own LLaVA with the weights that it has a place for: the oracle for everything but regions."""
    ours = {"region_encoder", "prompter_config", "grounding", "grounding_config", "region_token_index"}
    ours |= {"ground_token_index", "model_type", "auto_map", "architectures", "num_region_tokens", "boxes_per_phrase"}
    config = LlavaConfig(**{name: value for name, value in model.config.to_dict().items() if name not in ours})
    stock = LlavaForConditionalGeneration(config).eval()
    extra = ("model.prompter.", "model.region_projector.", "model.grounding_head.")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(extra)}
    stock.load_state_dict(weights)
    stock.generation_config = model.generation_config
    return stock
