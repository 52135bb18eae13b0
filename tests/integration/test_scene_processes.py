"""Scenes drawn by several processes are the ones that a single process draws, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.data.scenes.generator import generate_scenes


@pytest.mark.integration
def test_the_number_of_processes_decides_nothing(tmp_path: Path) -> None:
    for workers in (1, 2):
        generate_scenes(tmp_path / str(workers), "quick", n=450, seed=9, n_val=5, n_test=210, workers=workers)
    one, two = (
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (tmp_path / "1", tmp_path / "2")
    )
    assert len(one) == 665 + 4 * 3 - 1 + 1
    assert one == two
