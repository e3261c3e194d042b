"""Tests of train.py: `python -m pytest tests/test_train.py`. They train a tiny GPT on a handful of pairs, on the CPU, in out folders of their own."""

import argparse
import csv
import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import mora
import train
from model import GPT

ROOT = Path(__file__).parent.parent
TINY = "uuid --n_layer 1 --n_head 2 --n_embd 32 --n_pairs 4 --max_steps 12 --eval_every 4 --merge_every 5 --warmup_steps 2".split()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The file of a small base that knows what pairs look like: few steps, but enough for adapters to build on."""
    folder = tmp_path_factory.mktemp("base")
    settings = dict(train.DEMO_BASE)
    train.DEMO_BASE.update(max_steps=120, batch_size=16, text_size=100_000)
    try:
        args = train.parse_args(["--n_layer", "1", "--n_head", "2", "--n_embd", "64", "--out_dir", str(folder), "--device", "cpu"])
        train.choose_device(args)
        train.demo_base(args)
    finally:
        train.DEMO_BASE.update(settings)
    return next(folder.glob("base-*/model.pt"))


def cli(*argv):
    """Call train.py's main as the shell would; -> its exit status."""
    with pytest.raises(SystemExit) as end:
        train.main([str(arg) for arg in argv])
    return end.value.code


