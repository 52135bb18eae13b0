"""What the two trainers add up, held against the same terms added up by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloc_mllm.data.collate import ConversationCollator, RegionTextCollator
from cloc_mllm.data.dataset import RegionTextDataset, SkipCount
from cloc_mllm.errors import ClocError
from cloc_mllm.models.answer_text import absent_phrases
from cloc_mllm.models.chat_template import caption_template
from cloc_mllm.models.modeling_cloc import ClocOutput
from cloc_mllm.objectives import (
    clip_loss,
    grounding_loss,
    region_text_loss,
    region_text_sigmoid_loss,
    sigmoid_loss,
)
from cloc_mllm.training.presets.config import load_config
from cloc_mllm.training.presets.options import AlignDataOptions, MllmObjective, PretrainObjective
from cloc_mllm.training.pretraining.pretrain import MODEL_INPUTS, PretrainTrainer
from cloc_mllm.training.running.launch import World
from cloc_mllm.training.tuning.mllm import AlignConversations, blind, build_mllm, first_sample_report, mllm_skeleton
from cloc_mllm.training.tuning.phrases import PhraseEmbedder
from cloc_mllm.training.tuning.tune import TuneTrainer
from tests.builders import noise_image, tiny_cloc
from tests.builders_mllm import assistant, grounding_turn, image, region, text, tiny_mllm, user
from tests.builders_training import CONFIGS, TINY_LLM, write_regions


def pretrainer(**objective: Any) -> Any:
    """The trainer's objective without the trainer around it."""
    bare: Any = PretrainTrainer.__new__(PretrainTrainer)
    bare.objective, bare.max_regions, bare._validated = PretrainObjective(**objective), 3, []
    bare._replays, bare.logs_this_step = [], lambda: True
    return bare


@pytest.fixture
def samples(tmp_path: Path) -> list[dict[str, Any]]:
    dataset = RegionTextDataset(write_regions(tmp_path, 8, seed=3), max_regions=3)
    return [dataset[k] for k in range(8)]


