"""Our tasks: who knows the truth scores 1, who says nothing 0, and they agree with the suites on the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.lmms.benchmarks import KNOWN_SIZES
from cloc_mllm.evaluation.lmms.results import metrics_of, unparsed_of
from cloc_mllm.evaluation.lmms.runs import OWN_TASKS, Found, Run, evaluate_here, find_tasks
from cloc_mllm.evaluation.lmms.tasks import asking, documents, scores
from cloc_mllm.evaluation.mllms.questions import hits_of, load_questions
from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.models.boxes import BoxCodec
from tests.builders import noise_image
from tests.unit.evaluation.lmms.conftest import Told

SIZE = (60, 40)
OURS = BoxCodec("norm1000")


def asked(folder: Path, tasks: tuple[str, ...], model: Predictor, **options: Any) -> Found:
    found = evaluate_here(Run("told", tasks, str(folder / "out"), device="cpu", batch_size=4, **options), model)
    assert found is not None
    return found


def values(found: Found) -> dict[str, float]:
    return {name: metric.value for name, metric in metrics_of(found)[0].items()}


@pytest.fixture
def refcoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures with three expressions, as the importer writes them."""
    folder = tmp_path / "refcoco" / "testA"
    (folder / "images").mkdir(parents=True)
    samples = []
    for k in range(2):
        noise_image(*SIZE, k).save(folder / "images" / f"{k}.png")
        regions = [
            {"box": [6.0 * j, 4, 30 + 6.0 * j, 36], "text": f"Man {k} {j}", "unique": True} for j in range(2 - k)
        ]
        sample = {"id": f"p{k}", "image": f"images/{k}.png", "width": SIZE[0], "height": SIZE[1]}
        samples.append(sample | {"caption": "men", "regions": regions})
    (folder / "regions.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    monkeypatch.setenv("CLOC_REFCOCO", str(tmp_path))
    return folder


@pytest.fixture
def flickr30k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two guys, each with a box, on one shirt; the scene has none."""
    for name in ("images", "Annotations", "Sentences"):
        (tmp_path / name).mkdir()
    noise_image(*SIZE).save(tmp_path / "images" / "7.jpg")
    objects = [(1, 1, 11, 31), (1, 41, 51, 31), (2, 21, 31, 11)]
    boxes = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>1</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, x2, y2 in objects
    )
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    (tmp_path / "Annotations" / "7.xml").write_text(f"<annotation>{size}{boxes}</annotation>")
    line = "[/EN#1/people Two guys] in [/EN#2/clothing a shirt] are [/EN#4/scene outside] ."
    (tmp_path / "Sentences" / "7.txt").write_text(f"{line}\n")
    (tmp_path / "test.txt").write_text("7\n")
    monkeypatch.setenv("CLOC_FLICKR30K", str(tmp_path))
    return tmp_path


@pytest.fixture
def referred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A question of each kind, as `data build lvis-referring` writes them."""
    noise_image(*SIZE).save(tmp_path / "7.png")
    mask = {"size": [SIZE[1], SIZE[0]], "counts": [100, 200, SIZE[0] * SIZE[1] - 300]}
    lines = []
    for kind, place in (
        ("box", {"box": [3, 4, 33, 24]}),
        ("point", {"point": [15, 10]}),
        ("free-form", {"mask": mask}),
    ):
        items = [{"type": "text", "text": "Is the object "}, {"type": "region", **place}]
        items += [{"type": "text", "text": " of the image a cat or a dog?"}]
        content = [{"type": "image", "image": "7.png"}, *items]
        lines.append(
            {
                "id": kind,
                "image": "7.png",
                "messages": [{"role": "user", "content": content}],
                "answer": "cat",
                "synonyms": ["cat", "kitten"],
                "negative": "dog",
                "negative_synonyms": ["dog"],
                "kind": kind,
            }
        )
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("CLOC_LVIS_REFERRING", str(tmp_path))
    return tmp_path


def test_scenes_score_as_the_suite_scenes_does(
    predictor: Predictor, scenes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model, the same questions: the same words to the last letter, and the same hits."""
    monkeypatch.setenv("CLOC_SCENES", str(scenes_folder))
    found = asked(tmp_path, ("cloc_scenes_vqa", "cloc_scenes_referring"), predictor, limit=6)
    split = load_questions(scenes_folder / "test", name="scenes", split="test")
    for task in ("vqa", "referring"):
        questions = split.of_task(task)[:6]
        conversations = [split.dataset[question.row]["messages"] for question in questions]
        answers = predictor.chat(conversations, max_new_tokens=48)
        samples = found.samples[f"cloc_scenes_{task}"]
        assert [sample["answer"] for sample in samples] == [answer.text.strip() for answer in answers]
        scored = [sample["metrics"]["exact_match"] for sample in samples]
        assert [entry["id"] for entry in scored] == [question.id for question in questions]
        assert [entry["score"] for entry in scored] == hits_of(questions, answers).tolist()


@pytest.mark.parametrize("task", ["vqa", "referring", "grounding"])
def test_scenes_oracle(task: str, scenes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOC_SCENES", str(scenes_folder))
    docs = iter(documents.scene_questions(scenes_folder, task))

    def truth(question: str, conversation: Any) -> str:
        doc = next(docs)
        return (
            OURS.encode(doc["boxes"][0], *documents.picture_size(doc)) if doc["boxes"] else doc["answer"].upper() + "."
        )

    name = f"cloc_scenes_{task}"
    ours = values(asked(tmp_path, (name,), Told(truth)))
    nothing = values(asked(tmp_path, (name,), Told(lambda *_: "")))
    for metric in ("acc50", "acc25", "acc75") if task == "grounding" else ("exact_match",):
        assert ours[f"{name}/{metric}"] == 1.0
        assert nothing[f"{name}/{metric}"] == 0.0
    if task == "grounding":
        assert nothing[f"{name}/unparsed"] == 1.0 - ours[f"{name}/unparsed"] == 1.0


def test_refcoco(refcoco: Path, tmp_path: Path) -> None:
    """The first box counts; a split that is not all there is not called by its name."""
    said = {
        "Man 0 0": "Man 0 0 [0, 100, 500, 900] and [600, 600, 999, 999]",  # exact
        "Man 0 1": "[350, 100, 849, 900]",  # off by half: (30 - 15) / (30 + 15)
        "Man 1 0": "nowhere",
    }

    def say(question: str, _: Any) -> str:
        return next(answer for phrase, answer in said.items() if question == f"Where is the {phrase}?")

    found = asked(tmp_path, ("cloc_refcoco_rec_testA",), Told(say))
    ours = {name.partition("/")[2]: round(value, 2) for name, value in values(found).items()}
    assert ours == {"acc50": 0.33, "acc25": 0.67, "acc75": 0.33, "mean_iou": 0.44, "unparsed": 0.33}
    assert unparsed_of(found) == pytest.approx(1 / 3)
    assert metrics_of(found)[1]["tasks"]["cloc_refcoco_rec_testA"]["published_split"] == 5657
    entry = found.samples["cloc_refcoco_rec_testA"][0]["metrics"]["acc50"]
    assert entry["truth"] == [0.0, 4.0, 30.0, 36.0]
    assert entry["box"] == pytest.approx([0, 4, 30, 36], abs=0.1)
    assert {entry["phrase"], entry["image"]} == {"Man 0 0", "p0"}


def test_flickr30k_by_both_protocols(flickr30k: Path, tmp_path: Path) -> None:
    """The guys' boxes are 0-10 and 40-50 wide: one of them is right under ANY-BOX, only the hull under MERGED-BOXES."""

    def say(where: str) -> Callable[[str, Any], str]:
        return lambda question, _: where if "guys" in question else "[333, 0, 500, 250]"

    one, hull = OURS.encode([40, 0, 50, 30], *SIZE), OURS.encode([0, 0, 50, 30], *SIZE)
    task = "cloc_flickr30k_entities"
    assert values(asked(tmp_path, (task,), Told(say(one)))) == {
        f"{task}/recall1_merged": 0.5,
        f"{task}/recall1_any": 1.0,
        f"{task}/unparsed": 0.0,
    }
    assert values(asked(tmp_path, (task,), Told(say(hull))))[f"{task}/recall1_merged"] == 1.0
    assert values(asked(tmp_path, (task,), Told(say(hull))))[f"{task}/recall1_any"] == 0.5
    assert values(asked(tmp_path, (task,), Told(lambda *_: "")))[f"{task}/unparsed"] == 1.0


def test_referred_objects_by_both_scorers(referred: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def say(_: str, conversation: Any) -> str:
        seen.append(next(key for item in conversation[0]["content"] if item["type"] == "region" for key in item))
        places = [set(item) - {"type"} for item in conversation[0]["content"] if item["type"] == "region"]
        assert len(places) == 1
        return "it is a cat, not a dog" if "box" in places[0] else "a cat or a dog"

    ours = values(asked(tmp_path, ("cloc_lvis_referring",), Told(say)))
    assert ours["cloc_lvis_referring_box/ferret"] == ours["cloc_lvis_referring_box/strict"] == 1.0
    for kind in ("point", "free_form"):
        assert ours[f"cloc_lvis_referring_{kind}/ferret"] == 1.0, "the published rule looks for the right name only"
        assert ours[f"cloc_lvis_referring_{kind}/strict"] == 0.0
    assert len(seen) == 3


def test_other_models_are_told_of_regions_in_words(referred: Path) -> None:
    """Without an entry of its own, a model gets coordinates as shares of the picture's sides."""
    docs = {kind: documents.referring_questions(referred, kind)[0] for kind in ("box", "point", "free-form")}
    turn = asking.doc_to_messages(docs["box"], {"regions": "text", "post_prompt": " Say which."})[0]["content"]
    assert [item["type"] for item in turn] == ["image", "text"]
    assert turn[1]["text"] == "Is the object [0.050, 0.100, 0.550, 0.600] of the image a cat or a dog? Say which."
    assert "[0.250, 0.250]" in asking.doc_to_text(docs["point"])
    with pytest.raises(ClocError, match="a mask cannot be said in words"):
        asking.doc_to_text(docs["free-form"])
    assert asking.in_words({"type": "region", "scribble": [[6, 8], [30, 4]]}, SIZE) == "[0.100, 0.100, 0.500, 0.200]"
    ours = asking.doc_to_messages(docs["box"], {"regions": "item"})[0]["content"]
    assert [item["type"] for item in ours] == ["image", "text", "region", "text"]
    assert asking.doc_to_text(docs["box"], {"regions": "item"}).startswith("Is the object <region> of")


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("[0.1, 0.1, 0.5, 0.5]", [6, 4, 30, 20]),
        ("here: (0.1,0.1,0.5,0.5).", [6, 4, 30, 20]),
        ("[.1 .1 .5 .5]", [6, 4, 30, 20]),
        ("[[0, 0, 1, 1]]", [0, 0, 60, 40]),
        ("[0.5, 0.5, 0.1, 0.1]", None),  # corners out of order
        ("[6, 4, 30, 20]", None),  # pixels
        ("[0.1, 0.1, 0.5", None),  # cut off
        ("", None),
    ],
)
def test_boxes_are_read_tolerantly_but_in_one_frame(answer: str, box: list[float] | None) -> None:
    found = scores.first_box({"size": SIZE}, answer)
    assert found == (None if box is None else pytest.approx(box))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval tries to load a task's data five times, two seconds apart: one error for all of the cases here."""
    monkeypatch.delenv("CLOC_SCENES", raising=False)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with pytest.raises(ClocError, match="Set CLOC_SCENES to the folder that `cloc-mllm data scenes` wrote"):
        asked(tmp_path, ("cloc_scenes_vqa",), Told(lambda *_: ""))
    monkeypatch.setenv("CLOC_SCENES", str(tmp_path / "none"))
    with pytest.raises(ClocError, match="CLOC_SCENES names what is not there"):
        asked(tmp_path, ("cloc_scenes_vqa",), Told(lambda *_: ""))
    with pytest.raises(ClocError, match="there is no such folder of tasks"):
        asked(tmp_path, ("cloc_scenes_vqa",), Told(lambda *_: ""), include_path=str(tmp_path / "none"))


def test_a_failure_of_the_model_is_a_failure_of_the_run(
    scenes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOC_SCENES", str(scenes_folder))

    def say(*_: Any) -> str:
        raise RuntimeError("out of memory")

    with pytest.raises(ClocError, match=r"lmms-eval failed \(RuntimeError: out of memory\)"):
        asked(tmp_path, ("cloc_scenes_vqa",), Told(say), limit=1)


def test_every_task_of_ours_is_found_and_sized(tmp_path: Path) -> None:
    names = sorted(path.stem for path in OWN_TASKS.glob("*.yaml"))
    manager, found = find_tasks(Run("told", tuple(names), str(tmp_path)))
    assert sorted(found) == names
    splits = {next(iter(manager._get_config(name)["dataset_kwargs"]["data_files"])) for name in names}
    assert splits == set(documents.SOURCES)
    assert all(KNOWN_SIZES[name] > 1000 for name in names if "_rec_" in name or "entities" in name)
