"""What phrase extractors make of COCO's captions: how many phrases, how long, and what they lose of what is on it.

    python scripts/benchmarks/caption_phrases.py --instances annotations/instances_train2017.json \
        --captions annotations/captions_train2017.json --extractors textblob spacy:en_core_web_sm ngrams

For every category that is annotated on a picture: do its captions name it, in the singular or plural, and if they do,
does a phrase? Captions are tried all together (`all`) and the first alone (`first`), which is what most sets have.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import argument_parser, print_table, write_report

from cloc_mllm.data.importers.json_stream import stream_lists
from cloc_mllm.labeling.phrases.tokens import normalise
from cloc_mllm.labeling.stages import PHRASES, build_stage


@dataclass
class Annotated:
    """A picture's captions, in order of their ids, and the names of the categories on it."""

    captions: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def read_coco(instances: Path, captions: Path) -> list[Annotated]:
    """Return the pictures that have captions; crowds do not count as being there."""
    pictures: dict[int, Annotated] = defaultdict(Annotated)
    names: dict[int, str] = {}
    present: list[tuple[int, int]] = []
    for name, item in stream_lists(instances, ("annotations", "categories")):
        if name == "categories":
            names[item["id"]] = item["name"]
        elif not item.get("iscrowd"):
            present.append((item["image_id"], item["category_id"]))
    listed = [item for _, item in stream_lists(captions, ("annotations",))]
    for item in sorted(listed, key=lambda one: one["id"]):
        pictures[item["image_id"]].captions.append(item["caption"])
    for picture, category in present:
        if picture in pictures:
            pictures[picture].names.add(names[category])
    return list(pictures.values())


def names_it(text: str, name: str) -> bool:
    """Whether a text has a category's name as whole words, in the singular or a regular plural."""
    plural = f"{re.escape(name)}(?:s|es)?" + (f"|{re.escape(name[:-1])}ies" if name.endswith("y") else "")
    return re.search(rf"(?<![\w-])(?:{plural})(?![\w-])", text) is not None


def measure(spec: str, pictures: Sequence[Annotated], which: str) -> dict[str, Any]:
    """Run one extractor.

    Args:
        spec: Its specification.
        pictures: What it is run on.
        which: "all" captions of each picture, or the "first".
    """
    captions = [one.captions if which == "all" else one.captions[:1] for one in pictures]
    found: list[list[str]] = build_stage(PHRASES, spec)(captions)
    phrases = [phrase for one in found for phrase in one]
    named = kept = 0
    for one, texts, own in zip(pictures, captions, found, strict=True):
        for name in one.names:
            if any(names_it(normalise(text), name) for text in texts):
                named += 1
                kept += any(names_it(phrase, name) for phrase in own)
    return {
        "extractor": spec,
        "captions": which,
        "pictures": len(pictures),
        "without_phrases": sum(not own for own in found),
        "phrases_a_picture": len(phrases) / len(pictures),
        "words_a_phrase": sum(len(phrase.split()) for phrase in phrases) / max(1, len(phrases)),
        "categories_present": sum(len(one.names) for one in pictures),
        "categories_named": named,
        "named_and_kept": kept,
    }


def row_of(result: Mapping[str, Any]) -> list[str]:
    """Return a line of the table."""
    kept = f"{result['named_and_kept']} of {result['categories_named']}"
    return [
        str(result["extractor"]),
        str(result["captions"]),
        f"{result['phrases_a_picture']:.1f}",
        f"{result['words_a_phrase']:.2f}",
        str(result["without_phrases"]),
        f"{kept} ({result['named_and_kept'] / max(1, result['categories_named']):.0%})",
    ]


def main() -> None:
    """Run all extractors and print a table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--instances", type=Path, required=True, help="COCO's instances_*.json")
    parser.add_argument("--captions", type=Path, required=True, help="COCO's captions_*.json")
    parser.add_argument("--extractors", nargs="+", default=["textblob", "ngrams"], help="as `--phrases` has them")
    args = parser.parse_args()
    pictures = read_coco(args.instances, args.captions)
    results = [measure(spec, pictures, which) for which in ("all", "first") for spec in args.extractors]
    present = results[0]["categories_present"]
    print(f"{len(pictures)} pictures, {present} categories on them\n")
    head = ["extractor", "captions", "phrases a picture", "words a phrase", "without phrases", "named and kept"]
    print_table([head, *map(row_of, results)])
    write_report(args.out, "caption_phrases", results)


if __name__ == "__main__":
    main()
