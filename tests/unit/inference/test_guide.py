"""Every line of Python in the guide runs, from top to bottom, on a checkpoint on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.builders import noise_image, tiny_cloc

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "inference.md"


def test_the_guide_runs(mllm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in mllm:
        part.save_pretrained(tmp_path / "my-mllm")
    for part in tiny_cloc():
        part.save_pretrained(tmp_path / "my-encoder")
    noise_image(40, 30, seed=1).save(tmp_path / "scene.png")
    noise_image(20, 50, seed=2).save(tmp_path / "other.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert [len(of_one) for of_one in names["both"]] == [1, 2]
    assert names["embeds"].shape == (2, 24)
    assert names["predictor"].cache.misses == 1
