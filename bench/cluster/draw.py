#!/usr/bin/env python3
"""A table and a picture of bench/cluster/network.sh:  draw.py network.csv network.svg

The table goes to standard output. The picture has tokens per second over the network's delay, and a line for one host alone:
where a curve falls below it, more hosts are slower than one."""
import csv
import math
import sys

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 60, 20, 190, 50
COLOURS = {"tp": "#d1495b", "pp": "#30638e"}
NAMES = {"tp": "tensor parallel", "pp": "pipeline"}


def read(path):
    """Rates of one host alone, and {(delay, mbit): {"trip": us, "tp": (decode, prefill), "pp": ...}}."""
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
    delays = sorted({delay for delay, _ in settings})
    rates = [setting[ranks][0] for setting in settings.values() for ranks in COLOURS] + [alone[0]]
    low, high = math.log10(min(rates)) - 0.1, math.log10(max(rates)) + 0.1

    def x(delay):
        return LEFT + (WIDTH - LEFT - RIGHT) * (delays.index(delay) + 0.5) / len(delays)

    def y(rate):
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(rate)) / (high - low)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for rate in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if low <= math.log10(rate) <= high:
            out.append(f'<path d="M{LEFT} {y(rate):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                       f'<text x="{LEFT - 6}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate}</text>')
    for delay in delays:
        out.append(f'<text x="{x(delay):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{delay:g} us</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">delay of the network, one way</text>'
               f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
               f'tokens per second, decoding</text>')
    labels = [(y(alone[0]), "one host alone", "#555")]
    out.append(f'<path d="M{LEFT} {y(alone[0]):.1f}H{WIDTH - RIGHT}" stroke="#555" stroke-dasharray="2 3"/>')
    for mbit in sorted({mbit for _, mbit in settings}):
        for ranks, colour in COLOURS.items():
            points = [(x(delay), y(settings[delay, mbit][ranks][0])) for delay in delays if (delay, mbit) in settings]
            dash = "" if mbit >= 10000 else ' stroke-dasharray="6 4"'
            out.append(f'<path d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in points)}" fill="none" stroke="{colour}" '
                       f'stroke-width="2"{dash}/>')
            labels.append((points[-1][1], f"{NAMES[ranks]}, {mbit / 1000:g} Gbit/s", colour))
    at = 0.0
    for place, text, colour in sorted(labels):
        at = max(at + 15, place)  # labels do not cover each other
        out.append(f'<text x="{WIDTH - RIGHT + 6}" y="{at + 4:.1f}" fill="{colour}">{text}</text>')
    with open(path, "w") as file:
        file.write("\n".join(out + ["</svg>\n"]))


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    alone, settings = read(sys.argv[1])
    table(alone, settings)
    picture(alone, settings, sys.argv[2])


if __name__ == "__main__":
    main()
