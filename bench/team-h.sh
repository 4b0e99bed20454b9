#!/bin/sh
# Repeats Table 2 of Team H's report (Samsung Computer Engineering Challenge 2023, round 1) with N processes, and adds our own
# schedules:  bench/team-h.sh MODEL N [--limit QUESTIONS] [other options of build/mpi/hellaswag]
# Team H used LLaMA-30B on 4 V100; the table has their seconds and ours. Ratios are relative to row A. Idle is the mean over the
# stages of the share of time in which a stage waits for another. --threads 1 gives each process one core. If matplotlib is
# installed, the pipeline of row 1 is drawn to build/team-h.png.
set -eu
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: bench/team-h.sh MODEL N [--limit QUESTIONS]" >&2; exit 1; }
model=$1 n=$2
shift 2
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

row() { # ID THEIR_SECONDS WHAT OPTIONS...
    id=$1 theirs=$2 what=$3
    shift 3
    rm -f "$dir/answers" "$dir/trace"
    mpirun --oversubscribe -n "$n" build/mpi/hellaswag -m "$model" -o csv --results "$dir/answers" --trace "$dir/trace" "$@" >"$dir/csv"
    idle=- # without a pipeline there is no trace
    [ ! -s "$dir/trace" ] || idle=$(awk -F, -v n="$n" 'NR == FNR { waited += $3 - $2; next } FNR == 2 { printf "%.1f %%", 100 * waited / n / $4 }' \
        "$dir/trace" "$dir/csv")
    [ "$id" != 1 ] || cp "$dir/trace" "$dir/drawn"
    sort "$dir/answers" >"$dir/sorted"
    [ -f "$dir/first" ] || cp "$dir/sorted" "$dir/first"
    same=yes
    cmp -s "$dir/sorted" "$dir/first" || same=no
    [ "$id" != G ] || same=- # without labels the texts differ
    awk -F, -v id="$id" -v theirs="$theirs" -v what="$what" -v same="$same" -v idle="$idle" 'NR == 2 {
        printf "%s;%s;%s;%.1f;%s;%.1f;%.2f;%s\n", id, what, theirs, $4, idle, 100 * ($7 + $8) / $6, $3, same
    }' "$dir/csv" >>"$dir/table"
}

row A 2840.4 "tensor parallel, fixed(32)" --tp "$n" --batch 4096 --schedule fixed:32 --no-share "$@"
row B 1121.6 "pipeline, fixed(32)" --pp "$n" --batch 4096 --schedule fixed:32 --no-share "$@"
row C 849.9 "pipeline, dp" --pp "$n" --batch 4096 --schedule dp --no-share "$@"
row D 518.9 "shared contexts, fixed(128) and fixed(32)" --pp "$n" --batch 4096 --schedule fixed:32,128 "$@"
row E 511.1 "shared contexts, dp and fixed(32)" --pp "$n" --batch 4096 --schedule dp --ending-batch 32 "$@"
row F 507.9 "shared contexts, dp and dp" --pp "$n" --batch 4096 --schedule dp "$@"
row G 492.5 "the same without activity label" --pp "$n" --batch 4096 --schedule dp --no-label "$@"
row H 480.1 "F with contexts in mini-batches" --pp "$n" --batch 4096 --schedule dp --mini-batch 512 "$@"
row 1 - "ours: packed, pipeline" --pp "$n" --schedule packed "$@"
row 2 - "ours: packed, data parallel" --dp "$n" --schedule packed "$@"
echo "| | | Team H s | ratio | s | ratio | idle | waste | acc_norm | same bits |"
echo "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
awk -F';' 'NR == 1 { theirs = $3; ours = $4 } {
    printf "| %s | %s | %s | %s | %s | %.2f | %s | %s %% | %s | %s |\n", $1, $2, $3, $3 == "-" ? "-" : sprintf("%.2f", theirs / $3), $4, ours / $4, $5, $6, $7, $8
}' "$dir/table"
if python3 -c 'import matplotlib' 2>/dev/null; then python3 bench/gantt.py "$dir/drawn" build/team-h.png; fi
