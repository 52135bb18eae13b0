"""The losses on 2 and 3 ranks against one process that holds the joined batch: the value and every gradient.

One group of ranks a world size works through all cases; the tests below look at what it brought back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cloc_mllm.objectives import (
    clip_loss,
    gather_with_grad,
    grounding_loss,
    region_share,
    region_text_loss,
    region_text_sigmoid_loss,
    sigmoid_loss,
)
from cloc_mllm.objectives.distributed import all_reduce_sum, world_size
from tests.harness import run_ranks

pytestmark = pytest.mark.integration

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
WIDTH = 8


@dataclass(frozen=True)
class Split:
    """How many images and regions each rank holds."""

    images: tuple[int, ...]
    regions: tuple[int, ...]


SPLITS = [
    Split((3, 3), (3, 3)),
    Split((3, 3), (4, 2)),
    Split((4, 2), (6, 0)),
    Split((2, 2), (0, 0)),
    Split((0, 4), (0, 5)),
    Split((2, 2, 2), (3, 0, 2)),
    Split((1, 2, 3), (0, 0, 5)),
    Split((2, 2, 2), (0, 0, 0)),
]


class Towers(nn.Module):
    """One linear map a tower, and the two temperatures, giving what the losses take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(WIDTH, WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)
        self.region = nn.Linear(WIDTH, WIDTH)
        self.box = nn.Linear(WIDTH, 4)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self.region_logit_scale = nn.Parameter(torch.tensor([1.5]))
        self.logit_bias = nn.Parameter(torch.tensor([-1.0]))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "images": F.normalize(self.image(batch["images"]), dim=1),
            "captions": F.normalize(self.text(batch["captions"]), dim=1),
            "regions": F.normalize(self.region(batch["regions"]), dim=1),
            "region_texts": F.normalize(self.text(batch["region_texts"]), dim=1),
            "pred_boxes": self.box(batch["region_texts"]).sigmoid(),
            "logit_scale": self.logit_scale.exp(),
            "region_logit_scale": self.region_logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def joined_batch(split: Split, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch of all ranks; region texts repeat, exactly and nearly, across ranks as within them."""
    generator = torch.Generator().manual_seed(1)
    images, regions = sum(split.images), sum(split.regions)

    def rows(count: int) -> Tensor:
        return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)

    texts = rows(3)[torch.arange(regions) % 3]
    texts[3:4] += 0.05 * rows(len(texts[3:4]))
    corner = torch.rand(regions, 2, generator=generator, dtype=torch.float64) * 0.6
    batch = {
        "images": rows(images),
        "captions": rows(images),
        "regions": rows(regions),
        "region_texts": texts,
        "boxes": torch.cat([corner, corner + 0.3], dim=1),
    }
    flags = torch.arange(images) % 3 != 1
    return {name: x.to(dtype) for name, x in batch.items()} | {"has_regions": flags & (regions > 0)}


def part_of_rank(batch: dict[str, Tensor], split: Split, rank: int) -> dict[str, Tensor]:
    by_image = {"images", "captions", "has_regions"}
    return {
        name: x.split(split.images if name in by_image else split.regions)[rank].clone() for name, x in batch.items()
    }


TILED: dict[str, Any] = {"impl": "tiled", "tile_size": 2}  # smaller than what a rank holds


def _clip(out: dict[str, Tensor], batch: dict[str, Tensor], **form: Any) -> Tensor:
    return clip_loss(out["images"], out["captions"], out["logit_scale"], **form)


def _region_text(out: dict[str, Tensor], batch: dict[str, Tensor], **form: Any) -> Tensor:
    return region_text_loss(out["regions"], out["region_texts"], out["region_logit_scale"], **form)


def _sigmoid(out: dict[str, Tensor], batch: dict[str, Tensor], **form: Any) -> Tensor:
    return sigmoid_loss(out["images"], out["captions"], out["logit_scale"], out["logit_bias"], **form)


def _region_sigmoid(out: dict[str, Tensor], batch: dict[str, Tensor], **form: Any) -> Tensor:
    scale, bias = out["region_logit_scale"], out["logit_bias"]
    return region_text_sigmoid_loss(out["regions"], out["region_texts"], scale, bias, **form)


LOSSES: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]] = {
    "clip": _clip,
    "clip_tiled": partial(_clip, **TILED),
    "region_text": _region_text,
    "region_text_tiled": partial(_region_text, **TILED),
    "region_text_unfiltered": partial(_region_text, filter_threshold=None),
    "sigmoid": _sigmoid,
    "sigmoid_tiled": partial(_sigmoid, **TILED),
    "region_sigmoid": _region_sigmoid,
    "region_sigmoid_tiled": partial(_region_sigmoid, **TILED),
    "grounding_mse": lambda out, batch: grounding_loss(out["pred_boxes"], batch["boxes"]),
    "grounding_l1_giou": lambda out, batch: grounding_loss(out["pred_boxes"], batch["boxes"], kind="l1_giou"),
    "total": lambda out, batch: (
        _clip(out, batch)
        + _sigmoid(out, batch)  # so that every parameter takes part, as DDP wants it
        + region_share(batch["has_regions"])
        * (_region_text(out, batch) + grounding_loss(out["pred_boxes"], batch["boxes"]))
    ),
}

Outcome = tuple[float, dict[str, Tensor | None]]


def value_and_gradients(name: str, batch: dict[str, Tensor], dtype: torch.dtype, ddp: bool = False) -> Outcome:
    """The loss of this rank's batch and the gradients, averaged over ranks by hand or by DDP."""
    towers = Towers().to(dtype)
    # Named, because DDP averages nothing in the backward pass unless it lives until then.
    model = DistributedDataParallel(towers) if ddp else towers
    loss = LOSSES[name](model(batch), batch)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in towers.named_parameters()}
    if world_size() > 1 and not ddp:
        gradients = {key: None if g is None else all_reduce_sum(g) / world_size() for key, g in gradients.items()}
    return loss.item(), gradients


