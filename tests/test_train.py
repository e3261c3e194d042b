"""Tests of train.py: python -m pytest tests/test_train.py. They train a tiny GPT on the CPU."""

import copy
import csv
import gzip
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import data
import mora
import train
from model import GPT, GPTConfig
from reference import assert_close, schedule

ROOT = Path(__file__).parent.parent
TINY = dict(block_size=128, vocab_size=257, n_layer=1, n_head=2, n_embd=32)
SCRATCH = "--init scratch --n_layer 1 --n_embd 32"
# Batches that differ from step to step, three evaluations, and two merges in between
SHORT = "uuid --n_pairs 6 --batch_size 4 --max_steps 12 --eval_every 4 --merge_every 5"

def command(folder, *parts):
    """The words of a command line, from strings and paths. What it writes is in `folder`."""
    words = [x for part in parts for x in (part.split() if isinstance(part, str) else [str(part)])]
    task = words[: not words[0].startswith("-")]
    folders = ["--out_dir", str(folder), "--cache_dir", str(folder / "cache")]
    return [*task, "--device", "cpu", *folders, *words[len(task) :]]

def cli(folder, *parts):
    """Call train.py's main as the shell would; -> its exit status."""
    with pytest.raises(SystemExit) as end:
        train.main(command(folder, *parts))
    return end.value.code

def settings(*parts):
    """The settings of each run of a command line."""
    args = train.parse_args(command(Path("out"), *parts))
    args.dtype, args.compile = train.device_defaults(None)
    return [*train.runs(args)]

def rows(run):
    """metrics.csv without the speed, which no two runs share."""
    lines = (run / "metrics.csv").read_text().splitlines()
    return [row | {"tokens_per_second": 0} for row in csv.DictReader(lines)]

def results(run):
    return json.loads((run / "results.json").read_text())

def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)

def assert_same_run(*folders):
    """Bit for bit the same metrics and weights in the only runs of two folders."""
    one, two = (next(folder.glob("*-seed*")) for folder in folders)
    weights, others = checkpoint(one)["model"], checkpoint(two)["model"]
    assert not [name for name in weights if not torch.equal(weights[name], others[name])]
    assert rows(one) == rows(two)

def load_tiny_base(folder):
    args = train.parse_args(command(folder, "uuid --n_layer 1 --n_head 2 --n_embd 64"))
    train.choose_device(args)
    return train.pretrain_demo(*train.load_base(args), args)

@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The file of a small base that knows what pairs look like, so that adapters have it easy."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DEMO_BASE", train.DEMO_BASE | dict(max_steps=120, batch_size=16))
        patch.setattr(train, "DEMO_TEXT", 100_000)
        load_tiny_base(folder)
    return next(folder.glob("base-*/model.pt"))

# ---- Settings ------------------------------------------------------------------------------------
def test_runs_are_the_combinations_of_what_concerns_a_method():
    runs = settings("uuid --methods full lora mora remora --operator sharing --rank 1 2",
                    "--groups cycle random --seed 0 1 --merge_every 7")
    groups = [f"sharing {groups} r{rank}" for rank in (1, 2) for groups in ("cycle", "random")]
    expected = ["full", "lora r1", "lora r2"]
    expected += [f"{method} {each}" for method in ("mora", "remora") for each in groups]
    assert sorted((train.label(run), run.seed) for run in runs) == sorted(
        itertools.product(expected, (0, 1)))
    assert {run.method for run in runs if run.merge_every} == {"remora"}

def test_operators_made_from_sharing_have_groups(monkeypatch):
    monkeypatch.setitem(mora.OPERATORS, "own", type("Own", (mora.Sharing,), {}))
    runs = settings("uuid --methods mora remora --operator own")
    assert [config.groups for config in runs] == ["strided", "cycle"]

