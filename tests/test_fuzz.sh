#!/bin/sh
# Fuzzing: runs each target of tests/fuzz/fuzz.c for FUZZ_SECONDS (default 25), one target per processor at a time. Inputs that
# reach new code are kept in build/fuzz/corpus. Inputs that fail are kept in build/fuzz/findings and are tried first in the next
# run. When the bug is fixed, move the input to tests/fuzz/regressions/TARGET. With FUZZ_SEED=0, each run tries other inputs. By
# default they are chosen in the same way each time, so that a failure of `make test` can be repeated.
. tests/tap.sh
here=$(dirname "$0")/fuzz
seconds=${FUZZ_SECONDS:-25}
targets="gguf packed safetensors json tokenizer.json tokenizer.model pth chat messages tool-calls grammar round-trip"
export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1

most_bytes() {
    case $1 in
    gguf | tokenizer.json) echo 24000 ;;
    packed) echo 64000 ;;
    round-trip | grammar) echo 4000 ;;
    pth) echo 12000 ;;
    *) echo 8000 ;;
    esac
}

# Fuzzes one target and saves its exit code.
fuzz() {
    "$here/$1" -max_total_time="$seconds" -max_len="$(most_bytes "$1")" -timeout=30 -rss_limit_mb=2000 -print_final_stats=1 \
        -seed="${FUZZ_SEED:-1}" -dict="$here/corpus/$1.dict" -artifact_prefix="$here/findings/$1-" "$here/corpus/$1" >"$here/$1.log" 2>&1
    echo $? >"$here/$1.code"
}

# Runs a target once on each file, unchanged:  tries TARGET FILE...
tries() {
    target=$1
    shift
    [ -e "$1" ] || return 0
    "$here/$target" -timeout=30 -rss_limit_mb=2000 "$@" >"$here/$target.log" 2>&1 || shows_why "$target"
}

shows_why() {
    grep -E 'failed check|runtime error|ERROR|not freed|too slow|too much memory|^Running: |Test unit|^    #[0-9] ' "$here/$1.log" | tail -n 20 | sed 's/^/# /'
    return 1
}

passed() {
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$here/$1.log")
    echo "# $1: ${runs:-0} inputs in $seconds s"
    [ "$(cat "$here/$1.code")" -eq 0 ] || shows_why "$1"
}

# Makes packed files from the seeds that are GGUF files or directories.
packs() {
    mkdir -p "$1/packed"
    rm -f "$1"/packed/seed-*
    for seed in "$1"/gguf/seed-*; do "$here/../quantize" --pack "$seed" "$1/packed/${seed##*/}" || return 1; done
    for name in llama qwen2 int8; do "$here/../quantize" --pack "tests/golden/hf/$name" "$1/packed/seed-hf-$name" || return 1; done
}

mkdir -p "$here/corpus" "$here/findings"
for target in $targets; do ln -sf fuzz "$here/$target"; done
check "the seeds are made" python3 tests/fuzz/seeds.py "$here/corpus"
check "the seeds are packed" packs "$here/corpus"
export FUZZ_ALL_GOOD=1
for target in gguf packed safetensors tokenizer.json tokenizer.model pth messages tool-calls grammar; do
    check "the seeds are good: $target" tries "$target" "$here/corpus/$target"/seed-*
done
unset FUZZ_ALL_GOOD
for target in $targets; do
    check "earlier findings: $target" tries "$target" tests/fuzz/regressions/"$target"/*
    check "findings on this machine: $target" tries "$target" "$here/findings/$target"-*
done

n_running=0
for target in $targets; do
    fuzz "$target" &
    n_running=$((n_running + 1))
    [ $((n_running % $(nproc))) -ne 0 ] || wait
done
wait
for target in $targets; do check "fuzzing $target" passed "$target"; done
finish
