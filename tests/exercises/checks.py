"""What the graders ask of gradients, memory, random numbers and devices, and layers that work while
later exercises are missing."""

import contextlib
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mora
from reference import assert_close, generator, randomise

class OneDevice(TorchDispatchMode):
    """Refuses operations between tensors on the CPU and on "meta", which stands for a GPU here."""
    aten = torch.ops.aten
    FINE = aten.index.Tensor, aten._to_copy.default, aten.copy_.default

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim()}
        assert len(devices) < 2 or function in self.FINE, (
            f"{function} meets a tensor on the CPU while x is on another device: make new tensors "
            "with device=x.device"
        )
        return function(*args, **kwargs or {})

def check_device(module, f, shape):
    """f gives a result of this shape on the module's device, unless it needs actual numbers."""
    with pytest.MonkeyPatch.context() as patch, OneDevice():
        patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        try:
            y = f(module.to("meta"))
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
        else:
            got = y.device.type, tuple(y.shape)
            assert got == ("meta", tuple(shape)), f"expected {('meta', tuple(shape))}, got {got}"

def assert_same(y, expected, inputs, what, tol=1e-10):
    """y is what is expected, and so are the gradients that it gives to the named inputs."""
    assert_close(y, expected, what, tol)
    upstream = torch.randn_like(expected)
    found, wanted = (gradients(each, inputs, upstream, what) for each in (y, expected))
    for name in inputs:
        assert_close(found[name], wanted[name], f"{what}: the gradient of {name}", tol)

def gradients(y, inputs, upstream, what):
    """{name: gradient} of the named inputs."""
    found = [None] * len(inputs)
    if y.requires_grad:
        found = torch.autograd.grad(y, [*inputs.values()], upstream, allow_unused=True)
    missing = [name for name, gradient in zip(inputs, found) if gradient is None]
    assert not missing, (
        f"{what}: no gradient arrives at {missing[0]}; look for detach(), .data and no_grad()"
    )
    return dict(zip(inputs, found))

@contextlib.contextmanager
def in_place(owner, *names):
    """What is done here keeps these tensors and their memory."""
    before = [(name, attrgetter(name)(owner), attrgetter(name)(owner).data_ptr()) for name in names]
    yield
    for name, tensor, pointer in before:
        assert attrgetter(name)(owner) is tensor and tensor.data_ptr() == pointer, (
            f"{name} must be written in place, by copy_() or zero_(): an optimizer and a compiled "
            "model hold this tensor and its memory, but here it was replaced by another one"
        )

def check_draws(draw, what):
    """`draw(generator)` draws from the generator it is given, or from torch's own if it is None."""
    torch.manual_seed(3)
    state, moving = torch.get_rng_state(), generator(1)
    one, same, other = (draw(generator(seed)) for seed in (1, 1, 2))
    first, second = draw(moving), draw(moving)
    untouched = torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, same), f"{what}: generators with the same seed gave different numbers"
    assert not torch.equal(one, other), f"{what}: seeds 1 and 2 gave the same numbers"
    assert not torch.equal(first, second), f"{what}: one generator gave the same numbers twice"
    assert untouched, f"{what}: torch's global generator was used or seeded as well"
    first, second = draw(None), draw(None)
    assert not torch.equal(first, second), f"{what}: with None, two draws in a row are the same"
    torch.manual_seed(3)
    right = torch.equal(first, draw(None))
    assert right, f"{what}: generator=None must mean torch's global generator"

class Dense(mora.Adapter):
    """An adapter whose ΔW is a parameter, W. It shows what all adapters share."""
    def __init__(self, linear, rank=1, dropout=0.0):
        super().__init__(linear, rank, dropout)
        self.W = nn.Parameter(torch.zeros_like(linear.weight, dtype=self.dtype))

    def update(self, x):
        return F.linear(x, self.W.to(x.dtype))

def build(kind, k, d, rank=2, bias=True, dtype=torch.float64, **options):
    """A layer at random. r̂ is `rank`, as exercise 5 may be missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mora, "square_size", lambda k, d, rank: rank)
        return randomise(kind(nn.Linear(k, d, bias, dtype=dtype), rank, **options))
