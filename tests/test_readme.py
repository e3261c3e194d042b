"""Keeps README.md and RESULTS.md true: links point at what they name, commands (and those of EXERCISES.md) run, tables
come from the commands below them.
"""

import ast
import dataclasses
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import controls
import data
import mora
import train
from model import GPT, PRESETS, GPTConfig

ROOT = Path(__file__).parent.parent
README, RESULTS, EXERCISES = (re.sub(r"\\\n *", "", (ROOT / name).read_text(encoding="utf-8"))  # commands in one line
                              for name in ("README.md", "tests/RESULTS.md", "tests/EXERCISES.md"))
PROSE = re.sub(r"```text.*?```", "", README + RESULTS, flags=re.S)  # without what the programs print
# A command up to what is said about it, and its options
COMMAND = r"(?:python|torchrun[^\n`]*?) (?:train|tests/controls)\.py((?: ?[^\s`#|&]+)*)"
COMMANDS = [options for options in sorted(set(re.findall(COMMAND, README + RESULTS + EXERCISES)))
            if not options.endswith(("-h", "...", "--no-fast"))]
TABLE = r"((?:^\|[^\n]*\n)+)\s*(?:```bash\n(.*?)```)?"  # and the commands below it
TABLES = [table for table in re.findall(TABLE, PROSE, re.M | re.S) if table[0].startswith("| method ")]


@pytest.fixture(autouse=True)
def controls_are_known():
    known, methods = (mora.METHODS, mora.OPERATORS, train.LEARNING_RATES), [*train.METHODS]
    before = [dict(each) for each in known]
    controls.add()
    yield
    train.METHODS[:] = methods
    for each, content in zip(known, before):
        each.clear()
        each.update(content)


def test_there_are_commands_and_tables():
    assert len(COMMANDS) > 5 and len(TABLES) > 2


# ----------------------------------------------------------------------------------------------------------------------
# Names and links


@pytest.mark.parametrize("name, file, line", re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README))
def test_links_point_at_the_definitions_that_they_name(name, file, line):
    *owner, name = name.split(".")
    nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    if owner:
        nodes = next(node.body for node in nodes if getattr(node, "name", None) == owner[0])
    found = next(node.lineno for node in nodes if getattr(node, "name", None) == name)
    assert int(line) == found, f"README.md links {name} to {file}#L{line}, but it is defined in line {found}"


def test_the_map_covers_every_equation():
    table = README[README.index("| in the paper"):]
    assert all(re.search(rf"Eq\.[^|]* {number}\b[^|]*\|", table) for number in (1, 2, 3, 4, 6, 8, 9))


@pytest.mark.parametrize("file", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", README))))
def test_linked_files_exist(file):
    assert (ROOT / file).exists()


def test_every_option_exists():
    known = {f"--{field.name}" for field in dataclasses.fields(train.Config)}
    known |= {"--methods", "--no-fast", "--standalone", "--nproc_per_node"}  # the last two are torchrun's
    for script in ("bench.py", "exercise.py", "compare.py"):
        known |= set(re.findall(r"--[a-z_]+", (ROOT / "tests" / script).read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<![\w-])--\w[\w-]*", PROSE)) <= known


def test_every_name_exists():
    source = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), ROOT / "tests/controls.py"])
    names = set(re.findall(r"`([A-Za-z_]\w+)`", PROSE)) - {"mora_type"}  # the released code's
    assert len(names) > 10 and not {name for name in names if not re.search(rf"\b{name}\b", source)}


# ----------------------------------------------------------------------------------------------------------------------
# Commands


