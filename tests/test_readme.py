"""Keeps the READMEs true: their Python runs, their commands parse, their links and names exist."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import controls
import mora
import train

pytestmark = pytest.mark.books

ROOT = Path(__file__).parent.parent
PATHS = ["README.md", "tests/experiments/README.md", "tests/exercises/README.md"]
TEXTS = {path: (ROOT / path).read_text(encoding="utf-8").replace("\\\n", " ") for path in PATHS}
PYTHON = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.S)
COMMAND = r"^\s*(?:python|torchrun [^\n]*?) (?:train|tests/experiments/controls)\.py([^\n#|`]*)"
COMMANDS = [(path, line) for path in PATHS for line in re.findall(COMMAND, TEXTS[path], re.M)]

@pytest.fixture
def controls_are_known(monkeypatch):
    for owner, name in ((mora, "METHODS"), (mora, "OPERATORS"), (train, "LEARNING_RATES")):
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    monkeypatch.setattr(train, "METHODS", list(train.METHODS))
    controls.add()

def test_the_first_example_prints_what_the_text_says(capsys):
    exec(PYTHON[0], {})
    said = capsys.readouterr().out.splitlines()
    assert said[0] in TEXTS["README.md"] and said[2] in TEXTS["README.md"]
    assert said[1] == said[3] == "merged: True"

def test_mora_works_by_itself_as_the_second_example_uses_it(tmp_path):
    (tmp_path / "mora.py").write_bytes((ROOT / "mora.py").read_bytes())
    head = "import torch\nfrom mora import *\nmodel = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
    subprocess.run([sys.executable, "-c", head + PYTHON[1]], cwd=tmp_path, check=True)
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    model = mora.add_adapters(torch.nn.Sequential(torch.nn.Linear(8, 8)), "mora", rank=8)
    mora.load_adapters(model, state)

@pytest.mark.parametrize("path, line", COMMANDS)
def test_commands_parse(path, line, controls_are_known):
    words = line.replace("TASK -h", "").split()
    if "-h" in words or "..." in words or "YOURS" in words:
        words = words[: min(words.index(word) for word in ("-h", "...", "YOURS") if word in words)]
        words += ["sharing"] * (words[-1:] == ["--operator"])
    with contextlib.redirect_stdout(io.StringIO()):
        assert list(train.runs(train.parse_args(words)))

def test_there_are_commands():
    assert len(PYTHON) == 2 and {path for path, _ in COMMANDS} >= {PATHS[0], PATHS[2]}

@pytest.mark.parametrize("path", PATHS)
def test_links_exist(path):
    for link in re.findall(r"\]\(((?!http)[^)#]+)", TEXTS[path]):
        assert ((ROOT / path).parent / link).exists(), link

def test_names_in_the_table_from_paper_to_code_exist():
    table = re.search(r"\| in the paper.*?\n\n", TEXTS["README.md"], re.S)[0]
    for name in re.findall(r"`([\w.]+)`", table):
        module = train if name in ("restarts_before", "schedule") else mora
        for part in name.split("."):
            module = getattr(module, part)
