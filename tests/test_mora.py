"""Tests of mora.py, in its order: the size of M, the operators, the layers, whole models, speed.

    python -m pytest -q tests/test_mora.py                   # everything, from the project's folder
    python -m pytest -q tests/test_mora.py -k formula        # the updates against the paper's equations

What is expected is written from the paper's formulas, by loops where that is plainest, never from mora.py. k is the
number of inputs, d of outputs, r the rank, r̂ (`size`) the side of M. M and B start at zero, where every mistake in an
update is hidden, so most tests put random numbers in first.
"""

import ast
import copy
import io
import itertools
import math
import pathlib
import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mora
from mora import (OPERATORS, DoRALinear, LoRALinear, MoRALinear, adapter_state_dict, add_adapters, load_adapters,
                  merge_adapters, merge_and_reset, square_size)
from test_linear_maps import rotation_matrix

# Every way to adapt a layer, as options of add_adapters (whose default method is mora).
CYCLE = [("strided", "strided"), ("contiguous", "contiguous"), ("contiguous", "strided"), ("strided", "contiguous")]
MORA = {"truncation": dict(operator="truncation"),
        **{f"sharing {groups}": dict(operator="sharing", groups=groups)
           for groups in ("strided", "contiguous", CYCLE[2], "random", "cycle")},
        **{f"{operator}{' fold' * fold}": dict(operator=operator, fold=fold)
           for operator in ("decoupling", "rotation") for fold in (False, True)},
        "overlap": dict(operator="overlap", copies=3)}
LORA = {"lora": dict(method="lora"), "rslora": dict(method="lora", rslora=True, alpha=3),
        "asylora": dict(method="asylora"), "dora": dict(method="dora")}
VARIANTS = MORA | LORA
every_operator = pytest.mark.parametrize("options", MORA.values(), ids=MORA.keys())
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_close(got, expected, hint, tol=1e-12):
    """Equal up to `tol` times the largest number expected (or 1, if that is larger)."""
    assert got.shape == expected.shape, f"{hint}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    got, expected = got.double().flatten(), expected.double().flatten()
    worst = (got - expected).abs().argmax()
    assert (got - expected)[worst].abs() <= tol * max(1, expected.abs().max()), (
        f"{hint}: expected {expected[worst]:.6g}, got {got[worst]:.6g} at entry {worst}")


def randomise(model, std=1.0):
    """Every trainable parameter at random."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def adapted(k, d, rank=2, bias=True, dtype=torch.float64, **options):
    """A model of one adapted layer, at random, and the layer."""
    model = randomise(add_adapters(nn.Sequential(nn.Linear(k, d, bias, dtype=dtype)), rank=rank, **options))
    return model, model[0]


class Net(nn.Module):
    """An embedding, two residual blocks, and an output head that shares its weight with the embedding."""

    LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    TOKENS = torch.arange(11)

    def __init__(self, bias=True):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(11, 10), nn.LayerNorm(10), nn.Linear(10, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(10, 24, bias), "down": nn.Linear(24, 10, bias)})
                                    for _ in range(2))

    def forward(self):
        x = self.embedding(self.TOKENS)
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](self.norm(x))))
        return self.head(x)


def adapted_net(seed=0, bias=True, rank=2, **options):
    """A Net at random: the frozen weights are always the same, `seed` draws what belongs to the adapters."""
    torch.manual_seed(0)
    model = Net(bias).double()
    torch.manual_seed(seed)
    return randomise(add_adapters(model, rank=rank, **options))


# ----------------------------------------------------------------------------------------------------------------------
# The size of M.


def test_square_size():
    hint = "r̂ = sqrt((768 + 768) 8) = 110.85 is rounded down: rounded up, M would have more parameters than LoRA"
    assert square_size(768, 768, 8) == 110, hint
    for k, d, r in itertools.product(range(1, 40, 3), range(1, 40, 3), (1, 2, 3, 7, 8, 50)):
        size = square_size(k, d, r)
        assert size**2 <= (k + d) * r, f"k = {k}, d = {d}, r = {r}: M has {size}² parameters, LoRA {(k + d) * r}"
        assert size == min(k, d) or size < min(k, d) and (size + 1)**2 > (k + d) * r, (
            f"k = {k}, d = {d}, r = {r}: {size} is not the largest size within the budget and within min(k, d)")


def test_rotation_has_an_even_size():
    for k, d, r in itertools.product(range(1, 40, 3), range(1, 40, 3), (1, 2, 50)):
        M, size = MoRALinear(nn.Linear(k, d), r, "rotation").M, square_size(k, d, r)
        even = size if size == 1 else size // 2 * 2
        assert M.shape == (even, even), f"rotation turns coordinates in pairs: r̂ is {even} here, not {len(M)}"


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_rank_is_a_whole_number_of_at_least_1(rank):
    for build in (square_size, lambda k, d, rank: LoRALinear(nn.Linear(k, d), rank),
                  lambda k, d, rank: MoRALinear(nn.Linear(k, d), rank)):
        with pytest.raises(ValueError, match=str(rank)):
            build(4, 4, rank)


# ----------------------------------------------------------------------------------------------------------------------
# The operators.


def make(k, d, size, operator, **options):
    return OPERATORS[operator](k, d, size, **options)


def matrix(operator, M, k):
    """ΔW (d, k): column j is what the j-th unit vector becomes on its way through compress, M and decompress."""
    return operator.decompress(operator.compress(torch.eye(k, dtype=M.dtype)) @ M.T).T


def formula(name, M, k, d, operator, fold=False):
    """ΔW (d, k) from the paper's equation. `operator` is asked for its groups only."""
    W, size = torch.zeros(d, k, dtype=M.dtype), len(M)
    if name == "truncation":  # Eq. 4
        for i, j in itertools.product(range(size), range(size)):
            W[i, j] = M[i, j]
    elif name == "sharing":  # Eq. 6
        for i, j in itertools.product(range(d), range(k)):
            W[i, j] = M[operator.out_group[i], operator.in_group[j]]
    elif name == "overlap":
        W += sum(formula("sharing", M, k, d, sharing) for sharing in operator.sharings) / math.sqrt(3)
    else:  # Eq. 8 and 9: a block for each row of inputs; its outputs are cut, folded or repeated until there are d
        n = math.ceil(k / size)
        blocks = torch.block_diag(*[M @ rotation_matrix(size, i) if name == "rotation" else M for i in range(n)])
        for i in range(max(d, n * size) if fold else d):
            W[i % d] += blocks[i % (n * size), :k]  # past column k is the padding
    return W