def test_default_rates_fall_with_the_rank_and_a_new_operator_has_one(monkeypatch):
    monkeypatch.setitem(mora.OPERATORS, "own", mora.Operator)
    low, high = settings("uuid --methods mora --rank 2 8 --operator own")
    assert low.learning_rate == pytest.approx(2 * high.learning_rate)

def test_options_concern_and_name_only_the_runs_that_have_them():
    configs = settings("uuid --methods full lora mora --operator sharing rotation --fold --rslora")
    names = ["full", "lora rslora r2", "mora sharing strided r2", "mora rotation fold r2"]
    assert [train.label(config) for config in configs] == names
    assert settings("uuid --learning_rate 0")[0].learning_rate == 0, "a control, not the default"

@pytest.mark.parametrize("capability, expected", [
    (None, ("float32", False)), ((6, 1), ("float16", False)), ((7, 5), ("float16", True)),
    ((8, 0), ("bfloat16", True)), ((8, 9), ("bfloat16", True)), ((9, 0), ("bfloat16", True))])
def test_types_and_compiling_are_what_a_card_is_fast_at(capability, expected):
    assert train.device_defaults(capability) == expected

@pytest.mark.parametrize("task", ["uuid", "c4", "text", "pairs"])
def test_help_has_every_option_with_the_tasks_own_default(task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli(Path("out"), task, "-h") == 0
    text = capsys.readouterr().out
    for name in vars(train.settings()).keys() - {"task"}:
        assert re.search(rf"--{name.replace('_', '[_-]')}[ ,]", text), name
    for name, value in train.TASKS[task].items():
        assert re.search(rf"--{name} .*\n?.* \({re.escape(str(value))}\)", text), name
    assert "None" not in text

# ---- The method in training ----------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, every, restart", [
    (4, None, 2), (0, None, 2), (4, 8, 3), (10, 4, 3), (4, 3, 5), (0, 5, 0)])
def test_the_schedule_is_reloras(kind, warmup, every, restart):
    config = train.settings(schedule=kind, max_steps=24, warmup_steps=warmup, merge_every=every,
                            restart_warmup=restart)
    expected = [schedule(i, kind, 24, warmup, every, restart) for i in range(24)]
    assert [train.schedule(i, config) for i in range(24)] == pytest.approx(expected)

@pytest.mark.parametrize("every, expected", [(8, [8, 16, 24]), (1, [*range(1, 25)]), (None, [])])
def test_adapters_restart_before_every_so_many_steps(every, expected):
    config = train.settings(merge_every=every)
    assert [step for step in range(25) if train.restarts_before(step, config)] == expected

@pytest.mark.parametrize("method, B", [("lora+", 16.0), ("lora", 1.0)])
def test_b_of_lora_plus_and_what_is_in_no_adapter_have_rates_of_their_own(method, B):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
    mora.add_adapters(model, method, 2)[1].requires_grad_(True)
    config = train.settings(method=method, learning_rate=1.0, other_learning_rate=0.25)
    groups = train.make_optimizer(model, config).param_groups
    rates = {id(p): group["peak"] for group in groups for p in group["params"]}
    rates = {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}
    assert rates == {"0.A": 1.0, "0.B": B, "1.weight": 0.25, "1.bias": 0.25}

@pytest.mark.parametrize("init", ["scratch", "gpt2"])
@pytest.mark.parametrize("method, own", [
    ("lora", ["A", "B"]), ("lora+", ["A", "B"]), ("asylora", ["B"]), ("relora", ["A", "B"]),
    ("dora", ["A", "B", "magnitude"]), ("mora", ["M"]), ("remora", ["M"])])
