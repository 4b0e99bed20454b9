#!/bin/bash
# Tests and measures llm_cuda.cu on a machine with an NVIDIA GPU. Ends within 560 seconds.
#   bench/gpu.sh              runs all steps, the most important ones first
#   bench/gpu.sh STEP...      runs only these steps: probe first why types sparse ranks pipeline fused tests sanitizer ncu
#                             peer shapes same hellaswag
#   bench/gpu.sh --build      only builds build/gpu, which needs no GPU
#   OUT=folder                results are written here, line by line: gpu.log, gpu.csv, clocks.csv and others (default:
#                             build/gpu)
#   LLM_MODEL=path            the default model, if it is not in models/
#   LLM_DATA=folder           has hellaswag_val_full.txt (or .bz2), six lines per question; the first 400 are scored
#   LLAMA_BENCH=path          llama.cpp's llama-bench, built with CUDA, to run on the default model
# Needs a driver. `make gpu-bundle` builds everything beforehand; programs that are missing or older than their sources are
# built here with nvcc. A step that cannot run says why, and the next one runs. Each combination of shape, type and mode has
# its own process, and so has each test.
# To score all of HellaSwag: build/gpu/bench --hellaswag LLaMA-33B MODEL hellaswag_val_full.txt 10042
set -u
cd "$(dirname "$0")/.." || exit 1
bin=build/gpu
out=${OUT:-build/gpu}
model=${LLM_MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
seconds=540 # time limit of all steps together
failures=0
steps="probe first why types sparse ranks pipeline fused tests sanitizer ncu peer shapes same hellaswag"
mkdir -p $bin "$out"
csv=$out/gpu.csv

# Runs a command with a time limit, because a broken driver may never answer.
ask() {
    local left=$((seconds - SECONDS))
    timeout -k 2 $((left < 1 ? 1 : left < 20 ? left : 20)) "$@"
}

say() { printf '\n== %s (%d s) ==\n' "$1" "$SECONDS"; }

# ---- Finding the tools ----

# Prints the first folder that holds a file of this name.
folder_with() { # NAME FOLDER...
    local name=$1 folder
    shift
    for folder; do
        if [ -e "$folder/$name" ]; then
            echo "$folder"
            return
        fi
    done
}

# The CUDA Toolkit may be complete, partial, or the wheels that come with PyTorch.
find_cuda() {
    local python_folders
    PATH=$PATH:/usr/local/cuda/bin
    for folder in /usr/local/cuda-*/bin /opt/cuda/bin /usr/lib/nvidia-cuda-toolkit/bin; do
        [ ! -d "$folder" ] || PATH=$PATH:$folder
    done
    python_folders=$(python3 -c 'import site, sys
for folder in site.getsitepackages() + [site.getusersitepackages()] + sys.path: print(folder)' 2>/dev/null |
        grep packages | sort -u)
    roots=()
    if command -v nvcc >/dev/null; then roots+=("$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")"); fi
    roots+=(/usr/local/cuda /usr/local/cuda-* /opt/cuda)
    for folder in $python_folders; do
        roots+=("$folder"/nvidia/cu13 "$folder"/nvidia/cublas "$folder"/nvidia/cuda_runtime "$folder"/nvidia/cu12)
        [ -n "$(command -v nvcc)" ] || [ ! -x "$folder/nvidia/cu13/bin/nvcc" ] || PATH=$PATH:$folder/nvidia/cu13/bin
    done
    libraries=() headers=()
    for root in "${roots[@]}"; do
        for folder in "$root"/lib64 "$root"/lib "$root"/targets/*/lib; do
            [ ! -d "$folder" ] || libraries+=("$folder")
        done
        for folder in "$root"/include "$root"/targets/*/include; do [ ! -d "$folder" ] || headers+=("$folder"); done
    done
    libraries+=(/usr/lib/x86_64-linux-gnu /usr/lib64)
    headers+=(/usr/include)
    blas=$(folder_with libcublas.so.13 "${libraries[@]}")
    blas_name=libcublas.so.13
    if [ -z "$blas" ]; then # another version works if the programs are built here
        blas=$(folder_with libcublas.so "${libraries[@]}")
        blas_name=libcublas.so
        [ -n "$blas" ] || { blas=$(folder_with libcublas.so.12 "${libraries[@]}") && blas_name=libcublas.so.12; }
    fi
    [ -z "$blas" ] || export LD_LIBRARY_PATH="$blas:${LD_LIBRARY_PATH:-}"
}

# ---- Building ----

sources="llm.h llm_cuda.cu bench/gpu.cpp examples/ranks.h tests/test_cuda.cpp tests/tiny.h tests/common.h tests/check.h"

sources_sum() { cat $sources 2>/dev/null | cksum; }

# True if the programs were built from these sources and start on this machine.
is_built() {
    [ -x $bin/bench ] && [ "$(cat $bin/sources.sum 2>/dev/null)" = "$(sources_sum)" ] &&
        ask $bin/bench --help >/dev/null 2>&1
}

has_cmocka() {
    printf '#include <%s>\n' setjmp.h stdarg.h stddef.h stdint.h cmocka.h | g++ -x c++ -fsyntax-only - 2>/dev/null
}

# Builds for this machine's chip, or without a GPU for all supported chips.
build() {
    local runtime_headers blas_headers runtime link chip flags pids=() tests=
    command -v nvcc >/dev/null || { echo "Not built: nvcc is not installed"; return 1; }
    [ -n "$blas" ] || { echo "Not built: libcublas.so.13 was not found in ${libraries[*]}"; return 1; }
    runtime_headers=$(folder_with cuda_runtime.h "${headers[@]}")
    blas_headers=$(folder_with cublas_v2.h "${headers[@]}")
    if [ -z "$runtime_headers" ] || [ -z "$blas_headers" ]; then
        echo "Not built: cuda_runtime.h or cublas_v2.h is missing"
        return 1
    fi
    runtime=$(folder_with libcudart_static.a "${libraries[@]}")
    if [ -n "$runtime" ]; then
        link=("$runtime/libcudart_static.a" -ldl -lrt)
    else
        runtime=$(folder_with libcudart.so.13 "${libraries[@]}")
        [ -n "$runtime" ] || { echo "Not built: neither libcudart_static.a nor libcudart.so.13 was found"; return 1; }
        link=("$runtime/libcudart.so.13" "-Wl,-rpath,$runtime")
    fi
    link+=("$blas/$blas_name" "-Wl,-rpath,\$ORIGIN" "-Wl,-rpath,$blas" -static-libstdc++ -static-libgcc -lpthread -lm)
    chip=$(ask nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
    case $chip in
    [0-9]*) flags=(-gencode "arch=compute_$chip,code=sm_$chip") ;;
    *)
        flags=(-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
            -gencode arch=compute_90,code=compute_90)
        ;;
    esac
    ! nvcc --help | grep -q compress-mode || flags+=(-compress-mode=size) # a bundle should be small
    local host=(g++ -O2 -std=c++17 -I. "-I$runtime_headers")
    "${host[@]}" -c -o $bin/bench.o bench/gpu.cpp & pids+=($!)
    if has_cmocka; then
        tests=1
        gcc -O2 -std=c99 -DLLM_IMPLEMENTATION -I. -c -o $bin/llm.o -x c llm.h & pids+=($!)
        "${host[@]}" -c -o $bin/test_cuda.o tests/test_cuda.cpp & pids+=($!)
    else
        echo "The tests are not built: cmocka.h is missing (Debian: libcmocka-dev)"
    fi
    local device=(nvcc -O3 -std=c++17 -t 0 "${flags[@]}" "-I$blas_headers")
    "${device[@]}" -c -o $bin/llm_cuda.o llm_cuda.cu & pids+=($!)
    running=${pids[*]}
    for pid in "${pids[@]}"; do wait "$pid" || { echo "Not built: the compiler failed"; return 1; }; done
    running=
    g++ -s -o $bin/bench $bin/bench.o $bin/llm_cuda.o "${link[@]}" || return 1
    if [ -n "$tests" ]; then
        g++ -s -o $bin/test_cuda $bin/test_cuda.o $bin/llm.o $bin/llm_cuda.o "${link[@]}" -lcmocka || return 1
    fi
    sources_sum >$bin/sources.sum
}

