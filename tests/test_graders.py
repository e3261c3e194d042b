"""The graders, graded: each exercise's tests fail while it is taken out, catch the wrong answers listed here, and
accept right answers of other designs. Then the command line of tests/exercise.py.

A wrong answer is a small change of the solution, old text -> new text, in one function. The changed sources are loaded
in this process, under the graders, whose tests are called one by one; no pytest is started for each.
"""

import functools
import itertools
import re
import shutil
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch

import exercise
import test_mora  # before any source is changed: the graders take helpers from it, which call nothing of mora.py

ROOT = Path(__file__).parent.parent
EXERCISES = (ROOT / "tests" / "EXERCISES.md").read_text(encoding="utf-8")
PATHS = [ROOT / name for name in exercise.FILES]
GRADERS = [ROOT / "tests" / name for name in ("test_mora.py", "test_data.py", "test_train.py", "test_exercises.py")]
TITLES, PARTS = exercise.find_exercises()
pytestmark = pytest.mark.skipif(any(part.kept.exists() for parts in PARTS.values() for part in parts),
                                reason="an exercise is out, and the graders are graded by the solutions")

# (exercise, what is wrong, function, old text, new text)
WRONG = [
    (1, "rounded, not floored", "square_size", "math.isqrt((in_features + out_features) * rank)",
     "round(math.sqrt((in_features + out_features) * rank))"),
    (1, "rounded up", "square_size", "math.isqrt((in_features + out_features) * rank)",
     "math.ceil(math.sqrt((in_features + out_features) * rank))"),
    (1, "not capped by k and d", "square_size", ", in_features, out_features)", ", 10**9)"),
    (1, "capped by the larger of the two", "square_size", ", in_features, out_features)",
     ", max(in_features, out_features))"),
    (1, "k d instead of k + d", "square_size", "in_features + out_features", "in_features * out_features"),
    (1, "the budget of r = 1", "square_size", " * rank)", ")"),

    (2, "the last inputs", "Truncation.compress", ":self.size", "-self.size:"),
    (2, "written at the end", "Truncation.decompress", "(0, self.out_features - self.size)",
     "(self.out_features - self.size, 0)"),
    (2, "repeated instead of zeros", "Truncation.decompress", "return F.pad(z, (0, self.out_features - self.size))",
     "return torch.cat([z] * self.out_features, dim=-1)[..., :self.out_features]"),

    (3, "the mean of a group", "Sharing.add_up", "index_add(-1, group, x)",
     "index_add(-1, group, x) / group.bincount(minlength=self.size).clamp(min=1)"),
    (3, "the last of a group", "Sharing.add_up", "index_add", "index_copy"),
    (3, "always the inputs' groups", "Sharing.add_up", "-1, group", "-1, self.in_group"),
    (3, "strided whatever the groups", "Sharing.compress", "self.in_group",
     "torch.arange(self.in_features) % self.size"),
    (3, "groups of consecutive outputs", "Sharing.decompress", "self.out_group",
     "torch.arange(self.out_features) * self.size // self.out_features"),
    (3, "an output's share instead of a copy", "Sharing.decompress", "self.out_group)",
     "self.out_group) * self.size / self.out_features"),

    (4, "groups off by one", "Sharing.deal", "return i % self.size", "return (i + 1) % self.size"),
    (4, "rounded up: the last groups are short", "Sharing.deal", "i * self.size // features",
     "i // -(-features // self.size)"),
    (4, "rounded down: the last group is long", "Sharing.deal", "i * self.size // features",
     "(i // (features // self.size)).clamp(max=self.size - 1)"),
    (4, "contiguous taken for strided", "Sharing.deal", 'kind == "contiguous"', 'kind == "strided"'),
    (4, "random groups are uneven", "Sharing.deal", "torch.randperm(features, generator=generator)",
     "torch.randint(features, (features,), generator=generator)"),
    (4, "random groups ignore the generator", "Sharing.deal", "generator=generator", "generator=None"),
    (4, "more groups than there are", "Sharing.deal", "return i % self.size", "return i % (self.size + 1)"),

    (5, "every n-th input in a row", "Decoupling.compress", "x.unflatten(-1, (self.rows, self.size))",
     "x.unflatten(-1, (self.size, self.rows)).mT"),
    (5, "the first inputs fed in twice", "Decoupling.compress",
     "F.pad(x, (0, self.rows * self.size - self.in_features))",
     "torch.cat([x] * (self.rows * self.size // self.in_features + 1), dim=-1)[..., :self.rows * self.size]"),
    (5, "padded in front", "Decoupling.compress", "(0, self.rows * self.size - self.in_features)",
     "(self.rows * self.size - self.in_features, 0)"),
    (5, "padded twice", "Decoupling.compress", "x.unflatten(-1, (self.rows, self.size))",
     "F.pad(x, (0, self.size)).unflatten(-1, (self.rows + 1, self.size))"),
    (5, "what fills no row is dropped", "Decoupling.compress", "F.pad(x,",
     "F.pad(torch.where(torch.arange(self.in_features) < self.in_features // self.size * self.size, x, 0),"),
    (5, "rotate not asked", "Decoupling.compress", "self.rotate", ""),

    (6, "cut instead of folded", "Decoupling.decompress",
     "fold if self.fold and y.shape[-1] > self.out_features else tile", "tile"),
    (6, "folded without being asked", "Decoupling.decompress", "self.fold and ", ""),
    (6, "folded where it should be repeated", "Decoupling.decompress", " and y.shape[-1] > self.out_features", ""),
    (6, "the rows mixed up", "Decoupling.decompress", "z.flatten(-2)", "z.mT.flatten(-2)"),
    (6, "tiled instead of folded", "fold", "return y[..., :whole].unflatten(-1, (-1, length)).sum(-2) + rest",
     "return y[..., :length]"),
    (6, "the mean of what is folded", "fold", ".sum(-2)", ".mean(-2)"),
    (6, "folded in turn, like cards", "fold", "unflatten(-1, (-1, length)).sum(-2)",
     "unflatten(-1, (length, -1)).sum(-1)"),
    (6, "what fills no fold is lost", "fold", " + rest", ""),
    (6, "what fills no fold goes to the end", "fold", "(0, whole + length - y.shape[-1])",
     "(whole + length - y.shape[-1], 0)"),
    (6, "folded as a mirror is", "fold", "+ rest", "+ rest.flip(-1)"),
    (6, "zeros instead of repeated", "tile", "torch.cat([y] * copies, dim=-1)", "F.pad(y, (0, length))"),
    (6, "each number repeated", "tile", "torch.cat([y] * copies, dim=-1)", "y.repeat_interleave(copies, dim=-1)"),
    (6, "repeated whole, too long", "tile", "[..., :length]", ""),

    (7, "turned the other way", "Rotation.rotate", "if back:", "if not back:"),
    (7, "a reflection", "Rotation.rotate", "a * cos - b * sin", "a * cos + b * sin"),
    (7, "never back", "Rotation.rotate", "if back:", "if False:"),
    (7, "neighbours are pairs", "Rotation.rotate", "a, b, rest = rows.tensor_split((half, 2 * half), dim=-1)",
     "a, b, rest = rows[..., :2 * half:2], rows[..., 1:2 * half:2], rows[..., 2 * half:]"),
    (7, "the halves exchanged", "Rotation.rotate", "a * cos - b * sin, b * cos + a * sin",
     "b * cos + a * sin, a * cos - b * sin"),
    (7, "rows counted from 1", "Rotation.__init__", "torch.arange(self.rows, dtype=torch.float64)",
     "torch.arange(1, self.rows + 1, dtype=torch.float64)"),
    (7, "the exponent without the 2", "Rotation.__init__", "-2 * torch.arange", "-1 * torch.arange"),
    (7, "the exponent's sign", "Rotation.__init__", "-2 * torch.arange", "2 * torch.arange"),
    (7, "theta counted from 1", "Rotation.__init__", "torch.arange(size // 2,", "torch.arange(1, size // 2 + 1,"),
    (7, "the angles of the last rows for fewer", "Rotation.rotate",
     "self.cos[:n].to(rows.dtype), self.sin[:n].to(rows.dtype)",
     "self.cos[-n:].to(rows.dtype), self.sin[-n:].to(rows.dtype)"),
    (7, "tables in the state dict", "Rotation.__init__", '"cos", angle.cos().float(), persistent=False',
     '"cos", angle.cos().float()'),

    (8, "W0 forgotten", "Adapter.forward", "self.linear(x) + ", ""),
    (8, "the bias forgotten", "Adapter.forward", "self.linear(x)", "F.linear(x, self.linear.weight)"),
    (8, "dropout on the frozen path", "Adapter.forward", "self.linear(x)", "self.linear(self.dropout(x))"),
    (8, "dropout on both", "Adapter.forward", "self.linear(x) + self.update(self.dropout(x))",
     "self.dropout(self.linear(x) + self.update(x))"),
    (8, "dropout in eval mode", "Adapter.forward", "self.dropout(x)", "F.dropout(x, self.dropout.p, training=True)"),
    (8, "no dropout", "Adapter.forward", "self.dropout(x)", "x"),
    (8, "M transposed", "MoRALinear.update", "self.M.to", "self.M.T.to"),
    (8, "no gradient for M", "MoRALinear.update", "self.M.to", "self.M.detach().to"),
    (8, "compress forgotten", "MoRALinear.update", "self.operator.compress(x)", "x[..., :self.operator.size]"),
    (8, "scaled by 2, as LoRA is", "MoRALinear.update", "self.M.to(z.dtype)", "2 * self.M.to(z.dtype)"),

    (9, "not transposed back", "Adapter.delta_weight", ")).T", "))"),
    (9, "W0 in it", "Adapter.delta_weight", "self.update(",
     "(lambda x: F.linear(x, self.linear.weight) + self.update(x))("),
    (9, "the bias in it", "Adapter.delta_weight", "self.update(", "self("),
    (9, "dropout in it", "Adapter.delta_weight", "self.update(", "(lambda x: self.update(self.dropout(x)))("),
    (9, "in the weight's own precision", "Adapter.delta_weight", "dtype=self.dtype", "dtype=self.linear.weight.dtype"),
    (9, "rounded by autocast", "Adapter.delta_weight", "enabled=False", "enabled=torch.is_autocast_enabled('cpu')"),

    (10, "merged in bfloat16", "Adapter.merged_weight", "self.linear.weight.to(self.dtype) + self.delta_weight()",
     "self.linear.weight + self.delta_weight().to(self.linear.weight.dtype)"),
    (10, "left in float32", "Adapter.merged_weight", ".to(self.linear.weight.dtype)", ""),
    (10, "subtracted", "Adapter.merged_weight", "+ self.delta_weight()", "- self.delta_weight()"),
    (10, "the layer's own weight changed", "Adapter.merge", "copy.deepcopy(self.linear)", "self.linear"),
    (10, "memory shared", "Adapter.merge", "copy.deepcopy(self.linear)", "copy.copy(self.linear)"),
    (10, "the bias's memory shared", "Adapter.merge", "return merged", "merged.bias = self.linear.bias; return merged"),
    (10, "the bias lost", "Adapter.merge", "return merged", "merged.bias = None; return merged"),
    (10, "only the update", "Adapter.merge", "self.merged_weight()", "self.delta_weight()"),

    (11, "alpha instead of alpha / r", "LoRALinear.__init__", "self.alpha / (math.sqrt(rank) if rslora else rank)",
     "self.alpha"),
    (11, "alpha = r by default", "LoRALinear.__init__", "2 * rank if", "rank if"),
    (11, "rsLoRA's root forgotten", "LoRALinear.__init__", "(math.sqrt(rank) if rslora else rank)", "rank"),
    (11, "A and B exchanged at the start", "LoRALinear.reset", "self.B.zero_()",
     "self.B.copy_(torch.randn_like(self.B)); self.A.zero_()"),
    (11, "both zero: nothing would ever learn", "LoRALinear.reset", "self.B.zero_()", "self.B.zero_(); self.A.zero_()"),
    (11, "A not drawn again", "LoRALinear.reset", "self.A.copy_(", "self.A.any() or self.A.copy_("),
    (11, "A ignores the generator", "LoRALinear.reset", "generator=generator", "generator=None"),
    (11, "A twice too wide", "LoRALinear.reset", "1 / math.sqrt", "2 / math.sqrt"),
    (11, "A bounded by r, not by k", "LoRALinear.reset", "math.sqrt(self.in_features)", "math.sqrt(self.rank)"),
    (11, "a new tensor for B", "LoRALinear.reset", "self.B.zero_()", "self.B = nn.Parameter(torch.zeros_like(self.B))"),
    (11, "AsyLoRA trains A", "LoRALinear.__init__", ".requires_grad_(train_A)", ""),
    (11, "scaled twice", "LoRALinear.update", "self.A.to(x.dtype)", "self.scaling * self.A.to(x.dtype)"),

    (12, "the norm not detached", "DoRALinear.scale", "torch.no_grad()", "torch.enable_grad()"),
    (12, "the norm of columns", "DoRALinear.scale", "self.direction().norm(dim=1)",
     "self.direction().norm(dim=0).mean().expand(self.out_features)"),
    (12, "the norm of W0 only", "DoRALinear.scale", "self.direction().norm", "self.linear.weight.norm"),
    (12, "one norm for the whole matrix", "DoRALinear.scale", ".norm(dim=1)", ".norm()"),
    (12, "the bias scaled too", "DoRALinear.forward", "F.linear(x, self.linear.weight) +", "self.linear(x) +"),
    (12, "the bias forgotten", "DoRALinear.forward",
     "return y if self.linear.bias is None else y + self.linear.bias.to(y.dtype)", "return y"),
    (12, "dropout on the frozen path", "DoRALinear.forward", "F.linear(x, self.linear.weight)",
     "F.linear(self.dropout(x), self.linear.weight)"),
    (12, "no dropout", "DoRALinear.forward", "self.dropout(x)", "x"),
    (12, "W0 counted twice in V", "DoRALinear.direction", "self.linear.weight.to(self.dtype)",
     "2 * self.linear.weight.to(self.dtype)"),
    (12, "ΔW still holds W0", "DoRALinear.delta_weight", " - self.linear.weight", ""),
    (12, "magnitude not reset", "DoRALinear.reset", "self.magnitude.copy_(self.direction().norm(dim=1))", "pass"),
    (12, "magnitude becomes 1", "DoRALinear.reset", "self.direction().norm(dim=1)", "torch.ones_like(self.magnitude)"),

    (13, "reset before the merge", "Adapter.merge_and_reset", "self.linear.weight.copy_(self.merged_weight())",
     "self.reset(generator); self.linear.weight.copy_(self.merged_weight())"),
    (13, "not merged", "Adapter.merge_and_reset", "self.linear.weight.copy_(self.merged_weight())", "pass"),
    (13, "not reset", "Adapter.merge_and_reset", "self.reset(generator)", "pass"),
    (13, "a new tensor for the weight", "Adapter.merge_and_reset", "self.linear.weight.copy_(self.merged_weight())",
     "self.linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)"),
    (13, "the generator not passed on", "Adapter.merge_and_reset", "self.reset(generator)", "self.reset()"),
    (13, "M kept", "MoRALinear.reset", "self.M.zero_()", "pass"),
    (13, "the groups kept", "MoRALinear.reset", "self.operator.regroup(generator)", "pass"),
    (13, "groups without the generator", "MoRALinear.reset", "regroup(generator)", "regroup()"),
    (13, "a new tensor for M", "MoRALinear.reset", "self.M.zero_()", "self.M = nn.Parameter(torch.zeros_like(self.M))"),
    (13, "the optimizer remembers", "restart", "optimizer.state.pop(parameter, None)", "pass"),
    (13, "the optimizer forgets everything", "restart", "optimizer.state.pop(parameter, None)",
     "optimizer.state.clear()"),
    (13, "restart without the generator", "restart", "(model, generator)", "(model)"),

    (14, "the first pair for ever", "Sharing.regroup", "self.turn += 1", "self.turn.zero_()"),
    (14, "a cycle of two", "Sharing.regroup", "len(self.pairs)", "min(2, len(self.pairs))"),
    (14, "inputs and outputs exchanged", "Sharing.regroup", "in_kind, out_kind =", "out_kind, in_kind ="),
    (14, "inputs ignore the generator", "Sharing.regroup", "in_kind, generator", "in_kind, None"),
    (14, "outputs ignore the generator", "Sharing.regroup", "out_kind, generator", "out_kind, None"),
    (14, "new tensors for the groups", "Sharing.regroup",
     "self.in_group.copy_(self.deal(self.in_features, in_kind, generator))",
     "self.in_group = self.deal(self.in_features, in_kind, generator)"),
    (14, "the outputs keep their groups", "Sharing.regroup",
     "self.out_group.copy_(self.deal(self.out_features, out_kind, generator))",
     "self.turn > 0 or self.out_group.copy_(self.deal(self.out_features, out_kind, generator))"),

    (15, "the mask one too early", "PromptPairs.pad", "targets[i, prompt - 1:len(tokens) - 1] = tokens[prompt:]",
     "targets[i, max(0, prompt - 2):len(tokens) - 1] = tokens[max(1, prompt - 1):]"),
    (15, "the mask one too late", "PromptPairs.pad", "targets[i, prompt - 1:len(tokens) - 1] = tokens[prompt:]",
     "targets[i, prompt:len(tokens) - 1] = tokens[prompt + 1:]"),
    (15, "the targets not shifted", "PromptPairs.pad", "targets[i, prompt - 1:len(tokens) - 1] = tokens[prompt:]",
     "targets[i, prompt:len(tokens)] = tokens[prompt:]"),
    (15, "the prompt is a target too", "PromptPairs.pad", "targets[i, prompt - 1:len(tokens) - 1] = tokens[prompt:]",
     "targets[i, :len(tokens) - 1] = tokens[1:]"),
    (15, "padding counts", "PromptPairs.pad", "torch.full_like(idx, -100)", "idx.clone()"),
    (15, "the end is not learned", "PromptPairs.pad", "len(tokens) - 1] = tokens[prompt:]",
     "len(tokens) - 2] = tokens[prompt:-1]"),
    (15, "padded to the longest row only", "PromptPairs.pad", "min(-(-longest // 64) * 64, self.block_size)",
     "longest"),

    (16, "a restart to the peak, not to the curve", "learning_rate", "return config.learning_rate * rise * fall",
     "return config.learning_rate * rise * (1 if restarted and step - restarted < config.restart_warmup else fall)"),
    (16, "a restart one step early", "learning_rate", "step // config.merge_every", "(step + 1) // config.merge_every"),
    (16, "a restart one step late", "learning_rate", "(step - restarted + 1)", "(step - restarted)"),
    (16, "no restart", "learning_rate", "if restarted:", "if False:"),
    (16, "the warm-up forgotten", "learning_rate", "rise = min(1.0, (step + 1) / max(1, config.warmup_steps))",
     "rise = 1.0"),
    (16, "the warm-up begins at 0", "learning_rate", "(step + 1) / max(1, config.warmup_steps)",
     "step / max(1, config.warmup_steps)"),
    (16, "the fall begins at step 0", "learning_rate",
     "max(0.0, (step - config.warmup_steps) / (config.max_steps - config.warmup_steps))", "step / config.max_steps"),
    (16, "the cosine not halved", "learning_rate", "(1 + math.cos(math.pi * progress)) / 2",
     "math.cos(math.pi * progress)"),
    (16, "every method restarts", "learning_rate", 'if config.method in ("relora", "remora"):', "if True:"),
    (16, "a merge on the last step", "merges_after", " and step + 1 < config.max_steps", ""),
    (16, "merges one step late", "merges_after", "(step + 1) % config.merge_every == 0",
     "step > 0 and step % config.merge_every == 0"),
    (16, "every method merges", "merges_after", "restarts and", "True and"),

    (17, "the best single seed", "at_best_rate", "statistics.mean(map(score, group))", "max(map(score, group))"),
    (17, "the last seed", "at_best_rate", "statistics.mean(map(score, group))", "score(group[-1])"),
    (17, "the loss where there is an accuracy", "at_best_rate", '"char_accuracy" in metrics else -metrics["val_loss"]',
     'False else -metrics.get("val_loss", metrics.get("loss", 0))'),
    (17, "the highest loss", "at_best_rate", '-metrics["val_loss"]', 'metrics["val_loss"]'),
    (17, "the training loss", "at_best_rate", '-metrics["val_loss"]', '-metrics.get("loss", 0)'),
    (17, "the worst", "at_best_rate", "best += max(", "best += min("),
    (17, "one rate for all methods", "at_best_rate", "return best",
     'rate = best[0]["config"]["learning_rate"]; return [r for r in results if r["config"]["learning_rate"] == rate]'),
    (17, "a rate at which a seed diverged", "at_best_rate", "len(group) == seeds", "True"),
    (17, "a loss that is no number", "at_best_rate", "if math.isfinite(score(result)):", "if True:"),
    (17, "one seed only", "at_best_rate", "return best", "return best[::2]"),
]

