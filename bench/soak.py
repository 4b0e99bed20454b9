#!/usr/bin/env python3
"""Sends a server random small requests, some of them invalid or aborted, and looks for leaks.

    build/server -m MODEL -p 8080 --ctx 512 --cache 1024 & bench/soak.py http://127.0.0.1:8080 --pid $!

The server keeps prefixes of prompts until its cache is full, so its memory grows at first. With a small cache this ends soon.

Sends chats and texts, whole and streamed, with stops, seeds, log-probabilities, schemas, echo, several prompts and tools;
requests that must be refused (no JSON, wrong values, wrong addresses, large bodies); and clients that hang up during the
request, before the answer or during it. Prints how often each kind was sent and each status was received, and the server's
memory and open files after each tenth. Fails if a request gets no answer or a status of 500 or above, if requests or files
remain open, or if the memory grows by more than 5 % in the second half. Only needs Python's standard library.
"""
import argparse, collections, http.client, json, os, random, socket, threading, time, urllib.parse

WORDS = "sea bridge bread moon horse rain music iron garden winter glass river wind salt clock paper forest fire city wool".split()
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"enum": WORDS}}, "required": ["at"], "additionalProperties": False}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": WORDS}}}
WRONG = [b"{", b"[]", b'{"prompt":7}', b'{"prompt":"a","stop":[1]}', b'{"messages":[]}', b'{"prompt":[99999999]}',
         b'{"prompt":"a","temperature":"x"}', b'{"prompt":"a","logit_bias":{"x":1}}', b'{"prompt":[[]]}', b"\xff\0",
         b'{"messages":[{"role":"user","content":"a"}],"tools":[{}]}', b'{"prompt":"a","n":2}',
         b'{"messages":[{"role":"user","content":"a"}],"prompt":"a","response_format":{"type":"json_schema","json_schema":{"schema":{"nonsense":1}}}}']


def some_request(rng):
    """Returns the kind, the path and the body."""
    body = {"model": "any", "max_tokens": rng.randint(1, 6), "stream": rng.random() < .5, "temperature": rng.choice([0, 1])}
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    more = rng.choice(["", "stop", "seed", "logprobs", "response_format", "special"])
    chat = rng.random() < .5
    if chat:
        body["messages"] = [{"role": "user", "content": words}]
    else:
        body["prompt"] = words
    if more == "stop":
        body["stop"] = rng.sample(WORDS, 2)
    elif more == "seed":
        body |= {"seed": rng.randint(0, 9), "frequency_penalty": 1, "logit_bias": {"5": -100}}
    elif more == "logprobs":
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2, "echo": rng.random() < .5}
    elif more == "response_format":
        body["response_format"] = SCHEMA
    elif more == "special" and chat:
        body |= {"tools": [TOOL], "tool_choice": rng.choice(["auto", "required", "none"]), "max_tokens": rng.choice([2, 30])}
    elif more == "special":
        body["prompt"] = [words, [1, 2, 3], "a"][:rng.randint(1, 3)]
    return ("chat " if chat else "text ") + more, "/v1/chat/completions" if chat else "/v1/completions", body