@every_operator
def test_operator_is_the_formula(options):
    name, fold = options["operator"], options.get("fold", False)
    shapes = [(6, 12, 2), (12, 6, 2), (14, 14, 6), (5, 9, 2), (4, 15, 4), (13, 5, 4), (23, 3, 2), (26, 8, 6), (7, 7, 2),
              (5, 3, 1), (3, 5, 1), (1, 1, 1)] + [(7, 8, 3), (17, 5, 5)] * (name != "rotation")  # whose r̂ is even
    for k, d, size in shapes:
        operator, M = make(k, d, size, **options), randn(size, size)
        expected = formula(name, M, k, d, operator, fold)
        assert_close(matrix(operator, M, k), expected, f"ΔW at k = {k}, d = {d}, r̂ = {size}")


def test_kronecker_identities():
    M, ones, eye = randn(3, 3), torch.ones(2, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    strided, contiguous = (make(12, 6, 3, "sharing", groups=groups) for groups in ("strided", "contiguous"))
    assert_close(matrix(strided, M, 12), torch.kron(ones, M), "strided is ones ⊗ M")
    assert_close(matrix(contiguous, M, 12), torch.kron(M, ones), "contiguous is M ⊗ ones")
    assert_close(matrix(make(12, 12, 3, "decoupling"), M, 12), torch.kron(eye, M), "decoupling is I ⊗ M")


@pytest.mark.parametrize("mora_type, groups", [*enumerate(CYCLE, start=1)])
def test_types_of_the_released_code(mora_type, groups):
    """kongds/MoRA reshapes x and sums it, then repeats the result, along the first or the second dimension."""
    M, x = randn(4, 4), randn(5, 12)  # k = 12, r̂ = 4, d = 20
    z = x.view(5, 3, 4).sum(1) if mora_type in (1, 4) else x.view(5, 4, 3).sum(2)
    y = (z @ M.T).repeat(1, 5) if mora_type in (1, 3) else (z @ M.T).repeat_interleave(5, dim=1)
    assert_close(x @ matrix(make(12, 20, 4, "sharing", groups=groups), M, 12).T, y, f"mora_type {mora_type}")


@every_operator
@pytest.mark.parametrize("k, d", [(13, 22), (22, 13)])
def test_operator_is_linear_in_any_number_of_dimensions(k, d, options):
    operator, x, y = make(k, d, 4, **options), randn(2, 3, k), randn(2, 3, k)
    for f, x, y in ((operator.compress, x, y), (operator.decompress, operator.compress(x), operator.compress(y))):
        assert_close(f(2 * x - y), 2 * f(x) - f(y), "f(2x - y) = 2 f(x) - f(y)")
        assert_close(f(x)[1, 2], f(x[1, 2]), "one vector, alone and in a batch")
        assert f(x[:0]).shape == f(x)[:0].shape, "an empty batch"


def test_rotation_keeps_the_length_of_each_row():
    x = randn(5, 23)
    rows, got = F.pad(x, (0, 1)).view(5, 4, 6), make(23, 23, 6, "rotation").compress(x).reshape(5, 4, 6)
    assert_close(got[:, 0], rows[:, 0], "rows count from 0, so the first one is not turned")
    assert_close(got.norm(dim=-1), rows.norm(dim=-1), "lengths", tol=1e-6)


def kind(group, size):
    """How indices were dealt into groups; whichever way, the groups' lengths differ by one at most."""
    lengths = torch.bincount(group, minlength=size)
    assert len(lengths) == size and lengths.max() - lengths.min() <= 1, f"{size} even groups have lengths {lengths}"
    if torch.equal(group, torch.arange(len(group)) % size):
        return "strided"
    return "contiguous" if torch.equal(group, group.sort().values) else "random"


@pytest.mark.parametrize("k, d, rank", [(12, 20, 1), (13, 20, 2), (31, 17, 3), (17, 31, 5), (9, 9, 2)])
@pytest.mark.parametrize("groups", ["strided", "contiguous", "random", *CYCLE, "cycle"], ids=str)
def test_groups(groups, k, d, rank):
    model, layer = adapted(k, d, rank, operator="sharing", groups=groups)
    operator, seen = layer.operator, []
    pair = (groups, groups) if isinstance(groups, str) else groups
    for merge, expected in enumerate(CYCLE * 2 if groups == "cycle" else [pair, pair]):
        assert (len(operator.in_group), len(operator.out_group)) == (k, d)
        got = kind(operator.in_group, len(layer.M)), kind(operator.out_group, len(layer.M))
        assert got == expected, f"after {merge} merges the groups of (inputs, outputs) should be {expected}, not {got}"
        seen.append(operator.in_group.tolist())
        merge_and_reset(model)
    assert groups != "random" or seen[0] != seen[1], "random groups came out the same twice"


# ----------------------------------------------------------------------------------------------------------------------
# The layers.


@pytest.mark.parametrize("layer, own", [(LoRALinear, "AB"), (DoRALinear, ["A", "B", "magnitude"]), (MoRALinear, "M")])
def test_layer_freezes_what_it_wraps(layer, own):
    trainable = {name for name, parameter in layer(nn.Linear(9, 14), 2).named_parameters() if parameter.requires_grad}
    assert trainable == {*own}


def deal_shapes():
    """Every (k, d) up to 50, and some larger ones, dealt to the variants, with ranks of every sort: 1, odd, above k."""
    draw = random.Random(0)
    shapes = [*itertools.product(range(1, 51), repeat=2)]
    shapes += [(draw.randint(51, 700), draw.randint(51, 700)) for _ in range(6 * len(VARIANTS))]
    draw.shuffle(shapes)
    shapes = [(k, d, draw.choice((1, 2, 3, 7, k + 1)), draw.random() < 0.5) for k, d in shapes]
    return [shapes[i::len(VARIANTS)] for i in range(len(VARIANTS))]


@pytest.mark.parametrize("options, shapes", [*zip(VARIANTS.values(), deal_shapes())], ids=VARIANTS.keys())
def test_delta_weight_and_merge_agree_with_forward(options, shapes):
    for k, d, rank, bias in shapes:
        _, layer = adapted(k, d, rank, bias, **options)
        x, hint = randn(3, k), f"k = {k}, d = {d}, rank = {rank}, bias = {bias}"
        y, merged = layer(x), layer.merge()
        assert_close(layer.linear(x) + x @ layer.delta_weight().T, y, f"delta_weight(), {hint}")
        assert_close(merged(x), y, f"merge(), {hint}")
        assert type(merged) is nn.Linear
        for parameter in merged.parameters():
            parameter.data.zero_()
        assert torch.equal(layer(x), y), f"merge() changed the layer, or shares memory with it, {hint}"


@every_operator
def test_mora_is_the_formula(options):
    _, layer = adapted(13, 20, **options)
    assert_close(layer.delta_weight(), matrix(layer.operator, layer.M, 13), "ΔW is M between compress and decompress")


@pytest.mark.parametrize("options, scaling", [(dict(), 2), (dict(alpha=3), 3 / 4), (dict(alpha=3, rslora=True), 3 / 2)])
def test_lora_is_the_formula(options, scaling):
    _, layer = adapted(7, 5, rank=4, method="lora", **options)
    assert_close(layer.delta_weight(), scaling * layer.B @ layer.A, f"ΔW is {scaling} B A, at r = 4")


def dora(layer, x, adapter_x):
    """magnitude · V x / ‖V‖ + bias, where the length of V's rows counts as a constant; V = W0 + (alpha / r) B A."""
    W, BA = layer.linear.weight, 2 * layer.B @ layer.A
    return layer.magnitude / (W + BA).norm(dim=1).detach() * (x @ W.T + adapter_x @ BA.T) + layer.linear.bias


def test_dora_is_the_formula():
    _, layer = adapted(5, 8, method="dora")
    x, upstream = randn(2, 5).requires_grad_(), randn(2, 8)
    y, expected = layer(x), dora(layer, x, x)
    assert_close(y, expected, "outputs")
    inputs = {"x": x, "A": layer.A, "B": layer.B, "magnitude": layer.magnitude}
    grads = (torch.autograd.grad(outputs, inputs.values(), upstream) for outputs in (y, expected))
    for name, got, grad in zip(inputs, *grads):
        assert_close(got, grad, f"gradient of {name}")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dora"])
@pytest.mark.parametrize("k, d", [(5, 8), (8, 5)])
def test_gradients(k, d, name):
    _, layer = adapted(k, d, **VARIANTS[name])
    names, values = zip(*[(name, value) for name, value in layer.named_parameters() if value.requires_grad])
    assert torch.autograd.gradcheck(lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values)), x),
                                    (randn(2, k).requires_grad_(), *values))


