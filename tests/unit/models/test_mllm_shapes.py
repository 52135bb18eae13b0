"""Regions that are no boxes, and regions of several tokens: from the message to the language model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig
from cloc_mllm.models.conversation_cloc_mllm import ConversationError
from cloc_mllm.models.processing_cloc_mllm import ClocMllmProcessor
from cloc_mllm.models.prompter import sample_tokens
from cloc_mllm.models.region_encoder import with_parts
from cloc_mllm.models.region_shapes import SHAPE_POINTS, mask_shape, scribble_shape
from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_mllm, user

SCRIBBLE = [[3, 4], [20, 6], [8, 25]]


def mask(*, upper: bool, width: int = 40, height: int = 30) -> np.ndarray:
    """One of the two triangles of the box from (4, 5) to (24, 25)."""
    rows, columns = np.mgrid[0:height, 0:width]
    box = (columns >= 4) & (columns < 24) & (rows >= 5) & (rows < 25)
    half = columns - 4 >= rows - 5 if upper else columns - 4 <= rows - 5
    return box & half


def shape(**how: Any) -> dict[str, Any]:
    return {"type": "region", **how}


def asked(*regions: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    return [user(image(seed), text("what is"), *(part for one in regions for part in (text(" "), one)), text("?"))]


MIXED = [
    asked(region(3, 4, 20, 25), shape(mask=mask(upper=True)), seed=1),
    [user("how many are there")],
    asked(shape(scribble=SCRIBBLE), shape(point=[12, 9]), seed=2),
]


@pytest.fixture(scope="module", params=[("prompter", 1), ("prompter", 5), ("roi_align", 1), ("roi_align", 10)], ids=str)
def mllm(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    kind, tokens = request.param
    return tiny_mllm(region_encoder=kind, num_region_tokens=tokens)


def region_features(model: Any, batch: Any) -> torch.Tensor:
    names = ("pixel_values", "region_boxes", "region_image_index", "region_points")
    with torch.no_grad():
        return model.get_image_features(**{name: batch[name] for name in names if name in batch}).region_features


def test_shapes_reach_the_model_as_boxes_with_points() -> None:
    processor = tiny_mllm()[1]
    batch = processor.encode(MIXED)
    place = processor.image_processor.geometry(40, 30)
    filled, stroke = mask_shape(mask(upper=True), 40, 30), scribble_shape(SCRIBBLE, 40, 30)
    assert filled.box == [4, 5, 24, 25]
    assert stroke.box == [3, 4, 21, 26]
    boxes = [[3, 4, 20, 25], filled.box, stroke.box, [12, 9, 12, 9]]
    assert torch.equal(batch["region_boxes"], place.boxes_to_model(boxes))
    assert batch["region_points"].dtype == torch.float32
    assert batch["region_points"].shape == (4, SHAPE_POINTS, 2)
    assert batch["region_points"][[0, 3]].isnan().all()
    for row, points in ((1, filled.points), (2, stroke.points)):
        assert torch.equal(batch["region_points"][row], place.points_to_model(torch.from_numpy(points)))
    assert batch["region_image_index"].tolist() == [0, 0, 1, 1]
    # Where all regions are boxes and points, nothing is new.
    assert "region_points" not in processor.encode([asked(region(3, 4, 20, 25), shape(point=[12, 9]))])


def test_in_a_mixed_batch_every_region_reads_as_alone(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    together = region_features(model, processor.encode(MIXED)).split(model.config.num_region_tokens)
    singles = [
        asked(item, seed=seed)
        for seed, turns in ((1, MIXED[0]), (2, MIXED[2]))
        for item in turns[0]["content"]
        if item["type"] == "region"
    ]
    for single, found in zip(singles, together, strict=True):
        torch.testing.assert_close(region_features(model, processor.encode(single)), found, atol=1e-5, rtol=1e-4)


def test_shapes_in_one_box_are_told_apart(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    forms = [shape(mask=mask(upper=True)), shape(mask=mask(upper=False)), region(4, 5, 24, 25)]
    batches = [processor.encode(asked(form)) for form in forms]
    assert all(torch.equal(batch["region_boxes"], batches[0]["region_boxes"]) for batch in batches)
    found = [region_features(model, batch) for batch in batches]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[first], found[second], atol=1e-3)


def test_roi_align_reads_a_shape_at_its_points() -> None:
    model, processor = tiny_mllm(region_encoder="roi_align")
    batch = processor.encode(asked(shape(mask=mask(upper=True))))
    reader = model.model.prompter
    with torch.no_grad():
        tokens = model.model.vision_tower(batch["pixel_values"]).last_hidden_state
        mean = sample_tokens(tokens, batch["region_points"], torch.tensor([0])).mean(dim=1)
        expected = model.model.region_projector(reader.projection(reader.layer_norm(mean)))
    torch.testing.assert_close(region_features(model, batch), expected)
    # Sampled at the middle of a patch, a token is itself.
    grid = torch.randn(1, 17, 48)
    centre = torch.tensor([[[(2 + 0.5) / 4, (1 + 0.5) / 4]]])
    torch.testing.assert_close(sample_tokens(grid, centre, torch.tensor([0]))[0, 0], grid[0, 1 + 1 * 4 + 2])


boxes = st.tuples(*[st.floats(0, 0.875, width=32)] * 2, *[st.floats(0.015625, 0.125, width=32)] * 2)


@given(boxes, st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 2), max_size=5), st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_the_parts_tile_the_box_and_share_its_points(
    drawn: tuple[float, ...], inside: list[tuple[float, float]], side: int
) -> None:
    box = torch.tensor([[drawn[0], drawn[1], drawn[0] + drawn[2], drawn[1] + drawn[3]]])
    points = box[0, :2] + torch.tensor(inside).view(-1, 2) * (box[0, 2:] - box[0, :2])
    points = torch.cat([points, torch.full((2, 2), float("nan"))])[None]
    parts, of_parts = with_parts(box, points, 1 + side * side)
    assert torch.equal(parts[0], box[0])
    assert torch.equal(of_parts[0].nan_to_num(-1), points[0].nan_to_num(-1))
    cells = parts[1:]
    for k, cell in enumerate(cells):  # row by row
        corner = torch.tensor([k % side, k // side])
        expected = box[0, :2] + torch.cat([corner, corner + 1]).view(2, 2) / side * (box[0, 2:] - box[0, :2])
        torch.testing.assert_close(cell, expected.flatten())
    assert torch.equal(with_parts(box, None, 1 + side * side)[0], parts)
    real = ~of_parts[1:].isnan().any(dim=-1)
    assert real.sum(dim=0).tolist() == [1] * len(inside) + [0, 0]
    for cell, which in real.nonzero().tolist():
        low, high, place = cells[cell][:2], cells[cell][2:], points[0, which]
        assert ((place >= low - 1e-6) & (place <= high + 1e-6)).all()


def test_one_token_is_the_first_of_several() -> None:
    one, processor = tiny_mllm()
    five, five_processor = tiny_mllm(num_region_tokens=5)
    five.load_state_dict(one.state_dict())
    batch, more = processor.encode(MIXED), five_processor.encode(MIXED)
    found = region_features(five, more)
    assert found.shape[0] == 5 * 4
    torch.testing.assert_close(found[::5], region_features(one, batch), atol=1e-5, rtol=1e-4)
    # The parts of a box are boxes; those of a point are the point.
    box = batch["region_boxes"][0]
    middle = (box[:2] + box[2:]) / 2
    quarter = {"region_boxes": torch.cat([box[:2], middle])[None], "region_image_index": torch.tensor([0])}
    torch.testing.assert_close(found[1:2], region_features(one, {**batch, **quarter, "region_points": None}))
    torch.testing.assert_close(found[15:], found[15:16].expand(5, -1))


def test_placeholders_are_as_many_as_tokens_and_stand_together(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    count = model.config.num_region_tokens
    batch = processor.encode(MIXED, return_labels=False)
    at = batch["input_ids"] == processor.region_token_id
    assert at.sum(dim=1).tolist() == [2 * count, 0, 2 * count]
    lengths = torch.diff(at[0].nonzero()[:, 0])
    assert (lengths == 1).sum() == 2 * (count - 1)
    # The text for people holds one.
    assert processor.apply_chat_template(MIXED[0]).count("<region>") == 2
    with pytest.raises(ValueError, match=f"{4 * count} <region> placeholders, but there are {2 * count} region feat"):
        model(**{**batch, "region_boxes": batch["region_boxes"][:2], "region_points": None,
                 "region_image_index": torch.tensor([0, 1])})  # fmt: skip
    with pytest.raises(ValueError, match="there are 4 regions, but region_points has 1"):
        model(**{**batch, "region_points": batch["region_points"][:1]})


def test_regions_over_turns_and_images(mllm: tuple[Any, Any]) -> None:
    """Several a turn, in later turns, on whichever image: each is read on its own image, in the order of the text."""
    model, processor = mllm
    talk = [
        user(image(1), image(2, 20, 50), text("a "), shape(mask=mask(upper=True), image=0), region(1, 2, 9, 40)),
        assistant("two"),
        user(text("and "), shape(scribble=SCRIBBLE, image=0), image(3), text(" or "), region(5, 5, 30, 20)),
        assistant("three"),
        user(text("and "), shape(point=[7, 8], image=1), text("?")),
    ]
    batch = processor.encode([MIXED[0], talk])
    assert batch["region_image_index"].tolist() == [0, 0, 1, 2, 1, 3, 2]
    found = region_features(model, batch).split(model.config.num_region_tokens)[2:]
    alone = [
        (image(1), shape(mask=mask(upper=True))),
        (image(2, 20, 50), region(1, 2, 9, 40)),
        (image(1), shape(scribble=SCRIBBLE)),
        (image(3), region(5, 5, 30, 20)),
        (image(2, 20, 50), shape(point=[7, 8])),
    ]
    for (picture, item), features in zip(alone, found, strict=True):
        expected = region_features(model, processor.encode([user(picture, item, text("?"))]))
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_generation_keeps_shapes_and_sequences_together(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode(MIXED, add_generation_prompt=True)
    length = batch["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    together = model.generate(**batch, **options)[:, length:]
    assert torch.equal(model.generate(**batch, **options, use_cache=False)[:, length:], together)
    for row, conversation in enumerate(MIXED):
        alone = processor.encode(conversation, add_generation_prompt=True)
        expected = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(together[2 * row : 2 * row + 2], expected)


def test_generate_grounded_sees_the_shapes() -> None:
    model, processor = tiny_mllm(num_region_tokens=5)
    found = []
    for upper in (True, False):
        turns = [*asked(shape(mask=mask(upper=upper))), grounding_turn(), user("and?")]
        batch = processor.encode(turns, add_generation_prompt=True)
        ids = torch.cat([batch["input_ids"], torch.tensor([[processor.ground_token_id]])], dim=1)
        rest = {name: batch[name] for name in ("pixel_values", "region_boxes", "region_image_index", "region_points")}
        output = model.ground_sequences(ids, batch["input_ids"], **rest)
        found.append(output.pred_boxes)
        assert output.pred_boxes.shape == (1, 4)
    assert not torch.equal(found[0], found[1])


def test_shapes_are_trained_through(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    batch = processor.encode([[*MIXED[0], grounding_turn()], [*MIXED[1], assistant("two")]], return_labels=True)
    model.zero_grad()
    model(**model_inputs(batch)).loss.backward()
    for parameter in (*model.model.prompter.parameters(), *model.model.region_projector.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert model.model.region_projector.linear_1.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_points_stay_float32_in_a_bf16_model() -> None:
    model, processor = tiny_mllm()
    batch = processor.encode(MIXED)
    exact = region_features(model, batch)
    found = region_features(model.to(torch.bfloat16), batch)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)
    near = {**batch, "region_points": batch["region_points"] + 2e-3}  # less than one step of bfloat16 at 0.6
    assert not torch.equal(region_features(model, near), found)


def test_as_coordinates_a_shape_is_its_box() -> None:
    processor = tiny_mllm(region_format="both")[1]
    filled, stroke = asked(shape(mask=mask(upper=True))), asked(shape(scribble=SCRIBBLE))
    assert f"<region> {processor.codec.encode([4, 5, 24, 25], 40, 30)}" in processor.apply_chat_template(filled)
    assert f"<region> {processor.codec.encode([3, 4, 21, 26], 40, 30)}" in processor.apply_chat_template(stroke)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (
            shape(mask=mask(upper=True, width=41)),
            r"message 0 \(user\): the mask is 41 x 30 pixels, but its image is 40",
        ),
        (shape(mask=np.zeros((30, 40), dtype=bool)), "the mask is empty"),
        (shape(mask=mask(upper=True), box=[1, 2, 3, 4]), "exactly one of 'box', 'point', 'mask', 'scribble'"),
        (shape(scribble=[[1, 1], [50, 2]]), "outside the image of 40 x 30"),
        (shape(scribble=[[1, 1], [5, 2]], image=3), "a region is on image 3, but the conversation has 1 images"),
        (shape(mask=None), "a mask is an array"),
    ],
)
def test_what_is_refused_and_how(item: dict[str, Any], problem: str) -> None:
    processor = tiny_mllm()[1]
    with pytest.raises(ConversationError, match=problem):
        processor.encode(asked(item))


@pytest.mark.parametrize("how", [{"mask": mask(upper=True)}, {"scribble": SCRIBBLE}])
def test_the_assistant_points_with_boxes_only(how: dict[str, Any]) -> None:
    processor = tiny_mllm()[1]
    with pytest.raises(ConversationError, match=r"the assistant answers with boxes, not with a (mask|scribble)"):
        processor.encode([user(image(), text("where?")), assistant(text("a cat "), shape(**how))])


def test_numbers_of_tokens_that_are_none_are_refused(tmp_path: Any) -> None:
    for count in (0, 2, 4, 6, 9, 16):
        with pytest.raises(StrictDataclassClassValidationError, match=f"num_region_tokens is {count}: use 1, or"):
            ClocMllmConfig(num_region_tokens=count)
        with pytest.raises(ValueError, match=f"num_region_tokens is {count}: use 1, or"):
            tiny_mllm(num_region_tokens=count)
    _, processor = tiny_mllm(num_region_tokens=10)
    processor.save_pretrained(tmp_path)
    assert ClocMllmProcessor.from_pretrained(tmp_path).num_region_tokens == 10
