"""The trainer the three stages share: transformers' Trainer, with the traps of this stack closed.

* Boxes stay fp32: under DeepSpeed the stock Trainer casts every float input to the training dtype, and a coordinate of
  1003.37 pixels becomes 1004.0 in bf16.
* Learning rates per part reach the optimiser, and temperatures are clamped in the optimiser's own (fp32, possibly
  sharded) copy: clamping the model's copy would be undone by the next step.

What keeps a long run going is in :mod:`cloc_mllm.training.running.steady`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from cloc_mllm.objectives.distributed import all_reduce_sum
from cloc_mllm.training.presets.config import AnyConfig, BatchPlan
from cloc_mllm.training.presets.parts import parameter_groups
from cloc_mllm.training.running import launch
from cloc_mllm.training.running.ema import averaged_weights, base_optimizer, keep_average
from cloc_mllm.training.running.log import RunLog, keep_gradient_norm, peak_memory_gib, shows_progress
from cloc_mllm.training.running.steady import SteadyTrainer
from cloc_mllm.training.running.stream import TrainLoader

FULL_PRECISION_INPUTS = ("input_boxes", "region_boxes", "region_points", "ground_boxes")


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
        ignore_data_skip=True,  # TrainLoader starts where the run stands
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


class ClocTrainer(SteadyTrainer):
    """Base of the stages' trainers; a subclass says what the loss is. Arguments as :class:`SteadyTrainer`'s."""

    clamped_parts: tuple[tuple[str, float, float], ...] = ()
    """Parameter groups (by part) whose values are kept between two bounds."""

    def __init__(
        self, config: AnyConfig, world: launch.World, zero: dict[str, Any] | None, *args: Any, **kwargs: Any
    ) -> None:
        # DeepSpeed rounds the whole model to bf16 and keeps fp32 copies of what it trains only.
        rounds = zero is not None and config.run.precision == "bf16" and world.is_main
        frozen = kwargs["model"].named_parameters(remove_duplicate=False) if rounds else ()
        self.exact_weights = {name: p.detach().clone() for name, p in frozen if not p.requires_grad}
        """In a bf16 run under DeepSpeed, on the main process: frozen weights as they were, for the export."""
        super().__init__(config, world, zero, *args, **kwargs)
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
        self._waited = 0.0
        self._shows_average = False

    def get_train_dataloader(self) -> Any:
        """Return this process's micro-batches; accelerate has no part in it, see `TrainLoader`."""
        return TrainLoader(
            self.stream,
            self.data_collator,
            self.world.rank,
            lambda: self.state.global_step * self.stream.plan.accumulation,
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

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
        self.note("forward" if model.training else "evaluating")
        items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss, scalars = self.losses(model, inputs, items)
        store = self._scalars if model.training else self._eval_scalars
        for name, value in scalars.items():
            store[name].append(value.detach().float().reshape(()))
        if model.training:
            self.require_finite(loss, scalars, inputs)
            # Under DeepSpeed the optimiser's step is a part of it.
            self.note("backward")
        return (loss, {}) if return_outputs else loss

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
            self.optimizer = optimizer
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare as the Trainer does, and watch the optimiser."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        # Not earlier: with an optimiser offloaded on a GPU machine, DeepSpeed's own has taken the place of ours.
        optimizer = base_optimizer(self.optimizer)
        if launch.zero_stage(self.zero) == 0:
            keep_gradient_norm(self.model_wrapped)
            optimizer.register_step_pre_hook(self.check_gradients)
        optimizer.register_step_post_hook(_clamp_bounded_groups)
        if self.config.optim.ema is not None:
            keep_average(optimizer, self.config.optim.ema)
        return prepared

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """Let the model hold what a run is to be judged by, its averaged weights if it keeps an average."""
        if self.config.optim.ema is None:
            yield
            return
        self._shows_average = True
        try:
            with averaged_weights(self.optimizer, self.model_wrapped if self.zero is not None else None):
                yield
        finally:
            self._shows_average = False

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
                logs["data_wait"] = self._waited / (now - then)
            logs["memory_gib"] = peak_memory_gib()
            self._window, self._waited = (now, done), 0.0
            if self.stream.skipped is not None:
                own = torch.tensor(float(self.stream.skipped), device=self.args.device)
                logs["skipped"] = float(all_reduce_sum(own))
        elif self._shows_average:
            logs = {**logs, "ema": self.config.optim.ema or 0.0}
        rounded = {key: _short(value) for key, value in logs.items()}
        super().log(rounded, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch a step's micro-batches, and note how long that took."""
        began = time.perf_counter()
        fetched = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - began
        return fetched

    def logs_this_step(self) -> bool:
        """Whether the step that is being made will be logged; what only the log wants can be left out otherwise."""
        number = self.state.global_step + 1
        return number == 1 or number % self.args.logging_steps == 0

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