@pytest.mark.parametrize("name, expected", [
    ("lora", 1), ("truncation", 13), ("sharing strided", 13), ("sharing contiguous", 13), ("sharing random", 13),
    ("decoupling", 96), ("decoupling fold", 96), ("rotation", 96), ("rotation fold", 96), ("overlap", 37)])
def test_rank_of_the_update(name, expected):
    _, layer = adapted(96, 96, rank=1, **VARIANTS[name])
    got = int(torch.linalg.matrix_rank(layer.delta_weight()))
    assert got == expected, f"the rank of ΔW for 96 x 96, r = 1, r̂ = 13 and a random M is {expected}, not {got}"


@pytest.mark.parametrize("fold", [False, True])
def test_rotation_without_fold_loses_inputs_where_k_is_above_d(fold):
    _, layer = adapted(3072, 768, rank=8, dtype=torch.float32, operator="rotation", fold=fold)
    expected = 3072 if fold else math.ceil(768 / 174) * 174  # r̂ = 174, and the first 5 rows of inputs make 768 outputs
    got = int(layer.delta_weight().any(dim=0).sum())
    assert got == expected, f"{expected} of 3072 inputs reach an output, not {got}"


@every_variant
@pytest.mark.parametrize("dtype, autocast, tol", [(torch.float64, False, 1e-12), (torch.float32, False, 1e-5),
                                                  (torch.bfloat16, False, 0.03), (torch.float32, True, 0.03)])
def test_precision(dtype, autocast, tol, options):
    _, layer = adapted(13, 20, dtype=dtype, **options)
    x = randn(30, 13).to(dtype)  # enough rows for MergedProduct
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, base, merged = layer(x), layer.linear(x), layer.merge()
    assert y.dtype == base.dtype, f"the plain layer returns {base.dtype}, the adapted one {y.dtype}"
    assert_close(y, copy.deepcopy(layer).double()(x.double()), "outputs, against float64", tol)
    assert torch.equal(merged.weight, layer.merge().weight), "autocast must not make merging less exact"
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype != torch.bfloat16, f"{name} is bfloat16, which loses the small steps of training"
            assert parameter.grad.isfinite().all() and parameter.grad.any(), f"the gradient of {name}"


@every_variant
def test_dropout_acts_on_the_input_of_the_adapter_only(options):
    _, layer = adapted(13, 20, dropout=1.0, **options)  # in training, nothing is left of that input
    x = randn(30, 13)
    expected = dora(layer, x, 0 * x) if options.get("method") == "dora" else layer.linear(x)
    assert_close(layer.train()(x), expected, "with the adapter's input dropped, the frozen layer is left")
    merged = layer.merge()(x)
    assert_close(layer.eval()(x), merged, "eval() and merge() know no dropout")
    assert not torch.allclose(merged, expected), "the update is gone in eval mode too"
    model = add_adapters(Net().eval(), dropout=1.0, **options)
    assert not any(module.training for module in model.modules()), "a model in eval mode has adapters in training mode"


