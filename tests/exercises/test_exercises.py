"""The graders of the exercises in README.md, in its order: `python -m pytest -m ex5` runs those of
exercise 5, and so does `python tests/exercises/exercise.py --grade 5`.

A grader compares results, and not how the code gets them, with a slow second statement of what
README.md asks, mostly from tests/reference.py. It works while all later exercises are missing. The
mark `detail` is for tests that count once the subject of the exercise is right (grading.share).
"""

import contextlib
import copy
import itertools
import math
import types

import numpy as np
import torch
import torch.nn.functional as F
from pytest import approx, mark
from torch import nn

import compare
import data
import measure
import mora
import reference
import train
from checks import Dense, assert_same, build, check_device, check_draws, in_place
from mora import DoRALinear, LoRALinear, MoRALinear
from reference import CYCLE, Net, assert_close, dora, generator, lora_delta, randn, randomise

def learn(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}

# ---- LoRA, and what every adapter does -----------------------------------------------------------
@mark.ex1
class TestLoRA:
    @mark.parametrize("options, factor", [
        ({}, 2), ({"alpha": 3}, 0.75), ({"alpha": 3, "rslora": True}, 1.5), ({"train_A": False}, 2)
    ])
    def test_the_update(self, options, factor):
        layer, x = build(LoRALinear, 13, 20, 4, dropout=0.9, **options), randn(2, 3, 13)
        hint = f"with {options} at r = 4, ΔW is {factor} B A, and update() has no dropout"
        assert_same(layer.update(x), x @ lora_delta(layer, factor).T, learn(layer), hint)

    @mark.parametrize("train_A", [True, False])
    def test_reset(self, train_A):
        layer = build(LoRALinear, 400, 3, 8, train_A=train_A)
        layer.A.data.fill_(9)
        with in_place(layer, "A", "B"):
            layer.reset(generator(1))
        assert not layer.B.any(), "reset() makes B zero, so that ΔW is zero"
        most, deviation = layer.A.abs().max(), layer.A.std()
        assert 0.049 < most <= 0.05, f"A is within 1 / sqrt(400) = 0.05, got {most:.4g} at most"
        uniform = abs(deviation - 0.0289) < 0.002
        assert uniform, f"uniform numbers deviate by 0.0289 here, and A's by {deviation:.4g}"
        expected, got = (train_A, True), (layer.A.requires_grad, layer.B.requires_grad)
        assert got == expected, f"after reset() (A, B) train as before: {expected}, got {got}"

    @mark.detail
    def test_A_is_drawn_from_the_generator_on_the_CPU(self):
        layer = build(LoRALinear, 13, 20)
        check_draws(lambda a: (layer.reset(a), layer.A.detach().clone())[1], "reset")
        a, b = generator(1), generator(1)
        layer.reset(a), build(LoRALinear, 13, 20).to("meta").reset(b)
        assert a.get_state().equal(b.get_state()), (
            "A is drawn on the CPU, wherever the layer is, so that every device gets the same "
            "numbers. Here the layer is on another device, and the generator did not move on"
        )

@mark.ex2
class TestForward:
    @mark.parametrize("bias", [True, False])
    def test_it_adds_the_update(self, bias):
        layer, x = build(Dense, 5, 7, bias=bias, dropout=0.5).eval(), randn(2, 3, 5)
        expected = x @ (layer.linear.weight + layer.W).T + (layer.linear.bias if bias else 0)
        assert_same(layer(x), expected, {"W": layer.W}, "W0 x + bias + ΔW x in eval mode")

    def test_dropout_acts_on_the_inputs_of_the_update(self):
        layer, x = build(Dense, 5, 7, dropout=0.5).train(), torch.eye(5).double().repeat(100, 1)
        y = layer(x) - layer.linear(x)  # an input of 1 gives nothing, or twice its column of ΔW
        kept = y.abs().sum(1) > 1e-9
        hint = "at p = 0.5, what is kept of the update's input is doubled, and W0 gets all of x"
        assert_close(y[kept], 2 * x[kept] @ layer.W.T, hint)
        n = int(kept.sum())
        assert 180 < n < 320, f"at p = 0.5 about 250 of 500 inputs are kept, got {n}"

