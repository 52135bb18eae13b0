"""What the suites of questions share: settings, those of the shipped YAML files too, and how a question is put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.suites.asking import AskingSettings, question, with_suffix
from cloc_mllm.evaluation.suites.ferret_bench import FerretBenchSettings
from cloc_mllm.evaluation.suites.flickr30k import Flickr30kSettings
from cloc_mllm.evaluation.suites.grounding import GroundingSettings
from cloc_mllm.evaluation.suites.options import options_from_yaml, settings_of

SHIPPED: dict[str, tuple[str, Any]] = {
    "lvis_referring": ("referring", AskingSettings),
    "refcoco": ("grounding", GroundingSettings),
    "flickr30k_entities": ("flickr30k", Flickr30kSettings),
    "ferret_bench": ("ferret-bench", FerretBenchSettings),
    "easy_vqa": ("easy-vqa", AskingSettings),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_settings_are_known_to_their_suite(name: str) -> None:
    file = Path(__file__).parents[4] / "eval" / "suites" / f"{name}.yaml"
    suite, options = options_from_yaml(file, ["model=m", "out=o", "settings.suffix=Briefly."])
    wanted, kind = SHIPPED[name]
    assert suite == wanted
    assert settings_of(kind, options).suffix == "Briefly."


def test_a_suffix_goes_behind_the_last_turn() -> None:
    turn = question("a.png", "Where?", "In one word.")
    assert turn == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "Where?"},
                {"type": "text", "text": "\nIn one word."},
            ],
        }
    ]
    plain = [{"role": "user", "content": "Where?"}]
    assert with_suffix(plain, "") == plain
    assert with_suffix(plain, "Now.")[0]["content"] == [
        {"type": "text", "text": "Where?"},
        {"type": "text", "text": "\nNow."},
    ]
    assert plain == [{"role": "user", "content": "Where?"}]


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(ClocError, match="no frame of boxes 'norm'"):
        AskingSettings(boxes="norm")
    with pytest.raises(ClocError, match="suffix is 3, not a text"):
        AskingSettings(suffix=3)  # type: ignore[arg-type]
