"""`cloc-mllm assemble`: put an image tower and a language model together into an untrained MLLM."""

from __future__ import annotations

import argparse

EPILOG = """\
example:
  cloc-mllm assemble --tower checkpoints/cloc_vit_l14_336/export --llm Qwen/Qwen2.5-0.5B-Instruct --out mllm

The tower: folder or hub name of a CLOC encoder, of a CLIP or SigLIP (SigLIP2 of a fixed resolution included), or of an
image tower of these alone. The connectors are new: align and instruct train them, with model.init=mllm:DIR."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "assemble",
        help="put an image tower and a language model together into an untrained MLLM",
        description="Put an image tower and a language model together into an MLLM whose connectors are untrained.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tower", required=True, metavar="T", help="see below")
    parser.add_argument("--llm", required=True, metavar="L", help="folder or hub name of any causal language model")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--region-encoder", default="prompter", choices=("prompter", "roi_align", "none"), help="how a region is read"
    )
    parser.add_argument(
        "--region-format", default="both", choices=("token", "coords", "both"), help="how a region is written"
    )
    parser.add_argument("--grounding", default="head", choices=("head", "text"), help="how boxes come out")
    parser.add_argument(
        "--box-mode", default="norm1000", choices=("norm1000", "norm1", "pixel"), help="how coordinates are written"
    )
    parser.add_argument("--chat-style", default="auto", metavar="STYLE", help="markers around turns (default: found)")
    parser.add_argument("--vision-layer", type=int, default=-2, help="layer of the tower the LLM sees (default: -2)")
    parser.add_argument(
        "--projector", default="mlp2x_gelu", choices=("mlp2x_gelu", "linear", "pixel_shuffle"), help="tower to LLM"
    )
    parser.add_argument(
        "--image-mode", choices=("pad", "resize", "anyres"), help="how images are shown (default: as the encoder's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new weights (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the MLLM and print where it lies."""
    from cloc_mllm.apps.outputs import empty_output_folder
    from cloc_mllm.training.tuning.assembly import assemble_mllm

    folder = empty_output_folder(args.out)
    model, processor = assemble_mllm(
        args.tower,
        args.llm,
        region_encoder=args.region_encoder,
        region_format=args.region_format,
        grounding=args.grounding,
        box_mode=args.box_mode,
        chat_style=args.chat_style,
        vision_feature_layer=args.vision_layer,
        projector_type=args.projector,
        image_mode=args.image_mode,
        seed=args.seed,
    )
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    print(folder)
    return 0
