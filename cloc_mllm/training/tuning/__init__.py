"""The MLLM: put together, aligned, tuned, adapted."""