@mark.ex3
class TestDeltaWeight:
    @mark.parametrize("k, d", [(5, 7), (7, 5), (6, 6)])
    def test_it_is_the_updates_matrix(self, k, d):
        for training in (True, False):
            layer = build(Dense, k, d, dropout=1.0).train(training)
            hint = f"ΔW, {k} to {d}, without W0, bias and dropout, training = {training}"
            assert_same(layer.delta_weight(), layer.W * 1, {"W": layer.W}, hint)
            same = layer.training == layer.dropout.training == training
            assert same, "delta_weight() changed the layer's training mode"

    @mark.detail
    @mark.parametrize("autocast", [False, True])
    def test_it_is_not_rounded(self, autocast):
        layer = build(Dense, 5, 7, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = layer.delta_weight()
        assert_close(got, layer.W, "ΔW of a bfloat16 layer, in float32", tol=0)

    @mark.detail
    def test_any_device(self):
        check_device(build(Dense, 5, 7), lambda layer: layer.delta_weight(), (7, 5))

@mark.ex4
class TestMerging:
    @mark.parametrize("bias", [True, False])
    def test_merge_makes_a_plain_layer(self, bias):
        layer, x = build(Dense, 5, 7, bias=bias, dropout=1.0).train(), randn(2, 3, 5)
        plain = layer.merge()
        what = f"the merged layer with bias={bias}"
        assert type(plain) is nn.Linear, f"{what} is an nn.Linear, got {type(plain).__name__}"
        right = (plain.in_features, plain.out_features) == (5, 7) and layer.training
        assert right, f"{what} has 5 inputs and 7 outputs, and this one still trains; got {plain}"
        assert (plain.bias is not None) == bias, f"{what} has the bias {plain.bias}"
        expected = x @ (layer.linear.weight + layer.W).T + (layer.linear.bias if bias else 0)
        assert_close(plain(x), expected, f"{what} computes W0 x + ΔW x + bias")
        trains = [name for name, parameter in plain.named_parameters() if parameter.requires_grad]
        assert not trains, f"{what} is frozen as W0 is, but {trains} would train"

    @mark.detail
    def test_merge_shares_nothing_with_the_layer(self):
        layer = build(Dense, 5, 7)
        before = copy.deepcopy(layer.state_dict())
        for parameter in layer.merge().parameters():
            parameter.data.fill_(9)
        for name, tensor in layer.state_dict().items():
            same = torch.equal(tensor, before[name])
            assert same, f"merge() changed {name} of the layer, or shares its memory"

    @mark.parametrize("autocast", [False, True])
    def test_the_sum_is_rounded_once(self, autocast):
        layer = build(Dense, 40, 30, dtype=torch.bfloat16)
        layer.W.data.mul_(0.01)
        expected = (layer.linear.weight.float() + layer.W).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, plain = layer.merged_weight(), layer.merge()
        hint = "W0 + ΔW, added in float32 and rounded once"
        assert_close(plain.weight, expected, f"merge(): {hint}", tol=0)
        assert_same(got, expected, {"W": layer.W}, f"merged_weight(): {hint}", tol=0)

# ---- MoRA ----------------------------------------------------------------------------------------
@mark.ex5
class TestSquareSize:
    def test_it_is_the_largest_within_the_budget(self):
        got = mora.square_size(768, 768, 8)
        right = got == 110 and isinstance(got, int)
        assert right, f"sqrt((768 + 768) 8) = 110.85 is rounded down to 110, got {got!r}"
        sizes = itertools.product(range(1, 40, 3), range(1, 40, 3), (1, 2, 3, 7, 8, 50))
        for k, d, r in [*sizes, (96, 96, 3), (514, 514, 256), (5120, 11008, 741)]:
            got, expected = mora.square_size(k, d, r), reference.square_size(k, d, r)
            assert got == expected, f"k = {k}, d = {d}, r = {r}: expected {expected}, got {got}"

# ---- DoRA ----------------------------------------------------------------------------------------
@mark.ex13
class TestDoRA:
    @mark.parametrize("bias", [True, False])
    def test_it_is_the_formula(self, bias):
        layer, x = build(DoRALinear, 5, 8, bias=bias), randn(2, 3, 5).requires_grad_()
        hint = "the outputs (V's lengths count as constants)"
        assert_same(layer(x), dora(layer, x, x), learn(layer) | {"x": x}, hint)

    @mark.detail
    def test_it_drops_only_what_goes_through_A_and_B(self):
        layer, x = build(DoRALinear, 5, 8, dropout=0.5), randn(2, 3, 5)
        torch.manual_seed(0)
        y = layer.train()(x)
        torch.manual_seed(0)
        dropped = layer.dropout(x)
        hint = "dropout is of the x that B A gets, and W0 x has all of it, scaled as before"
        assert_close(y, dora(layer, x, dropped), hint)
        assert_close(layer.eval()(x), dora(layer, x, x), "eval() has no dropout")

    def test_it_merges(self):
        layer, x = build(DoRALinear, 5, 8), randn(2, 3, 5)
        V = layer.linear.weight + lora_delta(layer)
        scale = layer.magnitude / V.norm(dim=1).detach()
        expected = scale[:, None] * V - layer.linear.weight
        hint = "ΔW is magnitude · V / ‖V‖ - W0, and the lengths count as constants"
        assert_same(layer.delta_weight(), expected, learn(layer), hint)
        assert_close(layer.merge()(x), layer(x), "merge() computes what the layer computes")

    def test_reset(self):
        layer, same = build(DoRALinear, 5, 8), build(LoRALinear, 5, 8)
        with in_place(layer, "A", "B", "magnitude"):
            layer.reset(generator(1))
        assert_close(layer.magnitude, layer.linear.weight.norm(dim=1), "magnitude after reset()")
        assert_close(layer.delta_weight(), 0 * layer.linear.weight, "ΔW after reset()")
        same.reset(generator(1))
        assert_close(layer.A, same.A, "reset(generator) draws A as LoRA does, from the generator")

    @mark.detail
    @mark.parametrize("autocast", [False, True])
    def test_in_bfloat16_and_with_a_row_of_zeros(self, autocast):
        layer, x = build(DoRALinear, 5, 8, dtype=torch.bfloat16), torch.ones(2, 5).bfloat16()
        layer.linear.weight.data[3], layer.B.data[3] = 0, 0
        V = layer.linear.weight.float() + lora_delta(layer)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            lengths, delta, y = layer.row_lengths(), layer.delta_weight(), layer(x)
        assert_close(lengths, V.norm(dim=1), "the lengths of V's rows, in float32", tol=1e-6)
        scale = layer.magnitude / V.norm(dim=1).clamp_min(1e-30)
        expected = scale[:, None] * V - layer.linear.weight.float()
        assert_close(delta, expected, "ΔW, in float32 to the end; V has a row of zeros", tol=1e-6)
        assert y.dtype == torch.bfloat16, f"outputs have x's type, bfloat16, got {y.dtype}"
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            half = layer.float()(x.float())
        finite = y.isfinite().all() and half.isfinite().all()
        assert finite, "where a row of V is zero, outputs must be finite (float16 has no 1e-30)"

# ---- Training ------------------------------------------------------------------------------------
def net(method, dtype=torch.float64):
    """A Net with adapters at random, whose norm trains as well; always the same."""
    torch.manual_seed(0)
    operator = "truncation" if method == "mora" else None
    model = mora.add_adapters(Net().to(dtype), method, 2, operator, fast=False)
    model.norm.requires_grad_(True)
    return randomise(model)

def take_a_step(model, optimizer, step):
    """How far each parameter moves, with gradients that depend on the step only."""
    before, a = {name: p.detach().clone() for name, p in model.named_parameters()}, generator(step)
    for parameter in learn(model).values():
        numbers = torch.rand(parameter.shape, generator=a).to(parameter)
        parameter.grad = numbers + (-1.5 if step == 5 else 1)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}

