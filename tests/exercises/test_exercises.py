"""The graders of EXERCISES.md, in its order: `python tests/exercise.py --grade 5` grades exercise 5.

Each exercise is graded by what EXERCISES.md asks, against a slow second statement of it, and whatever comes after it
may be missing. A test is one claim, so that marks mean something. Nothing here looks at how the code does it. What
every linear map owes, and the exercises that ask for nothing else, are in test_linear_maps.py.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx, mark
from torch import nn

import compare
import data
import measure
import mora
import train
from mora import DoRALinear, LoRALinear, MoRALinear
from test_linear_maps import (Dense, assert_close, build, check_draws, generator, gradients, in_place, operator,
                              outer, randn, randomise)


# ---- LoRA, and what every adapter does -------------------------------------------------------------------------------
@mark.ex1
class TestLoRA:
    def test_it_begins_as_zero(self):
        layer = build(LoRALinear, 400, 3, 4, dropout=0.25)
        got = [*layer.A.shape], [*layer.B.shape]
        assert got == ([4, 400], [3, 4]), f"A is r x k and B is d x r: expected [4, 400] and [3, 4], got {got}"
        assert layer.A.any(), "A begins at random: if A and B are both zero, neither has a gradient, ever"
        assert not layer.B.any(), "B begins at zero, so that ΔW is zero and training begins from the model as it is"
        assert layer.dropout.p == 0.25, f"dropout=0.25 is for Adapter's __init__; the layer has {layer.dropout.p}"

    def test_A_is_uniform(self):
        layer = build(LoRALinear, 400, 8, 8)
        for what, A in (("A", layer.A), ("random_A()", layer.random_A())):
            most, deviation = A.abs().max(), A.std()
            assert 0.049 < most <= 0.05, f"{what} lies within 1 / sqrt(400) = 0.05, got {most:.4g} at most"
            assert abs(deviation - 0.0289) < 0.002, f"{what}: uniform numbers deviate by 0.0289, got {deviation:.4g}"

    @mark.parametrize("train_A, expected", [(True, {"A", "B"}), (False, {"B"})])
    def test_what_trains_and_in_what_type(self, train_A, expected):
        for dtype, own in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            layer = build(LoRALinear, 13, 20, dtype=dtype, train_A=train_A)
            trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
            assert trains == expected, f"with train_A={train_A}, expected {expected} to train, got {trains}"
            assert "A" in dict(layer.named_parameters()), "A is a parameter of the layer, also where it does not train"
            got = {layer.A.dtype, layer.B.dtype}
            assert got == {own}, f"for a {dtype} layer A and B are {own}, got {got}"
        with torch.device("meta"):
            layer = build(LoRALinear, 13, 20, train_A=train_A)
        assert layer.A.is_meta and layer.B.is_meta, "A and B are made on the device of W0"
        a, b = generator(1), generator(1)
        layer.random_A(a), build(LoRALinear, 13, 20).random_A(b)
        assert a.get_state().equal(b.get_state()), (
            "random_A draws on the CPU, also where W0 is elsewhere, so that every device gets the same; here W0 is on "
            "meta, and expected the generator to move on as it does where W0 is on the CPU; it did not: device='cpu'?")

    @mark.parametrize("options, factor", [({}, 2), ({"alpha": 3}, 0.75), ({"alpha": 0}, 0),
                                          ({"alpha": 3, "rslora": True}, 1.5), ({"rslora": True}, 4)])
    def test_the_update_is_scaled(self, options, factor):
        layer = randomise(build(LoRALinear, 7, 5, 4, dropout=0.9, **options)).train()  # dropout is for forward
        got = layer.update(torch.eye(7, dtype=torch.float64)).T
        assert_close(got, factor * layer.B @ layer.A, f"with {options} at r = 4, ΔW is {factor} B A")
        assert layer.scaling == factor, f"with {options} at r = 4, expected self.scaling {factor}, got {layer.scaling}"

    def test_A_and_B_learn(self):
        layer, x, upstream = randomise(build(LoRALinear, 13, 20)), randn(2, 3, 13), randn(2, 3, 20)
        found = gradients(layer.update(x), {"A": layer.A, "B": layer.B}, upstream, "update")
        assert_close(found["A"], 2 * layer.B.T @ outer(upstream, x), "the gradient of A")
        assert_close(found["B"], 2 * outer(upstream, x) @ layer.A.T, "the gradient of B")

    @mark.parametrize("train_A", [True, False])
    def test_reset(self, train_A):
        layer = randomise(build(LoRALinear, 13, 20, train_A=train_A))
        with in_place(layer, "A", "B"):
            layer.reset(generator(1))
        assert not layer.B.any(), "reset() makes B zero again"
        expected, got = (train_A, True), (layer.A.requires_grad, layer.B.requires_grad)
        assert got == expected, f"after reset() (A, B) train as before: expected {expected}, got {got}"
        assert_close(layer.A, layer.random_A(generator(1)), "reset(generator) draws A anew, from the generator")
        check_draws(lambda a: layer.random_A(a).clone(), "random_A")
        check_draws(lambda a: (layer.reset(a), layer.A.detach().clone())[1], "reset")


@mark.ex2
class TestForward:
    @mark.parametrize("bias", [True, False])
    def test_it_adds_the_update(self, bias):
        layer, x, upstream = randomise(build(Dense, 5, 7, bias=bias)), randn(2, 3, 5), randn(2, 3, 7)
        expected = x @ (layer.linear.weight + layer.W).T + (layer.linear.bias if bias else 0)
        for training in (True, False):
            y = layer.train(training)(x)
            assert_close(y, expected, f"W0 x + bias + ΔW x, training = {training}")
            assert_close(gradients(y, {"W": layer.W}, upstream, "W")["W"], outer(upstream, x), "the gradient of ΔW")

    def test_dropout_is_for_the_update_only(self):
        layer, x = randomise(build(Dense, 5, 7, dropout=1.0)), randn(2, 3, 5)
        frozen = x @ layer.linear.weight.T + layer.linear.bias
        assert_close(layer.train()(x), frozen, "with all of the update's input dropped, the frozen output is left")
        assert_close(layer.eval()(x), frozen + x @ layer.W.T, "eval() knows no dropout")

    def test_dropout_drops_inputs_and_once(self):
        layer, x = randomise(build(Dense, 5, 7, dropout=0.5)).train(), torch.eye(5).double().repeat(100, 1)
        y = layer(x) - layer.linear(x)  # of an input that is 1: nothing at all, or twice its column of ΔW
        kept = y.abs().sum(1) > 1e-9
        assert_close(y[kept], 2 * x[kept] @ layer.W.T, "what is kept of the update's input is doubled at p = 0.5")
        assert 180 < kept.sum() < 320, f"at p = 0.5 about 250 of 500 inputs are kept, got {int(kept.sum())}"


@mark.ex3
class TestDeltaWeight:
    def test_it_is_the_updates_matrix(self):
        for (k, d), training in itertools.product([(5, 7), (7, 5), (6, 6)], (True, False)):
            layer = randomise(build(Dense, k, d, dropout=1.0)).train(training)
            hint = f"ΔW of {k} inputs and {d} outputs, without W0, bias and dropout, training = {training}"
            assert_close(layer.delta_weight(), layer.W, hint)
            upstream = randn(d, k)
            found = gradients(layer.delta_weight(), {"W": layer.W}, upstream, "delta_weight")["W"]
            assert_close(found, upstream, f"the gradient that reaches W through delta_weight(), {k} to {d}")
            assert layer.training == layer.dropout.training == training, "the mode of the layer was changed"

    @mark.parametrize("autocast", [False, True])
    def test_it_is_not_rounded(self, autocast):
        layer = randomise(build(Dense, 5, 7, dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert_close(layer.delta_weight(), layer.W, "ΔW of a bfloat16 layer, in float32", tol=0)


@mark.ex4
class TestMerging:
    @mark.parametrize("bias", [True, False])
    def test_merge_makes_a_plain_layer(self, bias):
        layer, x = randomise(build(Dense, 5, 7, bias=bias, dropout=1.0)).train(), randn(2, 3, 5)
        plain = layer.merge()
        assert type(plain) is nn.Linear, f"an nn.Linear is wanted, got {type(plain).__name__}"
        assert layer.training and layer.dropout.training, "the layer trained before merge(), and does not after it"
        got = plain.in_features, plain.out_features
        assert got == (5, 7), f"(in_features, out_features) of the merged layer: expected (5, 7), as of W0, got {got}"
        assert (plain.bias is not None) == bias, f"with bias={bias}, the merged layer has {plain.bias}"
        expected = x @ (layer.linear.weight + layer.W).T + (layer.linear.bias if bias else 0)
        assert_close(plain(x), expected, "the merged layer computes W0 x + ΔW x, and the bias if there is one")
        trains = [name for name, parameter in plain.named_parameters() if parameter.requires_grad]
        assert not trains, f"the merged layer is frozen, as W0 is; here {trains} would train"

    def test_merge_shares_nothing_with_the_layer(self):
        layer = randomise(build(Dense, 5, 7))
        before = copy.deepcopy(layer.state_dict())
        for parameter in layer.merge().parameters():
            parameter.data.fill_(9)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]), f"merge() changed {name} of the layer, or shares its memory"

    @mark.parametrize("autocast", [False, True])
    def test_the_sum_is_rounded_once(self, autocast):
        layer = randomise(build(Dense, 40, 30, dtype=torch.bfloat16))
        layer.W.data.mul_(0.01)
        expected = (layer.linear.weight.float() + layer.W).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for got in (layer.merged_weight(), layer.merge().weight):
                assert_close(got, expected, "W0 and ΔW are added in float32, and the sum is rounded once", tol=0)
        found = gradients(layer.merged_weight(), {"W": layer.W}, expected, "merged_weight")["W"]
        assert_close(found, expected.float(), "the gradient that reaches W through merged_weight()", tol=0)


# ---- MoRA ------------------------------------------------------------------------------------------------------------
@mark.ex5
class TestSquareSize:
    def test_it_is_the_largest_within_the_budget(self):
        got, hint = mora.square_size(768, 768, 8), "sqrt((768 + 768) 8) = 110.85 is rounded down, or M would have more"
        assert got == 110 and isinstance(got, int), f"{hint} parameters than LoRA; got {got!r}"
        for k, d, r in itertools.product(range(1, 40, 3), range(1, 40, 3), (1, 2, 3, 7, 8, 50)):
            got, most = mora.square_size(k, d, r), min(k, d)
            while most**2 > (k + d) * r:
                most -= 1
            assert got == most, f"k = {k}, d = {d}, r = {r}, (k + d) r = {(k + d) * r}: expected {most}, got {got}"

    @mark.parametrize("k, d, r, expected", [(96, 96, 3, 24), (514, 514, 256, 512), (5120, 11008, 741, 3456)])
    def test_it_is_exact(self, k, d, r, expected):
        got = mora.square_size(k, d, r)
        assert got == expected, f"k = {k}, d = {d}, r = {r}: expected {expected}, got {got}; roots of floats err"

    @mark.parametrize("rank", [0, -1, 1.5, None, "8"])
    def test_what_is_no_rank_is_refused(self, rank):
        with contextlib.suppress(ValueError):
            pytest.fail(f"square_size(8, 8, {rank!r}) is to raise a ValueError; got {mora.square_size(8, 8, rank)}")


# ---- DoRA ------------------------------------------------------------------------------------------------------------
def dora_formula(layer, x, dropped):
    """magnitude · V x / ‖V‖ + bias, where the length of V's rows counts as a constant; V = W0 + (alpha / r) B A."""
    W, BA = layer.linear.weight, 2 * layer.B @ layer.A
    y = layer.magnitude / (W + BA).norm(dim=1).detach() * (x @ W.T + dropped @ BA.T)
    return y if layer.linear.bias is None else y + layer.linear.bias


