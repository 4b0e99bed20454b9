#!/bin/sh
# llm.h compiles without warnings in all supported languages, compilers and configurations, and so does the code in the
# documentation. Most is compiled without optimisation, which takes less time. The builds with other compilers (MATRIX in the
# Makefile) optimise C, and stop at a warning, too.
. tests/tap.sh
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
strict='-Wall -Wextra -pedantic -Werror -I. -c -o /dev/null'
parse='-Wall -Wextra -pedantic -Werror -I. -fsyntax-only' # enough for all of clang's warnings, but not of gcc's

printf '#define LLM_IMPLEMENTATION\n#include "llm.h"\n' >"$tmp/whole.c"
printf '#include "llm.h"\nint unused;\n' >"$tmp/declarations.c"
printf '#define LLM_IMPLEMENTATION\n#define LLM_STATIC\n#include "llm.h"\nint unused;\n' >"$tmp/static.c"
cat >"$tmp/late.c" <<'END'
#include <stdio.h>
#include <stdlib.h>
#define LLM_IMPLEMENTATION
#include "llm.h"
END
for file in whole declarations static late; do cp "$tmp/$file.c" "$tmp/$file.cpp"; done

# In build/aarch64 or build/windows, the script tests that machine's compiler, and also runs the examples.
case $0 in
*/aarch64/*) machine=aarch64-linux-gnu- emulator=qemu-aarch64-static ;;
*/windows/*) machine=x86_64-w64-mingw32- emulator="env WINEPREFIX=$PWD/build/windows/wine WINEDEBUG=-all /usr/lib/wine/wine64" ;;
*) machine= ;;
esac

in_every_language() { # NAME SOURCE FLAGS...
    what=$1 source=$2
    shift 2
    check "$what, gcc C99" "${machine}gcc" -std=c99 -O2 $strict "$@" "$source.c"
    check "$what, gcc C11" "${machine}gcc" -std=gnu11 -O0 $strict "$@" "$source.c"
    check "$what, gcc C++17" "${machine}g++" -std=c++17 -O1 $strict "$@" "$source.cpp"
    check "$what, gcc C++20" "${machine}g++" -std=c++20 -O0 $strict "$@" "$source.cpp"
    [ -z "$machine" ] || return 0
    check "$what, clang C99" clang -std=c99 $parse "$@" "$source.c"
    check "$what, clang C++17" clang++ -std=c++17 $parse "$@" "$source.cpp"
    check "$what, clang C++20" clang++ -std=c++20 $parse "$@" "$source.cpp"
}

in_every_language "declarations" "$tmp/declarations"
in_every_language "implementation" "$tmp/whole"
check "implementation after other headers" "${machine}gcc" -std=c99 -O0 $strict "$tmp/late.c"
check "implementation after other headers, C++" "${machine}g++" -std=c++17 -O0 $strict "$tmp/late.cpp"
refuses() { # WORDS FLAGS...
    words=$1
    shift
    ! "${machine}gcc" -std=c99 -fsyntax-only -I. "$@" "$tmp/whole.c" 2>"$tmp/errors" && grep -q "#error $words" "$tmp/errors"
}
check "LLM_API" "${machine}gcc" -std=c99 -O0 $strict '-DLLM_API=extern __attribute__((visibility("default")))' "$tmp/whole.c"
check "LLM_STATIC with LLM_API is refused" refuses '"define LLM_STATIC or LLM_API' -DLLM_STATIC -DLLM_API=extern
check "LLM_STATIC with LLM_CUDA is refused" refuses '"llm_cuda.cu calls' -DLLM_STATIC -DLLM_CUDA
check "a big-endian machine is refused" refuses '"llm.h is for little-endian' -U__BYTE_ORDER__ -D__BYTE_ORDER__=4321
check "LLM_STATIC" "${machine}gcc" -std=c99 -O0 $strict "$tmp/static.c"
check "LLM_STATIC, C++" "${machine}g++" -std=c++17 -O0 $strict "$tmp/static.cpp"
check "LLM_CUDA" "${machine}gcc" -std=c99 -O0 $strict -DLLM_CUDA "$tmp/whole.c"
check "LLM_NO_THREADS" "${machine}gcc" -std=c99 -O0 $strict -DLLM_NO_THREADS "$tmp/whole.c"
check "LLM_NO_SIMD" "${machine}gcc" -std=c99 -O0 $strict -DLLM_NO_SIMD "$tmp/whole.c"
check "implementation without optimisation" "${machine}gcc" -std=c99 -O0 $strict "$tmp/whole.c"
if [ "$machine" ]; then
    program=$tmp/program.exe
    strict="${strict%-c -o /dev/null} -static -o $program"
    says() { word=$1; shift; $emulator "$program" "$@" 2>&1 | grep -q "$word"; }
    check "examples/hello.c" "${machine}gcc" -std=c99 -O0 $strict examples/hello.c -lm -lpthread
    check "hello continues a text" says '^yatatononon' tests/golden/hf/gqa.gguf "a b"
    check "examples/embed.cpp" "${machine}g++" -std=c++17 -O0 $strict examples/embed.cpp examples/embed_llm.cpp -lm -lpthread
    check "embed explains a missing chat template" says 'no chat template' tests/golden/hf/gqa.gguf "a b"
    finish
fi
check "LLM_STATIC, clang" clang -std=c99 $parse "$tmp/static.c"

# If llm.h is compiled as C++, callbacks may leave by exceptions.
check "tests/exceptions.cpp" g++ -std=c++17 -O1 -Wall -Wextra -pedantic -Werror -I. -DLLM_NO_SIMD -o "$tmp/exceptions" tests/exceptions.cpp \
    -lm -lpthread
check "callbacks leave by exceptions" timeout -k 5 300 "$tmp/exceptions" tests/golden/hf/gqa.gguf

# The implementation was compiled above. LLM_IMPLEMENTED leaves it out where a program uses public functions only.
for program in examples/*.c tokenizer/*.c; do
    case $program in
    */hello.c | */hellaswag.c) without= ;; # LLM_STATIC; private functions
    *) without=-DLLM_IMPLEMENTED ;;
    esac
    check "$program, gcc" gcc -std=c99 -O0 $strict $without "$program"
    check "$program, clang" clang -std=c99 $parse $without "$program"
