"""Tests of train.py: `python -m pytest tests/test_train.py`. They train a tiny GPT on a handful of pairs, on the CPU,
in out folders of their own.
"""

import contextlib
import csv
import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import compare
import data
import mora
import train
from model import GPT, PRESETS, GPTConfig

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, ROOT / "train.py"]
TINY = ("uuid --n_layer 1 --n_head 2 --n_embd 32 "
        "--n_pairs 4 --batch_size 4 --max_steps 12 --eval_every 4 --merge_every 5 --warmup_steps 2").split()
FOUR_PAIRS = "--n_pairs", "4", "--batch_size", "4"


EVERY_METHOD = [*(["--methods", method] for method in ("full", "lora", "lora+", "asylora", "dora")),
                *(["--methods", "mora", "--operator", operator] for operator in mora.OPERATORS)]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The file of a small base that knows what pairs look like: few steps, but enough for adapters to build on."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DEMO_BASE", train.DEMO_BASE | dict(max_steps=120, batch_size=16))
        patch.setattr(train, "DEMO_TEXT", 100_000)
        args = train.parse_args(["--n_layer", "1", "--n_head", "2", "--n_embd", "64", "--out_dir", str(folder),
                                 "--device", "cpu"])
        train.choose_device(args)
        train.load_base(args)
    return next(folder.glob("base-*/model.pt"))


def cli(*argv):
    """Call train.py's main as the shell would; -> its exit status."""
    with pytest.raises(SystemExit) as end:
        train.main([str(arg) for arg in argv])
    return end.value.code


def rows(folder):
    """metrics.csv without the speed, which no two runs share."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_second"}
                for row in csv.DictReader(file)]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def assert_same_run(a, b):
    """Bit for bit the same metrics and weights."""
    assert rows(a) == rows(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ----------------------------------------------------------------------------------------------------------------------
# The loop's parts


def config(**changes):
    return train.Config(**dict(method="lora", learning_rate=1.0, warmup_steps=4, max_steps=24, schedule="linear",
                               restart_warmup=2, device="cpu") | changes)


def test_schedule_rises_and_falls_linearly():
    rates = [train.schedule(step, config()) for step in range(24)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0]), "four steps of warm-up, the first of them not at 0"
    assert rates[4:] == pytest.approx([1 - i / 20 for i in range(20)]), "down to what would be 0 at step 24"


@pytest.mark.parametrize("method", ["remora", "relora"])
def test_schedule_restarts_on_the_cosine(method):
    curve = [train.schedule(step, config(schedule="cosine")) for step in range(24)]
    jagged = [train.schedule(step, config(schedule="cosine", method=method, merge_every=8)) for step in range(24)]
    assert curve[14] == pytest.approx(0.5), "half-way between warm-up and end, a cosine is at one half"
    assert jagged[8] == pytest.approx(curve[8] / 2), "the first step after a merge"
    assert jagged[16] == pytest.approx(curve[16] / 2)
    others = [step for step in range(24) if step not in (8, 16)]
    assert [jagged[step] for step in others] == pytest.approx([curve[step] for step in others]), "back on the curve"


def test_schedule_after_a_full_rank_warmup():
    constant = config(schedule="constant", full_warmup=6, restart_warmup=4)
    rates = [train.schedule(step, constant) for step in range(12)]
    assert rates[6:] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1]), "the adapters begin at step 6"
    assert train.schedule(7, dataclasses.replace(constant, method="full")) == 1


def test_adapters_restart_every_so_often():
    assert [step for step in range(24) if train.restarts_before(step, config(merge_every=8))] == [8, 16]
    assert [step for step in range(25) if train.restarts_before(step, config(merge_every=8, full_warmup=8))] == [16, 24]
    assert not any(train.restarts_before(step, config()) for step in range(24)), "it is for ReLoRA and ReMoRA"


def test_lora_plus_gives_b_its_own_rate():
    model = mora.add_adapters(torch.nn.Sequential(torch.nn.Linear(4, 6)), "lora+", 2)
    groups = train.make_optimizer(model, config(method="lora+")).param_groups
    rates = [(group["peak"], [p.shape for p in group["params"]]) for group in groups]
    assert rates == [(1.0, [(2, 4)]), (16.0, [(6, 2)])]


def test_what_is_in_no_adapter_has_a_rate_of_its_own():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    model = mora.add_adapters(model, "lora", 2)
    model[1].requires_grad_(True)
    groups = train.make_optimizer(model, config(other_learning_rate=0.25)).param_groups
    assert {group["peak"]: len(group["params"]) for group in groups} == {1.0: 4, 0.25: 2}
    groups = train.make_optimizer(model, config(other_learning_rate=0.25, method="full")).param_groups
    assert [group["peak"] for group in groups] == [1.0], "in full training there is one rate"


@pytest.mark.parametrize("method", mora.METHODS)
def test_from_scratch_only_linear_layers_are_frozen(method):
    args = train.parse_args([*TINY, "--init", "scratch", "--methods", method])
    args.device = "cpu"
    base, _ = train.load_base(args)
    model = train.adapt(base, next(train.runs(args)))
    own = {"mora": ["M"], "remora": ["M"], "asylora": ["B"], "dora": ["A", "B", "magnitude"]}.get(method, ["A", "B"])
    layers = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    norms = [f"{norm}.{kind}" for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f") for kind in ("weight", "bias")]
    expected = {f"{layer}.{name}" for layer in layers for name in own} | {"wte.weight", "wpe.weight", *norms}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


class Travels(TorchDispatchMode):
    """Notes which tensors cross between the CPU and the meta device, which stands for a GPU here, and what would make
    the CPU wait for it.
    """

    def __init__(self):
        super().__init__()
        self.shapes, self.waits = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.waits += 1
            return 0.0
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.shapes.append(tuple(tensors[0].shape))
        return result


@pytest.mark.parametrize("options", EVERY_METHOD, ids=lambda options: options[-1])
def test_nothing_goes_to_the_device_in_a_step(options, tmp_path, monkeypatch):
    """One permutation goes there in an epoch of five steps. The loop waits once, when its clock starts."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(train, "evaluate", lambda *_: {})
    args = train.parse_args([*TINY, "--init", "scratch", "--n_pairs", "20", "--batch_size", "4",
                             "--max_steps", "6", "--eval_every", "6", *options])
    args.dtype, args.compile = "float32", False
    base, tokenizer = train.load_base(args)
    config = next(train.runs(args))
    model, config.device = train.adapt(base, config).to("meta"), "meta"
    dataset = train.load_dataset(config, tokenizer, base.config.block_size)
    data.shuffled.cache_clear()
    with Travels() as travels:
        train.train(model, dataset, config, tmp_path)
    assert travels.shapes == [(20,)] * 2 and travels.waits == 1 + 1, "its clock starts, and the loss of an evaluation"


