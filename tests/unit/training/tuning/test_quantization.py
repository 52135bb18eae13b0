"""QLoRA: the language model's linear layers in 4 bits and nothing else; the export knows nothing of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cloc_mllm.errors import ClocError
from cloc_mllm.training.export import EXPORT_FOLDER, export_model
from cloc_mllm.training.presets.options import MllmParts, OptimOptions, PartOptions
from cloc_mllm.training.presets.parts import apply_parts, parameter_groups
from cloc_mllm.training.tuning.mllm import load_mllm
from cloc_mllm.training.tuning.quantization import quantize_llm
from tests.builders_mllm import grounding_turn, image, model_inputs, region, text, tiny_mllm, user

OPTIM = OptimOptions(lr=1e-2)
TALK = [user(image(), text("what is "), region(2, 3, 20, 22)), grounding_turn()]


def parts(**llm: Any) -> MllmParts:
    return MllmParts.model_validate({"llm": {"mode": "lora", "rank": 4, "quantization": "nf4", **llm}})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [None, ["q_proj", "v_proj"]])
def test_training_moves_adapters_and_the_export_merges_them_into_the_weights_as_they_were(
    tied: bool, layers: list[str] | None, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, processor = tiny_mllm(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = parts(layers=layers)
    originals = quantize_llm(model, chosen.llm, keep=True)
    packed = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(packed) == len(originals) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert "lm_head" in plain
    assert {"vision_tower", "multi_modal_projector", "prompter", "region_projector", "grounding_head"} <= {
        name.split(".")[1] for name in plain if "." in name
    }

    adapted, reports = apply_parts(model, chosen, OPTIM)
    whole, _ = tiny_mllm(tied=tied)
    _, unquantized = apply_parts(whole, parts(layers=layers, quantization=None), OPTIM)
    assert reports == unquantized, "counted otherwise than without 4 bits"
    optimizer = torch.optim.AdamW(parameter_groups(adapted, chosen, OPTIM))
    batch = model_inputs(processor.encode([TALK], return_labels=True))
    losses = []
    for _ in range(4):
        loss = adapted.train()(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    world = SimpleNamespace(is_main=True)
    config = _config(tmp_path)
    trainer = SimpleNamespace(model=adapted, zero=None, world=world, exact_weights=originals, config=config)
    export_model(trainer, lambda: apply_parts(type(model)(model.config), chosen, OPTIM)[0], processor)
    found, _ = load_mllm(tmp_path / EXPORT_FOLDER)
    after = found.state_dict()
    assert {str(value.dtype) for value in after.values()} <= {"torch.float32", "torch.int64"}
    for name, adapter in adapted.named_modules():
        if not hasattr(adapter, "lora_A") or "default" not in adapter.lora_A:
            continue
        own = name.removeprefix("base_model.model.") + ".weight"
        delta = adapter.scaling["default"] * adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
        torch.testing.assert_close(after[own], before[own] + delta.detach(), atol=1e-6, rtol=1e-5)
        assert not torch.equal(after[own], before[own]), f"{own} has not moved"
    for name in packed:
        if layers is not None and name.rpartition(".")[-1] not in layers:
            assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]), "rounding to 4 bits was exported"


def _config(output: Path) -> Any:
    from cloc_mllm.training.presets.config import load_config
    from tests.builders_training import CONFIGS

    return load_config(CONFIGS / "instruct_quick.yaml", [f"run.output={output}"])


def test_what_cannot_be_quantized_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_mllm()
    assert quantize_llm(model, PartOptions(mode="lora"), keep=True) == {}
    with pytest.raises(ClocError, match="ZeRO stage 3"):
        quantize_llm(model, parts().llm, keep=False, stage=3)
    for mode in ("full", "frozen", "tokens"):
        with pytest.raises(ValueError, match=f"'quantization' is for 'mode: lora', not for 'mode: {mode}'"):
            PartOptions.model_validate({"mode": mode, "quantization": "nf4"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ClocError, match="needs bitsandbytes") as caught:
        quantize_llm(model, parts().llm, keep=False)
    assert "cloc-mllm[qlora]" in str(caught.value)
