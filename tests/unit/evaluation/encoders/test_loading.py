"""Any encoder by its name: what its config.json says decides, its own preprocessing is kept, the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipModel,
    SiglipVisionModel,
)

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.loading import load_encoder
from cloc_mllm.evaluation.encoders.readouts import ClocEncoder, build_readouts
from tests.builders import noise_image, save_tiny_siglip, tiny_cloc, tiny_cloc_config, tiny_tokenizer

PICTURES = [noise_image(60, 30, 0), noise_image(30, 50, 1)]
BOXES = [[[0, 0, 20, 20], [30, 5, 60, 30]], [[1, 1, 20, 40]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose folders' names say nothing, or something wrong."""
    root = tmp_path_factory.mktemp("models")
    paths = {"cloc": root / "clip", "clip": root / "siglip-b16", "siglip": root / "q1", "vision": root / "q2"}
    model, processor = tiny_cloc()
    model.save_pretrained(paths["cloc"])
    processor.save_pretrained(paths["cloc"])
    config = tiny_cloc_config(tiny_tokenizer())
    torch.manual_seed(0)
    stock = CLIPModel(
        CLIPConfig(
            vision_config=config.vision_config.to_dict(), text_config=config.text_config.to_dict(), projection_dim=24
        )
    )
    stock.save_pretrained(paths["clip"])
    tiny_tokenizer().save_pretrained(paths["clip"])
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, resample=2).save_pretrained(paths["clip"])
    siglip = save_tiny_siglip(paths["siglip"])
    SiglipVisionModel(siglip.config.vision_config).save_pretrained(paths["vision"])
    return paths


def test_the_configuration_decides_and_not_the_folders_name(folders: dict[str, Path]) -> None:
    found = {name: load_encoder(str(folders[name]), "cpu") for name in ("cloc", "clip", "siglip")}
    assert found["cloc"].methods == ["prompter", "roi", "crop", "value"]
    assert found["clip"].methods == ["roi", "crop", "value"]
    assert found["siglip"].methods == ["roi", "crop"]
    assert found["siglip"].bias == pytest.approx(-12.9)
    assert found["siglip"].scale == pytest.approx(np.exp(4.77), rel=1e-4)
    assert found["clip"].bias is None


def test_clip_embeds_whole_images_and_texts_as_transformers_own_model_does(folders: dict[str, Path]) -> None:
    path = str(folders["clip"])
    encoder, stock = load_encoder(path, "cpu"), CLIPModel.from_pretrained(path).eval()
    pixels = AutoImageProcessor.from_pretrained(path)(images=PICTURES, return_tensors="pt")["pixel_values"]
    ids = tiny_tokenizer()(["a red ring"], return_tensors="pt")
    with torch.no_grad():
        images = functional.normalize(stock.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        texts = functional.normalize(stock.get_text_features(**ids).pooler_output, dim=-1)
    assert torch.allclose(encoder.embed_images(PICTURES, ["a", "b"]), images, atol=1e-5)
    assert torch.allclose(encoder.embed_texts(["a red ring"]), texts, atol=1e-5)
    assert "cuts out the centre" in encoder.preprocessing
    # Regions must survive, so for them the picture is placed whole in the frame, by the model's interpolation.
    assert isinstance(encoder, ClocEncoder)
    assert encoder.processor.image_processor.resample == Image.Resampling.BILINEAR
    framed = encoder.embed_images(PICTURES, ["a", "b"], framed=True)
    assert not torch.allclose(framed, images, atol=1e-3)
    assert torch.equal(framed, encoder.encode_images(PICTURES, ["a", "b"]).embeds)


def test_siglip_is_read_through_the_values_of_its_pooling_head(folders: dict[str, Path]) -> None:
    path = str(folders["siglip"])
    encoder, stock = load_encoder(path, "cpu"), SiglipModel.from_pretrained(path).eval()
    padded = tiny_tokenizer()(
        ["a red ring"], padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        texts = functional.normalize(stock.get_text_features(input_ids=padded).pooler_output, dim=-1)
    assert torch.allclose(encoder.embed_texts(["A red ring"]), texts, atol=1e-5), "lower case, padded to full length"
    images = encoder.encode_images(PICTURES, ["a", "b"])
    with torch.no_grad():
        alone = stock.vision_model.head(images.tokens[1, 5][None, None])
    assert images.patches is not None
    assert torch.allclose(images.patches[1, 5], alone.flatten(), atol=1e-5)
    with pytest.raises(ClocError, match="already sends each alone through the values of that pooling head"):
        build_readouts(encoder, ["value"])
    with pytest.raises(ClocError, match="has no Prompter"):
        build_readouts(encoder, ["prompter"])


def test_what_is_no_encoder_of_images_and_texts_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    def named(model_type: str, **more: object) -> str:
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, **more}))
        return str(folder)

    with pytest.raises(ClocError, match="an image tower alone"):
        load_encoder(str(folders["vision"]))
    with pytest.raises(ClocError, match="holds a 'bert' model"):
        load_encoder(named("bert"))
    with pytest.raises(ClocError, match="NaFlex SigLIP2"):
        load_encoder(named("siglip2"))
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    with pytest.raises(ClocError, match=r"Did you mean .*export"):
        load_encoder(str(tmp_path / "run"))


