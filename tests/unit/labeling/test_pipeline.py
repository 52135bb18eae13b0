"""The pipeline: what it writes is what its stages say, however it is stopped, shared out or taken up again."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cloc_mllm.data.dataset import RegionTextDataset, open_image
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.writers import open_writer
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling import pipeline as pipeline_module
from cloc_mllm.labeling.config import LabelConfig
from cloc_mllm.labeling.files import STATE, Locks
from cloc_mllm.labeling.filtering import FilterOptions, filter_detections
from cloc_mllm.labeling.pipeline import label
from cloc_mllm.labeling.sources import SourceReader, plan_source
from tests.builders_labels import (
    SmallCaptioner,
    SmallDetector,
    SmallPhrases,
    labelled,
    output_bytes,
    small_config,
    write_pictures,
)

COUNT = 18
FORMATS = ("parquet", "webdataset", "jsonl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set labelled without any interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    label(small_config(pictures, out), progress=False)
    return out


def label_quietly(config: LabelConfig, part: tuple[int, int] | None = None) -> dict[str, Any] | None:
    return label(config, part, progress=False)


# -- what it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
def test_labels_are_what_the_stages_say_of_each_picture(file_format: str, pictures: Path, tmp_path: Path) -> None:
    result = label_quietly(small_config(pictures, tmp_path / "out", f"format={file_format}", "filter.score=0.4"))
    caption, extract, detect = SmallCaptioner("", {}), SmallPhrases("", {}), SmallDetector("", {})
    expected, dropped = {}, Counter[str]()
    for file in sorted(path for path in pictures.rglob("*") if path.is_file()):
        image = open_image(file, None, None, "")
        captions = caption([image], [{}])[0]
        found = detect([image], extract([captions]))[0]
        kept, reasons = filter_detections(found, image.size, FilterOptions(score=0.4))
        dropped += reasons
        expected[file.relative_to(pictures).as_posix()] = (captions, image, kept)
    samples = labelled(tmp_path / "out")
    assert [sample["id"] for sample in samples] == sorted(expected)
    source = open_samples(tmp_path / "out")
    for k, sample in enumerate(samples):
        captions, image, kept = expected[sample["id"]]
        assert (sample["caption"], sample["captions"]) == (captions[0], captions)
        assert (sample["width"], sample["height"]) == image.size
        assert open_image(sample["image"], source.folder(k), None, "").tobytes() == image.tobytes()
        assert [(region["text"], region["score"]) for region in sample["regions"]] == [
            (found.text, pytest.approx(found.score, abs=5e-5)) for found in kept
        ]
        for region, found in zip(sample["regions"], kept, strict=True):
            assert region["box"] == pytest.approx(found.box, abs=5e-3)
    assert result is not None
    assert result["detections_dropped"] == dict(dropped)
    counts = result["counts"]
    assert counts["samples_read"] == counts["samples_written"] == COUNT
    assert counts["regions_written"] == sum(len(kept) for _, _, kept in expected.values())
    assert counts["detections"] == counts["regions_written"] + dropped.total()
    # What the detector could not read of its phrases stands in the report, over all shards.
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["detector_phrases"] == {name: number for name, number in detect.tally.items() if number}
    assert "Phrases as the detector read them" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("file_format", FORMATS)
def test_labels_can_be_trained_on_and_have_no_fault(file_format: str, pictures: Path, tmp_path: Path) -> None:
    label_quietly(small_config(pictures, tmp_path / "out", f"format={file_format}"))
    data = RegionTextDataset(tmp_path / "out")
    assert len(data) == COUNT
    assert sum(len(data[k]["regions"]) for k in range(COUNT)) > COUNT
    report = check_data(tmp_path / "out", progress=False)
    assert (report.samples, report.faults) == (COUNT, [])


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_pictures_make_the_same_bytes(file_format: str, pictures: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    label_quietly(small_config(pictures, first, f"format={file_format}"))
    time.sleep(1.1)  # archives and the like keep time in whole seconds
    batches = [f"{stage}.batch_size=1" for stage in ("captioner", "phrases", "detector")]
    label_quietly(small_config(pictures, second, f"format={file_format}", *batches))
    assert output_bytes(first) == output_bytes(second)


def test_a_shard_holds_its_range_of_the_source(whole: Path) -> None:
    files = sorted(whole.glob("regions-*.parquet"))
    ids = [[sample["id"] for sample in labelled(file)] for file in files]
    assert [len(part) for part in ids] == [4, 4, 4, 4, 2]
    joined = [name for part in ids for name in part]
    assert joined == sorted(joined)


def test_shards_larger_than_the_writers_own(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples a writer would put into one: a shard of ours is one file."""
    monkeypatch.setattr("cloc_mllm.data.writers._SHARD", 4)
    label_quietly(small_config(pictures, tmp_path / "out", "shard=100", "format=webdataset"))
    assert [file.name for file in sorted((tmp_path / "out").glob("*.tar"))] == ["regions-00000.tar"]


