"""Sources of a labelling: the same samples in the same order from whatever holds them; what is wrong, by name."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.data.writers import open_writer
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.sources import RawSample, SourceReader, clean_text, plan_source
from tests.builders import noise_image
from tests.builders_labels import write_pictures

COUNT = 11


def encoded(seed: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise_image(seed=seed).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read_all(source: Path | str, state: Path) -> list[RawSample]:
    plan = plan_source(str(source), state)
    return list(SourceReader(plan).read(0, plan.total))


def as_pictures(folder: Path) -> Path:
    return write_pictures(folder / "pictures", COUNT)


def as_lines(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir()
    with open_writer(folder, "jsonl") as writer:
        for number in range(COUNT):
            noise_image(seed=number).save(images / f"{number}.png")
            writer.write({"id": f"s{number}", "image": images / f"{number}.png", "caption": "a", "regions": []})
    return folder


def as_shards(file_format: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for shard in range(3):  # three shards, of 4, 4 and 3 samples
            with open_writer(folder, file_format, f"part{shard}") as writer:
                for number in range(4 * shard, min(4 * shard + 4, COUNT)):
                    writer.write({"id": f"s{number}", "image": encoded(number), "caption": "a", "regions": []})
        return folder

    return write


FORMS = {
    "pictures": as_pictures,
    "jsonl": as_lines,
    "parquet": as_shards("parquet"),
    "webdataset": as_shards("webdataset"),
}


@pytest.fixture(params=list(FORMS))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return FORMS[request.param](folder)


def test_any_range_is_that_slice_of_the_whole(source: Path, tmp_path: Path) -> None:
    plan = plan_source(str(source), tmp_path / "state")
    whole = [(raw.number, raw.checked()["id"], raw.picture().tobytes()) for raw in SourceReader(plan).read(0, COUNT)]
    assert [number for number, _, _ in whole] == list(range(COUNT))
    assert len({name for _, name, _ in whole}) == len({pixels for _, _, pixels in whole}) == COUNT
    reader = SourceReader(plan)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, COUNT), st.integers(0, COUNT))
    def same(start: int, stop: int) -> None:
        found = [(raw.number, raw.checked()["id"], raw.picture().tobytes()) for raw in reader.read(start, stop)]
        assert found == whole[start:stop]

    same()


def test_a_plan_is_the_same_every_time_and_another_for_other_files(source: Path, tmp_path: Path) -> None:
    first = plan_source(str(source), tmp_path / "one")
    assert plan_source(str(source), tmp_path / "two").fingerprint == first.fingerprint
    kinds = (".jsonl", ".parquet", ".tar", ".png")
    file = min((p for p in source.rglob("*") if p.suffix in kinds), key=lambda p: (kinds.index(p.suffix), p))
    file.rename(file.with_name(f"x{file.name}"))
    assert plan_source(str(source), tmp_path / "three").fingerprint != first.fingerprint


def test_lines_of_the_same_length_make_another_plan(tmp_path: Path) -> None:
    file = tmp_path / "regions.jsonl"
    plans = set()
    for text in ("cat", "dog"):
        file.write_text(json.dumps({**GOOD, "caption": text}))
        plans.add(plan_source(str(tmp_path), tmp_path / "state").fingerprint)
    assert len(plans) == 2


def test_pictures_come_folder_by_folder_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.JPG", "a.png", "b/a/z.webp", "c/1.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        noise_image().save(tmp_path / name)
    for name in ("note.txt", "._a.png", ".hidden"):
        (tmp_path / name).write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    noise_image().save(tmp_path / ".cache" / "thumbnail.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "regions-00000.parquet").write_bytes(b"labels of an earlier run")
    plan = plan_source(str(tmp_path), tmp_path / "out" / "state")
    ids = [raw.checked()["id"] for raw in SourceReader(plan).read(0, plan.total)]
    assert ids == ["a.png", "b/10.JPG", "b/2.png", "b/a/z.webp", "c/1.jpeg"]
    assert plan.ignored == 4


def test_links_to_folders_are_followed_and_no_folder_is_listed_twice(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for name in (source / "b" / "1.png", elsewhere / "2.png", elsewhere / "deep" / "3.png"):
        name.parent.mkdir(parents=True, exist_ok=True)
        noise_image().save(name)
    (source / "linked").symlink_to(elsewhere)
    (source / "again").symlink_to(elsewhere)
    (source / "b" / "circle").symlink_to(source)
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    (tmp_path / "out").mkdir()
    noise_image().save(tmp_path / "out" / "figure.png")
    (source / "labels").symlink_to(tmp_path / "out")
    samples = read_all(source, tmp_path / "out" / "state")
    assert [raw.checked()["id"] for raw in samples] == ["again/2.png", "again/deep/3.png", "b/1.png"]
    assert all(raw.picture().size == (40, 30) for raw in samples)


def test_one_picture_and_a_pattern_of_pictures(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.jpg"):
        noise_image().save(tmp_path / name)
    one = read_all(tmp_path / "1.png", tmp_path / "state")
    assert [raw.checked()["id"] for raw in one] == ["1.png"]
    assert one[0].picture().size == (40, 30)
    some = read_all(tmp_path / "*.png", tmp_path / "state")
    assert [raw.checked()["id"] for raw in some] == ["1.png", "2.png"]


def test_pictures_of_a_pattern_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        noise_image(seed=1).save(tmp_path / "photos" / name / "1.png")
    plan = plan_source(str(tmp_path / "photos" / "*" / "1.png"), tmp_path / "state")
    samples = list(SourceReader(plan).read(0, plan.total))
    assert [raw.checked()["id"] for raw in samples] == ["a/1.png", "b/1.png"]
    assert all(raw.picture().size == (40, 30) for raw in samples)
    (tmp_path / "photos" / "b").rename(tmp_path / "photos" / "c")
    other = plan_source(str(tmp_path / "photos" / "*" / "1.png"), tmp_path / "state")
    assert other.fingerprint != plan.fingerprint


def test_shards_of_img2dataset(tmp_path: Path) -> None:
    """Facts in the JSON that are not ours stay with the sample; the caption is the JSON's or else the text's."""
    told = {"url": "http://e.org/1.jpg", "caption": "a  dog\n", "key": "000000000", "status": "success", "width": 512}
    members = [("000000000.jpg", encoded(0, "JPEG")), ("000000000.json", json.dumps(told).encode())]
    members += [("000000001.jpg", encoded(1, "JPEG")), ("000000001.txt", b"un chat\x00 noir")]
    members += [("000000002.jpg", encoded(2, "JPEG")), ("000000002.json", b'{"caption": null}')]
    write_tar(tmp_path / "00000.tar", members)
    first, second, third = (raw.checked() for raw in read_all(tmp_path, tmp_path / "state"))
    assert (first["id"], first["caption"], first["url"]) == ("000000000", "a dog", "http://e.org/1.jpg")
    assert (second["id"], second["caption"]) == ("000000001", "un chat noir")
    assert "caption" not in third
    assert not list(tmp_path.glob("*.index")), "a source is not written to"


@given(st.text(st.characters(), max_size=40))
def test_clean_texts_are_one_line_and_can_be_written(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned.encode().decode() == cleaned
    assert not any(unicodedata.category(mark) == "Cc" for mark in cleaned)
    assert clean_text(cleaned) == cleaned
    kept = [mark for mark in text if unicodedata.category(mark) not in ("Cc", "Cs") and not mark.isspace()]
    assert [mark for mark in cleaned if mark != "\ufffd" and not mark.isspace()] == [m for m in kept if m != "\ufffd"]


def test_scripts_are_kept() -> None:
    for text in ("नमस्ते दुनिया", "שלום‎ עולם", "👩‍👩‍👧 家族", "e\u0301te\u0301"):
        assert clean_text(text) == text


GOOD = {"image": "0.png", "caption": "a", "regions": []}
HUGE = 20_000 * 20_000


def bomb() -> bytes:
    """A PNG that says it is enormous, in its header and its (true) checksum."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    whole = encoded()
    return whole[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "cut-off JSON": ('{"image": "0.png", "capt', "not valid JSON"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "no picture": (json.dumps({**GOOD, "image": "missing.png"}), "does not exist"),
    "no name": (json.dumps({"caption": "a"}), "names no image"),
    "a caption that is a number": (json.dumps({**GOOD, "caption": 7}), "'caption' is 7"),
    "captions that are no list": (json.dumps({**GOOD, "captions": "a"}), "'captions' is 'a'"),
    "a conversation": (json.dumps({"image": "0.png", "messages": []}), "is a conversation"),
}


@pytest.mark.parametrize("kind", list(BAD_LINES))
def test_a_bad_line_is_named_and_the_others_are_read(kind: str, tmp_path: Path) -> None:
    line, problem = BAD_LINES[kind]
    noise_image().save(tmp_path / "0.png")
    (tmp_path / "regions.jsonl").write_text("\n".join([json.dumps(GOOD), str(line), json.dumps(GOOD)]))
    first, second, third = read_all(tmp_path, tmp_path / "state")
    assert first.picture().size == third.picture().size == (40, 30)
    with pytest.raises(ClocError, match=problem) as caught:
        second.picture()
    assert caught.value.file == str(tmp_path / "regions.jsonl")
    assert caught.value.sample is not None
    assert "line 2" in caught.value.sample
    assert caught.value.remedy


BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "not a picture"),
    "empty": (b"", "not a picture"),
    "cut off": (encoded()[:200], "cannot be read"),
    "decompression bomb": (bomb(), "too large to open safely"),
}