# --- open_clip ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny open_clip model, registered and saved, by the name that --model takes."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    folder = tmp_path_factory.mktemp("open_clip")
    plan = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-vit.json").write_text(json.dumps(plan))
    open_clip.add_model_config(folder / "tiny-vit.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-vit").state_dict(), folder / "weights.pt")
    return f"open_clip:tiny-vit/{folder / 'weights.pt'}"


def test_open_clip_models_embed_as_they_do_by_themselves(open_clip_name: str) -> None:
    import open_clip

    encoder = load_encoder(open_clip_name, "cpu")
    path = open_clip_name.partition("/")[2]
    model, _, transform = open_clip.create_model_and_transforms("tiny-vit", pretrained=path)
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([transform(one) for one in PICTURES]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer("tiny-vit")(["A ring"]), normalize=True)
    assert torch.allclose(encoder.embed_images(PICTURES, ["a", "b"]), images, atol=1e-5)
    assert torch.allclose(encoder.embed_texts(["A ring"]), texts, atol=1e-5)
    assert encoder.scale == pytest.approx(1 / 0.07, rel=1e-3)


def test_open_clip_towers_are_read_patch_by_patch(open_clip_name: str) -> None:
    encoder = load_encoder(open_clip_name, "cpu")
    images = encoder.encode_images(PICTURES, ["a", "b"])
    visual = encoder.model.visual  # type: ignore[attr-defined]
    layer = visual.transformer.resblocks[-1]
    with torch.no_grad():
        hidden = visual._embeds(encoder._framed(PICTURES))  # type: ignore[attr-defined]
        for block in visual.transformer.resblocks[:-1]:
            hidden = block(hidden)
        normed = layer.ln_1(hidden)
        # The class token's attention, were the sixth patch all there is to attend to.
        alone = layer.attn(normed[:, :1], normed[:, 6:7], normed[:, 6:7], need_weights=False)[0]
        value = (visual.ln_post(layer.ls_1(alone)) @ visual.proj)[:, 0]
        token = (visual.ln_post(layer(hidden)[:, 6]) @ visual.proj).float()
    assert images.values is not None
    assert images.patches is not None
    assert torch.allclose(images.values[:, 5], value, atol=1e-5)
    assert torch.allclose(images.patches[:, 5], token, atol=1e-5)
    for readout in build_readouts(encoder):
        assert readout.embed(images, BOXES).norm(dim=-1) == pytest.approx(torch.ones(3), abs=1e-4)
    with pytest.raises(ClocError, match="have no Prompter"):
        build_readouts(encoder, ["prompter"])


def test_open_clip_names_with_faults_are_refused(open_clip_name: str) -> None:
    with pytest.raises(ClocError, match="names no weights"):
        load_encoder("open_clip:tiny-vit")
    with pytest.raises(ClocError, match="cannot load 'tiny-vit/nowhere'"):
        load_encoder("open_clip:tiny-vit/nowhere")


def test_without_open_clip_its_models_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ClocError, match="pip install open_clip_torch"):
        load_encoder("open_clip:ViT-B-16/openai")
