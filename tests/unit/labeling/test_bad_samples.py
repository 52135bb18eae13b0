"""Samples that a stage or a writer fails on: left out alone and by name, unless it fails whatever the sample."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.config import LabelConfig
from cloc_mllm.labeling.detectors.common import process_images
from cloc_mllm.labeling.pipeline import label
from cloc_mllm.labeling.stages import Detection, StageError
from tests.builders import noise_image
from tests.builders_detectors import save_tiny_grounding_dino
from tests.builders_labels import (
    WORDS,
    SmallCaptioner,
    SmallDetector,
    SmallPhrases,
    labelled,
    small_config,
    write_pictures,
)
from tests.chat_server import chat_server, failed, said

COUNT = 18
FORMATS = ("parquet", "webdataset", "jsonl")
SKIP = "on_bad_sample=skip"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


def counts_of(config: LabelConfig) -> dict[str, int]:
    result = label(config, progress=False)
    assert result is not None
    counts: dict[str, int] = result["counts"]
    return counts


def write_lines(folder: Path, pictures: Path, *facts: dict[str, Any]) -> Path:
    """A source in which each sample has some facts of its own."""
    folder.mkdir()
    files = sorted(pictures.glob("a/*"))
    lines = [{"id": f"s{k}", "image": str(files[k]), "caption": "a cat", **own} for k, own in enumerate(facts)]
    (folder / "regions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


class Moody:
    """Makes a stage fail on pictures of certain widths, or on captions with a word, after it has counted."""

    def __init__(self, stage: type, monkeypatch: pytest.MonkeyPatch, error: Exception, *bad: Any) -> None:
        work = stage.__call__

        def answer(this: Any, *arguments: Sequence[Any]) -> Any:
            found = work(this, *arguments)
            seen = [getattr(one, "width", str(one)) for one in arguments[0]]
            if any(mark == one or (isinstance(mark, str) and mark in one) for one in seen for mark in bad):
                raise error
            return found

        monkeypatch.setattr(stage, "__call__", answer)


@pytest.mark.parametrize("error", [ValueError("too\nnarrow"), ClocError("too narrow")], ids=["ValueError", "ClocError"])
@pytest.mark.parametrize("stage", [SmallCaptioner, SmallDetector])
def test_only_the_samples_that_a_stage_fails_on_are_left_out(
    stage: type, error: Exception, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = counts_of(small_config(pictures, tmp_path / "whole"))
    samples = {sample["id"]: sample for sample in labelled(tmp_path / "whole")}
    wordless = {name for name, one in samples.items() if one["caption"] == "a picture of nothing"}
    asked = samples.keys() - (wordless if stage is SmallDetector else set())
    bad = {name for name in asked if samples[name]["width"] == 25}
    assert 0 < len(bad) < len(asked) - 2
    Moody(stage, monkeypatch, error, 25)
    counts = counts_of(small_config(pictures, tmp_path / "out", SKIP))
    assert (counts["samples_skipped"], counts["samples_written"]) == (len(bad), whole["samples_written"] - len(bad))
    assert {one["id"]: one for one in labelled(tmp_path / "out")}.keys() == samples.keys() - bad
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(listed) == len(bad)
    for name, line in zip(sorted(bad), listed, strict=True):
        assert line.startswith(f"{pictures / name}: sample '{name}': 'tests.builders_labels:")
        assert "fails on it: too narrow" in line
    # What a call that failed has counted does not count.
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    given = sum(word in one["caption"] for n, one in samples.items() if n not in bad for word in WORDS)
    assert report["detector_phrases"]["given"] == given


def test_a_caption_that_the_extractor_fails_on(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "source", pictures, *({"caption": f"number {k}"} for k in range(6)))
    Moody(SmallPhrases, monkeypatch, ValueError("too long"), "number 4")
    assert counts_of(small_config(source, tmp_path / "out", SKIP))["samples_skipped"] == 1
    assert "sample 's4" in (tmp_path / "out" / "skipped.txt").read_text()


def test_an_error_of_a_stage_names_the_sample_and_is_not_kept(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the same command goes on when the stage is mended."""
    config = small_config(pictures, tmp_path / "out")
    with monkeypatch.context() as patch:
        Moody(SmallCaptioner, patch, ValueError("too narrow"), 25)
        with pytest.raises(ClocError, match=r"fails on it: too narrow.*skip leaves such samples out") as caught:
            label(config, progress=False)
        assert caught.value.sample == "a/0001.jpg"
        assert caught.value.file == str(pictures / "a" / "0001.jpg")
    assert counts_of(config)["samples_written"] == COUNT


def test_a_stage_that_fails_on_everything_stops_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloc_mllm.labeling.steps._HOPELESS", 6)
    with monkeypatch.context() as patch:
        Moody(SmallCaptioner, patch, ValueError("not today"), *range(100))
        with pytest.raises(StageError, match="It has answered on none of 6 samples"):
            label(small_config(pictures, tmp_path / "out", SKIP, "shard=18"), progress=False)
    assert counts_of(small_config(pictures, tmp_path / "out", SKIP, "shard=18"))["samples_skipped"] == 0


