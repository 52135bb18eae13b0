"""Readers: every form on disk gives the same samples, at random access, and says where each one stands."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.data import readers, writers
from cloc_mllm.data.importers.json_stream import stream_items
from cloc_mllm.data.readers import InMemory, Joined, JsonLines, data_files, open_file, open_samples, resolve_image
from cloc_mllm.data.writers import JsonlWriter, ParquetWriter, SampleWriter, open_writer
from cloc_mllm.errors import ClocError
from tests.builders import noise_image

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
fillers = st.lists(st.sampled_from(["", " ", "\r"]), max_size=2)


@given(
    st.lists(st.tuples(st.dictionaries(texts, texts, min_size=1, max_size=3), fillers), max_size=12),
    st.booleans(),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_json_lines_are_found_whatever_lies_between_them(
    entries: list[tuple[dict[str, str], list[str]]], final_break: bool, window: int
) -> None:
    import tempfile

    expected, rows = [], []
    for sample, blanks in entries:
        rows += [json.dumps(sample, ensure_ascii=False).replace("\x85", " "), *blanks]
        expected.append((json.loads(rows[-1 - len(blanks)]), f"line {len(rows) - len(blanks)}"))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_SCAN_BYTES", window)
        path = Path(folder) / "data.jsonl"
        path.write_bytes(("\n".join(rows) + "\n" * final_break).encode())
        source = JsonLines(path)
        assert [(source[k], source.where(k)[1]) for k in reversed(range(len(source)))] == expected[::-1]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1}\n\n{"id": \n[1]\n')
    source = JsonLines(path)
    assert source[0] == {"id": 1}
    with pytest.raises(ClocError, match=r"data.jsonl: sample 'line 3': not valid JSON"):
        source[1]
    with pytest.raises(ClocError, match=r"sample 'line 4': not a JSON object"):
        source[2]


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    source = JsonLines(path)
    assert source[1] == {"id": 2}
    assert pickle.loads(pickle.dumps(source))[1] == {"id": 2}


def test_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"id": 1}, {"id": 2}, 3]')
    source = open_file(path)
    assert len(source) == 3
    assert source[1] == {"id": 2}
    assert source.folder(1) == tmp_path
    with pytest.raises(ClocError, match=r"entry 2.*not a JSON object"):
        source[2]
    path.write_text('{"id": 1}')
    with pytest.raises(ClocError, match="not a list of samples"):
        open_file(path)
    path.write_text('{"id": 1}\n{"id": 2}')
    with pytest.raises(ClocError, match="jsonl"):
        open_file(path)


def region_samples(folder: Path) -> list[dict[str, Any]]:
    for k in range(3):
        noise_image(seed=k).save(folder / f"{k}.png")
    plain = {"box": [0.0, 1.25, 10.0, 20.0], "text": "cat"}
    full = {**plain, "score": 0.5, "unique": True, "attributes": {"shape": "star", "colour": "red"}}
    return [
        {"id": "0", "image": "0.png", "width": 40, "height": 30, "caption": "ünïcode", "regions": [plain, full]},
        {"id": "1", "image": "1.png", "caption": "b", "captions": ["b", "c"], "regions": [], "source": "test"},
        {"id": "2", "image": "2.png", "caption": "c", "regions": [full]},
    ]


def conversation_samples(folder: Path) -> list[dict[str, Any]]:
    for k in range(2):
        noise_image(seed=k).save(folder / f"{k}.png")
    region = {"type": "region", "box": [0, 1.5, 10, 20], "phrase": "a cat", "image": 0}
    return [
        {
            "id": "0",
            "task": "chat",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "image", "image": "1.png"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}, region]},
            ],
        },
        {"id": "1", "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
    ]


def write_all(writer: SampleWriter, samples: list[dict[str, Any]], folder: Path) -> None:
    with writer:
        for sample in samples:
            writer.write(sample, folder)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_what_is_written_is_read(tmp_path: Path, file_format: str) -> None:
    samples = region_samples(tmp_path)
    with open_writer(tmp_path / "out", file_format) as writer:
        for sample in samples:
            writer.write(sample, tmp_path)
    source = open_samples(tmp_path / "out")
    assert len(source) == 3
    for k, sample in enumerate(samples):
        read = source[k]
        image = resolve_image(read.pop("image"), source.folder(k))
        data = image if isinstance(image, bytes) else image.read_bytes()
        assert data == (tmp_path / sample["image"]).read_bytes()
        assert read == {key: value for key, value in sample.items() if key != "image"}


def test_conversations_in_parquet(tmp_path: Path) -> None:
    from cloc_mllm.data.dataset import ConversationDataset

    samples = conversation_samples(tmp_path)
    with ParquetWriter(tmp_path / "out", "conversations") as writer:
        for sample in samples:
            writer.write(sample, tmp_path)
    stored, direct = ConversationDataset(tmp_path / "out"), ConversationDataset(InMemory(samples, tmp_path))
    for k in range(2):
        ours, theirs = stored[k]["messages"], direct[k]["messages"]
        assert len(ours) == len(theirs)
        assert ours == theirs


def test_copied_images_make_a_folder_that_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    with JsonlWriter(tmp_path / "a", copy_images=True) as writer:
        for sample in region_samples(tmp_path / "from"):
            writer.write(sample, tmp_path / "from")
    (tmp_path / "a").rename(tmp_path / "b")
    source = open_samples(tmp_path / "b")
    assert all(resolve_image(source[k]["image"], source.folder(k)).is_file() for k in range(3))


def picture_sample(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    noise_image(*size).save(folder / "a.bmp")
    return {"id": folder.name, "image": str(folder / "a.bmp"), "caption": "a", "regions": []}


def test_pictures_of_one_name_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    one, two = picture_sample(tmp_path / "one", (8, 6)), picture_sample(tmp_path / "two", (6, 8))
    same = {**picture_sample(tmp_path / "three", (8, 6)), "id": "same"}
    content = Path(one["image"]).read_bytes()
    Path(two["image"]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with JsonlWriter(tmp_path / "out", copy_images=True) as writer:
        writer.write(one)
        writer.write(same)
        with pytest.raises(ClocError, match=r"two/a\.bmp: sample 'two \(number 2 written\)': two different images"):
            writer.write(two)
    assert [file.name for file in (tmp_path / "out" / "images").iterdir()] == ["a.bmp"]


@pytest.mark.parametrize("rival", [None, "same", "other"])
def test_a_copy_is_whole_or_not_there(rival: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of a copy leaves nothing under its name; a process that is faster is not written over."""
    sample, copied = picture_sample(tmp_path / "one", (8, 6)), writers.shutil.copyfile
    content = Path(sample["image"]).read_bytes()
    copy = tmp_path / "out" / "images" / "a.bmp"

    def half(source: Path, part: Path) -> None:
        part.write_bytes(content[:9])
        raise KeyboardInterrupt

    def faster(source: Path, part: Path) -> None:
        copied(source, part)
        copy.write_bytes(content if rival == "same" else b"another picture")

    with JsonlWriter(tmp_path / "out", copy_images=True) as writer:
        monkeypatch.setattr(writers.shutil, "copyfile", half if rival is None else faster)
        if rival != "same":
            with pytest.raises(KeyboardInterrupt if rival is None else ClocError):
                writer.write(sample)
            assert copy.exists() == (rival == "other")
        if rival is None:
            monkeypatch.setattr(writers.shutil, "copyfile", copied)
        if rival != "other":
            writer.write(sample)
            assert copy.read_bytes() == content


