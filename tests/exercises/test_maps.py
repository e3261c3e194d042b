"""The graders of EXERCISES.md for linear maps: what every map owes, then exercises 6 to 12, 14 and 24 by themselves.

Of every map (`compress`, `decompress`, a layer's update or forward) it is asked: any number of dimensions, the type of
x, x itself unchanged, its gradient, any device. test_exercises.py has the other exercises, and says how all are graded.
"""

import contextlib
import copy
import itertools
import math
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from pytest import mark
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import measure
import mora
from mora import OPERATORS, DoRALinear, LoRALinear, MoRALinear

SHAPES = [(6, 12, 2), (12, 6, 2), (13, 20, 4), (20, 13, 6), (9, 5, 4), (5, 3, 1), (7, 7, 7), (26, 5, 4),
          (3, 11, 2), (7, 8, 3)]  # k, d, r̂


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_close(got, expected, hint, tol=1e-10):
    """Of the same shape and type, and equal up to `tol` times the largest number expected, or 1 if it is larger."""
    assert isinstance(got, torch.Tensor), f"{hint}: expected a tensor, got {type(got).__name__}"
    assert got.shape == expected.shape, f"{hint}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    assert got.dtype == expected.dtype, f"{hint}: expected {expected.dtype}, got {got.dtype}"
    if got.numel():
        largest = max(1, expected.double().abs().max())
        error = (got.double() - expected.double()).abs().nan_to_num(math.inf) / largest
        worst = tuple(i.item() for i in torch.unravel_index(error.argmax(), error.shape))
        assert error[worst] <= tol, (
            f"{hint}: expected {expected[worst]:.6g} at {worst}, got {got[worst]:.6g}, which is off by "
            f"{error[worst]:.1e} of the largest number; {tol:.0e} is allowed")


def outer(upstream, x):
    """The gradient of ΔW: gᵀ x, summed over tokens."""
    return upstream.flatten(0, -2).T @ x.flatten(0, -2)


def gradients(y, inputs, upstream, what):
    """{name: gradient} of the named inputs; a sentence where one is missing."""
    found = [None]
    if y.requires_grad:
        found = torch.autograd.grad(y, [*inputs.values()], upstream, allow_unused=True, retain_graph=True)
    for name, gradient in zip(inputs, found):
        assert gradient is not None, f"{what}: no gradient arrives at {name}; look for detach(), .data and no_grad()"
    return dict(zip(inputs, found))


@contextlib.contextmanager
def in_place(owner, *names):
    """What is done here keeps these tensors and their memory."""
    before = {name: (attrgetter(name)(owner), attrgetter(name)(owner).data_ptr()) for name in names}
    yield
    for name, (tensor, pointer) in before.items():
        assert attrgetter(name)(owner) is tensor and tensor.data_ptr() == pointer, (
            f"{name} is to be written in place, by copy_() or zero_(): an optimizer and a compiled model hold this "
            "very tensor and its memory, and here is another one")