# ---- Running ----

# Runs a command for at most MOST seconds, and not longer than the time that is left for all steps.
table=/dev/null
part() { # NAME MOST COMMAND...
    local name=$1 most=$2 left=$((seconds - SECONDS)) code=0
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "$name: skipped, no time is left"
        failures=$((failures + 1))
        return 1
    fi
    timeout -k 5 "$((most < left ? most : left))" "$@" > >(tee -a "$table") &
    running=$!
    wait $running || code=$?
    running=
    case $code in
    0) return ;;
    124) echo "$name: stopped at its time limit" ;;
    137) echo "$name: killed at its time limit or because of too little memory" ;;
    *) echo "$name: failed with exit code $code" ;;
    esac
    failures=$((failures + 1))
    return 1
}

# The same; the output is appended to the table.
rows() { # NAME MOST COMMAND...
    local code=0
    table=$csv
    part "$@" || code=$?
    table=/dev/null
    return $code
}

# Prints the clocks and the power since the last call.
clocks() {
    [ -r "$out/clocks.csv" ] || return 0
    awk -F', *' -v from="${clock_lines:-0}" '
        NR > from && $3 + 0 > 1000 {
            n++; power += $4; memory = $3
            if ($2 > sm) sm = $2
            low = n == 1 || $2 < low ? $2 : low
        }
        END {
            if (!n) exit
            printf "   (clocks: SM %d to %d MHz, memory %d MHz, %.0f W on average)\n", low, sm, memory, power / n
        }' "$out/clocks.csv"
    clock_lines=$(wc -l <"$out/clocks.csv")
}

