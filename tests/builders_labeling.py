"""Tiny checkpoints of image-to-text models, random but telling pictures apart, for the tests of labelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    GenerationConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from tests.builders import tiny_tokenizer

SQUARE = {"height": 32, "width": 32}
# The spread makes untrained answers depend on the picture.
_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.5,
}
_TOWER = {**_SIZE, "image_size": 32, "patch_size": 8}


def save_tiny_blip(folder: Path, seed: int = 0) -> Path:
    """A BLIP captioner."""
    tokenizer = tiny_tokenizer()
    text = {**_SIZE, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "sep_token_id": 3, **_special()}
    torch.manual_seed(seed)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_TOWER)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size=SQUARE), tokenizer).save_pretrained(folder)
    return folder


def save_tiny_git(folder: Path, seed: int = 0) -> Path:
    """A GIT captioner."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = GitConfig(vision_config=_TOWER, vocab_size=len(tokenizer), **_SIZE, **_special())
    GitForCausalLM(config).save_pretrained(folder)
    GitProcessor(CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tokenizer).save_pretrained(folder)
    return folder


def save_tiny_vit_gpt2(folder: Path, seed: int = 0) -> Path:
    """A ViT that GPT-2 writes about."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    text = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=3,
        initializer_range=0.5,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_TOWER), text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 3
    model = VisionEncoderDecoderModel(config)
    model.generation_config = GenerationConfig(decoder_start_token_id=1, pad_token_id=0, eos_token_id=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return folder


def _special() -> dict[str, int]:
    return {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
