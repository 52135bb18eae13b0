"""Statistics: every fault that was put in is found and none is invented; the numbers are those counted by hand."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.apps.cli import main
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.inspection.faults import SampleView, problems_of
from cloc_mllm.data.inspection.pictures import PictureSizes
from cloc_mllm.data.inspection.statistics import fault_kind, inspect_data
from cloc_mllm.data.inspection.tally import Place, Tally, TallyOptions
from cloc_mllm.data.inspection.texts import (
    TextTally,
    flaws_of,
    histogram_summary,
    normalized,
    over,
    scripts_of,
    token_counts,
)
from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.schema import QUESTION_KEYS, REGION_KEYS, SAMPLE_KEYS
from cloc_mllm.data.writers import open_writer
from cloc_mllm.errors import ClocError
from tests.builders import tiny_tokenizer
from tests.unit.data.inspection.sets import FAULTS, region_samples, smooth_picture, talk, write_lines

KEYS = sorted(QUESTION_KEYS | SAMPLE_KEYS | REGION_KEYS | {"role", "content", "type", "phrase", "from", "value"})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 300 sound samples: more than two parts, so that parts are put together."""
    folder = tmp_path_factory.mktemp("sound")
    write_lines(folder / "regions.jsonl", region_samples(folder, 300))
    return folder


@given(st.dictionaries(st.integers(0, 299), st.sampled_from(sorted(FAULTS)), max_size=40))
@settings(max_examples=6, deadline=None)
def test_every_fault_is_found_where_it_was_put_and_no_other(sound: Path, planted: dict[int, str]) -> None:
    source = open_samples(sound)
    lines = [FAULTS[planted[k]](source[k], sound) if k in planted else source[k] for k in range(300)]
    report = check_data(write_lines(sound / "faulty.jsonl", lines), progress=False)
    found = {int(str(fault.sample).rsplit("line ", 1)[1].rstrip(")")) - 1: fault.problem for fault in report.faults}
    assert len(report.faults) == len(planted) == report.broken
    assert set(found) == set(planted)
    for k, problem in found.items():
        assert planted[k] in problem


def write_copy(folder: Path, out: Path, file_format: str) -> None:
    source = open_samples(folder)
    with open_writer(out, file_format) as writer:
        for k in range(len(source)):
            writer.write(source[k], source.folder(k))


