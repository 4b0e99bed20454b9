#!/usr/bin/env python3
"""When the stages of a pipeline wait:  bench/gantt.py TRACE [PICTURE]

TRACE is what build/mpi/hellaswag --trace wrote: lines of rank, begin and end of a wait. Prints each rank's idle share, of
the whole run and of its middle, without the first and the last tenth; draws a Gantt chart if a picture is named."""
import csv
import sys


def read(path):
    """{rank: [(begin, end), ...]} in seconds from the first wait, and the end of the last."""
    waits = {}
    with open(path, newline="") as file:
        for rank, begin, end in csv.reader(file):
            waits.setdefault(int(rank), []).append((float(begin), float(end)))
    start = min(w[0][0] for w in waits.values())
    end = max(w[-1][1] for w in waits.values()) - start
    return {rank: [(b - start, e - start) for b, e in w] for rank, w in sorted(waits.items())}, end


def idle(waits, begin, end):
    """The share of the time from begin to end that is waits."""
    return sum(max(0.0, min(e, end) - max(b, begin)) for b, e in waits) / (end - begin)


def draw(waits, end, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 0.6 * len(waits) + 1.2), constrained_layout=True)
    for rank, spans in waits.items():
        axes.broken_barh([(0, end)], (rank - 0.4, 0.8), color="tab:blue")
        axes.broken_barh([(b, e - b) for b, e in spans], (rank - 0.4, 0.8), color="white")
    axes.set_yticks(list(waits), [f"stage {rank}" for rank in waits])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("s; white: waits for another stage")
    figure.savefig(path, dpi=120)


def main():
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    waits, end = read(sys.argv[1])
    for rank, spans in waits.items():
        print(f"rank {rank}: idle {100 * idle(spans, 0, end):.1f} %, in the middle {100 * idle(spans, 0.1 * end, 0.9 * end):.1f} %")
    if len(sys.argv) == 3:
        draw(waits, end, sys.argv[2])


if __name__ == "__main__":
    main()
