"""Tests of controls.py: the layers keep to the budget, learn from zero, merge, and are what their docstrings say."""

import pytest
import torch
from torch import nn

import controls
import mora
from controls import Aligned, AlignedOverlap


def make(name, k=12, d=20, rank=2):
    """A layer of a control, or of MoRA with its operator, in float64, whose parameters are random."""
    linear = nn.Linear(k, d, dtype=torch.float64)
    if name in controls.METHODS:
        layer = controls.METHODS[name](linear, rank, dropout=0.0)
    else:
        layer = mora.MoRALinear(linear, rank)
        layer.operator = controls.OPERATORS[name](k, d, layer.size)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("name", [*controls.METHODS, *controls.OPERATORS])
@pytest.mark.parametrize("k, d, rank", [(12, 20, 2), (20, 12, 3), (7, 7, 1)])
def test_a_layer_of_any_control(name, k, d, rank):
    layer = make(name, k, d, rank)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in trained) <= (k + d) * rank
    x = torch.randn(3, 50, k, dtype=torch.float64)
    y, update = layer(x), layer.delta_weight()
    assert torch.allclose(y, layer.linear(x) + x @ update.T) and torch.allclose(layer.merge()(x), y)
    y.square().mean().backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in trained), "every parameter takes part"
    layer.reset()
    assert torch.equal(layer(x), layer.linear(x))


def test_strided_sums_is_of_low_rank_and_scattered_is_not():
    ranks = {name: int(torch.linalg.matrix_rank(make(name, 64, 64).delta_weight())) for name in controls.METHODS}
    assert ranks == {"strided_sums": 4, "scattered": 64, "asylora_full": 4}
    values, counts = make("scattered", 64, 64).delta_weight().unique(return_counts=True)
    assert len(values) == 16**2 and counts.eq(16).all(), "each of r̂² numbers as often"


def test_contiguous_strided_is_a_pair_of_the_cycle():
    operator, cycle = controls.ContiguousStrided(24, 36, 8).sharings[0], mora.Sharing(24, 36, 8, "cycle")
    for _ in range(2):
        cycle.regroup()
    assert torch.equal(operator.in_group, cycle.in_group) and torch.equal(operator.out_group, cycle.out_group)


def delta_weight(operator, M):
    return operator(torch.eye(operator.in_features, dtype=M.dtype), M).T


def test_overlap_has_as_many_copies_as_its_name_says():
    assert [len(controls.OPERATORS[f"overlap_{copies}"](12, 20, 4).sharings) for copies in (2, 8)] == [2, 8]


def test_four_pairs_is_the_sum_of_the_cycle_and_by_inputs_scales_by_outputs_over_inputs():
    M = torch.randn(8, 8, dtype=torch.float64)
    pairs = [delta_weight(mora.Sharing(48, 24, 8, pair), M) for pair in mora.Sharing.CYCLE]
    assert torch.allclose(delta_weight(controls.FourPairs(48, 24, 8), M), sum(pairs) / 2)
    assert torch.allclose(delta_weight(controls.SharingByInputs(48, 24, 8), M), pairs[0] / 2)
    wide = delta_weight(mora.Sharing(24, 48, 8), M)
    assert torch.allclose(delta_weight(controls.SharingByInputs(24, 48, 8), M), wide), "only where k > d"


def test_signed_overlap_has_a_sign_for_each_input_and_output():
    M, operator = torch.rand(4, 4, dtype=torch.float64) + 1, controls.SignedOverlap(24, 36, 4, copies=1)
    update, sharing = delta_weight(operator, M), operator.sharings[0]
    assert torch.allclose(update.abs(), M[sharing.out_group][:, sharing.in_group])
    signs = update.sign()
    assert torch.linalg.matrix_rank(signs) == 1 and {*signs.unique().tolist()} == {-1, 1}
    assert not (signs == signs[0]).all() and not (signs == signs[:, :1]).all(), "some of each, on both sides"


@pytest.mark.parametrize("name", ["aligned", "aligned_overlap"])
def test_aligned_groups_are_those_of_all_layers_until_a_merge(name):
    def groups(operator):
        return [(each.in_group, each.out_group) for each in operator.sharings]

    torch.manual_seed(1)
    first, second = (controls.OPERATORS[name](24, 24, 8) for _ in range(2))
    before = torch.cat([group.clone() for pair in groups(first) for group in pair])
    for merge in range(2):
        dealt = [[group for pair in groups(operator) for group in pair] for operator in (first, second)]
        assert all(torch.equal(a, b) for a, b in zip(*dealt)), "one dealing for both layers"
        assert all(torch.equal(*pair) for pair in groups(first)), "for inputs and outputs of one width"
        assert len({tuple(pair[0].tolist()) for pair in groups(first)}) == len(groups(first)), "each copy has its own"
        assert all(group.bincount().eq(3).all() for group in dealt[0])
        for operator in (first, second):
            operator.regroup(torch.Generator().manual_seed(5))
    assert not torch.equal(before, torch.cat([group for pair in groups(first) for group in pair])), "a merge deals anew"
