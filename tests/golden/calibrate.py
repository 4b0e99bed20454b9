#!/usr/bin/env python3
"""Writes calibrate.bin: reference results for llm_calibrate and for the functions that use its importance. They come from
a float64 forward pass and simple searches in NumPy.

    python3 calibrate.py sparse/dense calibrate.bin

The file contains:

1  int32 n, n bytes of text; int32 n, n int32 token ids; int32 n_ctx: the model reads pieces of n_ctx tokens.
2  int32 n, then for each of n matrices of sparse/dense: char name[64], int32 rows, int32 cols, float64 mean_squares[cols]
   of its inputs over all tokens, and uint8 kept[rows][cols]: 1 for the two of each four weights with the largest
   |w| * sqrt(mean square) (Wanda; Sun et al. 2023, arXiv:2306.11695).
3  int32 n, int32 n_types; n float32 weights, n float32 importances; then for each type int32 type (GGUF's number) and
   float64 error[n / 256]: for each 256 weights, the least sum of importance * (w - w')^2 that a search from many starts
   finds. Each group has a scale and, if the type has minimums, a minimum, which are not rounded. The types' own scales are
   rounded, so their best blocks have about this error or a little more.
"""
import json
import re
import struct
import sys

import numpy as np

N_CTX = 32
TEXT = " ".join(["the and of a in then an ofa the bead", "deaf cab in the fade and the face of a cafe", "the band had an idea"] * 5)