bench() { # MOST ARGUMENT...
    local most=$1
    shift
    rows "bench $*" "$most" $bin/bench "$@"
    clocks
}

has_bench() { [ -x $bin/bench ] || { echo "Skipped: $bin/bench could not be built"; false; }; }

step_probe() {
    say "The machine"
    uname -srm
    ask nvidia-smi --format=csv,noheader \
        --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem,power.limit ||
        echo "nvidia-smi does not work here"
    echo "nvcc: $(command -v nvcc || echo none); cuBLAS: ${blas:-none}; python3: $(command -v python3 || echo none);" \
        "processors: $(nproc)"
    if has_bench; then ask $bin/bench --device || echo "No usable GPU; steps that need one will fail"; fi
}

step_first() {
    say "Llama-2-7B in bf16"
    has_bench && bench 60 Llama-2-7B bf16 graph
}

step_why() {
    say "What the time is made of"
    has_bench && bench 60 --why Llama-2-7B bf16
    has_bench && bench 45 --why Llama-2-7B int4
}

step_types() {
    say "The other types"
    has_bench && for type in int8 int4; do bench 45 Llama-2-7B $type graph; done
}

step_sparse() {
    say "2:4 sparsity"
    has_bench && for type in bf16-2:4 int8-2:4; do bench 45 Llama-2-7B $type graph; done
}

# Counts the GPUs: $gpus. Fails if there are fewer than two.
count_gpus() {
    gpus=$(ask $bin/bench --gpus 2>/dev/null)
    [ "${gpus:-0}" -lt 2 ] || return 0
    echo "Skipped: two GPUs are needed; this machine has ${gpus:-none}"
    return 1
}

# Divides a model between 2, 4 and 8 GPUs, if there are that many. gpt-fast published figures for A100s.
step_ranks() {
    local gpus n
    say "Tensor parallel"
    has_bench && count_gpus || return
    for n in 2 4 8; do
        [ "$n" -le "$gpus" ] || continue
        bench 45 --ranks $n Llama-2-7B bf16
        bench 60 --ranks $n Llama-2-70B bf16
    done
    LLM_CUDA_RANKS=host bench 30 --ranks 2 Llama-2-7B bf16
    LLM_CUDA_RANKS=nccl bench 45 --ranks 2 Llama-2-7B bf16 # its ranks are threads, so passes are not recorded
    awk -F, '
        BEGIN { split("104.9 168.8 254.0 328.4", seven, " "); split("none 21.3 38.0 62.5", seventy, " ") }
        $4 == "decode at 6" && $2 == "bf16" && ($3 == "graph" || $3 ~ /^tensor [248]$/) { rate[$1, $3] = $5 }
        END {
            print "| GPUs | 7B tok/s | gpt-fast, A100 | 70B tok/s | gpt-fast, A100 |"
            for (i = 1; i <= 4; i++) {
                mode = i == 1 ? "graph" : "tensor " 2 ^ (i - 1)
                a = rate["Llama-2-7B", mode]; b = rate["Llama-2-70B", mode]
                printf "| %d | %s | %s | %s | %s |\n", 2 ^ (i - 1), a == "" ? "-" : a, seven[i], b == "" ? "-" : b, seventy[i]
            }
        }' "$csv"
}

