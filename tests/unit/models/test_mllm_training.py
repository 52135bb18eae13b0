"""Training: every part runs in every step, dummies weigh nothing, and adapters and checkpointing change nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.builders_mllm import assistant, grounding_turn, image, model_inputs, region, text, tiny_mllm, user

WITH_ALL = [user(image(1), text("what is "), region(3, 4, 20, 25), text("?")), assistant("a ring"), user("where?")]
BATCHES = {
    "all": [[*WITH_ALL, grounding_turn()]],
    "no region": [[user(image(1), text("where?")), grounding_turn()]],
    "no ground": [[*WITH_ALL[:2]]],
    "image only": [[user(image(1), text("what?")), assistant("a ring")]],
    "text only": [[user("how many?"), assistant("two")]],
}
PARTS = (
    "embed_tokens",
    "vision_tower",
    "multi_modal_projector",
    "prompter",
    "region_projector",
    "language_model",
    "grounding_head",
    "lm_head",
)
ZERO_GRAD = {
    "no region": ("prompter", "region_projector"),
    "no ground": ("grounding_head",),
    "image only": ("prompter", "region_projector", "grounding_head"),
    "text only": ("vision_tower", "multi_modal_projector", "prompter", "region_projector", "grounding_head"),
}


@pytest.fixture(scope="module")
def mllm() -> tuple[Any, Any]:
    return tiny_mllm()


def training_batch(processor: Any, name: str) -> dict[str, Any]:
    return model_inputs(processor.encode(BATCHES[name], return_labels=True))


def part_of(parameter: str) -> str:
    return parameter.removeprefix("model.").split(".")[0]


@contextmanager
def order_of_calls(model: Any) -> Iterator[list[str]]:
    """The parts in the order they are called, and, behind ``|``, in the order gradients come back to them."""
    calls: list[str] = []
    inner = model.model
    modules = {name: getattr(inner, name, None) for name in PARTS}
    modules |= {"embed_tokens": model.get_input_embeddings(), "lm_head": model.lm_head}
    hooks = [
        module.register_forward_pre_hook(lambda *args, name=name: calls.append(name))
        for name, module in modules.items()
        if module is not None
    ]
    # Backward hooks want a module whose output is one tensor, behind something that has a gradient.
    tensors = {**modules, "vision_tower": inner.vision_tower.encoder.layers[1].mlp}
    tensors |= {"language_model": inner.language_model.norm, "grounding_head": inner.grounding_head.box_head}
    tensors |= {"prompter": inner.prompter.projection, "embed_tokens": inner.language_model.layers[0].mlp}
    hooks += [
        module.register_full_backward_pre_hook(lambda *args, name=name: calls.append(f"| {name}"))
        for name, module in tensors.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("queried", [False, True])
def test_every_batch_runs_every_part_once_in_one_order(mllm: tuple[Any, Any], queried: bool) -> None:
    model, processor = mllm
    orders = {}
    model.train()
    for name in BATCHES:
        batch = training_batch(processor, name)
        queries = torch.zeros(len(batch["ground_image_index"]), 24) if queried else None
        with order_of_calls(model) as calls:
            output = model(**batch, ground_queries=queries)
            (output.loss + output.pred_boxes.sum()).backward()
        orders[name] = list(calls)
        assert output.pred_boxes.shape == (len(batch["ground_image_index"]), 4)
        assert (output.text_prompted_boxes is not None) == queried
        # Empty or not, what the trainer may use is on the graph: ZeRO-3 compares over the ranks what backward reaches.
        assert output.pred_boxes.requires_grad
        assert output.ground_embeds.requires_grad
        assert output.text_prompted_boxes is None or output.text_prompted_boxes.requires_grad
    model.zero_grad()
    model.eval()
    forwards = [call for call in orders["all"] if "|" not in call]
    assert forwards == list(PARTS)
    assert len(orders["all"]) == 2 * len(PARTS)
    for name, order in orders.items():
        assert order == orders["all"], name


@pytest.mark.parametrize("name", list(ZERO_GRAD))
def test_dummies_weigh_nothing(mllm: tuple[Any, Any], name: str) -> None:
    model, processor = mllm
    batch = training_batch(processor, name)
    losses, grads = {}, {}
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        losses[training] = output.loss.detach()
        grads[training] = {n: p.grad for n, p in model.named_parameters()}
    model.eval()
    model.zero_grad()
    assert torch.equal(losses[False], losses[True])
    for parameter, grad in grads[True].items():
        plain = grads[False][parameter]
        if part_of(parameter) in ZERO_GRAD[name] and "post_layernorm" not in parameter:
            assert plain is None, parameter
            assert grad is not None, parameter
            assert not grad.any(), parameter
        elif plain is not None:
            torch.testing.assert_close(grad, plain, msg=parameter)


def test_evaluation_runs_only_what_is_needed(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    with order_of_calls(model) as calls, torch.no_grad():
        model(**training_batch(processor, "text only"))
    assert calls == ["embed_tokens", "language_model", "lm_head"]


def test_boxes_and_queries_carry_gradient_to_the_parts_they_come_from(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    model.train()
    output = model(**training_batch(processor, "all"), ground_queries=torch.randn(1, 24))
    reached = {}
    for name in ("pred_boxes", "ground_embeds", "text_prompted_boxes"):
        model.zero_grad()
        getattr(output, name)[:, 0].sum().backward(retain_graph=True)
        reached[name] = {part_of(n) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    model.eval()
    assert "language_model" in reached["pred_boxes"]
    assert "grounding_head" in reached["pred_boxes"]
    assert "language_model" in reached["ground_embeds"]
    assert reached["text_prompted_boxes"] == {"vision_tower", "grounding_head"}


def test_all_weights_but_the_towers_unused_norm_learn(mllm: tuple[Any, Any]) -> None:
    model, processor = mllm
    model.train()
    output = model(**training_batch(processor, "all"))
    (output.loss + output.pred_boxes.sum()).backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    model.zero_grad()
    model.eval()
    assert idle == {f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")}
    assert all(parameter.dim() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool) -> None:
    model, processor = tiny_mllm()
    batch = training_batch(processor, "all")
    plain = copy.deepcopy(model).train()
    plain(**batch).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()(**batch).loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name, atol=1e-6, rtol=1e-4)


def test_bf16_trains_with_finite_gradients() -> None:
    model, processor = tiny_mllm()
    model.to(torch.bfloat16).train()
    for name in BATCHES:
        output = model(**training_batch(processor, name))
        assert output.pred_boxes.dtype == torch.float32
        (output.loss + output.pred_boxes.sum()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def lora(model: Any) -> PeftModel:
    return get_peft_model(
        model,
        LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
            modules_to_save=["multi_modal_projector", "prompter", "region_projector", "grounding_head"],
        ),
    )


def test_adapters_train_save_load_and_merge(tmp_path: Any) -> None:
    model, processor = tiny_mllm()
    reference = copy.deepcopy(model)
    batch = training_batch(processor, "all")
    adapted = lora(model)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # twice: LoRA's first factor starts to learn when the second is no longer zero
        optimizer.zero_grad()
        output = adapted(**batch)
        (output.loss + output.pred_boxes.sum()).backward()
        without = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        optimizer.step()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    assert any("grounding_head" in name and "localizer" in name for name in trained)
    adapted.eval()
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        before, untouched = adapted(**batch), reference(**batch)
        again = PeftModel.from_pretrained(reference, tmp_path).eval()
        loaded = again(**batch)
        merged = adapted.merge_and_unload()(**batch)
    assert not torch.allclose(before.logits, untouched.logits, atol=1e-3)
    for name in ("logits", "pred_boxes", "ground_embeds"):
        torch.testing.assert_close(getattr(loaded, name), getattr(before, name))
        torch.testing.assert_close(getattr(merged, name), getattr(before, name), atol=1e-5, rtol=1e-4)
    question = processor.encode(WITH_ALL[:1], add_generation_prompt=True)
    expected = model.generate(**question, max_new_tokens=5)
    assert torch.equal(again.generate(**question, max_new_tokens=5), expected)
    assert torch.equal(again.generate_grounded(**question, max_new_tokens=5).sequences, expected)
