#!/usr/bin/env python3
"""Computes reference logits of a Llama-family GGUF file in float64, only with NumPy.

    python3 logits.py MODEL.gguf logits.bin

The forward pass is written from the papers (RMSNorm, rotary embedding, grouped-query attention, SwiGLU) and shares no
code with any other implementation. It computes the logits after each of the 64 tokens of the text below. All of them
would be 12 MB, so the file holds, for each position, the peak, the logits of 256 vocabulary entries (the same for all
positions), and the 16 largest.

logits.bin is little-endian. Every field has four bytes, and there is no padding:

    char[4] "LGT1"
    u32     n_pos, n_vocab, n_probe, n_top      (64, 49152, 256, 16)
    i32     token[n_pos]                        input tokens at positions 0, 1, 2, ...
    i32     probe[n_probe]                      vocabulary ids, ascending
    then n_pos times, one record for each position:
        f32 peak                                max |logit| over the whole vocabulary
        i32 argmax                              the same as top_id[0]
        f32 probe_logit[n_probe]                in the order of probe
        i32 top_id[n_top]                       the largest logits first
        f32 top_logit[n_top]

To compare, use max |ours - reference| / peak at each position.
"""
import struct
import sys

import numpy as np

# "The lighthouse keeper wrote down the weather every evening: wind from the north, 14 knots, rain before
# midnight. Nobody had asked him to do it, but after thirty years the notebooks filled a whole wall, and last
# spring a young woman from the university came to ask if she could read them. He said yes"
TOKENS = [
    504, 33059, 40061, 4150, 1187, 260, 3947, 897, 9053, 42, 2251, 429, 260, 4081, 28, 216, 33, 36, 25035, 28,
    5249, 1092, 25232, 30, 32304, 761, 3413, 1272, 288, 536, 357, 28, 564, 990, 11591, 929, 260, 31837, 4412,
    253, 2444, 4923, 28, 284, 1596, 4921, 253, 1805, 4166, 429, 260, 5006, 2422, 288, 1998, 585, 1041, 856,
    1012, 601, 30, 909, 1137, 9805,
]

N_PROBE, N_TOP, PROBE_SEED = 256, 16, 135

# ---- GGUF: the header, then one description for each tensor, then the data ------------------------------------

SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}
STRING, ARRAY = 8, 9


class Reader:
    """A cursor over the bytes of a file."""

    def __init__(self, data):
        self.data, self.pos = data, 0

    def scalar(self, dtype):
        dtype = np.dtype(dtype)
        value = self.data[self.pos:self.pos + dtype.itemsize].view(dtype)[0]
        self.pos += dtype.itemsize
        return value.item()

    def string(self):
        length = self.scalar("<u8")
        self.pos += length
        return self.data[self.pos - length:self.pos].tobytes().decode("utf-8", "replace")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.scalar("<u4"), self.scalar("<u8")
            return [self.value(kind) for _ in range(count)]
        return self.scalar(SCALARS[kind])


def read_gguf(path):
    """Returns the metadata, and for each tensor (type, shape with rows first, the bytes from its data to the file's end)."""
    data = np.memmap(path, np.uint8, "r")
    r = Reader(data)
    if data[:4].tobytes() != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file")
    r.pos = 8  # past the magic and the version
    n_tensors, n_meta = r.scalar("<u8"), r.scalar("<u8")
    meta = {}
    for _ in range(n_meta):
        key = r.string()
        meta[key] = r.value(r.scalar("<u4"))
    headers = []
    for _ in range(n_tensors):
        name = r.string()
        shape = [r.scalar("<u8") for _ in range(r.scalar("<u4"))][::-1]
        headers.append((name, shape, r.scalar("<u4"), r.scalar("<u8")))
    align = meta.get("general.alignment", 32)
    start = (r.pos + align - 1) // align * align
    return meta, {name: (kind, shape, data[start + offset:]) for name, shape, kind, offset in headers}


# ---- number formats: raw bytes to float64 ---------------------------------------------------------------------
# Block formats hold 32 weights: a scale d (f16), in Q4_1 a minimum m (f16), then the codes.

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
BYTES_PER_BLOCK = {F32: (4, 1), F16: (2, 1), BF16: (2, 1), Q4_0: (18, 32), Q4_1: (20, 32), Q8_0: (34, 32)}


def half(blocks, at):
    """Returns the f16 at byte `at` of every block, as a column."""
    return blocks[:, at:at + 2].copy().view("<f2").astype(np.float64)


def nibbles(blocks, at):
    """Codes 0..15. Byte i holds weight i in its low half and weight i + 16 in its high half."""
    codes = blocks[:, at:]
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float64)


