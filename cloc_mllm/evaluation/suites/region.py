"""The ``region`` suite: an encoder on any region-text data (converted COCO, say), with the field's protocols.

Region recognition is protocol A of the CLOC paper: true boxes, bare class names, accuracy averaged over classes. The
instance average stands beside it. The classes are the texts that occur in the data, so a subset with fewer classes is
an easier task than the full split: the report states how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.measure import (
    EncoderSettings,
    Metrics,
    TextBank,
    all_captions,
    draw_pools,
    image_metrics,
    read_split,
    similarity_of,
)
from cloc_mllm.evaluation.encoders.readouts import ClocEncoder, Encoder, RegionReadout, build_readouts
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit, draw, load_region_split
from cloc_mllm.evaluation.scoring.metrics import class_mean_metric, mean_metric, recall_hits, same_item, top1_hits
from cloc_mllm.evaluation.suites.options import (
    ENCODER,
    EvalOptions,
    NoSettings,
    Outcome,
    batch_size_of,
    model_type,
    other_model,
    settings_of,
)

RECALLS = (1, 5, 10)


def run(options: EvalOptions) -> Outcome:
    """Measure the encoder that a folder holds."""
    settings_of(NoSettings, options)
    if model_type(options.model) != ENCODER:
        raise other_model(model_type(options.model), options)
    data = load_region_split(options.data_path, split=options.split or "all", limit=options.limit, seed=options.seed)
    encoder = ClocEncoder.from_pretrained(options.model, options.device)
    readouts = build_readouts(encoder, [options.method] if options.method else None)
    # The first is the headline: the Prompter's, or for CLIP the crop, which needs no read-out of patches.
    readouts.sort(key=lambda way: way.name not in ("prompter", "crop"))
    settings = EncoderSettings(crop_limit=None, seed=options.seed, **batch_size_of(options))
    metrics, details = evaluate_regions(encoder, readouts, data, settings)
    return Outcome(data.ref, metrics, details)


def evaluate_regions(
    encoder: Encoder,
    readouts: Sequence[RegionReadout],
    split: RegionSplit,
    settings: EncoderSettings | None = None,
) -> tuple[Metrics, dict[str, Any]]:
    """Measure an encoder on region-text data.

    Args:
        encoder: The encoder.
        readouts: The ways its regions are read; the headline is the first one's, whatever the others score, because
            there is no second split to choose on.
        split: What to measure on.
        settings: How much to measure.

    Returns:
        The headline metrics, and the details: all read-outs, pools, classes.

    Raises:
        ClocError: The data hold no region.
    """
    settings = settings or EncoderSettings(crop_limit=None)
    regions = split.regions
    if not regions:
        raise ClocError("there is no region to recognise", file=split.ref.name)
    sampled = draw(len(regions), settings.crop_limit, settings.seed)
    rows = {way.name: sampled if way.name == "crop" else list(range(len(regions))) for way in readouts}
    classes = sorted({region.text for region in regions})
    bank = TextBank(encoder, [*classes, *all_captions(split)])
    pools = draw_pools(sampled, regions, settings)
    read = read_split(encoder, readouts, [], split, rows, {}, bank, settings)
    by_readout: dict[str, Metrics] = {}
    for name, embeds in read.regions.items():
        mine = [regions[row] for row in rows[name]]
        place = {row: k for k, row in enumerate(rows[name])}
        hits = top1_hits(similarity_of(embeds, bank[classes]), [classes.index(region.text) for region in mine])
        images = [region.image for region in mine]
        by_readout[name] = {
            "region_macc": class_mean_metric(hits, [region.text for region in mine], images, seed=settings.seed),
            "region_top1": mean_metric(hits, images, seed=settings.seed),
            **_recalls(
                [
                    similarity_of(embeds[[place[row] for row in pool]], bank[[regions[row].text for row in pool]])
                    for pool in pools
                ],
                [[regions[row] for row in pool] for pool in pools],
                settings.seed,
            ),
        }
    headline = image_metrics(read.images, split, bank, settings) | by_readout[readouts[0].name]
    return headline, {
        "choices": {"made_on": "nothing", "readout": readouts[0].name},
        "readouts": by_readout,
        "baselines": {"region_macc": {"chance": 1 / len(classes)}, "region_top1": {"chance": 1 / len(classes)}},
        "pools": {
            "image": f"{len(split.rows)} images, {len(set(all_captions(split)))} distinct captions",
            "region": f"{len(pools)} pools of {', '.join(str(len(pool)) for pool in pools)} regions with distinct "
            f"texts, seed {settings.seed}",
            "classes": f"{len(classes)}: every text that occurs",
        },
    }


def _recalls(similarities: Sequence[Any], pools: Sequence[Sequence[Region]], seed: int) -> Metrics:
    """R@k both ways over all pools; within a pool every region has a text of its own."""
    images = [region.image for pool in pools for region in pool]
    found: Metrics = {}
    for k in RECALLS:
        r2t, t2r = [], []
        for similarity, pool in zip(similarities, pools, strict=True):
            texts = [region.text for region in pool]
            r2t.append(recall_hits(similarity, same_item(texts, texts), k))
            t2r.append(recall_hits(similarity.T, same_item(texts, texts), k))
        found[f"region_r2t_r{k}"] = mean_metric(np.concatenate(r2t), images, seed=seed)
        found[f"region_t2r_r{k}"] = mean_metric(np.concatenate(t2r), images, seed=seed)
    return found
