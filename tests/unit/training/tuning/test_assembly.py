"""One call, one command: any tower and any language model become an MLLM that loads again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModel, SiglipVisionModel

from cloc_mllm.apps import cli
from cloc_mllm.errors import ClocError
from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.training.presets.config import load_config
from cloc_mllm.training.pretraining.encoder import load_any_encoder
from cloc_mllm.training.running.launch import World
from cloc_mllm.training.tuning.assembly import assemble_mllm, load_tower
from cloc_mllm.training.tuning.mllm import build_mllm, mllm_skeleton
from tests.builders import noise_image, save_tiny_siglip, tiny_cloc, tiny_cloc_config, tiny_tokenizer
from tests.builders_mllm import image, region, text, tiny_llm, tiny_llm_tokenizer, user

TOWERS = ("cloc", "clip", "siglip", "clip_vision", "siglip_vision")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every kind of tower, and of a language model."""
    folder = tmp_path_factory.mktemp("parts")
    encoder, processor = tiny_cloc()
    encoder.save_pretrained(folder / "cloc")
    processor.save_pretrained(folder / "cloc")
    own = tiny_cloc_config(kind=None)
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(vision_config=own.vision_config.to_dict(), text_config=own.text_config.to_dict()))
    clip.save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "clip")
    statistics = CLIPImageProcessorPil(image_mean=[0.3, 0.4, 0.5], image_std=[0.2, 0.2, 0.2])
    statistics.save_pretrained(folder / "clip")
    siglip = save_tiny_siglip(folder / "siglip")
    for name, whole, kind in (("clip", clip, CLIPVisionModel), ("siglip", siglip, SiglipVisionModel)):
        alone = kind(whole.config.vision_config)
        alone.load_state_dict(whole.vision_model.state_dict())
        alone.save_pretrained(folder / f"{name}_vision")
    statistics.save_pretrained(folder / "clip_vision")
    tiny_llm("qwen2").save_pretrained(folder / "llm")
    tiny_llm_tokenizer().save_pretrained(folder / "llm")
    return folder


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_any_tower(tower: str, parts: Path, tmp_path: Path) -> None:
    """The tower sees as transformers' own of the same weights; the MLLM answers, after saving and loading too."""
    model, processor = assemble_mllm(parts / tower, parts / "llm")
    pixels = processor.image_processor(noise_image())["pixel_values"]
    stock = AutoModel.from_pretrained(parts / tower).eval()
    expected = getattr(stock, "vision_model", stock)(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, expected, rtol=0, atol=1e-6)
    if tower.startswith("clip"):
        assert processor.image_processor.image_mean == [0.3, 0.4, 0.5]
    conversation = [user(image(1), text("what is "), region(2, 2, 20, 20))]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answers = [one.chat([conversation], max_new_tokens=4)[0] for one in (Predictor(model, processor),)]
    answers += [Predictor.from_pretrained(tmp_path).chat([conversation], max_new_tokens=4)[0]]
    assert answers[0] == answers[1]


def test_the_prompter_is_the_encoders_where_it_has_one(parts: Path) -> None:
    encoder, _ = load_tower(parts / "cloc")
    model, _ = assemble_mllm(parts / "cloc", parts / "llm")
    weights = encoder.prompter.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.model.prompter.state_dict().items())


def test_the_command(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mllm"
    arguments = ["--tower", str(parts / "siglip"), "--llm", str(parts / "llm"), "--out", str(out)]
    assert cli.main(["assemble", *arguments, "--grounding", "text", "--region-encoder", "none"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    processor = Predictor.from_pretrained(out).processor
    assert (processor.grounding, processor.region_format) == ("text", "coords")
    assert cli.main(["assemble", *arguments]) == 2
    assert "the folder is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("tower", TOWERS)
def test_a_preset_may_name_any_tower(tower: str, parts: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        f"stage: align\nrun: {{steps: 1, output: {tmp_path / 'run'}}}\ndata: {{train: none}}\n"
        f"model: {{encoder: {parts / tower}, llm: {parts / 'llm'}, chat_style: chatml}}\n"
    )
    config = load_config(preset, [], stage="align")
    model, _ = build_mllm(config, World(0, 0, 1, 1, True))
    with torch.device("meta"):
        planned = mllm_skeleton(config)
    shapes = {name: weight.shape for name, weight in model.state_dict().items() if "embed_tokens" not in name}
    planned_shapes = {name: w.shape for name, w in planned.state_dict().items() if "embed_tokens" not in name}
    assert shapes.keys() == planned_shapes.keys()
    assert {k for k in shapes if shapes[k] != planned_shapes[k]} <= {"lm_head.weight"}


def test_what_does_not_go_together_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="there is no model here"):
        assemble_mllm(tmp_path / "nothing", parts / "llm")
    with pytest.raises(ClocError, match="holds a model of type 'qwen2', not 'cloc'"):
        assemble_mllm(parts / "llm", parts / "llm")
    with pytest.raises(ClocError, match="holds no tokenizer"):
        assemble_mllm(parts / "clip", parts / "clip_vision")
    with pytest.raises(ClocError, match="chat style 'gemma' is not this model's"):
        assemble_mllm(parts / "clip", parts / "llm", chat_style="gemma")
    with pytest.raises(ClocError, match="is an image tower alone, which embeds no phrases"):
        load_any_encoder(parts / "clip_vision")
    llm = tiny_llm("llama")
    del llm.model.layers[1]
    llm.save_pretrained(tmp_path)
    tiny_llm_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ClocError, match=r"lacks weights: model\.layers\.1\."):
        assemble_mllm(parts / "clip", tmp_path)