def test_regions_of_the_source_are_ignored_or_kept_first(tmp_path: Path, pictures: Path) -> None:
    old = {"box": [1, 2, 9, 8], "text": "an old region", "attributes": {"by": "hand"}}
    with open_writer(tmp_path / "source", "parquet") as writer:
        for number, file in enumerate(sorted(pictures.glob("a/*"))[:6]):
            regions = [old] * (number % 2)
            writer.write({"id": str(number), "image": file, "caption": "a dog and a cat", "regions": regions})
    label_quietly(small_config(tmp_path / "source", tmp_path / "ignored"))
    label_quietly(small_config(tmp_path / "source", tmp_path / "kept", "regions=keep"))
    pairs = zip(labelled(tmp_path / "ignored"), labelled(tmp_path / "kept"), strict=True)
    for number, (bare, both) in enumerate(pairs):
        assert bare["captions"] == ["a dog and a cat"]
        assert both["regions"] == [old] * (number % 2) + bare["regions"]
        assert {region["text"] for region in bare["regions"]} <= {"dog", "cat"}
    counts = json.loads((tmp_path / "kept" / "dataset.json").read_text())["counts"]
    assert counts["regions_of_the_source"] == 3


def test_regions_that_are_kept_have_to_be_sound(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "source").mkdir()
    picture = next(iter(sorted(pictures.glob("a/*"))))
    sample = {"image": str(picture), "caption": "a", "regions": [{"box": [0, 0, 900, 9], "text": "wide"}]}
    (tmp_path / "source" / "regions.jsonl").write_text(json.dumps(sample))
    label_quietly(small_config(tmp_path / "source", tmp_path / "ignored"))
    with pytest.raises(ClocError, match="outside the image"):
        label_quietly(small_config(tmp_path / "source", tmp_path / "kept", "regions=keep"))


# -- what has been done is not done again -----------------------------------------------------------------------------


