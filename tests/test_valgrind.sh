#!/bin/sh
# Valgrind finds no errors while small models of every kind are loaded and run, bad ones are refused, and texts are generated.
. tests/tap.sh
here=$(dirname "$0")
log=$(mktemp)
trap 'rm -f "$log"' EXIT

if ! command -v valgrind >/dev/null; then
    echo "1..0 # SKIP valgrind is not installed"
    echo "ok 1 - # SKIP valgrind is not installed"
    exit 0
fi

clean() { valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=all "$@" >"$log" 2>&1 || { sed 's/^/# /' "$log" | tail -n 40; return 1; }; }

for model in tests/golden/hf/gqa.gguf tests/golden/hf/qwen3; do
    check "hello $model" clean "$here/hello" "$model" "a b"
done
check "test_hf" clean "$here/test_hf"
finish
