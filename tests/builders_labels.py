"""Small deterministic stages of VESL, named by this module's path, and folders of pictures to label with them.

Each stage notes the batches that it was called with in a file, if its option `log` names one: its answers do not depend
on that, so its identity does not tell of it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cloc_mllm.data.readers import open_samples
from cloc_mllm.labeling.config import LabelConfig, load_label_config
from cloc_mllm.labeling.detectors.common import PhraseTally
from cloc_mllm.labeling.stages import Detection
from tests.builders import noise_image

HERE = "tests.builders_labels"
WORDS = ("cat", "dog", "red ball", "tree", "old house", "sky", "bench", "car")


class _Small:
    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        self.kind, self.options = kind, dict(options)

    def identity(self) -> dict[str, Any]:
        return {"name": self.kind, "seed": self.options.get("seed", 0)}

    def note(self, count: int) -> None:
        if log := self.options.get("log"):
            with open(log, "a") as file:
                file.write(f"{self.kind} {count}\n")
        time.sleep(self.options.get("sleep", 0))

    def draw(self, *facts: Any) -> float:
        """A number from 0 to 1 that depends on facts and the seed alone."""
        text = repr([self.options.get("seed", 0), *facts])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


class SmallCaptioner(_Small):
    """Says what a picture's sample says, or a caption made of its pixels."""

    def __call__(self, images: Sequence[Image.Image], samples: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        self.note(len(images))
        told = [list(s.get("captions") or filter(None, [s.get("caption")])) for s in samples]
        return [texts or [self.describe(images[k])] for k, texts in enumerate(told)]

    def describe(self, image: Image.Image) -> str:
        seen = image.resize((1, 1)).getpixel((0, 0)), image.size, image.tobytes()[:99]
        named = [word for word in WORDS if self.draw(word, seen) < 0.4]
        return f"a picture of {' and '.join(named) or 'nothing'}"


class SmallPhrases(_Small):
    """The words of `WORDS` that the captions have."""

    def __call__(self, captions: Sequence[Sequence[str]]) -> list[list[str]]:
        self.note(len(captions))
        return [[word for word in WORDS if any(word in text for text in texts)] for texts in captions]


class SmallDetector(_Small):
    """Finds each phrase where a hash of it and the picture says; of phrases of two words it reads the first alone."""

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        super().__init__(kind, options)
        self.tally = PhraseTally()

    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        self.note(len(images))
        if (die_at := self.options.get("die_at")) and any(die_at in texts for texts in phrases):
            os.kill(os.getpid(), signal.SIGKILL)
        for texts in phrases:
            self.tally.count(len(texts), shortened=sum(" " in text for text in texts))
        return [self.find(image, texts) for image, texts in zip(images, phrases, strict=True)]

    def find(self, image: Image.Image, phrases: Sequence[str]) -> list[Detection]:
        width, height = image.size
        found = []
        for phrase in phrases:
            x, y = (self.draw(axis, phrase, image.tobytes()[:99]) / 2 for axis in "xy")
            box = (x * width, y * height, (x + 0.5) * width, (y + 0.4) * height)
            found.append(Detection(box, phrase, self.draw("score", phrase, image.size)))
        return sorted(found, key=lambda detection: -detection.score)


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> Any:
    """The stage whose kind the argument names."""
    kinds = {"captioner": SmallCaptioner, "phrases": SmallPhrases, "detector": SmallDetector}
    return kinds[argument or ""](argument or "", options)


def write_pictures(folder: Path, count: int) -> Path:
    """A folder of small noisy pictures in two sub-folders, in forms of several kinds."""
    for number in range(count):
        place = folder / ("a" if number % 3 else "b") / f"{number:04d}.{('png', 'jpg', 'webp')[number % 3]}"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise_image(24 + number % 5, 20 + number % 7, seed=number).save(place)
    return folder


def small_config(source: Path | str, out: Path, *overrides: str, log: Path | None = None) -> LabelConfig:
    """A configuration of the stages above, in this process."""
    given: dict[str, Any] = {"source": str(source), "out": str(out), "workers": 0, "shard": 4}
    for name in ("captioner", "phrases", "detector"):
        options = {} if log is None else {"log": str(log)}
        given[name] = {"stage": f"{HERE}:{name}", "batch_size": 3, "options": options}
    return load_label_config(None, given, overrides)


def output_bytes(out: Path) -> dict[str, bytes]:
    """The files of a finished set by name, those that tell of time left out."""
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file() and not p.name.startswith("report")}


def labelled(out: Path) -> list[dict[str, Any]]:
    """The samples of a finished set."""
    source = open_samples(out)
    return [source[k] for k in range(len(source))]
