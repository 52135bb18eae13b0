"""How pre-training saves work: patch dropout, texts in buckets, compiled towers; set on the model, not saved in it."""

from __future__ import annotations

from cloc_mllm.models.modeling_cloc import ClocModel
from cloc_mllm.training.presets.options import ComputeOptions


def apply_compute(model: ClocModel, options: ComputeOptions) -> None:
    """Set a model up for training as a preset says; its names, weights and checkpoints stay what they are.

    The towers' stacks of layers are compiled, where nearly all of the time goes. What lies around them (embeddings,
    pooling, a hook that drops patches) stays plain Python, and needs no compiler to understand it.

    Args:
        model: The encoder, changed in place.
        options: The preset's `compute` block.
    """
    model.patch_dropout = options.patch_dropout
    model.text_buckets, model.text_multiple_of = options.text_buckets, options.text_multiple_of
    if options.compile is not None:
        for tower in (model.vision_model, model.text_model):
            tower.encoder.compile(backend=options.compile)
