"""Tests of model.py, without a network, in seconds. From the repository's root: python -m pytest tests/test_model.py"""

import ast
import collections
import copy
import http.server
import math
import sys
import threading
from pathlib import Path

import pytest
import torch

import model as model_file
import mora
from model import GPT, PRESETS, GPTConfig

SHAPE = dict(block_size=12, vocab_size=31, n_layer=3, n_head=4, n_embd=24)


def random_gpt(seed=0, **changes):
    """A small GPT in which everything matters; as GPT draws the weights, biases are 0 and attention nearly uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(SHAPE | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The architecture


def plain_gpt2(w, idx, n_layer, n_head):
    """GPT-2 a second time, by its formulas and one head at a time, from a dictionary of weights `w`."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    length, n_embd = idx.shape[1], w["wte.weight"].shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = w["wte.weight"][idx] + w["wpe.weight"][:length]
    for layer in range(n_layer):
        q, k, v = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(n_embd, dim=-1)
        heads = []
        for head in range(n_head):
            own = slice(head * n_embd // n_head, (head + 1) * n_embd // n_head)
            scores = q[..., own] @ k[..., own].mT / math.sqrt(n_embd // n_head)
            scores = scores.masked_fill(future, -math.inf).exp()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., own])
        x = x + linear(torch.cat(heads, dim=-1), f"h.{layer}.attn.c_proj")
        y = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("n_layer, n_head, length", [(1, 1, 1), (1, 4, 5), (3, 4, 12), (2, 3, 7)])
def test_equals_a_second_implementation(n_layer, n_head, length):
    model, idx = random_gpt(n_layer=n_layer, n_head=n_head, dropout=0.5).double().eval(), random_tokens(2, length)
    weights = dict(model.named_parameters())
    ours, theirs = model(idx)[0], plain_gpt2(weights, idx, n_layer, n_head)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    probe = torch.randn_like(ours)
    gradients = (torch.autograd.grad((logits * probe).sum(), list(weights.values())) for logits in (ours, theirs))
    for name, our, their in zip(weights, *gradients):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8, msg=lambda text: f"{name}: {text}")


def test_dropout_in_training():
    block, x = random_gpt(dropout=0.3).h[0], torch.ones(8, 12, 24)
    for layer in (block.attn, block.mlp):
        assert (layer(x) == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_is_causal():
    model, idx = random_gpt(), random_tokens(1, 12)
    changed = (idx + torch.eye(12, dtype=torch.long)) % SHAPE["vocab_size"]  # row i: another token at position i
    moved = (model(changed)[0] - model(idx)[0]).abs().amax(-1) > 1e-5
    assert torch.equal(moved, torch.ones(12, 12, dtype=torch.bool).triu())


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name):
    config = GPTConfig(**PRESETS[name])
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GPT(config).parameters())
    C = config.n_embd
    assert count == (config.vocab_size + config.block_size) * C + config.n_layer * (12 * C**2 + 13 * C) + 2 * C
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert count == published.get(name, count)


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:  # 4,096 numbers or more: the standard error of their standard deviation is 1.1 % at most
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name


@pytest.mark.parametrize("name, value, message", [
    ("n_head", 5, "n_embd must be a multiple of n_head, and 24 .* 5"), ("n_head", 48, "multiple of n_head"),
    ("n_head", 0, "n_head .* 0"), ("n_embd", 0, "n_embd .* 0"), ("n_layer", -1, "n_layer .* -1"),
    ("block_size", 0, "block_size .* 0"), ("vocab_size", 0, "vocab_size .* 0")])
def test_sizes_that_make_no_gpt_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(SHAPE | {name: value}))


def test_too_long_a_context_is_refused():
    with pytest.raises(ValueError, match="13 tokens .* 12"):
        random_gpt()(random_tokens(1, 13))


