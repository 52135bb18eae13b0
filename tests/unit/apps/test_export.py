"""The exported tower is CLIP's own class with the encoder's own features; what cannot be exported is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPVisionModel

from cloc_mllm.apps.export import export_clip
from cloc_mllm.errors import ClocError
from tests.builders import noise_image, tiny_cloc


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    model, processor = tiny_cloc()
    model.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_stock_tower_has_equal_features(encoder: Path, tmp_path: Path) -> None:
    model, processor = tiny_cloc()
    folder = export_clip(encoder, tmp_path / "tower")
    pixels = processor(images=[noise_image(32, 32)])["pixel_values"]
    tower = CLIPVisionModel.from_pretrained(folder).eval()
    with torch.no_grad():
        stock = tower(pixel_values=pixels).last_hidden_state
        ours = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(stock, ours, rtol=0, atol=0)


def test_stock_image_processor_gives_equal_pixels_of_a_square_image(encoder: Path, tmp_path: Path) -> None:
    _, processor = tiny_cloc()
    folder = export_clip(encoder, tmp_path / "tower")
    image = noise_image(50, 50)
    stock = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(stock, processor(images=[image])["pixel_values"].numpy(), atol=1e-5)


def test_the_card_says_what_to_do_about_padding(encoder: Path, tmp_path: Path) -> None:
    assert "pad images that are not square" in (export_clip(encoder, tmp_path / "t") / "README.md").read_text()


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
