"""The demo's report: numbers joined over seeds, sentences that follow from them, a page that stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.apps.demo.files import DATA, DemoFiles
from cloc_mllm.apps.demo.findings import difference, findings
from cloc_mllm.apps.demo.markdown import write_markdown
from cloc_mllm.apps.demo.page import write_page
from cloc_mllm.apps.demo.picture import MODEL_COLOURS, write_picture
from cloc_mllm.apps.demo.plan import PRESETS, make_plan, with_language_model
from cloc_mllm.apps.demo.report import build_report, targets, write_report
from cloc_mllm.apps.demo.runner import build_stages, open_demo_folder
from cloc_mllm.errors import ClocError
from cloc_mllm.pages.drawing import TRUE_COLOUR
from cloc_mllm.training.running.launch import programs_folder

ENCODER = {
    "clip": {"region_top1": 0.2, "grounding_zeroshot_acc50": 0.05, "image_i2t_r1": 0.4, "image_t2i_r1": 0.4},
    "clip_captions": {"region_top1": 0.6, "grounding_zeroshot_acc50": 0.06, "image_i2t_r1": 0.4, "image_t2i_r1": 0.4},
    "cloc": {"region_top1": 0.63, "grounding_zeroshot_acc50": 0.5, "image_i2t_r1": 0.42, "image_t2i_r1": 0.38},
}
MLLM = {
    "blind": {"vqa_acc": 0.45, "referring_acc": 0.05, "grounding_acc50": 0.04},
    "clip": {"vqa_acc": 0.6, "referring_acc": 0.15, "grounding_acc50": 0.5},
    "clip_roi": {"vqa_acc": 0.6, "referring_acc": 0.3, "grounding_acc50": 0.5},
    "cloc": {"vqa_acc": 0.6, "referring_acc": 0.2, "grounding_acc50": 0.6},
    "cloc_prompter": {"vqa_acc": 0.62, "referring_acc": 0.6, "grounding_acc50": 0.7},
    "cloc_new_head": {"vqa_acc": 0.62, "referring_acc": 0.6, "grounding_acc50": 0.3},
}
_FLOOR = {"value": 0.03, "ci95": [0.02, 0.04], "n": 500}
BASELINES: dict[str, Any] = {
    "encoders": {"region_top1": {"majority": _FLOOR, "chance": 0.014}, "image_t2i_r1": {"chance": 0.001}},
    "mllm": {
        "vqa_acc": {"majority": {"value": 0.44, "ci95": [0.4, 0.48], "n": 500}},
        "referring_acc": {"majority": _FLOOR},
        "grounding_acc50": {"majority": _FLOOR},
    },
}


def _metrics(values: dict[str, float], shift: float = 0.0) -> dict[str, Any]:
    return {
        name: {"value": value + shift, "ci95": [value + shift - 0.03, value + shift + 0.03], "n": 1000}
        for name, value in values.items()
    }


def _write_evaluations(files: DemoFiles, preset: str, seeds: tuple[int, ...]) -> None:
    """Lay out what the stages leave behind, with known numbers."""
    plan = PRESETS[preset]
    kinds = (("encoders", [e.name for e in plan.encoders], ENCODER), ("mllm", [m.name for m in plan.mllms], MLLM))
    for seed in seeds:
        for kind, names, values in kinds:
            for name in names:
                folder = files.out / files.evaluation(kind, name, seed)
                folder.mkdir(parents=True)
                details: dict[str, Any] = {"baselines": BASELINES[kind], "grounding_mode": "head"}
                if kind == "encoders":
                    details["readouts"] = {"crop": _metrics(values[name]), "roi": _metrics(values[name])}
                    details["localizers"] = {"grid": _metrics({"acc50": 0.1})}
                report = {
                    "suite": "scenes",
                    "dataset": {"name": "quick, seed 0", "split": "test", "n": 1000, "of": 1000},
                    "metrics": _metrics(values[name], 0.01 * seed),
                    "unparsed": 0.0,
                    "details": details,
                }
                (folder / "report.json").write_text(json.dumps(report))


def _question(number: int, task: str, content: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    image = {"type": "image", "image": f"images/{number}.png"}
    messages = [{"role": "user", "content": [image, *content]}]
    return {
        "id": f"q{number}",
        "image": image["image"],
        "task": task,
        "messages": messages,
        "answer": "red circle",
        **more,
    }


QUESTIONS = [
    _question(
        0,
        "referring",
        [
            {"type": "text", "text": "What is "},
            {"type": "region", "box": [5, 5, 30, 30]},
            {"type": "text", "text": "?"},
        ],
        boxes_in=[[5, 5, 30, 30]],
    ),
    _question(1, "grounding", [{"type": "text", "text": "Where is <b> & co?"}], box=[12, 12, 44, 44]),
]
ANSWERS = [
    {"id": "q0", "task": "referring", "truth": "red circle", "answer": "blue", "right": False},
    {
        "id": "q1",
        "task": "grounding",
        "truth": "red circle",
        "answer": "it [9, 9]",
        "right": True,
        "box": [12, 12, 44, 44],
        "boxes": [{"box": [10, 10, 40, 40]}],
    },
]


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(params=["quick", "reproduce"])
def demo(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], DemoFiles]:
    """A finished demo's report and files."""
    preset = request.param
    plan = PRESETS[preset]
    files = DemoFiles(tmp_path / "out", Path("train"), len(plan.seeds))
    _write_evaluations(files, preset, plan.seeds)
    (files.out / DATA / "test" / "images").mkdir(parents=True)
    for number in (0, 1):
        Image.new("RGB", (96, 96), "#808080").save(files.out / DATA / "test" / "images" / f"{number}.png")
    _write_jsonl(files.out / DATA / "test" / "questions.jsonl", QUESTIONS)
    for mllm in plan.mllms:
        _write_jsonl(files.out / files.evaluation("mllm", mllm.name, plan.seeds[0]) / "answers.jsonl", ANSWERS)
    stamp = {
        "name": "encoders/clip",
        "title": "pre-train",
        "seconds": 12.5,
        "images": 640,
        "world_size": 2,
        "zero_stage": 1,
        "steps": 10,
        "seed": 0,
        "skipped": False,
        "command": ["deepspeed"],
    }
    report = build_report(plan, files, {"encoders/clip": stamp}, seconds=13.0, command="cloc-mllm demo")
    return report, files


