"""Features that were made before: the same answers, and the tower runs once for each picture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cloc_mllm.inference.feature_cache import MIB, FeatureCache
from cloc_mllm.inference.predictor import Predictor
from cloc_mllm.models.outputs_cloc_mllm import ClocMllmImageOutput
from tests.builders import noise_image
from tests.builders_mllm import assistant, grounding_turn, image, region, text, user
from tests.unit.inference.test_predictor import QUESTIONS

BOXES = [[3, 4, 20, 25], [1, 1, 9, 30], [10, 10, 30, 20]]


@contextmanager
def images_encoded(model: Any) -> Iterator[list[int]]:
    """How many images the tower is given, call by call."""
    calls: list[int] = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    try:
        yield calls
    finally:
        hook.remove()


def pixels(processor: Any, *seeds: int) -> torch.Tensor:
    return processor.image_processor([noise_image(seed=seed) for seed in seeds])["pixel_values"]


def asked_about(seed: int, box: list[int]) -> list[dict[str, Any]]:
    return [user(image(seed), text("what is "), region(*box), text("?"))]


def test_features_are_those_of_the_model(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    cache = FeatureCache(model)
    cache.features(pixels(processor, 5, 1))
    found = cache.features(pixels(processor, 1, 2, 1, 5))
    with torch.no_grad():
        expected = model.get_image_features(pixels(processor, 1, 2, 1, 5))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(torch.cat(found.pooler_output), torch.cat(expected.pooler_output))
    assert found.region_features is None
    assert (cache.hits, cache.misses) == (3, 3)


def test_a_picture_is_encoded_once_for_all_turns_questions_and_regions(predictor: Predictor) -> None:
    first = asked_about(7, BOXES[0])
    with images_encoded(predictor.model) as calls:
        answer = predictor.chat([first], max_new_tokens=6)[0]
        predictor.chat([[*first, answer.message, user("and where?")]], max_new_tokens=6)
        list(predictor.stream(asked_about(7, BOXES[1]), max_new_tokens=6))
        predictor.embed_regions(noise_image(seed=7), BOXES)
        predictor.ground(noise_image(seed=7), ["red ring", "blue star"], max_new_tokens=12)
    assert calls == [1]
    with images_encoded(predictor.model) as calls:
        predictor.chat([asked_about(7, BOXES[0]), asked_about(8, BOXES[0]), asked_about(8, BOXES[1])], 4)
    assert calls == [1]


def test_answers_are_those_of_a_model_that_remembers_nothing(predictor: Predictor) -> None:
    model, processor = predictor.model, predictor.processor
    questions = [
        *QUESTIONS,
        [*asked_about(1, BOXES[0]), grounding_turn(), user("and where?")],
        [user(image(1), image(2), text("what is "), region(*BOXES[2], image=0), text("?")), assistant("x"), user("y")],
    ]
    inputs = processor.encode(questions, add_generation_prompt=True, return_original_sizes=True)
    sizes = inputs.pop("original_sizes")
    plain = processor.post_process_grounding(model.generate_grounded(**inputs, max_new_tokens=12), sizes)
    for _ in range(2):
        for ours, theirs in zip(predictor.chat(questions, max_new_tokens=12), plain, strict=True):
            assert ours.text == theirs.text
            assert ours.unparsed == theirs.unparsed
            assert [box["image"] for box in ours.boxes] == [box["image"] for box in theirs.boxes]
            for mine, other in zip(ours.boxes, theirs.boxes, strict=True):
                assert mine["box"] == pytest.approx(other["box"], abs=1e-3)
    assert any(answer.boxes for answer in plain)
    assert predictor.cache.misses == 3


def test_boxes_cost_no_second_pass_of_the_tower(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    inputs = processor.encode(QUESTIONS[3], add_generation_prompt=True)
    with images_encoded(model) as calls:
        output = model.generate_grounded(**inputs, max_new_tokens=12)
    assert calls == [1]
    assert len(output.pred_boxes)


def test_what_is_used_last_is_kept(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    cache = FeatureCache(model)
    cache.features(pixels(processor, 0))
    one = cache.mib
    assert one * MIB == 4 * (17 * 48 + 16 * 32)  # tower tokens and projected features, float32
    cache = FeatureCache(model, limit_mib=2.5 * one)
    for seeds, misses in (((0, 1), 2), ((0,), 2), ((2,), 3), ((0,), 3), ((1,), 4), ((3, 4, 5), 7)):
        cache.features(pixels(processor, *seeds))
        assert cache.misses == misses, seeds
        assert len(cache) <= 2
        assert cache.mib <= 2.5 * one
    cache.clear()
    assert (len(cache), cache.mib) == (0, 0)
    cache.features(pixels(processor, 5))
    assert cache.misses == 8


def test_nothing_is_kept_without_memory_but_doubles_are_seen(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    cache = FeatureCache(model, limit_mib=0)
    with images_encoded(model) as calls:
        cache.features(pixels(processor, 1, 1, 2))
        cache.features(pixels(processor, 1))
    assert calls == [2, 1]
    assert len(cache) == 0
    with pytest.raises(ValueError, match="give 0 or more"):
        FeatureCache(model, limit_mib=-1)


def test_another_picture_of_the_same_name_is_another(predictor: Predictor, tmp_path: Any) -> None:
    path = tmp_path / "now.png"
    found = []
    for seed in (1, 2, 1):
        noise_image(seed=seed).save(path)
        found.append(predictor.embed_regions(path, BOXES))
    assert predictor.cache.misses == 2
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_threads_share_it(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    cache, batch = FeatureCache(model), pixels(processor, 1, 2)
    threads = [threading.Thread(target=cache.features, args=(batch,)) for _ in range(4)]
    with images_encoded(model) as calls:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert calls == [2]


class TiledModel:
    """Stands for a model whose images are several rows each: features say which rows and size they were made of."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> ClocMllmImageOutput:
        self.encoded.append(len(image_sizes))
        rows = list(pixel_values.split((image_sizes[:, 0] // 10).tolist()))
        return ClocMllmImageOutput(
            last_hidden_state=torch.stack([of_one[0].flatten()[None] for of_one in rows]),
            pooler_output=[
                torch.cat([of_one.flatten(1), size.expand(len(of_one), 2)], dim=1)
                for of_one, size in zip(rows, image_sizes, strict=True)
            ],
        )


def test_images_of_several_rows() -> None:
    model = TiledModel()
    cache = FeatureCache(model)
    one, two, three = torch.rand(1, 3, 2, 2), torch.rand(2, 3, 2, 2), torch.rand(3, 3, 2, 2)

    def ask(*images: tuple[torch.Tensor, int]) -> list[torch.Tensor]:
        sizes = torch.tensor([[10 * len(pixels), width] for pixels, width in images])
        pixels = torch.cat([pixels for pixels, _ in images])
        found = cache.features(pixels, sizes, [len(pixels) for pixels, _ in images]).pooler_output
        expected = TiledModel().get_image_features(pixels, sizes).pooler_output
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        return found

    assert [len(of_one) for of_one in ask((two, 7), (one, 7), (two, 7))] == [2, 1, 2]
    ask((three, 7), (one, 7), (two, 8))  # the same pixels of another size are another image
    ask((two, 7), (two, 8), (three, 7))
    assert model.encoded == [2, 2]
