"""Which categories regions are told apart among: all that a set has, those that occur, or a list of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.reporting.known_splits import SET_FILE, set_facts

_BASE = """
person bicycle car motorcycle train truck boat bench bird horse sheep bear zebra giraffe backpack handbag suitcase
frisbee skis kite surfboard bottle fork spoon bowl banana apple sandwich orange broccoli carrot pizza donut chair bed
toilet tv laptop mouse remote microwave oven toaster refrigerator book clock vase toothbrush
"""
_NOVEL = """
airplane bus cat dog cow elephant umbrella tie snowboard skateboard cup knife cake couch keyboard sink scissors
"""
# The 48 base and 17 novel categories of COCO that open-vocabulary detection uses (Bansal et al., arXiv 1804.04340).
OV_COCO_BASE, OV_COCO_NOVEL = tuple(_BASE.split()), tuple(_NOVEL.split())

OV_COCO = "ov-coco"


@dataclass(frozen=True)
class Vocabulary:
    """Categories to tell apart.

    Attributes:
        names: Distinct names.
        source: Where they come from, in words.
        frequency: LVIS's ``r``, ``c`` or ``f`` by name, where the set says so.
        choice: Which they are, for programs: ``known``, ``occurring``, ``ov-coco`` or ``file``.
    """

    names: list[str]
    source: str
    frequency: dict[str, str] = field(default_factory=dict)
    choice: str = "file"

    @property
    def described(self) -> str:
        """How many there are and where they come from."""
        return f"{len(self.names)}: {self.source}"


def read_vocabulary(choice: str, data: str | PathLike[str], occurring: Iterable[str]) -> Vocabulary:
    """Read categories.

    Args:
        choice: ``known``: all that ``dataset.json`` beside the data lists; ``occurring``: the texts that occur;
            ``auto``: the first, if every text that occurs is in it, else the second; ``ov-coco``: the 65 categories of
            that benchmark; or a file with a name on each line.
        data: The data.
        occurring: The texts of all regions.

    Raises:
        ClocError: There is no list, or a text is not in the one that was asked for.
    """
    present = sorted(set(occurring))
    if choice == "occurring":
        return Vocabulary(present, "every text that occurs", choice="occurring")
    found = _listed(choice, data)
    strange = [text for text in present if found is not None and text not in set(found.names)]
    if choice == "auto" and (found is None or strange):
        return Vocabulary(present, "every text that occurs", choice="occurring")
    if found is None:
        raise ClocError(
            f"no categories are listed beside the data (no 'categories' in {SET_FILE})",
            file=data,
            remedy="Convert it again, name a file with a name on each line, or set categories=occurring.",
        )
    if strange:
        raise ClocError(f"a region's text, '{strange[0]}', is none of the categories ({found.source})", file=data)
    return found


def _listed(choice: str, data: str | PathLike[str]) -> Vocabulary | None:
    if choice == OV_COCO:
        names = [*OV_COCO_BASE, *OV_COCO_NOVEL]
        return Vocabulary(names, "the 48 base and 17 novel categories of OV-COCO", choice=OV_COCO)
    return _known(data) if choice in ("auto", "known") else _from_file(Path(choice))


def _known(data: str | PathLike[str]) -> Vocabulary | None:
    facts = set_facts(data)
    listed = facts.get("categories")
    if not isinstance(listed, Sequence) or not listed:
        return None
    names = list(dict.fromkeys(one["name"] for one in listed))
    source = f"all categories of {facts.get('kind')}, {SET_FILE} says"
    if len(names) < len(listed):
        # LVIS tells apart by a remark in brackets what this data calls alike ("bow (weapon)", "bow (ribbon)").
        source += f" ({len(listed)}, some of the same name)"
    rarity: dict[str, set[str]] = {}
    for one in listed:
        if "frequency" in one:
            rarity.setdefault(one["name"], set()).add(one["frequency"])
    # A name of two categories of different rarity is of neither group.
    frequency = {name: next(iter(some)) for name, some in rarity.items() if len(some) == 1}
    return Vocabulary(names, source, frequency, "known")


def _from_file(path: Path) -> Vocabulary:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "categories is auto, known, occurring, ov-coco, or a file with a name on each line."
        raise ClocError(f"cannot read the categories ({error})", file=path, remedy=remedy) from error
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != len(set(names)) or len(names) < 2:
        raise ClocError("categories are at least two different names, one on each line", file=path)
    return Vocabulary(names, f"the names in {path.name}")
