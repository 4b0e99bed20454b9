#!/bin/sh
# Runs every step and leaves one .out file of each:  examples/walkthrough/run.sh MODEL FOLDER [NAME...]
# With names only those whose name contains one of them are run.
# `make walkthrough` calls it. QUICK=1 makes one short sample of each, to see that all of it works.
set -eu
model=$1 folder=$2
shift 2
only=$*
text=tests/golden/heldout.txt
mkdir -p "$folder"
export OMP_PROC_BIND="${OMP_PROC_BIND:-true}"
samples='--samples 5' long='--long 512' predict='--perplexity 512'
if [ "${QUICK:-}" ]; then samples='--samples 1 -n 24' long='' predict=''; fi

wanted() { # NAME
    [ "$only" ] || return 0
    for part in $only; do case $1 in *$part*) return 0 ;; esac; done
    return 1
}

step() { # NAME PROGRAM OPTIONS...
    name=$1 program=$2
    shift 2
    wanted "$name" || return 0
    printf '  %-22s' "$name"
    $launch build/walkthrough/"$program" -m "$model" $samples --ids "$folder/$name.ids" "$@" >"$folder/$name.out"
    sed -n 's/^Average tokens\/sec: \(.*\)/\1 tok\/s/p' "$folder/$name.out"
}

launch=
step 00-eager 00-eager
step 01-compiled 01-compiled
step 02-static-cache 02-static-cache --text $text $long
step 03-online-softmax 03-online-softmax --text $text $long $predict
step 04-int8 04-int8 --text $text $long $predict
step 05-int4 05-int4 --text $text $long $predict
step 06-speculative 06-speculative
step 06-with-lookup 06-speculative --draft lookup
if [ -x build/walkthrough/07-tensor-parallel ]; then
    launch="env OMP_NUM_THREADS=1 mpirun --oversubscribe -n 2"
    [ "$(id -u)" != 0 ] || launch="$launch --allow-run-as-root"
    step 07-tensor-parallel 07-tensor-parallel
    launch=
else
    echo "  07-tensor-parallel    left out: there is no mpicc"
    rm -f "$folder/07-tensor-parallel.out"
fi
step 08-bf16-dense 08-sparse --weights bf16 --text $text $predict
step 08-bf16-sparse 08-sparse --weights "bf16 2:4" --text $text $predict
step 08-int8-dense 08-sparse --weights int8 --text $text $predict
step 08-int8-sparse 08-sparse --weights "int8 2:4" --text $text $predict
if wanted 09-scoring; then
    echo "  09-scoring"
    bench/hellaswag.sh "$model" --data tests/hellaswag.jsonl >"$folder/09-scoring.md" 2>"$folder/09-scoring.log"
fi
# OpenMP would bind the first thread to one processor before the library starts its own, which would then share it.
launch='env -u OMP_PROC_BIND'
for type in f32 bf16 int8 int4; do step library-$type 03-online-softmax --library $type --text $text $long; done
