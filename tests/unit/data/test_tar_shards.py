"""Tar shards: what tarfile and webdataset's grouping would give, from any sample on; an index that fits, or none."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.data.dataset import RegionTextDataset
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.shards import ShardSet, write_missing_indexes
from cloc_mllm.data.tar_shards import TarFile, index_path, read_index, scan_tar, split_name
from cloc_mllm.data.tar_writer import WebDatasetWriter
from cloc_mllm.data.writers import open_writer
from cloc_mllm.errors import ClocError
from tests.builders import noise_image
from tests.builders_training import write_regions


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise_image(seed=seed).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            archive.addfile(member, io.BytesIO(content))
    return path


def sample_files(key: str, **changes: Any) -> list[tuple[str, bytes]]:
    sample = {"caption": f"caption {key}", "regions": [{"box": [0, 0, 5, 5], "text": key}], **changes}
    return [(f"{key}.jpg", jpeg()), (f"{key}.json", json.dumps(sample).encode())]


keys = st.lists(
    st.tuples(
        st.text("abé_-", min_size=1, max_size=8), st.sampled_from(["", "part/", "d" * 70 + "/" + "e" * 80 + "/"])
    ),
    min_size=1,
    max_size=6,
    unique=True,
).filter(lambda found: not any(key[:2] == key[-2:] == "__" and len(key) > 3 for key, _ in found))


@given(
    keys=keys,
    sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    folders=st.booleans(),
    start=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_tar_is_read_as_tarfile_reads_it(
    keys: list[tuple[str, str]], sizes: list[int], form: int, folders: bool, start: int
) -> None:
    named = [f"{folder}{key}" for key, folder in keys]
    files = []
    for name, size in zip(named, sizes, strict=False):
        files += [(f"{Path(name).parent}/", b"")] if folders else []
        files += [(f"{name}.txt", name.encode() + b"."), (f"{name}.jpg", bytes(size)), (f"{name}.seg.png", b"no")]
    with tempfile.TemporaryDirectory() as folder:
        shard = TarFile(write_tar(Path(folder) / "a.tar", files, form))
        assert len(shard) == len(named)
        start = min(start, len(named) - 1)  # it may start in the middle
        block = shard.block(start, len(named))
        for number in range(len(block)):
            name, size = named[start + number], sizes[start + number]
            assert block.sample(number) == {"id": name, "caption": f"{name}.", "image": bytes(size), "regions": []}
            assert block.where(number)[1] == f"member {name}"


def test_what_the_writer_writes_is_read_and_its_index_is_what_a_scan_finds(tmp_path: Path) -> None:
    source = open_samples(write_regions(tmp_path / "json", 10))
    with WebDatasetWriter(tmp_path / "tar", shard=4) as writer:
        for k in range(len(source)):
            writer.write(source[k], source.folder(k))
    shards = sorted((tmp_path / "tar").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"regions-0000{k}.tar" for k in range(3)]
    for shard in shards:
        index = read_index(str(shard), shard.stat().st_size)
        assert index is not None
        assert index.tolist() == scan_tar(str(shard)).tolist()
    stored, direct = RegionTextDataset(tmp_path / "tar", seed=3), RegionTextDataset(source, seed=3)
    for k in range(10):
        assert {**stored[k], "index": k} == {**direct[k], "index": k}
    assert pickle.loads(pickle.dumps(stored))[9]["id"] == "s9"
    report = check_data(tmp_path / "tar", progress=False)
    assert (report.samples, report.broken, len(report.files)) == (10, 0, 3)


def test_bytes_are_named_by_what_they_are(tmp_path: Path) -> None:
    with open_writer(tmp_path, "webdataset") as writer:
        writer.write({"image": jpeg(), "caption": "a", "regions": []})
    with tarfile.open(tmp_path / "regions-00000.tar") as archive:
        assert archive.getnames() == ["000000000.jpg", "000000000.json"]
    with pytest.raises(ClocError, match="no picture"), open_writer(tmp_path / "b", "webdataset") as writer:
        writer.write({"image": b"nothing", "caption": "a", "regions": []})
    (tmp_path / "notes.txt").write_text("no picture")
    with (
        pytest.raises(ClocError, match=r"notes\.txt: sample 'x \(number 0 written\)': an image is no picture"),
        open_writer(tmp_path / "b", "webdataset") as writer,
    ):
        writer.write({"id": "x", "image": tmp_path / "notes.txt", "caption": "a", "regions": []})
    assert not list((tmp_path / "b").glob("*.tar")), "a stopped writer leaves no finished shard"
    with pytest.raises(ClocError, match="hold region-text samples"), open_writer(tmp_path, "webdataset") as writer:
        writer.write({"messages": []})


def test_a_phones_picture_is_a_jpeg(tmp_path: Path) -> None:
    """MPO: a JPEG with a second one behind it."""
    first, second = noise_image(8, 6), noise_image(6, 8)
    first.save(tmp_path / "phone.mpo", format="MPO", save_all=True, append_images=[second])
    with open_writer(tmp_path / "out", "webdataset") as writer:
        writer.write({"image": tmp_path / "phone.mpo", "caption": "a", "regions": []})
        writer.write({"image": (tmp_path / "phone.mpo").read_bytes(), "caption": "a", "regions": []})
    with tarfile.open(tmp_path / "out" / "regions-00000.tar") as archive:
        assert archive.getnames()[::2] == ["000000000.jpg", "000000001.jpg"]
    assert check_data(tmp_path / "out", progress=False).faults == []


def test_an_index_is_written_once_and_refused_where_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tar(tmp_path / "a.tar", sample_files("x") + sample_files("y"))
    with pytest.raises(ClocError, match=r"a\.tar: the shard has no index"):
        ShardSet(tmp_path)
    assert write_missing_indexes([tmp_path]) == 1
    assert "1 tar shards have no index" in capsys.readouterr().out
    assert write_missing_indexes([tmp_path]) == 0
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["a.tar", "a.tar.index"]
    assert ShardSet(tmp_path).counts == [2]
    path = write_tar(path, [*sample_files("x"), ("y.txt", bytes(20_000))])
    with pytest.raises(ClocError, match=r"a\.tar\.index: does not fit its shard, which has \d+ bytes and not \d+"):
        ShardSet(tmp_path)
    assert "does not fit" in str(check_data(path, progress=False).faults[0])
    index = Path(index_path(str(path)))
    for damage in ("", "{}\n[]\n", index.read_text()[:-9], index.read_text().replace("[0,", "[7,0,")):
        index.write_text(damage)
        with pytest.raises(ClocError, match="not a readable index"):
            TarFile(path)


def test_an_index_of_another_tar_of_the_same_size_is_found_out(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", [("x.txt", bytes(100)), ("y.txt", bytes(600))])
    other = write_tar(tmp_path / "b.tar", [("x.txt", bytes(600)), ("y.txt", bytes(100))])
    write_missing_indexes([one])
    Path(index_path(str(other))).write_text(Path(index_path(str(one))).read_text())
    with pytest.raises(ClocError, match="there is no sample where the index says one is"):
        TarFile(other)[1]


def test_tars_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample_files("x") + sample_files("y"))
    whole = path.read_bytes()
    end = int(scan_tar(str(path))[-1])
    for data in (whole[:end], whole[: end - 600], whole[: end - 100], b"nothing of the kind" * 100):
        path.write_bytes(data)
        with pytest.raises(ClocError, match=r"a\.tar"):
            TarFile(path)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.txt"))
    with pytest.raises(ClocError, match="not compressed ones"):
        TarFile(tmp_path / "b.tar")
    with pytest.raises(ClocError, match="cannot read the file"):
        TarFile(tmp_path / "none.tar")


BROKEN = {
    "bad JSON": ([("x.jpg", b""), ("x.json", b"{")], "not valid JSON"),
    "a list": ([("x.json", b"[]")], "the JSON is not an object"),
    "twice the same": ([("x.txt", b"a"), ("x.txt", b"b")], "two members called x.txt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_is_named(tmp_path: Path, name: str) -> None:
    files, message = BROKEN[name]
    path = write_tar(tmp_path / "a.tar", sample_files("w") + files)
    with pytest.raises(ClocError, match=message) as caught:
        TarFile(path)[1]
    assert (caught.value.file, caught.value.sample) == (str(path), "member x")
    assert TarFile(path).where(1) == (str(path), "member x")


def test_shards_behind_a_url_are_read_through_their_index(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    write_tar(tmp_path / "a.tar", sample_files("x") + sample_files("y"))
    memory.pipe("/shards/a.tar", (tmp_path / "a.tar").read_bytes())
    with pytest.raises(ClocError, match=r"memory://.*a\.tar: the shard has no index"):
        ShardSet("memory://shards")
    write_missing_indexes([tmp_path])
    memory.pipe("/shards/a.tar.index", (tmp_path / "a.tar.index").read_bytes())
    for name in ("memory://shards", "memory://shards/*.tar", "memory://shards/a.tar"):
        shards = ShardSet(name)
        assert shards.counts == [2]
        assert shards.open(0).block(1, 2).sample(0)["caption"] == "caption y"
    with pytest.raises(ClocError, match="cannot be read at random"):
        open_samples("memory://shards/a.tar")
    for name in ("nosuch://shards", "nosuch://shards/a.tar", "nosuch://shards/a.parquet", "nosuch://shards/*.tar"):
        with pytest.raises(ClocError, match=r"nosuch://shards.*cannot be opened"):
            ShardSet(name)


def test_members_about_the_shard_are_no_samples(tmp_path: Path) -> None:
    files = [("__info__.json", b"{}"), *sample_files("x"), ("__more__.txt", b"a"), *sample_files("y")]
    shard = TarFile(write_tar(tmp_path / "a.tar", files))
    assert [shard[k]["id"] for k in range(len(shard))] == ["x", "y"]
    assert shard[0]["caption"] == "caption x"


def test_names_are_split_at_the_first_dot_of_their_last_part() -> None:
    assert split_name("a.b/c.d.JPG") == ("a.b/c", "d.jpg")
    assert split_name("c") == ("c", "")
