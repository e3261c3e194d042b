"""The graders of EXERCISES.md, in its order: `python -m pytest -m ex5` grades exercise 5.

A few older tests that grade an exercise as well carry its mark where they stand. Each exercise is graded by what
EXERCISES.md asks, against a slow second statement of it, and whatever comes after it may be missing. Nothing here looks
at how the code does it.
"""

import argparse
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import mora
import train
from mora import OPERATORS, DoRALinear, MoRALinear
from test_mora import assert_close, dora, formula, kind, randn, randomise, rotation_matrix

SHAPES = [(6, 12, 2), (12, 6, 2), (13, 20, 4), (20, 13, 6), (9, 5, 4), (5, 3, 1), (7, 7, 7)]  # k, d, r̂


@pytest.fixture(autouse=True)
def same_random_numbers_for_every_test():
    torch.manual_seed(0)


def make(k, d, size, operator, **options):
    return OPERATORS[operator](k, d, size, **options)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Exercises 2 to 7: the operators


@pytest.mark.ex2
def test_truncation():
    for k, d, size in SHAPES:
        operator, x, z = make(k, d, size, "truncation"), randn(2, 3, k), randn(2, 3, size)
        kept = torch.stack([x[..., j] for j in range(size)], dim=-1)
        assert_close(operator.compress(x), kept, f"compress keeps the first {size} of {k} inputs")
        y = torch.stack([z[..., i] if i < size else 0 * z[..., 0] for i in range(d)], dim=-1)
        assert_close(operator.decompress(z), y, f"decompress writes the first {size} of {d} outputs, then zeros")


