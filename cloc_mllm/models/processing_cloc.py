"""Images, texts and prompts in pixels, to the tensors :class:`ClocModel` takes, and its boxes back to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .geometry import Geometry
from .image_processing_cloc import ImageSource, load_image


class ClocProcessor(ProcessorMixin):
    """Processor of the CLOC encoder.

    Args:
        image_processor: A :class:`ClocImageProcessor`.
        tokenizer: The text encoder's tokenizer.
        max_length: Longest text in tokens; longer ones are cut (paper: 77).
        lower_case: Whether texts are lower-cased first (paper: yes).
        fixed_length: Whether every text is padded to ``max_length`` and its padding attended to. SigLIP's text encoder
            was trained so and is read at the last position: a trimmed text would have another embedding.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_length: int = 77,
        lower_case: bool = True,
        fixed_length: bool = False,
        **kwargs: Any,
    ) -> None:
        if getattr(image_processor, "image_grid_pinpoints", None) is not None:
            raise ValueError("the encoder takes one square an image: resize_mode 'anyres' is for the MLLM")
        self.max_length = max_length
        self.fixed_length = fixed_length
        self.lower_case = lower_case
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        input_boxes: Sequence[Sequence[Sequence[float]]] | None = None,
        input_points: Sequence[Sequence[Sequence[float]]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare model inputs.

        Args:
            images: One image or a list of B.
            text: One text or a list.
            input_boxes: For each image its list of ``[x1, y1, x2, y2]`` boxes in pixels of the original image; lists
                may differ in length and be empty.
            input_points: For each image its list of ``[x, y]`` points in pixels of the original image.
            **kwargs: Only ``return_tensors="pt"`` is known.

        Returns:
            Those of ``pixel_values`` ``(B, 3, H, W)``; ``input_ids`` and ``attention_mask`` ``(T, L)``;
            ``input_boxes`` ``(R, 4)`` or ``input_points`` ``(R, 2)``, float32, normalised, model frame; and their
            ``box_image_index`` or ``point_image_index`` ``(R,)`` that apply.

        Raises:
            ValueError: If an image cannot be read, or a box has no area, is out of order or lies outside its image.
        """
        if kwargs.pop("return_tensors", "pt") != "pt" or kwargs:
            raise ValueError(f"only return_tensors='pt' is understood, not {kwargs or 'another format'}")
        data: dict[str, torch.Tensor] = {}
        pictures = self._pictures(images)
        if pictures:
            data["pixel_values"] = self.image_processor(pictures)["pixel_values"]
        if text is not None:
            data |= self.tokenize([text] if isinstance(text, str) else list(text))
        if input_boxes is not None:
            data["input_boxes"], data["box_image_index"] = self._place(pictures, input_boxes, 4)
        if input_points is not None:
            data["input_points"], data["point_image_index"] = self._place(pictures, input_points, 2)
        return BatchFeature(data)

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask``, padded on the right to the longest text, cut at ``max_length``.

        With ``fixed_length``, padded to ``max_length`` on the tokenizer's own side, and the mask leaves nothing out.
        """
        encoded = self.tokenizer(
            [text.lower() if self.lower_case else text for text in texts],
            padding="max_length" if self.fixed_length else True,
            padding_side=self.tokenizer.padding_side if self.fixed_length else "right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if self.fixed_length else mask}

    def geometry(self, image: ImageSource) -> Geometry:
        """How ``image`` lies in the model frame."""
        return self.image_processor.geometry(*load_image(image).size)

    def post_process_boxes(self, boxes: torch.Tensor, image: ImageSource) -> torch.Tensor:
        """``(R, 4)`` normalised boxes of the model frame to pixels of ``image``, clipped to it."""
        return self.geometry(image).boxes_from_model(boxes)

    @staticmethod
    def _pictures(images: ImageSource | Sequence[ImageSource] | None) -> list[Any]:
        if images is None:
            return []
        several: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        return [load_image(image) for image in several]

    def _place(
        self, pictures: list[Any], prompts: Sequence[Sequence[Sequence[float]]], width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ragged prompts in pixels to flat normalised ones with the image of each."""
        if len(prompts) != len(pictures):
            raise ValueError(f"{len(pictures)} images, but prompts for {len(prompts)}: give one list for each image")
        placed, index = [torch.zeros(0, width)], [torch.zeros(0, dtype=torch.long)]
        for number, (picture, of_image) in enumerate(zip(pictures, prompts, strict=True)):
            if not len(of_image):
                continue
            for prompt in of_image:
                check_prompt(prompt, picture.width, picture.height, width)
            place = self.image_processor.geometry(*picture.size)
            to_model = place.boxes_to_model if width == 4 else place.points_to_model
            placed.append(to_model(of_image))
            index.append(torch.full((len(of_image),), number))
        return torch.cat(placed), torch.cat(index)


def check_prompt(prompt: Sequence[float], width: int, height: int, numbers: int = 4) -> None:
    """Refuse a box or point that is malformed or outside a ``width`` x ``height`` image.

    Args:
        prompt: ``[x1, y1, x2, y2]`` or ``[x, y]`` in pixels of the original image.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        numbers: 4 for a box, 2 for a point.

    Raises:
        ValueError: Naming the prompt, the image's size and what is wrong.
    """
    values = [float(v) for v in prompt]
    kind = "box" if numbers == 4 else "point"
    if len(values) != numbers or any(v != v for v in values):
        raise ValueError(f"{kind} {values} is not {numbers} numbers")
    if numbers == 4 and (values[2] <= values[0] or values[3] <= values[1]):
        raise ValueError(f"box {values} is empty or has its corners out of order: x1 < x2 and y1 < y2 are needed")
    inside = all(0 <= v <= limit for v, limit in zip(values, (width, height) * (numbers // 2), strict=True))
    if not inside:
        raise ValueError(f"{kind} {values} is outside the image of {width} x {height} pixels")