def read_tensors(path):
    data = open(path, "rb").read()
    n = struct.unpack("<Q", data[:8])[0]
    out = {}
    for name, t in json.loads(data[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        raw = data[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]]
        if t["dtype"] == "BF16":
            w = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            assert t["dtype"] == "F32"
            w = np.frombuffer(raw, np.float32)
        out[name] = w.astype(np.float64).reshape(t["shape"])
    return out


def encode(folder):
    """Encodes lower-case words separated by single spaces, with byte-level BPE."""
    t = json.load(open(f"{folder}/tokenizer.json"))["model"]
    ranks = {tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(t["merges"])}
    ids = []
    for word in re.findall(" ?[a-z]+", TEXT):
        parts = list(word.replace(" ", "\u0120"))
        while True:
            pairs = [(ranks.get(p, 1 << 30), i) for i, p in enumerate(zip(parts, parts[1:]))]
            if not pairs or min(pairs)[0] == 1 << 30:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [t["vocab"][p] for p in parts]
    return ids


def forward(w, config, tokens, sums):
    """Runs a forward pass, and adds the squares of each matrix's inputs to sums[name]."""
    heads, d, eps = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]
    n, half = len(tokens), config["head_dim"] // 2
    angle = np.outer(np.arange(n), config["rope_parameters"]["rope_theta"] ** (-np.arange(half) / half))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(v, g):
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + eps) * g

    def rotate(v):
        a, b = v[..., :half], v[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def times(v, name):
        sums[name] = sums.get(name, 0) + (v * v).sum(0)
        return v @ w[name].T

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (times(h, p + f"self_attn.{c}_proj.weight").reshape(n, -1, d) for c in "qkv")
        k, v = (np.repeat(t, heads // t.shape[1], 1) for t in (k, v))
        s = np.einsum("ihd,jhd->hij", rotate(q), rotate(k)) / np.sqrt(d)
        s[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        s = np.exp(s - s.max(-1, keepdims=True))
        s /= s.sum(-1, keepdims=True)
        x = x + times(np.einsum("hij,jhd->ihd", s, v).reshape(n, -1), p + "self_attn.o_proj.weight")
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        g, u = times(h, p + "mlp.gate_proj.weight"), times(h, p + "mlp.up_proj.weight")
        x = x + times(g / (1 + np.exp(-g)) * u, p + "mlp.down_proj.weight")
    times(norm(x, w["model.norm.weight"]), "lm_head.weight")


def wanda(w, mean_squares):
    """Marks the two of each four weights with the largest scores. Fails if two scores are so close that rounding decides."""
    scores = (np.abs(w) * np.sqrt(mean_squares)).reshape(-1, 4)
    order = np.argsort(-scores, axis=1, kind="stable")
    second, third = (np.take_along_axis(scores, order[:, i : i + 1], 1) for i in (1, 2))
    assert ((second - third > 1e-4 * second) | (second < 1e-30)).all()
    kept = np.zeros(scores.shape, np.uint8)
    np.put_along_axis(kept, order[:, :2], 1, 1)
    return kept.reshape(w.shape)


def least_error(x, h, low, high, affine, negative):
    """Returns the least error of a group. Starts with many scales and minimums; 30 times rounds the weights, then solves for
    the best scale and minimum."""
    seen = x[h > 0] if (h > 0).any() else x
    spread, largest = seen.max() - seen.min(), np.abs(seen).max()
    if affine:
        a, b = np.meshgrid(np.linspace(-0.15, 0.4, 56), np.linspace(-0.15, 0.4, 56))
        m = (seen.min() + a * spread).ravel()
        s = ((seen.max() - b * spread).ravel() - m) / (high - low)
        if negative:
            m = np.minimum(m, 0)
    else:
        s = np.concatenate([largest / end * np.linspace(0.5, 1.2, 800) for end in (low, high, -low, -high)])
        m = np.zeros(s.shape)
    best = np.inf
    for _ in range(30):
        s = np.where(s == 0, 1e-30, s)
        q = np.clip(np.rint((x - m[:, None]) / s[:, None]), low, high)
        best = min(best, (h * (q * s[:, None] + m[:, None] - x) ** 2).sum(1).min())
        w, l, l2, sx, xl = h.sum(), (h * q).sum(1), (h * q * q).sum(1), (h * x).sum(), (h * q * x).sum(1)
        alone = np.divide(xl, l2, out=np.zeros(s.shape), where=l2 > 0)
        if not affine:
            s = alone
            continue
        det = w * l2 - l * l
        ok = det > 1e-9 * w * l2
        m2 = np.divide(l2 * sx - l * xl, det, out=m.copy(), where=ok)
        s2 = np.divide(w * xl - sx * l, det, out=s.copy(), where=ok)
        s, m = (np.where(m2 > 0, alone, s2), np.minimum(m2, 0)) if negative else (s2, m2)
    return best


# GGUF's number, weights per group, smallest q, largest q, has minimums, minimums are at most 0
TYPES = {"Q4_0": (2, 32, -8, 7, False, False), "Q4_1": (3, 32, 0, 15, True, False), "Q5_0": (6, 32, -16, 15, False, False),
         "Q5_1": (7, 32, 0, 31, True, False), "Q8_0": (8, 32, -127, 127, False, False), "Q4_K": (12, 32, 0, 15, True, True),
         "Q5_K": (13, 32, 0, 31, True, True), "Q6_K": (14, 16, -32, 31, False, False)}


def blocks():
    rng = np.random.default_rng(20)
    x = rng.standard_normal((6, 256))
    h = 2.0 ** rng.uniform(-8, 0, (6, 256))
    x[0] *= 0.02
    x[1, ::37] *= 6  # outliers
    h[2] = 2.0 ** rng.uniform(-16, 0, 256) * (rng.random(256) < 0.7)  # some inputs are always zero
    x[3, 64:] = np.abs(x[3, 64:]) + 0.5  # the minimum is above 0
    x[4] = np.round(x[4] * 4) / 4  # ties
    h[5] = 1
    return x.astype(np.float32), h.astype(np.float32)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    w = read_tensors(f"{sys.argv[1]}/model.safetensors")
    config = json.load(open(f"{sys.argv[1]}/config.json"))
    ids, sums = encode(sys.argv[1]), {}
    for i in range(0, len(ids), N_CTX):
        forward(w, config, ids[i : i + N_CTX], sums)
    with open(sys.argv[2], "wb") as f:
        f.write(struct.pack("<i", len(TEXT)) + TEXT.encode() + struct.pack(f"<{len(ids) + 2}i", len(ids), *ids, N_CTX))
        f.write(struct.pack("<i", len(sums)))
        for name, squares in sums.items():
            mean = squares / len(ids)
            f.write(struct.pack("<64s2i", name.encode(), *w[name].shape) + mean.tobytes() + wanda(w[name], mean).tobytes())
        x, h = blocks()
        f.write(struct.pack("<2i", x.size, len(TYPES)) + x.tobytes() + h.tobytes())
        for kind, n, low, high, affine, negative in TYPES.values():
            groups = zip(x.astype(np.float64).reshape(-1, n), h.astype(np.float64).reshape(-1, n))
            errors = np.array([least_error(a, b, low, high, affine, negative) for a, b in groups])
            f.write(struct.pack("<i", kind) + errors.reshape(len(x), -1).sum(1).tobytes())


main()
