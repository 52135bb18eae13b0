"""Noise, smoothed labels and packed rows: each against what it is said to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModel,
    BloomConfig,
    GPT2Config,
    Lfm2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
)

from cloc_mllm.errors import ClocError
from cloc_mllm.models.packed_attention import BLOCKS
from cloc_mllm.training.presets.options import MllmParts, OptimOptions
from cloc_mllm.training.presets.parts import apply_parts, llm_layers
from cloc_mllm.training.tuning.language import EmbeddingNoise, prepare_packing, smooth_labels, smoothed_loss
from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_mllm, user

TALKS = [
    [user(image(1), text("what is "), region(3, 4, 20, 25), text("?")), assistant("a ring")],
    [user("how many?"), assistant("two, or three, or four")],
    [user(image(2), text("where?")), grounding_turn()],
]
ALPHA = 5.0


def fed_to_the_language_model(model: Any, batch: dict[str, Any], noise: EmbeddingNoise | None) -> torch.Tensor:
    """The embeddings that reach the language model, image and region features in their places."""
    seen = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = inner.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    if noise is None:
        model(**batch)
    else:
        with noise.of(batch):
            model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("adapted", [None, "lora", "tokens"])
@pytest.mark.parametrize("packing", [False, True])
def test_noise_is_on_real_text_alone_and_as_strong_as_said(packing: bool, adapted: str | None) -> None:
    model, processor = tiny_mllm()
    if adapted is not None:
        model, _ = apply_parts(model, MllmParts.model_validate({"llm": adapted}), OptimOptions())
    model.train()
    options = {"packing": True, "pack_length": 200} if packing else {}
    batch = model_inputs(processor.encode(TALKS, return_labels=True, **options))
    clean = fed_to_the_language_model(model, batch, None)
    noise = EmbeddingNoise(model, ALPHA)
    torch.testing.assert_close(fed_to_the_language_model(model, batch, None), clean, msg="noise without being asked")
    torch.manual_seed(0)
    added = fed_to_the_language_model(model, batch, noise) - clean
    ids = batch["input_ids"]
    is_text = (ids != model.config.image_token_index) & (ids != model.config.region_token_index)
    if not packing:
        is_text &= batch["attention_mask"].bool()
    assert (added[~is_text] == 0).all(), "a feature or a padding got noise"
    # By conversation, found on its own: its text tokens' number, and noise that fills the interval it says.
    for one in TALKS:
        alone = processor.encode([one], return_labels=True)["input_ids"][0]
        bare = (alone != model.config.image_token_index) & (alone != model.config.region_token_index)
        bound = ALPHA / (int(bare.sum()) * clean.shape[-1]) ** 0.5
        row, start = next(
            (r, s)
            for r in range(len(ids))
            for s in range(ids.shape[1] - len(alone) + 1)
            if torch.equal(ids[r, s : s + len(alone)], alone)
        )
        mine = added[row, start : start + len(alone)][bare]
        assert bound * 0.9 < float(mine.abs().max()) <= bound * 1.001
        assert abs(float(mine.mean())) < bound / 4


def test_smoothed_labels_are_torchs() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11, requires_grad=True), torch.randint(0, 11, (3, 7))
    labels[0, :4] = labels[2] = -100
    flat, targets = logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1)
    kept = targets != -100
    wanted = functional.cross_entropy(flat[kept], targets[kept], label_smoothing=0.1)
    torch.testing.assert_close(smoothed_loss(logits, labels, 11, 0.1), wanted)
    whole_step = functional.cross_entropy(flat[kept], targets[kept], label_smoothing=0.1, reduction="sum") / 40
    torch.testing.assert_close(smoothed_loss(logits, labels, 11, 0.1, torch.tensor(40)), whole_step)


def test_only_training_is_smoothed() -> None:
    model, processor = tiny_mllm()
    batch = model_inputs(processor.encode(TALKS, return_labels=True))
    with torch.no_grad():
        plain = model.eval()(**batch).loss
        smooth_labels(model, 0.1)
        torch.testing.assert_close(model(**batch).loss, plain)
        output = model.train()(**batch, num_items_in_batch=50)
    wanted = smoothed_loss(output.logits, batch["labels"], output.logits.shape[-1], 0.1, 50)
    torch.testing.assert_close(output.loss, wanted)
    assert abs(float(wanted) * 50 / int((batch["labels"][:, 1:] != -100).sum()) - float(plain)) > 1e-3


SIZE = {"vocab_size": 64, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
FAMILIES: dict[str, tuple[PreTrainedConfig, set[str] | None]] = {
    "phi": (PhiConfig(**SIZE, **HEADS, intermediate_size=48), {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), {"c_attn", "c_fc", "c_proj"}),
    # A mask of its own, which would mix neighbours; attended to block by block, none is needed.
    "opt": (
        OPTConfig(**SIZE, **HEADS, ffn_dim=48, word_embed_proj_dim=32),
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
    # A convolution, biases by distance: neither knows where a conversation begins.
    "lfm2": (Lfm2Config(**SIZE, **HEADS, num_key_value_heads=2, layer_types=["conv", "full_attention"]), None),
    "bloom": (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), None),
}


def around(config: PreTrainedConfig) -> Any:
    """As much of an MLLM as there is around its language model, random and far from linear."""
    torch.manual_seed(0)
    llm = AutoModel.from_config(config).eval()
    for parameter in llm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    whole: Any = torch.nn.Module()
    whole.model = torch.nn.Module()
    whole.model.language_model, whole.device = llm, torch.device("cpu")
    whole.get_input_embeddings, whole.config = llm.get_input_embeddings, SimpleNamespace(text_config=config)
    return whole


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_language_models_that_can_be_packed_pass(family: str) -> None:
    model, _ = tiny_mllm(family)
    model.train()
    prepare_packing(model)
    assert model.training
    assert model.model.language_model.training
    assert model.model.language_model.config._attn_implementation == BLOCKS
    assert BLOCKS not in model.config.to_json_string(), "where it is loaded, nobody may know it"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_are_packed_or_refused_and_their_layers_found(family: str) -> None:
    config, layers = FAMILIES[family]
    model = around(config)
    if layers is None:
        with pytest.raises(ClocError, match="lets packed conversations see each other"):
            prepare_packing(model)
        return
    prepare_packing(model)
    found = llm_layers(model)
    assert {name.rpartition(".")[-1] for name in found} == layers
    assert len(found) == 2 * (
        6 if family in ("phi", "opt") else 4
    )  # GPT-2 has a c_proj in attention and one in the MLP
    some = sorted(layers)[:1]
    assert {name.rpartition(".")[-1] for name in llm_layers(model, some)} == set(some)
    with pytest.raises(ClocError, match=r"has no layer nothing.*Choose 'parts\.llm\.layers' among"):
        llm_layers(model, [*some, "nothing"])
