"""cloc_mllm: multimodal LLMs that understand regions."""

__version__ = "0.1.0"
