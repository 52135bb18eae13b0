"""Captions by a model behind an OpenAI-compatible endpoint; pictures travel within the request."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from pydantic import PositiveInt

from cloc_mllm.data.tar_shards import Sample
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.captioners.existing import name_of
from cloc_mllm.labeling.captioners.prompts import DESCRIBE
from cloc_mllm.labeling.chat_endpoint import ChatEndpoint, EndpointOptions
from cloc_mllm.labeling.stage_options import read_options
from cloc_mllm.labeling.stages import Captioner

JPEG_QUALITY = 95


class OpenaiOptions(EndpointOptions):
    """Options of `openai`, beside those of every endpoint.

    Attributes:
        prompt: What is asked about each picture.
        max_side: Larger pictures are scaled down to this length of their longer side, in pixels.
    """

    prompt: str = DESCRIBE
    max_side: PositiveInt = 1024


class OpenaiCaptioner:
    """Captions by an endpoint.

    Args:
        target: `BASE_URL#MODEL`.
        options: How it is asked.
    """

    def __init__(self, target: str, options: OpenaiOptions) -> None:
        self._endpoint, self._options = ChatEndpoint(target, options), options

    def __call__(self, images: Sequence[Image.Image], samples: Sequence[Sample]) -> list[list[str]]:
        """Caption a batch.

        Args:
            images: RGB pictures, upright.
            samples: The samples they are of, for messages.

        Returns:
            For each picture its caption; none if the model said nothing.

        Raises:
            ClocError: The endpoint did not answer; it names the sample.
        """
        turns = [self._messages(image) for image in images]
        texts = self._endpoint.answer(turns, [name_of(sample) for sample in samples])
        return [[" ".join(text.split())] if text else [] for text in texts]

    def _messages(self, image: Image.Image) -> list[dict[str, Any]]:
        content = [
            {"type": "image_url", "image_url": {"url": data_uri(image, self._options.max_side)}},
            {"type": "text", "text": self._options.prompt},
        ]
        return [{"role": "user", "content": content}]

    def identity(self) -> Mapping[str, Any]:
        """Model, request, prompt, and how pictures are sent."""
        sent = {"format": f"JPEG {JPEG_QUALITY}", "max_side": self._options.max_side}
        return {"name": "openai", **self._endpoint.identity(), "prompt": self._options.prompt, "images": sent}


def data_uri(image: Image.Image, max_side: int) -> str:
    """A picture as a JPEG inside a URI.

    Args:
        image: RGB.
        max_side: Longest side in pixels.
    """
    if max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> Captioner:
    """Build `openai:BASE_URL#MODEL`; it needs no device here.

    Raises:
        ClocError: No endpoint is named, or an option is wrong.
    """
    if argument is None:
        raise ClocError(f"'{name}' needs an address", remedy=f"As in {name}:http://localhost:8000/v1#MODEL.")
    return OpenaiCaptioner(argument, read_options(OpenaiOptions, options, name))
