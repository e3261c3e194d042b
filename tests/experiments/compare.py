"""Finished runs side by side: means and deviations over seeds, each setting at its best rate.

    python tests/experiments/compare.py out/uuid-*                         of these folders
    python tests/experiments/compare.py out/uuid-* --keep results.csv      and a row for each run
    python tests/experiments/compare.py results.csv --where task=uuid rank=2,4 "label!=lora*"
    python tests/experiments/compare.py out/uuid-* --curves curves.png     pictures need matplotlib
"""

import argparse
import csv
import fnmatch
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import controls  # which makes the files of the repository's root known
import real_model
import train
import weights

# ---- Runs, from folders or from a table of kept ones ---------------------------------------------
COLUMNS = "task label method rank size seed n_pairs max_steps learning_rate".split()
COLUMNS += "other_learning_rate adapter_parameters trainable_parameters update_rank".split()
COLUMNS += "seconds torch device dtype command rows".split()
csv.field_size_limit(10**9)

def load(path):
    """The runs of a table, or a folder's if it is finished: dicts with these COLUMNS, and more."""
    if path.suffix == ".csv":
        return [from_row(row) for row in read_table(path)]
    if not (path / "results.json").exists():
        return []
    run = json.loads((path / "results.json").read_text(encoding="utf-8"))
    config = run["config"]
    run = {name: config.get(name) for name in COLUMNS} | run
    if run["task"] != "uuid":
        run["n_pairs"] = None
    if config["init"] == "smollm2":
        run["task"] = "smollm2 " + run["task"]
    return [run | {"folder": path, "command": command(config)}]

def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def from_row(row):
    run = {}
    for name, cell in row.items():
        try:
            run[name] = json.loads(cell or "null")
        except ValueError:
            run[name] = cell  # a word
    return run | {"config": run, "metrics": run["rows"][-1]}

def command(config):
    """What makes a run again: its method, rank, rate and seed, and what is not at its default."""
    script, parse_args = "train.py", train.parse_args
    own = {*controls.METHODS, *controls.OPERATORS} & {config["method"], config["operator"]}
    if own or config.get("full_warmup") or config.get("rms_norm"):
        script = "tests/experiments/controls.py"
    if config["init"] == "smollm2":
        script, parse_args = "tests/experiments/real_model.py", real_model.parse_args
    task = [config["task"]] + ["--data", "FILE"] * bool(config["data"])
    # Other defaults follow from the number of steps and of pairs
    sizes = [f"--{name}={config[name]}" for name in ("max_steps", "n_pairs")]
    default = vars(parse_args(task + sizes))
    plain = vars(parse_args(task))
    default |= {"max_steps": plain["max_steps"], "n_pairs": plain["n_pairs"], "dtype": "float32"}
    of_the_machine = "task out_dir cache_dir device compile resume".split()
    words = [config["task"]]
    for name, usual in default.items():
        value = config["method"] if name == "methods" else config.get(name)
        if name in of_the_machine or value in (None, usual, "auto"):
            continue
        words.append("--" + name.replace("no_fast", "no-fast"))
        if isinstance(value, list):
            words += value
        elif value is not True:
            words.append(str(value))
    return " ".join(["python", script, *words])

def is_wanted(run, where):
    for condition in where:
        column, _, values = condition.partition("=")
        name = column.removesuffix("!")
        if name not in run:
            raise ValueError(f"--where {condition}: the columns are asked, {', '.join(COLUMNS)}")
        found = any(fnmatch.fnmatchcase(str(run[name]), value) for value in values.split(","))
        if found == (name != column):
            return False
    return True

def keep(runs, path):
    """Put the runs of folders into a table, each in the place of one with the same command."""
    rows = read_table(path) if path.exists() else []
    for run in runs:
        run |= weights.measure(run["folder"])
        rows.append({name: run[name] for name in COLUMNS} | {"rows": json.dumps(run["rows"])})
    table = {row["command"]: row for row in rows}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table[command] for command in sorted(table))

