"""The command line: quick to start, one line for what the user did wrong, a traceback for what we did wrong."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from cloc_mllm.apps import cli
from cloc_mllm.errors import ClocError


def _command_that(monkeypatch: pytest.MonkeyPatch, act: Callable[[], int]) -> None:
    """Replace the table by one command, `act`."""

    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        subparsers.add_parser("act").set_defaults(run=lambda args: act())

    module = argparse.Namespace(add_parser=add_parser)
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("act", "act_module", "acts"),))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cloc_mllm.apps import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_with_an_example(command: cli.Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command.name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"cloc-mllm {command.name}" in out.split("example", 1)[1], "no example in the help"


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_building_a_parser_imports_no_torch(command: cli.Command) -> None:
    code = (
        "import sys; from cloc_mllm.apps import cli\n"
        f"cli.build_parser([{command.name!r}])\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["chat"]])
def test_bad_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["M", "why?", "--image", "F"],
        ["M", "--image", "F", "why?"],
        ["--image", "F", "M", "why?"],
        ["--image", "F", "--json", "M", "why?", "--device", "cpu"],
    ],
)
def test_options_may_stand_anywhere(words: list[str]) -> None:
    args = cli.build_parser(["chat"]).parse_args(["chat", *words])
    assert (args.model, args.question, args.image) == ("M", "why?", "F")


def test_no_command_prints_the_table_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    err = capsys.readouterr().err
    assert all(command.summary.split()[0] in err for command in cli.COMMANDS)


def test_bad_input_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> int:
        raise ClocError("x2 is left\nof x1", file="regions.jsonl", sample="7")

    _command_that(monkeypatch, act)
    assert cli.main(["act"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "cloc-mllm: error: regions.jsonl: sample '7': x2 is left of x1\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR])
def test_what_the_system_refuses_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> int:
        raise OSError(number, os.strerror(number), "/some/where")

    _command_that(monkeypatch, act)
    assert cli.main(["act"]) == 2
    err = capsys.readouterr().err
    assert "/some/where" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EBADF, "a bug")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def act() -> int:
        raise error

    _command_that(monkeypatch, act)
    with pytest.raises(type(error), match="a bug"):
        cli.main(["act"])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> int:
        raise KeyboardInterrupt

    _command_that(monkeypatch, act)
    assert cli.main(["act"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_no_error_message() -> None:
    """`cloc-mllm … | head -1` ends without a word, though the reader left."""
    code = (
        "import sys, argparse; from cloc_mllm.apps import cli\n"
        "def talk(args):\n"
        "    for _ in range(100_000): print('a long line of words')\n"
        "    return 0\n"
        "module = argparse.Namespace(add_parser=lambda s: s.add_parser('talk').set_defaults(run=talk))\n"
        "cli.COMMANDS = (cli.Command('talk', '', ''),)\n"
        "cli.importlib.import_module = lambda name: module\n"
        "sys.exit(cli.main(['talk']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == cli.BROKEN_PIPE


def test_stdout_and_stderr_hold_nothing_of_the_libraries() -> None:
    code = (
        "from cloc_mllm.apps import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "import logging, tqdm\n"
        "log = logging.getLogger('DeepSpeed'); log.setLevel(logging.WARNING)\n"
        "log.addHandler(logging.StreamHandler()); log.warning('no GPU')\n"
        "list(tqdm.tqdm(range(3)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("cloc-mllm ")
    assert done.stderr == ""


def test_the_table_names_real_modules() -> None:
    for command in cli.COMMANDS:
        assert callable(importlib.import_module(command.module).add_parser)
