#!/bin/bash
# On a machine with an NVIDIA GPU and the CUDA Toolkit, in less than nine minutes: builds llm_cuda.cu; runs its tests on
# the device, then some under compute-sanitizer; measures the device's limits and how near decoding and prefill come to
# them; measures peers; compares the default model's text with the CPU's; scores part of HellaSwag. Prints one table last
# and writes it to build/gpu/gpu.csv. What is not on the machine (cmocka, compute-sanitizer, PyTorch, the model, the data)
# is left out, and said so.
#   bench/gpu.sh [SHAPE...]   SHAPE: only these of bench/gpu.cpp
#   bench/gpu.sh --build      only builds, which needs no GPU
#   LLAMA_BENCH=path          llama.cpp's llama-bench, built with CUDA, to run on the default model
#   LLM_MODEL=path            the default model, if it is not in models/
#   LLM_DATA=folder           with hellaswag_val_full.txt (perhaps .bz2), six lines a question; the first 400 are scored
# All questions: build/gpu/bench --hellaswag LLaMA-33B models/SmolLM2-135M-Instruct.Q4_1.gguf hellaswag_val_full.txt 10042
set -u
cd "$(dirname "$0")/.." || exit 1
PATH=$PATH:/usr/local/cuda/bin
out=build/gpu
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
seconds=520 # for everything
failures=0
command -v nvcc >/dev/null || { echo "nvcc of the CUDA Toolkit is needed." >&2; exit 1; }
cuda=$(dirname "$(dirname "$(command -v nvcc)")")
export LD_LIBRARY_PATH="$cuda/lib64:${LD_LIBRARY_PATH:-}"
mkdir -p $out
rm -f $out/gpu.csv

say() { printf '\n== %s (%d s) ==\n' "$1" "$SECONDS"; }

# A command within MOST seconds, and within what is left of all.
part() { # NAME MOST COMMAND...
    local name=$1 most=$2 left=$((seconds - SECONDS)) code=0
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "$name: left out, the time is up" >&2
        failures=$((failures + 1))
        return 1
    fi
    timeout "$((most < left ? most : left))" "$@" || code=$?
    [ $code = 0 ] && return
    echo "$name: $([ $code = 124 ] && echo "stopped, its time was up" || echo "failed with exit code $code")" >&2
    failures=$((failures + 1))
    return 1
}

has_cmocka() {
    printf '#include <%s>\n' setjmp.h stdarg.h stddef.h stdint.h cmocka.h | g++ -x c++ -fsyntax-only - 2>/dev/null
}

say "1. Build"
host=(g++ -O2 -std=c++17 -I. "-I$cuda/include")
libraries=("-L$cuda/lib64" -lcublas -lcudart -lpthread -lm)
"${host[@]}" -c -o $out/bench.o bench/gpu.cpp &
bench=$!
if has_cmocka; then
    gcc -O2 -std=c99 -DLLM_IMPLEMENTATION -I. -c -o $out/llm.o -x c llm.h &
    llm=$!
    "${host[@]}" -c -o $out/test_cuda.o tests/test_cuda.cpp &
    tests=$!
else
    echo "No tests: cmocka.h is not here (Debian: libcmocka-dev)"
    tests=
fi
nvcc -O3 -std=c++17 -t 0 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
    -gencode arch=compute_90,code=compute_90 -c -o $out/llm_cuda.o llm_cuda.cu || exit 1
wait $bench || exit 1
g++ -o $out/bench $out/bench.o $out/llm_cuda.o "${libraries[@]}" || exit 1
if [ -n "$tests" ]; then
    { wait "$tests" && wait "$llm"; } || exit 1
    g++ -o $out/test_cuda $out/test_cuda.o $out/llm.o $out/llm_cuda.o "${libraries[@]}" -lcmocka || exit 1
fi
[ "${1:-}" != --build ] || exit 0
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader || exit 1

if [ -n "$tests" ]; then
    say "1. Tests on the device"
    part "the tests" 100 $out/test_cuda
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            for test in test_groups test_bursts_of_all_modes test_scores_against_logits; do
                say "1. compute-sanitizer $tool, $test"
                part "$tool" 30 compute-sanitizer --tool $tool --error-exitcode 1 $out/test_cuda $test >$out/$tool.$test.log 2>&1
                tail -n 5 $out/$tool.$test.log
            done
        done
    else
        echo "No memcheck and racecheck: compute-sanitizer is not here"
    fi
fi

say "2. to 4. Limits, decoding, prefill"
part "the benchmark" 200 $out/bench "$@" >$out/gpu.csv

say "5. Peers"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    gbs=$(awk -F, '$1 == "Llama-2-7B" && $4 == "read GB/s" { print $5; exit }' $out/gpu.csv)
    part "gptfast.py" 150 python3 bench/peers/gptfast.py --read-gbs "${gbs:-0}" >>$out/gpu.csv
else
    echo "No gptfast.py: PyTorch with CUDA is not here"
fi
if [ -n "${LLAMA_BENCH:-}" ] && [ -r "$model" ]; then
    part "llama-bench" 40 "$LLAMA_BENCH" -m "$model" -ngl 99 -p 512 -n 128 -r 3 -o csv >$out/llama-bench.csv
    cat $out/llama-bench.csv
else
    echo "No llama.cpp: LLAMA_BENCH does not name its llama-bench, or there is no model"
fi

say "6. The default model's text"
if [ -r "$model" ]; then
    part "the comparison with the CPU" 60 $out/bench --same "$model" >>$out/gpu.csv
else
    echo "Not compared with the CPU: $model is not here"
fi

say "7. HellaSwag"
data=${LLM_DATA:-data}/hellaswag_val_full.txt
! [ -r "$data.bz2" ] || { bunzip2 -c "$data.bz2" >$out/hellaswag.txt && data=$out/hellaswag.txt; }
if [ -r "$data" ] && [ -r "$model" ]; then
    part "HellaSwag of Llama-2-7B" 40 $out/bench --hellaswag Llama-2-7B "$model" "$data" >>$out/gpu.csv
    if [ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)" -gt 78000 ]; then
        part "HellaSwag of LLaMA-33B" 60 $out/bench --hellaswag LLaMA-33B "$model" "$data" >>$out/gpu.csv
    else
        echo "No LLaMA-33B: it and its cache take 75 GB"
    fi
else
    echo "No HellaSwag: LLM_DATA does not name its folder, or there is no model"
fi

say "All in $out/gpu.csv; $failures parts failed"
awk -F, '{ for (i = 1; i <= 6; i++) printf "| %s ", $i; print "|" } NR == 1 { print "|---|---|---|---|---|---|" }' $out/gpu.csv
[ $failures = 0 ]