def test_report_keeps_the_contract(demo: tuple[dict[str, Any], DemoFiles], tmp_path: Path) -> None:
    report, _ = demo
    assert {"suite", "dataset", "frame", "encoder", "mllm", "baselines", "stages", "samples", "versions"} <= set(report)
    assert report["encoder"]["cloc"]["metrics"]["region_top1"]["n"] == 1000
    assert report["mllm"]["cloc_prompter"]["metrics"]["referring_acc"]["value"] == pytest.approx(
        0.6 + 0.01 * (len(report["seeds"]) // 2)
    )
    assert report["grounding_mode"] == "head"
    assert report["stages"][0]["images_per_second"] == pytest.approx(51.2)
    json.loads(write_report(report, tmp_path).read_text())


def test_values_are_means_over_seeds(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    report, _ = demo
    entry = report["encoder"]["cloc"]["metrics"]["region_top1"]
    if report["preset"] == "quick":
        assert "seeds" not in entry
    else:
        assert entry["seeds"] == pytest.approx([0.63, 0.64, 0.65])
        assert entry["value"] == pytest.approx(0.64)
        assert entry["spread"]["std"] == pytest.approx(0.01)


class _Page(HTMLParser):
    """Collects what a page loads and how its tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("rect", "line", "polyline")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_markdown_has_every_model_and_figure(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    report, files = demo
    lines = write_markdown(report, files.out).read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    for kind, title in (("encoder", "encoder"), ("mllm", "MLLM")):
        start = next(k for k, row in enumerate(rows) if row[0] == title)
        assert rows[start][1:-1] == [f"`{name}`" for name in report[kind]]
        length = len({metric for entry in report[kind].values() for metric in entry["metrics"]})
        table = {row[0].strip("`"): row[1:] for row in rows[start + 1 : start + 1 + length]}
        for column, entry in enumerate(report[kind].values()):
            for metric, found in entry["metrics"].items():
                value = f"{100 * found['value']:.1f}"
                several = "" if len(report["seeds"]) == 1 else f" ± {100 * found['spread']['std']:.1f}"
                assert table[metric][column].startswith(f"{value}{several} [")
    for target in report["targets"]:
        assert [target["name"], target["wanted"], target["got"], "yes" if target["reached"] else "**no**"] in rows
    assert all(f"* {finding['text']}" in lines for finding in report["findings"])


def test_page_stands_alone_and_is_well_formed(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    report, files = demo
    run = files.out / "encoders" / "clip"
    run.mkdir(parents=True)
    lines = [{"step": step, "loss": 4.0 - step, "loss_clip": 4.0 - step} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_page(report, files.out, {"encoders/clip": run}, files.out / DATA / "test").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.loads
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert not re.search(r"https?://|<script|@import", text)
    assert "Where is &lt;b&gt; &amp; co?" in text, "what models and data say is escaped"
    for heading in (
        "What the numbers say",
        "Encoders",
        "Boxes: true and predicted",
        "Chats",
        "Losses",
        "What each stage cost",
    ):
        assert f">{heading}<" in text
    assert "20.0 %" in text


def test_picture_shows_every_sample(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    report, files = demo
    picture = Image.open(write_picture(report, files.out, files.out / DATA / "test")).convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 24) or []}
    for wanted in (TRUE_COLOUR, MODEL_COLOURS["clip"], MODEL_COLOURS["cloc"]):
        assert tuple(int(wanted[start : start + 2], 16) for start in (1, 3, 5)) in colours


def test_samples_are_what_was_asked_and_answered(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    report, _ = demo
    referring, grounding = report["samples"]
    assert referring["question"] == "What is <region>?"
    assert referring["boxes_in"] == [[5, 5, 30, 30]]
    assert grounding["answers"]["clip"]["iou"] == pytest.approx(784 / (900 + 1024 - 784), abs=1e-4)
    assert grounding["answers"]["clip"]["boxes"] == [{"box": [10, 10, 40, 40]}]


def test_findings_follow_from_the_numbers(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    report, _ = demo
    texts = {found["text"]: found["verdict"] for found in report["findings"]}
    (naming,) = [text for text in texts if "(region_top1)" in text]
    assert texts[naming] == "ahead"
    assert re.search(r"3\.\d times", naming)
    (retrieval,) = [text for text in texts if "(image_t2i_r1)" in text]
    assert texts[retrieval] == "level"
    controls = [text for text in texts if text.startswith("Control clip_captions")]
    assert bool(controls) == (report["preset"] == "reproduce")
    if controls:
        (control,) = [text for text in controls if "naming a region" in text]
        assert "this control closes the gap" in control, "0.60 against 0.63 ± 0.03 is no difference"
        assert any("clip_roi" in text and "goes 33 % of the way" in text for text in texts)
        assert not any("caption of an image" in text for text in controls), "where there is no gap, none is closed"


def test_a_gain_that_vanishes_is_not_claimed(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    report, _ = demo
    report["encoder"]["cloc"]["metrics"]["region_top1"] = {"value": 0.1, "ci95": [0.08, 0.12], "n": 1000}
    found = [item for item in findings(report) if "(region_top1)" in item["text"]]
    assert found[0]["verdict"] == "behind"
    assert "CLIP is ahead" in found[0]["text"]
    assert not next(row for row in targets(report) if row["name"] == "region_top1")["reached"]


def test_targets_are_those_that_were_set(demo: tuple[dict[str, Any], DemoFiles]) -> None:
    rows = {row["name"]: row for row in targets(demo[0])}
    assert rows["region_top1"]["reached"]
    assert rows["mllm referring_acc"]["reached"]
    assert rows["mllm clip vqa_acc"]["reached"]
    assert not any("blind vqa" in name for name in rows)


def test_spread_over_seeds_widens_the_uncertainty() -> None:
    plain = {"value": 0.5, "ci95": [0.47, 0.53], "n": 100}
    seeded = {**plain, "value": 0.6, "seeds": [0.4, 0.6, 0.8], "spread": {"std": 0.2, "min": 0.4, "max": 0.8}}
    assert difference({**plain, "value": 0.6}, plain).verdict == "ahead"
    assert difference(seeded, plain).verdict == "level"


@pytest.mark.parametrize("preset", ["quick", "miniature"])
def test_stages_are_real_commands_in_order(preset: str, tmp_path: Path) -> None:
    files = DemoFiles(tmp_path, programs_folder(), 1)
    stages = build_stages(make_plan(preset), files)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert names[:3] == ["data", "encoders/clip", "encoders/cloc"]
    for number, stage in enumerate(stages):
        assert set(stage.after) <= set(names[:number])
    trained = [stage for stage in stages if "--config" in stage.command]
    assert len(trained) == 6
    for stage in trained:
        assert stage.slots == 2
        assert "--num_gpus" in stage.command
        assert Path(stage.command[stage.command.index("--config") - 1]).is_file()
        assert stage.facts["images"] > 0


def test_reproduce_runs_every_control_over_three_seeds_on_the_same_data(tmp_path: Path) -> None:
    plan = make_plan("reproduce", seed=5)
    stages = {stage.name: stage for stage in build_stages(plan, DemoFiles(tmp_path, programs_folder(), 3))}
    assert len(stages) == 1 + 3 * (3 + 2 * 6 + 3 + 6)
    assert sum(name == "data" for name in stages) == 1
    for seed in (5, 6, 7):
        for name in ("blind", "clip", "clip_roi", "cloc", "cloc_prompter", "cloc_new_head"):
            stage = stages[f"seed{seed}/mllm/{name}/align"]
            assert f"run.seed={seed}" in stage.command
            assert stage.after == (f"seed{seed}/encoders/{'cloc' if name.startswith('cloc') else 'clip'}",)
            assert stage.slots == 1
            assert ("model.blind=true" in stage.command) == (name == "blind")
    assert plan.slots == 2, "two of one process each side by side"


def test_models_that_are_compared_differ_in_nothing_else(tmp_path: Path) -> None:
    stages = {
        stage.name: stage for stage in build_stages(make_plan("quick"), DemoFiles(tmp_path, programs_folder(), 1))
    }
    clip, cloc = (set(stages[f"encoders/{name}"].command) for name in ("clip", "cloc"))
    assert {word.split("=")[0] for word in clip ^ cloc} == {"run.output", "model.prompter"}
    assert stages["encoders/clip"].facts["images"] == stages["encoders/cloc"].facts["images"]


def test_a_world_size_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="does not divide"):
        build_stages(make_plan("quick", world_size=7), DemoFiles(tmp_path, programs_folder(), 1))
    with pytest.raises(ClocError, match="at least one process"):
        make_plan("quick", world_size=0)


def test_a_real_language_model_learns_its_new_tokens_then_is_tuned_with_lora(tmp_path: Path) -> None:
    plan = with_language_model(make_plan("quick"), "/models/llm")
    stages = {stage.name: stage for stage in build_stages(plan, DemoFiles(tmp_path, programs_folder(), 1))}
    assert "parts.llm.mode=tokens" in stages["mllm/cloc_prompter/align"].command
    assert "model.llm=/models/llm" in stages["mllm/cloc_prompter/align"].command
    assert "parts.llm.mode=lora" in stages["mllm/cloc_prompter/instruct"].command
    assert "--limit" in stages["evaluation/mllm/cloc_prompter"].command
    assert "--limit" not in stages["evaluation/encoders/cloc"].command
    with pytest.raises(ClocError, match="--preset quick"):
        with_language_model(make_plan("reproduce"), "/models/llm")


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ClocError, match="no demo wrote it"):
        open_demo_folder(tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").exists()
    open_demo_folder(tmp_path / "new", fresh=False)
    open_demo_folder(tmp_path / "new", fresh=True)
