"""A detector without a download: a tiny OWLv2 with random weights, for checks and benchmarks of labelling."""

from __future__ import annotations

from pathlib import Path

WORDS = "a an above below blue circle cross gray green left of orange purple red right ring solid square star striped"


def save_detector(folder: Path) -> None:
    """Write an OWLv2 of 32 px with random weights, and a tokenizer of some words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil, PreTrainedTokenizerFast

    vocab = {token: k for k, token in enumerate(["<pad>", "<bos>", "<unk>", *WORDS.split(), "<eos>"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(name, vocab[name]) for name in ("<bos>", "<eos>")]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(vocab), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": vocab["<eos>"]}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config={**small, **ids}, vision_config=vision, projection_dim=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
