#!/bin/sh
# nvcc compiles llm_cuda.cu for the supported chips without a warning. The kernels in which speed counts spill no registers,
# and use so few that a multiprocessor holds the number of blocks that the host assumes. Kernels that overlap issue their
# loads and prefetches before they wait. That check needs nvdisasm, on the PATH or from PyPI's nvidia-cuda-nvdisasm.
. tests/tap.sh
PATH=$PATH:/usr/local/cuda/bin
for folder in $(python3 -c 'import site; print(*site.getsitepackages())' 2>/dev/null); do
    PATH=$PATH:$folder/nvidia/cu13/bin
done
if ! command -v nvcc >/dev/null; then
    echo "ok 1 - llm_cuda.cu compiles # SKIP there is no nvcc on this machine"
    echo "1..1"
    exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# An ARCHITECTURE is a chip's number; with _128, weights are read in pieces of that many bytes.
compile() { # ARCHITECTURE
    mkdir "$tmp/$1"
    piece=64 chip=${1%_128}
    [ "$chip" = "$1" ] || piece=128
    nvcc -O3 -std=c++17 -gencode "arch=compute_$chip,code=sm_$chip" -DLLM_CUDA_PIECE=$piece -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v \
        --keep --keep-dir "$tmp/$1" -c -o "$tmp/llm_cuda.o" llm_cuda.cu >"$tmp/$1.log" 2>&1 || { cat "$tmp/$1.log"; return 1; }
}

# What ptxas reports of each kernel: its name in one line, its spills in the next, its registers after that.
no_spills() { # ARCHITECTURE
    awk '/Function properties for/ { kernel = $NF }
         /spill stores/ && kernel ~ /fused|tile|embed|rope|pick|score|widen|values/ { n++; if (!/ 0 bytes spill stores, 0 bytes spill loads/) { print kernel ":" $0; bad = 1 } }
         END { exit bad || n < 60 }' "$tmp/$1.log"
}

# 65,536 registers: three blocks of 256 threads have 80 each, two 128; four of 128 threads 128, two 255. llm__fused_product has its
# ending, the tiles of columns, and the format as parameters, llm__fused_attention columns and dimensions.
few_registers() { # ARCHITECTURE
    awk '/Function properties for/ { kernel = $NF; most = 0 }
         /Used [0-9]+ registers/ {
             if (kernel ~ /fused_product/) most = kernel ~ /ILi[0-9]ELi1ELi[012]E/ ? 80 : 128
             if (kernel ~ /fused_attention/) most = kernel ~ /ILi8ELi[12]E/ ? 128 : 255
             if (!most) next
             n++
             for (i = 1; i < NF; i++) if ($i == "Used" && $(i + 1) > most) { print kernel ": " $(i + 1) " registers"; bad = 1 }
         }
         END { exit bad || n != 59 }' "$tmp/$1.log"
}

# Of each fused product: how many 16-byte loads of weights and how many prefetches stand before the (last) wait.
early_loads() { # ARCHITECTURE
    nvdisasm -c "$tmp/$1"/*.cubin >"$tmp/$1.sass" || return 1
    awk 'function judge() {
             if (kernel !~ /fused_product/) return
             n++
             least = kernel ~ /Li1ELi4E/ ? 12 : kernel ~ /Li1ELi3E/ ? 6 : kernel ~ /Li2ELi4E/ ? 4 : kernel ~ /Li2ELi3E/ ? 2 : 8
             if (loads < least || prefetches < (kernel ~ /Li[34]EEE/ ? 2 : 1)) { print kernel ": " loads " loads, " prefetches " prefetches before it waits"; bad = 1 }
         }
         /\.section[ \t]+\.text\./ { judge(); kernel = $0; loads = prefetches = n_loads = n_prefetches = 0 }
         /LDG\.E\..*128/ { n_loads++ }
         /UBLKPF/ { n_prefetches++ }
         /ACQBULK/ { loads = n_loads; prefetches = n_prefetches }
         END { judge(); exit bad || n != 50 }' "$tmp/$1.sass"
}

for arch in 80 90 90_128 100; do
    check "llm_cuda.cu compiles for sm_$arch" compile $arch
    check "its kernels keep to their registers on sm_$arch" no_spills $arch
    check "there is room for as many blocks as are counted on, on sm_$arch" few_registers $arch
    [ $arch = 80 ] && continue # kernels do not overlap there
    if command -v nvdisasm >/dev/null; then
        check "loads and prefetches come before the wait on sm_$arch" early_loads $arch
    else
        check "loads and prefetches come before the wait on sm_$arch # SKIP there is no nvdisasm" true
    fi
done
finish
