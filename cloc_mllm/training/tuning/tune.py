"""The objective of alignment and instruction tuning.

    L = L_language + box_weight * L_box + text_box_weight * L_text_box + distill_weight * L_distill

`L_language` is the token mean over the whole optimiser step. With a grounding head, `L_box` is the distance of the box
that is read off the LLM's query at `<ground>`, `L_text_box` that of the box read off the phrase's text embedding, and
`L_distill = mean(1 - cos(query, text embedding))`; without one, only `L_language` is left.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from cloc_mllm.errors import ClocError
from cloc_mllm.models.chat_template import IGNORED
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.objectives import gather_with_grad, grounding_loss
from cloc_mllm.objectives.distributed import all_reduce_sum
from cloc_mllm.training.running.trainer import ClocTrainer
from cloc_mllm.training.tuning.language import EmbeddingNoise, prepare_packing, smooth_labels
from cloc_mllm.training.tuning.mllm import TuneConfig
from cloc_mllm.training.tuning.phrases import PhraseEmbedder

NOT_FOR_THE_MODEL = ("ground_boxes", "ground_phrases", "original_sizes")


class TuneTrainer(ClocTrainer):
    """Trains `ClocMllmForConditionalGeneration` on conversations."""

    # The language loss is divided by the supervised tokens of the whole step; the rest is scaled here as well.
    loss_is_scaled_for_ga = True
    noise: EmbeddingNoise | None = None

    def __init__(self, config: TuneConfig, *args: Any, phrases: PhraseEmbedder | None, **kwargs: Any) -> None:
        self.objective = config.objective
        self.phrases = phrases
        super().__init__(config, *args, **kwargs)
        if config.optim.neftune_alpha is not None:
            self.noise = EmbeddingNoise(self.model, config.optim.neftune_alpha)

    def loss_sees_whole_step(self) -> bool:
        """Return whether a step's loss stays the same however its samples are dealt out.

        The language loss does: it is a mean over the tokens of the step. Those of boxes are means over a micro-step.
        """
        weights = self.objective
        return self.model.config.grounding != "head" or not (
            weights.box_weight or weights.text_box_weight or weights.distill_weight
        )

    def losses(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the objective from one forward pass; see the module's docstring."""
        fed = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL}
        asked = None
        if self.phrases is not None:
            # Also where there are none: every process has to take the same way through the head.
            asked = fed["ground_queries"] = self.phrases(inputs["ground_phrases"])
        if num_items is not None:
            # With none in the whole step there is nothing to learn, and nothing to divide by.
            fed["num_items_in_batch"] = num_items = num_items.clamp(min=1)
        elif not bool((fed["labels"][..., 1:] != IGNORED).any()):
            fed["num_items_in_batch"] = torch.ones((), device=fed["labels"].device)
        noise = self.noise if model.training else None
        with nullcontext() if noise is None else noise.of(fed):
            output: Any = model(**fed)
        # A sum over tokens by the tokens of all processes, which DDP and ZeRO will divide by the processes once more.
        processes = self.world.size if num_items is not None else 1
        windows = self.current_gradient_accumulation_steps if num_items is not None else 1
        language = output.loss * processes
        mean = all_reduce_sum(output.loss) * windows if num_items is not None else output.loss
        if "ground_boxes" not in inputs or output.pred_boxes is None:
            return language, {"loss_lm": mean}
        extra, scalars = self._box_terms(output, inputs["ground_boxes"], asked)
        return language + extra / windows, {"loss_lm": mean, **scalars}

    def _box_terms(
        self, output: Any, boxes: torch.Tensor, asked: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted sum of the box terms: means over the `<ground>` tokens of all processes."""
        weights = self.objective
        box = grounding_loss(output.pred_boxes, boxes, kind="l1_giou")
        total, scalars = weights.box_weight * box, {"loss_box": box}
        if asked is None:
            return total, scalars
        text_box = grounding_loss(output.text_prompted_boxes, boxes, kind="l1_giou")
        distance = gather_with_grad(1 - (output.ground_embeds.float() * asked.float()).sum(dim=1))
        distill = distance.sum() / max(len(distance), 1)
        total = total + weights.text_box_weight * text_box + weights.distill_weight * distill
        return total, scalars | {"loss_text_box": text_box, "loss_distill": distill}


def prepare_model(model: ClocMllmForConditionalGeneration, config: TuneConfig) -> None:
    """Give the model the loss that the preset asks for, and make sure that it can be trained on packed rows.

    Args:
        model: The whole model, before its parts are applied.
        config: The preset.

    Raises:
        ClocError: The language model attends over the borders of packed conversations.
    """
    if config.objective.label_smoothing:
        smooth_labels(model, config.objective.label_smoothing)
    if config.data.packing:
        prepare_packing(model)


def phrase_embedder(config: TuneConfig, grounding: str, device: torch.device | str) -> PhraseEmbedder | None:
    """Return the embedder that the objective needs, or ``None`` where it needs none.

    Args:
        config: The preset.
        grounding: The model's own, which may come from a checkpoint.
        device: Where to compute.

    Returns:
        The embedder. It has to be built before `TrainingArguments`: after a stage-3 configuration every model that is
        loaded comes out partitioned.

    Raises:
        ClocError: It needs one, and `model.encoder` names no encoder.
    """
    weights = config.objective
    if grounding != "head" or not (weights.text_box_weight or weights.distill_weight):
        return None
    if config.model.encoder is None:
        raise ClocError(
            "the grounding head is taught by the phrases' text embeddings, but 'model.encoder' names no encoder",
            remedy="Set model.encoder to the encoder's export, or both weights in `objective` to 0.",
        )
    return PhraseEmbedder(config.model.encoder, device)