def test_the_number_of_processes_changes_nothing(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    samples = [FAULTS[sorted(FAULTS)[k]](s, folder) for k, s in enumerate(region_samples(folder, len(FAULTS)))]
    write_lines(folder / "regions.jsonl", samples + region_samples(folder, 150, first=10))
    write_lines(folder / "talks.jsonl", [talk(f"t{k}", f"p{k % 4}.png", f"Question {k}?") for k in range(150)])
    write_copy(sound, folder, "webdataset")
    tokenizer = tiny_tokenizer()
    alone, together = (
        inspect_data(folder, tokenizer=tokenizer, limit=12, workers=workers, progress=False).to_dict()
        for workers in (1, 2)
    )
    assert alone == together
    assert alone["samples"] == len(FAULTS) + 150 + 150 + 300
    assert check_data(folder, progress=False).to_dict() == check_data(folder, progress=False, workers=2).to_dict()
    assert {key: alone[key] for key in ("files", "samples", "broken", "faults")} == check_data(folder, False).to_dict()


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
def test_a_set_says_the_same_of_itself_in_any_format(sound: Path, tmp_path: Path, file_format: str) -> None:
    write_copy(sound, tmp_path, file_format)
    lines, shards = (inspect_data(path, progress=False).statistics for path in (sound / "regions.jsonl", tmp_path))
    for key in ("kinds", "pictures", "regions", "texts", "notices", "samples_without_id", "images_per_sample"):
        assert lines[key] == shards[key], key


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloc_mllm.data.inspection import pictures

    decoded: list[str] = []

    def counted(image: Any, *words: Any) -> Any:
        decoded.append(str(image))
        return real(image, *words)

    real = pictures.open_image
    monkeypatch.setattr(pictures, "open_image", counted)
    region_samples(tmp_path, 3)
    write_lines(tmp_path / "talks.jsonl", [talk(f"t{k}", ("p1.png", "./p2.png", "p2.png")[k % 3]) for k in range(300)])
    found = inspect_data(tmp_path / "talks.jsonl", progress=False).statistics["pictures"]
    assert len(decoded) == found["count"] == 2
    assert found["named"] == 300


def test_what_is_odd_is_counted_with_its_place(tmp_path: Path) -> None:
    samples = region_samples(tmp_path, 8)
    samples[1]["id"] = samples[0]["id"]
    samples[2].pop("id")
    samples[3]["image"] = samples[0]["image"]
    samples[4]["regions"] = [{"box": [1, 2, 9, 9], "text": "twice"}] * 2
    samples[5]["caption"] = "zero\u200bwidth <b>bold</b> from www.example.org "
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "p6.png", tmp_path / "sub" / "p6.jpg")
    samples[6]["image"] = "sub/p6.jpg"
    samples[7]["image"] = str(tmp_path / "p7.png")
    write_lines(tmp_path / "set" / "regions.jsonl", [{**s, "image": f"../{s['image']}"} for s in samples[:1]])
    write_lines(tmp_path / "regions.jsonl", samples)
    found = {n["kind"]: n for n in inspect_data(tmp_path / "regions.jsonl", progress=False).statistics["notices"]}
    expected = {
        "an id that another sample of its file has": "s0 (line 2)",
        "a picture that another sample names": "s3 (line 4)",
        "a region stands in the sample twice, with the same box and text": "s4 (line 5)",
        "a text holds characters that no one can see (controls, zero-width, directions of writing)": "s5 (line 6)",
        "a text holds HTML tags or entities": "s5 (line 6)",
        "a text holds a web address": "s5 (line 6)",
        "a text begins or ends with a space": "s5 (line 6)",
        "the name ends in .jpg, but the picture is PNG": "s6 (line 7)",
        "the path of the picture is absolute: the folder cannot be moved": "s7 (line 8)",
    }
    assert {kind: notice["examples"][0]["sample"] for kind, notice in found.items()} == expected
    assert all(notice["count"] == 1 for notice in found.values())
    elsewhere = inspect_data(tmp_path / "set", progress=False).statistics["notices"]
    assert [notice["kind"] for notice in elsewhere] == ["the path of the picture leaves the folder of the file"]


def test_ids_are_compared_across_files_of_one_kind(tmp_path: Path) -> None:
    samples = region_samples(tmp_path, 2)
    write_lines(tmp_path / "a.jsonl", samples)
    write_lines(tmp_path / "b.jsonl", samples[1:])
    write_lines(tmp_path / "c.jsonl", [talk("s0", "p0.png")])
    found = inspect_data(tmp_path, progress=False)
    assert found.statistics["notices"][0]["kind"] == "an id that a sample of the same kind in another file has"
    assert found.statistics["notices"][0]["count"] == 1
    assert found.faults.faults == []


def test_duplicates_are_grouped(tmp_path: Path) -> None:
    samples = region_samples(tmp_path, 6)
    picture = smooth_picture(2)
    picture.resize((128, 96), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    picture.save(tmp_path / "again.jpg", quality=80)
    shutil.copy(tmp_path / "p4.png", tmp_path / "copy.png")
    for k, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"flat{k}.png")
    names = ["large.png", "again.jpg", "copy.png", "flat0.png", "flat1.png"]
    more = [{"id": name, "image": name, "caption": f"c {name}", "regions": []} for name in names]
    write_lines(tmp_path / "regions.jsonl", [*samples, *more])
    found = inspect_data(tmp_path, progress=False).statistics["duplicates"]
    (exact,) = found["exact"]["listed"]
    assert [picture["sample"] for picture in exact["pictures"]] == ["s4 (line 5)", "copy.png (line 9)"]
    (near,) = found["near"]["listed"]
    assert [p["sample"] for p in near["pictures"]] == ["s2 (line 3)", "large.png (line 7)", "again.jpg (line 8)"]
    assert (found["exact"]["surplus"], found["near"]["surplus"], found["compared"]) == (1, 2, 8)


