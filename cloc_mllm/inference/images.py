"""Pictures from wherever they are: paths, URLs, PIL images, arrays, bytes."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from cloc_mllm.data.files import is_url, open_url
from cloc_mllm.errors import ClocError
from cloc_mllm.models.image_processing_cloc import ImageSource, load_image

TIMEOUT = 20.0
"""Seconds a download may take."""
MAX_MIB = 64
"""Largest file, in MiB, that is read from a URL."""

_CHUNK = 1 << 16


def read_image(source: ImageSource, timeout: float = TIMEOUT, max_mib: float = MAX_MIB) -> Image.Image:
    """Open a picture: RGB, upright, fully decoded.

    Args:
        source: A path; a URL (``http``, ``https``, or any that fsspec opens, such as ``s3`` and ``hf``); a PIL image;
            an ``(H, W)`` or ``(H, W, 3)`` uint8 array; or the bytes of an image file.
        timeout: Seconds a download over HTTP may take; no single wait is longer, and nothing is read on after it.
        max_mib: Largest file that is read from a URL, in MiB.

    Raises:
        ClocError: It is not there, takes too long, is too large, or is not a picture.
    """
    if not isinstance(source, (str, os.PathLike, bytes, Image.Image)) and not hasattr(source, "__array_interface__"):
        raise ClocError(
            f"a {type(source).__name__} is not a picture",
            remedy="Give a path, a URL, a PIL image, a uint8 array or the bytes of an image file.",
        )
    name = str(source) if isinstance(source, (str, os.PathLike)) else None
    try:
        if name is not None and is_url(name):
            return load_image(_download(name, timeout, int(max_mib * 2**20)))
        return load_image(Path(name).expanduser() if name is not None else source)
    except TypeError as error:  # what Pillow says of arrays that hold no picture
        raise ClocError(f"an array of shape {source.shape} and {source.dtype} is not a picture") from error  # type: ignore[union-attr]
    except ValueError as error:
        raise ClocError(str(error), file=name if name is not None and is_url(name) else None) from error


def with_pictures(conversation: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A conversation whose image items that name a URL hold its picture; all else is left as it is.

    Raises:
        ClocError: As :func:`read_image`.
    """

    def fetched(item: Any) -> Any:
        source = item.get("image") if isinstance(item, Mapping) and item.get("type") == "image" else None
        return {**item, "image": read_image(source)} if isinstance(source, str) and is_url(source) else item

    return [
        {**message, "content": [fetched(item) for item in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple))
        else message
        for message in conversation
    ]


def _download(url: str, timeout: float, limit: int) -> bytes:
    """The bytes behind a URL.

    Raises:
        ClocError: They cannot be had, are too many, or do not come in time.
    """
    deadline = time.monotonic() + timeout
    remedy = "Check the address, or download the picture first."
    try:
        if not url.lower().startswith(("http://", "https://")):
            with open_url(url) as file:
                return _read(file, url, limit, None)
        request = urllib.request.Request(url, headers={"User-Agent": "cloc_mllm"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return _read(response, url, limit, deadline)
    except TimeoutError as error:
        raise ClocError(f"no answer within {timeout:g} s", file=url, remedy=remedy) from error
    except urllib.error.HTTPError as error:
        raise ClocError(f"the server answers {error.code} {error.reason}", file=url, remedy=remedy) from error
    except (OSError, ValueError) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise ClocError(f"no answer within {timeout:g} s", file=url, remedy=remedy) from error
        raise ClocError(f"cannot be read: {getattr(error, 'reason', error)}", file=url, remedy=remedy) from error


def _read(file: BinaryIO, url: str, limit: int, deadline: float | None) -> bytes:
    """All of a file, piece by piece: a server that drips bytes is not waited for, one that never ends not read on."""
    # `read1` hands over what has come; `read` would wait for all of it.
    read = getattr(file, "read1", file.read)
    pieces, size = [], 0
    while piece := read(_CHUNK):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise ClocError(f"the file is larger than {limit / 2**20:g} MiB", file=url, remedy="Make it smaller.")
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(pieces)
