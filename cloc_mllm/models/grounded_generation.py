"""Generation with regions in the prompt and boxes in the answer.

transformers encodes the images once, before the first token, by calling ``get_image_features`` with those of the
arguments that its signature names, and hands ``forward`` the result. Regions ride along in that result. What the
library does to such results without knowing of regions (expanding them for beams, cutting them for chunked prefill) is
seen to here.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled

from .outputs_cloc_mllm import ClocGroundedOutput, ClocMllmImageOutput


class GroundedGenerationMixin(GenerationMixin):
    """``generate`` that keeps regions and sequences together, and ``generate_grounded``."""

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as every model of transformers does; regions and images may be among the keyword arguments.

        Raises:
            ValueError: If the prompt has regions and is to be prefilled in chunks: transformers would drop them.
        """
        chunk = kwargs.get("prefill_chunk_size")
        for config in (generation_config, self.generation_config):
            chunk = chunk or getattr(config, "prefill_chunk_size", None)
        regions = kwargs.get("region_boxes")
        if chunk and regions is not None and len(regions):
            raise ValueError(
                f"prefill_chunk_size={chunk} cannot be used with the {len(regions)} regions of this prompt: "
                "chunked prefill drops region features. Leave prefill_chunk_size out"
            )
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As every model's, without what belongs to the ``<ground>`` tokens of earlier turns: they need no boxes.

        ``inputs_embeds`` is named for ``generate`` to see that it may be given.
        """
        for name in ("ground_image_index", "ground_queries"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Repeat each row's regions with the row, for beams and several returned sequences."""
        expanded = super()._expand_multimodal_outputs(
            input_ids, mm_encoder_output, expand_size=expand_size, inputs_embeds=inputs_embeds
        )
        image = expanded.get("image")
        if image is None or getattr(image, "region_features", None) is None:
            return expanded
        mask = self.model.placeholder_mask(self.config.region_token_index, input_ids, inputs_embeds)
        rows = image.region_features.split(mask.sum(-1).tolist())
        regions = torch.cat([row for row in rows for _ in range(expand_size)])
        expanded["image"] = ClocMllmImageOutput(pooler_output=image.pooler_output, region_features=regions)
        return expanded

    @torch.no_grad()
    def generate_grounded(self, **inputs: Any) -> ClocGroundedOutput:
        """Generate, then localise every ``<ground>`` of the answers in one more forward pass.

        Args:
            **inputs: What the processor made and what ``generate`` takes. One sequence is returned for each row, and a
                ``streamer`` may be among them.

        Returns:
            A :class:`ClocGroundedOutput`; without a grounding head it has no boxes.

        Raises:
            ValueError: If more than one sequence is asked for each row, or there are no ``input_ids``.
        """
        config = inputs.get("generation_config") or self.generation_config
        if (inputs.get("num_return_sequences") or config.num_return_sequences or 1) > 1:
            raise ValueError("generate_grounded returns one sequence for each row: leave num_return_sequences out")
        if inputs.get("input_ids") is None:
            raise ValueError("generate_grounded needs input_ids: they say where the images and the answers are")
        generated = self.generate(**{**inputs, "return_dict_in_generate": False})
        names = ("attention_mask", "pixel_values", "image_sizes", "region_boxes", "region_image_index", "region_points")
        return self.ground_sequences(generated, inputs["input_ids"], **{name: inputs.get(name) for name in names})

    @torch.no_grad()
    def ground_sequences(
        self,
        sequences: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_image_index: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        region_points: torch.Tensor | None = None,
    ) -> ClocGroundedOutput:
        """Localise every ``<ground>`` that ``generate`` added to a prompt.

        Args:
            sequences: ``(B, T)`` what ``generate`` returned.
            input_ids: ``(B, P)`` the prompt.
            attention_mask: ``(B, P)`` of the prompt.
            pixel_values: ``(I, 3, H, W)`` of the prompt.
            region_boxes: ``(R, 4)`` of the prompt.
            region_image_index: ``(R,)`` of the prompt.
            image_sizes: ``(I, 2)`` of the prompt, where its images are cut into tiles.
            region_points: ``(R, P, 2)`` of the prompt.
        """
        prompt_length = input_ids.shape[1]
        output = ClocGroundedOutput(sequences=sequences, prompt_length=prompt_length)
        if self.config.grounding != "head":
            return output
        at = sequences == self.config.ground_token_index
        is_answer = torch.arange(sequences.shape[1], device=sequences.device) >= prompt_length
        rows = at.nonzero()[:, 0]
        wanted = is_answer.expand_as(at)[at]
        output.ground_row = rows[wanted]
        if not bool(wanted.any()) and not is_deepspeed_zero3_enabled():
            output.pred_boxes = torch.zeros(0, 4, device=sequences.device)
            output.ground_image_index = torch.zeros(0, dtype=torch.long, device=sequences.device)
            return output
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - prompt_length)], dim=1)
        forward = self(
            input_ids=sequences,
            attention_mask=mask,
            # As while generating: positions count from the first real token, whatever the padding on the left.
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            region_boxes=region_boxes,
            region_image_index=region_image_index,
            region_points=region_points,
            logits_to_keep=1,
            use_cache=False,
        )
        output.pred_boxes, output.ground_image_index = forward.pred_boxes[wanted], forward.ground_image_index[wanted]
        return output
