"""Tasks for lmms-eval under names that start with `cloc_`: YAML files, and the functions that they name."""