# ---- Means over seeds, and best rates ------------------------------------------------------------
def by_setting(results):
    """{(setting, rate): results, one per seed}. A setting is a command without rate and seed."""
    groups = defaultdict(list)
    for result in results:
        said = result.get("command", result["label"])
        setting = re.sub(r" --(seed|learning_rate) \S+", "", said)
        groups[setting, result["config"]["learning_rate"]].append(result)
    return groups

def score(result):
    """What is compared: the last accuracy, or the last loss, negative."""
    metrics = result["metrics"]
    return metrics["char_accuracy"] if "char_accuracy" in metrics else -metrics["val_loss"]

def at_best_rate(results):  # exercise 23
    """Of every setting, the results at its best rate, by the mean score over seeds; of equals the
    first. A rate that lacks a seed which another has does not count: there a run diverged."""
    settings = defaultdict(list)
    for (setting, _), group in by_setting(results).items():
        settings[setting].append(group)
    best = []
    for groups in settings.values():
        seeds = {result["seed"] for group in groups for result in group}
        complete = []
        for group in groups:
            if seeds == {result["seed"] for result in group if math.isfinite(score(result))}:
                complete.append(group)
        if complete:
            best += max(complete, key=lambda group: statistics.mean(map(score, group)))
    return best

def figures(run):
    """{column: (value, digits after the point)}"""
    last = run["metrics"]
    found = {}
    if "char_accuracy" in last:
        half_way = run["rows"][(len(run["rows"]) - 1) // 2]
        found["half-way"] = 100 * half_way["char_accuracy"], 1
        found["digits"] = 100 * last["char_accuracy"], 1
        found["exact"] = 100 * last["exact_match"], 1
    if "token_accuracy" in last:
        found["tokens right"] = 100 * last["token_accuracy"], 1
    if "bits" in last:
        found["bits"] = last["bits"] / run["trainable_parameters"], 2
    for name in ("val_loss", "old_loss"):
        if name in last:
            found[name.replace("_", " ")] = last[name], 3
    if run["update_rank"]:
        found["rank of ΔW"] = run["update_rank"], 0
    return found

def mean_and_deviation(values):
    """Over seeds. The deviation of a single one is 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

def make_rows(runs):
    """A table's rows: one for all seeds of a setting at a rate."""
    rows = []
    groups = by_setting(runs)
    # What a command says beyond the other columns, and other commands do not
    known = r"--(?:methods|rank|operator|groups|fold|n_pairs|max_steps)\b"
    options = [re.findall(rf"(?!{known})--\S+(?: (?!--)\S+)*", each) for each, _ in groups]
    common = set.intersection(*map(set, options))
    for (_, rate), group, words in zip(groups, groups.values(), options):
        run = group[0]
        row = {"method": re.sub(r" r\d+$", "", run["label"]), "steps": str(run["max_steps"])}
        for name, key in {"rank": "rank", "pairs": "n_pairs", "r̂": "size"}.items():
            row[name] = str(run[key] or "-")
        row["parameters"] = f"{run['adapter_parameters'] or run['trainable_parameters']:,}"
        row["rate"] = f"{rate:g}"
        found = [figures(each) for each in group]
        for name, (_, digits) in found[0].items():
            if all(name in each for each in found):
                mean, deviation = mean_and_deviation([each[name][0] for each in found])
                row[name] = f"{mean:.{digits}f}"
                if len(group) > 1 and digits:
                    row[name] += f" ± {deviation:.{digits}f}"
        row["seeds"] = str(len(group))
        row["options"] = " ".join(word for word in words if word not in common) or "-"
        rows.append(row)
    return rows

def across(rows, column, figure):
    """A row for each method, with a figure for each value of a column."""
    table = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (len(row[column]), row[column])):  # 4 before 32
        cells = table[row["method"]]
        title = f"{column} {row[column]}"
        if title in cells:
            raise ValueError(f"{row['method']} has several settings with {title}")
        cells[title] = row[figure]
    return [{"method": method} | cells for method, cells in table.items()]

