"""The helper that other distributed tests trust: results in order, failures and hangs reported, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, run_ranks

pytestmark = pytest.mark.integration


def sum_of_ranks(rank: int, scale: torch.Tensor) -> tuple[int, torch.Tensor, str]:
    total = scale * (rank + 1)
    dist.all_reduce(total)
    return rank, total, os.environ["LOCAL_RANK"]


def one_rank_raises(rank: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def one_rank_hangs_in_python(rank: int) -> None:
    while rank == 0:
        time.sleep(0.05)


def one_rank_is_killed(rank: int) -> None:
    if rank == 0:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def returns_a_socket(rank: int) -> socket.socket:
    return socket.socket()


def forms_its_own_group(rank: int, folder: str) -> int:
    assert not dist.is_initialized()
    Path(folder, f"{rank}-{os.getpid()}").touch()
    dist.init_process_group("gloo")
    return dist.get_world_size()


def leaves_a_child_behind(rank: int, folder: str) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    Path(folder, str(pid)).touch()
    raise ValueError("the child stays")


def test_results_come_in_rank_order_and_tensors_travel() -> None:
    results = run_ranks(sum_of_ranks, 3, torch.tensor([1.0, 2.0]), timeout=60)
    assert [(rank, local) for rank, _, local in results] == [(0, "0"), (1, "1"), (2, "2")]
    for _, total, _ in results:
        torch.testing.assert_close(total, torch.tensor([6.0, 12.0]))


def test_an_error_comes_with_its_traceback_and_does_not_wait_for_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 raised") as caught:
        run_ranks(one_rank_raises, 2, timeout=300)
    assert "KeyError: 'the reason'" in str(caught.value)
    assert "in one_rank_raises" in str(caught.value)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 150


def test_a_hang_ends_in_the_stack_it_hangs_on() -> None:
    with pytest.raises(RankError, match="rank 0 did not finish in time") as caught:
        run_ranks(one_rank_hangs_in_python, 2, timeout=8)
    assert "in one_rank_hangs_in_python" in str(caught.value)


def test_a_killed_rank_is_reported_with_its_signal_and_output() -> None:
    with pytest.raises(RankError, match=f"rank 0 died without a word, exit code {-signal.SIGKILL}") as caught:
        run_ranks(one_rank_is_killed, 2, timeout=60)
    assert "last words" in str(caught.value)


def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(RankError, match="cannot pickle"):
        run_ranks(returns_a_socket, 1, timeout=60)


def test_the_function_may_form_the_group_itself_and_no_process_outlives_the_call(tmp_path: Path) -> None:
    assert run_ranks(forms_its_own_group, 2, str(tmp_path), timeout=60, init_group=False) == [2, 2]
    pids = [int(path.name.split("-")[1]) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(_alive(pid) for pid in pids)


def test_what_a_failed_rank_started_is_ended_too(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="the child stays"):
        run_ranks(leaves_a_child_behind, 1, str(tmp_path), timeout=60)
    (pid,) = (int(path.name) for path in tmp_path.iterdir())
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_the_environment_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_BY_THE_CALLER", "1")
    assert run_ranks(environment, 1, timeout=60, env={"SET_FOR_THE_RANKS": "2"}) == [("1", "2", "")]


def environment(rank: int) -> tuple[str | None, str | None, str | None]:
    names = ("SET_BY_THE_CALLER", "SET_FOR_THE_RANKS", "CUDA_VISIBLE_DEVICES")
    first, second, third = (os.environ.get(name) for name in names)
    return first, second, third


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet collected by its parent does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
