"""Encoders to start from: from scratch, from a CLIP, from a checkpoint; whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import PretrainConfig, load_config
from cloc_mllm.training.pretraining.encoder import build_encoder, load_encoder
from cloc_mllm.training.running.launch import World
from tests.builders import tiny_cloc, tiny_cloc_config, tiny_tokenizer
from tests.builders_training import CONFIGS, TINY_ENCODER, write_regions

ALONE = World(0, 0, 1, 1, True)


def configured(tmp_path: Path, *overrides: str) -> PretrainConfig:
    where = (f"run.output={tmp_path / 'run'}", f"data.train={tmp_path / 'data'}")
    config = load_config(CONFIGS / "pretrain_quick.yaml", [*TINY_ENCODER, *where, *overrides])
    assert isinstance(config, PretrainConfig)
    return config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, processor = tiny_cloc(seed=5)
    model.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_from_scratch_is_the_same_for_the_same_seed_only(tmp_path: Path) -> None:
    write_regions(tmp_path / "data", 12)
    first, again, other = (
        build_encoder(configured(tmp_path, f"run.seed={seed}"), ALONE)[0].state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_temperatures_start_and_end_where_the_preset_says(tmp_path: Path) -> None:
    write_regions(tmp_path / "data", 12)
    model, _ = build_encoder(configured(tmp_path, "model.logit_scale_init=20", "model.logit_scale_max=50"), ALONE)
    assert model.logit_scale.shape == (1,), "DeepSpeed cannot broadcast a parameter without dimensions"
    assert float(model.logit_scale.detach().exp()) == pytest.approx(20)
    assert model.config.logit_scale_max == pytest.approx(torch.tensor(50.0).log().item())


def test_from_a_clip_keeps_its_weights_and_adds_a_prompter(tmp_path: Path) -> None:
    tokenizer, tiny = tiny_tokenizer(), tiny_cloc_config()
    clip = CLIPModel(
        CLIPConfig(
            vision_config=tiny.vision_config.to_dict(), text_config=tiny.text_config.to_dict(), projection_dim=24
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    model, processor = build_encoder(configured(tmp_path, f"model.init=clip:{tmp_path / 'clip'}"), ALONE)
    assert model.prompter is not None
    assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
    assert processor.image_processor.size == 32
    with pytest.raises(ClocError, match="cannot be loaded as a CLIP model"):
        build_encoder(configured(tmp_path, f"model.init=clip:{tmp_path / 'nowhere'}"), ALONE)


def test_from_a_checkpoint_keeps_every_weight(tmp_path: Path, saved: Path) -> None:
    model, _ = build_encoder(configured(tmp_path, f"model.init=cloc:{saved}"), ALONE)
    expected = tiny_cloc(seed=5)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.training
    with pytest.raises(ClocError, match="has a Prompter, and the preset asks for the opposite"):
        build_encoder(configured(tmp_path, f"model.init=cloc:{saved}", "model.prompter=null"), ALONE)


def test_a_checkpoint_that_lacks_a_weight_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    weights = load_file(file)
    removed = weights.pop("prompter.projection.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ClocError, match=r"lacks weights: prompter\.projection\.weight"):
        load_encoder(saved)
    save_file({**weights, "prompter.projection.weight": removed, "other.weight": removed.clone()}, file)
    with pytest.raises(ClocError, match=r"holds weights of another model: other\.weight|cannot be loaded"):
        load_encoder(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a readable model configuration"), ('{"model_type": "llama"}', "holds a model of type 'llama'")],
)
def test_a_folder_of_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="no model here"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ClocError, match=message):
        load_encoder(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    write_regions(tmp_path / "data", 12)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ClocError, match="has no eos_token"):
        build_encoder(configured(tmp_path, f"tokenizer.path={tmp_path / 'tokenizer'}"), ALONE)
    with pytest.raises(ClocError, match="holds no tokenizer"):
        build_encoder(configured(tmp_path, f"tokenizer.path={tmp_path / 'data'}"), ALONE)