def decode(kind, raw):
    if kind == F32:
        return raw.view("<f4").astype(np.float64)
    if kind == F16:
        return raw.view("<f2").astype(np.float64)
    if kind == BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    blocks = raw.reshape(-1, BYTES_PER_BLOCK[kind][0])
    if kind == Q8_0:
        weights = half(blocks, 0) * blocks[:, 2:].view(np.int8)
    elif kind == Q4_0:
        weights = half(blocks, 0) * (nibbles(blocks, 2) - 8)
    else:
        weights = half(blocks, 0) * nibbles(blocks, 4) + half(blocks, 2)
    # In float64, products and sums of such short numbers are exact. So this is the only rounding, the same as in a float32
    # implementation that uses one fused multiply-add per weight.
    return weights.astype(np.float32).astype(np.float64)


def load(tensors, name):
    kind, shape, data = tensors[name]
    size, per_block = BYTES_PER_BLOCK[kind]
    n_bytes = int(np.prod(shape)) // per_block * size
    return decode(kind, np.array(data[:n_bytes])).reshape(shape)


# ---- the model -------------------------------------------------------------------------------------------------

def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x, base, n_rot):
    """Rotates pairs (2i, 2i + 1) of x [pos, head, dim] by pos * base^(-2i / n_rot).

    GGUF files of the architecture "llama" have the rows of Q and K reordered so that a pair's two halves are
    neighbours; Hugging Face's order would pair i with i + n_rot / 2.
    """
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(0, n_rot, 2) / n_rot)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    even, odd = x[..., 0:n_rot:2], x[..., 1:n_rot:2]
    out = x.copy()
    out[..., 0:n_rot:2] = even * cos - odd * sin
    out[..., 1:n_rot:2] = even * sin + odd * cos
    return out


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v):
    """q [pos, head, dim], k and v [pos, kv_head, dim]. Consecutive query heads share a key head."""
    n, n_head, dim = q.shape
    k = np.repeat(k, n_head // k.shape[1], axis=1)
    v = np.repeat(v, n_head // v.shape[1], axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
    future = np.triu(np.ones((n, n), bool), 1)
    scores[:, future] = -np.inf
    return np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(n, n_head * dim)


def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def forward(meta, tensors, tokens):
    """Logits [pos, vocabulary]."""
    n_head = meta["llama.attention.head_count"]
    n_kv = meta.get("llama.attention.head_count_kv", n_head)
    dim = meta.get("llama.attention.key_length", meta["llama.embedding_length"] // n_head)
    n_rot = meta.get("llama.rope.dimension_count", dim)
    base = meta.get("llama.rope.freq_base", 10000.0)
    eps = meta["llama.attention.layer_norm_rms_epsilon"]
    n = len(tokens)

    embedding = load(tensors, "token_embd.weight")
    x = embedding[tokens]
    for layer in range(meta["llama.block_count"]):
        def w(name):
            return load(tensors, f"blk.{layer}.{name}.weight")

        h = rms_norm(x, w("attn_norm"), eps)
        q = rope((h @ w("attn_q").T).reshape(n, n_head, dim), base, n_rot)
        k = rope((h @ w("attn_k").T).reshape(n, n_kv, dim), base, n_rot)
        v = (h @ w("attn_v").T).reshape(n, n_kv, dim)
        x = x + attention(q, k, v) @ w("attn_output").T

        h = rms_norm(x, w("ffn_norm"), eps)
        x = x + swiglu(h @ w("ffn_gate").T, h @ w("ffn_up").T) @ w("ffn_down").T

    head = load(tensors, "output.weight") if "output.weight" in tensors else embedding
    return rms_norm(x, load(tensors, "output_norm.weight"), eps) @ head.T


# ---- the file --------------------------------------------------------------------------------------------------

def write_golden(path, tokens, logits):
    n, n_vocab = logits.shape
    probe = np.sort(np.random.RandomState(PROBE_SEED).choice(n_vocab, N_PROBE, replace=False))
    with open(path, "wb") as f:
        f.write(b"LGT1" + struct.pack("<4I", n, n_vocab, N_PROBE, N_TOP))
        f.write(np.asarray(tokens, "<i4").tobytes() + probe.astype("<i4").tobytes())
        for row in logits:
            top = np.argsort(-row, kind="stable")[:N_TOP]
            f.write(struct.pack("<fi", np.abs(row).max(), top[0]))
            f.write(row[probe].astype("<f4").tobytes())
            f.write(top.astype("<i4").tobytes() + row[top].astype("<f4").tobytes())


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    meta, tensors = read_gguf(sys.argv[1])
    if meta["general.architecture"] != "llama":
        sys.exit("this script only supports the architecture \"llama\"")
    write_golden(sys.argv[2], TOKENS, forward(meta, tensors, TOKENS))


if __name__ == "__main__":
    main()
