"""Writes hf/meta-1 and hf/meta-2: tiny models as Meta publishes them, in one and two files, saved by torch.save.
logits.bin has the tokens' count, the vocabulary's size (int32), the tokens (int32) and logits (float32) of a NumPy
float64 forward pass. Needs torch. Usage: python meta.py TOKENIZER.model VOCABULARY_SIZE"""
import json
import pathlib
import shutil
import sys

import numpy as np
import torch

DIM, LAYERS, HEADS, FF = 16, 2, 2, 48
EPS = 1e-5


def forward(w, tokens, theta):
    """Logits of all positions. w: name -> float64 array. RoPE turns the pairs (2i, 2i + 1)."""
    x = w["tok_embeddings.weight"][tokens]
    n, d = len(tokens), DIM // HEADS
    angle = np.outer(np.arange(n), theta ** (-np.arange(0, d, 2) / d))
    turn = np.exp(1j * angle)[:, None]

    def norm(v, g):
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + EPS) * g

    def rotate(v):
        c = (v[..., 0::2] + 1j * v[..., 1::2]) * turn
        return np.stack([c.real, c.imag], -1).reshape(v.shape)

    for i in range(LAYERS):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = ((h @ w[p + f"attention.w{c}.weight"].T).reshape(n, HEADS, d) for c in "qkv")
        s = np.einsum("ihd,jhd->hij", rotate(q), rotate(k)) / np.sqrt(d)
        s[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        s = np.exp(s - s.max(-1, keepdims=True))
        s /= s.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", s, v).reshape(n, DIM) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        g, u = h @ w[p + "feed_forward.w1.weight"].T, h @ w[p + "feed_forward.w3.weight"].T
        x = x + (g / (1 + np.exp(-g)) * u) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def main():
    vocab = int(sys.argv[2])
    torch.manual_seed(1)
    for files, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        out = pathlib.Path(__file__).parent / "hf" / f"meta-{files}"
        out.mkdir(exist_ok=True)
        shapes = {"tok_embeddings.weight": (vocab, DIM), "norm.weight": (DIM,), "output.weight": (vocab, DIM)}
        for i in range(LAYERS):
            p = f"layers.{i}."
            shapes.update({p + f"attention.w{c}.weight": (DIM, DIM) for c in "qkvo"})
            shapes.update({p + "feed_forward.w1.weight": (FF, DIM), p + "feed_forward.w3.weight": (FF, DIM)})
            shapes.update({p + "feed_forward.w2.weight": (DIM, FF)})
            shapes.update({p + "attention_norm.weight": (DIM,), p + "ffn_norm.weight": (DIM,)})
        w = {name: (torch.randn(s) * (0.4 if len(s) == 2 else 0.1) + (len(s) == 1)).to(dtype) for name, s in shapes.items()}
        for f in range(files):
            part = {}
            for name, t in w.items():
                columns = any(c in name for c in ("wo.", "w2.", "tok_embeddings"))
                part[name] = t if t.dim() == 1 else t.chunk(files, 1 if columns else 0)[f].clone()
            torch.save(part, out / f"consolidated.{f:02}.pth")
        params = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "multiple_of": 16, "norm_eps": EPS, "vocab_size": -1}
        (out / "params.json").write_text(json.dumps(params) + "\n")
        shutil.copy(sys.argv[1], out / "tokenizer.model")
        tokens = np.array([1, 5, 9, 3, 7, 2, 8], np.int32)
        logits = forward({k: v.double().numpy() for k, v in w.items()}, tokens, 10000.0)
        head = np.array([len(tokens), vocab], np.int32)
        (out / "logits.bin").write_bytes(head.tobytes() + tokens.tobytes() + logits.astype(np.float32).tobytes())


main()