# Operators that exercise 18 must refuse, as what differs from truncation
WRONG_OPERATORS = {
    "not linear": "def compress(self, x): return super().compress(x).relu()",
    "a constant added": "def decompress(self, z): return super().decompress(z) + 1",
    "random numbers in each call": "def compress(self, x): return super().compress(x) * torch.rand(self.size)",
    "parameters of its own":
        "def __init__(self, k, d, size): super().__init__(k, d, size); self.scale = nn.Parameter(torch.ones(k))",
    "no gradient": "def decompress(self, z): return super().decompress(z).detach()",
    "the input changed": "def compress(self, x): return super().compress(x.mul_(2))",
    "a mean over the batch": "def compress(self, x): return super().compress(x - x.mean(0))",
    "a vector alone not taken": "def compress(self, x): return super().compress(x).movedim(1, 1)",
    "too few outputs": "def decompress(self, z): return super().decompress(z)[..., :-1]",
    "another function in training": "def compress(self, x): return super().compress(x) * (1 + self.training)",
    "nothing at all": "def decompress(self, z): return 0 * super().decompress(z)",
}

# Right answers of other designs, which the graders must accept: (exercise, what, function, body)
RIGHT = [
    (1, "by trying", "square_size", 
     "check_rank(rank)\nsize = min(in_features, out_features)\n"
     "while size**2 > (in_features + out_features) * rank:\n    size -= 1\nreturn size"),
    (2, "by a matrix of ones and zeros", "Truncation.decompress",
     "return z @ torch.eye(self.size, self.out_features, dtype=z.dtype)"),
    (3, "by one-hot matrices", "Sharing.add_up", "return x @ F.one_hot(group, self.size).to(x.dtype)"),
    (3, "by a reshape, after sorting", "Sharing.add_up",
     "order, longest = group.argsort(stable=True), -(-len(group) // self.size)\n"
     "lengths = group.bincount(minlength=self.size).tolist()\n"
     "rows = [F.pad(part, (0, longest - part.shape[-1])) for part in x[..., order].split(lengths, dim=-1)]\n"
     "return torch.cat(rows, dim=-1).unflatten(-1, (self.size, longest)).sum(-1)"),
    (4, "by lists", "Sharing.deal",
     "strided = [j % self.size for j in range(features)]\n"
     "if kind == 'contiguous':\n    return torch.tensor(sorted(strided))\n"
     "if kind == 'random':\n    return torch.tensor(strided)[torch.randperm(features, generator=generator)]\n"
     "return torch.tensor(strided)"),
    (5, "by split and stack", "Decoupling.compress",
     "x = torch.cat([x, x.new_zeros(*x.shape[:-1], -self.in_features % self.size)], dim=-1)\n"
     "return self.rotate(torch.stack(x.split(self.size, dim=-1), dim=-2))"),
    (6, "by indices", "fold", "i = torch.arange(y.shape[-1]) % length\n"
     "return y.new_zeros(*y.shape[:-1], length).index_add(-1, i, y)"),
    (6, "by indices", "tile", "return y[..., torch.arange(length) % y.shape[-1]]"),
    (6, "by a loop", "Decoupling.decompress",
     "y = z.flatten(-2)\nif y.shape[-1] <= self.out_features or not self.fold:\n    return tile(y, self.out_features)\n"
     "parts = y.split(self.out_features, dim=-1)\n"
     "return sum(F.pad(part, (0, self.out_features - part.shape[-1])) for part in parts)"),
    (7, "by complex numbers", "Rotation.rotate",
     "n, half = rows.shape[-2], self.size // 2\n"
     "turn = torch.complex(self.cos[:n], -self.sin[:n] if back else self.sin[:n])\n"
     "turned = torch.complex(rows[..., :half], rows[..., half:2 * half]) * turn\n"
     "return torch.cat([turned.real, turned.imag, rows[..., 2 * half:]], dim=-1)"),
    (8, "by matrices", "MoRALinear.update",
     "return self.operator.decompress(self.operator.compress(x) @ self.M.T.to(x.dtype))"),
    (9, "column by column", "Adapter.delta_weight",
     "with torch.autocast(self.linear.weight.device.type, enabled=False):\n"
     "    units = torch.eye(self.in_features, dtype=self.dtype, device=self.linear.weight.device)\n"
     "    return torch.stack([self.update(unit) for unit in units], dim=1)"),
    (10, "a new layer", "Adapter.merge",
     "weight, bias = self.merged_weight(), self.linear.bias\n"
     "merged = nn.Linear(self.in_features, self.out_features, bias is not None, dtype=weight.dtype)\n"
     "merged.weight.copy_(weight)\nif bias is not None:\n    merged.bias.copy_(bias)\nreturn merged"),
    (11, "by the product B A", "LoRALinear.update", "return x @ (self.scaling * self.B @ self.A).T.to(x.dtype)"),
    (12, "by the whole matrix", "DoRALinear.forward",
     "x, dropped = x, self.dropout(x)\nscale = self.scale()[:, None]\n"
     "y = x @ (scale * self.linear.weight).T + dropped @ (scale * (self.direction() - self.linear.weight)).T\n"
     "return y if self.linear.bias is None else y + self.linear.bias"),
    (14, "by the four named cases", "Sharing.regroup",
     "self.turn += 1\npair = self.pairs[self.turn.item() % len(self.pairs)]\n"
     "for group, kind in zip((self.in_group, self.out_group), pair):\n"
     "    group[:] = self.deal(len(group), kind, generator)"),
    (16, "case by case", "merges_after",
     "if config.method not in ('relora', 'remora') or step == config.max_steps - 1:\n    return False\n"
     "return step % config.merge_every == config.merge_every - 1"),
]
RIGHT_OPERATOR = """
def compress(self, x): return F.pad(x, (0, -self.in_features % self.size)).unflatten(-1, (self.size, -1)).sum(-1)
def decompress(self, z): return z.flip(-1)[..., torch.arange(self.out_features) % self.size]
"""


