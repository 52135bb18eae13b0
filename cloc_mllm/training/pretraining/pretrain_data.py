"""The samples of CLOC pre-training: what a preset's `data` block names, opened in the order in which it is seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cloc_mllm.data.dataset import RegionTextDataset, region_text_item
from cloc_mllm.data.files import is_url
from cloc_mllm.data.lanes import LaneOrder
from cloc_mllm.data.readers import shard_files
from cloc_mllm.data.shards import ShardSet, write_missing_indexes
from cloc_mllm.data.streaming import ShardStream
from cloc_mllm.training.presets.config import BatchPlan, PretrainConfig
from cloc_mllm.training.pretraining.validation import NumberedSamples
from cloc_mllm.training.running import launch
from cloc_mllm.training.running.stream import LaneStream, StepStream


def needs_regions(config: PretrainConfig) -> bool:
    """Return whether batches have to carry regions: plain CLIP never looks at them."""
    return config.model.prompter is not None or config.objective.extra_captions


def training_stream(config: PretrainConfig, plan: BatchPlan, world: launch.World) -> StepStream | LaneStream:
    """Return the training samples of a preset in order: streamed from shards, or at random from map-style data.

    Missing indexes of tar shards are written first, by the main process.

    Args:
        config: The preset.
        plan: The batch arithmetic.
        world: This process's place.

    Raises:
        ClocError: The data cannot be opened, is too small, or does not divide over processes and workers.
    """
    data, run = config.data, config.run
    paths = [source.path for source in data.sources]
    if not _is_streamed(data.streaming, paths):
        dataset = RegionTextDataset(
            paths[0], max_regions=data.max_regions, seed=run.seed, on_bad_sample=data.on_bad_sample
        )
        return StepStream(dataset, plan, steps=run.steps, epochs=run.epochs, seed=run.seed, name=paths[0])
    if world.is_main:
        write_missing_indexes(paths)
    launch.barrier()
    sources = [ShardSet(path) for path in paths]
    order = LaneOrder(
        [source.counts for source in sources],
        [source.weight for source in data.sources],
        names=paths,
        batch=plan.global_batch,
        lanes=data.lanes,
        chunk=data.chunk,
        block=data.shuffle_block,
        seed=run.seed,
    )
    make_item = partial(region_text_item, max_regions=data.max_regions)
    stream = ShardStream(sources, order, make_item, seed=run.seed, on_bad_sample=data.on_bad_sample)
    return LaneStream(stream, plan, steps=run.steps, epochs=run.epochs, workers=run.workers)


def _is_streamed(asked: bool | None, paths: Sequence[str]) -> bool:
    """Whether data is streamed: as asked, else if it is a mixture, tar shards or behind a URL."""
    if asked is not None:
        return asked
    return len(paths) > 1 or is_url(paths[0]) or shard_files(paths[0])[0].endswith(".tar")


def validation_subset(config: PretrainConfig) -> NumberedSamples | None:
    """Return the validation samples of a preset, or ``None``."""
    if config.data.validation is None:
        return None
    dataset = RegionTextDataset(config.data.validation, max_regions=config.data.max_regions, seed=config.run.seed)
    return NumberedSamples(dataset, config.data.validation_samples)
