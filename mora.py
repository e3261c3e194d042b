"""MoRA: high-rank updating for parameter-efficient fine-tuning (arXiv 2405.12130), and LoRA.

A frozen weight W0 with k inputs and d outputs gets a trainable update ΔW. LoRA's is the product of
two thin matrices. MoRA spends as many parameters on one square matrix M, between two fixed linear
maps. After training, W0 + ΔW replaces W0: exact up to rounding, and free at inference.

    LoRA   h = W0 x + (alpha / r) B A x           A: r x k,  B: d x r                     (Eq. 1)
    MoRA   h = W0 x + decompress(M compress(x))   M: r̂ x r̂,  r̂ = floor(sqrt((k + d) r))   (Eq. 2)

In the code k is in_features, d out_features, r rank and r̂ size. Equation numbers are the paper's,
and "# exercise 5" is a mark for tests/exercises.
"""

import copy
import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

def square_size(in_features, out_features, rank):  # exercise 5
    """r̂: M has no more parameters than LoRA's (k + d) r, and is no larger than ΔW itself."""
    size = math.isqrt((in_features + out_features) * rank)  # rounds down
    return min(size, in_features, out_features)

# ---- The operators -------------------------------------------------------------------------------
#               ΔW[i, j]                        rank, at most   different entries inputs lost
#   truncation  M[i, j], zero outside of M      r̂               r̂²                all past r̂
#   sharing     M[out_group[i], in_group[j]]    r̂               r̂²                none
#   decoupling  M in blocks on the diagonal     min(k, d)       r̂²                some, if k > d
#   rotation    M Rᵢ in the i-th block          min(k, d)       r̂² in each block  some, if k > d
# For example, where k = d = 6 and r̂ = 2:
#   M = 1 2    truncation     sharing        sharing        decoupling     rotation
#       3 4    1 2 . . . .    (strided)      (contiguous)   1 2 . . . .    1.0 2.0   .    .  ...
#              3 4 . . . .    1 2 1 2 1 2    1 1 1 2 2 2    3 4 . . . .    3.0 4.0   .    .  ...
#              . . . . . .    3 4 3 4 3 4    1 1 1 2 2 2    . . 1 2 . .     .   .   2.2  0.2 ...
#              . . . . . .    1 2 1 2 1 2    1 1 1 2 2 2    . . 3 4 . .     .   .   5.0 -0.4 ...
#              . . . . . .    3 4 3 4 3 4    3 3 3 4 4 4    . . . . 1 2    block i is M times
#              . . . . . .    1 2 1 2 1 2    3 3 3 4 4 4    . . . . 3 4    (r̂ = 2) a rotation by
#                             3 4 3 4 3 4    3 3 3 4 4 4                   i radians; 3rd not shown
class Operator(nn.Module):
    """Two linear maps without parameters, around M in Eq. 2: compress, from x (..., k) to z
    (..., r̂), or (..., n, r̂), n rows that all meet the same M, and decompress, from z to (..., d).
    A new operator is a subclass with these two, and a name in OPERATORS. What it draws at random
    must be a registered buffer, or it is not saved."""
    def __init__(self, in_features, out_features, size):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.size = size

    def regroup(self, generator=None):
        """Take new groups after a merge. Only Sharing has groups."""

class Truncation(Operator):
    """Eq. 4: M reads the first r̂ inputs and writes the first r̂ outputs. The paper's baseline."""
    def compress(self, x):  # exercise 6
        return x[..., : self.size]  # (..., k) -> (..., r̂)

    def decompress(self, z):  # exercise 6
        return F.pad(z, (0, self.out_features - self.size))  # (..., r̂) -> (..., d)

