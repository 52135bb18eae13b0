"""Measures an encoder on one split: every image encoded once, every way of reading it beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cloc_mllm.evaluation.encoders.localizers import Localizer, Located
from cloc_mllm.evaluation.encoders.readouts import Encoder, RegionReadout
from cloc_mllm.evaluation.encoders.region_data import Region, RegionSplit, SceneTruth, canonical_name, describes, draw
from cloc_mllm.evaluation.scoring.metrics import (
    Metric,
    box_ious,
    class_mean_metric,
    mean_metric,
    misplaced,
    pointing_hits,
    recall_hits,
    top1_hits,
)

Metrics = dict[str, Metric]


@dataclass(frozen=True)
class EncoderSettings:
    """How much is measured; every limit below the whole shows in the metric's ``n``.

    Attributes:
        batch_size: Images encoded at a time.
        crop_limit: Regions that are cropped (None: all); the pools of region retrieval are drawn from the same ones.
        grid_images: Images whose phrases are looked for by grid search, which embeds hundreds of boxes an image; the
            other localizers look for every phrase.
        pool_size: Most texts in a pool of region retrieval.
        pools: Most pools.
        validation_images: Images of the validation split that choices are made on.
        seed: Of every draw and of the bootstrap.
        progress: Show a progress bar, if stderr is a terminal.
    """

    batch_size: int = 64
    crop_limit: int | None = 2000
    grid_images: int = 300
    pool_size: int = 256
    pools: int = 8
    validation_images: int = 200
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True)
class Measured:
    """The metrics of one encoder on one split.

    Attributes:
        image: Retrieval of whole images.
        readouts: By region read-out.
        localizers: By localizer.
        pools: What the retrieval metrics chose from, in words.
    """

    image: Metrics
    readouts: dict[str, Metrics]
    localizers: dict[str, Metrics]
    pools: dict[str, str]


class TextBank:
    """Every distinct text, encoded once."""

    def __init__(self, encoder: Encoder, texts: Sequence[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._row = {text: row for row, text in enumerate(distinct)}
        self._embeds = encoder.embed_texts(distinct)

    def __getitem__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the ``(T, D)`` embeddings of some of the texts."""
        return self._embeds[[self._row[text] for text in texts]]


def measure(
    encoder: Encoder,
    readouts: Sequence[RegionReadout],
    localizers: Sequence[Localizer],
    truth: SceneTruth,
    split: RegionSplit,
    settings: EncoderSettings,
) -> Measured:
    """Encode a split once and measure every read-out and localizer on it.

    Args:
        encoder: The encoder.
        readouts: The ways its regions are read; the one called ``crop`` sees ``crop_limit`` regions only.
        localizers: The ways it is asked where something is.
        truth: The scenes' vocabulary and held-out pairs.
        split: What to measure on.
        settings: How much to measure.
    """
    regions = split.regions
    every = list(range(len(regions)))
    sampled = draw(len(regions), settings.crop_limit, settings.seed)
    rows = {readout.name: sampled if readout.name == "crop" else every for readout in readouts}
    findable = [row for row in every if regions[row].unique]
    searched = set(draw(len(split.rows), settings.grid_images, settings.seed))
    on_grid = [row for row in findable if regions[row].image in searched]
    phrases = {way.name: on_grid if way.name.startswith("grid") else findable for way in localizers}
    pools = draw_pools([row for row in sampled if not _says_size(regions[row], truth)], regions, settings)
    bank = TextBank(encoder, [*_probes(truth), *all_captions(split), *(region.text for region in regions)])
    read = read_split(encoder, readouts, localizers, split, rows, phrases, bank, settings)
    sizes = ", ".join(str(len(pool)) for pool in pools)
    return Measured(
        image=image_metrics(read.images, split, bank, settings),
        readouts={
            name: _naming_metrics(embeds, rows[name], split, truth, bank, settings)
            | _retrieval_metrics(embeds, rows[name], split, bank, pools, settings)
            for name, embeds in read.regions.items()
        },
        localizers={
            name: _localizer_metrics(found, phrases[name], split, settings) for name, found in read.located.items()
        },
        pools={
            "image": f"{len(split.rows)} images, {len(set(all_captions(split)))} distinct captions",
            "region": f"{len(pools)} pools of {sizes} regions with distinct texts, none naming a size; drawn from "
            f"{len(sampled)} regions with seed {settings.seed}",
            "classes": f"{len(truth.classes)}: texture x colour x shape",
        },
    )


