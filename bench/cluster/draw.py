#!/usr/bin/env python3
"""Makes a table and a picture from the results of bench/cluster/network.sh:  draw.py network.csv [network.png]

The table goes to standard output. The picture, which needs matplotlib, shows tokens per second over the network's delay, and a
line for one host alone. Where a curve is below this line, two hosts are slower than one."""
import csv
import sys

COLOURS = {"tp": "#d1495b", "pp": "#30638e"}
NAMES = {"tp": "tensor parallel", "pp": "pipeline"}


def read(path):
    """Returns the rates of one host alone, and {(delay, mbit): {"trip": us, "tp": (decode, prefill), "pp": ...}}."""
    alone, settings = (0.0, 0.0), {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            rates = float(row["decode_tok_s"]), float(row["prefill_tok_s"])
            if row["ranks"] == "alone":
                alone = rates
                continue
            setting = settings.setdefault((float(row["delay_us"]), float(row["mbit_s"])), {"trip": row["round_trip_us"]})
            setting[row["ranks"]] = rates
    return alone, settings


def table(alone, settings):
    print(f"One host alone: decode {alone[0]:.1f} tok/s, prompt {alone[1]:.0f} tok/s. Of two hosts:\n")
    print("| Gbit/s | delay us | ping us | decode tp 2 | x | decode pp 2 | x | prompt tp 2 | x | prompt pp 2 | x |")
    print("| ---: " * 11 + "|")
    for (delay, mbit), setting in settings.items():
        cells = [f"{mbit / 1000:g}", f"{delay:g}", setting["trip"]]
        for i, form in enumerate(("{:.1f}", "{:.0f}")):
            for ranks in ("tp", "pp"):
                cells += [form.format(setting[ranks][i]), f"{setting[ranks][i] / alone[i]:.2f}"]
        print("| " + " | ".join(cells) + " |")


def picture(alone, settings, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    delays = sorted({delay for delay, _ in settings})
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for i, (axes, title) in enumerate(zip(panels, ("decoding", "a prompt"))):
        axes.axhline(alone[i], color="#555555", linestyle=":", label="one host alone")
        for mbit in sorted({mbit for _, mbit in settings}):
            for ranks, colour in COLOURS.items():
                at = [delay for delay in delays if (delay, mbit) in settings]
                rates = [settings[delay, mbit][ranks][i] for delay in at]
                axes.plot([delays.index(delay) for delay in at], rates, color=colour, marker="o", markersize=4,
                          linestyle="-" if mbit >= 10000 else "--", label=f"{NAMES[ranks]}, {mbit / 1000:g} Gbit/s")
        axes.set_xticks(range(len(delays)), [f"{delay:g} us" for delay in delays])
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("delay of the network, one way")
        axes.grid(axis="y", which="both", color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens per second")
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main():
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    alone, settings = read(sys.argv[1])
    table(alone, settings)
    if len(sys.argv) == 3:
        picture(alone, settings, sys.argv[2])


if __name__ == "__main__":
    main()
