#!/usr/bin/env python3
"""Predicts the speed of ranks: a model of a pass, compared with measurements, and predictions for larger models and clusters.

    scale.py RESULTS.csv                                          prints the tables
    scale.py RESULTS.csv --measure MODEL [--rounds 3]             first measures on this machine, with build/bench, build/hellaswag
                                                                  and the same in build/mpi; LLM_DATA has HellaSwag's questions

A rank is a process with one thread. The parameters come from single processes: the speeds of one process with one thread and with
a thread on each core, the speeds of two programs at the same time, and build/bench's times of the ranks' exchanges, of one byte and
of long messages. Speeds of several ranks are only used for REPLICATED.

DECODING A TOKEN takes the time t1 with one core, and tC with one process on all cores.
    tensor parallel    tC + own t1 + (4 L + 2) meetings, for L layers; own is the part that each rank does itself
    pipeline           t1 + R meetings + the time in which the last of R stages sends the logits to the others

SCORING. Passes have 512 rows; t is the time of a pass on one core while the other cores are busy, too.
    tensor parallel    t (own + (1 - own) / R) + bytes that a rank receives / link + meetings
    pipeline           t times the share of the busiest stage, times (m + R - 1) / m to fill and drain it, for m passes
    data parallel      t / R for each of m passes, and half a pass at the end, when some copies have no questions left

MORE RANKS THAN CORES. In tensor parallel, ranks meet after each phase, so a phase takes ceil(R / cores) turns. A rank that is alone
in the last turn decodes its part at the speed of one core alone. Stages and copies of the model do not wait for each other in this
way; they share the cores evenly."""
import argparse
import csv
import math
import os
import statistics
import subprocess

from extract_and_plot import processor

CORES = 2
# The part of a pass that each rank of a tensor group repeats: norms, and rounding of activations. The numbers are for SMALL, with one
# row and with many. For larger models the part is smaller, because this work grows with n_embd and the rest with its square. The
# numbers were fitted to 2 ranks of SMALL; everything else is predicted.
REPLICATED = {"decode": 0.03, "score": 0.2}
SMALL, LARGE = "smollm2-135m", "tinyllama-1.1b"
SHAPES = {  # n_vocab, n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim
    SMALL: (49152, 30, 576, 1536, 9, 3, 64),
    LARGE: (32000, 22, 2048, 5632, 32, 4, 64),
    "llama2-70b": (32000, 80, 8192, 28672, 64, 8, 128),
}
COLUMNS = ["round", "model", "work", "form", "ranks", "threads", "tok_s", "bandwidth_gb_s", "meeting_us", "link_gb_s",
           "mb_per_token", "passes"]


# ---- Measuring ----------------------------------------------------------------------------------------------------------


def run(program, form, ranks, options):
    """Returns the last line of a program's csv output as {column: text}. Form "one": one process with `ranks` threads."""
    command = [f"build/{program}", "-t", str(ranks)]
    if form != "one":
        command = ["mpirun", "--oversubscribe", "-n", str(ranks), f"build/mpi/{program}", "-t", "1", f"--{form}", str(ranks)]
    environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    done = subprocess.run(command + options + ["-o", "csv"], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True, env=environment)
    return list(csv.DictReader(done.stdout.splitlines()))[-1]


