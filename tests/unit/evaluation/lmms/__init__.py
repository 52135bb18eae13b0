"""lmms-eval: the backend, the tasks, the reports."""
