"""Leaks: every way a picture or text of an evaluation set can be in the training set, and the set without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from cloc_mllm.apps.cli import main
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.inspection.exclusion import (
    Excluded,
    data_root,
    excluded_sample,
    filter_data,
    read_exclusions,
    write_exclusions,
)
from cloc_mllm.data.inspection.leaks import KINDS, LeakOptions, find_leaks, write_exclude
from cloc_mllm.data.inspection.scan import SampleFiles
from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.writers import open_writer
from cloc_mllm.errors import ClocError
from tests.unit.data.inspection.sets import region_samples, smooth_picture, talk, write_lines

QUIET = LeakOptions(progress=False)
LONG = "a man in a blue hat who feeds three grey pigeons"


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Twelve samples; the pictures of numbers 1 and 7 are one file, and 9's is called after a COCO image."""
    folder = tmp_path / "train"
    samples = region_samples(folder, 12)
    samples[7]["image"] = samples[1]["image"]
    (folder / "p9.png").rename(folder / "COCO_train2014_000000000139.png")
    samples[9]["image"] = "COCO_train2014_000000000139.png"
    samples[10]["regions"] = [{"box": [1, 2, 9, 9], "text": f"  {LONG.upper()} "}]
    write_lines(folder / "regions.jsonl", samples)
    return folder


@pytest.fixture
def evaluation(tmp_path: Path, train: Path) -> Path:
    """A copy, a re-encoded, a mirrored and a cropped picture of the training set, a flat one, and new ones."""
    folder = tmp_path / "evaluation"
    samples = region_samples(folder, 4, first=100)
    shutil.copy(train / "p1.png", folder / "copy.png")
    smooth_picture(2).resize((128, 96), Image.Resampling.BICUBIC).save(folder / "half.jpg", quality=70)
    ImageOps.mirror(smooth_picture(3)).save(folder / "mirror.png")
    smooth_picture(9).crop((20, 10, 64, 48)).save(folder / "000000000139.jpg")
    Image.new("RGB", (64, 48), "red").save(folder / "flat.png")
    for name in ("copy.png", "half.jpg", "mirror.png", "000000000139.jpg", "flat.png"):
        samples.append({"id": name, "image": name, "caption": f"evaluation of {name}", "regions": []})
    samples[0]["caption"] = LONG
    formula = "this long caption of nine words is a formula"
    for sample in samples[1:4]:
        sample["caption"] = formula
    write_lines(folder / "regions.jsonl", samples)
    with (train / "regions.jsonl").open("a") as file:
        Image.new("RGB", (64, 48), "blue").save(train / "flat.png")
        file.write(json.dumps({"id": "flat", "image": "flat.png", "caption": formula, "regions": []}) + "\n")
    return folder


def hits(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (h["evaluation"]["sample"].split(" ")[0], h["kind"], h["training"]["sample"])
        for h in report["pictures"]["hits"]
    ]


def test_every_kind_of_leak_is_named_with_both_samples(train: Path, evaluation: Path) -> None:
    options = LeakOptions(mirrored=True, progress=False)
    report = find_leaks(train, [evaluation], options).to_dict()
    assert hits(report) == [
        ("copy.png", KINDS[0], "s1 (line 2)"),
        ("half.jpg", KINDS[1], "s2 (line 3)"),
        ("mirror.png", KINDS[2], "s3 (line 4)"),
        ("000000000139.jpg", KINDS[3], "s9 (line 10)"),
    ]
    (text,) = report["texts"]["hits"]
    assert text["text"] == LONG
    assert text["evaluation"] == {
        "file": str(evaluation / "regions.jsonl"),
        "sample": "s100 (line 1)",
        "group": "captions",
    }
    assert text["training"]["sample"] == "s10 (line 11)"
    assert text["training"]["group"] == "region texts"
    assert report["sets"][0]["formulas"] == 1
    assert report["leaks"] == 5
    together = find_leaks(train, [evaluation], LeakOptions(mirrored=True, workers=2, progress=False)).to_dict()
    assert together == report


