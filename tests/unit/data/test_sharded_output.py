"""A folder of shards holds one run's samples and no other's, whatever was stopped there before."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.sharded_output import Placed, ShardedOutput
from cloc_mllm.errors import ClocError
from tests.builders import noise_image

COUNT = 10


def sample(number: int, folder: Path) -> Placed:
    picture = folder / "a.png"
    if not picture.exists():
        noise_image(8, 8).save(picture)
    return {"id": str(number), "image": "a.png", "caption": "a", "regions": []}, folder


def write(output: ShardedOutput, stop_at: int | None, number: int) -> None:
    def samples(counts: Counter[str]) -> Iterator[Placed]:
        for k in range(number * output.shard, min((number + 1) * output.shard, COUNT)):
            counts["read"] += 1
            yield sample(k, output.out.parent)

    if number == stop_at:
        raise KeyboardInterrupt
    output.write(number, samples)


def run(out: Path, shard: int, *, stop_at: int | None = None, file_format: str = "parquet") -> None:
    output = ShardedOutput(out, "regions", file_format, shard=shard)
    output.begin({"shard": shard, "format": file_format})
    shards = -(-COUNT // shard)
    assert sum(counts["read"] for counts in output.run(partial(write, output, stop_at), shards)) == COUNT
    output.finish(shards, {"samples": COUNT})


def ids(out: Path) -> list[str]:
    source = open_samples(out)
    return [source[k]["id"] for k in range(len(source))]


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
def test_a_stopped_run_leaves_no_sample_to_one_of_another_plan(file_format: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, 2, stop_at=4, file_format=file_format)
    assert len(list(out.glob("regions-*.*"))) >= 4
    run(out, 5, file_format=file_format)
    assert ids(out) == [str(k) for k in range(COUNT)]
    assert not (out / ".convert").exists()


@pytest.mark.parametrize(("first", "second"), [("parquet", "parquet"), ("webdataset", "jsonl"), ("jsonl", "parquet")])
def test_a_folder_that_holds_other_samples_is_refused_by_name(first: str, second: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, 2, file_format=first)
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ClocError, match=r"out/regions.*: the folder holds samples already.*another folder"):
        run(out, 5, file_format=second)
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_json_lines_are_replaced_as_a_whole(tmp_path: Path) -> None:
    run(tmp_path / "out", 2, file_format="jsonl")
    run(tmp_path / "out", 5, file_format="jsonl")
    assert ids(tmp_path / "out") == [str(k) for k in range(COUNT)]


def test_a_run_stopped_while_it_names_its_files_can_be_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardedOutput._note

    def stops(self: ShardedOutput, number: int, ending: str, content: Any) -> None:
        if (number, ending) == (1, ".json"):
            raise KeyboardInterrupt
        real(self, number, ending, content)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedOutput, "_note", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", 2)
    assert (tmp_path / "out" / "regions-00001.parquet").exists()
    run(tmp_path / "out", 5)
    assert ids(tmp_path / "out") == [str(k) for k in range(COUNT)]


@pytest.mark.parametrize("comes", [True, False])
def test_files_that_come_or_go_are_found_out(comes: bool, tmp_path: Path) -> None:
    output = ShardedOutput(tmp_path / "out", "regions", "parquet", shard=5)
    output.begin("plan")
    list(output.run(partial(write, output, None), 2))
    if comes:
        (output.out / "regions-00007.parquet").write_bytes(b"")
    else:
        (output.out / "regions-00001.parquet").unlink()
    with pytest.raises(ClocError, match="is none of the files written" if comes else "was written, and is gone"):
        output.finish(2, {})


def test_half_a_state_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it clears away: the lines of the first shards are gone, their markers are not."""
    from cloc_mllm.data import sharded_output

    def half(state: Path, **_: Any) -> None:
        if state.is_dir():
            (state / "lines-00000.jsonl").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sharded_output.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", 5, file_format="jsonl")
    run(tmp_path / "out", 5, file_format="jsonl")
    assert ids(tmp_path / "out") == [str(k) for k in range(COUNT)]


def fail_first(folder: Path, number: int) -> None:
    if number == 0:
        raise ClocError("a bad sample")
    time.sleep(0.01)
    (folder / str(number)).touch()


def test_the_first_fault_is_told_before_everything_else_is_done(tmp_path: Path) -> None:
    output = ShardedOutput(tmp_path / "out", "regions")
    output.begin("plan")
    (tmp_path / "done").mkdir()
    with pytest.raises(ClocError, match="a bad sample"):
        list(output.run(partial(fail_first, tmp_path / "done"), 300, workers=2, progress=False))
    assert len(list((tmp_path / "done").iterdir())) < 150
