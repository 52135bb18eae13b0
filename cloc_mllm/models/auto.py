"""Makes our classes known to the Auto classes; called once both ``cloc_mllm`` and transformers are imported."""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from .configuration_cloc import ClocConfig, ClocVisionConfig
from .image_processing_cloc import ClocImageProcessor
from .modeling_cloc import ClocModel, ClocVisionModel
from .processing_cloc import ClocProcessor


def register_auto_classes() -> None:
    """Register configurations, models and processors, once."""
    for config, model in ((ClocConfig, ClocModel), (ClocVisionConfig, ClocVisionModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": ClocImageProcessor}, exist_ok=True)
    AutoProcessor.register(ClocConfig, ClocProcessor, exist_ok=True)