@mark.ex13
class TestDoRA:
    def test_it_is_the_formula(self):
        layer, x, upstream = randomise(build(DoRALinear, 5, 8)), randn(2, 5).requires_grad_(), randn(2, 8)
        assert_close(layer.direction(), layer.linear.weight + 2 * layer.B @ layer.A, "direction() is V")
        y, expected = layer(x), dora_formula(layer, x, x)
        assert_close(y, expected, "the outputs")
        inputs = {"x": x, "A": layer.A, "B": layer.B, "magnitude": layer.magnitude}
        found, wanted = (gradients(outputs, inputs, upstream, "forward") for outputs in (y, expected))
        for name in inputs:
            assert_close(found[name], wanted[name], f"the gradient of {name}; V's lengths count as constants")

    def test_it_drops_only_what_goes_through_A_and_B(self):
        layer, x = randomise(build(DoRALinear, 5, 8, dropout=1.0)), randn(2, 3, 5)
        expected = dora_formula(layer, x, 0 * x)
        assert_close(layer.train()(x), expected, "with B A's input dropped, W0 x is left, scaled as before")
        assert_close(layer.eval()(x), dora_formula(layer, x, x), "eval() knows no dropout")

    @mark.parametrize("bias", [True, False])
    def test_it_merges(self, bias):
        layer, x = randomise(build(DoRALinear, 5, 8, bias=bias)), randn(2, 3, 5)
        V = layer.linear.weight + 2 * layer.B @ layer.A
        expected = layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach() - layer.linear.weight
        assert_close(layer.delta_weight(), expected, "ΔW is magnitude · V / ‖V‖ - W0")
        inputs, upstream = {"A": layer.A, "B": layer.B, "magnitude": layer.magnitude}, randn(8, 5)
        found, wanted = (gradients(dW, inputs, upstream, "delta_weight") for dW in (layer.delta_weight(), expected))
        for name in inputs:
            assert_close(found[name], wanted[name], f"the gradient of {name} in delta_weight(); lengths are constants")
        assert_close(layer.merge()(x), layer(x), "merge() computes what the layer computes")

    def test_reset(self):
        layer = randomise(build(DoRALinear, 5, 8))
        with in_place(layer, "A", "B", "magnitude"):
            layer.reset(generator(1))
        assert_close(layer.magnitude, layer.linear.weight.norm(dim=1), "magnitude after reset()")
        assert_close(layer.delta_weight(), 0 * layer.linear.weight, "ΔW after reset()")
        assert_close(layer.A, layer.random_A(generator(1)), "reset(generator) draws A anew, from the generator")

    @mark.parametrize("autocast", [False, True])
    def test_in_bfloat16_and_with_a_row_of_zeros(self, autocast):
        layer, x = randomise(build(DoRALinear, 5, 8, dtype=torch.bfloat16)), torch.ones(2, 5, dtype=torch.bfloat16)
        layer.linear.weight.data[3], layer.B.data[3] = 0, 0
        V = layer.linear.weight.float() + 2 * layer.B @ layer.A
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            lengths, delta, y = layer.row_lengths(), layer.delta_weight(), layer(x)
        assert_close(lengths, V.norm(dim=1), "the lengths of V's rows, in float32", tol=1e-6)
        scale = layer.magnitude / V.norm(dim=1).clamp_min(1e-30)
        expected = scale[:, None] * V - layer.linear.weight.float()
        assert_close(delta, expected, "ΔW, calculated in float32 to the end", tol=1e-6)
        got = delta.dtype, y.dtype
        assert got == (torch.float32, torch.bfloat16), (
            f"of a bfloat16 layer ΔW is float32, to be rounded once, and the outputs are bfloat16, as x is; got {got}")
        assert y.isfinite().all() and delta.isfinite().all(), "where a row of V is zero, 0 / 0 is not to come of it"
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            y = layer.float()(x.float())
        assert y.isfinite().all(), "where a row of V is zero, 0 / 0 is not to come of it: float16 has no 1e-30"


