"""Finished runs side by side, each setting at its best learning rate: a table, and a picture if there is matplotlib.

    python tests/compare.py curves.png out/uuid-*-seed?
"""

import argparse
import collections
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train


def draw_curves(results, path):
    """Accuracy, or held-out loss, by step: a panel for each rank, the mean and standard deviation over seeds."""
    accurate = "char_accuracy" in results[0]["metrics"]
    metric, scale, ylabel = ("char_accuracy", 100, "hex digits right, %") if accurate else (
        "val_loss", 1, "held-out loss, nats a token")
    panels = {}
    for rank in sorted({result["rank"] for result in results} - {None}) or [None]:
        settings = collections.defaultdict(list)
        for result in results:
            if result["rank"] in (None, rank):  # full has none, and is in every panel
                settings[result["label"].removesuffix(f" r{rank}")].append(result["rows"])
        panels[f"r = {rank}" if rank else "full"] = {
            label: ([row["step"] for row in seeds[0]],
                    *zip(*(train.mean_and_deviation([scale * row[metric] for row in rows]) for rows in zip(*seeds))))
            for label, seeds in settings.items()}
    train.draw(panels, path, xlabel="step", ylabel=ylabel)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of one task's runs")
    args = parser.parse_args(argv)
    results = []
    for folder in args.runs:
        try:
            results.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        except OSError:
            parser.error(f"{folder} is not the folder of a finished run: it has no results.json")
    best = train.at_best_rate(results)
    best.sort(key=lambda result: (result["rank"] or 0, train.METHODS.index(result["method"]), result["label"]))
    print(train.results_table(best))
    draw_curves(best, args.picture)


if __name__ == "__main__":
    main()
