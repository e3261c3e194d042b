"""MoRA: high-rank updating for parameter-efficient fine-tuning (arXiv 2405.12130), with LoRA and its relatives.

A frozen weight W0 (d outputs, k inputs) gets a trainable update ΔW. LoRA spends (k + d) r parameters on two thin
matrices, MoRA at most as many on one square matrix M, between two operators that have none:

    LoRA   h = W0 x + (alpha / r) B A x          A: r x k,  B: d x r                     rank of ΔW: at most r
    MoRA   h = W0 x + decompress(M compress(x))  M: r̂ x r̂,  r̂ = floor(sqrt((k + d) r))   at most r̂ (rows: min(k, d))

compress turns k inputs into r̂ numbers, or rows of r̂ numbers; decompress spreads the results over d outputs. Both are
linear, so ΔW is a matrix and merges into W0 exactly. In the code k is `in_features`, d `out_features`, r `rank`, r̂
`size`; equations are numbered as in MoRA's paper, and `# exercise N` is for tests/EXERCISES.md.
"""

import collections
import copy
import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


def square_size(in_features: int, out_features: int, rank: int) -> int:  # exercise 5
    """r̂, the side of the largest square matrix within LoRA's budget (k + d) r; more than min(k, d) adds no rank."""
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, not {rank!r}")
    return min(math.isqrt((in_features + out_features) * rank), in_features, out_features)


# ---- The operators. `...` stands for any leading dimensions, such as (batch, length) ---------------------------------
class Operator(nn.Module):
    """Eq. 2, ΔW x = decompress(M compress(x)), for two linear maps without parameters.

    `compress` maps k inputs to z, (..., r̂), or (..., n, r̂) for n rows that all meet the same M; `decompress` maps z
    to d outputs. An operator of your own is a subclass with these two and a name in OPERATORS. What it draws at random
    has to be a registered buffer, to be saved, and an option of its own has to show in extra_repr.

    M starts at zero and learns all the same: its gradient, decompressᵀ(g) compress(x)ᵀ summed over tokens and rows,
    does not contain M. (The gradients of LoRA's A and B contain the other, so both at zero would never move.)
    """

    multiple = 1  # r̂, unless it is 1, is rounded down to a multiple of this

    def __init__(self, in_features: int, out_features: int, size: int):
        super().__init__()
        self.in_features, self.out_features, self.size = in_features, out_features, size

    def compress(self, x):
        raise NotImplementedError

    def decompress(self, z):
        raise NotImplementedError

    def forward(self, x, M):  # exercise 12; training takes a faster way: see MoRALinear.fast
        z = F.linear(self.compress(x), M.to(x.dtype))  # (..., k) -> (..., r̂) or (..., n, r̂)
        return self.decompress(z)  # -> (..., d)

    def regroup(self, generator=None):
        """Take the next groups, if the operator has any (`Sharing`, `Overlap`)."""

    def extra_repr(self):
        return ", ".join(f"{name}={vars(self)[name]}" for name in ("groups", "fold", "copies") if name in vars(self))


class Truncation(Operator):
    """Eq. 4: keep the first r̂ inputs, write the first r̂ outputs. The baseline: M never sees the rest of x."""

    def compress(self, x):  # exercise 6
        return x[..., :self.size]  # (..., k) -> (..., r̂)

    def decompress(self, z):  # exercise 6
        return F.pad(z, (0, self.out_features - self.size))  # (..., r̂) -> (..., d)


