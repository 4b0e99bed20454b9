#!/bin/sh
# On a machine with an NVIDIA GPU and the CUDA Toolkit: builds llm_cuda.cu, runs its tests on the device, with
# compute-sanitizer if it is there, then the benchmark, and prints one table last. Writes build/gpu/gpu.csv.
#   bench/gpu.sh [SHAPE...]     without SHAPE all of bench/gpu.cpp
#   bench/gpu.sh --build        only builds, which needs no GPU
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/cuda/bin
out=build/gpu
command -v nvcc >/dev/null || { echo "nvcc of the CUDA Toolkit is needed." >&2; exit 1; }
cuda=$(dirname "$(dirname "$(command -v nvcc)")")
export LD_LIBRARY_PATH="$cuda/lib64:${LD_LIBRARY_PATH:-}"
mkdir -p $out

echo "== build"
nvcc -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
    -gencode arch=compute_90,code=compute_90 -c -o $out/llm_cuda.o llm_cuda.cu
link="$out/llm_cuda.o -L$cuda/lib64 -lcublas -lcudart -lpthread -lm"
g++ -O2 -std=c++17 -I. -I"$cuda/include" -o $out/bench bench/gpu.cpp $link
if echo '#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>' | g++ -x c++ -fsyntax-only - 2>/dev/null; then
    g++ -O2 -std=c++17 -I. -I"$cuda/include" -o $out/test_cuda tests/test_cuda.cpp $link -lcmocka
else
    echo "No tests: cmocka.h is not here (Debian: libcmocka-dev)"
fi
[ "${1:-}" != --build ] || exit 0

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader || true
if [ -x $out/test_cuda ]; then
    echo "== tests on the device"
    timeout 120 $out/test_cuda
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            echo "== compute-sanitizer $tool"
            timeout 60 compute-sanitizer --tool $tool --error-exitcode 1 $out/test_cuda 'test_rows*' || echo "$tool: exit code $?"
        done
    fi
fi

echo "== benchmark"
timeout 300 $out/bench "$@" | tee $out/gpu.csv || echo "The benchmark ended early: exit code $?"
echo
awk -F, '{ for (i = 1; i <= NF; i++) printf "| %s ", $i; print "|" } NR == 1 { print "|---|---|---|---|---|---|" }' $out/gpu.csv
