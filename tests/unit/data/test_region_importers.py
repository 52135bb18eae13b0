"""Importers of region-text data, each on a small set in exactly the official format."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.apps.cli import main
from cloc_mllm.data import writers
from cloc_mllm.data.importers import conversion
from cloc_mllm.data.importers.annotation_index import AnnotationIndex
from cloc_mllm.data.importers.coco import convert_coco
from cloc_mllm.data.importers.conversion import ConvertOptions, convert
from cloc_mllm.data.importers.flickr30k_entities import read_sentence
from cloc_mllm.data.importers.grit import GritSource
from cloc_mllm.data.importers.open_images import OpenImagesSource
from cloc_mllm.data.importers.pictures import picture_size
from cloc_mllm.data.importers.refcoco import RefCocoSource, read_refs
from cloc_mllm.data.importers.visual_genome import VisualGenomeSource
from cloc_mllm.data.inspection.check import check_data
from cloc_mllm.data.readers import open_file, open_samples
from cloc_mllm.errors import ClocError
from tests.builders import noise_image, png_bomb


def picture(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_image(width, height, seed).save(path)
    return path.read_bytes()


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def converted(folder: Path, kind: str, *words: Any, out: str = "out") -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Run the command; return its counts and the samples, which the checker finds no fault with."""
    assert main(["data", "convert", kind, *map(str, words), "--out", str(folder / out)]) == 0
    report = check_data(folder / out)
    assert report.faults == []
    source = open_samples(folder / out)
    assert not (folder / out / ".convert").exists()
    samples = [dict(source[k]) for k in range(len(source))]
    return json.loads((folder / out / "dataset.json").read_text())["counts"], samples


def test_lvis(tmp_path: Path) -> None:
    picture(tmp_path / "train2017" / "000000391895.jpg")
    instances = {
        "images": [
            {
                "id": 391895,
                "width": 40,
                "height": 30,
                "coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg",
                "neg_category_ids": [2],
                "not_exhaustive_category_ids": [],
            }
        ],
        "annotations": [
            {"id": 1, "image_id": 391895, "category_id": 1, "bbox": [1.5, 2.0, 10.25, 5.0], "area": 51.25},
            {"id": 2, "image_id": 391895, "category_id": 2, "bbox": [0.0, 0.0, 40.0, 30.0], "area": 1200.0},
        ],
        "categories": [
            {"id": 1, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)"], "frequency": "r"},
            {"id": 2, "name": "trash_can", "synonyms": ["trash_can", "garbage_can"], "frequency": "c"},
        ],
    }
    file = write(tmp_path / "lvis_v1_other.json", instances)
    counts, samples = converted(tmp_path, "lvis", "--images", tmp_path, "--instances", file)
    assert (counts["images_written"], counts["boxes_written"], counts["categories"]) == (1, 2, 2)
    assert samples[0]["caption"] == "a photo of bow and trash can"
    assert samples[0]["regions"][0] == {"box": [1.5, 2.0, 11.75, 7.0], "text": "bow"}


def test_objects365(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "patch8" / "objects365_v1_00420917.jpg")
    instances = {
        "images": [
            {"id": 420917, "width": 40, "height": 30, "file_name": "images/v1/patch8/objects365_v1_00420917.jpg"}
        ],
        "annotations": [
            {"id": 1, "image_id": 420917, "category_id": 84, "bbox": [30.0, 20.0, 20.0, 5.0], "iscrowd": 0},
            {"id": 2, "image_id": 420917, "category_id": 84, "bbox": [0.0, 0.0, 20.0, 5.0], "iscrowd": 1},
        ],
        "categories": [{"id": 84, "name": "Pot/Pan"}],
    }
    file = write(tmp_path / "made.json", instances)
    counts, samples = converted(tmp_path, "objects365", "--images", tmp_path / "train", "--instances", file)
    assert (counts["boxes_clipped"], counts["boxes_crowd_left_out"]) == (1, 1)
    assert samples[0]["regions"] == [{"box": [30.0, 20.0, 40.0, 25.0], "text": "pot"}]