class Sharing(Operator):
    """Eq. 6: put inputs and outputs into r̂ groups each; add up the inputs of a group, copy one number to its outputs.

    So ΔW[i, j] = M[out_group[i], in_group[j]] (`fast_merged_weight` relies on it). `groups` says which index is in
    which: "strided" (0 1 2 0 1 2; ΔW is 1 ⊗ M where r̂ divides k and d), "contiguous" (0 0 1 1 2 2; M ⊗ 1), "random", a
    pair of these for inputs and outputs, or "cycle": each `regroup` takes the next pair of CYCLE, as in the paper's
    code. Updates merged with the same groups have rank r̂ at most; new ones raise it. Groups differ by one at most.
    """

    CYCLE = (("strided", "strided"), ("contiguous", "contiguous"), ("contiguous", "strided"), ("strided", "contiguous"))

    def __init__(self, in_features, out_features, size, groups="strided"):
        super().__init__(in_features, out_features, size)
        self.groups = groups if groups == "cycle" else (groups, groups) if isinstance(groups, str) else tuple(groups)
        self.groupings = self.CYCLE if groups == "cycle" else (self.groups,)
        if not all(len(pair) == 2 and {*pair} <= {"strided", "contiguous", "random"} for pair in self.groupings):
            raise ValueError(f"groups must be strided, contiguous, random, a pair of these, or cycle, not {groups!r}")
        self.register_buffer("in_group", torch.zeros(in_features, dtype=torch.long))
        self.register_buffer("out_group", torch.zeros(out_features, dtype=torch.long))
        self.register_buffer("cycle_step", torch.tensor(-1, device="cpu"))  # regroups so far, less one
        Sharing.regroup(self)  # not a subclass's, whose buffers are not there yet

    def regroup(self, generator=None):  # exercise 16
        self.cycle_step += 1
        in_kind, out_kind = self.groupings[int(self.cycle_step) % len(self.groupings)]
        self.in_group.copy_(self.assign(self.in_features, in_kind, generator))  # in place: a compiled model sees it
        self.out_group.copy_(self.assign(self.out_features, out_kind, generator))

    def assign(self, features, kind, generator):  # exercise 8
        """The group of each of `features` indices: whole numbers below r̂, shape (features,)."""
        i = torch.arange(features, device="cpu")  # where random numbers are drawn, so that devices agree
        if kind == "contiguous":
            return i * self.size // features
        if kind == "random":
            i = torch.randperm(features, generator=generator, device="cpu")
        return i % self.size

    def compress(self, x):  # exercise 7
        return x.new_zeros(*x.shape[:-1], self.size).index_add(-1, self.in_group, x)  # (..., k) -> (..., r̂)

    def decompress(self, z):  # exercise 7
        return z.index_select(-1, self.out_group)  # (..., r̂) -> (..., d)


class Decoupling(Operator):
    """Eq. 8: split x into rows of r̂ numbers, the last padded with zeros; multiply each by the same M, and concatenate.

    Where k = d, ΔW is block diagonal: I ⊗ M, cut to d x k. A result shorter than d is repeated. A longer one is cut, as
    in the paper: the inputs past row n = ceil(min(k, d) / r̂) would change nothing and are dropped. With `fold=True`,
    n = ceil(k / r̂), and what lies past d is added onto the first outputs.
    """

    def __init__(self, in_features, out_features, size, fold=False):
        super().__init__(in_features, out_features, size)
        self.fold = fold
        self.rows = math.ceil((in_features if fold else min(in_features, out_features)) / size)

    def compress(self, x):  # exercise 9
        x = F.pad(x, (0, self.rows * self.size - self.in_features))  # a negative number cuts
        return self.rotate(x.unflatten(-1, (self.rows, self.size)))  # (..., k) -> (..., n, r̂)

    def rotate(self, rows):
        return rows  # Rotation has its own

    def decompress(self, z):  # exercise 10
        y, d = z.flatten(-2), self.out_features  # (..., n, r̂) -> (..., n r̂)
        if self.fold and y.shape[-1] > d:
            return F.pad(y, (0, -y.shape[-1] % d)).unflatten(-1, (-1, d)).sum(-2)  # -> (..., d)
        times, rest = divmod(d, y.shape[-1])
        return torch.cat([y] * times + [y[..., :rest]], dim=-1)  # -> (..., d)