def test_imports_only_torch_and_the_standard_library():
    nodes = list(ast.walk(ast.parse(Path(model_file.__file__).read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"torch"} | sys.stdlib_module_names


# ----------------------------------------------------------------------------------------------------------------------
# The loss and generate


@pytest.mark.parametrize("length", [12, 5, 1])
def test_loss_is_the_mean_cross_entropy_of_the_last_positions(length):
    model, idx, targets = random_gpt(), random_tokens(3, 12), random_tokens(3, length, seed=2)
    targets[1, 0] = -100
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, model(idx)[0][:, -length:])
    pairs = [(row, target) for row, target in zip(logits.flatten(0, 1), targets.flatten()) if target != -100]
    torch.testing.assert_close(loss, sum(row.exp().sum().log() - row[target] for row, target in pairs) / len(pairs))
    assert model(idx)[1] is None


@pytest.mark.parametrize("prompt_length", [1, 9, 15])
def test_greedy_takes_the_likeliest_token_and_sees_the_last_block(prompt_length):
    model, prompt = random_gpt(), random_tokens(2, prompt_length)
    expected = prompt
    for _ in range(14):
        expected = torch.cat([expected, model(expected[:, -12:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(prompt, 14), expected)
    assert torch.equal(model.generate(prompt, 14, temperature=0.7, top_k=1), expected)


@pytest.mark.parametrize("temperature, top_k", [(4.0, None), (8.0, 5), (8.0, 100)])
def test_sampled_frequencies(temperature, top_k):
    model, prompt = random_gpt(), random_tokens(1, 6)
    logits = model(prompt)[0][0, -1]
    logits[logits.argsort()[:-(top_k or 31)]] = -math.inf
    expected = (logits / temperature).exp() / (logits / temperature).exp().sum()
    draws = model.generate(prompt.expand(10_000, -1), 1, temperature, top_k, torch.Generator().manual_seed(0))[:, -1]
    assert (draws.bincount(minlength=31) / 10_000 - expected).abs().max() < 0.025  # five standard errors


@pytest.mark.parametrize("training", [True, False])
def test_sampling_repeats_with_its_generator_and_changes_nothing(training):
    model, prompt = random_gpt().train(training), random_tokens(1, 3)
    before, idx = copy.deepcopy(model.state_dict()), prompt.clone()
    a, b, c = (model.generate(idx, 30, 5.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(idx, prompt) and model.training == training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# from_pretrained and export


def gpt2_checkpoint(model, prefix="", masks=False, head=False):
    """The model's weights as OpenAI's files hold them, and what some writers add."""
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in (f"{prefix}h.{layer}." for layer in range(model.config.n_layer)):
        for name in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"):
            state[block + name] = state[block + name].T.contiguous()
        if masks:
            state[block + "attn.bias"] = torch.ones(1, 1, 12, 12).tril()
            state[block + "attn.masked_bias"] = torch.tensor(-1e4)
    return state | ({"lm_head.weight": state[prefix + "wte.weight"]} if head else {})


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_loads_gpt2s_names(tmp_path, prefix, masks, head):
    model, idx, path = random_gpt(), random_tokens(2, 12), str(tmp_path / "gpt2.bin")
    torch.save(gpt2_checkpoint(model, prefix, masks, head), path)
    loaded = GPT.from_pretrained(path, n_head=4, dropout=0.1)
    assert loaded.config == GPTConfig(**SHAPE, dropout=0.1)
    assert torch.equal(loaded.eval()(idx)[0], model(idx)[0])


@pytest.mark.parametrize("n_embd, heads", [(768, 12), (1024, 16), (1280, 20), (1600, 25), (192, None)])
def test_heads_are_gpt2s_for_its_widths_and_asked_for_otherwise(tmp_path, n_embd, heads):
    path = str(tmp_path / "gpt2.bin")
    with torch.device("meta"):
        state = gpt2_checkpoint(GPT(GPTConfig(**SHAPE | dict(n_embd=n_embd, n_layer=1))))
    torch.save({name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}, path)  # a small file
    if heads:
        assert GPT.from_pretrained(path).config.n_head == heads
    else:
        assert GPT.from_pretrained(path, 8).config.n_head == 8
        with pytest.raises(ValueError, match="gpt2.bin: n_head must be given"):
            GPT.from_pretrained(path)


def test_half_precision_becomes_single(tmp_path):
    path = str(tmp_path / "gpt2.bin")
    torch.save(gpt2_checkpoint(random_gpt().bfloat16()), path)
    assert {(p.dtype, p.requires_grad) for p in GPT.from_pretrained(path, 4).parameters()} == {(torch.float32, True)}


@pytest.mark.parametrize("name, value, message", [
    ("wte.weight", None, "no wte.weight"),
    ("h.1.mlp.c_fc.bias", None, r"h.1.mlp.c_fc.bias is absent in the file, and \(96,\)"),
    ("h.0.attn.q_norm.weight", torch.ones(6), r"h.0.attn.q_norm.weight is \(6,\) in the file, and absent"),
    ("h.2000000.ln_1.weight", torch.ones(24), r"h.2000000.ln_1.weight is \(24,\) in the file, and absent"),
    ("h.0.ln_1.bias", torch.ones(24, dtype=torch.complex64), "h.0.ln_1.bias is not finite, or not of dense"),
    ("h.0.ln_1.bias", torch.ones(24).to_sparse(), "h.0.ln_1.bias is not finite, or not of dense"),
    ("h.0.ln_1.bias", torch.ones(24, dtype=torch.long), "h.0.ln_1.bias is not finite, or not of dense"),
    ("h.0.ln_1.bias", torch.ones(24, device="meta"), "h.0.ln_1.bias is not finite, or not of dense"),
    ("h.2.attn.c_attn.weight", torch.ones(72, 24), r"h.2.attn.c_attn.weight is \(24, 72\) in the file, and \(72, 24\)"),
    ("lm_head.weight", torch.ones(31, 24), "lm_head.weight is not wte.weight"),
    ("wte.weight", torch.ones(31), "no wte.weight of 2 dimensions"), ("wpe.weight", torch.tensor(1.0), "no wpe.weight"),
    ("ln_f.bias", torch.full((24,), math.nan), "ln_f.bias is not finite"),
    ("ln_f.bias", torch.full((24,), 1e300, dtype=torch.float64), "ln_f.bias is not finite")])  # in float32
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, name, value, message):
    state = gpt2_checkpoint(random_gpt()) | {name: value}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "gpt2.bin")
    with pytest.raises(ValueError, match=f"gpt2.bin.*{message}"):
        GPT.from_pretrained(str(tmp_path / "gpt2.bin"), n_head=4)


@pytest.mark.parametrize("kind", ["text", "empty", "half", "most", "list", "nested", "object"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, kind):
    path, model = tmp_path / "gpt2.bin", random_gpt()
    state = gpt2_checkpoint(model)
    torch.save({"list": [1, 2], "nested": {"model": state}, "object": model}.get(kind, state), path)
    saved = path.read_bytes()
    damaged = {"text": b"hello", "empty": b"", "half": saved[:len(saved) // 2], "most": saved[:-9]}
    path.write_bytes(damaged.get(kind, saved))
    with pytest.raises(ValueError, match="gpt2.bin.*(damaged|not a GPT-2 checkpoint)") as error:
        GPT.from_pretrained(str(path))
    assert len(str(error.value)) < 400 and "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_a_flipped_bit_is_noticed(tmp_path):
    """torch.load does not look at the checksums that torch.save writes."""
    path = tmp_path / "gpt2.bin"
    torch.save(gpt2_checkpoint(random_gpt()), path)
    content = bytearray(path.read_bytes())
    place = content.index(random_gpt().wte.weight.detach().numpy().tobytes()[:64])
    content[place] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="gpt2.bin is damaged.*checksum"):
        GPT.from_pretrained(str(path), n_head=4)


@pytest.mark.parametrize("noted", ["four", [4], True, 4.0])
def test_a_strange_note_of_heads_is_not_believed(tmp_path, noted):
    state = collections.OrderedDict(gpt2_checkpoint(random_gpt()))
    state.n_head = noted
    torch.save(state, tmp_path / "gpt2.bin")
    with pytest.raises(ValueError, match="n_head must be given"):
        GPT.from_pretrained(str(tmp_path / "gpt2.bin"))
    assert GPT.from_pretrained(str(tmp_path / "gpt2.bin"), 4).config.n_head == 4


def test_another_number_of_heads_than_noted_is_refused(tmp_path):
    random_gpt().export(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: n_head must be 4, not 2"):
        GPT.from_pretrained(str(tmp_path / "model.pt"), 2)


@pytest.mark.parametrize("name", ["gpt3", "tiny", "no/such/file.bin", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is neither a file nor one of gpt2, .*gpt2-xl"):
        GPT.from_pretrained(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face of our own: it serves the paths in `hub.files` and lists in `hub.requests` what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hub.requests.append(self.path)
            self.send_response(200 if self.path in hub.files else 404)
            self.end_headers()
            self.wfile.write(hub.files.get(self.path, b""))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as hub:
        hub.files, hub.requests = {}, []
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        threading.Thread(target=hub.serve_forever, args=[0.01]).start()
        yield hub
        hub.shutdown()


def test_a_published_model_is_downloaded_once(hub, tmp_path):
    model, idx, path = random_gpt(n_embd=128, n_head=2), random_tokens(2, 12), tmp_path / "served.bin"
    torch.save(gpt2_checkpoint(model, masks=True), path)
    hub.files["/openai-community/gpt2/resolve/main/pytorch_model.bin"] = path.read_bytes()
    for _ in range(2):
        assert torch.equal(GPT.from_pretrained("gpt2", n_head=2)(idx)[0], model(idx)[0])
    assert hub.requests == list(hub.files)


@pytest.mark.parametrize("reason", ["404", "refused"])
def test_a_download_that_fails_says_so_in_one_line(hub, reason, monkeypatch):
    if reason == "refused":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of the discard service: nobody listens
    message = rf"^gpt2-xl cannot be downloaded \(.*{reason}.*\): give the path of a copy$"
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained("gpt2-xl")


def test_export_writes_gpt2s_format_and_from_pretrained_reads_it(tmp_path):
    model, idx, path = random_gpt(), random_tokens(2, 12), tmp_path / "exported.bin"
    model.export(str(path))
    assert list(tmp_path.iterdir()) == [path]
    written, expected = torch.load(path, weights_only=True), gpt2_checkpoint(model)
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    loaded = GPT.from_pretrained(str(path))
    assert loaded.config == model.config  # with its 4 heads, which no shape tells
    assert torch.equal(loaded(idx)[0], model(idx)[0])


def test_adapters_are_merged_before_export(tmp_path):
    model, idx, path = mora.add_adapters(random_gpt(), rank=2), random_tokens(2, 12), str(tmp_path / "exported.bin")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".M"):
                parameter.normal_(std=0.1)
    adapted = model(idx)[0]
    with pytest.raises(ValueError, match="no place for h.0.attn.c_attn.* merge the adapters first"):
        model.export(path)
    mora.merge_adapters(model).export(path)
    torch.testing.assert_close(GPT.from_pretrained(path)(idx)[0], adapted, rtol=1e-4, atol=1e-4)