@every_variant
def test_compiles_once(options):
    torch._dynamo.reset()
    counter, (model, _) = CompileCounter(), adapted(13, 20, dtype=torch.float32, **options)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for merge in range(2):
        x = torch.randn(30, 13)
        assert_close(compiled(x), model(x), f"compiled, after {merge} merges", tol=1e-5)
        merge_and_reset(model)
        randomise(model)
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times; merging in place needs no second time"


# ----------------------------------------------------------------------------------------------------------------------
# Whole models: adapting.


@every_variant
@pytest.mark.parametrize("bias", [True, False])
def test_start(bias, options):
    base = Net(bias)
    model = add_adapters(copy.deepcopy(base), rank=2, **options)
    assert_close(model(), base(), "ΔW starts at zero", tol=1e-6)
    assert options.get("method") == "dora" or torch.equal(model(), base()), "not one bit of the outputs may change"

    own = {"lora": "AB", "asylora": "B", "dora": ["A", "B", "magnitude"], "mora": "M"}[options.get("method", "mora")]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable.keys() == {f"{layer}.{name}" for layer in Net.LAYERS for name in own}, "the trainable parameters"
    budget = sum((10 + 24) * 2 + ("magnitude" in own) * model.get_submodule(layer).out_features for layer in Net.LAYERS)
    assert sum(parameter.numel() for parameter in trainable.values()) <= budget, f"LoRA has (k + d) r, {budget} in all"


def test_A_starts_as_kaiming():
    A = LoRALinear(nn.Linear(400, 8), rank=8).A
    assert 0.049 < A.abs().max() <= 0.05, "A is uniform within 1 / sqrt(k) = 0.05"
    assert_close(A.std(), torch.tensor(0.05 / math.sqrt(3)), "its standard deviation", tol=2e-3)


def adapted_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, MoRALinear)]


@pytest.mark.parametrize("targets, expected", [
    (None, Net.LAYERS), (["up", "down"], Net.LAYERS), (["down"], ["blocks.0.down", "blocks.1.down"]),
    (["1.up"], ["blocks.1.up"]), (["blocks.0.up", "1.down"], ["blocks.0.up", "blocks.1.down"])])
def test_targets(targets, expected):
    model = add_adapters(Net(), targets=targets)
    assert adapted_layers(model) == expected, "targets are full names or their ends; None leaves out the tied head"
    assert isinstance(model.get_submodule(expected[0]).operator, OPERATORS["rotation"]), "rotation is the default"


def test_subclasses_of_linear_are_left_alone():
    """nn.MultiheadAttention reads the weight of its out_proj without calling it: an adapter there would do nothing."""
    model = add_adapters(nn.TransformerEncoderLayer(8, 2, 16))
    assert adapted_layers(model) == ["linear1", "linear2"]
    model(torch.randn(3, 8)).sum().backward()


def snapshot(model):
    """By name, all that an error must leave as it was."""
    modules = {f"module {name}": (type(module), module.training) for name, module in model.named_modules()}
    tensors = model.state_dict(keep_vars=True)
    return modules | {name: (tensor.requires_grad, tensor.tolist()) for name, tensor in tensors.items()}


def assert_error(model, function, *words):
    """`function` raises a ValueError whose message has all the words, and the model is as it was before."""
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        function()
    for word in words:
        assert word in str(error.value), "the message should name the value and the choices"
    after = snapshot(model)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    assert not changed, f"the error came after the model was changed: {', '.join(changed)}"


@pytest.mark.parametrize("options, words", [
    (dict(rank=0), ["rank", "0"]), (dict(rank=0, method="lora"), ["rank", "0"]),
    (dict(method="morra"), ["morra", "lora", "lora+", "asylora", "dora", "mora"]),
    (dict(operator="spin"), ["spin", *OPERATORS]), (dict(operator="spin", method="lora"), ["spin", *OPERATORS]),
    (dict(method="lora", groups="random"), ["groups"]), (dict(method="lora", alpha="16"), ["lora"]),
    (dict(method="lora", rank=10**12), ["lora"]),
    (dict(operator="sharing", groups="odd"), ["odd", "strided", "contiguous", "random", "cycle"]),
    (dict(targets=["up", "left"]), ["left", "up", "down"]), (dict(targets=["p"]), ["'p'", "up", "down"]),
    (dict(targets=[]), ["up", "down"]), (dict(targets=["head"]), ["head"])], ids=str)
def test_errors_of_add_adapters(options, words):
    model = Net()
    assert_error(model, lambda: add_adapters(model, **options), *words)


@pytest.mark.parametrize("compute", [nn.utils.weight_norm, nn.utils.spectral_norm,
                                     lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_refused_since_a_merge_into_it_would_be_lost(compute):
    model = nn.Sequential(nn.Linear(6, 6), compute(nn.Linear(6, 6)))
    with pytest.raises(ValueError, match="weight of 1 is computed"):
        add_adapters(model)
    assert type(model[0]) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())
    model = add_adapters(nn.Sequential(nn.Linear(6, 6)), "lora")
    compute(model[0].linear)
    for merge in (merge_adapters, merge_and_reset):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge(model)


def test_a_layer_without_inputs_or_outputs_is_left_alone():
    model = add_adapters(nn.ModuleList([nn.Linear(4, 4), nn.Linear(0, 4), nn.Linear(4, 0)]))
    assert adapted_layers(model) == ["0"]


def test_a_layer_used_in_several_places_gets_one_adapter():
    block, head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)
    model = nn.ModuleDict({"blocks": nn.Sequential(block, block), "heads": nn.ModuleList([head, head])}).double()
    x = randn(9, 6)
    randomise(add_adapters(model, rank=1))
    assert adapted_layers(model) == ["blocks.0.0", "heads.0"] and model["heads"][0] is model["heads"][1]
    y = model["heads"][1](model["blocks"](x))
    merge_adapters(model)
    assert not adapted_layers(model) and type(model["heads"][1]) is nn.Linear
    assert_close(model["heads"][1](model["blocks"](x)), y, "merged")