# ---- Training --------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Two blocks, nested as a GPT's are."""

    def __init__(self):
        super().__init__()
        layers = {"norm": nn.LayerNorm(6), "up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}
        self.blocks = nn.ModuleList(nn.ModuleDict(copy.deepcopy(layers)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](block["norm"](x))))
        return x


def net(method, dtype=torch.float64):
    """A Net with adapters at random, whose norms train as well; always the same."""
    torch.manual_seed(0)
    model = mora.add_adapters(Net().to(dtype), method, 2, "truncation" if method == "mora" else None)
    for module in model.modules():
        module.fast = False
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    return randomise(model)


def take_a_step(model, optimizer, step):
    """How far each parameter moves, with gradients that depend on the step only."""
    before, a = {name: p.detach().clone() for name, p in model.named_parameters()}, generator(step)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.rand(parameter.shape, generator=a).to(parameter) + (-1.5 if step == 5 else 1)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def trained(method):  # a model and its optimizer after five steps
    model, groups = net(method), ([], [], [])
    for name, parameter in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        groups["norm" in name or 2 * name.endswith(".B")].append(parameter)
    groups = [{"params": some, "lr": rate} for some, rate in zip(groups, (0.1, 0.01, 0.1)) if some]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(5):
        take_a_step(model, optimizer, step)
    return model, optimizer


