"""MoRA: high-rank updating for parameter-efficient fine-tuning (arXiv 2405.12130), with LoRA and its relatives.

A frozen weight W0 (d outputs, k inputs) gets a trainable update. LoRA's has rank r and (k + d) r parameters. MoRA
spends the same parameters on one square matrix M, between two operators that have none:

    LoRA   h = W0 x + (alpha / r) B A x               A: r x k,  B: d x r
    MoRA   h = W0 x + decompress(M compress(x))       M: r̂ x r̂,  r̂ = floor(sqrt((k + d) r)),
                                                      at most min(k, d), and even for rotation

compress squeezes k inputs into r̂ numbers, or cuts them into rows of r̂; decompress spreads the results over d outputs.
Both are linear, so the update is a matrix ΔW that merges into W0 exactly. Its rank is r̂ or more where LoRA's is r, and
what an update of low rank cannot hold, such as facts to memorize, is what MoRA is for. In the code k is `in_features`,
d `out_features`, r `rank` and r̂ `size`. Equations are numbered as in MoRA's paper.

From top to bottom: the size of M, the four operators, the layers, and what is done to a whole model. A comment such as
`# exercise 7` marks what that exercise of tests/EXERCISES.md takes out. The file needs torch and nothing else:

    model = add_adapters(model, method="mora", rank=8)     # freezes the model and adapts every linear layer
    ...                                                    # train the parameters that still require a gradient
    torch.save(adapter_state_dict(model), "adapter.pt")
    model = merge_adapters(model)                          # plain nn.Linear layers again, with the same outputs
"""

import collections
import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn


def square_size(in_features: int, out_features: int, rank: int) -> int:  # exercise 1
    """r̂, the side of the largest square matrix within LoRA's budget (k + d) r; more than min(k, d) adds no rank."""
    check_rank(rank)
    return min(math.isqrt((in_features + out_features) * rank), in_features, out_features)


def check_rank(rank):
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, not {rank!r}")


# ----------------------------------------------------------------------------------------------------------------------
# The operators. `...` stands for any leading dimensions, such as (batch, length).


class Operator(nn.Module):
    """Two linear maps without parameters: `compress`, from k inputs to r̂ numbers, and `decompress`, from them to d
    outputs.

    These two define the method, and an operator of your own needs no more than them and a name in OPERATORS; what it
    draws at random should be a registered buffer, so that it is saved. The others are for speed, in `MergedProduct`
    below: `matrix` makes ΔW (d, k) of M, `decompress_transposed` takes the gradient of the outputs (..., d) back to
    that of M's outputs, and `keep` and `gradient` lead to M's own. Leave them out at a first reading.
    """

    options = ()  # further arguments of __init__

    def __init__(self, in_features: int, out_features: int, size: int):
        super().__init__()
        self.in_features, self.out_features, self.size = in_features, out_features, size

    def regroup(self, generator=None):
        """Draw new groups, where the operator has any (`Sharing`)."""

    def keep(self, x):
        """What the gradient of M needs of the inputs: compress(x)."""
        return self.compress(x).contiguous()  # a view, as Truncation's, would keep all of x in memory

    def gradient(self, g, kept):
        """The gradient of M (r̂, r̂), from that of the outputs, g (..., d)."""
        return sum_of_products(self.decompress_transposed(g), kept)


def sum_of_products(g, z):
    """Σ g zᵀ over all leading dimensions: (..., m), (..., n) -> (m, n)."""
    return g.flatten(0, -2).T @ z.flatten(0, -2)


class Truncation(Operator):
    """Eq. 4: keep the first r̂ inputs, write the first r̂ outputs. The baseline: M never sees the rest of x."""

    def compress(self, x):  # exercise 2
        return x[..., :self.size]  # (..., k) -> (..., r̂)

    def decompress(self, z):  # exercise 2
        return F.pad(z, (0, self.out_features - self.size))  # (..., r̂) -> (..., d)

    def decompress_transposed(self, g):
        return g[..., :self.size]  # (..., d) -> (..., r̂)

    def matrix(self, M):
        return F.pad(M, (0, self.in_features - self.size, 0, self.out_features - self.size))  # (r̂, r̂) -> (d, k)