@pytest.mark.parametrize("kind", list(BAD_PICTURES))
@pytest.mark.parametrize("form", ["pictures", "tar"])
def test_a_bad_picture_is_named(kind: str, form: str, tmp_path: Path) -> None:
    content, problem = BAD_PICTURES[kind]
    folder = tmp_path / "source"
    folder.mkdir()
    if form == "tar":
        write_tar(folder / "0.tar", [("0.png", encoded()), ("1.png", content), ("1.txt", b"a"), ("2.png", encoded())])
    else:
        for number, data in enumerate((encoded(), content, encoded())):
            (folder / f"{number}.png").write_bytes(data)
    samples = read_all(folder, tmp_path / "state")
    assert len(samples) == 3
    samples[0].picture(), samples[2].picture()
    with pytest.raises(ClocError, match=problem) as caught:
        samples[1].picture()
    assert "1" in str(caught.value.sample)


def test_bad_members_of_a_shard(tmp_path: Path) -> None:
    members = [("a.png", encoded()), ("a.json", b'{"caption": "cut'), ("../../b.png", encoded()), ("c.json", b"{}")]
    write_tar(tmp_path / "0.tar", members)
    problems = []
    for raw in read_all(tmp_path, tmp_path / "state"):
        with pytest.raises(ClocError) as caught:
            raw.picture()
        problems.append(str(caught.value))
    assert "not valid JSON" in problems[0]
    assert "leads out of the shard" in problems[1]
    assert "names no image" in problems[2]
    assert all(str(tmp_path / "0.tar") in problem for problem in problems)