every_method = mark.parametrize("method", ["lora", "asylora", "dora", "mora"])


@mark.ex15
class TestMergeAndReset:
    @every_method
    def test_the_model_computes_the_same_before_and_after(self, method):
        model, x = net(method), randn(4, 6)
        y, before = model(x), {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
        with contextlib.ExitStack() as stack:
            for adapter in mora.find_adapters(model).values():
                own = (name for name, _ in adapter.named_parameters(recurse=False))
                stack.enter_context(in_place(adapter, "linear.weight", *own))
            mora.merge_and_reset(model)
        assert_close(model(x), y, "ΔW moves into W0, so the outputs stay", tol=1e-9)
        for name, adapter in mora.find_adapters(model).items():
            assert_close(adapter.delta_weight(), 0 * adapter.linear.weight, f"ΔW of {name}, now zero", tol=1e-9)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == before[name][1], f"requires_grad of {name} was {before[name][1]}"
            kept = "norm" not in name and "bias" not in name or torch.equal(parameter, before[name][0])
            assert kept, f"{name} belongs to no update, and was changed"

    def test_the_sum_is_rounded_once(self):
        model = net("mora", torch.bfloat16)
        for step, (name, adapter) in itertools.product(range(3), mora.find_adapters(model).items()):
            nn.init.normal_(adapter.M, std=0.01)
            expected = (adapter.linear.weight.float() + adapter.delta_weight()).bfloat16()
            mora.merge_and_reset(model)
            assert_close(adapter.linear.weight, expected, f"{name}: add in float32, and round the sum once", tol=0)

    def test_moras_reset(self):
        layer, a, given = randomise(MoRALinear(nn.Linear(8, 8), 1, "truncation")), generator(3), []
        layer.operator.regroup = lambda generator=None: given.append(generator)
        with in_place(layer, "M"):
            layer.reset(a)
        assert not layer.M.any(), "M becomes zero"
        assert given == [a], f"the operator's regroup() is called once, with the generator; got {given}"
        mora.merge_and_reset(layer)  # a layer alone is a model, too

    @mark.parametrize("method", ["lora", "dora"])
    def test_all_adapters_draw_from_the_generator(self, method):
        model = net(method)

        def draw(a):
            mora.merge_and_reset(model, generator=a)
            return torch.stack([block["up"].A.detach() for block in model.blocks])

        check_draws(draw, "A")
        first, second = draw(generator(1))
        assert not torch.equal(first, second), "two layers drew the same A: the generator has to move on between them"

    @every_method
    def test_the_next_step_is_a_new_optimizers(self, method):
        model, optimizer = trained(method)
        optimizer.zero_grad(set_to_none=True)  # as after a step in train.py
        mora.merge_and_reset(model, optimizer, generator(0))
        other = copy.deepcopy(model)
        new = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        got, expected = take_a_step(model, optimizer, 5), take_a_step(other, new, 5)
        for name in (name for name in got if "norm" not in name):
            assert_close(got[name], expected[name], f"{name} is to move as under a new optimizer: of the old update "
                         "nothing is remembered, neither means nor the number of steps")

    @every_method
    def test_what_is_in_no_adapter_is_remembered(self, method):
        (model, optimizer), (other, old) = trained(method), trained(method)
        mora.merge_and_reset(model, optimizer, generator(0))
        got, expected = take_a_step(model, optimizer, 5), take_a_step(other, old, 5)  # the other one without a merge
        for name in (name for name in got if "norm" in name):
            assert_close(got[name], expected[name], f"{name} is in no adapter, and is to move as without the merge")
        model = net(method)
        mora.merge_and_reset(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))  # no step yet


CYCLE = [("strided", "strided"), ("contiguous", "contiguous"), ("contiguous", "strided"), ("strided", "contiguous")]
every_grouping = mark.parametrize("groups", ["strided", ("random", "strided"), ("contiguous", "random"), "random",
                                             "cycle"])


def pair(groups, turn):
    return CYCLE[turn % 4] if groups == "cycle" else (groups, groups) if isinstance(groups, str) else groups


def kinds(o):  # of its groups
    strided = [torch.arange(len(group)) % o.size for group in (o.in_group, o.out_group)]
    return tuple("strided" if group.equal(i) else "contiguous" if group.equal(i.sort().values) else "random"
                 for group, i in zip((o.in_group, o.out_group), strided))


