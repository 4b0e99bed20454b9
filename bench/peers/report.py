#!/usr/bin/env python3
"""Prints the medians of bench/peers/cpu.py's measurements as a Markdown table, and draws them as bars with the machine's limits.

    pip install matplotlib
    report.py RESULTS.csv PLOT.png
"""
import collections
import csv
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {"bf16": "bf16", "q8_0": "8 bits (Q8_0)", "q6_k": "6 bits (Q6_K)", "q5_k_m": "5 bits (Q5_K_M)",
         "q4_1": "4 bits (Q4_1)", "q4_0": "4 bits (Q4_0)", "model": "the file's own"}
COLOURS = {"llm.h": "#d1495b", "llama.cpp": "#30638e", "ik_llama.cpp": "#4f9d69", "ik_llama.cpp repacked": "#a3c9a8",
           "OpenVINO GenAI": "#8d99ae"}


def read(path):
    """Returns the machine, and {column: {(program, weights): median}}. Limits are the rates that llm.h would reach with the
    machine's full bandwidth or multiplication rate, which build/bench measures in the same run."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        key = row["program"], row["weights"]
        for column, limit, share in (("decode_tok_s", "decode_limit", "decode_mbu"),
                                     ("prefill_tok_s", "prefill_limit", "prefill_mfu")):
            values[column][key].append(float(row[column]))
            if row[share]:
                values[limit][key].append(float(row[column]) / float(row[share]))
    medians = {column: {key: statistics.median(list_) for key, list_ in table.items()} for column, table in values.items()}
    return lines[0].lstrip("# "), medians


def table(medians):
    print("| weights | program | prefill tok/s | llm.h is | decode tok/s | llm.h is | of llm.h's limit |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for weights in NAMES:
        for program in COLOURS:
            key = program, weights
            if key not in medians["decode_tok_s"]:
                continue
            prefill, decode = medians["prefill_tok_s"][key], medians["decode_tok_s"][key]
            ratios = [medians[column]["llm.h", weights] / medians[column][key] for column in ("prefill_tok_s", "decode_tok_s")]
            times = ["" if program == "llm.h" else f"{ratio:.2f}x" for ratio in ratios]
            print(f"| {NAMES[weights]} | {program} | {prefill:,.0f} | {times[0]} | {decode:.0f} | {times[1]} | "
                  f"{decode / medians['decode_limit']['llm.h', weights]:.0%} |")


def bars(axes, medians, column, limit, title, limit_name):
    kinds = [weights for weights in NAMES if ("llm.h", weights) in medians[column]]
    programs = [program for program in COLOURS if any((program, weights) in medians[column] for weights in kinds)]
    step = 0.81 / len(programs)
    for i, program in enumerate(programs):
        drawn_kinds = [(x, weights) for x, weights in enumerate(kinds) if (program, weights) in medians[column]]
        at = [x + (i - (len(programs) - 1) / 2) * step for x, _ in drawn_kinds]
        heights = [medians[column][program, weights] for _, weights in drawn_kinds]
        drawn = axes.bar(at, heights, width=step * 0.93, color=COLOURS[program], label=program)
        axes.bar_label(drawn, [f"{height:.0f}" for height in heights], fontsize=8, padding=3, zorder=3,
                       rotation=90 if len(programs) > 3 else 0, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})
    axes.set_xticks(range(len(kinds)), [NAMES[weights].replace(" (", "\n(") for weights in kinds])
    for x, weights in enumerate(kinds):
        axes.hlines(medians[limit]["llm.h", weights], x - 0.4, x + 0.4, colors="black", linestyles="dashed",
                    label=None if x else limit_name)
    axes.margins(y=0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3, frameon=False, fontsize=8)
    axes.set_ylabel("tokens per second")
    axes.set_title(title)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main(source, target):
    machine, medians = read(source)
    table(medians)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4))
    bars(left, medians, "decode_tok_s", "decode_limit", "Decode", "llm.h's limit: its weights and cache only read")
    bars(right, medians, "prefill_tok_s", "prefill_limit", "Prefill", "llm.h's limit: the measured rate of multiplication")
    figure.text(0.5, 0.01, machine, ha="center", fontsize=7, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