def test_the_objective_is_the_weighted_sum_of_its_terms(samples: list[dict[str, Any]]) -> None:
    model, processor = tiny_cloc()
    batch = RegionTextCollator(processor)(samples)
    trainer = pretrainer(region_weight=0.7, grounding_weight=0.3, grounding_loss="l1_giou", filter_threshold=0.8)
    loss, scalars = trainer.losses(model.train(), batch, None)
    out: Any = model(**{key: batch[key] for key in MODEL_INPUTS})
    share = batch["has_regions"].float().mean()
    assert 0 < share < 1
    named = batch["region_unique"]
    expected = clip_loss(out.image_embeds, out.text_embeds, out.logit_scale) + 0.7 * share * (
        region_text_loss(out.region_embeds, out.region_text_embeds, out.region_logit_scale, 0.8)
        + 0.3 * grounding_loss(out.pred_boxes[named], batch["input_boxes"][named], kind="l1_giou")
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(scalars["lambda"], 0.7 * share)
    assert {"loss_clip", "loss_region", "loss_grounding", "scale", "scale_region", "filtered"} <= set(scalars)


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_the_sigmoid_loss_takes_the_place_of_both_softmax_losses(impl: str, samples: list[dict[str, Any]]) -> None:
    model, processor = tiny_cloc()
    model.add_logit_biases(-3.0)
    batch = RegionTextCollator(processor)(samples)
    trainer = pretrainer(contrast="sigmoid", loss_impl=impl, tile_size=3, grounding_weight=0.0, filter_threshold=0.8)
    loss, _ = trainer.losses(model.train(), batch, None)
    out: Any = model(**{key: batch[key] for key in MODEL_INPUTS})
    expected = sigmoid_loss(out.image_embeds, out.text_embeds, out.logit_scale, -3.0)
    expected = expected + batch["has_regions"].float().mean() * region_text_sigmoid_loss(
        out.region_embeds, out.region_text_embeds, out.region_logit_scale, -3.0, 0.8
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for bias in (model.logit_bias, model.region_logit_bias):
        assert bias is not None
        assert bias.grad is not None
        assert float(bias.grad.abs()) > 0


def test_what_only_the_log_wants_is_left_out_where_nothing_is_logged(samples: list[dict[str, Any]]) -> None:
    model, processor = tiny_cloc()
    batch = RegionTextCollator(processor)(samples)
    trainer = pretrainer(filter_threshold=0.8)
    loss, scalars = trainer.losses(model.train(), batch, None)
    trainer.logs_this_step = lambda: False
    silent, fewer = trainer.losses(model, batch, None)
    assert set(scalars) - set(fewer) == {"filtered"}
    torch.testing.assert_close(silent, loss)


def test_tiles_change_nothing_in_a_step(samples: list[dict[str, Any]]) -> None:
    model, processor = tiny_cloc()
    batch = RegionTextCollator(processor)(samples)
    plain, scalars = pretrainer(filter_threshold=0.8).losses(model.train(), batch, None)
    tiled, others = pretrainer(filter_threshold=0.8, loss_impl="tiled", tile_size=3).losses(model, batch, None)
    torch.testing.assert_close(tiled, plain)
    assert scalars.keys() == others.keys()
    torch.testing.assert_close(others["filtered"], scalars["filtered"])


def test_a_batch_without_any_region_trains_on_captions_alone(samples: list[dict[str, Any]]) -> None:
    model, processor = tiny_cloc()
    batch = RegionTextCollator(processor)([{**sample, "regions": []} for sample in samples])
    loss, scalars = pretrainer().losses(model.train(), batch, None)
    torch.testing.assert_close(loss, scalars["loss_clip"])
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.prompter is not None
    assert next(model.prompter.parameters()).grad is not None, "the Prompter must take part in every step"


def test_extra_captions_never_set_two_regions_of_one_image_against_each_other() -> None:
    """Two images with two and one regions: three positives in two draws, of two rows and of one row."""
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (2, 3))
    output = ClocOutput(image_embeds=images, region_text_embeds=texts, logit_scale=torch.tensor([5.0]))
    inputs = {"box_image_index": torch.tensor([0, 0, 1]), "region_valid": torch.ones(3, dtype=torch.bool)}
    got = pretrainer(extra_captions=True, filter_threshold=None)._extra_caption_loss(output, inputs)
    first = region_text_loss(images, texts[[0, 2]], 5.0, None)
    second = region_text_loss(images[:1], texts[[1]], 5.0, None)
    torch.testing.assert_close(got, (2 * first + 1 * second) / 3)


def tuner(phrases: Any, processes: int = 1, windows: int = 1, **objective: float) -> Any:
    bare: Any = TuneTrainer.__new__(TuneTrainer)
    bare.objective, bare.phrases = MllmObjective(**objective), phrases
    bare.world, bare.current_gradient_accumulation_steps = SimpleNamespace(size=processes), windows
    return bare


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    model, processor = tiny_cloc()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_phrases_are_embedded_as_the_encoder_embeds_them(encoder_folder: Path) -> None:
    model, processor = tiny_cloc()
    embed = PhraseEmbedder(encoder_folder)
    got = embed(["Red Ring", "a star", "Red Ring"])
    with torch.no_grad():
        expected = model.get_text_features(**processor.tokenize(["red ring", "a star"])).pooler_output
    torch.testing.assert_close(got, torch.nn.functional.normalize(expected, dim=1)[[0, 1, 0]])
    assert embed([]).shape == (0, model.config.projection_dim)
    assert not got.requires_grad
    embed(["a very much longer phrase about a blue star"])
    assert torch.equal(embed(["Red Ring", "a star", "Red Ring"]), got), "what came before is remembered"


def test_box_terms_are_scaled_for_accumulation_and_the_language_loss_for_processes(encoder_folder: Path) -> None:
    model, processor = tiny_mllm()
    turns = [[user(image(), text("where?")), grounding_turn()], [user("hi"), assistant("well")]]
    batch = ConversationCollator(processor)([{"messages": turn} for turn in turns])
    phrases = PhraseEmbedder(encoder_folder)
    weights = {"box_weight": 0.5, "text_box_weight": 0.25, "distill_weight": 2.0}
    items = torch.tensor(50.0)
    one, parts = tuner(phrases, **weights).losses(model.train(), dict(batch), items)
    extra = 0.5 * parts["loss_box"] + 0.25 * parts["loss_text_box"] + 2.0 * parts["loss_distill"]
    torch.testing.assert_close(one, parts["loss_lm"] + extra)
    many, more = tuner(phrases, processes=4, windows=2, **weights).losses(model, dict(batch), items)
    torch.testing.assert_close(many, 4 * parts["loss_lm"] + extra / 2)
    torch.testing.assert_close(more["loss_lm"], 2 * parts["loss_lm"])


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_in_which_nothing_is_supervised_weighs_nothing(packing: bool) -> None:
    model, processor = tiny_mllm()
    broken = [user(image(), text("where?"), region(0, 0, 900, 9)), grounding_turn()]
    batch = ConversationCollator(processor, packing=packing, skips=SkipCount())([{"messages": broken}])
    trainer = tuner(None, processes=2, windows=2)
    loss, _ = trainer.losses(model.train(), dict(batch), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)
    validated, _ = trainer.losses(model.eval(), dict(batch), None)
    assert validated.item() == 0


def test_distillation_vanishes_where_the_query_is_the_phrase(encoder_folder: Path) -> None:
    trainer = tuner(PhraseEmbedder(encoder_folder))
    asked = trainer.phrases(["a red ring", "a star"])
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.3, 0.4, 0.9]])
    perfect = SimpleNamespace(pred_boxes=boxes, text_prompted_boxes=boxes, ground_embeds=asked)
    total, scalars = trainer._box_terms(perfect, boxes, asked)
    assert float(total) == pytest.approx(0, abs=1e-5)
    opposite = SimpleNamespace(pred_boxes=boxes, text_prompted_boxes=boxes, ground_embeds=-asked)
    assert float(trainer._box_terms(opposite, boxes, asked)[1]["loss_distill"]) == pytest.approx(2, abs=1e-5)
    assert scalars["loss_box"] >= 0


