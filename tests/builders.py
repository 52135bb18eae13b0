"""Small real models, tokenizers and pictures that the tests build instead of downloading."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from cloc_mllm.models.configuration_cloc import ClocConfig, ClocPrompterConfig
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.processing_cloc import ClocProcessor

CORPUS = [
    "a red circle left of a blue square",
    "two green striped triangles above a yellow star",
    "where is the small red ring",
    "what is this",
    "how many crosses are there",
    "yes no one two three four",
]


def tiny_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ``<bos>``, ``<eos>`` and ``<pad>``, wrapping every text in bos and eos."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<unk>", "<eos>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_cloc_config(
    tokenizer: PreTrainedTokenizerFast | None = None, *, kind: str | None = "prompter", pooling: str = "prompt"
) -> ClocConfig:
    """A CLOC of a few ten thousand weights at 32 px, patch 8; ``kind=None`` makes it a plain CLIP."""
    tokenizer = tokenizer or tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=32, patch_size=8
    )
    text = CLIPTextConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompter = ClocPrompterConfig(hidden_size=48, projection_dim=24, kind=kind, pooling=pooling) if kind else None
    return ClocConfig(vision_config=vision, text_config=text, prompter_config=prompter, projection_dim=24)


def tiny_cloc(
    *, kind: str | None = "prompter", pooling: str = "prompt", resize_mode: str = "pad", seed: int = 0
) -> tuple[ClocModel, ClocProcessor]:
    """A tiny randomly initialised encoder in eval mode, and its processor."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = ClocModel(tiny_cloc_config(tokenizer, kind=kind, pooling=pooling)).eval()
    return model, ClocProcessor(ClocImageProcessor(size=32, resize_mode=resize_mode), tokenizer)


def save_tiny_siglip(folder: Path, *, image_size: int = 32, length: int = 24, seed: int = 0) -> SiglipModel:
    """Write a tiny SigLIP with tokenizer and image processor, all weights random, biases too; returned in eval mode."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = SiglipModel(
        SiglipConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=image_size,
                patch_size=8,
            ).to_dict(),
            text_config=SiglipTextConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                vocab_size=len(tokenizer),
                max_position_embeddings=length,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ).to_dict(),
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.logit_scale.fill_(4.77)  # as google/siglip-base-patch16-224 has learnt: above CLIP's cap
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": image_size, "width": image_size}
    half = [0.5] * 3
    CLIPImageProcessorPil(size=square, crop_size=square, image_mean=half, image_std=half).save_pretrained(folder)
    return model


def noise_image(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """An RGB picture of uniform noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_bomb(side: int) -> bytes:
    """A PNG of a few bytes that would decode to ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
