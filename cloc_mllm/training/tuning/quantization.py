"""QLoRA (Dettmers et al., arXiv 2305.14314): the frozen language model's linear layers in 4 bits, adapters beside them.

Nothing else is quantised: not the tower, the connectors, the grounding head, the embeddings or the head. The export
merges the adapters into the weights as they were before, so what was rounded for training never leaves it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.options import PartOptions
from cloc_mllm.training.presets.parts import llm_layers


def quantize_llm(
    model: nn.Module, llm: PartOptions, *, keep: bool, stage: int | None = None
) -> dict[str, torch.Tensor]:
    """Put the language model's linear layers into 4 bits, in place, if the preset says so.

    Args:
        model: The whole MLLM, on the CPU, before its parts are applied.
        llm: The preset's `parts.llm`.
        keep: Whether to return the weights as they were: the process that writes the export needs them.
        stage: The run's ZeRO stage; ``None`` without DeepSpeed.

    Returns:
        Those weights, by the names that they will have under the adapters; empty if nothing is quantised or kept.

    Raises:
        ClocError: bitsandbytes is missing, the stage is 3, or the language model has no layers to quantise.
    """
    if llm.quantization is None:
        return {}
    if stage == 3:
        raise ClocError(
            "'parts.llm.quantization' with ZeRO stage 3: it would partition packed 4-bit weights like numbers",
            remedy="Use run.zero=2.",
        )
    bnb = _bitsandbytes()
    originals: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in llm_layers(model).items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise ClocError("'parts.llm.quantization' knows linear layers only, and this language model has none")
    adapted = set(llm_layers(model, llm.layers))
    for name, layer in layers.items():
        if keep:
            infix = ".base_layer" if name in adapted else ""
            originals[f"base_model.model.{name}{infix}.weight"] = layer.weight.detach()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, _in_four_bits(bnb, layer, llm.quantization))
    # What peft asks for, to choose the adapters that go with such layers.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return originals


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ClocError(
            "'parts.llm.quantization' needs bitsandbytes, which is not installed",
            remedy="pip install 'cloc-mllm[qlora]', or set parts.llm.quantization=null.",
        ) from error
    return bitsandbytes


def _in_four_bits(bnb: Any, layer: nn.Linear, kind: str) -> nn.Module:
    """Return a layer's 4-bit twin, scales quantised a second time as in the paper."""
    twin = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type=kind, compress_statistics=True
    )
    # It quantises the weight in `to`, whatever the device.
    twin.weight = bnb.nn.Params4bit(
        layer.weight.detach().clone(), requires_grad=False, quant_type=kind, compress_statistics=True
    )
    if layer.bias is not None:
        twin.bias = nn.Parameter(layer.bias.detach().clone())
    twin.requires_grad_(False)
    done: nn.Module = twin.to(layer.weight.device)
    return done
