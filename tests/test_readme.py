"""Keeps README.md true: its links point at the code they quote, its commands, and those of EXERCISES.md, are understood,
its example runs.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "EXERCISES.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"(?:python|torchrun[^\n`]*?) train\.py[^\n`#|&\\]*", PAGES)))


@pytest.mark.parametrize("code, file, line", re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README))
def test_quoted_lines_stand_where_the_links_say(code, file, line):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [number for number, text in enumerate(lines, 1) if code in text]
    assert int(line) in found, f"README.md links {code!r} to {file}#L{line}, but it stands at {found}"


def test_the_map_covers_every_equation():
    table = README[README.index("| in the paper"):]
    assert all(f"Eq. {number} |" in table for number in (1, 2, 3, 4, 6, 8, 9))


@pytest.mark.parametrize("file", re.findall(r"\]\(((?!http)[^)#]+)", README))
def test_linked_files_exist(file):
    assert (ROOT / file).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch):
    monkeypatch.setattr(train.os.path, "isfile", lambda path: True)
    words = shlex.split(command[command.index("train.py") + len("train.py"):].split("    ")[0])
    if "-h" not in words and "..." not in words:
        train.parse_args(words)


def test_there_are_commands():
    assert len(COMMANDS) > 5


def test_the_set_up_is_what_ci_runs():
    command = next(line for line in README.splitlines() if line.startswith("pip install") and "pytest" in line)
    pattern = re.search(r"grep -m 1 '([^']+)'", (ROOT / ".ci/run").read_text())[1]
    assert re.match(pattern, command)


def test_the_example_runs(tmp_path):
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "add_adapters" in block)
    (tmp_path / "mora.py").write_bytes((ROOT / "mora.py").read_bytes())  # copied alone, as the README says
    before = "import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))\n"
    after = "\nprint([type(layer).__name__ for layer in model])"
    (tmp_path / "example.py").write_text(before + example + after)
    run = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "['Linear', 'ReLU', 'Linear']", run.stderr
