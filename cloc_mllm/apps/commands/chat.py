"""`cloc-mllm chat`: ask an MLLM about an image and boxes on it, once or in a conversation."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator

EPILOG = """\
examples:
  cloc-mllm chat M --image scene.jpg "What colour is the star?"
  cloc-mllm chat M --image scene.jpg --box 12,30,48,71
  cloc-mllm chat M --image scene.jpg --draw out.png "Where is the red circle?"
  cloc-mllm chat M                    # a conversation; /help says what can be typed

M is an MLLM's folder (export/ of a run). Boxes are x1,y1,x2,y2 in pixels of the original image."""

_NOT_IN_A_BOX = re.compile(r"[^0-9.,+()e\[\] -]")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with an MLLM about an image and boxes on it",
        description="Ask once (with a question, or with a box and no question), or hold a conversation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="M", help="folder of an MLLM")
    parser.add_argument("question", nargs="?", help="<region> in it says where a --box belongs")
    parser.add_argument("--image", metavar="FILE", help="the image to look at")
    parser.add_argument(
        "--box", action="append", nargs="+", default=[], metavar="x1,y1,x2,y2", help="boxes to ask about, in pixels"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    parser.add_argument("--draw", metavar="FILE", help="save the image with the boxes asked about and found")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--device", help="torch device (default: a GPU if there is one)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the checkpoint bring and run its own code"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer once, or converse."""
    from cloc_mllm.apps.chat import ChatSession, converse, format_reply, load_picture, parse_box, save_picture
    from cloc_mllm.apps.outputs import prepare_output_file
    from cloc_mllm.errors import ClocError

    once = args.question is not None or bool(args.box)
    boxes = [parse_box(text) for group in _boxes_and_question(args) for text in group]
    # What can be wrong with the input is found before the model is loaded.
    if (args.json or args.draw) and not once:
        raise ClocError("--json and --draw are for one question", remedy="Give a question, or a --box.")
    if args.draw and not args.image:
        raise ClocError("--draw needs an image", remedy="Give one with --image.")
    if args.max_new_tokens < 1:
        raise ClocError(f"--max-new-tokens is {args.max_new_tokens}, but an answer has at least one token")
    if args.draw:
        prepare_output_file(args.draw)
    if args.image:
        load_picture(args.image)

    from cloc_mllm.inference.predictor import Predictor

    predictor = Predictor.from_pretrained(args.model, device=args.device, trust_remote_code=args.trust_remote_code)
    session = ChatSession(predictor, args.max_new_tokens)
    if args.image:
        session.open_image(args.image)
    if not once:
        converse(session, _typed_lines(), sys.stdout)
        return 0
    reply = session.ask(args.question or "", boxes)
    print(json.dumps(reply.to_dict(args.image), ensure_ascii=False) if args.json else format_reply(reply))
    if args.draw:
        save_picture(session.drawn(), args.draw)
    return 0


def _boxes_and_question(args: argparse.Namespace) -> list[list[str]]:
    """Give back a question that `--box` swallowed: it takes several words, and the question may come last."""
    groups: list[list[str]] = args.box
    if args.question is not None or not groups or len(groups[-1]) < 2 or not _NOT_IN_A_BOX.search(groups[-1][-1]):
        return groups
    *boxes, args.question = groups[-1]
    return [*groups[:-1], boxes]


def _typed_lines() -> Iterator[str]:
    """Yield what the user types, with a prompt where someone sits at a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (importing it gives input() its history and editing)

    print("Ask about the image; /help says what else can be typed.")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