def trained(method):
    """A model and its optimizer after five steps."""
    model = net(method)
    optimizer = torch.optim.AdamW(learn(model).values(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        take_a_step(model, optimizer, step)
    return model, optimizer

every_method = mark.parametrize("method", ["lora", "asylora", "dora", "mora"])

@mark.ex15
class TestMergeAndReset:
    @every_method
    def test_the_model_computes_the_same_before_and_after(self, method):
        model = net(method)
        y, before = model(), {name: p.clone() for name, p in model.named_parameters()}
        trains = learn(model).keys()
        with contextlib.ExitStack() as stack:
            for adapter in mora.find_adapters(model).values():
                own = (name for name, _ in adapter.named_parameters(recurse=False))
                stack.enter_context(in_place(adapter, "linear.weight", *own))
            mora.merge_and_reset(model)
        assert_close(model(), y, "ΔW moves into W0, so the outputs stay", tol=1e-9)
        for name, adapter in mora.find_adapters(model).items():
            zero = 0 * adapter.linear.weight
            assert_close(adapter.delta_weight(), zero, f"ΔW of {name} after the merge", tol=1e-9)
        assert learn(model).keys() == trains, "other parameters than before the merge train now"
        for name, parameter in model.named_parameters():
            if "blocks" not in name or "bias" in name:
                same = torch.equal(parameter, before[name])
                assert same, f"{name} has no update, but was changed"

    @mark.detail
    def test_the_sum_is_rounded_once(self):
        model = net("mora", torch.bfloat16)
        for step, (name, adapter) in itertools.product(range(3), mora.find_adapters(model).items()):
            nn.init.normal_(adapter.M, std=0.01)
            expected = (adapter.linear.weight.float() + adapter.delta_weight()).bfloat16()
            mora.merge_and_reset(model)
            hint = f"{name}: add in float32, and round the sum once"
            assert_close(adapter.linear.weight, expected, hint, tol=0)

    def test_the_reset_of_mora(self):
        layer, a, given = build(MoRALinear, 8, 8, operator="truncation"), generator(3), []
        layer.operator.regroup = lambda generator=None: given.append(generator)
        with in_place(layer, "M"):
            layer.reset(a)
        assert not layer.M.any(), "reset() makes M zero"
        assert given == [a], f"the operator's regroup() is called once, with the generator: {given}"

    @mark.detail
    @mark.parametrize("method", ["lora", "dora"])
    def test_all_adapters_draw_from_the_generator(self, method):
        model = net(method)

        def draw(a):
            mora.merge_and_reset(model, generator=a)
            return torch.stack([block["up"].A.detach() for block in model.blocks])

        check_draws(draw, "A")
        first, second = draw(generator(1))
        same = torch.equal(first, second)
        assert not same, "two layers drew the same A: the generator has to move on between them"

    @every_method
    def test_the_next_step_is_a_new_optimizers(self, method):
        model, optimizer = trained(method)
        optimizer.zero_grad()  # as after a step in train.py
        mora.merge_and_reset(model, optimizer, generator(0))
        other = copy.deepcopy(model)
        new = torch.optim.AdamW(learn(other).values(), lr=0.1, weight_decay=0.1)
        got, expected = take_a_step(model, optimizer, 5), take_a_step(other, new, 5)
        for name in (name for name in got if "norm" not in name):
            hint = f"{name} must move as under a new optimizer, which knows no means and no steps"
            assert_close(got[name], expected[name], hint)

    @mark.detail
    @every_method
    def test_what_is_in_no_adapter_is_remembered(self, method):
        (model, optimizer), (other, old) = trained(method), trained(method)
        mora.merge_and_reset(model, optimizer, generator(0))
        got, expected = take_a_step(model, optimizer, 5), take_a_step(other, old, 5)
        for name in (name for name in got if "norm" in name):
            hint = f"{name} is in no adapter, and must move as without the merge"
            assert_close(got[name], expected[name], hint)
        model = net(method)
        mora.merge_and_reset(model, torch.optim.AdamW(learn(model).values()))  # before any step

GROUPS = ["strided", ("random", "strided"), ("contiguous", "random"), "random", "cycle"]
every_grouping = mark.parametrize("groups", GROUPS)

def pair(groups, merges):
    if groups == "cycle":
        return CYCLE[merges % 4]
    return (groups, groups) if isinstance(groups, str) else groups

def make_groups(n, size, kind):
    group = torch.arange(n) % size
    if kind == "random":
        return group[torch.randperm(n)]
    return torch.tensor(sorted(group.tolist())) if kind == "contiguous" else group

def kind_of(group):
    kinds = [k for k in ("strided", "contiguous") if group.equal(make_groups(len(group), 4, k))]
    return (kinds + ["random"])[0]

@mark.ex16
class TestCycle:
    @every_grouping
    def test_one_pair_after_the_other(self, groups):
        o = mora.Sharing(32, 16, 4, groups)
        for merges in range(9):
            kinds = kind_of(o.in_group), kind_of(o.out_group)
            expected, got = (pair(groups, merges), merges), (kinds, int(o.merges))
            assert got == expected, (
                f"groups={groups!r}: after {merges} merges the kinds of groups (of inputs, of "
                f"outputs) and self.merges should be {expected}, got {got}. (After each merge the "
                "operator is saved, and a new one loads its state)"
            )
            with in_place(o, "in_group", "out_group", "merges"):
                o.regroup()
            state, o = o.state_dict(), mora.Sharing(32, 16, 4, groups)
            o.load_state_dict(state)

    @mark.detail
    def test_inputs_and_outputs_are_drawn_from_the_generator(self):
        o = mora.Sharing(31, 31, 4, "random")
        check_draws(lambda a: (o.regroup(a), torch.stack([o.in_group, o.out_group]))[1], "groups")
        same = torch.equal(o.in_group, o.out_group)
        assert not same, "inputs and outputs have the same random groups: draw for each of them"

    @every_grouping
    def test_rank_bound(self, groups):
        for k, d, size in [(20, 20, 4), (8, 8, 4), (13, 20, 5), (20, 13, 3)]:
            known, total = [], 0
            for merge in range(6):
                i, j = map(make_groups, (k, d), (size, size), pair(groups, merge))
                known.append((i, j))
                total += randn(size, size)[j][:, i]
                # P Pᵀ has the rank of P, and a 1 at (i, j) if i and j are in the same group
                sides = [sum((x[:, None] == x).double() for x in side) for side in zip(*known)]
                expected = min(int(torch.linalg.matrix_rank(side)) for side in sides)
                rank, got = int(torch.linalg.matrix_rank(total)), measure.rank_bound([*known])
                assert got == expected, (
                    f"{groups}, {merge + 1} merges, {k} to {d}, r̂ = {size}: the smaller rank of "
                    f"the two sides is {expected}, got {got}; this random sum has rank {rank}"
                )

@mark.ex17
@mark.parametrize("step", [1, 2, 50])
def test_adam_step_is_adams(step):
    for betas, eps, rate in [((0.9, 0.999), 1e-8, 0.1), ((0.8, 0.95), 0.5, 0.01)]:
        p, given = nn.Parameter(0 * randn(5)), [randn(5), randn(5), randn(5).square()]
        before = [tensor.clone() for tensor in given]
        optimizer = torch.optim.Adam([p], lr=rate, betas=betas, eps=eps)
        means = {"exp_avg": before[1].clone(), "exp_avg_sq": before[2].clone()}
        optimizer.state[p] = {"step": torch.tensor(step - 1.0)} | means
        p.grad = before[0].clone()
        optimizer.step()
        got = measure.adam_step(*given, step, rate, betas, eps)
        what = f"what Adam adds in step {step} with betas {betas} and eps {eps}"
        assert_close(got, p.detach(), what)
        assert all(map(torch.equal, given, before)), "gradient, mean or square was changed"

def config(**changes):
    given = dict(warmup_steps=4, max_steps=24, schedule="linear")
    return train.settings(**given | dict(merge_every=None, restart_warmup=0) | changes)

@mark.ex18
class TestSchedule:
    @mark.parametrize("hint, warmup, merge_every, restart_warmup", [
        ("without merges: a warm-up of 4 steps, then down until step 24", 4, None, 2),
        ("merge_every 0 is no merge", 4, 0, 2),
        ("without a warm-up", 0, None, 2),
        ("after a merge the rate rises back onto the curve", 4, 8, 3),
        ("after each merge the rate rises back onto the curve", 4, 7, 5),
        ("a rise of 0 steps", 4, 8, 0),
        ("a merge in the warm-up: the lower of both rises", 12, 8, 4),
        ("two merges in the warm-up: the lower of both rises", 20, 8, 2),
        ("a rise that the next merge cuts short", 4, 4, 8),
    ])
    def test_the_rate(self, hint, warmup, merge_every, restart_warmup):
        given = dict(warmup_steps=warmup, merge_every=merge_every, restart_warmup=restart_warmup)
        for kind, step in itertools.product(("linear", "cosine", "constant"), range(24)):
            got = train.schedule(step, config(schedule=kind, **given))
            rate = reference.schedule(step, kind, 24, warmup, merge_every, restart_warmup)
            right = got == approx(rate)
            assert right, f"{hint}: {kind}, step {step}: expected {rate:.4f}, got {got}; {given}"

    @mark.detail
    @mark.parametrize("changes, expected", [
        ({"merge_every": 8}, [8, 16]),
        ({"merge_every": 8, "max_steps": 25}, [8, 16, 24]),
        ({"merge_every": None}, []),
        ({"merge_every": 0}, []),
        ({"merge_every": 5, "warmup_steps": 12}, [5, 10, 15, 20]),
    ])
    def test_the_steps_before_which_adapters_restart(self, changes, expected):
        given = config(**changes)
        got = [step for step in range(given.max_steps) if train.restarts_before(step, given)]
        assert got == expected, f"with {changes} merges come before {expected}, here before {got}"

def pad(rows, end=256, block_size=150, device="cpu"):
    """What `pad` makes of [(number of prompt tokens, tokens), ...]."""
    one = [("a", "b")]
    pairs = data.PromptPairs(one, one, data.get_tokenizer("bytes"), block_size, 2, 0, device)
    pairs.tokenizer = types.SimpleNamespace(eot_token=end)
    rows = [(n_prompt, np.array(tokens, dtype=np.uint16)) for n_prompt, tokens in rows]
    before = copy.deepcopy(rows)
    batch = pairs.pad(rows)
    same = [a == b and (x == y).all() for (a, x), (b, y) in zip(rows, before)]
    assert len(rows) == len(before) and all(same), "the rows themselves were changed"
    return batch

@mark.ex19
class TestMask:
    def test_a_worked_example(self):
        """After "ab" comes "cde": b has the target c, c has d, d has e, e has the end token 256."""
        a, b, c, d, e, f, end, none = *b"abcdef", 256, -100
        batch = pad([(2, [a, b, c, d, e, end]), (1, [f, end])], block_size=8)
        idx, targets = (tensor.tolist() for tensor in batch)
        expected = [[a, b, c, d, e, end, end, end], [f] + [end] * 7]
        what = "idx, all tokens but the last, filled up with the end"
        assert idx == expected, f"{what}: expected {expected}, got {idx}"
        expected = [[none, c, d, e, end, none, none, none], [end] + [none] * 7]
        what = "targets, what follows, if it is of the completion or the end"
        assert targets == expected, f"{what}: expected {expected}, got {targets}"

    @mark.detail
    @mark.parametrize("tokens, length", [
        (2, 64), (65, 64), (66, 128), (129, 128), (130, 150), (151, 150)
    ])
    def test_the_length(self, tokens, length):
        idx, targets = pad([(1, range(2)), (1, range(1, tokens + 1))])
        got, expected = (tuple(idx.shape), tuple(targets.shape)), ((2, length), (2, length))
        assert got == expected, f"{tokens} tokens, without the last: expected {expected}, got {got}"
        expected = [*range(2, tokens + 1)] + [-100] * (length - tokens + 1)
        got = targets[1].tolist()
        assert got == expected, f"after one prompt token: expected {expected}, got {got}"

    @mark.detail
    def test_types_and_device(self):
        idx, targets = pad([(1, [40000, 65535, 50256]), (1, [7, 50256])], end=50256)
        got, kind = [idx[:, :2].tolist(), targets[:, :2].tolist()], {idx.dtype, targets.dtype}
        expected = [[[40000, 65535], [7, 50256]], [[65535, 50256], [50256, -100]]]
        right = got == expected and kind == {torch.long}
        assert right, f"idx and targets: expected {expected} in torch.long, got {got} in {kind}"
        devices = [tensor.device.type for tensor in pad([(1, [5, 6, 7])], device="meta")]
        assert devices == ["meta", "meta"], f"idx and targets go to self.device, meta: {devices}"

# ---- Measuring -----------------------------------------------------------------------------------
@mark.ex20
class TestBits:
    def test_bits_held(self):
        logits, targets, expected = randn(3, 5, 7), torch.randint(7, (3, 5)), 3 * 20.0
        targets[0, :2] = targets[2] = -100
        for i, j in (targets != -100).nonzero().tolist():
            expected += math.log2(logits[i, j].softmax(0)[targets[i, j]])
        got = measure.bits_held(logits, targets, 20.0)
        right = float(got) == approx(expected)
        assert right, f"3 rows of 20 bits, less the cross entropy: expected {expected}, got {got}"

    @mark.parametrize("who, sure, expected", [
        ("guesses", 0.0, 0), ("knows", 99.0, 488), ("is confident and wrong", -30.0, -5354)
    ])
    def test_the_bits_of_one_who(self, who, sure, expected):
        """Of 31 digits, 30 are any of 16 and one is any of four: 122 bits, as a UUID has them."""
        targets, logits = torch.randint(16, (4, 31)), torch.full((4, 31, 20), -1e4)
        targets[:, 30] %= 4
        logits[:, :30, :16] = logits[:, 30:, :4] = 0
        logits.scatter_(2, targets[..., None], sure)
        for dtype in (torch.float32, torch.bfloat16):
            got = measure.bits_held(logits.to(dtype), targets, 122)
            right = float(got) == approx(expected, 1e-3, 0.01)
            assert right, f"one who {who}, {dtype}: expected {expected} bits, got {got}"

def with_singular_values(values, rows=8, columns=6):
    U, V = (torch.linalg.qr(randn(n, len(values)))[0] for n in (rows, columns))
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T

@mark.ex21
class TestSpectrum:
    @mark.parametrize("which, name", list(enumerate(["rank", "effective", "stable"])))
    def test_known_ones(self, which, name):
        known = {(5.0,) * 4: (4, 4, 4), (3.0, 1.0): (2, 4 / 3**0.75, 10 / 9), (7.0,): (1, 1, 1)}
        known |= {(0.0, 0.0): (0, 0, 0), (1.0, 1e-9): (2, 1, 1), (1.0, 1e-20): (1, 1, 1)}
        for (values, expected), scale in itertools.product(known.items(), (1, 1e-9)):
            for shape in ((8, 6), (6, 8)):
                got = measure.spectrum(scale * with_singular_values([*values], *shape))
                assert [*map(type, got)] == [float] * 3, f"three floats are wanted, got {got}"
                right = got[which] == approx(expected[which], rel=1e-5)
                what = f"{name} of {values} times {scale:g}"
                assert right, f"{what}: expected {expected[which]:.6g}, got {got[which]:.6g}"

    def test_directions_of_exactly_zero(self):
        for dtype in (torch.float32, torch.bfloat16):
            got = measure.spectrum(torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=dtype)))
            expected, what = (2, 4 / 3**0.75, 10 / 9), f"s = 3, 1, 0, 0 in {dtype}"
            right = got == approx(expected, rel=1e-5)
            assert right, f"{what} (0 log 0 is 0): expected {expected}, got {got}"

    @mark.detail
    def test_the_rank_is_not_that_of_rounding(self):
        small = torch.diag(torch.tensor([1.0, 3e-7, 0.0, 0.0]))
        given = with_singular_values([3.0, 2.0, 1.0], 60, 50).float(), small
        got = [measure.spectrum(matrix)[0] for matrix in given]
        assert got == [3, 1], f"rank 3, and s = 1, 3e-7, 0, 0 in float32: not 3 and 1 but {got}"

