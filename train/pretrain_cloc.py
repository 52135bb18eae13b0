"""CLOC pre-training: images, captions and region texts in, an encoder out.

    deepspeed --num_gpus 2 train/pretrain_cloc.py --config train/configs/pretrain_quick.yaml [key=value …] [--resume]
    torchrun --nproc_per_node 2 train/pretrain_cloc.py --config …
    python train/pretrain_cloc.py --config …

The run folder (`run.output`) gets `export/`, the weights to use, `checkpoint-N/`, the states to resume from,
`metrics.jsonl` and TensorBoard files under `log/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs from a clone that is not installed

from cloc_mllm.training.presets.config import PretrainConfig, load_config, plan_batch
from cloc_mllm.training.program import open_run_folder, parse_args, train_and_export
from cloc_mllm.training.running import launch


def main() -> None:
    """Run the stage from preset to export."""
    # 1. What is asked for. Nothing slow is imported yet, so a misspelt key is reported at once.
    args = parse_args("CLOC pre-training")
    config = load_config(args.config, args.overrides, stage="pretrain")
    assert isinstance(config, PretrainConfig)
    plan = plan_batch(config.run.batch_size, config.run.micro_batch_size, launch.world_size_of_environment())
    zero = launch.resolve_zero(config.run.zero)

    # 2. The processes find each other.
    world = launch.start(zero, config.run.precision)
    checkpoint = open_run_folder(config, args.resume, world)

    from cloc_mllm.data.collate import RegionTextCollator
    from cloc_mllm.training.presets.parts import apply_parts, describe
    from cloc_mllm.training.pretraining.encoder import build_encoder
    from cloc_mllm.training.pretraining.pretrain import PretrainTrainer
    from cloc_mllm.training.pretraining.pretrain_data import needs_regions, training_stream, validation_subset
    from cloc_mllm.training.running.stream import LaneStream
    from cloc_mllm.training.running.trainer import training_arguments

    # 3. The data, in an order that depends on the seed and the position only.
    stream = training_stream(config, plan, world)
    if isinstance(stream, LaneStream):
        stream.keep_order(Path(config.run.output), resumed=checkpoint is not None, write=world.is_main)

    # 4. The model, whole on every process: ZeRO-3 shards it later, and its checkpoint keeps its plain names.
    model, processor = build_encoder(config, world)
    trained, reports = apply_parts(model, config.parts, config.optim)
    if world.is_main:
        print(f"{plan}, {stream.steps} steps of {len(stream.dataset):,} samples\n{describe(reports)}", flush=True)

    # 5. The trainer.
    trainer = PretrainTrainer(
        config,
        world,
        zero,
        stream,
        model=trained,
        args=training_arguments(config, plan, world, zero, stream.steps),
        data_collator=RegionTextCollator(processor, regions=needs_regions(config)),
        eval_dataset=validation_subset(config),
        processor=processor,
    )

    # 6. Train, then write the weights to use.
    train_and_export(trainer, checkpoint, lambda: type(model)(model.config))
    launch.leave()


if __name__ == "__main__":
    launch.run_program(main)
