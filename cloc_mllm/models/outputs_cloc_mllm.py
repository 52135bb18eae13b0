"""What the MLLM returns: LLaVA's outputs and, beside them, regions and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class ClocMllmImageOutput(BaseModelOutputWithPooling):
    """What encoding the images, and the regions on them, gives.

    ``last_hidden_state`` ``(I, N, width)`` are the tower's tokens and ``pooler_output`` a list of ``(n, hidden_size)``
    projected features, one entry an image, as LLaVA's. Where images are cut into tiles, ``last_hidden_state`` is of
    their overviews alone, n differs between images, and ``hidden_states`` and ``attentions`` have a row for each tile.

    Attributes:
        region_features: ``(R * num_region_tokens, hidden_size)`` of the regions, in their order, those of one region
            behind each other; ``None`` without regions.
    """

    region_features: torch.Tensor | None = None


@dataclass
class ClocMllmModelOutputWithPast(LlavaModelOutputWithPast):
    """LLaVA's output and the boxes; see :class:`ClocMllmCausalLMOutputWithPast`."""

    pred_boxes: torch.Tensor | None = None
    ground_embeds: torch.Tensor | None = None
    text_prompted_boxes: torch.Tensor | None = None
    ground_image_index: torch.Tensor | None = None


@dataclass
class ClocMllmCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """LLaVA's output and the boxes.

    ``loss`` is the language model's alone; the losses on boxes and queries are the trainer's, from these.

    Attributes:
        pred_boxes: ``(G, 4)`` float32 xyxy, normalised, model frame: one for each ``<ground>``, row by row. NaN where
            no image stands before it (evaluation only). ``None`` without a grounding head.
        ground_embeds: ``(G, D)`` float32, L2-normalised: what each ``<ground>`` asked for, in CLOC's shared space.
        text_prompted_boxes: ``(G, 4)`` what the head answers to the ``ground_queries``, if they were given.
        ground_image_index: ``(G,)`` the image each box is on; -1 where there is none.
    """

    pred_boxes: torch.Tensor | None = None
    ground_embeds: torch.Tensor | None = None
    text_prompted_boxes: torch.Tensor | None = None
    ground_image_index: torch.Tensor | None = None


@dataclass
class ClocGroundedOutput(ModelOutput):
    """Finished sequences and a box for each ``<ground>`` that was generated.

    Attributes:
        sequences: ``(B, T)`` prompts and answers.
        prompt_length: How many tokens of each row are the prompt.
        pred_boxes: ``(G, 4)`` float32 xyxy, normalised, model frame, row by row; NaN where there is no image.
        ground_row: ``(G,)`` the row of ``sequences`` each box belongs to.
        ground_image_index: ``(G,)`` the image of the batch each box is on; -1 where there is none.
    """

    sequences: torch.Tensor | None = None
    prompt_length: int | None = None
    pred_boxes: torch.Tensor | None = None
    ground_row: torch.Tensor | None = None
    ground_image_index: torch.Tensor | None = None