def test_what_counts_is_up_to_the_options(train: Path, evaluation: Path) -> None:
    plain = find_leaks(train, [evaluation], QUIET)
    assert [kind for _, kind, _ in hits(plain.to_dict())] == [KINDS[0], KINDS[1], KINDS[3]]
    assert plain.leaks == 4
    assert find_leaks(train, [evaluation], LeakOptions(texts="report", progress=False)).leaks == 3
    skipped = find_leaks(train, [evaluation], LeakOptions(texts="skip", progress=False)).to_dict()
    assert skipped["texts"]["hits"] == []
    assert find_leaks(train, [evaluation], LeakOptions(min_words=12, progress=False)).to_dict()["texts"]["count"] == 0
    with pytest.raises(ClocError, match="texts is 'none'"):
        find_leaks(train, [evaluation], LeakOptions(texts="none"))


@pytest.mark.parametrize("file_format", ["jsonl", "parquet", "webdataset"])
def test_a_filtered_set_has_no_leak_and_lacks_nothing_else(
    train: Path, evaluation: Path, tmp_path: Path, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_samples(train)
    with open_writer(tmp_path / "set", file_format) as writer:
        for k in range(len(source)):
            writer.write(source[k], source.folder(k))
    listed, clean = tmp_path / "leaks.jsonl", tmp_path / "clean"
    words = ["data", "leaks", str(tmp_path / "set"), "--eval", str(evaluation), "--mirrored"]
    assert main([*words, "--write-exclude", str(listed)]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    assert "--write-exclude FILE" in output.err
    left_out = [json.loads(line)["id"] for line in listed.read_text().splitlines()]
    # A shard keeps no names of files, and of the ids none is COCO's.
    expected = ["s1", "s2", "s3", "s7", *(["s9"] if file_format == "jsonl" else []), "s10"]
    assert left_out == expected
    assert main(["data", "filter", str(tmp_path / "set"), "--exclude", str(listed), "--out", str(clean)]) == 0
    assert f"13 samples read, {len(expected)} left out, {13 - len(expected)} written" in capsys.readouterr().out
    assert main(["data", "leaks", str(clean), "--eval", str(evaluation), "--mirrored"]) == 0
    assert {file.suffix for file in clean.iterdir()} == {file.suffix for file in (tmp_path / "set").iterdir()}
    rest = open_samples(clean)
    ids = [f"s{k}" for k in range(12)]
    assert [rest[k]["id"] for k in range(len(rest))] == [i for i in [*ids, "flat"] if i not in expected]
    assert check_data(clean, progress=False).faults == []


def test_exit_codes_and_json(train: Path, evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "leaks", str(train), "--eval", str(evaluation), "--json"]
    assert main(words) == 2
    assert json.loads(capsys.readouterr().out)["leaks"] == 4
    assert main([*words, "--report-only"]) == 0
    assert main(["data", "leaks", str(train), "--eval", str(evaluation / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_ids_of_cocos_samples_name_coco_images(tmp_path: Path) -> None:
    train = [{**s, "id": str(k + 5), "source": "coco"} for k, s in enumerate(region_samples(tmp_path / "a", 3))]
    write_lines(tmp_path / "a" / "regions.jsonl", train)
    smooth_picture(77).save(tmp_path / "COCO_val2014_000000000006.jpg")
    write_lines(tmp_path / "b.jsonl", [talk("x", "COCO_val2014_000000000006.jpg"), talk("y", "a/p2.png")])
    report = find_leaks(tmp_path / "a", [tmp_path / "b.jsonl"], QUIET).to_dict()
    assert hits(report) == [("x", KINDS[3], "6 (line 2)"), ("y", KINDS[0], "7 (line 3)")]
    write_lines(tmp_path / "a" / "regions.jsonl", [{**s, "source": "other"} for s in train])
    assert len(hits(find_leaks(tmp_path / "a", [tmp_path / "b.jsonl"], QUIET).to_dict())) == 1


# -- filter -----------------------------------------------------------------------------------------------------------


def test_a_list_of_ids_and_its_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        samples = region_samples(tmp_path / "set" / split, 3)
        samples[2].pop("id")
        write_lines(tmp_path / "set" / split / "regions.jsonl", samples)
        write_lines(tmp_path / "set" / split / "talks.jsonl", [talk("t", "p0.png"), talk("s1", "p1.png")])
    listed = tmp_path / "list"
    entries = [Excluded(None, "test/regions.jsonl", "line 3", "odd"), Excluded("s0", "train/regions.jsonl", "line 1")]
    write_exclusions(listed, entries)
    assert read_exclusions(listed) == entries
    with listed.open("a") as file:
        file.write("s1\n\nnobody\n")
    words = ["data", "filter", str(tmp_path / "set"), "--exclude", str(listed), "--copy-images"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert "10 samples read, 6 left out, 4 written" in output.out
    assert "1 lines of" in output.err
    kept = {
        str(file.relative_to(tmp_path / "out")): [json.loads(line).get("id") for line in file.read_text().splitlines()]
        for file in (tmp_path / "out").rglob("*.jsonl")
    }
    assert kept == {
        "train/regions.jsonl": [None],
        "train/talks.jsonl": ["t"],
        "test/regions.jsonl": ["s0"],
        "test/talks.jsonl": ["t"],
    }
    assert check_data(tmp_path / "out", progress=False).faults == []
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_files_of_one_name_that_a_pattern_finds_stay_apart(file_format: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        samples = region_samples(tmp_path / "set" / split, 3)
        with open_writer(tmp_path / "set" / split, file_format) as writer:
            for sample in samples:
                writer.write(sample, tmp_path / "set" / split)
    (name,) = {file.name for file in (tmp_path / "set").glob(f"*/*.{file_format}")}
    pattern, place = f"{tmp_path}/set/*/{name}", "row 1" if file_format == "parquet" else "line 2"
    files = SampleFiles(pattern)
    root = data_root(pattern, files)
    assert excluded_sample(root, files, 4, "") == Excluded("s1", f"train/{name}", place, "")
    write_exclusions(tmp_path / "list", [excluded_sample(root, files, 4, "")])
    counts = filter_data(pattern, tmp_path / "list", tmp_path / "out", progress=False)
    assert (counts.read, counts.left_out, counts.written, counts.unmatched) == (6, 1, 5, 0)
    for split, left in (("train", ["s0", "s2"]), ("test", ["s0", "s1", "s2"])):
        source = open_samples(tmp_path / "out" / split / name)
        assert [source[k]["id"] for k in range(len(source))] == left
    # The files would be written over those that are read.
    with pytest.raises(ClocError, match="the output is the data set itself"):
        filter_data(pattern, tmp_path / "list", tmp_path / "set", progress=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1', "line 2 cannot be read"),
        ('{"name": "a"}', "line 2 cannot be read"),
        ('{"id": null}', "names no sample"),
    ],
)
def test_a_broken_list_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "list").write_text(f"s0\n{line}\n")
    with pytest.raises(ClocError, match=message):
        read_exclusions(tmp_path / "list")
    with pytest.raises(ClocError, match="cannot read the list"):
        read_exclusions(tmp_path / "none")


def test_a_filter_stops_at_what_it_cannot_write(tmp_path: Path) -> None:
    samples = region_samples(tmp_path / "set", 3)
    (tmp_path / "list").write_text("s0\n")
    path = tmp_path / "set" / "regions.jsonl"
    for sample, out, message, options in (
        ({**samples[1], "caption": ""}, "a", r"s1 \(line 2\)': empty text", {}),
        (
            {**samples[1], "image": "none.png"},
            "b",
            r"s1 \(line 2\)': the picture .*none.png' does not exist",
            {"copy_images": True},
        ),
        ({**samples[1], "image": "none.png"}, "c", "does not exist", {"file_format": "parquet"}),
        (samples[1], "d", "unknown format", {"file_format": "zip"}),
        (samples[1], "set", "the output is the data set itself", {}),
    ):
        write_lines(path, [samples[0], sample])
        with pytest.raises(ClocError, match=message):
            filter_data(path.parent, tmp_path / "list", tmp_path / out, progress=False, **options)
        assert not list((tmp_path / out).rglob("regions.jsonl")) or out == "set"
    write_lines(path, [samples[0], {**samples[1], "caption": ""}])
    (tmp_path / "list").write_text("s0\ns1\n")
    assert filter_data(path.parent, tmp_path / "list", tmp_path / "e", progress=False).left_out == 2


def test_a_list_that_cannot_be_written(train: Path, evaluation: Path, tmp_path: Path) -> None:
    report = find_leaks(train, [evaluation], QUIET)
    with pytest.raises(ClocError, match="cannot write the list"):
        write_exclude(report, train / "regions.jsonl" / "list")
