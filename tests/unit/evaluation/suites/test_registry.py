"""The suites as a person runs them: real tiny checkpoints and scenes, the command line, YAML, and every bad input."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.apps.cli import main
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.encoders.measure import EncoderSettings
from cloc_mllm.evaluation.encoders.region_data import load_region_split
from cloc_mllm.evaluation.encoders.vocabulary import read_vocabulary
from cloc_mllm.evaluation.reporting.scores import write_scores
from cloc_mllm.evaluation.scoring.metrics import Metric
from cloc_mllm.evaluation.suites.detection import DetectionSettings
from cloc_mllm.evaluation.suites.grounding import GroundingSettings
from cloc_mllm.evaluation.suites.options import (
    EvalOptions,
    model_type,
    options_from_yaml,
    settings_from_words,
    settings_of,
)
from cloc_mllm.evaluation.suites.region import evaluate_regions
from cloc_mllm.evaluation.suites.registry import SUITES, run_suite
from tests.builders import noise_image, tiny_cloc
from tests.builders_mllm import tiny_mllm
from tests.unit.evaluation.oracles import TruthEncoder, TruthReadout

SUITE_FILES = sorted((Path(__file__).parents[4] / "eval" / "suites").glob("*.yaml"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders whose names say nothing, by what is in them."""
    root = tmp_path_factory.mktemp("checkpoints")
    parts = {"cloc": tiny_cloc(), "clip": tiny_cloc(kind=None), "mllm": tiny_mllm()}
    for name, (model, processor) in parts.items():
        model.save_pretrained(root / name[::-1])
        processor.save_pretrained(root / name[::-1])
    return {name: root / name[::-1] for name in parts}


