"""Figures for a lecture, drawn with the code as it stands: with your own, while you do exercises.

    python tests/exercises/figures.py                 all: updates, rank, schedule, spectra, bits
    python tests/exercises/figures.py updates rank    only these
    python tests/exercises/figures.py --png FILE      to another file than out/figures.png

The numbers are printed as well. Pictures need matplotlib. All of them together take half a minute.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import measure
import mora
import train

LAYERS = {
    "LoRA": (mora.LoRALinear, {}),
    "truncation": (mora.MoRALinear, dict(operator="truncation")),
    "sharing (strided)": (mora.MoRALinear, dict(operator="sharing")),
    "sharing (contiguous)": (mora.MoRALinear, dict(operator="sharing", groups="contiguous")),
    "decoupling": (mora.MoRALinear, dict(operator="decoupling")),
    "rotation": (mora.MoRALinear, dict(operator="rotation")),
}

def make(label, k, d, rank):
    """A layer whose update is random."""
    kind, options = LAYERS[label]
    layer = kind(nn.Linear(k, d, bias=False), rank, **options)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layer

def updates(axes):
    """ΔW (24 x 24) of LoRA and of each operator with the same budget: r = 1, so r̂ = 6."""
    for axis, label in zip(axes, LAYERS):
        delta = make(label, 24, 24, 1).delta_weight().detach()
        rank = int(torch.linalg.matrix_rank(delta, rtol=1e-5))
        print(f"update, {label}: rank {rank}")
        axis.imshow(delta, cmap="RdBu", vmin=-2.5, vmax=2.5)
        axis.set(title=f"{label}, rank {rank}", xticks=[], yticks=[])

def rank(axes):
    """The rank of all merged updates together, and its bound, for 96 x 96 and r̂ = 13."""
    for color, groups in enumerate(("strided", "cycle", "random")):
        linear = nn.Linear(96, 96, dtype=torch.float64)
        layer = mora.MoRALinear(linear, 1, "sharing", groups=groups)
        start, known, ranks, bounds = linear.weight.clone(), [], [], []
        for _ in range(10):
            nn.init.normal_(layer.M)
            known.append((layer.operator.in_group.clone(), layer.operator.out_group.clone()))
            bounds.append(measure.rank_bound([*known]))
            mora.merge_and_reset(layer)
            ranks.append(int(torch.linalg.matrix_rank(linear.weight - start)))
        print(f"rank, {groups}: {ranks}, bounds {bounds}")
        axes[0].plot(range(1, 11), ranks, "o", color=f"C{color}", label=groups)
        axes[0].plot(range(1, 11), bounds, "--", color=f"C{color}")
    axes[0].set(title="rank of all updates (dashed: bound)", xlabel="merges")
    axes[0].legend()

def schedule(axes):
    """The learning rate of a run with merges."""
    for kind in ("cosine", "linear"):
        warmups = dict(warmup_steps=50, restart_warmup=20)
        config = train.settings(schedule=kind, max_steps=500, merge_every=100, **warmups)
        axes[0].plot([train.schedule(step, config) for step in range(500)], label=kind)
    axes[0].set(title="learning rate over its peak", xlabel="step")
    axes[0].legend()

def spectra(axes):
    """Singular values of random updates of one budget (128 x 128, r = 4), and of a full matrix."""
    for label in (*LAYERS, "full"):
        full = torch.randn(128, 128)
        update = full if label == "full" else make(label, 128, 128, 4).delta_weight().detach()
        s, (rank, effective, stable) = torch.linalg.svdvals(update), measure.spectrum(update)
        print(f"spectrum, {label}: rank {rank:.0f}, effective {effective:.1f}, stable {stable:.1f}")
        name = f"{label} ({rank:.0f}, {effective:.0f}, {stable:.0f})"
        axes[0].plot(range(1, 129), s / s[0], label=name)
    title = "singular values (rank, effective, stable)"
    axes[0].set(title=title, yscale="log", ylim=(1e-3, 1.5), xlabel="index")
    axes[0].legend(fontsize="small")

def bits(axes):
    """Bits held over bits asked: a frozen layer of zeros, with 64 inputs, memorizes values of 16
    random bits. The best of three learning rates counts."""
    for label in LAYERS:
        points = []
        for n in (8, 16, 32, 64, 128):
            runs = [memorize(label, n, rate) for rate in (0.03, 0.1, 0.3)]
            held, parameters = max(runs)
            points.append((16 * n / parameters, held / parameters))
        values = ", ".join(f"{held:.2f} of {asked:.2f}" for asked, held in points)
        print(f"bits per parameter, {label}: {values}")
        axes[0].plot(*zip(*points), "o-", label=label)
    axes[0].plot([0, 2], [0, 2], ":", color="gray")
    axes[0].set(title="bits held per parameter", xlabel="bits asked per parameter")
    axes[0].legend(fontsize="small")

def memorize(label, n, rate, steps=300):
    """(bits held, parameters) of an adapter after training on n values of four hex digits."""
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

PANELS = {updates: len(LAYERS), rank: 1, schedule: 1, spectra: 1, bits: 1}

class Nowhere:
    """Stands for a panel where matplotlib is missing, and draws nothing."""
    def __getattr__(self, name):
        return lambda *args, **options: None

def main(argv=None):
    known = {figure.__name__: figure for figure in PANELS}
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(known))
    parser.add_argument("--png", type=Path, default="out/figures.png")
    args = parser.parse_args(argv)
    for name in args.figures:
        if name not in known:
            parser.error(f"there is no figure {name}: they are {', '.join(known)}")
    chosen = [known[name] for name in args.figures or known]
    torch.set_num_threads(1)
    panels = sum(PANELS[figure] for figure in chosen)
    page, axes = None, [Nowhere()] * panels
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture")
    else:
        columns = min(panels, 3)
        rows = -(-panels // columns)
        width, height = (8 / 3, 2.8) if chosen == [updates] else (4, 4)
        page = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = [*page.subplots(rows, columns, squeeze=False).flat]
    for figure in chosen:
        own, axes = axes[:PANELS[figure]], axes[PANELS[figure]:]
        torch.manual_seed(0)
        try:
            figure(own)
        except NotImplementedError as error:  # an exercise that is taken out
            own[0].set(title=str(error).replace(", as", ",\nas"), xticks=[], yticks=[])
            print(f"{figure.__name__}: {error}")
    for axis in axes:
        axis.set_axis_off()
    if page:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        page.savefig(args.png, dpi=150)
        print(f"drawn: {args.png}")

if __name__ == "__main__":
    main()
