#!/usr/bin/env python3
"""Measures build/server beside llama.cpp's server, on the same model, in alternating rounds.

    bench/serve_beside.py MODEL [LLAMA_SERVER]

Prints the medians of three rounds for 1, 8 and 32 clients; see serve.py for what a client does. The last column counts
answers that differ from an earlier answer to the same prompt in that round. LLAMA_SERVER is any program that takes
llama-server's options -m, --port, --parallel, -c and -t. Without it only build/server is measured.
"""
import argparse, os, statistics, subprocess, sys, time, types, urllib.request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serve

CLIENTS, ROUNDS, TOKENS = (1, 8, 32), 3, 64
REQUESTS = {1: 6, 8: 32, 32: 64}


def start(command, port):
    """A server that runs and answers /health."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(.1)
    process.kill()
    raise SystemExit(f"{command[0]} did not start")


def measure(port, clients):
    args = types.SimpleNamespace(url=f"http://127.0.0.1:{port}", model="any", requests=REQUESTS[clients], tokens=TOKENS,
                                 cancel=0, ignore_end=False)
    load = serve.Load(args, clients)
    load.run()
    figures = [load.answered / load.seconds, load.tokens / load.seconds]
    figures += [1000 * serve.percentile(values, share) for values in (load.first, load.gaps) for share in (.5, .99)]
    changed = sum(problem.startswith("another text") for problem in load.problems)
    return figures, changed, [problem for problem in load.problems if not problem.startswith("another text")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("llama_server", nargs="?")
    args = parser.parse_args()
    n = str(max(CLIENTS))
    cores = str(len(os.sched_getaffinity(0)))
    commands = {"llm.h": ["build/server", "-m", args.model, "-p", "18080", "--parallel", n]}
    if args.llama_server:
        commands["llama.cpp"] = [args.llama_server, "-m", args.model, "--port", "18081", "--parallel", n,
                                 "-c", str(512 * max(CLIENTS)), "-t", cores]
    ports = {"llm.h": 18080, "llama.cpp": 18081}
    processes, problems = [], []
    try:
        for name, command in commands.items():
            processes.append(start(command, ports[name]))
            measure(ports[name], 1)  # reads the weights once
        print("| clients | server | requests/s | tokens/s | first token ms, p50 | p99 | gap ms, p50 | p99 | p99/p50 | changed texts |")
        print("| ---: | --- |" + " ---: |" * 8)
        for clients in CLIENTS:
            rounds, changed = {name: [] for name in commands}, dict.fromkeys(commands, 0)
            for _ in range(ROUNDS):
                for name in commands:
                    figures, other, lost = measure(ports[name], clients)
                    rounds[name].append(figures)
                    changed[name] += other
                    problems += [f"{name}, {clients} clients: {problem}" for problem in lost]
            for name, all_figures in rounds.items():
                f = [statistics.median(column) for column in zip(*all_figures)]
                print(f"| {clients} | {name} | {f[0]:.1f} | {f[1]:.0f} | " + " | ".join(f"{x:.1f}" for x in f[2:]) +
                      f" | {f[5] / f[4]:.1f} | {changed[name]} |", flush=True)
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    if problems:
        raise SystemExit("\n".join(problems[:5] + [f"{len(problems)} requests failed"]))


if __name__ == "__main__":
    main()
