"""Zero-shot classification while training: images against the embeddings of their classes' names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from cloc_mllm.data.labelled import LabelledImages
from cloc_mllm.objectives import gather_with_grad
from cloc_mllm.objectives.retrieval import shared_top1
from cloc_mllm.training.presets.options import ZeroShotOptions
from cloc_mllm.training.running import launch

Embed = Callable[[dict[str, Any]], Any]


class ZeroShot:
    """A set of labelled images and the texts of their classes.

    Args:
        options: The preset's `data.zero_shot` block.
        processor: The encoder's.
        world: This process's place: images and texts are shared out.
        batch_size: Images, or texts, a process embeds at once.

    Raises:
        ClocError: The images or their classes cannot be read.
    """

    def __init__(self, options: ZeroShotOptions, processor: Any, world: launch.World, batch_size: int) -> None:
        self.images = LabelledImages(options.path, options.samples)
        self.templates = options.templates
        self.processor, self.world, self.batch_size = processor, world, batch_size

    @torch.no_grad()
    def __call__(self, embed: Embed) -> dict[str, float]:
        """Classify; every process has to call this.

        Args:
            embed: Runs the whole model on a batch: at ZeRO-3 no part of it has its weights otherwise.

        Returns:
            `zero_shot_top1`, and its mean over classes, `zero_shot_macc`.
        """
        prompts = [template.format(name) for name in self.images.classes for template in self.templates]
        texts = self._embed_texts(embed, prompts).unflatten(0, (len(self.images.classes), len(self.templates)))
        classes = functional.normalize(texts.mean(dim=1), dim=-1)
        found = self._embed_images(embed)
        labels = torch.tensor(self.images.labels, device=found.device)
        top1, mean = shared_top1(found, classes, labels, torch.arange(len(classes), device=found.device))
        return {"zero_shot_top1": top1, "zero_shot_macc": mean}

    def _embed_texts(self, embed: Embed, prompts: Sequence[str]) -> torch.Tensor:
        picture = self.processor.image_processor([self.images[0]])["pixel_values"]
        parts = [
            embed({"pixel_values": picture, **self.processor.tokenize([prompts[k] for k in rows])}).text_embeds
            for rows in self._my_batches(len(prompts))
        ]
        return gather_with_grad(torch.cat(parts).float())[: len(prompts)]

    def _embed_images(self, embed: Embed) -> torch.Tensor:
        text = self.processor.tokenize([self.images.classes[0]])
        parts = []
        for rows in self._my_batches(len(self.images)):
            pixels = self.processor.image_processor([self.images[k] for k in rows])["pixel_values"]
            parts.append(embed({"pixel_values": pixels, **text}).image_embeds)
        return gather_with_grad(torch.cat(parts).float())[: len(self.images)]

    def _my_batches(self, count: int) -> list[list[int]]:
        """This process's share, as batches; every process has as many, the last one repeating what is left over.

        The shares follow one another, so that what is gathered is in order and repeats stand behind all else.
        """
        share = -(-count // self.world.size)
        mine = [min(self.world.rank * share + k, count - 1) for k in range(share)]
        return [mine[start : start + self.batch_size] for start in range(0, share, self.batch_size)]
