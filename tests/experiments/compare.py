"""Finished runs side by side: means and deviations over seeds, each setting at its best learning rate, and pictures.

    python tests/compare.py out/uuid-*                              the tables
    python tests/compare.py out/uuid-* --curves curves.png          accuracy, or loss, by step
    python tests/compare.py out/c4-* --spectra spectra.png          singular values of the updates, by kind of layer
    python tests/compare.py out/text-* --forgetting old.png         the loss on --old_data by that on new text
    python tests/compare.py out/uuid-* --keep results.csv           a row for each run, with the command that makes it
    python tests/compare.py results.csv --where task=uuid rank=2    kept runs instead of folders, some of them
    python tests/compare.py results.csv --where rank=1 --bits bits.png       bits held over bits asked

Pictures need matplotlib.
"""

import argparse
import collections
import contextlib
import copy
import csv
import fnmatch
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import controls
import data
import train
from model import load_file
from mora import merge_adapters

# ----------------------------------------------------------------------------------------------------------------------
# Tables


def by_setting(results):
    """{(setting, rates): results, one per seed}; a setting is what a run's command says but for its seed and rates."""
    groups = collections.defaultdict(list)
    for result in results:
        setting = re.sub(r" --(seed|learning_rate|other_learning_rate) \S+", "", result.get("command", result["label"]))
        rates = result["config"]["learning_rate"], result["config"].get("other_learning_rate")
        groups[setting, rates].append(result)
    return groups


def over_seeds(figures):
    """The mean of some (value, digits), and the standard deviation if there are several."""
    values, digits = [value for value, _ in figures], figures[0][1]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}" + deviation


def results_table(results):
    """One row for all seeds of a setting at a rate; with its options, but for those in its name or of all settings."""
    groups, rows = by_setting(results), []
    in_label = r"--(?:methods|rank|operator|groups|fold)\b"
    words = {setting: {*re.findall(rf"(?!{in_label})--\S+(?: (?!--)\S+)*", setting)} for setting, _ in groups}
    others = {other for _, (_, other) in groups}
    for (setting, (_, other)), group in groups.items():
        figures = [train.columns(result) for result in group]
        cells = {name: over_seeds([some[name] for some in figures]) if all(name in some for some in figures) else "-"
                 for name in figures[0]}
        if more := sorted(words[setting] - set.intersection(*words.values())):
            cells["options"] = " ".join(more)
        cells |= {"other rate": f"{other:g}"} if len(others) > 1 and other is not None else {}
        rows.append(train.table_row(group[0], **cells, seeds=str(len(group))))
    return train.markdown(rows)


def score(result):
    """What is compared: the last accuracy, or the last loss, negative."""
    metrics = result["metrics"]
    return metrics["char_accuracy"] if "char_accuracy" in metrics else -metrics["val_loss"]


def at_best_rate(results):  # exercise 23
    """Of every setting, the results at its best learning rate: by the last accuracy, or loss, in the mean over seeds.

    A rate that lacks a seed which another rate of the setting has, as where a run diverged, is not compared. A tie
    goes to the rate that comes first.
    """
    settings = collections.defaultdict(dict)
    for (setting, rate), group in by_setting(results).items():
        settings[setting][rate] = group
    best = []
    for rates in settings.values():
        seeds = {result["seed"] for group in rates.values() for result in group}
        complete = [group for group in rates.values()
                    if seeds == {result["seed"] for result in group if math.isfinite(score(result))}]
        best += max(complete, key=lambda group: statistics.mean(map(score, group)), default=[])
    return best


# ----------------------------------------------------------------------------------------------------------------------
# Spectra, and what is forgotten


def load_run(folder):
    """A run's config, its base, the trained model, and their tokenizer."""
    state = load_file(folder / "checkpoint.pt")
    if state["step"] < state["config"]["max_steps"]:
        raise ValueError(f"{folder} is being prolonged: --resume finishes it")
    config = train.Config(**state["config"] | {"device": "cpu"})
    files = [file for name in ("data", "val_data", "old_data") for file in getattr(config, name) or ()]
    if os.path.isfile(config.init) and config.inputs != data.fingerprint([*files, config.init]):
        raise ValueError(f"{folder}: the files that this run read have changed since, among them perhaps its base")
    base, tokenizer = train.load_base(config)
    model = train.adapt(copy.deepcopy(base), config)
    model.load_state_dict(state["model"])
    return config, base, model, tokenizer


