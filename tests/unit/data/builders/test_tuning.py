"""Conversations built of region-text data: everything they say is true of the data, and nothing is lost."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.apps.cli import main
from cloc_mllm.data.builders import tuning
from cloc_mllm.data.builders.absent import Vocabulary
from cloc_mllm.data.builders.templates import WORDINGS
from cloc_mllm.data.builders.tuning import BuildOptions, build_conversations
from cloc_mllm.data.builders.turns import KINDS, Choices
from cloc_mllm.data.dataset import ConversationDataset
from cloc_mllm.data.english import content_words, without_article
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.readers import InMemory, open_samples
from cloc_mllm.errors import ClocError
from cloc_mllm.models.answer_text import absent_phrases
from tests.builders import noise_image

Sample = dict[str, Any]
SIZE = (40, 30)
MEANT = {
    "dog": {"dog"},
    "a dog": {"dog"},
    "hot dog": {"hot dog"},
    "bear": {"bear"},
    "teddy bear": {"teddy bear"},
    "red cube": {"red cube", "cube"},
    "cube": {"cube"},
    "cat": {"cat"},
    "two men": {"two men"},
    "scissors": {"scissors"},
    "traffic light": {"traffic light"},
    "striped red cube": {"striped red cube", "red cube", "cube"},
}
"""What each text may truly be called, which its words do not tell: a hot dog is no dog, a red cube is a cube."""
NAMES = ("dog", "a dog", "red cube", "cube", "cat", "two men", "scissors", "traffic light", "striped red cube")

boxes = st.tuples(st.integers(0, 36), st.integers(0, 26), st.integers(1, 40), st.integers(1, 30)).map(
    lambda b: [b[0], b[1], min(b[0] + b[2], 40), min(b[1] + b[3], 30)]
)
regions = st.fixed_dictionaries(
    {"box": boxes, "text": st.sampled_from(sorted(MEANT))},
    optional={"unique": st.booleans(), "attributes": st.just({"mask": [[2, 2, 12, 2, 12, 12, 2, 12]]})},
)
samples = st.lists(
    st.fixed_dictionaries({"caption": st.just("nothing much"), "regions": st.lists(regions, max_size=7)}),
    min_size=1,
    max_size=4,
)


def written(folder: Path, found: list[Sample]) -> Path:
    """Region-text data of some samples, which share one picture."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    noise_image(*SIZE).save(data / "a.png")
    lines = [{"id": str(k), "image": "a.png", **sample} for k, sample in enumerate(found)]
    (data / "regions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def built(folder: Path, found: list[Sample], kind: str, **options: Any) -> tuple[dict[str, int], list[Sample]]:
    """Counts and conversations; the checker finds no fault with them."""
    out = folder / options.pop("out", kind)
    options = {"progress": False, **options}
    result = build_conversations(BuildOptions(written(folder, found), out, kind, **options))
    assert result == json.loads((out / "dataset.json").read_text())
    assert not (out / ".build").exists()
    source = open_samples(out, "conversations.jsonl") if (out / "conversations.jsonl").stat().st_size else InMemory([])
    if len(source):
        assert check_data(out).faults == []
    return result["counts"], [source[k] for k in range(len(source))]


def turns(conversation: Sample) -> list[tuple[str, list[Sample], str, list[Sample]]]:
    """Question's text, regions it shows, answer's text, boxes it gives."""
    pairs = []
    messages = conversation["messages"]
    for asked, said in zip(messages[::2], messages[1::2], strict=True):
        parts: list[Any] = []
        for message in (asked, said):
            parts.append("".join(item.get("text", "") for item in message["content"]))
            parts.append([item for item in message["content"] if item["type"] == "region"])
        pairs.append(tuple(parts))
    return pairs


def things_of(sample: Sample) -> dict[tuple[float, ...], list[str]]:
    found: dict[tuple[float, ...], list[str]] = {}
    for region in sample["regions"]:
        found.setdefault(tuple(region["box"]), []).append(region["text"])
    return found


def meant(sample: Sample, phrase: str) -> set[tuple[float, ...]]:
    """The boxes of what may truly be called so."""
    called = without_article(phrase)
    return {tuple(region["box"]) for region in sample["regions"] if called in MEANT[region["text"]]}


@given(samples, st.sampled_from([*KINDS, "mixed"]), st.sampled_from(["box", "point", "mask", "mixed"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_everything_said_is_true(found: list[Sample], kind: str, shape: str, varied: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        choices = Choices(shape, "varied" if varied else "plain", max_boxes=3, absent="adversarial")
        counts, conversations = built(Path(folder), found, kind, choices=choices, limit=5)
    assert counts["images_read"] == len(found) == counts["images_written"] + counts["images_without_question"]
    assert counts["images_written"] == len(conversations)
    assert counts["turns"] == sum(len(turns(one)) for one in conversations)
    assert all(1 <= len(turns(one)) <= 5 for one in conversations)
    for conversation in conversations:
        sample = found[int(conversation["id"].split("-")[0])]
        told: Counter[tuple[float, ...]] = Counter()
        for question, shown, answer, given_boxes in turns(conversation):
            told.update({tuple(item["box"]) for item in given_boxes})
            told.update({tuple(item["box"]) for item in shown if "box" in item})
            judge(sample, question, shown, answer, given_boxes)
        assert not told or max(told.values()) == 1, "a thing is told of twice"


def judge(sample: Sample, question: str, shown: list[Sample], answer: str, given_boxes: list[Sample]) -> None:
    things = things_of(sample)
    if given_boxes:
        by_phrase: dict[str, set[tuple[float, ...]]] = {}
        for item in given_boxes:
            by_phrase.setdefault(item["phrase"], set()).add(tuple(item["box"]))
        assert sum(map(len, by_phrase.values())) == len(given_boxes)
        if question in WORDINGS["list"].questions:
            assert set().union(*by_phrase.values()) == set(things)
            return
        ((phrase, found),) = by_phrase.items()
        stated = {region.get("unique") for region in sample["regions"] if region["text"] == phrase}
        if len(found) == 1:
            assert True in stated or meant(sample, phrase) == found
        else:
            assert meant(sample, phrase) == found
            assert len(found) <= 3
    elif shown:
        (region,) = shown
        said = (
            things[tuple(region["box"])] if "box" in region else [text for texts in things.values() for text in texts]
        )
        assert any(without_article(text) in answer for text in said)
    elif absent := absent_phrases(answer):
        assert not content_words(absent[0]) & content_words(" ".join(r["text"] for r in sample["regions"]))
        assert absent[0] in question
    elif answer.startswith("Yes"):
        assert any(without_article(region["text"]) in question for region in sample["regions"])
    elif answer != "No.":
        assert answer == sample["caption"]


def several(count: int) -> list[Sample]:
    return [
        {
            "caption": f"picture {k}",
            "regions": [{"box": [k, j, k + 9, j + 9], "text": NAMES[(k * 3 + j) % 9]} for j in range(1 + k % 5)],
        }
        for k in range(count)
    ]


def test_a_hot_dog_is_no_dog(tmp_path: Path) -> None:
    names = ("dog", "hot dog", "bear", "teddy bear", "cat", "the cat")
    regions = [{"box": [k, 0, k + 5, 9], "text": name} for k, name in enumerate(names)]
    counts, conversations = built(tmp_path, [{"caption": "x", "regions": regions}] * 20, "multi-object", limit=5)
    asked = [pair for one in conversations for pair in turns(one) if pair[0] not in WORDINGS["list"].questions]
    assert asked
    assert {tuple(tuple(item["box"]) for item in boxes) for *_, boxes in asked} == {((4, 0, 9, 9), (5, 0, 10, 9))}
    assert counts["phrases_in_longer_texts_left_out"] == 40


@pytest.mark.parametrize("kind", ["mixed", "negatives"])
def test_workers_shards_and_stops_change_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"choices": Choices("mixed", "varied"), "shard": 4}
    _, alone = built(tmp_path, several(11), kind, **options)
    _, together = built(tmp_path, several(11), kind, out="b", workers=2, **options)
    _, whole = built(tmp_path, several(11), kind, out="c", **{**options, "shard": 4096})
    assert alone == together == [{**one} for one in whole]
    _, other = built(tmp_path, several(11), kind, out="d", seed=1, **options)
    assert other != alone
    real, done = tuning._write_shard, []

    def stops(*args: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(args)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path, several(11), kind, out="e", **options)
    monkeypatch.setattr(tuning, "_write_shard", lambda *args: (done.append(args), real(*args)))
    assert built(tmp_path, several(11), kind, out="e", **options)[1] == alone
    assert len(done) == 3


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    _, lines = built(tmp_path, several(6), "mixed")
    options = BuildOptions(tmp_path / "data", tmp_path / "p", "mixed", file_format="parquet", shard=2, progress=False)
    build_conversations(options)
    assert len(list((tmp_path / "p").glob("conversations-*.parquet"))) == 3
    read, direct = ConversationDataset(tmp_path / "p"), ConversationDataset(tmp_path / "mixed")
    assert len(read) == len(direct) == len(lines)
    for k in range(len(read)):
        ours, theirs = read[k]["messages"], direct[k]["messages"]
        assert [m["content"][1:] for m in ours] == [m["content"][1:] for m in theirs]


def test_yes_is_as_likely_as_no(tmp_path: Path) -> None:
    data = [{"caption": "x", "regions": [{"box": [0, 0, 9, 9], "text": f"thing{k % 40}"}]} for k in range(400)]
    _, conversations = built(tmp_path, data, "negatives", limit=1)
    answers = Counter(turns(one)[0][2].split(",")[0].split(" no ")[0] for one in conversations)
    assert 70 < answers["Yes"] < 130
    assert 70 < answers["No"] < 130
    assert 160 < answers["There is"] < 240


def test_no_is_no_better_guess_where_pictures_have_few_names(tmp_path: Path) -> None:
    data = [{"caption": "x", "regions": [{"box": [0, 0, 9, 9], "text": f"thing{k % 40}"}][: k % 3]} for k in range(900)]
    counts, conversations = built(tmp_path, data, "negatives", limit=4)
    asked = [pair[2] for one in conversations for pair in turns(one)]
    yes, no = (sum(answer.startswith(word) for answer in asked) for word in ("Yes", "No"))
    assert counts["turns"] == 3600
    assert min(yes, no) > 300
    assert abs(yes - no) < 4 * (yes + no) ** 0.5


def test_absent_names_are_drawn_as_asked() -> None:
    """With 40 pictures of a dog and a lead, 40 of a cat and 2 of a yak, what is asked for of a dog alone?"""
    listed = [["dog", "lead"]] * 40 + [["cat"]] * 40 + [["yak"]] * 2
    vocabulary = Vocabulary(listed)
    from random import Random

    from cloc_mllm.data.builders.picture import Picture

    picture = Picture({"caption": "dogs", "regions": [{"box": [0, 0, 9, 9], "text": "a dog"}]}, SIZE)

    def drawn(way: str) -> Counter[str | None]:
        return Counter(vocabulary.absent(picture, way, set(), Random(k)) for k in range(300))

    assert set(drawn("adversarial")) == {"lead"}
    assert drawn("popular")["yak"] < 30
    assert set(drawn("random")) == {"lead", "cat", "yak"}
    assert min(drawn("random").values()) > 60
    assert vocabulary.absent(picture, "random", {"lead", "cat", "yak"}, Random(0)) is None
    assert Vocabulary([]).absent(picture, "popular", set(), Random(0)) is None


def test_weights(tmp_path: Path) -> None:
    weights = {"referring": 3.0, "grounding": 1.0}
    data = [{"caption": "x", "regions": [{"box": [k, 0, k + 3, 9], "text": f"thing{k}"} for k in range(8)]}] * 100
    counts, _ = built(tmp_path, data, "mixed", weights=weights, limit=2)
    assert counts["turns"] == 200 == counts["turns_referring"] + counts["turns_grounding"]
    assert 130 < counts["turns_referring"] < 170


def test_a_point_is_on_its_thing_and_not_on_a_smaller_one(tmp_path: Path) -> None:
    small = [{"box": [15 + k, 10, 17 + k, 20], "text": "pen"} for k in (0, 4)]
    data = [{"caption": "x", "regions": [{"box": [0, 0, 40, 30], "text": "table"}, *small]}] * 50
    counts, conversations = built(tmp_path, data, "referring", choices=Choices("point"))
    assert counts["regions_shown_as_point"] == 150
    for conversation in conversations:
        for _, ((shown),), answer, _ in turns(conversation):
            on_pen = [b["box"] for b in small if b["box"][0] <= shown["point"][0] <= b["box"][2]
                      and b["box"][1] <= shown["point"][1] <= b["box"][3]]  # fmt: skip
            assert bool(on_pen) == (answer == "pen")
    data = [{"caption": "x", "regions": [{"box": [0, 0, 40, 30], "text": t} for t in ("a", "b")]
             + [{"box": [0, 0, 40, 29.9], "text": "c"}]}]  # fmt: skip
    counts, _ = built(tmp_path, data, "referring", out="covered", choices=Choices("point"))
    assert (counts["boxes_read"], counts["regions_shown_as_box_instead"]) == (2, 1)


def test_bad_samples_are_named_or_counted(tmp_path: Path) -> None:
    data = written(tmp_path, several(4))
    lines = (data / "regions.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace("a.png", "lost.png")
    lines[2] = lines[2][:-9]
    (data / "regions.jsonl").write_text("\n".join(lines))
    options = {"kind": "referring", "progress": False}
    with pytest.raises(
        ClocError, match=r"regions\.jsonl: sample '1 \(line 2\)': .*lost\.png: the image does not exist"
    ):
        build_conversations(BuildOptions(data, tmp_path / "a", **options))
    counts = build_conversations(BuildOptions(data, tmp_path / "a", on_bad_sample="skip", **options))["counts"]
    assert (counts["images_read"], counts["images_written"], counts["images_bad_left_out"]) == (4, 2, 2)


@pytest.mark.parametrize("shape", ["mask", "point"])
def test_a_mask_that_cannot_be_read(shape: str, tmp_path: Path) -> None:
    data = several(1)
    data[0]["regions"][0]["attributes"] = {"mask": {"size": [3, 3], "counts": [9]}}
    with pytest.raises(ClocError, match=r"sample '0 \(line 1\)': the mask of a region: the mask is 3 x 3 pixels"):
        built(tmp_path, data, "referring", choices=Choices(shape))
    assert built(tmp_path, data, "referring")[0]["images_written"] == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"weights": {"refering": 1.0}}, "there is no kind 'refering'"),
        ({"weights": {"referring": 0.0}}, "a weight is not positive"),
        ({"choices": Choices(max_boxes=1)}, "max_boxes is 1"),
    ],
)
def test_options_that_make_no_sense(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ClocError, match=problem):
        BuildOptions(tmp_path, tmp_path, "mixed", **change)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path, several(5))
    words = ["data", "build", "mixed", data, "--out", tmp_path / "out", "--weights", "referring=2", "grounding=1"]
    assert main([str(word) for word in [*words, "--shape", "point", "--limit-per-image", 2]]) == 0
    printed = capsys.readouterr().out
    assert "images read                          5\n" in printed
    stated = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (stated["weights"], stated["shape"]) == ({"referring": 2.0, "grounding": 1.0}, "point")
    # What was built is no region-text data.
    assert main(["data", "build", "referring", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 2
    assert "is a conversation already" in capsys.readouterr().err
    assert main(["data", "build", "referring", str(tmp_path / "none"), "--out", str(tmp_path / "again")]) == 2
