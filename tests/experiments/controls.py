"""Controls: updates within MoRA's budget that are not MoRA's, to find out what its lead is made of.
This is train.py with more methods and operators, --full_warmup and --rms_norm.

    python tests/experiments/controls.py uuid --methods mora scattered --operator overlap
    python tests/experiments/controls.py c4 --methods lora relora --full_warmup 120
"""

import argparse
import copy
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import model
import mora
import train
from model import Block, load_file

# ---- An operator of one's own: such a class, and at the end of this file a name and peak rates --
class Overlap(mora.Operator):
    """J random Sharings of the same M at once, J = 4: ΔW = Σ Dⱼ M Cⱼ / sqrt(J).
    An entry of ΔW is a sum of J entries of M. Divided by sqrt(J) it stays as large as sharing's
    entries, so that the learning rate need not change with J. The rank is at most J (r̂ - 1) + 1:
    each Dⱼ has r̂ columns, and those of each add up to the same vector of ones."""
    kinds = [functools.partial(mora.Sharing, groups="random")] * 4

    def __init__(self, *sizes):  # in_features, out_features, size
        super().__init__(*sizes)
        # What is drawn at random, here the groups of each Sharing, has to be in registered buffers
        self.sharings = nn.ModuleList(kind(*sizes) for kind in self.kinds)

    # Any number of rows may meet M, as in Decoupling: MoRALinear multiplies the last dimension
    def compress(self, x):
        rows = [sharing.compress(x) for sharing in self.sharings]
        return torch.stack(rows, dim=-2)  # (..., k) -> (..., J, r̂)

    def decompress(self, z):
        parts = [sharing.decompress(row) for sharing, row in zip(self.sharings, z.unbind(-2))]
        return sum(parts) / math.sqrt(len(parts))  # (..., J, r̂) -> (..., d)

    # Only where a merge changes the operator
    def regroup(self, generator=None):
        for sharing in self.sharings:
            sharing.regroup(generator)

# ---- Other operators -----------------------------------------------------------------------------
class SignedSharing(mora.Sharing):
    """Sharing with a random sign for every input and output: a count sketch. A merge draws anew."""
    sides = "in", "out"

    def __init__(self, in_features, out_features, size, groups="random"):
        super().__init__(in_features, out_features, size, groups)
        self.register_buffer("in_signs", torch.ones(in_features))
        self.register_buffer("out_signs", torch.ones(out_features))
        self.draw_signs()

    def draw_signs(self, generator=None):
        for side in self.sides:
            signs = self.get_buffer(f"{side}_signs")
            drawn = torch.randint(2, signs.shape, generator=generator, device="cpu")
            signs.copy_(drawn * 2 - 1)

    def regroup(self, generator=None):
        super().regroup(generator)
        self.draw_signs(generator)

    def compress(self, x):
        return super().compress(x * self.in_signs.to(x.dtype))

    def decompress(self, z):
        return super().decompress(z) * self.out_signs.to(z.dtype)

class Centred:
    """Another operator, or LoRA, of x without its part in one `direction`, a unit vector: that of
    the mean input of the first batch. ΔW stays linear: merging is exact and moves no bias."""
    def __init__(self, first, *others, **options):
        super().__init__(first, *others, **options)
        self.register_buffer("direction", torch.zeros(self.in_features))

    def centre(self, x):
        direction = self.direction.to(x.dtype)
        return x - (x @ direction)[..., None] * direction

    def compress(self, x):
        return super().compress(self.centre(x))

    def update(self, x):
        return super().update(self.centre(x))

class CentredSharing(Centred, mora.Sharing):
    pass

class CentredRotation(Centred, mora.Rotation):
    pass

class CentredLoRA(Centred, mora.LoRALinear):
    pass

@torch.no_grad()
def find_directions(model, dataset):
    """Set the directions of all centred adapters."""
    def find(adapter, inputs):
        mean = inputs[0].flatten(0, -2).mean(0)
        for name, buffer in adapter.named_buffers():
            if name.endswith("direction"):
                buffer.copy_(mean / mean.norm())

    adapters = mora.find_adapters(model).values()
    handles = [adapter.register_forward_pre_hook(find) for adapter in adapters]
    model(*dataset.batch(0))
    for handle in handles:
        handle.remove()