def check_draws(draw, what):
    """`draw(generator)` draws at random from the generator that it is given, or from torch's own if that is None."""
    one, same, other = (draw(generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same), f"{what}: two generators with the same seed gave different numbers"
    assert not torch.equal(one, other), f"{what}: generators with different seeds gave the same numbers"
    torch.manual_seed(3)
    state, moving = torch.get_rng_state(), generator(1)
    assert not torch.equal(draw(moving), draw(moving)), f"{what}: two draws in a row from one generator are the same"
    assert torch.equal(state, torch.get_rng_state()), f"{what}: torch's global generator was used or seeded as well"
    first, second = draw(None), draw(None)
    assert not torch.equal(first, second), f"{what}: with generator=None, two draws in a row are the same"
    torch.manual_seed(3)
    assert torch.equal(first, draw(None)), f"{what}: generator=None is to mean torch's global generator"


# ---- Layers and operators, made so that the functions of later exercises may be missing ------------------------------
class Dense(mora.Adapter):
    """An adapter whose ΔW is a parameter, W: what all adapters share can be seen with it alone."""

    def __init__(self, linear, rank=1, dropout=0.0):
        super().__init__(linear, rank, dropout)
        self.W = self.new_parameter(self.out_features, self.in_features)

    def update(self, x):
        return F.linear(x, self.W.to(x.dtype))


def randomise(module):
    """Every trainable parameter at random: what begins at zero hides mistakes."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return module


def build(kind, k, d, rank=2, bias=True, dtype=torch.float64, **options):
    """A layer of some class, which may not ask exercise 5 for r̂."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mora, "square_size", lambda k, d, rank: rank)
        return kind(nn.Linear(k, d, bias, dtype=dtype), rank, **options)


def operator(name, k, d, size):
    """An operator; sharing has groups that are drawn here, not by `assign` and `regroup`."""
    name, *fold = name.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mora.Sharing, "regroup", lambda self, generator=None: None)
        made = OPERATORS[name](k, d, size, **({"fold": True} if fold else {}))
    if name == "sharing":
        made.in_group.copy_(torch.randperm(size)[torch.randperm(k) % size])  # no group is longer because of its number
        made.out_group.copy_(torch.randperm(size)[torch.randperm(d) % size])
    return made


VARIANTS = ["truncation", "sharing", "decoupling", "decoupling fold", "rotation", "rotation fold"]
OWN = [name for name in OPERATORS if name not in VARIANTS]  # what you wrote in exercise 24

# ---- The maps, by exercise -------------------------------------------------------------------------------------------
MAPS = {1: ["LoRA update"], 2: ["Dense forward"], 6: ["truncation compress", "truncation decompress"],
        7: ["sharing compress", "sharing decompress"],
        9: ["decoupling compress", "wide decoupling compress", "wide decoupling fold compress"],
        10: ["decoupling decompress", "wide decoupling decompress", "wide decoupling fold decompress"],
        11: ["rotation compress", "rotation rotate"], 12: ["sharing forward", "rotation forward"], 13: ["DoRA forward"],
        14: ["sharing merged", "wide rotation fold merged"],
        24: [f"{name} {method}" for name in OWN for method in ("compress", "decompress", "forward", "merged")]}
every_map = mark.parametrize("name", [pytest.param(name, marks=getattr(mark, f"ex{number}"))
                                      for number, names in MAPS.items() for name in names])


def linear_map(name, dtype=torch.float64, k=13, d=20, size=4):
    """(module, function of it and x, shape of a vector) of a map that an exercise asks for."""
    *kind, method = name.removeprefix("wide ").split()
    k, d = (d, k) if name.startswith("wide") else (k, d)
    call, shape = (lambda module, x: getattr(module, method)(x)), (k,)
    if layer := {"LoRA": LoRALinear, "DoRA": DoRALinear, "Dense": Dense}.get(kind[0]):
        return randomise(build(layer, k, d, bias=False, dtype=dtype)), call, shape
    if kind[0] in OWN:
        made = MoRALinear(nn.Linear(k, d), 2, kind[0]).operator
        size, shape_of_z = made.size, made.compress(torch.zeros(k)).shape
    else:
        made = operator(" ".join(kind), k, d, size)
        shape_of_z = (made.rows, size) if hasattr(made, "rows") else (size,)
    if method in ("compress", "decompress", "rotate"):
        return made, call, shape if method == "compress" else shape_of_z
    made.M, made.W = nn.Parameter(torch.randn(size, size)), nn.Parameter(randn(d, k).to(dtype))
    if method == "forward":
        return made, lambda module, x: module(x, module.M), shape
    return made, lambda module, x: mora.MergedProduct.apply(x, module.M, module.W, None, module), shape