@mark.ex16
class TestCycle:
    @every_grouping
    def test_one_pair_after_the_other(self, groups):
        o = mora.Sharing(31, 17, 4, groups)
        for turn in range(9):
            expected = pair(groups, turn)
            assert kinds(o) == expected, f"after {turn} merges (inputs, outputs) should be {expected}, got {kinds(o)}"
            step = int(o.cycle_step)
            assert step == turn, f"cycle_step grows by 1 in each regroup: after {turn} merges {turn}, got {step}"
            with in_place(o, "in_group", "out_group", "cycle_step"):
                o.regroup()

    def test_inputs_and_outputs_are_drawn_from_the_generator(self):
        o = mora.Sharing(31, 31, 4, "random")
        check_draws(lambda a: (o.regroup(a), torch.stack([o.in_group, o.out_group]))[1], "groups")
        assert not torch.equal(o.in_group, o.out_group), "inputs and outputs have the same groups: draw them one by one"

    def test_the_cycle_goes_on_after_loading(self):
        o, loaded = mora.Sharing(31, 17, 4, "cycle"), mora.Sharing(31, 17, 4, "cycle")
        o.regroup()
        loaded.load_state_dict(o.state_dict())
        for each in (o, loaded):
            each.regroup()
        assert kinds(loaded) == kinds(o), f"loaded, it goes on with {kinds(loaded)}, not {kinds(o)}: use cycle_step"

    @every_grouping
    def test_rank_bound(self, groups):
        for k, d, size in [(20, 20, 4), (8, 8, 4), (13, 20, 5), (20, 13, 3)]:
            known, total = [], 0
            for merge in range(6):
                i = [torch.randperm(n) if kind == "random" else torch.arange(n) * size // n if kind == "contiguous" else
                     torch.arange(n) for n, kind in zip((k, d), pair(groups, merge))]
                known.append(tuple(group % size for group in i))
                total += randn(size, size)[known[-1][1]][:, known[-1][0]]
                sides = [torch.cat([F.one_hot(group, size).double() for group in side], 1) for side in zip(*known)]
                expected = min(int(torch.linalg.matrix_rank(side)) for side in sides)
                got, rank, what = measure.rank_bound([*known]), torch.linalg.matrix_rank(total), f"{merge + 1} merges"
                assert got >= rank, f"{what}, {k} to {d}, r̂ = {size}: the sum has rank {rank}, above your bound {got}"
                assert got == expected, f"{what}, {k} to {d}, r̂ = {size}: the best bound is {expected}, got {got}"