class Rotation(Decoupling):
    """Eq. 9: Decoupling, but row i is first rotated by the angles i θ_j, θ_j = 10000^(-2j / r̂), as in RoPE.

    So block i of ΔW is M Rᵢ, and M can tell the rows apart. Coordinate j is paired with coordinate j + r̂/2; of an odd
    r̂ the last one stays as it is.
    """

    multiple = 2

    def rotate(self, rows):  # exercise 11
        half, dtype = self.size // 2, torch.promote_types(rows.dtype, torch.float32)  # an angle in bfloat16 is none
        theta = 10000 ** (-2 * torch.arange(half, dtype=dtype, device=rows.device) / self.size)
        angle = torch.arange(self.rows, device=rows.device)[:, None] * theta  # (n, r̂ // 2)
        cos, sin = angle.cos().to(rows.dtype), angle.sin().to(rows.dtype)
        a, b, rest = rows.tensor_split((half, 2 * half), dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)  # (..., n, r̂)


class Overlap(Operator):
    """Not in the paper: J = `copies` random Sharings of the same M at once, ΔW = Σ Dⱼ M Cⱼ / sqrt(J). So each input is
    in J groups, and an entry of ΔW is a sum of J entries of M. Its rank is at most J (r̂ - 1) + 1, since the columns of
    every Dⱼ add up to the same vector of ones.
    """

    def __init__(self, in_features, out_features, size, copies=4):
        super().__init__(in_features, out_features, size)
        self.copies = copies
        self.sharings = nn.ModuleList(Sharing(in_features, out_features, size, "random") for _ in range(copies))

    def regroup(self, generator=None):
        for sharing in self.sharings:
            sharing.regroup(generator)

    def compress(self, x):
        return torch.stack([sharing.compress(x) for sharing in self.sharings], dim=-2)  # (..., k) -> (..., J, r̂)

    def decompress(self, z):
        y = [sharing.decompress(row) for sharing, row in zip(self.sharings, z.unbind(-2))]
        return sum(y) / math.sqrt(self.copies)  # (..., J, r̂) -> (..., d)


OPERATORS = dict(truncation=Truncation, sharing=Sharing, decoupling=Decoupling, rotation=Rotation, overlap=Overlap)


# ---- The layers: a frozen nn.Linear and a trainable update -----------------------------------------------------------
class Adapter(nn.Module):
    """What all layers share. A subclass adds the trainable parameters, in float32 at least (bfloat16 would round small
    steps away), `update(x)` = ΔW x, and `reset(generator)`: back to ΔW = 0, with a fresh A or the next groups.
    """

    def __init__(self, linear: nn.Linear, rank: int, dropout: float = 0.0):
        super().__init__()
        if type(linear) is not nn.Linear or linear.weight.is_complex():  # subclasses may bypass forward
            raise ValueError(f"an adapter wraps an nn.Linear of real numbers, not {linear}")
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.size = square_size(linear.in_features, linear.out_features, rank)  # r̂; it refuses a wrong rank
        self.dropout = nn.Dropout(dropout)
        self.linear = linear.requires_grad_(False)

    @property
    def dtype(self):
        return torch.promote_types(self.linear.weight.dtype, torch.float32)

    def new_parameter(self, *shape):
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.linear.weight.device))

    def forward(self, x):  # exercise 2
        return self.linear(x) + self.update(self.dropout(x))  # (..., k) -> (..., d)

    def delta_weight(self) -> torch.Tensor:  # exercise 3
        """ΔW (d, k), float32 at least (Eq. 3): column j is the update of the j-th unit vector."""
        with torch.autocast(self.linear.weight.device.type, enabled=False):
            return self.update(torch.eye(self.in_features, dtype=self.dtype, device=self.linear.weight.device)).T

    def merged_weight(self) -> torch.Tensor:  # exercise 4
        """W0 + ΔW (d, k), added in float32 at least and rounded once to W0's type."""
        if "weight" not in self.linear._parameters or hasattr(self.linear.weight, "full_tensor"):
            raise ValueError("a weight that is computed (weight_norm, pruning) or sharded (FSDP2) cannot be merged")
        return (self.linear.weight.to(self.dtype) + self.delta_weight()).to(self.linear.weight.dtype)

    weight = property(lambda self: self.merged_weight())  # nn.TransformerEncoderLayer and others read these two
    bias = property(lambda self: self.linear.bias)

    @torch.no_grad()
    def merge(self) -> nn.Linear:  # exercise 4
        """A new nn.Linear that computes what this layer computes in eval mode. This layer stays as it is."""
        weight, merged = self.merged_weight(), copy.deepcopy(self.linear)
        merged.weight.copy_(weight)
        return merged