def test_without_a_grounding_head_only_language_is_learnt() -> None:
    model, processor = tiny_mllm(grounding="text")
    batch = ConversationCollator(processor)([{"messages": [user(image(), text("where?")), grounding_turn()]}])
    loss, scalars = tuner(None).losses(model.train(), dict(batch), torch.tensor(9.0))
    assert list(scalars) == ["loss_lm"]
    torch.testing.assert_close(loss, scalars["loss_lm"])


def test_alignment_tells_names_and_finds_and_never_asks_for_the_ambiguous(tmp_path: Path) -> None:
    dataset = RegionTextDataset(write_regions(tmp_path, 12, without=0.0), max_regions=None)
    made = AlignConversations(dataset, AlignDataOptions(train="x", referring=1, grounding=2), seed=0)
    for index in range(12):
        item, regions = made[index], dataset[index]["regions"]
        said = [m for m in item["messages"] if m["role"] == "assistant"]
        assert said[0]["content"][0]["text"] == dataset[index]["caption"]
        found = [i for m in said for i in m["content"] if i["type"] == "region"]
        assert len(found) == min(2, sum(r["unique"] for r in regions))
        by_text = {r["text"]: r for r in regions if r["unique"]}
        assert all(by_text[i["phrase"]]["box"] == i["box"] for i in found)
        asked = [i for m in item["messages"] if m["role"] == "user" for i in m["content"] if i["type"] == "region"]
        assert len(asked) == 1
        named = item["messages"][3]["content"][0]["text"]
        assert any(r["text"] == named and r["box"] == asked[0]["box"] for r in regions)
    repeated = [i["text"] for i in made[0]["messages"][0]["content"] if i["type"] == "text"]
    assert repeated == ["Describe the image."]


def test_alignment_asks_for_every_one_and_for_what_is_not_there(tmp_path: Path) -> None:
    """Squares of like colours are found together; what is asked for in vain shares no word with the image's texts."""
    names = ["red ring", "red ring", "big red ring", "blue star"]
    samples = [
        {
            "image": noise_image(seed=number),
            "caption": f"picture {number}",
            "regions": [
                {"box": [k, k, k + 9, k + 9 + number], "text": name}
                for k, name in enumerate(names if number % 2 else ["green cross"])
            ],
        }
        for number in range(6)
    ]
    dataset = RegionTextDataset(samples, max_regions=None)
    options = AlignDataOptions(train="x", referring=0, grounding=0, several=2, absent=1)
    made = AlignConversations(dataset, options, seed=0)
    _, processor = tiny_mllm()
    said = []
    for index in range(6):
        turns = made[index]["messages"][2:]
        assert made[index]["messages"][2:] == turns  # the same each time
        batch = processor.encode(made[index]["messages"], return_labels=True)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            asked = question["content"][0]["text"]
            if not asked.startswith("Where is every"):
                said.append((index % 2, answer["content"][0]["text"]))
                continue
            assert asked == "Where is every red ring?"
            found = [item["box"] for item in answer["content"] if item["type"] == "region"]
            assert sorted(found) == [[k, k, k + 9, k + 9 + index] for k in range(3)]
            assert batch["ground_phrases"] == ["red ring"] * 3
            assert torch.equal(batch["ground_boxes"], batch["ground_boxes"][batch["ground_boxes"][:, 0].argsort()])
        assert (index % 2 == 1) == ("ground_phrases" in batch and len(batch["ground_phrases"]) == 3)
    assert len(said) >= 4  # an image is drawn from its like only, now and then
    for has_rings, answer in said:
        assert absent_phrases(answer)[0] in (["green cross"] if has_rings else names)


def dataset_regions(made: AlignConversations, index: int) -> list[Any]:
    found: list[Any] = made.dataset[index]["regions"]
    return found