def test_a_copy_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    sample = picture_sample(tmp_path / "one", (8, 6))
    monkeypatch.setattr(writers.os, "link", refused)
    with JsonlWriter(tmp_path / "out", copy_images=True) as writer:
        writer.write(sample)
    assert [file.name for file in (tmp_path / "out" / "images").iterdir()] == ["a.bmp"]


def test_a_line_nested_too_deeply_is_named(tmp_path: Path) -> None:
    deep = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "a.jsonl").write_text(deep)
    with pytest.raises(ClocError, match=r"a\.jsonl: sample 'line 1': not valid JSON: maximum recursion"):
        JsonLines(tmp_path / "a.jsonl")[0]
    (tmp_path / "a.json").write_text(f"[{deep}]")
    with pytest.raises(ClocError, match=r"a\.json: not valid JSON: maximum recursion"):
        open_file(tmp_path / "a.json")
    with pytest.raises(ClocError, match=r"a\.json: not valid JSON near character"):
        list(stream_items(tmp_path / "a.json"))


def test_a_stopped_writer_leaves_no_finished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_ROW_GROUP", 1)
    for writer in (JsonlWriter(tmp_path / "a"), ParquetWriter(tmp_path / "b")):
        with pytest.raises(KeyError, match="image"):
            write_all(writer, [region_samples(tmp_path)[0], {"regions": []}], tmp_path)
        (left,) = writer.out.iterdir()
        assert left.name.endswith(".part")


def test_shards_and_row_groups(tmp_path: Path) -> None:
    sample = region_samples(tmp_path)[1]
    with ParquetWriter(tmp_path / "out", shard=128) as writer:
        for k in range(300):
            writer.write({**sample, "id": str(k)}, tmp_path)
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [f"regions-0000{k}.parquet" for k in range(3)]
    source = open_samples(tmp_path / "out")
    assert [source[k]["id"] for k in (0, 127, 128, 299)] == ["0", "127", "128", "299"]


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    mixed = [region_samples(tmp_path)[0], conversation_samples(tmp_path)[0]]
    with pytest.raises(ClocError, match="one kind"):
        write_all(ParquetWriter(tmp_path / "out"), mixed, tmp_path)
    with pytest.raises(ClocError, match="unknown format 'tar'"):
        open_writer(tmp_path, "tar")


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("nothing of the kind")
    with pytest.raises(ClocError, match="not a readable Parquet file"):
        open_file(tmp_path / "a.parquet")


def test_joined_sources_keep_their_places(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"id": "{name}{k}"}}\n' for k in range(3)))
    source = open_samples([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [source[k]["id"] for k in range(6)] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert source.where(4) == (str(tmp_path / "b.jsonl"), "line 2")
    with pytest.raises(IndexError):
        source[6]
    assert len(Joined([])) == 0


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="holds no samples"):
        data_files(tmp_path)
    (tmp_path / "x.jsonl").touch()
    assert data_files(tmp_path) == [tmp_path / "x.jsonl"]
    (tmp_path / "y.jsonl").touch()
    with pytest.raises(ClocError, match=r"several files: x.jsonl, y.jsonl"):
        data_files(tmp_path)
    (tmp_path / "regions.jsonl").touch()
    assert data_files(tmp_path) == [tmp_path / "regions.jsonl"]
    assert data_files(tmp_path, "y.jsonl") == [tmp_path / "y.jsonl"]
    with pytest.raises(ClocError, match="no such file"):
        data_files(tmp_path / "none")
    split = tmp_path / "root" / "train"
    split.mkdir(parents=True)
    (split / "regions.jsonl").touch()
    with pytest.raises(ClocError, match="root/train"):
        data_files(tmp_path / "root")
    with pytest.raises(ClocError, match=r"cannot tell what 'a\.txt' is"):
        open_file(tmp_path / "a.txt")