def test_adapters_train_and_from_scratch_all_but_linear_layers(init, method, own):
    [config] = settings("uuid --methods", method, "--init", init)
    model = train.adapt(GPT(GPTConfig(**TINY)), config)
    layers = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    expected = {f"{layer}.{name}" for layer in layers for name in own}
    if init == "scratch":
        norms = itertools.product(("h.0.ln_1", "h.0.ln_2", "ln_f"), ("weight", "bias"))
        expected |= {"wte.weight", "wpe.weight", *map(".".join, norms)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected

def test_options_reach_the_adapters():
    lora, fold, sharing = (
        train.adapt(GPT(GPTConfig(**TINY)), settings("uuid --rank 3 --methods", options)[0])
        for options in ("lora --alpha 6 --rslora --dropout 0.5 --targets c_fc", "mora --fold",
                        "mora --operator sharing --groups contiguous"))
    assert [*mora.find_adapters(lora)] == ["h.0.mlp.c_fc"]
    lora, fold, sharing = (model.h[0].mlp.c_fc for model in (lora, fold, sharing))
    assert lora.scaling == pytest.approx(6 / math.sqrt(3)) and lora.dropout.p == 0.5
    assert fold.operator.fold and (sharing.operator.in_group.diff() >= 0).all()

# ---- The loop ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", ["full", "dora --grad_clip 0", "remora --restart_warmup 3"])
def test_training_is_adam_with_merges_and_the_schedule(options, base, tmp_path, monkeypatch):
    # As in float16: the scaler is on, and only some of the gradients are clipped
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=8.0))
    [config] = settings(SHORT, "--grad_clip 0.8 --learning_rate 3e-3 --methods", options)
    model = train.adapt(GPT.from_pretrained(base), config)
    plain = copy.deepcopy(model)
    dataset = train.load_dataset(config, data.get_tokenizer("bytes"), 128)
    last = train.train(model, dataset, config, tmp_path)["rows"][-1]
    trainable = [p for p in plain.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trainable), []
    for step in range(12):
        if config.merge_every and step in (5, 10):
            mora.merge_and_reset(plain, optimizer)
        rate = 3e-3 * schedule(step, "linear", 12, 2, config.merge_every, 3)
        optimizer.param_groups[0]["lr"] = rate
        loss = plain(*dataset.batch(step))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for (name, got), expected in zip(model.named_parameters(), plain.parameters()):
        assert_close(got, expected, name, 1e-5)
    assert (last["step"], last["learning_rate"]) == (12, pytest.approx(rate))
    assert last["loss"] == pytest.approx(sum(losses[-4:]) / 4)  # since the last evaluation

def uneven_batch():
    idx, targets = torch.randint(257, (2, 4, 8)).unbind()
    for row, n in enumerate((1, 7, 2, 6)):  # targets
        targets[row, n:] = -100
    return idx, targets

@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_have_the_gradient_of_the_batch(accumulate):
    model, (idx, targets) = GPT(GPTConfig(**TINY)), uneven_batch()
    loss = model(idx, targets)[1]
    expected = torch.autograd.grad(loss, [*model.parameters()])
    config = train.settings(accumulate=accumulate, device="cpu", dtype="float32")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    got = train.forward_backward(train.Loss(model), idx, targets, config, scaler)
    assert_close(got, loss.detach(), "loss", 1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), expected):
        assert_close(parameter.grad / 8, gradient, name, 1e-6)

def test_evaluation_changes_nothing_but_dropout_does(base, tmp_path):
    M = []
    for options in ("--dropout 0.2 --eval_every 1", "--dropout 0.2", "--dropout 0"):
        folder = tmp_path / str(len(M))
        assert cli(folder, SHORT, options, "--methods mora --init", base) == 0
        M.append(checkpoint(next(folder.glob("uuid-*")))["model"]["h.0.mlp.c_fc.M"])
    assert torch.equal(M[0], M[1]) and not torch.equal(M[1], M[2])

def test_adapters_start_from_the_seed(base, tmp_path):
    assert cli(tmp_path, SHORT, "--methods lora --learning_rate 1e-9 --seed 0 1 --init", base) == 0
    one, two = (checkpoint(next(tmp_path.glob(f"uuid-*-seed{seed}")))["model"] for seed in (0, 1))
    assert not torch.allclose(one["h.0.mlp.c_fc.A"], two["h.0.mlp.c_fc.A"])