def test_remora_has_groups_to_renew():
    model = add_adapters(Net(), "remora")
    for model in (model, add_adapters(Net(), "remora", operator="sharing")):
        assert {str(layer.operator) for layer in mora.find_adapters(model).values()} == {"Sharing(groups=cycle)"}
    model = add_adapters(Net(), "remora", operator="sharing", groups="random")
    assert {layer.operator.groups for layer in mora.find_adapters(model).values()} == {("random", "random")}
    with pytest.warns(UserWarning, match="rotation has no groups"):
        add_adapters(Net(), "remora", operator="rotation")


@every_variant
def test_transformer_encoder(options):
    """In eval mode nn.TransformerEncoderLayer reads the weights of its linear layers instead of calling them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = randomise(add_adapters(nn.TransformerEncoder(layer, 2), rank=1, **options), std=0.3)
    x = torch.randn(3, 5, 8)
    expected = model.train()(x)
    with torch.no_grad():
        assert_close(model.eval()(x), expected, "without gradients, by the fast path of PyTorch's own", tol=1e-5)
    assert_close(model(x), expected, "with gradients", tol=1e-5)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("options", [VARIANTS[name] for name in ("lora", "rotation", "sharing cycle")], ids=str)
def test_built_on_the_meta_device_and_loaded(options):
    with torch.device("meta"):
        model = add_adapters(Net(), rank=2, **options)
    saved = randomise(add_adapters(Net(), rank=2, **options))
    merge_and_reset(randomise(saved))
    model.to_empty(device="cpu").load_state_dict(randomise(saved).state_dict())
    model.head.weight = model.embedding.weight  # tied weights are not after to_empty()
    assert_close(model(), saved(), "the loaded model", tol=1e-6)


def test_angles_are_float32_in_a_bfloat16_model():
    rotation, ones = make(4000, 4000, 40, "rotation").bfloat16(), torch.ones(100, 40)
    assert_close(rotation.rotate(ones.bfloat16()), rotation.rotate(ones.double()), "100 rows of ones", tol=0.01)


def test_gradient_checkpointing():
    """It runs forward twice, under hooks on what is saved."""
    for use_reentrant in (False, True):
        (_, layer), x = adapted(12, 12), randn(30, 12).requires_grad_()
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        expected, = torch.autograd.grad(layer(x).square().sum(), layer.M)
        assert_close(layer.M.grad, expected, "the gradient of M")


def test_models_that_do_not_fit():
    model = adapted_net()
    assert_error(model, lambda: add_adapters(model), "already")
    model = nn.Sequential(nn.Embedding(3, 3))
    assert_error(model, lambda: add_adapters(model), "Linear")
    model = Net()
    model.blocks = nn.ModuleList()
    assert_error(model, lambda: add_adapters(model), "head")  # the tied head is the only linear layer left
    for function in (merge_adapters, merge_and_reset, adapter_state_dict, lambda model: load_adapters(model, {})):
        assert_error(model, lambda: function(model), "adapter")


# ----------------------------------------------------------------------------------------------------------------------
# Merging.


@every_variant
@pytest.mark.parametrize("bias", [True, False])
def test_merge_adapters(bias, options):
    model = adapted_net(bias=bias, **options)
    y, merged = model(), merge_adapters(model)
    assert_close(merged(), y, "merging changed the outputs")
    assert all(type(merged.get_submodule(layer)) is nn.Linear for layer in Net.LAYERS)
    assert type(merge_adapters(adapted(4, 4)[1])) is nn.Linear, "a model that is one layer"
    assert merged.state_dict().keys() == Net(bias).state_dict().keys(), "the names that the base had"
    assert_error(merged, lambda: merge_adapters(merged))


@every_variant
def test_merge_and_reset(options):
    model = adapted_net(**options)
    layers = [model.get_submodule(layer) for layer in Net.LAYERS]
    y, tensors = model(), [*model.parameters(), *model.buffers()]
    old = [layer.A.clone() for layer in layers if hasattr(layer, "A")]
    merge_and_reset(model)
    assert_close(model(), y, "merge_and_reset() changed the outputs")
    assert not any(torch.equal(layer.A, A) for layer, A in zip(layers, old)), "A is to be drawn again"
    for layer in layers:
        assert not (layer.M if isinstance(layer, MoRALinear) else layer.B).any(), "M, or B, starts again from zero"
        assert_close(layer.delta_weight(), torch.zeros_like(layer.linear.weight), "ΔW after merge_and_reset()")
        randomise(layer).reset()
        assert_close(layer.delta_weight(), torch.zeros_like(layer.linear.weight), "ΔW after reset()")
    assert all(new is tensor for new, tensor in zip([*model.parameters(), *model.buffers()], tensors)), (
        "tensors were replaced: an optimizer or a compiled model goes on with the old ones")


@pytest.mark.parametrize("name", ["lora", "asylora", "dora", "sharing random", "overlap"])
def test_merge_and_reset_drops_the_optimizers_state_of_the_adapters_only(name):
    model = adapted_net(**VARIANTS[name])
    model.norm.requires_grad_(True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.0)
    for step in range(3):
        model().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    merge_and_reset(model, optimizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first = torch.allclose(before[name] - parameter, torch.full_like(parameter, 0.1))
            assert first == (not name.startswith("norm")), f"{name}: Adam's first step is its rate in every number"


@pytest.mark.parametrize("name", ["lora", "asylora", "dora", "sharing random", "overlap"])
def test_merge_and_reset_draws_from_the_generator(name):
    states = []
    for seed in (1, 1, 2):
        model = adapted_net(**VARIANTS[name])
        torch.manual_seed(len(states))  # must not matter
        merge_and_reset(model, generator=torch.Generator().manual_seed(seed))
        states.append(adapter_state_dict(model))
    same, other = (all(torch.equal(states[0][key], state[key]) for key in state) for state in states[1:])
    assert same, "the same seed drew other numbers: distributed and resumed runs would part ways"
    assert not other, "another seed drew the same numbers"


@pytest.mark.parametrize("std", [0.1, 0.001])
def test_merging_into_bfloat16_rounds_once(std):
    model, layer = adapted(24, 16, dtype=torch.bfloat16, operator="sharing")
    for merge in range(50):
        randomise(model, std)
        delta = formula("sharing", layer.M.float(), 24, 16, layer.operator)
        expected, merged = (layer.linear.weight.float() + delta).bfloat16(), layer.merge().weight
        merge_and_reset(model)
        for got in (merged, layer.linear.weight):
            assert got.dtype == torch.bfloat16 and torch.equal(got, expected), (
                f"merge {merge}: W0 and ΔW are to be added in float32 and the sum rounded once")


@pytest.mark.parametrize("groups, expected", [("strided", [9] * 6), ("cycle", [9, 17, 17, 17, 17, 17]),
                                              ("random", [9, 17, 25, 33, 41, 48])])
def test_rank_of_remora(groups, expected):
    """Here r̂ = 9. New groups raise the rank of all updates together, but the paper's cycle ends at 2 r̂ - 1."""
    model, layer = adapted(48, 48, rank=1, operator="sharing", groups=groups)
    start, ranks = layer.linear.weight.clone(), []
    for _ in expected:
        randomise(model)
        merge_and_reset(model)
        ranks.append(int(torch.linalg.matrix_rank(layer.linear.weight - start, rtol=1e-10)))
    assert ranks == expected, "the rank of the weight's change after each merge"


