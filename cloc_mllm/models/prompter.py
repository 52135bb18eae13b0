"""The Prompter: one image embedding in, the embedding of any box, point or phrase out (paper, section 3.2).

One transformer encoder layer reads ``[prompt tokens ; image tokens]`` and its output is pooled and projected into the
space shared with the text encoder. An image is encoded once; what depends on the image alone (its keys, its values and
its attention to itself) is computed once too and shared by all of its prompts. That is exact, not an approximation:
attention over two sets of keys is the average of the two attentions, weighted by their soft-max denominators.
"""

from __future__ import annotations

import math

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


class PrompterLayer(nn.Module):
    """One pre-norm transformer encoder layer over prompt and image tokens.

    :meth:`forward` is the plain form on the concatenated sequence. :meth:`shared` gives the same outputs while
    computing the image's side once for all prompts of an image.
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

    def _finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residual and MLP; ``attended`` is ``(..., heads, T, head_dim)``."""
        hidden = residual + self.out_proj(attended.transpose(-3, -2).flatten(-2))
        return hidden + self.fc2(self.activation(self.fc1(self.layer_norm2(hidden))))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The layer on ``(R, P + N, width)`` concatenated prompt and image tokens: the plain twin of :meth:`shared`."""
        query, key, value = self._qkv(tokens)
        return self._finish(tokens, functional.scaled_dot_product_attention(query, key, value))

    def shared(
        self, prompts: torch.Tensor, image_tokens: torch.Tensor, image_index: torch.Tensor, *, with_image: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer for many prompts, each on its own image, with the image's side computed once.

        Args:
            prompts: ``(R, P, width)`` prompt tokens.
            image_tokens: ``(B, N, width)`` image tokens.
            image_index: ``(R,)`` the image of each prompt.
            with_image: Whether the outputs at the image tokens are wanted too.

        Returns:
            Outputs at the prompt tokens, ``(R, P, width)``, and at the image tokens, ``(R, N, width)`` or ``None``.
        """
        query_p, key_p, value_p = self._qkv(prompts)
        normed = self.layer_norm1(image_tokens)
        key_i, value_i = self._heads(self.k_proj(normed)), self._heads(self.v_proj(normed))
        scale = query_p.shape[-1] ** -0.5
        key_of, value_of = key_i[image_index], value_i[image_index]
        scores = torch.cat([query_p @ key_p.transpose(-1, -2), query_p @ key_of.transpose(-1, -2)], dim=-1) * scale
        values = torch.cat([value_p, value_of], dim=-2)
        at_prompt = self._finish(prompts, scores.softmax(dim=-1) @ values)
        if not with_image:
            return at_prompt, None
        query_i = self._heads(self.q_proj(normed))
        own = query_i @ key_i.transpose(-1, -2) * scale
        own_norm = own.logsumexp(dim=-1, keepdim=True)
        own_out = own.softmax(dim=-1) @ value_i
        cross = query_i[image_index] @ key_p.transpose(-1, -2) * scale
        cross_norm = cross.logsumexp(dim=-1, keepdim=True)
        # Share of the prompt's keys in the joint soft-max: sigmoid of the difference of the log-sum-exps.
        share = torch.sigmoid(cross_norm - own_norm[image_index])
        merged = own_out[image_index] * (1 - share) + (cross.softmax(dim=-1) @ value_p) * share
        return at_prompt, self._finish(image_tokens[image_index], merged)


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

    def _placed(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """``(B, N, hidden_size)`` tokens, each patch's with the encoding of its centre added."""
        if not self.config.image_positions:
            return image_tokens
        first = int(self.config.has_class_token)
        side = _grid_side(image_tokens.shape[1] - first)
        steps = (torch.arange(side, device=image_tokens.device, dtype=torch.float32) + 0.5) / side
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        roles = torch.tensor([CoordinateEmbedding.PATCH], device=image_tokens.device)
        where = self.coordinates(torch.stack([x, y], dim=-1).view(1, -1, 2), roles)
        return image_tokens + functional.pad(where, (0, 0, first, 0))

    def forward(
        self, image_tokens: torch.Tensor, prompts: torch.Tensor, image_index: torch.Tensor, *, plain: bool = False
    ) -> torch.Tensor:
        """Pool one feature for each prompt.

        Args:
            image_tokens: ``(B, N, hidden_size)`` tokens of the tower before pooling and projection.
            prompts: ``(R, P, hidden_size)`` prompt tokens from one of the ``embed_*`` methods.
            image_index: ``(R,)`` the image each prompt is about.
            plain: Run the layer on the concatenated sequences, sharing nothing. Slow; the reference for tests.

        Returns:
            ``(R, hidden_size)`` pooled features; :attr:`projection` takes them to the shared space.
        """
        of_prompt = self.config.pooling == "prompt"
        image_tokens = self._placed(image_tokens)
        if plain:
            tokens = self.layer(torch.cat([prompts, image_tokens[image_index]], dim=1))
            return self.layer_norm(tokens[:, : prompts.shape[1]] if of_prompt else tokens).mean(dim=1)
        at_prompt, at_image = self.layer.shared(prompts, image_tokens, image_index, with_image=not of_prompt)
        tokens = at_prompt if at_image is None else torch.cat([at_prompt, at_image], dim=1)
        return self.layer_norm(tokens).mean(dim=1)


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
        pooled = roi_align(image_tokens, boxes, image_index, self.config.roi_output_size, self.config.has_class_token)
        return self.layer_norm(pooled.mean(dim=1))


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
    patches = image_tokens[:, 1:] if has_class_token else image_tokens
    side = _grid_side(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    boxes = boxes.to(torch.float32)
    steps = (torch.arange(output_size, device=boxes.device, dtype=torch.float32) + 0.5) / output_size
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * steps
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * steps
    x, y = x[:, None, :].expand(-1, output_size, -1), y[:, :, None].expand(-1, -1, output_size)
    where = torch.stack([x, y], dim=-1) * 2 - 1  # grid_sample's frame is [-1, 1]
    sampled = functional.grid_sample(
        grid[image_index].to(torch.float32), where, padding_mode="border", align_corners=False
    )
    return sampled.flatten(2).transpose(1, 2).to(image_tokens.dtype)


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
