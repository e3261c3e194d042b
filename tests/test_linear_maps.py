"""What every linear map of the exercises owes, claim by claim, and what the graders in test_exercises.py share.

A map is `compress`, `decompress`, a layer's update or forward. Its values are told apart from what is asked of all maps:
any number of dimensions, the type of x, x itself unchanged, its gradient, any device.
"""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pytest import mark
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mora
from mora import OPERATORS, DoRALinear, LoRALinear, MoRALinear

SHAPES = [(6, 12, 2), (12, 6, 2), (13, 20, 4), (20, 13, 6), (9, 5, 4), (5, 3, 1), (7, 7, 7), (26, 5, 4)]  # k, d, r̂


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """All is small here, and threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_close(got, expected, hint, tol=1e-10):
    """Of this shape and type, and equal up to `tol` times the largest number expected (or 1, if that is larger)."""
    assert isinstance(got, torch.Tensor), f"{hint}: expected a tensor, got {type(got).__name__}"
    for what, ours, theirs in (("shape", *map(tuple, (expected.shape, got.shape))), ("type", expected.dtype, got.dtype)):
        assert theirs == ours, f"{hint}: expected {what} {ours}, got {theirs}"
    if got.numel():
        error = (got.double() - expected.double()).abs().nan_to_num(math.inf) / max(1, expected.double().abs().max())
        worst = tuple(i.item() for i in torch.unravel_index(error.argmax(), error.shape))
        assert error[worst] <= tol, (f"{hint}: expected {expected[worst]:.6g} at {worst}, got {got[worst]:.6g}, which is "
                                     f"off by {error[worst]:.1e} of the largest number; {tol:.0e} is allowed")


def gradients(y, inputs, upstream, what):
    """{name: gradient} of the named inputs; a sentence where one is missing."""
    found = [None]
    if y.requires_grad:
        found = torch.autograd.grad(y, [*inputs.values()], upstream, allow_unused=True, retain_graph=True)
    for name, gradient in zip(inputs, found):
        assert gradient is not None, f"{what}: no gradient arrives at {name}; look for detach(), .data, no_grad(), copies"
    return dict(zip(inputs, found))


@contextlib.contextmanager
def in_place(owner, *names):
    """What is done here keeps these tensors and their memory."""
    before = {name: (getattr(owner, name), getattr(owner, name).data_ptr()) for name in names}
    yield
    for name, (tensor, pointer) in before.items():
        assert getattr(owner, name) is tensor and tensor.data_ptr() == pointer, (
            f"{name} is to be written in place, by copy_() or zero_(): an optimizer and a compiled model hold this very "
            "tensor and its memory, and here is another one")


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
        made.in_group.copy_(torch.randperm(k) % size)
        made.out_group.copy_(torch.randperm(d) % size)
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
    for empty in (x[:0], x[:, :0]):
        assert_close(f(module, empty), y[:len(empty), :empty.shape[1]], f"an empty batch {tuple(empty.shape)}")


@every_map
def test_the_type_of_x(name):
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        module, f, shape = linear_map(name, dtype)
        x = randn(3, *shape).to(dtype)
        y, exact = f(module, x), f(copy.deepcopy(module).double(), x.double())
        assert y.dtype == dtype, f"x is {dtype}, and the result {y.dtype}: bring what meets x to x's type"
        assert_close(y.double(), exact, f"in {dtype}, compared with float64", tol)
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


def on_another_device(module, f, expected):
    """`f` gives a result of this shape on the device of the module."""
    with pytest.MonkeyPatch.context() as patch, OneDevice():
        patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # knows no meta device
        try:
            y = f(module.to("meta"))
        except (RuntimeError, NotImplementedError) as error:
            if "meta" in str(error):
                return  # it looks at the numbers, which a GPU has
            raise
    got = y.device.type, tuple(y.shape)
    assert got == ("meta", tuple(expected)), f"on another device, here meta: expected {tuple(expected)} there, got {got}"


@every_map
def test_any_device(name):
    module, f, shape = linear_map(name)
    expected = f(module, randn(2, 3, *shape)).shape
    on_another_device(module, lambda module: f(module, randn(2, 3, *shape).to("meta")), expected)


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


@mark.parametrize("name, fold", [pytest.param(name, fold, marks=getattr(mark, f"ex{number}")) for number in (6, 7, 9, 10)
                                 for name in MAPS[number] if name in VALUES for fold in ["", " fold"][:1 + (number > 8)]])
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
