"""The objective of CLOC pre-training, and of the CLIP baselines it is compared with.

    L = L_clip + lambda * (L_region + grounding_weight * L_grounding),    lambda = region_weight * share

where `share` is the share of the global batch's images that have regions. Without a Prompter only L_clip is left: plain
CLIP. With `extra_captions` CLIP also sees every region text, as one more caption of the whole image.
Source: Chen et al., "Contrastive Localized Language-Image Pre-Training" (arXiv 2410.02746), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cloc_mllm.objectives import (
    grounding_loss,
    region_share,
    region_text_loss,
    region_text_sigmoid_loss,
    share_filtered,
)
from cloc_mllm.objectives.distributed import all_reduce_sum
from cloc_mllm.training.presets.config import PretrainConfig
from cloc_mllm.training.presets.parts import TEMPERATURES
from cloc_mllm.training.pretraining.compute import apply_compute
from cloc_mllm.training.pretraining.gradient_cache import Replay, plan_replays, restore_random_state
from cloc_mllm.training.pretraining.validation import (
    NumberingCollator,
    Rows,
    rank_within_image,
    validation_figures,
    validation_rows,
)
from cloc_mllm.training.pretraining.zero_shot import ZeroShot
from cloc_mllm.training.running import finite
from cloc_mllm.training.running.steady import describe_loss
from cloc_mllm.training.running.trainer import ClocTrainer

MODEL_INPUTS = (
    "pixel_values",
    "input_ids",
    "attention_mask",
    "input_boxes",
    "box_image_index",
    "region_input_ids",
    "region_attention_mask",
    "region_text_index",
)


class PretrainTrainer(ClocTrainer):
    """Trains `ClocModel` on region-text data."""

    # Without the gradient cache the losses are means over one micro-step, so accumulation has to average them; with it
    # every micro-step is given the loss of the whole step.
    loss_is_scaled_for_ga = False

    def __init__(self, config: PretrainConfig, *args: Any, model: Any, **kwargs: Any) -> None:
        self.objective = config.objective
        self.max_regions = config.data.max_regions
        # CLIP's bounds: multipliers from 1 to the cap.
        self.clamped_parts = tuple((part, 0.0, model.config.logit_scale_max) for part in TEMPERATURES)
        self._validated: list[Rows] = []
        self._replays: list[Replay] = []
        apply_compute(model, config.compute)
        if "data_collator" in kwargs:
            kwargs["data_collator"] = NumberingCollator(kwargs["data_collator"])
        super().__init__(config, *args, model=model, **kwargs)
        options = config.data.zero_shot
        at_once = self.args.per_device_eval_batch_size
        self._zero_shot = None if options is None else ZeroShot(options, self.processor, self.world, at_once)

    def loss_sees_whole_step(self) -> bool:
        """Return whether a step's loss stays the same however its samples are dealt out: with the gradient cache."""
        return self.objective.grad_cache

    def losses(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the objective; see the module's docstring."""
        if model.training and self._replays:
            return self._replayed(model, inputs)
        output = _embed(model, inputs)
        if not model.training:
            self._validated.append(validation_rows(output, inputs))
            return self.objective_of(output, inputs)
        return self._checked_objective(output, inputs, [inputs])

    def _checked_objective(
        self, output: Any, inputs: Mapping[str, Any], batches: Sequence[Mapping[str, Any]]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the objective; where it is not finite, stop and name the samples whose embeddings are not.

        The loss is over the batches of all processes, so all stop here, and one sample may have spoilt it for all.
        """
        loss, scalars = self.objective_of(output, inputs, figures=self.logs_this_step())
        if not bool(torch.isfinite(loss)):
            own = self.own_samples(len(batches))()
            broken = finite.gather_names([own[row] for row in finite.broken_images(output, inputs)])
            what = describe_loss(loss, scalars)
            # Embeddings that are finite, and a loss that is not: any sample may be the one.
            self.stop_not_finite(what, batches, own, finite.listed(broken or finite.gather_names(own)), shared=True)
        return loss, scalars

    def objective_of(
        self, output: Any, inputs: Mapping[str, Any], *, figures: bool = True
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the objective from the model's output.

        Args:
            output: A `ClocOutput`.
            inputs: What it is of; of a whole step's micro-batches together, if the step is done in two passes.
            figures: Whether to compute what only the log wants too.

        Returns:
            The loss and the figures to log.
        """
        image_text = self._contrast(output.image_embeds, output.text_embeds, output.logit_scale, output.logit_bias)
        scalars = {"loss_clip": image_text, "scale": output.logit_scale}
        if "has_regions" not in inputs:
            return image_text, scalars
        weight = self.objective.region_weight * region_share(inputs["has_regions"])
        if self.objective.extra_captions:
            region = self._extra_caption_loss(output, inputs)
            return image_text + weight * region, scalars | {"loss_region": region, "lambda": weight}
        region, more = self._region_terms(output, inputs, figures)
        return image_text + weight * region, scalars | more | {"lambda": weight}

    def _region_terms(
        self, output: Any, inputs: Mapping[str, Any], figures: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return L_region + grounding_weight * L_grounding."""
        valid = inputs["region_valid"]
        texts = output.region_text_embeds[valid]
        threshold = self.objective.filter_threshold
        region = self._contrast(
            output.region_embeds[valid], texts, output.region_logit_scale, output.region_logit_bias, threshold
        )
        scalars = {"loss_region": region, "scale_region": output.region_logit_scale}
        if threshold is not None and figures:
            scalars["filtered"] = share_filtered(texts, threshold, tile_size=self.objective.tile_size)
        if output.pred_boxes is None or self.objective.grounding_weight == 0:
            return region, scalars
        # A phrase that fits two regions of its image has no one box.
        named = valid & inputs["region_unique"]
        ground = grounding_loss(
            output.pred_boxes[named], inputs["input_boxes"][named], kind=self.objective.grounding_loss
        )
        return region + self.objective.grounding_weight * ground, scalars | {"loss_grounding": ground}

    def _extra_caption_loss(self, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Contrast whole images with one of their region texts each, once a region that an image may have.

        Two regions of one image never meet in a draw: their common image would be the other's negative. The mean is
        over draws, weighted by how many images take part.
        """
        images, valid = inputs["box_image_index"], inputs["region_valid"]
        draw = rank_within_image(images)
        total, rows = output.image_embeds.sum() * 0.0, torch.zeros((), device=images.device)
        for number in range(self.max_regions):
            chosen = valid & (draw == number)
            count = all_reduce_sum(chosen.sum().float())
            loss = self._contrast(
                output.image_embeds[images[chosen]],
                output.region_text_embeds[chosen],
                output.logit_scale,
                output.logit_bias,
                self.objective.filter_threshold,
            )
            total, rows = total + count * loss, rows + count
        return total / rows.clamp(min=1)

    def _contrast(
        self,
        rows: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        threshold: float | None = None,
    ) -> torch.Tensor:
        """Contrast images or regions with their texts as the preset says; without a threshold nothing is filtered."""
        form: dict[str, Any] = {"impl": self.objective.loss_impl, "tile_size": self.objective.tile_size}
        if self.objective.contrast == "softmax":
            return region_text_loss(rows, texts, scale, threshold, **form)
        assert bias is not None  # `PretrainConfig` has seen to it
        return region_text_sigmoid_loss(rows, texts, scale, bias, threshold, **form)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch a step's micro-batches, and contrast them with each other if there are several."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if len(batches) > 1 and self.objective.grad_cache:
            self.note("first pass")
            model = self.model_wrapped
            model.train()  # DeepSpeed's engine returns nothing from it
            with self.compute_loss_context_manager():
                # One micro-batch at a time is moved to the device: a step's pictures need not fit there together.
                self._replays = plan_replays(
                    lambda inputs: _embed(model, self._prepare_inputs(dict(inputs))),
                    batches,
                    lambda output, inputs: self._checked_objective(output, self._prepare_inputs(dict(inputs)), batches),
                )
        return batches, items

    def _replayed(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Do the second pass of the next micro-batch."""
        replay = self._replays.pop(0)
        with torch.random.fork_rng():
            restore_random_state(replay.random_state)
            output = _embed(model, inputs)
        return replay.surrogate(output, self.current_gradient_accumulation_steps), replay.scalars

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add retrieval, recognition and localisation over the validation samples, and zero-shot classification."""
        self._validated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        figures = validation_figures(self._validated)
        self._validated.clear()
        if self._zero_shot is not None:
            figures |= self._zero_shot(self._embed_alone)
        output.metrics.update({f"eval_{name}": value for name, value in figures.items()})
        return output

    def _embed_alone(self, inputs: dict[str, Any]) -> Any:
        """Run the model, in evaluation mode, on a batch that is not of the validation samples."""
        assert self.model is not None
        with torch.no_grad(), self.compute_loss_context_manager():
            return _embed(self.model.eval(), self._prepare_inputs(inputs))


def _embed(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run the model on a batch."""
    return model(**{key: inputs[key] for key in MODEL_INPUTS if key in inputs})