class Sharing(Operator):
    """Eq. 6: put inputs and outputs into r̂ groups each. The inputs of a group are added up, and the
    outputs of a group get the same number. `groups` is "strided" (0 1 2 0 1 2), "contiguous"
    (0 0 1 1 2 2), "random", a pair of these for inputs and outputs, or "cycle": the next of CYCLE
    after each merge, which is the paper's ReMoRA.
    Why new groups: ΔW = P M Qᵀ, where row i of P (d, r̂) is 1 at out_group[i] and else 0, and Q is
    that of the inputs. Merges with one P have rank r̂ at most, all together. The cycle has two P, and
    2 r̂ - 1 at most: the columns of each sum to the same vector. A random grouping can add r̂ - 1."""
    CYCLE = ["strided", "contiguous", ("contiguous", "strided"), ("strided", "contiguous")]

    def __init__(self, in_features, out_features, size, groups="strided"):
        super().__init__(in_features, out_features, size)
        self.turns = self.CYCLE if groups == "cycle" else [groups]
        self.register_buffer("in_group", torch.zeros(in_features, dtype=torch.long))
        self.register_buffer("out_group", torch.zeros(out_features, dtype=torch.long))
        self.register_buffer("merges", torch.tensor(-1, device="cpu"))
        Sharing.regroup(self)  # merges becomes 0. A subclass's own regroup is not ready yet

    def regroup(self, generator=None):  # exercise 16
        self.merges += 1
        kinds = self.turns[int(self.merges) % len(self.turns)]
        if isinstance(kinds, str):
            kinds = kinds, kinds
        # In place, since a compiled model goes on reading these tensors
        self.in_group.copy_(self.assign(self.in_features, kinds[0], generator))
        self.out_group.copy_(self.assign(self.out_features, kinds[1], generator))

    def assign(self, features, kind, generator=None):  # exercise 8
        """The group of each of `features` indices: whole numbers below r̂, (features,)."""
        group = torch.arange(features, device="cpu") % self.size  # 0 1 2 0 1 2
        if kind == "contiguous":
            return group.sort().values  # 0 0 1 1 2 2
        if kind == "random":  # drawn on the CPU, so that every device has the same groups
            return group[torch.randperm(features, generator=generator, device="cpu")]
        if kind != "strided":
            raise ValueError(f"groups must be strided, contiguous, random or cycle, not {kind!r}")
        return group

    def compress(self, x):  # exercise 7
        sums = x.new_zeros(*x.shape[:-1], self.size)
        # Not index_add, which keeps x for the backward pass
        return sums.scatter_add(-1, self.in_group.expand_as(x), x)  # (..., k) -> (..., r̂)

    def decompress(self, z):  # exercise 7
        return z.index_select(-1, self.out_group)  # (..., r̂) -> (..., d)

class Decoupling(Operator):
    """Eq. 8: cut x into rows of r̂ numbers, the last one padded with zeros, multiply each by M, and
    put the results side by side. If they are fewer than d, they are repeated. If they are more, as
    where k > d, the paper drops what is past d, and with it the inputs that this came from (in
    3072 -> 768 at r = 8 only 875 inputs are used). `fold=True` adds result p to output p mod d."""
    def __init__(self, in_features, out_features, size, fold=False):
        super().__init__(in_features, out_features, size)
        self.fold = fold
        used = in_features if fold else min(in_features, out_features)
        self.n_rows = math.ceil(used / size)

    def compress(self, x):  # exercise 9
        x = F.pad(x, (0, self.n_rows * self.size - self.in_features))  # a negative number cuts
        return x.unflatten(-1, (self.n_rows, self.size))  # (..., k) -> (..., n, r̂)

    def decompress(self, z):  # exercise 10
        y = z.flatten(-2)  # (..., n, r̂) -> (..., n r̂)
        n, d = y.shape[-1], self.out_features
        if self.fold and n > d:
            y = F.pad(y, (0, -n % d))  # to a multiple of d
            return y.unflatten(-1, (-1, d)).sum(-2)  # (..., d)
        times = math.ceil(d / n)
        return torch.cat([y] * times, dim=-1)[..., :d]  # (..., d)

class Rotation(Decoupling):
    """Eq. 9: Decoupling, but row i is first turned by the angles i θ_j, θ_j = 10000^(-2j / r̂), as
    in RoPE, so that M can tell the rows apart. Coordinate j is paired with j + r̂/2."""
    def compress(self, x):  # exercise 11
        rows = super().compress(x)  # (..., n, r̂)
        half = self.size // 2
        i = torch.arange(self.n_rows, device=x.device)
        j = torch.arange(half, device=x.device)
        # Angles are float32 whatever x is: bfloat16 has too few digits
        angle = torch.outer(i, 10000 ** (-2 * j / self.size))  # (n, r̂/2)
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        a, b, unpaired = rows.tensor_split((half, 2 * half), dim=-1)  # r̂ = 1 has no pair
        return torch.cat([a * cos - b * sin, b * cos + a * sin, unpaired], dim=-1)

OPERATORS = dict(truncation=Truncation, sharing=Sharing, decoupling=Decoupling, rotation=Rotation)

