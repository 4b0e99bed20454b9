#!/bin/sh
# The manual in llm.h: its recipes compile as C and C++ and work, and its CONTENTS lists all sections.
. tests/tap.sh
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}

manual() { awk '/^#ifndef LLM_H/ { exit } 1' llm.h; }

manual | awk '/^    RECIPES/ { inside = 1 } /^    LIMITS/ { exit } inside && /^(        |$)/ { sub(/^        /, ""); print }' >"$tmp/recipes.h"
strict="-Wall -Wextra -pedantic -Werror -O1 -I. -I$tmp"
check "the recipes compile, gcc C99" gcc -std=c99 $strict -c -o /dev/null tests/manual.c
check "the recipes compile, clang C99" clang -std=c99 $strict -c -o /dev/null tests/manual.c
for compiler in g++ clang++; do
    check "the recipes compile, $compiler C++20" $compiler -std=c++20 $strict -Wno-missing-field-initializers -c -o /dev/null -x c++ tests/manual.c
done
check "the recipes link with the library" gcc -std=c99 $strict -o "$tmp/manual" tests/manual.c "$(dirname "$0")/llm.o" -lm -lpthread
"$tmp/manual" "$model" >"$tmp/said" 2>&1
check "the recipes work" test $? -eq 0
sed 's/^/# /' "$tmp/said"

# Checks headings such as "13 The CPU backend" and the names of parts, each up to the first : or , of the heading.
manual | sed -n '/^    CONTENTS/,$p' | tr -s ' \n' ' ' >"$tmp/contents"
missing=0
sed -n '/^#ifndef LLM_H/,$ s,^/\* \(====\|----\) \(.*\),\2,p' llm.h | sed 's/ *\(----*\|====*\).*//; s/ *\*\/$//; /^[0-9]/! s/[:,].*//' >"$tmp/headings"
while read -r heading; do
    grep -qF "$heading" "$tmp/contents" || { echo "# CONTENTS lacks: $heading"; missing=1; }
done <"$tmp/headings"
check "CONTENTS has every heading" test $missing = 0
check "CONTENTS has no other section" test "$(manual | sed -n '/^    CONTENTS/,$p' | grep -c '^ *[0-9][0-9]*[a-z]* ')" = "$(grep -c '^[0-9]' "$tmp/headings")"
check "the version is that of LLM_VERSION" grep -q "^/\*  llm.h $(sed -n 's/^#define LLM_VERSION "\(.*\)"/\1/p' llm.h) " llm.h
finish