def markdown(rows, columns=None):
    """Rows, which are dicts, as a table with these columns, or with all."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([row.get(name, "-") for name in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    return "\n".join(f"| {line} |" for line in lines)

# ---- Pictures: {x: y} of a run -------------------------------------------------------------------
def curve(run):
    name, factor = ("char_accuracy", 100) if run["task"] == "uuid" else ("val_loss", 1)
    return {row["step"]: factor * row[name] for row in run["rows"]}

def bits_asked(run):  # 122 random bits in each value, per trainable parameter
    return 122 * (run["n_pairs"] or 0) / run["trainable_parameters"]

def bits(run):
    return {bits_asked(run): run["metrics"]["bits"] / run["trainable_parameters"]}

PICTURES = {  # with what stands at the axes
    "curves": (curve, "step", "digits right (%)"),
    "bits": (bits, "bits asked per trainable parameter", "bits held per trainable parameter"),
    "spectra": (weights.spectrum, "index", "singular value of ΔW, mean over layers"),
    "forgetting": (weights.forgetting, "loss on new text", "loss on old text"),
}

def draw(path, name, runs):
    """Write a PNG with a line for each label: means over seeds, and standard deviations."""
    points, xlabel, ylabel = PICTURES[name]
    if name == "curves" and runs[0]["task"] != "uuid":
        ylabel = "held-out loss (nats per token)"
    lines = defaultdict(dict)  # {label: {x: (y, deviation)}}
    for group in by_setting(runs).values():
        label = group[0]["label"]
        for same in zip(*(points(run).items() for run in group)):
            x, y = zip(*same)
            x = statistics.mean(x)
            if x in lines[label]:
                raise ValueError(f"{label} has several settings: choose one with --where")
            lines[label][x] = mean_and_deviation(y)
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for label, line in lines.items():
        x = sorted(line)
        y, deviation = zip(*(line[each] for each in x))
        if len(x) > 1:
            axes.errorbar(x, y, deviation, label=label, capsize=2)
        if len(x) < 20:  # not for spectra
            for point in zip(x, y, deviation):
                print("{}: at {:.4g} {:.3f} ± {:.3f}".format(label, *point))
    if name == "bits":
        axes.set_ylim(0, axes.get_ylim()[1])  # the diagonal goes on beyond it
        axes.axline((0, 0), slope=1, color="grey", linestyle=":", label="held = asked")
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if name == "spectra" else "linear")
    axes.legend()
    figure.savefig(path)

# ---- The command ---------------------------------------------------------------------------------
def compare(args):
    runs = [run for path in args.runs for run in load(path)]
    for run in runs:
        run["asked"] = round(bits_asked(run), 1)
    runs = [run for run in runs if is_wanted(run, args.where)]
    if args.keep:
        keep([run for run in runs if "folder" in run], args.keep)
    runs = list({run["command"]: run for run in runs}.values())  # a kept run may be there twice
    tasks = sorted({run["task"] for run in runs})
    if len(tasks) > 1:
        raise ValueError(f"runs of several tasks: --where task={tasks[0]} takes those of one")
    runs = runs if args.rates else at_best_rate(runs)
    if not runs:
        raise ValueError("no finished run that --where wants, or no rate that all seeds have")
    runs.sort(key=lambda run: train.METHODS.index(run["method"]))
    rows = make_rows(runs)
    names = {name: None for row in rows for name in row}
    for name in args.across or args.columns or ():
        if name not in names:
            raise ValueError(f"no column is called {name}: there are {', '.join(names)}")
    print(markdown(across(rows, *args.across) if args.across else rows, args.columns))
    for name in PICTURES:
        if path := getattr(args, name):
            draw(path, name, runs)

def main(argv=None):
    controls.add()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of runs, or tables that --keep wrote")
    add("--where", nargs="+", default=[], metavar="COLUMN=VALUE,VALUE", help="only such runs, "
        "or, with !=, no such runs; * ? [ab] are as in a shell; asked is bits per parameter")
    add("--rates", action="store_true", help="every learning rate, not each setting's best")
    add("--columns", nargs="+", help="of the table, only these")
    add("--across", nargs=2, metavar=("COLUMN", "FIGURE"), help="a row for each method")
    add("--keep", type=Path, metavar="CSV", help="put the folders' runs into this table")
    for name in PICTURES:
        add(f"--{name}", type=Path, metavar="PNG")
    try:
        compare(parser.parse_args(argv))
    except ValueError as error:
        sys.exit(f"compare.py: error: {error}")

if __name__ == "__main__":
    main()