def test_boxes_scores_and_texts_are_counted_exactly(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), "white").save(tmp_path / "a.png")
    boxes = [[0, 0, 31, 32], [0, 0, 32, 32], [0, 0, 96, 96], [0, 0, 400, 300], [0, 0, 401, 300]]
    scores = [0.0, 1.0, 0.97, -0.5, None]
    regions = [
        {"box": b, "text": t, "score": s}
        for b, t, s in zip(boxes, ["A dog", "a  DOG", "cat", "big cat", "x"], scores, strict=True)
    ]
    for region in regions:
        if region["score"] is None:
            del region["score"]
    sample = {"image": "a.png", "caption": "one", "captions": ["one", "two three"], "regions": regions}
    write_lines(tmp_path / "regions.jsonl", [sample])
    found = inspect_data(tmp_path, tokenizer=tiny_tokenizer(), limit=4, progress=False).statistics
    regions = found["regions"]
    assert regions["coco_sizes"] == {"small": 1, "medium": 1, "large": 2}
    assert (regions["boxes_measured"], regions["boxes_unmeasured"]) == (4, 1)
    shares = [(part["from"], part["count"]) for part in regions["share_of_picture"] if part["count"]]
    assert shares == [(0.003, 2), (0.03, 1), (0.95, 1)]
    assert sum(part["count"] for part in regions["width_by_height"]) == 4
    assert regions["scores"]["count"] == 4
    assert regions["scores"]["outside_0_to_1"] == 1
    assert regions["scores"]["histogram"] == [1, *[0] * 18, 2]
    assert regions["share_unique"] == 2 / 5  # "big cat" and "x": both dogs say the same, and "cat" fits two
    texts = found["texts"]["region texts"]
    assert (texts["count"], texts["distinct"]) == (5, 4)
    assert texts["top"] == [{"text": "a dog", "count": 2}]
    assert found["texts"]["captions"]["words"]["histogram"] == {"1": 1, "2": 1}
    lengths = token_counts(tiny_tokenizer(), ["A dog", "a  DOG", "cat", "big cat", "x"])
    assert texts["over_limit"] == sum(length > 4 for length in lengths)
    assert texts["tokens"]["histogram"] == {str(k): n for k, n in sorted(Counter(lengths).items())}
    assert found["samples_without_id"] == 1


def test_conversations_are_counted_in_turns_and_forms(tmp_path: Path) -> None:
    region_samples(tmp_path, 2)
    question = {"id": "q", "image": "p0.png", "answer": "yes", "box": [1, 2, 9, 9], "task": "vqa"}
    question["messages"] = talk("", "p0.png")["messages"][:1]
    point = talk("p", "p1.png")
    point["messages"][0]["content"][2] = {"type": "region", "point": [4, 5]}
    write_lines(tmp_path / "talks.jsonl", [talk("a", "p0.png"), point, question])
    found = inspect_data(tmp_path, progress=False)
    assert found.faults.faults == []
    statistics = found.statistics
    assert statistics["kinds"] == {"conversation": 2, "question": 1}
    assert statistics["turns_per_conversation"]["histogram"] == {"1": 1, "2": 2}
    forms = {"box, asked about": 2, "box, to be found": 2, "point, asked about": 1, "box, truth": 1}
    assert statistics["regions"]["forms"] == forms
    assert statistics["texts"]["user's turns"]["top"] == [{"text": "what is this?<region>", "count": 3}]
    assert statistics["texts"]["answers"]["count"] == 1
    assert statistics["tasks"] == {"vqa": 1}