def test_exact_match_is_what_greedy_decoding_finds(base):
    model, tokenizer = GPT.from_pretrained(str(base)), data.get_tokenizer("bytes")
    pairs = data.UUIDPairs(6, tokenizer, 4, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        idx, targets = pairs.batch(step)
        model(idx, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 and 0 < train.evaluate(model, pairs)["exact_match"] < 1:
            break
    metrics = train.evaluate(model, pairs)
    decoded = model.generate(pairs.tokens[:, :37], 36)[:, 37:]
    exact = (decoded == pairs.tokens[:, 37:]).all(dim=1).float().mean().item()
    assert 0 < exact < 1, "the test should look at a model that knows some pairs and not others"
    assert metrics["exact_match"] == pytest.approx(exact)


def test_bits_are_what_the_model_knows_of_the_values(base):
    """By the definition, one pair at a time; of pairs that it never saw, the base knows nothing."""
    model, pairs = GPT.from_pretrained(str(base)).eval(), data.UUIDPairs(5, data.get_tokenizer("bytes"), 4, seed=7)
    bits = 0
    for row in pairs.tokens:
        log_p = model(row[None, :-1])[0][0].log_softmax(-1)
        bits += 122 + sum(log_p[i - 1, row[i]].item() for i in range(37, 73)) / math.log(2)
    assert train.evaluate(model, pairs)["bits"] == pytest.approx(bits, abs=0.01) and bits < 0


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("options", EVERY_METHOD, ids=lambda options: options[-1])
def test_every_method_memorizes_four_pairs(options, base, tmp_path):
    rate = 2e-3 if "lora+" in options else 1e-2
    assert cli("uuid", "--init", base, *FOUR_PAIRS, "--max_steps", 120, "--rank", 16, "--learning_rate", rate,
               "--out_dir", tmp_path, *options) == 0
    accuracy = json.loads(next(tmp_path.glob("*/results.json")).read_text())["metrics"]["char_accuracy"]
    assert accuracy > 0.4, "guessing gets 10 % of the digits right, and a method that learns four times as many by now"


def test_an_earlier_run_is_kept(base, tmp_path):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "--max_steps", 4, "--out_dir", tmp_path]
    assert cli(*command) == 0 and cli(*command, "--alpha", 9) == 0
    folder, = tmp_path.glob("uuid-*seed0")
    first, second = (json.loads((path / "results.json").read_text())["config"]["alpha"]
                     for path in (folder.with_name(f"kept-{folder.name}.1"), folder))
    assert (first, second) == (None, 9)


def test_what_a_run_leaves(base, tmp_path, capsys):
    assert cli("uuid", "--init", base, *FOUR_PAIRS, "--max_steps", 8, "--eval_every", 3,
               "--methods", "full", "mora", "--out_dir", tmp_path) == 0
    folder = next(tmp_path.glob("uuid-mora-*"))
    assert {file.name for file in folder.iterdir()} == {"metrics.csv", "results.json", "checkpoint.pt", "adapter.pt"}
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "loss", "learning_rate", "tokens_per_second", *data.UUIDPairs.metrics]
    assert [row["step"] for row in table] == ["3", "6", "8"], "a row for every evaluation, and one at the end"
    results = json.loads((folder / "results.json").read_text())
    assert {"seed", "trainable_parameters", "total_parameters", "steps", "seconds", "config", "torch",
            "device"} <= results.keys()
    assert results["metrics"]["step"] == 8
    assert (results["method"], results["rank"], results["operator"]) == ("mora", 2, "rotation")

    model = mora.add_adapters(GPT.from_pretrained(str(base)), "mora", 2)
    assert results["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    mora.load_adapters(model, torch.load(folder / "adapter.pt", weights_only=True))
    pairs = data.UUIDPairs(4, data.get_tokenizer("bytes"), 4, seed=0)
    again = train.evaluate(model.eval(), pairs)
    assert again["char_accuracy"] == pytest.approx(results["metrics"]["char_accuracy"])
    last = capsys.readouterr().out
    assert "| full" in last and "| mora rotation r2" in last, "the table has a row for each run"


def table(text, method):
    """The rows of a method in the tables of a text, as dicts by column."""
    rows = []
    for block in text.split("\n\n"):
        lines = [line.split("|")[1:-1] for line in block.splitlines() if line.startswith("|")]
        lines = [[cell.strip() for cell in line] for line in lines]
        rows += [dict(zip(lines[0], line)) for line in lines if lines[0][0] == "method" and line[0] == method]
    return rows


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    for before, count in ((signal.SIG_DFL, 3), (signal.SIG_IGN, 2)):
        monkeypatch.setattr(signal, "getsignal", lambda number: before)
        handlers.clear()
        train.on_signals(print)
        assert (len(handlers), signal.SIGHUP in handlers) == (count, count == 3)


def test_compare_gives_means_over_seeds_and_draws_if_it_can(base, tmp_path, capsys, monkeypatch):
    assert cli("uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "mora", "--rank", 2, 4, "--seed", 0, 1,
               "--max_steps", 4, "--out_dir", tmp_path) == 0
    runs = table(capsys.readouterr().out, "lora r2")
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(next(tmp_path.glob("uuid-*")))] * 2)
    assert "more than once" in capsys.readouterr().err
    assert [run["seed"] for run in runs] == ["0", "1"] and {run["rank of ΔW"] for run in runs} == {"2"}
    pictures = [tmp_path / "curves.png", tmp_path / "spectra.png"]
    compare.main([*map(str, tmp_path.glob("uuid-*")), "--curves", str(pictures[0]), "--spectra", str(pictures[1])])
    said = capsys.readouterr().out
    row, = table(said, "lora r2")
    folder = next(tmp_path.glob("uuid-*"))
    accuracies = [100 * json.loads((path / "results.json").read_text())["metrics"]["char_accuracy"]
                  for path in sorted(tmp_path.glob("uuid-lora-r2-*"))]
    mean = f"{sum(accuracies) / 2:.1f} ± {abs(accuracies[0] - accuracies[1]) / math.sqrt(2):.1f}"
    assert row["step 4"] == mean and row["seeds"] == "2"
    assert "| mora rotation r4 | attn.c_attn | 64.0 |" in re.sub(" +", " ", said), "rank of ΔW by kind of layer"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(data, "fingerprint", lambda files: "another")
        compare.main([str(folder), "--spectra", str(tmp_path / "none.png")])
    assert "have changed" in capsys.readouterr().err and not (tmp_path / "none.png").exists()
    compare.main([*map(str, tmp_path.glob("uuid-*")), "--keep", str(tmp_path / "kept.csv")])
    capsys.readouterr()
    compare.main([str(tmp_path / "kept.csv"), "--where", "rank=2", "--keep", str(tmp_path / "kept.csv")])
    kept, = table(capsys.readouterr().out, "lora r2")
    assert {**row, "seconds": 0} == {**kept, "seconds": 0}
    with open(tmp_path / "kept.csv", newline="") as file:
        commands = [run["command"] for run in csv.DictReader(file)]
    assert len(commands) == 8, "a table keeps the rows that are not asked for"
    config, = train.runs(train.parse_args(commands[-1].split()[2:]))  # what makes that run again
    folder, = tmp_path.glob(f"uuid-{train.label(config).replace(' ', '-')}-lr{config.learning_rate}-seed{config.seed}")
    saved = json.loads((folder / "results.json").read_text())["config"]
    machine = ("out_dir", "device", "dtype", "compile")
    assert {**vars(config), **dict.fromkeys(machine)} == {**saved, **dict.fromkeys(machine)}
    missing = said.count("matplotlib is not installed")
    assert said.count("drawn: ") == sum(path.exists() for path in pictures) == 2 - missing
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures if path.exists())