class Sharing(Operator):
    """Eq. 6: deal inputs and outputs into r̂ groups; add up the inputs of a group, copy one number to its outputs.

    So ΔW[i, j] = M[out_group[i], in_group[j]]. `groups` says how indices are dealt: "strided" (0 1 2 0 1 2),
    "contiguous" (0 0 1 1 2 2), "random", a pair of these for inputs and outputs, or "cycle": each `regroup` takes the
    next pair of `CYCLE`, as the paper's code does in ReMoRA. Groups differ in length by at most one.
    """

    options = ("groups",)
    KINDS = ("strided", "contiguous", "random")
    CYCLE = (("strided", "strided"), ("contiguous", "contiguous"), ("contiguous", "strided"), ("strided", "contiguous"))

    def __init__(self, in_features, out_features, size, groups="strided"):
        super().__init__(in_features, out_features, size)
        pair = (groups, groups) if isinstance(groups, str) else tuple(groups)
        self.pairs = self.CYCLE if groups == "cycle" else (pair,)
        if not all(len(pair) == 2 and set(pair) <= set(self.KINDS) for pair in self.pairs):
            raise ValueError(f"groups must be one of {', '.join(self.KINDS)}, cycle, or a pair of the first three, not "
                             f"{groups!r}")
        self.register_buffer("in_group", torch.empty(in_features, dtype=torch.long))
        self.register_buffer("out_group", torch.empty(out_features, dtype=torch.long))
        self.register_buffer("turn", torch.tensor(-1))  # which of the pairs is in use; the first regroup makes it 0
        self.regroup()

    @torch.no_grad()
    def regroup(self, generator=None):  # exercise 14
        # In place, so that a compiled model sees the new groups without being compiled again.
        self.turn += 1
        in_kind, out_kind = self.pairs[int(self.turn) % len(self.pairs)]
        self.in_group.copy_(self.deal(self.in_features, in_kind, generator))
        self.out_group.copy_(self.deal(self.out_features, out_kind, generator))

    def deal(self, features, kind, generator):  # exercise 4
        """The group of each of `features` indices: whole numbers below r̂, shape (features,)."""
        i = torch.arange(features)
        if kind == "contiguous":
            return i * self.size // features
        if kind == "random":
            i = torch.randperm(features, generator=generator)
        return i % self.size

    def compress(self, x):  # exercise 3
        return self.add_up(x, self.in_group)  # (..., k) -> (..., r̂)

    def add_up(self, x, group):  # exercise 3
        if x.device.type == "cuda":  # where index_add rounds after each addition, in an order that varies
            return x @ F.one_hot(group, self.size).to(x.dtype)  # (..., k) (k, r̂) -> (..., r̂)
        return x.new_zeros(*x.shape[:-1], self.size).index_add(-1, group, x)

    def decompress(self, z):  # exercise 3
        return z.index_select(-1, self.out_group)  # (..., r̂) -> (..., d)

    def decompress_transposed(self, g):
        return self.add_up(g, self.out_group)  # (..., d) -> (..., r̂)

    def matrix(self, M):
        return M.index_select(1, self.in_group).index_select(0, self.out_group)  # (r̂, r̂) -> (d, k)


class Decoupling(Operator):
    """Eq. 8: cut x into n = ceil(k / r̂) rows of r̂, send each through the same M, lay the results side by side.

    Zeros fill the last row. Where k = d, ΔW is block diagonal, with M as every block. Results longer than d are cut, as
    in the paper, and shorter ones repeated. Where k > d the cut loses whole rows, and with them every input in them;
    `fold=True` adds what lies past d back onto the first outputs.
    """

    options = ("fold",)

    def __init__(self, in_features, out_features, size, fold=False):
        super().__init__(in_features, out_features, size)
        self.rows, self.fold = math.ceil(in_features / size), fold

    def compress(self, x):  # exercise 5
        x = F.pad(x, (0, self.rows * self.size - self.in_features))
        return self.rotate(x.unflatten(-1, (self.rows, self.size)))  # (..., k) -> (..., n, r̂)

    def rotate(self, rows, back=False):
        """Rows (..., n, r̂), each turned by its own angle, or back: not at all here, and Rotation says how."""
        return rows

    def decompress(self, z):  # exercise 6
        y = z.flatten(-2)  # (..., n, r̂) -> (..., n r̂)
        resize = fold if self.fold and y.shape[-1] > self.out_features else tile
        return resize(y, self.out_features)  # (..., d)

    def decompress_transposed(self, g):
        length = self.rows * self.size
        if length < self.out_features:
            return fold(g, length)  # (..., d) -> (..., n r̂)
        return tile(g, length) if self.fold else g  # (..., n r̂); without fold, what was cut has no gradient

    # Row i of x meets M Rᵢ, which is M with each of its own rows turned back: so `matrix` turns M, which is small, and
    # not x. M's gradient is Σ gᵢ (Rᵢ xᵢ)ᵀ, which is gᵢ xᵢᵀ with each of its rows turned: so `gradient` turns those.

    def matrix(self, M):
        n = self.rows if self.fold else min(self.rows, math.ceil(self.out_features / self.size))  # the others are cut
        blocks = self.rotate(M[:, None].expand(-1, n, -1), back=True)  # (r̂, n, r̂), where the last r̂ are inputs
        diagonal = torch.block_diag(*blocks.unbind(1))  # (n r̂, n r̂)
        columns = F.pad(diagonal, (0, self.in_features - n * self.size)).T  # (k, n r̂); below zero, pad cuts
        return self.decompress(columns.unflatten(-1, (n, self.size))).T  # (k, n, r̂) -> (d, k)

    def keep(self, x):
        return x

    def gradient(self, g, x):
        rows = zip(self.decompress_transposed(g).split(self.size, -1), x.split(self.size, -1))
        products = [sum_of_products(g_i, x_i) for g_i, x_i in rows]  # n of them, the last perhaps smaller than (r̂, r̂)
        products = [F.pad(p, (0, self.size - p.shape[1], 0, self.size - p.shape[0])) for p in products]
        return self.rotate(torch.stack(products, dim=1)).sum(1)  # (r̂, n, r̂) -> (r̂, r̂)