class AlignedSharing(mora.Sharing):
    """Random groups that are the same at all inputs and outputs of a width, in all layers."""
    def __init__(self, *sizes):
        super().__init__(*sizes, "random")

    def assign(self, features, kind, generator=None):
        seed = generator.initial_seed() if generator else torch.initial_seed()
        seed = (seed + 1_000_003 * features) % 2**63
        return super().assign(features, kind, torch.Generator().manual_seed(seed))

def overlap_of(*sharings):
    """Overlap of other sharings. Each is called with in_features, out_features and size."""
    return type("OverlapOf", (Overlap,), {"kinds": sharings})

# ---- Methods that have no M ----------------------------------------------------------------------
class AsyLoRAFull(mora.LoRALinear):
    """AsyLoRA with the whole budget: B of rank s = floor((k + d) r / d), behind a random A."""
    def __init__(self, linear, rank, **options):
        rank = (linear.in_features + linear.out_features) * rank // linear.out_features
        super().__init__(linear, rank, train_A=False, **options)

class StridedSums(AsyLoRAFull):
    """The same behind s sums of the inputs, where A has no random numbers (as MiSS, 2409.15371)."""
    def __init__(self, linear, rank, **options):
        super().__init__(linear, rank, **options)
        self.reset()

    @torch.no_grad()
    def reset(self, generator=None):
        super().reset(generator)
        s, k = self.A.shape
        in_group = torch.arange(k) % s == torch.arange(s)[:, None]  # (s, k)
        self.A.copy_(in_group / self.scaling)

class Scattered(mora.Adapter):
    """r̂² numbers, dealt at random to all entries of ΔW (as HashedNets, arXiv 1504.04788)."""
    def __init__(self, linear, rank, dropout=0.0, **options):
        super().__init__(linear, rank, dropout)
        W0 = linear.weight
        n = mora.square_size(self.in_features, self.out_features, rank) ** 2
        which = torch.randperm(W0.numel(), device="cpu").view(W0.shape) % n
        self.register_buffer("which", which.to(W0.device))
        self.values = nn.Parameter(W0.new_zeros(n, dtype=self.dtype))
        self.description = f"{n} scattered numbers"

    def update(self, x):
        return F.linear(x, self.values[self.which].to(x.dtype))

    @torch.no_grad()
    def reset(self, generator=None):
        self.values.zero_()

class SHiRA(mora.Adapter):
    """(k + d) r entries of ΔW train, at random places, and the others stay 0 (arXiv 2406.13175)."""
    def __init__(self, linear, rank, dropout=0.0, **options):
        super().__init__(linear, rank, dropout)
        W0 = linear.weight
        n = min((self.in_features + self.out_features) * rank, W0.numel())
        self.register_buffer("places", torch.randperm(W0.numel(), device="cpu")[:n].to(W0.device))
        self.values = nn.Parameter(W0.new_zeros(n, dtype=self.dtype))
        self.description = f"{n} entries"

    def update(self, x):
        entries = self.values.new_zeros(self.out_features * self.in_features)
        entries = entries.index_copy(0, self.places, self.values)
        return F.linear(x, entries.view(self.out_features, self.in_features).to(x.dtype))

    @torch.no_grad()
    def reset(self, generator=None):
        self.values.zero_()

# ---- More options of train.py --------------------------------------------------------------------
plain = argparse.Namespace(**vars(train))  # its functions before `add` replaces some

def parse_args(argv=()):
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--full_warmup", type=int, default=0)
    parser.add_argument("--rms_norm", action="store_true")  # with an --out_dir of its own
    own, others = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(plain.parse_args(others)), **vars(own))

class RMSBlock(Block):
    """--rms_norm: the norm of later models, which leaves the mean over the features in x."""
    def __init__(self, config):
        super().__init__(config)
        self.ln_1 = nn.RMSNorm(config.n_embd)
        self.ln_2 = nn.RMSNorm(config.n_embd)

def load_base(args):
    model.Block = RMSBlock if getattr(args, "rms_norm", False) else Block
    return plain.load_base(args)

# --full_warmup: ReLoRA's recipe, in which all weights train first
def restarts_before(step, config):
    return step > getattr(config, "full_warmup", 0) and plain.restarts_before(step, config)

