"""Tests of cloc_mllm.data."""