def tile(y, length):  # exercise 6
    """Repeat the last dimension up to a length, and cut what is beyond. The transpose of `fold`."""
    copies = math.ceil(length / y.shape[-1])
    return (torch.cat([y] * copies, dim=-1) if copies > 1 else y)[..., :length]


def fold(y, length):  # exercise 6
    """Cut the last dimension, which is longer, into pieces of a length and add them up. The transpose of `tile`."""
    whole = y.shape[-1] // length * length
    rest = F.pad(y[..., whole:], (0, whole + length - y.shape[-1]))
    return y[..., :whole].unflatten(-1, (-1, length)).sum(-2) + rest


class Rotation(Decoupling):
    """Eq. 9: Decoupling, but row i is first rotated by angles i θ_j, θ_j = 10000^(-2j / r̂): M can tell rows apart.

    As in RoPE, coordinate j pairs with coordinate j + r̂/2. If r̂ is odd, the last coordinate has no partner and stays
    as it is.
    """

    def __init__(self, in_features, out_features, size, fold=False):  # exercise 7
        super().__init__(in_features, out_features, size, fold)
        theta = 10000 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
        angle = torch.arange(self.rows, dtype=torch.float64)[:, None] * theta  # (n, r̂ // 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def rotate(self, rows, back=False):  # exercise 7
        n, half = rows.shape[-2], self.size // 2
        a, b, rest = rows.tensor_split((half, 2 * half), dim=-1)
        cos, sin = self.cos[:n].to(rows.dtype), self.sin[:n].to(rows.dtype)
        if back:
            sin = -sin
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)  # (..., n, r̂)


OPERATORS = {"truncation": Truncation, "sharing": Sharing, "decoupling": Decoupling, "rotation": Rotation}


# ----------------------------------------------------------------------------------------------------------------------
# The layers: a frozen nn.Linear and a trainable update.


