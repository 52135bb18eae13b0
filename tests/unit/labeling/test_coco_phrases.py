"""Phrases of real captions: the 250 of 50 photographs of COCO."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
COCO50 = Path(os.environ.get("CLOC_COCO50", ROOT.parent / "shared" / "data" / "coco50"))
pytestmark = pytest.mark.skipif(
    not COCO50.is_dir(), reason=f"the 50 photographs of COCO are not at {COCO50} (set CLOC_COCO50)"
)


@pytest.fixture(scope="module")
def benchmark_module() -> Iterator[Any]:
    """`scripts/benchmarks/caption_phrases.py` as a module."""
    folder = ROOT / "scripts" / "benchmarks"
    spec = importlib.util.spec_from_file_location("caption_phrases", folder / "caption_phrases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(sys.modules, "caption_phrases", module)  # its dataclass looks itself up
        spec.loader.exec_module(module)
        yield module


def test_noun_phrases_name_what_the_captions_name(benchmark_module: Any) -> None:
    annotations = COCO50 / "annotations"
    pictures = benchmark_module.read_coco(
        annotations / "instances_train2017.json", annotations / "captions_train2017.json"
    )
    assert (len(pictures), sum(len(one.captions) for one in pictures)) == (50, 250)
    nouns = benchmark_module.measure("textblob", pictures, "all")
    grams = benchmark_module.measure("ngrams", pictures, "all")
    assert nouns["categories_named"] == grams["categories_named"] == grams["named_and_kept"] > 60
    assert nouns["named_and_kept"] >= 0.95 * nouns["categories_named"]
    assert nouns["without_phrases"] == 0
    # Fewer and shorter, as in the paper: 2.1 tokens against 3.9.
    assert 8 < nouns["phrases_a_picture"] < 14
    assert nouns["words_a_phrase"] < 2.3 < 3.9 < grams["words_a_phrase"]


def test_a_name_is_found_as_a_whole_word(benchmark_module: Any) -> None:
    names_it = benchmark_module.names_it
    assert names_it("two cats", "cat")
    assert names_it("a bus", "bus")
    assert names_it("red buses", "bus")
    assert names_it("a dining table.", "dining table")
    assert not names_it("cattle and a tom-cat", "cat")