def test_a_picture_that_an_endpoint_refuses_is_left_out_and_a_dead_endpoint_stops(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "source", 6)
    endpoint = {"captioner.options.retries=1", "captioner.options.backoff=0.01", "captioner.options.concurrency=1"}

    def config(address: str) -> LabelConfig:
        stage = f"captioner.stage=openai:{address}#tiny"
        return small_config(folder, tmp_path / "out", SKIP, stage, "captioner.options={}", *sorted(endpoint))

    for reply in (failed(401), failed(404), failed(503), (500, "", {})):
        with (
            chat_server(lambda body, number, reply=reply: reply) as server,
            pytest.raises(StageError, match="the endpoint answered"),
        ):
            label(config(server.address), progress=False)
        assert len(server.bodies) <= 3, "it was asked about further samples"
    with pytest.raises(StageError, match="cannot be reached"):
        label(config(server.address), progress=False)
    first: list[str] = []

    def choosy(body: dict[str, Any], number: int) -> Any:
        uri = body["messages"][0]["content"][0]["image_url"]["url"]
        first.append(uri)
        return failed(400, "no such picture") if uri == first[0] else said("a cat")

    with chat_server(choosy) as server:
        assert counts_of(config(server.address))["samples_skipped"] == 1
    assert "answered 400: no such picture" in (tmp_path / "out" / "skipped.txt").read_text()


def test_a_strip_that_the_processor_of_grounding_dino_refuses(tmp_path: Path) -> None:
    save_tiny_grounding_dino(tmp_path / "model")
    (tmp_path / "source").mkdir()
    for name, size in (("0", (40, 30)), ("1", (2000, 1)), ("2", (40, 30))):
        noise_image(*size, seed=int(name)).save(tmp_path / "source" / f"{name}.png")
    lines = [{"image": f"{k}.png", "caption": "a cat"} for k in range(3)]
    (tmp_path / "source" / "regions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stage = f"detector.stage=grounding-dino:{tmp_path / 'model'}"
    counts = counts_of(small_config(tmp_path / "source", tmp_path / "out", SKIP, stage, "detector.options={}"))
    assert (counts["samples_written"], counts["samples_skipped"]) == (2, 1)
    assert "sample 'line 2'" in (tmp_path / "out" / "skipped.txt").read_text()


def test_a_box_that_is_no_number(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = SmallDetector.find

    def overflow(self: SmallDetector, image: Image.Image, phrases: Sequence[str]) -> list[Detection]:
        found = find(self, image, phrases)
        return [Detection(one.box, one.text, math.nan if image.width == 25 else one.score) for one in found]

    monkeypatch.setattr(SmallDetector, "find", overflow)
    with pytest.raises(ClocError, match="not finite") as caught:
        label(small_config(pictures, tmp_path / "error"), progress=False)
    assert caught.value.file
    assert caught.value.sample
    assert 0 < counts_of(small_config(pictures, tmp_path / "out", SKIP))["samples_skipped"] < 6


@pytest.mark.parametrize("file_format", FORMATS)
def test_half_a_surrogate_pair_in_what_is_copied(file_format: str, pictures: Path, tmp_path: Path) -> None:
    region = {"box": [1, 1, 9, 9], "text": "x", "attributes": {"by": "\ud800"}}
    facts = ({"source": "x\ud800\x00y"}, {}, {"regions": [region]})
    source = write_lines(tmp_path / "source", pictures, *facts)
    config = small_config(source, tmp_path / "out", f"format={file_format}", "regions=keep", SKIP)
    assert counts_of(config)["samples_skipped"] == 1
    assert [sample.get("source") for sample in labelled(tmp_path / "out")] == ["x\ufffd y", None]
    assert "half a surrogate pair" in (tmp_path / "out" / "skipped.txt").read_text()


def test_a_picture_that_the_writer_refuses(pictures: Path, tmp_path: Path) -> None:
    """A kind that Pillow reads and shards do not hold: every step before the last one is content with it."""
    buffer = io.BytesIO()
    noise_image(seed=3).save(buffer, "PPM")
    contents = [file.read_bytes() for file in sorted(pictures.glob("a/*"))[:5]]
    contents[2] = buffer.getvalue()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    out, asked = tmp_path / "out", ("format=webdataset", "shard=5")
    with pytest.raises(ClocError, match="shards do not hold ppm images") as caught:
        label(small_config(tmp_path / "0.tar", out, *asked), progress=False)
    assert (caught.value.file, caught.value.sample is not None) == (str(tmp_path / "0.tar"), True)
    assert counts_of(small_config(tmp_path / "0.tar", out, *asked, SKIP))["samples_skipped"] == 1
    assert [sample["id"] for sample in labelled(out)] == ["0", "1", "3", "4"]
    with pytest.raises(ClocError, match="shards do not hold ppm images"):
        label(small_config(tmp_path / "0.tar", out, *asked), progress=False)


def test_a_package_that_is_missing_is_no_samples_fault() -> None:
    def processor(**options: Any) -> None:
        raise ImportError("torchvision")

    with pytest.raises(StageError, match="needs more packages: torchvision"):
        process_images(processor, [noise_image()])
