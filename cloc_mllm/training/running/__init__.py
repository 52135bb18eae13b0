"""How a run goes on: processes, order of the samples, the trainer, checkpoints, watching, logging."""
