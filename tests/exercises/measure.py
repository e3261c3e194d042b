"""What exercises measure: costs, the rank that merging can reach, Adam's step, bits, spectra,
rounding. Each function stands alone and belongs to an exercise of README.md. figures.py draws with
them.
"""

import math

import torch
import torch.nn.functional as F

def extra_flops(tokens, k, d, rank):  # exercise 14
    """(as defined, merged): floating-point operations of one training step of a LoRA layer, forward
    and backward, beyond those of the frozen layer, where x needs a gradient. A product of (a, b)
    and (b, c) takes 2 a b c; sums and scalar factors do not count. Merged means that ΔW = B A is
    built in the forward and again in the backward pass, that only x is kept between the two, and
    that the gradient of ΔW (d, k) is not formed.
    """
    return 6 * tokens * rank * (k + d), 4 * rank * k * d + 4 * tokens * rank * (k + d)

def rank_bound(groups):  # exercise 16
    """An upper bound on the rank of the sum of Sharing's merged updates: the smaller of the ranks
    of [P₁ ... P_t] and [Q₁ ... Q_t]. `groups` has a pair for each merge: in_group (k,) and
    out_group (d,), the group of each input and of each output.
    """
    sides = [torch.cat([F.one_hot(group) for group in side], dim=1) for side in zip(*groups)]
    return min(int(torch.linalg.matrix_rank(side.double())) for side in sides)

def adam_step(gradient, mean, square, step, rate, betas=(0.9, 0.999), eps=1e-8):  # exercise 17
    """What Adam adds to a parameter in its step number `step`, counted from 1. `mean` and `square`
    are the running means of the gradient and of its square, as they were before this step.
    """
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    return -rate * mean / (1 - betas[0]**step) / ((square / (1 - betas[1]**step)).sqrt() + eps)

def bits_held(logits, targets, entropy):  # exercise 20
    """How many bits of random values a model holds, all values together: of each value's `entropy`,
    what is left after the cross entropy of its targets, in bits, is subtracted. Takes logits (rows,
    length, vocabulary) and targets (rows, length), a row for each value, and returns a float, below
    zero for a model that is confident and wrong. Targets of -100 do not count.
    """
    logits = logits.double().flatten(0, 1)
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    return len(targets) * entropy - nats.item() / math.log(2)

def spectrum(update):  # exercise 21
    """(rank, effective rank, stable rank) of a matrix as floats, from its singular values s. The
    rank is how many are above max s · max(shape) · eps of the matrix's type, the effective rank is
    exp of the entropy of s / Σ s, the stable rank Σ s² / max s². All are 0 for a matrix of zeros.
    """
    s = torch.linalg.svdvals(update.double())
    if not s.any():
        return 0.0, 0.0, 0.0
    rank = (s > s[0] * max(update.shape) * torch.finfo(update.dtype).eps).sum()
    effective = torch.special.entr(s / s.sum()).sum().exp()
    return float(rank), effective.item(), (s / s[0]).square().sum().item()

def round_randomly(x, generator=None):  # exercise 22
    """x, which is float32, in bfloat16: each number is rounded to one of its two neighbours, at
    random so that the mean is x. What bfloat16 can represent, inf and NaN included, stays as it is.
    """
    low = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32).to(x.device)
    rounded = (x.view(torch.int32) + low & -1 << 16).view(torch.float32)  # bfloat16 has no low half
    return torch.where(x.isnan(), x, rounded).bfloat16()
