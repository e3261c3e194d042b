"""What the inputs of linear layers are like: how much of their power is in a mean, and in outliers.

    python tests/experiments/inputs.py --png inputs.png    SmolLM2 (packages: see real_model.py)
    python tests/experiments/inputs.py --models gpt gpt_rms_norm
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from torch import nn

import controls  # which makes the files of the repository's root known
import data
import real_model
import train
from compare import markdown

FIGURES = ["mean over tokens", "mean over features", "outliers"]

def statistics(x):
    """Of inputs x (tokens, k): the share of their power that is in the mean over tokens, which is a
    vector (k,), and in the mean over features, which is a number for each token; and the largest
    feature over the median one, by root mean squares."""
    power = x.square().mean()
    over_tokens = x.mean(0).square().mean() / power
    over_features = x.mean(1).square().mean() / power
    size = x.square().mean(0).sqrt()
    return [figure.item() for figure in (over_tokens, over_features, size.max() / size.median())]

@torch.no_grad()
def measure(model, *inputs):
    """[(depth from 0 to 1, name, statistics), ...] of the linear layers, in the order of calls."""
    rows = []

    def hook(name, layer, x):
        rows.append((name, statistics(x[0].flatten(0, -2).double())))

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(functools.partial(hook, name))
    model(*inputs)
    return [(i / (len(rows) - 1), *row) for i, row in enumerate(rows)]

def smollm2():
    args = real_model.parse_args(["text", "--data", "none"])
    train.choose_device(args)
    pairs = real_model.Pairs(args, real_model.load_smollm2()[1])
    model, _ = real_model.load_base(args)
    return measure(model, pairs.idx, torch.zeros_like(pairs.idx))

def gpt(*options):
    args = controls.parse_args(["uuid", "--out_dir", "out/inputs" + "".join(options), *options])
    train.choose_device(args)
    base, tokenizer = controls.load_base(args)
    base = train.pretrain_demo(base, tokenizer, args)
    return measure(base, data.UUIDPairs(16, tokenizer, 16, 0).batch(0)[0])

MODELS = {"smollm2": smollm2, "gpt": gpt, "gpt_rms_norm": lambda: gpt("--rms_norm")}

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--png", type=Path, help="a picture of all layers (needs matplotlib)")
    args = parser.parse_args(argv)
    controls.add()
    try:
        found = {name: MODELS[name]() for name in args.models}
    except ValueError as error:
        sys.exit(f"inputs.py: error: {error}")
    rows = []
    for name, layers in found.items():
        last = layers[-14:] if name == "smollm2" else layers[-4:]  # the layers that are trained, or one
        for _, layer, values in last:
            cells = [f"{100 * value:.0f} %" for value in values[:2]] + [f"{values[2]:.1f}"]
            rows.append({"model": name, "layer": layer} | dict(zip(FIGURES, cells)))
    print(markdown(rows))
    if args.png:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
        for i, axes in enumerate(figure.subplots(1, 3)):
            for name, layers in found.items():
                depth, values = zip(*((depth, values[i]) for depth, _, values in layers))
                axes.plot(depth, values, ".", label=name)
            axes.set(title=FIGURES[i], xlabel="depth", yscale="log" if i == 2 else "linear")
        axes.legend()
        figure.savefig(args.png)

if __name__ == "__main__":
    main()