def test_open_images(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "0001eeaf4aed83f9.jpg")
    heads = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    rows = [
        ["0001eeaf4aed83f9", "xclick", "/m/0cmf2", "1", "0.25", "0.75", "0.5", "1.0", "0", "0", "0", "0", "0"],
        ["0001eeaf4aed83f9", "xclick", "/m/0cmf2", "1", "0", "1", "0", "1", "0", "0", "1", "0", "0"],
        ["0001eeaf4aed83f9", "xclick", "/m/0cmf2", "1", "0", "1", "0", "1", "0", "0", "0", "1", "0"],
    ]
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([heads.split(","), *rows])
    (tmp_path / "classes.csv").write_text("LabelName,DisplayName\n/m/0cmf2,Airplane\n")
    words = ["--images", tmp_path / "images", "--boxes", tmp_path / "boxes.csv", "--classes", tmp_path / "classes.csv"]
    counts, samples = converted(tmp_path, "open-images", *words)
    assert (counts["boxes_crowd_left_out"], counts["boxes_depiction_left_out"], counts["categories"]) == (1, 1, 1)
    assert samples[0]["regions"] == [{"box": [10.0, 15.0, 30.0, 30.0], "text": "airplane"}]
    counts, _ = converted(tmp_path, "open-images", *words, "--depictions", out="more")
    assert counts["boxes_written"] == 2
    (tmp_path / "boxes.csv").write_text((tmp_path / "boxes.csv").read_text() + "0001eeaf4aed83f9,xcl")
    with pytest.raises(ClocError, match=r"'0001eeaf4aed83f9': a line has 2 fields, the first line 13"):
        convert(OpenImagesSource(tmp_path / "boxes.csv", tmp_path / "classes.csv"), ConvertOptions(tmp_path, tmp_path))


def test_visual_genome(tmp_path: Path) -> None:
    picture(tmp_path / "vg" / "VG_100K" / "1.jpg")
    picture(tmp_path / "vg" / "VG_100K_2" / "2.jpg", 30, 40)
    data = [
        {"image_id": 1, "width": 40, "height": 30, "url": "https://x/1.jpg", "coco_id": None, "flickr_id": None},
        {"image_id": 2, "width": 30, "height": 40, "url": "https://x/2.jpg", "coco_id": None, "flickr_id": None},
    ]
    cup, table = (
        {"object_id": k, "x": x, "y": 5, "w": 5, "h": 6, "names": [name]}
        for k, x, name in ((7, 3, "cup"), (8, 20, "table"))
    )
    regions = [
        {
            "id": 1,
            "regions": [
                {"region_id": 1, "image_id": 1, "x": 0, "y": 0, "width": 9, "height": 9, "phrase": "a cup"},
                {"region_id": 2, "image_id": 1, "x": 0, "y": 0, "width": 40, "height": 30, "phrase": "cup on\n table"},
                {"region_id": 3, "image_id": 1, "x": 0, "y": 0, "width": 40, "height": 30, "phrase": " "},
            ],
        },
        {"id": 2, "regions": [{"region_id": 4, "image_id": 2, "x": 1, "y": 1, "width": 3, "height": 3, "phrase": "x"}]},
    ]
    objects = [{"image_id": 1, "image_url": "https://x/1.jpg", "objects": [{**cup, "synsets": ["cup.n.01"]}, table]}]
    relations = [
        {
            "image_id": 1,
            "relationships": [
                {"predicate": "ON", "subject": cup, "object": table, "relationship_id": 1, "synsets": ["along.r.01"]}
            ],
        }
    ]
    words: list[Any] = ["--images", tmp_path / "vg", "--image-data", write(tmp_path / "images.json", data)]
    words += ["--regions", write(tmp_path / "region_descriptions.json", regions)]
    words += ["--objects", write(tmp_path / "objects.json", objects)]
    words += ["--relationships", write(tmp_path / "relationships.json", relations)]
    counts, samples = converted(tmp_path, "visual-genome", *words)
    assert (counts["regions_read"], counts["regions_without_text_left_out"], counts["objects_read"]) == (4, 1, 2)
    first, second = samples
    assert first["caption"] == "cup on table"
    assert [region["text"] for region in first["regions"]] == ["a cup", "cup on table", "cup", "table", "cup on table"]
    assert first["regions"][-1]["box"] == [3, 5, 25, 11]
    assert second["image"].endswith("VG_100K_2/2.jpg")
    with pytest.raises(ClocError, match="nothing to convert"):
        VisualGenomeSource(tmp_path, tmp_path)