@mark.ex22
class TestRounding:
    def test_it_goes_to_a_neighbour(self):
        x = torch.cat([torch.randn(500), torch.randn(500) * 1e-6, torch.randn(500) * 1e30])
        got = measure.round_randomly(x)
        what = got.dtype, tuple(got.shape)
        assert what == (torch.bfloat16, (1500,)), f"expected bfloat16 and shape (1500,), got {what}"
        step = 2.0 ** (torch.frexp(x)[1].double() - 8)  # between neighbours in bfloat16
        error, nearest = ((each.double() - x.double()).abs() for each in (got, x.bfloat16()))
        i = int((error / step).argmax())
        assert (error < step).all(), f"{x[i]:.6g} becomes {got[i]:.6g}, which is no neighbour of it"
        both = (error > nearest).any() and (error == nearest).any()
        assert both, "it should sometimes be the nearer neighbour and sometimes the other one"

    @mark.parametrize("x, n, tol", [
        (1 + 2**-9, 20_000, 0.02), (-1 - 2**-9, 20_000, 0.02), (3.1, 20_000, 0.02),
        (-2e-5, 20_000, 0.02), (1 + 2**-17, 400_000, 0.0002)
    ])
    def test_its_mean_is_x(self, x, n, tol):
        x = torch.full((n,), x)
        step = 2.0 ** (math.frexp(x[0])[1] - 8)
        off = (measure.round_randomly(x, generator(0)).double().mean() - x[0].double()) / step
        what = f"the mean of {n} roundings of {x[0]:.7g}"
        assert abs(off) < tol, f"{what} should be within {tol} of a step of it, got {off:.5f}"

    def test_each_number_has_a_random_number_of_its_own(self):
        got = measure.round_randomly(torch.full((50, 50), 1.003), generator(0))
        alike = (got == got[:1]).all() or (got == got[:, :1]).all()
        assert not alike, "all rows or columns were rounded alike: draw for every number of x"

    @mark.detail
    def test_what_needs_no_rounding(self):
        x = torch.tensor([0.0, 1.0, -3.0, 0.5, 1.0078125, math.inf, -math.inf]).repeat(10_000, 1)
        before, got = x.clone(), measure.round_randomly(x).float()
        kept = torch.equal(got, before) and torch.equal(x, before)
        assert kept, f"what bfloat16 can represent stays, and x is not changed: {got.unique()}"
        x = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
        got = measure.round_randomly(x.view(torch.float32).repeat(1000, 1))
        found = got.unique().tolist()
        assert got.isnan().all(), f"NaN must stay NaN, whatever its bits are, but becomes {found}"

    @mark.detail
    def test_it_draws_from_the_generator(self):
        x = torch.full((100,), 1.003)
        check_draws(lambda a: measure.round_randomly(x, a), "round_randomly")

