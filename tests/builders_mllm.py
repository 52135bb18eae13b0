"""Tiny real MLLMs for the tests: a random language model of a real family behind a tiny CLOC encoder."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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


LLM_FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "cohere",
    "granite",
)


def tiny_llm(family: str = "llama", *, tied: bool = False, vocab_size: int = 350, seed: int = 1) -> PreTrainedModel:
    """A two-layer random language model of a family, by its ``model_type``, in evaluation mode."""
    torch.manual_seed(seed)
    head_dim = {"head_dim": 8} if family in ("qwen3", "gemma", "gemma2", "gemma3_text") else {}
    scale = {"logit_scale": 0.25} if family == "cohere" else {"logits_scaling": 4.0} if family == "granite" else {}
    cap = {"final_logit_softcapping": 3.0} if family in ("gemma2", "gemma3_text") else {}
    config = AutoConfig.for_model(
        family,
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
        # Defaults of some families lie outside this vocabulary.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        **head_dim,
        **scale,
        **cap,
    )
    return AutoModelForCausalLM.from_config(config).eval()


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
    image_mode: str | None = None,
    image_grid_pinpoints: list[list[int]] | None = None,
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
        image_mode=image_mode,
        image_grid_pinpoints=image_grid_pinpoints,
        **{name: options[name] for name in ("projector_type", "pixel_shuffle_factor") if name in options},
        num_region_tokens=options.get("num_region_tokens", 1),
    )
    torch.manual_seed(seed)
    model = ClocMllmForConditionalGeneration.from_parts(
        encoder,
        tiny_llm(family, tied=tied),
        processor.tokenizer,
        region_encoder=region_encoder,
        grounding=grounding,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
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


def stock_llava(model: ClocMllmForConditionalGeneration) -> Any:
    """Transformers' own LLaVA, or LLaVA-NeXT, with the weights it has a place for: the oracle for all but regions."""
    ours = {"region_encoder", "prompter_config", "grounding", "grounding_config", "region_token_index"}
    ours |= {"ground_token_index", "lm_head_bias", "model_type", "auto_map", "architectures"}
    ours |= {"projector_type", "pixel_shuffle_factor", "num_region_tokens", "boxes_per_phrase"}
    shared = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    stock: Any
    if shared["image_grid_pinpoints"] is None:
        del shared["image_grid_pinpoints"]
        stock = LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()
    else:
        stock = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared)).eval()
    extra = ("model.prompter.", "model.region_projector.", "model.grounding_head.")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(extra)}
    if "model.image_newline.weight" in weights:
        weights["model.image_newline"] = weights.pop("model.image_newline.weight")
    stock.load_state_dict(weights)
    stock.generation_config = model.generation_config
    return stock