def called(log: Path) -> Counter[str]:
    """Pictures by stage since the last time."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    log.unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    for line in lines:
        kind, count = line.split()
        counts[kind] += int(count)
    return counts


def test_each_stage_is_asked_again_only_for_what_depends_on_the_change(pictures: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    config = small_config(pictures, out, log=log)
    label_quietly(config)
    first = called(log)
    assert first["captioner"] == first["phrases"] == COUNT
    assert 0 < first["detector"] <= COUNT
    before = output_bytes(out)
    label_quietly(config)
    assert not called(log)
    assert output_bytes(out) == before

    other = small_config(pictures, out, "detector.options.seed=1", log=log)
    with pytest.raises(ClocError, match="finished set of other options"):
        label_quietly(other)
    assert output_bytes(out) == before
    label_quietly(other.model_copy(update={"overwrite": True}))
    assert set(called(log)) == {"detector"}
    assert output_bytes(out) != before
    label_quietly(small_config(pictures, out, "filter.score=0.5", "overwrite=true", log=log))
    assert not called(log), "the answers of the first detector are still there"
    label_quietly(small_config(pictures, out, "phrases.options.seed=1", "overwrite=true", log=log))
    assert set(called(log)) == {"phrases", "detector"}
    label_quietly(small_config(pictures, out, "overwrite=true", log=log))
    assert not called(log)
    assert output_bytes(out) == before


def test_another_format_leaves_nothing_of_the_old_one(pictures: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    label_quietly(small_config(pictures, out, "format=webdataset", "shard=2"))
    label_quietly(small_config(pictures, out, "overwrite=true"))
    assert output_bytes(out) == output_bytes(whole)


def test_answers_that_are_damaged_are_asked_for_again(pictures: Path, tmp_path: Path, whole: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    label_quietly(small_config(pictures, out, log=log))
    called(log)
    detections = sorted(out.glob(f"{STATE}/detections-*/*.jsonl"))
    detections[0].write_bytes(detections[0].read_bytes()[:-20])
    detections[1].write_text("")
    detections[2].unlink()
    (out / "regions-00001.parquet").write_bytes(b"cut")
    label_quietly(small_config(pictures, out, log=log))
    assert 0 < called(log)["detector"] <= 12
    assert {k: v for k, v in output_bytes(out).items() if k != "dataset.json"} == {
        k: v for k, v in output_bytes(whole).items() if k != "dataset.json"
    }


# -- samples that cannot be labelled ----------------------------------------------------------------------------------


@pytest.fixture
def spoilt(pictures: Path, tmp_path: Path) -> Path:
    """The pictures, four of them spoilt."""
    folder = shutil.copytree(pictures, tmp_path / "spoilt")
    (folder / "a" / "0001.jpg").write_bytes(b"<!DOCTYPE html><title>not found</title>")
    (folder / "a" / "0002.webp").write_bytes(b"")
    cut = folder / "b" / "0003.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / "b" / "0006.png").unlink()
    (folder / "b" / "0006.png").symlink_to(folder / "b" / "nowhere.png")
    return folder


def test_a_bad_sample_stops_by_name(pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "spoilt")
    (folder / "a" / "0007.jpg").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ClocError, match="skip leaves such samples out") as caught:
        label_quietly(small_config(folder, tmp_path / "out"))
    assert caught.value.file == str(folder / "a" / "0007.jpg")
    assert caught.value.sample == "a/0007.jpg"
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("file_format", FORMATS)
def test_read_is_written_plus_skipped(file_format: str, spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "b" / "0006.png").unlink()
    out = tmp_path / "out"
    result = label_quietly(small_config(spoilt, out, f"format={file_format}", "on_bad_sample=skip", "shard=1"))
    assert result is not None
    counts = result["counts"]
    read, written, skipped = (counts[f"samples_{name}"] for name in ("read", "written", "skipped"))
    assert (read, written, skipped) == (COUNT - 1, COUNT - 4, 3)
    listed = (out / "skipped.txt").read_text().splitlines()
    assert len(listed) == 3
    for name, line in zip(("a/0001.jpg", "a/0002.webp", "b/0003.png"), listed, strict=True):
        assert name in line
    assert check_data(out, progress=False).samples == written


def test_a_link_to_nowhere_is_a_bad_sample(spoilt: Path, tmp_path: Path) -> None:
    result = label_quietly(small_config(spoilt, tmp_path / "out", "on_bad_sample=skip"))
    assert result is not None
    assert result["counts"]["samples_skipped"] == 4
    assert "0006.png" in (tmp_path / "out" / "skipped.txt").read_text()


def test_what_was_skipped_is_an_error_for_those_who_ask_for_one(spoilt: Path, tmp_path: Path) -> None:
    label_quietly(small_config(spoilt, tmp_path / "out", "on_bad_sample=skip"))
    with pytest.raises(ClocError, match="0001"):
        label_quietly(small_config(spoilt, tmp_path / "out"))


def test_a_set_of_which_nothing_can_be_labelled_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ClocError, match="no sample could be labelled"):
        label_quietly(small_config(tmp_path / "source", tmp_path / "out", "on_bad_sample=skip"))


def test_texts_of_any_script_go_through(pictures: Path, tmp_path: Path) -> None:
    texts = [
        "a dog\x00\x1b[31m and\r\na cat",
        "नमस्ते cat",
        "שלום \u202edog",
        "\ud83d dog",
        "<script>alert(1)</script> dog | cat",
    ]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, (text, file) in enumerate(zip(texts, sorted(pictures.glob("a/*.jpg")), strict=False)):
            (tmp_path / "member").write_text(json.dumps({"caption": text}))
            archive.add(file, f"{number}.jpg")
            archive.add(tmp_path / "member", f"{number}.json")
    for file_format in ("parquet", "webdataset"):
        label_quietly(small_config(tmp_path / "0.tar", tmp_path / file_format, f"format={file_format}"))
        captions = [sample["caption"] for sample in labelled(tmp_path / file_format)]
        assert captions == ["a dog [31m and a cat", texts[1], texts[2], "\ufffd dog", texts[4]]
        page = (tmp_path / file_format / "report.html").read_text()
        assert "<script" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_stage_that_gives_too_few_answers_is_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallPhrases, "__call__", lambda self, captions: [["cat"]])
    with pytest.raises(ClocError, match="gave 1 answers on 3 pictures"):
        label_quietly(small_config(pictures, tmp_path / "out"))


def test_pictures_in_shards_cannot_be_named_by_lines(pictures: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(ClocError, match="JSON lines name pictures"):
        label_quietly(small_config(whole, tmp_path / "out", "format=jsonl"))


# -- several processes, and processes that are killed -----------------------------------------------------------------


def in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Start work in a fork of this process."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def test_killed_at_any_moment_it_ends_in_the_same_bytes(pictures: Path, tmp_path: Path, whole: Path) -> None:
    """Each launch is shot after a random time; the stages take some, so that most moments can be hit."""
    rng, out = random.Random(0), tmp_path / "out"
    slow = [f"{stage}.options.sleep=0.02" for stage in ("captioner", "phrases", "detector")]
    config = small_config(pictures, out, *slow)
    kills = 0
    for _ in range(8):
        process = in_a_process(label_quietly, config)
        process.join(rng.uniform(0.02, 0.35))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 4, "too few launches were at work when they were shot"
    assert label_quietly(config) is not None
    produced, expected = output_bytes(out), output_bytes(whole)
    for files in (produced, expected):
        files.pop("dataset.json")  # it repeats the options, and these stages were told to be slow
    assert produced == expected
    assert not [*out.rglob("*.part"), *out.glob(f"{STATE}/piece-*")]


def test_parts_in_any_order_make_the_whole(pictures: Path, tmp_path: Path, whole: Path) -> None:
    config = small_config(pictures, tmp_path / "out")
    assert label_quietly(config, (2, 3)) is None
    with pytest.raises(ClocError, match="shard 0 of 5 is not done"):
        label(config, finish_only=True, progress=False)
    assert label_quietly(config, (0, 3)) is None
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert label_quietly(config, (1, 3)) is not None
    assert output_bytes(tmp_path / "out") == output_bytes(whole)


def test_parts_at_once_make_the_whole_and_one_of_them_finishes(pictures: Path, tmp_path: Path, whole: Path) -> None:
    config = small_config(pictures, tmp_path / "out")
    processes = [in_a_process(label_quietly, config, (k, 4)) for k in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert output_bytes(tmp_path / "out") == output_bytes(whole)


def test_more_parts_than_shards(pictures: Path, tmp_path: Path, whole: Path) -> None:
    config = small_config(pictures, tmp_path / "out", "shard=9")
    results = [label_quietly(config, (k, 5)) for k in range(5)]
    assert results[0] is None
    assert results[-1] is not None
    assert results[-1]["counts"] == json.loads((whole / "dataset.json").read_text())["counts"]


def test_two_runs_at_once_are_refused(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = Locks(out / STATE)
    others.require("run")
    with pytest.raises(ClocError, match="another process is labelling"):
        label_quietly(small_config(pictures, out))
    others.release()
    label_quietly(small_config(pictures, out), (1, 2))
    others.require("run", shared=True)  # a part is at work
    with pytest.raises(ClocError, match="another process is labelling"):
        label_quietly(small_config(pictures, out))
    others.require("part-0-of-2")
    with pytest.raises(ClocError, match="another process is labelling"):
        label_quietly(small_config(pictures, out), (0, 2))
    others.release()
    label_quietly(small_config(pictures, out))


def test_a_part_with_other_options_is_refused_while_parts_work(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    label_quietly(small_config(pictures, out), (0, 2))
    others = Locks(out / STATE)
    others.require("run", shared=True)
    with pytest.raises(ClocError, match="made with other options"):
        label_quietly(small_config(pictures, out, "filter.score=0.3"), (1, 2))
    with pytest.raises(ClocError, match="another process"):
        label(small_config(pictures, out, "filter.score=0.3"), finish_only=True, progress=False)
    others.release()
    with pytest.raises(ClocError, match="made with other options"):
        label(small_config(pictures, out, "filter.score=0.3"), finish_only=True, progress=False)


def test_a_refused_part_leaves_the_pictures_of_those_at_work(pictures: Path, tmp_path: Path) -> None:
    """Another source with as many pictures: were their list replaced, the parts at work would label the wrong ones."""
    out, other = tmp_path / "out", write_pictures(tmp_path / "other", COUNT)
    label_quietly(small_config(pictures, out), (0, 2))
    plan = plan_source(str(pictures), out / STATE)  # as those at work have it
    others = Locks(out / STATE)
    others.require("run", shared=True)
    with pytest.raises(ClocError, match="made with other options or of another source"):
        label_quietly(small_config(other, out), (1, 2))
    others.release()
    read = [raw.checked()["image"] for raw in SourceReader(plan).read(0, COUNT)]
    assert sorted(read) == sorted(str(path) for path in pictures.rglob("*") if path.is_file())
    label_quietly(small_config(other, out))
    assert len([*(out / STATE).glob("pictures*")]) == 1, "the list of the set that was replaced is gone"


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_shard_that_no_marker_tells_of_goes_with_its_options(
    file_format: str, pictures: Path, tmp_path: Path
) -> None:
    """As a run leaves it that is killed between a shard and its marker, before other options make fewer shards."""
    out = tmp_path / "out"
    label_quietly(small_config(pictures, out, "shard=2", f"format={file_format}"), (0, 2))
    (out / STATE / "done" / "00008.json").unlink()
    label_quietly(small_config(pictures, out, f"format={file_format}"))
    ids = [sample["id"] for sample in labelled(out)]
    assert len(ids) == len(set(ids)) == COUNT
    assert not [path for path in [*out.iterdir(), *(out / STATE).glob("lines/*")] if "00008" in path.name]


def test_a_shard_of_nobody_is_not_certified(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    label_quietly(small_config(pictures, out))
    shutil.copy(out / "regions-00000.parquet", out / "regions-00009.parquet")
    with pytest.raises(ClocError, match=r"regions-00009\.parquet: is a shard that this labelling has not written"):
        label_quietly(small_config(pictures, out))


def test_a_set_that_lacks_a_file_is_not_certified(pictures: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    config = small_config(pictures, out)
    label_quietly(config, (0, 2))
    (out / "regions-00002.parquet").unlink()
    assert label_quietly(config, (1, 2)) is None, "shard 2 is not there, so this is not the last part"
    with pytest.raises(ClocError, match="shard 2 of 5 is not done, or its files are not there"):
        label(config, finish_only=True, progress=False)
    assert not (out / "dataset.json").exists()
    assert label_quietly(config, (0, 2)) is not None
    assert output_bytes(out) == output_bytes(whole)


def test_parts_of_different_stages_do_not_make_a_set(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was exchanged between two parts has the same name."""
    config = small_config(pictures, tmp_path / "out")
    label_quietly(config, (0, 2))
    monkeypatch.setattr(SmallDetector, "identity", lambda self: {"name": "detector", "weights": "others"})
    with pytest.raises(ClocError, match="made by other stages"):
        label_quietly(config, (1, 2))
    assert label_quietly(config) is not None, "the whole can be made one again"


