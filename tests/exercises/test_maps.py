"""The graders for linear maps: first what every map owes (`compress`, `decompress`, an update or a
forward), then exercises 6 to 12, 14 and 24. test_exercises.py has the other exercises.
"""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pytest import mark
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import measure
import mora
from checks import Dense, assert_same, build, check_device, check_draws, gradients
from mora import OPERATORS, DoRALinear, FastMoRALinear, LoRALinear, MoRALinear
from reference import assert_close, generator, mora_delta, randn, randomise, rotation_matrix

SHAPES = [(6, 12, 2), (12, 6, 2), (13, 20, 4), (20, 13, 6), (9, 5, 4), (5, 3, 1), (7, 7, 7)]
SHAPES += [(26, 5, 4), (3, 11, 2), (7, 8, 3)]  # k, d, r̂

# ---- Operators and layers that work while later exercises are missing ---------------------------
def operator(name, k, d, size=4):
    """An operator, maybe with "fold". Sharing's groups are drawn here, not by exercise 8 or 16."""
    if name not in VARIANTS:
        return OPERATORS[name](k, d, size)
    name, *fold = name.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mora.Sharing, "regroup", lambda self, generator=None: None)
        made = OPERATORS[name](k, d, size, **({"fold": True} if fold else {}))
    if name == "sharing":  # the longer groups are not the first ones
        made.in_group.copy_(torch.randperm(size)[torch.randperm(k) % size])
        made.out_group.copy_(torch.randperm(size)[torch.randperm(d) % size])
    return made

def mora_layer(name, k, d, **options):
    """A MoRALinear at random with r̂ = 4 and such an operator."""
    layer = build(MoRALinear, k, d, 4, operator="truncation", **options)
    layer.operator = operator(name, k, d)
    return layer

def merged(layer, x):
    given = layer.M, layer.linear.weight, layer.linear.bias, layer.operator
    return mora.MergedProduct.apply(x, *given)

VARIANTS = ["truncation", "sharing", "decoupling", "decoupling fold", "rotation", "rotation fold"]
OWN = [name for name in OPERATORS if name not in VARIANTS]  # what you wrote in exercise 24

# ---- What every map must do ----------------------------------------------------------------------
DECOUPLINGS = "decoupling", "wide decoupling", "wide decoupling fold"
MAPS = {
    1: ["LoRA update"], 2: ["Dense forward"],
    6: ["truncation compress", "truncation decompress"],
    7: ["sharing compress", "sharing decompress"],
    9: [f"{name} compress" for name in DECOUPLINGS],
    10: [f"{name} decompress" for name in DECOUPLINGS],
    11: ["rotation compress"], 12: ["sharing update", "rotation update"], 13: ["DoRA forward"],
    14: ["sharing merged", "wide rotation fold merged"],
    24: [f"{name} {f}" for name in OWN for f in ("compress", "decompress", "update", "merged")],
}

def every_map(*numbers, without=()):
    """Parametrizes a test with the maps of these exercises, or of all, which owe what it asks."""
    rows = [(name, number) for number in numbers or MAPS for name in MAPS[number]]
    kind = [] if numbers else [mark.owed]
    marked = [pytest.param(name, marks=[getattr(mark, f"ex{number}"), *kind])
              for name, number in rows if not name.endswith(without)]
    return mark.parametrize("name", marked)

def linear_map(name, dtype=torch.float64):
    """(module, function of it and x, shape of a vector) of a map."""
    *kind, method = name.removeprefix("wide ").split()
    kind = " ".join(kind)
    k, d = (20, 13) if name.startswith("wide") else (13, 20)
    if layer_class := {"LoRA": LoRALinear, "DoRA": DoRALinear, "Dense": Dense}.get(kind):
        module, shape = build(layer_class, k, d, bias=False, dtype=dtype), (k,)
    elif method in ("update", "merged"):
        module, shape = mora_layer(kind, k, d, bias=False, dtype=dtype), (k,)
    else:
        module = operator(kind, k, d)
        shape = [module.n_rows, 4] if hasattr(module, "n_rows") else [4]
        if method == "compress":
            shape = (k,)
        elif kind in OWN:
            shape = module.compress(torch.zeros(k)).shape
    call = merged if method == "merged" else lambda module, x: getattr(module, method)(x)
    return module, call, shape

