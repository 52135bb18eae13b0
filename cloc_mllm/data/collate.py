"""Batches: region-text samples for the encoder, conversations for the language model.

Boxes enter in pixels of the original image and leave, through the processor's geometry, normalised to the model frame
in fp32. Every batch drives every module: where no image has a region, one dummy region keeps the Prompter and the text
tower in step with the other ranks, marked as not valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cloc_mllm.data.dataset import SkipCount
from cloc_mllm.errors import ClocError
from cloc_mllm.models.chat_template import IGNORED
from cloc_mllm.models.conversation_cloc_mllm import ConversationError

Batch = dict[str, Any]


def _named(samples: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(sample.get("sample", sample.get("id", "?"))) for sample in samples)


class RegionTextCollator:
    """Turns items of `RegionTextDataset` into a batch for `ClocModel` and its losses.

    Args:
        processor: A `ClocProcessor`.
        regions: Whether the batch carries regions (CLOC) or images and captions only (CLIP).

    A batch of B images holds `pixel_values` (B, 3, H, W), `input_ids` and `attention_mask` (B, L) of the captions; with
    regions also `input_boxes` (R, 4) fp32 in [0, 1] of the model frame, `box_image_index` (R,), `region_input_ids` and
    `region_attention_mask` (U, Lr) of the distinct texts, `region_text_index` (R,) into them, `region_valid` (R,),
    `region_unique` (R,) (the text names this region of its image alone), and `has_regions` (B,). R is at least 1.
    """

    def __init__(self, processor: Any, regions: bool = True) -> None:
        self.processor = processor
        self.regions = regions

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """The batch of some items.

        Raises:
            ClocError: The processor refuses a sample; the message names the batch's samples.
        """
        boxes = [[region["box"] for region in sample["regions"]] for sample in samples]
        try:
            batch = dict(
                self.processor(
                    images=[sample["image"] for sample in samples],
                    text=[sample["caption"] for sample in samples],
                    input_boxes=boxes if self.regions else None,
                    return_tensors="pt",
                )
            )
        except ValueError as error:
            raise ClocError(str(error), sample=_named(samples), remedy="Run `cloc-mllm data check`.") from error
        return batch | self._region_part(samples, batch) if self.regions else batch

    def _region_part(self, samples: Sequence[dict[str, Any]], batch: Batch) -> Batch:
        regions = [region for sample in samples for region in sample["regions"]]
        extra: Batch = {"has_regions": torch.tensor([bool(sample["regions"]) for sample in samples])}
        if regions:
            valid, unique = [True] * len(regions), [bool(region["unique"]) for region in regions]
            texts = [str(region["text"]) for region in regions]
        else:
            extra["input_boxes"] = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
            extra["box_image_index"] = torch.zeros(1, dtype=torch.long)
            valid, unique, texts = [False], [False], [samples[0]["caption"]]
        distinct = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        encoded = self.processor(text=list(distinct), return_tensors="pt")
        return extra | {
            "region_input_ids": encoded["input_ids"],
            "region_attention_mask": encoded["attention_mask"],
            "region_text_index": torch.tensor([distinct[text] for text in texts]),
            "region_valid": torch.tensor(valid),
            "region_unique": torch.tensor(unique),
        }


class ConversationCollator:
    """Turns items of `ConversationDataset` into a training batch for the MLLM.

    Args:
        processor: A `ClocMllmProcessor`; ids and labels are built together in its `encode`.
        max_length: Longest sequence in tokens; longer ones lose whole exchanges, as `encode` says. None for no limit.
        packing: Whether several conversations share a row, each in a block of its own.
        pack_length: Most tokens of a packed row; None: `max_length`, or the longest conversation's.
        chat_template: In the place of the processor's own.
        skips: Conversations that the processor refuses are left out of their batch and counted here; None: an error.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        *,
        packing: bool = False,
        pack_length: int | None = None,
        chat_template: str | None = None,
        skips: SkipCount | None = None,
    ) -> None:
        self.processor = processor
        self.skips = skips
        self._options: dict[str, Any] = {"max_length": max_length}
        if packing:
            self._options |= {"packing": True, "pack_length": pack_length or max_length}
        if chat_template is not None:
            self._options["chat_template"] = chat_template

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """The batch of some items, as `ClocMllmProcessor.encode(..., return_labels=True)` makes it.

        Where every conversation had to be left out, it is one of two words of which nothing is learnt: the other
        processes wait for this one in every part of the model.

        Raises:
            ClocError: The processor refuses a sample; the message names it.
        """
        kept = list(samples)
        while kept:
            try:
                return self._encode([sample["messages"] for sample in kept])
            except ConversationError as error:
                culprit = kept.pop(error.index)
                if self.skips is None:
                    raise ClocError(
                        error.problem,
                        file=culprit.get("file"),
                        sample=_named([culprit]),
                        remedy="Mend or remove it; `cloc-mllm data check` lists all that break the schema.",
                    ) from error
                self.skips.add()
        batch = self._encode([NOTHING_TO_LEARN])
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch

    def _encode(self, conversations: list[Any]) -> Batch:
        return dict(self.processor.encode(conversations, return_labels=True, **self._options))


NOTHING_TO_LEARN = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
