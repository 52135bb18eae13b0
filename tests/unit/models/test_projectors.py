"""Projectors: what they compute, how many tokens they leave, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaProcessor

from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig
from cloc_mllm.models.image_tokens import ImageTokens
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from cloc_mllm.models.projectors import PixelShuffleProjector
from tests.builders_mllm import grounding_turn, image, model_inputs, region, text, tiny_mllm, user

TURNS = [user(image(1, 90, 33), text("what is "), region(3, 4, 60, 25), text("?")), grounding_turn()]
KINDS = [("mlp2x_gelu", {}), ("linear", {}), ("pixel_shuffle", {}), ("pixel_shuffle", {"pixel_shuffle_factor": 4})]


@pytest.mark.parametrize("mode", ["pad", "resize", "anyres"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_model_and_processor_count_alike_and_come_back_from_disk(
    kind: str, options: dict[str, Any], mode: str, tmp_path: Any
) -> None:
    model, processor = tiny_mllm(projector_type=kind, image_mode=mode, **options)
    side = 4 // model.model.multi_modal_projector.factor if kind == "pixel_shuffle" else 4
    assert processor.num_image_tokens == model.config.image_seq_length == side**2
    assert processor.image_layout == ImageTokens.of(model.config)
    batch = model_inputs(processor.encode(TURNS, return_labels=True))
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == processor.image_tokens(90, 33)
    with torch.no_grad():
        before = model(**batch)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = ClocMllmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same = ClocMllmProcessor.from_pretrained(tmp_path)
    assert same.image_layout == processor.image_layout
    repeated = model_inputs(same.encode(TURNS, return_labels=True))
    with torch.no_grad():
        after = again.eval()(**repeated)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.pred_boxes, before.pred_boxes)
    Predictor(again, same)


def test_pixel_shuffle_reads_each_square_of_patches_row_by_row() -> None:
    model, _ = tiny_mllm(projector_type="pixel_shuffle")
    projector: Any = model.model.multi_modal_projector
    assert isinstance(projector, PixelShuffleProjector)
    features = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = projector(features)
        for token in range(4):
            row, column = divmod(token, 2)
            patches = [
                features[:, (2 * row + down) * 4 + 2 * column + right] for down in range(2) for right in range(2)
            ]
            expected = projector.linear_2(projector.act(projector.linear_1(torch.cat(patches, dim=-1))))
            torch.testing.assert_close(ours[:, token], expected)
    # It is space to depth, in another order of the channels.
    unshuffled = torch.pixel_unshuffle(features.transpose(1, 2).reshape(2, 48, 4, 4), 2)
    channels = unshuffled.reshape(2, 48, 4, 4).permute(0, 3, 2, 1).flatten(2)
    with torch.no_grad():
        torch.testing.assert_close(projector.linear_2(projector.act(projector.linear_1(channels))), ours)


def test_a_linear_projector_is_one_layer_over_all_selected_layers() -> None:
    model, processor = tiny_mllm(projector_type="linear", vision_feature_layer=[-2, -1])
    batch = processor.encode([user(image(), text("?"))])
    with torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output[0]
        hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        layer = model.model.multi_modal_projector.linear
        torch.testing.assert_close(features, layer(torch.cat([hidden[-2], hidden[-1]], dim=-1)[0, 1:]))
    assert layer.weight.shape == (32, 96)


def test_keys_of_the_default_projector_are_llavas() -> None:
    names = {name for name in tiny_mllm()[0].state_dict() if "projector" in name and "region" not in name}
    layers = ("linear_1", "linear_2")
    assert names == {f"model.multi_modal_projector.{one}.{what}" for one in layers for what in ("weight", "bias")}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"projector_type": "magic"}, "unknown projector_type 'magic'"),
        ({"projector_type": "pixel_shuffle", "pixel_shuffle_factor": 3}, "3 does not divide the tower's grid of 4 x 4"),
        (
            {"projector_type": "pixel_shuffle", "vision_feature_select_strategy": "full"},
            "must drop the class token and nothing else",
        ),
    ],
)
def test_projectors_that_do_not_fit_are_refused_by_name(options: dict[str, Any], problem: str) -> None:
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    with pytest.raises(Exception, match=problem):
        ClocMllmConfig(vision_config=vision, **options)
    with pytest.raises(Exception, match=problem):
        tiny_mllm(**options)


@pytest.mark.parametrize("options", [{"projector_type": "pixel_shuffle"}, {"image_grid_pinpoints": [[32, 64]]}])
def test_a_tower_without_class_token_gives_all_of_its_tokens(options: dict[str, Any]) -> None:
    vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}
    layout = ImageTokens.of(ClocMllmConfig(vision_config=vision, vision_feature_select_strategy="full", **options))
    assert (layout.side, layout.extra) == (2 if "projector_type" in options else 4, 0)
    with pytest.raises(Exception, match="and nothing else"):
        ClocMllmConfig(vision_config=vision, vision_feature_select_strategy="default", **options)


def test_a_processor_of_another_model_is_refused() -> None:
    from cloc_mllm.errors import ClocError

    plain, tiled = tiny_mllm(image_mode="pad"), tiny_mllm(image_mode="anyres")
    with pytest.raises(ClocError, match="resolutions of tiles is"):
        Predictor(plain[0], tiled[1])
    with pytest.raises(ClocError, match="tokens an image is 16 for one, 4 for the other"):
        Predictor(plain[0], tiny_mllm(projector_type="pixel_shuffle")[1])


@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_servers_are_told_the_counts_and_the_stock_way_in_gives_the_same(mode: str) -> None:
    model, processor = tiny_mllm(projector_type="pixel_shuffle", image_mode=mode)
    pictures = [image(1, 90, 33)["image"], image(2, 33, 90)["image"]]
    asked = processor._get_num_multimodal_tokens([(33, 90), (90, 33)])
    assert asked.num_image_tokens == [processor.image_tokens(90, 33), processor.image_tokens(33, 90)]
    stock = LlavaProcessor.__call__(processor, images=pictures, text=["a <image> and <image>"], return_tensors="pt")
    assert len(stock["pixel_values"]) == sum(asked.num_image_patches)
    assert int((stock["input_ids"] == processor.image_token_id).sum()) == sum(asked.num_image_tokens)
    with torch.no_grad():
        assert model(**stock).logits.isfinite().all()
