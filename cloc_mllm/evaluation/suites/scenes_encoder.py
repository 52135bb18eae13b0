"""The ``scenes`` suite for encoders: retrieval, naming regions, finding phrases.

An encoder is measured in every way it can be read. One that has a way of its own (CLOC's Prompter) is reported by it.
For one that has not (CLIP) the headline takes, for each metric, the way that is best on the validation split. All are
shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.localizers import Localizer
from cloc_mllm.evaluation.encoders.measure import EncoderSettings, Measured, Metrics, all_captions, measure
from cloc_mllm.evaluation.encoders.readouts import Encoder, RegionReadout
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit, SceneTruth, canonical_name
from cloc_mllm.evaluation.scoring.metrics import iou_hits, mean_box, mean_metric, pointing_hits

OWN_READOUT = "prompter"
OWN_LOCALIZER = "grid_prompter"


def evaluate_encoder(
    encoder: Encoder,
    readouts: Sequence[RegionReadout],
    localizers: Sequence[Localizer],
    truth: SceneTruth,
    split: RegionSplit,
    validation: RegionSplit | None,
    settings: EncoderSettings | None = None,
) -> tuple[Metrics, dict[str, Any]]:
    """Measure an encoder on a split of scenes.

    Args:
        encoder: The encoder.
        readouts: The ways its regions are read, at least one.
        localizers: The ways it is asked where something is.
        truth: The scenes' vocabulary and held-out pairs.
        split: What to measure on.
        validation: What choices are made on, and what the baselines know; never the split itself unless that is what
            is being developed on.
        settings: How much to measure.

    Returns:
        The headline metrics (``report.json``'s names), and the details: all read-outs, choices, baselines, pools.

    Raises:
        ClocError: There is something to choose and no validation split.
    """
    settings = settings or EncoderSettings()
    zero_shot = [localizer for localizer in localizers if not localizer.trained]
    candidates = {
        "region": _candidates(readouts, OWN_READOUT),
        "pointing_acc": _candidates(zero_shot, OWN_LOCALIZER),
        "grounding_zeroshot_acc50": _candidates(zero_shot, OWN_LOCALIZER),
    }
    chosen_on: Measured | None = None
    if any(len(names) > 1 for names in candidates.values()):
        if validation is None:
            raise ClocError("choosing between read-outs needs a validation split")
        chosen_on = measure(encoder, readouts, localizers, truth, validation, settings)
    measured = measure(encoder, readouts, localizers, truth, split, settings)

    headline = dict(measured.image)
    choices: dict[str, str] = {}
    for metric in measured.readouts[readouts[0].name]:
        # No held-out pair occurs in the validation split: that metric follows the one it is a part of.
        key = "region_top1" if metric == "region_top1_heldout" else metric
        choices[metric] = _best(candidates["region"], chosen_on.readouts if chosen_on else {}, key)
        headline[metric] = measured.readouts[choices[metric]][metric]
    for metric, key in (("pointing_acc", "pointing"), ("grounding_zeroshot_acc50", "acc50")):
        if candidates[metric]:
            choices[metric] = _best(candidates[metric], chosen_on.localizers if chosen_on else {}, key)
            headline[metric] = measured.localizers[choices[metric]][key]
    for localizer in localizers:
        if localizer.trained:
            headline["grounding_acc50"] = measured.localizers[localizer.name]["acc50"]
    details = {
        "choices": {"made_on": validation.ref.label if chosen_on and validation else "nothing to choose", **choices},
        "readouts": measured.readouts,
        "localizers": measured.localizers,
        "baselines": baselines(truth, split, validation, settings.seed) if validation else {},
        "pools": measured.pools,
    }
    return headline, details


def _candidates(ways: Sequence[RegionReadout] | Sequence[Localizer], own: str) -> list[str]:
    """Return the names to choose from: the encoder's own way alone if it has one, else all."""
    names = [way.name for way in ways]
    return [own] if own in names else names


def _best(names: Sequence[str], measured: Mapping[str, Metrics], metric: str) -> str:
    """Return the name with the highest value, the first of equals; a value over nothing (NaN) is the lowest."""
    if len(names) == 1:
        return names[0]
    values = {name: measured[name][metric].value for name in names}
    return max(names, key=lambda name: -math.inf if math.isnan(values[name]) else values[name])


def baselines(truth: SceneTruth, split: RegionSplit, validation: RegionSplit, seed: int = 0) -> dict[str, Any]:
    """Score on ``split`` the answers that look at no picture.

    ``majority`` is the best constant answer, learned from the validation split: the most frequent class or size, the
    mean box (as a share of the picture) and its centre. ``chance`` guesses evenly; for pointing, anywhere in the
    picture.

    Returns:
        By metric name ``majority`` (a metric) and ``chance`` (a number), where they exist.
    """
    images = [region.image for region in split.regions]
    names = _constant([canonical_name(region.attributes) for region in validation.regions])
    size = _constant([region.attributes["size"] for region in validation.regions])
    findable = [region for region in split.regions if region.unique]
    known = [region for region in validation.regions if region.unique]
    share = mean_box([region.box for region in known], [validation.sizes[region.image] for region in known])
    sides = np.array([split.sizes[region.image] for region in findable], dtype=np.float64).reshape(-1, 2)
    guess = np.tile(sides, 2) * share
    true = np.array([region.box for region in findable], dtype=np.float64).reshape(-1, 4)
    found_in = [region.image for region in findable]
    found = mean_metric(iou_hits(guess, true), found_in, seed=seed)
    hits = [canonical_name(region.attributes) == names for region in split.regions]
    same_size = [region.attributes["size"] == size for region in split.regions]
    pointed = mean_metric(pointing_hits((guess[:, :2] + guess[:, 2:]) / 2, true), found_in, seed=seed)
    return {
        "image_i2t_r1": {"chance": 1 / len(set(all_captions(split)))},
        "image_t2i_r1": {"chance": 1 / len(split.rows)},
        "region_top1": {"majority": mean_metric(hits, images, seed=seed), "chance": 1 / len(truth.classes)},
        "region_macc": {"chance": 1 / len(truth.classes)},
        "region_size_acc": {
            "majority": mean_metric(same_size, images, seed=seed),
            "chance": 1 / len(truth.vocabulary["size"]),
        },
        "pointing_acc": {"majority": pointed, "chance": _mean_area(findable, split)},
        "grounding_acc50": {"majority": found},
        "grounding_zeroshot_acc50": {"majority": found},
    }


def _constant(values: Sequence[str]) -> str:
    """Return the most frequent value; ties go to the alphabet."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _mean_area(regions: Sequence[Region], split: RegionSplit) -> float:
    """Return the mean share of the picture that a box covers."""
    areas = [
        (r.box[2] - r.box[0]) * (r.box[3] - r.box[1]) / (split.sizes[r.image][0] * split.sizes[r.image][1])
        for r in regions
    ]
    return float(np.mean(areas)) if areas else math.nan
