"""The `cloc-mllm` command: a table of commands, and the one place where errors become exit codes.

A command is imported only when it is the one asked for, so `cloc-mllm --help` answers at once without importing torch.
Exit codes: 0 only on success, 2 for bad usage or bad input (one message on stderr, no traceback), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloc_mllm import __version__
from cloc_mllm.errors import ClocError

BAD_INPUT = 2
INTERRUPTED = 128 + 2
BROKEN_PIPE = 128 + 13

# What the operating system refuses because of what the user named or the state of the disk. Everything else is a bug
# of ours and keeps its traceback.
_USER_ERRNOS = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENAMETOOLONG: "the name is too long",
}


@dataclass(frozen=True)
class Command:
    """One row of the table: the command's name, the module that has `add_parser`, and one line of help."""

    name: str
    module: str
    summary: str


COMMANDS = (
    Command("demo", "cloc_mllm.apps.commands.demo", "run the whole path once, from data to chat, and write a report"),
    Command("data", "cloc_mllm.apps.commands.data", "make procedural scenes, convert, check, describe data"),
    Command(
        "label", "cloc_mllm.apps.commands.label", "label pictures with region texts: captions, phrases, detections"
    ),
    Command("train", "cloc_mllm.apps.commands.train", "explain a training preset: values, batch, what is frozen"),
    Command("eval", "cloc_mllm.apps.commands.evaluate", "score an encoder or an MLLM on a suite"),
    Command("assemble", "cloc_mllm.apps.commands.assemble", "put a tower and an LLM together into an untrained MLLM"),
    Command("chat", "cloc_mllm.apps.commands.chat", "talk with an MLLM about an image and boxes on it"),
    Command("export", "cloc_mllm.apps.commands.export", "write a checkpoint in a layout other programs load"),
    Command("merge", "cloc_mllm.apps.commands.merge", "put an adapter on its base and write one checkpoint"),
    Command("push", "cloc_mllm.apps.commands.push", "upload a checkpoint, an adapter or an export to the hub"),
)


class OrderlessParser(argparse.ArgumentParser):
    """A parser that takes options before, between and after positional arguments.

    The stock one gives an optional positional its (empty) value at the first option, so that in
    `chat M --image F "question"` the question would be an error.
    """

    _intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `parse_known_intermixed_args` does; it calls this method again for its two passes."""
        nested = any(action.nargs == argparse.PARSER for action in self._actions)
        if self._intermixing or nested:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit code. Bad usage leaves through argparse's `SystemExit(2)`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _quieten_libraries()
    try:
        parser = build_parser(arguments)
        args = parser.parse_args(arguments)
        if not hasattr(args, "run"):
            parser.print_help(sys.stderr)
            return BAD_INPUT
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except ClocError as error:
        return _complain(str(error))
    except BrokenPipeError:
        # The reader (head, less) has what it wanted. Python would complain again when it closes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("\ncloc-mllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{_USER_ERRNOS[error.errno]} ({error.strerror})")


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser, with the full options of the command that `arguments` name and a bare entry for every other.

    Args:
        arguments: The arguments after the program's name.

    Returns:
        The parser. Its namespace has `run` when a command was named.
    """
    parser = OrderlessParser(
        prog="cloc-mllm",
        description="Multimodal LLMs that understand regions: pre-train, tune, evaluate, chat.",
        epilog="example: cloc-mllm demo --out runs/demo      (each command has its own --help)",
    )
    parser.add_argument("--version", action="version", version=f"cloc-mllm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    named = next((word for word in arguments if not word.startswith("-")), None)
    for command in COMMANDS:
        if command.name == named:
            importlib.import_module(command.module).add_parser(subparsers)
        else:
            subparsers.add_parser(command.name, help=command.summary)
    return parser


def _quieten_libraries() -> None:
    """Keep libraries' bars and notices out of what this program prints; takes effect before any of them is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # It writes to stdout, where a caller of --json reads, and warns of every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _complain(message: str) -> int:
    """Print one line on stderr and return the exit code of bad input."""
    print(f"cloc-mllm: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