def test_the_command_line(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    words = ["data", "stats", str(sound / "regions.jsonl")]
    assert main([*words, "--tokenizer", str(tmp_path / "tok"), "--limit-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "samples             300 in 1 files: 300 region-text" in out
    assert "too long          300 have more than 3 tokens" in out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regions"]["boxes_measured"] == 300
    for wrong, message in (
        (["--distance", "16"], "cannot be searched for"),
        (["--limit-tokens", "0"], "a limit of 0 tokens"),
        (["--tokenizer", str(sound)], "holds no tokenizer"),
        (["--html", str(sound)], "is a folder"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("a cat", {"latin"}),
        ("12 + 3 = ?", set()),
        ("кошка cat", {"cyrillic", "latin"}),
        ("猫がいる", {"cjk", "hiragana"}),
        ("قطة", {"arabic"}),
        ("고양이", {"hangul"}),
        ("1º \U0001f408", {"latin"}),
        ("Ａ", {"latin"}),
    ],
)
def test_scripts(text: str, scripts: set[str]) -> None:
    assert scripts_of(text) == scripts


@pytest.mark.parametrize(
    ("text", "flaws"),
    [
        ("a cat\nand a dog", []),
        ("\u0635\u200c\u0635 \U0001f468\u200d\U0001f469", []),
        ("where is <region>?", []),
        ("5 < 6 & 7 > 6", []),
        ("bell \x07", ["control characters"]),
        ("left\u202eright", ["control characters"]),
        ("caf\ufffd", ["replacement characters"]),
        (" a", ["surrounding spaces"]),
        ("a &quot;cat&#39;", ["markup"]),
        ("</p>", ["markup"]),
        ("see https://x.org", ["web address"]),
    ],
)
def test_flaws(text: str, flaws: list[str]) -> None:
    assert flaws_of(text) == flaws


@given(st.lists(st.text(max_size=12), max_size=30), st.integers(0, 30))
def test_tallies_of_texts_add_up(texts: list[str], cut: int) -> None:
    whole, first, second = TextTally(), TextTally(), TextTally()
    for k, text in enumerate(texts):
        whole.add(text, k)
        (first if k < cut else second).add(text, k)
    first.merge(second)
    assert first == whole
    said = [normalized(text) for text in texts if text.strip()]
    assert whole.distinct() == len(set(said))
    counts = [(number, sample) for _, number, sample in whole.most_frequent(5)]
    assert [number for number, _ in counts] == [number for _, number in Counter(said).most_common(5)]
    assert all(said.count(normalized(texts[sample])) == number for number, sample in counts)


@given(st.lists(st.integers(0, 200), min_size=1), st.integers(0, 200))
def test_summaries_of_histograms_are_those_of_the_numbers(values: list[int], limit: int) -> None:
    found = histogram_summary(Counter(values))
    assert (found["count"], found["min"], found["max"]) == (len(values), min(values), max(values))
    assert found["mean"] == pytest.approx(np.mean(values), abs=0.006)
    for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert found[name] == np.quantile(values, share, method="inverted_cdf")
    assert over(Counter(values), limit) == sum(value > limit for value in values)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 99), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=8,
)


@given(st.booleans(), st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4))
@settings(deadline=None, max_examples=150)
def test_any_sample_can_be_counted(talks: bool, changes: dict[str, Any]) -> None:
    base = talk("a", "none.png") if talks else {"image": "none.png", "caption": "a", "regions": []}
    view = SampleView.of({**base, **changes}, None)
    sizes = PictureSizes(hashes=True)
    looked_up = [sizes(image, None) for image in view.images]
    problems_of(view, looked_up)
    whole, tally = Tally(), Tally()
    tally.add(view, [(50, 40)] * len(looked_up), Place(0, None, "a"), TallyOptions())
    whole.merge(tally)
    assert whole == tally
    assert sum(tally.kinds.values()) == 1
    json.dumps([notice.examples for notice in tally.notices.values()])


def test_faults_that_differ_in_names_and_numbers_are_of_one_kind() -> None:
    one, other = "region 3's box [1, 2, 3.5, -4] has no area", "region 12's box [0, 0, 0, 0] has no area"
    assert fault_kind(one) == fault_kind(other)
    assert fault_kind("image 'a/b.png' does not exist") == fault_kind('image "it\'s.png" does not exist')
    assert fault_kind(one) != fault_kind("region 3's box [1, 2, 3, 4] has x2 < x1")


def test_nothing_to_describe(tmp_path: Path) -> None:
    with pytest.raises(ClocError, match="no such file"):
        inspect_data(tmp_path / "none")
    (tmp_path / "empty.jsonl").touch()
    found = inspect_data(tmp_path, progress=False)
    assert [fault.problem for fault in found.faults.faults] == ["the file holds no samples"]
    assert found.statistics["pictures"]["count"] == 0
