"""What the stages of VESL hand to each other: pictures → captions → phrases → detections → region-text samples.

A stage is a callable over a batch that keeps no state between calls, so the same batch gives the same answer in any
process. Each kind has its table of names; a stage is built from a specification `name` or `name:argument`
(`owlv2:google/owlv2-base-patch16-ensemble`) and imported only then.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from cloc_mllm.data.tar_shards import Sample
from cloc_mllm.errors import ClocError

Box = tuple[float, float, float, float]


class StageError(ClocError):
    """A stage fails whatever the sample: an endpoint that is not there, a key that it does not take.

    It ends a labelling. Any other `ClocError` or `ValueError` of a stage is the fault of the sample that it fails on
    alone, and `on_bad_sample` says what becomes of that.
    """


@dataclass(frozen=True)
class Detection:
    """A phrase found in a picture.

    Attributes:
        box: xyxy in pixels of the original picture.
        text: The phrase.
        score: The detector's confidence, 0 to 1.
    """

    box: Box
    text: str
    score: float


class Stage(Protocol):
    """What every stage tells of itself."""

    def identity(self) -> Mapping[str, Any]:
        """What its answers depend on, as plain data: name, model and its revision or hash, thresholds, versions.

        It is recorded in the output and decides whether a cached answer may be used again.
        """
        ...


class Captioner(Stage, Protocol):
    """Describes pictures."""

    def __call__(self, images: Sequence[Image.Image], samples: Sequence[Sample]) -> list[list[str]]:
        """Caption a batch.

        Args:
            images: RGB pictures, upright.
            samples: The samples they are of, for the texts that are there already.

        Returns:
            For each picture its captions, the best first; empty if it has none.
        """
        ...


class PhraseExtractor(Stage, Protocol):
    """Finds what captions speak of."""

    def __call__(self, captions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Extract phrases.

        Args:
            captions: For each picture its captions.

        Returns:
            For each picture its distinct phrases, in order of appearance.
        """
        ...


class Detector(Stage, Protocol):
    """Finds phrases in pictures."""

    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Look for each picture's phrases.

        Args:
            images: RGB pictures, upright.
            phrases: For each picture what to look for; may be empty.

        Returns:
            For each picture every detection above the detector's own low floor, unfiltered, boxes within the picture,
            in descending order of score.
        """
        ...


_HERE = "cloc_mllm.labeling"

CAPTIONERS: dict[str, str] = {
    "existing": f"{_HERE}.captioners.existing",
    "hf": f"{_HERE}.captioners.transformers_model",
    "openai": f"{_HERE}.captioners.openai_endpoint",
    "fuse": f"{_HERE}.captioners.fusion",
}
PHRASES: dict[str, str] = {
    "textblob": f"{_HERE}.phrases.noun_phrases",
    "spacy": f"{_HERE}.phrases.noun_phrases",
    "ngrams": f"{_HERE}.phrases.ngrams",
}
DETECTORS: dict[str, str] = {
    "owlv2": f"{_HERE}.detectors.owlv2",
    "grounding-dino": f"{_HERE}.detectors.grounding_dino",
    "cam": f"{_HERE}.detectors.class_activation",
}
"""Name of a stage to its module, which has `build(name, argument, device, options)`."""


def build_stage(
    table: Mapping[str, str], spec: str, device: str = "cpu", options: Mapping[str, Any] | None = None
) -> Any:
    """Build a stage from its specification.

    Args:
        table: `CAPTIONERS`, `PHRASES` or `DETECTORS`.
        spec: `name` or `name:argument`; the argument is a model's folder or hub name, or an address. A name with a dot
            in it is a module of one's own that has `build` (`my_stages.blip:large`).
        device: Where its model runs.
        options: Further options of that stage; it refuses those it does not know.

    Returns:
        The stage.

    Raises:
        ClocError: There is no such stage, or it cannot be built (a missing package, model or option).
    """
    name, _, argument = spec.partition(":")
    if name not in table and "." not in name:
        remedy = f"There are: {', '.join(table)}; or name a module of your own, as in my_stages.blip."
        raise ClocError(f"there is no '{name}' here", remedy=remedy)
    return _module(table, name).build(name, argument or None, device, dict(options or {}))


def _module(table: Mapping[str, str], name: str) -> Any:
    """The module of a stage's name, or the one that the name is."""
    if name in table:
        return importlib.import_module(table[name])
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ClocError(f"there is no module '{name}'", remedy="Put its folder on PYTHONPATH.") from error
    if not hasattr(module, "build"):
        raise ClocError(f"the module '{name}' has no build(name, argument, device, options)", file=module.__file__)
    return module
