"""Where commands may write: checked before the work starts, not after an hour of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cloc_mllm.errors import ClocError


def prepare_output_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder, with its parents, and prove that a file can be written in it.

    Args:
        path: The folder; it may exist.

    Returns:
        The folder's absolute path.

    Raises:
        ClocError: It cannot be made or written to.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # os.access answers for the mode bits only (and always yes for root); a real file answers for the file system.
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ClocError(
            f"cannot write here ({error.strerror})", file=folder, remedy="Choose another folder with --out."
        ) from error


def empty_output_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder to write, or take it if it is there and empty.

    Args:
        path: The folder.

    Returns:
        The folder's absolute path.

    Raises:
        ClocError: It cannot be written to, or holds something.
    """
    folder = prepare_output_folder(path)
    if any(folder.iterdir()):
        raise ClocError("the folder is not empty", file=folder, remedy="Choose another one with --out.")
    return folder


def prepare_output_file(path: str | os.PathLike[str]) -> Path:
    """Make a file's parent folder and prove that the file can be written.

    Args:
        path: The file; it may exist and is then left as it is.

    Returns:
        The file's absolute path.

    Raises:
        ClocError: It cannot be written, or is a folder.
    """
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        raise ClocError("is a folder, but a file is to be written", file=file)
    prepare_output_folder(file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise ClocError("cannot write here (Permission denied)", file=file)
    return file