def rows(folder):
    """metrics.csv without the speed, which no two runs share."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in csv.DictReader(file)]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def assert_same_run(a, b):
    """Bit for bit the same metrics and weights."""
    assert rows(a) == rows(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs by up to {(first[name] - second[name]).abs().max()}"


# ------------------------------------------------------------------------------------------------------------------------------
# The loop's parts


def config(**changes):
    settings = dict(method="lora", learning_rate=1.0, warmup_steps=4, max_steps=24, schedule="linear", merge_every=8, restart_warmup=2,
                    full_warmup=0, lora_plus_ratio=16.0, weight_decay=0.0, device="cpu")
    return argparse.Namespace(**settings | changes)


@pytest.mark.ex16
def test_learning_rate_rises_and_falls_linearly():
    rates = [train.learning_rate(step, config()) for step in range(24)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0]), "four steps of warm-up, the first of them not at 0"
    assert rates[4:] == pytest.approx([1 - i / 20 for i in range(20)]), "from the peak down to what would be 0 at step 24"


@pytest.mark.ex16
def test_learning_rate_restarts_on_the_cosine():
    curve = [train.learning_rate(step, config(schedule="cosine")) for step in range(24)]
    jagged = [train.learning_rate(step, config(schedule="cosine", method="remora")) for step in range(24)]
    assert curve[14] == pytest.approx(0.5), "half-way between warm-up and end, a cosine is at one half"
    assert jagged[8] == pytest.approx(curve[8] / 2) and jagged[16] == pytest.approx(curve[16] / 2), "the first step after a merge"
    others = [step for step in range(24) if step not in (8, 16)]
    assert [jagged[step] for step in others] == pytest.approx([curve[step] for step in others]), "back on the curve"


@pytest.mark.ex16
def test_learning_rate_after_a_full_rank_warmup():
    rates = [train.learning_rate(step, config(schedule="constant", full_warmup=6, restart_warmup=4)) for step in range(12)]
    assert rates[6:] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1]), "the adapters begin at step 6, with four steps' climb"
    assert train.learning_rate(7, config(schedule="constant", full_warmup=6, method="full")) == 1


@pytest.mark.ex16
def test_merges_come_every_so_often_but_not_at_the_end():
    assert [step for step in range(24) if train.merges_after(step, config(method="remora"))] == [7, 15], "after 8 and 16 steps"
    assert not any(train.merges_after(step, config(method="mora")) for step in range(24)), "MoRA never merges"


def test_lora_plus_gives_b_its_own_rate():
    model = mora.add_adapters(torch.nn.Sequential(torch.nn.Linear(4, 6)), "lora+", 2)
    groups = train.make_optimizer(model, config(method="lora+")).param_groups
    assert [(group["multiple"], [p.shape for p in group["params"]]) for group in groups] == [(1.0, [(2, 4)]), (16.0, [(6, 2)])]


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


def test_exact_match_is_what_greedy_decoding_finds(base):
    model, tokenizer = GPT.from_pretrained(str(base)), data.get_tokenizer("bytes")
    pairs = data.UUIDPairs(6, tokenizer, 4, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        idx, targets = pairs.batch(step)
        model(idx, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 and 0 < train.uuid_metrics(model, pairs)["exact_match"] < 1:
            break
    metrics = train.uuid_metrics(model, pairs)
    decoded = model.generate(pairs.tokens[:, :37], 36)[:, 37:]
    exact = (decoded == pairs.tokens[:, 37:]).all(dim=1).float().mean().item()
    assert 0 < exact < 1, "the test should look at a model that knows some pairs and not others"
    assert metrics["exact_match"] == pytest.approx(exact)


# ------------------------------------------------------------------------------------------------------------------------------
# Runs


EVERY_METHOD = [*(["--methods", method] for method in ("full", "lora", "lora+", "asylora", "dora")),
                *(["--methods", "mora", "--operator", operator] for operator in mora.OPERATORS)]


@pytest.mark.parametrize("options", EVERY_METHOD, ids=lambda options: options[-1])
def test_every_method_memorizes_four_pairs(options, base, tmp_path):
    rate = 2e-3 if "lora+" in options else 1e-2
    assert cli("uuid", "--init", base, "--n_pairs", 4, "--max_steps", 200, "--rank", 16, "--learning_rate", rate, "--out_dir", tmp_path, *options) == 0
    accuracy = json.loads(next(tmp_path.glob("*/results.json")).read_text())["metrics"]["char_accuracy"]
    assert accuracy > 0.6, f"guessing gets 10 % of the digits right, a method that learns has most of them by now, and this one {accuracy:.0%}"


def test_an_earlier_run_is_kept(base, tmp_path):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "lora", "--max_steps", 4, "--out_dir", tmp_path]
    assert cli(*command) == 0 and cli(*command, "--alpha", 9) == 0
    folder, = tmp_path.glob("uuid-*seed0")
    first, second = (json.loads((path / "results.json").read_text())["config"]["alpha"] for path in (Path(f"{folder}.1"), folder))
    assert (first, second) == (None, 9)


def test_what_a_run_leaves(base, tmp_path, capsys):
    assert cli("uuid", "--init", base, "--n_pairs", 4, "--max_steps", 8, "--eval_every", 3, "--methods", "full", "mora", "--out_dir", tmp_path) == 0
    folder = next(tmp_path.glob("uuid-mora-*"))
    assert {file.name for file in folder.iterdir()} == {"metrics.csv", "results.json", "checkpoint.pt", "adapter.pt"}
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "loss", "learning_rate", "tokens_per_second", "char_accuracy", "exact_match"]
    assert [row["step"] for row in table] == ["3", "6", "8"], "a row for every evaluation, and one at the end"
    results = json.loads((folder / "results.json").read_text())
    assert {"method", "rank", "operator", "seed", "trainable_parameters", "total_parameters", "steps", "seconds", "metrics", "config", "torch",
            "device"} <= results.keys()
    assert results["metrics"]["step"] == 8 and (results["method"], results["rank"], results["operator"]) == ("mora", 2, "rotation")

    model = mora.add_adapters(GPT.from_pretrained(str(base)), "mora", 2)
    assert results["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    mora.load_adapters(model, torch.load(folder / "adapter.pt", weights_only=True))
    pairs = data.UUIDPairs(4, data.get_tokenizer("bytes"), 4, seed=0)
    assert train.uuid_metrics(model.eval(), pairs)["char_accuracy"] == pytest.approx(results["metrics"]["char_accuracy"])
    last = capsys.readouterr().out
    assert "| full" in last and "| mora rotation r2" in last, "the last thing printed is a table with a row for each run"


def test_runs_are_the_combinations_of_what_concerns_a_method():
    args = train.parse_args("uuid --methods full lora mora remora --rank 1 2 --operator sharing --groups cycle random --seed 0 1".split())
    labels = [train.label(config) for config in train.runs(args) if config.seed == 0]
    groups = [f"sharing {how} r{r}" for r in (1, 2) for how in ("cycle", "random")]
    expected = ["full", "lora r1", "lora r2", *(f"{method} {rest}" for method in ("mora", "remora") for rest in groups)]
    assert sorted(labels) == sorted(expected)
    assert len(list(train.runs(args))) == 2 * len(expected)


def test_a_sweep_ends_with_each_setting_at_its_best_rate(base, tmp_path, capsys):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "lora", "mora", "--max_steps", 40, "--out_dir", tmp_path]
    assert cli(*command, "--learning_rate", 0, 1e-2) == 0
    table = capsys.readouterr().out.split("Each setting at the best of its learning rates:\n")[1].split("\n\n")[0]
    rates = [re.sub(r" +", " ", line).split(" | ")[:3] for line in table.splitlines()[2:]]
    assert rates == [["| lora r2", "-", "0.01"], ["| mora rotation r2", rates[1][1], "0.01"]]
    assert cli(*command, "--learning_rate", 1e-2, "--resume") == 0
    assert "Each setting" not in capsys.readouterr().out, "a single rate is no sweep"


def test_evaluation_and_micro_batches_change_nothing(base, tmp_path):
    common = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "mora", "--max_steps", 8]
    for name, options in dict(plain=["--eval_every", 8], often=["--eval_every", 1], cut=["--eval_every", 8, "--accumulate", 4]).items():
        assert cli(*common, *options, "--out_dir", tmp_path / name) == 0
    plain, often, cut = (next((tmp_path / name).glob("uuid-*")) for name in ("plain", "often", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(often).values()))
    assert float(rows(plain)[-1]["loss"]) == pytest.approx(float(rows(cut)[-1]["loss"]), rel=1e-5)


def test_seeds_differ(base, tmp_path):
    assert cli("uuid", "--init", base, "--n_pairs", 4, "--methods", "lora", "--max_steps", 4, "--seed", 0, 1, "--out_dir", tmp_path) == 0
    first, second = (rows(next(tmp_path.glob(f"*-seed{seed}"))) for seed in (0, 1))
    assert first != second


def test_a_merge_clears_the_optimizers_memory_of_the_adapters_only(tmp_path):
    assert cli(*TINY, "--init", "scratch", "--methods", "remora", "--operator", "sharing", "--merge_every", 4, "--eval_every", 8,
               "--max_steps", 9, "--out_dir", tmp_path / "a") == 0  # evaluated, and saved, after the merges of steps 4 and 8
    saved = {}
    original = train.save_checkpoint

    def spy(folder, step, rows, losses, config, model, optimizer, scaler):
        names = {id(p): name for name, p in model.named_parameters()}
        saved[step] = {names[id(p)]: (state["step"].item(), p.detach().abs().max().item()) for p, state in optimizer.state.items()}
        original(folder, step, rows, losses, config, model, optimizer, scaler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", spy)
        assert cli(*TINY, "--init", "scratch", "--methods", "remora", "--operator", "sharing", "--merge_every", 4, "--eval_every", 8,
                   "--max_steps", 9, "--out_dir", tmp_path / "b") == 0
    assert not any(name.endswith(".M") for name in saved[8]), "right after a merge the optimizer knows no M"
    assert saved[8]["wte.weight"][0] == 8, "what is not in an adapter keeps its state"
    assert saved[9]["h.0.mlp.c_fc.M"][0] == 1 and saved[9]["wte.weight"][0] == 9


# ------------------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("options", ["--methods mora --dropout 0.1", "--methods remora --operator sharing --groups cycle", "--methods remora --operator sharing",
                                     "--methods relora --init scratch", "--methods lora+ --full_warmup 5 --schedule cosine"])
@pytest.mark.parametrize("broken_at", [2, 6, 11])
def test_a_broken_run_resumes_bit_for_bit(options, broken_at, base, tmp_path, monkeypatch):
    common = [*TINY, *options.split()] if "scratch" in options else ["uuid", "--init", base, *TINY[7:], *options.split()]
    assert cli(*common, "--out_dir", tmp_path / "whole") == 0

    class Killed(Exception):
        pass

    batch = data.UUIDPairs.batch

    def breaking(self, step):
        if step == broken_at:
            raise Killed
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(data.UUIDPairs, "batch", breaking)
        with pytest.raises(Killed):
            train.main([str(arg) for arg in [*common, "--out_dir", tmp_path / "broken"]])
    assert cli(*common, "--out_dir", tmp_path / "broken", "--resume") == 0
    whole, broken = (next((tmp_path / name).glob("uuid-*")) for name in ("whole", "broken"))
    assert_same_run(whole, broken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_stopped_process_resumes_bit_for_bit(number, base, tmp_path):
    command = ["uuid", "--init", base, "--methods", "mora", "--n_pairs", 4, "--max_steps", 200, "--eval_every", 20, "--device", "cpu"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, command), "--out_dir", str(tmp_path / "stopped")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    for line in process.stdout:
        if line.startswith("step  60/"):
            break
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and "--resume" in error and "Traceback" not in error
    assert cli(*command, "--out_dir", tmp_path / "stopped", "--resume") == 0
    assert cli(*command, "--out_dir", tmp_path / "whole") == 0
    assert_same_run(*(next((tmp_path / name).glob("uuid-*")) for name in ("whole", "stopped")))


def test_finished_runs_are_not_run_again(base, tmp_path, capsys):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "lora", "--max_steps", 4, "--out_dir", tmp_path]
    assert cli(*command) == 0
    before = (next(tmp_path.glob("*/results.json"))).stat().st_mtime_ns
    assert cli(*command, "--resume") == 0
    assert "done before" in capsys.readouterr().out and next(tmp_path.glob("*/results.json")).stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["--n_pairs 5", "--max_steps 9", "--batch_size 2", "--alpha 3", "--schedule cosine", "--dropout 0.5"])
def test_resuming_with_other_settings_is_refused(change, base, tmp_path, capsys):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "lora", "--max_steps", 4, "--warmup_steps", 1, "--out_dir", tmp_path]
    assert cli(*command) == 0
    capsys.readouterr()
    assert cli(*command, *change.split(), "--resume") == 2
    error = capsys.readouterr().err
    option, value = change.split()
    assert option in error and value in error and error.count("\n") == 1


def test_a_constant_schedule_may_be_prolonged(base, tmp_path):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "mora", "--warmup_steps", 1, "--schedule", "constant", "--eval_every", 2]
    assert cli(*command, "--max_steps", 4, "--out_dir", tmp_path / "a") == 0
    assert cli(*command, "--max_steps", 8, "--out_dir", tmp_path / "a", "--resume") == 0
    assert cli(*command, "--max_steps", 8, "--out_dir", tmp_path / "b") == 0
    assert_same_run(*(next((tmp_path / name).glob("uuid-*")) for name in "ab"))


# ------------------------------------------------------------------------------------------------------------------------------
# Text, pairs and C4

SMALL = "--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 8 --max_steps 12 --eval_every 4 --merge_every 5".split()


@pytest.fixture
def corpus(tmp_path):
    """Files of every kind, in a language of a few words."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("the cat sat on a mat and saw the dog".split(), k=60)) for _ in range(40)]
    lines = [json.dumps({"text": text, "url": "", "timestamp": ""}) for text in texts]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "old.txt").write_text("to be or not to be " * 50)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) for a in range(8) for b in range(8)))
    (tmp_path / "c4/en").mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        (tmp_path / f"c4/en/{name}.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def test_c4_with_every_method(corpus, capsys):
    assert cli("c4", *SMALL, "--c4_url", f"file:{corpus / 'c4'}", "--out_dir", corpus / "out", "--spectrum", "--groups", "cycle", "random") == 0
    out = capsys.readouterr().out
    for label in ("full", "lora r4", "relora r4", "mora sharing cycle r4", "remora sharing cycle r4", "remora sharing random r4"):
        assert f"| {label} " in out
    assert "effective rank" in out
    folder = next((corpus / "out").glob("c4-remora-sharing-random-*"))
    assert list(rows(folder)[0]) == ["step", "loss", "learning_rate", "val_loss", "perplexity"]
    last = json.loads((folder / "results.json").read_text())
    assert last["metrics"]["perplexity"] == pytest.approx(math.exp(last["metrics"]["val_loss"]))
    model = train.adapt(train.load_base(train.parse_args(["c4", *SMALL]))[0], next(train.runs(train.parse_args(["c4", *SMALL, "--methods", "mora"]))))
    own = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".M"))
    assert last["adapter_parameters"] == own and last["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_validation_does_not_depend_on_batch_or_interval(corpus):
    common = ["text", *SMALL, "--data", corpus / "text.jsonl", "--init", "scratch", "--methods", "full"]
    losses = []
    for name, options in dict(a=[], b=["--batch_size", 4], c=["--eval_every", 1]).items():
        assert cli(*common, "--learning_rate", 0, *options, "--out_dir", corpus / name) == 0  # nothing is learned at a rate of 0
        losses.append(rows(next((corpus / name).glob("text-*")))[-1]["val_loss"])
    assert losses[0] == losses[1] == losses[2]


def test_continual_pretraining_reports_what_was_forgotten(corpus):
    assert cli("text", *SMALL, "--data", corpus / "text.jsonl", "--methods", "full", "--export", "--out_dir", corpus / "first") == 0
    start = next((corpus / "first").glob("*/model.pt"))
    common = ["--max_steps", 8, "--batch_size", 8, "--data", corpus / "old.txt", "--old_data", corpus / "text.jsonl", "--out_dir", corpus / "second"]
    assert cli("text", "--init", start, "--methods", "full", "mora", "--learning_rate", 1e-2, *common) == 0
    for folder in (corpus / "second").glob("text-*"):
        table = rows(folder)
        assert float(table[-1]["val_loss"]) < float(table[0]["val_loss"]) and float(table[-1]["old_loss"]) > 0
    mora_folder = next((corpus / "second").glob("text-mora-*"))
    trained = {name for name in torch.load(mora_folder / "adapter.pt", weights_only=True)}
    assert all(name.split(".")[-1] in ("M", "_extra_state") for name in trained), "weights that were given stay frozen"


def test_pairs_learn_completions(corpus, capsys):
    assert cli("pairs", *SMALL, "--data", corpus / "pairs.jsonl", "--methods", "full", "--max_steps", 60, "--eval_every", 30,
               "--learning_rate", 3e-3, "--out_dir", corpus / "out") == 0
    table = rows(next((corpus / "out").glob("pairs-*")))
    assert list(table[0]) == ["step", "loss", "learning_rate", "val_loss", "perplexity", "exact_match"]
    assert float(table[-1]["loss"]) < float(table[0]["loss"]) and float(table[-1]["val_loss"]) < float(table[0]["val_loss"])


def test_an_exported_model_computes_what_was_trained(corpus):
    assert cli("text", *SMALL, "--data", corpus / "text.jsonl", "--methods", "remora", "--operator", "sharing", "--export", "--out_dir", corpus / "out") == 0
    folder = next((corpus / "out").glob("text-*"))
    exported, args = GPT.from_pretrained(str(folder / "model.pt")), train.parse_args(["text", *SMALL, "--data", __file__, "--methods", "remora", "--operator", "sharing"])
    model = train.adapt(GPT(exported.config), next(train.runs(args)))
    model.load_state_dict(weights(folder))
    idx = torch.randint(256, (2, 32))
    assert torch.allclose(exported(idx)[0], model(idx)[0], atol=1e-5)


def test_a_full_rank_warmup_trains_all_weights_first(corpus):
    common = ["text", *SMALL, "--data", corpus / "text.jsonl", "--full_warmup", 6, "--warmup_steps", 2, "--schedule", "constant", "--out_dir", corpus / "out"]
    assert cli(*common, "--methods", "relora", "--export") == 0
    folder = next((corpus / "out").glob("text-relora-*"))
    spectrum = json.loads((folder / "results.json").read_text())["spectra"]["mlp.c_fc"]
    assert spectrum["rank"] == 32, "what a full-rank warm-up adds has full rank"
    assert [row["step"] for row in rows(folder / "full_warmup")] == ["4", "6"] and [row["step"] for row in rows(folder)] == ["8", "12"]


# ------------------------------------------------------------------------------------------------------------------------------
# Faults


def test_a_loss_that_is_not_finite_ends_a_run(base, tmp_path, capsys, monkeypatch):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "full", "--max_steps", 8, "--eval_every", 2, "--out_dir", tmp_path]
    forward = GPT.forward

    def poisoned(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        return logits, loss * math.nan if self.training and len(calls) == 5 else loss

    calls = []
    monkeypatch.setattr(train, "learning_rate", lambda step, config, f=train.learning_rate: calls.append(step) or f(step, config))
    monkeypatch.setattr(GPT, "forward", poisoned)
    assert cli(*command) == 2
    error = capsys.readouterr().err
    assert "step 5" in error and "--learning_rate" in error and "checkpoint.pt" in error and error.count("\n") == 1
    assert torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)["step"] == 4


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")], ids=["os", "torch"])
def test_a_full_disk_leaves_the_last_checkpoint(fault, base, tmp_path, capsys, monkeypatch):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "lora", "--max_steps", 8, "--eval_every", 2, "--out_dir", tmp_path]
    save = torch.save

    def full(state, path):
        if state.get("step") == 6:
            Path(path).write_bytes(b"half a file")
            raise fault
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    assert cli(*command) == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and error.count("\n") == 1 and "Traceback" not in error
    folder = next(tmp_path.glob("uuid-*"))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4 and not list(folder.glob("*.tmp"))