# ----------------------------------------------------------------------------------------------------------------------
# Loading changed sources under the graders


@functools.lru_cache(maxsize=None)
def read(path):
    return path.read_text(encoding="utf-8")


@functools.lru_cache(maxsize=64)
def compiled(path, source):
    return compile(source, str(path), "exec")


def change(number, name, rewrite):
    """{path: source} in which the text of one function of an exercise is rewritten."""
    part = next(part for part in PARTS[number] if part.name == name)
    return {part.path: swap(read(part.path), part.text, rewrite(part.text))}


def swap(source, old, new):
    assert source.count(old) == 1, f"this should stand once in the source, and does {source.count(old)} times: {old}"
    return source.replace(old, new)


def replace(old, new):
    def rewrite(text):
        assert old in text, f"the list is stale: {old!r} is no longer in\n{text}"
        return text.replace(old, new)
    return rewrite


def new_body(number, name, body):
    def rewrite(text):
        head, error = exercise.stub(text, number, name).rsplit("\n", 1)
        return head + "\n" + textwrap.indent(body, " " * (len(error) - len(error.lstrip())))
    return rewrite


def new_operator(methods):
    path = ROOT / "mora.py"
    own = f"class Own(Truncation):\n{textwrap.indent(methods.strip(), '    ')}\n\n\n"
    return {path: swap(read(path), "\nOPERATORS = {", f"\n{own}OPERATORS = {{'own': Own, ")}


