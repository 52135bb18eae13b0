"""The trainer the three stages share: transformers' Trainer, with the traps of this stack closed.

* Boxes stay fp32: under DeepSpeed the stock Trainer casts every float input to the training dtype, and a coordinate of
  1003.37 pixels becomes 1004.0 in bf16.
* Learning rates per part reach the optimiser, and temperatures are clamped in the optimiser's own (fp32, possibly
  sharded) copy: clamping the model's copy would be undone by the next step.
* A loss that is not finite stops the run, keeps the batch and names its samples.
* What a checkpoint was made with is compared before anything is resumed from it.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from cloc_mllm.errors import ClocError
from cloc_mllm.training import checkpoint as checkpoints
from cloc_mllm.training import finite, launch, universal
from cloc_mllm.training.checkpoint import SAVING_FOLDER, RunState
from cloc_mllm.training.config import AnyConfig, BatchPlan
from cloc_mllm.training.log import RunLog, shows_progress
from cloc_mllm.training.parts import parameter_groups
from cloc_mllm.training.stream import StepStream

FULL_PRECISION_INPUTS = ("input_boxes", "region_boxes", "ground_boxes")


def training_arguments(
    config: AnyConfig, plan: BatchPlan, world: launch.World, zero: dict[str, Any] | None, steps: int
) -> TrainingArguments:
    """Translate a preset for transformers' Trainer.

    Args:
        config: The preset.
        plan: The batch arithmetic.
        world: This process's place.
        zero: The DeepSpeed configuration, or ``None``.
        steps: Optimiser steps of the whole run.

    Returns:
        The arguments. The whole model has to be built before this is called: a stage-3 configuration changes how
        models are built afterwards.
    """
    run, optim = config.run, config.optim
    return TrainingArguments(
        output_dir=run.output,
        max_steps=steps,
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=run.eval_batch_size or plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=optim.lr,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup,
        optim="adamw_torch",
        bf16=run.precision == "bf16",
        deepspeed=zero,
        use_cpu=world.use_cpu,
        activation_checkpointing=run.activation_checkpointing,
        dataloader_num_workers=run.workers,
        dataloader_pin_memory=not world.use_cpu,
        train_sampling_strategy="sequential",  # StepStream has the order
        remove_unused_columns=False,
        prediction_loss_only=True,
        logging_steps=run.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if run.eval_every else "no",
        eval_steps=run.eval_every,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        report_to=["wandb"] if "wandb" in run.log_to else [],
        disable_tqdm=not shows_progress(),
        seed=run.seed,
    )


class ClocTrainer(Trainer):
    """Base of the stages' trainers; a subclass says what the loss is.

    Args:
        config: The preset.
        world: This process's place.
        zero: The DeepSpeed configuration, or ``None``.
        stream: The training samples.
        processor: Saved in every checkpoint beside the weights. It is not handed to transformers' Trainer, which
            would rewrite the model's special tokens after it.
        **kwargs: Passed to `transformers.Trainer`: `model`, `args`, `data_collator`, `eval_dataset`, …
    """

    clamped_parts: tuple[tuple[str, float, float], ...] = ()
    """Parameter groups (by part) whose values are kept between two bounds."""

    def __init__(
        self,
        config: AnyConfig,
        world: launch.World,
        zero: dict[str, Any] | None,
        stream: StepStream,
        *,
        processor: Any,
        **kwargs: Any,
    ) -> None:
        self.config, self.world, self.zero, self.stream = config, world, zero, stream
        self.processor = processor
        # DeepSpeed rounds the whole model to bf16 and keeps fp32 copies of what it trains only.
        rounds = zero is not None and config.run.precision == "bf16" and world.is_main
        frozen = kwargs["model"].named_parameters(remove_duplicate=False) if rounds else ()
        self.exact_weights = {name: p.detach().clone() for name, p in frozen if not p.requires_grad}
        """In a bf16 run under DeepSpeed, on the main process: frozen weights as they were, for the export."""
        super().__init__(train_dataset=stream, **kwargs)
        self._pop_printer()
        self.add_callback(
            RunLog(
                config.run.output,
                tensorboard="tensorboard" in config.run.log_to,
                console=self.args.disable_tqdm,
            )
        )
        self._scalars: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._eval_scalars: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._window = (time.perf_counter(), 0)
        self._micro_step = 0
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._moved = False
        self._saving = False

    # -- the loss -----------------------------------------------------------------------------------------------------

    def losses(
        self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the model once and compute the loss from its output.

        No parameter may be used outside the model's forward: at ZeRO-3 it is empty there.

        Args:
            model: The wrapped model.
            inputs: The batch.
            num_items: Supervised tokens of the whole step, for a language-model loss; ``None`` while evaluating.

        Returns:
            The loss, such that its gradient averaged over processes and summed over accumulation steps is right once
            divided by :attr:`loss_divisor`; and the figures to log.
        """
        raise TypeError(f"{type(self).__name__} does not say what its loss is")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss, log its parts, and stop where it is not finite."""
        items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss, scalars = self.losses(model, inputs, items)
        store = self._scalars if model.training else self._eval_scalars
        for name, value in scalars.items():
            store[name].append(value.detach().float().reshape(()))
        if model.training:
            self._require_finite(loss, scalars, inputs)
        return (loss, {}) if return_outputs else loss

    def _require_finite(
        self, loss: torch.Tensor, scalars: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]
    ) -> None:
        """Stop at a loss that is not finite: keep the batch, name its samples."""
        samples = self._own_samples(1)
        self._micro_step = (self._micro_step + 1) % self.stream.plan.accumulation
        if not bool(torch.isfinite(loss)):
            self.stop_not_finite(describe_loss(loss, scalars), [inputs], samples(), samples(), shared=False)

    def _own_samples(self, micro_steps: int) -> Callable[[], list[finite.SampleName]]:
        """Return what names this process's samples of the coming micro-steps, should they have to be named."""
        first = self.state.global_step * self.stream.plan.accumulation + self._micro_step
        positions = [p for k in range(micro_steps) for p in self.stream.positions(first + k, self.world.rank)]
        return lambda: finite.name_samples(self.stream, positions)

    def stop_not_finite(
        self,
        what: str,
        batches: Sequence[Mapping[str, Any]],
        own: Sequence[finite.SampleName],
        suspects: Sequence[finite.SampleName],
        *,
        shared: bool,
    ) -> NoReturn:
        """Keep this process's batches of the step and end the run.

        Args:
            what: What is not finite.
            batches: Micro-batches of this process.
            own: The samples in them.
            suspects: The samples to name.
            shared: Whether every process stops at this moment, so that one may speak for all.

        Raises:
            ClocError: Always.
        """
        step, rank = self.state.global_step + 1, self.world.rank
        kept = finite.keep_batches(Path(self.args.output_dir), step, rank, batches, own)
        raise (launch.SharedError if shared else ClocError)(
            f"{what} at step {step}" + ("" if shared else f" on process {rank}"),
            file=kept,
            sample=finite.listed(suspects),
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
            self._stop_at_gradient()
        return norm

    def _stop_at_gradient(self) -> NoReturn:
        """Stop at a gradient that is not finite: it is the sum over all samples of the step, so all are named."""
        batch = self.stream.plan.global_batch
        whole = range(self.state.global_step * batch, (self.state.global_step + 1) * batch)
        self._micro_step = 0
        self.stop_not_finite(
            "the loss is finite, but its gradient is not,",
            self._batches,
            self._own_samples(len(self._batches))(),
            finite.name_samples(self.stream, whole),
            shared=True,
        )

    def _check_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Look at the gradients before a step: DeepSpeed's stage 0 takes any, and tells no norm."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and finite.is_broken_norm(torch.nn.utils.get_total_norm(gradients)):
            self._stop_at_gradient()

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch a step's micro-batches, and remember them in case they have to be kept."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._batches = batches
        return batches, items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move the batch to the device, with boxes left in fp32."""
        exact = {key: inputs[key].to(self.args.device) for key in FULL_PRECISION_INPUTS if key in inputs}
        rest = {key: value for key, value in inputs.items() if key not in exact}
        return {**super()._prepare_inputs(rest), **exact}

    # -- optimiser ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW over the parts' parameter groups."""
        optimizer: torch.optim.Optimizer | None = self.__dict__.get("optimizer")
        if optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.config.parts, self.config.optim)
            bounds = {part: (low, high) for part, low, high in self.clamped_parts}
            for group in groups:
                group["bounds"] = bounds.get(group["name"].split("/")[0])
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimizer = optimizer_class(groups, **options)
            assert optimizer is not None
            if launch.zero_stage(self.zero) == 0:
                optimizer.register_step_pre_hook(self._check_gradients)
            optimizer.register_step_post_hook(_clamp_bounded_groups)
            self.optimizer = optimizer
        return optimizer

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

    # -- logging ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's parts, throughput and the real epoch to what the Trainer logs."""
        self.state.epoch = round(self.state.global_step / self.stream.steps_per_epoch, 4)
        if "loss" in logs:
            logs = {**logs, **_means(self._scalars)}
            then, step = self._window
            now, done = time.perf_counter(), self.state.global_step
            if done > step and now > then:
                logs["samples_per_second"] = (done - step) * self.stream.plan.global_batch / (now - then)
            self._window = (now, done)
        rounded = {key: _short(value) for key, value in logs.items()}
        super().log(rounded, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate; the time it takes does not count as training."""
        paused = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        then, step = self._window
        self._window = (then + time.perf_counter() - paused, step)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the validation set and add the means of the loss's parts."""
        self._eval_scalars.clear()
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics.update({f"eval_{name}": value for name, value in _means(self._eval_scalars).items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Compute the loss of one validation batch, without gradient."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().reshape(()), None, None

    def _pop_printer(self) -> None:
        """Take out the Trainer's own printer, which prints dictionaries."""
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                self.remove_callback(callback)


def describe_loss(loss: torch.Tensor, scalars: Mapping[str, torch.Tensor]) -> str:
    """Return a loss and its parts in words."""
    parts = ", ".join(f"{name} {float(value):.4g}" for name, value in scalars.items())
    return f"the loss is {float(loss)} ({parts})"


@torch.no_grad()
def _clamp_bounded_groups(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Keep bounded groups within their bounds, in whatever shards of them this process holds."""
    for group in optimizer.param_groups:
        if group.get("bounds"):
            low, high = group["bounds"]
            for parameter in group["params"]:
                parameter.clamp_(low, high)


def _means(store: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Return the mean of each figure since the last call, and forget them."""
    means = {name: float(torch.stack(values).mean()) for name, values in store.items() if values}
    store.clear()
    return means


def _short(value: Any) -> Any:
    """Round to 7 significant digits: more is noise, and the log is read by people too."""
    if isinstance(value, float) and math.isfinite(value) and value:
        return float(f"{value:.7g}")
    return value