def schedule(step, config):
    # The warm-up is the beginning of the whole run's curve
    max_steps = getattr(config, "curve_steps", config.max_steps)
    rate = plain.schedule(step, argparse.Namespace(**vars(config) | {"max_steps": max_steps}))
    if 0 < getattr(config, "full_warmup", 0) <= step and config.method != "full":
        # The adapters begin, as after a merge
        rate *= min(1, (step - config.full_warmup + 1) / config.restart_warmup)
    return rate

def train_all_first(model, dataset, config, folder):
    """Train all weights at full's rate for `full_warmup` steps, then the adapters."""
    if "centred" in f"{config.method} {config.operator}":
        find_directions(model, dataset)  # a run that is resumed reads its own from the checkpoint
    begun = config.resume and (folder / "checkpoint.pt").exists()
    if getattr(config, "full_warmup", 0) and config.method != "full" and not begun:
        full = mora.merge_adapters(copy.deepcopy(model)).requires_grad_(True)  # ΔW is 0
        first = argparse.Namespace(**vars(config) | dict(method="full", operator=None))
        first.merge_every, first.max_steps = None, config.full_warmup
        first.curve_steps = config.max_steps
        first.learning_rate = train.default_learning_rate(first)
        plain.train(full, dataset, first, folder / "full_warmup")
        # What follows is a run with adapters that is resumed after these steps
        torch.manual_seed(config.seed)
        train.adapt(full, config)
        state = load_file(folder / "full_warmup" / "checkpoint.pt")
        state |= {"config": vars(config), "rows": [], "model": full.state_dict()}
        state["optimizer"] = train.make_optimizer(full, config).state_dict()
        train.write(folder / "checkpoint.pt", lambda file: torch.save(state, file))
        config = argparse.Namespace(**vars(config) | {"resume": True})
    return plain.train(model, dataset, config, folder)

# ---- What train.py is told of them ---------------------------------------------------------------
METHODS = {"strided_sums": StridedSums, "scattered": Scattered, "asylora_full": AsyLoRAFull,
           "shira": SHiRA, "centred_lora": CentredLoRA}
# The pairs of groups in ReMoRA's cycle
CYCLE = [functools.partial(mora.Sharing, groups=pair) for pair in mora.Sharing.CYCLE]
OPERATORS = {
    "overlap": Overlap, "overlap_2": overlap_of(*Overlap.kinds[:2]),
    "four_pairs": overlap_of(*CYCLE), "contiguous_strided": overlap_of(CYCLE[2]),
    "strided_contiguous": overlap_of(CYCLE[3]), "aligned": overlap_of(AlignedSharing),
    "centred_sharing": CentredSharing, "centred_rotation": CentredRotation,
    "signed_sharing": SignedSharing,
    "signed_inputs": type("SignedInputs", (SignedSharing,), {"sides": ["in"]}),
    "signed_outputs": type("SignedOutputs", (SignedSharing,), {"sides": ["out"]}),
    "signed_overlap": overlap_of(*[SignedSharing] * 4),
    "signed_overlap_2": overlap_of(*[SignedSharing] * 2),
}
# Peak rates, in the columns of train.py's LEARNING_RATES
RATES = {name: (2e-2 if "overlap" in name else 1e-2, 1e-2, 3e-4) for name in OPERATORS}
RATES |= {"strided_sums": (1e-2, 3e-3, 2e-4), "scattered": (2e-2, 1e-2, 3e-4),
          "asylora_full": (5e-2, 3e-3, 2e-4), "shira": (2e-2, 1e-2, 6e-4),
          "centred_lora": (2e-2, 1e-2, 2e-4)}

def add():
    """Make all this known to mora.py and train.py. A second call changes nothing."""
    mora.METHODS |= METHODS
    mora.OPERATORS |= OPERATORS
    train.METHODS += [name for name in METHODS if name not in train.METHODS]
    train.LEARNING_RATES |= RATES
    train.parse_args, train.restarts_before = parse_args, restarts_before
    train.load_base = load_base
    train.schedule, train.train = schedule, train_all_first

if __name__ == "__main__":
    add()
    train.main()
