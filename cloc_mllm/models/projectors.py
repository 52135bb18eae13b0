"""From the tower's tokens to the language model's: the projectors, and what puts the tiles of an image together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .configuration_cloc_mllm import ClocMllmConfig
from .image_tokens import ImageTokens


class LinearProjector(nn.Module):
    """One linear layer, as in the first LLaVA (arXiv 2304.08485)."""

    def __init__(self, config: ClocMllmConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(
            _input_size(config), config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """``(I, N, C)`` to ``(I, N, D)``."""
        return self.linear(image_features)


class PixelShuffleProjector(nn.Module):
    """Fewer tokens: each square of ``factor`` x ``factor`` patches becomes one, then two linear layers.

    Space to depth, as InternVL (arXiv 2404.16821) reduces tokens; there is no norm before the layers (ours). A token's
    channels are those of its patches, row by row.
    """

    def __init__(self, config: ClocMllmConfig) -> None:
        super().__init__()
        self.factor = config.pixel_shuffle_factor
        size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(_input_size(config) * self.factor**2, size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(size, size, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """``(I, N, C)``, a square grid of patches, to ``(I, N / factor**2, D)``.

        Raises:
            ValueError: If the patches are no square grid that the factor divides.
        """
        count, tokens, channels = image_features.shape
        side = round(tokens**0.5)
        if side * side != tokens or side % self.factor:
            raise ValueError(
                f"{tokens} tokens are no square grid of patches that pixel_shuffle_factor {self.factor} divides"
            )
        blocks = side // self.factor
        squares = image_features.reshape(count, blocks, self.factor, blocks, self.factor, channels).transpose(2, 3)
        return self.linear_2(self.act(self.linear_1(squares.reshape(count, blocks**2, -1))))


_CLASSES: dict[str, type[nn.Module]] = {
    "mlp2x_gelu": LlavaMultiModalProjector,
    "linear": LinearProjector,
    "pixel_shuffle": PixelShuffleProjector,
}


def build_projector(config: ClocMllmConfig) -> nn.Module:
    """The projector that ``config.projector_type`` names; ``mlp2x_gelu`` is LLaVA's own module, under its names."""
    return _CLASSES[config.projector_type](config)


def _input_size(config: ClocMllmConfig) -> int:
    """Channels that reach the projector: those of every selected layer of the tower."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


class ImageNewline(nn.Module):
    """The learnt token that ends each row of an image put together from tiles: LLaVA-NeXT's ``image_newline``.

    A module of its own, and not a bare parameter of the model: so ZeRO-3 gathers it wherever it is used, and adapters
    keep it as they keep the projector.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """``(D,)`` in the dtype of ``like``, as a tensor of its own: ZeRO-3 takes the weight back at once."""
        return self.weight.to(like.dtype).clone()


def set_image_grid(model: Any, pinpoints: list[list[int]] | None) -> None:
    """Let a finished model take images cut into tiles, or whole ones.

    Args:
        model: A :class:`ClocMllmModel`, changed in place.
        pinpoints: Resolutions ``[height, width]`` of ``anyres``, with a new ``image_newline`` if there is none yet;
            ``None``: every image is one square.

    Raises:
        ValueError: If the tower's tokens are no grid of patches, or tiles do not fill a resolution.
    """
    before = model.config.image_grid_pinpoints
    model.config.image_grid_pinpoints = pinpoints
    try:
        ImageTokens.of(model.config)
    except ValueError:
        model.config.image_grid_pinpoints = before
        raise
    if pinpoints is None:
        model.image_newline = None
    elif model.image_newline is None:
        weight = next(model.multi_modal_projector.parameters())
        model.image_newline = ImageNewline(model.config.text_config.hidden_size).to(weight.device, weight.dtype)


def checked_tiles(
    layout: ImageTokens, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Bring tiles to one row each, and see that they go with their images.

    Args:
        layout: The tokens of images.
        pixel_values: ``(tiles, 3, S, S)``, or padded to ``(I, most tiles, 3, S, S)`` as LLaVA-NeXT's processor does.
        image_sizes: ``(I, 2)`` height and width of the original images in pixels.

    Returns:
        ``(tiles, 3, S, S)`` and the sizes.

    Raises:
        ValueError: If there are no sizes, or they ask for more or fewer tiles.
    """
    if image_sizes is None:
        raise ValueError("images that are cut into tiles need image_sizes, (height, width) of each original")
    sizes = [(int(height), int(width)) for height, width in torch.as_tensor(image_sizes).tolist()]
    tiles = [layout.num_tiles(*size) for size in sizes]
    if pixel_values.dim() == 5 and len(pixel_values) == len(sizes):
        pixel_values = torch.cat([rows[:count] for rows, count in zip(pixel_values, tiles, strict=True)])
    if pixel_values.dim() != 4 or len(pixel_values) != sum(tiles):
        raise ValueError(
            f"pixel_values {tuple(pixel_values.shape)} are not the {sum(tiles)} tiles that {len(sizes)} images of the "
            "given image_sizes are cut into"
        )
    return pixel_values, sizes


def pack_tiles(
    features: torch.Tensor, layout: ImageTokens, height: int, width: int, newline: torch.Tensor
) -> torch.Tensor:
    """Put the tiles of one image together, as LLaVA-NeXT does.

    Args:
        features: ``(1 + rows * columns, side**2, D)`` projected tokens of the overview and the tiles, row by row.
        layout: The tokens of images.
        height: Height of the original image in pixels.
        width: Width of the original image in pixels.
        newline: ``(D,)`` the token that ends a row.

    Returns:
        ``(layout.count(height, width), D)``: the overview, then the tiles' tokens row by row over all tiles, without
        those in the padding.
    """
    (rows, columns), side = layout.grid(height, width), layout.side
    tiles = features[1:].unflatten(0, (rows, columns)).unflatten(2, (side, side))
    whole = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    top, left = layout.padding(height, width)
    whole = whole[top : rows * side - top, left : columns * side - left]
    lines = torch.cat([whole, newline.expand(len(whole), 1, -1)], dim=1)
    return torch.cat([features[0], lines.flatten(0, 1)])
