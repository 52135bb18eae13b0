"""Phrases found by an encoder instead of an MLLM, for the suites ``grounding`` and ``flickr30k``.

CLOC answers with its BoxHead or by searching a grid of boxes, CLIP by the searches that it is lent
(:mod:`cloc_mllm.evaluation.encoders.localizers`). Each way gives one box a phrase. There is no second split to choose a
way on, so which one is the headline is fixed, and all stand in the details.
"""

from __future__ import annotations

from collections.abc import Sequence

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.localizers import build_localizers
from cloc_mllm.evaluation.encoders.measure import EncoderSettings, TextBank, read_split
from cloc_mllm.evaluation.encoders.readouts import ClocEncoder
from cloc_mllm.evaluation.encoders.region_data import RegionSplit
from cloc_mllm.evaluation.suites.options import EvalOptions, batch_size_of

HEADLINES = ("box_head", "grid_prompter", "grid_value", "grid_roi")
"""Whose figure is the headline: the first of these that the encoder has."""

Boxes = list[list[float]]


def locate_texts(options: EvalOptions, data: RegionSplit, rows: Sequence[int]) -> dict[str, Boxes]:
    """Find the texts of some regions in their pictures, in every way that the encoder of a folder can.

    Args:
        options: Names the checkpoint; ``method`` leaves one way only.
        data: Pictures and regions.
        rows: Which regions' texts to find, ascending.

    Returns:
        By way, the headline first, a box for each text, xyxy in pixels of the original.

    Raises:
        ClocError: The checkpoint cannot be loaded, or finds no texts in the way asked for.
    """
    encoder = ClocEncoder.from_pretrained(options.model, options.device)
    ways = build_localizers(encoder, options.method)
    if not ways:
        raise ClocError(f"this encoder finds no phrases by the method '{options.method}'", file=options.model)
    settings = EncoderSettings(seed=options.seed, **batch_size_of(options))
    bank = TextBank(encoder, [data.regions[row].text for row in rows])
    found = read_split(encoder, [], ways, data, {}, {way.name: rows for way in ways}, bank, settings).located
    first = next((name for name in HEADLINES if name in found), ways[0].name)
    return {name: found[name].boxes.tolist() for name in (first, *(name for name in found if name != first))}
