"""Generation with regions in the prompt and boxes in the answer.

Images and regions are encoded once, before the first token, and ``forward`` is handed the result: as transformers does
it, with what that leaves out. Features of images may come from an earlier call, regions are read on them; every rank
encodes something under ZeRO-3; the pass that finds the boxes reuses the features. What the library does to them without
knowing of regions (expanding them for beams, cutting them for chunked prefill) is seen to here too.
"""

from __future__ import annotations

import inspect
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

        In place of ``pixel_values``, ``mm_encoder_outputs={"image": ...}`` takes what ``get_image_features`` returned
        for the same images; it is left as it is, and serves any number of calls.

        Raises:
            ValueError: If the prompt has regions and is to be prefilled in chunks: transformers would drop them.
        """
        kwargs = self.encode_inputs(kwargs)
        chunk = kwargs.get("prefill_chunk_size")
        for config in (generation_config, self.generation_config):
            chunk = chunk or getattr(config, "prefill_chunk_size", None)
        image = kwargs["mm_encoder_outputs"].get("image")
        if chunk and image is not None and image.region_features is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} cannot be used with the {len(image.region_features)} regions of this "
                "prompt: chunked prefill drops region features. Leave prefill_chunk_size out"
            )
        return super().generate(inputs, generation_config, **kwargs)

    @torch.no_grad()
    def encode_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Encode the images and regions among model inputs.

        Args:
            inputs: What the processor made, with ``pixel_values``, with ``mm_encoder_outputs`` in their place, or with
                neither; anything else besides.

        Returns:
            The same inputs with ``mm_encoder_outputs`` in place of all that they are made of.

        Raises:
            ValueError: If images are given both ways, or regions without an image.
        """
        base = self.base_model
        names = set(inspect.signature(base.get_image_features).parameters) - {"kwargs"}
        given = {name: value for name, value in inputs.items() if name in names and value is not None}
        rest = {name: value for name, value in inputs.items() if name not in names}
        regions = {name: value for name, value in given.items() if name.startswith("region_")}
        image = (rest.pop("mm_encoder_outputs", None) or {}).get("image")
        if image is not None and "pixel_values" in given:
            raise ValueError("give either pixel_values or mm_encoder_outputs, not both")
        if image is not None:
            image = self._with_regions(image, regions) if regions else image
        elif "pixel_values" in given:
            image = base.get_image_features(**given)
        elif regions.get("region_boxes") is not None and len(regions["region_boxes"]):
            raise ValueError(f"{len(regions['region_boxes'])} regions were given, but no image for them to be on")
        elif is_deepspeed_zero3_enabled():
            # Weights are gathered by all ranks together, in one order: whoever has no image encodes a blank one.
            pixels, sizes = base._blank_image(torch.zeros(0, dtype=base.dtype, device=base.device))
            base.get_image_features(pixels, image_sizes=sizes)
        return {**rest, "mm_encoder_outputs": {} if image is None else {"image": image}}

    def _with_regions(self, image: ClocMllmImageOutput, regions: dict[str, Any]) -> ClocMllmImageOutput:
        """Images that were encoded before, left as they are, with regions encoded on them."""
        output = ClocMllmImageOutput(**image)
        output.pooler_output, output.region_features = list(image.pooler_output), None
        # `_encode_regions` takes what `get_image_features` takes of regions, in the same order.
        parameters = inspect.signature(self.base_model.get_image_features).parameters
        names = [name for name in parameters if name.startswith("region_")]
        self.base_model._encode_regions(output, *(regions.get(name) for name in names))
        return output

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
        # Copied first: transformers writes into what it is given, and the caller may want to use it again.
        copies = {name: type(output)(**output) for name, output in mm_encoder_output.items()}
        expanded = super()._expand_multimodal_outputs(
            input_ids, copies, expand_size=expand_size, inputs_embeds=inputs_embeds
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
        if not is_deepspeed_zero3_enabled():
            # Once for both passes. Under ZeRO-3 each runs every part on every rank, which keeps the ranks in step.
            inputs = self.encode_inputs(inputs)
        generated = self.generate(**{**inputs, "return_dict_in_generate": False})
        names = {"mm_encoder_outputs", *inspect.signature(self.base_model.get_image_features).parameters}
        images = {name: value for name, value in inputs.items() if name in names}
        return self.ground_sequences(generated, inputs["input_ids"], inputs.get("attention_mask"), **images)

    @torch.no_grad()
    def ground_sequences(
        self,
        sequences: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **images: Any,
    ) -> ClocGroundedOutput:
        """Localise every ``<ground>`` that ``generate`` added to a prompt.

        Args:
            sequences: ``(B, T)`` what ``generate`` returned.
            input_ids: ``(B, P)`` the prompt.
            attention_mask: ``(B, P)`` of the prompt.
            **images: The prompt's images and regions, as ``forward`` takes them: raw, or as ``mm_encoder_outputs``.
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
            logits_to_keep=1,
            use_cache=False,
            predict_boxes=True,
            **images,
        )
        output.pred_boxes, output.ground_image_index = forward.pred_boxes[wanted], forward.ground_image_index[wanted]
        return output