def test_kept_runs_are_neither_lost_nor_mixed(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mora.MoRALinear, "fast", True)  # --no-fast is for the whole process

    def compare_says(*words):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(word) for word in words])
        error = capsys.readouterr().err
        assert error.startswith("compare.py: error: ") and error.count("\n") == 1
        return error

    first, kept = next(finished[1].glob("uuid-*")), tmp_path / "kept.csv"
    more = ["--targets", "c_attn", "c_fc", "--alpha", 0, "--no-fast"]
    assert cli(*finished[0], *more, "--seed", 1, "--out_dir", tmp_path) == 0
    second = next(tmp_path.glob("uuid-*"))
    capsys.readouterr()
    compare.main([str(first), str(second), "--keep", str(kept)])
    said = capsys.readouterr().out
    assert said.count("| lora r2 |") == 2 and "--alpha 0" in said, "other options are no other seed"
    one, other = compare.load(kept)
    assert "--alpha 0" in compare.results_table([one, other | {"label": "other"}]), "nor are those of another name"
    compare.main([str(first), str(second), "--where", "seed=1"])
    assert capsys.readouterr().out.count("| lora r2 |") == 1
    assert [len(compare.load(first, [where])) for where in (("seed", "0"), ("seed!", "0"), ("seed!", "1"))] == [1, 0, 1]
    assert [len(compare.load(first, [("command" + no, "*--seed 0*")])) for no in ("", "!")] == [1, 0]
    for picture in ("--curves", "--bits", "--spectra"):
        assert "several settings" in compare_says(first, second, picture, tmp_path / "p.png"), "not one line for both"
    with pytest.raises(ValueError, match="several settings"):  # as many pairs, and not as many passes
        compare.draw_bits([one, dict(one, command=one["command"] + " --max_steps 7")], tmp_path / "p.png")
    few = dict(other, metrics={name: value for name, value in other["metrics"].items() if name != "bits"})
    pooled, = table(compare.results_table([dict(one, command=""), dict(few, command="")]), "lora r2")
    assert (pooled["bits / parameter"], pooled["seeds"]) == ("-", "2"), "not the figure of the one that has it"
    compare.main([str(second), "--spectra", str(tmp_path / "p.png")])
    assert re.search(r"mlp.c_proj( +\| 0\.0){4} ", capsys.readouterr().out), "an untouched layer has no rank"
    before = kept.read_text()
    assert all(option in before for option in ("--targets c_attn c_fc --", "--alpha 0.0", "--no-fast", "--seed 1"))
    for wrong in ("rows,notes\n1,2\n", "", before.replace("seed,", "seeds,", 1), before + "a,b\n", "notes",
                  before.replace('"[', '"[['), re.sub('"\\[.*?\\]"', "[]", before)):
        kept.write_text(wrong)
        for words in ([first, "--keep", kept], [kept]):
            assert "kept.csv" in compare_says(*words) and kept.read_text() == wrong, "what is no such table stays"
    assert ".csv" in compare_says(first, "--keep", tmp_path / "table") and not (tmp_path / "table").exists()
    kept.write_text(before)
    assert "n_pairs" in compare_says(kept, "--where", "pairs=4")
    assert "kept.csv" in compare_says(kept, "--where", "seed=9")
    assert "folders" in compare_says(kept, "--spectra", tmp_path / "s.png")
    for key, value in (("rows", []), ("trainable_parameters", 0), ("config", None), ("metrics", {"bits": 10**400})):
        results = json.loads((second / "results.json").read_text())
        (second / "results.json").write_text(json.dumps(results | {key: value}))
        assert str(second / "results.json") in compare_says(first, second)
        (second / "results.json").write_text(json.dumps(results))


def test_an_operator_made_from_sharing_gets_groups(monkeypatch):
    monkeypatch.setitem(mora.OPERATORS, "own", type("Own", (mora.Sharing,), {}))
    args = train.parse_args("uuid --methods mora remora --operator own --init scratch".split())
    configs = train.runs(args)
    assert [config.groups for config in configs] == ["strided", "cycle"]


def test_no_fast_computes_every_layer_as_defined(base, tmp_path, monkeypatch):
    monkeypatch.setattr(mora.MoRALinear, "fast", True)
    seen, forward = [], mora.Operator.forward
    monkeypatch.setattr(mora.Operator, "forward", lambda self, x, M: seen.append(len(x)) or forward(self, x, M))
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "mora", "--max_steps", 3, "--out_dir", tmp_path]
    for options, calls in (([], 0), (["--no-fast"], 4 * 3)):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(train, "evaluate", lambda *_: {"char_accuracy": 0.0, "exact_match": 0.0})
            patch.setattr(train, "update_rank", lambda *_: None)
            patch.setattr(train, "show_completion", lambda *_: None)
            patch.setattr(train, "check_start", lambda *_: None)
            assert cli(*command, *options) == 0
        assert len(seen) == calls, "a breakpoint in Eq. 2 stops for each layer in each step"


def test_runs_are_the_combinations_of_what_concerns_a_method():
    args = train.parse_args("uuid --methods full lora mora remora --rank 1 2 --operator sharing --groups cycle random "
                            "--seed 0 1".split())
    labels = [train.label(config) for config in train.runs(args) if config.seed == 0]
    groups = [f"sharing {how} r{r}" for r in (1, 2) for how in ("cycle", "random")]
    expected = ["full", "lora r1", "lora r2", *(f"{method} {rest}" for method in ("mora", "remora") for rest in groups)]
    assert sorted(labels) == sorted(expected)
    assert len(list(train.runs(args))) == 2 * len(expected)


def test_compare_shows_each_setting_at_its_best_rate(base, tmp_path, capsys):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "mora", "--max_steps", 40]
    assert cli(*command, "--learning_rate", 0, 1e-2, "--out_dir", tmp_path) == 0
    compare.main([*map(str, tmp_path.glob("uuid-*"))])
    best = capsys.readouterr().out.split("Each setting at the best of its learning rates:")[1]
    assert [row["peak rate"] for name in ("lora r2", "mora rotation r2") for row in table(best, name)] == ["0.01"] * 2
    compare.main([*map(str, tmp_path.glob("uuid-*-lr0.01-*"))])
    assert "Each setting" not in capsys.readouterr().out, "a single rate is no sweep"
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "nothing")])


def test_evaluation_and_micro_batches_change_nothing(base, tmp_path):
    common = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "mora", "--max_steps", 8]
    for name, options in dict(plain=["--eval_every", 8], often=["--eval_every", 1],
                              cut=["--eval_every", 8, "--accumulate", 4]).items():
        assert cli(*common, *options, "--out_dir", tmp_path / name) == 0
    plain, often, cut = (next((tmp_path / name).glob("uuid-*")) for name in ("plain", "often", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(often).values()))
    assert float(rows(plain)[-1]["loss"]) == pytest.approx(float(rows(cut)[-1]["loss"]), rel=1e-5)


