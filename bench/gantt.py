#!/usr/bin/env python3
"""Shows when the stages of a pipeline wait:  bench/gantt.py TRACE [PICTURE]

TRACE is a file written by build/mpi/hellaswag --trace. Its lines have the rank, the begin and end of a wait in seconds, and the
reason (rows of the previous stage, results of the last stage, or room to send). Prints how long each stage waits. Stages with
less work must wait for others, so the bubbles of the pipeline are the waits of the busiest stage. Filling and draining alone
would leave it idle for (p - 1) / (m + p - 1) of the time, with p stages and m equal passes. Given PICTURE, draws a Gantt chart,
which needs matplotlib."""
import csv
import sys


def read(path):
    """Returns {rank: [(begin, end), ...]} in seconds since the first wait, the end of the last wait, and the number of passes."""
    waits, passes = {}, {}
    with open(path, newline="") as file:
        for rank, begin, end, what in csv.reader(file):
            waits.setdefault(int(rank), []).append((float(begin), float(end)))
            passes[int(rank)] = passes.get(int(rank), 0) + (what == "rows")
    start = min(w[0][0] for w in waits.values())
    end = max(w[-1][1] for w in waits.values()) - start
    return {rank: [(b - start, e - start) for b, e in w] for rank, w in sorted(waits.items())}, end, max(passes.values())


def idle(waits, begin, end):
    """Returns the share of the time from begin to end that is spent waiting."""
    return sum(max(0.0, min(e, end) - max(b, begin)) for b, e in waits) / (end - begin)


def draw(waits, end, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 0.6 * len(waits) + 1.2), constrained_layout=True)
    for rank, spans in waits.items():
        axes.broken_barh([(0, end)], (rank - 0.4, 0.8), color="tab:blue")
        axes.broken_barh([(b, e - b) for b, e in spans], (rank - 0.4, 0.8), color="white", linewidth=0)
    axes.set_yticks(list(waits), [f"stage {rank}" for rank in waits])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("s; white: waits for another stage")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    waits, end, m = read(sys.argv[1])
    p = len(waits)
    shares = {rank: idle(spans, 0, end) for rank, spans in waits.items()}
    for rank, spans in waits.items():
        print(f"stage {rank}: idle {100 * shares[rank]:.1f} %, in the middle 80 % of the time {100 * idle(spans, 0.1 * end, 0.9 * end):.1f} %")
    least, fill = min(shares.values()), (p - 1) / (m + p - 1)
    print(f"{m} passes: the busiest stage is idle for {100 * least:.2f} %; filling and draining take {100 * fill:.2f} %, "
          f"the difference is {100 * (least - fill):+.2f} %")
    if len(sys.argv) == 3:
        draw(waits, end, sys.argv[2])


if __name__ == "__main__":
    main()
