"""Makes our classes known to the Auto classes; called once both ``cloc_mllm`` and transformers are imported."""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_cloc import ClocConfig, ClocVisionConfig
from .configuration_cloc_mllm import ClocMllmConfig
from .image_processing_cloc import ClocImageProcessor
from .modeling_cloc import ClocModel, ClocVisionModel
from .modeling_cloc_mllm import ClocMllmForConditionalGeneration, ClocMllmModel
from .processing_cloc import ClocProcessor
from .processing_cloc_mllm import ClocMllmProcessor


def register_auto_classes() -> None:
    """Register configurations, models and processors, once, and let checkpoints carry their code.

    The code in a checkpoint runs only where this package is not installed, and only with ``trust_remote_code=True``.
    """
    for config, model in (
        (ClocConfig, ClocModel),
        (ClocVisionConfig, ClocVisionModel),
        (ClocMllmConfig, ClocMllmModel),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": ClocImageProcessor}, exist_ok=True)
        config.register_for_auto_class()
    AutoModelForImageTextToText.register(ClocMllmConfig, ClocMllmForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(ClocConfig, ClocProcessor, exist_ok=True)
    AutoProcessor.register(ClocMllmConfig, ClocMllmProcessor, exist_ok=True)
    for encoder in (ClocModel, ClocVisionModel):
        encoder.register_for_auto_class("AutoModel")
    ClocMllmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    ClocImageProcessor.register_for_auto_class("AutoImageProcessor")
    for processor in (ClocProcessor, ClocMllmProcessor):
        processor.register_for_auto_class()