def test_seeds_differ(base, tmp_path):
    assert cli("uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "--max_steps", 4, "--seed", 0, 1,
               "--out_dir", tmp_path) == 0
    first, second = (rows(next(tmp_path.glob(f"*-seed{seed}"))) for seed in (0, 1))
    assert first != second


def test_a_merge_clears_the_optimizers_memory_of_the_adapters_only(tmp_path):
    command = [*TINY, "--init", "scratch", "--methods", "remora", "--operator", "sharing", "--merge_every", 4,
               "--eval_every", 8, "--max_steps", 9]  # evaluated, and saved, after the merges of steps 4 and 8
    saved = {}
    original = train.save_checkpoint

    def spy(folder, step, rows, losses, seconds, config, model, optimizer, scaler):
        names = {id(p): name for name, p in model.named_parameters()}
        saved[step] = {names[id(p)]: state["step"].item() for p, state in optimizer.state.items()}
        original(folder, step, rows, losses, seconds, config, model, optimizer, scaler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", spy)
        assert cli(*command, "--out_dir", tmp_path) == 0
    assert saved[8]["h.0.mlp.c_fc.M"] == 4 and saved[9]["h.0.mlp.c_fc.M"] == 1, "M's state is that since the last merge"
    assert saved[8]["wte.weight"] == 8 and saved[9]["wte.weight"] == 9, "what is not in an adapter keeps its state"


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("options", [
    "--methods mora --dropout 0.1", "--methods remora --operator sharing --groups cycle",
    "--methods remora --operator sharing", "--methods relora --init scratch",
    "--methods lora+ --full_warmup 5 --schedule cosine"])
def test_a_broken_run_resumes_bit_for_bit(options, base, tmp_path, monkeypatch):
    common = TINY if "scratch" in options else ["uuid", "--init", base, *TINY[7:]]
    common = [*map(str, common), *options.split()]
    assert cli(*common, "--out_dir", tmp_path / "whole") == 0

    class Killed(Exception):
        pass

    batch = data.UUIDPairs.batch

    def breaking(self, step):
        if step == broken_at:
            raise Killed
        return batch(self, step)

    for broken_at in (2, 6, 11):
        out = tmp_path / f"broken at {broken_at}"
        with monkeypatch.context() as patch:
            patch.setattr(data.UUIDPairs, "batch", breaking)
            with pytest.raises(Killed):
                train.main([*common, "--out_dir", str(out)])
        assert cli(*common, "--out_dir", out, "--resume") == 0
        assert_same_run(*(next(folder.glob("uuid-*")) for folder in (tmp_path / "whole", out)))


def start(*argv, **environment):
    """train.py as a process of its own."""
    return subprocess.Popen([*TRAIN, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | environment)


def signal_at(number, process, beginning):
    """Send a signal when the process prints a line that begins so."""
    assert any(line.startswith(beginning) for line in process.stdout), process.communicate()[1]
    process.send_signal(number)


def test_a_stopped_process_resumes_bit_for_bit(base, tmp_path):
    command = ["uuid", "--init", base, "--methods", "mora", *FOUR_PAIRS, "--max_steps", 200, "--eval_every", 10,
               "--device", "cpu"]
    numbers = signal.SIGINT, signal.SIGKILL  # SIGTERM is in the next test
    processes = [start(*command, "--out_dir", tmp_path / number.name) for number in numbers]
    with ThreadPoolExecutor() as pool:
        [*pool.map(signal_at, numbers, processes, itertools.repeat("step  20/"))]
    assert cli(*command, "--out_dir", tmp_path / "whole") == 0
    for number, process in zip(numbers, processes):
        _, error = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130 and "--resume" in error and "Traceback" not in error
        assert cli(*command, "--out_dir", tmp_path / number.name, "--resume") == 0
        assert_same_run(*(next((tmp_path / name).glob("uuid-*")) for name in ("whole", number.name)))


def test_a_run_is_left_alone_by_others_and_stops_as_a_whole(base, tmp_path, capsys):
    """A run of two processes; commands that want its folder meanwhile; and one of the two is asked to stop."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    command = ["uuid", "--init", base, "--methods", "mora", "--n_pairs", 8, "--device", "cpu", "--out_dir", tmp_path]
    both = [start(*command, "--max_steps", 5000, "--eval_every", 5, RANK=rank, **environment) for rank in "01"]
    signal_at(0, both[0], "step    5/5000")  # 0 is no signal: this only waits
    for options in (["--dropout", 0.5], ["--resume"]):
        assert cli(*command, "--max_steps", 5000, *options) == 2
        error = capsys.readouterr().err
        assert f"in use by process {both[0].pid}" in error and error.count("\n") == 1
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and "which is saved" in error and "Traceback" not in error
    folder, = tmp_path.glob("uuid-*")  # nothing was renamed
    step = re.search(r"stopped after step (\d+)", error)[1]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == int(step)
    assert cli(*command, "--max_steps", 4) == 0, "the lock ended with its process"
    assert len([*tmp_path.glob("kept-uuid-*")]) == 1


def test_finished_runs_are_not_run_again(base, tmp_path, capsys):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "--max_steps", 4, "--out_dir", tmp_path]
    assert cli(*command) == 0
    results = next(tmp_path.glob("*/results.json"))
    before = results.stat().st_mtime_ns
    assert cli(*command, "--resume") == 0
    assert "done before" in capsys.readouterr().out and results.stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["--n_pairs 5", "--max_steps 9", "--batch_size 2", "--alpha 3", "--schedule cosine",
                                    "--dropout 0.5"])
def test_resuming_with_other_settings_is_refused(change, base, tmp_path, capsys):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "--max_steps", 4, "--warmup_steps", 1,
               "--out_dir", tmp_path]
    assert cli(*command) == 0
    capsys.readouterr()
    assert cli(*command, *change.split(), "--resume") == 2
    error = capsys.readouterr().err
    option, value = change.split()
    assert option in error and value in error and error.count("\n") == 1


@pytest.mark.parametrize("options", ["--methods mora", "--methods remora --operator sharing --groups random",
                                     "--methods relora"])
def test_a_constant_schedule_may_be_prolonged(options, base, tmp_path):
    command = ["uuid", "--init", base, *FOUR_PAIRS, *options.split(), "--warmup_steps", 1, "--merge_every", 4,
               "--restart_warmup", 2, "--schedule", "constant", "--eval_every", 2]
    assert cli(*command, "--max_steps", 8, "--out_dir", tmp_path / "a") == 0
    assert cli(*command, "--max_steps", 12, "--out_dir", tmp_path / "a", "--resume") == 0
    assert cli(*command, "--max_steps", 12, "--out_dir", tmp_path / "b") == 0
    assert_same_run(*(next((tmp_path / name).glob("uuid-*")) for name in "ab"))


def test_seconds_are_those_of_all_sessions(base, tmp_path, monkeypatch):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "mora", "--schedule", "constant",
               "--warmup_steps", 1]
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert cli(*command, "--max_steps", 8, "--out_dir", tmp_path) == 0
    results = next(tmp_path.glob("uuid-*")) / "results.json"
    before = json.loads(results.read_text())["seconds"]
    assert cli(*command, "--max_steps", 12, "--out_dir", tmp_path, "--resume") == 0
    assert json.loads(results.read_text())["seconds"] > before > 0


def test_metrics_are_whole_after_a_kill_between_two_files(base, tmp_path, monkeypatch):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "mora", "--max_steps", 8, "--eval_every", 4]
    assert cli(*command, "--out_dir", tmp_path / "whole") == 0
    write = train.write
    for name, calls in (("a", 4), ("b", 3), ("c", 2), ("d", 1)):
        def killed(path, save):
            write(path, save)
            if path.name in ("metrics.csv", "checkpoint.pt") and not next(left):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(train, "write", killed)
            left = iter(range(calls - 1, -1, -1))
            assert cli(*command, "--out_dir", tmp_path / name) == 130
        assert cli(*command, "--out_dir", tmp_path / name, "--resume") == 0
        assert_same_run(*(next((tmp_path / folder).glob("uuid-*")) for folder in ("whole", name)))


# ----------------------------------------------------------------------------------------------------------------------
# Text, pairs and C4

SMALL = ("--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 "
         "--batch_size 8 --max_steps 12 --eval_every 4 --merge_every 5").split()


@pytest.fixture
def corpus(tmp_path):
    """Files of every kind, in a language of a few words."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("the cat sat on a mat and saw the dog".split(), k=60)) for _ in range(40)]
    lines = [json.dumps({"text": text, "url": "", "timestamp": ""}) for text in texts]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "old.txt").write_text("to be or not to be " * 50)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)})
                                                    for a in range(8) for b in range(8)))
    (tmp_path / "c4/en").mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        (tmp_path / f"c4/en/{name}.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def test_c4_with_every_method(corpus, capsys):
    assert cli("c4", *SMALL, "--c4_url", f"file:{corpus / 'c4'}", "--out_dir", corpus / "out",
               "--cache_dir", corpus / "cache", "--groups", "cycle", "random") == 0
    out = capsys.readouterr().out
    for label in ("full", "lora r4", "relora r4", "mora sharing cycle r4", "remora sharing cycle r4",
                  "remora sharing random r4"):
        assert f"| {label} " in out
    folder = next((corpus / "out").glob("c4-remora-sharing-random-*"))
    assert list(rows(folder)[0]) == ["step", "loss", "learning_rate", "val_loss", "perplexity"]
    last = json.loads((folder / "results.json").read_text())
    assert last["metrics"]["perplexity"] == pytest.approx(math.exp(last["metrics"]["val_loss"]))
    model = train.adapt(train.load_base(train.parse_args(["c4", *SMALL]))[0],
                        next(train.runs(train.parse_args(["c4", *SMALL, "--methods", "mora"]))))
    own = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".M"))
    assert last["adapter_parameters"] == own
    assert last["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_validation_does_not_depend_on_batch_or_interval(corpus):
    common = ["text", *SMALL, "--data", corpus / "text.jsonl", "--init", "scratch", "--methods", "full"]
    losses = []
    for name, options in dict(a=[], b=["--batch_size", 4], c=["--eval_every", 1]).items():
        # nothing is learned at a rate of 0
        assert cli(*common, "--learning_rate", 0, *options, "--out_dir", corpus / name) == 0
        losses.append(rows(next((corpus / name).glob("text-*")))[-1]["val_loss"])
    assert losses[0] == losses[1] == losses[2]


def test_continual_pretraining_reports_what_was_forgotten(corpus, capsys):
    assert cli("text", *SMALL, "--data", corpus / "text.jsonl", "--methods", "full", "--export",
               "--out_dir", corpus / "first") == 0
    start = next((corpus / "first").glob("*/model.pt"))
    common = ["--max_steps", 8, "--batch_size", 8, "--data", corpus / "old.txt", "--old_data", corpus / "text.jsonl",
              "--out_dir", corpus / "second"]
    assert cli("text", "--init", start, "--methods", "full", "mora", "--learning_rate", 1e-2, *common) == 0
    for folder in (corpus / "second").glob("text-*"):
        evaluated = rows(folder)
        assert float(evaluated[-1]["val_loss"]) < float(evaluated[0]["val_loss"])
    mora_folder = next((corpus / "second").glob("text-mora-*"))
    trained = {name for name in torch.load(mora_folder / "adapter.pt", weights_only=True)}
    assert all(name.split(".")[-1] in ("M", "description") for name in trained), "weights that were given stay frozen"
    capsys.readouterr()
    compare.main([*map(str, (corpus / "second").glob("text-*")), "--forgetting", str(corpus / "old.png")])
    said = capsys.readouterr().out
    for label in ("full", "mora rotation r8"):
        ended, scaled = table(said, label)  # the runs' own metrics, then those of a part of the update
        losses = [[float(loss) for loss in scaled[part].split(" / ")] for part in ("50%", "100%")]
        assert losses[1] == [float(ended["val loss"]), float(ended["old loss"])]
        before = rows(next((corpus / "second").glob(f"text-{label[:4]}-*")))[0]
        assert losses[1][0] < losses[0][0] < float(before["val_loss"])
        assert abs(losses[0][1] - losses[1][1]) > 1e-3, "the old loss is of the part as well"
    with pytest.raises(SystemExit, match="2"):
        compare.main([*map(str, (corpus / "first").glob("text-*")), "--forgetting", str(corpus / "old.png")])
    assert "--old_data" in capsys.readouterr().err


def test_pairs_learn_completions(corpus, capsys):
    assert cli("pairs", *SMALL, "--data", corpus / "pairs.jsonl", "--methods", "full", "--max_steps", 60,
               "--eval_every", 30,
               "--learning_rate", 3e-3, "--out_dir", corpus / "out") == 0
    table = rows(next((corpus / "out").glob("pairs-*")))
    assert list(table[0]) == ["step", "loss", "learning_rate", "val_loss", "perplexity", "exact_match"]
    assert float(table[-1]["loss"]) < float(table[0]["loss"])
    assert float(table[-1]["val_loss"]) < float(table[0]["val_loss"])


def test_an_exported_model_computes_what_was_trained(corpus):
    assert cli("text", *SMALL, "--data", corpus / "text.jsonl", "--methods", "remora", "--operator", "sharing",
               "--export", "--out_dir", corpus / "out") == 0
    folder = next((corpus / "out").glob("text-*"))
    exported = GPT.from_pretrained(str(folder / "model.pt"))
    args = train.parse_args(["text", *SMALL, "--data", __file__, "--methods", "remora", "--operator", "sharing"])
    model = train.adapt(GPT(exported.config), next(train.runs(args)))
    model.load_state_dict(weights(folder))
    idx = torch.randint(256, (2, 32))
    assert torch.allclose(exported(idx)[0], model(idx)[0], atol=1e-5)


def test_a_full_rank_warmup_trains_all_weights_first(corpus):
    common = ["text", *SMALL, "--data", corpus / "text.jsonl", "--full_warmup", 6, "--warmup_steps", 2,
              "--schedule", "constant", "--out_dir", corpus / "out"]
    assert cli(*common, "--methods", "relora", "--export") == 0
    folder = next((corpus / "out").glob("text-relora-*"))
    assert json.loads((folder / "results.json").read_text())["update_rank"] == 32, "a full-rank warm-up's has full rank"
    assert [row["step"] for row in rows(folder / "full_warmup")] == ["4", "6"]
    assert [row["step"] for row in rows(folder)] == ["8", "12"]
    common[common.index("--full_warmup") + 1] = 4
    (folder / "results.json").unlink()
    (folder / "checkpoint.pt").unlink()
    assert cli(*common, "--methods", "relora", "--resume") == 2, "the warm-up that is there has 6 steps"


@pytest.mark.parametrize("full_warmup", [0, 2])
def test_adapters_are_saved_where_they_rebuild_the_model(full_warmup, base, tmp_path):
    assert cli("uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "--max_steps", 4,
               "--full_warmup", full_warmup, "--out_dir", tmp_path) == 0
    assert bool([*tmp_path.glob("*/adapter.pt")]) == (not full_warmup), "a full-rank warm-up changes the base"


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def test_a_loss_that_is_not_finite_ends_a_run(base, tmp_path, capsys, monkeypatch):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "full", "--max_steps", 8, "--eval_every", 2,
               "--out_dir", tmp_path]
    forward, calls = GPT.forward, []

    def poisoned(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.append(self.training)
        return logits, loss * math.nan if calls.count(True) == 5 and self.training else loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    assert cli(*command) == 2
    error = capsys.readouterr().err
    assert "not finite" in error and "--learning_rate" in error and error.count("\n") == 1
    folder, = tmp_path.glob("uuid-*seed0")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4
    assert [row["step"] for row in rows(folder)] == ["2", "4"] and not (folder / "results.json").exists()


def test_a_run_that_diverges_in_its_last_step_is_a_failure(corpus, capsys):
    command = ["text", *SMALL, "--data", corpus / "text.jsonl", "--methods", "full", "--learning_rate", 1e9,
               "--max_steps", 1, "--warmup_steps", 0, "--eval_every", 1, "--export", "--out_dir", corpus / "out"]
    assert cli(*command) == 2
    assert "not finite" in capsys.readouterr().err
    assert not [*corpus.glob("out/text-*/model.pt"), *corpus.glob("out/text-*/results.json")]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file")], ids=["os", "torch"])
def test_a_full_disk_leaves_the_last_checkpoint(fault, base, tmp_path, capsys, monkeypatch):
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "--max_steps", 8, "--eval_every", 2,
               "--out_dir", tmp_path]
    save = torch.save

    def full(state, file):
        if state.get("step") == 6:
            file.write(b"half a file")
            raise fault
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert cli(*command) == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and error.count("\n") == 1
    assert "No space left on device" in error or isinstance(fault, RuntimeError)
    folder = next(tmp_path.glob("uuid-*"))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4 and not list(folder.glob("*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_torch_save_to_an_open_file_says_that_the_disk_is_full():
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as file:
        torch.save(torch.zeros(100_000), file)


def test_a_name_that_is_no_utf8_does_no_harm(corpus):
    for name in (b"caf\xe9.jsonl", "日本語".encode() * 25 + b".jsonl"):
        path = os.path.join(os.fsencode(corpus), name)
        with open(path, "wb") as file:
            file.write((corpus / "text.jsonl").read_bytes())
        command = ["text", *SMALL, "--data", os.fsdecode(path), "--methods", "mora", "--out_dir", corpus / "out"]
        assert cli(*command) == 0 and cli(*command, "--resume") == 0


@pytest.mark.parametrize("changed", ["text.jsonl", "model.pt"])
def test_resuming_with_other_contents_of_a_file_is_refused(changed, corpus, capsys):
    start = corpus / "model.pt"
    GPT(GPTConfig(**PRESETS["tiny"])).export(start)
    command = ["text", "--data", corpus / "text.jsonl", "--init", start, "--max_steps", 4, "--batch_size", 4,
               "--block_size", 32, "--out_dir", corpus / "out"]
    assert cli(*command) == 0
    times = os.stat(corpus / changed)
    if changed == "model.pt":
        torch.manual_seed(1)
        GPT(GPTConfig(**PRESETS["tiny"])).export(start)
    else:
        (corpus / changed).write_text((corpus / changed).read_text().replace("the cat", "teh cat"))
    os.utime(corpus / changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    assert cli(*command, "--resume") == 2
    error = capsys.readouterr().err
    assert "--inputs" in error and error.count("\n") == 1
    next(corpus.glob("out/text-*/results.json")).unlink()
    assert cli(*command, "--resume") == 2, "nor is an unfinished run continued"


def pickle_bomb(path):
    class Bomb:
        def __reduce__(self):
            return print, ("run by a pickle",)
    torch.save({"config": Bomb()}, path)


def change(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def flip(path):
    """One bit of the first weight, which torch.load does not notice."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["model"]["wte.weight"].numpy().tobytes()
    content[content.index(weight[:64])] ^= 1
    path.write_bytes(content)


def moments(path):
    optimizer = torch.load(path, weights_only=True)["optimizer"]
    for state in optimizer["state"].values():
        state["exp_avg"] = state["exp_avg"][:1]
    return optimizer


SPOILT = {
    "checkpoint.pt": [lambda path: path.write_bytes(path.read_bytes()[:1000]), lambda path: path.write_bytes(b""),
                      pickle_bomb, lambda path: torch.save([1, 2], path), lambda path: change(path, config=5),
                      lambda path: change(path, model={"wte.weight": torch.zeros(2, 2)}),
                      lambda path: change(path, optimizer={"state": {}, "param_groups": []}),
                      flip, lambda path: change(path, step=-3), lambda path: change(path, step=10**12),
                      lambda path: change(path, step="4"), lambda path: change(path, rows=None),
                      lambda path: change(path, rows=[1, 2]), lambda path: change(path, losses=None),
                      lambda path: change(path, seconds="long"), lambda path: change(path, scaler=5),
                      lambda path: change(path, optimizer=moments(path))],
    "results.json": [lambda path: path.write_bytes(path.read_bytes()[:1000]), lambda path: path.write_bytes(b""),
                     lambda path: path.write_bytes(b"\xff\xfe"), lambda path: path.write_text("[1, 2]"),
                     lambda path: path.write_text('{"config": {}}'),
                     lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"label": None}))],
}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished run: its command but for the folder, and the folder."""
    folder = tmp_path_factory.mktemp("finished")
    command = ["uuid", "--init", base, *FOUR_PAIRS, "--methods", "lora", "--max_steps", 4, "--eval_every", 4]
    assert cli(*command, "--out_dir", folder) == 0
    return command, folder


@pytest.mark.parametrize("name, spoil", [(name, spoil) for name, ways in SPOILT.items() for spoil in ways])
def test_a_damaged_file_of_a_run_is_named_and_can_be_moved_away(name, spoil, finished, tmp_path, capsys):
    command = [*finished[0], "--out_dir", tmp_path]
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    folder = next(tmp_path.glob("uuid-*"))
    if name == "checkpoint.pt":
        (folder / "results.json").unlink()  # or the run would be done
    spoil(folder / name)
    before = (folder / name).read_bytes()
    capsys.readouterr()
    assert cli(*command, "--resume") == 2
    out, error = capsys.readouterr()
    assert str(folder / name) in error and error.count("\n") == 1 and "run by a pickle" not in out
    assert (folder / name).read_bytes() == before
    (folder / name).unlink()
    assert cli(*command, "--resume") == 0


# What a user types, and what the one line of complaint names. The files are those of `wrong_files`.
WRONG = {
    # Numbers
    "--rank 0": "--rank", "--rank two": "'two'", "--rank 1.5": "'1.5'", "--rank 1e3": "'1e3'", "--rank ''": "''",
    "--rank": "--rank", "--rank 99999999999999999999999": "1,000,000,000", "--rank inf": "'inf'",
    "--n_pairs 0": "--n_pairs", "--n_pairs 1000000000": "10,000,000", "--batch_size 1000000000": "--batch_size",
    "--n_embd 10000000": "--n_embd", "--n_layer 100000": "--n_layer", "--max_steps 0": "--max_steps",
    "--max_steps 1000000000000000000": "--max_steps", "--seed -1": "--seed", "--seed 18446744073709551616": "--seed",
    "--learning_rate -1": "--learning_rate", "--learning_rate nan": "not nan", "--learning_rate 1e999": "not inf",
    "--learning_rate 1e-3,1e-4": "'1e-3,1e-4'", "--dropout 2": "--dropout", "--dropout -0.1": "--dropout",
    "--alpha 1e300": "--alpha", "--alpha -1": "--alpha", "--lora_plus_ratio 1e308": "--lora_plus_ratio",
    "--grad_clip nan": "--grad_clip", "--weight_decay -0.1": "--weight_decay", "--block_size 1": "--block_size",
    "--eval_every 0": "--eval_every", "c4 --shards 1025": "1,024", "c4 --shards 0": "--shards",
    # Names
    "memorize": "'memorize'", "uuid c4": "c4", "--methods lorra": "'lorra'", "--operator rope": "'rope'",
    "--groups even": "'even'", "--schedule step": "'step'", "--dtype float8": "'float8'",
    "--tokenizer words": "'words'", "uuid --learnin_rate 1": "--learnin_rate", "--export yes": "yes",
    "--targets c_atn": "'c_atn'", "--targets ''": "''", "--init gpt3": "'gpt3'", "--init ''": "''",
    "--device tpu": "tpu", "--device ''": "--device", "--device cuda:99": "cuda:99", "--device meta": "meta",
    "c4 --c4_url ''": "--c4_url", "c4 --c4_url ftp://x/c4": "ftp://x/c4", "c4 --c4_url file:/nowhere": "/nowhere/en",
    "c4 --c4_url http://a:b:c/": "http://a:b:c/",
    # What does not go together
    "--seed 0 0": "--seed", "--methods lora lora": "--methods", "--learning_rate 1e-3 0.001": "--learning_rate",
    "text --data text.jsonl text.jsonl": "--data",
    "--batch_size 8 --accumulate 3": "3 micro-batches", "--warmup_steps 500": "--warmup_steps",
    "--full_warmup 9 --max_steps 9": "--full_warmup", "--n_embd 30 --n_head 4": "30", "--n_head 3": "128",
    "--block_size 40": "72 tokens", "text --data text.jsonl --init demo --block_size 40": "72 tokens",
    "--tokenizer gpt2": "--tokenizer", "--init gpt2 --n_layer 3": "--n_layer", "--fold --operator sharing": "--fold",
    "--groups random --operator rotation": "--groups", "--groups random --methods lora": "lora",
    "--merge_every 2 --restart_warmup 2 --methods remora": "--restart_warmup",
    "--data text.jsonl": "--data", "--old_data text.jsonl": "--old_data", "--shards 3": "--shards",
    "c4 --n_pairs 4": "--n_pairs", "c4 --data text.jsonl": "--data",
    "pairs --data pairs.jsonl --old_data text.jsonl": "--old_data", "text --data text.jsonl --c4_url x": "--c4_url",
    "--init scratch --n_embd 100000 --n_head 1 --block_size 1000000000": "memory",  # 400 terabytes
    # Text, and prompts with completions
    "text": "--data", "pairs": "--data", "text --val_data text.jsonl": "--data", "text --data": "--data",
    "text --data nowhere.txt": "nowhere.txt", "text --data ''": "''", "text --data folder": "folder",
    "text --data /dev/null": "/dev/null", "text --data text.jsonl --val_data nowhere.txt": "nowhere.txt",
    "text --data empty.txt": "empty.txt", "text --data blank.jsonl": "blank.jsonl", "text --data run.pdf": "run.pdf",
    "text --data binary.txt": "binary.txt:1", "text --data utf16.jsonl": "utf16.jsonl:1",
    "text --data latin1.jsonl": "latin1.jsonl:2", "text --data not.txt.gz": "not.txt.gz",
    "text --data cut.jsonl.gz": "cut.jsonl.gz", "text --data array.json": "array.json:1",
    "text --data hugeline.jsonl": "hugeline.jsonl:1", "text --data pairs.jsonl": "pairs.jsonl:1: ",
    "text --data number.jsonl": "number.jsonl:1", "text --data short.jsonl": "129",
    "text --data text.jsonl --val_data short.jsonl": "129",
    "text --data text.jsonl --old_data binary.txt": "binary.txt:1",
    "text --data text.jsonl --block_size 100000": "100001", "pairs --data text.jsonl": "text.jsonl:1",
    "pairs --data one.jsonl": "one.jsonl", "pairs --data pairs.jsonl --block_size 2": "--block_size 2",
    "pairs --data pairs.jsonl --val_data blank.jsonl": "0 lines",
    # Initial weights
    "--init run.pdf": "run.pdf", "--init folder": "'folder'", "--init empty.txt": "empty.txt",
    "--init half.pt": "half.pt", "--init bomb.pt": "bomb.pt", "--init checkpoint.pt": "--export",
    "--init adapter.pt": "wte.weight", "--init list.pt": "list.pt", "--init nan.pt": "not finite",
    "--init short.pt": "context of 40", "--init short.pt --block_size 80": "context of 40", "--init small.pt": "50257",
    "text --data text.jsonl --init model.pt --block_size 300": "context of 128",
    "--init model.pt --tokenizer gpt2": "--tokenizer",
    # Folders
    "--out_dir run.pdf": "run.pdf", "--out_dir run.pdf/out": "run.pdf/out", "--out_dir /dev/null/out": "/dev/null/out",
}


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    """A folder with files that are good, and files that are not."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "folder").mkdir()
    rows = {"text.jsonl": {"text": "the cat sat on the mat " * 20}, "short.jsonl": {"text": "a"},
            "number.jsonl": {"text": 3}, "pairs.jsonl": {"prompt": "2+2=", "completion": "4"}}
    for name, row in rows.items():
        (folder / name).write_text((json.dumps(row) + "\n") * 40)
    line = '{"text": "caf\xe9"}\n'
    contents = {
        "run.pdf": b"%PDF-1.7", "empty.txt": b"", "blank.jsonl": b"\n \n", "binary.txt": b"\x89PNG\r\n\x1a\n\x00\xff",
        "utf16.jsonl": line.encode("utf-16"), "latin1.jsonl": b"\n" + line.encode("latin-1"), "not.txt.gz": b"<html>",
        "cut.jsonl.gz": gzip.compress(os.urandom(999))[:-99], "array.json": json.dumps([{"text": "a"}] * 9).encode(),
        "hugeline.jsonl": b'{"text": "' + b"x" * 3_000_000, "one.jsonl": b'{"prompt": "a", "completion": "b"}'}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sizes = {"model.pt": {}, "short.pt": {"block_size": 40}, "small.pt": {"vocab_size": 100}}
    for name, changes in sizes.items():
        model = GPT(GPTConfig(**PRESETS["tiny"] | changes))
        model.export(folder / name)
    model.ln_f.bias.data[0] = math.nan
    model.export(folder / "nan.pt")
    torch.save({"step": 1, "config": {}, "model": model.state_dict()}, folder / "checkpoint.pt")
    torch.save(mora.adapter_state_dict(mora.add_adapters(model, rank=2)), folder / "adapter.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "half.pt").write_bytes((folder / "model.pt").read_bytes()[:9000])
    pickle_bomb(folder / "bomb.pt")
    return folder


@pytest.mark.parametrize("command, named", WRONG.items(), ids=WRONG)
def test_wrong_input_gets_one_clear_line(command, named, capsys, wrong_files, monkeypatch):
    monkeypatch.chdir(wrong_files)
    before = {path: path.read_bytes() for path in wrong_files.iterdir() if path.is_file()}
    assert cli(*shlex.split(command)) == 2
    out, error = capsys.readouterr()
    assert named in error and error.count("\n") == 1 and error.startswith("train.py: error: ")
    assert len(error) < 500 and error[:-1].isprintable()
    assert "pretraining" not in out and "\nstep" not in out and "run by a pickle" not in out, "found before the work"
    assert {path: path.read_bytes() for path in wrong_files.iterdir() if path.is_file()} == before


def test_weights_that_overflow_are_named_before_training(tmp_path, capsys):
    model = GPT(GPTConfig(**PRESETS["demo"]))
    model.ln_f.weight.data.fill_(1e38)
    model.export(tmp_path / "large.pt")
    assert cli("uuid", "--init", tmp_path / "large.pt", "--methods", "mora", "--out_dir", tmp_path) == 2
    out, error = capsys.readouterr()
    assert "not finite" in error and error.count("\n") == 1 and "\nstep" not in out


def test_of_several_processes_the_first_names_a_wrong_option(monkeypatch, capsys):
    monkeypatch.setattr(train, "RANK", 1)
    assert cli("--rank", 0) == cli("--rank", "two") == 2 and not capsys.readouterr().err


def test_a_closed_output_and_variables_that_are_not_torchruns_do_no_harm(base, tmp_path):
    command = shlex.join(map(str, [*TRAIN, "uuid", "--init", base, "--methods", "lora", "--max_steps", 4,
                                   *FOUR_PAIRS, "--out_dir", tmp_path]))
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "two"}
    assert subprocess.run(f"{command} >&-", shell=True, env=environment).returncode == 0
    assert [*tmp_path.glob("uuid-*/results.json")], "as the first process, the only one that writes"


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C. During training: test_a_stopped_process_resumes_bit_for_bit


@pytest.mark.parametrize("stage", ["train.load_base", "data.tokenize", "train.check_start", "train.evaluate",
                                   "train.update_rank", "os.replace", "torch.save", "train.columns", "train.markdown"])
def test_a_signal_is_kind_at_every_stage(stage, corpus, capsys, monkeypatch):
    number = signal.SIGTERM if stage == "data.tokenize" else signal.SIGINT
    signal.signal(number, signal.SIG_IGN)  # main sets it
    command = ["text", *SMALL, "--data", corpus / "text.jsonl", "--methods", "mora", "--out_dir", corpus / "out",
               "--cache_dir", corpus / "cache"]

    def interrupted(*args, **more):
        if stage == "torch.save":
            args[1].write(b"half a file")
        signal.raise_signal(number)
        signal.raise_signal(number)  # the first one only asks the training to stop after its step

    module, name = stage.split(".")
    with monkeypatch.context() as patch:
        patch.setattr({"train": train, "data": data, "os": os, "torch": torch}[module], name, interrupted)
        assert cli(*command) == 130
    error = capsys.readouterr().err
    assert "--resume" in error and "Traceback" not in error
    assert not [path for path in corpus.rglob("*") if path.suffix in (".tmp", ".part")]
    assert cli(*command, "--resume") == 0


@pytest.mark.parametrize("task", train.TASKS)
def test_help_explains_every_option_with_the_tasks_own_default(task, capsys):
    assert cli(task, "-h") == 0
    text = " ".join(capsys.readouterr().out.split())
    fields = {field.name: field for field in dataclasses.fields(train.Config) if "help" in field.metadata}
    for name, field in fields.items():
        flag = "--methods" if name == "method" else f"--{name}"
        assert bool(re.search(f"{flag}[ ,]", text)) == (task in field.metadata.get("tasks", train.TASKS)), flag
    assert "None" not in text
    steps = {"uuid": 500, "c4": 600}.get(task, 1000)
    assert f"optimizer steps (default: {steps})" in text
    assert f"scratch, gpt2, gpt2-medium, ..., or a file (default: {'demo' if task == 'uuid' else 'scratch'})" in text


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("rank, reason, status", [(1, "[gloo] closed", 2), (0, "[gloo] closed", None),
                                                  (1, "a fault", None)])
def test_what_ends_the_first_process_is_no_traceback_of_the_others(rank, reason, status, monkeypatch, capsys):
    def run_all(argv):
        raise RuntimeError(reason)

    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(train, "run_all", run_all)
    with pytest.raises(SystemExit if status else RuntimeError):
        train.main([])
    assert not capsys.readouterr().err


def test_two_processes_train_as_one(base, tmp_path):
    command = ["uuid", "--init", str(base), "--methods", "remora", "relora", "--operator", "sharing", "--n_pairs", "8",
               "--max_steps", "20", "--eval_every", "5", "--merge_every", "8", "--learning_rate", "1e-3",
               "--grad_clip", "0", "--device", "cpu"]
    assert cli(*command, "--out_dir", tmp_path / "one") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN[1]]
    subprocess.run([*torchrun, *command, "--out_dir", tmp_path / "two"], check=True, capture_output=True)
    for run in ("relora", "remora"):
        one, two = (next((tmp_path / name).glob(f"uuid-{run}*")) for name in ("one", "two"))
        for a, b in zip(rows(one), rows(two), strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        for name, tensor in weights(one).items():  # A is drawn, and groups are dealt, alike in all processes
            assert torch.allclose(tensor.float(), weights(two)[name].float(), atol=1e-4), name
        # Adam hides a gradient's scale from the weights, so look at what it remembers of the gradient
        memories = (torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
                    for folder in (one, two))
        first, second = (torch.cat([state["exp_avg"].flatten() for state in memory.values()]) for memory in memories)
        assert first.norm() > 0
        assert (first - second).norm() < 1e-2 * first.norm(), "the mean over processes is not the batch's gradient"
