"""The benchmark of what lmms-eval costs, on a case that takes seconds: it runs, and both ways answer alike."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

FOLDER = Path(__file__).resolve().parents[4] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def overhead() -> Iterator[Any]:
    """`scripts/benchmarks/lmms_overhead.py` as a module."""
    spec = importlib.util.spec_from_file_location("lmms_overhead", FOLDER / "lmms_overhead.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setenv("CLOC_SCENES", "")  # it sets this itself, and here it must be gone again
        spec.loader.exec_module(module)
        yield module


def test_a_tiny_case(
    overhead: Any,
    scenes_folder: Path,
    mllm_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = {"model": str(mllm_folder), "data": str(scenes_folder), "limit": 3, "batch": 2, "repeats": 1}
    monkeypatch.setattr(sys, "argv", ["lmms_overhead.py", "--case", json.dumps(case)])
    overhead.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["n"] == 3
    assert found["predictor_seconds"] > 0
    assert found["share"] == pytest.approx(found["lmms-eval_seconds"] / found["predictor_seconds"] - 1)
