"""The losses of CLOC pre-training, global over all ranks."""