def out(numbers):
    """{path: source} with these exercises taken out."""
    changed = {}
    for part in itertools.chain(*(PARTS[number] for number in numbers)):
        changed[part.path] = swap(changed.get(part.path, read(part.path)), part.text, part.stub)
    return changed


def graders_of(number, changed):
    """The tests that carry an exercise's mark, loaded with everything below them from the changed sources."""
    marked = [path for path in GRADERS if re.search(rf"mark\.ex{number}\b", read(path))]
    tests = []
    with pytest.MonkeyPatch.context() as patch:
        for path in [*PATHS, *GRADERS]:
            if path in PATHS or path in marked:
                module = types.ModuleType(path.stem)
                module.__file__ = str(path)
                patch.setitem(sys.modules, path.stem, module)
                exec(compiled(path, changed.get(path, read(path))), vars(module))
                tests += [test for test in vars(module).values() if getattr(test, "__module__", "") == path.stem
                          and any(mark.name == f"ex{number}" for mark in getattr(test, "pytestmark", []))]
    assert tests, f"no test carries the mark ex{number}"
    return tests


def fault(test):
    """What a test raises, called as pytest would, with each of its parameters; None if it passes."""
    rows = []
    for mark in test.pytestmark:
        if mark.name == "parametrize":
            names, values = mark.args
            names = re.split(r", *", names)
            rows.append([dict(zip(names, value if len(names) > 1 else [value])) for value in values])
    for choice in itertools.product(*rows):
        torch.manual_seed(0)
        try:
            test(**{name: value for chosen in choice for name, value in chosen.items()})
        except (Exception, pytest.fail.Exception) as error:
            return error