# ---- The layers: a frozen nn.Linear and a trainable update ---------------------------------------
class Adapter(nn.Module):
    """A subclass adds what trains, `update` (ΔW x) and `reset` (to ΔW = 0, with a new start)."""
    def __init__(self, linear, rank, dropout=0.0):
        super().__init__()
        if rank < 1 or not isinstance(rank, int):
            raise ValueError(f"rank must be a whole number of at least 1, not {rank}")
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.linear = linear.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        # The type of trainable tensors and of ΔW: bfloat16 would round small steps away
        self.dtype = torch.promote_types(linear.weight.dtype, torch.float32)

    def forward(self, x):  # exercise 2
        return self.linear(x) + self.update(self.dropout(x))  # (..., k) -> (..., d)

    def delta_weight(self):  # exercise 3
        """ΔW (d, k), float32 at least (Eq. 3). Column j is the update of the j-th unit vector."""
        device = self.linear.weight.device
        with torch.autocast(device.type, enabled=False):
            return self.update(torch.eye(self.in_features, dtype=self.dtype, device=device)).T

    def merged_weight(self):  # exercise 4
        """W0 + ΔW (d, k), rounded to W0's type, where in bfloat16 part of a small ΔW is lost."""
        return (self.linear.weight + self.delta_weight()).to(self.linear.weight.dtype)

    @torch.no_grad()
    def merge(self):  # exercise 4
        """A new nn.Linear that computes what this layer does in eval mode."""
        merged = copy.deepcopy(self.linear)
        merged.weight.copy_(self.merged_weight())
        return merged

    # Models may read these instead of calling the layer, as nn.TransformerEncoderLayer does
    weight = property(lambda self: self.merged_weight())
    bias = property(lambda self: self.linear.bias)

    def extra_repr(self):
        return self.description

class LoRALinear(Adapter):
    """LoRA (arXiv 2106.09685), Eq. 1: ΔW = (alpha / r) B A. A starts at random and B at zero. (With
    both at zero neither would learn, since the gradient of each contains the other.) `alpha=None`
    means 2 r. `rslora` divides by sqrt(r) instead (arXiv 2312.03732).
    `train_A=False` is AsyLoRA (arXiv 2402.16842): only B learns."""
    def __init__(self, linear, rank, alpha=None, dropout=0.0, rslora=False, train_A=True):
        super().__init__(linear, rank, dropout)
        alpha = 2 * rank if alpha is None else alpha
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        W0 = linear.weight
        self.A = nn.Parameter(W0.new_zeros(rank, self.in_features, dtype=self.dtype), train_A)
        self.B = nn.Parameter(W0.new_zeros(self.out_features, rank, dtype=self.dtype))
        self.description = f"rank={rank}, scaling={self.scaling:g}"
        LoRALinear.reset(self)

    def update(self, x):  # exercise 1
        x = F.linear(x, self.A.to(x.dtype))  # (..., k) -> (..., r)
        return F.linear(x, self.B.to(x.dtype)) * self.scaling  # (..., d)

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 1
        bound = 1 / math.sqrt(self.in_features)  # as kaiming_uniform_(a=sqrt(5))
        A = torch.empty(self.A.shape, device="cpu")  # the same numbers on every device
        self.A.copy_(A.uniform_(-bound, bound, generator=generator))
        self.B.zero_()

class DoRALinear(LoRALinear):
    """DoRA (arXiv 2402.09353): h = magnitude · V x / ‖V‖, V = W0 + (alpha / r) B A, where ‖V‖ (d,)
    are the lengths of V's rows. LoRA gives rows their direction, `magnitude` (d,) their length."""
    def __init__(self, linear, rank, **options):
        super().__init__(linear, rank, **options)
        self.magnitude = nn.Parameter(self.row_lengths())

    @torch.no_grad()
    def row_lengths(self):  # exercise 13
        """‖V‖ (d,), without a gradient, which saves memory (DoRA, section 4.3)."""
        V = self.linear.weight + super().delta_weight()
        return V.norm(dim=1).clamp_min(1e-30)  # a pruned row is zero

    def forward(self, x):  # exercise 13
        y = F.linear(x, self.linear.weight) + self.update(self.dropout(x))  # V x: (..., d)
        scale = self.magnitude / self.row_lengths()
        y = (scale * y).to(y.dtype)
        if self.linear.bias is not None:
            y = y + self.linear.bias.to(y.dtype)
        return y

    def delta_weight(self):  # exercise 13
        V = self.linear.weight + super().delta_weight()
        scale = self.magnitude / self.row_lengths()
        return scale[:, None] * V - self.linear.weight

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 13
        super().reset(generator)
        self.magnitude.copy_(self.row_lengths())

