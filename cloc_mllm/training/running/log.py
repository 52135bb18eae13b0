"""Where figures go during a run: `metrics.jsonl` for programs, TensorBoard for curves, a line or a bar for people."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

METRICS_FILE = "metrics.jsonl"
LOG_FOLDER = "log"


class RunLog(TrainerCallback):
    """Writes every logged line to the run folder, from the main process only.

    Args:
        folder: The run folder.
        tensorboard: Whether to write TensorBoard files under `log/` too.
        console: Whether to print a line; a progress bar does it where stderr is a terminal.
    """

    def __init__(self, folder: str | os.PathLike[str], *, tensorboard: bool, console: bool) -> None:
        self.folder = Path(folder)
        self.tensorboard = tensorboard
        self.console = console
        self._writer: Any = None
        self._started = time.time()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what a killed run logged beyond its last checkpoint, then open the TensorBoard file."""
        if not state.is_world_process_zero:
            return
        self._started = time.time()
        forget_after(self.folder / METRICS_FILE, state.global_step)
        if self.tensorboard:
            # Imported here: it takes seconds, and the other processes never need it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / LOG_FOLDER), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "seconds": round(time.time() - self._started, 2), **logs}
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for key, value in logs.items():
                if isinstance(value, (int, float)):
                    group = "validation" if key.startswith("eval_") else "train"
                    self._writer.add_scalar(f"{group}/{key.removeprefix('eval_')}", value, state.global_step)
            self._writer.flush()
        if self.console:
            figures = "  ".join(f"{k} {v:.4g}" for k, v in logs.items() if isinstance(v, (int, float)) and k != "epoch")
            print(f"step {state.global_step}/{state.max_steps}  {figures}", flush=True)


def peak_memory_gib() -> float:
    """Return the most memory this process has held so far: tensors on its GPU, or all of it on a CPU-only machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # Linux counts KiB


def keep_gradient_norm(engine: Any) -> None:
    """Have DeepSpeed's engine at stage 0 in fp32 remember the gradient norm, as it does at all other stages.

    Args:
        engine: The engine; its gradients are averaged over processes when it clips or steps.
    """
    clip = engine.clip_fp32_gradients

    def note(*_: Any) -> None:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = float(torch.nn.utils.get_total_norm(gradients))

    def note_and_clip() -> None:
        note()
        clip()

    if engine.gradient_clipping() > 0:
        engine.clip_fp32_gradients = note_and_clip
    else:
        engine.optimizer.register_step_pre_hook(note)


def shows_progress() -> bool:
    """Whether a progress bar would be seen: it falls quiet where stderr is no terminal."""
    return sys.stderr.isatty()


def quiet_where_unseen() -> None:
    """Turn off transformers' own progress bars where stderr is no terminal."""
    if not shows_progress():
        transformers_logging.disable_progress_bar()


def forget_after(path: Path, step: int) -> None:
    """Remove lines of later steps, which a run that goes on from `step` will write again.

    Args:
        path: A `metrics.jsonl`, or nothing there yet.
        step: The last step to keep.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            # The half-written last line of a killed run.
            continue
    # Not in place: a run that is killed just here must not lose what it had logged.
    shorter = path.with_name(f".{path.name}")
    shorter.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    shorter.replace(path)