def faults(number, changed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {test.__name__: fault(test) for test in graders_of(number, changed)}


def caught(number, changed):
    """Whether a test fails by what is computed; a slip in the wrong answer's own text would raise something else."""
    kinds = AssertionError, RuntimeError, IndexError
    return any(isinstance(error, kinds) for error in faults(number, changed).values())


# ----------------------------------------------------------------------------------------------------------------------
# The proof


@pytest.mark.parametrize("number", TITLES)
def test_an_exercise_is_graded_by_its_own_tests(number):
    later = faults(number, out(range(number + 1, max(TITLES) + 1)))
    assert not any(later.values()), f"with the exercises after {number} taken out, its tests should pass: {later}"
    if PARTS[number]:
        for name, error in faults(number, out([number])).items():
            assert isinstance(error, NotImplementedError) and str(error).startswith(f"exercise {number}: "), (
                f"with exercise {number} taken out, {name} should end in its NotImplementedError, not in {error!r}")


@pytest.mark.parametrize("number, what, name, old, new", WRONG, ids=[f"ex{answer[0]}-{answer[1]}" for answer in WRONG])
def test_a_wrong_answer_is_caught(number, what, name, old, new):
    assert caught(number, change(number, name, replace(old, new))), f"exercise {number}: {what} is not caught"


@pytest.mark.parametrize("what", WRONG_OPERATORS)
def test_a_wrong_operator_is_caught(what):
    assert caught(18, new_operator(WRONG_OPERATORS[what])), f"an operator is not caught: {what}"


@pytest.mark.parametrize("number, what, name, body", RIGHT, ids=[f"ex{answer[0]}-{answer[1]}" for answer in RIGHT])
def test_a_right_answer_of_another_design_is_accepted(number, what, name, body):
    found = faults(number, change(number, name, new_body(number, name, body)))
    assert not any(found.values()), f"exercise {number}, {what}: {found}"


def test_a_right_operator_is_accepted():
    found = faults(18, new_operator(RIGHT_OPERATOR))
    assert not any(found.values()), found


def test_every_exercise_has_a_text_a_mark_and_wrong_answers():
    assert list(TITLES) == list(range(1, len(TITLES) + 1))
    markers = dict(re.findall(r"(?m)^    ex(\d+): (.+)$", read(ROOT / "pytest.ini")))
    assert markers == {str(number): title for number, title in TITLES.items()}, "pytest.ini and EXERCISES.md differ"
    for number, parts in PARTS.items():
        missing = {part.name for part in parts} - {name for _, _, name, _, _ in WRONG}
        assert not missing, f"exercise {number} lacks wrong answers for {missing}"


def test_the_experiments_in_python_print_what_the_text_says(capsys):
    for block in re.findall(r"```python\n(.*?)```", EXERCISES, re.S):
        torch.manual_seed(0)
        exec(block, {})
    printed = capsys.readouterr().out
    lost, folded = map(int, re.findall(r"(?:False|True) (\d+) of 3072", printed))
    assert lost < 1000 and folded == 3072
    assert "cycle [13, 25, 25, 25, 25, 25, 25, 25, 25, 25]" in printed, "2 r̂ - 1 after the second merge, and no more"
    assert "random [13, 25, 37, 49, 61, 73, 85, 96, 96, 96]" in printed, "t (r̂ - 1) + 1, up to full rank"


# ----------------------------------------------------------------------------------------------------------------------
# The command line of tests/exercise.py


@pytest.fixture
def project(tmp_path):
    """A copy of the project as a downloaded archive is, without git, and with a few of the tests."""
    (tmp_path / "tests").mkdir()
    for path in (*PATHS, ROOT / "pytest.ini"):
        shutil.copy(path, tmp_path)
    for name in ("EXERCISES.md", "exercise.py", "test_exercises.py", "test_mora.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    return tmp_path


def test_as_a_student_types_it(project):
    def python(*words):
        run = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True, encoding="utf-8")
        return run.returncode, run.stdout + run.stderr

    def state():
        return re.search("(?m)^ 5  Decoupling, inwards +(.+)$", python("tests/exercise.py")[1])[1]

    before = (project / "mora.py").read_bytes()
    assert state() == "solution in place"
    assert python("tests/exercise.py", "5")[0] == 0 and state() == "taken out"
    status, text = python("-m", "pytest", "-q", "-m", "ex5")
    assert status == 1 and "exercise 5: write Decoupling.compress, as EXERCISES.md says" in text, text
    edit(project, 'raise NotImplementedError("exercise 5', 'return ("mine')
    assert state() == "own code"
    status, text = python("tests/exercise.py", "--solution", "5")
    assert status == 0 and state() == "solution in place" and (project / "mora.py").read_bytes() == before
    assert 'return ("mine' in Path(re.search("is kept in (.+)", text)[1]).read_text(encoding="utf-8")
    status, text = python("-m", "pytest", "-q", "-m", "ex5")
    assert status == 0 and "1 passed" in text, text


def tool(project, *words):
    """The exit status of exercise.py in the project."""
    try:
        exercise.main([*words], project)
        return 0
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_everything_out_and_back_is_what_it_was(project, newline):
    for name in exercise.FILES:
        (project / name).write_text((project / name).read_text(encoding="utf-8"), encoding="utf-8", newline=newline)
    before = [(project / name).read_bytes() for name in exercise.FILES]
    numbers = [str(number) for number in TITLES if PARTS[number]]
    for _ in range(2):
        assert tool(project, *numbers) == 0
    stubs = "".join((project / name).read_text(encoding="utf-8") for name in exercise.FILES)
    assert all(f"exercise {number}: write {part.name}," in stubs for number in PARTS for part in PARTS[number])
    for name in exercise.FILES:
        compile((project / name).read_bytes(), name, "exec")
    for _ in range(2):
        assert tool(project, "--solution", *numbers) == 0
    assert [(project / name).read_bytes() for name in exercise.FILES] == before
    assert not list((project / "tests" / "kept").glob("*.py"))


def edit(project, old, new):
    path = project / "mora.py"
    path.write_text(swap(path.read_text(encoding="utf-8"), old, new), encoding="utf-8")


def test_own_code_is_kept_each_time(project, capsys):
    error = 'raise NotImplementedError("exercise 1: write square_size, as EXERCISES.md says")'
    for i, command in enumerate([[], ["--solution"], []], start=1):
        assert tool(project, "1") == 0
        edit(project, error, f"return {i}  # not yet right")
        assert tool(project, *command, "1") == 0
        assert f"square_size.{i}.py" in capsys.readouterr().out
    kept = sorted((project / "tests" / "kept" / "own").iterdir())
    assert len(kept) == 3
    assert all(f"return {i}  # not" in path.read_text(encoding="utf-8") for i, path in enumerate(kept, start=1))
    edit(project, "-> int:  # exercise 1", "-> int:")  # the comment lost, and more than the body changed
    assert tool(project, "--solution", "1") == 0
    assert (project / "mora.py").read_bytes() == (ROOT / "mora.py").read_bytes()


@pytest.mark.parametrize("words, message", [
    (["99"], "no exercise 99: they are 1 to 18"), (["0"], "no exercise 0"), (["two"], "invalid int value: 'two'"),
    (["18"], "nothing to take out"), (["--solution"], "needs the number"), (["--solve", "1"], "--solve"),
    (["1", "99"], "no exercise 99")])
def test_wrong_input_gets_one_clear_line(words, message, project, capsys):
    assert tool(project, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("exercise.py: error: ")
    assert (project / "mora.py").read_bytes() == (ROOT / "mora.py").read_bytes(), "an error came after a change"


@pytest.mark.parametrize("old, new, message", [
    ("    def deal(", "    def deal)(", r"mora.py:\d+: .*correct this line first"),
    ("def square_size(", "def size(", "mora.py has no square_size any more: .*1-mora-square_size.py")])
def test_code_that_cannot_be_found_is_said(old, new, message, project, capsys):
    assert tool(project, "1") == 0
    edit(project, old, new)
    assert tool(project, "--solution", "1") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_a_lost_solution_is_said(project, capsys):
    assert tool(project, "1") == 0
    shutil.rmtree(project / "tests" / "kept")
    assert tool(project, "1") == 0
    assert tool(project, "--solution", "1") == 2
    assert "get mora.py from the project again" in capsys.readouterr().err
