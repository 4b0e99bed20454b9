#!/usr/bin/env python3
"""Draws the output of `build/bench -m MODEL --flops-table -o csv` as a heat map.

    pip install matplotlib
    python3 bench/flops-table.py TABLE.csv TABLE.png
"""
import csv
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(source, target):
    with open(source, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lengths = sorted({int(row["length"]) for row in rows})
    batches = sorted({int(row["batch"]) for row in rows})
    rate = {(int(row["length"]), int(row["batch"])): float(row["gflop_s"]) for row in rows}
    table = [[rate.get((length, batch), 0) for batch in batches] for length in lengths]
    best = max(rate.values())
    figure, axes = plt.subplots(figsize=(6, 6))
    image = axes.imshow(table, cmap="viridis", vmin=0, aspect="auto")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 0.6 * best else "black")
    axes.set_xticks(range(len(batches)), batches)
    axes.set_yticks(range(len(lengths)), lengths)
    axes.set_xlabel("sequences in the batch")
    axes.set_ylabel("tokens per sequence")
    axes.set_title(f"GFLOP/s of the layers; the limit is {float(rows[0]['limit_gflop_s']):.0f}")
    figure.colorbar(image, label="GFLOP/s")
    figure.tight_layout()
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
