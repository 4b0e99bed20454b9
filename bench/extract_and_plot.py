#!/usr/bin/env python3
"""Prints a table of the speeds in log files of language models, and draws it.

    extract_and_plot.py A.out B.out ... [--to PREFIX] [--readme README.md]

Each file is the output of one run; the first is the reference for the others. The script reads the lines "Average
tokens/sec", "Bandwidth achieved" and "Memory used", which gpt-fast and the programs of examples/walkthrough print. A file
name that Slurm made, such as gpt-fast-compile-488364.out, gives the name "compile".

--to draws PREFIX-bars (memory, bandwidth and tokens per second, with the change from the first run), PREFIX-pairs (each
run next to the previous one) and, if the files have bytes and operations, PREFIX-roofline: as .png, or as .svg with --svg.
It needs matplotlib (pip install matplotlib). --readme writes the table and the figures in the headings into that file."""
import argparse
import os
import re
import statistics
import sys

COLOURS = ["#30638e", "#4a8f5b", "#d1495b", "#8661a5", "#e08e45", "#3a9fa5", "#8d99ae", "#b5838d"]
NUMBER = r":?\s*([0-9.]+)"
LINES = {  # name of a figure: the words before the number, and the function that combines several numbers
    "speed": (r"Average tokens/sec", statistics.mean),
    "bandwidth": (r"Bandwidth achieved", statistics.mean),
    "memory": (r"Memory used", max),
    "limit": (r"Bandwidth measured", max),
    "rate": (r"Rate measured", max),
    "bytes": (r"Bytes per token", max),
    "operations": (r"Operations per token", max),
    "prefill": (r"Prefill of \d+ tokens", max),
    "perplexity": (r"Perplexity of \d+ tokens", max),
}


def read(path):
    """Reads a file: {name of a figure: number, or None if the file does not have it}."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    run = {}
    for name, (words, join) in LINES.items():
        found = [float(number) for number in re.findall(words + NUMBER, text)]
        run[name] = join(found) if found else None
    step = re.search(r"^Step: (.*)$", text, re.M)
    file_name = os.path.splitext(os.path.basename(path))[0]
    run["key"] = file_name
    run["label"] = step.group(1) if step else re.sub(r"-\d+$", "", re.sub(r"^gpt-fast-", "", file_name))
    device = re.search(r"^Using device=(.*)$", text, re.M)
    run["device"] = device.group(1) if device else "unknown"
    return run


def share(run):
    """Returns the share of the measured bandwidth that the run used, or None if it is not known."""
    if not (run["bytes"] and run["speed"] and run["limit"]):
        return None
    return run["bytes"] * run["speed"] / (run["limit"] * 1e9)


# ---- Pictures -----------------------------------------------------------------------------------------------------------


def save(figure, name):  # the ending of the name gives the format
    figure.savefig(name, dpi=120, bbox_inches="tight")


def bars(plt, runs, name):
    """Three bar charts, one below the other. If a run did not print a figure, its place is empty."""
    figure, axes = plt.subplots(3, 1, figsize=(max(6, 0.95 * len(runs) + 1), 10), sharex=True)
    for axis, (key, title) in zip(axes, (("memory", "Memory used (GB)"), ("bandwidth", "Bandwidth achieved (GB/s)"),
                                         ("speed", "Average tokens per second"))):
        heights = [run[key] or 0 for run in runs]
        drawn = axis.bar(range(len(runs)), heights, color=[COLOURS[i % len(COLOURS)] for i in range(len(runs))])
        texts = []
        for i, height in enumerate(heights):
            change = "" if i == 0 or not (height and heights[0]) else f"\n{100 * (height / heights[0] - 1):+.0f} %"
            texts.append(f"{height:.3g}{change}" if height else "")
        axis.bar_label(drawn, texts, fontsize=8, padding=2)
        axis.set_ylim(0, max(heights) * 1.25 or 1)
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(runs)), [run["label"] for run in runs], rotation=35, ha="right", fontsize=9)
    save(figure, name)


def couples_of(runs, readme):
    """Returns pairs (old, new): those that the README's chapters compare, or each run with the previous one."""
    if not readme:
        return list(zip(runs, runs[1:]))
    by_key = {run["key"]: run for run in runs}
    with open(readme, encoding="utf-8") as file:
        found = re.findall(r"<!-- step (\S+) after (\S+) -->", file.read())
    return [(by_key[old], by_key[new]) for new, old in found if old in by_key and new in by_key]


def pairs(plt, couples, name):
    """Draws a panel for each pair of runs."""
    columns = min(4, len(couples))
    lines = -(-len(couples) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3 * columns, 2.6 * lines), squeeze=False)
    for axis, (old, new) in zip(axes.flat, couples):
        drawn = axis.bar([old["label"], new["label"]], [old["speed"] or 0, new["speed"] or 0], color=["#8d99ae", "#d1495b"])
        axis.bar_label(drawn, fmt="%.3g", fontsize=8)
        factor = f"{new['speed'] / old['speed']:.2f}x" if old["speed"] and new["speed"] else ""
        axis.set_title(factor, fontsize=10)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(couples):]:
        axis.axis("off")
    figure.supylabel("tokens per second", fontsize=9)
    figure.tight_layout()
    save(figure, name)