SENTENCE = "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#0/notvisual something] ."
ANNOTATION = """<annotation><filename>36979.jpg</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>11</xmax><ymax>21</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>21</xmin><ymin>2</ymin><xmax>31</xmax><ymax>20</ymax></bndbox></object>
<object><name>2</name><name>3</name><bndbox><xmin>5</xmin><ymin>3</ymin><xmax>9</xmax><ymax>6</ymax></bndbox></object>
<object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""


def flickr(folder: Path) -> list[Any]:
    picture(folder / "images" / "36979.jpg")
    entities = folder / "entities"
    for name, text in (
        ("test.txt", "36979\n"),
        ("Sentences/36979.txt", f"{SENTENCE}\n[/EN#1/people two young guys] are [/EN#4/scene outside] .\n"),
        ("Annotations/36979.xml", ANNOTATION),
    ):
        (entities / name).parent.mkdir(parents=True, exist_ok=True)
        (entities / name).write_text(text)
    return ["--images", folder / "images", "--entities", entities, "--split", "test"]


def test_flickr30k_entities(tmp_path: Path) -> None:
    words = flickr(tmp_path)
    with pytest.warns(UserWarning, match="captions read: 2 instead of 5,000"):
        counts, samples = converted(tmp_path, "flickr30k-entities", *words)
    assert counts["phrases_read"] == 5
    assert counts["phrases_without_box_left_out"] == 2
    assert counts["regions_repeated_left_out"] == 1
    assert samples[0]["captions"] == [
        "Two young guys with shaggy hair look at something .",
        "two young guys are outside .",
    ]
    assert samples[0]["regions"] == [
        {"box": [1.0, 1.0, 30.0, 20.0], "text": "Two young guys"},
        {"box": [4.0, 2.0, 8.0, 5.0], "text": "shaggy hair"},
    ]
    with pytest.warns(UserWarning, match="is not the whole of flickr30k-entities test"):
        counts, _ = converted(tmp_path, "flickr30k-entities", *words, "--each-box", out="each")
    assert counts["boxes_written"] == 3


@given(st.lists(st.tuples(st.text("abc ,", min_size=1), st.booleans()), max_size=6))
def test_phrases_stand_where_the_caption_has_them(parts: list[tuple[str, bool]]) -> None:
    line = "".join(f"[/EN#{k}/other {words}]" if marked else words for k, (words, marked) in enumerate(parts))
    caption, phrases = read_sentence(line)
    assert caption == "".join(words for words, _ in parts)
    assert [phrase.text for phrase in phrases] == [words for words, marked in parts if marked]
    assert all(caption[p.start :].startswith(p.text) for p in phrases)


def refcoco(folder: Path) -> list[Any]:
    name = "COCO_train2014_000000581857.jpg"
    picture(folder / "train2014" / name)
    sentence = {"tokens": ["navy", "blue"], "raw": "navy blue ", "sent_id": 0, "sent": "navy blue"}
    other = {**sentence, "sent_id": 1, "raw": "caf\u00e9 man", "sent": "caf\u00e9 man"}
    ref = {"sent_ids": [0, 1], "file_name": "COCO_train2014_000000581857_16.jpg", "ann_id": 16, "ref_id": 0}
    refs = [{**ref, "image_id": 581857, "split": "train", "sentences": [sentence, other], "category_id": 1}]
    refs += [{**refs[0], "ref_id": 1, "ann_id": 17, "split": "val"}]
    (folder / "refcoco").mkdir()
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    image = {"id": 581857, "file_name": name, "width": 40, "height": 30}
    boxes = [{"id": k, "image_id": 581857, "category_id": 1, "bbox": [k, 2, 10, 12.5], "iscrowd": 0} for k in (16, 17)]
    instances = {"images": [image], "annotations": boxes, "categories": [{"id": 1, "name": "person"}]}
    write(folder / "refcoco" / "instances.json", instances)
    return ["--refs", folder / "refcoco" / "refs(unc).p", "--images", folder / "train2014"]


def test_refcoco_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = refcoco(tmp_path)
    with pytest.warns(
        UserWarning, match="references read: 1 instead of 42,404; expressions read: 2 instead of 120,624"
    ):
        _, samples = converted(tmp_path, "refcoco", *words, "--split", "train")
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (facts["kind"], facts["set"], facts["split"]) == ("refcoco", "refcoco", "train")
    assert samples[0]["caption"] == "a photo of person"
    assert samples[0]["regions"] == [
        {"box": [16.0, 2.0, 26.0, 14.5], "text": text, "unique": True} for text in ("navy blue", "café man")
    ]
    assert main(["data", "convert", "refcoco", *map(str, words), "--split", "minival", "--out", str(tmp_path)]) == 2
    assert "has no references of the split 'minival': it has train, val" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "partition", "split", "name"),
    [
        ("refcoco", "unc", "val", "refcoco"),
        ("refcoco+", "unc", "val", "refcoco+"),
        ("refcocog", "umd", "val", "refcocog"),
        ("refcocog", "google", "val", "refcocog (google)"),
        ("mine", "unc", "val", None),
    ],
)
def test_refcoco_says_which_of_the_three_it_is(
    tmp_path: Path, folder: str, partition: str, split: str, name: str | None
) -> None:
    source = RefCocoSource(tmp_path / folder / f"refs({partition}).p", None, split)
    assert source.stated() == ({"set": name} if name else {}) | {"split": split}


class Evil:
    """What a pickle that runs something looks like."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("this must never be printed",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([Evil()], protocol=2))
    with pytest.raises(ClocError, match=r"asks for builtins.print|asks for __builtin__.print"):
        read_refs(path)
    assert capsys.readouterr().out == ""
    for content in (b"", b"no pickle", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ClocError, match=r"refs\(unc\).p: (cannot be read as plain|does not hold a list)"):
            read_refs(path)