# ----------------------------------------------------------------------------------------------------------------------
# Speed: the same as defined, in one product.


class Own(mora.Operator):
    """An operator as a reader would write it: the mean of neighbours in, the same number for neighbours out."""

    def compress(self, x):
        padded = F.pad(x, (0, -self.in_features % self.size))
        return padded.unflatten(-1, (self.size, -1)).mean(-1)

    def decompress(self, z):
        return z.repeat_interleave(math.ceil(self.out_features / self.size), dim=-1)[..., :self.out_features]


class OwnRows(Own):
    """Two rows through the same M: neighbours as they are, and backwards."""

    def compress(self, x):
        return torch.stack([super(OwnRows, self).compress(x), super(OwnRows, self).compress(x.flip(-1))], dim=-2)

    def decompress(self, z):
        return super().decompress(z[..., 0, :]) - 2 * super().decompress(z[..., 1, :])


class OwnDecoupling(mora.Decoupling):
    """Made from another operator, and not it: every other sign changed, on both sides."""

    def sign(self, features):
        return (-1.0) ** torch.arange(features)

    def compress(self, x):
        return super().compress(x * self.sign(self.in_features))

    def decompress(self, z):
        return super().decompress(z) * self.sign(self.out_features)


OWN = {"own": Own, "own rows": OwnRows, "own decoupling": OwnDecoupling,
       "own sharing": type("OwnSharing", (mora.Sharing,),
                           {"decompress": lambda self, z: 3 * mora.Sharing.decompress(self, z)}),
       "own rotation": type("OwnRotation", (mora.Rotation,), {"rotate": lambda self, rows: rows.flip(-2)}),
       "own output": type("OwnOutput", (mora.Rotation,),
                          {"decompress": lambda self, z: mora.Rotation.decompress(self, z).flip(-1)})}


@pytest.fixture
def own_operators(monkeypatch):
    for name, operator in OWN.items():
        monkeypatch.setitem(OPERATORS, name, operator)


def is_fast(y):
    return "MergedProduct" in y.grad_fn.name()


@pytest.mark.parametrize("options", [*MORA.values(), *({"operator": name} for name in OWN)], ids=[*MORA, *OWN])
def test_fast_is_the_definition(options, own_operators):
    """Outputs, and the gradients of x and M, for any shape of layer and of x; and as merging has it."""
    for k, d, rank in [(12, 12, 2), (13, 22, 2), (22, 13, 2), (26, 14, 2), (5, 33, 1), (40, 40, 1), (7, 9, 7),
                       (4, 1, 1)]:
        model, layer = adapted(k, d, rank, **options)
        for shape in [(2, 25), (50,), ()]:
            x, g, results = randn(*shape, k).requires_grad_(), randn(*shape, d), {}
            for layer.fast in (True, False):
                y = layer(x)
                results[layer.fast] = y, *torch.autograd.grad(y, (x, layer.M), g)
                assert is_fast(y) == (layer.fast and (shape != () or k == 4)), "the way that forward took"
            names = "outputs", "gradient of x", "gradient of M"
            for name, got, expected in zip(names, results[True], results[False]):
                assert_close(got, expected, f"{name}, k = {k}, d = {d}, r̂ = {len(layer.M)}, x {tuple(x.shape)}")
            layer.fast = True
        merge_and_reset(model)  # its groups are others then
        randomise(model)
        assert_close(layer(x.expand(50, k)), layer.merge()(x.expand(50, k)), "merge() with the next groups")


@every_operator
def test_an_inputs_gradient_in_any_number_of_dimensions(options):
    """A head of one or two classes sees enough tokens in a single one."""
    for classes in (1, 2):
        _, layer = adapted(64, classes, **options)
        x = randn(64)
        layer(x).sum().backward()
        expected, = torch.autograd.grad((layer.delta_weight() @ x).sum(), layer.M)
        assert_close(layer.M.grad, expected, "the gradient of M from a single vector")


def test_speed_can_be_deleted():
    """What is left without the last section, and the method that refers to it, computes the formulas."""
    source = pathlib.Path(mora.__file__).read_text(encoding="utf-8")
    source = source[:source.index("\n# ---- Speed")]
    forward = """    def forward(self, x):  # what Adapter.forward computes, in less time
        return fast_forward(self, x)
"""
    assert source.count(forward) == 1
    slow = types.ModuleType("slow_mora")
    exec(compile(source.replace(forward, ""), "slow_mora.py", "exec"), slow.__dict__)
    for options in MORA.values():
        (_, layer), x = adapted(13, 20, **options), randn(50, 13)
        torch.manual_seed(1)
        twin = slow.MoRALinear(copy.deepcopy(layer.linear), 2, **options)
        twin.load_state_dict(layer.state_dict())
        assert is_fast(layer(x)) and not is_fast(twin(x))
        assert_close(twin(x), layer(x), "without the section Speed")


