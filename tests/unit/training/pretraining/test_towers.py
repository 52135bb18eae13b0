"""Encoders that start from SigLIP and CLIP checkpoints, held against transformers' own models of the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPImageProcessorPil, CLIPModel, SiglipModel

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.readouts import ClocEncoder, build_readouts
from cloc_mllm.models.modeling_cloc import ClocModel, ClocVisionModel
from cloc_mllm.models.position_embeddings import resize_positions
from cloc_mllm.models.processing_cloc import ClocProcessor
from cloc_mllm.training.presets.config import PretrainConfig, load_config
from cloc_mllm.training.presets.parts import apply_parts
from cloc_mllm.training.pretraining.encoder import build_encoder, load_encoder, planned_config
from cloc_mllm.training.running.launch import World
from cloc_mllm.training.tuning.phrases import PhraseEmbedder
from tests.builders import noise_image, save_tiny_siglip, tiny_cloc_config, tiny_tokenizer
from tests.builders_mllm import tiny_mllm
from tests.builders_training import CONFIGS

ALONE = World(0, 0, 1, 1, True)
SIGMOID = ("objective.contrast=sigmoid", "model.logit_bias_init=-10")
TEXTS = ["A red square", "two green circles left of a blue star", "x"]


def configured(tmp_path: Path, *overrides: str) -> PretrainConfig:
    preset = tmp_path / "preset.yaml"
    preset.write_text("stage: pretrain\nrun: {steps: 1}\ndata: {train: none}\n")
    config = load_config(preset, overrides)
    assert isinstance(config, PretrainConfig)
    return config


@pytest.fixture
def siglip(tmp_path: Path) -> SiglipModel:
    return save_tiny_siglip(tmp_path / "siglip")


def started(tmp_path: Path, *overrides: str) -> tuple[ClocModel, ClocProcessor]:
    return build_encoder(configured(tmp_path, f"model.init=siglip:{tmp_path / 'siglip'}", *overrides), ALONE)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_images_and_texts_are_embedded_as_siglip_does(side: str, tmp_path: Path, siglip: SiglipModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side  # Gemma's, which SigLIP2 has, may come with either
    tokenizer.save_pretrained(tmp_path / "siglip")
    model, processor = started(tmp_path, *SIGMOID)
    model.eval()
    inputs = processor(images=[noise_image(seed=k) for k in range(2)], text=TEXTS)
    padded = tiny_tokenizer()(
        [text.lower() for text in TEXTS], padding="max_length", max_length=24, return_tensors="pt"
    )
    assert torch.equal(inputs["input_ids"], padded["input_ids"]), "texts are padded to the full length"
    theirs = siglip(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"])
    mine = model(**{key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")})
    torch.testing.assert_close(mine.image_embeds, theirs.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(mine.text_embeds, theirs.text_embeds, atol=1e-6, rtol=0)
    logits = mine.logit_scale * mine.text_embeds @ mine.image_embeds.T + mine.logit_bias
    torch.testing.assert_close(logits, theirs.logits_per_text, atol=1e-3, rtol=0)
    alone = model.get_text_features(**processor.tokenize(TEXTS[2:])).pooler_output
    torch.testing.assert_close(
        torch.nn.functional.normalize(alone), mine.text_embeds[2:], atol=1e-6, rtol=0, msg="depends on its neighbours"
    )


def test_a_trimmed_text_would_be_another_one(tmp_path: Path, siglip: SiglipModel) -> None:
    """Why the processor pads: the test above could not fail if SigLIP did not care."""
    ids = tiny_tokenizer()(TEXTS[:1], return_tensors="pt")["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 24 - ids.shape[1]), value=0)
    with torch.no_grad():
        short, long = (siglip.text_model(input_ids=x).pooler_output for x in (ids, padded))
    assert (short - long).abs().max() > 1e-2


def test_what_comes_from_the_checkpoint_and_what_is_new(tmp_path: Path, siglip: SiglipModel) -> None:
    model, processor = started(tmp_path, *SIGMOID, "model.logit_scale_init=10")
    assert float(model.logit_scale.detach()) == pytest.approx(4.77)
    assert float(model.logit_bias.detach()) == pytest.approx(-12.9)
    assert float(model.region_logit_scale.detach().exp()) == pytest.approx(10)
    assert float(model.region_logit_bias.detach()) == -10
    assert model.config.logit_scale_max > 4.77, "a learnt temperature must not be cut down at the first step"
    assert not [name for name, _ in model.named_parameters() if "_projection" in name.split(".")[0]]
    assert processor.image_processor.image_mean == processor.image_processor.image_std == [0.5] * 3
    assert (processor.image_processor.size, processor.max_length) == (32, 24)
    assert not model.prompter.config.has_class_token
    apply_parts(model, configured(tmp_path).parts, configured(tmp_path).optim)
    with pytest.raises(ClocError, match=r"multiply cosines by 117\.9, more than model.logit_scale_max"):
        started(tmp_path, *SIGMOID, "model.logit_scale_max=100")


def test_frozen_towers_run_without_a_graph(tmp_path: Path, siglip: SiglipModel) -> None:
    model, processor = started(tmp_path, *SIGMOID)
    shipped = load_config(CONFIGS / "prompter_only.yaml")
    assert isinstance(shipped, PretrainConfig)
    apply_parts(model, shipped.parts, shipped.optim)
    inputs = dict(processor(images=[noise_image()], text=["a ring"], input_boxes=[[[2, 3, 20, 21]]]))
    texts = {f"region_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
    output = model.train()(**inputs, **texts)
    for name in ("image_embeds", "text_embeds", "region_text_embeds", "logit_scale", "logit_bias"):
        assert getattr(output, name).grad_fn is None, f"{name} carries a graph"
    for name in ("region_embeds", "pred_boxes", "region_logit_scale", "region_logit_bias"):
        assert getattr(output, name).grad_fn is not None, f"{name} cannot be learnt"


def test_with_the_softmax_loss_there_is_no_bias(tmp_path: Path, siglip: SiglipModel) -> None:
    model, _ = started(tmp_path)
    assert model.logit_bias is None
    assert float(model.logit_scale.detach()) == pytest.approx(4.77)


@torch.no_grad()
def test_another_frame_is_what_transformers_interpolates_to(tmp_path: Path, siglip: SiglipModel) -> None:
    model, processor = started(tmp_path, "model.image_size=48")
    pixels = processor(images=[noise_image()])["pixel_values"]
    assert pixels.shape[-1] == 48
    expected = siglip.vision_model(pixels, interpolate_pos_encoding=True)
    mine = model.eval().get_image_features(pixels)
    torch.testing.assert_close(mine.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
    with pytest.raises(ClocError, match="not a multiple of this tower's patches of 8"):
        started(tmp_path, "model.image_size=50")


@pytest.mark.parametrize("kind", ["clip", "cloc"])
@torch.no_grad()
def test_a_clip_tower_takes_another_frame_too(kind: str, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    original = CLIPModel.from_pretrained(tmp_path / "clip")
    if kind == "cloc":
        model, processor = build_encoder(configured(tmp_path, f"model.init=clip:{tmp_path / 'clip'}"), ALONE)
        for part in (model, processor):
            part.save_pretrained(tmp_path / "cloc")
    model, processor = build_encoder(
        configured(tmp_path, f"model.init={kind}:{tmp_path / kind}", "model.image_size=64"), ALONE
    )
    pixels = processor(images=[noise_image()])["pixel_values"]
    assert pixels.shape[-1] == 64
    expected = original.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    mine = model.eval().get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_positions_that_are_no_square_are_refused() -> None:
    weight = torch.randn(10, 4)
    assert torch.equal(resize_positions(weight, 10)[:1], weight[:1])
    for count in (0, 12, 16):
        with pytest.raises(ValueError, match="not square grids"):
            resize_positions(weight, count)


def save_clip(folder: Path, *, mean: list[float] | None = None) -> None:
    tiny = tiny_cloc_config()
    CLIPModel(
        CLIPConfig(
            vision_config=tiny.vision_config.to_dict(), text_config=tiny.text_config.to_dict(), projection_dim=24
        )
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if mean is not None:
        CLIPImageProcessorPil(image_mean=mean).save_pretrained(folder)


def test_a_clip_brings_its_own_image_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_clip(tmp_path / "own", mean=[0.1, 0.2, 0.3])
    save_clip(tmp_path / "none")
    own, none = (
        build_encoder(configured(tmp_path, f"model.init=clip:{tmp_path / name}"), ALONE)[1].image_processor
        for name in ("own", "none")
    )
    assert own.image_mean == [0.1, 0.2, 0.3]
    assert none.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    said = capsys.readouterr().out
    assert str(tmp_path / "none") in said
    assert str(tmp_path / "own") not in said


def test_what_is_explained_is_what_is_built(tmp_path: Path, siglip: SiglipModel) -> None:
    save_clip(tmp_path / "clip")
    for kind, size in (("siglip", 48), ("clip", 64)):
        config = configured(tmp_path, f"model.init={kind}:{tmp_path / kind}", f"model.image_size={size}")
        with torch.device("meta"):
            planned = ClocModel(planned_config(config)).state_dict()
        built = build_encoder(config, ALONE)[0].state_dict()
        assert {name: value.shape for name, value in planned.items()} == {
            name: value.shape for name, value in built.items()
        }


def test_checkpoints_of_other_kinds_are_refused_by_name(tmp_path: Path, siglip: SiglipModel) -> None:
    folder = tmp_path / "siglip"
    with pytest.raises(ClocError, match="cannot be loaded as a CLIP model: its type is 'siglip'"):
        build_encoder(configured(tmp_path, f"model.init=clip:{folder}"), ALONE)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "model_type": "siglip2"}))
    with pytest.raises(ClocError, match="NaFlex SigLIP2"):
        started(tmp_path)
    described["vision_config"]["vision_use_head"] = False
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ClocError, match="no pooling head"):
        started(tmp_path)


@torch.no_grad()
def test_everything_downstream_takes_a_siglip_tower(tmp_path: Path, siglip: SiglipModel) -> None:
    model, processor = started(tmp_path, *SIGMOID)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "export")
    again, processor = load_encoder(tmp_path / "export")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert processor.fixed_length
    assert isinstance(AutoModel.from_pretrained(tmp_path / "export"), ClocModel)
    assert AutoProcessor.from_pretrained(tmp_path / "export").fixed_length

    picture = noise_image()
    again.eval()
    boxes, scores = again.ground(picture, ["a red square"], processor)
    assert len(boxes[0]) == 4
    assert -1 <= scores[0] <= 1
    inputs = processor(images=[picture], text=["a"], input_boxes=[[[2, 3, 20, 21]]])
    vision = ClocVisionModel.from_cloc(again).eval()
    output = vision(inputs["pixel_values"], inputs["input_boxes"], inputs["box_image_index"])
    whole = again(**{k: inputs[k] for k in ("pixel_values", "input_ids", "input_boxes", "box_image_index")})
    torch.testing.assert_close(output.image_embeds, whole.image_embeds)
    torch.testing.assert_close(output.region_embeds, whole.region_embeds)
    phrases = PhraseEmbedder(tmp_path / "export")(TEXTS)
    expected = again.get_text_features(**processor.tokenize(TEXTS)).pooler_output
    torch.testing.assert_close(phrases, torch.nn.functional.normalize(expected, dim=-1))


@torch.no_grad()
def test_read_outs_of_a_siglip_tower(tmp_path: Path, siglip: SiglipModel) -> None:
    model, processor = started(tmp_path, *SIGMOID)
    encoder = ClocEncoder(model, processor, "siglip")
    flat = noise_image().resize((1, 1)).resize((32, 32))
    # Without positions all patches of a flat picture are alike, and each is pooled to what the whole is pooled to.
    model.vision_model.embeddings.position_embedding.weight.zero_()
    images = encoder.encode_images([flat, noise_image()], ["flat", "noise"])
    for patch in images.patches[0]:
        torch.testing.assert_close(torch.nn.functional.normalize(patch, dim=0), images.embeds[0], atol=1e-5, rtol=0)
    for readout in build_readouts(encoder, ["prompter", "roi", "crop"]):
        assert readout.embed(images, [[[1, 1, 20, 20]], [[0, 0, 40, 30]]]).shape == (2, 32)


@torch.no_grad()
def test_a_language_model_sees_every_patch_of_a_siglip_tower(tmp_path: Path, siglip: SiglipModel) -> None:
    model, _ = started(tmp_path, *SIGMOID)
    mllm, processor = tiny_mllm(encoder=model.eval(), vision_feature_select_strategy=None)
    assert mllm.config.vision_feature_select_strategy == "full"
    assert processor.num_image_tokens == 16
    batch = processor.encode([[{"role": "user", "content": [{"type": "image", "image": noise_image()}]}]])
    features = mllm.model.get_image_features(batch["pixel_values"])
    tower = siglip.vision_model(batch["pixel_values"])
    torch.testing.assert_close(features.last_hidden_state, tower.last_hidden_state, atol=1e-5, rtol=0)
    assert mllm(**batch).logits.isfinite().all()
