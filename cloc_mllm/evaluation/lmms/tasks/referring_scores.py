"""How referred objects are scored: by Ferret's published rule, and by whole words.

A file of its own because it needs the two scorers of the suite `referring`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloc_mllm.evaluation.scoring.referring import ferret_right, strict_right


def score_name(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Which of the two names an answer gives, by both scorers."""
    names = (doc["answer"], list(doc["synonyms"]), doc["negative"], list(doc["negative_synonyms"]))
    entry = {"id": doc["id"], "image": doc["image"]}
    what = {"answer": results[0], "truth": doc["answer"], "negative": doc["negative"], "kind": doc["kind"]}
    return {
        "ferret": {"score": float(ferret_right(results[0], *names)), **entry, **what},
        "strict": {"score": float(strict_right(results[0], *names)), **entry},
    }