@every_map(without="merged")  # which takes (tokens, k)
def test_any_number_of_dimensions(name):
    module, f, shape = linear_map(name)
    x = randn(2, 3, 2, *shape)
    y = f(module, x)
    assert_close(f(module, x[1, 2, 0]), y[1, 2, 0], "one vector alone, and in a batch (2, 3, 2)")
    assert_close(f(module, x[1]), y[1], "a batch (3, 2), and the same in a batch (2, 3, 2)")
    assert_close(f(module, x[1, 2, :1]), y[1, 2, :1], "a batch (1,), and in a batch (2, 3, 2)")
    assert_close(f(module, x[:, :0]), y[:, :0], "an empty batch (2, 0, 2)")

@every_map()
def test_the_type_of_x(name):
    for dtype, tol in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        module, f, shape = linear_map(name, dtype)
        x, exact = randn(3, *shape).to(dtype), copy.deepcopy(module).double()
        y = f(module, x)
        assert y.dtype == dtype, f"x is {dtype}, the result {y.dtype}: bring the rest to x's type"
        expected = f(exact, x.double()).double()
        assert_close(y.double(), expected, f"{dtype}, compared with float64", tol)
    module, f, shape = linear_map(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = f(module, torch.randn(3, *shape)).dtype
    if not name.endswith("compress"):
        assert got == torch.bfloat16, f"under autocast to bfloat16 nn.Linear gives that, this {got}"

@every_map()
def test_x_is_unchanged(name):
    module, f, shape = linear_map(name)
    x = randn(6, *shape)
    before, y = x.clone(), f(module, x).clone()
    assert torch.equal(x, before), "x itself was changed, and the caller still needs it"
    assert_close(f(module, x), y, "the same x a second time")

@every_map()
def test_the_gradient_of_x(name):
    module, f, shape = linear_map(name)
    x, units = randn(6, *shape).requires_grad_(), torch.eye(math.prod(shape)).double()
    matrix = f(module, units.unflatten(1, shape)).detach().flatten(1)
    y = f(module, x).flatten(1)
    what = "the map is linear, so that of x is the sum of x[i] times that of the i-th unit vector"
    assert_same(y, x.flatten(1) @ matrix, {"x": x}, what)

@every_map()
def test_any_device(name):
    module, f, shape = linear_map(name)
    x = randn(6, *shape)
    check_device(module, lambda module: f(module, x.to("meta")), f(module, x).shape)

def repeated(o, i, j):
    n = o.n_rows * o.size
    return j % o.out_features == i if o.fold and n > o.out_features else i % n == j

VALUES = {  # whether the map's matrix has a 1 at (i, j), and what to say if it has not
    "truncation compress": (lambda o, i, j: i == j, "the first r̂ inputs"),
    "truncation decompress": (lambda o, i, j: i == j, "the first r̂ outputs, then zeros"),
    "sharing compress": (lambda o, i, j: o.in_group[j] == i, "the sum of each group's inputs"),
    "sharing decompress": (lambda o, i, j: o.out_group[i] == j, "output i is z[out_group[i]]"),
    "decoupling compress": (lambda o, i, j: i == j, "input j at place j % r̂ of row j // r̂"),
    "decoupling decompress": (repeated, "the rows side by side, repeated, cut or folded"),
}

@every_map(6, 7, 9, 10)
def test_the_values_of(name):
    *kind, method = name.removeprefix("wide ").split()
    entry, hint = VALUES[f"{kind[0]} {method}"]
    for k, d, size in SHAPES:
        o = operator(" ".join(kind), k, d, size)
        rows = [o.n_rows, size] if kind[0] == "decoupling" else [size]
        before, after = ([k], rows) if method == "compress" else (rows, [d])
        n_in, n_out = math.prod(before), math.prod(after)
        matrix = [[float(entry(o, i, j)) for j in range(n_in)] for i in range(n_out)]
        x = randn(2, 3, *before)
        expected = x.flatten(2) @ torch.tensor(matrix).to(x).T
        what = f"{hint}; here k = {k}, d = {d}, r̂ = {size} ({' '.join(kind)})"
        assert_close(getattr(o, method)(x), expected.unflatten(-1, after), what)

@mark.ex8
class TestAssign:
    def test_another_kind_is_refused(self):
        with pytest.raises(ValueError):
            operator("sharing", 6, 6, 3).assign(6, "even", None)
    @mark.parametrize("kind", ["strided", "contiguous", "random"])
    def test_groups(self, kind):
        for features, size in [(12, 3), (7, 3), (13, 5), (31, 4), (5, 5), (4, 1), (82, 2)]:
            group = operator("sharing", features, features, size).assign(features, kind, None)
            what, got = f"{features} indices in {size} {kind} groups", group.tolist()
            found = tuple(group.shape), group.dtype
            assert found == ((features,), torch.long), f"{what}: shape and type are {found}"
            assert {*got} == {*range(size)}, f"{what}: their numbers are 0 to {size - 1}, got {got}"
            lengths = [got.count(i) for i in range(size)]
            fair = max(lengths) - min(lengths) <= 1
            assert fair, f"{what}: lengths differ by one at most, got {lengths}"
            expected = [i % size for i in range(features)] if kind == "strided" else sorted(got)
            right = kind == "random" or got == expected
            assert right, f"{what}: expected {expected}, got {got}"

    @mark.detail
    def test_random_groups_are_drawn_from_the_generator(self):
        o = operator("sharing", 31, 31)
        check_draws(lambda a: o.assign(31, "random", a), "random groups")

    @mark.parametrize("features, size", [(12, 3), (14, 4)])
    def test_random_groups_are_random(self, features, size):
        o, a = operator("sharing", features, features, size), generator(0)
        groups = torch.stack([o.assign(features, "random", a) for _ in range(600)])
        pairs = (groups[:, :, None] == groups[:, None]).double().mean(0)
        pairs = pairs[torch.ones(features, features).triu(1).bool()]
        what = f"600 draws of {size} groups of {features} indices"
        assert pairs.max() - pairs.min() < 0.2, (
            f"{what}: any two indices should be together equally often, but the shares of all "
            f"pairs go from {pairs.min():.0%} to {pairs.max():.0%}"
        )
        first = (groups == 0).double().mean(0)
        assert first.max() - first.min() < 0.2, (
            f"{what}: each index should be in group 0 equally often, but {first.argmax()} is in "
            f"{first.max():.0%} of them, {first.argmin()} in {first.min():.0%}"
        )

@mark.ex11
class TestRotation:
    @mark.parametrize("k, size", [(8, 2), (20, 4), (13, 6), (5, 1), (60, 20), (400, 8)])
    def test_row_i_turns_by_i_times_theta(self, k, size):
        o, x = operator("rotation", k, k, size), randn(2, 3, k)
        rows = F.pad(x, (0, -k % size)).unflatten(-1, (-1, size)).unbind(-2)
        turned = [row @ rotation_matrix(size, i).T for i, row in enumerate(rows)]
        hint = f"{len(rows)} rows of {size}: row 0 stays, row i turns by i θ_j"
        assert_close(o.compress(x), torch.stack(turned, dim=-2), hint, tol=1e-5)

    @mark.detail
    def test_angles_in_bfloat16(self):
        o, ones = operator("rotation", 4000, 4000, 40), torch.ones(4000)
        got, expected = o.compress(ones.bfloat16()).float(), o.compress(ones)
        hint = "100 rows of ones in bfloat16, whose angles must be float32 at least"
        assert_close(got, expected, hint, tol=0.03)

@mark.ex12
class TestUpdate:
    @mark.parametrize("name", VARIANTS)
    def test_it_is_eq_2(self, name):
        for (k, d), start in itertools.product([(13, 20), (20, 13), (12, 12)], ("random", "zero")):
            layer, x = mora_layer(name, k, d), randn(2, 3, k).requires_grad_()
            layer.M.data *= start == "random"  # it starts at zero
            expected = x @ mora_delta(name.split()[0], layer.operator, layer.M).T
            hint = f"decompress(M compress(x)), {k} to {d}, M {start}"
            assert_same(layer.update(x), expected, {"M": layer.M, "x": x}, hint, tol=1e-5)

@mark.ex14
class TestMergedForward:
    @mark.parametrize("name", VARIANTS)
    def test_outputs_and_gradients(self, name):
        for k, d in [(13, 20), (20, 13), (12, 12), (26, 6)]:
            for start, needs in itertools.product(("random", "zero"), ("xM", "M")):
                layer, x = mora_layer(name, k, d), randn(6, k).requires_grad_("x" in needs)
                layer.M.data *= start == "random"
                inputs = {"M": layer.M} | ({"x": x} if "x" in needs else {})
                expected = layer.linear(x) + layer.update(x)
                what = f"W0 x + ΔW x + bias, {k} to {d}, M {start}, where {needs} need gradients"
                assert_same(merged(layer, x), expected, inputs, what)

    @mark.detail
    @mark.parametrize("name", ["sharing", "rotation"])
    def test_a_layer_that_is_used_twice(self, name):
        layer, a, b = mora_layer(name, 13, 13), randn(6, 13).requires_grad_(), randn(6, 13)
        expected = [layer.linear(x) + layer.update(x) for x in (a, b)]
        y = [merged(layer, x) for x in (a, b)]
        what = "two calls, then one backward pass: what is kept belongs to ctx, not to the operator"
        assert_same(torch.cat(y), torch.cat(expected), {"M": layer.M, "a": a}, what)

    @mark.parametrize("name", ["truncation", "sharing", "decoupling", "rotation"])
    def test_its_cost(self, name):
        layer, x, kept = build(MoRALinear, 64, 48, 8, operator="truncation"), randn(500, 64), {}
        layer.operator = operator(name, 64, 48, 8)

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = merged(layer, x.requires_grad_())
        for tensor in tree_leaves(vars(y.grad_fn)):  # what ctx has as an attribute
            if isinstance(tensor, torch.Tensor):
                pack(tensor)
        for tensor in (layer.M, layer.linear.weight):  # which exist anyway
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        z = layer.operator.compress(x).numel()
        assert sum(kept.values()) <= z + 64, (
            f"{sum(kept.values()):,} numbers are kept for the backward pass beside M and W0, and "
            f"{z:,} would do: keep compress(x) and no view of x, and build W0 + ΔW again"
        )
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        times = counter.get_total_flops() / (2 * 500 * 64 * 48)
        assert times < 1.5, (
            f"the backward pass takes {times:.2f} times the FLOPs of the product that x's gradient "
            "needs. M's needs few more; the gradient of ΔW (d, k) would take as many again"
        )

    @mark.detail
    def test_under_autocast(self):
        layer = mora_layer("rotation", 13, 20, dtype=torch.float32)
        inputs = {"x": torch.randn(6, 13, requires_grad=True), "M": layer.M}
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer.linear(inputs["x"]) + layer.update(inputs["x"])
            y = merged(layer, inputs["x"])
        assert_same(y, expected, inputs, "under autocast", tol=0.03)

    @mark.detail
    def test_extra_flops(self):
        for tokens, k, d, r in [(100, 30, 50, 2), (7, 50, 30, 4)]:
            x, g, z = torch.randn(tokens, k), torch.randn(tokens, d), torch.randn(tokens, r)
            A, B = torch.randn(r, k), torch.randn(d, r)
            with FlopCounterMode(display=False) as defined:
                (x @ A.T) @ B.T, (g @ B) @ A, g.T @ z, z.T @ x  # forward; gradients of x, B, A
            with FlopCounterMode(display=False) as in_one:
                B @ A, B @ A, g.T @ (x @ A.T), (g @ B).T @ x  # ΔW twice; gradients of B, A
            expected = defined.get_total_flops(), in_one.get_total_flops()
            got = measure.extra_flops(tokens, k, d, r)
            what = f"{tokens} tokens, {k} to {d}, r = {r}"
            assert got == expected, f"{what}: expected {expected}, got {got}"

# ---- An operator of your own ---------------------------------------------------------------------
def layers(name):
    """Layers with M at random, of some shapes and ranks, and x of few and of many tokens."""
    for k, d, rank, tokens in [(13, 22, 3, 99), (22, 13, 1, 99), (22, 13, 3, 2), (12, 12, 3, 99)]:
        layer = randomise(FastMoRALinear(nn.Linear(k, d, dtype=torch.float64), rank, name))
        yield f"{k} inputs, {d} outputs, rank {rank}, {tokens} tokens", layer, randn(tokens, k)

@mark.ex24
@mark.parametrize("name", OWN)
class TestOwnOperator:
    def test_it_is_new(self, name):
        for what, layer, _ in layers(name):
            mine = layer.delta_weight()
            for known in ("truncation", "sharing", "decoupling", "rotation"):
                layer.operator = OPERATORS[known](layer.in_features, layer.out_features, layer.size)
                same = torch.allclose(mine, layer.delta_weight())
                assert not same, f"{what}: this is {known} by another name"

    def test_it_merges_exactly(self, name):
        for what, layer, x in layers(name):
            size = layer.operator.compress(x).shape[-1]
            right = size == layer.size
            assert right, f"{what}: compress must end in {layer.size} numbers, got {size}"
            assert layer.delta_weight().any(), f"{what}: ΔW is zero, although M is random"
            plain = layer.merge()
            for training in (True, False):
                y = layer.train(training)(x)
                assert_close(plain(x), y, f"{what}: merge() and the layer, training {training}")

    @mark.detail
    def test_it_keeps_the_budget(self, name):
        for what, layer, _ in layers(name):
            own = {name: p.numel() for name, p in layer.named_parameters() if p.requires_grad}
            right = own == {"M": layer.size**2}
            assert right, f"{what}: M is the only parameter, {layer.size**2} numbers; got {own}"

    def test_M_learns(self, name):
        for what, layer, x in layers(name):
            target, direction = randn(len(x), layer.out_features), torch.randn_like(layer.M)
            for start in (1, 0):
                layer.M.data *= start
                loss = (layer(x) * target).sum()
                gradient = gradients(loss, {"M": layer.M}, None, what)["M"]
                layer.M.data += direction
                difference = ((layer(x) * target).sum() - loss).detach()
                got, hint = (gradient * direction).sum(), f"{what}: the gradient of M"
                assert_close(got, difference, hint, tol=1e-8)

    @mark.detail
    def test_it_is_saved(self, name):
        for what, layer, x in layers(name):
            other = copy.deepcopy(layer)  # with other random numbers, if the operator draws any
            other.operator = OPERATORS[name](layer.in_features, layer.out_features, layer.size)
            state = mora.adapter_state_dict(nn.Sequential(layer))
            mora.load_adapters(nn.Sequential(other), state)
            hint = f"{what}: a loaded adapter must compute what the saved one did; what is drawn "
            assert_close(other(x), layer(x), hint + "at random must be a registered buffer")
