#!/bin/sh
# Runs test programs that speak TAP and sums up:  tests/run.sh PROGRAM...
# A program that is missing, crashes, hangs or stops early counts as failed.
set -u
export CMOCKA_MESSAGE_OUTPUT=TAP
export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
passed=0 failed=0 skipped=0
[ $# -gt 0 ] || { echo "There is no such test." >&2; exit 2; }

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

# The thread sanitizer cannot map its shadow where addresses are too random.
launch() {
    case $1 in
    */tsan/*) setarch -R timeout -k 5 900 "$1" ;;
    *) timeout -k 5 900 "$1" ;;
    esac
}

for program; do
    log=$program.log start=$(date +%s)
    launch "$program" >"$log" 2>&1 </dev/null
    code=$?
    set -- $(count "$log" "$code")
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
    printf '%-42s %4d passed  %d failed  %d skipped  %4d s\n' "$program" "$1" "$2" "$3" $(($(date +%s) - start))
    if [ "$2" -gt 0 ]; then
        echo "  exit code $code; the end of $log:"
        grep -v '^ok ' "$log" | tail -n 40 | sed 's/^/    /'
    fi
done

summary="$passed passed, $failed failed"
[ "$skipped" -eq 0 ] || summary="$summary, $skipped skipped"
echo "$summary"
[ "$failed" -eq 0 ]