class MoRALinear(Adapter):
    """MoRA, Eq. 2: h = W0 x + decompress(M compress(x)). M (r̂, r̂) can start at zero, as LoRA's A
    and B together cannot: its gradient, decompressᵀ(g) compress(x)ᵀ summed over tokens, where g is
    the gradient of h, has no M in it. No alpha: under Adam it is only another learning rate."""
    def __init__(self, linear, rank, operator="rotation", dropout=0.0, **options):
        super().__init__(linear, rank, dropout)
        if operator not in OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, not {operator!r}")
        k, d = self.in_features, self.out_features
        self.size = square_size(k, d, rank)
        if operator == "rotation" and self.size > 1:
            self.size -= self.size % 2  # for pairs of coordinates
        self.operator = OPERATORS[operator](k, d, self.size, **options).to(linear.weight.device)
        self.M = nn.Parameter(linear.weight.new_zeros(self.size, self.size, dtype=self.dtype))
        self.description = f"rank={rank}, size={self.size}, {operator} {options}"

    def update(self, x):  # exercise 12
        z = self.operator.compress(x)  # (..., k) -> (..., r̂) or (..., n, r̂)
        z = F.linear(z, self.M.to(x.dtype))  # M z
        return self.operator.decompress(z)  # (..., d)

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 15
        self.M.zero_()
        self.operator.regroup(generator)

# ---- Whole models --------------------------------------------------------------------------------
METHODS = {
    "lora": LoRALinear,
    "lora+": LoRALinear,  # arXiv 2402.12354: the optimizer has a higher rate for B than for A
    "asylora": functools.partial(LoRALinear, train_A=False),
    "dora": DoRALinear,
    "relora": LoRALinear,  # arXiv 2307.05695: LoRA with merge_and_reset every so many steps
    "mora": MoRALinear,  # the last section puts a faster one in its place
    "remora": MoRALinear,  # MoRA with merge_and_reset
}

def add_adapters(model, method="mora", rank=8, operator=None, targets=None, fast=True, **options):
    """Put adapters in the place of linear layers, in place, freeze all else, and return the model.
    `operator` None means rotation, and for remora sharing with groups="cycle". `targets` are names
    of layers or their ends, such as ["c_attn", "h.0.mlp.c_fc"]; None means all but an output head.
    `options` are those of the layer and the operator. `fast=False` computes Eq. 2 as written."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model has adapters already: merge_adapters(model) comes first")
    layer_class = METHODS[method]
    if method in ("mora", "remora"):
        operator = operator or ("sharing" if method == "remora" else "rotation")
        if operator == "sharing":
            options.setdefault("groups", "cycle" if method == "remora" else "strided")
        options["operator"] = operator
        layer_class = layer_class if fast else MoRALinear
    layers = find_targets(model, targets)
    if not layers:
        raise ValueError("the model has no nn.Linear to adapt")
    model.requires_grad_(False)
    try:
        adapters = {x: layer_class(x, rank, **options).train(x.training) for x in layers}
    except TypeError as error:  # such as groups for Rotation
        if "unexpected keyword" not in str(error):
            raise
        name = options.get("operator", method)
        raise ValueError(f"{name} {str(error).split('() ')[-1]}") from error
    return replace_modules(model, adapters)

def find_targets(model, targets=None):
    """The layers to adapt. One that shares its weight is not: a merge would change both uses."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers = {name: m for name, m in linear.items() if type(m) is nn.Linear}
    if len(layers) < len(linear):
        warnings.warn(f"left out: {len(linear) - len(layers)} layers of a subclass of nn.Linear")
    weights = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    layers = {name: m for name, m in layers.items() if weights.count(id(m.weight)) == 1}
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()  # in transformers
        return [m for m in layers.values() if m is not head]
    chosen = []
    for target in targets:
        found = [m for name, m in layers.items() if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"no linear layer is called {target!r}: there are {', '.join(layers)}")
        chosen += found
    return chosen