@pytest.fixture(scope="module")
def region_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of COCO's form: several captions, class names as texts, one picture without regions."""
    folder = tmp_path_factory.mktemp("coco")
    classes = ["dog", "cat", "traffic light"]
    lines = []
    for k in range(6):
        noise_image(60, 40, k).save(folder / f"{k}.png")
        regions = [{"box": [j, 0, 30 + j, 20 + k], "text": classes[(k + j) % 3]} for j in range(k)]
        captions = [f"picture {k}", f"the one numbered {k}", "noise" if k < 2 else f"noise {k}"]
        sample = {"id": f"p{k}", "image": f"{k}.png", "caption": captions[0], "captions": captions, "regions": regions}
        lines.append(json.dumps(sample) + "\n")
    (folder / "regions.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("kind", ["cloc", "clip"])
def test_scenes_suite_measures_an_encoder(
    checkpoints: dict[str, Path], scenes_folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "scenes", "--model", str(checkpoints[kind]), "--data", str(scenes_folder), "--out", str(tmp_path)]
    assert main([*words, "--limit", "12", "--batch-size", "8"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dataset"] == {
        "name": "scenes quick (seed 3)",
        "split": "test subset (12 of 40 images, seed 0)",
        "n": 12,
        "of": 40,
        "unit": "images",
        "path": str(scenes_folder / "test" / "regions.jsonl"),
        "seed": 0,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html", "scores.npz"}
    assert ("grounding_acc50" in report["metrics"]) == (kind == "cloc")
    assert {"region_top1", "pointing_acc", "grounding_zeroshot_acc50"} <= set(report["metrics"])
    assert report["details"]["choices"]["made_on"] == ("nothing to choose" if kind == "cloc" else "validation")
    assert set(report["details"]["readouts"]) == ({"prompter", "roi"} if kind == "cloc" else {"crop", "roi", "value"})
    printed = capsys.readouterr().out
    assert "region_top1" in printed
    assert str(tmp_path / "report.md") in printed


def test_method_leaves_one_read_out(checkpoints: dict[str, Path], scenes_folder: Path, tmp_path: Path) -> None:
    options = EvalOptions(str(checkpoints["clip"]), str(scenes_folder), str(tmp_path), method="crop", limit=6)
    report = run_suite("scenes", options)
    assert set(report["details"]["readouts"]) == {"crop"}
    assert report["details"]["localizers"] == {}
    assert "pointing_acc" not in report["metrics"]


def test_scenes_suite_measures_an_mllm(checkpoints: dict[str, Path], scenes_folder: Path, tmp_path: Path) -> None:
    options = EvalOptions(
        str(checkpoints["mllm"]), str(scenes_folder), str(tmp_path), limit=3, max_new_tokens=4, batch_size=4
    )
    report = run_suite("scenes", options)
    assert {"vqa_acc", "referring_acc", "grounding_acc50"} <= set(report["metrics"])
    assert report["dataset"]["unit"] == "questions"
    assert report["details"]["grounding_mode"] == "head"
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 9


def test_region_suite_measures_any_region_text_data(
    checkpoints: dict[str, Path], region_data: Path, tmp_path: Path
) -> None:
    report = run_suite("region", EvalOptions(str(checkpoints["clip"]), str(region_data), str(tmp_path)))
    assert report["dataset"]["split"] == "all"
    assert report["details"]["choices"]["readout"] == "crop"
    assert report["metrics"]["region_macc"] == report["details"]["readouts"]["crop"]["region_macc"]
    assert report["metrics"]["region_macc"]["n"] == 15
    assert report["metrics"]["image_t2i_r1"]["n"] == 18
    assert report["details"]["baselines"]["region_macc"]["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_region_suite_gives_the_truth_100_and_its_opposite_0(region_data: Path, sign: float, expected: float) -> None:
    split = load_region_split(region_data)
    encoder = TruthEncoder([split], sign)
    vocabulary = read_vocabulary("occurring", region_data, [region.text for region in split.regions])
    metrics, _, _ = evaluate_regions(
        encoder, [TruthReadout(encoder)], split, EncoderSettings(progress=False, crop_limit=None), vocabulary
    )
    wanted = [name for name in metrics if not name.endswith(("_r5", "_r10", "_top5"))]
    assert {name: metrics[name].value for name in wanted} == dict.fromkeys(wanted, expected)
    assert {"region_macc", "region_top1", "region_r2t_r1", "region_t2r_r1", "image_i2t_r1"} <= set(wanted)
    # What items are paired by: the samples' own ids, not numbers that any other data have as well.
    items = metrics["region_top1"].items
    assert items is not None
    assert items.images == tuple(split.ids[region.image] for region in split.regions)
    assert items.keys == tuple(f"{image}/{row}" for row, image in enumerate(items.images))
    assert metrics["image_i2t_r1"].items is not None
    assert metrics["image_i2t_r1"].items.images == tuple(split.ids)


def test_the_same_seed_gives_the_same_numbers(
    checkpoints: dict[str, Path], scenes_folder: Path, tmp_path: Path
) -> None:
    def numbers(seed: int) -> object:
        options = EvalOptions(
            str(checkpoints["clip"]), str(scenes_folder), str(tmp_path), method="crop", limit=8, seed=seed
        )
        return run_suite("scenes", options)["metrics"]

    first = numbers(1)
    assert numbers(1) == first
    assert numbers(2) != first


def test_nothing_of_an_earlier_run_is_taken_for_this_ones(
    checkpoints: dict[str, Path], region_data: Path, tmp_path: Path
) -> None:
    run_suite("region", EvalOptions(str(checkpoints["cloc"]), str(region_data), str(tmp_path), method="crop"))
    (tmp_path / "judge.jsonl").write_text("{}\n")
    assert (tmp_path / "answers.jsonl").is_file()
    run_suite("image", EvalOptions(str(checkpoints["cloc"]), str(region_data), str(tmp_path)))
    assert not (tmp_path / "answers.jsonl").exists()
    assert (tmp_path / "judge.jsonl").is_file(), "Ferret-Bench goes on with it"
    assert write_scores({"points": Metric(0.5, (0.4, 0.6), 3)}, tmp_path) is None
    assert not (tmp_path / "scores.npz").exists()


# --- YAML and bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUITE_FILES, ids=lambda path: path.stem)
def test_shipped_suites_can_be_read(path: Path) -> None:
    name, options = options_from_yaml(path, ["model=m", "data=d", "out=o", "limit=5"])
    assert name in SUITES
    assert (options.model, options.data, options.out, options.limit) == ("m", "d", "o", 5)
    if name in ("region", "detection", "grounding"):
        assert options.split is None, "dataset.json says which split the data are"


def test_the_command_in_a_report_can_be_pasted(
    checkpoints: dict[str, Path], region_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SUITE_FILES[0].parents[1] / "run_suite.py"))
    file, out = tmp_path / "my suite.yaml", tmp_path / "it's here"
    file.write_text("suite: region\nsettings: {recognition: false}\n")
    words = [str(file), f"model={checkpoints['cloc']}", f"data={region_data}", f"out={out}", "limit=4"]
    assert script["main"](words) == 0
    assert "region_r2t_r1" in capsys.readouterr().out
    command = json.loads((out / "report.json").read_text())["command"]
    assert shlex.split(command) == ["python", "eval/run_suite.py", *words]


def test_suite_files_with_faults_are_named(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("suite: scenes\nmodl: x\n")
    with pytest.raises(ClocError, match=r"s\.yaml: unknown key 'modl'. Did you mean 'model'"):
        options_from_yaml(file)
    file.write_text("suite: scenes\n")
    with pytest.raises(ClocError, match="'model' is not given"):
        options_from_yaml(file)
    with pytest.raises(ClocError, match="not of the form key=value"):
        options_from_yaml(file, ["model"])
    file.write_text("[1, 2")
    with pytest.raises(ClocError, match="cannot read this suite"):
        options_from_yaml(file)
    with pytest.raises(ClocError, match="cannot read this suite"):
        options_from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("seed", [None, -1, 1.5, "1", True])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    """None is "another draw each time", and a negative one ends in NumPy's own words."""
    with pytest.raises(ClocError, match=r"seed is .*, not a whole number from 0"):
        EvalOptions("m", "d", "o", seed=seed)  # type: ignore[arg-type]


def detection_error(**settings: object) -> str:
    with pytest.raises(ClocError) as caught:
        settings_of(DetectionSettings, EvalOptions("m", "d", "o", settings=settings))
    return str(caught.value)


def test_settings_are_of_their_types() -> None:
    """Told before anything is loaded, from the command line and from YAML alike."""
    wrong = {
        "most": ("abc", "1.5", "true", "[1]", "null"),
        "temperature": ("hot", "true", ".inf"),
        "nms": ("high", "{a: 1}"),
        "grid": ("5", "steps"),
        "objectness": ("maybe", "1"),
        "min_score": ("null", "a: ["),
    }
    named = {"most": "a whole number", "grid": "a mapping", "objectness": "true or false"}
    for name, words in wrong.items():
        for word in words:
            said = detection_error(**settings_from_words([f"{name}={word}"]))
            assert f"{name} is {word!r}, not {named.get(name, 'a number')}" in said
    assert "most is 'abc', not a whole number" in detection_error(most="abc")
    assert "templates is 5, not a text or a list (a text each)" in detection_error(templates=5)
    assert "no templates '5'" in detection_error(**settings_from_words(["templates=5"]))
    for name, value in {"most": 0, "nms": 1.5, "temperature": -1, "score": "relu"}.items():
        assert f"{name} is " in detection_error(**{name: value})


def test_settings_are_read_as_their_types_want_them() -> None:
    def read(kind: type, *words: str) -> Any:
        return settings_of(kind, EvalOptions("m", "d", "o", settings=settings_from_words(words)))

    # Words that YAML takes for a mapping, for nothing at all, for a number and for a truth.
    for question in ("Task: find {phrase}", "{phrase}?", "{phrase}", "[{phrase}", "'{phrase}"):
        assert read(GroundingSettings, f"question={question}").question == question
    assert read(GroundingSettings, "question='{phrase}: where?'").question == "{phrase}: where?"
    assert read(GroundingSettings, "question=null").question is None
    assert read(GroundingSettings, "suffix=123").suffix == "123"
    assert read(GroundingSettings, "suffix=no").suffix == "no"
    words = ("most=7", "nms=1", "min_score=1e-3", "grid={steps: 3}", "templates=['a {}', 'b {}']")
    found = read(DetectionSettings, *words)
    assert (found.most, found.nms, found.min_score, found.grid) == (7, 1, 0.001, {"steps": 3})
    assert found.templates == ["a {}", "b {}"]


def test_options_of_a_suite_file_are_of_their_types(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("suite: scenes\nsettings:\n")
    _, options = options_from_yaml(file, ["model=123", "out=2024-01-01", "limit=5", "settings.question=a: {phrase}"])
    assert (options.model, options.out, options.limit) == ("123", "2024-01-01", 5)
    assert settings_of(GroundingSettings, options).question == "a: {phrase}"
    for word, said in {
        "limit=many": "limit is 'many', not a whole number",
        "seed=null": "seed is 'null', not a whole number",
        "trust_remote_code=perhaps": "not true or false",
        "settings=5": "settings is '5', not a mapping",
        "model=": "'model' is not given",
    }.items():
        with pytest.raises(ClocError, match=said):
            options_from_yaml(file, ["model=m", "out=o", word])


def test_bad_input_ends_in_one_line_and_exit_code_2(
    checkpoints: dict[str, Path],
    scenes_folder: Path,
    region_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def complaint(suite: str, model: object, data: object, *more: str) -> str:
        words = ["eval", suite, "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), *more]
        assert main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "Traceback" not in error
        return error

    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    cloc, mllm = checkpoints["cloc"], checkpoints["mllm"]
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "imagenet", "--model", str(cloc), "--out", str(tmp_path / "out")])
    assert "invalid choice: 'imagenet' (choose from 'scenes', 'region'" in capsys.readouterr().err
    with pytest.raises(ClocError, match="there is no suite 'imagenet'"):
        run_suite("imagenet", EvalOptions(str(cloc), None, str(tmp_path / "out")))
    assert "knows: none" in complaint("scenes", cloc, scenes_folder, "--set", "box=norm1")
    assert "not of the form key=value" in complaint("scenes", cloc, scenes_folder, "--set", "box")
    assert f"Did you mean {tmp_path / 'run' / 'export'}?" in complaint("scenes", tmp_path / "run", scenes_folder)
    assert "does not say its model_type" in complaint("scenes", tmp_path / "run" / "export", scenes_folder)
    assert "holds a 'bert' model" in complaint("scenes", tmp_path / "other", scenes_folder)
    assert "holds a 'cloc_mllm' model" in complaint("region", mllm, region_data)
    assert "no set of procedural scenes" in complaint("scenes", cloc, region_data)
    assert "there is no split 'tset'" in complaint("scenes", cloc, scenes_folder, "--split", "tset")
    assert "limit is 0" in complaint("scenes", cloc, scenes_folder, "--limit", "0")
    assert "has no Prompter" in complaint("scenes", checkpoints["clip"], scenes_folder, "--method", "prompter")
    assert "--method is for encoders" in complaint("scenes", mllm, scenes_folder, "--method", "roi")
    assert "no such file or folder" in complaint("region", cloc, tmp_path / "nowhere")


def test_a_broken_picture_names_file_and_sample(
    checkpoints: dict[str, Path], region_data: Path, tmp_path: Path
) -> None:
    lines = (region_data / "regions.jsonl").read_text()
    (tmp_path / "regions.jsonl").write_text(lines)
    for k in range(6):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{k}.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    with pytest.raises(ClocError, match=r"regions\.jsonl: sample 'p4 \(line 5\)'"):
        run_suite("region", EvalOptions(str(checkpoints["cloc"]), str(tmp_path), str(tmp_path / "out")))


def test_the_model_type_is_read_from_config_json(checkpoints: dict[str, Path]) -> None:
    assert [model_type(checkpoints[name]) for name in ("cloc", "clip", "mllm")] == ["cloc", "cloc", "cloc_mllm"]
