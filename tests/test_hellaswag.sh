#!/bin/sh
# hellaswag.c: results for invented questions, stopping and resuming, and bad input.
. tests/tap.sh
hellaswag=$(dirname "$0")/hellaswag
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
data=tests/hellaswag.jsonl
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
log=$dir/log out=$dir/out

score() { "$hellaswag" -m "$model" -d $data "$@" >"$out" 2>"$log"; }
refuses() {
    word=$1
    shift
    ! "$hellaswag" "$@" >"$out" 2>"$log" && grep -q -- "$word" "$log"
}

# The accuracies must be those of the golden file, from the LM evaluation harness and a float64 forward pass.
golden() { tail -n 1 tests/golden/hellaswag.golden | sed 's/.*"'"$1"'": \([0-9.]*\).*/\1/'; }
agrees() { score -o csv --results "$dir/all" && [ "$(sed -n 2p "$out" | cut -d, -f1-3)" = "$(printf '20,%.2f,%.2f' "$(golden acc)" "$(golden acc_norm)")" ]; }
padded_and_redundant() { sed -n 2p "$out" | cut -d, -f7-8; }

# A question in llama.cpp's format: six lines, with a context that is cleaned already.
lines() {
    echo 'Rowing: Four rowers carry a long boat over their heads to the river. They lower it carefully into the water. They'
    printf '%s\n' 2 'climb in one after the other and fall asleep on the ceiling.' 'climb a tree and wait for the boat to come up.' \
        'climb in one after the other and push off from the bank.' 'sell the river to a man in a hat.'
}
answers() { grep '^[0-9]' "$1" | sort -n; }
same_answers() { [ "$(answers "$dir/$1")" = "$(answers "$dir/all" | head -n "$2")" ]; }
resumes() {
    head -c "$(($(wc -c <"$dir/all") - 70))" "$dir/all" >"$dir/cut" # as if killed in the middle of a line
    score -o csv --results "$dir/cut" && [ "$(sed -n 2p "$out" | cut -d, -f1-3)" = "$(printf '20,%.2f,%.2f' "$(golden acc)" "$(golden acc_norm)")" ] &&
        [ "$(sed -n 2p "$out" | cut -d, -f6)" -lt 500 ] && same_answers cut 20
}
n_answers() { [ "$(cat "$1" 2>/dev/null | wc -l)" -gt "$2" ]; }
survives_kill() {
    "$hellaswag" -m "$model" -d $data --batch 32 --results "$dir/killed" >"$out" 2>"$log" &
    wait_until n_answers "$dir/killed" 3
    kill -9 $!
    wait $! 2>/dev/null
    n_answers "$dir/killed" 3 && score --results "$dir/killed" && same_answers killed 20
}
stops() {
    "$hellaswag" -m "$model" -d $data --batch 32 --results "$dir/stopped" >"$out" 2>"$log" &
    wait_until n_answers "$dir/stopped" 2
    kill -TERM $!
    wait $!
    [ $? -eq 130 ] && grep -q "to resume" "$log" && score --results "$dir/stopped" && same_answers stopped 20
}
reads_lines() {
    lines >"$dir/lines.txt"
    file=$dir/lines.txt
    ! command -v bzip2 >/dev/null || { bzip2 "$file" && file=$file.bz2; }
    "$hellaswag" -m "$model" -d "$file" --results "$dir/one" >"$out" 2>"$log" &&
        [ "$(sed -n 's/^0 //p' "$dir/one")" = "$(sed -n 's/^5 //p' "$dir/all")" ]
}
finds_data() {
    mkdir "$dir/data" && cp $data "$dir/data/hellaswag_val.jsonl" &&
        LLM_DATA=$dir/data "$hellaswag" -m "$model" --count >"$out" 2>"$log" && grep -q " 0 padded, 0 redundant" "$out"
}

check "gives the accuracies of the LM evaluation harness" agrees
check "nothing is padded or computed twice" [ "$(padded_and_redundant)" = 0,0 ]
check "shows a progress bar" grep -q "100 %" "$log"
check "resumes after an incomplete line" resumes
check "a kill -9 loses no answer that was shown" survives_kill
check "stops at a signal, and resumes" stops
check "padded batches give the same bits" eval 'score --schedule dp:100,200 --limit 5 --results "$dir/dp" && same_answers dp 5'
check "each text alone gives the same bits" eval 'score --schedule fixed:1 --no-share --limit 3 --results "$dir/alone" && same_answers alone 3'
check "reads llama.cpp's format" reads_lines
check "finds its data in LLM_DATA" finds_data
check "--no-label omits the label" eval 'score --count && cp "$out" "$dir/with" && score --count --no-label && ! cmp -s "$out" "$dir/with"'
check "refuses another model's results" refuses "not of this model" -m "$model" -d $data --no-label --results "$dir/all"
check "refuses damaged results" eval 'sed "3s/0x/zz/" "$dir/all" >"$dir/bad"; refuses "line 3 is damaged" -m "$model" -d $data --results "$dir/bad"'
check "refuses damaged data" eval 'head -c 1200 $data >"$dir/short.jsonl"; refuses "short.jsonl, line " -m "$model" -d "$dir/short.jsonl"'
check "refuses a question without endings" eval 'sed "3s/endings/end/" $data >"$dir/none.jsonl"; refuses "line 3 does not have four endings" -m "$model" -d "$dir/none.jsonl"'
check "refuses an incomplete question" eval 'lines | head -n 4 >"$dir/few.txt"; refuses "six lines" -m "$model" -d "$dir/few.txt"'
check "says where to get the data" eval 'LLM_DATA= refuses hellaswag_val.jsonl -m "$model"'
check "refuses a missing file" refuses "absent.txt" -m "$model" -d absent.txt
check "LLM_ISA is obeyed" eval 'LLM_ISA=abacus refuses abacus -m "$model" -d $data'
check "refuses a missing model" refuses "absent.gguf" -m absent.gguf -d $data
check "refuses an unknown schedule" refuses "not one of packed" -m "$model" -d $data --schedule best
finish