def replace_modules(model, new):
    """Put new[module] wherever that module is used; -> the model, or what replaces it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            setattr(parent, name, new.get(child, child))
    return new.get(model, model)

def find_adapters(model):
    """{full name: adapter}. ValueError if there are none."""
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}
    if not adapters:
        raise ValueError("the model has no adapters: add_adapters(model) comes first")
    return adapters

def merge_adapters(model):
    """Put a merged nn.Linear, frozen as it was, in the place of every adapter; -> the model."""
    adapters = find_adapters(model).values()
    return replace_modules(model, {adapter: adapter.merge() for adapter in adapters})

@torch.no_grad()
def merge_and_reset(model, optimizer=None, generator=None):  # exercise 15
    """The step of ReLoRA and ReMoRA: add every ΔW to its W0, start again from ΔW = 0, and drop
    Adam's state, which is the old ΔW's. Under DDP `generator` needs the same seed everywhere."""
    for adapter in find_adapters(model).values():
        adapter.linear.weight.copy_(adapter.merged_weight())
        adapter.reset(generator)
        if optimizer:
            for parameter in adapter.parameters(recurse=False):
                optimizer.state.pop(parameter, None)

def adapter_state_dict(model):
    """The adapters' own tensors by full name, and keys that say what the adapters are. After
    merge_and_reset save the model instead, as the frozen weights have changed."""
    state = {}
    for name, adapter in find_adapters(model).items():
        state[f"{name} {adapter.description}"] = torch.empty(0)  # the key says it all
        for key, tensor in adapter.state_dict().items():
            if key.endswith("_group"):
                tensor = tensor.short()  # 8 bytes each would be most of a small file
            if not key.startswith("linear."):
                state[f"{name}.{key}".lstrip(".")] = tensor  # the model itself has no name
    return state

def load_adapters(model, state):
    """Load what `adapter_state_dict` saved. ValueError if the model has other adapters."""
    differences = sorted(adapter_state_dict(model).keys() ^ state.keys())
    if differences:
        raise ValueError(f"model and state have different adapters: {'; '.join(differences[:2])}")
    model.load_state_dict(state, strict=False)
    return model

# ---- Speed: the same numbers in less time. This section can be deleted ---------------------------
def fast_delta_weight(operator, M):
    if type(operator) is Sharing:
        return M[operator.out_group][:, operator.in_group]
    eye = torch.eye(operator.in_features, dtype=M.dtype, device=M.device)
    return operator.decompress(operator.compress(eye) @ M.T).T

class MergedProduct(torch.autograd.Function):
    """h = (W0 + ΔW) x + b: one matrix product instead of two. x is (tokens, k)."""
    @staticmethod
    def forward(ctx, x, M, W0, bias, operator):  # exercise 14
        merged = W0 + fast_delta_weight(operator, M)
        y = F.linear(x, merged.to(W0.dtype), bias)
        # Kept is compress(x), often smaller than x, in a copy: a view would keep all of x
        z = operator.compress(x.to(y.dtype)).contiguous()
        ctx.save_for_backward(z, M, W0)
        ctx.operator = operator
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # exercise 14
        z, M, W0 = ctx.saved_tensors
        merged = W0 + fast_delta_weight(ctx.operator, M)
        grad_x = g @ merged.to(g.dtype)
        _, transpose = torch.func.vjp(ctx.operator.decompress, z[0])  # it is linear: any z will do
        (grad_z,) = torch.vmap(transpose)(g)  # (tokens, d) -> (tokens, r̂) or (tokens, n, r̂)
        grad_M = grad_z.flatten(0, -2).T @ z.flatten(0, -2)
        return grad_x, grad_M, None, None, None

class FastMoRALinear(MoRALinear):
    """MergedProduct where that pays. Second derivatives and torch.func need `fast=False`."""
    def forward(self, x):
        # Building ΔW pays from max(k, d) tokens on (on a CPU). Dropout needs W0 x and ΔW x apart.
        # MergedProduct is a millisecond of Python, for which a GPU would wait if not compiled
        few = x.numel() <= self.in_features * max(self.in_features, self.out_features)
        drops = self.training and self.dropout.p > 0
        eager_gpu = x.device.type != "cpu" and not torch.compiler.is_compiling()
        base_trains = any(p.requires_grad for p in self.linear.parameters())
        if few or drops or eager_gpu or base_trains:
            return super().forward(x)
        frozen = self.linear.weight, self.linear.bias
        y = MergedProduct.apply(x.flatten(0, -2), self.M, *frozen, self.operator)
        return y.unflatten(0, x.shape[:-1])  # (tokens, d) -> (..., d)

METHODS |= {"mora": FastMoRALinear, "remora": FastMoRALinear}
