"""Pictures that lie inside an annotation file: a row of a Parquet file, or a member of a tar archive.

Annotations sorted on disk keep only where a picture lies; it is read when its sample is made.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from cloc_mllm.errors import ClocError


def read_held(place: list[Any]) -> bytes:
    """Return the encoded bytes of a picture.

    Args:
        place: `["parquet", file, row group, row in it]` with the picture in the column `image`, or `["tar", file,
            offset, size]`.

    Raises:
        ClocError: The file has changed or cannot be read.
    """
    kind, file, first, second = place
    try:
        if kind == "tar":
            with Path(file).open("rb") as archive:
                archive.seek(first)
                member = archive.read(second)
            if len(member) != second:
                raise ClocError("the archive ends within a picture", file=file, remedy="Fetch it again.")
            return member
        image = _row_group(file, first)[second].as_py()
    except OSError as error:
        raise ClocError(f"cannot read a picture in it: {error}", file=file, remedy="Fetch it again.") from error
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise ClocError("a row holds no picture", file=file, sample=second, remedy="Give --images, a folder of them.")
    return content


@lru_cache(maxsize=1)
def _row_group(file: str, number: int) -> Any:
    """The pictures of one row group; rows are asked for in order, so one is enough to keep."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file).read_row_group(number, columns=["image"]).column("image")
