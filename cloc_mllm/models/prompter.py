"""The Prompter: one image embedding in, the embedding of any box, point or phrase out (paper, section 3.2).

One transformer encoder layer reads ``[prompt tokens ; image tokens]`` and its output is pooled and projected into the
space shared with the text encoder. An image is encoded once; what depends on the image alone (its keys, its values and
its attention to itself) is computed once too and shared by all of its prompts. That is exact, not an approximation:
attention over two sets of keys is the average of the two attentions, weighted by their soft-max denominators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .boxes import cxcywh_to_xyxy
from .configuration_cloc import ClocPrompterConfig


class CoordinateEmbedding(nn.Module):
    """Sinusoidal encoding of points, lifted to the tower's width, plus a learned embedding of each point's role.

    Roles are top-left corner, bottom-right corner and free point, as SAM has them, and the centre of an image patch.
    Ours: the paper says only that the two corners are encoded by sinusoids.
    """

    TOP_LEFT, BOTTOM_RIGHT, POINT, PATCH = range(4)

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__()
        self.num_pos_feats = config.num_pos_feats
        self.max_frequency = config.max_frequency
        self.lift = nn.Linear(4 * config.num_pos_feats, config.hidden_size)
        self.role = nn.Embedding(4, config.hidden_size)

    def forward(self, points: torch.Tensor, roles: torch.Tensor) -> torch.Tensor:
        """Embed points.

        Args:
            points: ``(R, P, 2)`` float32 x, y in [0, 1] of the model frame.
            roles: ``(P,)`` role of each point.

        Returns:
            ``(R, P, hidden_size)``.
        """
        # Built at every call in float32, never a buffer: a bf16 run would round the frequencies, and the sinusoids of
        # rounded coordinates are those of another place.
        exponent = torch.linspace(0, 1, self.num_pos_feats, device=points.device, dtype=torch.float32)
        frequency = 2 * math.pi * 0.5 * (2 * self.max_frequency) ** exponent
        angle = points.to(torch.float32)[..., None] * frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
        return self.lift(waves.to(self.lift.weight.dtype)) + self.role(roles)


@dataclass(frozen=True)
class ImageSide:
    """What the Prompter computes of images once, whatever they are asked.

    Attributes:
        tokens: ``(B, N, width)`` the layer's input.
        key: ``(B, heads, N, head_dim)``.
        value: ``(B, heads, N, head_dim)``.
        query: ``(B, heads, N, head_dim)``; this and what follows is ``None`` if only outputs at prompts are wanted.
        attended: ``(B, heads, N, head_dim)`` attention of the image's tokens to each other.
        log_norm: ``(B, heads, N, 1)`` logarithm of that attention's soft-max denominators.
    """

    tokens: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    log_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class PromptTable:
    """A place for each of R prompts in a table of G rows and C columns, so that a row's prompts share their keys.

    A row is an image and its columns are its prompts: then no image's keys are copied. Where that would leave most of
    the table empty (a thousand prompts on one image, one on each of the others), each prompt has a row of its own.

    Attributes:
        row: ``(R,)`` row of each prompt.
        column: ``(R,)`` column of each prompt.
        images: ``(G,)`` image of each row; ``None`` where row g is image g.
        shape: G and C.
        full: Whether the prompts fill the table in order: then it is another view of them.
    """

    row: torch.Tensor
    column: torch.Tensor
    images: torch.Tensor | None
    shape: tuple[int, int]
    full: bool

    @classmethod
    def of(cls, image_index: torch.Tensor, num_images: int) -> PromptTable:
        """Lay out the table for prompts on the images ``image_index`` ``(R,)`` of ``num_images``."""
        count = len(image_index)
        numbers = torch.arange(count, device=image_index.device)
        order = image_index.argsort(stable=True)
        per_image = torch.bincount(image_index, minlength=num_images)
        first = per_image.cumsum(0) - per_image
        column = torch.empty_like(image_index)
        column[order] = numbers - first[image_index[order]]
        if count == 0:
            return cls(numbers, column, None, (num_images, 0), full=True)
        # The one place that waits for the device.
        in_order, longest = torch.stack([(order == numbers).all().long(), per_image.max()]).tolist()
        if num_images * longest > 2 * count:
            return cls(numbers, torch.zeros_like(numbers), image_index, (count, 1), full=True)
        full = bool(in_order) and num_images * longest == count
        return cls(image_index, column, None, (num_images, longest), full)

    def fill(self, prompts: torch.Tensor) -> torch.Tensor:
        """``(R, ...)`` to ``(G, C, ...)``, zeros where no prompt is."""
        if self.full:
            return prompts.unflatten(0, self.shape)
        return prompts.new_zeros(*self.shape, *prompts.shape[1:]).index_put((self.row, self.column), prompts)

    def pick(self, table: torch.Tensor) -> torch.Tensor:
        """``(G, C, ...)`` to ``(R, ...)``."""
        return table.flatten(0, 1) if self.full else table[self.row, self.column]

    def of_rows(self, per_image: torch.Tensor) -> torch.Tensor:
        """``(B, ...)`` to ``(G, ...)``."""
        return per_image if self.images is None else per_image.index_select(0, self.images)


class PrompterLayer(nn.Module):
    """One pre-norm transformer encoder layer over prompt and image tokens.

    :meth:`forward` is the plain form on the concatenated sequence. :meth:`read` and :meth:`ask` give the same outputs
    while computing the image's side once for all prompts of an image.
    """

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size or 4 * width
        self.num_heads = config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, inner)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(inner, width)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., T, width)`` to ``(..., heads, T, width / heads)``."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _qkv(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = self.layer_norm1(tokens)
        return self._heads(self.q_proj(normed)), self._heads(self.k_proj(normed)), self._heads(self.v_proj(normed))

    def _joined(self, attended: torch.Tensor) -> torch.Tensor:
        """Output projection of ``(..., heads, T, head_dim)``."""
        return self.out_proj(attended.transpose(-3, -2).flatten(-2))

    def _inner(self, hidden: torch.Tensor) -> torch.Tensor:
        """The MLP up to its activation."""
        return self.activation(self.fc1(self.layer_norm2(hidden)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The layer on ``(R, P + N, width)`` concatenated prompt and image tokens: the plain twin of :meth:`ask`."""
        query, key, value = self._qkv(tokens)
        hidden = tokens + self._joined(functional.scaled_dot_product_attention(query, key, value))
        return hidden + self.fc2(self._inner(hidden))

    def read(self, image_tokens: torch.Tensor, *, with_image: bool) -> ImageSide:
        """Compute what depends on the images alone.

        Args:
            image_tokens: ``(B, N, width)``.
            with_image: Whether outputs at the image tokens will be wanted, not at the prompts' alone.
        """
        normed = self.layer_norm1(image_tokens)
        key, value = self._heads(self.k_proj(normed)), self._heads(self.v_proj(normed))
        if not with_image:
            return ImageSide(image_tokens, key, value)
        query = self._heads(self.q_proj(normed))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return ImageSide(
            image_tokens, key, value, query, scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1, keepdim=True)
        )

    def ask(
        self, prompts: torch.Tensor, side: ImageSide, table: PromptTable, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's outputs at the prompts' own tokens, ``(R, P, width)``.

        Args:
            prompts: ``(R, P, width)`` prompt tokens.
            side: What :meth:`read` gave.
            table: Which image each prompt is about.
            padding: ``(R, P)`` bool: tokens that nothing attends to. Their own outputs mean nothing.
        """
        hidden = self._at_prompts(prompts, *self._qkv(prompts), side, table, padding)
        return hidden + self.fc2(self._inner(hidden))

    def ask_for_mean(
        self, prompts: torch.Tensor, side: ImageSide, table: PromptTable, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean of the layer's outputs over prompt and image tokens, ``(R, width)``; arguments as :meth:`ask`.

        What follows the activation is linear, so it is done to the mean: half of the MLP's work is saved.
        """
        query, key, value = self._qkv(prompts)
        at_prompts = self._at_prompts(prompts, query, key, value, side, table, padding)
        attended = self._joined(self._at_image(key, value, side, table, padding))
        at_image = table.pick(table.of_rows(side.tokens)[:, None] + attended)
        count: int | torch.Tensor = at_prompts.shape[1] + at_image.shape[1]
        inner_at_prompts = self._inner(at_prompts)
        if padding is not None:
            real = ~padding[..., None]
            at_prompts, inner_at_prompts = at_prompts * real, inner_at_prompts * real
            count = at_image.shape[1] + real.sum(dim=1)
        hidden = at_prompts.sum(dim=1) + at_image.sum(dim=1)
        inner = inner_at_prompts.sum(dim=1) + self._inner(at_image).sum(dim=1)
        return hidden / count + self.fc2(inner / count)

    def _at_prompts(
        self,
        prompts: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        side: ImageSide,
        table: PromptTable,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """Prompt tokens after attention to themselves and their image, ``(R, P, width)``."""
        scale = query.shape[-1] ** -0.5
        slots = table.fill(query).transpose(1, 2)  # (G, heads, C, P, head_dim)
        columns, length = slots.shape[2:4]
        to_image = slots.flatten(2, 3) @ table.of_rows(side.key).transpose(-1, -2)
        to_image = table.pick(to_image.unflatten(2, (columns, length)).transpose(1, 2))  # (R, heads, P, N)
        to_own = query @ key.transpose(-1, -2)
        if padding is not None:
            to_own = to_own.masked_fill(padding[:, None, None], float("-inf"))
        weights = (torch.cat([to_own, to_image], dim=-1) * scale).softmax(dim=-1)
        of_own, of_image = weights.split([length, weights.shape[-1] - length], dim=-1)
        slots = table.fill(of_image).transpose(1, 2).flatten(2, 3)  # (G, heads, C * P, N)
        read = (slots @ table.of_rows(side.value)).unflatten(2, (columns, length)).transpose(1, 2)
        return prompts + self._joined(table.pick(read) + of_own @ value)

    def _at_image(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        side: ImageSide,
        table: PromptTable,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the image tokens to their image and each prompt, ``(G, C, heads, N, head_dim)``."""
        assert side.query is not None
        assert side.attended is not None
        assert side.log_norm is not None
        query, own_norm = table.of_rows(side.query)[:, None], table.of_rows(side.log_norm)[:, None]
        scores = query @ table.fill(key).transpose(-1, -2) * query.shape[-1] ** -0.5  # (G, C, heads, N, P)
        if padding is not None:
            # An empty place of the table counts as not padded: a soft-max over nothing would be NaN.
            scores = scores.masked_fill(table.fill(padding)[:, :, None, None], float("-inf"))
        # The prompt's part of the joint soft-max is the sigmoid of the difference of the log-sum-exps.
        share = torch.sigmoid(scores.logsumexp(dim=-1, keepdim=True) - own_norm)
        return torch.lerp(table.of_rows(side.attended)[:, None], scores.softmax(dim=-1) @ table.fill(value), share)


class ClocPrompter(nn.Module):
    """Embeds boxes, points and phrases of images that were encoded once.

    Args:
        config: See :class:`ClocPrompterConfig`; ``pooling`` picks the read-out.
    """

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__()
        self.config = config
        self.coordinates = CoordinateEmbedding(config)
        self.text_lift = nn.Linear(config.projection_dim, config.hidden_size)
        self.layer = PrompterLayer(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.gradient_checkpointing = False  # transformers' gradient_checkpointing_enable() looks for it
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]

    def embed_boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """``(R, 4)`` float32 xyxy boxes, normalised, model frame, to two corner tokens each, ``(R, 2, width)``."""
        roles = torch.tensor([CoordinateEmbedding.TOP_LEFT, CoordinateEmbedding.BOTTOM_RIGHT], device=boxes.device)
        return self.coordinates(boxes.unflatten(-1, (2, 2)), roles)

    def embed_points(self, points: torch.Tensor) -> torch.Tensor:
        """``(R, 2)`` float32 points, normalised, model frame, to ``(R, 2, width)``: a box of no size, own role."""
        roles = torch.tensor([CoordinateEmbedding.POINT] * 2, device=points.device)
        return self.coordinates(points[:, None].expand(-1, 2, -1), roles)

    def embed_texts(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """``(R, projection_dim)`` text embeddings to one token each, ``(R, 1, hidden_size)``.

        Normalised first, so that a phrase's prompt does not depend on the scale the text projection happens to have.
        """
        return self.text_lift(functional.normalize(text_embeds, dim=-1).to(self.text_lift.weight.dtype))[:, None]

    def _placed(self, image_tokens: torch.Tensor, patch_centers: torch.Tensor | None) -> torch.Tensor:
        """``(B, N, hidden_size)`` tokens, each patch's with the encoding of its centre added."""
        if not self.config.image_positions:
            return image_tokens
        first = int(self.config.has_class_token)
        if patch_centers is None:
            patch_centers = grid_centers(_grid_side(image_tokens.shape[1] - first), image_tokens.device)[None]
        roles = torch.tensor([CoordinateEmbedding.PATCH], device=image_tokens.device)
        return image_tokens + functional.pad(self.coordinates(patch_centers, roles), (0, 0, first, 0))

    def read_images(self, image_tokens: torch.Tensor, patch_centers: torch.Tensor | None = None) -> ImageSide:
        """Compute what all prompts of the images share; :meth:`forward` takes it in place of the tokens.

        Args:
            image_tokens: ``(B, N, hidden_size)`` tokens of the tower before pooling and projection.
            patch_centers: ``(B, N', 2)`` float32 x, y in [0, 1] of the patch tokens, if the tower has read only some of
                the patches; by default those of the whole square grid.
        """
        return self.layer.read(self._placed(image_tokens, patch_centers), with_image=self.config.pooling == "mean")

    def forward(
        self,
        image_tokens: torch.Tensor | ImageSide,
        prompts: torch.Tensor,
        image_index: torch.Tensor | PromptTable,
        *,
        plain: bool = False,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pool one feature for each prompt.

        Args:
            image_tokens: ``(B, N, hidden_size)`` tokens of the tower before pooling and projection, or what
                :meth:`read_images` made of them.
            prompts: ``(R, P, hidden_size)`` prompt tokens from one of the ``embed_*`` methods.
            image_index: ``(R,)`` the image each prompt is about, or the table of them.
            plain: Run the layer on the concatenated sequences, sharing nothing. Slow; the reference for tests.
            padding: ``(R, P)`` bool, where prompts differ in length: the tokens that are not there. Not with ``plain``.

        Returns:
            ``(R, hidden_size)`` pooled features; :attr:`projection` takes them to the shared space.
        """
        if plain:
            assert padding is None
            assert isinstance(image_tokens, torch.Tensor)
            assert isinstance(image_index, torch.Tensor)
            tokens = self.layer(torch.cat([prompts, self._placed(image_tokens, None)[image_index]], dim=1))
            if self.config.pooling == "mean":
                return self.layer_norm(tokens.mean(dim=1))
            return self.layer_norm(tokens[:, : prompts.shape[1]]).mean(dim=1)
        side = self.read_images(image_tokens) if isinstance(image_tokens, torch.Tensor) else image_tokens
        table = image_index
        if isinstance(table, torch.Tensor):
            table = PromptTable.of(table, len(side.tokens))
        if self.config.pooling == "prompt":
            read = self.layer_norm(self.layer.ask(prompts, side, table, padding))
            if padding is None:
                return read.mean(dim=1)
            real = ~padding[..., None]
            return (read * real).sum(dim=1) / real.sum(dim=1)
        if self.gradient_checkpointing and self.training:
            # Each prompt has image tokens of its own here, the largest tensors of the whole step: they are made inside.
            mean = self._gradient_checkpointing_func(self.layer.ask_for_mean, prompts, side, table, padding)
            return self.layer_norm(mean)
        return self.layer_norm(self.layer.ask_for_mean(prompts, side, table, padding))


class RoiAlignPooler(nn.Module):
    """RoI-Align on the tower's patch tokens, projected: the paper's ablation in the Prompter's place (table 2).

    Samples ``roi_output_size`` x ``roi_output_size`` bin centres bilinearly and averages them. It has no way to take a
    phrase, so it cannot localise.
    """

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__()
        self.config = config
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, image_tokens: torch.Tensor, boxes: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """``(B, N, hidden_size)`` tokens and ``(R, 4)`` normalised boxes to ``(R, hidden_size)`` pooled features."""
        return self.layer_norm(self.pool(image_tokens, boxes, image_index))

    def pool(self, image_tokens: torch.Tensor, boxes: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """As :meth:`forward`, before the norm."""
        size, has_class_token = self.config.roi_output_size, self.config.has_class_token
        return roi_align(image_tokens, boxes, image_index, size, has_class_token).mean(dim=1)


def roi_align(
    image_tokens: torch.Tensor,
    boxes: torch.Tensor,
    image_index: torch.Tensor,
    output_size: int = 4,
    has_class_token: bool = True,
) -> torch.Tensor:
    """Sample a square token grid under boxes (Mask R-CNN's RoI-Align, one sample a bin).

    Args:
        image_tokens: ``(B, N, D)`` tokens of a square grid, with a class token in front or not.
        boxes: ``(R, 4)`` xyxy, normalised, model frame.
        image_index: ``(R,)`` the image of each box.
        output_size: Bins on each side.
        has_class_token: Whether the first token is left out.

    Returns:
        ``(R, output_size ** 2, D)`` sampled tokens.

    Raises:
        ValueError: If the tokens do not form a square grid.
    """
    boxes = boxes.to(torch.float32)
    steps = (torch.arange(output_size, device=boxes.device, dtype=torch.float32) + 0.5) / output_size
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * steps
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * steps
    x, y = x[:, None, :].expand(-1, output_size, -1), y[:, :, None].expand(-1, -1, output_size)
    return sample_tokens(image_tokens, torch.stack([x, y], dim=-1).flatten(1, 2), image_index, has_class_token)


def sample_tokens(
    image_tokens: torch.Tensor, points: torch.Tensor, image_index: torch.Tensor, has_class_token: bool = True
) -> torch.Tensor:
    """Sample a square token grid bilinearly at points.

    Args:
        image_tokens: ``(B, N, D)`` tokens of a square grid, with a class token in front or not.
        points: ``(R, P, 2)`` float32 x, y, normalised, model frame.
        image_index: ``(R,)`` the image of each row of points.
        has_class_token: Whether the first token is left out.

    Returns:
        ``(R, P, D)`` sampled tokens.

    Raises:
        ValueError: If the tokens do not form a square grid.
    """
    patches = image_tokens[:, 1:] if has_class_token else image_tokens
    side = _grid_side(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    where = points[:, None] * 2 - 1  # grid_sample's frame is [-1, 1]
    sampled = functional.grid_sample(
        grid[image_index].to(torch.float32), where, padding_mode="border", align_corners=False
    )
    return sampled.flatten(2).transpose(1, 2).to(image_tokens.dtype)


def grid_centers(side: int, device: torch.device) -> torch.Tensor:
    """``(side ** 2, 2)`` float32 x, y in [0, 1] of the centres of a square grid's patches, row by row."""
    steps = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def _grid_side(num_patches: int) -> int:
    """Side of a square grid of patches.

    Raises:
        ValueError: If the patches do not form one.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"the tower's {num_patches} patch tokens do not form a square grid: is has_class_token right?")
    return side


class BoxHead(nn.Module):
    """Two-layer GELU MLP from a text-prompted feature to a box (paper, section 3.2).

    Ours: centre and size through a sigmoid, so that corners are in order and the centre lies in the frame.
    """

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__()
        inner = config.box_head_hidden_size or config.hidden_size
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(inner, 4)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(R, hidden_size)`` features to ``(R, 4)`` float32 xyxy boxes, normalised, model frame."""
        raw = self.fc2(self.activation(self.fc1(features)))
        return cxcywh_to_xyxy(raw.to(torch.float32).sigmoid())