def draw_pools(rows: Sequence[int], regions: Sequence[Region], settings: EncoderSettings) -> list[list[int]]:
    """Draw disjoint pools of regions for retrieval; in a pool no two regions have the same text.

    With all regions in one pool a text would have dozens of right regions and recall would say nothing; with one small
    pool it would rest on few queries. So several pools are drawn and averaged over. Pools less than half as large as
    the largest (late ones, of frequent texts only) are left out, because a small pool is an easy one.

    Returns:
        For each pool the regions in it, as rows of ``regions``.
    """
    order = np.random.default_rng(settings.seed).permutation(len(rows)).tolist()
    pools: list[list[int]] = []
    seen: dict[str, int] = {}
    for row in (rows[k] for k in order):
        number = seen.get(regions[row].text, 0)
        seen[regions[row].text] = number + 1
        if number == len(pools):
            pools.append([])
        if len(pools[number]) < settings.pool_size:
            pools[number].append(row)
    largest = len(pools[0]) if pools else 0
    return [sorted(pool) for pool in pools[: settings.pools] if len(pool) >= largest / 2]


def _says_size(region: Region, truth: SceneTruth) -> bool:
    return not set(truth.vocabulary["size"]).isdisjoint(region.text.split())


def _probes(truth: SceneTruth) -> list[str]:
    """Return the texts a region is compared with: every class, then every class with every size."""
    return [*truth.classes, *(f"{size} {name}" for size in truth.vocabulary["size"] for name in truth.classes)]


# --- through the encoder -----------------------------------------------------------------------------------------


@dataclass
class ReadSplit:
    """What an encoder made of a split.

    Attributes:
        images: ``(B, D)`` embeddings of the images.
        regions: By read-out ``(R, D)`` embeddings of the regions it was asked for.
        located: By localizer where it found the phrases it was asked for.
    """

    images: torch.Tensor
    regions: dict[str, torch.Tensor]
    located: dict[str, Located]


def read_split(
    encoder: Encoder,
    readouts: Sequence[RegionReadout],
    localizers: Sequence[Localizer],
    split: RegionSplit,
    rows: Mapping[str, Sequence[int]],
    phrases: Mapping[str, Sequence[int]],
    bank: TextBank,
    settings: EncoderSettings,
) -> ReadSplit:
    """Stream the pictures through the encoder once, keeping what each read-out and localizer makes of them.

    Args:
        encoder: Encodes the pictures.
        readouts: Embed boxes.
        localizers: Find phrases.
        split: The pictures and regions.
        rows: For each read-out by name, which regions it embeds, ascending.
        phrases: For each localizer by name, which regions' texts it looks for, ascending.
        bank: Holds those texts.
        settings: Batch size and progress.
    """
    regions, count = split.regions, len(split.rows)
    boxes_of = {name: _by_image(regions, wanted, count) for name, wanted in rows.items()}
    phrases_of = {name: _by_image(regions, wanted, count) for name, wanted in phrases.items()}
    whole: list[torch.Tensor] = []
    embeds: dict[str, list[torch.Tensor]] = {name: [] for name in rows}
    located: dict[str, list[Located]] = {localizer.name: [] for localizer in localizers}
    title = f"{split.ref.split} split"
    with tqdm(total=count, unit="img", desc=title, disable=None if settings.progress else True) as bar:
        for batch, pictures in split.pictures(settings.batch_size):
            images = encoder.encode_images(pictures, [split.ids[number] for number in batch])
            whole.append(images.embeds.cpu())
            for readout in readouts:
                boxes = [[regions[row].box for row in boxes_of[readout.name][number]] for number in batch]
                embeds[readout.name].append(readout.embed(images, boxes).cpu())
            for localizer in localizers:
                wanted = [regions[row] for number in batch for row in phrases_of[localizer.name][number]]
                if wanted:
                    texts = bank[[region.text for region in wanted]]
                    owner = torch.tensor([region.image - batch.start for region in wanted], device=texts.device)
                    located[localizer.name].append(localizer.locate(images, texts, owner))
            bar.update(len(batch))
    return ReadSplit(
        images=torch.cat(whole),
        regions={name: torch.cat(parts) for name, parts in embeds.items()},
        located={
            name: Located(
                np.concatenate([part.boxes for part in parts] or [np.zeros((0, 4))]),
                np.concatenate([part.points for part in parts] or [np.zeros((0, 2))]),
            )
            for name, parts in located.items()
        },
    )


def _by_image(regions: Sequence[Region], rows: Sequence[int], images: int) -> list[list[int]]:
    """Return which of ``rows`` are regions of each image."""
    found: list[list[int]] = [[] for _ in range(images)]
    for row in rows:
        found[regions[row].image].append(row)
    return found


# --- numbers -----------------------------------------------------------------------------------------------------


def similarity_of(first: torch.Tensor, second: torch.Tensor) -> NDArray[np.float32]:
    """Return the ``(N, M)`` products of ``(N, D)`` and ``(M, D)`` embeddings."""
    return np.asarray((first.cpu() @ second.cpu().T).numpy())


def all_captions(split: RegionSplit) -> list[str]:
    """Return every caption of every image, in order of images."""
    return [caption for of_image in split.captions for caption in of_image]


