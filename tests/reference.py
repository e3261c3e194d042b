"""The formulas, written from the papers by loops where that is plainest, and what tests share.

Nothing here is computed by mora.py: an operator is asked for its groups, a layer for its tensors.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

# The four (inputs, outputs) of the released code's mora_type 1 to 4, which ReMoRA takes in turn
CYCLE = [
    ("strided", "strided"),
    ("contiguous", "contiguous"),
    ("contiguous", "strided"),
    ("strided", "contiguous"),
]

# ---- The formulas --------------------------------------------------------------------------------
def square_size(k, d, r):
    """The largest size with size² <= (k + d) r and size <= min(k, d), by trying."""
    size = min(k, d)
    while size**2 > (k + d) * r:
        size -= 1
    return size

def rotation_matrix(size, i):
    """Eq. 9's R_i: coordinates j and j + r̂/2 are a pair, which turns by the angle i θ_j."""
    R = torch.eye(size, dtype=torch.float64)
    half = size // 2
    for j in range(half):
        angle = i * 10000 ** (-2 * j / size)
        R[j, j] = R[j + half, j + half] = math.cos(angle)
        R[j, j + half] = -math.sin(angle)
        R[j + half, j] = math.sin(angle)
    return R

def mora_delta(name, operator, M):
    """ΔW (d, k) from the paper's equation, for truncation, sharing, decoupling or rotation."""
    k, d, size = operator.in_features, operator.out_features, len(M)
    W = torch.zeros(d, k, dtype=M.dtype)
    if name == "truncation":  # Eq. 4
        W[:size, :size] = M
    elif name == "sharing":  # Eq. 6
        for i, j in itertools.product(range(d), range(k)):
            W[i, j] = M[operator.out_group[i], operator.in_group[j]]
    else:  # Eq. 8 and 9: a block for each row of inputs
        n = math.ceil(k / size)
        turns = [rotation_matrix(size, i) if name == "rotation" else torch.eye(size) for i in range(n)]
        blocks = torch.block_diag(*[M @ turn.to(M.dtype) for turn in turns])
        results = n * size
        # Result p is output p. Missing outputs repeat the first ones; results that are too many
        # are cut off, or with fold added to output p mod d
        for p in range(max(d, results) if operator.fold else d):
            W[p % d] += blocks[p % results, :k]  # past column k is the padding
    return W

def lora_delta(layer, factor=2):
    """Eq. 1, where factor is alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return factor * layer.B @ layer.A

def dora(layer, x, dropped):
    """magnitude · V x / ‖V‖ + bias, V = W0 + 2 B A, where ‖V‖ counts as a constant. `dropped` is x as
    B A gets it.
    """
    W, BA = layer.linear.weight, lora_delta(layer)
    lengths = (W + BA).norm(dim=1).detach()
    y = layer.magnitude / lengths * (x @ W.T + dropped @ BA.T)
    return y if layer.linear.bias is None else y + layer.linear.bias

def schedule(step, kind, max_steps, warmup, merge_every=0, restart_warmup=0):
    """ReLoRA's jagged schedule, as a fraction of the peak rate."""
    t = max(0, step - warmup) / (max_steps - warmup)
    curve = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[kind]
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if merge_every and step >= merge_every:
        rise = min(rise, (step % merge_every + 1) / max(1, restart_warmup))
    return rise * curve

# ---- What tests share ----------------------------------------------------------------------------
def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)

def generator(seed):
    return torch.Generator().manual_seed(seed)

def randomise(module, std=1.0):
    """Every trainable parameter at random: M and B start at zero, where every mistake is hidden."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return module

def assert_close(got, expected, hint, tol=1e-10):
    """Of the same shape and type, and equal up to `tol` times the largest number expected, or 1."""
    assert isinstance(got, torch.Tensor), f"{hint}: expected a tensor, got {type(got).__name__}"
    shapes = tuple(expected.shape), tuple(got.shape)
    assert shapes[0] == shapes[1], f"{hint}: expected shape {shapes[0]}, got {shapes[1]}"
    assert got.dtype == expected.dtype, f"{hint}: expected {expected.dtype}, got {got.dtype}"
    if got.numel():
        largest = max(1, expected.double().abs().max())
        error = (got.double() - expected.double()).abs().nan_to_num(math.inf) / largest
        worst = tuple(i.item() for i in torch.unravel_index(error.argmax(), error.shape))
        assert error[worst] <= tol, (
            f"{hint}: expected {expected[worst]:.6g} at {worst}, got {got[worst]:.6g}, which is off by "
            f"{error[worst]:.1e} of the largest number; {tol:.0e} is allowed"
        )

class Net(nn.Module):
    """An embedding, two residual blocks, and a head that shares its weight with the embedding."""

    LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    TOKENS = torch.arange(11)

    def __init__(self, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(11, 10)
        self.norm = nn.LayerNorm(10)
        blocks = [{"up": nn.Linear(10, 24, bias), "down": nn.Linear(24, 10, bias)} for _ in range(2)]
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for block in blocks)
        self.head = nn.Linear(10, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self):
        x = self.embedding(self.TOKENS)
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](self.norm(x))))
        return self.head(x)