def test_absent_phrases_share_no_word_with_the_image(tmp_path: Path) -> None:
    write_regions(tmp_path, 24, without=0.2)
    options = AlignDataOptions(train="x", absent=2, referring=0, grounding=0)
    shared = AlignConversations(RegionTextDataset(tmp_path, max_regions=None), options, seed=0)
    said = [
        m["content"][-1]["text"] for k in range(24) for m in shared[k]["messages"] if len(dataset_regions(shared, k))
    ]
    assert not any("There is no" in text for text in said), "all phrases are of a square, so none is surely absent"
    lines = [json.loads(line) for line in (tmp_path / "regions.jsonl").read_text().splitlines()]
    for line in lines:
        for found in line["regions"]:
            found["text"] = found["text"].split()[0]
        line["caption"] = " and ".join(found["text"] for found in line["regions"]) or "nothing at all"
    (tmp_path / "regions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = AlignConversations(RegionTextDataset(tmp_path, max_regions=None), options, seed=0)
    denied = 0
    for index in range(24):
        turns = [m["content"][0]["text"] for m in made[index]["messages"][2:]]
        answers = turns[1::2]
        phrases = {answer.removeprefix("There is no ").removesuffix(".") for answer in answers}
        assert len(phrases) == len(answers) <= 2
        assert turns[::2] == [f"Where is the {answer.split()[3][:-1]}?" for answer in answers]
        assert phrases <= {"red", "green", "blue", "yellow"} - {r["text"] for r in lines[index]["regions"]}
        denied += len(phrases)
        assert made.item(index, 0)["messages"][2:] == made.item(index, 0)["messages"][2:], "drawn anew each time"
    assert denied > 24
    assert any(made.item(k, 0)["messages"][2:] != made.item(k, 1)["messages"][2:] for k in range(24))


def test_plain_alignment_is_the_image_and_its_caption(tmp_path: Path) -> None:
    dataset = RegionTextDataset(write_regions(tmp_path, 4), max_regions=None)
    options = AlignDataOptions(train="x", prompts="plain", referring=0, grounding=0)
    item = AlignConversations(dataset, options, seed=0)[0]
    _, processor = tiny_mllm()
    template = caption_template(processor.tokenizer)
    shown = first_sample_report(processor, item, template=template)
    assert shown == f"<image> x {processor.num_image_tokens} ⟦{dataset[0]['caption']}\n⟧"
    batch = ConversationCollator(processor, chat_template=template)([item])
    assert int((batch["input_ids"] != processor.image_token_id).sum()) == int((batch["labels"] != -100).sum())
    with pytest.raises(ValueError, match="'prompts: plain' has no questions: set referring=0, grounding=0"):
        AlignDataOptions(train="x", prompts="plain")


def test_the_first_sample_is_shown_with_what_is_learnt() -> None:
    _, processor = tiny_mllm()
    turns = [user(image(), text("what is "), region(1, 2, 20, 20)), assistant("a red ring")]
    shown = first_sample_report(processor, {"messages": turns})
    assert "⟦a red ring<|im_end|>⟧" in shown
    assert f"<image> x {processor.num_image_tokens} " in shown
    assert shown.count("⟦") == 1


@torch.no_grad()
def test_blinding_hides_the_image_from_every_output() -> None:
    model, processor = tiny_mllm()
    blind(model, "frozen")
    outputs = []
    for seed in (1, 2):
        turns = [user(image(seed), text("what is "), region(1, 2, 20, 20)), grounding_turn()]
        outputs.append(model.eval()(**processor.encode([turns])))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].pred_boxes, outputs[1].pred_boxes)
    with pytest.raises(Exception, match="would learn to see again"):
        blind(model, "full")


def test_a_preset_says_how_many_tokens_a_region_and_boxes_a_phrase_has(encoder_folder: Path, tmp_path: Path) -> None:
    """The model, its processor and the skeleton that is counted agree; what has no meaning is refused."""
    (tmp_path / "data").mkdir()
    words = [
        f"model.encoder={encoder_folder}",
        f"data.train={write_regions(tmp_path / 'data', 4)}",
        f"run.output={tmp_path / 'run'}",
        *TINY_LLM,
        "data.validation=null",
        "model.num_region_tokens=5",
    ]
    config = load_config(CONFIGS / "align_quick.yaml", [*words, "model.boxes_per_phrase=3"])
    model, processor = build_mllm(config, World(rank=0, local_rank=0, size=1, local_size=1, use_cpu=True))
    assert model.config.num_region_tokens == processor.num_region_tokens == 5
    assert model.model.grounding_head.ordinals.shape[0] == 2
    with torch.device("meta"):
        skeleton = mllm_skeleton(config)
    assert skeleton.config.num_region_tokens == 5
    assert skeleton.model.grounding_head.ordinals.shape == model.model.grounding_head.ordinals.shape
    with pytest.raises(ClocError, match=r"'model\.num_region_tokens' is 4"):
        load_config(CONFIGS / "align_quick.yaml", [*words, "model.num_region_tokens=4"])
    with pytest.raises(ClocError, match="'boxes_per_phrase' is the grounding head's"):
        load_config(CONFIGS / "align_quick.yaml", [*words, "model.grounding=text", "model.boxes_per_phrase=2"])
