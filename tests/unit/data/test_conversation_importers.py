"""The importers of conversations, on small files exactly as published: every sample counted, every box in pixels."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.apps.cli import main
from cloc_mllm.data.dataset import ConversationDataset
from cloc_mllm.data.importers import conversations
from cloc_mllm.data.importers.ferret import convert_ferret
from cloc_mllm.data.importers.llava import FILES, convert_llava, from_padded_square
from cloc_mllm.data.importers.ms_swift import convert_ms_swift
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.readers import open_samples
from cloc_mllm.data.writers import open_writer
from cloc_mllm.errors import ClocError
from cloc_mllm.models.region_shapes import read_mask
from tests.builders import noise_image, png_bomb

Sample = dict[str, Any]
CONVERTERS = {"llava": convert_llava, "ferret": convert_ferret, "ms-swift": convert_ms_swift}


CORNER = {"size": [30, 40], "counts": [0, 5, 25, 5, 1165]}
"""The run-length code of a mask of 40 x 30 pixels: the upper five of its first two columns."""


def turns(*texts: str) -> list[Sample]:
    """LLaVA's turns, the human's first."""
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def llava_samples() -> list[Sample]:
    """One sample of each sort that blip_laion_cc_sbu_558k and llava_v1_5_mix665k hold."""
    refer = "Please provide a short description for this region: [0.25, 0.25, 0.5, 0.75]."
    find = "Please provide the bounding box coordinate of the region this sentence describes: guy on left."
    return [
        {"id": "004539375", "image": "a.png", "conversations": turns("Render a clear summary.\n<image>", "a tent")},
        {"id": 33471, "image": "coco/b.png", "conversations": turns("<image>\nWhat is it?", "A bus.", "Red?", "No")},
        {"id": "wgByO4Y_0", "model": "", "conversations": turns("Sum [0, 1, 0, 1].", "Two.")},
        {"id": "7", "image": "a.png",
         "conversations": turns(f"<image>\n{refer}", "Man in blue.", find, "[0.0, 0.3, 0.1, 0.5]")},
        {"id": "8", "conversations": [{"from": "gpt", "value": "Hello."}, *turns("Hi?", "Hm.", "And?")]},
    ]  # fmt: skip


def ferret_samples() -> list[Sample]:
    """Samples as those of Ferret-UI's sample_data and of Ferret's loaders."""
    size = {"image_h": 30, "image_w": 40}
    ask, answer = "<image>\nWhat is <bbox_location0> beside <bbox_location1>?", "A dog <bbox_location0>."
    return [
        {"id": 0, "image": "a.png", **size, "conversations": turns(ask, answer), "location_instruction": True,
         "box_x1y1x2y2": [[[4, 5, 20, 22], [1.5, 2, 9, 30]], [[3, 3, 40.5, 9]]], "masks": [[CORNER, None], [CORNER]]},
        {"id": 1, "image": "a.png", **size, "conversations": turns("<image>\nWhat is <bbox_location0>?", "Button"),
         "box_x1y1x2y2": [[[4, 5, 20, 22]], []]},
        {"id": "2", "image": "coco/b.png", "conversations": turns("<image>\nWell?", "Yes.")},
    ]  # fmt: skip


def swift_samples() -> list[Sample]:
    """The three samples of ms-swift's page, with our pictures, and one of each further kind."""
    system = {"role": "system", "content": "You are a helpful assistant."}

    def said(user: str, assistant: str) -> list[Sample]:
        return [system, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

    dogs = {"ref": ["a dog", "a woman"], "bbox": [[3.5, 7.4, 18.5, 25.8], [26.5, 6.8, 39.5, 27.4]]}
    sheep = {"ref": ["sheep"], "bbox": [[0.1, 0.2, 0.5, 0.5], [0.6, 0.5, 0.9, 1]], "bbox_type": "norm1"}
    two = {"ref": [], "bbox": [[1, 2, 10, 12], [30, 10], [20, 20, 50, 60]], "bbox_type": "real", "image_id": [0, 0, 1]}
    return [
        {"messages": said("<image>Describe it.", "<ref-object><bbox> and <ref-object><bbox> are playing."),
         "images": ["a.png"], "objects": dogs},
        {"messages": said("<image>Find the <ref-object> in the image", "<bbox><bbox>"), "images": ["a.png"],
         "objects": json.dumps(sheep)},
        {"messages": said("<image><image>What is at <bbox>, <bbox>?", "This: <bbox>"),
         "images": ["a.png", "coco/b.png"], "objects": two},
        {"messages": said("Where is the capital of Zhejiang?", "In Hangzhou.")},
    ]  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    noise_image(40, 30).save(folder / "a.png")
    noise_image(60, 90).save(folder / "coco" / "b.png")
    return folder


def convert(
    kind: str, samples: list[Any], pictures: Path, out: str = "out", suffix: str = ".json", **options: Any
) -> tuple[dict[str, int], list[Sample]]:
    """Counts, and the samples as training would read them."""
    source = pictures.parent / f"source{suffix}"
    lines = suffix == ".jsonl"
    source.write_text("\n".join(map(json.dumps, samples)) if lines else json.dumps(samples, indent=1))
    result = CONVERTERS[kind](source, pictures, pictures.parent / out, **options)  # type: ignore[operator]
    stated = json.loads((pictures.parent / out / "dataset.json").read_text())
    assert stated == result
    assert stated["frame"]
    assert stated["source"].startswith("https://")
    counts = result["counts"]
    assert counts["samples_read"] == counts["samples_written"] + counts["samples_skipped"] == len(samples)
    read = ConversationDataset(pictures.parent / out)
    assert len(read) == counts["samples_written"]
    return counts, [read[k] for k in range(len(read))]


def shown(item: Sample) -> list[Any]:
    """A conversation as texts, "IMAGE", and regions without their type."""
    parts: list[Any] = []
    for message in item["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            rest = {key: value for key, value in part.items() if key != "type"}
            parts.append({"text": part.get("text"), "image": "IMAGE", "region": rest}[kind])
    return parts


def test_llava_as_published(pictures: Path) -> None:
    counts, items = convert("llava", llava_samples(), pictures)
    assert [shown(item) for item in items][:3] == [
        ["Render a clear summary.", "IMAGE", "a tent"],
        ["IMAGE", "What is it?", "A bus.", "Red?", "No"],
        ["Sum [0, 1, 0, 1].", "Two."],
    ]
    assert "[0.0, 0.3, 0.1, 0.5]" in shown(items[3])
    assert shown(items[4]) == ["Hi?", "Hm."]
    assert [item["id"] for item in items] == ["004539375", "33471", "wgByO4Y_0", "7", "8"]
    wanted = {"text_only": 2, "images": 3, "boxes_left_in_text": 2, "model_key_dropped": 1}
    wanted |= {"leading_answers_left_out": 1, "trailing_questions_left_out": 1, "regions_shown": 0}
    assert {name: counts[name] for name in wanted} == wanted


def test_llavas_boxes_become_regions_in_pixels(pictures: Path) -> None:
    counts, items = convert("llava", llava_samples(), pictures, boxes="regions", suffix=".jsonl")
    # 40 x 30 lies in a square of 40 with 5 rows above it: y pixels are share * 40 - 5.
    assert shown(items[3]) == [
        "IMAGE",
        "Please provide a short description for this region: ",
        {"box": [10.0, 5.0, 20.0, 25.0]},
        ".",
        "Man in blue.",
        "Please provide the bounding box coordinate of the region this sentence describes: guy on left.",
        {"box": [0.0, 7.0, 4.0, 15.0], "phrase": "guy on left"},
    ]
    assert shown(items[2])[0] == "Sum [0, 1, 0, 1]."
    assert (counts["regions_shown"], counts["regions_to_be_found"], counts["boxes_clipped"]) == (1, 1, 0)


@given(
    st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_unpadding_undoes_llavas_padding(size: tuple[int, int], shares: list[float]) -> None:
    (width, height), side = size, max(size)
    x1, x2 = sorted(shares[:2])
    y1, y2 = sorted(shares[2:])
    box = [x1 * width, y1 * height, x2 * width, y2 * height]
    # expand2square pastes the picture at half of what is missing, rounded down.
    left, top = (0, (width - height) // 2) if width > height else ((height - width) // 2, 0)
    padded = [(value + (left, top)[k % 2]) / side for k, value in enumerate(box)]
    if padded[0] == padded[2] or padded[1] == padded[3]:
        return
    assert from_padded_square(padded, size, Counter()) == pytest.approx(box, abs=2e-3)


def test_a_box_that_rounding_has_flattened_keeps_an_area() -> None:
    counts: Counter[str] = Counter()
    box = from_padded_square([0.5, 0.2, 0.5, 0.4], (100, 100), counts)
    assert box == [49.5, 20.0, 50.5, 40.0]
    assert counts == {"boxes_widened": 1, "boxes_clipped": 0}
    from_padded_square([0.0, 0.2, 0.1, 0.4], (100, 50), counts)
    assert counts == {"boxes_widened": 1, "boxes_clipped": 1}


def test_ferret_as_published(pictures: Path) -> None:
    counts, items = convert("ferret", ferret_samples(), pictures)
    assert shown(items[0])[:5] == ["IMAGE", "What is ", {"mask": CORNER}, " beside ", {"box": [1.5, 2.0, 9.0, 30.0]}]
    assert (counts["masks_carried"], counts["masks_left_out"]) == (1, 1)
    assert read_mask(shown(items[0])[2]["mask"], 40, 30).sum() == 10
    counts, items = convert("ferret", ferret_samples(), pictures, "boxes", shape="box")
    assert shown(items[0]) == [
        "IMAGE", "What is ", {"box": [4.0, 5.0, 20.0, 22.0]}, " beside ", {"box": [1.5, 2.0, 9.0, 30.0]}, "?",
        "A dog ", {"box": [3.0, 3.0, 40.0, 9.0]}, ".",
    ]  # fmt: skip
    assert shown(items[2]) == ["IMAGE", "Well?", "Yes."]
    assert (counts["boxes_clipped"], counts["masks_left_out"], counts["regions_shown"]) == (1, 2, 3)


def test_ms_swift_as_published(pictures: Path) -> None:
    counts, items = convert("ms-swift", swift_samples(), pictures, suffix=".jsonl")
    assert shown(items[0])[2:] == [
        "Describe it.", "a dog", {"box": [3.5, 7.4, 18.5, 25.8], "phrase": "a dog"}, " and a woman",
        {"box": [26.5, 6.8, 39.5, 27.4], "phrase": "a woman"}, " are playing.",
    ]  # fmt: skip
    found = [{"box": box, "phrase": "sheep"} for box in ([4.0, 6.0, 20.0, 15.0], [24.0, 15.0, 36.0, 30.0])]
    assert shown(items[1])[2:] == ["Find the sheep in the image", *found]
    assert shown(items[2])[1:] == [
        "IMAGE", "IMAGE", "What is at ", {"box": [1.0, 2.0, 10.0, 12.0], "image": 0}, ", ",
        {"point": [30.0, 10.0], "image": 0}, "?", "This: ", {"box": [20.0, 20.0, 50.0, 60.0], "image": 1},
    ]  # fmt: skip
    assert (counts["text_only"], counts["regions_shown"], counts["regions_to_be_found"]) == (1, 2, 5)


BROKEN: list[tuple[str, Sample, str]] = [
    ("llava", {"image": "a.png", "conversations": turns("Hm?", "No.")}, "wrong number of <image>"),
    ("llava", {"image": "lost.png", "conversations": turns("<image>\nHm?", "No.")}, "the image does not exist"),
    ("llava", {"conversations": turns("Hm?", " ")}, "empty text|is blank"),
    ("llava", {"conversations": turns("Hm?", "No."), "video": "a.mp4"}, "unknown key 'video'"),
    ("llava", {"conversations": turns("What is <ground>?", "No.")}, "holds '<ground>'"),
    ("ferret", {"image_w": 41}, "41 x 30 pixels, but the picture has 40 x 30"),
    ("ferret", {"masks": [], "box_x1y1x2y2": [[[4, 5, 20, 22]], []]}, "turn 0 has <bbox_location1>, but 1 boxes"),
    ("ferret", {"masks": [], "box_x1y1x2y2": [[[1, 1, 2, 2]] * 3, [[1, 1, 2, 2]]]}, "box 2 of turn 0 stands nowhere"),
    ("ferret", {"box_x1y1x2y2": [[[1, 1, 2, 2]] * 2, [[50, 1, 60, 2]]]}, "has no area"),
    ("ferret", {"box_x1y1x2y2": [[], [], []]}, "lists for 3 turns, but the conversation has 2"),
    ("ferret", {"masks": [[CORNER]]}, "turn 0 has 1 masks, but 2 boxes"),
    ("ferret", {"masks": {"size": [30, 40]}}, "'masks' is not a list with a list for each turn"),
    ("ferret", {"masks": [[{"size": [3, 4], "counts": [0, 12]}] * 2]}, "the mask is 4 x 3 pixels, but its image is 40"),
    ("ferret", {"masks": [[{"size": [30, 40], "counts": "?"}] * 2]}, "the runs of the mask hold 15 pixels"),
    ("ms-swift", {"objects": {"ref": [], "bbox": []}}, "<ref-object> for which nothing is left"),
    ("ms-swift", {"objects": {"ref": ["a", "b", "c"], "bbox": [[1, 1, 2, 2]] * 2}}, "more entries than <ref-object>"),
    ("ms-swift", {"objects": {"ref": ["a", "b"], "bbox": [[1, 1], [2, 2]]}}, "the assistant's and holds a point"),
    ("ms-swift", {"objects": {"bbox": [[1, 1, 2, 2]], "bbox_type": "norm1000"}}, "bbox_type is 'norm1000'"),
    ("ms-swift", {"objects": {"bbox": [[1, 1, 2, 2]], "bbox_type": "norm1"}}, "goes beyond 0 to 1"),
    ("ms-swift", {"objects": {"bbox": [[1, 1, 2, 2]], "image_id": [1]}}, "on image 1, but the sample has 1 images"),
    ("ms-swift", {"images": ["a.png", "a.png"]}, "more entries than <image>"),
    ("ms-swift", {"videos": ["a.mp4"]}, "unknown key 'videos'"),
    ("ms-swift", {"messages": [{"role": "tool_call", "content": "{}"}]}, "more entries|has the role"),
]


@pytest.mark.parametrize(("kind", "change", "problem"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_bad_sample_is_named_or_counted(kind: str, change: Sample, problem: str, pictures: Path) -> None:
    good = {"llava": {"id": "x"}, "ferret": ferret_samples()[0], "ms-swift": swift_samples()[0]}[kind]
    samples = [swift_samples()[3] if kind == "ms-swift" else ferret_samples()[2], {**good, **change, "id": "culprit"}]
    with pytest.raises(ClocError, match=problem) as caught:
        convert(kind, samples, pictures)
    assert caught.value.sample is not None
    assert caught.value.sample.startswith("culprit (entry 1)")
    assert caught.value.file.endswith("source.json")
    assert not (pictures.parent / "out" / "conversations.jsonl").exists()
    counts, items = convert(kind, samples, pictures, on_bad_sample="skip")
    assert (counts["samples_skipped"], len(items)) == (1, 1)
    assert "culprit (entry 1)" in (pictures.parent / "out" / "skipped.txt").read_text()
    # What a skipped sample had done before it was found out is not counted.
    assert counts.get("boxes_clipped", 0) == counts.get("masks_left_out", 0) == 0


def test_several_images_leave_open_which_one_a_box_is_on(pictures: Path) -> None:
    sample = {"image": ["a.png", "a.png"], "conversations": turns("<image><image>\nAt [0.1, 0.1, 0.2, 0.2]?", "No")}
    with pytest.raises(ClocError, match="several images"):
        convert("llava", [sample], pictures, boxes="regions")
    assert convert("llava", [sample], pictures)[0]["boxes_left_in_text"] == 1


@pytest.mark.parametrize("kind", list(CONVERTERS))
def test_parquet_holds_the_same_and_is_read_again(kind: str, pictures: Path) -> None:
    samples = {"llava": llava_samples(), "ferret": ferret_samples(), "ms-swift": swift_samples()}[kind]
    _, lines = convert(kind, samples, pictures)
    _, table = convert(kind, samples, pictures, "parquet", file_format="parquet")
    assert list(map(shown, table)) == list(map(shown, lines))
    for theirs, ours in zip(table, lines, strict=True):
        for one, two in zip(theirs["messages"], ours["messages"], strict=True):
            if not isinstance(one["content"], str):
                pairs = zip(one["content"], two["content"], strict=True)
                assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in pairs if a["type"] == "image")
    assert not check_data(pictures.parent / "parquet").faults


def test_llava_from_parquet_with_pictures_inside(pictures: Path) -> None:
    """As the hub hosts LLaVA's later mixtures: images as bytes, conversations as structs."""
    from datasets import Dataset

    rows = [
        {"id": "1", "image": {"bytes": (pictures / "a.png").read_bytes(), "path": None},
         "conversations": turns("<image>\nHm?", "No.")},
        {"id": "2", "image": None, "conversations": turns("Hm?", "No.")},
    ]  # fmt: skip
    source = pictures.parent / "source.parquet"
    Dataset.from_list(rows).to_parquet(source)
    result = convert_llava(source, pictures, pictures.parent / "out", file_format="parquet")
    assert result["counts"]["samples_written"] == 2
    read = ConversationDataset(pictures.parent / "out")
    assert shown(read[0]) == ["IMAGE", "Hm?", "No."]
    with pytest.raises(ClocError, match="Write Parquet instead"):
        convert_llava(source, pictures, pictures.parent / "lines")


def test_messages_with_regions_survive_both_formats(pictures: Path) -> None:
    """What the writers write of the messages format, the readers read, regions and bytes included."""
    picture = (pictures / "a.png").read_bytes()
    region = {"type": "region", "box": [1, 2, 30.5, 20], "image": 1}
    question = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is "}, region]
    answer = [{"type": "text", "text": "a dog "}, {"type": "region", "box": [1, 2, 3, 4], "phrase": "a dog"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for file_format, images in (("jsonl", ["a.png", "coco/b.png"]), ("parquet", [picture, picture])):
        out = pictures if file_format == "jsonl" else pictures.parent / "table"
        with open_writer(out, file_format, "conversations") as writer:
            writer.write({"id": "1", "images": images, "messages": messages}, pictures)
        raw = open_samples(out, "conversations.jsonl")[0]
        assert len(raw["images"]) == 2
        assert shown(ConversationDataset(out)[0]) == [
            "IMAGE", "IMAGE", "What is ", {"box": [1, 2, 30.5, 20], "image": 1},
            "a dog ", {"box": [1, 2, 3, 4], "phrase": "a dog"},
        ]  # fmt: skip


def test_the_command(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = pictures.parent / "mix.json", pictures.parent / "out"
    source.write_text(json.dumps(llava_samples()))
    words = ["data", "convert", "llava", source, "--images", pictures, "--boxes", "regions", "--out", out]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "samples written                      5" in printed
    source.write_text('{"not": "a list"}')
    assert main([str(word) for word in words]) == 2
    assert "is not a list" in capsys.readouterr().err
    assert main(["data", "convert", "ferret", str(pictures), "--images", ".", "--out", str(out)]) == 2
    assert "cannot tell what" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(FILES))
def test_known_files_are_told_by_name_and_counted(name: str, pictures: Path) -> None:
    """ShareGPT4V's files have LLaVA's keys, with pictures of further folders."""
    page, licence, samples = FILES[name]
    captioned = {"id": "sa_1", "image": "coco/b.png", "conversations": turns("<image>\nDescribe it.", "A bus.")}
    source = pictures.parent / f"{name}.json"
    source.write_text(json.dumps([captioned, *llava_samples()]))
    with pytest.warns(
        UserWarning, match=f"{name}.json is not the whole of llava: samples read: 6 instead of {samples:,}"
    ):
        result = convert_llava(source, pictures, pictures.parent / "out")
    assert (result["source"], result["licence"], result["expected"]) == (page, licence, {"samples_read": samples})
    assert result["counts"]["samples_written"] == 6


def test_a_line_that_cannot_be_read_is_one_sample(pictures: Path) -> None:
    source = pictures.parent / "source.jsonl"
    good = [json.dumps(sample) for sample in llava_samples()[:2]]
    source.write_text("\n".join([good[0], good[1][:-20], good[1]]))
    with pytest.raises(ClocError, match=r"source\.jsonl: sample 'line 2': not valid JSON"):
        convert_llava(source, pictures, pictures.parent / "out")
    counts = convert_llava(source, pictures, pictures.parent / "out", on_bad_sample="skip")["counts"]
    assert (counts["samples_read"], counts["samples_written"], counts["samples_skipped"]) == (3, 2, 1)
    assert "line 2" in (pictures.parent / "out" / "skipped.txt").read_text()


def many(pictures: Path, count: int = 11) -> list[Sample]:
    """Samples with something to count in each, of which two are bad."""
    samples = [{**llava_samples()[k % 5], "id": str(k)} for k in range(count)]
    return [{**sample, "image": "lost.png"} if k in (3, 6) else sample for k, sample in enumerate(samples)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_workers_and_stops_change_nothing(
    file_format: str, suffix: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = pictures.parent / f"source{suffix}", pictures.parent
    texts = [json.dumps(sample) for sample in many(pictures)]
    source.write_text("\n".join(texts) if suffix == ".jsonl" else f"[{','.join(texts)}]")
    options: dict[str, Any] = {"file_format": file_format, "on_bad_sample": "skip", "shard": 2, "boxes": "regions"}
    whole = convert_llava(source, pictures, folder / "a", **options)
    assert (whole["counts"]["samples_read"], whole["counts"]["samples_skipped"]) == (11, 2)
    lines = (folder / "a" / "skipped.txt").read_text().splitlines()
    assert ["'3 (" in lines[0], "'6 (" in lines[1], len(lines)] == [True, True, 2]
    convert_llava(source, pictures, folder / "b", workers=2, **options)
    assert contents(folder / "b") == contents(folder / "a")
    real, done = conversations._write_shard, []

    def stops(*args: Any) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(conversations, "_write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            convert_llava(source, pictures, folder / "c", **options)
    monkeypatch.setattr(conversations, "_write_shard", lambda *args: (done.append(args), real(*args)))
    monkeypatch.setattr(conversations, "stream_items", lambda _: pytest.fail("the list was read again"))
    convert_llava(source, pictures, folder / "c", **options)
    assert len(done) == 6
    assert contents(folder / "c") == contents(folder / "a")


def test_shards_change_nothing_in_json_lines_and_never_stay_from_another_run(pictures: Path) -> None:
    source, folder = pictures.parent / "source.json", pictures.parent
    source.write_text(json.dumps(many(pictures)))
    for shard in (3, 4096):
        convert_llava(source, pictures, folder / f"of-{shard}", on_bad_sample="skip", shard=shard)
    assert contents(folder / "of-3") == contents(folder / "of-4096")
    with pytest.raises(ClocError, match=r"lost\.png"):
        convert_llava(source, pictures, folder / "table", file_format="parquet", shard=1)
    assert (folder / "table" / "conversations-00002.parquet").exists()
    options: dict[str, Any] = {"file_format": "parquet", "on_bad_sample": "skip"}
    convert_llava(source, pictures, folder / "table", shard=10, **options)
    assert len(ConversationDataset(folder / "table")) == 9
    with pytest.raises(ClocError, match="the folder holds samples already"):
        convert_llava(source, pictures, folder / "table", shard=3, **options)
    with pytest.raises(ClocError, match="shard is 0"):
        convert_llava(source, pictures, folder / "none", shard=0)


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (b"<!DOCTYPE html><title>not found</title>", "x.jpg", "x.jpg: the image cannot be read: cannot identify"),
        (png_bomb(50_000), "x.jpg", r"x.jpg: the image cannot be read: Image size \(2500000000 pixels\) exceeds limit"),
        (b"", "x.jpg", "x.jpg: the image cannot be read"),
        (b"", "../secret.jpg", "the name of a picture leads out of --images"),
        (b"", "/etc/secret.jpg", "the name of a picture leads out of --images"),
        (b"", "https://host/x.jpg", "names no image file"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_pictures_that_are_none(content: bytes, name: str, problem: str, pictures: Path) -> None:
    (pictures / "x.jpg").write_bytes(content)
    bad = {"id": "culprit", "image": name, "conversations": turns("<image>\nHm?", "No.")}
    samples = [llava_samples()[0], bad, llava_samples()[1]]
    with pytest.raises(ClocError, match=problem) as caught:
        convert("llava", samples, pictures)
    assert caught.value.sample == "culprit (entry 1)"
    assert caught.value.remedy
    counts, _ = convert("llava", samples, pictures, on_bad_sample="skip")
    assert (counts["samples_written"], counts["samples_skipped"]) == (2, 1)


def test_texts_in_any_script_go_through_and_control_characters_do_not(pictures: Path) -> None:
    said = "\x00猫と犬 \u202eقط \ud83d кот \U0001f408\x7f"
    samples = [{"id": "1", "conversations": turns("Hm?\n\tWell?", said)}]
    counts, items = convert("llava", samples, pictures)
    assert shown(items[0]) == ["Hm?\n\tWell?", "猫と犬 \u202eقط кот \U0001f408"]
    assert counts["texts_cleaned"] == 1
    (pictures.parent / "raw.jsonl").write_text(json.dumps(samples[0]))
    with pytest.raises(ClocError, match=r"raw\.jsonl: sample '1 \(line 1\)': .* holds the control character U\+0000"):
        ConversationDataset(pictures.parent / "raw.jsonl")[0]