def test_folders_that_hold_something_else(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "regions-00000.parquet").write_bytes(b"of somebody else")
    with pytest.raises(ClocError, match=r"holds regions-00000\.parquet already"):
        label_quietly(small_config(pictures, out))
    with pytest.raises(ClocError, match="one folder"):
        label_quietly(small_config(pictures, pictures))


def test_pictures_are_decoded_only_by_those_who_look(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With captions there already: once to see that each can be read, once for the detector."""
    with open_writer(tmp_path / "source", "parquet") as writer:
        for number, file in enumerate(sorted(pictures.glob("a/*"))[:6]):
            caption = "a cat" if number % 2 else "nothing of note"
            writer.write({"id": str(number), "image": file, "caption": caption, "regions": []})
    decoded = []
    load = Image.Image.load

    def counted(image: Image.Image) -> Any:
        decoded.append(image.size) if getattr(image, "fp", None) else None
        return load(image)

    monkeypatch.setattr(Image.Image, "load", counted)
    monkeypatch.setattr(pipeline_module, "write_reports", lambda *arguments: None)  # it shows some of them
    opened = []
    monkeypatch.setattr(
        "cloc_mllm.labeling.sources.open_image", lambda *words: opened.append(words[-1]) or open_image(*words)
    )
    label_quietly(small_config(tmp_path / "source", tmp_path / "out"))
    assert Counter(name.split()[0] for name in opened) == {str(n): 1 + n % 2 for n in range(6)}


def test_threads_of_the_caller_are_left_as_they_were(pictures: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        label_quietly(small_config(pictures, tmp_path / "out"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