def measure_twins(model):
    """Returns the tokens per second of two independent programs together, each on its own core."""
    command = ["build/hellaswag", "-t", "1", "-m", model, "--limit", "150", "-o", "csv"]
    twins = [subprocess.Popen(["taskset", "-c", str(core)] + command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
             for core in range(CORES)]
    return sum(float(list(csv.DictReader(twin.communicate()[0].splitlines()))[-1]["tok_s"]) for twin in twins)


def measure(path, model, rounds):
    new = not os.path.exists(path)
    with open(path, "a", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            file.write(f"# {processor()}, {CORES} cores\n")
            out.writeheader()
        for number in range(rounds):
            for name, options in ((SMALL, ["-m", model, "--dtype", "file", "-p", "64", "-n", "64", "-r", "3"]),
                                  (LARGE, ["--random", LARGE, "--dtype", "int8", "-p", "16", "-n", "24", "-r", "3"])):
                for form, ranks in [("one", 1), ("one", 2)] + [(form, n) for form in ("tp", "pp") for n in (2, 3, 4)]:
                    r = run("bench", form, ranks, options)
                    out.writerow({"round": number, "model": name, "work": "decode", "form": form, "ranks": ranks,
                                  "threads": r["threads"], "tok_s": r["decode_tok_s"], **{c: r[c] for c in COLUMNS[7:11]}})
            for form, ranks in [("one", 1)] + [(form, n) for form in ("tp", "pp", "dp") for n in (2, 3, 4)]:
                r = run("hellaswag", form, ranks, ["-m", model, "--limit", "150"])
                out.writerow({"round": number, "model": SMALL, "work": "score", "form": form, "ranks": ranks,
                              "threads": 1, "tok_s": r["tok_s"], "passes": r["passes"]})
            out.writerow({"round": number, "model": SMALL, "work": "score", "form": "twins", "ranks": CORES, "threads": 1,
                          "tok_s": measure_twins(model)})
            file.flush()


# ---- The model ----------------------------------------------------------------------------------------------------------

ROWS = 512  # rows of a pass when texts are scored
HEAD_ROWS = 0.65  # the part of HellaSwag's rows that goes through the head


def layer_weights(shape):
    _, _, embd, ff, heads, keys, dim = SHAPES[shape]
    return embd * (2 * heads * dim + 2 * keys * dim + 3 * ff)


def head_weights(shape):
    return SHAPES[shape][0] * SHAPES[shape][2]


def score_weights(shape):
    """Returns the number of weights by which a row is multiplied, on average."""
    return SHAPES[shape][1] * layer_weights(shape) + HEAD_ROWS * head_weights(shape)


def exchanges(shape):
    """Returns the number of meetings in a tensor parallel pass: one for the embedding's rows, four per layer, one for the logits."""
    return 4 * SHAPES[shape][1] + 2


def exchanged(shape, ranks):
    """Returns the bytes that a rank receives per row of a pass from all others: attention, half of the network, the stream twice."""
    _, layers, embd, ff, heads, _, dim = SHAPES[shape]
    return 4 * layers * (heads * dim + ff + 2 * embd) * (ranks - 1) / ranks


def replicated(shape, work):
    return REPLICATED[work] * SHAPES[SMALL][2] / SHAPES[shape][2]


def busiest(shape, stages):
    """Returns the largest share of the work that a stage has. For its cuts the library counts half of the head's weights."""
    layers = SHAPES[shape][1]
    layer, head = layer_weights(shape), head_weights(shape)
    share = (layers + head / 2 / layer) / stages
    ends = [min(int(share * i + 0.5), layers - (stages - i)) for i in range(stages)] + [layers]
    work = [(ends[i + 1] - ends[i]) * layer for i in range(stages)]
    work[-1] += HEAD_ROWS * head
    return max(work) / sum(work)


def decode(m, model, form, ranks):
    """Returns tokens per second. m is the result of best()."""
    one, both = (1 / m[model, "decode", "one", n]["tok_s"] for n in (1, CORES))  # seconds per token
    r = m[model, "decode", form, ranks]
    if form == "pp":
        return 1 / (one + ranks * r["meeting_us"] * 1e-6 + 4e-9 * SHAPES[model][0] * (ranks - 1) / r["link_gb_s"])
    turns, left = divmod(ranks, CORES)  # with two cores at most one rank remains
    own = (turns + left) * replicated(model, "decode") * one
    return 1 / ((turns * CORES * both + left * one) / ranks + own + exchanges(model) * r["meeting_us"] * 1e-6)


def score(m, model, form, ranks):
    n, used = m[model, "score", "one", 1]["passes"], min(ranks, CORES)
    seconds = ROWS * CORES / m[model, "score", "twins", CORES]["tok_s"]
    if form == "tp":
        r, own = m[model, "decode", "tp", ranks], replicated(model, "score")
        seconds *= math.ceil(ranks / CORES) * (own + (1 - own) / ranks)
        seconds += ROWS * exchanged(model, ranks) / (r["link_gb_s"] * 1e9)
        seconds += exchanges(model) * r["meeting_us"] * 1e-6
    elif form == "pp":
        seconds *= (busiest(model, ranks) if ranks <= CORES else 1 / CORES) * (n + ranks - 1) / n
    else:
        seconds *= (n / used + 0.5) / n
    return ROWS / seconds


PARAMETERS = {"one": "1 process, threads: {}", "twins": "{} programs at the same time"}  # forms that are not predicted


# ---- Tables -------------------------------------------------------------------------------------------------------------


def best(path):
    """Returns {(model, work, form, ranks): {column: median}}. Of speeds and bandwidths it takes the best of all rounds, because
    other machines on the same hardware only slow this one down."""
    groups, result = {}, {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            groups.setdefault((row["model"], row["work"], row["form"], int(row["ranks"])), []).append(row)
    for key, rows in groups.items():
        result[key] = {c: statistics.median(float(row[c]) for row in rows) for c in COLUMNS[6:] if rows[0][c]}
        for c in {"tok_s", "bandwidth_gb_s"} & result[key].keys():
            result[key][c] = max(float(row[c]) for row in rows)
    return result


def compare(m):
    print("| model | work | | predicted tok/s | measured | |\n| --- | --- | --- | ---: | ---: | ---: |")
    worst = 0.0
    for (model, work, form, ranks), r in m.items():
        if form in PARAMETERS:
            print(f"| {model} | {work} | {PARAMETERS[form].format(ranks)} | | {r['tok_s']:.1f} | |")
            continue
        predicted = (decode if work == "decode" else score)(m, model, form, ranks)
        error = predicted / r["tok_s"] - 1
        worst = max(worst, abs(error))
        print(f"| {model} | {work} | {form} {ranks} | {predicted:.1f} | {r['tok_s']:.1f} | {round(100 * error):+d} % |")
    print(f"\nThe largest error is {100 * worst:.0f} %.\n")


BIG = "llama2-70b"
BYTES_PER_WEIGHT = 5 / 8  # 4 bits, and two 16-bit numbers per 32 weights
CLUSTERS = {  # cores, bytes/s of memory, bytes/s of the link, seconds per meeting, and for each further rank in it
    "2 cores as here, 10 Gbit/s, 30 us": (2, None, 1.25e9, 30e-6, 2e-6),
    "64 cores, 400 GB/s, 100 Gbit/s, 3 us": (64, 400e9, 12.5e9, 3e-6, 0.5e-6),
}


def predict(m):
    """Predicts Llama-2-70B on clusters. Reading a weight takes its bytes / bandwidth. The other work per weight is that of LARGE in
    decoding, and that of SMALL in scoring."""
    weights = SHAPES[BIG][1] * layer_weights(BIG) + head_weights(BIG)
    one = m[LARGE, "decode", "one", 1]
    per_weight = (1 / one["tok_s"] - one["mb_per_token"] * 1e-3 / one["bandwidth_gb_s"]) / (
        SHAPES[LARGE][1] * layer_weights(LARGE) + head_weights(LARGE))
    row = score_weights(BIG) / score_weights(SMALL) / m[SMALL, "score", "one", 1]["tok_s"]  # seconds on one core
    for name, (cores, bandwidth, link, latency, message) in CLUSTERS.items():
        bandwidth = bandwidth or m[LARGE, "decode", "one", 2]["bandwidth_gb_s"] * 1e9
        alone = weights * (BYTES_PER_WEIGHT / bandwidth + per_weight / cores)
        print(f"{name}:\n\n| machines | GB each | decode tp tok/s | decode pp tok/s | scoring tp tok/s | scoring pp tok/s |")
        print("| ---: " * 6 + "|")
        for n in (1, 2, 4, 8, 16, 32, 64):
            meeting = latency + (n - 2) * message if n > 1 else 0.0
            own = (replicated(BIG, "decode"), replicated(BIG, "score")) if n > 1 else (0, 0)
            tp = alone * (own[0] + (1 - own[0]) / n) + exchanges(BIG) * meeting + exchanged(BIG, n) / link
            pp = alone + (n - 1) * (latency + 4 * SHAPES[BIG][2] / link) + (n > 1) * 4 * SHAPES[BIG][0] / link
            work = ROWS * row / cores
            tp_score = work * (own[1] + (1 - own[1]) / n)
            tp_score += ROWS * exchanged(BIG, n) / link + exchanges(BIG) * meeting
            pp_score = max(work * busiest(BIG, n), (n > 1) * ROWS * 4 * SHAPES[BIG][2] / link)
            print(f"| {n} | {weights * BYTES_PER_WEIGHT / n * 1e-9:.1f} | {1 / tp:.2f} | {1 / pp:.2f} | "
                  f"{ROWS / tp_score:.0f} | {ROWS / pp_score:.0f} |")
        print("\n| 10,042 questions on 1,000 machines | copies | s |\n| --- | ---: | ---: |")
        for stages in (1, 2, 4, 8, 16):
            copies = 1000 // stages
            passes = math.ceil(10042 / copies) * 1636328 / 10042 / ROWS
            seconds = (passes + stages - 1) * ROWS * row / cores * busiest(BIG, stages)
            print(f"| pipelines of {stages} | {copies} | {seconds:.0f} |")
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="RESULTS.csv")
    parser.add_argument("--measure", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.measure:
        measure(options.results, options.measure, options.rounds)
    m = best(options.results)
    compare(m)
    predict(m)


if __name__ == "__main__":
    main()
