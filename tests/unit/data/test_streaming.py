"""Streams: the same samples from every kind of shard, a resume that reads the rest, one block a lane in memory."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.data import shards as shards_module
from cloc_mllm.data.dataset import region_text_item
from cloc_mllm.data.lanes import LaneOrder
from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.shards import ShardSet
from cloc_mllm.data.streaming import ShardStream
from cloc_mllm.data.tar_writer import WebDatasetWriter
from cloc_mllm.data.writers import JsonlWriter, ParquetWriter
from cloc_mllm.errors import ClocError
from tests.builders_training import write_regions

COUNT = 45
KINDS = ("jsonl", "parquet", "tar")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples in every form, the shards in an uneven number."""
    folder = tmp_path_factory.mktemp("data")
    source = open_samples(write_regions(folder / "source", COUNT, without=0.1))
    for writer in (
        JsonlWriter(folder / "jsonl", copy_images=True),
        ParquetWriter(folder / "parquet", shard=13),
        WebDatasetWriter(folder / "tar", shard=13),
    ):
        with writer:
            for k in range(COUNT):
                if isinstance(writer, ParquetWriter) and k % 13 == 5:
                    writer._flush()  # row groups within shards
                writer.write(source[k], source.folder(k))
    return folder


def stream_of(
    *paths: Path | str,
    lanes: int = 4,
    block: int = 6,
    on_bad: Any = "error",
    seed: int = 0,
    batch: int = 4,
    weights: Any = None,
) -> ShardStream:
    sources = [ShardSet(path) for path in paths]
    order = LaneOrder(
        [source.counts for source in sources],
        weights or [1.0] * len(sources),
        names=[source.name for source in sources],
        batch=4,
        lanes=lanes,
        chunk=1,
        block=block,
        seed=seed,
    )
    return ShardStream(sources, order, partial(region_text_item, max_regions=1), seed=seed, on_bad_sample=on_bad)


def seen(items: list[dict[str, Any]]) -> list[Any]:
    return [(item["id"], item["caption"], item["regions"], item["image"].tobytes()) for item in items]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_shard_gives_whole_samples_once_an_epoch(data: Path, kind: str) -> None:
    stream, source = stream_of(data / kind), open_samples(data / "jsonl")
    reader = stream.reader()
    items = [item for chunk in range(44) for item in reader.chunk(chunk)]
    by_id = {source[k]["id"]: source[k] for k in range(COUNT)}
    assert len({item["id"] for item in items}) == 44
    for item in items:
        raw = by_id[item["id"]]
        assert item["caption"] == raw["caption"]
        assert len(item["regions"]) == min(1, len(raw["regions"]))
        for region in item["regions"]:
            assert {"box": region["box"], "text": region["text"]} in raw["regions"]


@given(kind=st.sampled_from(KINDS), start=st.integers(0, 100), lanes=st.sampled_from([4, 8]), block=st.integers(1, 50))
@settings(max_examples=15, deadline=None)
def test_reading_from_anywhere_gives_the_rest(data: Path, kind: str, start: int, lanes: int, block: int) -> None:
    stream = stream_of(data / kind, lanes=lanes, block=block)
    whole = stream.reader()
    items = [item for chunk in range(start + 9) for item in whole.chunk(chunk)]
    fresh = stream.reader()
    assert seen([item for chunk in range(start, start + 9) for item in fresh.chunk(chunk)]) == seen(items[start:])


def test_what_is_drawn_changes_with_the_epoch(data: Path) -> None:
    stream = stream_of(data / "tar")
    reader = stream.reader()
    first, second = (
        {item["id"]: item["regions"] for chunk in range(e * 44, e * 44 + 44) for item in reader.chunk(chunk)}
        for e in (0, 1)
    )
    assert any(first[name] != second[name] for name in first.keys() & second.keys())


def test_one_block_a_lane_is_held_whatever_the_size(data: Path) -> None:
    reader = stream_of(data / "tar", data / "parquet", data / "jsonl", lanes=4, block=5).reader()
    for chunk in range(300):
        reader.chunk(chunk)
        assert len(reader._held) <= 3 * 4
        assert all(len(held.turns) <= 5 for held in reader._held.values())


def test_a_mixture_reads_all_kinds(data: Path) -> None:
    stream = stream_of(*(data / kind for kind in KINDS), weights=[2.0, 1.0, 1.0])
    reader = stream.reader()
    items = [item for chunk in range(4 * 64) for item in reader.chunk(chunk)]
    files = [draw.source for chunk in range(4 * 64) for draw in stream.order.draws(chunk)]
    assert len(items) == len(files)
    assert abs(files.count(0) - 128) < 40