def results(runs, label="mora r2"):
    """What README.md names of results, of {(rate, seed): metrics}."""
    runs = [(rate, {"seed": seed, "metrics": metrics}) for (rate, seed), metrics in runs.items()]
    return [{"label": label, "config": {"learning_rate": rate}} | run for rate, run in runs]

def accuracies(*values):
    """{(rate, seed): metrics} of pairs (rate, accuracies of the seeds)."""
    runs = {(rate, seed): value for rate, seeds in values for seed, value in enumerate(seeds)}
    return {run: {"char_accuracy": value, "exact_match": 1 - value} for run, value in runs.items()}

def assert_best(given, hint, **rates):
    """The results at these rates are chosen, whatever the order of the given ones."""
    def key(result):
        return result["label"], result["config"]["learning_rate"], result["seed"]

    wanted = {(label.replace("_", " "), rate) for label, rate in rates.items()}
    expected = sorted(key(one) for one in given if key(one)[:2] in wanted)
    before = repr(given)
    for order in (given, given[::-1], given[1::2] + given[::2]):
        found = compare.at_best_rate(order)
        own = all(any(one is other for other in given) for one in found) and repr(given) == before
        assert own, "the given results themselves are wanted, not copies, and unchanged"
        got = sorted(map(key, found))
        assert got == expected, f"{hint}: expected (label, rate, seed) {expected}, got {got}"