def test_one_switch_makes_every_layer_compute_as_defined(monkeypatch):
    model = adapted_net()
    assert is_fast(model.blocks[0]["up"](randn(50, 10)))
    monkeypatch.setattr(MoRALinear, "fast", False)
    seen, forward = [], mora.Operator.forward
    monkeypatch.setattr(mora.Operator, "forward", lambda self, x, M: seen.append(self) or forward(self, x, M))
    model()
    assert len(seen) == 4, "a breakpoint in Eq. 2 stops in every layer"


def test_fast_is_for_many_tokens_and_first_gradients(monkeypatch):
    _, layer = adapted(40, 40)
    assert not is_fast(layer(randn(3, 40))), "W0 + ΔW is not worth building for three tokens"
    x = randn(30, 40).requires_grad_()
    with pytest.raises(RuntimeError, match="fast = False"):  # or a gradient penalty would pass M by in silence
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    monkeypatch.setattr(MoRALinear, "fast", False)
    grad, = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert layer.M.grad.any()


def test_second_derivatives_by_torch_func():
    _, layer = adapted(6, 5)
    x = randn(40, 6)

    def loss(M):
        return torch.func.functional_call(layer, {"M": M}, (x,)).pow(3).sum()

    found = torch.func.jacrev(torch.func.jacrev(loss))(layer.M.detach())
    MoRALinear.fast, fast = False, MoRALinear.fast
    try:
        expected = torch.func.jacrev(torch.func.jacrev(loss))(layer.M.detach())
    finally:
        MoRALinear.fast = fast
    assert expected.any()
    assert_close(found, expected, "the Hessian in M")


@pytest.mark.parametrize("change", [
    lambda layer: layer.operator.register_forward_hook(lambda module, inputs, output: 2 * output),
    lambda layer: layer.dropout.register_forward_hook(lambda module, inputs, output: 2 * output),
    lambda layer: setattr(layer, "dropout", nn.Identity()),
    lambda layer: setattr(layer, "dropout", nn.LeakyReLU(0.5)),
    lambda layer: setattr(layer.operator, "forward", lambda x, M: x @ M),
    lambda layer: setattr(layer, "__class__", type("Own", (MoRALinear,), {"update": lambda self, x: 2 * x @ self.M})),
    lambda layer: setattr(layer.operator, "__class__", type("Own", (type(layer.operator),), {
        "forward": lambda self, x, M: x @ M}))])
def test_changed_parts_count_for_any_number_of_tokens(change):
    _, layer = adapted(12, 12, 12)
    change(layer)
    x = randn(60, 12)
    assert_close(layer(x), torch.cat([layer(row[None]) for row in x]), "many tokens at once")


def test_fast_is_not_for_a_frozen_layer_that_learns():
    _, layer = adapted(12, 12)
    layer.linear.bias.requires_grad_(True)
    layer(randn(30, 12)).sum().backward()
    assert_close(layer.linear.bias.grad, torch.full((12,), 30.0), "the bias counts once a row")


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                                  "register_full_backward_pre_hook"])
def test_hooks_of_the_frozen_layer_run_for_any_number_of_tokens(hook):
    _, layer = adapted(12, 12)
    calls = []
    getattr(layer.linear, hook)(lambda *args: calls.append(hook))
    for tokens in (1, 50):
        layer(randn(tokens, 12).requires_grad_()).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("tokens", [1, 50])
def test_a_forward_of_the_users_own_is_called_for_any_number_of_tokens(tokens):
    _, layer = adapted(12, 12)
    layer.linear.forward = lambda x: 0 * x
    x = randn(tokens, 12)
    assert_close(layer(x), layer.update(x), "W0 x is what the patched layer says, 0")


@pytest.mark.parametrize("tokens", [1, 50])
def test_dropout_that_is_on_in_an_eval_model(tokens):
    _, layer = adapted(12, 12, dropout=1.0)
    layer.eval().dropout.train()
    x = randn(tokens, 12)
    assert_close(layer(x), layer.linear(x), "all inputs of the adapter are dropped, as for Monte Carlo dropout")


