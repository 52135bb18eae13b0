"""The ``region`` suite: any encoder on any region-text data (converted COCO, say), with the field's protocols.

Two protocols of region recognition circulate and their figures cannot be compared, so both are reported side by side.
Both give the true boxes. A, of the CLOC paper: bare class names, accuracy averaged over classes (the instance average
beside it). B, of FG-CLIP and others: CLIP's 80 templates for ImageNet, top-1 and top-5 over instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cloc_mllm.data.importers.coco import MADE_CAPTION
from cloc_mllm.data.prompt_templates import BARE, IMAGENET, templates_of
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.loading import load_encoder
from cloc_mllm.evaluation.encoders.measure import (
    EncoderSettings,
    Metrics,
    TextBank,
    all_captions,
    draw_pools,
    image_metrics,
    read_split,
    seen_regions,
    similarity_of,
)
from cloc_mllm.evaluation.encoders.readouts import Encoder, RegionReadout, build_readouts
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit, draw, load_region_split
from cloc_mllm.evaluation.encoders.vocabulary import Vocabulary, read_vocabulary
from cloc_mllm.evaluation.encoders.zero_shot import class_embeddings
from cloc_mllm.evaluation.scoring.metrics import (
    class_mean_metric,
    mean_metric,
    misplaced,
    same_item,
    top1_hits,
    topk_hits,
)
from cloc_mllm.evaluation.suites.options import EvalOptions, Outcome, batch_size_of, settings_of

RECALLS = (1, 5, 10)
PROTOCOLS = {
    "A": "region_macc, region_top1: true boxes, bare names, mean over classes and over instances (CLOC paper: macc)",
    "B": "region_ensemble_top1, region_ensemble_top5: true boxes, names in templates, mean over instances (FG-CLIP)",
}


@dataclass(frozen=True)
class RegionSettings:
    """Settings of this suite.

    Attributes:
        recognition: Whether regions are named; false for data whose texts are phrases and not classes.
        categories: Among which; see :func:`cloc_mllm.evaluation.encoders.vocabulary.read_vocabulary`.
        templates: Of protocol B: ``imagenet`` (the 80), ``simple``, ``bare``, or a list.
        gallery: Retrieval chooses from ``pools`` of at most 256 regions of different texts, or from ``all`` regions.
    """

    recognition: bool = True
    categories: str = "auto"
    templates: str | list[str] = "imagenet"
    gallery: str = "pools"

    def __post_init__(self) -> None:
        if self.gallery not in ("pools", "all"):
            raise ClocError(f"gallery is '{self.gallery}'", remedy="It is pools or all.")
        if not isinstance(self.recognition, bool):
            raise ClocError(f"recognition is {self.recognition!r}, not true or false")
        templates_of(self.templates)


def run(options: EvalOptions) -> Outcome:
    """Measure the encoder that ``--model`` names."""
    asked = settings_of(RegionSettings, options)
    data = load_region_split(options.data_path, split=options.split, limit=options.limit, seed=options.seed)
    texts = [region.text for region in data.regions]
    vocabulary = read_vocabulary(asked.categories, options.data_path, texts) if asked.recognition else None
    encoder = load_encoder(options.model, options.device)
    readouts = build_readouts(encoder, [options.method] if options.method else None)
    # The first is the headline: the Prompter's, or for CLIP the crop, which needs no read-out of patches.
    readouts.sort(key=lambda way: way.name not in ("prompter", "crop"))
    settings = EncoderSettings(crop_limit=None, seed=options.seed, **batch_size_of(options))
    metrics, details, records = evaluate_regions(
        encoder, readouts, data, settings, vocabulary, templates_of(asked.templates), asked.gallery == "all"
    )
    return Outcome(data.ref, metrics, details, answers=records)


def evaluate_regions(
    encoder: Encoder,
    readouts: Sequence[RegionReadout],
    split: RegionSplit,
    settings: EncoderSettings | None = None,
    vocabulary: Vocabulary | None = None,
    templates: Sequence[str] = IMAGENET,
    one_gallery: bool = False,
) -> tuple[Metrics, dict[str, Any], list[dict[str, Any]]]:
    """Measure an encoder on region-text data.

    Args:
        encoder: The encoder.
        readouts: The ways its regions are read; the headline is the first one's, whatever the others score, because
            there is no second split to choose on.
        split: What to measure on.
        settings: How much to measure.
        vocabulary: The classes that regions are named among; None names none.
        templates: Of protocol B.
        one_gallery: Retrieval among all regions instead of in pools.

    Returns:
        The headline metrics; the details: all read-outs, pools, classes; and what the headline's read-out called each
        region, if regions are named.

    Raises:
        ClocError: The data hold no region.
    """
    settings = settings or EncoderSettings(crop_limit=None)
    regions = split.regions
    if not regions:
        raise ClocError("there is no region to recognise", file=split.ref.name)
    sampled = draw(len(regions), settings.crop_limit, settings.seed)
    rows = {way.name: sampled if way.name == "crop" else list(range(len(regions))) for way in readouts}
    bank = TextBank(encoder, [*all_captions(split), *(region.text for region in regions)])
    classes = [] if vocabulary is None else [class_embeddings(encoder, vocabulary.names, t) for t in (BARE, templates)]
    pools = [list(sampled)] if one_gallery else draw_pools(sampled, regions, settings)
    read = read_split(encoder, readouts, [], split, rows, {}, bank, settings)
    by_readout: dict[str, Metrics] = {}
    for name, embeds in read.regions.items():
        mine, images, keys = seen_regions(split, rows[name])
        place = {row: k for k, row in enumerate(rows[name])}
        named = _named(embeds, mine, images, keys, vocabulary, classes, settings.seed) if vocabulary else {}
        parts = [[place[row] for row in pool] for pool in pools]
        by_readout[name] = named | _recalls(embeds, mine, images, parts, bank, settings.seed)
    no_retrieval = _why_no_captions(split)
    headline = {} if no_retrieval else image_metrics(read.images, split, bank, settings)
    headline |= by_readout[readouts[0].name]
    chance = 1 / len(vocabulary.names) if vocabulary else 0.0
    alone = ("region_macc", "region_top1", "region_ensemble_top1") if vocabulary else ()
    sizes = ", ".join(str(len(pool)) for pool in pools)
    details = {
        "choices": {"made_on": "nothing", "readout": readouts[0].name},
        "protocol": {
            "gallery": "all" if one_gallery else "pools",
            "categories": vocabulary.choice if vocabulary else "none",
        },
        "protocols": PROTOCOLS if vocabulary else {},
        "readouts": by_readout,
        "baselines": {name: {"chance": chance} for name in alone},
        "pools": {
            "image": no_retrieval or f"{len(split.rows)} images, {len(set(all_captions(split)))} distinct captions",
            "region": f"all {sizes} regions, those of the same text being one item"
            if one_gallery
            else f"{len(pools)} pools of {sizes} regions with distinct texts, seed {settings.seed}",
            "classes": vocabulary.described if vocabulary else "regions are not named",
            "templates": f"protocol B: {len(templates)}",
        },
    }
    first = readouts[0].name
    records = _records(split, read.regions[first], rows[first], vocabulary, classes[0]) if vocabulary else []
    return headline, details, records


def _why_no_captions(split: RegionSplit) -> str | None:
    """Say why images are not retrieved by their captions; None if they are."""
    captions = all_captions(split)
    if len(set(captions)) < 2:
        return "images are not retrieved: all have the same caption"
    if len(captions) == len(split.rows) and all(caption.startswith(MADE_CAPTION) for caption in captions):
        return "images are not retrieved: their captions are made of names, many are alike and none was written for one"
    return None


def _records(
    split: RegionSplit, embeds: torch.Tensor, rows: Sequence[int], vocabulary: Vocabulary, names: torch.Tensor
) -> list[dict[str, Any]]:
    """What each region was taken for among the bare names."""
    similarity = similarity_of(embeds, names)
    number = {name: k for k, name in enumerate(vocabulary.names)}
    records = []
    for row, scores in zip(rows, similarity, strict=True):
        region = split.regions[row]
        best = int(scores.argmax())
        records.append(
            {
                "id": f"{split.ids[region.image]}/{row}",
                "row": split.rows[region.image],
                "question": "What is in the box?",
                "boxes_in": [list(region.box)],
                "truth": region.text,
                "answer": vocabulary.names[best],
                "right": bool(top1_hits(scores[None], [number[region.text]])[0]),
            }
        )
    return records


def _named(
    embeds: torch.Tensor,
    regions: Sequence[Region],
    images: Sequence[str],
    keys: Sequence[str],
    vocabulary: Vocabulary,
    classes: Sequence[torch.Tensor],
    seed: int,
) -> Metrics:
    """Both protocols; ``classes`` holds each one's ``(C, D)`` embeddings of the names."""
    number = {name: k for k, name in enumerate(vocabulary.names)}
    targets = [number[region.text] for region in regions]
    bare, ensemble = (similarity_of(embeds, each) for each in classes)
    hits = topk_hits(bare, targets)
    return {
        "region_macc": class_mean_metric(hits, [region.text for region in regions], images, seed=seed, keys=keys),
        "region_top1": mean_metric(hits, images, seed=seed, keys=keys),
        "region_ensemble_top1": mean_metric(topk_hits(ensemble, targets), images, seed=seed, keys=keys),
        "region_ensemble_top5": mean_metric(topk_hits(ensemble, targets, 5), images, seed=seed, keys=keys),
    }


def _recalls(
    embeds: torch.Tensor,
    regions: Sequence[Region],
    found_in: Sequence[str],
    pools: Sequence[Sequence[int]],
    bank: TextBank,
    seed: int,
) -> Metrics:
    """R@k both ways over all pools. Regions of the same text are one item: any of them is right for it."""
    images = [found_in[row] for pool in pools for row in pool]
    r2t, t2r = [], []
    for pool in pools:
        texts = [regions[row].text for row in pool]
        distinct = list(dict.fromkeys(texts))
        similarity = similarity_of(embeds[list(pool)], bank[distinct])
        right = same_item(texts, distinct)
        r2t.append(misplaced(similarity, right))
        of_text = dict(zip(distinct, misplaced(similarity.T, right.T), strict=True))
        t2r.append(np.array([of_text[text] for text in texts]))
    found: Metrics = {}
    for k in RECALLS:
        found[f"region_r2t_r{k}"] = mean_metric(np.concatenate(r2t) < k, images, seed=seed)
        found[f"region_t2r_r{k}"] = mean_metric(np.concatenate(t2r) < k, images, seed=seed)
    return found
