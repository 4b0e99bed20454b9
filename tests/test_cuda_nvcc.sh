#!/bin/sh
# nvcc compiles llm_cuda.cu for the chips it is meant for, without a warning, and no kernel where speed counts spills registers.
. tests/tap.sh
PATH=$PATH:/usr/local/cuda/bin
if ! command -v nvcc >/dev/null; then
    echo "ok 1 - llm_cuda.cu compiles # SKIP there is no nvcc on this machine"
    echo "1..1"
    exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

compile() { # ARCHITECTURE
    nvcc -O3 -std=c++17 -gencode "arch=compute_$1,code=sm_$1" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v \
        -c -o "$tmp/llm_cuda.o" llm_cuda.cu >"$tmp/$1.log" 2>&1 || { cat "$tmp/$1.log"; return 1; }
}

# What ptxas reports of each kernel: its name in one line, its spills in the next.
no_spills() { # ARCHITECTURE
    awk '/Function properties for/ { kernel = $NF }
         /spill stores/ && kernel ~ /fused|embed|rope|pick|score/ { n++; if (!/ 0 bytes spill stores, 0 bytes spill loads/) { print kernel ":" $0; bad = 1 } }
         END { exit bad || n < 50 }' "$tmp/$1.log"
}

for arch in 80 90; do
    check "llm_cuda.cu compiles for sm_$arch" compile $arch
    check "its kernels keep to their registers on sm_$arch" no_spills $arch
done
finish
