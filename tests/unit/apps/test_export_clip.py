"""Exported towers and encoders are CLIP's own classes with equal features; what cannot be exported is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionModel

from cloc_mllm.apps.exporters import clip
from cloc_mllm.apps.exporters.clip import export_clip
from cloc_mllm.errors import ClocError
from cloc_mllm.models.modeling_cloc import ClocModel
from tests.builders import noise_image, save_tiny_siglip, tiny_cloc


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    model, processor = tiny_cloc()
    model.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_stock_tower_has_equal_features(encoder: Path, tmp_path: Path) -> None:
    model, processor = tiny_cloc()
    folder = export_clip(encoder, tmp_path / "tower").folder
    pixels = processor(images=[noise_image(32, 32)])["pixel_values"]
    tower = CLIPVisionModel.from_pretrained(folder).eval()
    with torch.no_grad():
        stock = tower(pixel_values=pixels).last_hidden_state
        ours = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(stock, ours, rtol=0, atol=0)


def test_stock_image_processor_gives_equal_pixels(encoder: Path, tmp_path: Path) -> None:
    _, processor = tiny_cloc()
    done = export_clip(encoder, tmp_path / "tower")
    stock = AutoImageProcessor.from_pretrained(done.folder)
    for image, most in ((noise_image(50, 50), 1e-5), (noise_image(50, 30), 1 / 255 / 0.26)):
        pixels = stock(images=image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels, processor(images=[image])["pixel_values"].numpy(), atol=most)
    assert "one of 255 grey levels" in done.notes[1]


TEXTS = ["A RED circle left of a blue square", "where is the small red ring", "yes " * 90]


@pytest.mark.parametrize("resize_mode", ["pad", "resize"])
def test_both_sides_as_a_stock_clip(resize_mode: str, tmp_path: Path) -> None:
    model, processor = tiny_cloc(resize_mode=resize_mode)
    with torch.no_grad():
        model.logit_scale.fill_(5.0)  # above the cap
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    done = export_clip(tmp_path / "m", tmp_path / "clip", "encoder")
    stock, info = CLIPModel.from_pretrained(done.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pictures = [noise_image(32, 32), noise_image(50, 50, seed=1)]
    theirs = CLIPProcessor.from_pretrained(done.folder)(
        text=TEXTS, images=pictures, return_tensors="pt", padding=True, truncation=True
    )
    ours = processor(images=pictures, text=TEXTS)
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    with torch.no_grad():
        found, wanted = stock.eval()(**theirs), model(**ours)
    torch.testing.assert_close(found.image_embeds, wanted.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.text_embeds, wanted.text_embeds, atol=1e-6, rtol=0)
    logits = wanted.logit_scale * wanted.image_embeds @ wanted.text_embeds.T
    torch.testing.assert_close(found.logits_per_image, logits, atol=1e-4, rtol=0)
    # A whole CLIP is a tower too, as OpenAI's folders are.
    assert isinstance(CLIPVisionModel.from_pretrained(done.folder), CLIPVisionModel)
    assert "the Prompter, the regions' temperature, the BoxHead" in done.notes[0]


def test_a_bias_is_left_out_and_said(tmp_path: Path) -> None:
    model, processor = tiny_cloc()
    model.add_logit_biases(-7.5)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    assert any("bias of -7.5" in note for note in export_clip(tmp_path / "m", tmp_path / "o", "encoder").notes)


def test_what_is_not_clip_is_refused(tmp_path: Path) -> None:
    siglip = ClocModel.from_siglip(save_tiny_siglip(tmp_path / "s"))
    _, processor = tiny_cloc()
    siglip.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    with pytest.raises(ClocError, match="its tower is a SiglipVisionModel"):
        export_clip(tmp_path / "m", tmp_path / "o", "encoder")
    model, _ = tiny_cloc()
    model.text_model = siglip.text_model
    with pytest.raises(ClocError, match="its text side is a SiglipTextModel, not a CLIPTextModel"):
        clip._refuse_what_is_not_clip(model, "encoder", "m")
    clip._refuse_what_is_not_clip(model, "tower", "m")
    model, _ = tiny_cloc()
    model.config.has_projections = False
    with pytest.raises(ClocError, match="no projections"):
        clip._refuse_what_is_not_clip(model, "encoder", "m")


def test_another_kind_of_checkpoint_is_refused(encoder: Path, tmp_path: Path) -> None:
    config = encoder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "cloc_mllm"}))
    with pytest.raises(ClocError, match=r"type 'cloc_mllm'.*takes an encoder"):
        export_clip(encoder, tmp_path / "tower")
    assert not (tmp_path / "tower").exists()


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "there is no checkpoint"), ("{", "cannot be read"), ("{}", "cannot be read")]
)
def test_a_folder_without_a_checkpoint_is_refused(content: str | None, problem: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    if content is not None:
        (model / "config.json").write_text(content)
    with pytest.raises(ClocError, match=problem):
        export_clip(model, tmp_path / "tower")


def test_nothing_is_written_over(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    with pytest.raises(ClocError, match="not empty"):
        export_clip(encoder, tmp_path / "full")
