#!/bin/sh
# bench.c: its output formats are right, and bad options are refused.
. tests/tap.sh
bench=$(dirname "$0")/bench
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
out=$(mktemp)
trap 'rm -f "$out" "$out.txt"' EXIT

measure() { "$bench" -p 8 -n 2 -r 1 "$@" >"$out" 2>&1; }
fields() {
    for field in dtype threads depth prefill_tok_s decode_tok_s prefill_mfu decode_mbu load_s peak_mib generate_tok_s; do
        [ "$(grep -c "\"$field\": " "$out")" -eq "$1" ] || return 1
    done
}
refuses() { ! "$bench" "$@" >"$out" 2>&1 && [ -s "$out" ]; }

check "measures types, threads and depths" measure -m "$model" --dtype bf16,int8,int4 -t 1,2 -d 0,40 -o json
check "prints one JSON object for each combination" fields 12
check "csv has a header and one line per thread count" eval 'measure -m "$model" -o csv && [ "$(wc -l <"$out")" -eq 3 ]'
check "defaults to one thread per core, then one more" awk -F, 'NR > 1 { n[NR] = $3 } END { exit n[2] < 1 || n[3] != n[2] + 1 }' "$out"
check "prints a table" eval 'measure -m "$model" -o md -t 2 && [ "$(grep -c "^|" "$out")" -eq 3 ]'
check "measures random weights of a published shape" measure --random smollm2-135m
printf 'one two three one two three one' >"$out.txt"
check "compares drafts" eval 'measure -m "$model" -n 8 --draft lookup,self:int4 "$out.txt" && [ "$(grep -c "^| " "$out")" -eq 4 ]'
check "compares passes of different numbers of rows" eval 'measure --random smollm2-135m --rows 1,2,4 && [ "$(grep -c "^| bf16" "$out")" -eq 3 ]'
check "compares numbers of streams" eval 'measure -m "$model" --dtype int4 -n 4 -b 1,3 && [ "$(grep -c "^| [a-z0-9]* | [0-9]* | [13] |" "$out")" -eq 2 ]'
check "compares texts with and without grammars" eval 'measure -m "$model" --dtype int8 -n 16 --grammars && [ "$(grep -c "^| [A-Za-z ]* | int8 |" "$out")" -eq 3 ]'
check "measures another type of cache" eval 'measure --random smollm2-135m -d 1000 --cache int8 -t 1 -o csv && bytes=$(tail -n 1 "$out" | cut -d, -f11) &&
    measure --random smollm2-135m -d 1000 --cache bf16 -t 1 -o csv && tail -n 1 "$out" | awk -F, -v int8="$bytes" "{ exit !(\$11 > int8 + 8) }"'
check "refuses an unknown type of cache" refuses --random smollm2-135m --cache f16
check "refuses grammars of random weights" refuses --random smollm2-135m --grammars
check "refuses grammars together with streams" refuses -m "$model" --grammars -b 2
check "refuses too many streams" refuses -m "$model" -b 1000
check "refuses a draft without texts" refuses -m "$model" --draft lookup
check "refuses texts without a draft" refuses -m "$model" "$out.txt"
check "refuses a missing text" refuses -m "$model" --draft lookup "$out.absent"
check "refuses an unknown type in self:TYPE" refuses -m "$model" --draft self:int5 "$out.txt"
check "prints a table of batches and lengths" eval '"$bench" -m "$model" --flops-table=8 -o csv >"$out" && [ "$(wc -l <"$out")" -eq 11 ]'
check "refuses an unknown shape" refuses --random gpt5
check "refuses an unknown type" refuses -m "$model" --dtype int5
check "refuses a bad list" refuses -m "$model" -d 0,,1
check "refuses to run without a model" refuses -p 8
finish
