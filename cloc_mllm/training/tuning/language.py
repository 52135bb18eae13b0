"""What tuning does to the language model's side of a step: noise on its embeddings, a smoothed loss, packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cloc_mllm.errors import ClocError
from cloc_mllm.models.chat_template import IGNORED
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from cloc_mllm.models.packed_attention import BLOCKS, packed_inputs
from cloc_mllm.models.packing import sequence_numbers


class EmbeddingNoise:
    """NEFTune (Jain et al., arXiv 2310.05914): uniform noise on the embeddings of text while training.

    A conversation of L text tokens in width d gets noise from [-1, 1] times `alpha / sqrt(L d)`. Text tokens are those
    that are neither padding nor the places of image and region features, which stay as they are; L counts them alone.
    The embeddings are met by a hook, so adapters on them and partitioned weights (ZeRO-3) make no difference.

    Args:
        model: The MLLM, adapters included.
        alpha: Strength; the paper uses 5 to 15.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self._placeholders = (model.config.image_token_index, model.config.region_token_index)
        self._width = int(model.config.text_config.hidden_size)
        self._scale: torch.Tensor | None = None
        model.get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def of(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Add noise to the embeddings of a batch while the model runs on it.

        Args:
            inputs: The batch: `input_ids` (B, T) with `attention_mask`, or packed with `position_ids`.
        """
        self._scale = self.scale(inputs)
        try:
            yield
        finally:
            self._scale = None

    def scale(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the largest noise of each token, (B, T); 0 where there is to be none."""
        ids = inputs["input_ids"]
        is_text = torch.ones_like(ids, dtype=torch.bool)
        for token in self._placeholders:
            is_text &= ids != token
        numbers = torch.zeros_like(ids)
        if "attention_mask" in inputs:
            is_text &= inputs["attention_mask"].bool()
        elif "position_ids" in inputs:
            numbers = sequence_numbers(inputs["position_ids"])
        counts = torch.zeros_like(ids).scatter_add_(1, numbers, is_text.long())
        lengths = counts.gather(1, numbers).clamp(min=1)
        return is_text * self.alpha / (lengths * self._width).sqrt()

    def _add(self, _: nn.Module, arguments: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor:
        if self._scale is None or not arguments or arguments[0].shape != self._scale.shape:
            return embedded
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * self._scale[..., None].to(embedded)


def smooth_labels(model: ClocMllmForConditionalGeneration, amount: float) -> None:
    """Let a model's language loss smooth its labels while it is trained; validation stays as it is.

    Args:
        model: The MLLM.
        amount: Share of each target that is spread over the whole vocabulary.
    """
    plain = model.loss_function

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        if not model.training:
            return plain(logits, labels, vocab_size=vocab_size, **kwargs)
        return smoothed_loss(logits, labels, vocab_size, amount, kwargs.get("num_items_in_batch"))

    model.loss_function = loss


def smoothed_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    amount: float,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the language loss with smoothed labels, over supervised tokens alone.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)``; each is predicted from the token before it. -100 where nothing is learnt.
        vocab_size: ``V``.
        amount: Share of each target that is spread over the whole vocabulary.
        num_items: Supervised tokens of the whole step, to divide the sum by; ``None``: the mean of this batch.
    """
    targets = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1).to(logits.device)
    loss = functional.cross_entropy(
        logits.float().view(-1, vocab_size),
        targets,
        ignore_index=IGNORED,
        label_smoothing=amount,
        reduction="mean" if num_items is None else "sum",
    )
    return loss if num_items is None else loss / num_items


def prepare_packing(model: ClocMllmForConditionalGeneration) -> None:
    """Let a language model attend block by block where it can, and make sure that blocks do not see each other.

    A language model that keeps a state, or makes masks of its own, would mix its neighbours in silence, so it is tried.

    Args:
        model: The whole model, weights in place; its attention may be changed.

    Raises:
        ClocError: The answer to a short text depends on its neighbour.
    """
    llm = model.model.language_model
    if llm.config._attn_implementation == "sdpa":
        llm.set_attn_implementation(BLOCKS)
        if _neighbours_difference(model) <= _SAME:
            return
        llm.set_attn_implementation("sdpa")
    if not _neighbours_difference(model) <= _SAME:
        raise ClocError(
            f"'data.packing': {type(llm).__name__} lets packed conversations see each other, or takes no packed rows",
            remedy="Set data.packing=false; data.grouping=length spares padding too.",
        )


_SAME = 1e-2
"""Relative difference of hidden states that is rounding, also in bf16; a neighbour in sight makes a larger one."""


@torch.no_grad()
def _neighbours_difference(model: ClocMllmForConditionalGeneration) -> float:
    """How much a short text's hidden states differ behind another text in its row; infinite if it cannot be there."""
    embed, llm, device = model.get_input_embeddings(), model.model.language_model, model.device
    ids = torch.arange(12, device=device)[None] % model.config.text_config.vocab_size
    positions = torch.arange(12, device=device)[None] % 6
    was_training = llm.training
    llm.eval()
    try:
        packed = packed_inputs(llm, positions)
        together = llm(inputs_embeds=embed(ids), position_ids=positions, **packed).last_hidden_state
        alone = llm(inputs_embeds=embed(ids[:, 6:]), use_cache=False).last_hidden_state
    except (TypeError, ValueError):
        return float("inf")
    finally:
        llm.train(was_training)
    difference, scale = (together[:, 6:] - alone).float().abs().max(), alone.float().abs().max().clamp(min=1e-6)
    return float(difference / scale)
