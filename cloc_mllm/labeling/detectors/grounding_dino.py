"""Grounding DINO (arXiv 2303.05499): the phrases of a picture in one text, boxes scored against its tokens.

Transformers reads an answer's words off the tokens above a threshold, which yields pieces and mixtures of phrases
("red cat dog"). Here each phrase's tokens are known, because the text is put together token by token, and a box gets
the phrase with the best token; that token's confidence is the box's own where a phrase holds its best one.

A text has at most `max_text_len` tokens (256), and transformers cuts off the rest: phrases beyond go into further
texts, and the finds of all texts are joined. Pictures run together only if they are of one size after scaling: padding
a picture changes what a convolution sees at its edge, so that its boxes would depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from transformers import AutoModelForZeroShotObjectDetection

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.checkpoints import checkpoint_identity, load_model, versions
from cloc_mllm.labeling.detectors.common import (
    DetectorOptions,
    PhraseTally,
    load_config,
    load_image_processor,
    load_tokenizer,
    make_detections,
    process_images,
    stretched,
)
from cloc_mllm.labeling.stage_options import read_options
from cloc_mllm.labeling.stages import Detection
from cloc_mllm.models.boxes import cxcywh_to_xyxy

_ENDS_A_PHRASE = str.maketrans(".?", "  ")
"""The marks at which the model's text encoder separates phrases; within one they become blanks."""


class GroundingDinoOptions(DetectorOptions):
    """What Grounding DINO can be told.

    Attributes:
        size: Shortest side that pictures are scaled to, in pixels, while the longest stays below 5/3 of it. None: as
            the checkpoint's image processor says, 800 and 1,333 as a rule.
    """

    size: int | None = Field(None, gt=0)


@dataclass(frozen=True)
class Text:
    """Some of a picture's phrases in one row of tokens.

    Attributes:
        ids: The tokens.
        spans: For each phrase its text and the places of its first and behind its last token.
    """

    ids: list[int]
    spans: list[tuple[str, int, int]]


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> GroundingDinoDetector:
    """Build the detector; see `cloc_mllm.labeling.stages.build_stage`."""
    return GroundingDinoDetector(argument, device, read_options(GroundingDinoOptions, options, name))


class GroundingDinoDetector:
    """Finds phrases with Grounding DINO. Of each box the best phrase is reported, if it is good enough.

    Args:
        path: Folder or hub name of a `grounding-dino` checkpoint.
        device: Where it runs.
        options: Everything else.

    Attributes:
        tally: How many phrases it was given, of how many it could read the beginning only, and how many had no token.

    Raises:
        ClocError: There is no such checkpoint, or its tokenizer does not belong to it.
    """

    def __init__(self, path: str | None, device: str, options: GroundingDinoOptions) -> None:
        example, revision = "grounding-dino:IDEA-Research/grounding-dino-tiny", options.revision
        config = load_config(path, example, revision, ("grounding-dino",))
        assert path is not None  # `load_config` has seen to it
        self.options = options
        self.model = load_model(AutoModelForZeroShotObjectDetection, path, device, options.dtype, revision)
        self.processor = load_image_processor(path, revision)
        self.tokenizer = load_tokenizer(path, revision)
        self.tally = PhraseTally()
        self._checkpoint = checkpoint_identity(path, config)
        self._text_length = config.max_text_len
        self._first, self._last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        self._stop = self.tokenizer.convert_tokens_to_ids(".")
        self._size = {} if options.size is None else {"size": _edges(options.size)}
        known = set(self.model.model.special_tokens.tolist())
        if not {self._first, self._last, self._stop} <= known:
            problem = f"the tokenizer's [CLS], [SEP] and '.' are not among the model's separators {sorted(known)}"
            raise ClocError(problem, file=path, remedy="Use the checkpoint's own tokenizer, BERT's uncased one.")

    def identity(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {
            "name": "grounding-dino",
            "model": self._checkpoint,
            "size": self._size.get("size", dict(self.processor.size)),
            "dtype": self.options.dtype,
            "floor": self.options.floor,
            "image_processor": type(self.processor).__name__,
            **versions(),
        }

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Look for each picture's phrases; see `cloc_mllm.labeling.stages.Detector`."""
        found: list[list[Detection]] = [[] for _ in images]
        texts = {k: own for k, own in enumerate(map(self.texts, phrases)) if own}
        groups: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}
        for k in texts:
            pixels = process_images(self.processor, [images[k]], **self._size).pixel_values
            groups.setdefault(tuple(pixels.shape), []).append((k, pixels))
        for group in groups.values():
            for turn in range(max(len(texts[k]) for k, _ in group)):
                rows = [(k, texts[k][turn], pixels) for k, pixels in group if turn < len(texts[k])]
                answers = self._detect([text for _, text, _ in rows], torch.cat([pixels for *_, pixels in rows]))
                for (k, text, _), (scores, labels, boxes) in zip(rows, answers, strict=True):
                    names = [text.spans[label][0] for label in labels.tolist()]
                    found[k] += make_detections(boxes, names, scores, stretched(images[k]))
        return [sorted(own, key=lambda d: -d.score) for own in found]

    def texts(self, phrases: Sequence[str]) -> list[Text]:
        """Put a picture's phrases into as few texts as their order allows.

        Args:
            phrases: What to look for.

        Returns:
            The texts, `[CLS] a red cat . dog . [SEP]`; none if there is nothing to look for.
        """
        texts: list[Text] = []
        room = self._text_length - 3  # beside [CLS], a full stop and [SEP]
        for phrase in dict.fromkeys(phrases):
            ids = self.tokenizer(phrase.translate(_ENDS_A_PHRASE).lower(), add_special_tokens=False)["input_ids"]
            self.tally.count(1, shortened=int(len(ids) > room), unreadable=int(not ids))
            if not ids:
                continue
            ids = ids[:room]
            if not texts or len(texts[-1].ids) + len(ids) + 2 > self._text_length:
                texts.append(Text([self._first], []))
            start = len(texts[-1].ids)
            texts[-1].ids.extend([*ids, self._stop])
            texts[-1].spans.append((phrase, start, start + len(ids)))
        for text in texts:
            text.ids.append(self._last)
        return texts

    def _detect(
        self, texts: Sequence[Text], pixels: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Scores, places of the best phrases and normalised xyxy boxes above the floor, for each row of a batch."""
        device = self.model.device
        ids = [torch.tensor(text.ids) for text in texts]
        outputs = self.model(
            pixel_values=pixels.to(device, self.model.dtype),
            input_ids=_pad(ids, self.tokenizer.pad_token_id or 0).to(device),
            attention_mask=_pad([torch.ones_like(row) for row in ids], 0).to(device),
        )
        answers = []
        for text, logits, boxes in zip(texts, outputs.logits.float(), outputs.pred_boxes.float(), strict=True):
            each = torch.stack([logits[:, start:stop].amax(dim=1) for _, start, stop in text.spans], dim=1)
            scores, labels = each.sigmoid().max(dim=1)
            keep = scores > self.options.floor
            answers.append((scores[keep], labels[keep], cxcywh_to_xyxy(boxes[keep])))
        return answers


def _pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _edges(shortest: int) -> dict[str, int]:
    """The published ratio of both limits, 800 to 1,333."""
    return {"shortest_edge": shortest, "longest_edge": shortest * 1333 // 800}
