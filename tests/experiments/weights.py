"""What a finished run's weights show, for compare.py: the size and the rank of its updates, their
singular values, and what they cost on old text."""

import argparse
import copy
import statistics

import torch

import controls  # which makes the files of the repository's root known
import mora
import real_model
import train
from model import load_file

def load_run(folder):
    """A run's settings, its base, the trained model, and their tokenizer."""
    state = load_file(folder / "checkpoint.pt")
    config = argparse.Namespace(**state["config"] | {"device": "cpu"})
    real = config.init == "smollm2"
    base, tokenizer = real_model.load_base(config) if real else train.load_base(config)
    if config.init == "demo":
        base = train.pretrain_demo(base, tokenizer, config)
    model = train.adapt(copy.deepcopy(base), config)
    model.load_state_dict(state["model"])
    return config, base, model, tokenizer

@torch.no_grad()
def updates(base, model):
    """What was added to each linear layer (d, k), in all merges together."""
    found = []
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            found.append(model.get_submodule(name).weight - module.weight)
    return found

def measure(folder):
    """What results.csv has of a run beyond results.json. The rank is a mean over linear layers."""
    _, base, model, _ = load_run(folder)
    adapters = [module for module in model.modules() if isinstance(module, mora.Adapter)]
    n_parameters = 0
    for adapter in adapters:
        n_parameters += sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    sizes = sorted(a.size for a in adapters if isinstance(a, mora.MoRALinear))
    ends = [str(size) for size in sizes[:1] + sizes[-1:]]
    ranks = [float(torch.linalg.matrix_rank(update)) for update in updates(base, model)]
    found = {"size": "-".join(dict.fromkeys(ends)), "adapter_parameters": n_parameters}
    return found | {"update_rank": statistics.mean(ranks)}

def spectrum(run):
    """{index: singular value of ΔW}, the largest first, means over the linear layers."""
    _, base, model, _ = load_run(run["folder"])
    s = [torch.linalg.svdvals(update) for update in updates(base, model)]
    return dict(enumerate(torch.stack(s).mean(0).tolist()))

@torch.no_grad()
def forgetting(run, parts=(0.25, 0.5, 0.75, 1.0)):
    """{loss on new text: loss on old text} of the base plus such a part of what was added to it."""
    config, base, model, tokenizer = load_run(run["folder"])
    dataset = train.load_dataset(config, tokenizer, base.config.block_size)
    if config.method != "full":
        mora.merge_adapters(model)
    losses = {}
    for part in parts:
        mixed = copy.deepcopy(base)
        for tensor, trained in zip(mixed.parameters(), model.parameters(), strict=True):
            tensor.lerp_(trained, part)
        metrics = train.evaluate(mixed.eval(), dataset)
        losses[metrics["val_loss"]] = metrics["old_loss"]
    return losses
