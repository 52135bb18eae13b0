"""Steps in processes of this machine, each on a device of its own; one step over all shards, then the next.

So a worker holds one model at a time. A worker that dies is named with the shard it was at.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.steps import MODEL_STEPS, STEPS, Job, Step

Answer = tuple[str, Any]
"""`("done", keys)`, `("bad", the fields of a ClocError)` or `("bug", a traceback)`."""


def run_local(job: Job, shards: Sequence[int], progress: bool = True) -> None:
    """Do all steps on some shards.

    Args:
        job: The labelling; `devices` and `workers` say where.
        shards: Their numbers.
        progress: Show a progress bar, if standard error is a terminal.

    Raises:
        ClocError: A stage cannot be built, a sample cannot be labelled, or a worker has died.
    """
    devices = job.config.devices or default_devices()
    workers = default_workers(devices) if job.config.workers is None else job.config.workers
    silent = None if progress else True  # None: where standard error is no terminal
    if workers == 0:
        keys: dict[str, str] = {}
        for name in STEPS:
            step = Step(job, name, keys, devices[0] if name in MODEL_STEPS else "cpu")
            for shard in tqdm(shards, desc=name, unit="shard", disable=silent):
                step(shard)
            keys = step.keys
        return
    with _Pool(job, [devices[k % len(devices)] for k in range(min(workers, len(shards)))]) as pool:
        keys = {}
        for name in STEPS:
            found = None
            for found in tqdm(pool.map(name, keys, shards), total=len(shards), desc=name, unit="shard", disable=silent):
                if found[name] != keys.get(name, found[name]):
                    remedy = "Its identity() has to be the same in every process."
                    raise ClocError(f"two workers disagree on what the stage of '{name}' is", remedy=remedy)
                keys = found


def default_devices() -> list[str]:
    """All GPUs, or the processor."""
    import torch

    return [f"cuda:{k}" for k in range(torch.cuda.device_count())] or ["cpu"]


def default_workers(devices: Sequence[str]) -> int:
    """One worker a GPU, or one for each two cores: they decode pictures and write files beside the model's work."""
    if devices[0].startswith("cpu"):
        return max(1, len(os.sched_getaffinity(0)) // 2)
    return len(devices)


class _Worker:
    """A process, the pipe to it, and the shard that it is at."""

    def __init__(self, context: Any, job: Job, device: str) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, job, device), daemon=True)
        self.process.start()
        theirs.close()
        self.shard: int | None = None

    def give(self, name: str, keys: dict[str, str], shard: int) -> None:
        self.shard = shard
        self.pipe.send((name, keys, shard))

    def answer(self, name: str) -> dict[str, str]:
        """What the worker says of the shard it was at."""
        shard, self.shard = self.shard, None
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise _death(self.process.exitcode, name, shard) from None
        if kind == "bad":
            raise ClocError(**value)
        if kind == "bug":
            raise RuntimeError(f"in step '{name}' on shard {shard}:\n{value}")
        return dict(value)


def _death(code: int | None, name: str, shard: int | None) -> ClocError:
    how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
    remedy = "With SIGKILL memory was short: lower the stage's batch_size or --workers. The same command goes on here."
    return ClocError(f"a worker died ({how}) in step '{name}' on shard {shard}", remedy=remedy)


class _Pool:
    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        # A server that has imported everything, and never touched a GPU, forks the workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._workers: list[_Worker] = []
        try:
            for device in devices:
                self._workers.append(_Worker(context, job, device))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *reason: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def map(self, name: str, keys: dict[str, str], shards: Sequence[int]) -> Iterator[dict[str, str]]:
        """Do one step on all shards; yield the keys after each, in the order in which they are done."""
        left = iter(shards)
        by_pipe: dict[Connection, _Worker] = {worker.pipe: worker for worker in self._workers}
        for worker, shard in zip(self._workers, left, strict=False):  # the first shard of each
            worker.give(name, keys, shard)
        while busy := [worker.pipe for worker in self._workers if worker.shard is not None]:
            for pipe in wait(busy):
                worker = by_pipe[pipe]  # type: ignore[index]
                found = worker.answer(name)
                following = next(left, None)
                if following is not None:
                    worker.give(name, keys, following)
                yield found


def _serve(pipe: Connection, job: Job, device: str) -> None:
    """A worker's life: build a step when it is asked for another, do it on shard after shard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that started us ends us
    step: Step | None = None
    while True:
        try:
            name, keys, shard = pipe.recv()
        except EOFError:
            return
        try:
            if step is None or step.name != name:
                step = None  # what it holds goes before the next is built
                step = Step(job, name, keys, device if name in MODEL_STEPS else "cpu")
            step(shard)
            answer: Answer = ("done", step.keys)
        except ClocError as error:
            answer = ("bad", error_fields(error))
        except Exception:
            answer = ("bug", traceback.format_exc())
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def error_fields(error: ClocError) -> dict[str, Any]:
    """What it takes to raise an error anew in another process."""
    return {"problem": error.problem, "file": error.file, "sample": error.sample, "remedy": error.remedy}
