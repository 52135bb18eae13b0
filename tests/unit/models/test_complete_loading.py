"""A checkpoint with a weight missing is refused by whatever loads it, not filled with random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

import cloc_mllm  # noqa: F401 -- registers the Auto classes
from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from tests.builders import tiny_cloc
from tests.builders_mllm import tiny_mllm


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "classes", "lost"),
    [
        (
            lambda: tiny_mllm()[0],
            (AutoModelForImageTextToText, ClocMllmForConditionalGeneration, AutoModel),
            "model.grounding_head.box_head.fc1.weight",
        ),
        (lambda: tiny_cloc()[0], (AutoModel, ClocModel), "prompter.projection.weight"),
    ],
)
def test_missing_weights_are_named(make: Any, classes: Any, lost: str, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    whole = classes[0].from_pretrained(tmp_path)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    without(tmp_path, lost)
    for one in classes:
        with pytest.raises(
            ValueError, match=r"the checkpoint lacks 1 weights, the first being '.*(box_head|projection)"
        ):
            one.from_pretrained(tmp_path)
    # Who asks what is missing is told, and judges for himself.
    _, info = classes[0].from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {lost}
