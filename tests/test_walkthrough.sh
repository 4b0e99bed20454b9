#!/bin/sh
# The walkthrough: its programs compile without warnings. Steps with the same weights give the same text, which is also the
# library's. The plotting script also reads gpt-fast's output.
. tests/tap.sh
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
programs=$(dirname "$0")/walkthrough
steps=examples/walkthrough
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export OMP_WAIT_POLICY=passive # other tests run at the same time

says() { # FILE PROGRAM OPTIONS...    writes the ids to FILE
    to=$1 program=$2
    shift 2
    "$programs/$program" -m "$model" -n 40 --samples 1 --ids "$dir/$to" "$@" >"$dir/$to.out" && [ -s "$dir/$to" ]
}
same() { # FILE FILE
    cmp -s "$dir/$1" "$dir/$2"
}
says_as() { # FILE FILE PROGRAM OPTIONS...
    other=$1
    shift
    says "$@" && same "$1" "$other"
}
no_warning() {
    cc=${CC:-cc}
    case $1 in *07*) cc="mpicc" ;; esac
    $cc -std=gnu11 -O3 -march=native -fopenmp -Wall -Wextra -pedantic -Werror -I. -c -o "$dir/object" "$1"
}

for file in "$steps"/0*.c; do
    case $file in *07*) command -v mpicc >/dev/null || continue ;; esac
    check "$file compiles without a warning" no_warning "$file"
done
check "step 0 gives a text" says 0 00-eager
check "step 1 gives the same text" says_as 0 1 01-compiled
check "step 2 gives the same text" says_as 0 2 02-static-cache
check "step 3 gives the same text" says_as 0 3 03-online-softmax
check "llm.h gives the same text in floats" says_as 0 library 03-online-softmax --library f32
check "step 5 gives the same text: the file's weights have 4 bits" says_as 0 5 05-int4
check "step 6 gives the same text with its int8 draft" says_as 0 6 06-speculative
check "step 6 gives the same text with lookup" says_as 0 6l 06-speculative --draft lookup
check "some guesses were right" grep -q "^Mean Accepted: [1-5]" "$dir/6.out"
if [ -x "$programs/07-tensor-parallel" ]; then
    export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    for n in 1 2 3; do
        ranks() {
            mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 -n $n "$programs/07-tensor-parallel" -m "$model" -n 40 --samples 1 --ids "$dir/7" >"$dir/7.out" 2>&1
        }
        check "step 7 runs in $n processes" ranks
        check "and gives the same text" same 0 7
    done
    unset OMP_NUM_THREADS
else
    check "step 7 is skipped: mpicc is not installed" true
fi
check "step 3 runs with weights rounded to int8" says 3int8 03-online-softmax --weights int8
check "step 4 gives the same text as these weights in floats" says_as 3int8 4 04-int8
for weights in bf16 int8 "bf16 2:4" "int8 2:4"; do
    check "step 3 with weights $weights" says dense 03-online-softmax --weights "$weights"
    check "step 8 gives the same text as these weights in floats" says_as dense 8 08-sparse --weights "$weights"
done
# The text of a damaged model could agree by chance, so the perplexity, which depends on every bit, is compared, too.
judges() { # FILE WEIGHTS
    "$programs/08-sparse" -m "$model" -n 40 --samples 1 --ids "$dir/$1" --weights "$2" --text tests/golden/heldout.txt \
        --perplexity 96 >"$dir/$1.out" && grep '^Perplexity' "$dir/$1.out" >"$dir/$1.perplexity"
}
for weights in bf16 int8; do
    check "step 8 runs with weights $weights 2:4" judges sparse "$weights 2:4"
    check "and with the same weights and stored zeros" judges whole "$weights 2:4 dense"
    check "which gives the same text" same sparse whole
    check "and the same perplexity" same sparse.perplexity whole.perplexity
done

for n in 1 2 3 4 5 6 7 8; do
    diff_is_short() { [ "$($steps/diff.sh $n | wc -l)" -lt 400 ] && $steps/diff.sh $n | grep -q '^+'; }
    check "the changes of step $n can be shown" diff_is_short
done

# The script: gpt-fast's lines from a Slurm file, and a README.
cat >"$dir/gpt-fast-baseline-488363.out" <<'OUT'
Using device=cuda
Bandwidth achieved: 500.00 GB/s
Bandwidth achieved: 506.00 GB/s
Average tokens/sec: 37.50
Memory used: 13.60 GB
OUT
sed 's/37.50/93.20/; s/50[06].00/1253.00/' "$dir/gpt-fast-baseline-488363.out" >"$dir/gpt-fast-compile-488364.out"
plot="python3 bench/extract_and_plot.py"
says_table() { $plot "$dir"/gpt-fast-*.out >"$dir/table" && grep -q "^| baseline | 37.5 | 1.0 |.*| 503.0 |" "$dir/table" && grep -q "^| compile | 93.2 | 2.5 |" "$dir/table"; }
printf 'before\n<!-- table: begin -->\nold\n<!-- table: end -->\n<!-- step 3 after 0 -->\n## 3 Name: old\nafter\n' >"$dir/README.md"
writes_readme() {
    $plot "$dir/0.out" "$dir/3.out" --readme "$dir/README.md" && grep -q '^| 0 eager |' "$dir/README.md" && ! grep -q old "$dir/README.md" &&
        grep -q '^## 3 Name: [0-9.]* → [0-9.]* tok/s, [0-9]* % of the limit$' "$dir/README.md" && [ "$(tail -n 1 "$dir/README.md")" = after ]
}
refuses() { ! $plot "$dir/0" >/dev/null 2>"$dir/log" && grep -q "Average tokens/sec" "$dir/log"; }
check "the script reads what gpt-fast wrote under Slurm" says_table
check "the script writes the table and the headings" writes_readme
check "the script reports a file without figures" refuses
finish
