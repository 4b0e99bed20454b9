#!/bin/sh
# With several processes, the programs give the same texts and answers as with one, and explain errors. Without MPI the
# test is skipped.
. tests/tap.sh
if ! command -v mpirun >/dev/null || ! command -v mpicc >/dev/null; then
    echo "1..0 # SKIP MPI is not installed (packages openmpi-bin and libopenmpi-dev)"
    echo "ok 1 # SKIP MPI is not installed"
    exit 0
fi
programs=$(dirname "$0")/mpi
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

ranks() { # N PROGRAM OPTIONS...
    n=$1 program=$2
    shift 2
    timeout 120 mpirun --oversubscribe -n "$n" "$programs/$program" -m "$model" -t 1 "$@" 2>"$dir/log"
}
answer() { # FILE N OPTIONS...
    file=$1 n=$2
    shift 2
    ranks "$n" repl --raw -p "Hello, my name is" -n 40 "$@" >"$dir/$file"
}
same_text() { answer text "$@" && cmp -s "$dir/one" "$dir/text"; }
chats() {
    printf 'Say hello.\n/reset\nWhat is 2 + 2?\n/stats\n' >"$dir/lines"
    ranks 1 repl --temp 0.7 --seed 5 -n 12 <"$dir/lines" >"$dir/alone" && ranks 2 repl --tp 2 --temp 0.7 --seed 5 -n 12 <"$dir/lines" >"$dir/text" &&
        [ -s "$dir/text" ] && cmp -s "$dir/alone" "$dir/text"
}
score() { # FILE N OPTIONS...
    file=$1 n=$2
    shift 2
    ranks "$n" hellaswag -d tests/hellaswag.jsonl -o csv --results "$dir/$file" "$@" >"$dir/csv"
}
same_answers() { rm -f "$dir/answers" && score answers "$@" && [ "$(sort "$dir/answers")" = "$(sort "$dir/scored")" ]; }
resumes() { head -n 9 "$dir/scored" >"$dir/answers" && score answers 2 --dp 2 && [ "$(sort "$dir/answers")" = "$(sort "$dir/scored")" ]; }
measures() { ranks 2 bench --tp 2 -p 16 -n 4 -r 1 -o csv >"$dir/csv" && [ "$(wc -l <"$dir/csv")" -eq 2 ]; }
# With random weights of the default model's shape, a rank reads as many bytes per token as with the model's file.
same_bytes() { # OPTIONS...
    ranks 2 bench "$@" -d 64 -p 16 -n 4 -r 1 -o csv >"$dir/csv" &&
        timeout 120 mpirun --oversubscribe -n 2 "$programs/bench" --random smollm2-135m -t 1 "$@" -d 64 -p 16 -n 4 -r 1 -o csv >"$dir/random" 2>"$dir/log" &&
        [ "$(wc -l <"$dir/random")" -eq 2 ] && [ "$(cut -d, -f11 "$dir/csv")" = "$(cut -d, -f11 "$dir/random")" ]
}
refuses() { # WORD N PROGRAM OPTIONS...
    word=$1
    shift
    ! ranks "$@" >"$dir/text" 2>&1 && grep -q -- "$word" "$dir/log"
}
# If one of three processes is killed while it works, the others end within ten seconds.
dies() {
    timeout 120 mpirun --oversubscribe -n 3 "$programs/hellaswag" -m "$model" -t 1 -d tests/hellaswag.jsonl --batch 32 --tp 3 --results "$dir/dying" >"$dir/text" 2>&1 &
    job=$!
    wait_until grep -q '^[0-9]' "$dir/dying" 2>/dev/null
    kill -9 "$(pgrep -P "$(pgrep -P $job mpirun)" hellaswag | tail -n 1)"
    start=$(date +%s)
    ! wait $job && [ $(($(date +%s) - start)) -le 10 ]
}

answer one 1
check "two processes share every layer" same_text 2 --tp 2
check "three processes share every layer" same_text 3 --tp 3
check "two processes with half of the layers each" same_text 2 --pp 2
check "two groups of two processes" same_text 4 --tp 2 --pp 2
check "two processes with a draft" same_text 2 --tp 2 --draft lookup
check "a chat with two processes" chats
score scored 1
check "scoring in tensor parallel" same_answers 2 --tp 2
check "scoring in a pipeline" same_answers 3 --pp 3
check "scoring in a pipeline, in mini-batches" same_answers 2 --pp 2 --schedule dp --mini-batch 64
check "two copies share the questions" same_answers 2 --dp 2
check "two copies of two stages" same_answers 4 --pp 2 --dp 2
check "another number of processes can resume" resumes
check "a benchmark of two processes" measures
case $model in *SmolLM2-135M*)
    check "a benchmark with random weights, in tensor parallel" same_bytes --tp 2
    check "a benchmark with random weights, in a pipeline" same_bytes --pp 2
    ;;
esac
check "too few processes" refuses "need 3 processes" 2 repl --tp 3 -p a
check "a missing model" refuses "cannot be read" 2 repl --tp 2 -p a -m "$dir/none"
check "more stages than layers" refuses "cannot share" 31 repl --pp 31 -p a
check "a process that is killed" dies
finish
