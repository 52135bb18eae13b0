"""Writing somewhere is checked before work starts, with a message that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloc_mllm.apps.outputs import prepare_output_file, prepare_output_folder
from cloc_mllm.errors import ClocError


def test_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = prepare_output_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_existing_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    prepare_output_folder(tmp_path)
    prepare_output_file(tmp_path / "kept.txt")
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClocError, match=r"file/below: cannot write here .*--out"):
        prepare_output_folder(tmp_path / "file" / "below")


def test_a_place_nobody_may_write_to() -> None:
    # /proc refuses new files to root too, so this holds whoever runs the tests.
    with pytest.raises(ClocError, match="cannot write here"):
        prepare_output_folder("/proc/self/cloc")


def test_a_folder_where_a_file_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="is a folder"):
        prepare_output_file(tmp_path)
