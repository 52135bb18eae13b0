"""lmms-eval: this package's models as one of its backends, and tasks about regions that it lacks."""