# Scores HellaSwag by pipelines of GPUs: messages from GPU to GPU, and for the longest pipeline also through the host.
# Draws when the stages wait.
step_pipeline() {
    local gpus n most=0
    say "Pipelines"
    has_bench && count_gpus || return
    find_questions || return
    score_33b
    for n in 2 4 8; do
        [ "$n" -le "$gpus" ] || continue
        most=$n
        stages "$n" "$n" "$tokenizer" "$data"
    done
    LLM_CUDA_RANKS=host stages "$most" "$most-by-host" "$tokenizer" "$data"
    awk -F, '
        $1 == "LLaMA-33B" && $4 ~ /^HellaSwag: seconds/ { all[$3] = $5; if ($3 ~ /^stages/) order[++n] = $3 }
        END {
            print "| LLaMA-33B | s for all | times one GPU |"
            one = all["packed"]
            for (i = 1; i <= n; i++) {
                some = all[order[i]]
                printf "| %s | %s | %s |\n", order[i], some, (one * some == 0 ? "-" : sprintf("%.2f", one / some))
            }
        }' "$csv"
}

# Runs one pipeline. $out/waits-NAME.csv records the waits of its stages, and $out/waits-NAME.png shows them if matplotlib is
# installed.
stages() { # NUMBER NAME TOKENIZER QUESTIONS
    local waits=$out/waits-$2.csv
    rm -f "$waits"
    bench 75 --stages "$1" LLaMA-33B "$3" "$4" "$waits"
    [ -s "$waits" ] || return
    if ask python3 -c 'import matplotlib' 2>/dev/null; then
        part "the picture of the waits" 30 python3 bench/gantt.py "$waits" "$out/waits-$2.png"
    else
        part "the table of the waits" 30 python3 bench/gantt.py "$waits"
    fi
}

step_fused() {
    say "Without graphs"
    has_bench && for mode in fused eager; do bench 45 Llama-2-7B bf16 $mode; done
}

step_tests() {
    local passed=0 failed= n=0 test most
    say "Tests on the device"
    [ -x $bin/test_cuda ] || { echo "Skipped: $bin/test_cuda was not built (it needs cmocka)"; return; }
    for test in $(ask $bin/test_cuda --list); do
        n=$((n + 1)) most=20
        if part "$test" $most $bin/test_cuda "$test" >"$out/tests.tmp" 2>&1; then
            passed=$((passed + 1))
        else
            failed="$failed $test"
            tail -n 12 "$out/tests.tmp"
        fi
        cat "$out/tests.tmp" >>"$out/tests.log"
    done
    rm -f "$out/tests.tmp"
    echo "$passed of $n tests passed${failed:+; failed:}$failed"
    printf 'tests,,,passed of %d,%d,\n' "$n" "$passed" >>"$csv"
}

step_sanitizer() {
    local sanitizer only test tool
    say "compute-sanitizer"
    sanitizer=$(command -v compute-sanitizer ||
        ls /usr/local/cuda*/bin/compute-sanitizer /opt/nvidia/*/*/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -z "$sanitizer" ] || [ ! -x $bin/test_cuda ]; then
        echo "Skipped: compute-sanitizer or $bin/test_cuda is missing"
        return
    fi
    only=(--kernel-name kernel_substring=llm__) # without cuBLAS's kernels
    ask "$sanitizer" --help 2>/dev/null | grep -q -e '--kernel-name ' || only=(--kernel-regex kns=llm__)
    for tool in memcheck racecheck; do
        for test in test_groups test_graph test_bursts_of_all_modes; do
            part "$tool $test" 25 "$sanitizer" --tool $tool "${only[@]}" --error-exitcode 1 $bin/test_cuda $test \
                >"$out/sanitizer.tmp" 2>&1
            echo "$tool, $test:" "$(grep -e 'ERROR SUMMARY' -e 'RACECHECK SUMMARY' -e 'failed with' -e 'its time' \
                "$out/sanitizer.tmp" | tail -n 2)"
            cat "$out/sanitizer.tmp" >>"$out/sanitizer.log"
        done
    done
    rm -f "$out/sanitizer.tmp"
}