@mark.ex17
@mark.parametrize("step", [1, 2, 50])
def test_adam_step_is_adams(step):
    for betas, eps, rate in [((0.9, 0.999), 1e-8, 0.1), ((0.8, 0.95), 0.5, 0.01)]:
        p, gradient, mean, square = nn.Parameter(0 * randn(5)), randn(5), randn(5), randn(5).square()
        optimizer = torch.optim.Adam([p], lr=rate, betas=betas, eps=eps)
        optimizer.state[p] = {"step": torch.tensor(step - 1.0), "exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
        p.grad, given = gradient.clone(), [each.clone() for each in (gradient, mean, square)]
        optimizer.step()
        got = measure.adam_step(gradient, mean, square, step, rate, betas, eps)
        assert_close(got, p.detach(), f"what Adam adds in step {step}, with betas {betas} and eps {eps}")
        assert all(map(torch.equal, (gradient, mean, square), given)), "gradient, mean or square was changed"


def config(**changes):
    return train.Config(**dict(method="lora", warmup_steps=4, max_steps=24, schedule="linear", device="cpu") | changes)


def assert_rates(expected, hint, first=0, **changes):
    for step, rate in enumerate(expected, first):
        got = train.schedule(step, config(**changes))
        assert got == approx(rate), f"{hint}: at step {step} expected {rate:.4f} of the peak, got {got}; {changes}"


CURVES = {"linear": lambda t: 1 - t, "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2, "constant": lambda t: 1}


@mark.ex18
class TestSchedule:
    @mark.parametrize("kind", CURVES)
    def test_without_restarts(self, kind):
        for changes in ({}, {"merge_every": 0}, {"method": "full"}, {"method": "full", "merge_every": 8}):
            rates = [0.25, 0.5, 0.75, 1] + [CURVES[kind](i / 20) for i in range(20)]
            assert_rates(rates, "four steps up, the first not at 0, then down until step 24", schedule=kind, **changes)
            rates = [CURVES[kind](i / 24) for i in range(24)]
            assert_rates(rates, "without a warm-up", schedule=kind, warmup_steps=0, **changes)

    @mark.parametrize("kind", CURVES)
    def test_after_a_merge_it_rises_back_onto_the_curve(self, kind):
        for method, every, rise in itertools.product(("remora", "relora"), (7, 8), (0, 1, 2, 5)):
            rates = [min(1, (step + 1) / 4, (step % every + 1) / max(1, rise) if step >= every else 1) *
                     CURVES[kind](max(0, step - 4) / 20) for step in range(24)]
            changes = dict(method=method, merge_every=every, restart_warmup=rise)
            assert_rates(rates, "back onto the curve", schedule=kind, **changes)

    def test_what_else_makes_it_rise(self):
        changes = dict(method="remora", warmup_steps=12, merge_every=8, restart_warmup=4)
        assert_rates([8 / 12, 1 / 4, 2 / 4, 3 / 4, 1], "a merge in the warm-up: the lower of both rises", 7, **changes)
        changes = dict(method="remora", warmup_steps=20, merge_every=8, restart_warmup=2)
        assert_rates([8 / 20, 9 / 20, 10 / 20], "a merge in the warm-up: the lower of both rises", 7, **changes)
        changes = dict(method="remora", schedule="constant", merge_every=4, restart_warmup=8)
        assert_rates([1 / 8, 2 / 8, 3 / 8, 4 / 8, 1 / 8], "a rise that the next merge cuts short", 4, **changes)
        changes = dict(method="relora", schedule="constant", full_warmup=10, merge_every=8, restart_warmup=4)
        assert_rates([0.25, 0.5, 0.75, 1, 1, 1, 0.25], "adapters begun at step 10; 8 was no restart", 10, **changes)
        changes = dict(schedule="constant", full_warmup=6, restart_warmup=4)
        assert_rates([0.25, 0.5, 0.75, 1, 1], "a full-rank warm-up: the adapters begin at step 6", 6, **changes)
        rates, changes = [0.25, 0.5, 0.25, 0.5, 0.75, 1], changes | {"merge_every": 8}
        assert_rates(rates, "adapters begun at step 6, merged before step 8", 6, **changes | {"method": "relora"})
        assert_rates([1] * 8, "the full-rank warm-up itself, under method full", 4, **changes | {"method": "full"})

    @mark.parametrize("changes, expected", [
        ({"merge_every": 8}, [8, 16]), ({"merge_every": 8, "max_steps": 25}, [8, 16, 24]), ({"merge_every": None}, []),
        ({"merge_every": 0}, []),
        ({"merge_every": 8, "full_warmup": 8}, [16]), ({"merge_every": 8, "full_warmup": 9}, [16]),
        ({"merge_every": 5, "warmup_steps": 12}, [5, 10, 15, 20])])
    def test_the_steps_before_which_adapters_restart(self, changes, expected):
        got = [step for step in range(changes.get("max_steps", 24)) if train.restarts_before(step, config(**changes))]
        assert got == expected, f"with {changes} a merge comes before the steps {expected}, and here before {got}"


def pad(rows, end=256, block_size=150, device="cpu"):
    """What `pad` makes of [(number of prompt tokens, tokens), ...]."""
    pairs = data.PromptPairs([("a", "b")], [("a", "b")], data.get_tokenizer("bytes"), block_size, 2, 0, device)
    pairs.tokenizer = types.SimpleNamespace(eot_token=end)
    rows = [(prompt, np.array(tokens, dtype=np.uint16)) for prompt, tokens in rows]
    before = copy.deepcopy(rows)
    idx, targets = pairs.pad(rows)
    same = [a == b and (x == y).all() for (a, x), (b, y) in zip(rows, before)]
    assert len(same) == len(before) and all(same), "the rows themselves were changed"
    return idx, targets


@mark.ex19
class TestMask:
    def test_a_worked_example(self):
        """"ab" asks, "cde" answers: the b is asked for c, the c for d, d for e, e for the end token, 256."""
        a, b, c, d, e, f, end, none = *b"abcdef", 256, -100
        idx, targets = (batch.tolist() for batch in pad([(2, [a, b, c, d, e, end]), (1, [f, end])], block_size=8))
        expected = [[a, b, c, d, e, end, end, end], [f] + [end] * 7]
        assert idx == expected, f"idx, all tokens but the last, filled up with the end: expected {expected}, got {idx}"
        expected = [[none, c, d, e, end, none, none, none], [end] + [none] * 7]
        assert targets == expected, f"targets, what follows, if it is answer or end: expected {expected}, got {targets}"

    @mark.parametrize("tokens, length", [(2, 64), (64, 64), (65, 64), (66, 128), (129, 128), (130, 150), (151, 150)])
    def test_the_length(self, tokens, length):
        idx, targets = pad([(1, range(2)), (1, range(1, tokens + 1))])
        assert idx.shape == targets.shape == (2, length), (
            f"{tokens} tokens, all but the last go in: expected (2, {length}), got {idx.shape} and {targets.shape}")
        expected, got = [*range(2, tokens + 1)] + [-100] * (length - tokens + 1), targets[1].tolist()
        assert got == expected, f"after a prompt of one token all others are targets: expected {expected}, got {got}"

    def test_types_and_device(self):
        idx, targets = pad([(1, [40000, 65535, 50256]), (1, [7, 50256])], end=50256)
        for what, tensor, expected in (("idx", idx, [40000, 65535, 50256]), ("targets", targets, [65535, 50256, -100])):
            got = tensor[0, :3].tolist()
            right = tensor.dtype == torch.long and got == expected
            assert right, f"{what}: expected {expected}, torch.long, got {got}, {tensor.dtype}"
        assert idx[1, 2] == 50256, f"idx is filled up with the tokenizer's end token, 50256, got {idx[1, 2]}"
        devices = [tensor.device.type for tensor in pad([(1, [5, 6, 7])], device="meta")]
        assert devices == ["meta", "meta"], f"idx and targets go to self.device, meta here; got {devices}"


# ---- Measuring -------------------------------------------------------------------------------------------------------
@mark.ex20
class TestBits:
    def test_bits_held(self):
        logits, targets, expected = randn(3, 5, 7), torch.randint(7, (3, 5)), 3 * 20.0
        targets[0, :2] = targets[2] = -100
        for i, j in (targets != -100).nonzero().tolist():
            expected += math.log2(logits[i, j].softmax(0)[targets[i, j]])
        got = measure.bits_held(logits, targets, 20.0)
        assert isinstance(got, float), f"a float is wanted, got {type(got).__name__}"
        assert got == approx(expected), f"3 rows of 20 bits, less cross entropy: expected {expected}, got {got}"

    @mark.parametrize("who, sure, expected", [("guesses", 0.0, 0), ("knows", 99.0, 488), ("is wrong", -30.0, -5354)])
    def test_the_bits_of_one_who(self, who, sure, expected):
        """Four values of 31 digits, of which 30 are any of 16 and one is one of four: 122 bits each, as in a UUID."""
        targets, logits = torch.randint(16, (4, 31)), torch.full((4, 31, 20), -1e4)
        targets[:, 30] %= 4
        logits[:, :30, :16] = logits[:, 30:, :4] = 0
        logits.scatter_(2, targets[..., None], sure)
        before = logits.clone()
        for dtype in (torch.float32, torch.bfloat16):
            got = measure.bits_held(logits.to(dtype), targets, 122)
            assert got == approx(expected, 1e-3, 0.01), f"one who {who} holds {expected} bits, got {got} ({dtype})"
        assert torch.equal(logits, before), "the logits were changed"


def with_singular_values(values, rows=8, columns=6):
    U, V = (torch.linalg.qr(randn(n, len(values)))[0] for n in (rows, columns))
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


@mark.ex21
class TestSpectrum:
    @mark.parametrize("which, name", [*enumerate(["rank", "effective rank", "stable rank"])])
    def test_known_ones(self, which, name):
        known = {(5.0,) * 4: (4, 4, 4), (3.0, 1.0): (2, 4 / 3**0.75, 10 / 9), (7.0,): (1, 1, 1), (0.0, 0.0): (0, 0, 0),
                 (1.0, 1e-9): (2, 1, 1), (1.0, 1e-20): (1, 1, 1)}
        for (values, expected), scale in itertools.product(known.items(), (1, 1e-9)):
            for update in (scale * with_singular_values([*values]), scale * with_singular_values([*values], 6, 8)):
                got = measure.spectrum(update)
                assert [*map(type, got)] == [float] * 3, f"three floats are wanted, got {got}"
                assert got[which] == approx(expected[which], rel=1e-5), (
                    f"{name} of {values} times {scale:g}: expected {expected[which]:.6g}, got {got[which]:.6g}")

    def test_directions_of_exactly_zero(self):
        got, expected = measure.spectrum(torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))), (2, 4 / 3**0.75, 10 / 9)
        assert got == approx(expected, rel=1e-5), f"for s = 3, 1, 0, 0 expected {expected}, got {got}: 0 log 0"

    def test_the_rank_is_not_that_of_rounding(self):
        got = measure.spectrum(with_singular_values([3.0, 2.0, 1.0], 60, 50).float())[0]
        assert got == 3, f"a matrix of rank 3 in float32: got {got:g}; which s are above max s · max(shape) · eps?"
        for shape, scale in itertools.product(((3, 300), (300, 3)), (1, 1e-14)):
            matrix = torch.zeros(*shape, dtype=torch.float64)
            matrix[:3, :3] = scale * torch.diag(torch.tensor([1, 1e-13, 3e-14]))  # max(shape) · eps is 6.7e-14
            got = measure.spectrum(matrix)[0]
            assert got == 2, f"{shape}, s = {scale:g} times 1, 1e-13 and 3e-14: the rank is 2, got {got:g}"


