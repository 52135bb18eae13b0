"""Conversations for alignment, made of region-text samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from cloc_mllm.data.builders.templates import DESCRIBE_IMAGE, GROUND, GROUND_EACH, REFER
from cloc_mllm.data.dataset import RegionTextDataset, SkipCount
from cloc_mllm.data.english import content_words, without_article
from cloc_mllm.data.lengths import REGION_TOKENS, TokensOfImage
from cloc_mllm.data.messages import question_items, text_item, turn
from cloc_mllm.data.phrases import fits
from cloc_mllm.errors import ClocError
from cloc_mllm.models.answer_text import absent_answer
from cloc_mllm.training.presets.options import AlignDataOptions

ABSENT_DRAWS = 8
"""Other samples that are looked at, at most, for each phrase that is to be absent."""


class AlignConversations(Dataset):
    """Region-text samples as short conversations: tell what is seen, name what is shown, find what is named.

    Args:
        dataset: The samples, with all regions they are to have.
        options: How many regions are named (`referring`), found (`grounding`: only phrases that name one region of
            their image), found each of several (`several`) and asked for in vain (`absent`); or that the caption alone
            is learnt (`prompts: plain`).
        seed: Seed of which regions play which part.
    """

    def __init__(self, dataset: RegionTextDataset, options: AlignDataOptions, seed: int) -> None:
        self.dataset, self.options, self.seed = dataset, options, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data this is."""
        self._epoch = epoch
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self._epoch)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """The conversation at an index in a given pass over the data."""
        item = self.dataset.item(index, epoch)
        image = {"type": "image", "image": item["image"]}
        if self.options.prompts == "plain":
            return self._item(index, item, turn([image], item["caption"]))
        drawn = np.random.default_rng([self.seed, epoch, index])
        regions = [item["regions"][int(k)] for k in drawn.permutation(len(item["regions"]))]
        to_find = [region for region in regions if region["unique"]][: self.options.grounding]
        to_name = [region for region in regions if not any(region is found for found in to_find)]
        if len(to_name) < self.options.referring:
            to_name += to_find
        messages = turn([image, text_item(DESCRIBE_IMAGE)], item["caption"])
        for region in to_name[: self.options.referring]:
            messages += turn(question_items(REFER, [{"box": region["box"]}]), str(region["text"]))
        for region in to_find:
            answer = [
                text_item(f"{region['text']} "),
                {"type": "region", "box": region["box"], "phrase": region["text"]},
            ]
            messages += turn([text_item(GROUND.format(phrase=without_article(region["text"])))], answer)
        for phrase, boxes in self._several(regions):
            each = [{"type": "region", "box": box, "phrase": phrase} for box in boxes]
            messages += turn(
                [text_item(GROUND_EACH.format(phrase=without_article(phrase)))], [text_item(f"{phrase} "), *each]
            )
        for phrase in self._absent(item, drawn):
            messages += turn([text_item(GROUND.format(phrase=without_article(phrase)))], absent_answer(phrase))
        return self._item(index, item, messages)

    def _item(self, index: int, item: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
        name = {"id": item["id"], "sample": item["id"], "file": self.where(index)[0]}
        return {"messages": messages, **name, "index": index}

    def _several(self, regions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
        """Phrases that fit several regions, and the boxes of all of them.

        A phrase fits a region whose text holds all of its words, as in `unique_regions`.
        """
        ambiguous = dict.fromkeys(str(region["text"]) for region in regions if not region["unique"])
        fitting = (
            (phrase, [region["box"] for region in regions if fits(phrase, str(region["text"]))]) for phrase in ambiguous
        )
        yield from itertools.islice(((p, boxes) for p, boxes in fitting if len(boxes) > 1), self.options.several)

    def _absent(self, item: dict[str, Any], drawn: np.random.Generator) -> list[str]:
        """Phrases of other samples that share no word with anything this image is said to show.

        That is stricter than it need be (with a "red ring" there, no "red star" is asked for), since neither caption
        nor regions say everything. Words such as "the" do not count. Fewer where few are found.
        """
        here = content_words(" ".join([item["caption"], *(str(region["text"]) for region in item["regions"])]))
        found: list[str] = []
        for other in drawn.integers(len(self.dataset), size=self.options.absent * ABSENT_DRAWS).tolist():
            if len(found) == self.options.absent:
                break
            texts = [str(region["text"]) for region in self._regions_of(other)]
            free = [
                text for text in texts if text not in found and content_words(text) and not content_words(text) & here
            ]
            if free:
                found.append(free[int(drawn.integers(len(free)))])
        return found

    def _regions_of(self, index: int) -> list[Any]:
        """The regions of a sample as they stand in its file, its picture unread; none if they are malformed."""
        try:
            regions = self.dataset.source[index].get("regions")
        except ClocError:
            return []  # `on_bad_sample` decides when the sample itself is loaded
        listed = regions if isinstance(regions, list) else []
        return [region for region in listed if isinstance(region, Mapping) and isinstance(region.get("text"), str)]

    def lengths(self, image_tokens: TokensOfImage, epoch: int = 0) -> npt.NDArray[np.int64]:
        """See `ConversationDataset.lengths`; a turn about a region, which is drawn, counts `REGION_TOKENS`."""
        found = self.dataset.lengths(image_tokens).copy()
        asked = self.options.referring + self.options.grounding + self.options.several
        if asked:
            counts = [min(len(self._regions_of(index)), asked) for index in range(len(self))]
            found[:, 1] += np.asarray(counts) * REGION_TOKENS
        return found

    def where(self, index: int) -> tuple[str | None, str]:
        """File and name of a sample, for messages."""
        return self.dataset.where(index)

    @property
    def on_bad_sample(self) -> str:
        """What happens to a broken sample."""
        return self.dataset.on_bad_sample

    @property
    def skips(self) -> SkipCount:
        """Where samples that a batch had to leave out are counted."""
        return self.dataset.skips

    @property
    def skipped(self) -> int:
        """How often a broken sample was left out or replaced, in this process and its workers."""
        return self.dataset.skipped
