"""Writes checkpoints in layouts that other programs load without knowing this package; one module a layout."""
