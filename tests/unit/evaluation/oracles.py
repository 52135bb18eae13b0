"""Encoders and answerers that know the truth, or its opposite, behind the real protocols."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from cloc_mllm.evaluation.encoders.localizers import Located
from cloc_mllm.evaluation.encoders.readouts import Box, EncodedImages
from cloc_mllm.evaluation.encoders.region_data import RegionSplit
from cloc_mllm.models.answer_text import AnswerText
from cloc_mllm.models.geometry import Geometry

DIM = 6000


class TruthEncoder:
    """One dimension for each text; an image or region points along every text that is true of it.

    Args:
        splits: What it knows.
        sign: 1 tells the truth; -1 turns every image and region around, so that all that is false comes first.
    """

    def __init__(self, splits: Sequence[RegionSplit], sign: float = 1.0) -> None:
        self.name = self.preprocessing = "truth"
        self.methods, self.scale, self.bias = ["prompter"], 1.0, None
        self.sign = sign
        self._rows: dict[str, int] = {}
        self.captions = {name: some for split in splits for name, some in zip(split.ids, split.captions, strict=True)}
        self.regions = {(split.ids[region.image], region.box): region for split in splits for region in split.regions}
        self.encoded: list[str] = []

    def row(self, text: str) -> int:
        return self._rows.setdefault(text, len(self._rows))

    def encode_images(self, pictures: Sequence[Image.Image], ids: Sequence[str]) -> EncodedImages:
        self.encoded += ids
        embeds = torch.zeros(len(ids), DIM)
        for k, name in enumerate(ids):
            embeds[k, [self.row(caption) for caption in self.captions[name]]] = self.sign
        return EncodedImages(
            ids=ids,
            pictures=pictures,
            geometries=[Geometry.fit(*picture.size, 96) for picture in pictures],
            embeds=embeds,
            tokens=torch.zeros(len(ids), 1, 1),
        )

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([self.row(text) for text in texts]), DIM).float()


class TruthReadout:
    """Reads regions off a :class:`TruthEncoder`'s knowledge."""

    def __init__(self, encoder: TruthEncoder, name: str = "prompter", sign: float | None = None) -> None:
        self.encoder, self.name = encoder, name
        self.sign = encoder.sign if sign is None else sign

    def embed(self, images: EncodedImages, boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
        mine = [
            self.encoder.regions[name, tuple(box)]
            for name, of_image in zip(images.ids, boxes, strict=True)
            for box in of_image
        ]
        embeds = torch.zeros(len(mine), DIM)
        for k, region in enumerate(mine):
            true = set(region.attributes.values()) or set(region.text.split())
            said = re.compile(rf"\b{re.escape(region.text)}\b")  # within the sentences that class names are put into
            texts = [
                text
                for text in self.encoder._rows
                if set(text.split()) <= true or (not region.attributes and said.search(text))
            ]
            embeds[k, [self.encoder.row(text) for text in texts]] = self.sign
        return embeds


class TruthLocalizer:
    """Finds the box of the region whose text is asked for, moved by ``shift`` pixels."""

    def __init__(self, encoder: TruthEncoder, name: str, trained: bool, shift: float = 0.0) -> None:
        self.encoder, self.name, self.trained, self.shift = encoder, name, trained, shift

    def locate(self, images: EncodedImages, text_embeds: torch.Tensor, owner: torch.Tensor) -> Located:
        texts = list(self.encoder._rows)
        boxes = []
        for embed, image in zip(text_embeds, owner.tolist(), strict=True):
            text = texts[int(embed.argmax())]
            name = images.ids[image]
            (box,) = [r.box for (i, _), r in self.encoder.regions.items() if i == name and r.text == text and r.unique]
            boxes.append([value + self.shift for value in box])
        found = np.array(boxes)
        return Located(found, (found[:, :2] + found[:, 2:]) / 2)


class ScriptedAnswerer:
    """Answers each conversation by a function of its messages; counts what it is asked."""

    def __init__(self, answer: Callable[[Sequence[Mapping[str, Any]]], AnswerText]) -> None:
        self.answer = answer
        self.asked = 0

    def chat(self, conversations: Sequence[Any], max_new_tokens: int = 1, batch_size: int = 1) -> list[AnswerText]:
        self.asked += len(conversations)
        return [self.answer(conversation) for conversation in conversations]


def asked_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The words of a conversation's last turn."""
    return "".join(item["text"] for item in messages[-1]["content"] if item["type"] == "text")


def silent() -> ScriptedAnswerer:
    """An answerer that says nothing."""
    return ScriptedAnswerer(lambda messages: AnswerText())
