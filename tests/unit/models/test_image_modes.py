"""Pictures of any mode, turned by EXIF or not: what the model sees is what a viewer shows."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.models.image_processing_cloc import load_image

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def through(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of a file that holds a picture."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def as_array(source: Any) -> np.ndarray:
    picture = load_image(source)
    assert picture.mode == "RGB"
    assert load_image(picture) is picture  # nothing is left to do
    return np.asarray(picture)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("mode", ["L", "LA", "PA", "La", "RGBA", "RGBa", "RGBX", "P", "YCbCr", "CMYK", "HSV", "LAB"])
def test_opaque_greys_stay_what_they_are(mode: str) -> None:
    by_way_of = {"La": "LA", "RGBa": "RGBA", "PA": "LA"}.get(mode)
    picture = Image.fromarray(GREY)
    picture = (picture.convert(by_way_of) if by_way_of else picture).convert(mode)
    assert picture.mode == mode
    tolerance = 2 if mode == "LAB" else 1
    assert np.abs(as_array(picture).astype(int) - grey(GREY)).max() <= tolerance


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    assert np.array_equal(as_array(through(frames[0], "GIF", save_all=True, append_images=frames[1:])), grey(GREY))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_and_not_clipped(order: str) -> None:
    deep = GREY.astype(np.uint16) * 257
    mode = "I;16" if order == "<u2" else "I;16B"
    picture = Image.frombytes(mode, (8, 6), deep.astype(order).tobytes())
    assert np.array_equal(as_array(picture), grey(GREY))
    assert np.array_equal(as_array(Image.fromarray(deep.astype(np.int32))), grey(GREY))
    assert np.array_equal(as_array(deep), grey(GREY))
    assert np.array_equal(as_array(through(Image.fromarray(deep), "PNG")), grey(GREY))
    assert np.array_equal(as_array(through(Image.fromarray(deep), "TIFF")), grey(GREY))


def test_one_bit_is_black_and_white() -> None:
    on = GREY > 100
    assert np.array_equal(as_array(on), grey(on.astype(np.uint8) * 255))
    assert np.array_equal(as_array(through(Image.fromarray(on), "PNG")), grey(on.astype(np.uint8) * 255))


@settings(max_examples=60, deadline=None)
@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3), alpha=st.integers(0, 255), mode=st.sampled_from(["RGBA", "LA", "PA"])
)
def test_what_is_transparent_shows_white(colour: tuple[int, int, int], alpha: int, mode: str) -> None:
    if mode == "LA":
        seen, picture = (colour[0],) * 3, Image.new("LA", (3, 2), (colour[0], alpha))
    else:
        seen, picture = colour, Image.new("RGBA", (3, 2), (*colour, alpha)).convert(mode)
    expected = [value * alpha / 255 + 255 - alpha for value in seen]
    assert np.abs(as_array(picture) - np.array(expected)).max() <= 1


def test_a_transparent_colour_or_palette_entry_shows_white() -> None:
    key = tuple(int(value) for value in COLOUR[2, 3])
    expected = np.where((key == COLOUR).all(-1, keepdims=True), 255, COLOUR)
    assert np.array_equal(as_array(through(Image.fromarray(COLOUR), "PNG", transparency=key)), expected)
    palette = Image.fromarray(COLOUR).quantize(7)
    index, shown = np.asarray(palette), np.asarray(palette.convert("RGB"))
    expected = np.where((index == 3)[..., None], 255, shown)
    assert np.array_equal(as_array(through(palette, "PNG", transparency=3)), expected)
    assert np.array_equal(as_array(through(palette, "GIF", transparency=3)), expected)


def test_values_without_a_range_are_refused() -> None:
    for values in (GREY.astype(np.float32), GREY.astype(np.int32) * 10_000, GREY.astype(np.int32) - 200):
        with pytest.raises(ValueError, match=r"its mode is '[IF]', numbers from .*: scale them to 8 or 16 bits"):
            load_image(values)
    with pytest.raises(ValueError, match="the image cannot be read"):
        load_image(GREY.astype(np.int64))


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16"])
def test_exif_turns_pictures_of_any_mode(mode: str, orientation: int) -> None:
    deep = GREY.astype(np.uint16) * 257
    stored = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(GREY).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = as_array(through(stored, "PNG", exif=exif))
    undone = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }
    assert np.array_equal(turned, undone[orientation](grey(GREY)))