def roofline(plt, runs, name):
    """Draws operations per second over operations per byte. Below the slope, a run is limited by memory; below the flat roof,
    by arithmetic."""
    known = [run for run in runs if share(run) and run["operations"]]
    if not known:
        return
    slowest, bandwidth = min(run["limit"] for run in known), max(run["limit"] for run in known)
    rate = max(run["rate"] or 0 for run in known)
    figure, axis = plt.subplots(figsize=(10, 6))
    places = [(run["operations"] / run["bytes"], run["operations"] * run["speed"] / 1e9) for run in known]
    left, right = min(x for x, y in places) / 2, 4 * max(rate / slowest, max(x for x, y in places))
    at = [left, rate / bandwidth, rate / slowest, right]
    axis.fill_between(at, [min(x * slowest, rate) for x in at], [min(x * bandwidth, rate) for x in at], color="#d9d9d9")
    axis.plot(at, [min(x * bandwidth, rate) for x in at], color="black", linewidth=1.5)
    memory = f"memory: {slowest:.0f} to {bandwidth:.0f} GB/s"
    axis.annotate(memory, (1, 1.1 * bandwidth), fontsize=9, ha="right")
    axis.annotate(f"arithmetic: {rate:.0f} GFLOP/s", (right, rate * 1.1), fontsize=9, ha="right")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(min(y for x, y in places) / 2, rate * 2)
    labels = []  # positions of the letters in points; a letter that would cover another moves to the right
    for i, (run, (x, y)) in enumerate(zip(known, places)):
        letter = chr(ord("a") + i) if i < 26 else str(i)
        axis.plot(x, y, "o", markersize=5, color=COLOURS[i % len(COLOURS)], label=f"{letter}  {run['label']}: {share(run):.0%}")
        dot_x, dot_y = axis.transData.transform((x, y)) * 72 / figure.dpi
        offset = 5
        while any(abs(dot_x + offset - a) < 8 and abs(dot_y - b) < 9 for a, b in labels):
            offset += 1
        labels.append((dot_x + offset, dot_y))
        axis.annotate(letter, (x, y), xytext=(offset, -3), textcoords="offset points", fontsize=9)
    axis.set_xlabel("operations for each byte that is read")
    axis.set_ylabel("GFLOP/s")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="part of its own bandwidth", title_fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, name)


# ---- The README ---------------------------------------------------------------------------------------------------------


def figure(value, digits=1):
    return "" if value is None else f"{value:,.{digits}f}"


def table(runs):
    lines = ["| step | tok/s | × | MB read per token | GB/s | MBU | memory GB | prefill tok/s | perplexity |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for run in runs:
        lines.append(
            f"| {run['label']} | {figure(run['speed'])} | {figure(run['speed'] / runs[0]['speed'])} | "
            f"{figure(run['bytes'] and run['bytes'] / 1e6, 0)} | {figure(run['bandwidth'])} | "
            f"{'' if share(run) is None else format(100 * share(run), '.0f') + ' %'} | {figure(run['memory'], 2)} | "
            f"{figure(run['prefill'], 0)} | {figure(run['perplexity'], 2)} |")
    limits = [run["limit"] for run in runs if run["limit"]]
    if limits:
        lines.append(f"\nMachine: {processor()}, {runs[0]['device']}. Bandwidth measured with each step: {min(limits):.0f} to "
                     f"{max(limits):.0f} GB/s. The GPU's figures are in a separate table below.")
    return "\n".join(lines)


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"model name\s*:\s*(.*)", file.read()).group(1)
    except (OSError, AttributeError):
        return "unknown processor"


def heading(match, runs):
    """Writes the figures of two runs after the colon of '## 3 Name: ...', the line after '<!-- step NEW after OLD -->'."""
    new, old = runs.get(match.group(2)), runs.get(match.group(3))
    if not (new and new["speed"]):
        return match.group(0)
    before = f"{old['speed']:.3g} → " if old and old["speed"] else ""
    of_limit = "" if share(new) is None else f", {100 * share(new):.0f} % of the limit"
    return f"{match.group(1)}{match.group(4)}: {before}{new['speed']:.3g} tok/s{of_limit}"


def put(path, text, name, new):
    """Returns the text with `new` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        sys.exit(f"{path} has no lines {begin.strip()} and {end}")
    return text[:text.index(begin)] + begin + new.strip() + "\n" + text[text.index(end):]


def write_readme(path, runs, scoring):
    with open(path, encoding="utf-8") as file:
        text = put(path, file.read(), "table", table(runs))
    if scoring:
        with open(scoring, encoding="utf-8") as file:
            text = put(path, text, "scoring", file.read())
    by_key = {run["key"]: run for run in runs}
    text = re.sub(r"(<!-- step (\S+) after (\S+) -->\n)(## [^:\n]*):.*", lambda match: heading(match, by_key), text)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="A.out")
    parser.add_argument("--to", metavar="PREFIX", help="draw PREFIX-bars, PREFIX-pairs and PREFIX-roofline")
    parser.add_argument("--svg", action="store_true", help="draw .svg files instead of .png")
    parser.add_argument("--readme", metavar="FILE", help="write the table and the headings' figures into this file")
    parser.add_argument("--scoring", metavar="FILE", help="a table from bench/hellaswag.sh, which --readme also inserts")
    options = parser.parse_args()
    runs = [read(path) for path in options.files]
    missing = [run["key"] for run in runs if not run["speed"]]
    if missing:
        sys.exit(f"no line \"Average tokens/sec\" in {', '.join(missing)}")
    if options.readme:
        write_readme(options.readme, runs, options.scoring)
    else:
        print(table(runs))
    if options.to:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        ending = "svg" if options.svg else "png"
        bars(plt, runs, f"{options.to}-bars.{ending}")
        couples = couples_of(runs, options.readme)
        if couples:
            pairs(plt, couples, f"{options.to}-pairs.{ending}")
        roofline(plt, runs, f"{options.to}-roofline.{ending}")


if __name__ == "__main__":
    main()
