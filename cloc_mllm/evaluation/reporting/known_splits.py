"""How many items the splits of public data sets have, so that a part of one is never taken for the whole."""

from __future__ import annotations

from cloc_mllm.data.importers.refcoco import KNOWN as _REFCOCO

KNOWN_SPLITS: dict[str, dict[str, int]] = {
    # Expressions, in the partitions that everybody reports on: UNC's of RefCOCO and RefCOCO+, UMD's of RefCOCOg.
    **{
        name: {split: counts[1] for (owner, _, split), counts in _REFCOCO.items() if owner == name}
        for name in sorted({owner for owner, _, _ in _REFCOCO})
    },
}
"""Name of a data set to its splits to their sizes."""