def test_exact_match_is_of_what_greedy_decoding_writes():
    model = GPT(GPTConfig(**TINY))
    rows = model.generate(torch.randint(257, (4, 37)), 36)
    rows[1, 40] = rows[2, 72] = 3  # in a value, and its last character
    dataset = types.SimpleNamespace(metrics=("exact_match",))
    dataset.validation = lambda: [(rows[:, :-1], rows[:, -36:])]
    assert train.evaluate(model, dataset) == {"exact_match": 0.5}

def test_bits_and_accuracy_are_of_what_the_model_knows_of_the_values(base):
    model, pairs = GPT.from_pretrained(base), data.UUIDPairs(5, data.get_tokenizer("bytes"), 4, 7)
    bits, right = 0, []
    for (key, value), row in zip(pairs.pairs, pairs.tokens):
        log_p = model(row[None, :-1])[0][0].log_softmax(-1)[36:]
        bits += 122 + sum(log_p[i, row[37 + i]].item() for i in range(36)) / math.log(2)
        right += [chr(log_p[i].argmax()) == value[i] for i in range(36) if value[i] != "-"]
    metrics = train.evaluate(model, pairs)
    assert metrics["bits"] == pytest.approx(bits, abs=0.01) and bits < 0  # of these it knows none
    assert metrics["char_accuracy"] == pytest.approx(sum(right) / len(right)) and len(right) == 160

def test_every_target_counts_alike_in_the_loss_of_a_data_set():
    model, (idx, targets) = GPT(GPTConfig(**TINY)), uneven_batch()
    targets[1, :7] = model(idx)[0][1, :7].argmax(-1)  # a row that is right
    dataset = types.SimpleNamespace(metrics=("val_loss", "perplexity", "exact_match"))
    dataset.validation = lambda: zip(idx.split([1, 3]), targets.split([1, 3]))
    loss = model(idx, targets)[1].item()
    expected = {"val_loss": loss, "perplexity": math.exp(loss), "exact_match": 1 / 4}
    assert train.evaluate(model, dataset) == pytest.approx(expected, rel=1e-5)

# ---- Runs ----------------------------------------------------------------------------------------
def test_the_demos_base_is_trained_once(base, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    weights = load_tiny_base(base.parent.parent).state_dict()
    expected = GPT.from_pretrained(base).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())

@pytest.mark.parametrize("options", ["full", "lora", "lora+", "asylora", "dora", "relora", "remora",
    *(f"mora --operator {name}" for name in ("truncation", "sharing", "decoupling", "rotation"))])
def test_every_method_memorizes_four_pairs(options, base, tmp_path):
    rate = 2e-3 if "lora+" in options else 1e-2
    line = f"uuid --n_pairs 4 --max_steps 120 --rank 16 --learning_rate {rate} --methods {options}"
    assert cli(tmp_path, line, "--merge_every 60 --init", base) == 0
    metrics = results(next(tmp_path.glob("uuid-*")))["metrics"]
    assert metrics["char_accuracy"] > 0.4  # guessing gets a tenth

def test_what_a_run_leaves(base, tmp_path):
    line = "uuid --n_pairs 4 --max_steps 8 --eval_every 3 --methods mora --init"
    assert cli(tmp_path, line, base) == 0
    run = next(tmp_path.glob("uuid-*"))
    assert {*os.listdir(run)} == {"metrics.csv", "results.json", "checkpoint.pt", "adapter.pt"}
    columns = ["step", "loss", "learning_rate", "tokens_per_second", *data.UUIDPairs.metrics]
    assert [*rows(run)[0]] == columns and [row["step"] for row in rows(run)] == ["3", "6", "8"]
    saved, model = results(run), mora.add_adapters(GPT.from_pretrained(base), "mora", 2)
    expected = {"method": "mora", "rank": 2, "operator": "rotation", "seed": 0, "steps": 8}
    expected |= {"torch": torch.__version__, "device": "cpu"}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    expected["trainable_parameters"] = sum(n for n, trains in sizes if trains)
    expected["total_parameters"] = sum(n for n, _ in sizes)
    assert expected.items() <= saved.items()
    assert saved["seconds"] > 0 and saved["config"]["n_pairs"] == 4
    mora.load_adapters(model, torch.load(run / "adapter.pt", weights_only=True))
    pairs = data.UUIDPairs(4, data.get_tokenizer("bytes"), 4, seed=0)
    assert train.evaluate(model, pairs) == pytest.approx(saved["metrics"])

