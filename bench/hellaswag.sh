#!/bin/sh
# Runs HellaSwag with every schedule and prints a table:  bench/hellaswag.sh MODEL [--limit N] [other options of build/hellaswag]
# The rows go from the baseline to the packed schedule. MFU counts only the necessary operations. Waste is the share of the
# computed tokens that were not needed. The last column says whether all log-likelihoods have the same bits as with the packed
# schedule.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: bench/hellaswag.sh MODEL [--limit N]" >&2; exit 1; }
model=$1
shift
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

row() { # NAME OPTIONS...
    name=$1
    shift
    rm -f "$dir/answers"
    build/hellaswag -m "$model" -o csv --results "$dir/answers" "$@" >"$dir/csv"
    sort "$dir/answers" >"$dir/sorted"
    [ -f "$dir/first" ] || cp "$dir/sorted" "$dir/first"
    same=no
    ! cmp -s "$dir/sorted" "$dir/first" || same=yes
    awk -F, -v name="$name" -v same="$same" 'NR == 2 {
        printf "| %s | %.1f | %d | %.1f %% | %.0f | %.0f %% | %.2f | %.2f | %s |\n", name, $4, $6, 100 * ($7 + $8) / $6, $11, 100 * $12, $2, $3, same
    }' "$dir/csv" >>"$dir/table"
}

row "packed" --schedule packed "$@"
row "dp + shared context" --schedule dp "$@"
row "dp" --schedule dp --no-share "$@"
row "fixed(32)" --schedule fixed:32 --no-share "$@"
row "one at a time without cache" --schedule fixed:1 --no-share "$@"
echo "| schedule | s | tokens computed | waste | tokens/s | MFU | acc | acc_norm | same bits |"
echo "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
tac "$dir/table"
