"""Features of images that were asked about lately: the next turn, question or region on a picture costs no tower.

An image is known by its content, as the tower would see it, not by its name: a file that was written over, or the same
picture under another path, is never mistaken.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from cloc_mllm.models.outputs_cloc_mllm import ClocMllmImageOutput

MIB = 2**20


class FeatureCache:
    """Tower tokens and projected features of the images used last, up to a limit of memory.

    What it holds belongs to the weights it was made with: call :meth:`clear` after changing them.

    Args:
        model: A :class:`ClocMllmForConditionalGeneration`.
        limit_mib: Most memory, in MiB on the model's device, that is kept from one call to the next. With 0 nothing
            is kept; images that occur twice in one call are still encoded once.

    Attributes:
        hits: Images that were not encoded, because their features were there.
        misses: Images that were encoded.
    """

    def __init__(self, model: Any, limit_mib: float = 256.0) -> None:
        if not limit_mib >= 0:
            raise ValueError(f"the cache cannot hold {limit_mib} MiB: give 0 or more")
        self._model, self._limit = model, limit_mib * MIB
        self._entries: OrderedDict[bytes, ClocMllmImageOutput] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        """How many images it holds."""
        return len(self._entries)

    @property
    def mib(self) -> float:
        """Memory it holds, in MiB."""
        return self._bytes / MIB

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    @torch.no_grad()
    def features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> ClocMllmImageOutput:
        """Encode images, or remember what they were encoded to.

        Args:
            pixel_values: ``(I, 3, H, W)`` from the processor, on any device; or a row for each tile.
            image_sizes: ``(I, 2)`` of the originals, where the processor gives them.
            rows: How many rows of ``pixel_values`` each image takes; default one.

        Returns:
            What ``get_image_features`` gives for them, without regions.
        """
        pixels = pixel_values.split([1] * len(pixel_values) if rows is None else list(rows))
        sizes = [None] * len(pixels) if image_sizes is None else list(image_sizes.split(1))
        images = list(zip(pixels, sizes, strict=True))
        with self._lock:  # two threads that ask about one picture encode it once
            keys = [_digest(*image) for image in images]
            found = {key: self._entries[key] for key in keys if key in self._entries}
            absent = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
            self.hits += len(keys) - len(absent)
            self.misses += len(absent)
            if absent:
                found |= dict(zip(absent, self._encode(list(absent.values())), strict=True))
            for key in keys:
                self._keep(key, found[key])
            several = [found[key] for key in keys]
        return ClocMllmImageOutput(
            last_hidden_state=torch.cat([one.last_hidden_state for one in several]),
            pooler_output=[one.pooler_output[0] for one in several],
        )

    def _encode(self, images: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> list[ClocMllmImageOutput]:
        """Features of images, one by one, each in memory of its own."""
        pixel_values = torch.cat([pixels for pixels, _ in images]).to(self._model.device)
        sizes = [size for _, size in images if size is not None]
        options = {"image_sizes": torch.cat(sizes).to(self._model.device)} if sizes else {}
        output = self._model.get_image_features(pixel_values, **options)
        return [
            ClocMllmImageOutput(last_hidden_state=tokens[None].clone(), pooler_output=[projected.clone()])
            for tokens, projected in zip(output.last_hidden_state, output.pooler_output, strict=True)
        ]

    def _keep(self, key: bytes, entry: ClocMllmImageOutput) -> None:
        """Make an image the one used last, and forget those not used for longest until all fits."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        if _size(entry) > self._limit:
            return
        self._entries[key] = entry
        self._bytes += _size(entry)
        while self._bytes > self._limit:
            self._bytes -= _size(self._entries.popitem(last=False)[1])


def _digest(pixels: torch.Tensor, size: torch.Tensor | None) -> bytes:
    """Tells images apart by every bit that the tower sees, and by how they lay in it."""
    state = hashlib.blake2b(digest_size=16)
    for part in (pixels, size):
        if part is not None:
            state.update(repr(tuple(part.shape)).encode())
            state.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.digest()


def _size(entry: ClocMllmImageOutput) -> int:
    return entry.last_hidden_state.nbytes + entry.pooler_output[0].nbytes
