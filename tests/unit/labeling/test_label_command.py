"""`cloc-mllm label`: its options, its presets, and the report that it writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.labeling.config import load_label_config
from cloc_mllm.labeling.pipeline import label
from tests.builders_labels import labelled, output_bytes, small_config, write_pictures

COUNT = 18


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    label(small_config(pictures, out), progress=False)
    return out


def words(source: Path, out: Path, *more: str) -> list[str]:
    stages = [w for n in ("captioner", "phrases", "detector") for w in (f"--{n}", f"tests.builders_labels:{n}")]
    return ["label", str(source), "--out", str(out), "--workers", "0", "--shard", "4", *stages, *more]


def test_the_command_writes_what_the_function_does(
    pictures: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(pictures, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "samples written                      18" in printed
    assert output_bytes(tmp_path / "out") == output_bytes(whole)
    assert main(words(pictures, tmp_path / "part", "--shards", "0/2")) == 0
    assert "others are not yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--shards", "2/2"], "--shards is '2/2'"),
        (["--shards", "0/2", "--finish"], "--finish is of all shards"),
        (["filter.scor=1"], "did you mean 'score'"),
        (["filter.score=2"], "filter.score is 2"),
        (["detctor.stage=x"], "did you mean 'detector'"),
        (["shard=0"], "'shard' is 0"),
        (["devices=[]"], "name at least one device"),
        (["shard"], "cannot read the override"),
        (["--detector", "owl"], "there is no 'owl' here"),
        (["--detector", "no.such.module"], "there is no module 'no.such.module'"),
        (["--detector", "tests.builders"], "has no build"),
        (["--config", "absent.yaml"], "cannot be read as YAML"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    more: list[str], complaint: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(pictures, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert len(printed.strip().splitlines()) == 1


def test_the_report_adds_up(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    counts, statistics = report["counts"], report["statistics"]
    samples = labelled(whole)
    regions = [region for sample in samples for region in sample["regions"]]
    histograms = statistics["histograms"]
    assert sum(histograms["regions an image"].values()) == len(samples) == counts["samples_written"]
    for name in ("words a region", "score", "share of the image"):
        assert sum(histograms[name].values()) == len(regions) == counts["regions_written"]
    assert histograms["regions an image"]["2"] == sum(len(sample["regions"]) == 2 for sample in samples)
    assert histograms["words a region"]["2"] == sum(len(region["text"].split()) == 2 for region in regions)
    assert histograms["score"]["0.5-0.6"] == sum(0.5 <= region["score"] < 0.6 for region in regions)
    assert statistics["means"]["regions an image"] == pytest.approx(len(regions) / len(samples), abs=1e-4)
    assert statistics["top_phrases"] == dict(
        sorted(Counter(region["text"] for region in regions).items(), key=lambda item: (-item[1], item[0]))
    )
    assert list(report["throughput"]) == ["source", "captions", "phrases", "detections", "shards"]
    assert sum(step["share"] for step in report["throughput"].values()) == pytest.approx(1, abs=1e-3)
    assert all(step["samples"] == COUNT for step in report["throughput"].values())


def test_the_page_is_whole_in_itself(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 12  # three each of four shards
    assert "http://" not in page
    assert "https://" not in page
    assert (whole / "report.md").read_text().startswith("# Labels of ")


def test_the_preset_is_the_papers_and_names_keys_that_exist() -> None:
    preset = Path(__file__).resolve().parents[3] / "scripts" / "labeling" / "vesl.yaml"
    config = load_label_config(preset, {"source": "photos", "out": "out"}, ["detector.options.x=1", "filter.nms=text"])
    assert config.detector.stage.startswith("owlv2:")
    assert config.detector.options == {"x": 1}
    assert (config.filter.score, config.filter.nms) == (0.1, "text")
    assert config.filter.one_phrase_per_box


def test_a_stage_may_be_written_short(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("source: a\nout: b\ncaptioner: hf:x/y\nphrases: {batch_size: 5}\n")
    config = load_label_config(tmp_path / "x.yaml", {"detector.stage": "cam:z"}, ["captioner.options.beams=4"])
    assert (config.captioner.stage, config.captioner.options) == ("hf:x/y", {"beams": 4})
    assert (config.phrases.stage, config.phrases.batch_size) == ("textblob", 5)
    assert config.detector.stage == "cam:z"


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("source: a\nout: b\nfilter: {score: 0.5}\nfilter: {nms: text}\n")
    with pytest.raises(ClocError, match="key 'filter' is given twice"):
        load_label_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("preset", "given", "overrides", "options"),
    [
        ("{stage: 'owlv2:m', options: {size: 960}}", "cam", [], {}),
        ("{stage: 'owlv2:m', options: {size: 960}}", "owlv2:n", [], {"size": 960}),
        ("{stage: 'owlv2:m', options: {size: 960}}", None, ["detector.stage=cam"], {}),
        (
            "{stage: 'owlv2:m', options: {size: 960}}",
            None,
            ["detector.options.floor=0.1", "detector.stage=cam"],
            {"floor": 0.1},
        ),
        ("{options: {size: 960}}", "cam", ["detector.options.floor=0.1"], {"floor": 0.1}),
        ("{options: {size: 960}}", "owlv2:n", [], {"size": 960}),
    ],
)
def test_options_of_a_preset_do_not_go_to_another_stage(
    preset: str, given: str | None, overrides: list[str], options: dict[str, float], tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text(f"source: a\nout: b\ndetector: {preset}\n")
    config = load_label_config(tmp_path / "x.yaml", {"detector.stage": given}, overrides)
    assert config.detector.options == options