@pytest.mark.parametrize("options, written", [
    ("--methods remora", False), ("--methods lora", True), (f"--methods lora {SCRATCH}", False)])
def test_adapters_are_saved_where_they_rebuild_the_model(options, written, base, tmp_path):
    assert cli(tmp_path, SHORT, "--init", base, options) == 0
    assert bool([*tmp_path.glob("*/adapter.pt")]) == written

@pytest.mark.parametrize("no_fast", [False, True])
def test_no_fast_computes_by_eq_2(no_fast, base, tmp_path, monkeypatch):
    update, shapes = mora.MoRALinear.update, []
    monkeypatch.setattr(mora.MoRALinear, "update",
                        lambda self, x: shapes.append(x.shape[:-1]) or update(self, x))
    line = "uuid --n_pairs 8 --max_steps 3 --methods mora" + " --no-fast" * no_fast
    assert cli(tmp_path, line, "--init", base) == 0
    assert ((8, 72) in shapes) == no_fast  # a breakpoint in Eq. 2 would stop in each batch

@pytest.mark.parametrize("options", ["--methods full", "--methods remora", "--methods dora"])
def test_an_exported_model_computes_what_was_trained(options, base, tmp_path):
    line = [SHORT, "--export --init", base, options]
    assert cli(tmp_path, *line) == 0
    run = next(tmp_path.glob("uuid-*"))
    trained = train.adapt(GPT.from_pretrained(base), settings(*line)[0])
    trained.load_state_dict(checkpoint(run)["model"])
    idx = torch.arange(64)[None]
    assert_close(GPT.from_pretrained(run / "model.pt")(idx)[0], trained(idx)[0], "logits", 1e-5)

def test_a_mistake_in_the_code_has_its_traceback(base, tmp_path, monkeypatch):
    monkeypatch.setattr(data.UUIDPairs, "batch", lambda self, step: int("an own mistake"))
    with pytest.raises(ValueError, match="an own mistake"):
        train.main(command(tmp_path, SHORT, "--methods full --init", base))

def test_a_loss_that_is_not_finite_ends_its_run_but_not_the_others(base, tmp_path, capsys):
    assert cli(tmp_path, SHORT, "--methods full --learning_rate 1e30 1e-3 --init", base) == 2
    error = capsys.readouterr().err
    assert "not finite" in error and error.count("\n") == 1
    [finished] = tmp_path.glob("uuid-*/results.json")
    assert results(finished.parent)["config"]["learning_rate"] == 1e-3

# ---- Resuming ------------------------------------------------------------------------------------
def interrupted(monkeypatch, step, *line):
    """Call `cli` with a Ctrl-C in a step."""
    batch, stop = data.UUIDPairs.batch, Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr(data.UUIDPairs, "batch", lambda *x: (stop if x[1] == step else batch)(*x))
        return cli(*line)

@pytest.mark.parametrize("options", [
    "--methods mora --dropout 0.1", "--methods remora --groups random --dropout 0.1",
    f"--methods relora {SCRATCH}", "--methods lora+ --schedule cosine"])
def test_an_interrupted_run_resumes_bit_for_bit(options, base, tmp_path, capsys, monkeypatch):
    line = [SHORT, "--init", base, options]
    assert cli(tmp_path / "whole", *line) == 0
    for step in (2, 6, 11):
        assert interrupted(monkeypatch, step, tmp_path / f"{step}", *line) == 130
        error = capsys.readouterr().err
        assert "--resume" in error and error.count("\n") == 1
        assert cli(tmp_path / f"{step}", *line, "--resume") == 0
        assert_same_run(tmp_path / "whole", tmp_path / f"{step}")

