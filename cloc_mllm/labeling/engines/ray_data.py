"""Steps as Ray Data actors: shard numbers flow through pools of actors, on one machine or over a cluster.

What flows is numbers and hashes; pictures and answers stay in the source and the output folder, which every node has
to see under the same paths. Each step that takes a GPU has a pool of its own, and so do the steps between two of these;
all pools are at work at once, on different shards. Without GPUs there is one pool: a fixed share of the processor for
each step would be too much for some and too little for others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.engines.local import error_fields
from cloc_mllm.labeling.steps import MODEL_STEPS, STEPS, Job, Step

Rows = Mapping[str, Any]


class StepsActor:
    """Consecutive steps in a process of Ray's.

    Args:
        job: The labelling.
        names: The steps.
        device: Where their models run.
    """

    def __init__(self, job: Job, names: Sequence[str], device: str) -> None:
        self._job, self._names, self._device = job, names, device
        self._steps: dict[str, Step] = {}

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Do the steps on each row's shard. An error goes on as a row, so that it comes out as it was raised."""
        done = [self._one(int(s), str(k), str(e)) for s, k, e in zip(*(rows[n] for n in _COLUMNS), strict=True)]
        return {name: [row[k] for row in done] for k, name in enumerate(_COLUMNS)}

    def _one(self, shard: int, keys: str, error: str) -> tuple[int, str, str]:
        if error:
            return shard, keys, error
        try:
            known = json.loads(keys)
            for name in self._names:
                if name not in self._steps:
                    self._steps[name] = Step(self._job, name, known, self._device if name in MODEL_STEPS else "cpu")
                known = self._steps[name](shard)
            return shard, json.dumps(known), ""
        except ClocError as problem:
            return shard, keys, json.dumps(error_fields(problem))


_COLUMNS = ("shard", "keys", "error")


@dataclass(frozen=True)
class ActorPool:
    """Which steps a pool does, with how many actors, and what each of them takes."""

    steps: tuple[str, ...]
    actors: int
    cpus: float
    gpus: float


def pools(job: Job, resources: Mapping[str, float]) -> list[ActorPool]:
    """Share a cluster out.

    Args:
        job: The labelling.
        resources: `CPU` and `GPU` of the whole cluster.

    Returns:
        Pools in the order of their steps. All of them fit at once, beside the process that drives them: Ray would wait
        for ever for one that does not.

    Raises:
        ClocError: The shares of a GPU that the stages ask for do not fit.
    """
    cores, graphics = resources.get("CPU", 1.0), int(resources.get("GPU", 0))
    asked = {name: job.stage_of(name).gpus if graphics and name in MODEL_STEPS else 0.0 for name in STEPS}
    groups: list[list[str]] = []
    for name in STEPS:
        if groups and not asked[name] and not asked[groups[-1][0]]:
            groups[-1].append(name)
        else:
            groups.append([name])
    actors = job.config.workers or graphics or max(1, int(cores) // 2)
    if graphics and actors * sum(asked.values()) > graphics:
        wanted = ", ".join(f"{name} {share:g}" for name, share in asked.items() if share)
        remedy = "Lower captioner.gpus and detector.gpus, or --workers."
        raise ClocError(f"{actors} actors of each of {wanted} need more than {graphics} GPUs", remedy=remedy)
    share = max(cores - 1, cores / 2) / (len(groups) * actors)
    return [ActorPool(tuple(group), actors, min(1.0, int(share * 100) / 100), asked[group[0]]) for group in groups]


def run_ray(job: Job, shards: Sequence[int], progress: bool = True) -> None:
    """Do all steps on some shards.

    Args:
        job: The labelling; `workers` actors a pool, by default one a GPU of the cluster, or one for each two cores.
        shards: Their numbers.
        progress: Show Ray's progress bars.

    Raises:
        ClocError: Ray is not installed or not to be had, a stage cannot be built, a sample cannot be labelled, or Ray
            gave an actor up.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _start(ray, job.config.ray_address)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = progress
        rows = [{"shard": shard, "keys": "{}", "error": ""} for shard in shards]
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
        for pool in pools(job, ray.cluster_resources()):
            data = data.map_batches(
                StepsActor,
                fn_constructor_kwargs={"job": job, "names": pool.steps, "device": "cuda" if pool.gpus else "cpu"},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=pool.actors),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
            )
        for row in data.iter_rows():
            if row["error"]:
                raise ClocError(**json.loads(row["error"]))
    except ray.exceptions.RayActorError as error:
        remedy = "Often memory was short: lower the stage's batch_size. The same command goes on where this one was."
        raise ClocError(f"Ray gave up on an actor: {error}", remedy=remedy) from error
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ClocError(
            "Ray is not installed", remedy="pip install 'cloc-mllm[ray]', or use --engine local."
        ) from error
    return ray


def _start(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address, include_dashboard=False if address == "local" else None, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        remedy = "Check ray_address; `ray status` on the head node has to answer."
        raise ClocError(f"cannot join or start Ray: {error}", remedy=remedy) from error
