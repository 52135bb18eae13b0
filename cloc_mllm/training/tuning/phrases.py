"""Text embeddings of phrases, by the frozen text side of the encoder.

The grounding head is taught by them twice: it must find the box when it is asked with the embedding itself, and the
LLM's query at `<ground>` must come out close to it. The text tower stays outside the model that is trained: it is never
sharded, saved or exported with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from cloc_mllm.training.pretraining.encoder import load_any_encoder


class PhraseEmbedder:
    """Embeds phrases, the distinct ones of a batch together.

    Nothing is kept from batch to batch: beside other texts the same phrase differs in the last bits, and a run that is
    resumed would no longer be the run that was not.

    Args:
        path: The encoder's export folder.
        device: Where to compute.

    Raises:
        ClocError: There is no encoder at `path`.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        encoder, self._processor = load_any_encoder(path)
        self._text_model = encoder.text_model.to(device).eval().requires_grad_(False)
        self._projection = encoder.text_projection.to(device).eval().requires_grad_(False)
        self._width = encoder.config.projection_dim
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, phrases: Sequence[str]) -> torch.Tensor:
        """Return ``(G, D)`` fp32 embeddings, L2-normalised, in the order of the phrases; ``(0, D)`` for none."""
        if not phrases:
            return torch.zeros(0, self._width, device=self._device)
        distinct = sorted(set(phrases))
        tokens = {key: value.to(self._device) for key, value in self._processor.tokenize(distinct).items()}
        pooled = self._projection(self._text_model(**tokens).pooler_output)
        place = {phrase: k for k, phrase in enumerate(distinct)}
        return functional.normalize(pooled.float(), dim=-1)[[place[phrase] for phrase in phrases]]
