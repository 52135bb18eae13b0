"""Images in tiles: transformers' LLaVA-NeXT is the oracle for pixels, counts and logits; boxes go through the tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

from cloc_mllm.models.geometry import Geometry
from cloc_mllm.models.image_processing_cloc import ClocImageProcessor
from cloc_mllm.models.image_tokens import ImageTokens, checked_pinpoints, default_pinpoints
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from cloc_mllm.models.projectors import pack_tiles
from tests.builders import noise_image, tiny_cloc
from tests.builders_mllm import (
    assistant,
    grounding_turn,
    image,
    model_inputs,
    region,
    stock_llava,
    text,
    tiny_llm_tokenizer,
    tiny_mllm,
    user,
)

SHAPES = [(40, 30), (33, 90), (64, 64), (32, 64), (200, 31), (7, 150), (5, 4), (96, 32), (1000, 9), (3, 400)]
"""Width and height: among them exact fits, small ones, and some so thin that whole rows of tokens are padding."""


def stock_images(size: int, pinpoints: list[list[int]] | None = None) -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=pinpoints or default_pinpoints(size),
    )


@pytest.fixture(scope="module")
def mllm() -> tuple[Any, Any]:
    return tiny_mllm(image_mode="anyres")


# ---- against LLaVA-NeXT -------------------------------------------------------------------------------------------


def test_pixels_are_those_of_llava_next() -> None:
    pictures = [noise_image(width, height, seed) for seed, (width, height) in enumerate(SHAPES)]
    ours = ClocImageProcessor(32, "anyres")(pictures)
    theirs = stock_images(32)(pictures, return_tensors="pt")
    assert torch.equal(ours["image_sizes"], theirs["image_sizes"])
    layout = ImageTokens.plan(32, 8, 0, pinpoints=default_pinpoints(32))
    tiles = [layout.num_tiles(height, width) for width, height in SHAPES]
    for mine, padded, count in zip(ours["pixel_values"].split(tiles), theirs["pixel_values"], tiles, strict=True):
        assert not padded[count:].any()
        torch.testing.assert_close(mine, padded[:count], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def stock_processor() -> LlavaNextProcessor:
    tokenizer = tiny_llm_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return LlavaNextProcessor(stock_images(336), tokenizer, 14, "default", num_additional_image_tokens=1)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_counts_are_those_of_llava_next(stock_processor: LlavaNextProcessor, width: int, height: int) -> None:
    layout = ImageTokens.plan(336, 14, 0, pinpoints=default_pinpoints(336))
    stock = stock_processor._get_num_multimodal_tokens([(height, width)])
    assert [layout.count(height, width)] == stock.num_image_tokens


def test_the_defaults_are_llava_nexts() -> None:
    assert default_pinpoints(336) == LlavaNextImageProcessorPil().image_grid_pinpoints


@pytest.mark.parametrize("layer", [-2, [-2, -1]])
def test_logits_loss_and_answers_are_those_of_llava_next(layer: int | list[int]) -> None:
    model, processor = tiny_mllm("qwen2", image_mode="anyres", vision_feature_layer=layer)
    stock = stock_llava(model)
    for start in range(0, len(SHAPES), 3):
        turns = [[user(image(k, *size), text("what?")), assistant("two")] for k, size in enumerate(SHAPES[start:])][:3]
        turns.append([user("no image here"), assistant("a red circle")])
        batch = model_inputs(processor.encode(turns, return_labels=True))
        batch.pop("ground_image_index")
        with torch.no_grad():
            ours, theirs = model(**batch), stock(**batch)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.loss, theirs.loss)
        # The layout of LLaVA-NeXT's own processor is taken too: tiles padded to the most of the batch.
        pictures = [turn[0]["content"][0]["image"] for turn in turns[:-1]]
        batch |= stock_images(32)(pictures, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, ours.logits, atol=1e-5, rtol=1e-5)
    prompts = processor.encode([one[:1] for one in turns], add_generation_prompt=True)
    assert torch.equal(
        model.generate(**prompts, max_new_tokens=6, min_new_tokens=6),
        stock.generate(**prompts, max_new_tokens=6, min_new_tokens=6),
    )


# ---- what the tiles hold ------------------------------------------------------------------------------------------

sizes = st.sampled_from([32, 336])
sides = st.integers(1, 3000)


@settings(max_examples=150, deadline=None)
@given(width=sides, height=sides, size=sizes, factor=st.sampled_from([1, 2]))
def test_packing_reads_the_picture_row_by_row(width: int, height: int, size: int, factor: int) -> None:
    """Each token carries its place in the whole canvas; what comes out is those places in order, padding left out."""
    layout = ImageTokens.plan(
        size, size // 4, 0, "pixel_shuffle", pixel_shuffle_factor=factor, pinpoints=default_pinpoints(size)
    )
    (rows, columns), side = layout.grid(height, width), layout.side
    canvas = torch.stack(
        torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij"), dim=-1
    ).float()
    tiles = [
        canvas[r * side : (r + 1) * side, c * side : (c + 1) * side].reshape(side * side, 2)
        for r in range(rows)
        for c in range(columns)
    ]
    newline, overview = torch.tensor([-1.0, -1.0]), torch.full((side * side, 2), -2.0)
    packed = pack_tiles(torch.stack([overview, *tiles]), layout, height, width, newline)
    assert len(packed) == layout.count(height, width)
    assert torch.equal(packed[: side * side], overview)
    ends = (packed[side * side :, 0] == -1).nonzero()[:, 0]
    top, left = layout.padding(height, width)
    expected = canvas[top : rows * side - top, left : columns * side - left]
    assert len(ends) == len(expected)
    places = packed[side * side :][packed[side * side :, 0] != -1]
    assert torch.equal(places, expected.flatten(0, 1))


@settings(max_examples=150, deadline=None)
@given(width=sides, height=sides, size=sizes, share=st.tuples(*[st.floats(0, 1)] * 4))
def test_boxes_go_to_every_tile_and_back(
    width: int, height: int, size: int, share: tuple[float, float, float, float]
) -> None:
    box = torch.tensor(
        [
            [
                min(share[0], share[2]) * width,
                min(share[1], share[3]) * height,
                max(share[0], share[2]) * width,
                max(share[1], share[3]) * height,
            ]
        ],
        dtype=torch.float64,
    )
    pinpoints = default_pinpoints(size)
    tiles = Geometry.tiles(width, height, size, pinpoints)
    layout = ImageTokens.plan(size, size, 0, pinpoints=pinpoints)
    rows, columns = layout.grid(height, width)
    assert len(tiles) == rows * columns
    tolerance = 1e-6 * max(width, height)
    for number, tile in enumerate(tiles):
        inside = tile.boxes_to_model(box)
        torch.testing.assert_close(tile.boxes_from_model(inside), box, rtol=0, atol=tolerance)
        # One tile further is one frame further, and all of them see the same picture.
        row, column = divmod(number, columns)
        moved = inside + torch.tensor([column, row, column, row])
        torch.testing.assert_close(moved, tiles[0].boxes_to_model(box), rtol=0, atol=1e-5)
    canvas = tiles[0].boxes_to_model(box)
    limit = torch.tensor([columns, rows, columns, rows]) + 1e-5
    assert ((canvas >= -1e-5) & (canvas <= limit)).all()


def test_a_drawn_box_lies_where_the_tiles_say() -> None:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (200, 90))
    ImageDraw.Draw(picture).rectangle([20, 20, 189, 69], fill="white")
    processor = ClocImageProcessor(96, "anyres", [0, 0, 0], [1, 1, 1])
    pixels = processor(picture)["pixel_values"]
    places = processor.tiles(200, 90)
    assert len(pixels) == 1 + len(places) == 4
    for seen, place in zip(pixels[1:], places, strict=True):
        x1, y1, x2, y2 = (place.boxes_to_model([20, 20, 190, 70]) * 96).clamp(0, 96).tolist()
        rows, columns = (seen.mean(0) > 0.5).nonzero(as_tuple=True)
        found = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        assert found == pytest.approx([x1, y1, x2, y2], abs=0.6)


# ---- regions and boxes ---------------------------------------------------------------------------------------------


def test_regions_and_boxes_are_read_off_the_overview(mllm: tuple[Any, Any]) -> None:
    """What the Prompter and the head read of an image is what a model reads that sees the stretched picture only."""
    model, processor = mllm
    turns = [
        [
            user(image(1, 200, 31), text("is "), region(20, 4, 90, 25), text("?")),
            grounding_turn("a", (9, 2, 99, 9)),
        ],
        [user("no image"), assistant("yes")],
        [user(image(2, 33, 90), image(3, 64, 64), text("b"), region(2, 3, 20, 60, image=0)), grounding_turn()],
    ]
    batch = model_inputs(processor.encode(turns, return_labels=True))
    flat = processor.image_processor.in_mode("resize")
    pictures = [
        item["image"]
        for turn in turns
        for item in turn[0]["content"]
        if isinstance(item, dict) and item["type"] == "image"
    ]
    with torch.no_grad():
        ours = model.model.get_image_features(
            **{name: batch[name] for name in ("pixel_values", "image_sizes", "region_boxes", "region_image_index")}
        )
        tokens = model.model.vision_tower(flat(pictures)["pixel_values"]).last_hidden_state
        regions = model.model.region_projector(
            model.model.prompter(tokens, batch["region_boxes"], batch["region_image_index"])
        )
        output = model(**batch)
    torch.testing.assert_close(ours.last_hidden_state, tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.region_features, regions, atol=1e-5, rtol=1e-5)
    assert [len(one) for one in ours.pooler_output] == [processor.image_tokens(*one.size) for one in pictures]
    assert len({len(one) for one in ours.pooler_output}) > 1
    assert batch["region_image_index"].tolist() == [0, 1]
    place = flat.geometry(200, 31)
    assert torch.equal(batch["region_boxes"][:1], place.boxes_to_model([[20, 4, 90, 25]]))
    # Without being told, the model finds the image that each <ground> is about, though images differ in length.
    batch.pop("ground_image_index")
    with torch.no_grad():
        alone = model(**batch)
    assert alone.ground_image_index.tolist() == output.ground_image_index.tolist() == [0, 2]
    assert torch.equal(alone.pred_boxes, output.pred_boxes)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_tiles_and_sizes_that_do_not_go_together_are_refused(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = dict(processor.encode([user(image(), text("?"))]))
    with pytest.raises(ValueError, match="need image_sizes"):
        model(**{**batch, "image_sizes": None})
    with pytest.raises(ValueError, match="are not the 3 tiles that 1 images of the given image_sizes"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="works on the grid of patches"):
        tiny_mllm(image_mode="anyres", vision_feature_select_strategy="full")[1].encode([user(image())])


@pytest.mark.parametrize("pinpoints", [[], [[32, 48]], [[32]], [[0, 32]]])
def test_resolutions_that_tiles_do_not_fill_are_refused(pinpoints: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="cannot be cut into tiles of 32 x 32"):
        checked_pinpoints(pinpoints, 32)
    with pytest.raises(ValueError, match="cannot be cut into tiles"):
        ClocImageProcessor(32, "anyres", image_grid_pinpoints=pinpoints)


def test_resolutions_are_for_anyres_only() -> None:
    encoder, processor = tiny_cloc()
    with pytest.raises(ValueError, match="are for resize_mode 'anyres', not 'pad'"):
        ClocImageProcessor(32, "pad", image_grid_pinpoints=[[32, 64]])
    with pytest.raises(ValueError, match="are for image_mode 'anyres'"):
        ClocMllmProcessor.from_parts(
            processor.image_processor,
            tiny_llm_tokenizer(),
            encoder.config.vision_config,
            image_grid_pinpoints=[[32, 64]],
        )
    with pytest.raises(ValueError, match="one square an image"):
        type(processor)(processor.image_processor.in_mode("anyres"), processor.tokenizer)
