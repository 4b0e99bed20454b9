#!/bin/sh
# hello.c, loop.c, extract.c and embed.cpp give answers and explain errors. quantize.c explains them before it calibrates.
. tests/tap.sh
log=$(mktemp)
folder=$(mktemp -d)
trap 'rm -rf "$log" "$folder"' EXIT
hello=$(dirname "$0")/hello
loop=$(dirname "$0")/loop
extract=$(dirname "$0")/extract
embed=$(dirname "$0")/embed
quantize=$(dirname "$0")/quantize
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

# The text is long enough, so only a check before the calibration prevents it.
fails_before_calibrating() {
    word=$1
    shift
    ! "$quantize" "$@" >"$log" 2>"$log.err" && ! grep -q calibrated "$log" && grep -q "$word" "$log.err"
    failed=$?
    rm -f "$log.err"
    return $failed
}
awk 'BEGIN { for (i = 0; i < 100; i++) print "a b a b b a a b" }' >"$folder/text"
gguf=tests/golden/hf/gqa.gguf
mkdir "$folder/there"
touch "$folder/there.gguf"
check "quantize checks the type first" fails_before_calibrating Q9_K --calibrate "$folder/text" $gguf "$folder/out.gguf" Q9_K
check "quantize checks the file first" fails_before_calibrating exists --calibrate "$folder/text" $gguf "$folder/there.gguf" Q8_0
check "quantize checks the directory first" fails_before_calibrating exists --sparse 2:4 --calibrate "$folder/text" tests/golden/sparse/dense "$folder/there"
calibrates() { "$quantize" --calibrate "$folder/text" $gguf "$folder/out.gguf" Q8_0 >"$log" 2>&1 && grep -q calibrated "$log" && [ -s "$folder/out.gguf" ]; }
check "quantize calibrates" calibrates
check "quantize explains that directories hold no blocks" fails_saying "cannot hold blocks" "$quantize" $gguf "$folder/out" Q4_K_M
check "quantize explains that a GGUF file needs a type" fails_saying "needs a TYPE" "$quantize" tests/golden/hf/gqa "$folder/new.gguf"
finish
