#!/bin/sh
# hello.c, loop.c, extract.c and embed.cpp give answers and explain errors.
. tests/tap.sh
log=$(mktemp)
trap 'rm -f "$log"' EXIT
hello=$(dirname "$0")/hello
loop=$(dirname "$0")/loop
extract=$(dirname "$0")/extract
embed=$(dirname "$0")/embed
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}

says() { "$@" >"$log" 2>/dev/null && grep -q . "$log"; }
fails_saying() {
    word=$1
    shift
    ! "$@" >/dev/null 2>"$log" && grep -q "$word" "$log" && [ "$(wc -l <"$log")" -eq 1 ]
}

check "hello continues a text" says "$hello" "$model" "Once upon a time"
check "hello explains a missing model" fails_saying absent.gguf "$hello" absent.gguf
"$hello" "$model" "Once upon a time" >"$log"
check "loop gives the same text as hello" sh -c '"$1" "$2" "Once upon a time" | cmp - "$3"' sh "$loop" "$model" "$log"
check "loop explains a missing model" fails_saying absent.gguf "$loop" absent.gguf
says_a_person() { "$extract" "$model" >"$log" 2>/dev/null && grep -qE "^[A-Z][A-Za-z -]* is [0-9]+\.$" "$log"; }
check "extract fills a struct" says_a_person
check "extract explains a missing model" fails_saying absent.gguf "$extract" absent.gguf
check "embed answers a question" says "$embed" "$model" "What is the capital of France?"
check "embed explains a missing model" fails_saying absent.gguf "$embed" absent.gguf
finish