@mark.ex22
class TestRounding:
    def test_it_goes_to_a_neighbour(self):
        x = torch.cat([torch.randn(500), torch.randn(500) * 1e-6, torch.randn(500) * 1e30])
        got, step = measure.round_randomly(x), 2.0 ** (torch.frexp(x)[1].double() - 8)  # between neighbours in bfloat16
        what = got.dtype, tuple(got.shape)
        assert what == (torch.bfloat16, (1500,)), f"expected bfloat16 of x's shape, (1500,), got {what}"
        error, nearest = (got.double() - x.double()).abs(), (x.bfloat16().double() - x.double()).abs()
        worst = int((error / step).argmax())
        assert (error < step).all(), f"{x[worst]:.6g} becomes {got[worst]:.6g}, which is none of its two neighbours"
        assert (error > nearest).any() and (error == nearest).any(), "not always to the nearer one, nor to the other"

    def test_its_mean_is_x(self):
        a = generator(0)
        for x in (1 + 2**-9, -1 - 2**-9, 1 + 3 * 2**-10, 3.1, -2e-5):
            x = torch.full((20_000,), x)
            off = (measure.round_randomly(x, a).double().mean() - x[0].double()) / 2.0 ** (math.frexp(x[0])[1] - 8)
            assert abs(off) < 0.02, f"the mean of 20,000 roundings of {x[0]:.6g} is off by {off:.3f} of a step"

    def test_small_updates_are_not_lost(self):
        got = measure.round_randomly(torch.full((400_000,), 1 + 2**-17), generator(0)).double().mean() - 1
        assert got == approx(2**-17, rel=0.2), f"the mean of 400,000 roundings of 1 + 2^-17 is 1 + {got:.3g}: 16 bits"

    def test_each_number_has_a_random_number_of_its_own(self):
        got = measure.round_randomly(torch.full((50, 50), 1.003), generator(0))
        for what, first in (("rows", got[:1]), ("columns", got[:, :1])):
            assert not torch.equal(got, first.expand(50, 50)), (
                f"50 equal {what} are rounded each by itself, and here all became the same: draw for all of x.shape")

    def test_what_needs_no_rounding(self):
        x = torch.tensor([0.0, 1.0, -3.0, 0.5, 1.0078125, math.inf, -math.inf, math.nan]).repeat(100_000, 1)
        before, got = x.nan_to_num(7), measure.round_randomly(x).float().nan_to_num(7)
        assert_close(got, before, "a number of bfloat16 stays, and so do inf and nan", tol=0)
        assert torch.equal(x.nan_to_num(7), before), "x itself was changed"
        assert measure.round_randomly(torch.tensor(1.0)).shape == (), "a single number is a tensor, too"

    def test_it_draws_from_the_generator(self):
        check_draws(lambda a: measure.round_randomly(torch.full((100,), 1.003), a), "round_randomly")


