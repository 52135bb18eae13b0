"""Map-style data sets for training: validated samples with decoded images, the same ones after a resume.

What an item contains depends on (seed, epoch, index) only, never on how many items were drawn before or by which
worker; so a run that resumes mid-epoch sees exactly what the uninterrupted run would have seen.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from cloc_mllm.data.lengths import TokensOfImage, sample_length
from cloc_mllm.data.messages import image_items, messages_of, problems_before_messages, with_images, with_mask_paths
from cloc_mllm.data.phrases import unique_regions
from cloc_mllm.data.readers import Sample, SampleSource, open_samples, resolve_image, sample_name
from cloc_mllm.data.schema import conversation_problems, kind_of, raise_first, region_text_problems
from cloc_mllm.errors import ClocError
from cloc_mllm.models.image_processing_cloc import load_image

BadSample = Literal["error", "skip"]
DataPath = str | Path | Sequence[str | Path] | Sequence[Sample] | SampleSource

TRUTH_KEYS = ("kind", "answer", "negative", "synonyms", "negative_synonyms", "box", "boxes_in", "heldout")
"""What an item of a question holds of the truth, where the file does."""

_SLOTS = 256


def open_image(image: Any, folder: Path | None, file: str | None, sample: str) -> Image.Image:
    """A decoded RGB image of a sample.

    Raises:
        ClocError: The file is missing, cut off, or no picture.
    """
    if image is None:
        raise ClocError("the sample names no image", file=file, sample=sample, remedy="Give it 'image'.")
    try:
        return load_image(resolve_image(image, folder))
    except (ValueError, TypeError, AttributeError) as error:
        remedy = "Restore the file or remove the sample; `cloc-mllm data check` lists all that are broken."
        raise ClocError(str(error), file=file, sample=sample, remedy=remedy) from error


def require_bad_sample(on_bad_sample: str) -> None:
    """Raises `ClocError` for anything but "error" and "skip"."""
    if on_bad_sample not in ("error", "skip"):
        raise ClocError(f"on_bad_sample is '{on_bad_sample}'", remedy="Write error or skip.")


class SkipCount:
    """Counts in shared memory, so that a process sees what its workers have skipped."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()

    def add(self) -> None:
        """Counts one, for this worker."""
        worker = get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id % (_SLOTS - 1)] += 1

    @property
    def total(self) -> int:
        """The count of this process and its workers."""
        return int(self._counts.sum())


class _SampleDataset(Dataset[dict[str, Any]], ABC):
    """What both data sets share: a source, an epoch, and what happens to a broken sample."""

    def __init__(self, source: SampleSource, seed: int, on_bad_sample: BadSample) -> None:
        require_bad_sample(on_bad_sample)
        if len(source) == 0:
            raise ClocError("there are no samples", file=source_file(source), remedy="Check the path.")
        self.source = source
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        # In shared memory, so that workers that live for several epochs see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._skips = SkipCount()
        self._lengths: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        """Says which pass over the data this is; it decides what is drawn from each sample."""
        self._epoch[0] = epoch

    @property
    def skipped(self) -> int:
        """How often a broken sample was replaced by another, in this process and its workers."""
        return self._skips.total

    @property
    def skips(self) -> SkipCount:
        """Where samples that a batch had to leave out are counted."""
        return self._skips

    def lengths(self, image_tokens: TokensOfImage, epoch: int = 0) -> npt.NDArray[np.int64]:
        """Images and estimated tokens of every sample, (N, 2), without decoding a picture; the same in every pass.

        Args:
            image_tokens: What an image takes: a number, or a function of its width and height.
            epoch: Which pass over the data it is.

        Raises:
            ClocError: A sample cannot be read at all, and `on_bad_sample` is "error".
        """
        if self._lengths is not None:
            return self._lengths
        found = np.zeros((len(self), 2), np.int64)
        for index in range(len(self)):
            try:
                found[index] = sample_length(self.source[index], self.source.folder(index), image_tokens)
            except ClocError:
                if self.on_bad_sample == "error":
                    raise
        self._lengths = found
        return found

    def where(self, index: int) -> tuple[str | None, str]:
        """File and name of a sample, for messages."""
        file, place = self.source.where(index)
        try:
            return file, sample_name(self.source[index], place)
        except ClocError:
            return file, place

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, int(self._epoch[0]))

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """The item at an index in a given pass over the data, whatever pass `set_epoch` has said it is."""
        index = range(len(self))[index]
        # The next sample that is whole stands in for a broken one: batches keep their size on every rank.
        for step in range(len(self)):
            try:
                return self._load((index + step) % len(self), epoch)
            except ClocError:
                if self.on_bad_sample == "error":
                    raise
                self._skips.add()
        raise ClocError("every sample is broken", file=source_file(self.source), remedy="Run `cloc-mllm data check`.")

    @abstractmethod
    def _load(self, index: int, epoch: int) -> dict[str, Any]:
        """The item at an index; `ClocError` if its sample is broken."""


