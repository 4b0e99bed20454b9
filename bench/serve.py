#!/usr/bin/env python3
"""Measures a server with OpenAI's API, and checks that all answers are complete.

    build/server -m MODEL -p 8080 --parallel 8 &
    bench/serve.py http://127.0.0.1:8080 --clients 1,8,32 --requests 200
    bench/serve.py http://127.0.0.1:8080 --clients 16 --requests 10000 --tokens 4 --cancel 0.1 --pid PID

Each client sends one request after the other over its own connection, streamed, at temperature 0. The same prompt must give
the same text each time. --cancel is the share of requests that hang up after the first piece. With --pid, the script reads
the memory of the server from /proc before and after. It can measure any OpenAI-compatible server, also llama-server, and
only needs Python's standard library.
"""
import argparse, http.client, json, random, threading, time, urllib.parse

SUBJECTS = ["the sea", "a bridge", "bread", "the moon", "a horse", "rain", "music", "iron", "a garden", "winter",
            "glass", "a river", "the wind", "salt", "a clock", "paper", "a forest", "fire", "a city", "wool"]


class Load:
    def __init__(self, args, clients):
        self.args, self.clients = args, clients
        self.lock = threading.Lock()
        self.left = args.requests
        self.texts = {}  # the text for each prompt, which must always be the same
        self.first, self.gaps, self.problems, self.changed = [], [], [], []
        self.tokens = self.answered = self.cancelled = 0

    def take(self):
        with self.lock:
            self.left -= 1
            return self.left >= 0

    def request(self, connection, rng):
        prompt = f"Some facts about {rng.choice(SUBJECTS)}:"
        body = {"model": self.args.model, "prompt": prompt, "max_tokens": self.args.tokens, "temperature": 0, "stream": True}
        if self.args.ignore_end:
            body["ignore_eos"] = True
        cancels = rng.random() < self.args.cancel
        start = last = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {answer.read()[:200]!r}")
        text, pieces, reason, done, first, gaps = "", 0, None, False, None, []
        while not done:
            line = answer.readline()
            if not line:
                raise RuntimeError("the answer ended without [DONE]")
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic()
            if line.strip() == b"data: [DONE]":
                done = True
                break
            choices = json.loads(line[6:])["choices"]
            if not choices:
                continue
            reason = choices[0]["finish_reason"] or reason
            if not choices[0]["text"]:
                continue
            text += choices[0]["text"]
            pieces += 1
            if first is None:
                first = now - start
            else:
                gaps.append(now - last)
            last = now
            if cancels:
                connection.close()
                with self.lock:
                    self.cancelled += 1
                return
        answer.read()
        with self.lock:
            if reason is None:
                self.problems.append(f"no finish_reason for: {prompt}")
            if self.texts.setdefault(prompt, text) != text:
                self.changed.append(f"a different text: {prompt} {text!r} instead of {self.texts[prompt]!r}")
            self.answered += 1
            self.tokens += pieces
            if first is not None:
                self.first.append(first)
            self.gaps += gaps

    def client(self, number):
        rng = random.Random(number)
        url = urllib.parse.urlsplit(self.args.url)
        while self.take():
            # A connection of its own for each request, as some servers close one after a number of answers.
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
            try:
                self.request(connection, rng)
            except (OSError, RuntimeError, ValueError, KeyError, http.client.HTTPException) as problem:
                with self.lock:
                    self.problems.append(repr(problem))
            finally:
                connection.close()

    def run(self):
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(self.clients)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = time.monotonic() - start


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def resident(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="any", help="the model's name in requests")
    parser.add_argument("--clients", default="1,8,32", help="numbers of concurrent clients, one row for each")
    parser.add_argument("--requests", type=int, default=200, help="requests of all clients together")
    parser.add_argument("--tokens", type=int, default=64, help="max tokens of an answer")
    parser.add_argument("--cancel", type=float, default=0, help="share of the requests that hang up after the first piece")
    parser.add_argument("--ignore-end", action="store_true", help="request answers of full length (llama-server's ignore_eos)")
    parser.add_argument("--pid", type=int, help="the server's process id, to measure its memory")
    args = parser.parse_args()
    problems = 0
    print("| clients | requests | cancelled | requests/s | tokens/s | first token ms, p50 | p99 | gap ms, p50 | p99 | problems |"
          + (" MiB before | after |" if args.pid else ""))
    print("| ---: " * (12 if args.pid else 10) + "|")
    for clients in map(int, args.clients.split(",")):
        before = resident(args.pid) if args.pid else 0
        load = Load(args, clients)
        load.run()
        ms = [1000 * x for x in (percentile(load.first, .5), percentile(load.first, .99),
                                 percentile(load.gaps, .5), percentile(load.gaps, .99))]
        row = [clients, load.answered, load.cancelled, f"{load.answered / load.seconds:.1f}", f"{load.tokens / load.seconds:.0f}",
               *(f"{x:.1f}" for x in ms), len(load.problems) + len(load.changed)]
        if args.pid:
            row += [f"{before:.0f}", f"{resident(args.pid):.0f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        for problem in (load.problems + load.changed)[:5]:
            print("  " + problem)
        problems += len(load.problems) + len(load.changed)
        if load.answered + load.cancelled + len(load.problems) < args.requests:
            problems += 1
            print("  some requests were never answered")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