class Adapter(nn.Module):
    """What all layers share. A subclass owns what trains, and defines `update`, ΔW x, and `reset`, back to ΔW = 0.

    The trainable parameters are float32 at least, also beside a bfloat16 weight: their steps are too small for
    bfloat16.
    """

    def __init__(self, linear: nn.Linear, rank: int, dropout: float = 0.0):
        super().__init__()
        if type(linear) is not nn.Linear:  # subclasses may bypass forward, as the one in nn.MultiheadAttention does
            raise ValueError(f"an adapter wraps an nn.Linear, not {type(linear).__name__}")
        check_rank(rank)
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.dropout = nn.Dropout(dropout)
        self.linear = linear.requires_grad_(False)

    @property
    def dtype(self):
        return torch.promote_types(self.linear.weight.dtype, torch.float32)

    def new_parameter(self, *shape):
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.linear.weight.device))

    def forward(self, x):  # exercise 8
        return self.linear(x) + self.update(self.dropout(x))  # (..., k) -> (..., d)

    def update(self, x):
        """ΔW x: (..., k) -> (..., d)."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator | None = None):
        """Make ΔW zero again, with a fresh A or fresh groups drawn from `generator`, as at the start."""
        raise NotImplementedError

    def delta_weight(self) -> torch.Tensor:  # exercise 9
        """ΔW (d, k), float32 at least: column j is the update of the j-th unit vector, so it cannot disagree with
        `update` (Eq. 3).
        """
        with torch.autocast(self.linear.weight.device.type, enabled=False):
            return self.update(torch.eye(self.in_features, dtype=self.dtype, device=self.linear.weight.device)).T

    @torch.no_grad()
    def merged_weight(self):  # exercise 10
        """W0 + ΔW (d, k), added in float32 at least and rounded once to W0's type."""
        return (self.linear.weight.to(self.dtype) + self.delta_weight()).to(self.linear.weight.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:  # exercise 10
        """A new nn.Linear that computes what this layer computes in eval mode. This layer stays as it is."""
        merged = copy.deepcopy(self.linear)
        merged.weight.copy_(self.merged_weight())
        return merged

    @torch.no_grad()
    def merge_and_reset(self, generator: torch.Generator | None = None):  # exercise 13
        """Move ΔW into W0, in place, and start again from ΔW = 0: one step of ReLoRA or ReMoRA."""
        self.linear.weight.copy_(self.merged_weight())
        self.reset(generator)

    def extra_repr(self):
        return f"rank={self.rank}"

    # The numbers mean something only beside this description, so state dicts carry it, as bytes because they hold
    # tensors only.
    def get_extra_state(self):
        return torch.tensor(list(f"{type(self).__name__}({self.extra_repr()})".encode()), dtype=torch.uint8)

    def set_extra_state(self, state):
        if not torch.equal(state.cpu(), self.get_extra_state()):
            saved, own = (bytes(text.tolist()).decode(errors="replace") for text in (state, self.get_extra_state()))
            raise ValueError(f"the state was saved from {saved}, and the model has {own}")


class LoRALinear(Adapter):
    """LoRA (arXiv 2106.09685), Eq. 1: ΔW = (alpha / r) B A. A is random and B zero, so ΔW starts at zero.

    `alpha=None` means 2 r, which MoRA's paper uses at r = 8. `rslora` divides by sqrt(r) instead (arXiv 2312.03732), so
    that a step's size does not shrink with the rank. `train_A=False` is AsyLoRA (arXiv 2402.16842): A keeps its random
    values, B alone learns.
    """

    def __init__(self, linear, rank, alpha=None, dropout=0.0, rslora=False, train_A=True):  # exercise 11
        super().__init__(linear, rank, dropout)
        self.alpha = 2 * rank if alpha is None else alpha
        self.scaling = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.A = self.new_parameter(rank, self.in_features).requires_grad_(train_A)
        self.B = self.new_parameter(self.out_features, rank)
        LoRALinear.reset(self)  # not DoRA's, whose magnitude is not there yet

    def update(self, x):  # exercise 11
        x = F.linear(x, self.A.to(x.dtype))  # (..., k) -> (..., r)
        return F.linear(x, self.B.to(x.dtype)) * self.scaling  # (..., r) -> (..., d)

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 11
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=sqrt(5)), drawn on the CPU so that devices agree
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}"


class DoRALinear(LoRALinear):
    """DoRA (arXiv 2402.09353): LoRA turns each row of the weight, and a trainable `magnitude` (d,) sets its length.

    h = magnitude · V x / ‖V‖, where V = W0 + (alpha / r) B A and ‖V‖ has the length of each of its rows.
    """

    def __init__(self, linear, rank, alpha=None, dropout=0.0, rslora=False):
        super().__init__(linear, rank, alpha, dropout, rslora)
        self.magnitude = self.new_parameter(self.out_features)
        self.magnitude.data.copy_(self.direction().detach().norm(dim=1))

    def direction(self):  # exercise 12
        return self.linear.weight.to(self.dtype) + super().delta_weight()  # V: (d, k)

    def scale(self):  # exercise 12
        with torch.no_grad():  # the length counts as a constant, which saves memory at no loss (DoRA's section 4.3)
            length = self.direction().norm(dim=1).clamp_min(1e-30)  # (d,)
        return self.magnitude / length

    def forward(self, x):  # exercise 12
        y = F.linear(x, self.linear.weight) + self.update(self.dropout(x))  # V x: (..., k) -> (..., d)
        y = y * self.scale().to(y.dtype)
        return y if self.linear.bias is None else y + self.linear.bias.to(y.dtype)

    def delta_weight(self):  # exercise 12
        return self.scale()[:, None] * self.direction() - self.linear.weight

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 12
        super().reset(generator)
        self.magnitude.copy_(self.direction().norm(dim=1))


