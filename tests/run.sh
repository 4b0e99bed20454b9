#!/bin/sh
# Runs test programs that print TAP, one per processor at a time, and prints totals:  tests/run.sh PROGRAM...
# A program that is missing, crashes, hangs or stops early counts as failed.
set -u
export CMOCKA_MESSAGE_OUTPUT=TAP
export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
[ $# -gt 0 ] || { echo "No test has this name." >&2; exit 2; }

# Prints "passed failed skipped" of a program's TAP output and exit code.
count() {
    awk -v code="$2" '
        /^1\.\.[0-9]+/ { planned += substr($0, 4) }
        /^(not )?ok .*# *SKIP/ { skipped++; next }
        /^ok / { passed++ }
        /^not ok / { failed++ }
        END {
            missing = planned - passed - failed - skipped
            if (missing > 0) failed += missing
            if (code != 0 && failed == 0) failed = 1
            if (passed + failed + skipped == 0) failed = 1
            print passed + 0, failed + 0, skipped + 0
        }' "$1"
}

# Programs for other machines are emulated. setarch -R: the thread sanitizer fails if addresses are randomized too much.
launch() {
    case $1 in
    */test_cuda) timeout -k 5 2400 "$1" ;;
    */windows/*) WINEPREFIX=$PWD/build/windows/wine WINEDEBUG=-all timeout -k 5 900 /usr/lib/wine/wine64 "$1" ;;
    */aarch64/*) LLM_TEST_EMULATED=1 timeout -k 5 900 qemu-aarch64-static "$1" ;;
    */tsan/*) setarch -R timeout -k 5 900 "$1" ;;
    *) timeout -k 5 900 "$1" ;;
    esac
}

# Runs one program and writes "passed failed skipped" to PROGRAM.count.
run() {
    log=$1.log start=$(date +%s)
    launch "$1" >"$log" 2>&1 </dev/null
    code=$?
    count "$log" "$code" >"$1.count"
    read -r passed failed skipped <"$1.count"
    printf '%-42s %4d passed  %d failed  %d skipped  %4d s\n' "$1" "$passed" "$failed" "$skipped" $(($(date +%s) - start))
    if [ "$failed" -gt 0 ]; then
        echo "  exit code $code; the end of $log:"
        grep -v '^ok ' "$log" | tail -n 40 | sed 's/^/    /'
    fi
}

if [ "$1" = --one ]; then
    text=$(run "$2") # printed at once, so that lines of two programs do not mix
    echo "$text"
    exit
fi

for program; do echo "0 1 0" >"$program.count"; done
printf '%s\n' "$@" | xargs -n 1 -P "$(nproc)" "$0" --one
for program; do cat "$program.count"; done | awk '
    { passed += $1; failed += $2; skipped += $3 }
    END {
        printf "%d passed, %d failed", passed, failed
        if (skipped) printf ", %d skipped", skipped
        print ""
        exit failed > 0
    }'
