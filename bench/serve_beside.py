#!/usr/bin/env python3
"""Measures build/server and llama.cpp's server with the same model, in alternating rounds.

    bench/serve_beside.py MODEL [LLAMA_SERVER] [--clients 1,8,32] [--step TOKENS]
    bench/serve_beside.py MODEL --real-time

Prints the medians of three rounds for 1, 8 and 32 clients, which serve.py describes. The last column counts answers that
differ from an earlier answer to the same prompt in the same round. LLAMA_SERVER is a program with llama-server's options
-m, --port, --parallel, -c and -t. Without it, only build/server is measured. --step is an option of build/server.

The last line shows how much of the cores other programs used during the measurement. Such a program keeps a core for some
milliseconds at a time, which increases the p99 of the gaps. With --real-time (needs root), build/server and the clients get
priority over all other programs: first the clients, then the sending thread, then the computing threads. The kernel still
gives 5 % of each second to other programs, in one piece, which is the longest gap.
"""
import argparse, os, statistics, subprocess, sys, time, types, urllib.request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serve

CLIENTS, ROUNDS, TOKENS = (1, 8, 32), 3, 64
REQUESTS = {1: 6, 8: 32, 32: 64}


def start(command, port):
    """Starts a server and waits until it answers /health."""
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
    return figures, len(load.changed), load.problems


def seconds_of_all():
    """Returns the CPU time of all programs, including steal, the time that other virtual machines used."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def seconds_of(processes):
    """Returns the CPU time of these processes and of this one."""
    used = sum(os.times()[:2])
    for process in processes:
        with open(f"/proc/{process.pid}/stat") as stat:
            used += sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return used


def go_first(process):
    """Gives this program and build/server priority over all others."""
    for task in os.listdir(f"/proc/{process.pid}/task"):
        with open(f"/proc/{process.pid}/task/{task}/comm") as name:
            sends = name.read().startswith("MHD")
        os.sched_setscheduler(int(task), os.SCHED_FIFO, os.sched_param(2 if sends else 1))
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("llama_server", nargs="?")
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)))
    parser.add_argument("--step")
    parser.add_argument("--real-time", action="store_true")
    args = parser.parse_args()
    if args.real_time and args.llama_server:
        parser.error("--real-time only works with build/server")
    numbers = [int(number) for number in args.clients.split(",")]
    if any(number not in CLIENTS for number in numbers):
        parser.error("--clients takes 1, 8 and 32")
    n = str(max(CLIENTS))
    cores = str(len(os.sched_getaffinity(0)))
    commands = {"llm.h": ["build/server", "-m", args.model, "-p", "18080", "--parallel", n]}
    if args.step:
        commands["llm.h"] += ["--step", args.step]
    if args.llama_server:
        commands["llama.cpp"] = [args.llama_server, "-m", args.model, "--port", "18081", "--parallel", n,
                                 "-c", str(512 * max(CLIENTS)), "-t", cores]
    ports = {"llm.h": 18080, "llama.cpp": 18081}
    processes, problems = [], []
    try:
        for name, command in commands.items():
            processes.append(start(command, ports[name]))
            measure(ports[name], 1)  # reads the weights once
        if args.real_time:
            go_first(processes[0])
        begin, all_before, own_before = time.monotonic(), seconds_of_all(), seconds_of(processes)
        print("| clients | server | requests/s | tokens/s | first token ms, p50 | p99 | gap ms, p50 | p99 | p99/p50 | changed texts |")
        print("| ---: | --- |" + " ---: |" * 8)
        for clients in numbers:
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
        others = seconds_of_all() - all_before - (seconds_of(processes) - own_before)
        print(f"Other programs used {100 * max(others, 0) / (os.cpu_count() * (time.monotonic() - begin)):.0f} % of the cores.")
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    if problems:
        raise SystemExit("\n".join(problems[:5] + [f"{len(problems)} requests failed"]))


if __name__ == "__main__":
    main()