class MoRALinear(Adapter):
    """MoRA, Eq. 2: ΔW x = decompress(M compress(x)). M starts at zero, and so does ΔW; there is no alpha.

    `operator` is a key of OPERATORS; `options` go to its class: `groups` for sharing, `fold` for decoupling and
    rotation.
    """

    def __init__(self, linear, rank, operator="rotation", dropout=0.0, **options):
        if operator not in OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, not {operator!r}")
        size = square_size(linear.in_features, linear.out_features, rank)
        if operator == "rotation" and size > 1:
            size -= size % 2  # coordinates turn in pairs
        maps = OPERATORS[operator](linear.in_features, linear.out_features, size, **options)
        super().__init__(linear, rank, dropout)  # freezes the layer, which an error above must leave as it was
        self.operator = maps.to(linear.weight.device)
        self.M = self.new_parameter(size, size)
        self.one_product = has_short_cut(OPERATORS[operator], options)

    def update(self, x):  # exercise 8
        z = self.operator.compress(x)
        z = F.linear(z, self.M.to(z.dtype))
        return self.operator.decompress(z)

    def forward(self, x):
        if not self.takes_short_cut(x):
            return super().forward(x)
        device = x.device.type
        autocast = not x.is_meta and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        return MergedProduct.apply(x.to(dtype), self.M, self.linear.weight, self.linear.bias, self.operator)

    def takes_short_cut(self, x):
        """Whether forward may and should use MergedProduct, below, which computes the same in less time."""
        tokens = x.numel() // self.in_features
        many = tokens >= min(self.in_features, self.out_features) / 2  # enough to build ΔW for
        dropped = self.training and self.dropout.p > 0  # W0 and ΔW do not see the same x then
        frozen = not any(parameter.requires_grad for parameter in self.linear.parameters())
        return self.one_product and many and frozen and not dropped

    @torch.no_grad()
    def reset(self, generator=None):  # exercise 13
        self.M.zero_()
        self.operator.regroup(generator)

    def extra_repr(self):
        fold = ", fold=True" if getattr(self.operator, "fold", False) else ""
        return f"rank={self.rank}, size={self.operator.size}, operator={type(self.operator).__name__.lower()}{fold}"