class LoRALinear(Adapter):
    """LoRA (arXiv 2106.09685), Eq. 1: ΔW = (alpha / r) B A. A is random and B zero, so ΔW starts at zero.

    `alpha=None` means 2 r, which MoRA's paper uses at r = 8. `rslora` divides by sqrt(r) instead (arXiv 2312.03732), so
    that a step's size does not shrink with the rank. `train_A=False` is AsyLoRA (arXiv 2402.16842): A keeps its random
    values, B alone learns.
    """

    def __init__(self, linear, rank, alpha=None, dropout=0.0, rslora=False, train_A=True):  # exercise 1
        super().__init__(linear, rank, dropout)
        self.alpha = 2 * rank if alpha is None else alpha
        self.scaling = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.A = nn.Parameter(self.random_A(), requires_grad=train_A)
        self.B = self.new_parameter(self.out_features, rank)

    def random_A(self, generator=None):  # exercise 1
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=sqrt(5)), drawn on the CPU so that devices agree
        A = torch.empty(self.rank, self.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        return A.to(self.linear.weight.device, self.dtype)

    def update(self, x):  # exercise 1
        x = F.linear(x, self.A.to(x.dtype))  # (..., k) -> (..., r)
        return F.linear(x, self.B.to(x.dtype)) * self.scaling  # (..., r) -> (..., d)

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 1
        self.A.copy_(self.random_A(generator))
        self.B.zero_()

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"


class DoRALinear(LoRALinear):
    """DoRA (arXiv 2402.09353): LoRA changes the direction of each row of the weight, `magnitude` (d,) its length.

    h = magnitude · V x / ‖V‖, where V = W0 + (alpha / r) B A and ‖V‖ (d,) are the lengths of its rows.
    """

    def __init__(self, linear, rank, alpha=None, dropout=0.0, rslora=False):
        super().__init__(linear, rank, alpha, dropout, rslora)
        self.magnitude = nn.Parameter(self.row_lengths())

    def direction(self):  # exercise 13
        return self.linear.weight.to(self.dtype) + super().delta_weight()  # V: (d, k)

    @torch.no_grad()
    def row_lengths(self):  # exercise 13
        """‖V‖ (d,), a constant in the backward pass: an approximation of the gradient that saves memory (DoRA, 4.3)."""
        return self.direction().norm(dim=1).clamp_min(1e-30)

    def forward(self, x):  # exercise 13
        y = F.linear(x, self.linear.weight) + self.update(self.dropout(x))  # V x: (..., k) -> (..., d)
        y = (y * (self.magnitude / self.row_lengths())).to(y.dtype)  # float16 would overflow where V has a row of zeros
        return y if self.linear.bias is None else y + self.linear.bias.to(y.dtype)

    def delta_weight(self):  # exercise 13
        return (self.magnitude / self.row_lengths())[:, None] * self.direction() - self.linear.weight

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 13
        super().reset(generator)
        self.magnitude.copy_(self.row_lengths())


class MoRALinear(Adapter):
    """MoRA, Eq. 2: ΔW x = decompress(M compress(x)). M (r̂, r̂) starts at zero.

    `operator` is a key of OPERATORS; `options` go to its class: `groups` for sharing, `fold` for decoupling and
    rotation, `copies` for overlap. No alpha: a factor before M would, under Adam, only be another learning rate.
    """

    fast = True  # False, or --no-fast in train.py: each forward runs Operator.forward, so breakpoints there stop

    def __init__(self, linear, rank, operator="rotation", dropout=0.0, **options):
        if operator not in OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, not {operator!r}")
        super().__init__(linear, rank, dropout)
        self.size -= self.size % OPERATORS[operator].multiple * (self.size > 1)
        self.operator = OPERATORS[operator](self.in_features, self.out_features, self.size, **options)
        self.operator.to(linear.weight.device)
        self.M = self.new_parameter(self.size, self.size)

    def update(self, x):
        return self.operator(x, self.M)

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 15
        self.M.zero_()
        self.operator.regroup(generator)

    def extra_repr(self):
        return f"rank={self.rank}, size={self.size}, {type(self.operator).__name__}({self.operator.extra_repr()})"

    def forward(self, x):  # what Adapter.forward computes, in less time
        return fast_forward(self, x)


# ---- Whole models ----------------------------------------------------------------------------------------------------
METHODS = {
    "lora": LoRALinear,
    "lora+": LoRALinear,  # arXiv 2402.12354: LoRA whose B has a higher learning rate than A, set in the optimizer
    "asylora": functools.partial(LoRALinear, train_A=False),
    "dora": DoRALinear,
    "relora": LoRALinear,  # arXiv 2307.05695: LoRA with merge_and_reset every so often
    "mora": MoRALinear,
    "remora": MoRALinear,  # MoRA with merge_and_reset every so often, and new groups after each
}


def add_adapters(model: nn.Module, method="mora", rank=8, operator=None, targets=None, **options) -> nn.Module:
    """Replace the model's linear layers by adapted ones, in place, freeze everything else, and return the model.

    `operator` is MoRA's; None means rotation, and for remora sharing with groups="cycle". `targets` lists layers by
    their full name or its end, such as ["c_attn", "h.0.mlp.c_fc"]; None means all, except those that share their weight
    with another module, as an output head may with the embedding. `options` go to the method's class: alpha, dropout,
    rslora, groups, fold, copies. Random numbers come from torch's global generator. LoRA ignores `operator`.
    ValueError if an argument is wrong, nothing matches, or the model is adapted already; it is then as it was.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if operator not in (None, *OPERATORS):
        raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, not {operator!r}")
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model is adapted already: merge_adapters(model) comes first")
    if method == "remora" and operator in (None, "sharing"):
        operator, options = "sharing", {"groups": "cycle"} | options
    if METHODS[method] is MoRALinear:
        options["operator"] = operator = operator or "rotation"
    if method == "remora" and OPERATORS[operator].regroup is Operator.regroup:
        warnings.warn(f"{operator} has no groups to renew: a merge of remora adds nothing that M could not")
    layers = find_targets(model, targets)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        new = {id(layer): METHODS[method](layer, rank, **options).train(layer.training) for layer in layers.values()}
    except Exception as error:  # an option of another method, or of a wrong type, say
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise ValueError(f"{method}: {error}") from error
    replace_modules(model, new)
    return model


def find_targets(model, targets):
    """The linear layers that `targets` names, by full name, or the first name of one that is used in several places."""
    layers = {name: module for name, module in model.named_modules()
              if name and type(module) is nn.Linear and module.in_features * module.out_features}
    uses = collections.Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    untied = {name: layer for name, layer in layers.items() if uses[id(layer.weight)] <= 1}
    chosen = untied if targets is None else {}
    for target in [targets] if isinstance(targets, str) else targets or ():
        found = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}
        if not found:
            names = sorted({name.split(".")[-1] for name in layers})
            raise ValueError(f"no linear layer is called {target!r}; there are {', '.join(names)}")
        if found.keys() - untied.keys():
            raise ValueError(f"{target!r} shares its weight with another module: merging would change both")
        chosen |= found
    if not chosen:
        raise ValueError("no nn.Linear layer to adapt, a tied output head is none; there are: " + ", ".join(untied))
    for name, layer in chosen.items():
        if "weight" not in layer._parameters:  # each forward computes it anew, which would undo a merge
            raise ValueError(f"the weight of {name} is computed, as by weight_norm or pruning: remove that first")
    return chosen


def replace_modules(model, new):
    """Put new[id(module)] wherever one of these modules is used."""
    for parent in [*model.modules()]:
        for name, child in parent._modules.items():
            setattr(parent, name, new.get(id(child), child))


def find_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapted layers by full name; ValueError if there are none."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no adapters: add_adapters(model) comes first")
    return adapters


def merge_adapters(model: nn.Module) -> nn.Module:
    """Put a merged nn.Linear in the place of every adapted layer, and return the model. Nothing is unfrozen."""
    replace_modules(model, {id(adapter): adapter.merge() for adapter in find_adapters(model).values()})
    return model.merge() if isinstance(model, Adapter) else model


def merge_and_reset(model: nn.Module, optimizer=None, generator=None):  # exercise 15
    """The step of ReLoRA and ReMoRA: add every ΔW to its W0 and start again from zero, with a fresh A or fresh groups
    from `generator`; drop the optimizer's state for the adapters, which belongs to the update just merged.
    """
    for adapter in find_adapters(model).values():
        with torch.no_grad():
            adapter.linear.weight.copy_(adapter.merged_weight())
        adapter.reset(generator)
        for parameter in adapter.parameters(recurse=False) if optimizer else ():
            optimizer.state.pop(parameter, None)


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' own tensors by full name: parameters, groups, and a description, without which the numbers mean
    nothing. The frozen weights are not in it, nor what `merge_and_reset` added to them: after that, save the model.
    """
    state = {}
    for name, adapter in find_adapters(model).items():
        description = f"{type(adapter).__name__}({adapter.extra_repr()})".encode()
        tensors = adapter.state_dict() | {"description": torch.tensor([*description], dtype=torch.uint8)}
        state |= {f"{name}.{key}".lstrip("."): value for key, value in tensors.items() if not key.startswith("linear.")}
    return state


def load_adapters(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Load what `adapter_state_dict` saved. ValueError, and nothing loaded, if the model's adapters are others."""
    def describe(tensor):
        text = bytes(tensor.tolist()).decode(errors="replace") if tensor.dtype == torch.uint8 else tuple(tensor.shape)
        return f"{'float' if tensor.is_floating_point() else tensor.dtype} {text}".removeprefix("torch.uint8 ")

    expected = adapter_state_dict(model)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) and not tensor.is_meta
                                              and tensor.layout == torch.strided for tensor in state.values()):
        raise ValueError("the state is not a dict of dense tensors, as adapter_state_dict makes it")
    for key in sorted(expected.keys() | state.keys(), key=lambda key: ("description" not in str(key), str(key))):
        ours, saved = (describe(tensors[key]) if key in tensors else "absent" for tensors in (expected, state))
        if ours != saved:
            raise ValueError(f"{key} is {saved} in the state, and {ours} in the model")
    model.load_state_dict(state, strict=False)
    return model


