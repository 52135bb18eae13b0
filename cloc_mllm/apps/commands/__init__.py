"""One module for each sub-command of cloc-mllm."""