@mark.ex23
class TestBestRate:
    @mark.parametrize("values, rate, hint", [
        ([(0.01, [0.5, 0.6]), (0.02, [0.9, 0.1])], 0.01, "means 0.55 and 0.5: not the best seed"),
        ([(0.01, [0.3, 0.3, 0.9]), (0.02, [0.4] * 3)], 0.01, "means of 0.5 and 0.4: no median"),
        ([(0.01, [0.703, 0.7, 0.7]), (0.02, [0.702] * 3)], 0.02, "means of 0.701 and 0.702"),
        ([(0.01, [0.0, 0.0]), (0.02, [0.0, 0.1])], 0.02, "an accuracy of 0 is an accuracy"),
        ([(0.01, [0.5, math.nan]), (0.02, [0.9]), (0.05, [0.1, 0.2])], 0.05,
         "seed 1 is NaN at 0.01 and missing at 0.02"),
        ([(0.01, [0.5, math.nan]), (0.02, [math.nan, 0.9])], None, "each rate has another seed"),
    ])
    def test_the_best_mean_over_seeds(self, values, rate, hint):
        assert_best(results(accuracies(*values)), hint, mora_r2=rate)

    def test_every_setting_has_a_best_rate_of_its_own(self):
        given = results(accuracies((0.01, [0.5, 0.6, 0.5]), (0.02, [0.2, 0.1, 0.1])), "lora r2")
        given += results(accuracies((0.01, [0.3, 0.2]), (0.02, [0.4, 0.5])))
        given += results(accuracies((0.02, [0.7, 0.7]), (0.01, [0.8, 0.8])), "mora r8")
        hint = "lora r2 and mora r8 are best at 0.01, mora r2 at 0.02"
        assert_best(given, hint, lora_r2=0.01, mora_r2=0.02, mora_r8=0.01)

    def test_without_an_accuracy_the_lowest_loss_is_best(self):
        losses = {0.01: 3.0, 0.02: 2.5, 0.05: 2.7}
        runs = {(rate, 0): {"val_loss": losses[rate]} for rate in losses}
        assert_best(results(runs), "val_loss is 3.0, 2.5 and 2.7", mora_r2=0.02)

    @mark.parametrize("metric, good, better", [("char_accuracy", 0.5, 0.9), ("val_loss", 3.0, 2.0)])
    @mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
    def test_a_rate_at_which_a_seed_diverged_is_not_the_best(self, metric, good, better, value):
        levels = {0.01: good, 0.02: better}
        runs = {(rate, seed): {metric: levels[rate]} for rate in levels for seed in range(3)}
        runs[0.02, 1] = {metric: value}
        if value is None:
            del runs[0.02, 1]
        given = results(runs) + results({(0.5, 0): {metric: math.nan}}, "lora r2")
        hint = f"at 0.02, seed 1 is missing or has {metric} {value}; lora r2 never worked"
        assert_best(given, hint, mora_r2=0.01)

    @mark.detail
    def test_of_equals_the_rate_that_comes_first(self):
        for rates in ((0.02, 0.01), (0.01, 0.02)):
            chosen = compare.at_best_rate(results(accuracies(*((rate, [1.0]) for rate in rates))))
            got = chosen[0]["config"]["learning_rate"]
            assert got == rates[0], f"of two equals, the first: expected {rates[0]}, got {got}"