# ---- Speed -----------------------------------------------------------------------------------------------------------
# The rest may be deleted, with MoRALinear.forward: results change by rounding only. Your own operators are fast too.


def fast_forward(layer, x):
    """(W0 + ΔW) x + bias as one product; as Adapter.forward has it where that costs more or is not the same."""
    linear, operator, k = layer.linear, layer.operator, layer.in_features
    side = operator.rows * layer.size if is_decoupling(operator) else k  # building ΔW costs about side²
    few = 2 * x.numel() < k * min(k, layer.out_features) or 4 * x.numel() < side**2
    altered = [value for part in (linear, layer.dropout, operator) for name, value in vars(part).items()
               if name == "forward" or name.endswith("_hooks")] + [p.requires_grad for p in linear.parameters()]
    plain = (type(linear), type(layer.dropout), type(layer).update, type(operator).forward) == (
        nn.Linear, nn.Dropout, MoRALinear.update, Operator.forward) and not any(altered)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # by torch.func, which may want more
    if not layer.fast or few or not plain or transformed or layer.dropout.training and layer.dropout.p > 0:
        return Adapter.forward(layer, x)  # dropout gives W0 and ΔW different x
    return MergedProduct.apply(x, layer.M, linear.weight, linear.bias, operator)


class MergedProduct(torch.autograd.Function):
    """(W0 + ΔW) x + bias. W0 + ΔW is built again in the backward pass rather than kept, and its gradient (d, k) is not
    formed: M's is decompressᵀ(g) compress(x)ᵀ, summed over tokens and rows. There are no second derivatives.
    """

    @staticmethod
    def forward(x, M, weight, bias, operator):  # exercise 14
        return F.linear(x, fast_merged_weight(operator, M, weight), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):  # exercise 14
        x, M, weight, _, ctx.operator = inputs
        ctx.x_dtype, x = x.dtype, x.to(output.dtype)  # which differ under autocast
        if not is_decoupling(ctx.operator):
            x = fast_compress(ctx.operator, x).contiguous()  # a view, as Truncation's, would keep all of x in memory
        ctx.save_for_backward(x, M, weight)

    @staticmethod
    def backward(ctx, g):  # exercise 14
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("there are no second derivatives here: MoRALinear.fast = False has them")
        (kept, M, weight), operator, size = ctx.saved_tensors, ctx.operator, ctx.operator.size
        grad_x = (g @ fast_merged_weight(operator, M, weight).to(g.dtype)).to(ctx.x_dtype)
        kept, g = kept.reshape(-1, *kept.shape[g.dim() - 1:]), g.reshape(-1, g.shape[-1])  # (tokens, ...)
        if is_decoupling(operator):
            return grad_x, decoupling_gradient(operator, kept, g), None, None, None
        grad_z = fast_decompress_transposed(operator, g, kept.shape[1:])
        return grad_x, grad_z.reshape(-1, size).T @ kept.reshape(-1, size), None, None, None