done
for compiler in g++ clang++; do
    check "examples/embed.cpp, $compiler" "$compiler" -std=c++17 -O0 $strict examples/embed.cpp
done

# Prints the first code block of a language in a Markdown file.
code_block() { awk -v fence="^\`\`\`$1\$" '$0 ~ fence { inside = 1; next } /^```/ && inside { exit } inside' "$2"; }
code_block c README.md >"$tmp/readme.c"
sed '1,/\*\//d' examples/hello.c >"$tmp/hello.c"
for file in llm.h llm_cuda.cu; do
    check "the licence is in $file" eval 'sed -n "/^MIT License$/,/^SOFTWARE/p" '$file' | cmp - LICENSE'
done

# Other versions lay out some lines in another way.
if clang-format --version 2>/dev/null | grep -q 'version 14\.'; then
    check "all files have clang-format's layout" eval "find llm.h llm_cuda.cu examples tests tokenizer bench -name '*.c' -o -name '*.h' \
        -o -name '*.cpp' -o -name '*.cu' | xargs clang-format --dry-run -Werror"
else
    check "all files have clang-format's layout # SKIP clang-format 14 is not here" true
fi
check "the program in README.md is examples/hello.c" cmp "$tmp/readme.c" "$tmp/hello.c"

{
    printf '#include <stdio.h>\n#define LLM_IMPLEMENTATION\n#include "llm.h"\n'
    sed -n '/^ *QUICK START/,/^ *STEP BY STEP/p' llm.h | sed '1d;$d'
} >"$tmp/quick.c"
check "the quick start in llm.h compiles" gcc -std=c99 -O0 $strict "$tmp/quick.c"
check "the quick start in llm.h compiles with clang" clang -std=c99 $parse -DLLM_IMPLEMENTED "$tmp/quick.c"
finish
