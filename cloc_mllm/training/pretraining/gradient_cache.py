"""Contrastive batches larger than memory: the loss sees all micro-batches of a step, the graph one at a time.

A contrastive loss does not add up over micro-batches: halves of a batch have half of its negatives. So the step is done
in two passes. The first embeds every micro-batch without a graph; the loss of them all together is differentiated with
respect to the embeddings only, which are small. The second embeds each micro-batch once more, with a graph, and sends
its share of those gradients through it. Values and gradients are those of the whole batch at once, for one forward pass
more.
Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from cloc_mllm.models.modeling_cloc import ClocOutput

ROWS = ("image_embeds", "text_embeds", "region_embeds", "region_text_embeds", "pred_boxes")
"""Fields of the output that have a row for each image, text or region; the others are one number each."""
PER_ROW_INPUTS = ("has_regions", "region_valid", "region_unique", "input_boxes")

Inputs = Mapping[str, Any]
Objective = Callable[[ClocOutput, Inputs], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Replay:
    """What the second pass needs to know of one micro-batch.

    Attributes:
        gradients: The loss's gradient with respect to each field of the micro-batch's output.
        random_state: The generators' states before its first pass: masks drawn by dropout must come out the same.
        loss: The whole step's loss.
        scalars: The whole step's figures to log.
    """

    gradients: dict[str, torch.Tensor]
    random_state: list[torch.Tensor]
    loss: torch.Tensor
    scalars: dict[str, torch.Tensor]

    def surrogate(self, output: ClocOutput, micro_batches: int) -> torch.Tensor:
        """Return a scalar with the step's loss for a value, whose gradient is this micro-batch's share of the step's.

        Args:
            output: Of the second pass.
            micro_batches: How many there are; the trainer divides by it.
        """
        products = [(getattr(output, name).float() * gradient).sum() for name, gradient in self.gradients.items()]
        share = micro_batches * torch.stack(products).sum()
        return share + (self.loss - share).detach()


def plan_replays(
    embed: Callable[[Inputs], ClocOutput], micro_batches: Sequence[Inputs], objective: Objective
) -> list[Replay]:
    """Do the first pass.

    Args:
        embed: Runs the model on a micro-batch; called without gradient.
        micro_batches: Those of one step on this process.
        objective: Takes an output and the inputs it is of (those that it looks at), gives the loss and figures to log.

    Returns:
        What the second pass needs, micro-batch by micro-batch.
    """
    outputs, states = [], []
    for inputs in micro_batches:
        states.append(random_state())
        with torch.no_grad():
            outputs.append(embed(inputs))
    joined, leaves = _join_outputs(outputs)
    with torch.enable_grad():
        loss, scalars = objective(joined, join_inputs(micro_batches))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    loss, scalars = loss.detach(), {name: value.detach() for name, value in scalars.items()}
    dealt = _split(gradients, outputs)
    return [
        Replay({name: parts[k] for name, parts in dealt.items()}, state, loss, scalars)
        for k, state in enumerate(states)
    ]


def join_inputs(micro_batches: Sequence[Inputs]) -> dict[str, Any]:
    """Return the inputs that the objective looks at as those of one batch."""
    joined = {
        key: torch.cat([inputs[key] for inputs in micro_batches]) for key in PER_ROW_INPUTS if key in micro_batches[0]
    }
    if "box_image_index" in micro_batches[0]:
        images = [len(inputs["pixel_values"]) for inputs in micro_batches]
        starts = [sum(images[:k]) for k in range(len(images))]
        joined["box_image_index"] = torch.cat(
            [inputs["box_image_index"] + start for inputs, start in zip(micro_batches, starts, strict=True)]
        )
    return joined


def random_state() -> list[torch.Tensor]:
    """Return the states of the generators that a forward pass may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def restore_random_state(states: Sequence[torch.Tensor]) -> None:
    """Set the generators back; call it under `torch.random.fork_rng`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _join_outputs(outputs: Sequence[ClocOutput]) -> tuple[ClocOutput, dict[str, torch.Tensor]]:
    """Return one output of all rows, and its fields as the leaves to differentiate with respect to."""
    leaves = {}
    for field in fields(ClocOutput):
        values = [getattr(output, field.name) for output in outputs]
        if values[0] is not None:
            whole = torch.cat(values) if field.name in ROWS else values[0]
            leaves[field.name] = whole.detach().requires_grad_()
    return ClocOutput(**leaves), leaves


def _split(gradients: Mapping[str, torch.Tensor], outputs: Sequence[ClocOutput]) -> dict[str, Sequence[torch.Tensor]]:
    """Deal the gradients out to the micro-batches: rows to their own, an equal part of each number's to all."""
    dealt: dict[str, Sequence[torch.Tensor]] = {}
    for name, gradient in gradients.items():
        if name in ROWS:
            dealt[name] = gradient.split([len(getattr(output, name)) for output in outputs])
        else:
            dealt[name] = [gradient / len(outputs)] * len(outputs)
    return dealt