def test_refcoco_from_the_hub(tmp_path: Path) -> None:
    content = picture(tmp_path / "x.png")
    rows = [
        {
            "question_id": str(k),
            "image": {"bytes": content, "path": None},
            "question": "",
            "answer": [f"thing {k}", "it"],
            "segmentation": [0.0],
            "bbox": [float(k), 2.0, 10.0, 12.0],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_000000000{1 + k // 2:03d}_{k}.jpg",
        }
        for k in range(3)
    ]
    file = tmp_path / "val-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    counts, samples = converted(tmp_path, "refcoco", "--refs", file, "--format", "parquet")
    assert (counts["images_written"], counts["references_read"], counts["expressions_read"]) == (2, 3, 6)
    assert [region["text"] for region in samples[0]["regions"]] == ["thing 0", "it", "thing 1", "it"]
    assert samples[1]["regions"][0]["box"] == [2, 2, 12, 14]


def grit_rows() -> list[dict[str, Any]]:
    caption = "a wire hanger with a paper cover"
    chunks = [[19, 32, 0.25, 0.5, 0.75, 1.0, 0.79], [0, 13, 0.0, 0.0, 0.5, 0.5, 0.6]]
    expressions = [[0, 32, 0.0, 0.0, 1.0, 1.0, 0.7], [19, 32, 0.25, 0.5, 0.75, 1.0, 0.79]]
    row = {"clip_similarity_vitb32": 0.35, "id": 1795296605919, "url": "https://x", "caption": caption}
    return [{"key": f"00037393{k}", **row, "noun_chunks": chunks, "ref_exps": expressions} for k in (8, 9)]


def test_grit_as_img2dataset_writes_it(tmp_path: Path) -> None:
    content = picture(tmp_path / "x.jpg")
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for k, row in enumerate(grit_rows()):
            parts = {"json": json.dumps({**row, "status": "success"}).encode(), "txt": row["caption"].encode()}
            for ending, data in ({"jpg": content} if k == 0 else {}).items() | parts.items():
                member = tarfile.TarInfo(f"{row['key']}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    counts, samples = converted(
        tmp_path, "grit", "--annotations", tmp_path / "00000.tar", "--format", "webdataset", "--min-score", 0.65
    )
    assert counts["annotations_without_picture_left_out"] == 1
    assert (counts["boxes_below_score_left_out"], counts["regions_repeated_left_out"]) == (1, 1)
    assert samples[0]["id"] == "00000/000373938"
    assert samples[0]["regions"] == [
        {"box": [10.0, 15.0, 30.0, 30.0], "text": "a paper cover", "score": 0.79},
        {"box": [0.0, 0.0, 40.0, 30.0], "text": "a wire hanger with a paper cover", "score": 0.7},
    ]


def grit_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("ending", "content", "problem"),
    [
        ("jpg", b"<!DOCTYPE html>", "the image cannot be read: cannot identify"),
        ("jpg", png_bomb(50_000), "the image cannot be read: Image size .* exceeds limit"),
        ("json", b'{"caption": "cut o', "not valid JSON: Unterminated string"),
        ("json", b"[1]", "not a JSON object"),
    ],
    ids=["html", "bomb", "cut off", "a list"],
)
def test_a_damaged_member_of_a_shard(ending: str, content: bytes, problem: str, tmp_path: Path) -> None:
    members = []
    for k in range(3):
        parts = {"jpg": picture(tmp_path / "x.jpg"), "json": json.dumps({**grit_rows()[0], "key": str(k)}).encode()}
        members += [(f"{k}.{name}", content if (k, name) == (1, ending) else data) for name, data in parts.items()]
    source = GritSource([grit_shard(tmp_path / "00000.tar", members)])
    with pytest.raises(ClocError, match=f"00000.tar: sample '00000/1': {problem}") as caught:
        convert(source, ConvertOptions(None, tmp_path / "a", "webdataset"))
    assert caught.value.remedy
    options = ConvertOptions(None, tmp_path / "b", "webdataset", on_bad_sample="skip")
    counts = convert(source, options)["counts"]
    assert (counts["images_listed"], counts["images_written"], counts["images_bad_left_out"]) == (3, 2, 1)
    assert check_data(tmp_path / "b").faults == []