class Soak:
    def __init__(self, args):
        self.args, self.lock = args, threading.Lock()
        self.taken, self.kinds, self.statuses, self.problems = 0, collections.Counter(), collections.Counter(), []
        self.begin = time.monotonic()
        self.url = urllib.parse.urlsplit(args.url)

    def count(self, kind, status):
        with self.lock:
            self.kinds[kind] += 1
            self.statuses[status] += 1

    def done(self):
        """Returns which part of the test is over."""
        if self.args.seconds:
            return (time.monotonic() - self.begin) / self.args.seconds
        return self.taken / self.args.requests

    def take(self):
        with self.lock:
            if self.done() >= 1:
                return False
            self.taken += 1
            return True

    def hang_up(self, rng):
        """Sends an incomplete request, or does not read the answer or only its beginning."""
        kind, path, body = some_request(rng)
        body["max_tokens"] = 40
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        whole, where = head + data, rng.randrange(3)
        with socket.create_connection((self.url.hostname, self.url.port)) as connection:
            connection.sendall(whole[:rng.randrange(len(whole))] if where == 0 else whole)
            if where == 2:
                connection.settimeout(60)
                connection.recv(rng.randint(1, 600))
            elif where == 1:
                time.sleep(rng.random() / 20)
        self.count(f"hangs up {('within the request', 'before the answer', 'within the answer')[where]}", "none")

    def request(self, connection, rng):
        chance = rng.random()
        if chance < self.args.cancel:
            return self.hang_up(rng)
        kind, path, body = some_request(rng)
        data, method, headers = json.dumps(body).encode(), "POST", {"Content-Type": "application/json"}
        if chance < self.args.cancel + self.args.wrong:
            kind, path = "wrong", rng.choice([path, path, path, "/v1/nothing"])
            data, method = rng.choice(WRONG + [b"a" * 2000000]), rng.choice(["POST", "POST", "POST", "PUT"])
        elif chance > .98:
            kind, path, data, method = "get", rng.choice(["/health", "/metrics", "/v1/models", "/"]), None, "GET"
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        text = answer.read()
        self.count(kind, answer.status)
        ends = b"[DONE]" in text or not body["stream"] or kind in ("wrong", "get")
        if answer.status >= 500 or not text or (answer.status == 200 and not ends):
            raise RuntimeError(f"{kind}: status {answer.status}, {text[:200]!r}")

    def client(self, number):
        rng = random.Random(number)
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=300)
        while self.take():
            try:
                self.request(connection, rng)
            except (OSError, RuntimeError, http.client.HTTPException) as problem:
                connection.close()
                with self.lock:
                    self.problems.append(repr(problem))
        connection.close()

    def state(self):
        """Returns the server's memory in MiB and number of open files."""
        with open(f"/proc/{self.args.pid}/status") as status:
            memory = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
        return memory, len(os.listdir(f"/proc/{self.args.pid}/fd"))

    def metric(self, name):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=300)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"llm_{name} ")))

    def run(self):
        begin = self.state()
        print(f"at the beginning {begin[0]:.1f} MiB, {begin[1]} files", flush=True)
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(self.args.clients)]
        for thread in threads:
            thread.start()
        states = []
        for tenth in range(1, 11):
            while self.done() < tenth / 10 and any(t.is_alive() for t in threads):
                time.sleep(.1)
            states.append(self.state())
            print(f"after {self.taken} requests {states[-1][0]:.1f} MiB, {states[-1][1]} files", flush=True)
        for thread in threads:
            thread.join()
        for _ in range(100):
            waits = self.metric("requests_running") + self.metric("requests_waiting")
            if not waits and self.state()[1] <= begin[1]:
                break
            time.sleep(.1)
        end = self.state()
        print(f"at the end {end[0]:.1f} MiB, {end[1]} files")
        print(*(f"{n} {kind}" for kind, n in sorted(self.kinds.items())), sep=", ")
        print("statuses:", *(f"{n} {status}," for status, n in sorted(self.statuses.items(), key=str)))
        if waits:
            self.problems.append(f"{waits} requests remain")
        if end[1] > begin[1]:
            self.problems.append(f"{end[1] - begin[1]} files remain open")
        if end[0] > 1.05 * states[4][0]:
            self.problems.append("the memory grows")
        for problem in self.problems[:10]:
            print("  " + problem)
        return len(self.problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="the server's process id")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--seconds", type=float, help="how long the test takes, instead of --requests")
    parser.add_argument("--cancel", type=float, default=.1, help="share of the clients that hang up")
    parser.add_argument("--wrong", type=float, default=.2, help="share of invalid requests")
    raise SystemExit(1 if Soak(parser.parse_args()).run() else 0)


if __name__ == "__main__":
    main()