step_ncu() {
    local ncu metrics
    say "Nsight Compute: a layer of Llama-2-7B in bf16"
    ncu=$(command -v ncu || ls /usr/local/cuda*/bin/ncu /opt/nvidia/nsight-compute/*/ncu 2>/dev/null | head -n 1)
    if [ -z "$ncu" ] || ! has_bench; then
        echo "Skipped: ncu is not installed"
        return
    fi
    metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,lts__t_sector_hit_rate.pct,sm__warps_active.avg.pct_of_peak_sustained_active
    metrics+=,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
    part "ncu" 50 "$ncu" --clock-control none --kernel-name regex:product\|attention -s 340 -c 12 --metrics $metrics \
        $bin/bench --few Llama-2-7B bf16 >"$out/ncu.txt" 2>&1
    grep -e llm__ -e '__' "$out/ncu.txt" | tail -n 90
}

step_peer() {
    local gbs
    say "The torch.compile peer"
    if ! ask python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        echo "Skipped: PyTorch with GPU support is not installed"
        return
    fi
    gbs=$(awk -F, '$1 == "Llama-2-7B" && $4 == "read GB/s" { print $5; exit }' "$csv")
    for type in bf16 int8; do
        rows "gptfast.py $type" 110 python3 bench/peers/gptfast.py --weights $type --read-gbs "${gbs:-0}"
    done
    clocks
}

step_shapes() {
    say "Other shapes"
    has_bench && for run in "SmolLM2-135M bf16" "Llama-3.1-8B bf16" "TinyLlama-1.1B bf16" "Llama-3.1-8B int8" \
        "Llama-3.1-8B int4" "TinyLlama-1.1B int4"; do
        bench 30 $run graph
    done
}

step_same() {
    say "The default model's text"
    if [ -n "${LLAMA_BENCH:-}" ] && [ -r "$model" ]; then
        part "llama-bench" 40 "$LLAMA_BENCH" -m "$model" -ngl 99 -p 512 -n 128 -r 3 -o csv >"$out/llama-bench.csv"
        cat "$out/llama-bench.csv"
    fi
    if ! [ -r "$model" ]; then
        echo "Skipped: $model is missing"
        return
    fi
    has_bench && for type in bf16 int8; do
        rows "the comparison with the CPU in $type" 60 $bin/bench --same "$model" $type
    done
}

# Finds HellaSwag's questions, $data, and a model file with a tokenizer, $tokenizer.
find_questions() {
    local folder packed
    data="" tokenizer=$model
    [ -r "$tokenizer" ] || tokenizer=$bin/tokenizer.gguf
    for folder in "${LLM_DATA:-data}" $bin; do
        [ -z "$data" ] && [ -r "$folder/hellaswag_val_full.txt" ] && data=$folder/hellaswag_val_full.txt
        if [ -z "$data" ] && [ -r "$folder/hellaswag_val_full.txt.bz2" ]; then
            data=$bin/hellaswag.txt
            packed=$folder/hellaswag_val_full.txt.bz2
            python3 -c 'import bz2, sys; sys.stdout.buffer.write(bz2.open(sys.argv[1]).read())' "$packed" >$data ||
                bunzip2 -c "$packed" >$data || data=
        fi
    done
    if [ -z "$data" ] || ! [ -r "$tokenizer" ]; then
        echo "Skipped: the questions (LLM_DATA) or the tokenizer are missing"
        return 1
    fi
}

# Scores with LLaMA-33B's shape on one GPU, unless another step has done so.
score_33b() {
    grep -q '^LLaMA-33B,bf16,packed,' "$csv" || bench 75 --hellaswag LLaMA-33B "$tokenizer" "$data"
}

step_hellaswag() {
    say "HellaSwag"
    find_questions || return
    has_bench || return
    bench 45 --hellaswag Llama-2-7B "$tokenizer" "$data"
    score_33b
}

# ---- The end ----

# Prints for each target whether it was met or missed, and by how much.
verdicts() {
    awk -F, '
        function judge(name, value, target, unit, less) {
            if (value == "") printf "  %-52s not measured\n", name
            else if (less ? value + 0 <= target : value + 0 >= target)
                printf "  %-52s met: %.1f%s (target %s%s)\n", name, value, unit, target, unit
            else
                printf "  %-52s MISSED by %.1f%s: %.1f%s (target %s%s)\n", name, less ? value - target : target - value,
                    unit, value, unit, target, unit
        }
        function ratio(a, b) { return a == "" || b == "" || b + 0 == 0 ? "" : a / b }
        { rate[$1, $2, $3, $4] = $5; share[$1, $2, $3, $4] = $6 }
        $1 == "tests" { passed = $5; n = $4; sub(/passed of /, "", n) }
        END {
            m = "Llama-2-7B"; d = "decode at 6"; g = "graph"; t = "torch.compile"
            judge("7B bf16, share of the measured read bandwidth", share[m, "bf16", g, d], 92, " %")
            judge("7B int8, share of the measured read bandwidth", share[m, "int8", g, d], 88, " %")
            judge("7B int4, share of the measured read bandwidth", share[m, "int4", g, d], 80, " %")
            judge("7B bf16 2:4, times bf16", ratio(rate[m, "bf16-2:4", g, d], rate[m, "bf16", g, d]), 1.5, "x")
            judge("7B int8 2:4, times int8", ratio(rate[m, "int8-2:4", g, d], rate[m, "int8", g, d]), 1.35, "x")
            peer = ", times the torch.compile peer"
            judge("7B bf16" peer, ratio(rate[m, "bf16", g, d], rate[m, "bf16", t, d]), 1.25, "x")
            judge("7B int8" peer, ratio(rate[m, "int8", g, d], rate[m, "int8", t, d]), 1.6, "x")
            judge("7B bf16, prefill of 2,048 tokens, MFU", share[m, "bf16", g, "prefill 2048"], 75, " %")
            judge("135M bf16, tokens per second", rate["SmolLM2-135M", "bf16", g, d], 2500, "")
            all = rate["LLaMA-33B", "bf16", "packed", "HellaSwag: seconds for all 10042"]
            judge("LLaMA-33B, all of HellaSwag, seconds", all, 250, "", 1)
            four = rate["LLaMA-33B", "bf16", "stages 4", "HellaSwag: seconds for all 10042"]
            judge("LLaMA-33B, all of HellaSwag, 4 GPUs, times one GPU", ratio(all, four), 3.8, "x")
            judge("tests that failed", n == "" ? "" : n - passed, 0, "", 1)
        }' "$csv"
}

# Ends a process if it still runs after some time.
end_after() { # SECONDS PROCESS
    { timeout "$1" tail -f --pid="$2" /dev/null || kill "$2"; } >/dev/null 2>&1 &
}

finish() {
    trap - EXIT TERM INT
    kill ${running:-} ${watching:-} 2>/dev/null
    say "All rows, in $csv; $failures parts failed"
    awk -F, 'NF >= 5 { for (i = 1; i <= 6; i++) printf "| %s ", $i; print "|" }
        NR == 1 { print "|---|---|---|---|---|---|" }' "$csv"
    say "Targets"
    verdicts
    exec >&- 2>&- # so that the log is complete
    end_after 5 "$logging" # a leftover process may still hold the log open
    wait "$logging"
    exit $((failures > 0))
}

find_cuda
if [ "${1:-}" = --build ]; then
    build
    exit
fi
: >"$out/gpu.log"
rm -f "$out/clocks.csv" "$out/tests.log" "$out/sanitizer.log"
echo "model,weights,mode,what,per second,% of the limit" >"$csv"
exec > >(tee -a "$out/gpu.log") 2>&1
logging=$!
end_after $((seconds + 10)) $$
trap finish EXIT
trap 'echo "Stopped by a signal"; failures=$((failures + 1)); exit 1' TERM INT
if ! is_built; then
    say "Build"
    build || ! $bin/bench --help >/dev/null 2>&1 || echo "The programs from an earlier build of other sources are used"
fi
nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,clocks_throttle_reasons.active \
    --format=csv,noheader,nounits -lms 500 >"$out/clocks.csv" 2>/dev/null &
watching=$!
for step in ${*:-$steps}; do
    if [[ " $steps " == *" $step "* ]]; then
        step_"$step"
    else
        echo "Unknown step $step; the steps are: $steps"
        failures=$((failures + 1))
    fi
done
