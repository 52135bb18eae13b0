"""OWLv2 and OWL-ViT (arXiv 2306.09683, 2205.06230): one box a patch, and the phrase that fits it best.

Transformers' own processor pads lists of phrases of unequal length with the prompt " ", which the model's query mask
lets pass: such a prompt can win a box, and post-processing then looks up a phrase that is not there. Here the parts of
the model are called one by one: pictures once, the distinct phrases of a batch once (pictures share many), and then
each picture's own phrases against its patches, with everything else masked out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    padded_to_square,
    process_images,
    stretched,
)
from cloc_mllm.labeling.stage_options import read_options
from cloc_mllm.labeling.stages import Detection
from cloc_mllm.models.boxes import cxcywh_to_xyxy

PHRASES_AT_ONCE = 256
"""Phrases encoded, or compared with the patches of each picture, at a time, to bound the memory."""


class OwlOptions(DetectorOptions):
    """What an OWL can be told.

    Attributes:
        size: Side of the square that pictures are scaled to, in pixels; 448 is what VESL uses. None: the size that the
            checkpoint was made for, 960 as a rule, with 4.6 times the patches.
    """

    size: int | None = Field(448, gt=0)


def build(name: str, argument: str | None, device: str, options: Mapping[str, Any]) -> OwlDetector:
    """Build the detector; see `cloc_mllm.labeling.stages.build_stage`."""
    return OwlDetector(argument, device, read_options(OwlOptions, options, name))


class OwlDetector:
    """Finds phrases with an OWL. Of each patch's box the best phrase is reported, if it is good enough.

    Args:
        path: Folder or hub name of an `owlv2` or `owlvit` checkpoint.
        device: Where it runs.
        options: Everything else.

    Attributes:
        tally: How many phrases it was given, over all pictures, and of how many the text encoder read the beginning
            only.

    Raises:
        ClocError: There is no such checkpoint, or the size does not fit it.
    """

    def __init__(self, path: str | None, device: str, options: OwlOptions) -> None:
        example, revision = "owlv2:google/owlv2-base-patch16-ensemble", options.revision
        config = load_config(path, example, revision, ("owlv2", "owlvit"))
        assert path is not None  # `load_config` has seen to it
        self.options = options
        self.model = load_model(AutoModelForZeroShotObjectDetection, path, device, options.dtype, revision)
        self.processor = load_image_processor(path, revision)
        self.tokenizer = load_tokenizer(path, revision)
        self.pads = config.model_type == "owlv2"
        self.size = options.size or self.processor.size["height"]
        self.tally = PhraseTally()
        self._towers = self.model.owlv2 if self.pads else self.model.owlvit
        self._text_length = config.text_config.max_position_embeddings
        self._checkpoint = checkpoint_identity(path, config)
        patch = config.vision_config.patch_size
        if self.size % patch:
            problem = f"the detector's size is {self.size}, and its patches have {patch} pixels"
            raise ClocError(problem, remedy=f"Use a multiple, such as size={self.size // patch * patch or patch}.")

    def identity(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {
            "name": "owlv2" if self.pads else "owlvit",
            "model": self._checkpoint,
            "size": self.size,
            "dtype": self.options.dtype,
            "floor": self.options.floor,
            "image_processor": type(self.processor).__name__,
            **versions(),
        }

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Look for each picture's phrases; see `cloc_mllm.labeling.stages.Detector`."""
        found: list[list[Detection]] = [[] for _ in images]
        wanted = {k: list(dict.fromkeys(own)) for k, own in enumerate(phrases) if own}
        if not wanted:
            return found
        distinct = list(dict.fromkeys(phrase for own in wanted.values() for phrase in own))
        place = {phrase: k for k, phrase in enumerate(distinct)}
        features, boxes = self._patches([images[k] for k in wanted])
        own_places = [[place[phrase] for phrase in own] for own in wanted.values()]
        self._count(distinct, own_places)
        logits, best = self._best_phrases(features, self._embed(distinct), own_places)
        scores = logits.sigmoid()
        for row, k in enumerate(wanted):
            keep = scores[row] > self.options.floor
            texts = [distinct[label] for label in best[row][keep].tolist()]
            geometry = padded_to_square(images[k]) if self.pads else stretched(images[k])
            found[k] = make_detections(boxes[row][keep], texts, scores[row][keep], geometry)
        return found

    def _patches(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B, P, D)`` features of the patches and the ``(B, P, 4)`` xyxy boxes they propose, normalised."""
        frame = {"do_pad": True} if self.pads else {"do_center_crop": False}
        size = {"height": self.size, "width": self.size}
        pixels = process_images(self.processor, images, size=size, **frame).pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        grid, _ = self.model.image_embedder(pixels, interpolate_pos_encoding=True)
        features = grid.flatten(1, 2)
        boxes = self.model.box_predictor(features, grid, interpolate_pos_encoding=True)
        return features, cxcywh_to_xyxy(boxes.float())

    def _count(self, phrases: Sequence[str], wanted: Sequence[Sequence[int]]) -> None:
        """Count each picture's phrases, given as places in `phrases`: the sums are the same however it is batched."""
        too_long = [len(ids) > self._text_length for ids in self.tokenizer(list(phrases))["input_ids"]]
        for own in wanted:
            self.tally.count(len(own), shortened=sum(too_long[place] for place in own))

    def _embed(self, phrases: Sequence[str]) -> torch.Tensor:
        """``(T, D)`` embeddings of phrases, of length 1."""
        embeds = []
        for start in range(0, len(phrases), PHRASES_AT_ONCE):
            part = list(phrases[start : start + PHRASES_AT_ONCE])
            tokens = self.tokenizer(
                part, padding=True, truncation=True, max_length=self._text_length, return_tensors="pt"
            ).to(self.model.device)
            pooled = self._towers.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            embed = self._towers.text_projection(pooled)
            embeds.append(embed / torch.linalg.norm(embed, dim=-1, keepdim=True))
        return torch.cat(embeds)

    def _best_phrases(
        self, features: torch.Tensor, embeds: torch.Tensor, wanted: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of a picture's own phrases for each of its patches.

        Args:
            features: ``(B, P, D)`` of the patches.
            embeds: ``(T, D)`` of all phrases.
            wanted: For each picture its phrases' rows in `embeds`.

        Returns:
            ``(B, P)`` logits, in float32, and the ``(B, P)`` rows of `embeds` they are of.
        """
        best = features.new_full(features.shape[:2], -torch.inf, dtype=torch.float32)
        label = torch.zeros_like(best, dtype=torch.long)
        for start in range(0, max(map(len, wanted)), PHRASES_AT_ONCE):
            parts = [torch.tensor(own[start : start + PHRASES_AT_ONCE], dtype=torch.long) for own in wanted]
            padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1).to(features.device)
            logits, _ = self.model.class_predictor(features, embeds[padded.clamp(min=0)])
            logits = logits.float().masked_fill((padded < 0)[:, None], -torch.inf)
            top = logits.max(dim=-1)
            better = top.values > best
            best = torch.where(better, top.values, best)
            label = torch.where(better, padded.gather(1, top.indices), label)
        return best, label