def results(runs, label="mora r2"):
    """Results as train.py writes them, of {(rate, seed): metrics}."""
    return [{"label": label, "method": "mora", "rank": 2, "operator": "rotation", "seed": seed, "metrics": metrics,
             "config": dataclasses.asdict(config(learning_rate=rate, seed=seed)),
             "rows": [{"step": 500, "loss": 9.0 - rate, **metrics}]} for (rate, seed), metrics in runs.items()]


def accuracies(*values):  # (rate, one for each seed)
    return {(rate, seed): {"char_accuracy": value, "exact_match": 1 - value}
            for rate, of_seeds in values for seed, value in enumerate(of_seeds)}


def assert_best(given, hint, **rates):
    """The results at these rates are chosen, whatever the order of the given ones."""
    expected = [(one["label"], one["config"]["learning_rate"], one["seed"]) for one in given
                if one["config"]["learning_rate"] == rates[one["label"].removesuffix(" r2").replace(" ", "_")]]
    before = copy.deepcopy(given)
    for order in (given, given[::-1], given[1::2] + given[::2]):
        found = compare.at_best_rate(order)
        assert all(any(one is other for other in given) for one in found), "the given results are wanted, not copies"
        got = sorted((one["label"], one["config"]["learning_rate"], one["seed"]) for one in found)
        assert got == sorted(expected), f"{hint}: expected (label, rate, seed) {sorted(expected)}, got {got}"
    assert repr(given) == repr(before), "the results that were given were changed"


@mark.ex23
class TestBestRate:
    @mark.parametrize("values, rate, hint", [
        ([(0.01, [0.5, 0.6]), (0.02, [0.9, 0.1])], 0.01, "means of 0.55 and 0.5: not the best seed"),
        ([(0.01, [0.3, 0.3, 0.9]), (0.02, [0.4, 0.4, 0.4])], 0.01, "means of 0.5 and 0.4: not median or worst seed"),
        ([(0.01, [0.703, 0.700, 0.700]), (0.02, [0.702, 0.702, 0.702])], 0.02, "means of 0.701 and 0.702: not rounded"),
        ([(0.01, [0.0, 0.0]), (0.02, [0.0, 0.1])], 0.02, "an accuracy of 0 is an accuracy"),
        ([(0.05, [0.2]), (0.01, [0.3]), (0.02, [0.1])], 0.01, "one seed"),
        ([(0.01, [0.5, math.nan]), (0.02, [0.9]), (0.05, [0.1, 0.2])], 0.05, "seed 1 is nan at 0.01, missing at 0.02"),
        ([(0.01, [0.5, math.nan]), (0.02, [0.9])], None, "at no rate both seeds ended well: the setting is left out")])
    def test_the_best_mean_over_seeds(self, values, rate, hint):
        assert_best(results(accuracies(*values)), hint, mora=rate)

    def test_every_setting_has_a_best_rate_of_its_own(self):
        given = results(accuracies((0.01, [0.5, 0.6, 0.5]), (0.02, [0.2, 0.1, 0.1])), "lora r2")  # with one seed more
        given += results(accuracies((0.01, [0.3, 0.2]), (0.02, [0.4, 0.5])))
        given += results(accuracies((0.02, [0.7, 0.7]), (0.01, [0.8, 0.8])), "mora r8")
        assert_best(given, "lora r2 and mora r8 are best at 0.01, mora r2 at 0.02", lora=0.01, mora=0.02, mora_r8=0.01)

    def test_without_an_accuracy_the_lowest_loss_is_best(self):
        runs = {(rate, seed): {"val_loss": loss + seed, "perplexity": math.exp(loss)} for seed in (0, 1, 2)
                for rate, loss in {0.01: 3.0, 0.02: 2.5, 0.05: 2.7}.items()}
        assert_best(results(runs), "val_loss is 3.0, 2.5 and 2.7, whatever the loss in training", mora=0.02)

    @mark.parametrize("metric, good, better", [("char_accuracy", 0.5, 0.9), ("val_loss", 3.0, 2.0)])
    @mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
    def test_a_rate_at_which_a_seed_diverged_is_not_the_best(self, metric, good, better, value):
        runs = {(rate, seed): {metric: better if rate == 0.02 else good} for rate in (0.01, 0.02) for seed in range(3)}
        runs[0.02, 1] = {metric: value}
        given = [one for one in results(runs) if one["metrics"][metric] is not None]
        given += results({(0.5, 0): {metric: math.nan}}, "lora r2")  # a setting that never worked
        what = "is missing" if value is None else f"has a {metric} of {value}"
        assert_best(given, f"seed 1 diverged at 0.02 and {what}: what is left is luck", mora=0.01, lora=None)

    def test_of_equals_the_rate_that_comes_first(self):
        for first, second in ((0.02, 0.01), (0.01, 0.02)):
            chosen = compare.at_best_rate(results(accuracies((first, [1.0]), (second, [1.0]))))
            got = chosen[0]["config"]["learning_rate"]
            assert got == first, f"of two equals the rate that comes first: expected {first}, got {got}"