def test_sources_that_hold_nothing_or_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    whole = write_tar(tmp_path / "whole.tar", [("0.png", encoded())]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    for name, problem in {
        "empty": "nothing to label",
        "absent": "no such file or folder",
        "absent.png": "cannot read the file",
        "cut.tar": "cut off",
        "bad.parquet": "not a readable Parquet",
        "*.webp": "no file fits",
    }.items():
        with pytest.raises(ClocError, match=problem):
            plan_source(str(tmp_path / name), tmp_path / "state")


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "regions.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n" * 3)
    plan = plan_source(str(tmp_path), tmp_path / "state")
    file.write_text(f"{json.dumps(GOOD)}\n" * 2)
    with pytest.raises(ClocError, match="the source has changed"):
        list(SourceReader(plan).read(0, 3))


def test_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    import os

    name = os.fsdecode(b"caf\xe9.png")
    picture: Any = tmp_path / name
    try:
        picture.write_bytes(encoded())
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    (raw,) = read_all(tmp_path, tmp_path / "state")
    with pytest.raises(ClocError, match="not UTF-8") as caught:
        raw.picture()
    str(caught.value).encode()


def test_the_bomb_is_one() -> None:
    """The picture of the test above is refused for its size, not for being broken."""
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb()))
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) < HUGE