def test_a_damaged_shard_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    content = picture(tmp_path / "x.jpg")
    row = json.dumps(grit_rows()[0]).encode()
    path = grit_shard(tmp_path / "00000.tar", [(f"{k}.{name}", data) for k in range(3)
                                                for name, data in (("jpg", content), ("json", row))])  # fmt: skip
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        third = archive.getmembers()[4]
    for damaged in (whole[: third.offset + 200], whole[: third.offset] + b"\xff" * 512 + whole[third.offset + 512 :]):
        path.write_bytes(damaged)
        with pytest.raises(ClocError, match=r"00000\.tar: cannot be read as a tar shard"):
            convert(GritSource([path]), ConvertOptions(None, tmp_path / "a"))


@pytest.mark.parametrize("in_folder", [False, True])
def test_grit_as_parquet(in_folder: bool, tmp_path: Path) -> None:
    rows = grit_rows()
    for row in rows:
        content = picture(tmp_path / "images" / f"{row['key']}.jpg")
        row |= {} if in_folder else {"image": {"bytes": content, "path": None}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "coyo_0_snappy.parquet")
    more = ["--images", tmp_path / "images"] if in_folder else ["--format", "parquet"]
    counts, samples = converted(tmp_path, "grit", "--annotations", tmp_path / "coyo_0_snappy.parquet", *more)
    assert (counts["images_written"], counts["boxes_written"], len(samples)) == (2, 6, 2)


# -- what all importers share -----------------------------------------------------------------------------------------


