"""Public data sets, each in its own official format."""
