"""What one image costs in pre-training, part by part: operations, and bytes kept for the backward pass.

Nothing is estimated by formula: the real model is run forward and backward on fake tensors, which have shapes and no
values, while torch counts floating-point operations and this module counts what autograd keeps. Attention is counted as
fused kernels do it, which keep no matrix of tokens by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.prompter import ClocPrompter, PromptTable
from cloc_mllm.training.presets.config import PretrainConfig
from cloc_mllm.training.presets.parts import apply_parts

PHRASE_TOKENS = 8
"""Longest region text of a batch; the paper's have 2.1 tokens in the mean. Captions count with the longest allowed."""
IMAGES = 4
"""Images measured at once, so that what does not grow with their number is spread as in a real batch."""
Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


# The fused kernel that fake tensors take, those of a CPU; torch knows the count of the GPUs' only.
FUSED_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class PartCost:
    """What one part of the forward pass costs for one image.

    Attributes:
        name: The part, in words.
        flops: Operations, forward.
        kept: Bytes kept for the backward pass.
    """

    name: str
    flops: float
    kept: float


@dataclass(frozen=True)
class ImageCost:
    """What one image, its caption and its regions cost.

    Attributes:
        parts: The forward pass.
        step_flops: Operations forward and backward, recomputation included.
        recomputed: Bytes that the backward pass makes anew and holds at a time, with activation checkpointing.
        embedding: Dimension of the shared space.
    """

    parts: tuple[PartCost, ...]
    step_flops: float
    recomputed: float
    embedding: int

    @property
    def forward_flops(self) -> float:
        """Operations of the forward pass."""
        return sum(part.flops for part in self.parts)

    @property
    def kept(self) -> float:
        """Bytes kept for the backward pass."""
        return sum(part.kept for part in self.parts)


def image_cost(config: PretrainConfig, build: Callable[[], ClocModel], *, fake: bool = True) -> ImageCost:
    """Measure the model of a preset.

    Args:
        config: The preset.
        build: Makes the model.
        fake: Whether tensors have no values; real ones give the same numbers, which a test makes use of.
    """
    with FakeTensorMode() if fake else nullcontext():
        with _default_dtype(torch.bfloat16 if config.run.precision == "bf16" else torch.float32):
            model = build().train()  # fake weights cannot be converted afterwards
        apply_parts(model, config.parts, config.optim)
        plain, total = _measure(model, config)
        if not config.run.activation_checkpointing:
            return ImageCost(plain, total, 0.0, model.config.projection_dim)
        model.activation_checkpointing_enable()
        parts, total = _measure(model, config)
    layers = {
        "image tower": model.config.vision_config.num_hidden_layers,
        "captions": model.config.text_config.num_hidden_layers,
    }
    at_once = max(part.kept / layers.get(part.name, 1) for part in plain if part.name != "region texts")
    return ImageCost(parts, total, at_once, model.config.projection_dim)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new weights of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _measure(model: ClocModel, config: PretrainConfig) -> tuple[tuple[PartCost, ...], float]:
    """Run forward, part by part, and backward."""
    parts: list[PartCost] = []
    outputs: list[torch.Tensor] = []
    with _keeping(model) as kept, FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter:
        for name, output in _forward(model, config):
            flops = counter.get_total_flops() - sum(part.flops for part in parts)
            parts.append(PartCost(name, flops, sum(kept.values()) - sum(part.kept for part in parts)))
            if output is not None and output.requires_grad:
                outputs.append(output.float().sum())
        if outputs:
            torch.stack(outputs).sum().backward()
        total = counter.get_total_flops()
    return tuple(PartCost(part.name, part.flops / IMAGES, part.kept / IMAGES) for part in parts), total / IMAGES


@contextmanager
def _keeping(model: ClocModel) -> Iterator[dict[int, int]]:
    """Collect the size of every storage that autograd keeps, parameters apart, by its identity."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)  # or its identity could be given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


def _forward(model: ClocModel, config: PretrainConfig) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Run the parts of `ClocModel.forward` on made-up inputs, one after the other.

    Not `forward` itself: it looks at values, of attention masks and of the images' numbers, and here are none.
    """
    vision, regions = model.config.vision_config, config.data.max_regions
    pixels = torch.zeros(IMAGES, 3, vision.image_size, vision.image_size)

    def ids(count: int, length: int) -> torch.Tensor:
        length = min(length, model.config.text_config.max_position_embeddings)
        return torch.full((count, length), 3, dtype=torch.long)

    model.patch_dropout = config.compute.patch_dropout
    image, centers = model.read_images(pixels, None, None)
    yield "image tower", image.pooler_output
    yield "captions", model.get_text_features(ids(IMAGES, config.tokenizer.max_length)).pooler_output
    if model.prompter is None and not config.objective.extra_captions:
        return
    phrases = model.get_text_features(ids(IMAGES * regions, PHRASE_TOKENS)).pooler_output
    yield "region texts", phrases
    if model.prompter is None:
        return
    prompter, boxes = model.prompter, torch.zeros(IMAGES * regions, 4)
    places = torch.arange(IMAGES * regions)
    if not isinstance(prompter, ClocPrompter):
        yield "RoI-Align", prompter.projection(prompter(image.last_hidden_state, boxes, places // regions))
        return
    table = PromptTable(places, places, None, (IMAGES, regions), full=True)
    side = prompter.read_images(image.last_hidden_state, centers)
    yield "Prompter, image", None
    yield "Prompter, boxes", prompter.projection(prompter(side, prompter.embed_boxes(boxes), table))
    if model.box_head is not None and config.objective.grounding_weight:
        yield "Prompter, phrases", model.box_head(prompter(side, prompter.embed_texts(phrases), table))
