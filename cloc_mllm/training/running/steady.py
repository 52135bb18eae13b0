"""What keeps a long run going, and stops it where it must not go on: the part of the trainer that a laptop never needs.

* Checkpoints appear whole or not at all, and may be resumed by another number of processes.
* A loss, a gradient or weights that are not finite stop the run, keep the batches and name their samples.
* Every process notes what it does, so that one that stands still is found.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import Trainer, set_seed

from cloc_mllm.errors import ClocError
from cloc_mllm.training.presets.config import AnyConfig
from cloc_mllm.training.running import checkpoint as checkpoints
from cloc_mllm.training.running import finite, launch, universal
from cloc_mllm.training.running.checkpoint import SAVING_FOLDER, RunState
from cloc_mllm.training.running.stream import SampleName, SampleStream
from cloc_mllm.training.running.watch import StallWatch


class SteadyTrainer(Trainer):
    """transformers' Trainer for runs that are interrupted, moved and broken.

    Args:
        config: The preset.
        world: This process's place.
        zero: The DeepSpeed configuration, or ``None``.
        stream: The training samples.
        processor: Saved in every checkpoint beside the weights. It is not handed to transformers' Trainer, which
            would rewrite the model's special tokens after it.
        **kwargs: Passed to `transformers.Trainer`: `model`, `args`, `data_collator`, `eval_dataset`, …
    """

    def __init__(
        self,
        config: AnyConfig,
        world: launch.World,
        zero: dict[str, Any] | None,
        stream: SampleStream,
        *,
        processor: Any,
        **kwargs: Any,
    ) -> None:
        self.config, self.world, self.zero, self.stream = config, world, zero, stream
        self.processor = processor
        self.watch = StallWatch(world.rank, world.size, config.run.stall_timeout, config.run.output)
        super().__init__(train_dataset=stream, **kwargs)
        self._micro_step = 0
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._moved = False
        self._saving = False

    # -- what this process does ---------------------------------------------------------------------------------------

    def note(self, phase: str) -> None:
        """Note what this process begins to do. Every process has to note the same things in the same order.

        Args:
            phase: A word or two.
        """
        self.watch.beat(phase, self.state.global_step + 1)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch a step's micro-batches, and remember them in case they have to be kept."""
        self.note("loading data")
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._batches = batches
        return batches, items

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip gradients as the Trainer does."""
        self.note("optimiser")
        return super()._clip_grad_norm(model)

    # -- numbers that are not finite ----------------------------------------------------------------------------------

    def require_finite(
        self, loss: torch.Tensor, scalars: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]
    ) -> None:
        """Stop at a loss that is not finite: keep the batch, name its samples."""
        samples = self.own_samples(1)
        self._micro_step = (self._micro_step + 1) % self.stream.plan.accumulation
        if not bool(torch.isfinite(loss)):
            own = samples()
            self.stop_not_finite(describe_loss(loss, scalars), [inputs], own, finite.listed(own), shared=False)

    def own_samples(self, micro_steps: int) -> Callable[[], list[SampleName]]:
        """Return what names this process's samples of the coming micro-steps, should they have to be named."""
        first = self.state.global_step * self.stream.plan.accumulation + self._micro_step
        steps = range(first, first + micro_steps)
        return lambda: [name for step in steps for name in self.stream.names(step, self.world.rank)]

    def stop_not_finite(
        self,
        what: str,
        batches: Sequence[Mapping[str, Any]],
        own: Sequence[SampleName],
        suspects: str,
        *,
        shared: bool,
    ) -> NoReturn:
        """Keep this process's batches of the step and end the run.

        Args:
            what: What is not finite.
            batches: Micro-batches of this process.
            own: The samples in them.
            suspects: What to say of which samples it may be.
            shared: Whether every process stops at this moment, so that one may speak for all.

        Raises:
            ClocError: Always.
        """
        step, rank = self.state.global_step + 1, self.world.rank
        kept = finite.keep_batches(Path(self.args.output_dir), step, rank, batches, own)
        raise (launch.SharedError if shared else ClocError)(
            f"{what} at step {step}" + ("" if shared else f" on process {rank}"),
            file=kept,
            sample=suspects,
            remedy="The file holds the batches (torch.load). `cloc-mllm data check` finds broken samples; otherwise "
            "lower optim.lr or lengthen optim.warmup.",
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm, and stop at one that is not finite.

        In plain torch the step has not been made. DeepSpeed has skipped it in silence, or, in bf16 at stages 1 and 2,
        made it: the weights in memory are lost then, but no checkpoint has seen them.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if finite.is_broken_norm(norm):
            self.stop_at_gradient()
        return norm

    def stop_at_gradient(self) -> NoReturn:
        """Stop at a gradient that is not finite: it is the sum over all samples of the step, so all are named."""
        self._micro_step, plan = 0, self.stream.plan
        first = self.state.global_step * plan.accumulation
        steps = range(first, first + plan.accumulation)
        everyone = (n for step in steps for rank in range(plan.world_size) for n in self.stream.names(step, rank))
        self.stop_not_finite(
            "the loss is finite, but its gradient is not,",
            self._batches,
            self.own_samples(len(self._batches))(),
            finite.listed(list(islice(everyone, finite.SHOWN)), plan.global_batch),
            shared=True,
        )

    def check_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Look at the gradients before a step: DeepSpeed's stage 0 takes any, and tells no norm."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and finite.is_broken_norm(torch.nn.utils.get_total_norm(gradients)):
            self.stop_at_gradient()

    def require_finite_weights(self) -> None:
        """Make sure that weights about to be written are finite; every process has to call this.

        Raises:
            ClocError: They are not.
        """
        if not finite.weights_are_finite(self.model):
            raise launch.SharedError(
                f"weights are not finite after step {self.state.global_step}: nothing is written",
                file=self.args.output_dir,
                remedy="Resume from the last checkpoint with a lower optim.lr.",
            )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def run_state(self) -> RunState:
        """Return what a checkpoint of this run is marked with."""
        plan, run = self.stream.plan, self.config.run
        return RunState(
            stage=self.config.stage,
            zero=launch.zero_stage(self.zero),
            world_size=plan.world_size,
            precision=run.precision,
            global_batch=plan.global_batch,
            loss_batch=plan.global_batch if self.loss_sees_whole_step() else plan.micro_batch * plan.world_size,
            seed=run.seed,
            steps=self.stream.steps,
            samples=len(self.stream.dataset),
        )

    def loss_sees_whole_step(self) -> bool:
        """Return whether a step's loss stays the same however its samples are dealt out to micro-batches."""
        return False

    def prepare_resume(self, checkpoint: Path) -> None:
        """Make sure that this run may go on from a checkpoint, and turn it into a form that these processes can read.

        Args:
            checkpoint: A complete checkpoint.

        Raises:
            ClocError: It is of another run, or cannot be converted.
        """
        now = self.run_state()
        then = checkpoints.require_same_run(checkpoint, now)
        if then.world_size == now.world_size:
            return
        self._moved = True
        shards = universal.needs_conversion(now.zero)
        if shards and self.config.optim.ema is not None:
            raise ClocError(
                f"was written by {then.world_size} processes, and DeepSpeed's conversion would lose "
                "the average of the weights (optim.ema)",
                file=checkpoint,
                remedy=f"Resume with {then.world_size} processes.",
            )
        if self.world.is_main:
            how = "; its shards are joined into a universal checkpoint" if shards else ""
            print(
                f"{checkpoint}: written by {then.world_size} processes, resumed by {now.world_size}{how}; "
                "random states start anew, which only dropout notices",
                flush=True,
            )
            if shards:
                universal.convert(checkpoint)
        launch.barrier()
        if shards:
            settings: dict[str, Any] = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
            settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this process's generators; over another number of processes, seed them from where the run stands."""
        if self._moved and checkpoint is not None:
            place = f"{self.config.run.seed}-{self.state.global_step}-{self.world.rank}"
            set_seed(random.Random(place).getrandbits(32))
        else:
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the run folder; while saving, the hidden folder in it that unfinished checkpoints are in."""
        run = str(super()._get_output_dir(trial))
        return str(Path(run, SAVING_FOLDER)) if self._saving else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save out of sight; once every process has written its share, show the checkpoint and remove old ones."""
        self.note("saving")
        self.require_finite_weights()
        run = Path(self.args.output_dir)
        written = run / SAVING_FOLDER / f"checkpoint-{self.state.global_step}"
        with checkpoints.naming_failed_writes(run):
            self._saving = True
            super()._save_checkpoint(model, trial)
            self._saving = False
            self.save_extras(written)
            launch.barrier()
            if self.world.is_main:
                self.processor.save_pretrained(str(written))
                checkpoints.prune(checkpoints.publish(written, self.run_state()), self.config.run.keep)
        launch.barrier()

    def save_extras(self, folder: Path) -> None:
        """Write what a checkpoint holds beside the Trainer's own files; called on every process.

        Args:
            folder: The unfinished checkpoint.
        """

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Prepare as the Trainer does, then make sure that DeepSpeed is on if it was asked for."""
        joined = resume_from_checkpoint if self._moved and universal.needs_conversion(self.run_state().zero) else None
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint if joined is None else None
        )
        if self.zero is not None:
            launch.require_deepspeed(self.model_wrapped, self.world)
        if joined is not None:
            universal.load(self.model_wrapped, Path(joined), strict=not hasattr(self.model, "peft_config"))
            self._load_optimizer_and_scheduler(joined)
            universal.set_rates(self.optimizer, list(self.lr_scheduler.get_last_lr()))
        return prepared


def describe_loss(loss: torch.Tensor, scalars: Mapping[str, torch.Tensor]) -> str:
    """Return a loss and its parts in words."""
    parts = ", ".join(f"{name} {float(value):.4g}" for name, value in scalars.items())
    return f"the loss is {float(loss)} ({parts})"