@pytest.mark.parametrize("dtype", [torch.long, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("tokens", [1, 50])
def test_a_wrong_type_is_refused_as_a_plain_layer_refuses_it(tokens, dtype):
    _, layer = adapted(12, 12, dtype=torch.float32)
    for call in (layer.linear, layer):
        with pytest.raises(RuntimeError, match="dtype"):
            call(torch.ones(tokens, 12, dtype=dtype))


def test_a_layer_of_many_inputs_and_few_outputs_takes_little_memory():
    """The matrix that ΔW would be built from, (n r̂, n r̂), would take 2.5 GB here."""
    _, layer = adapted(25088, 10, dtype=torch.float32, operator="rotation", fold=True)
    with Largest() as largest:
        layer(torch.randn(8, 25088)).sum().backward()
    assert largest.numel <= 25088 * 10 + 10


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


class OnGPU(torch.Tensor):
    """A tensor that takes CUDA's way through mora.py, on the CPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("name, options", [("sharing", dict(groups=groups)) for groups in ("strided", "random")]
                         + [("own sharing", {})])
def test_sharing_on_a_gpu_adds_up_the_same(name, options, own_operators, monkeypatch):
    for k, d in ((12, 12), (13, 22), (22, 13)):
        (_, layer), x, g = adapted(k, d, operator=name, **options), randn(7, k), randn(7, d)
        z = layer.operator.compress(x)
        expected = mora.fast_decompress_transposed(layer.operator, g, z.shape[1:])
        eye = torch.eye
        with monkeypatch.context() as patch:
            patch.setattr(torch, "eye", lambda n, dtype, device: eye(n, dtype=dtype))
            assert_close(mora.fast_compress(layer.operator, x.as_subclass(OnGPU)), z, f"compress, k = {k}, d = {d}")
            got = mora.fast_decompress_transposed(layer.operator, g.as_subclass(OnGPU), z.shape[1:])
        assert_close(got, expected, f"the transpose of decompress, k = {k}, d = {d}")


def test_gradients_of_single_samples():
    for k, d in ((12, 12), (12, 2)):
        model, layer = adapted(k, d)
        x, M = randn(4, 30, k), layer.M.detach()

        def loss(M, x):
            return torch.func.functional_call(model, {"0.M": M}, x).square().sum()

        for samples in (x, x[:, 0]):
            got = torch.func.vmap(torch.func.grad(loss), (None, 0))(M, samples)
            expected = [torch.autograd.grad(model(sample).square().sum(), layer.M)[0] for sample in samples]
            assert_close(got, torch.stack(expected), "torch.func sees the same gradients")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("autocast", [False, True])
def test_fast_rounds_once_as_merging_does(autocast, operator):
    _, layer = adapted(40, 40, dtype=torch.float32 if autocast else torch.bfloat16, operator=operator)
    x = torch.randn(30, 40).to(layer.linear.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, merged = layer(x), layer.merge()(x)
    exact = operator != "rotation"  # whose entries are sums, rounded in another order
    assert is_fast(y) and torch.allclose(y, merged, rtol=0 if exact else 0.02, atol=0 if exact else 0.1)


@pytest.mark.parametrize("operator, expected", dict(truncation=13, sharing=13, decoupling=96, rotation=96).items())
def test_what_is_kept_for_backward(operator, expected):
    """Truncation and sharing need r̂ numbers of each token, the others all of x; and no weight is kept."""
    _, layer = adapted(96, 96, rank=1, operator=operator)
    own, kept = {parameter.data_ptr() for parameter in layer.parameters()}, 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.untyped_storage().nbytes() // 8 if tensor.data_ptr() not in own else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(randn(200, 96))
    assert kept == 200 * expected


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading, and the file by itself.


@every_variant
def test_save_and_load(options):
    saved, loaded = adapted_net(seed=1, **options), adapted_net(seed=2, **options)
    for layer in Net.LAYERS:
        saved.get_submodule(layer).reset()  # on to the next groups, where there are any
    file = io.BytesIO()
    torch.save(adapter_state_dict(randomise(saved)), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    names = {key.split(".")[-1] for key, tensor in state.items() if tensor.is_floating_point()}
    assert names <= {"A", "B", "M", "magnitude"}, "the state has frozen weights or tables in it"
    assert not torch.allclose(loaded(), saved()), "nothing to test: the two models are the same"
    load_adapters(loaded, state)
    assert torch.equal(loaded(), saved()), "what was loaded does not compute what was saved"
    for model in (saved, loaded):
        merge_and_reset(model, generator=torch.Generator().manual_seed(0))
    state, expected = adapter_state_dict(loaded), adapter_state_dict(saved)
    assert all(torch.equal(state[key], expected[key]) for key in expected), "after a merge, the two differ"


def test_a_layer_by_itself_is_saved_and_loaded():
    (_, saved), (_, loaded) = adapted(6, 5), adapted(6, 5)
    load_adapters(loaded, adapter_state_dict(saved))
    assert torch.equal(loaded.M, saved.M) and saved.M.any()


@pytest.mark.parametrize("saved, own", [
    (dict(operator="truncation"), dict(operator="sharing")), (dict(operator="decoupling"), dict(operator="rotation")),
    (dict(operator="decoupling"), dict(operator="truncation")), (dict(fold=True), dict(fold=False)),
    (dict(rank=1), dict(rank=2)), (dict(method="lora", rank=1), dict(method="lora", rank=2)),
    (dict(method="lora", alpha=8), dict(method="lora", alpha=16)), (dict(method="lora"), dict(method="dora")),
    (dict(operator="sharing", groups="random"), dict(operator="sharing", groups="cycle")),
    (dict(operator="overlap", copies=2), dict(operator="overlap", copies=4)),
    (dict(method="lora"), dict(method="lora", rslora=True)), (dict(method="lora"), dict(method="mora")),
    (dict(targets=["up"]), dict()), (dict(), dict(targets=["up"]))], ids=str)
def test_loading_into_another_kind_of_model(saved, own):
    state, model = adapter_state_dict(adapted_net(seed=1, **saved)), adapted_net(seed=2, **own)
    words = [options["operator"].capitalize() for options in (saved, own) if "operator" in options]
    assert_error(model, lambda: load_adapters(model, state), *words)


@pytest.mark.parametrize("key, value", [
    ("blocks.1.down.M", None), ("blocks.1.down.M", torch.zeros(3, 3)), ("blocks.1.down.N", torch.zeros(3, 3)),
    ("blocks.1.down.operator.out_group", None), ("blocks.1.down.operator.out_group", torch.zeros(3).long())])
def test_loading_names_what_does_not_fit(key, value):
    state, model = adapter_state_dict(adapted_net(seed=1, operator="sharing")), adapted_net(seed=2, operator="sharing")
    assert_error(model, lambda: load_adapters(model, state | {7: torch.zeros(3)}), "7")
    state[key] = value
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    assert_error(model, lambda: load_adapters(model, state), key)


@pytest.mark.parametrize("key, change", [
    ("blocks.1.down.operator.out_group", torch.Tensor.bool), ("blocks.1.down.M", lambda M: M.to("meta")),
    ("blocks.1.down.M", torch.Tensor.to_sparse)])
def test_loading_refuses_tensors_of_another_kind(key, change):
    state, model = adapter_state_dict(adapted_net(seed=1, operator="sharing")), adapted_net(seed=2, operator="sharing")
    assert_error(model, lambda: load_adapters(model, state | {key: change(state[key])}))


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_complex_numbers_are_refused(method):
    with pytest.raises(ValueError, match="real numbers"):
        add_adapters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64)), method, 1)


def test_the_file_needs_torch_only():  # it runs alone in test_readme.py
    source = pathlib.Path(mora.__file__).read_text(encoding="utf-8")
    nodes = [*ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    foreign = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names | {"torch"}}
    assert not foreign, f"mora.py imports {foreign}"
