"""Controls: updates within MoRA's budget that are not MoRA's, to find out what its lead is made of. This is train.py
with more methods and operators; their results are in RESULTS.md.

    python tests/controls.py uuid --methods strided_sums scattered asylora_full --seed 0 1 2
    python tests/controls.py c4 --methods mora remora --operator aligned --seed 0 1 2
"""

import math
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


class FourPairs(mora.Overlap):
    """The four pairs of ReMoRA's cycle at once, instead of one after the other."""

    pairs = mora.Sharing.CYCLE

    def __init__(self, in_features, out_features, size):
        sizes = in_features, out_features, size
        super().__init__(*sizes, copies=len(self.pairs))
        self.sharings = nn.ModuleList(mora.Sharing(*sizes, pair) for pair in self.pairs)


class ContiguousStrided(FourPairs):
    """The third of them, and nothing else: contiguous groups of inputs, strided groups of outputs."""

    pairs = mora.Sharing.CYCLE[2:3]


class StridedContiguous(FourPairs):
    """And the fourth."""

    pairs = mora.Sharing.CYCLE[3:]


class SignedOverlap(mora.Overlap):
    """Overlap with a random sign for every input and output of a copy: a count sketch."""

    def __init__(self, in_features, out_features, size, copies=4):
        super().__init__(in_features, out_features, size, copies)
        for name, features in {"in_signs": in_features, "out_signs": out_features}.items():
            self.register_buffer(name, torch.randint(2, (copies, features), device="cpu") * 2.0 - 1)

    def compress(self, x):
        rows = [sharing.compress(x * signs.to(x.dtype)) for sharing, signs in zip(self.sharings, self.in_signs)]
        return torch.stack(rows, dim=-2)  # (..., k) -> (..., J, r̂)

    def decompress(self, z):
        y = [sharing.decompress(row) * signs.to(z.dtype)
             for sharing, signs, row in zip(self.sharings, self.out_signs, z.unbind(-2))]
        return sum(y) / math.sqrt(self.copies)  # (..., J, r̂) -> (..., d)


class ByInputs:
    """x times min(1, d / k). Under Adam a factor before M is a learning rate: so M has a lower one where k > d."""

    def compress(self, x):
        return super().compress(x) * min(1, self.out_features / self.in_features)


class SharingByInputs(ByInputs, mora.Sharing):
    pass


class OverlapByInputs(ByInputs, mora.Overlap):
    pass


def overlap_of(copies):
    class OverlapOf(mora.Overlap):
        def __init__(self, in_features, out_features, size):
            super().__init__(in_features, out_features, size, copies)

    return OverlapOf


METHODS = {"strided_sums": StridedSums, "scattered": Scattered, "asylora_full": AsyLoRAFull}
OPERATORS = {
    "aligned": Aligned, "aligned_overlap": AlignedOverlap, "contiguous_strided": ContiguousStrided,
    "strided_contiguous": StridedContiguous, "four_pairs": FourPairs, "signed_overlap": SignedOverlap,
    "overlap_2": overlap_of(2), "overlap_8": overlap_of(8), "sharing_by_inputs": SharingByInputs,
    "overlap_by_inputs": OverlapByInputs,
}
LEARNING_RATES = {  # as in train.py
    "strided_sums": (1e-2, 3e-3, 2e-4), "scattered": (2e-2, 1e-2, 3e-4), "asylora_full": (5e-2, 3e-3, 2e-4),
} | dict.fromkeys(OPERATORS, train.LEARNING_RATES["overlap"]) | dict.fromkeys(
    ("aligned", "four_pairs", "contiguous_strided", "strided_contiguous", "sharing_by_inputs"),
    train.LEARNING_RATES["sharing"])


def add():
    """Make them known to mora.py and to the options of train.py."""
    mora.METHODS |= METHODS
    mora.OPERATORS |= OPERATORS
    train.METHODS += METHODS
    train.LEARNING_RATES |= LEARNING_RATES


if __name__ == "__main__":
    add()
    train.main()