@every_map
def test_any_number_of_dimensions(name):
    module, f, shape = linear_map(name)
    x = randn(2, 3, 2, *shape)
    y = f(module, x)
    assert_close(f(module, x[1, 2, 0]), y[1, 2, 0], "one vector alone, and the same one in a batch")
    assert_close(f(module, x[1]), y[1], "a batch (3, 2), and the same one in a batch (2, 3, 2)")
    assert_close(f(module, x[:1, :1]), y[:1, :1], "a batch (1, 1, 2), and the same one in a batch (2, 3, 2)")
    assert_close(f(module, x[1, 2, :1]), y[1, 2, :1], "a batch of one, and the same one in a batch (2, 3, 2)")
    for empty in (x[:0], x[:, :0]):
        assert_close(f(module, empty), y[:len(empty), :empty.shape[1]], f"an empty batch {tuple(empty.shape)}")


@every_map
def test_the_type_of_x(name):
    for dtype, tol in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        module, f, shape = linear_map(name, dtype)
        x, own = randn(3, *shape).to(dtype), copy.deepcopy(module.state_dict())
        y = f(module, x)
        for what, tensor in module.state_dict().items():
            same = tensor.dtype == own[what].dtype and torch.equal(tensor, own[what])
            assert same, f"{what} was changed by x in {dtype}: it is {own[what].dtype}, and others need it"
        assert y.dtype == dtype, f"x is {dtype}, and the result {y.dtype}: bring what meets x to x's type"
        assert_close(y.double(), f(copy.deepcopy(module).double(), x.double()), f"{dtype}, beside float64", tol)
    module, f, shape = linear_map(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = f(module, torch.randn(3, *shape)).dtype
    if name.split()[-1] in ("update", "forward", "merged"):
        assert got == torch.bfloat16, f"under autocast to bfloat16 an nn.Linear gives bfloat16, and this {got}"


@every_map
def test_x_stays_what_it_is(name):
    module, f, shape = linear_map(name)
    x = randn(2, 3, *shape)
    before, y = x.clone(), f(module, x).clone()
    assert torch.equal(x, before), "x itself was changed; the caller still needs it"
    assert_close(f(module, x), y, "the same x a second time")


@every_map
def test_the_gradient_of_x(name):
    module, f, shape = linear_map(name)
    x = randn(2, 3, *shape).requires_grad_()
    y = f(module, x)
    upstream = randn(*y.shape)
    gradient = gradients(y, {"x": x}, upstream, name)["x"]
    for v in randn(3, *x.shape):
        got, expected = (gradient * v).sum(), (f(module, v) * upstream).sum().detach()
        assert_close(got, expected, "<gradient, v> is to be <upstream, f(v)> for any v, as f is linear")


class OneDevice(TorchDispatchMode):
    """Refuses operations between tensors on the CPU and on the meta device, which stands for a GPU here."""

    FINE = (torch.ops.aten.index.Tensor, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()}
        assert len(devices) < 2 or function in self.FINE, (
            f"{function} meets a tensor on the CPU, and x is on another device: make new tensors with device=x.device")
        return function(*args, **kwargs or {})


def on_another_device(module, f, expected, may_look=False):
    """`f` gives a result of this shape on the device of the module. It may look at numbers, which a GPU has."""
    with pytest.MonkeyPatch.context() as patch, OneDevice():
        patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # knows no meta device
        try:
            y = f(module.to("meta"))
        except (RuntimeError, NotImplementedError) as error:
            if may_look and any(word in str(error) for word in ("meta", "autocast")):
                return
            raise
    got = y.device.type, tuple(y.shape)
    assert got == ("meta", tuple(expected)), f"on another device, meta: expected {tuple(expected)} there, got {got}"


@every_map
def test_any_device(name):
    module, f, shape = linear_map(name)
    expected = f(module, randn(2, 3, *shape)).shape
    on_another_device(module, lambda module: f(module, randn(2, 3, *shape).to("meta")), expected, may_look=True)


@mark.parametrize("name", [pytest.param("delta_weight", marks=mark.ex3), pytest.param("merged_weight", marks=mark.ex4),
                           pytest.param("merge", marks=mark.ex4)])
def test_an_adapter_on_any_device(name):
    def f(layer):
        result = getattr(layer, name)()
        return result.weight if name == "merge" else result

    on_another_device(build(Dense, 5, 7), f, (7, 5))


def repeated(o, i, j):
    length = o.rows * o.size
    return j % o.out_features == i if o.fold and length > o.out_features else i % length == j


VALUES = {  # whether the map's matrix has a 1 at (i, j), and what to say if it has not
    "truncation compress": (lambda o, i, j: i == j, "the first r̂ inputs"),
    "truncation decompress": (lambda o, i, j: i == j, "the first r̂ outputs, then zeros"),
    "sharing compress": (lambda o, i, j: o.in_group[j] == i, "the inputs of each group are added up"),
    "sharing decompress": (lambda o, i, j: o.out_group[i] == j, "output i is a copy of z[out_group[i]]"),
    "decoupling compress": (lambda o, i, j: i == j, "input j is in row j // r̂, place j % r̂; zeros fill the last row"),
    "decoupling decompress": (repeated, "the rows side by side, repeated if they are too few, else cut, or folded")}


@mark.parametrize("name, fold", [
    pytest.param(name, fold, marks=getattr(mark, f"ex{number}")) for number in (6, 7, 9, 10) for name in MAPS[number]
    if name in VALUES for fold in ["", " fold"][:1 + (number > 8)]])
def test_the_values_of(name, fold):
    (entry, hint), (kind, method) = VALUES[name], name.split()
    for k, d, size in SHAPES:
        o = operator(kind + fold, k, d, size)
        rows = [o.rows, size] if kind == "decoupling" else [size]
        before, after = ([k], rows) if method == "compress" else (rows, [d])
        x = randn(2, 3, *before)
        ones = [[float(entry(o, i, j)) for j in range(math.prod(before))] for i in range(math.prod(after))]
        expected = (x.flatten(2) @ torch.tensor(ones, dtype=x.dtype).T).unflatten(-1, after)
        assert_close(getattr(o, method)(x), expected, f"{hint}; here k = {k}, d = {d}, r̂ = {size}{fold}")


@mark.ex8
class TestAssign:
    @mark.parametrize("kind", ["strided", "contiguous", "random"])
    def test_groups(self, kind):
        for features, size in [(12, 3), (7, 3), (13, 5), (31, 4), (100, 7), (5, 5), (4, 1), (82, 2), (123, 3)]:
            group = operator("sharing", features, features, size).assign(features, kind, None)
            what, got = f"{features} indices in {size} groups, {kind}", group.tolist()
            assert group.shape == (features,), f"{what}: expected shape ({features},), got {tuple(group.shape)}"
            assert group.dtype == torch.long, f"{what}: expected whole numbers, torch.long, got {group.dtype}"
            assert 0 <= min(got) and max(got) < size, f"{what}: they are numbered from 0 to {size - 1}, got {got}"
            lengths = [got.count(i) for i in range(size)]
            assert max(lengths) - min(lengths) <= 1, f"{what}: their lengths differ by one at most, got {lengths}"
            expected = [i % size for i in range(features)] if kind == "strided" else sorted(got)
            assert kind == "random" or got == expected, f"{what}: expected {expected}, got {got}"

    def test_random_groups_are_drawn_from_the_generator(self):
        o = operator("sharing", 31, 31, 4)
        check_draws(lambda a: o.assign(31, "random", a), "random groups")

    def test_random_groups_are_random(self):
        o, a = operator("sharing", 12, 12, 3), generator(0)
        groups = torch.stack([o.assign(12, "random", a) for _ in range(600)])
        together = (groups[:, :, None] == groups[:, None]).double().mean(0)[torch.triu(torch.ones(12, 12), 1).bool()]
        for what, share in (("least", together.min()), ("most", together.max())):
            assert abs(share - 3 / 11) < 0.1, (f"two of 12 indices share one of 3 groups in 27% of all draws; the pair "
                                               f"that does so {what} often does in {share:.0%} of 600")
        first = (groups == 0).double().mean(0)
        assert (first - 1 / 3).abs().max() < 0.1, f"each index is in group 0 in a third of all draws, got {first}"


@mark.ex9
def test_the_rows_pass_through_rotate():
    o, x = operator("decoupling", 13, 20, 4), randn(2, 3, 13)
    expected, seen = -3 * o.compress(x).flip(-2), []
    o.rotate = lambda rows: (seen.append((*rows.shape,)), -3 * rows.flip(-2))[1]
    got = o.compress(x)
    assert seen == [(2, 3, 4, 4)], f"rotate() is called once, with the rows (..., n, r̂), (2, 3, 4, 4) here; got {seen}"
    assert_close(got, expected, "what rotate() makes of the rows is what compress() returns")


def rotation_matrix(size, i):
    """Eq. 9: coordinates j and j + r̂/2 are a pair, and its angle is i θ_j."""
    R, half = torch.eye(size, dtype=torch.float64), size // 2
    for j in range(half):
        angle = i * 10000 ** (-2 * j / size)
        R[j, j], R[j, j + half] = math.cos(angle), -math.sin(angle)
        R[j + half, j], R[j + half, j + half] = math.sin(angle), math.cos(angle)
    return R


@mark.ex11
class TestRotation:
    @mark.parametrize("k, size", [(8, 2), (20, 4), (40, 6), (13, 5), (5, 1), (60, 20), (8000, 40)])
    def test_row_i_turns_by_i_times_theta(self, k, size):
        o = operator("rotation", k, k, size)
        rows = randn(2, 3, o.rows, size)
        turned = torch.stack([rows[..., i, :] @ rotation_matrix(size, i).T for i in range(o.rows)], dim=-2)
        assert_close(o.rotate(rows), turned, f"{o.rows} rows of {size}: row 0 stays, row i turns by i θ_j", tol=1e-6)

    def test_angles_in_bfloat16(self):
        o, ones = operator("rotation", 4000, 4000, 40), torch.ones(100, 40)
        assert not o.state_dict(), f"nothing of it is to be saved; got {[*o.state_dict()]}"
        assert_close(o.bfloat16().rotate(ones.bfloat16()).float(), o.rotate(ones.double()).float(),
                     "100 rows of ones in bfloat16, whose angles are to be float32 at least", tol=0.03)


class TwoRows(mora.Operator):
    """x, and x backwards, each through M, and the outputs added: an operator that is none of the project's."""

    def compress(self, x):
        x = x[..., torch.arange(self.size, device=x.device) % self.in_features]
        return torch.stack([x, x.flip(-1)], dim=-2)

    def decompress(self, z):
        return z.sum(-2)[..., torch.arange(self.out_features, device=z.device) % self.size]


every_variant = mark.parametrize("name", [*VARIANTS, "two rows"])


def variant(name, k, d):
    return TwoRows(k, d, 4) if name == "two rows" else operator(name, k, d, 4)


def matrix(o, M):
    """ΔW (d, k), column by column, as Eq. 2 has it."""
    return torch.stack([o.decompress(o.compress(x) @ M.T) for x in torch.eye(o.in_features, dtype=M.dtype)], dim=1)


@mark.ex12
@every_variant
class TestEq2:
    def test_M_stands_between_the_operators(self, name):
        for k, d in [(13, 20), (20, 13), (12, 12)]:
            o, M, x = variant(name, k, d), randn(4, 4), randn(2, 3, k)
            assert_close(o(x, M), x @ matrix(o, M).T, f"decompress(M compress(x)), {k} to {d}")

    def test_M_learns(self, name):
        o, x, upstream = variant(name, 13, 20), randn(2, 3, 13), randn(2, 3, 20)
        units = torch.eye(16, dtype=torch.float64).view(16, 4, 4)
        expected = torch.stack([(matrix(o, unit) * outer(upstream, x)).sum() for unit in units]).view(4, 4)
        for what, M in (("at random", randn(4, 4)), ("at zero, where it begins", 0 * randn(4, 4))):
            got = gradients(o(x, M.requires_grad_()), {"M": M}, upstream, f"M {what}")["M"]
            assert_close(got, expected, f"the gradient of M {what}")
        M, o = nn.Parameter(torch.randn(4, 4)), variant(name, 13, 20).bfloat16()
        o(x.bfloat16(), M).float().square().sum().backward()
        assert M.grad is not None and M.grad.any(), "M is float32 and x bfloat16: M is to get a gradient all the same"


# ---- The merged forward ----------------------------------------------------------------------------------------------
def merged(o, x, M, W, bias=None):
    return mora.MergedProduct.apply(x, M, W, bias, o)


@mark.ex14
class TestMergedForward:
    @every_variant
    def test_outputs_and_gradients(self, name):
        for k, d in [(13, 20), (20, 13), (12, 12), (26, 6)]:
            o, W, bias, upstream = variant(name, k, d), randn(d, k), randn(d), randn(2, 3, d)
            for zero, needs in itertools.product((1, 0), ("xM", "M")):  # M at random, and at zero, where it begins
                given = {"x": randn(2, 3, k), "M": zero * randn(4, 4)}
                inputs = {what: tensor.requires_grad_() for what, tensor in given.items() if what in needs}
                y, expected = merged(o, *given.values(), W, bias), F.linear(given["x"], W, bias) + o(*given.values())
                assert_close(y, expected, f"W0 x + ΔW x + bias, {k} to {d}")
                found, wanted = (gradients(outputs, inputs, upstream, "MergedProduct") for outputs in (y, expected))
                for what in inputs:
                    assert_close(found[what], wanted[what], f"the gradient of {what}, {k} to {d}, where {needs} train")

    @mark.parametrize("name", ["truncation", "sharing", "decoupling", "rotation"])
    def test_its_cost(self, name):
        o, W, x, kept = operator(name, 64, 48, 8), randn(48, 64), randn(500, 64).requires_grad_(), {}
        M = randn(8, 8).requires_grad_()

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = merged(o, x, M, W)
        for tensor in tree_leaves(vars(y.grad_fn)):  # what ctx has as an attribute
            if isinstance(tensor, torch.Tensor):
                pack(tensor)
        for tensor in (M, W):  # which exist anyway
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        z = 500 * (64 if name in ("decoupling", "rotation") else 8)
        assert sum(kept.values()) <= z + 64, (
            f"{sum(kept.values()):,} numbers are kept for the backward pass beside M and W0, where {z:,} of the inputs "
            "would do: keep compress(x) where it is smaller than x, and not as a view of x; build W0 + ΔW again")
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        times = counter.get_total_flops() / (2 * 500 * 64 * 48)
        assert times < 1.5, (f"the backward pass takes {times:.2f} times the one product that the gradient of x needs; "
                             "M's needs little more, and to form that of ΔW (d, k) would be a second")

    def test_under_autocast(self):
        o, W = operator("rotation", 13, 20, 4), torch.randn(20, 13)
        inputs = {"x": torch.randn(6, 13, requires_grad=True), "M": torch.randn(4, 4, requires_grad=True)}
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = merged(o, *inputs.values(), W), F.linear(inputs["x"], W) + o(*inputs.values())
        found, wanted = (gradients(outputs, inputs, torch.ones_like(y), "under autocast") for outputs in (y, expected))
        for name in inputs:
            assert_close(found[name], wanted[name], f"the gradient of {name} under autocast", tol=0.03)

    def test_extra_flops(self):
        for tokens, k, d, r in [(100, 30, 50, 2), (7, 50, 30, 4)]:
            x, g, A, B, z = (torch.randn(*shape) for shape in ((tokens, k), (tokens, d), (r, k), (d, r), (tokens, r)))
            with FlopCounterMode(display=False) as defined:
                (x @ A.T) @ B.T, (g @ B) @ A, g.T @ z, z.T @ x  # forward, and the gradients of x, B and A
            with FlopCounterMode(display=False) as merged:
                B @ A, B @ A, g.T @ (x @ A.T), (g @ B).T @ x  # ΔW twice, and the gradients of B and A
            expected = defined.get_total_flops(), merged.get_total_flops()
            got = measure.extra_flops(tokens, k, d, r)
            assert got == expected, f"{tokens} tokens, {k} to {d}, r = {r}: expected {expected}, got {got}"


# ---- An operator of your own. The paper's four pass as well ----------------------------------------------------------
def layers(name, dtype=torch.float64):  # with M at random, for some shapes, ranks and numbers of tokens
    for k, d, rank, tokens in [(13, 22, 1, 2), (13, 22, 3, 200), (22, 13, 1, 200), (22, 13, 3, 2), (12, 12, 3, 200)]:
        layer = randomise(MoRALinear(nn.Linear(k, d, dtype=dtype), rank, name))
        yield f"{k} inputs, {d} outputs, rank {rank}, {tokens} tokens", layer, randn(tokens, k).to(dtype)


@mark.ex24
@mark.parametrize("name", OPERATORS)
class TestOwnOperator:
    def test_it_merges_exactly(self, name):
        for what, layer, x in layers(name):
            size = layer.operator.compress(x).shape[-1]
            assert size == layer.size, f"{what}: compress ends in r̂ = {layer.size} numbers, got {size}"
            assert layer.delta_weight().any(), f"{what}: ΔW is zero, and M is at random"
            for training in (False, True):
                y, plain = layer.train(training)(x), plain if training else layer.merge()
                assert_close(plain(x), y, f"{what}: merge() computes what the layer does, training {training}")

    def test_it_keeps_the_budget(self, name):
        for what, layer, _ in layers(name):
            own = {name: p.numel() for name, p in layer.named_parameters() if not name.startswith("linear.")}
            budget = (layer.in_features + layer.out_features) * layer.rank
            right = own.keys() == {"M"} and own["M"] <= budget
            assert right, f"{what}: M is the only parameter, with at most LoRA's {budget} numbers; got {own}"

    def test_M_learns(self, name):
        for what, layer, x in layers(name):
            target, direction = randn(len(x), layer.out_features), torch.randn_like(layer.M)
            for start in (layer.M.detach().clone(), torch.zeros_like(layer.M)):
                layer.M.data.copy_(start)
                loss = (layer(x) * target).sum()
                gradient = gradients(loss, {"M": layer.M}, None, what)["M"]
                layer.M.data += direction
                difference = ((layer(x) * target).sum() - loss).detach()
                assert_close((gradient * direction).sum(), difference, f"{what}: the gradient of M", tol=1e-8)

    def test_it_is_saved(self, name):
        for what, layer, x in layers(name):
            torch.manual_seed(9)  # another layer draws other numbers, if it draws any
            other = nn.Sequential(MoRALinear(copy.deepcopy(layer.linear), layer.rank, name))
            mora.load_adapters(other, mora.adapter_state_dict(nn.Sequential(layer)))
            assert_close(other(x), layer(x), f"{what}: a loaded adapter computes what the saved one did; what is drawn "
                         "at random has to be a registered buffer")

    def test_it_leaves_torchs_generator_moved_on(self, name):
        after = []
        for seed in (9, 10):
            torch.manual_seed(seed)
            MoRALinear(nn.Linear(13, 22), 1, name)
            after.append(torch.get_rng_state())
        assert not torch.equal(*after), (
            "after seeds 9 and 10, and a new layer, torch's generator should not be in the same state; here it is: "
            "draw from it, but do not seed it")

    def test_in_bfloat16(self, name):
        for what, layer, x in layers(name, torch.bfloat16):
            y, exact = layer(x), copy.deepcopy(layer).double()
            assert y.dtype == torch.bfloat16, f"{what}: bfloat16 in, {y.dtype} out"
            assert_close(y.double(), exact(x.double()), f"{what}, in bfloat16", tol=0.05)
