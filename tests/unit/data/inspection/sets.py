"""Data sets that the tests of inspections write: pictures that differ in looks, samples of both kinds, every fault."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Sample = dict[str, Any]


def smooth_picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A picture of a few large blobs of colour, as unlike another seed's as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_lines(path: Path, samples: Iterable[Any]) -> Path:
    """Write samples as JSON lines; a string stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((s if isinstance(s, str) else json.dumps(s)) + "\n" for s in samples), "utf-8")
    return path


def region_samples(folder: Path, count: int, first: int = 0) -> list[Sample]:
    """Region-text samples of pictures 64 x 48, which are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for k in range(first, first + count):
        smooth_picture(k).save(folder / f"p{k}.png")
        regions = [{"box": [k % 20, 2, k % 20 + 10 + r, 20], "text": f"thing {k} {r}"} for r in range(k % 3)]
        samples.append({"id": f"s{k}", "image": f"p{k}.png", "caption": f"A picture number {k}.", "regions": regions})
    return samples


def talk(identity: str, image: str, question: str = "What is this?", answer: str = "A thing.") -> Sample:
    """A conversation of two turns with a region in each."""
    asked = [
        {"type": "image", "image": image},
        {"type": "text", "text": question},
        {"type": "region", "box": [1, 2, 30, 40]},
    ]
    found = [{"type": "text", "text": answer}, {"type": "region", "box": [3, 4, 20, 30], "phrase": "thing"}]
    return {"id": identity, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": found}]}


def _box(sample: Sample, box: Any, text: str = "thing") -> Sample:
    return {**sample, "regions": [{"box": box, "text": text}]}


def _file(sample: Sample, folder: Path, content: bytes) -> Sample:
    name = f"broken-{sample['id']}.jpg"
    (folder / name).write_bytes(content)
    return {**sample, "image": name, "regions": []}


def _cut(sample: Sample, folder: Path) -> Sample:
    return _file(sample, folder, (folder / sample["image"]).read_bytes()[:60])


def bomb(side: int) -> bytes:
    """The beginning of a PNG that says it has so many pixels on each side."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


FAULTS: dict[str, Callable[[Sample, Path], Any]] = {
    "does not exist": lambda s, f: {**s, "image": "none.png", "regions": []},
    "it is an HTML page": lambda s, f: _file(s, f, b"<!DOCTYPE html><html>404</html>"),
    "the file is empty": lambda s, f: _file(s, f, b""),
    "it is a pointer of Git LFS": lambda s, f: _file(s, f, b"version https://git-lfs.github.com/spec/v1\n"),
    "cannot be read": _cut,
    "is too large to open safely": lambda s, f: _file(s, f, bomb(30_000)),
    "is outside the image": lambda s, f: _box(s, [0, 0, 65, 10]),
    "has no area": lambda s, f: _box(s, [5, 5, 5, 10]),
    "has x2 < x1": lambda s, f: _box(s, [9, 5, 5, 10]),
    "has y2 < y1": lambda s, f: _box(s, [1, 9, 5, 3]),
    "is not a list of 4 numbers": lambda s, f: _box(s, [1, 9, 5]),
    "the text of region": lambda s, f: _box(s, [1, 2, 5, 9], "  "),
    "the caption is missing": lambda s, f: {k: v for k, v in s.items() if k != "caption"},
    "unknown key 'captoin'": lambda s, f: {**s, "captoin": "a"},
    "width is stated as 99": lambda s, f: {**s, "width": 99},
    "'regions' is missing": lambda s, f: {**s, "regions": None},
    "not valid JSON": lambda s, f: "{broken",
    "not a JSON object": lambda s, f: "[1, 2]",
}
"""For each fault a piece of how it is told, and what makes a sound sample have it, and no other."""