def damage(path):
    path.write_bytes(path.read_bytes()[:1000])


def pickle_bomb(path):
    class Bomb:
        def __reduce__(self):
            return print, ("run by a pickle",)
    torch.save({"config": Bomb()}, path)


@pytest.mark.parametrize("spoil", [damage, pickle_bomb, lambda path: path.write_bytes(b""), lambda path: torch.save([1, 2], path)],
                         ids=["truncated", "pickle", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named(spoil, base, tmp_path, capsys):
    command = ["uuid", "--init", base, "--n_pairs", 4, "--methods", "lora", "--max_steps", 4, "--out_dir", tmp_path]
    assert cli(*command) == 0
    next(tmp_path.glob("*/results.json")).unlink()
    spoil(next(tmp_path.glob("*/checkpoint.pt")))
    capsys.readouterr()
    assert cli(*command, "--resume") == 2
    out, error = capsys.readouterr()
    assert "checkpoint.pt" in error and error.count("\n") == 1 and "run by a pickle" not in out


WRONG = {
    "uuid --rank 0": "--rank", "uuid --rank two": "two", "uuid --rank 1.5": "1.5", "uuid --methods lorra": "lorra", "uuid --operator rope": "rope",
    "uuid --learning_rate -1": "--learning_rate", "uuid --learning_rate nan": "nan", "uuid --dropout 2": "--dropout", "uuid --n_pairs 0": "--n_pairs",
    "uuid --batch_size 64 --n_pairs 8": "64", "uuid --batch_size 8 --accumulate 3": "3", "uuid --warmup_steps 500": "--warmup_steps",
    "uuid --max_steps 0": "--max_steps", "uuid --seed -1": "--seed", "uuid --init gpt3": "gpt3", "uuid --init README.md": "README.md",
    "uuid --init gpt2 --n_layer 3": "--n_layer", "uuid --tokenizer gpt2": "--tokenizer", "uuid --device tpu": "tpu", "uuid --device cuda:99": "cuda:99",
    "uuid --n_embd 30 --n_head 4 --init scratch": "30", "uuid --block_size 40 --init scratch": "40", "uuid --fold --operator sharing": "--fold",
    "uuid --targets c_atn --init scratch": "c_atn", "uuid --learnin_rate 1": "--learnin_rate", "memorize": "memorize", "text": "--data",
    "text --data nowhere.txt": "nowhere.txt", "uuid --merge_every 2 --restart_warmup 2 --methods remora": "--restart_warmup", "uuid --dtype float8": "float8",
    "uuid --groups random --operator rotation": "--groups", "uuid --out_dir README.md --init scratch": "README.md",
}


@pytest.mark.parametrize("command, named", WRONG.items(), ids=WRONG)
def test_wrong_input_gets_one_clear_line(command, named, capsys, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("no checkpoint")
    monkeypatch.chdir(tmp_path)
    assert cli(*command.split()) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and error.startswith("train.py: error: ")


def test_help_explains_every_option():
    text = subprocess.run([sys.executable, str(ROOT / "train.py"), "-h"], capture_output=True, text=True, check=True).stdout
    for name in vars(train.parse_args([])).keys() - {"task"}:
        assert f"--{name}" in text
    assert "None" not in text


# ------------------------------------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_train_as_one(base, tmp_path):
    command = ["uuid", "--init", str(base), "--methods", "remora", "relora", "--operator", "sharing", "--n_pairs", "8", "--max_steps", "30", "--eval_every", "5",
               "--merge_every", "12", "--learning_rate", "1e-3", "--grad_clip", "0", "--device", "cpu"]
    assert cli(*command, "--out_dir", tmp_path / "one") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    subprocess.run([*torchrun, *command, "--out_dir", str(tmp_path / "two")], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for run in ("relora", "remora"):
        one, two = (next((tmp_path / name).glob(f"uuid-{run}*")) for name in ("one", "two"))
        for a, b in zip(rows(one), rows(two), strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        for name, tensor in weights(one).items():  # A is drawn, and groups are dealt, alike in all processes
            assert torch.allclose(tensor.float(), weights(two)[name].float(), atol=1e-4), name
        # Adam hides a gradient's scale from the weights, so look at what it remembers of the gradient
        memories = (torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["state"] for folder in (one, two))
        first, second = (torch.cat([state["exp_avg"].flatten() for state in memory.values()]) for memory in memories)
        assert first.norm() > 0 and (first - second).norm() < 1e-2 * first.norm(), "the mean over processes is not the batch's gradient"
