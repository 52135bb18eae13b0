"""Boxes out: the hidden state at a ``<ground>`` token asks, the localisation head answers.

The hidden state is projected to the space that CLOC's images, regions and texts share, and prompts a Prompter of the
head's own as the text embedding of a phrase would; a BoxHead reads the box. So the head can be trained, and used, with
text embeddings as well, and the language model's query can be pulled towards the text embedding of its phrase.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from .configuration_cloc import ClocPrompterConfig
from .prompter import BoxHead, ClocPrompter


class PhraseLocalizer(ClocPrompter):
    """The CLOC Prompter, prompted by phrases only, read out before its projection."""

    def __init__(self, config: ClocPrompterConfig) -> None:
        super().__init__(config)
        del self.projection  # the BoxHead reads features
        if not config.image_positions:
            del self.coordinates  # boxes are the region encoder's business

    def forward(  # type: ignore[override]  # takes phrases where the parent takes their prompt tokens
        self,
        image_tokens: torch.Tensor,
        text_embeds: torch.Tensor,
        image_index: torch.Tensor,
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(I, N, hidden_size)`` tokens and ``(G, projection_dim)`` phrases to ``(G, hidden_size)`` features.

        ``offsets`` ``(G, hidden_size)`` are added to the phrases' prompt tokens.
        """
        prompts = self.embed_texts(text_embeds)
        return super().forward(image_tokens, prompts if offsets is None else prompts + offsets[:, None], image_index)


class ClocGroundingHead(nn.Module):
    """Hidden state at ``<ground>`` to a box.

    Args:
        config: The Prompter and the BoxHead.
        query_size: Width of the language model.
        boxes_per_phrase: Most boxes of one phrase that are told apart.

    Where a phrase has several boxes, its text embedding is the same for all, and the queries are pulled towards it.
    What tells them apart is ``ordinals``: an embedding of the place in the row, added to the localiser's prompt. They
    start at zero and the first box has none, so that a head that knew one box a phrase answers as it did.

    The inner Prompter is called ``localizer``: adapters pick modules by the end of their name, and ``prompter`` is
    the one that reads regions.
    """

    def __init__(self, config: ClocPrompterConfig, query_size: int, boxes_per_phrase: int = 1) -> None:
        super().__init__()
        self.config = config
        self.query_projection = nn.Linear(query_size, config.projection_dim)
        self.localizer = PhraseLocalizer(config)
        self.box_head = BoxHead(config)
        self.ordinals: nn.Parameter | None = None
        if boxes_per_phrase > 1:
            self.ordinals = nn.Parameter(torch.zeros(boxes_per_phrase - 1, config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_tokens: torch.Tensor,
        image_index: torch.Tensor,
        queries: torch.Tensor | None = None,
        ordinals: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Localise.

        All queries go through the Prompter and the BoxHead together: each is called once, whatever the batch holds,
        which is what ZeRO-3 needs to stay in step over the ranks.

        Args:
            hidden_states: ``(G, query_size)`` final hidden states at the ``<ground>`` tokens.
            image_tokens: ``(I, N, hidden_size)`` the tower's ``last_hidden_state``.
            image_index: ``(G,)`` the image each ``<ground>`` is about.
            queries: ``(G, projection_dim)`` text embeddings of the same phrases, or ``None``.
            ordinals: ``(G,)`` which box of its phrase each asks for, from 0; those beyond the last that is known ask
                for that one. Default: the first.

        Returns:
            The projected queries ``(G, projection_dim)``, float32 and L2-normalised; their boxes ``(G, 4)``, float32
            xyxy, normalised, model frame; and the boxes the text embeddings give, ``(G, 4)`` or ``None``.
        """
        asked = functional.normalize(self.query_projection(hidden_states).float(), dim=-1)
        embeds, index, offsets = asked, image_index, self._offsets(asked, ordinals)
        if queries is not None:
            embeds, index = torch.cat([asked, queries.to(asked.dtype)]), torch.cat([image_index, image_index])
            offsets = None if offsets is None else torch.cat([offsets, offsets])
        boxes = self.box_head(self.localizer(image_tokens, embeds, index, offsets))
        count = len(asked)
        return asked, boxes[:count], boxes[count:] if queries is not None else None

    def _offsets(self, asked: torch.Tensor, ordinals: torch.Tensor | None) -> torch.Tensor | None:
        """``(G, hidden_size)`` what is added to the prompts; made of the weights even where all of it is zero."""
        if self.ordinals is None:
            return None
        if ordinals is None:
            ordinals = torch.zeros(len(asked), dtype=torch.long, device=asked.device)
        table = torch.cat([torch.zeros_like(self.ordinals[:1]), self.ordinals])
        return table[ordinals.clamp(max=len(self.ordinals))]


def places_in_run(at: torch.Tensor) -> torch.Tensor:
    """For each marked place of a row, how many marked ones come right before it.

    Args:
        at: ``(B, T)`` bool.

    Returns:
        ``(B, T)``: 0 for the first of a run of marked places, then 1, 2, ...; of no meaning elsewhere.
    """
    numbers = torch.arange(at.shape[1], device=at.device).expand_as(at)
    last_gap = numbers.masked_fill(at, -1).cummax(dim=1).values
    return (numbers - last_gap - 1).clamp(min=0)


def image_before(is_image: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """For every token, the last image that its row shows before it.

    Args:
        is_image: ``(B, T)`` where ``<image>`` placeholders stand.
        counts: How many of them each image takes, in their order; they may differ.

    Returns:
        ``(B, T)`` images counted over the batch; -1 where there is none.
    """
    before, in_row = is_image.cumsum(-1), is_image.sum(-1)
    in_earlier_rows = (in_row.cumsum(0) - in_row)[:, None]
    ends = torch.tensor(counts, dtype=torch.long, device=is_image.device).cumsum(0)
    index = torch.searchsorted(ends, in_earlier_rows + before, right=True) - 1
    return torch.where(before > 0, index, -1)
