"""Models of other projects as answerers: frames of boxes, regions as text, stock LLaVA asked by a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.apps.exporters.llava import export_llava
from cloc_mllm.errors import ClocError
from cloc_mllm.evaluation.mllms.stock import FRAMES, FramedCodec, StockAnswerer
from cloc_mllm.evaluation.suites.options import EvalOptions
from cloc_mllm.evaluation.suites.registry import run_suite
from cloc_mllm.inference.predictor import Predictor
from tests.builders import noise_image
from tests.builders_mllm import image, region, text, user

SIDE = st.integers(20, 2000)


@pytest.fixture(scope="module")
def llava(mllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MLLM as transformers' own LLaVA."""
    return export_llava(mllm_folder, tmp_path_factory.mktemp("llava") / "out").folder


@given(frame=st.sampled_from(FRAMES), width=SIDE, height=SIDE, shares=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_box_comes_back_from_every_frame(frame: str, width: int, height: int, shares: list[float]) -> None:
    (x1, x2), (y1, y2) = sorted(shares[:2]), sorted(shares[2:])
    box = [x1 * width, y1 * height, x2 * width, y2 * height]
    codec = FramedCodec(frame)
    found = codec.decode(f"it is {codec.encode(box, width, height)}.", width, height)
    assert not found.unparsed
    step = 1.0 if frame == "pixel" else max(width, height) / (998 if "1000" in frame else 999)
    assert found.boxes[0] == pytest.approx(box, abs=step)


def test_square_frames_are_shares_of_the_padded_picture() -> None:
    # 200 x 100: the square is 200 wide, 50 pixels of padding above.
    assert FramedCodec("norm1-square").encode([0, 0, 200, 100], 200, 100) == "[0.000, 0.250, 1.000, 0.750]"
    assert FramedCodec("norm1").encode([0, 0, 200, 100], 200, 100) == "[0.000, 0.000, 1.000, 1.000]"
    assert FramedCodec("norm1-square").decode("[0, 0, 1, 1]", 200, 100).boxes == [[0.0, 0.0, 200.0, 100.0]]
    with pytest.raises(ClocError, match="no frame of boxes 'norm1-pixel'"):
        FramedCodec("norm1-pixel")


def test_stock_llava_answers_as_the_model_it_was_made_of(llava: Path, mllm_folder: Path) -> None:
    # Square pictures: there is nothing that two image processors could pad in different ways.
    turns = [[user(image(k, 32, 32), text(words))] for k, words in enumerate(("what is this", "how many?"))]
    stock = StockAnswerer.from_pretrained(llava, "norm1000")
    ours = Predictor.from_pretrained(mllm_folder).chat(turns, max_new_tokens=5)
    assert [one.text for one in stock.chat(turns, 5, 2)] == [one.text.strip() for one in ours]
    assert [one.text for one in stock.chat(turns, 5, 1)] == [one.text.strip() for one in ours]


def test_regions_are_written_into_the_question(llava: Path) -> None:
    stock = StockAnswerer.from_pretrained(llava, "pixel")
    picture = noise_image(40, 30)
    scribble = {"type": "region", "scribble": [[4, 5], [9, 12]]}
    items = [text("is "), region(1, 2, 11, 12), text(" "), {"type": "region", "point": [7, 8]}, text(" "), scribble]
    (turn,) = stock._written([user(image(), *items)], picture)
    assert [item["type"] for item in turn["content"]] == ["image", "text"]
    assert turn["content"][1]["text"].startswith("is [1, 2, 11, 12] [7, 8] [")
    frameless = StockAnswerer(stock.model, stock.processor)
    with pytest.raises(ClocError, match="not said how the model writes them"):
        frameless.chat([[user(image(), region(1, 2, 11, 12))]], 2)
    assert frameless.chat([[user(image(), text("what is this"))]], 2)[0].boxes == []
    with pytest.raises(ClocError, match="sample '0': the question is about 2 pictures"):
        frameless.chat([[user(image(), image(), text("what is this"))]], 2)


def test_a_suite_asks_stock_llava_if_it_knows_the_frame(llava: Path, tmp_path: Path) -> None:
    noise_image(40, 30).save(tmp_path / "a.png")
    sample: Any = {"id": "a", "image": "a.png", "caption": "c", "regions": [{"box": [0, 0, 9, 9], "text": "ring"}]}
    (tmp_path / "regions.jsonl").write_text(json.dumps(sample) + "\n")

    def run(**settings: Any) -> dict[str, Any]:
        options = EvalOptions(str(llava), str(tmp_path), str(tmp_path / "out"), max_new_tokens=4, settings=settings)
        return run_suite("grounding", options)

    assert run(boxes="norm1-square")["metrics"]["grounding_acc50"]["n"] == 1
    with pytest.raises(ClocError, match="not said how a 'llava' model writes boxes"):
        run()
    with pytest.raises(ClocError, match="no frame of boxes 'shares'"):
        run(boxes="shares")


def test_only_models_that_can_be_asked_are(mllm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    noise_image(40, 30).save(tmp_path / "a.png")
    sample = {"id": "a", "image": "a.png", "caption": "c", "regions": [{"box": [0, 0, 9, 9], "text": "ring"}]}
    (tmp_path / "regions.jsonl").write_text(json.dumps(sample) + "\n")

    def options(model: Path, method: str | None = None, **settings: Any) -> EvalOptions:
        return EvalOptions(str(model), str(tmp_path), str(tmp_path / "out"), method=method, settings=settings)

    with pytest.raises(ClocError, match="a 'bert' model, which answers no questions"):
        run_suite("grounding", options(tmp_path))
    with pytest.raises(ClocError, match="is for models of other projects"):
        run_suite("grounding", options(mllm_folder, boxes="norm1"))
    with pytest.raises(ClocError, match="--method is for encoders"):
        run_suite("grounding", options(mllm_folder, method="roi"))
    with pytest.raises(ClocError, match="Did you mean 'boxes'"):
        run_suite("grounding", options(mllm_folder, box="norm1"))
