"""The statistics of a data set as a page of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SHOWN_FAULTS = 3
_SHOWN_TEXTS = 8


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """What an inspection found, in lines.

    Args:
        found: As `Inspection.to_dict` returns it.
    """
    return [printable(line) for part in (_samples, _faults, _pictures, _regions, _texts) for line in part(found)]


def printable(line: str) -> str:
    """A line that does nothing to a terminal but show: other characters, which texts may hold, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)


def _samples(found: Mapping[str, Any]) -> Iterator[str]:
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in found["kinds"].items())
    yield f"samples             {found['samples']:,} in {len(found['files']):,} files: {kinds or 'none'}"
    for name in ("tasks", "sources"):
        if found[name]:
            shown = [f"{number:,} {value}" for value, number in list(found[name].items())[:_SHOWN_TEXTS]]
            more = len(found[name]) - len(shown)
            yield f"{name:20}" + ", ".join([*shown, *([f"{more:,} more"] if more else [])])
    turns = found["turns_per_conversation"]
    if turns["count"]:
        yield f"turns               {_spread(turns)}"


def _faults(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"faults              {len(found['faults']):,} in {found['broken']:,} samples"
    for kind in found["fault_kinds"]:
        yield f"  {kind['count']:>8,}  {kind['kind']}"
        yield f"            first: {kind['first']}"
    if found["notices"]:
        yield "odd, though no fault"
    for notice in found["notices"]:
        yield f"  {notice['count']:>8,}  {notice['kind']}"
        for example in notice["examples"][:_SHOWN_FAULTS]:
            detail = f": {example['detail']}" if example["detail"] else ""
            yield f"            {example['file']}: sample '{example['sample']}'{detail}"


def _pictures(found: Mapping[str, Any]) -> Iterator[str]:
    pictures, twins = found["pictures"], found["duplicates"]
    formats = ", ".join(f"{number:,} {name}" for name, number in pictures["formats"].items())
    lost = f"{pictures['unreadable']:,} unreadable, {pictures['flat']:,} of one colour"
    yield f"pictures            {pictures['count']:,}, named {pictures['named']:,} times: {formats or 'none'}; {lost}"
    if pictures["width"]["count"]:
        for name in ("width", "height", "megapixels"):
            yield f"  {name:18}{_spread(pictures[name])}"
    yield f"same bytes          {twins['exact']['surplus']:,} too many, in {twins['exact']['groups']:,} groups"
    near = f"{twins['near']['surplus']:,} too many, in {twins['near']['groups']:,} groups"
    yield f"looks alike         {near} ({twins['distance']} of 64 bits or fewer apart)"


def _regions(found: Mapping[str, Any]) -> Iterator[str]:
    regions = found["regions"]
    yield f"regions in a sample {_spread(regions['per_sample'])}"
    for form, number in regions["forms"].items():
        yield f"  {number:>8,}  {form}"
    if regions["boxes_measured"]:
        sizes = ", ".join(f"{number:,} {name}" for name, number in regions["coco_sizes"].items())
        yield f"  sizes             {sizes} (COCO's: below 32², below 96² pixels, above)"
    if regions["boxes_unmeasured"]:
        yield f"  not measured      {regions['boxes_unmeasured']:,} boxes with a fault or without a readable picture"
    if regions["share_unique"] is not None:
        share = f"{100 * regions['share_unique']:.1f} % of {regions['texts_judged']:,}"
        yield f"  unique texts      {share} name their region of the image alone"
    if "scores" in regions:
        scores = regions["scores"]
        spread = f"mean {scores['mean']:g}, from {scores['min']:g} to {scores['max']:g}"
        outside = f", {scores['outside_0_to_1']:,} outside 0 to 1" if scores["outside_0_to_1"] else ""
        yield f"  scores            {scores['count']:,}: {spread}{outside}"


def _texts(found: Mapping[str, Any]) -> Iterator[str]:
    for group, texts in found["texts"].items():
        distinct = f", {texts['distinct']:,} distinct" if "distinct" in texts else ""
        yield f"{group:20}{texts['count']:,}{distinct}"
        for unit in ("characters", "words", "tokens"):
            if unit in texts:
                yield f"  {unit:18}{_spread(texts[unit])}"
        if "over_limit" in texts:
            yield f"  too long          {texts['over_limit']:,} have more than {texts['token_limit']} tokens"
        for name in ("scripts", "flaws"):
            if texts[name]:
                yield f"  {name:18}" + ", ".join(f"{number:,} {value}" for value, number in texts[name].items())
        top = texts.get("top", [])[:_SHOWN_TEXTS]
        if top:
            yield "  most frequent     " + ", ".join(f"{entry['text'][:60]!r} {entry['count']:,}" for entry in top)


def _spread(numbers: Mapping[str, Any]) -> str:
    if not numbers["count"]:
        return "none"
    least, most = f"{numbers['min']:g}", f"{numbers['max']:g}"
    return f"mean {numbers['mean']:g}, median {numbers['median']:g}, 95 % up to {numbers['p95']:g}, {least} to {most}"
