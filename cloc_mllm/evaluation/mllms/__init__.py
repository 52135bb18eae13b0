"""Questions to an MLLM, and its answers."""