def source_file(source: SampleSource) -> str | None:
    """The (first) file of a source."""
    return source.where(0)[0] if len(source) else getattr(source, "path", None)


class RegionTextDataset(_SampleDataset):
    """Images with captions and some of their regions, for pre-training.

    Args:
        data: A folder (its `regions.jsonl` or .parquet files), a .jsonl, .json or .parquet file, several of these, or
            samples in memory.
        max_regions: Most regions drawn from an image at a time; None for all.
        seed: Seed of what is drawn.
        on_bad_sample: "error" stops at a broken sample; "skip" replaces it by the next whole one and counts it
            (`skipped`).

    Items are dicts: `image` (RGB PIL), `width`, `height`, `caption`, `regions` (each `box` in pixels, `text`, `unique`,
    and what else the file gives), `id`, `index`.

    Raises:
        ClocError: A path that cannot be opened; on access, a sample that breaks the schema.
    """

    def __init__(
        self,
        data: DataPath,
        max_regions: int | None = 4,
        seed: int = 0,
        *,
        on_bad_sample: BadSample = "error",
    ) -> None:
        super().__init__(open_samples(data, "regions.jsonl"), seed, on_bad_sample)
        self.max_regions = max_regions

    def _load(self, index: int, epoch: int) -> dict[str, Any]:
        raw = self.source[index]
        file, place = self.source.where(index)
        # Seeding by text takes microseconds, a numpy generator most of a millisecond: as long as decoding the picture.
        rng = random.Random(f"{self.seed}-{epoch}-{index}")
        name, folder = sample_name(raw, place), self.source.folder(index)
        item = region_text_item(raw, file, name, folder, rng, max_regions=self.max_regions)
        return {**item, "id": str(raw.get("id", place)), "index": index}


def region_text_item(
    raw: Sample,
    file: str | None,
    name: str,
    folder: Path | None,
    rng: random.Random,
    *,
    max_regions: int | None,
) -> dict[str, Any]:
    """The item that pre-training makes of a sample; see `RegionTextDataset`.

    Args:
        raw: The sample as read.
        file: Where it stands, for messages.
        name: What to call it.
        folder: Where its relative image path starts.
        rng: What regions and caption are drawn with.
        max_regions: Most regions; None for all.

    Raises:
        ClocError: The sample breaks the schema, or its image cannot be read.
    """
    image = open_image(raw.get("image"), folder, file, name)
    raise_first(region_text_problems(raw, image.size), file, name)
    unique = unique_regions(raw["regions"])
    regions = [{**region, "unique": alone} for region, alone in zip(raw["regions"], unique, strict=True)]
    if max_regions is not None and len(regions) > max_regions:
        regions = [regions[k] for k in sorted(rng.sample(range(len(regions)), max_regions))]
    return {
        "image": image,
        "width": image.width,
        "height": image.height,
        "caption": str(rng.choice(raw.get("captions") or [raw["caption"]])),
        "regions": regions,
        "id": str(raw.get("id", name)),
    }


class ConversationDataset(_SampleDataset):
    """Conversations with their images, for alignment and instruction tuning.

    Args:
        data: A folder (its `conversations.jsonl` or .parquet files), a file, several of these, or samples in memory;
            messages or LLaVA's format.
        seed: Accepted for symmetry; conversations are used as they are.
        on_bad_sample: "error" or "skip", as for `RegionTextDataset`.
        preferred: The file to take in a folder.

    Items are dicts: `messages` (image items hold RGB PIL images), `id`, `task`, `file`, `sample`, `index`.

    Raises:
        ClocError: A path that cannot be opened; on access, a sample that breaks the schema.
    """

    def __init__(
        self,
        data: DataPath,
        seed: int = 0,
        *,
        on_bad_sample: BadSample = "error",
        preferred: str = "conversations.jsonl",
    ) -> None:
        super().__init__(open_samples(data, preferred), seed, on_bad_sample)

    def _load(self, index: int, epoch: int) -> dict[str, Any]:
        raw = self.source[index]
        file, place = self.source.where(index)
        name = sample_name(raw, place)
        raise_first(problems_before_messages(raw), file, name)
        folder = self.source.folder(index)
        messages = with_mask_paths(messages_of(raw), folder)
        images = [open_image(image, folder, file, name) for image in image_items(messages)]
        asked = kind_of(raw) == "question"
        raise_first(
            conversation_problems(raw, messages, [image.size for image in images], answered=not asked), file, name
        )
        item = {"messages": with_images(messages, images), "id": str(raw.get("id", place)), "task": raw.get("task", "")}
        if asked:
            item |= {key: raw[key] for key in TRUTH_KEYS if key in raw}
        return item | {"file": file, "sample": name, "index": index}