class MergedProduct(torch.autograd.Function):
    """(W0 + ΔW) x + bias in one product, for hardly more than the frozen layer costs. W0 and the bias get no gradient.

    ΔW (d, k) is built once a call, however many tokens there are, and again in the backward pass rather than kept
    (torch.compile may keep it). Its own gradient would cost what training W0 costs, so M's comes from products of M's
    size.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x, M, weight, bias, operator):
        merged = (weight + operator.matrix(M)).to(x.dtype)  # added as merging adds, and rounded once
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, M, weight, _, ctx.operator = inputs
        ctx.save_for_backward(ctx.operator.keep(x), M, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable  # no second gradients
    def backward(ctx, g):
        kept, M, weight = ctx.saved_tensors
        merged = (weight + ctx.operator.matrix(M)).to(g.dtype)
        return g @ merged, ctx.operator.gradient(g, kept), None, None, None


def has_short_cut(operator_class, options):
    """Whether MergedProduct computes what the class's compress and decompress say, tried on random numbers. It does not
    where somebody changed these two, or wrote no `matrix`: then they alone count.
    """
    if not hasattr(operator_class, "matrix"):
        return False
    with torch.device("cpu"), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(0)
        for k, d in ((13, 22), (22, 13)):
            operator = operator_class(k, d, 4, **options).double()
            for _ in range(2):  # with the first groups, and with the next
                x, g, M, weight = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
                                   for shape in ((5, k), (5, d), (4, 4), (d, k)))
                defined = F.linear(x, weight) + operator.decompress(F.linear(operator.compress(x), M))
                merged = MergedProduct.apply(x, M, weight, None, operator)
                results = [(y, *torch.autograd.grad(y, (x, M), g)) for y in (defined, merged)]
                if not all(torch.allclose(a, b) for a, b in zip(*results)):
                    return False
                operator.regroup(generator)
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Whole models.

METHODS = {
    "lora": LoRALinear,
    "lora+": LoRALinear,  # arXiv 2402.12354: LoRA whose B learns faster than A, which is up to the optimizer
    "asylora": functools.partial(LoRALinear, train_A=False),
    "dora": DoRALinear,
    "relora": LoRALinear,  # arXiv 2307.05695: LoRA with merge_and_reset now and then
    "mora": MoRALinear,
    "remora": MoRALinear,  # MoRA with merge_and_reset now and then, which needs groups that change: cycle or random
}


def add_adapters(model: nn.Module, method="mora", rank=8, operator="rotation", targets=None, **options) -> nn.Module:
    """Replace the model's linear layers by adapted ones, in place, freeze everything else, and return the model.

    `targets` lists layers by their full name or its end, such as ["c_attn", "h.0.mlp.c_fc"]; None means all of them,
    except an output head that shares its weight with the embedding. `options` go to the method's class: alpha, dropout,
    rslora, groups, fold. Random numbers (A, random groups) come from torch's global generator. ValueError if an
    argument is unknown, if nothing matches, or if the model is adapted already; the model is then as it was.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model is adapted already: merge_adapters(model) comes first")
    if METHODS[method] is MoRALinear:
        options["operator"] = operator
    layers = find_targets(model, targets)
    try:
        adapters = {name: METHODS[method](layer, rank, **options) for name, layer in layers.items()}
    except TypeError as error:  # an option that belongs to another method
        raise ValueError(f"{method}: {error}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.train(adapter.linear.training))
    return model


def find_targets(model, targets):
    """The linear layers that `targets` names, by full name."""
    layers = {name: module for name, module in model.named_modules() if name and type(module) is nn.Linear}
    if not layers:
        raise ValueError(f"{type(model).__name__} contains no nn.Linear layer to adapt")
    uses = collections.Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {name for name, layer in layers.items() if uses[id(layer.weight)] > 1}
    if targets is None:
        chosen = {name: layer for name, layer in layers.items() if name not in tied}
    else:
        chosen = {}
        for target in [targets] if isinstance(targets, str) else targets:
            found = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}
            if not found:
                names = sorted({name.split(".")[-1] for name in layers})
                raise ValueError(f"no linear layer is called {target!r}; there are {', '.join(names)}")
            if tied & found.keys():
                raise ValueError(f"{target!r} shares its weight with another module: merging would change both")
            chosen |= found
    if not chosen:
        raise ValueError(f"there is no layer to adapt among {', '.join(layers)}: name some in targets; a tied output "
                         "head cannot be adapted")
    return chosen


def find_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapted layers by full name; ValueError if there are none."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no adapters: add_adapters(model) comes first")
    return adapters


def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace every adapted layer by its merged nn.Linear, in place, and return the model. All parameters stay frozen.
    """
    for name, adapter in find_adapters(model).items():
        model.set_submodule(name, adapter.merge())
    return model


def merge_and_reset(model: nn.Module, generator: torch.Generator | None = None):
    """The step of ReLoRA and ReMoRA: move every ΔW into its W0 and start again from zero, with fresh A or groups from
    `generator`.

    The optimizer's state of the adapters' parameters belongs to the old ΔW; dropping it is up to the caller.
    """
    for adapter in find_adapters(model).values():
        adapter.merge_and_reset(generator)


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' own tensors by full name: parameters, groups, and each adapter's description. The frozen weights
    are not in it, nor what `merge_and_reset` moved into them: after that, save the whole model.
    """
    return {f"{name}.{key}": tensor for name, adapter in find_adapters(model).items()
            for key, tensor in adapter.state_dict().items() if not key.startswith("linear.")}


def load_adapters(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Load what `adapter_state_dict` saved into a model with the same adapters. ValueError, and nothing loaded, if
    anything differs.
    """
    adapters = find_adapters(model)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError("the state is not a dict of tensors, as adapter_state_dict makes it")
    for name, adapter in adapters.items():
        if f"{name}._extra_state" in state:
            adapter.set_extra_state(state[f"{name}._extra_state"])
    own = adapter_state_dict(model)
    if own.keys() != state.keys():
        missing, unknown = sorted(own.keys() - state.keys())[:3], sorted(state.keys() - own.keys())[:3]
        raise ValueError(f"the state does not fit the model: missing in the state: {missing}; unknown to the model: "
                         f"{unknown}")
    for key in own:
        if own[key].shape != state[key].shape:
            raise ValueError(f"{key} is {tuple(state[key].shape)} in the state and {tuple(own[key].shape)} in the "
                             "model")
    model.load_state_dict(state, strict=False)
    return model