@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished run: its folder and its command."""
    folder = tmp_path_factory.mktemp("finished")
    line = ["uuid --n_pairs 13 --methods lora --max_steps 4 --alpha 7.5 --init", base]
    assert cli(folder, *line) == 0
    return folder, line

def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    assert cli(finished[0], *finished[1], "--resume") == 0

@pytest.fixture
def unfinished(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob("uuid-*/results.json")).unlink()
    return tmp_path, finished[1]

@pytest.mark.parametrize("option, before, now", [
    ("--n_pairs", "13", "17"), ("--max_steps", "4", "19"), ("--alpha", "7.5", "3.5"),
    ("--dropout", "0.0", "0.5"), ("--schedule", "linear", "cosine")])
def test_other_settings_are_refused(option, before, now, finished, unfinished, capsys):
    for folder, line in (finished, unfinished):
        line = [*line, "--resume --warmup_steps 1 --eval_every 1 --restart_warmup 1", option, now]
        assert cli(folder, *line) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in (option, before, now))

def test_a_damaged_checkpoint_is_named(unfinished, capsys):
    [path] = unfinished[0].glob("uuid-*/checkpoint.pt")
    os.truncate(path, 1000)
    assert cli(unfinished[0], *unfinished[1], "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error

def test_seconds_are_those_of_all_sessions(base, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    line = [tmp_path, SHORT, "--methods mora --init", base]
    assert interrupted(monkeypatch, 11, *line) == 130
    run = next(tmp_path.glob("uuid-*"))
    before = checkpoint(run)["seconds"]
    assert cli(*line, "--resume") == 0
    assert results(run)["seconds"] > before > 0

# ---- Text, pairs, C4, and several processes ------------------------------------------------------
SMALL = ("--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 8 --max_steps 12 "
         "--eval_every 4 --merge_every 5")

@pytest.fixture
def corpus(tmp_path):
    """A folder with a file for each task, in a language of a few words."""
    lines = [json.dumps({"text": f"the cat sat on mat {i} " * 12}) + "\n" for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    (tmp_path / "old.txt").write_text("to be or not to be " * 50)
    sums = [{"prompt": f"{a}+{b}=", "completion": "i" * (a + b)}
            for a, b in itertools.product(range(8), repeat=2)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, sums)))
    (tmp_path / "c4/en").mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        (tmp_path / f"c4/en/{name}.json.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return tmp_path

def test_c4_with_its_default_methods(corpus, capsys):
    line = f"c4 {SMALL} --groups cycle random --c4_url {(corpus / 'c4').as_uri()}"
    assert cli(corpus / "out", line) == 0
    table = capsys.readouterr().out.splitlines()[-7:]
    for label, row in zip(map(train.label, settings(line)), table, strict=True):
        assert row.startswith(f"{label} ")
    for run in (corpus / "out").glob("c4-*"):
        assert {"val_loss", "perplexity"} <= rows(run)[0].keys()

def test_text_reports_the_loss_on_old_text(corpus):
    line = [f"text {SMALL} --methods full mora --export --old_data", corpus / "old.txt", "--data"]
    assert cli(corpus / "out", *line, corpus / "text.jsonl") == 0
    old = data.token_file([corpus / "old.txt"], data.get_tokenizer("bytes"), corpus)
    for run in (corpus / "out").glob("text-*"):
        model, dataset = GPT.from_pretrained(run / "model.pt"), data.Text(old, old, 32, 8, 0)
        first, *_, last = results(run)["rows"]
        assert last["old_loss"] == pytest.approx(train.evaluate(model, dataset)["val_loss"])
        assert last["val_loss"] < first["val_loss"]

def test_pairs_learn_completions(corpus):
    line = f"pairs {SMALL} --methods full --max_steps 60 --eval_every 30 --data"
    assert cli(corpus, line, corpus / "pairs.jsonl") == 0
    first, last = results(next(corpus.glob("pairs-*")))["rows"]
    assert "exact_match" in last
    assert last["loss"] < first["loss"] and last["val_loss"] < first["val_loss"]

def gradients(run):
    """What Adam knows of them, where their scale shows: it does not show in the weights."""
    state = checkpoint(run)["optimizer"]["state"].values()
    return torch.cat([each["exp_avg"].flatten() for each in state])

def test_two_processes_train_as_one(base, corpus):
    line = ["pairs --methods remora relora --max_steps 8 --eval_every 4 --merge_every 5",
            "--batch_size 8 --learning_rate 1e-3 --grad_clip 0 --init", base,
            "--data", corpus / "pairs.jsonl"]
    assert cli(corpus / "one", *line) == 0
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py".split()
    words = [sys.executable, *torchrun, *command(corpus / "two", *line, "--accumulate 2")]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    for method in ("relora", "remora"):
        one, two = (next((corpus / name).glob(f"pairs-{method}-*")) for name in ("one", "two"))
        for row, other in zip(results(one)["rows"], results(two)["rows"], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        weights = checkpoint(two)["model"]
        for name, tensor in checkpoint(one)["model"].items():  # what is drawn is drawn alike
            assert_close(weights[name].float(), tensor.float(), name, 1e-4)
        assert (gradients(one) - gradients(two)).norm() < 1e-2 * gradients(one).norm()

# ---- What is wrong with a command line -----------------------------------------------------------
WRONG = {  # and what the one line of complaint names. At port 9 nobody listens
    "memorize": "memorize", "uuid c4": "c4", "--learnin_rate 1": "--learnin_rate",
    "--methods lorra": "lorra", "--operator rope": "rope", "--methods remora --groups even": "even",
    "--targets c_atn": "c_atn", "--max_steps 0": "--max_steps", "--dropout 2": "dropout",
    "--rank 0": "--rank", "--rank two": "two", "--n_pairs 0": "--n_pairs", "--n_embd 30": "n_embd",
    "--learning_rate 1e-3,1e-4": "1e-3,1e-4", "--batch_size 8 --accumulate 3": "--accumulate",
    "--device tpu": "tpu", "--device cuda:99": "cuda:99", "--data text.jsonl": "--data",
    "--init gpt3": "gpt3", "--init text.jsonl": "text.jsonl", "--init adapter.pt": "adapter.pt",
    "--init heads.pt": "--n_head", "text": "--data", "text --data nowhere.txt": "nowhere.txt",
    "text --data empty.txt": "empty.txt", "text --data latin1.txt": "latin1.txt:2",
    "text --data pairs.jsonl": "pairs.jsonl:1", "pairs --data text.jsonl": "text.jsonl:1",
    "text --data text.jsonl --block_size 999": "999", "c4 --c4_url http://127.0.0.1:9": "--c4_url",
    "text --data text.jsonl --init model.pt --block_size 300": "300",
}

@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working directory has good files and others."""
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text(json.dumps({"text": "the cat sat on the mat " * 300}) + "\n")
    Path("pairs.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n')
    Path("latin1.txt").write_bytes(b"one\ncaf\xe9\n")
    Path("empty.txt").touch()
    model = GPT(GPTConfig(**TINY))
    model.export("model.pt")
    torch.save({**torch.load("model.pt")}, "heads.pt")
    torch.save(mora.adapter_state_dict(mora.add_adapters(model)), "adapter.pt")

@pytest.mark.parametrize("line, named", WRONG.items(), ids=WRONG)
def test_a_wrong_command_line_gets_one_clear_line(line, named, files, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("found too late"))
    monkeypatch.setenv("no_proxy", "*")
    assert cli(Path("out"), line) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and error.count("\n") == 1 and named in error