def losses_on_rank(rank: int, splits: list[Split]) -> dict[tuple[Any, ...], Outcome]:
    found: dict[tuple[Any, ...], Outcome] = {}
    for split in splits:
        for dtype in TOLERANCE:
            batch = part_of_rank(joined_batch(split, dtype), split, rank)
            for name in LOSSES:
                with warnings.catch_warnings():
                    # The next release of torch must not find a call here that this one deprecates.
                    warnings.simplefilter("error")
                    found[split, dtype, name] = value_and_gradients(name, batch, dtype)
            found[split, dtype, "total under DDP"] = value_and_gradients("total", batch, dtype, ddp=True)
    return found


@cache
def outcomes(ranks: int) -> list[dict[tuple[Any, ...], Outcome]]:
    return run_ranks(losses_on_rank, ranks, [split for split in SPLITS if len(split.images) == ranks], timeout=120)


@pytest.mark.parametrize("name", [*LOSSES, "total under DDP"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"images{split.images}-regions{split.regions}")
def test_equals_one_process_on_the_joined_batch(split: Split, dtype: torch.dtype, name: str) -> None:
    # Of the plain form: that is what the tiled one has to equal too.
    plain = name.removesuffix(" under DDP").removesuffix("_tiled")
    expected, expected_gradients = value_and_gradients(plain, joined_batch(split, dtype), dtype)
    for on_rank in outcomes(len(split.images)):
        value, gradients = on_rank[split, dtype, name]
        assert value == pytest.approx(expected, rel=TOLERANCE[dtype], abs=0)
        assert gradients.keys() == expected_gradients.keys()
        for key, reference in expected_gradients.items():
            gradient = gradients[key]
            if reference is None:
                assert gradient is None, key
                continue
            assert gradient is not None, key
            error, size = (gradient - reference).abs().max(), reference.abs().max()
            assert error <= TOLERANCE[dtype] * size, f"{key}: off by {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_same_value_to_the_last_bit(ranks: int) -> None:
    first, *others = ({key: value for key, (value, _) in on_rank.items()} for on_rank in outcomes(ranks))
    assert len(first) > 0
    assert all(first == other for other in others)


def test_the_cases_can_tell_right_from_wrong() -> None:
    """Filter, repeats and temperatures matter in the batches above, and no gradient is 0 by accident."""
    batch = joined_batch(SPLITS[1], torch.float64)
    filtered, gradients = value_and_gradients("region_text", batch, torch.float64)
    unfiltered, _ = value_and_gradients("region_text_unfiltered", batch, torch.float64)
    assert abs(filtered - unfiltered) > 0.1
    _, all_gradients = value_and_gradients("total", batch, torch.float64)
    assert all(gradient is not None and gradient.abs().max() > 1e-4 for gradient in all_gradients.values())
    assert gradients["image.weight"] is None


def gathers_on_rank(rank: int) -> dict[str, Any]:
    """Whatever :func:`gather_with_grad` promises besides exact losses, on 2 ranks."""
    found: dict[str, Any] = {}
    # Rank 0 holds rows 0 to 2, rank 1 rows 3 and 4, of 2 x 2 values; rank r weighs what it gathers by r + 1.
    rows = torch.arange(20.0).reshape(5, 2, 2)
    x = rows.split([3, 2])[rank].clone().requires_grad_()
    gathered = gather_with_grad(x)
    (gathered * rows * (rank + 1)).sum().backward()
    found["rows"], found["gradient"] = gathered.detach(), x.grad

    scalars = torch.full((2 * rank,), 1.0 + rank, requires_grad=True)
    one_per_row = gather_with_grad(scalars)
    one_per_row.sum().backward()
    found["one value a row"], found["gradient of it"] = one_per_row.detach(), scalars.grad

    not_contiguous = torch.arange(6.0).reshape(2, 3).T[: 1 + rank]
    found["not contiguous"] = gather_with_grad(not_contiguous)

    # Rank 1 brings constants, rank 0 rows that need gradient: both must take part in the backward pass.
    half_constant = torch.full((1, 2), 1.0 + rank, requires_grad=rank == 0)
    gather_with_grad(half_constant).square().sum().backward()
    found["gradient beside constants"] = half_constant.grad

    found["constants need gradient"] = gather_with_grad(torch.ones(rank, 2)).requires_grad
    with torch.no_grad():
        found["no_grad needs gradient"] = gather_with_grad(x).requires_grad
    try:
        gather_with_grad(torch.ones(2, 3 + rank))
    except ValueError as error:
        found["error"] = str(error)

    # Likewise in the tiled form, where rank 1's constants meet rank 0's rows.
    half = F.normalize(torch.tensor([[1.0, 2.0 + rank], [3.0, 1.0]]), dim=1).requires_grad_(rank == 0)
    clip_loss(half, half.detach().flip(0), 5.0, **TILED).backward()
    found["tiled gradient beside constants"] = half.grad

    found["share"] = region_share(torch.tensor([[True, False, True], [False]][rank]))
    found["share of none"] = region_share(torch.zeros(0, dtype=torch.bool))
    counts = torch.tensor([rank + 1.0], requires_grad=True)
    found["sum"] = all_reduce_sum(counts)
    found["summed from"] = counts.detach()
    embeds = F.normalize(rows.flatten(1), dim=1).bfloat16().split([3, 2])[rank].clone().requires_grad_()
    loss = clip_loss(embeds, embeds.detach(), 10.0)
    loss.backward()
    assert embeds.grad is not None
    found["bf16"] = (loss.dtype, embeds.grad.dtype, loss.item())
    return found


@cache
def gathers() -> list[dict[str, Any]]:
    return run_ranks(gathers_on_rank, 2, timeout=60)


def test_gather_keeps_rank_order_and_sums_the_gradient_over_ranks() -> None:
    rows = torch.arange(20.0).reshape(5, 2, 2)
    for rank, found in enumerate(gathers()):
        assert found["rows"].equal(rows)
        assert found["gradient"].equal(3 * rows.split([3, 2])[rank])
        assert found["one value a row"].tolist() == [2.0, 2.0]
        assert found["gradient of it"].tolist() == [2.0] * 2 * rank
        assert found["not contiguous"].tolist() == [[0.0, 3.0], [0.0, 3.0], [1.0, 4.0]]


def test_a_rank_of_constants_neither_hangs_nor_bends_the_gradient() -> None:
    first, second = gathers()
    assert first["gradient beside constants"].tolist() == [[4.0, 4.0]]
    assert second["gradient beside constants"] is None
    rows = [F.normalize(torch.tensor([[1.0, 2.0 + rank], [3.0, 1.0]]), dim=1) for rank in (0, 1)]
    leaf = rows[0].clone().requires_grad_()
    clip_loss(torch.cat([leaf, rows[1]]), torch.cat([row.flip(0) for row in rows]), 5.0).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(first["tiled gradient beside constants"], 2 * leaf.grad)
    assert second["tiled gradient beside constants"] is None
    assert not any(found["constants need gradient"] or found["no_grad needs gradient"] for found in (first, second))


def test_rows_of_unequal_width_are_an_error_on_every_rank() -> None:
    assert [found["error"].endswith("in a row: [3, 4], in rank order") for found in gathers()] == [True, True]


def test_the_share_counts_images_not_ranks() -> None:
    for rank, found in enumerate(gathers()):
        assert found["share"].item() == 0.5
        assert found["share of none"].item() == 0.0
        assert found["sum"].tolist() == [3.0]
        assert not found["sum"].requires_grad
        assert found["summed from"].tolist() == [rank + 1.0]


def test_bf16_embeddings_give_an_fp32_loss_and_bf16_gradients() -> None:
    rows = F.normalize(torch.arange(20.0).reshape(5, 4), dim=1).bfloat16()
    expected = clip_loss(rows.float(), rows.float(), 10.0).item()
    for found in gathers():
        assert found["bf16"] == (torch.float32, torch.bfloat16, pytest.approx(expected, rel=1e-6))


def identity_on_a_single_rank(rank: int) -> bool:
    x = torch.ones(3, 2, requires_grad=True)
    return dist.is_initialized() and gather_with_grad(x) is x


def test_a_group_of_one_is_the_identity() -> None:
    assert run_ranks(identity_on_a_single_rank, 1, timeout=60) == [True]