@torch.no_grad()
def update_spectra(folder):
    """The singular values s of what a run added to the linear layers, over all merges, by kind of layer.

    Means over the layers of a kind: rank, the count above 0.1 (the paper's Figure 5), effective rank (exp of the
    entropy of s / Σ s), stable rank (Σ s² / max s²), and s itself.
    """
    _, base, model, _ = load_run(folder)
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
                    "effective rank": torch.special.entr(share).sum(1).exp() * share.sum(1),  # 0 of zeros
                    "stable rank": (s / s[:, :1].clamp_min(1e-30)).square().sum(1)}
        means = {name: values.float().mean().item() for name, values in measures.items()}
        spectra[kind] = means | {"s": s.mean(0).tolist()}
    return spectra


def spectrum_table(spectra):
    """One row for each kind of layer in each run, from {run: {kind: measures}}."""
    return train.markdown([{"run": run, "layers": kind} | {name: f"{value:.1f}" for name, value in measures.items()
                                                           if name != "s"}
                           for run, kinds in spectra.items() for kind, measures in kinds.items()])


SCALES = 0.25, 0.5, 0.75, 1


@torch.no_grad()
def scaled_losses(folder):
    """The losses on new and on old text, a pair for each scale, of the base plus so much of what the run added to it.
    """
    config, base, model, tokenizer = load_run(folder)
    if config.task != "text" or not config.old_data:
        raise ValueError(f"--forgetting is for runs of text with --old_data: {folder} is none")
    dataset = train.load_dataset(config, tokenizer, base.config.block_size)
    trained = (merge_adapters(model) if config.method != "full" else model).state_dict()
    losses = []
    for scale in SCALES:
        scaled = {name: torch.lerp(tensor, trained[name], scale) for name, tensor in base.state_dict().items()}
        model = copy.deepcopy(base)
        model.load_state_dict(scaled)
        metrics = train.evaluate(model.eval(), dataset)
        losses.append((metrics["val_loss"], metrics["old_loss"]))
    return losses


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


def check_lines(results, *several):
    """ValueError where a picture would have one line for several settings, apart from the options `several`."""
    settings = {}
    for (setting, _), group in by_setting(results).items():
        for name in several:
            setting = re.sub(rf" --{name} \S+", "", setting)
        label = group[0]["label"]
        if settings.setdefault(label, setting) != setting:
            raise ValueError(f"a picture has one line for {label}, of which there are several settings: see --where")


def draw_curves(results, path):
    """Accuracy, or held-out loss, by step: a panel for each rank, the mean and standard deviation over seeds."""
    check_lines(results)
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
            if any(steps != [row["step"] for row in rows] for rows in seeds):
                raise ValueError(f"--curves: the runs of {label} were not evaluated at the same steps")
            panels[f"r = {rank}" if rank else "full"][label] = steps, [statistics.mean(some) for some in values], errors
    draw(panels, path, xlabel="step", ylabel=ylabel)


def draw_bits(results, path):
    """The bits of values that a model holds over those it was asked to, both per trainable parameter."""
    check_lines(results, "n_pairs", "max_steps")
    for n_pairs in {result["config"]["n_pairs"] for result in results}:
        check_lines([result for result in results if result["config"]["n_pairs"] == n_pairs])
    lines = collections.defaultdict(dict)
    for result in results:
        asked, held = 122 * result["config"]["n_pairs"], result["metrics"]["bits"]
        lines[result["label"]].setdefault(asked, []).append((asked / result["trainable_parameters"],
                                                             held / result["trainable_parameters"]))
    panel = {}
    for label, points in lines.items():
        x, values = zip(*((some[0][0], [held for _, held in some]) for _, some in sorted(points.items())))
        error = [statistics.stdev(some) if len(some) > 1 else 0 for some in values]
        panel[label] = x, [*map(statistics.mean, values)], error
        print(f"bits held of those asked, per parameter, {label}: " + ", ".join(
            f"{statistics.mean(some):.2f} of {asked:.2f}" for asked, some in zip(x, values)))
    draw({"bits per parameter": panel}, path, xlabel="asked", ylabel="held")


def draw_spectra(spectra, path):
    """The singular values of every run's update: a panel for each kind of layer."""
    panels = collections.defaultdict(dict)
    for run, kinds in spectra.items():
        for kind, measures in kinds.items():
            panels[kind][run] = range(len(measures["s"])), measures["s"], None
    draw(panels, path, xlabel="index", ylabel="singular value of ΔW", yscale="log", ylim=(1e-4, None))


