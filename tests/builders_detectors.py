"""Small random detectors and their tokenizers, saved as the checkpoints that the stages load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    ViTImageProcessorPil,
)

WORDS = [*["a", "the", "on", "with", "of", "and"], *["red", "blue", "black", "white", "small", "very", "old"]]
WORDS += ["cat", "dog", "ball", "tree", "house", "car", "sky", "man"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words whose end token has the highest id, as CLIP's has: that is where OWL reads off a text."""
    vocab = {token: k for k, token in enumerate(["<pad>", "<bos>", "<unk>", *WORDS, "<eos>"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.normalizer = normalizers.Lowercase()
    special = [("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_tiny_owl(folder: Path, kind: str = "owlv2", *, seed: int = 0) -> Any:
    """Write a tiny OWLv2 or OWL-ViT of 32 px and patch 8, weights random and large; returned in eval mode."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 8}
    text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": 1}
    config_class, model_class, processor_class = {
        "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
        "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil),
    }[kind]
    model = model_class(config_class(text_config=text, vision_config=vision, projection_dim=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor_class(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def bert_like_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words with the ids that Grounding DINO has written into its code: 101, 102, 1012 and 1029."""
    vocab = {f"[unused{k}]": k for k in range(1100)}
    fixed = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
    fixed |= {word: 200 + k for k, word in enumerate(WORDS)}
    vocab = {name: k for name, k in vocab.items() if k not in fixed.values()} | fixed
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.normalizer = normalizers.Lowercase()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def save_tiny_grounding_dino(folder: Path, *, max_text_len: int = 256, seed: int = 0) -> Any:
    """Write a tiny Grounding DINO with a Swin of 4 stages and a BERT of 2 layers, weights random; in eval mode."""
    torch.manual_seed(seed)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            image_size=64,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=1100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        ),
        d_model=32,
        num_queries=12,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_text_len=max_text_len,
    )
    model = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    bert_like_tokenizer().save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 106}).save_pretrained(folder)
    return model


def save_tiny_classifier(folder: Path, names: list[str], kind: str = "resnet", *, seed: int = 0) -> Any:
    """Write a tiny ResNet (or ConvNeXt, whose head is another) that tells these classes apart; in eval mode."""
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
    if kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels)
        model = ResNetForImageClassification(config).eval()
    else:
        config = ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], **labels)
        model = ConvNextForImageClassification(config).eval()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model