def fast_merged_weight(operator, M, weight):
    """W0 + ΔW (d, k) as merging adds them. Sharing's ΔW copies M; with x = I, Decoupling's z is block diagonal."""
    if type(operator) in (Sharing, Overlap):
        sharings = getattr(operator, "sharings", (operator,))
        copies = [M[sharing.out_group].index_select(1, sharing.in_group) for sharing in sharings]
        return (weight + sum(copies) / math.sqrt(len(copies))).to(weight.dtype)
    k, eye = operator.in_features, functools.partial(torch.eye, dtype=M.dtype, device=M.device)
    with torch.autocast(M.device.type, enabled=False):
        if is_decoupling(operator):
            blocks = operator.rotate(eye(len(M))[:, None].expand(-1, operator.rows, -1)) @ M.T  # (M Rᵢ)ᵀ: (r̂, n, r̂)
            z = torch.block_diag(*blocks.unbind(1))  # (n r̂, n r̂)
            z = F.pad(z, (0, 0, 0, k - len(z))).unflatten(-1, blocks.shape[1:])  # (k, n, r̂)
        else:
            z = operator.compress(eye(k)) @ M.T  # (k, r̂) or (k, n, r̂)
    return (weight + operator.decompress(z).T).to(weight.dtype)


def fast_compress(operator, x):
    if x.device.type == "cuda" and isinstance(operator, Sharing):  # index_add is slow there, and its order varies
        return x @ operator.compress(torch.eye(operator.in_features, dtype=x.dtype, device=x.device))
    return operator.compress(x)