def draw_forgetting(losses, path):
    """The loss on old text by that on new text, as more and more of each run's update is added to the base."""
    panel, rows = {}, []
    for label, seeds in losses.items():
        points = [[*zip(*some)] for some in zip(*seeds)]  # for each scale, the new losses of all seeds and the old
        panel[label] = *zip(*([*map(statistics.mean, both)] for both in points)), None
        cells = (" / ".join(over_seeds([(loss, 3) for loss in some]) for some in both) for both in points)
        rows.append({"method": label} | {f"{scale:.0%}": cell for scale, cell in zip(SCALES, cells)})
    print("\nthe losses on new and on old text\n\n" + train.markdown(rows))
    draw({"": panel}, path, xlabel="loss on new text", ylabel="loss on old text")


# ----------------------------------------------------------------------------------------------------------------------
# Runs, from folders or from a table of kept ones


def evaluations(text):
    """The rows of a metrics.csv as a table keeps them; the last has the metrics."""
    rows = json.loads(text)
    return [row | {"step": int(row["step"])} for row in rows] if rows[-1] else rows


COLUMNS = {"task": str, "label": str, "method": str, "rank": int, "size": str, "seed": int, "n_pairs": int,
           "max_steps": int, "learning_rate": float, "other_learning_rate": float, "adapter_parameters": int,
           "trainable_parameters": int, "update_rank": float, "seconds": float, "torch": str, "device": str,
           "dtype": str, "command": str, "rows": evaluations}
csv.field_size_limit(10**9)


def command(config):
    """What makes a run again: its rank, rate and seed, and options that have not their defaults."""
    of_the_machine = {"task", "inputs", "out_dir", "cache_dir", "device", "dtype", "compile", "resume"}
    options = {train.FLAGS.get(name, name): value for name, value in config.items() if name not in of_the_machine}
    task = [config["task"], *["--data", __file__] * (config["task"] in ("text", "pairs"))]
    sizes = [("--max_steps", config["max_steps"]), *[("--n_pairs", config["n_pairs"])] * (config["task"] == "uuid")]
    default = vars(train.parse_args(task + [str(word) for size in sizes for word in size]))  # other defaults follow
    default |= {name[2:]: vars(train.parse_args(task))[name[2:]] for name, _ in sizes}
    script, words = "train.py", []
    for name, value in options.items():
        if name in default and value is not None and (name == "methods" or value != default[name]):
            values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
            words += [f"--no-{name}" if value is False else f"--{name}", *(shlex.quote(str(each)) for each in values)]
        if name in ("methods", "operator") and value in (*controls.METHODS, *controls.OPERATORS):
            script = "tests/controls.py"
    return " ".join(["python", script, config["task"], *words])


@contextlib.contextmanager
def reading(path):
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged, or something else ({type(error).__name__}: {error})") from error


def read_table(path):
    """The rows of a table of kept runs, as text, and with their values."""
    with reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = [*reader]
        if {*(reader.fieldnames or ())} != {*COLUMNS} or any(None in row or None in row.values() for row in rows):
            raise ValueError("a table of --keep has other columns")
        return rows, [{name: kind(row[name]) if row[name] else None for name, kind in COLUMNS.items()} for row in rows]


def keep(results, path):
    """Put the runs into a table, in the place of those with the same command, device and type."""
    def key(row):
        return row["command"], row["device"], row["dtype"]

    kept = {key(row): row for row in (read_table(path)[0] if path.exists() else ())}
    for result in results:
        rows = [{column: value if column == "step" else float(f"{value:.5g}") for column, value in row.items()
                 if column not in ("learning_rate", "tokens_per_second")} for row in result["rows"]]
        row = {name: result["config"].get(name, result.get(name)) for name in COLUMNS}
        kept[key(row)] = row | {"rows": json.dumps(rows, separators=(",", ":")), "seconds": round(row["seconds"])}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS])
    writer.writeheader()
    writer.writerows(kept[each] for each in sorted(kept))
    data.write_file(path, lambda file: file.write(text.getvalue().encode()))


