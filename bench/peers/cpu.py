#!/usr/bin/env python3
"""Measures the same work with build/bench, llama.cpp's llama-bench and OpenVINO GenAI, in alternating rounds: prefill of a
prompt, and decode from an empty cache. Appends each measurement to RESULTS.csv; bench/peers/report.py draws that file.

    cpu.py RESULTS.csv --model MODEL.Q4_1.gguf --llama-bench PATH [--ik-llama-bench PATH] [--prompt 512] [--new 128]
           [--threads 2] [--rounds 5] [--weights bf16,q8_0,q4_1,q4_0] [--no-openvino]

The type "model" is MODEL as it is. llama-quantize, which must be in the same folder as llama-bench, makes files of the other
types from MODEL, in build/peers/models. All programs read the same file, with these exceptions: OpenVINO reads F16 instead of
bf16 (it computes in bf16 if the processor can), Q4_0 instead of Q4_1, which it cannot read, and no Q5_K_M. ik_llama.cpp is
measured twice: as it comes, and with weights that it repacks while loading (-rtr 1). The prompts of llama-bench are random;
those of OpenVINO begin differently each time. LLM_ISA=avx512 (or avx2) prevents llm.h from using the matrix unit.
"""
import argparse
import csv
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

TOP = pathlib.Path(__file__).resolve().parents[2]
FOLDER = TOP / "build" / "peers"
COLUMNS = ["date", "program", "version", "weights", "file", "isa", "threads", "prompt", "new", "round", "prefill_tok_s",
           "decode_tok_s", "bandwidth_gb_s", "gflop_s", "decode_mbu", "prefill_mfu", "load_s"]
FILES = {"bf16": "BF16", "q8_0": "Q8_0", "q4_1": None, "q4_0": "Q4_0", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K",
         "model": None}  # None: the model itself
OPENVINO = {"bf16": "F16", "q8_0": "Q8_0", "q4_1": "Q4_0", "q4_0": "Q4_0", "q6_k": "Q6_K"}


def machine():
    """Returns a line that describes the machine."""
    about = dict(re.findall(r"(.+?):\s+(.+)", run(["lscpu"])))
    flags = about.get("Flags", "").split()
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags]
    memory = re.search(r"MemTotal:\s*(\d+)", pathlib.Path("/proc/meminfo").read_text(encoding="utf-8"))
    parts = [about.get("Model name", platform.machine()), f"family {about.get('CPU family')} model {about.get('Model')}",
             f"{os.cpu_count()} processors", " ".join(kinds), f"L3 {about.get('L3 cache')}", f"{int(memory[1]) >> 20} GiB",
             run(["cc", "--version"]).splitlines()[0]]
    return ", ".join(part for part in parts if part)


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def model_file(args, kind):
    """Returns the model's file with a type. llama-quantize makes it if it is missing."""
    if not kind:
        return args.model
    to = FOLDER / "models" / re.sub(r"(\.Q4_1)?\.gguf$", f".{kind}.gguf", args.model.name)
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        run([args.llama_bench.with_name("llama-quantize"), "--allow-requantize", args.model, to, kind])
    return to


def ours(args, weights):
    file = model_file(args, FILES[weights])
    dtype = "bf16" if weights == "bf16" else "file"
    [got] = json.loads(run([TOP / "build" / "bench", "-m", file, "--dtype", dtype, "-p", args.prompt, "-n", args.new, "-t",
                            args.threads, "-r", 1, "-o", "json"]))
    keep = ("isa", "prefill_tok_s", "decode_tok_s", "bandwidth_gb_s", "gflop_s", "decode_mbu", "prefill_mfu", "load_s")
    return {"program": "llm.h", "file": file.name} | {key: got[key] for key in keep}


def llama_bench(args, weights, program, binary, options=()):
    file = model_file(args, FILES[weights])
    prefill, decode = json.loads(run([binary, "-m", file, "-p", args.prompt, "-n", args.new, "-t", args.threads, "-r", 1,
                                      "-o", "json", *options]))
    return {"program": program, "version": prefill["build_commit"], "file": file.name,
            "prefill_tok_s": prefill["avg_ts"], "decode_tok_s": decode["avg_ts"]}


def llama(args, weights):
    return llama_bench(args, weights, "llama.cpp", args.llama_bench)


def ik_llama(args, weights):
    return llama_bench(args, weights, "ik_llama.cpp", args.ik_llama_bench)


def ik_llama_repacked(args, weights):
    return llama_bench(args, weights, "ik_llama.cpp repacked", args.ik_llama_bench, ["-rtr", 1])


def openvino(args, weights):
    file = model_file(args, OPENVINO[weights])
    text = run([sys.executable, TOP / "bench" / "peers" / "genai.py", file, "--prompt", args.prompt, "--new", args.new,
                "--threads", args.threads])
    return {"program": "OpenVINO GenAI", "file": file.name} | json.loads(text.splitlines()[-1])


def open_results(path):
    """Opens the file for appending. A new file begins with the machine and the columns."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", newline="", encoding="utf-8")
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    if new:
        file.write(f"# {machine()}\n")
        writer.writeheader()
    return file, writer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--llama-bench", type=pathlib.Path, required=True)
    parser.add_argument("--ik-llama-bench", type=pathlib.Path, help="llama-bench of ik_llama.cpp")
    parser.add_argument("--no-openvino", action="store_true")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", default="bf16,q8_0,q4_1,q4_0", help="some of " + ", ".join(FILES))
    args = parser.parse_args()
    kinds = args.weights.split(",")
    if not set(kinds) <= set(FILES):
        parser.error(f"--weights: '{args.weights}' is not a list of {', '.join(FILES)}")
    programs = [ours, llama]
    programs += [ik_llama, ik_llama_repacked] if args.ik_llama_bench else []
    programs += [] if args.no_openvino else [openvino]
    file, writer = open_results(args.results)
    with file:
        for round_ in range(args.rounds):
            for weights in kinds:
                for program in programs:
                    if program is openvino and weights not in OPENVINO:
                        continue
                    row = program(args, weights)
                    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
                    row |= {"date": now, "weights": weights, "threads": args.threads, "prompt": args.prompt, "new": args.new,
                            "round": round_}
                    writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value
                                     for key, value in row.items()})
                    file.flush()
                    print(f"{row['program']:21} {weights:6} prefill {row['prefill_tok_s']:8.1f}  "
                          f"decode {row['decode_tok_s']:7.1f} tok/s", flush=True)


if __name__ == "__main__":
    main()
