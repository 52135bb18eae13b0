"""Without regions the MLLM is LLaVA: transformers' own class with the same weights is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cloc_mllm.models.configuration_cloc_mllm import ClocMllmConfig
from cloc_mllm.models.modeling_cloc_mllm import ClocMllmForConditionalGeneration
from tests.builders import tiny_cloc
from tests.builders_mllm import (
    LLM_FAMILIES,
    assistant,
    grounding_turn,
    image,
    model_inputs,
    region,
    stock_llava,
    text,
    tiny_llm,
    tiny_llm_tokenizer,
    tiny_mllm,
    user,
)

CONVERSATIONS = [
    [
        user(image(1), {"type": "text", "text": "what is this"}),
        assistant("a red circle"),
        user("why"),
        assistant("yes"),
    ],
    [user("how many crosses are there"), assistant("two")],
    [user(image(2), image(3), {"type": "text", "text": "which is red"}), assistant("no")],
]


@pytest.mark.parametrize(
    ("family", "tied", "strategy", "layer"),
    [
        ("llama", False, "default", -2),
        ("llama", True, "full", -1),
        ("qwen2", True, "default", [-2, -1]),
        ("qwen2", False, "full", 1),
    ],
)
def test_logits_and_loss_are_those_of_llava(family: str, tied: bool, strategy: str, layer: int | list[int]) -> None:
    model, processor = tiny_mllm(
        family, tied=tied, vision_feature_select_strategy=strategy, vision_feature_layer=layer, grounding="head"
    )
    batch = model_inputs(processor.encode(CONVERSATIONS, return_labels=True))
    batch.pop("ground_image_index")
    with torch.no_grad():
        ours, theirs = model(**batch), stock_llava(model)(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert float(ours.loss) > 0


def test_greedy_generation_is_that_of_llava() -> None:
    model, processor = tiny_mllm("qwen2")
    batch = processor.encode([turns[:1] for turns in CONVERSATIONS], add_generation_prompt=True)
    ours = model.generate(**batch, max_new_tokens=8)
    assert torch.equal(ours, stock_llava(model).generate(**batch, max_new_tokens=8))


def test_num_items_in_batch_reaches_the_loss() -> None:
    model, processor = tiny_mllm()
    batch = model_inputs(processor.encode(CONVERSATIONS, return_labels=True))
    learnt = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        mean, summed = model(**batch).loss, model(**batch, num_items_in_batch=2 * learnt).loss
    torch.testing.assert_close(summed, mean / 2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_text_alone_gives_the_logits_the_language_model_gave(family: str) -> None:
    llm = tiny_llm(family, tied=True)
    model, _ = tiny_mllm(family, tied=True)
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, together = llm(ids).logits, model(ids).logits
    assert torch.equal(alone, together[..., : alone.shape[-1]])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_embeddings_may_have_any_name() -> None:
    encoder, _ = tiny_cloc()
    _, processor = tiny_mllm()
    torch.manual_seed(0)
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=350, n_embd=32, n_layer=1, n_head=2, n_positions=128)).eval()
    model = ClocMllmForConditionalGeneration.from_parts(encoder, llm, processor.tokenizer)
    assert model.lm_head.weight is model.model.language_model.wte.weight
    batch = processor.encode(CONVERSATIONS, add_generation_prompt=True)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_parts_are_copies_and_start_from_the_encoder() -> None:
    encoder, _ = tiny_cloc()
    before = copy.deepcopy(encoder.state_dict())
    model, _ = tiny_mllm(encoder=encoder)
    head = model.model.grounding_head
    for ours, theirs in (
        (model.model.vision_tower, encoder.vision_model),
        (model.model.prompter, encoder.prompter),
        (head.localizer, encoder.prompter),
        (head.box_head, encoder.box_head),
    ):
        weights = theirs.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("encoder_kind", [None, "roi_align", "prompter"])
@pytest.mark.parametrize("region_encoder", ["none", "roi_align", "prompter"])
def test_any_encoder_takes_any_region_encoder(encoder_kind: str | None, region_encoder: str) -> None:
    encoder, _ = tiny_cloc(kind=encoder_kind)
    model, _ = tiny_mllm(encoder=encoder, region_encoder=region_encoder)
    assert (model.model.prompter is None) == (region_encoder == "none")
    if region_encoder == encoder_kind:
        assert torch.equal(model.model.prompter.projection.weight, encoder.prompter.projection.weight)
    assert model.model.grounding_head is not None


def test_a_tokenizer_without_control_tokens_is_refused() -> None:
    encoder, _ = tiny_cloc()
    with pytest.raises(ValueError, match=r"no <image>, <region>, <ground>: pass the one of the processor"):
        ClocMllmForConditionalGeneration.from_parts(encoder, tiny_llm(), tiny_llm_tokenizer())


def test_logits_that_are_finished_in_an_unknown_way_are_refused() -> None:
    encoder, _ = tiny_cloc()
    _, processor = tiny_mllm()
    llm = tiny_llm("llama")
    llm.register_forward_hook(lambda module, args, output: type(output)(logits=output.logits * 2))
    with pytest.raises(ValueError, match="does something to its logits, beyond one linear layer"):
        ClocMllmForConditionalGeneration.from_parts(encoder, llm, processor.tokenizer)


@pytest.mark.parametrize(("tied", "grounding"), [(False, "head"), (True, "head"), (True, "text")])
@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_any_language_model(family: str, tied: bool, grounding: str, tmp_path: Path) -> None:
    """Its own logits on text; a gradient in every part; and batched answers as one by one, after saving and loading."""
    llm = tiny_llm(family, tied=tied)
    model, processor = tiny_mllm(family, tied=tied, grounding=grounding)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, together = llm(ids).logits, model(ids).logits
    torch.testing.assert_close(alone, together[..., : alone.shape[-1]], rtol=0, atol=1e-6)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    asked = [[user(image(1), text("what is "), region(2, 2, 20, 20))], [user("why")], [user(image(2), text("where"))]]
    said = [[*turns, grounding_turn() if k != 1 else assistant("yes")] for k, turns in enumerate(asked)]
    loss = model.train()(**model_inputs(processor.encode(said, return_labels=True))).loss
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith("model.vision_tower.") for name in without), without

    model.eval().save_pretrained(tmp_path)
    loaded = ClocMllmForConditionalGeneration.from_pretrained(tmp_path)
    batch = processor.encode(asked, add_generation_prompt=True)
    together = loaded.generate(**batch, max_new_tokens=5, min_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    for turns, answer in zip(asked, together, strict=True):
        one = processor.encode([turns], add_generation_prompt=True)
        alone = model.generate(**one, max_new_tokens=5, min_new_tokens=5)[0, one["input_ids"].shape[1] :]
        assert torch.equal(alone, answer)


def test_new_vocabulary_never_shrinks_and_is_never_said() -> None:
    model, processor = tiny_mllm()
    tokenizer = processor.tokenizer
    assert model.config.text_config.vocab_size >= len(tokenizer)
    never = set(model.generation_config.suppress_tokens)
    assert {processor.image_token_id, processor.region_token_id} <= never
    assert processor.ground_token_id not in never
    assert set(range(len(tokenizer), model.config.text_config.vocab_size)) <= never
    roomy = ClocMllmForConditionalGeneration.from_parts(tiny_cloc()[0], tiny_llm(vocab_size=400), tokenizer)
    assert roomy.get_input_embeddings().weight.shape[0] == 400


def test_generation_stops_where_a_turn_ends() -> None:
    model, processor = tiny_mllm()
    assert model.generation_config.eos_token_id == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"region_encoder": "magic"}, "unknown region_encoder 'magic'"),
        ({"grounding": "magic"}, "unknown grounding 'magic'"),
        ({"region_encoder": "prompter"}, "region_encoder 'prompter' needs prompter_config"),
        ({"grounding_config": {"hidden_size": 1024}}, "grounding 'text' takes no grounding_config"),
        ({"grounding": "head", "grounding_config": {"hidden_size": 48}}, "grounding_config is 48 wide, the tower 1024"),
        (
            {"region_encoder": "prompter", "prompter_config": {"hidden_size": 1024, "kind": "roi_align"}},
            "prompter_config is of kind 'roi_align'",
        ),
    ],
)
def test_configurations_without_meaning_are_refused(options: dict, problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        ClocMllmConfig(**options)


def test_the_configuration_survives_a_round_trip(tmp_path) -> None:
    model, _ = tiny_mllm(region_encoder="roi_align")
    model.config.save_pretrained(tmp_path)
    again = ClocMllmConfig.from_pretrained(tmp_path)
    assert again.prompter_config.kind == "roi_align"
    assert again.grounding_config.kind == "prompter"
    assert again.region_token_id == model.config.region_token_index
    ours, theirs = again.to_dict(), model.config.to_dict()
    assert {k: v for k, v in ours.items() if k != "architectures"} == {
        k: v for k, v in theirs.items() if k != "architectures"
    }