def load(path, where=()):
    """The finished run of a folder, or those of a table, as results.json has them; of these, those with such values."""
    source, results = path if path.suffix == ".csv" else path / "results.json", []
    with reading(source):
        if path.suffix == ".csv":
            results = [row | {"config": row, "metrics": row["rows"][-1]} for row in read_table(path)[1]]
        elif source.exists():
            result = json.loads(source.read_text(encoding="utf-8")) | {"folder": path}
            config = dict(result["config"])
            unused = ["n_pairs"] * (config["task"] != "uuid") + ["other_learning_rate"] * (config["init"] != "scratch")
            config |= dict.fromkeys(unused)
            results = [result | {"config": config, "command": command(result["config"])}]
        for result in results:
            train.table_row(result)  # what does not fit shows now
    for name, value in where:
        column = name.removesuffix("!")
        if column not in COLUMNS:
            raise ValueError(f"--where {column}=...: the columns are {', '.join(COLUMNS)}")
        values = [result["config"].get(column, result.get(column)) for result in results]
        found = [fnmatch.fnmatchcase(str(known), value) or is_number(known, value) for known in values]
        results = [result for result, is_so in zip(results, found) if is_so == (name == column)]
    return results


def is_number(known, text):
    try:
        return known == float(text)
    except ValueError:
        return False


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of one task's runs, of which unfinished ones are "
                        "left out, or tables that --keep wrote")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="of the runs, only these; "
                        "COLUMN!=VALUE leaves them out, and *, ? and [ab] stand for what they do in a shell")
    parser.add_argument("--keep", type=Path, metavar="CSV", help="put the runs into this table, or back into it")
    for name in ("curves", "spectra", "forgetting", "bits"):
        parser.add_argument(f"--{name}", type=Path, metavar="PNG")
    args = parser.parse_args(argv)
    try:
        compare(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"compare.py: error: {error}\n")


def compare(args):
    if wrong := [each for each in args.where if "=" not in each]:
        raise ValueError(f"--where {wrong[0]} is not COLUMN=VALUE")
    results = [result for path in args.runs for result in load(path, [each.split("=", 1) for each in args.where])]
    if not results:
        raise ValueError(f"{args.runs[0]} has no finished run" + " that is so" * bool(args.where))
    for group in by_setting(results).values():
        seeds = [result["seed"] for result in group]
        if len({*seeds}) < len(seeds):
            raise ValueError(f"{group[0]['label']} at rate {group[0]['config']['learning_rate']}, seed "
                             f"{max(seeds, key=seeds.count)}, is there more than once")
    tasks = {result["config"]["task"] for result in results}
    if len(tasks) > 1:
        raise ValueError(f"these are runs of several tasks: --where task={min(tasks)} takes those of one")
    if args.bits and (tasks != {"uuid"} or not all("bits" in result["metrics"] for result in results)):
        raise ValueError("--bits is for the task uuid")
    if (args.spectra or args.forgetting) and not all("folder" in result for result in results):
        raise ValueError("--spectra and --forgetting need the runs' folders: a table has no weights")
    if args.keep and args.keep.suffix != ".csv":
        raise ValueError(f"--keep {args.keep}: the table's name has to end in .csv")
    if args.keep:
        keep(results, args.keep)
    best = at_best_rate(results)
    order = {method: i for i, method in enumerate(train.METHODS)}  # those of controls.py come last
    best.sort(key=lambda result: (result["rank"] or 0, order.get(result["method"], 99), result["label"]))
    if not best:
        raise ValueError("no setting has a learning rate at which all of its seeds ended well")
    if len(best) < len(results):
        print(results_table(results) + "\n\nEach setting at the best of its learning rates:\n")
    print(results_table(best))
    if args.curves:
        draw_curves(best, args.curves)
    if args.bits:
        draw_bits(best, args.bits)
    if args.spectra:
        spectra = of_each_label([group[0] for group in by_setting(best).values()], update_spectra)
        spectra = {label: first for label, (first, *_) in spectra.items()}
        print("\n" + spectrum_table(spectra))
        draw_spectra(spectra, args.spectra)
    if args.forgetting:
        draw_forgetting(of_each_label(best, scaled_losses), args.forgetting)


def of_each_label(results, measure):
    """{label: what `measure` finds in the folder of each seed}."""
    check_lines(results)
    found = collections.defaultdict(list)
    try:
        for result in results:
            found[result["label"]].append(measure(result["folder"]))
        return found
    except (RuntimeError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"a checkpoint.pt is damaged, or of another model ({reason})") from error


if __name__ == "__main__":
    controls.add()
    main()