def image_metrics(
    embeds: torch.Tensor, split: RegionSplit, bank: TextBank, settings: EncoderSettings, recalls: Sequence[int] = (1,)
) -> Metrics:
    """R@k of images and captions both ways, over all of the split.

    Identical captions are one item: one place in the gallery, and right for all of their images. An image is right if
    any of its captions is among the best k.

    Args:
        embeds: ``(B, D)`` of the images.
        split: Whose captions are right for whose images.
        bank: Holds the captions.
        settings: The seed of the intervals.
        recalls: Each k.
    """
    captions = all_captions(split)
    distinct = list(dict.fromkeys(captions))
    row = {caption: k for k, caption in enumerate(distinct)}
    right = np.zeros((len(split.captions), len(distinct)), dtype=bool)
    for image, some in enumerate(split.captions):
        right[image, [row[caption] for caption in some]] = True
    similarity = similarity_of(embeds, bank[distinct])
    i2t = misplaced(similarity, right)
    t2i = misplaced(similarity.T, right.T)[[row[caption] for caption in captions]]
    ids = split.image_keys
    asked = [image for image, some in zip(ids, split.captions, strict=True) for _ in some]
    found: Metrics = {}
    for k in recalls:
        found[f"image_i2t_r{k}"] = mean_metric(i2t < k, ids, seed=settings.seed)
        found[f"image_t2i_r{k}"] = mean_metric(t2i < k, asked, seed=settings.seed)
    return found


def seen_regions(split: RegionSplit, rows: Sequence[int]) -> tuple[list[Region], list[str], list[str]]:
    """Return some regions, the id of each one's image, and what tells each from all others of the split."""
    regions, ids = [split.regions[row] for row in rows], split.image_keys
    images = [ids[region.image] for region in regions]
    return regions, images, [f"{image}/{row}" for image, row in zip(images, rows, strict=True)]


def _naming_metrics(
    embeds: torch.Tensor,
    rows: Sequence[int],
    split: RegionSplit,
    truth: SceneTruth,
    bank: TextBank,
    settings: EncoderSettings,
) -> Metrics:
    """Class of each region among all names without size; its size among the sizes of its true name."""
    regions, images, keys = seen_regions(split, rows)
    names = [canonical_name(region.attributes) for region in regions]
    number = {name: k for k, name in enumerate(truth.classes)}
    classes = np.array([number[name] for name in names], dtype=np.int64)
    hits = top1_hits(similarity_of(embeds, bank[truth.classes]), classes)
    sizes = truth.vocabulary["size"]
    sized = similarity_of(embeds, bank[_probes(truth)[len(truth.classes) :]]).reshape(len(regions), len(sizes), -1)
    own = np.take_along_axis(sized, classes[:, None, None], axis=2)[:, :, 0]
    size_hits = top1_hits(own, [sizes.index(region.attributes["size"]) for region in regions])
    new = [k for k, r in enumerate(regions) if (r.attributes["shape"], r.attributes["colour"]) in truth.heldout]
    return {
        "region_top1": mean_metric(hits, images, seed=settings.seed, keys=keys),
        "region_macc": class_mean_metric(hits, names, images, seed=settings.seed, keys=keys),
        "region_top1_heldout": mean_metric(
            hits[new], [images[k] for k in new], seed=settings.seed, keys=[keys[k] for k in new]
        ),
        "region_size_acc": mean_metric(size_hits, images, seed=settings.seed, keys=keys),
    }


def _retrieval_metrics(
    embeds: torch.Tensor,
    rows: Sequence[int],
    split: RegionSplit,
    bank: TextBank,
    pools: Sequence[Sequence[int]],
    settings: EncoderSettings,
) -> Metrics:
    """R@1 between regions and texts inside each pool; a text is right for every region it truly describes."""
    place = {row: k for k, row in enumerate(rows)}
    hits: dict[str, list[NDArray[np.bool_]]] = {"region_r2t_r1": [], "region_t2r_r1": []}
    images: list[str] = []
    for pool in pools:
        mine, found_in, _ = seen_regions(split, pool)
        texts = [region.text for region in mine]
        right = describes(texts, [region.attributes for region in mine]).T
        similarity = similarity_of(embeds[[place[row] for row in pool]], bank[texts])
        hits["region_r2t_r1"].append(recall_hits(similarity, right))
        hits["region_t2r_r1"].append(recall_hits(similarity.T, right.T))
        images += found_in
    return {
        name: mean_metric(np.concatenate(parts) if parts else [], images, seed=settings.seed)
        for name, parts in hits.items()
    }


def _localizer_metrics(found: Located, rows: Sequence[int], split: RegionSplit, settings: EncoderSettings) -> Metrics:
    regions, images, keys = seen_regions(split, rows)
    truth = np.array([region.box for region in regions], dtype=np.float64).reshape(-1, 4)
    ious = box_ious(found.boxes, truth)
    return {
        "pointing": mean_metric(pointing_hits(found.points, truth), images, seed=settings.seed, keys=keys),
        "acc50": mean_metric(ious >= 0.5, images, seed=settings.seed, keys=keys),
        "mean_iou": mean_metric(ious, images, seed=settings.seed, keys=keys),
    }
