"""Controls: updates within MoRA's budget that are not MoRA's, to find out what its lead is made of. This is train.py
with more methods and operators. Results of the first line are in RESULTS.md; the second was not measured in full:

    python tests/controls.py uuid --methods strided_sums scattered asylora_full --seed 0 1 2
    python tests/controls.py c4 --methods mora remora --operator aligned --seed 0 1 2
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import mora
import train


class StridedSums(mora.Adapter):
    """One trained matrix, as in MoRA, of a low rank, as in LoRA: D (d, s) behind s = floor((k + d) r / d) fixed strided
    sums of the inputs (as MiSS, arXiv 2409.15371).
    """

    def __init__(self, linear, rank, dropout=0.0, **options):
        super().__init__(linear, rank, dropout)
        self.sums = mora.Sharing(self.in_features, self.out_features, (self.in_features + self.out_features) * rank
                                 // self.out_features)
        self.D = self.new_parameter(self.out_features, self.sums.size)

    def update(self, x):
        return F.linear(self.sums.compress(x), self.D.to(x.dtype))  # (..., k) -> (..., s) -> (..., d)

    @torch.no_grad()
    def reset(self, generator=None):
        self.D.zero_()


class Scattered(mora.Adapter):
    """r̂² numbers, dealt at random to all entries of ΔW: full rank, and no structure (as MoSA and HashedNets,
    arXiv 1504.04788).
    """

    def __init__(self, linear, rank, dropout=0.0, **options):
        super().__init__(linear, rank, dropout)
        self.values = self.new_parameter(self.size**2)
        which = torch.randperm(self.in_features * self.out_features, device="cpu") % self.size**2
        self.register_buffer("which", which.view(self.out_features, self.in_features).to(self.values.device))

    def update(self, x):
        return F.linear(x, self.values[self.which].to(x.dtype))

    @torch.no_grad()
    def reset(self, generator=None):
        self.values.zero_()


class AsyLoRAFull(mora.LoRALinear):
    """AsyLoRA with the whole budget: B only, of rank floor((k + d) r / d), behind a random A."""

    def __init__(self, linear, rank, **options):
        features = linear.in_features + linear.out_features
        super().__init__(linear, features * rank // linear.out_features, train_A=False, **options)


class AlignedSharing(mora.Sharing):
    """Random groups that are the same at all inputs and outputs of a width, in all layers. A merge deals them anew."""

    def __init__(self, in_features, out_features, size, number):
        self.number = number  # of several dealings
        super().__init__(in_features, out_features, size, "random")

    def assign(self, features, kind, generator):
        seed = generator.initial_seed() if generator else torch.initial_seed()
        generator = torch.Generator().manual_seed((seed + 1_000_003 * features + self.number) % 2**63)
        return super().assign(features, kind, generator)


class AlignedOverlap(mora.Overlap):
    """Overlap of such sharings."""

    def __init__(self, in_features, out_features, size, copies=4):
        super().__init__(in_features, out_features, size, copies)
        self.sharings = nn.ModuleList(AlignedSharing(in_features, out_features, size, i) for i in range(copies))


class Aligned(AlignedOverlap):
    """One such sharing."""

    def __init__(self, in_features, out_features, size):
        super().__init__(in_features, out_features, size, copies=1)


class ContiguousStrided(mora.Overlap):
    """The third pair of ReMoRA's cycle, and nothing else: contiguous groups of inputs, strided groups of outputs."""

    def __init__(self, in_features, out_features, size):
        super().__init__(in_features, out_features, size, copies=1)
        self.sharings = nn.ModuleList([mora.Sharing(in_features, out_features, size, ("contiguous", "strided"))])


METHODS = {"strided_sums": StridedSums, "scattered": Scattered, "asylora_full": AsyLoRAFull}
OPERATORS = {"aligned": Aligned, "aligned_overlap": AlignedOverlap, "contiguous_strided": ContiguousStrided}
LEARNING_RATES = {  # as in train.py
    "strided_sums": (1e-2, 3e-3, 2e-4), "scattered": (2e-2, 1e-2, 3e-4), "asylora_full": (5e-2, 3e-3, 2e-4),
    "aligned": (2e-2, 1e-2, 3e-4), "aligned_overlap": (2e-2, 1e-2, 3e-4), "contiguous_strided": (1e-2, 1e-2, 3e-4),
}


def add():
    """Make them known to mora.py and to the options of train.py."""
    mora.METHODS |= METHODS
    mora.OPERATORS |= OPERATORS
    train.METHODS += METHODS
    train.LEARNING_RATES |= LEARNING_RATES


if __name__ == "__main__":
    add()
    train.main()
