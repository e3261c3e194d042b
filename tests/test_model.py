"""Tests of model.py, without a network: python -m pytest tests/test_model.py"""

import math
import os

import pytest
import torch
from model import GPT, GPTConfig
from reference import assert_close, generator

SHAPE = dict(block_size=12, vocab_size=31, n_layer=3, n_head=4, n_embd=24)

def random_gpt(**changes):
    """A small GPT in which everything matters: at the start biases are 0, and attention uniform."""
    model = GPT(GPTConfig(**SHAPE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model

def random_tokens(*shape, seed=1):
    return torch.randint(SHAPE["vocab_size"], shape, generator=generator(seed))

def plain_gpt2(w, idx, n_layer, n_head):
    """GPT-2 a second time, by its formulas and one head at a time, from a dictionary of weights."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    length, n_embd = idx.shape[1], w["wte.weight"].shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = w["wte.weight"][idx] + w["wpe.weight"][:length]
    for i in range(n_layer):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(n_embd, dim=-1)
        heads = []
        for own in torch.arange(n_embd).chunk(n_head):
            scores = (q[..., own] @ k[..., own].mT / math.sqrt(n_embd / n_head)).exp()
            scores = scores.masked_fill(future, 0)
            heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., own])
        x = x + linear(torch.cat(heads, dim=-1), f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

@pytest.mark.parametrize("n_layer, n_head, length", [(1, 1, 1), (1, 4, 5), (3, 4, 12), (2, 3, 7)])
def test_logits_and_gradients_are_those_of_the_formulas(n_layer, n_head, length):
    model, idx = random_gpt(n_layer=n_layer, n_head=n_head).double(), random_tokens(2, length)
    w = dict(model.named_parameters())
    ours, theirs = model(idx)[0], plain_gpt2(w, idx, n_layer, n_head)
    assert_close(ours, theirs, "logits")
    gradients = (torch.autograd.grad(x.square().mean(), [*w.values()]) for x in (ours, theirs))
    for name, our, their in zip(w, *gradients):
        assert_close(our, their, name)

def test_no_position_sees_a_later_one():
    model, idx = random_gpt(), random_tokens(1, 12)
    changed = (idx + torch.eye(12, dtype=torch.long)) % 31  # row i: another token at position i
    moved = (model(changed)[0] - model(idx)[0]).abs().amax(-1) > 1e-5
    assert torch.equal(moved, torch.ones(12, 12, dtype=torch.bool).triu())

def test_layers_start_at_deviation_002_and_those_that_are_added_up_at_less():
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:  # 4,096 numbers at least, whose deviation is known to 1.1 %
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name

@pytest.mark.parametrize("wrong, named", [
    (lambda: random_gpt(n_head=5), "n_head 5"), (lambda: GPT.from_pretrained("gpt3"), "gpt3"),
    (lambda: random_gpt()(random_tokens(1, 13)), "13 tokens")])
def test_what_cannot_be_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        wrong()

@pytest.mark.parametrize("length", [12, 5, 1])
def test_the_loss_is_the_mean_cross_entropy_of_the_last_positions(length):
    model, idx, targets = random_gpt(), random_tokens(3, 12), random_tokens(3, length, seed=2)
    targets[1, 0] = -100
    logits, loss = model(idx, targets)
    assert_close(logits, model(idx)[0][:, -length:], "logits", 1e-5)
    pairs = zip(logits.log_softmax(-1).flatten(0, 1), targets.flatten())
    nats = [-row[target] for row, target in pairs if target != -100]
    assert_close(loss, sum(nats) / len(nats), "loss", 1e-5)

@pytest.mark.parametrize("length", [1, 9, 15])
def test_greedy_takes_the_likeliest_token_and_sees_the_last_block(length):
    model, prompt = random_gpt(), random_tokens(2, length)
    expected = prompt
    for _ in range(14):
        expected = torch.cat([expected, model(expected[:, -12:])[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, 14), expected)
    assert torch.equal(model.generate(prompt, 14, temperature=0.7, top_k=1), expected)

@pytest.mark.parametrize("temperature, top_k", [(4.0, None), (0.9, 5)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_k):
    model, prompt = random_gpt(), random_tokens(1, 6)
    logits = model(prompt)[0][0, -1]
    logits[logits.argsort()[: -(top_k or 31)]] = -math.inf
    drawn = model.generate(prompt.expand(10_000, -1), 1, temperature, top_k, generator(0))[:, -1]
    error = drawn.bincount(minlength=31) / 10_000 - (logits / temperature).softmax(-1)
    assert error.abs().max() < 0.025  # five standard errors

# ---- Checkpoints ---------------------------------------------------------------------------------
def gpt2_checkpoint(model, prefix=""):
    """The model's weights as OpenAI's files have them, with the masks and the head some add."""
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in range(model.config.n_layer):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            name = f"{prefix}h.{i}.{name}.weight"
            state[name] = state[name].T.contiguous()
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    return state | {"lm_head.weight": state[f"{prefix}wte.weight"]}

@pytest.mark.parametrize("prefix, dtype", [("", torch.float32), ("transformer.", torch.bfloat16)])
def test_gpt2s_files_are_read_in_single_precision(tmp_path, prefix, dtype):
    model, idx = random_gpt().to(dtype), random_tokens(2, 12)
    torch.save(gpt2_checkpoint(model, prefix), tmp_path / "gpt2.bin")
    loaded = GPT.from_pretrained(tmp_path / "gpt2.bin", n_head=4)
    assert loaded.config == model.config and torch.equal(loaded(idx)[0], model.float()(idx)[0])

def test_export_writes_gpt2s_format_and_notes_the_heads(tmp_path):
    model, idx, path = random_gpt(), random_tokens(2, 12), tmp_path / "model.pt"
    model.export(path)
    written, expected = torch.load(path), gpt2_checkpoint(model)
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    loaded = GPT.from_pretrained(path)
    assert loaded.config == model.config and torch.equal(loaded(idx)[0], model(idx)[0])

@pytest.mark.parametrize("n_embd, n_head", [(768, 12), (1024, 16), (1280, 20), (1600, 25)])
def test_heads_are_given_or_gpt2s_for_its_widths(tmp_path, n_embd, n_head):
    torch.save(gpt2_checkpoint(random_gpt(n_layer=0, n_embd=n_embd)), tmp_path / "gpt2.bin")
    assert GPT.from_pretrained(tmp_path / "gpt2.bin").config.n_head == n_head
    assert GPT.from_pretrained(tmp_path / "gpt2.bin", n_head=8).config.n_head == 8

class Bomb:
    __reduce__ = lambda self: (pytest.fail, ("executed",))

REFUSED = {"text": lambda path: path.write_bytes(b"text"), "empty": lambda path: path.touch(),
           "cut": lambda path: random_gpt().export(path) or os.truncate(path, 5000),
           "others": lambda path: torch.save({"step": torch.ones(3)}, path),
           "code": lambda path: torch.save({"wte.weight": Bomb()}, path),
           "unknown heads": lambda path: torch.save(gpt2_checkpoint(random_gpt()), path)}

@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_checkpoint_is_named_and_not_executed(tmp_path, kind):
    REFUSED[kind](tmp_path / "gpt2.bin")
    with pytest.raises(ValueError, match="gpt2.bin.*n_head" if "heads" in kind else "gpt2.bin"):
        GPT.from_pretrained(tmp_path / "gpt2.bin")

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face of our own, in a folder. -> the file that it has as gpt2."""
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    file = tmp_path / "openai-community/gpt2/resolve/main/pytorch_model.bin"
    file.parent.mkdir(parents=True)
    return file

def test_a_published_model_is_downloaded_once(hub):
    model, idx = random_gpt(), random_tokens(2, 12)
    torch.save(gpt2_checkpoint(model), hub)
    assert torch.equal(GPT.from_pretrained("gpt2", n_head=4)(idx)[0], model(idx)[0])
    hub.unlink()
    assert torch.equal(GPT.from_pretrained("gpt2", n_head=4)(idx)[0], model(idx)[0])

def test_what_is_downloaded_is_not_executed(hub):
    torch.save(gpt2_checkpoint(random_gpt()) | {"x": Bomb()}, hub)
    with pytest.raises(Exception):
        GPT.from_pretrained("gpt2", n_head=4)

def test_a_download_that_fails_says_so(hub, monkeypatch):
    for address in (os.environ["HF_ENDPOINT"], "http://127.0.0.1:9"):  # no file, and no server
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(ValueError, match="gpt2-xl cannot be downloaded"):
            GPT.from_pretrained("gpt2-xl")
