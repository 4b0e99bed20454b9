#!/bin/sh
# nvcc compiles llm_cuda.cu without warnings for the supported chips. Kernels that must be fast spill no registers, and use
# few enough that a multiprocessor can hold as many blocks as the host assumes. Products start to copy weights before they
# wait for earlier kernels; this check needs nvdisasm, on the PATH or from PyPI's nvidia-cuda-nvdisasm.
. tests/tap.sh
PATH=$PATH:/usr/local/cuda/bin
for folder in $(python3 -c 'import site; print(*site.getsitepackages())' 2>/dev/null); do
    PATH=$PATH:$folder/nvidia/cu13/bin
done
if ! command -v nvcc >/dev/null; then
    echo "ok 1 - llm_cuda.cu compiles # SKIP nvcc is not installed"
    echo "1..1"
    exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

compile() { # ARCHITECTURE
    mkdir "$tmp/$1"
    nvcc -O3 -std=c++17 -gencode "arch=compute_$1,code=sm_$1" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v \
        --keep --keep-dir "$tmp/$1" -c -o "$tmp/llm_cuda.o" llm_cuda.cu >"$tmp/$1.log" 2>&1 || { cat "$tmp/$1.log"; return 1; }
}

# ptxas prints a kernel's name in one line, its spills in the next, and its registers after that.
no_spills() { # ARCHITECTURE
    awk '/Function properties for/ { kernel = $NF }
         /spill stores/ && kernel ~ /fused|tile|embed|rope|pick|score|widen|values/ { n++; if (!/ 0 bytes spill stores, 0 bytes spill loads/) { print kernel ":" $0; bad = 1 } }
         END { exit bad || n < 60 }' "$tmp/$1.log"
}

# A multiprocessor has 65,536 registers. With 3 blocks of 256 threads, each thread can have 80 registers, with 2 blocks 128;
# with 4 blocks of 128 threads 128, with 2 blocks 255. The template parameters of llm__fused_product are its ending, the tiles
# of columns, and the format; those of llm__fused_attention are columns and dimensions.
few_registers() { # ARCHITECTURE
    awk '/Function properties for/ { kernel = $NF; most = 0 }
         /Used [0-9]+ registers/ {
             if (kernel ~ /fused_product/) most = kernel ~ /ILi[0-9]ELi1ELi[01256]E/ ? 80 : 128
             if (kernel ~ /fused_attention/) most = kernel ~ /ILi8ELi[12]E/ ? 128 : 255
             if (!most) next
             n++
             for (i = 1; i < NF; i++) if ($i == "Used" && $(i + 1) > most) { print kernel ": " $(i + 1) " registers"; bad = 1 }
         }
         END { exit bad || n != 79 }' "$tmp/$1.log"
}

# In each fused product, instructions that copy to shared memory come before a wait (two for the numbers of two rows, one for
# the scales of groups or the places of 2:4), and those of the loop after it. (The product of the logits has a second wait,
# where it ends early.)
early_copies() { # ARCHITECTURE
    nvdisasm -c "$tmp/$1"/*.cubin >"$tmp/$1.sass" || return 1
    awk 'function judge(  i, good) {
             if (kernel !~ /fused_product/) return
             n++
             for (i = 1; i <= n_waits; i++) if (before[i] >= (kernel ~ /Li[3456]EEE/ ? 3 : 2) && before[i] < copies) good = 1
             if (!good) { print kernel ": no copies before it waits"; bad = 1 }
         }
         /\.section[ \t]+\.text\./ { judge(); kernel = $0; copies = n_waits = 0 }
         /LDGSTS/ { copies++ }
         /ACQBULK/ { before[++n_waits] = copies }
         END { judge(); exit bad || n != 70 }' "$tmp/$1.sass"
}

for arch in 80 90 100; do
    check "llm_cuda.cu compiles for sm_$arch" compile $arch
    check "its fast kernels spill no registers on sm_$arch" no_spills $arch
    check "its fused kernels use few enough registers on sm_$arch" few_registers $arch
    [ $arch = 80 ] && continue # kernels do not overlap there
    if command -v nvdisasm >/dev/null; then
        check "copies of weights start before the wait on sm_$arch" early_copies $arch
    else
        check "copies of weights start before the wait on sm_$arch # SKIP nvdisasm is not installed" true
    fi
done
finish
