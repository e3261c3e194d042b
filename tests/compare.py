"""Finished runs side by side: means and deviations over seeds, each setting at its best learning rate, and pictures.

    python tests/compare.py out/uuid-*                              the tables
    python tests/compare.py out/uuid-* --curves curves.png          accuracy, or loss, by step
    python tests/compare.py out/c4-* --spectra spectra.png          singular values of the updates, by kind of layer

Pictures need matplotlib.
"""

import argparse
import collections
import copy
import json
import math
import re
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from model import load_file

# ----------------------------------------------------------------------------------------------------------------------
# Tables


def by_setting(results):
    """The results of each setting and learning rate, one per seed."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[result["label"], result["config"]["learning_rate"]].append(result)
    return groups


def over_seeds(figures):
    """The mean of some (value, digits), and the standard deviation if there are several."""
    values, digits = [value for value, _ in figures], figures[0][1]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}" + deviation


def results_table(results):
    """One row for all seeds of a setting at a rate."""
    rows = []
    for group in by_setting(results).values():
        figures = [train.columns(result) for result in group]
        cells = {name: over_seeds([some[name] for some in figures if name in some]) for name in figures[0]}
        rows.append(train.table_row(group[0], **cells, seeds=str(len(group))))
    return train.markdown(rows)


def score(result):
    """What is compared: the last accuracy, or the last loss, negative."""
    metrics = result["metrics"]
    return metrics["char_accuracy"] if "char_accuracy" in metrics else -metrics["val_loss"]


def at_best_rate(results):  # exercise 23
    """Of every setting, the results at its best learning rate: by the last accuracy, or loss, in the mean over seeds.

    A rate that lacks a seed which another rate of the setting has, because its run diverged, is not compared. A tie
    goes to the rate that comes first.
    """
    settings = collections.defaultdict(dict)
    for (label, rate), group in by_setting(results).items():
        settings[label][rate] = group
    best = []
    for rates in settings.values():
        seeds = {result["seed"] for group in rates.values() for result in group}
        complete = [group for group in rates.values()
                    if seeds == {result["seed"] for result in group if math.isfinite(score(result))}]
        best += max(complete, key=lambda group: statistics.mean(map(score, group)), default=[])
    return best


# ----------------------------------------------------------------------------------------------------------------------
# Spectra


@torch.no_grad()
def update_spectra(folder):
    """The singular values s of what a run added to the linear layers, over all merges, by kind of layer.

    Means over the layers of a kind: rank, the count above 0.1 (the paper's Figure 5), effective rank (exp of the
    entropy of s / Σ s), stable rank (Σ s² / max s²), and s itself.
    """
    state = load_file(folder / "checkpoint.pt")
    config = train.Config(**state["config"] | {"device": "cpu"})
    base, _ = train.load_base(config)
    model = train.adapt(copy.deepcopy(base), config)
    model.load_state_dict(state["model"])
    kinds = collections.defaultdict(list)
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            kinds[re.sub(r"^h\.\d+\.", "", name)].append(model.get_submodule(name).weight - layer.weight)
    spectra = {}
    for kind, updates in kinds.items():
        s = torch.linalg.svdvals(torch.stack(updates))  # (layers, min(d, k)), descending
        noise = s[:, :1] * max(updates[0].shape) * torch.finfo(s.dtype).eps
        share = s / s.sum(1, keepdim=True).clamp_min(1e-30)
        measures = {"rank": (s > noise).sum(1), "above 0.1": (s > 0.1).sum(1),
                    "effective rank": torch.special.entr(share).sum(1).exp(),
                    "stable rank": (s / s[:, :1].clamp_min(1e-30)).square().sum(1)}
        means = {name: values.float().mean().item() for name, values in measures.items()}
        spectra[kind] = means | {"s": s.mean(0).tolist()}
    return spectra


def spectrum_table(spectra):
    """One row for each kind of layer in each run, from {run: {kind: measures}}."""
    return train.markdown([{"run": run, "layers": kind} | {name: f"{value:.1f}" for name, value in measures.items()
                                                           if name != "s"}
                           for run, kinds in spectra.items() for kind, measures in kinds.items()])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(panels, path, **axes_settings):
    """Write {title: {label: (x, y, error bars or None)}} as a PNG, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    figure = Figure(figsize=(4 * len(panels) + 2, 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items()):
        for label, (x, y, error) in lines.items():
            axes.errorbar(x, y, error, label=label, color=f"C{labels.index(label)}", capsize=2)
        axes.set(title=title, **axes_settings)
        axes.label_outer()
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


def draw_curves(results, path):
    """Accuracy, or held-out loss, by step: a panel for each rank, the mean and standard deviation over seeds."""
    accurate = "char_accuracy" in results[0]["metrics"]
    metric, scale, ylabel = ("char_accuracy", 100, "hex digits right, %") if accurate else (
        "val_loss", 1, "held-out loss, nats per token")
    panels = {}
    for rank in sorted({result["rank"] for result in results} - {None}) or [None]:
        settings = collections.defaultdict(list)
        for result in results:
            if result["rank"] in (None, rank):  # full has none, and is in every panel
                settings[result["label"].removesuffix(f" r{rank}")].append(result["rows"])
        panels[f"r = {rank}" if rank else "full"] = {}
        for label, seeds in settings.items():
            values = [[scale * row[metric] for row in rows] for rows in zip(*seeds)]  # of all seeds, by evaluation
            errors = [statistics.stdev(some) for some in values] if len(seeds) > 1 else None
            steps = [row["step"] for row in seeds[0]]
            panels[f"r = {rank}" if rank else "full"][label] = steps, [statistics.mean(some) for some in values], errors
    draw(panels, path, xlabel="step", ylabel=ylabel)


def draw_spectra(spectra, path):
    """The singular values of every run's update: a panel for each kind of layer."""
    panels = collections.defaultdict(dict)
    for run, kinds in spectra.items():
        for kind, measures in kinds.items():
            panels[kind][run] = range(len(measures["s"])), measures["s"], None
    draw(panels, path, xlabel="index", ylabel="singular value of ΔW", yscale="log", ylim=(1e-4, None))


def load(folder):
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8")) | {"folder": folder}
    except OSError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'results.json'} is damaged ({error})") from error


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of one task's runs; unfinished ones are left out")
    parser.add_argument("--curves", type=Path, metavar="PNG")
    parser.add_argument("--spectra", type=Path, metavar="PNG")
    args = parser.parse_args(argv)
    try:
        compare(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except (KeyError, TypeError) as error:
        parser.error(f"a results.json is damaged ({error!r})")


def compare(args):
    results = [result for result in map(load, args.runs) if result]
    if not results:
        raise ValueError(f"{args.runs[0]} is not the folder of a finished run: it has no results.json")
    runs = collections.Counter((one["label"], one["config"]["learning_rate"], one["seed"]) for one in results)
    if max(runs.values()) > 1:
        raise ValueError("{} at rate {}, seed {}, is there more than once".format(*runs.most_common(1)[0][0]))
    best = at_best_rate(results)
    best.sort(key=lambda result: (result["rank"] or 0, train.METHODS.index(result["method"]), result["label"]))
    if not best:
        raise ValueError("no setting has a learning rate at which all of its seeds ended well")
    if len(best) < len(results):
        print(results_table(results) + "\n\nEach setting at the best of its learning rates:\n")
    print(results_table(best))
    if args.curves:
        draw_curves(best, args.curves)
    if args.spectra:
        first = [group[0] for group in by_setting(best).values()]
        spectra = {result["label"]: update_spectra(result["folder"]) for result in first}
        print("\n" + spectrum_table(spectra))
        draw_spectra(spectra, args.spectra)


if __name__ == "__main__":
    main()
