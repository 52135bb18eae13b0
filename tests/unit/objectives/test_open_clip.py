"""The contrastive losses against open_clip's, values and gradients, where it is installed (the extra `benchmarks`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from cloc_mllm.objectives import clip_loss, sigmoid_loss

open_clip = pytest.importorskip("open_clip.loss", reason="open_clip is not installed: pip install -e '.[benchmarks]'")


def embeddings(count: int) -> list[torch.Tensor]:
    torch.manual_seed(count)
    made = [functional.normalize(torch.randn(count, 12, dtype=torch.float64), dim=1) for _ in range(2)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("form", [{"impl": "plain"}, {"impl": "tiled", "tile_size": 5}], ids=["plain", "tiled"])
@pytest.mark.parametrize("count", [1, 4, 13])
def test_softmax_loss(count: int, form: dict[str, Any]) -> None:
    images, texts = embeddings(count)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    losses = (open_clip.ClipLoss()(images, texts, scale), clip_loss(images, texts, scale, **form))
    found = [(loss, *torch.autograd.grad(loss, [images, texts, scale])) for loss in losses]
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", [{"impl": "plain"}, {"impl": "tiled", "tile_size": 5}], ids=["plain", "tiled"])
@pytest.mark.parametrize("count", [1, 4, 13])
def test_sigmoid_loss(count: int, form: dict[str, Any]) -> None:
    images, texts = embeddings(count)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    losses = (open_clip.SigLipLoss()(images, texts, scale, bias), sigmoid_loss(images, texts, scale, bias, **form))
    found = [(loss, *torch.autograd.grad(loss, [images, texts, scale, bias])) for loss in losses]
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
