"""The rules of the house that a machine can check: lint, format, types, file sizes, direction of imports, documents."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloc_mllm.apps import cli

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("cloc_mllm", "train", "eval", "scripts", "tests")
MAX_LINES = 600
# Data flows from left to right; a stage may import what is to its left.
STAGE_ORDER = ("models", "objectives", "data", "labeling", "training", "inference", "evaluation", "apps")
# Used by any stage, and knowing none.
LEAVES = ("pages",)
COMMANDS = {command.name for command in cli.COMMANDS}


def python_files(*folders: str) -> list[Path]:
    """Return the repository's own Python files."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _run(*words: str) -> None:
    """Run a tool as a module of this interpreter and show what it says if it is not content."""
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


def test_lint() -> None:
    _run("ruff", "check", *SOURCES)


def test_format() -> None:
    _run("ruff", "format", "--check", *SOURCES)


def test_types() -> None:
    _run("mypy")


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", "--source-path", "SCRIPTDIR", str(script)], check=True)


@pytest.mark.parametrize("path", python_files(*SOURCES), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", python_files(*SOURCES), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_say_what_they_are_and_hold_no_leftovers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        return
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring at the top"
    # Built from parts, so that this file does not find itself.
    for leftover in ("TO" + "DO", "FIX" + "ME", "X" * 3, "pdb." + "set_trace", "strict=" + "False)"):
        lines = [number for number, line in enumerate(text.splitlines(), 1) if leftover in line and "zip(" not in line]
        assert not lines, f"{leftover} in line {lines}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            swallowed = all(isinstance(line, ast.Pass) for line in node.body)
            assert not swallowed, f"line {node.lineno} swallows an exception"
        if isinstance(node, ast.Raise):
            assert "NotImplementedError" not in ast.dump(node), f"line {node.lineno} is a stub"


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of each import, those inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield node.lineno, ".".join(filter(None, [base, node.module or ""]))


def _violations(path: Path) -> list[str]:
    parts = path.relative_to(ROOT / "cloc_mllm").parts
    if parts[0] not in (*STAGE_ORDER, *LEAVES):
        return []
    own = -1 if parts[0] in LEAVES else STAGE_ORDER.index(parts[0])
    found = []
    for line, name in _imports(path):
        words = name.split(".")
        if words[0] in ("train", "eval", "tests"):
            found.append(f"line {line} imports {name}")
        elif len(words) > 1 and words[0] == "cloc_mllm" and words[1] in STAGE_ORDER[own + 1 :]:
            found.append(f"line {line} imports {name}, which is to the right of {parts[0]}")
    return found


@pytest.mark.parametrize("path", python_files("cloc_mllm"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_from_the_right(path: Path) -> None:
    assert not _violations(path)


def test_an_import_from_the_right_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    folder = tmp_path / "cloc_mllm" / "models"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text("from ..data import schema\ndef f():\n    import cloc_mllm.apps.cli\n")
    assert len(_violations(folder / "bad.py")) == 2
    (folder / "good.py").write_text("from .boxes import box_iou\nfrom cloc_mllm.errors import ClocError\n")
    assert not _violations(folder / "good.py")
    leaf = tmp_path / "cloc_mllm" / "pages"
    leaf.mkdir()
    (leaf / "bad.py").write_text("from cloc_mllm.models import boxes\n")
    assert len(_violations(leaf / "bad.py")) == 1


@pytest.mark.parametrize("path", python_files("cloc_mllm/models"), ids=lambda path: path.name)
def test_models_are_self_contained(path: Path) -> None:
    """The hub copies these files beside the weights: single-dot imports only, nothing else of the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"line {node.lineno}"
            assert node.level == 1 or not (node.module or "").startswith("cloc_mllm"), f"line {node.lineno}"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("cloc_mllm") for alias in node.names), f"line {node.lineno}"


DOCUMENTS = sorted([ROOT / "README.md", ROOT / "checkpoints" / "README.md", *(ROOT / "docs").rglob("*.md")])


def _shell_lines(document: Path) -> list[str]:
    """Return the commands in a document: lines of its shell blocks and its inline code, continuations joined."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in [*lines, *inline] if line]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(document: Path) -> None:
    for line in _shell_lines(document):
        for name in re.findall(r"\bcloc-mllm ([a-z][a-z-]*)", line):
            assert name in COMMANDS, line
        for path in re.findall(
            r"(?<![\w./-])((?:scripts|train|eval|tests|docs)/[\w./-]+\.(?:sh|py|yaml|json|md))", line
        ):
            if not path.rsplit("/", 1)[-1].startswith(("NAME", "X.")):
                assert (ROOT / path).is_file(), f"{path} in: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_ci_runs_the_command_the_readme_gives() -> None:
    assert "bash scripts/test.sh" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
