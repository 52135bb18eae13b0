"""One module for each suite of `cloc-mllm eval`, and the table of them (`registry.py`)."""
