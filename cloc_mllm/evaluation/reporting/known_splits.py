"""How many items the splits of public data sets have, so that a part of one is never taken for the whole."""

from __future__ import annotations

from cloc_mllm.data.importers.refcoco import KNOWN

KNOWN_EXPRESSIONS: dict[str, dict[str, int]] = {
    name: {split: counts[1] for (owner, _, split), counts in KNOWN.items() if owner == name}
    for name in dict.fromkeys(owner for owner, _, _ in KNOWN)
}
"""Referring expressions by data set and split, in the partitions that are reported on: UNC's of RefCOCO and RefCOCO+,
UMD's of RefCOCOg."""
