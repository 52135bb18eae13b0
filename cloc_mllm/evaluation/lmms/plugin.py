"""What lmms-eval reads through the entry point `lmms_eval.models`: which name stands for which class.

It is imported whenever `lmms_eval.models` is, so it imports nothing else. A plugin that raises here would take every
other plugin with it.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MODEL_NAME = "cloc_mllm"

MANIFESTS = [ModelManifest(model_id=MODEL_NAME, chat_class_path="cloc_mllm.evaluation.lmms.chat.ClocMllmChat")]