def sharing(k, d, size):
    """Sharing with groups that this test deals, so that `deal` and `regroup` need not be there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPERATORS["sharing"], "regroup", lambda self, generator=None: None)
        operator = make(k, d, size, "sharing")
    operator.in_group.copy_(torch.randperm(k) % size)
    operator.out_group.copy_(torch.randperm(d) % size)
    return operator


@pytest.mark.ex3
def test_sharing():
    for k, d, size in SHAPES:
        operator, x, z = sharing(k, d, size), randn(2, 3, k), randn(2, 3, size)
        sums = torch.zeros(2, 3, size, dtype=x.dtype)
        for j in range(k):
            sums[..., operator.in_group[j]] += x[..., j]
        assert_close(operator.compress(x), sums, f"compress adds up the inputs of each group, here {operator.in_group}")
        y = torch.stack([z[..., operator.out_group[i]] for i in range(d)], dim=-1)
        assert_close(operator.decompress(z), y, f"output i is a copy of z[out_group[i]], here {operator.out_group}")
        back = torch.stack([y[..., operator.out_group == g].sum(-1) for g in range(size)], dim=-1)
        assert_close(operator.add_up(y, operator.out_group), back, "add_up adds up by the groups that it is given")


@pytest.mark.ex4
def test_deal():
    for features, size in [(12, 3), (7, 3), (13, 5), (31, 4), (100, 7)]:
        operator = sharing(features, features, size)
        for wanted in ("strided", "contiguous", "random"):
            group, again, other = (operator.deal(features, wanted, generator(seed)) for seed in (1, 1, 2))
            assert group.shape == (features,) and group.dtype == torch.long, "a whole number for each index"
            assert 0 <= group.min() and group.max() < size, f"groups are numbered from 0 to {size - 1}, got {group}"
            assert kind(group, size) == wanted, f"{features} indices in {size} groups, {wanted}: got {group}"
            assert torch.equal(group, again), "the same generator dealt other groups: runs could not be repeated"
            assert wanted != "random" or not torch.equal(group, other), "another generator dealt the same groups"


@pytest.mark.ex5
def test_decoupling_cuts_the_inputs_into_rows():
    for k, d, size in SHAPES:
        operator, x = make(k, d, size, "decoupling"), randn(2, 3, k)
        rows = torch.zeros(2, 3, math.ceil(k / size), size, dtype=x.dtype)
        for j in range(k):
            rows[..., j // size, j % size] = x[..., j]
        hint = f"{k} inputs in rows of {size}, zeros at the end of the last: input j is in row j // r̂, place j % r̂"
        assert_close(operator.compress(x), rows, hint)
        operator.rotate = lambda rows, back=False: -rows
        assert_close(operator.compress(x), -rows, "the rows pass through `rotate`, by which Rotation turns them")


@pytest.mark.ex6
@pytest.mark.parametrize("fold", [False, True])
def test_decoupling_lays_the_rows_side_by_side(fold):
    for k, d, size in [*SHAPES, (5, 26, 4), (26, 5, 4), (23, 4, 3)]:
        n = math.ceil(k / size)
        operator, z = make(k, d, size, "decoupling", fold=fold), randn(2, 3, n, size)
        y = torch.zeros(2, 3, d, dtype=z.dtype)
        for i in range(max(d, n * size) if fold else d):
            y[..., i % d] += z[..., i % (n * size) // size, i % size]
        what = "repeated" if d > n * size else "folded" if fold else "cut"
        assert_close(operator.decompress(z), y, f"{n} rows of {size} make {n * size} numbers, {what} for {d} outputs")


@pytest.mark.ex6
def test_tile_and_fold_change_a_length():
    for length, wanted in [(5, 12), (5, 10), (5, 6), (5, 5), (12, 5)]:
        y = randn(2, 3, length)
        tiled = torch.stack([y[..., i % length] for i in range(wanted)], dim=-1)
        assert_close(mora.tile(y, wanted), tiled, f"tile {length} numbers to {wanted}")
        if length > wanted:
            folded = torch.stack([y[..., i::wanted].sum(-1) for i in range(wanted)], dim=-1)
            assert_close(mora.fold(y, wanted), folded, f"fold {length} numbers to {wanted}")


@pytest.mark.ex7
def test_rotation_turns_row_i_by_i_times_theta():
    for k, d, size in SHAPES:
        operator, x = make(k, d, size, "rotation"), randn(2, 3, k)
        rows = F.pad(x, (0, -k % size)).view(2, 3, -1, size)
        turned = torch.stack([rows[..., i, :] @ rotation_matrix(size, i).T for i in range(rows.shape[-2])], dim=-2)
        hint = f"{k} inputs in rows of {size}; row 0 stays, row i turns by i θ_j"
        assert_close(operator.compress(x), turned, hint, tol=1e-6)
        first, back = operator.rotate(turned[..., :1, :]), operator.rotate(turned, back=True)
        assert_close(first, turned[..., :1, :], "rotate, of fewer rows: the first angles are theirs", tol=1e-6)
        assert_close(back, rows, "back=True turns the other way, so that nothing is left of a rotation", tol=1e-6)
        assert not operator.state_dict(), "the angles follow from the shape: no state dict needs their tables"


# ----------------------------------------------------------------------------------------------------------------------
# Exercises 8 to 13: the layers


class Dense(mora.Adapter):
    """An adapter whose ΔW is a parameter, W: what all adapters share can be seen with it alone."""

    def __init__(self, linear, dropout=0.0):
        super().__init__(linear, rank=1, dropout=dropout)
        self.W = self.new_parameter(self.out_features, self.in_features)
        nn.init.normal_(self.W)

    def update(self, x):
        return F.linear(x, self.W.to(x.dtype))

    def reset(self, generator=None):
        self.W.data.zero_()
        self.generator = generator


def dense(k, d, dropout=0.0, bias=True, dtype=torch.float64):
    return Dense(nn.Linear(k, d, bias, dtype=dtype), dropout)


@pytest.mark.ex8
def test_forward_adds_the_update():
    layer, x = dense(5, 7), randn(2, 3, 5)
    expected = x @ (layer.linear.weight + layer.W).T + layer.linear.bias
    for training in (True, False):
        assert_close(layer.train(training)(x), expected, f"W0 x + bias + ΔW x, training = {training}")


@pytest.mark.ex8
def test_dropout_is_for_the_updates_input_in_training():
    layer, x = dense(5, 7, dropout=1.0), randn(2, 3, 5)
    frozen = x @ layer.linear.weight.T + layer.linear.bias
    assert_close(layer.train()(x), frozen, "with all of the update's input dropped, the frozen layer's output is left")
    assert_close(layer.eval()(x), frozen + x @ layer.W.T, "eval() knows no dropout")
    layer, ones = dense(5, 7, dropout=0.5).train(), torch.ones(2000, 5, dtype=torch.float64)
    mean = (layer(ones) - layer.linear(ones)).mean(0)
    assert_close(mean, layer.W.sum(1), "what is not dropped is scaled up, so that the mean stays", tol=0.2)


@pytest.mark.ex8
def test_moras_update_has_M_between_the_operators():
    for name, (k, d) in itertools.product(("truncation", "decoupling", "rotation"), [(13, 20), (20, 13), (12, 12)]):
        layer, x = randomise(MoRALinear(nn.Linear(k, d, dtype=torch.float64), 2, name)), randn(2, 3, k)
        W = formula(name, layer.M, k, d, layer.operator)
        assert_close(layer.update(x), x @ W.T, f"update: {name}, {k} to {d}", tol=1e-6)
        expected = x @ (layer.linear.weight + W).T + layer.linear.bias
        gradient, = torch.autograd.grad(expected.square().sum(), layer.M)
        for training in (True, False):
            y = layer.train(training)(x)
            assert_close(y, expected, f"{name}, {k} to {d}, training = {training}", tol=1e-6)
            got, = torch.autograd.grad(y.square().sum(), layer.M)
            assert_close(got, gradient, f"{name}, {k} to {d}, training = {training}: gradient of M", tol=1e-6)


@pytest.mark.ex9
def test_delta_weight_is_the_updates_matrix():
    for k, d in [(5, 7), (7, 5), (6, 6)]:
        layer = dense(k, d, dropout=1.0)
        for training in (True, False):
            hint = f"ΔW of {k} inputs and {d} outputs, without W0, bias and dropout, training = {training}"
            assert_close(layer.train(training).delta_weight(), layer.W, hint)
    layer = dense(5, 7, dtype=torch.bfloat16)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = layer.delta_weight()
        assert got.dtype == torch.float32, f"ΔW of a bfloat16 layer is float32 (autocast {autocast}), not {got.dtype}"
        assert torch.equal(got, layer.W), f"ΔW was rounded to bfloat16 on its way (autocast {autocast})"


@pytest.mark.ex10
@pytest.mark.parametrize("bias", [True, False])
def test_merge_makes_a_plain_layer(bias):
    layer, x = dense(5, 7, dropout=1.0, bias=bias).train(), randn(2, 3, 5)
    expected = x @ (layer.linear.weight + layer.W).T + (layer.linear.bias if bias else 0)
    before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    merged = layer.merge()
    assert type(merged) is nn.Linear, f"an nn.Linear is wanted, not {type(merged).__name__}"
    assert_close(merged(x), expected, "the merged layer computes W0 x + ΔW x, and the bias if there is one")
    for parameter in merged.parameters():
        parameter.data.fill_(9)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), f"merge() changed {name} of the layer, or shares its memory"


@pytest.mark.ex10
def test_merging_rounds_once():
    layer = dense(40, 30, dtype=torch.bfloat16)
    layer.W.data.mul_(0.01)
    expected = (layer.linear.weight.float() + layer.W).bfloat16()
    for got in (layer.merged_weight(), layer.merge().weight):
        assert got.dtype == torch.bfloat16, f"the merged weight has W0's type, bfloat16, not {got.dtype}"
        assert torch.equal(got, expected), "add W0 and ΔW in float32, and round the sum: rounding ΔW first loses bits"


@pytest.mark.ex11
def test_lora_begins_with_a_random_A_and_no_B():
    for method, trains in dict(lora={"A", "B"}, asylora={"B"}).items():
        layer = mora.METHODS[method](nn.Linear(400, 30), 4)
        assert (layer.A.shape, layer.B.shape) == ((4, 400), (30, 4)), "A is r x k, B is d x r"
        assert layer.A.any() and not layer.B.any(), "A begins at random and B at zero, so that ΔW is zero"
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == trains, f"what trains in {method}"
        A, B = layer.A, layer.B
        drawn = []
        for seed in (1, 1, 2):
            randomise(layer).reset(generator(seed))
            assert layer.A is A and layer.B is B, "reset() works in place: the optimizer holds these very tensors"
            assert not B.any(), "reset() makes B zero"
            drawn.append(A.clone())
        assert torch.equal(drawn[0], drawn[1]), "A is drawn from the generator: the same seed drew another one"
        assert not torch.equal(drawn[1], drawn[2]), "reset() draws a new A: another seed drew the same one"


@pytest.mark.ex12
def test_dora_begins_as_the_layer_it_wraps():
    linear, x = nn.Linear(5, 8, dtype=torch.float64), randn(2, 3, 5)
    layer = DoRALinear(linear, 2)
    assert_close(layer.magnitude, linear.weight.norm(dim=1), "magnitude begins as the length of each row of W0")
    assert_close(layer(x), linear(x), "a DoRA layer begins as the layer that it wraps")
    randomise(layer).reset(generator(0))
    assert_close(layer.magnitude, linear.weight.norm(dim=1), "magnitude after reset()")
    assert_close(layer.delta_weight(), torch.zeros(8, 5), "ΔW after reset()")


@pytest.mark.ex12
def test_dora_drops_only_what_goes_through_A_and_B():
    layer, x = randomise(DoRALinear(nn.Linear(5, 8, dtype=torch.float64), 2, dropout=1.0)), randn(2, 3, 5)
    assert_close(layer.train()(x), dora(layer, x, 0 * x), "with B A's input dropped, W0 x is left, scaled as before")
    assert_close(layer.eval()(x), dora(layer, x, x), "eval() knows no dropout")


@pytest.mark.ex12
def test_dora_merges():
    for bias in (True, False):
        layer, x = randomise(DoRALinear(nn.Linear(5, 8, bias, dtype=torch.float64), 2)), randn(2, 3, 5)
        V = layer.linear.weight + 2 * layer.B @ layer.A
        expected = layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
        assert_close(layer.delta_weight(), expected - layer.linear.weight, "ΔW is magnitude · V / ‖V‖ - W0")
        assert_close(layer.merge()(x), layer(x), f"merge() with bias {bias}")


@pytest.mark.ex13
def test_merge_and_reset_moves_the_update_into_the_weight():
    layer = dense(5, 7)
    weight, expected = layer.linear.weight, (layer.linear.weight + layer.W).clone()
    a = generator(3)
    layer.merge_and_reset(a)
    assert layer.linear.weight is weight, "the weight is written in place: a compiled model goes on with this tensor"
    assert_close(weight, expected, "after merge_and_reset() the weight is W0 + ΔW")
    assert not layer.W.any(), "the adapter was not reset"
    assert layer.generator is a, "reset() was not given the generator"


@pytest.mark.ex13
def test_moras_reset_makes_M_zero_and_regroups():
    layer, a = randomise(MoRALinear(nn.Linear(8, 8), 1, "truncation")), generator(3)
    M, given = layer.M, []
    layer.operator.regroup = lambda generator=None: given.append(generator)
    layer.reset(a)
    assert layer.M is M and not M.any(), "M becomes zero, in place: the optimizer holds this very tensor"
    assert len(given) == 1 and given[0] is a, "the operator's regroup() is called once, with the generator"


@pytest.mark.ex13
def test_restart_forgets_what_the_optimizer_knew_of_the_adapters():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    model = mora.add_adapters(model, "mora", 1, "truncation")
    model[1].requires_grad_(True)
    optimizer = train.make_optimizer(model, argparse.Namespace(method="remora", weight_decay=0.0, device="cpu"))
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoRALinear, "reset", lambda self, generator=None: given.append(generator))
        for step in range(2):
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
        a = generator(3)
        train.restart(model, optimizer, a)
    assert len(given) == 2 and all(each is a for each in given), "both adapters are merged and reset by the generator"
    known = {name for name, p in model.named_parameters() if optimizer.state.get(p)}
    assert not known & {"0.M", "2.M"}, "Adam still has means of M's old gradients, which would move the new M"
    assert known == {"1.weight", "1.bias"}, f"what is in no adapter, the norm here, keeps its state: got {known}"


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 14: ReMoRA's groups. test_groups and test_rank_of_remora in test_mora.py look at what comes of them


@pytest.mark.ex14
def test_regroup_deals_inputs_and_outputs_from_the_generator_in_place():
    for pair in [("random", "random"), ("random", "strided"), ("contiguous", "random")]:
        operator, dealt = make(31, 31, 4, "sharing", groups=pair), []
        tensors = operator.in_group, operator.out_group
        for seed in (1, 1, 2):
            operator.regroup(generator(seed))
            assert (operator.in_group is tensors[0]) and (operator.out_group is tensors[1]), (
                "groups are written in place: a compiled model goes on with these very tensors")
            dealt.append([group.tolist() for group in tensors])
        for how, first, same, other in zip(pair, *dealt):
            assert first == same, "the same seed dealt other groups: runs on two GPUs would part ways"
            assert (first != other) == (how == "random"), f"groups {pair}: new ones are drawn where they are random"


# ----------------------------------------------------------------------------------------------------------------------
# Exercises 15 to 17: training and measuring


@pytest.mark.ex15
def test_the_mask_of_a_worked_example():
    """"ab" asks, "cde" answers: the b is asked for c, the c for d, d for e, e for the end token, 256."""
    dataset = data.PromptPairs([("ab", "cde"), ("f", "")], [("g", "h")], data.get_tokenizer("bytes"), 8, 2, seed=0)
    idx, targets = dataset.pad(dataset.train)
    a, b, c, d, e, f, end, none = *b"abcdef", 256, -100
    assert idx.tolist() == [[a, b, c, d, e, end, end, end], [f] + [end] * 7], "idx: the tokens but the last, padding"
    assert targets.tolist() == [[none, c, d, e, end, none, none, none], [end] + [none] * 7], (
        "targets: what follows each token, if it belongs to the completion or is the end; -100 elsewhere")


def result(label, rate, seed, **metrics):
    return {"label": label, "seed": seed, "metrics": metrics, "config": {"learning_rate": rate}}


def best(results):
    """{label: {(rate, seed), ...}} of what `at_best_rate` chooses."""
    chosen = train.at_best_rate(results)
    assert all(any(one is other for other in results) for one in chosen), "the chosen results, as they were given"
    labels = {one["label"] for one in chosen}
    return {label: {(one["config"]["learning_rate"], one["seed"]) for one in chosen if one["label"] == label}
            for label in labels}


@pytest.mark.ex17
def test_every_setting_is_shown_at_its_own_best_rate():
    accuracy = {("lora r2", 0.01): (0.5, 0.6), ("lora r2", 0.02): (0.9, 0.1), ("lora r2", 0.05): (0.2, 0.3),
                ("mora r2", 0.01): (0.3, 0.2), ("mora r2", 0.02): (0.4, 0.4), ("mora r2", 0.05): (0.6, 0.9)}
    results = [result(label, rate, seed, loss=1 - value if rate < 0.05 else 5, char_accuracy=value)
               for (label, rate), values in accuracy.items() for seed, value in enumerate(values)]
    expected = {"lora r2": {(0.01, 0), (0.01, 1)}, "mora r2": {(0.05, 0), (0.05, 1)}}
    hint = "the best mean accuracy over seeds is 0.55 at rate 0.01 for lora, and 0.75 at rate 0.05 for mora"
    for order in (results, results[::-1]):
        assert best(order) == expected, f"{hint}; of each, the results of all seeds"


@pytest.mark.ex17
def test_without_an_accuracy_the_lowest_loss_on_held_out_text_is_best():
    results = [result("lora", 0.01, 0, loss=1.0, val_loss=3.0), result("lora", 0.02, 0, loss=2.0, val_loss=2.5),
               result("lora", 0.05, 0, loss=0.5, val_loss=2.7)]
    assert best(results) == {"lora": {(0.02, 0)}}, "the rates' val_loss is 3.0, 2.5 and 2.7: the second is best"


@pytest.mark.ex17
def test_a_rate_at_which_a_seed_diverged_is_not_the_best():
    results = [result("lora", 0.01, seed, val_loss=3.0) for seed in (0, 1)] + [result("lora", 0.02, 1, val_loss=2.0)]
    assert best(results) == {"lora": {(0.01, 0), (0.01, 1)}}, "seed 0 diverged at 0.02: what is left of it is luck"
    results.append(result("lora", 0.02, 0, val_loss=math.nan))
    for order in (results, results[::-1]):
        assert best(order) == {"lora": {(0.01, 0), (0.01, 1)}}, "a loss that is not a number is no result either"
    results = [result("lora", rate, 0, char_accuracy=1.0) for rate in (0.02, 0.01)]
    assert best(results) == {"lora": {(0.02, 0)}}, "of equals, the rate that comes first"


# ----------------------------------------------------------------------------------------------------------------------
# Exercise 18: an operator of your own. The four of the paper pass as well, in one test with yours


SIZES = [(13, 22), (22, 13), (12, 12), (7, 31)]  # k, d


def every_operator():
    """(what it is, a layer with M at random, k, d) for each operator, shape and rank."""
    for name, (k, d), rank in itertools.product(OPERATORS, SIZES, (1, 3)):
        layer = randomise(MoRALinear(nn.Linear(k, d, dtype=torch.float64), rank, name))
        yield f"{name}, {k} inputs, {d} outputs, rank {rank}", layer, k, d


@pytest.mark.ex18
def test_an_operator_is_two_linear_maps():
    for what, layer, k, d in every_operator():
        compress, decompress, x, y = layer.operator.compress, layer.operator.decompress, randn(2, 3, k), randn(2, 3, k)
        for f, x, y in ((compress, x, y), (decompress, compress(x), compress(y))):
            before = x.clone()
            assert_close(f(2 * x - y), 2 * f(x) - f(y), f"{what}: f(2x - y) = 2 f(x) - f(y)")
            assert_close(f(x)[1, 2], f(x[1, 2]), f"{what}: a vector alone, and in a batch")
            assert torch.equal(x, before), f"{what}: x itself was changed"
        assert compress(randn(k)).shape[-1] == len(layer.M), f"{what}: compress ends in r̂ = {len(layer.M)} numbers"


@pytest.mark.ex18
def test_an_operator_merges_exactly():
    for what, layer, k, d in every_operator():
        x, merged = randn(2, 3, k), layer.merge()
        for training in (True, False):
            y = layer.train(training)(x)
            assert y.shape == (2, 3, d), f"{what}: expected {d} outputs, got shape {tuple(y.shape)}"
            assert_close(merged(x), y, f"{what}, training = {training}: the merged layer is the adapted one")
        assert layer.delta_weight().any(), f"{what}: ΔW is zero with M at random"


@pytest.mark.ex18
def test_an_operator_keeps_the_budget_and_learns():
    for what, layer, k, d in every_operator():
        own = {name: p.numel() for name, p in layer.named_parameters() if p.requires_grad}
        budget = (k + d) * layer.rank
        assert sum(own.values()) <= budget, f"{what}: LoRA has {budget} parameters, this {own}"
        x, target = randn(2, k), randn(2, d)
        for training in (True, False):
            loss = (layer.train(training)(x) * target).sum()
            gradient, = torch.autograd.grad(loss, layer.M)
            direction = torch.randn_like(layer.M)
            with torch.no_grad():
                layer.M += direction
                difference = (layer(x) * target).sum() - loss
                layer.M -= direction
            assert_close((gradient * direction).sum(), difference, f"{what}: the gradient of M", tol=1e-9)
