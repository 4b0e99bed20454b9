#!/usr/bin/env python3
"""Writes samplers.jsonl: the distributions of samplers, computed in float64 from the formulas in the papers.

    tests/golden/samplers.py >tests/golden/samplers.jsonl

A line has the logits' seed and scale (see `logits`), the text's tokens, the settings that are not 0, the probability of
each token that can be drawn and, for mirostat, the state after each of these tokens."""
import json
import numpy as np

N = 261


def logits(seed, scale):
    x = np.empty(N)
    for i in range(N):
        seed = (seed * 1664525 + 1013904223) % 2**32
        x[i] = np.float32(np.float32(scale) * np.float32(seed - 2**32 if seed >= 2**31 else seed)) / np.float32(2**31)
    return x


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def keep(p, ids):
    q = np.zeros(N)
    q[ids] = p[ids]
    return q / q.sum()


def dry(x, tokens, s):
    """Penalizes each token by the length of the longest end of the text after which the token has come before."""
    breakers = [b.encode() for b in s.get("dry_breakers", ["\n", ":", '"', "*"])]
    allowed, base, mult = s.get("dry_allowed_length") or 2, s.get("dry_base") or 1.75, s["dry_multiplier"]
    text = tokens[-s["dry_last_n"]:] if s.get("dry_last_n") else tokens
    ends = [i + len(b) for b in breakers for i in range(len(text)) if bytes(text[i:i + len(b)]) == b]
    most = len(text) - max(ends, default=0)
    x = x.copy()
    for token in set(text):
        longest = 0
        for at in range(1, len(text)):
            if text[at] != token:
                continue
            n = 0
            while n < min(at, most) and text[at - 1 - n] == text[len(text) - 1 - n]:
                n += 1
            longest = max(longest, n)
        if longest >= allowed:
            x[token] -= mult * base ** (longest - allowed)
    return x


def distribution(x, tokens, s):
    if s.get("dry_multiplier"):
        x = dry(x, tokens, s)
    x = x / s["temperature"]
    p = softmax(x)
    if s.get("mirostat_tau"):
        mu = 2 * s["mirostat_tau"] + s.get("mirostat_shift", 0)
        kept = np.flatnonzero(-np.log2(p) <= mu)
        return keep(p, kept if len(kept) else [p.argmax()])
    if s.get("top_n_sigma"):
        p = keep(p, x >= x.max() - s["top_n_sigma"] * x.std())
    order = np.argsort(-p, kind="stable")
    if s.get("top_k"):
        p = keep(p, order[:s["top_k"]])
    if s.get("typical_p"):
        q = p[p > 0]
        entropy = -(q * np.log(q)).sum()
        ids = np.flatnonzero(p)
        ids = ids[np.argsort(np.abs(-np.log(p[ids]) - entropy), kind="stable")]
        p = keep(p, ids[:int((np.cumsum(p[ids]) <= s["typical_p"]).sum()) + 1])
    order = np.argsort(-p, kind="stable")
    if s.get("top_p"):
        p = keep(p, order[:int((np.cumsum(p[order]) < s["top_p"]).sum()) + 1])
    if s.get("min_p"):
        p = keep(p, p >= s["min_p"] * p.max())
    if s.get("xtc_probability"):
        order = np.argsort(-p, kind="stable")
        n = int((p >= s["xtc_threshold"]).sum())
        q = keep(p, order[n - 1:]) if n > 1 and s["xtc_threshold"] <= 0.5 else p
        p = (1 - s["xtc_probability"]) * p + s["xtc_probability"] * q
    return p


TEXT = list(b"one two three. one two three; one two")
SETTINGS = [
    {"top_n_sigma": 0.5},
    {"top_n_sigma": 1},
    {"top_n_sigma": 0.01},
    {"top_n_sigma": 1.2, "temperature": 2.5},
    {"top_n_sigma": 1, "top_k": 12, "min_p": 0.05},
    {"typical_p": 0.2},
    {"typical_p": 0.5},
    {"typical_p": 0.9},
    {"typical_p": 0.6, "temperature": 0.7},
    {"typical_p": 0.3, "top_k": 20},
    {"typical_p": 0.7, "top_p": 0.8, "min_p": 0.1},
    {"top_n_sigma": 1, "typical_p": 0.8},
    {"mirostat_tau": 1},
    {"mirostat_tau": 2.5},
    {"mirostat_tau": 5},
    {"mirostat_tau": 2, "mirostat_eta": 0.5, "mirostat_shift": -1.5},
    {"mirostat_tau": 1, "mirostat_shift": -9},
    {"mirostat_tau": 2, "top_k": 1, "typical_p": 0.1, "temperature": 0.8},
    {"mirostat_tau": 3, "mirostat_shift": 100},
    {"xtc_probability": 1, "xtc_threshold": 0.05},
    {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"xtc_probability": 0.3, "xtc_threshold": 0.02, "top_k": 30},
    {"xtc_probability": 1, "xtc_threshold": 0.51},
    {"xtc_probability": 1, "xtc_threshold": 0},
    {"xtc_probability": 1, "xtc_threshold": 0.1, "typical_p": 0.5, "min_p": 0.02},
    {"dry_multiplier": 0.8},
    {"dry_multiplier": 0.5, "dry_base": 1.2, "dry_allowed_length": 4},
    {"dry_multiplier": 0.8, "dry_last_n": 20},
    {"dry_multiplier": 0.3, "dry_allowed_length": 1, "dry_base": 1},
    {"dry_multiplier": 0.8, "dry_breakers": []},
    {"dry_multiplier": 0.8, "dry_breakers": ["; o", "x"]},
    {"dry_multiplier": 0.8, "dry_breakers": ["e t"]},
    {"dry_multiplier": 0.01, "dry_base": 1e30},
    {"dry_multiplier": 0.8, "dry_breakers": [" "]},
    {"dry_multiplier": 0.8, "dry_allowed_length": 8, "dry_breakers": ["."]},
    {"dry_multiplier": 0.5, "top_n_sigma": 1, "top_k": 30, "typical_p": 0.9, "top_p": 0.95, "min_p": 0.02, "xtc_probability": 0.5, "xtc_threshold": 0.1},
]

for number, settings in enumerate(SETTINGS):
    scale = 4 if number % 2 else 8
    s = {"temperature": 1, **settings}
    seed = 100 + number
    exact = {name: float(np.float32(v)) if isinstance(v, float) else v for name, v in s.items()}
    x = logits(seed, scale)
    x[[ord(c) for c in " t"]] = x.max() - 0.25  # the token that would continue the repetition is likely
    p = distribution(x, TEXT, exact)
    line = {"seed": seed, "scale": scale, "text": TEXT, "sampler": s,
            "p": {str(i): float("%.6g" % p[i]) for i in np.flatnonzero(p > 1e-9)}}
    if "mirostat_tau" in s:
        eta = exact.get("mirostat_eta", float(np.float32(0.1)))
        shift = exact.get("mirostat_shift", 0)
        line["shifts"] = {str(i): float("%.6g" % (shift - eta * (-np.log2(p[i]) - exact["mirostat_tau"])))
                          for i in np.flatnonzero(p > 1e-9)}
    print(json.dumps(line))