def fast_decompress_transposed(operator, g, z_shape):
    """The gradient of z (tokens, *z_shape) from that of the outputs (tokens, d), by decompressᵀ, its vjp at any z."""
    if g.device.type == "cuda" and isinstance(operator, Sharing):
        return g @ operator.decompress(torch.eye(operator.size, dtype=g.dtype, device=g.device)).T
    return torch.vmap(torch.func.vjp(operator.decompress, g.new_zeros(z_shape))[1])(g)[0]


def is_decoupling(operator):
    return type(operator) in (Decoupling, Rotation)  # no subclass: these two have faster ways, for ΔW and the gradient


def decoupling_gradient(operator, x, g):
    """M's gradient Σ gᵢ (Rᵢ xᵢ)ᵀ as Σ (gᵢ xᵢᵀ) Rᵢᵀ, which rotates n small products instead of all of x."""
    n, size = operator.rows, operator.size
    if operator.fold or n * size < operator.out_features:
        g = fast_decompress_transposed(operator, g, (n, size)).flatten(1)  # (tokens, n r̂)
    products = [g_i.T @ x_i for g_i, x_i in zip(g.split(size, 1), x.split(size, 1))]  # the last row may be shorter
    products = [F.pad(product, (0, size - product.shape[1], 0, size - product.shape[0])) for product in products]
    return operator.rotate(torch.stack(products, 1)).sum(1)  # (r̂, n, r̂) -> (r̂, r̂)
