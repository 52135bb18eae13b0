"""Runs a function in several processes that form one gloo process group, for tests of anything distributed.

    def body(rank: int, shift: int) -> float: ...          # at module level, so that it can be pickled

    results = run_ranks(body, 2, 10, timeout=30)           # [body(0, 10), body(1, 10)]

Ranks are forked from a fork server that has imported torch, transformers and deepspeed once and has done nothing else.
So a rank starts in milliseconds, and never inherits the threads or locks that a fork of the test process itself would.
The caller hosts the rendezvous store, as torchrun's agent does, so no port is ever picked before it is bound.
"""

from __future__ import annotations

import faulthandler
import functools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

PRELOADED = [
    "torch.distributed",
    "deepspeed",
    "peft",
    "transformers.trainer",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llama.modeling_llama",
]
CPU_ONLY = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
SECONDS_FOR_OTHER_ERRORS = 2.0
"""How long to wait, once one rank has failed, for what the other ranks have to say about it."""


class RankError(RuntimeError):
    """A rank raised, died, hung, or returned something that cannot be pickled.

    Args:
        message: What happened to which rank, with its traceback and the end of its output.
        rank: The rank that failed first.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    init_group: bool = True,
) -> list[Any]:
    """Run ``function(rank, *args)`` on every rank of a new group and return the results in rank order.

    Every rank has the environment that torchrun would give it (RANK, WORLD_SIZE, MASTER_ADDR, ...), the caller's
    working directory, one thread, and no GPU.

    Args:
        function: A function at module level: it is pickled by name.
        world_size: Number of ranks.
        *args: Picklable arguments, the same for every rank.
        timeout: Seconds for the whole call, and for each collective.
        env: Environment variables to set on top of the caller's.
        init_group: Whether to form the process group first; without it the function does so itself.

    Raises:
        RankError: A rank failed; the message holds the traceback of each rank that did, the first failure first. If
            time ran out, it holds the stack on which each unfinished rank stood. All ranks are gone on return.
    """
    context = _server()
    payload = pickle.dumps((function, args))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        patience = 0.0
        try:
            for rank in range(world_size):
                variables = {**os.environ, **CPU_ONLY, **_torchrun_variables(rank, world_size, store.port)}
                variables |= env or {}
                log = Path(folder, f"rank{rank}.log")
                ranks.append(_Rank(context, rank, log, payload, variables, timeout, init_group))
            _collect(ranks, time.monotonic() + timeout)
            patience = 10.0
            return [rank.result for rank in ranks]
        finally:
            for started in ranks:
                started.stop(patience)


class _Rank:
    """The caller's end of one rank: its process, its pipe, and what came of it."""

    def __init__(
        self,
        context: multiprocessing.context.ForkServerContext,
        rank: int,
        log: Path,
        payload: bytes,
        variables: dict[str, str],
        timeout: float,
        init_group: bool,
    ) -> None:
        self.rank, self.log = rank, log
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = (theirs, payload, variables, os.getcwd(), str(log), timeout, init_group)
        # Not a daemon: a rank may start data loader workers of its own.
        self.process = context.Process(target=_rank_main, args=arguments, name=f"rank{rank}", daemon=False)
        self.process.start()
        theirs.close()
        self.done = False
        self.result: Any = None
        self.failure: str | None = None

    def receive(self) -> None:
        """Take the outcome: the rank's own report, or its death if it left none."""
        try:
            succeeded, value = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join()
            succeeded, value = False, f"died without a word, exit code {self.process.exitcode}"
        self.done = True
        if succeeded:
            self.result = value
        else:
            self.failure = value

    def describe(self, what: str) -> str:
        """Say what went wrong, with the end of the rank's output."""
        output = self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""
        return f"rank {self.rank} {what}" + (f"\n--- output of rank {self.rank} ---\n{output}" if output else "")

    def stop(self, patience: float) -> None:
        """Give the process this many seconds to leave by itself, then end it and all it has started."""
        self.process.join(patience)
        try:
            # The group, not the process: what a rank has started may outlive it.
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # Nothing of it is left, or it is too early in its life to lead a group.
            self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process.close()


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Receive the outcome of every rank, or raise with all that is known once one has failed."""
    failed: list[_Rank] = []
    while waiting := [rank for rank in ranks if not rank.done]:
        ready = connection.wait([rank.pipe for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in waiting:
            if rank.pipe in ready:
                rank.receive()
                if rank.failure is not None:
                    deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHER_ERRORS)
                    failed.append(rank)
    if failed:
        raise RankError("\n".join(rank.describe(rank.failure or "") for rank in failed), failed[0].rank)
    if waiting:
        raise RankError("\n".join(rank.describe("did not finish in time") for rank in waiting), waiting[0].rank)


def _torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is the caller's: no rank starts one on this port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Start the fork server, once a test run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Libraries read these when they are imported, which the server does before any rank exists.
    with mock.patch.dict(os.environ, CPU_ONLY):
        forkserver.ensure_running()
    return context


def _rank_main(
    pipe: connection.Connection,
    payload: bytes,
    variables: dict[str, str],
    folder: str,
    log: str,
    timeout: float,
    init_group: bool,
) -> None:
    """Everything a rank does, from its first instruction to its last."""
    os.setsid()
    # The caller ends this process; should the caller itself be gone, the alarm does.
    signal.alarm(math.ceil(timeout) + 10)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.dump_traceback_later(0.9 * timeout, file=2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        if init_group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        function, args = pickle.loads(payload)
        report = pickle.dumps((True, function(int(variables["RANK"]), *args)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, f"raised\n{traceback.format_exc()}")))
        # No goodbye to the group: the other ranks may be stuck in a collective, and the caller ends them all.
        return
    pipe.send_bytes(report)
    if dist.is_initialized():
        # A rank that leaves early closes connections that others may still be reading from.
        dist.barrier()
        dist.destroy_process_group()
