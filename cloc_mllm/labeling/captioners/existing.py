"""The captions that samples have already.

`caption` comes first and `captions` after it. What an alt text is called in a source does not matter here: sources hand
it over as `caption` (a WebDataset's `key.txt` is that too), and there is no further key for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from cloc_mllm.data.tar_shards import Sample
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.stage_options import StageOptions, no_argument, read_options
from cloc_mllm.labeling.stages import Captioner


class ExistingOptions(StageOptions):
    """`existing` has no options."""


class Existing:
    """Takes a sample's own captions."""

    def __call__(self, images: Sequence[Image.Image], samples: Sequence[Sample]) -> list[list[str]]:
        """The captions of each sample; the pictures are not looked at.

        Raises:
            ClocError: A caption is no text.
        """
        return [own_captions(sample) for sample in samples]

    def identity(self) -> Mapping[str, Any]:
        """Its name: it depends on nothing else."""
        return {"name": "existing", "rules": 1}


def own_captions(sample: Sample) -> list[str]:
    """The distinct captions of a sample, the first being `caption`; blank ones are none.

    Raises:
        ClocError: A caption is no text.
    """
    further = sample.get("captions") or []
    texts = [sample.get("caption"), *(further if isinstance(further, (list, tuple)) else [further])]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ClocError(f"a caption is {text!r}, no text", sample=name_of(sample), remedy="Mend or remove it.")
    stripped = [text.strip() for text in texts if text is not None]
    return list(dict.fromkeys(text for text in stripped if text))


def name_of(sample: Sample) -> str:
    """What to call a sample in a message."""
    return str(sample.get("id", "without an id"))


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> Captioner:
    """Build `existing`; it needs no device.

    Raises:
        ClocError: It was given an argument or an option.
    """
    no_argument(name, argument)
    read_options(ExistingOptions, options, name)
    return Existing()