RUNS = {}  # results by settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands read, by the names they call it."""
    folder = tmp_path_factory.mktemp("readme")
    text = "".join(json.dumps({"text": f"the cat sat on {i} mats " * 8}) + "\n" for i in range(40))
    pairs = "".join(json.dumps({"prompt": f"{i} + 1 =", "completion": str(i + 1)}) + "\n" for i in range(40))
    for name, content in {"articles.jsonl": text, "new.jsonl": text, "old.txt": text, "pairs.jsonl": pairs}.items():
        (folder / name).write_text(content)
    runs = "NAME", "wikitext/text-full-lr0.01-seed0", "uuid-full-lr1e-09-seed0"
    models = "gpt2", *(f"out/{run}/model.pt" for run in runs)
    for name in ("c4/en/c4", *models):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name in ("c4/en/c4-train.00000-of-01024.json.gz", "c4/en/c4-validation.00000-of-00008.json.gz", "pmc.jsonl.gz",
                 "wikitext-train.txt.gz", "wikitext-valid.txt.gz"):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    for name in models:  # a file comes before the published model of its name
        GPT(GPTConfig(**PRESETS["tiny"])).export(folder / name)
    return folder


@pytest.mark.parametrize("options", COMMANDS)
def test_commands_run(options, folder, monkeypatch):
    """With a tiny model, for two steps, at one rate, from one seed, and what several commands run, once; GPT-2's
    tokenizer and C4 are of our own.
    """
    monkeypatch.chdir(folder)
    run = train.run
    monkeypatch.setattr(train, "run", lambda config, *rest: RUNS.get(repr(config))
                        or RUNS.setdefault(repr(config), run(config, *rest)))
    get_tokenizer = data.get_tokenizer
    monkeypatch.setattr(data, "get_tokenizer", lambda name: get_tokenizer("bytes"))
    monkeypatch.setattr(train, "DEMO_BASE", train.DEMO_BASE | dict(max_steps=4, warmup_steps=0))
    monkeypatch.setattr(train, "DEMO_TEXT", 10_000)
    args = train.parse_args(options.split())  # as it stands
    size = "--n_layer 1 --n_head 2 --n_embd 32" if args.init in ("demo", "scratch") else ""
    size += {"c4": f" --c4_url file:{folder}/c4", "uuid": " --n_pairs 4"}.get(args.task, "")
    size += " --full_warmup 1" * bool(args.full_warmup)
    small = f"{size} --max_steps 2 --batch_size 4 --learning_rate 1e-3 --seed 0 --device cpu --out_dir out"
    with pytest.raises(SystemExit) as end:
        train.main([*options.split(), *small.split()])
    assert end.value.code == 0


def test_the_set_up_is_what_ci_runs():
    for command in re.findall(r"'(\^[^']+)'", (ROOT / ".ci/run").read_text()):
        assert len(re.findall(command, README, re.M)) == 1, command


def test_the_example_runs(tmp_path):
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "add_adapters" in block)
    (tmp_path / "mora.py").write_bytes((ROOT / "mora.py").read_bytes())  # copied alone, as the README says
    before = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
"""
    after = "\nprint([type(layer).__name__ for layer in model])"
    (tmp_path / "example.py").write_text(before + example + after)
    run = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "['Linear', 'ReLU', 'Linear']", run.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Tables of results


@pytest.mark.parametrize("table, commands", TABLES, ids=range(len(TABLES)))
def test_rows_and_columns_of_tables_are_those_of_the_commands_below(table, commands, monkeypatch):
    monkeypatch.setattr(data, "fingerprint", lambda files: "")
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    options = re.findall(COMMAND, commands)
    configs = [config for some in options for config in train.runs(train.parse_args(some.split()))]
    assert configs, "no ```bash block follows"
    labels = {train.label(config) for config in configs}
    assert {row[0] for row in rows} <= labels | {re.sub(r" r\d+$", "", label) for label in labels}
    rates = {float(cell) for cell in head if re.fullmatch(r"[\d.]+", cell)}
    assert rates <= {config.learning_rate for config in configs}
    steps = {int(cell.removeprefix("step ")) for cell in head if cell.startswith("step ")}
    evaluated = {step for config in configs for step in range(0, config.max_steps + 1, config.eval_every)}
    assert steps <= evaluated
