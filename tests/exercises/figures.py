"""A page of figures for a lecture, drawn with the code as it stands: your own, where you are working on exercises.

    python tests/figures.py                          all of them, to out/figures.png
    python tests/figures.py updates rank             some: updates, rank, schedule, spectra, bits

The numbers are printed as well; pictures need matplotlib. All of it takes a minute.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import measure
import mora
import train

LAYERS = {"lora": (mora.LoRALinear, {}), **{f"mora {operator}": (mora.MoRALinear, {"operator": operator})
                                            for operator in mora.OPERATORS}}


def make(label, k, d, rank):
    """A layer whose update is at random."""
    kind, options = LAYERS[label]
    layer = kind(nn.Linear(k, d, bias=False), rank, **options)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layer


def updates(axes):
    """ΔW of each operator (24 x 24) and of LoRA, within the same budget: r = 1, r̂ = 6."""
    pictures = [make(label, 24, 24, 1).delta_weight().detach() for label in LAYERS]
    for axis, label, picture in zip(axes, LAYERS, pictures):
        axis.imshow(picture, cmap="RdBu", vmin=-2.5, vmax=2.5)
        axis.set(title=f"{label}, rank {int(torch.linalg.matrix_rank(picture))}", xticks=[], yticks=[])


def rank(axes):
    """The rank of all merged updates together, and its bound, for 96 x 96 and r̂ = 13."""
    axis, = axes
    for color, groups in enumerate(("strided", "cycle", "random")):
        layer = mora.MoRALinear(nn.Linear(96, 96, dtype=torch.float64), 1, "sharing", groups=groups)
        start, known, ranks, bounds = layer.linear.weight.clone(), [], [], []
        for _ in range(10):
            nn.init.normal_(layer.M)
            known.append((layer.operator.in_group.clone(), layer.operator.out_group.clone()))
            bounds.append(measure.rank_bound([*known]))
            mora.merge_and_reset(layer)
            ranks.append(int(torch.linalg.matrix_rank(layer.linear.weight - start)))
        print(f"rank, {groups}: {ranks}, bounds {bounds}")
        axis.plot(range(1, 11), ranks, "o", color=f"C{color}", label=groups)
        axis.plot(range(1, 11), bounds, "--", color=f"C{color}")
    axis.set(title="rank of all updates (dashed: bound)", xlabel="merges")
    axis.legend()


def schedule(axes):
    """The learning rate of a run with merges."""
    axis, = axes
    for kind in ("cosine", "linear"):
        config = train.Config(method="remora", schedule=kind, max_steps=500, warmup_steps=50, merge_every=100,
                              restart_warmup=20, device="cpu")
        axis.plot([train.schedule(step, config) for step in range(500)], label=kind)
    axis.set(title="learning rate, as a fraction of its peak", xlabel="step")
    axis.legend()


def spectra(axes):
    """Singular values of updates of one budget (128 x 128, r = 4), and of a matrix in which all are free."""
    axis, = axes
    for label in (*LAYERS, "full"):
        update = torch.randn(128, 128) if label == "full" else make(label, 128, 128, 4).delta_weight().detach()
        s, (rank, effective, stable) = torch.linalg.svdvals(update), measure.spectrum(update)
        print(f"spectrum, {label}: rank {rank:.0f}, effective rank {effective:.1f}, stable rank {stable:.1f}")
        axis.plot(range(1, 129), s / s[0], label=f"{label} ({rank:.0f}, {effective:.0f}, {stable:.0f})")
    axis.set(title="singular values (rank, effective, stable)", yscale="log", ylim=(1e-3, 1.5), xlabel="index")
    axis.legend(fontsize="small")


def bits(axes):
    """One frozen layer of zeros, 64 inputs, memorizes values of 16 random bits: bits held over bits asked. Of three
    learning rates the best one counts.
    """
    axis, = axes
    for label in LAYERS:
        points = []
        for n in (8, 16, 32, 64, 128):
            runs = [memorize(label, n, rate) for rate in (0.03, 0.1, 0.3)]
            points.append((16 * n / runs[0][1], max(held for held, _ in runs) / runs[0][1]))
        print(f"bits per parameter, {label}: " + ", ".join(f"{held:.2f} of {asked:.2f}" for asked, held in points))
        axis.plot(*zip(*points), "o-", label=label)
    axis.plot([0, 2], [0, 2], ":", color="gray")
    axis.set(title="bits held per parameter", xlabel="bits asked per parameter")
    axis.legend()


def memorize(label, n, rate, steps=300):
    """(bits held, parameters) of an adapter that learned n values of four digits, any of 16 each."""
    torch.manual_seed(0)
    x, digits = torch.randn(n, 64), torch.randint(16, (n, 4))
    layer = make(label, 64, 64, 2)
    layer.linear.weight.zero_()
    layer.reset()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(layer(x).view(-1, 16), digits.flatten()).backward()
        optimizer.step()
    held = measure.bits_held(layer(x).detach().view(n, 4, 16), digits, 16)
    return held, sum(parameter.numel() for parameter in parameters)


FIGURES = {updates: len(LAYERS), rank: 1, schedule: 1, spectra: 1, bits: 1}  # and how many panels each has


class Nowhere:
    """Where matplotlib is missing: draws nothing."""

    def __getattr__(self, name):
        return lambda *args, **options: None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {figure.__name__: figure for figure in FIGURES}
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(known))
    parser.add_argument("--png", type=Path, default="out/figures.png")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.figures if name not in known]:
        parser.error(f"there is no figure {unknown[0]}: they are {', '.join(known)}")
    chosen = [known[name] for name in args.figures or known]
    torch.set_num_threads(1)
    page, axes = None, [Nowhere()] * sum(FIGURES[figure] for figure in chosen)
    try:
        from matplotlib.figure import Figure
        columns = min(len(axes), 6)
        rows = -(-len(axes) // columns)
        page = Figure(figsize=(3.2 * columns, 3.2 * rows), layout="constrained")
        axes = [*page.subplots(rows, columns, squeeze=False).flat]
    except ImportError:
        print("matplotlib is not installed: no picture")
    for figure in chosen:
        own, axes = axes[:FIGURES[figure]], axes[FIGURES[figure]:]
        torch.manual_seed(0)
        try:
            figure(own)
        except NotImplementedError as error:  # an exercise that is out
            own[0].set(title=str(error).replace(", as", ",\nas"), xticks=[], yticks=[])
            print(f"{figure.__name__}: {error}")
    for axis in axes:
        axis.set_axis_off()
    if page:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        page.savefig(args.png, dpi=110)
        print(f"drawn: {args.png}")


if __name__ == "__main__":
    main()
