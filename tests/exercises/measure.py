"""What exercises measure: the rank that merging can reach, costs, Adam's step, bits, spectra, rounding.

Each function stands alone and belongs to an exercise of EXERCISES.md; figures.py draws with them.
"""

import math

import torch
import torch.nn.functional as F


def extra_flops(tokens, k, d, rank):  # exercise 14
    """(as defined, merged): floating-point operations of one training step of a LoRA layer, forward and backward,
    beyond those of the frozen layer, where x needs a gradient. A product of (a, b) and (b, c) takes 2 a b c; sums and
    factors do not count. Merged, ΔW = B A is built in the forward and again in the backward pass, nothing is kept but
    x, and no gradient of ΔW (d, k) is formed.
    """
    return 6 * tokens * rank * (k + d), 4 * rank * k * d + 4 * tokens * rank * (k + d)


def rank_bound(groups):  # exercise 16
    """The highest rank that the sum of merged updates of Sharing can have. `groups` has one pair for each merge:
    in_group (k,) and out_group (d,), the group of each input and output.
    """
    sides = [torch.cat([F.one_hot(group) for group in side], dim=1) for side in zip(*groups)]  # (features, merges r̂)
    return min(int(torch.linalg.matrix_rank(side.double())) for side in sides)


def adam_step(gradient, mean, square, step, rate, betas=(0.9, 0.999), eps=1e-8):  # exercise 17
    """What Adam adds to a parameter in its step number `step`, counted from 1. `mean` and `square` are the running
    means of the gradient and of its square, as they were before this step.
    """
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    return -rate * mean / (1 - betas[0]**step) / ((square / (1 - betas[1]**step)).sqrt() + eps)


def bits_held(logits, targets, entropy):  # exercise 20
    """The bits that a model holds of random values, over all of them: what is left of each value's `entropy` when the
    cross entropy of its targets, in bits, is taken off. (rows, length, vocabulary), (rows, length) -> a float, below
    zero where the model is surer than right. Targets of -100 are not counted.
    """
    nats = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return len(targets) * entropy - nats.item() / math.log(2)


def spectrum(update):  # exercise 21
    """(rank, effective rank, stable rank) of a matrix as floats, from its singular values s: how many are above the
    largest times max(shape) times eps of the matrix's type; exp of the entropy of s / Σ s; Σ s² / max s². All are 0 for
    a matrix of zeros.
    """
    s = torch.linalg.svdvals(update.double())
    if not s.sum():
        return 0.0, 0.0, 0.0
    rank = (s > s[0] * max(update.shape) * torch.finfo(update.dtype).eps).sum()
    return tuple(number.item() for number in (rank.double(), torch.special.entr(s / s.sum()).sum().exp(),
                                              (s / s[0]).square().sum()))


def round_randomly(x, generator=None):  # exercise 22
    """x, which is float32, in bfloat16: each number is rounded to one of its two neighbours, at random so that the mean
    is x. A number that bfloat16 has, inf and nan among them, stays what it is.
    """
    low = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32)  # bfloat16 has not these bits
    return (x.view(torch.int32) + low.to(x.device) & -1 << 16).view(torch.float32).bfloat16()
