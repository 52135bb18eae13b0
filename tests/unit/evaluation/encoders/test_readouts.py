"""Read-outs and localizers of a real tiny encoder, against plain twins and planted answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.localizers import (
    BoxHeadLocalizer,
    GridLocalizer,
    HeatMapLocalizer,
    build_localizers,
)
from cloc_mllm.evaluation.encoders.readouts import (
    ClocEncoder,
    CropReadout,
    EncodedImages,
    PrompterReadout,
    build_readouts,
    crop_box,
    pool_patches,
)
from cloc_mllm.models.geometry import Geometry
from cloc_mllm.models.prompter import roi_align
from tests.builders import noise_image, tiny_cloc

PICTURES = [noise_image(40, 30, 0), noise_image(20, 60, 1), noise_image(33, 33, 2)]
BOXES = [[[1, 2, 20, 25], [10, 5, 39.5, 29]], [], [[0, 0, 33, 33]]]


def encoder_of(kind: str | None = "prompter") -> ClocEncoder:
    return ClocEncoder(*tiny_cloc(kind=kind), "tiny")


def test_pooling_by_weights_equals_roi_align() -> None:
    torch.manual_seed(0)
    patches = torch.randn(3, 36, 8)
    corner = torch.rand(40, 2) * 0.8 - 0.1
    boxes = torch.cat([corner, corner + torch.rand(40, 2) * 0.6 + 0.01], dim=-1)
    owner = torch.randint(0, 3, (40,))
    plain = roi_align(patches, boxes, owner, output_size=4, has_class_token=False).mean(dim=1)
    assert torch.allclose(pool_patches(patches, boxes, owner), plain, atol=1e-5)


def test_prompter_read_out_equals_the_model_on_the_processors_inputs() -> None:
    encoder = encoder_of()
    images = encoder.encode_images(PICTURES, ["a", "b", "c"])
    inputs = encoder.processor(images=PICTURES, input_boxes=BOXES)
    with torch.no_grad():
        regions = encoder.model.get_region_features(
            pixel_values=inputs["pixel_values"],
            input_boxes=inputs["input_boxes"],
            image_index=inputs["box_image_index"],
        ).pooler_output
    found = PrompterReadout(encoder).embed(images, BOXES)
    assert torch.allclose(found, functional.normalize(regions, dim=-1), atol=1e-6)


def test_whole_image_patches_and_crop_go_through_clips_projection() -> None:
    encoder = encoder_of(None)
    images = encoder.encode_images(PICTURES, ["a", "b", "c"])
    model = encoder.model
    patches = model.visual_projection(model.vision_model.post_layernorm(images.tokens[2:3, 1:]))
    pooled = functional.normalize(
        roi_align(patches, torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0]), 4, False), dim=-1
    )
    assert images.patches.shape == (3, 16, 24)
    assert torch.allclose(images.patches[2:3], patches, atol=1e-6)
    assert pooled.shape == (1, 16, 24)
    crops = CropReadout(encoder).embed(images, BOXES)
    alone = encoder.encode_images([crop_box(PICTURES[0], BOXES[0][1])], ["x"]).embeds
    assert torch.allclose(crops[1], alone[0], atol=1e-6)
    whole = encoder.encode_images([PICTURES[2]], ["x"]).embeds
    assert torch.allclose(crops[2], whole[0], atol=1e-6), "the crop of the whole picture is the picture"


@pytest.mark.parametrize("readout", ["prompter", "roi", "value", "crop"])
def test_embeddings_do_not_depend_on_the_order_of_boxes_or_the_batch(readout: str) -> None:
    encoder = encoder_of()
    (way,) = build_readouts(encoder, [readout])
    together = way.embed(encoder.encode_images(PICTURES, ["a", "b", "c"]), BOXES)
    alone = way.embed(encoder.encode_images(PICTURES[:1], ["a"]), [BOXES[0][::-1]])
    assert torch.allclose(alone.flip(0), together[:2], atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert way.embed(encoder.encode_images(PICTURES, ["a", "b", "c"]), [[], [], []]).shape[0] == 0


def test_texts_keep_their_order_though_they_are_batched_by_length() -> None:
    encoder = encoder_of()
    texts = ["a red circle left of a blue square", "ring", "where is the small red ring", "no"]
    together = encoder.embed_texts(texts)
    for text, embed in zip(texts, together, strict=True):
        assert torch.allclose(encoder.embed_texts([text])[0], embed, atol=1e-5)


def test_crops_stay_inside_and_are_never_empty() -> None:
    picture = noise_image(40, 30)
    assert crop_box(picture, [0, 0, 40, 30]).size == (40, 30)
    assert crop_box(picture, [10, 10, 20, 20]).size == (12, 12)
    assert crop_box(picture, [39.9, 29.9, 40, 30]).size == (1, 1)
    box = crop_box(picture, [5, 5, 25, 10])
    assert box.getpixel((0, 0)) == picture.getpixel((3, 3))


def test_read_outs_an_encoder_does_not_have_are_refused() -> None:
    with pytest.raises(ClocError, match="has no Prompter"):
        build_readouts(encoder_of(None), ["prompter"])
    with pytest.raises(ClocError, match="no read-out 'cropp'"):
        build_readouts(encoder_of(None), ["cropp"])
    assert [way.name for way in build_readouts(encoder_of(None))] == ["roi", "crop", "value"]
    assert [way.name for way in build_readouts(encoder_of())] == ["prompter", "roi"]


def test_localizers_follow_what_the_encoder_has() -> None:
    def names(kind: str | None, method: str | None = None) -> list[str]:
        return [way.name.split("_0")[0] for way in build_localizers(encoder_of(kind), method)]

    maps = {source: [f"heatmap_{source}"] * 3 for source in ("roi", "value")}
    assert names("prompter") == ["box_head", "grid_prompter", *maps["roi"]]
    assert names("roi_align", "prompter") == ["grid_prompter"]
    assert names(None) == ["grid_roi", *maps["roi"], "grid_value", *maps["value"]]
    assert names("prompter", "prompter") == ["box_head", "grid_prompter"]
    assert names("prompter", "roi") == ["grid_roi", *maps["roi"]]
    assert names("prompter", "crop") == []


def test_values_are_the_last_layers_output_if_the_class_token_attended_to_one_patch_alone() -> None:
    encoder = encoder_of(None)
    images = encoder.encode_images(PICTURES, ["a", "b", "c"])
    tower = encoder.model.vision_model
    layer = tower.encoder.layers[-1]
    with torch.no_grad():
        pixels = encoder.processor(images=PICTURES)["pixel_values"]
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        normed = layer.layer_norm1(hidden)
        key, value = normed[:, :1], normed[:, 5:6]
        alone = layer.self_attn.out_proj(
            functional.scaled_dot_product_attention(
                layer.self_attn.q_proj(key), layer.self_attn.k_proj(value), layer.self_attn.v_proj(value)
            )
        )
        expected = encoder.model.visual_projection(tower.post_layernorm(alone))[:, 0]
    assert images.values is not None
    assert torch.allclose(images.values[:, 4], expected, atol=1e-5)
    assert not layer._forward_pre_hooks, "the hook is gone"


def test_a_checkpoint_loads_from_a_folder_of_any_name(tmp_path: Path) -> None:
    encoder = encoder_of()
    folder = tmp_path / "zq81"
    encoder.model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    loaded = ClocEncoder.from_pretrained(folder, "cpu")
    assert torch.equal(loaded.embed_texts(["ring"]), encoder.embed_texts(["ring"]))
    save_file({"logit_scale": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ClocError, match="lacks weights"):
        ClocEncoder.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ClocError, match="cannot be loaded as an encoder"):
        ClocEncoder.from_pretrained(folder)


# --- where is it ---------------------------------------------------------------------------------------------------


def planted(hot: list[tuple[int, int]], side: int = 8, size: tuple[int, int] = (96, 96)) -> EncodedImages:
    """One image whose patches at (row, column) point along axis 0 and all others along axis 1."""
    patches = torch.zeros(1, side, side, 4)
    patches[..., 1] = 1
    for row, column in hot:
        patches[0, row, column] = torch.tensor([1.0, 0, 0, 0])
    return EncodedImages(
        ids=["x"],
        pictures=[Image.new("RGB", size)],
        geometries=[Geometry.fit(*size, 96)],
        embeds=torch.zeros(1, 4),
        tokens=torch.zeros(1, side * side + 1, 4),
        patches_of=lambda: patches.flatten(1, 2),
    )


AXIS = torch.tensor([[1.0, 0, 0, 0]])
FIRST = torch.tensor([0])


def test_heat_map_boxes_the_hot_patches_and_points_at_them() -> None:
    hot = [(row, column) for row in (2, 3, 4) for column in (5, 6)]
    found = HeatMapLocalizer(0.6).locate(planted(hot), AXIS, FIRST)
    truth = np.array([60, 24, 84, 60])
    assert np.abs(found.boxes[0] - truth).max() <= 3.0 + 1e-4, "within one cell of the upsampled map"
    assert (truth[:2] <= found.points[0]).all()
    assert (found.points[0] <= truth[2:]).all()


def test_heat_map_keeps_to_the_part_that_holds_the_peak() -> None:
    images = planted([(1, 1), (1, 2), (6, 6)])
    images.patches[0, 6 * 8 + 6] = torch.tensor([0.99, 0.14, 0, 0])
    box = HeatMapLocalizer(0.5).locate(images, AXIS, FIRST).boxes[0]
    assert box[2] < 48
    assert box[3] < 48


def test_heat_map_never_looks_at_the_padding() -> None:
    images = planted([(0, 0), (4, 4)], size=(96, 24))
    images.patches[0, 4 * 8 + 4] = torch.tensor([0.9, 0.3, 0, 0])
    found = HeatMapLocalizer(0.5).locate(images, AXIS, FIRST)
    assert found.points[0] == pytest.approx([54, 18], abs=6.1)
    assert (found.boxes[0] >= 0).all()
    assert (found.boxes[0] <= [96, 24, 96, 24]).all()


def test_grid_over_patches_finds_the_planted_box() -> None:
    hot = [(row, column) for row in (2, 3, 4) for column in (4, 5, 6)]
    found = GridLocalizer(encoder_of(None), "roi").locate(planted(hot), AXIS, FIRST)
    assert found.points[0] == pytest.approx([66, 42], abs=6)


def test_box_head_and_grid_equal_the_models_own_methods() -> None:
    encoder = encoder_of()
    images = encoder.encode_images(PICTURES, ["a", "b", "c"])
    texts = encoder.embed_texts(["ring", "no", "what is this"])
    owner = torch.tensor([0, 0, 2])
    with torch.no_grad():
        direct = encoder.model.predict_boxes(images.tokens, texts, owner)
    boxes = BoxHeadLocalizer(encoder).locate(images, texts, owner).boxes
    assert boxes[2] == pytest.approx(images.geometries[2].boxes_from_model(direct[2]).numpy(), abs=1e-4)
    own, _ = encoder.model.ground(PICTURES[0], ["ring", "no"], encoder.processor)
    found = GridLocalizer(encoder, "prompter").locate(images, texts, owner)
    assert found.boxes[:2] == pytest.approx(np.array(own), abs=1e-3)
    assert found.points == pytest.approx((found.boxes[:, :2] + found.boxes[:, 2:]) / 2)


def test_a_grid_that_must_be_cut_into_parts_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of()
    images = encoder.encode_images(PICTURES, ["a", "b", "c"])
    texts = encoder.embed_texts(["ring", "no", "what is this"])
    owner = torch.tensor([0, 0, 1])
    whole = GridLocalizer(encoder, "prompter").locate(images, texts, owner).boxes
    monkeypatch.setattr("cloc_mllm.evaluation.encoders.localizers._GRID_MEMORY", 1)
    assert GridLocalizer(encoder, "prompter").locate(images, texts, owner).boxes == pytest.approx(whole, abs=1e-3)