def coco(folder: Path, count: int) -> tuple[Path, Path, Path]:
    """A COCO of so many pictures."""
    for k in range(count):
        picture(folder / "images" / f"{k}.jpg", seed=k)
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 40, "height": 30} for k in range(count)]
    boxes = [{"id": k, "image_id": k * 7 % count, "category_id": 1, "bbox": [k % 9, 1, 5, 5]} for k in range(3 * count)]
    captions = [{"id": k, "image_id": k, "caption": f"picture {k}"} for k in range(count)]
    instances = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    return (
        folder / "images",
        write(folder / "instances.json", instances),
        write(folder / "captions.json", {"images": images, "annotations": captions}),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file_format", ["jsonl", "parquet", "webdataset"])
def test_stopped_and_gone_on_is_as_never_stopped(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = coco(tmp_path, 11)
    whole = convert_coco(*files, tmp_path / "a", file_format=file_format, shard=2)
    real, written = conversion._write_shard, []

    def stops_at_third(*args: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write_shard", stops_at_third)
        with pytest.raises(KeyboardInterrupt):
            convert_coco(*files, tmp_path / "b", file_format=file_format, shard=2)
        assert not (tmp_path / "b" / "dataset.json").exists()
        patch.setattr(conversion, "_write_shard", lambda *args: (written.append(args), real(*args))[1])
        patch.setattr(AnnotationIndex, "build", lambda *_: pytest.fail("the annotations were read again"))
        again = convert_coco(*files, tmp_path / "b", file_format=file_format, shard=2)
    assert len(written) == 6
    assert again == whole
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("change", [{"shard": 0}, {"shard": -1}, {"workers": 0}])
def test_options_that_make_no_sense(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ClocError, match=r"(shard|workers) is (0|-1)"):
        ConvertOptions(tmp_path, tmp_path / "out", **change)  # type: ignore[arg-type]


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(ClocError, match="the image cannot be read: embedded null byte"):
        picture_size("a\0.png")


def test_several_processes_write_the_same(tmp_path: Path) -> None:
    files = coco(tmp_path, 9)
    convert_coco(*files, tmp_path / "a", file_format="parquet", shard=2, workers=1)
    convert_coco(*files, tmp_path / "b", file_format="parquet", shard=2, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_conversion_with_other_options_starts_anew(tmp_path: Path) -> None:
    files = coco(tmp_path, 3)
    (tmp_path / "images" / "2.jpg").unlink()
    with pytest.raises(ClocError, match=r"2\.jpg: sample '2': the image does not exist"):
        convert_coco(*files, tmp_path / "a", shard=1)
    counts = convert_coco(*files, tmp_path / "a", shard=1, on_bad_sample="skip")["counts"]
    assert (counts["images_written"], counts["images_bad_left_out"]) == (2, 1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<!DOCTYPE html><title>not found</title>", "the image cannot be read: cannot identify"),
        (png_bomb(50_000), "the image cannot be read: Image size .* exceeds limit"),
        (b"", "the image cannot be read"),
    ],
)
def test_pictures_that_are_none(content: bytes, problem: str, tmp_path: Path) -> None:
    files = coco(tmp_path, 3)
    (tmp_path / "images" / "1.jpg").write_bytes(content)
    with pytest.raises(ClocError, match=f"1.jpg: sample '1': {problem}"):
        convert_coco(*files, tmp_path / "a")
    counts = convert_coco(*files, tmp_path / "a", on_bad_sample="skip")["counts"]
    assert (counts["images_written"], counts["images_bad_left_out"]) == (2, 1)


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg"])
def test_a_name_that_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    images, instances, captions = coco(tmp_path, 2)
    for file in (instances, captions):
        content = json.loads(file.read_text())
        content["images"][1]["file_name"] = name
        file.write_text(json.dumps(content))
    with pytest.raises(ClocError, match="sample '1': the name of a picture leads out of --images"):
        convert_coco(images, instances, captions, tmp_path / "a")
    counts = convert_coco(images, instances, captions, tmp_path / "a", on_bad_sample="skip")["counts"]
    assert (counts["images_listed"], counts["images_written"], counts["images_bad_left_out"]) == (2, 1, 1)


def test_an_annotation_file_that_is_cut_off(tmp_path: Path) -> None:
    images, instances, captions = coco(tmp_path, 2)
    instances.write_text(instances.read_text()[:-40])
    with pytest.raises(ClocError, match=r"instances\.json: not valid JSON near character"):
        convert_coco(images, instances, captions, tmp_path / "a")


def test_text_in_any_script_goes_through(tmp_path: Path) -> None:
    images, instances, captions = coco(tmp_path, 2)
    content = json.loads(captions.read_text())
    content["annotations"][0]["caption"] = "\u0000猫と犬 \u202eقط\tкот \U0001f408"
    captions.write_text(json.dumps(content))
    counts = convert_coco(images, instances, captions, tmp_path / "a", file_format="parquet")["counts"]
    # Only what stands for no letter in any script goes; marks of direction, which some scripts need, stay.
    assert open_samples(tmp_path / "a")[0]["caption"] == "猫と犬 \u202eقط кот \U0001f408"
    assert counts["texts_cleaned"] == 1
    assert check_data(tmp_path / "a").faults == []


def test_shards_of_any_size_keep_every_sample(tmp_path: Path) -> None:
    """More samples to a shard than a writer puts in a file by itself."""
    files = coco(tmp_path, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "_SHARD", 2)
        patch.setattr(writers.ParquetWriter.__init__, "__defaults__", ("regions", 2))
        convert_coco(*files, tmp_path / "a", file_format="parquet", shard=5)
    assert [len(open_file(path)) for path in sorted((tmp_path / "a").glob("*.parquet"))] == [5, 2]


def test_outlines_are_kept_if_asked_for(tmp_path: Path) -> None:
    images, instances, captions = coco(tmp_path, 2)
    content = json.loads(instances.read_text())
    for box in content["annotations"]:
        box["segmentation"] = [[0, 0, 41.5, 0, 41.5, 10]]
    instances.write_text(json.dumps(content))
    words = ["--images", images, "--instances", instances, "--captions", captions]
    _, samples = converted(tmp_path, "coco", *words, "--masks", "--format", "parquet")
    assert samples[0]["regions"][0]["attributes"] == {"mask": [[0, 0, 40, 0, 40, 10]]}
    _, samples = converted(tmp_path, "coco", *words, out="plain")
    assert "attributes" not in samples[0]["regions"][0]
