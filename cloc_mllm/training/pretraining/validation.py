"""What an encoder can do on the validation samples: retrieval of captions and regions, and boxes for phrases.

Embeddings are collected batch by batch, gathered from all processes once, and compared a block at a time. Samples that
a sampler repeats to fill up the last batch are counted once, and two samples with the same text are both right for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from cloc_mllm.models.boxes import paired_iou
from cloc_mllm.objectives import gather_with_grad
from cloc_mllm.objectives.retrieval import shared_top1

NUMBER = "sample_number"
"""Key of a batch: which validation samples these are, ``(B,)``."""
_REGIONS_AN_IMAGE = 1 << 20

Rows = dict[str, torch.Tensor]


class NumberedSamples(Dataset[dict[str, Any]]):
    """The first samples of a data set, each with its number.

    Args:
        dataset: Map-style.
        count: How many of them at most.
    """

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset = dataset
        self.count = min(len(dataset), count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self.count)[index]
        return {**self.dataset[index], NUMBER: index}


class NumberingCollator:
    """A collator whose batches also say which samples they are of, where the samples do.

    Args:
        collate: Makes the batch.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch."""
        batch: dict[str, Any] = self.collate(samples)
        if NUMBER in samples[0]:
            batch[NUMBER] = torch.tensor([sample[NUMBER] for sample in samples])
        return batch


@torch.no_grad()
def validation_rows(output: Any, inputs: Mapping[str, Any]) -> Rows:
    """Return what validation keeps of one batch.

    Args:
        output: A `ClocOutput`.
        inputs: The batch it is of, with :data:`NUMBER`.

    Returns:
        Rows of images and captions, and those of regions where the encoder embeds any.
    """
    rows: Rows = {
        "number": inputs[NUMBER],
        "image": output.image_embeds.float(),
        "caption": output.text_embeds.float(),
        "caption_id": text_ids(inputs["input_ids"], inputs["attention_mask"]),
    }
    if output.region_embeds is None or "region_valid" not in inputs:
        return rows
    valid, owner = inputs["region_valid"], inputs["box_image_index"]
    texts = text_ids(inputs["region_input_ids"], inputs["region_attention_mask"])[inputs["region_text_index"]]
    iou = torch.full(valid.shape, -1.0, device=valid.device)
    if output.pred_boxes is not None:
        # Both are normalised; overlap is the same as in pixels. A phrase that fits two regions has no one box.
        found = paired_iou(output.pred_boxes.float(), inputs["input_boxes"])
        iou = torch.where(inputs["region_unique"], found, iou)
    number = inputs[NUMBER][owner] * _REGIONS_AN_IMAGE + rank_within_image(owner)
    return rows | {
        "region_number": number[valid],
        "region": output.region_embeds.float()[valid],
        "phrase": output.region_text_embeds.float()[valid],
        "phrase_id": texts[valid],
        "iou": iou[valid],
    }


@torch.no_grad()
def validation_figures(batches: Sequence[Rows]) -> dict[str, float]:
    """Return the figures over all batches of all processes; every process has to call this, with at least one batch.

    Args:
        batches: What :func:`validation_rows` returned on this process.

    Returns:
        `i2t_r1`, `t2i_r1`: images and captions. `region_r2t_r1`: regions against the distinct region texts, which is
        top-1 recognition among them; `region_macc`: its mean over texts; `region_t2r_r1`: texts against regions.
        `grounding_acc50`, `grounding_mean_iou`: the BoxHead's boxes for texts that name one region. And how many
        samples, regions and distinct region texts there were.
    """
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    rows = {key: gather_with_grad(value) for key, value in joined.items()}
    once = first_of_each(rows["number"])
    images, captions, ids = rows["image"][once], rows["caption"][once], rows["caption_id"][once]
    figures = {
        "samples": float(len(once)),
        "i2t_r1": shared_top1(images, captions, ids, ids)[0],
        "t2i_r1": shared_top1(captions, images, ids, ids)[0],
    }
    if "region" not in rows:
        return figures
    once = first_of_each(rows["region_number"])
    if not len(once):
        return figures | {"regions": 0.0}
    regions, ids, iou = (rows[key][once] for key in ("region", "phrase_id", "iou"))
    distinct = first_of_each(ids)
    phrases, phrase_ids = rows["phrase"][once][distinct], ids[distinct]
    top1, mean = shared_top1(regions, phrases, ids, phrase_ids)
    figures |= {
        "regions": float(len(once)),
        "region_texts": float(len(distinct)),
        "region_r2t_r1": top1,
        "region_macc": mean,
        "region_t2r_r1": shared_top1(phrases, regions, phrase_ids, ids)[0],
    }
    named = iou[iou >= 0]
    if len(named):
        figures["grounding_acc50"] = float((named >= 0.5).float().mean())
        figures["grounding_mean_iou"] = float(named.mean())
    return figures


def text_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return a number for each text, ``(T,)``, the same on every process for the same tokens, whatever the padding."""
    numbers = []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        tokens = ",".join(str(token) for token, kept in zip(ids, mask, strict=True) if kept)
        digest = hashlib.blake2b(tokens.encode(), digest_size=8).digest()
        numbers.append(int.from_bytes(digest, "big", signed=True))
    return torch.tensor(numbers, dtype=torch.int64, device=input_ids.device)


def first_of_each(values: torch.Tensor) -> torch.Tensor:
    """Return where each distinct value stands first, in the order in which they come, ``(U,)``."""
    distinct, inverse = values.unique(return_inverse=True)
    places = torch.arange(len(values), device=values.device)
    first = torch.full((len(distinct),), len(values), device=values.device)
    return first.scatter_reduce(0, inverse, places, "amin").sort().values


def rank_within_image(images: torch.Tensor) -> torch.Tensor:
    """Return for each region how many regions of the same image come before it; images come one after the other."""
    first = torch.searchsorted(images.contiguous(), images.contiguous())
    return torch.arange(len(images), device=images.device) - first
