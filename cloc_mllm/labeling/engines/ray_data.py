"""Steps as Ray Data actors: shard numbers flow through a pool of actors a step, on one machine or over a cluster.

What flows is numbers and hashes; pictures and answers stay in the source and the output folder, which every node has to
see under the same paths. All steps are at work at once, on different shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.engines.local import error_fields
from cloc_mllm.labeling.steps import MODEL_STEPS, STEPS, Job, Step

Rows = Mapping[str, Any]


class StepActor:
    """One step in a process of Ray's.

    Args:
        job: The labelling.
        name: The step.
    """

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._step: Step | None = None

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Do the step on each row's shard. An error goes on as a row, so that it comes out as it was raised."""
        done = [self._one(int(s), str(k), str(e)) for s, k, e in zip(*(rows[n] for n in _COLUMNS), strict=True)]
        return {name: [row[k] for row in done] for k, name in enumerate(_COLUMNS)}

    def _one(self, shard: int, keys: str, error: str) -> tuple[int, str, str]:
        if error:
            return shard, keys, error
        try:
            if self._step is None:
                import ray

                self._step = Step(self._job, self._name, json.loads(keys), "cuda" if ray.get_gpu_ids() else "cpu")
            return shard, json.dumps(self._step(shard)), ""
        except ClocError as problem:
            return shard, keys, json.dumps(error_fields(problem))


_COLUMNS = ("shard", "keys", "error")


def run_ray(job: Job, shards: Sequence[int], progress: bool = True) -> None:
    """Do all steps on some shards.

    Args:
        job: The labelling; `workers` actors a step, by default one a GPU of the cluster, or one.
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
        for name in STEPS:
            data = data.map_batches(
                StepActor,
                fn_constructor_kwargs={"job": job, "name": name},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=_actors(ray, job)),
                **_resources(ray, job, name),
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


def _actors(ray: Any, job: Job) -> int:
    return job.config.workers or max(1, int(ray.cluster_resources().get("GPU", 0)))


def _resources(ray: Any, job: Job, name: str) -> dict[str, float]:
    """What an actor asks for. All pools have to fit at once, beside the process that drives them."""
    total = ray.cluster_resources()
    gpus = job.stage_of(name).gpus if name in MODEL_STEPS and total.get("GPU", 0) else 0
    cores = total.get("CPU", 1)
    share = max(cores - 1, cores / 2) / (len(STEPS) * _actors(ray, job))
    return {"num_cpus": min(1.0, int(share * 100) / 100), "num_gpus": gpus}
