"""The encoder: where it starts, what it is trained on and judged by."""