def broken_tar(folder: Path, kind: str) -> Path:
    """Shards in which each fifth sample has a box outside its picture."""
    source = open_samples(write_regions(folder / "source", 20))
    writer = WebDatasetWriter(folder / "out") if kind == "tar" else ParquetWriter(folder / "out")
    with writer:
        for k in range(20):
            regions = [{"box": [0, 0, 999, 999], "text": "far"}] if k % 5 == 2 else []
            writer.write({**source[k], "regions": regions}, source.folder(k))
    return folder / "out"


@pytest.mark.parametrize(
    ("kind", "place"), [("tar", r"regions-00000\.tar.*member 0000000"), ("parquet", r"\(row \d+\)")]
)
def test_broken_samples_stop_with_their_place_or_are_replaced_and_counted(
    tmp_path: Path, kind: str, place: str
) -> None:
    folder = broken_tar(tmp_path, kind)
    reader = stream_of(folder).reader()
    with pytest.raises(ClocError, match=f"{place}.*outside the image") as caught:
        [reader.chunk(chunk) for chunk in range(20)]
    assert caught.value.remedy
    stream = stream_of(folder, on_bad="skip")
    reader = stream.reader()
    items = [item for chunk in range(20) for item in reader.chunk(chunk)]
    bad = {f"s{k}" for k in (2, 7, 12, 17)}
    assert len(items) == 20
    assert not bad & {item["id"] for item in items}
    assert stream.skipped >= 4
    again = stream_of(folder, on_bad="skip").reader()
    assert seen([item for chunk in range(9, 20) for item in again.chunk(chunk)]) == seen(items[9:])


def test_skipping_goes_on_beyond_a_block_but_not_for_ever(tmp_path: Path) -> None:
    data = write_regions(tmp_path, 40)
    lines = (data / "regions.jsonl").read_text().splitlines()
    sample = {"image": "no.png", "caption": "a", "regions": []}
    broken = [json.dumps({**sample, "id": f"b{k}"}) for k in range(39)]
    (data / "regions.jsonl").write_text("\n".join([*broken[:4], *lines[:36]]))
    reader = stream_of(data, on_bad="skip", block=1).reader()
    assert all(reader.chunk(chunk)[0]["id"].startswith("s") for chunk in range(80))
    (data / "regions.jsonl").write_text("\n".join([*broken, lines[0]]))
    with pytest.raises(ClocError, match="16 blocks of samples in a row are all broken"):
        [stream_of(data, on_bad="skip", block=1).reader().chunk(chunk) for chunk in range(40)]
    with pytest.raises(ClocError, match="on_bad_sample"):
        stream_of(data, on_bad="ignore")


def test_messages_name_file_and_place(data: Path) -> None:
    for kind, place in (("tar", "member "), ("parquet", "row "), ("jsonl", "line ")):
        stream = stream_of(data / kind)
        (draw,) = stream.order.draws(7)
        assert str(data / kind) in stream.where(draw)
        assert place in stream.where(draw)
        shard, row = stream.order.sources[0].locate(draw)
        block = stream.sources[0].open(shard).block(row, row + 1)
        assert block.sample(0)["id"] == stream.reader().chunk(7)[0]["id"]


def test_parquet_behind_a_url(data: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in (data / "parquet").iterdir():
        memory.pipe(f"/rows/{file.name}", file.read_bytes())
    near, far = stream_of(data / "parquet").reader(), stream_of("memory://rows").reader()
    assert [near.chunk(k)[0]["caption"] for k in range(44)] == [far.chunk(k)[0]["caption"] for k in range(44)]


def test_parquet_that_would_take_too_much_memory_or_cannot_be_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "MAX_ROW_GROUP", 100)
    with pytest.raises(ClocError, match="has a row group of"):
        ShardSet(data / "parquet")
    monkeypatch.undo()
    file = sorted((data / "parquet").iterdir())[0]
    whole = file.read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :])
    shards = ShardSet(tmp_path)
    with pytest.raises(ClocError, match=r"a\.parquet: row group 0 cannot be read"):
        shards.open(0).block(0, 5)
    (tmp_path / "a.parquet").write_text("nothing")
    with pytest.raises(ClocError, match="not a readable Parquet file"):
        ShardSet(tmp_path)
    assert pyarrow.parquet.ParquetFile(file).num_row_groups > 1
