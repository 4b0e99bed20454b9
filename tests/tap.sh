# shellcheck shell=sh
# For test scripts: `check NAME COMMAND...` is one test, which passes if the command succeeds; `finish` ends the script.
n_tests=0 n_failed=0

check() {
    name=$1
    shift
    n_tests=$((n_tests + 1))
    if "$@"; then
        echo "ok $n_tests - $name"
    else
        n_failed=$((n_failed + 1))
        echo "not ok $n_tests - $name"
    fi
}

# Waits up to a minute for the command to succeed.
wait_until() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || return 1
        sleep 0.1
    done
}

finish() {
    echo "1..$n_tests"
    [ $n_failed -eq 0 ]
    exit
}
