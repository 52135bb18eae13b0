"""Data sets: the same items after a resume, in any order and worker; broken samples named, or skipped and counted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from cloc_mllm.data.collate import ConversationCollator
from cloc_mllm.data.dataset import ConversationDataset, RegionTextDataset, unique_regions
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.scenes.generator import generate_scenes
from cloc_mllm.errors import ClocError
from tests.builders import noise_image
from tests.builders_mllm import tiny_mllm


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    generate_scenes(out, "full", n=12, seed=0, n_val=2, n_test=2)
    return out


def write(folder: Path, samples: list[dict[str, Any]]) -> Path:
    noise_image().save(folder / "whole.png")
    (folder / "cut.jpg").write_bytes((folder / "whole.png").read_bytes()[:200])
    path = folder / "regions.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def sample(identity: str, **changes: Any) -> dict[str, Any]:
    region = {"box": [0, 0, 5, 5], "text": identity}
    return {"id": identity, "image": "whole.png", "caption": f"caption {identity}", "regions": [region], **changes}


def seen(item: dict[str, Any]) -> tuple[str, list[Any]]:
    return item["caption"], item["regions"]


def test_an_item_depends_on_seed_epoch_and_index_only(scenes: Path) -> None:
    first = RegionTextDataset(scenes / "train", max_regions=2, seed=3)
    first.set_epoch(1)
    forwards = [seen(first[k]) for k in range(len(first))]
    second = RegionTextDataset(scenes / "train", max_regions=2, seed=3)
    for k in range(5):
        second[k]
    second.set_epoch(1)
    assert [seen(second[k]) for k in reversed(range(len(second)))] == forwards[::-1]
    second.set_epoch(2)
    assert [seen(second[k]) for k in range(len(second))] != forwards
    other = RegionTextDataset(scenes / "train", max_regions=2, seed=4)
    other.set_epoch(1)
    assert [seen(other[k]) for k in range(len(other))] != forwards


def test_workers_that_live_on_see_the_epoch_change(scenes: Path) -> None:
    dataset = RegionTextDataset(scenes / "train", max_regions=1)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        assert [seen(item) for item in loader] == [seen(dataset[k]) for k in range(len(dataset))]


def test_regions_are_drawn_without_repeats(scenes: Path) -> None:
    everything = RegionTextDataset(scenes / "train", max_regions=None)
    some = RegionTextDataset(scenes / "train", max_regions=3)
    for k in range(len(some)):
        all_regions, drawn = everything[k]["regions"], some[k]["regions"]
        assert len(drawn) == min(3, len(all_regions))
        assert [region for region in all_regions if region in drawn] == drawn
        assert everything[k]["image"].size == (96, 96)
        assert (everything[k]["width"], everything[k]["height"], everything[k]["index"]) == (96, 96, k)


def test_several_captions_are_all_used(tmp_path: Path) -> None:
    path = write(tmp_path, [sample("a", captions=["one", "two", "three"])])
    dataset = RegionTextDataset(path)
    captions = set()
    for epoch in range(30):
        dataset.set_epoch(epoch)
        captions.add(dataset[0]["caption"])
    assert captions == {"one", "two", "three"}


BROKEN = {
    "missing image": (sample("x", image="none.png"), "does not exist"),
    "truncated image": (sample("x", image="cut.jpg"), "cannot be read"),
    "no image": (sample("x", image=None), "names no image"),
    "box outside": (sample("x", regions=[{"box": [0, 0, 50, 5], "text": "a"}]), "outside the image"),
    "box reversed": (sample("x", regions=[{"box": [5, 0, 1, 5], "text": "a"}]), "x2 < x1"),
    "empty text": (sample("x", regions=[{"box": [0, 0, 1, 5], "text": ""}]), "empty text"),
    "unknown key": (sample("x", label="a"), "unknown key 'label'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_stops_with_its_name_or_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    broken, message = BROKEN[name]
    path = write(tmp_path, [sample("a"), broken, sample("c")])
    with pytest.raises(ClocError, match=message) as caught:
        RegionTextDataset(path)[1]
    assert caught.value.file == str(path)
    assert caught.value.sample == "x (line 2)"
    assert caught.value.remedy
    dataset = RegionTextDataset(path, on_bad_sample="skip")
    assert dataset.skipped == 0
    assert [dataset[k]["id"] for k in range(3)] == ["a", "c", "c"]
    assert dataset.skipped == 1


def test_skips_in_workers_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, [sample("a"), BROKEN["missing image"][0], sample("c"), BROKEN["empty text"][0]])
    dataset = RegionTextDataset(path, on_bad_sample="skip")
    items = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert [item["id"] for item in items] == ["a", "c", "c", "a"]
    assert dataset.skipped == 2


def test_if_nothing_is_whole_skipping_ends(tmp_path: Path) -> None:
    path = write(tmp_path, [BROKEN["missing image"][0]] * 3)
    with pytest.raises(ClocError, match="every sample is broken"):
        RegionTextDataset(path, on_bad_sample="skip")[0]


def test_bad_options(tmp_path: Path) -> None:
    path = write(tmp_path, [sample("a")])
    with pytest.raises(ClocError, match="on_bad_sample"):
        RegionTextDataset(path, on_bad_sample="ignore")  # type: ignore[arg-type]
    path.write_text("\n")
    with pytest.raises(ClocError, match="no samples"):
        RegionTextDataset(path)


def test_samples_in_memory_and_pickling() -> None:
    dataset = RegionTextDataset([sample("a", image=noise_image())], seed=1)
    dataset.set_epoch(5)
    copy = pickle.loads(pickle.dumps(dataset))
    assert seen(copy[0]) == seen(dataset[0])
    assert copy[-1]["id"] == "a"
    with pytest.raises(IndexError):
        copy[1]


def test_conversations_hold_their_pictures(scenes: Path) -> None:
    dataset = ConversationDataset(scenes / "train")
    item = dataset[4]
    picture = item["messages"][0]["content"][0]["image"]
    assert picture.size == (96, 96)
    assert item["id"] == "train-0000004"
    assert item["sample"] == "train-0000004 (line 5)"
    question = ConversationDataset(scenes / "test", preferred="questions.jsonl")[0]
    assert question["messages"][-1]["role"] == "user"
    assert question["answer"] in "0123456789"
    assert question["heldout"] is False


def test_conversations_in_llavas_format(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is <region>?"}, {"from": "gpt", "value": "A cat."}]
    talk = {"id": "t", "image": "whole.png", "conversations": turns, "regions": [[0, 0, 9, 9]]}
    path = write(tmp_path, [talk, {**talk, "regions": []}])
    dataset = ConversationDataset(path)
    assert [item["type"] for item in dataset[0]["messages"][0]["content"]] == ["image", "text", "region", "text"]
    with pytest.raises(ClocError, match=r"line 2.*wrong number of <region>"):
        dataset[1]


def test_shapes_of_a_file_reach_the_processor(tmp_path: Path) -> None:
    """Paths of masks start at the file, as those of images do; every form passes the check and can be encoded."""
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.eye(30, 40, dtype=bool)).save(tmp_path / "masks" / "m.png")
    forms: list[dict[str, Any]] = [
        {"mask": "masks/m.png"},
        {"mask": {"size": [30, 40], "counts": [30, 60, 1110]}},
        {"mask": [[1, 1, 9, 1, 9, 9]]},
        {"scribble": [[1, 2], [30, 4]]},
    ]
    talks = [
        {
            "id": f"t{number}",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "whole.png"}, {"type": "region", **form}]},
                {"role": "assistant", "content": "A cat."},
            ],
        }
        for number, form in enumerate([*forms, {"mask": "masks/none.png"}])
    ]
    path = write(tmp_path, talks)
    dataset = ConversationDataset(path)
    _, processor = tiny_mllm()
    batch = ConversationCollator(processor)([dataset[k] for k in range(4)])
    assert batch["region_boxes"].shape == (4, 4)
    assert not batch["region_points"].isnan().any()
    with pytest.raises(ClocError, match=r"line 5.*a mask of message 0: mask '.*none.png' does not exist"):
        dataset[4]
    report = check_data(path, progress=False)
    assert [fault.sample for fault in report.faults] == ["t4 (line 5)"]


bags = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3).map(" ".join)


@given(st.lists(bags, max_size=5))
def test_a_text_is_unique_if_no_other_says_as_much(texts: list[str]) -> None:
    got = unique_regions([{"text": text} for text in texts])
    for k, text in enumerate(texts):
        rivals = [other for j, other in enumerate(texts) if j != k and all(word in other for word in text.split())]
        assert got[k] == (not rivals)


def test_a_file_may_say_itself_what_is_unique() -> None:
    regions = [{"text": "cat", "unique": True}, {"text": "cat"}, {"text": "dog", "unique": False}]
    assert unique_regions(regions) == [True, False, False]
